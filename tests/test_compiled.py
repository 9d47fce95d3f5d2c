"""quantkit compile: a package of the decoding step gives the same tokens, and is refused where it does not fit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import packed_models
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from quantkit import presets
from quantkit.cli import app
from quantkit.errors import InputError, MissingError
from quantkit.runtime import compiled
from quantkit.runtime.generate import KEPT, generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    packed_models.save(folder, "compressed-tensors", presets.PRESETS["W4A16"])
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ids(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(4, 4096, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_a_package_gives_the_same_tokens(folder: Path, model: Any, tmp_path: Path) -> None:
    made = compiled.compile_step(model, tmp_path / "step", batch=2, slots=64)
    assert made.compile_seconds > 0 and made.bytes > 0
    mask = torch.ones_like(ids())
    mask[0, :4] = 0
    for own in (None, mask):
        plain = generate(model, ids(), 20, eos_token_id=[], attention_mask=own)
        ours = generate(model, ids(), 20, eos_token_id=[], attention_mask=own, compile=made.folder)
        assert torch.equal(ours, plain)
    kept = model.__dict__[KEPT].decoder
    short = generate(model, ids(length=3), 5, eos_token_id=[], compile=made.folder)
    assert model.__dict__[KEPT].decoder is kept, "any shorter sequence goes with the package's cache"
    assert torch.equal(short, generate(model, ids(length=3), 5, eos_token_id=[]))
    assert compiled.compile_step(model, made.folder, batch=2, slots=64).compile_seconds == 0
    # The package has the model's own weights, in place.
    plain = generate(model, ids(), 8, eos_token_id=[])
    with torch.no_grad():
        model.model.embed_tokens.weight.neg_()
        try:
            changed = generate(model, ids(), 8, eos_token_id=[], compile=made.folder)
            assert torch.equal(changed, generate(model, ids(), 8, eos_token_id=[]))
            assert not torch.equal(changed, plain)
        finally:
            model.model.embed_tokens.weight.neg_()


@pytest.mark.slow
def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.CACHE, str(tmp_path))
    result = CliRunner().invoke(app, ["compile", str(folder), "--length", "32", "--device", "cpu"])
    assert result.exit_code == 0, result.stderr
    made = next((tmp_path / "compiled").iterdir())
    assert {file.name for file in made.iterdir()} == {compiled.CODE, compiled.FACTS}
    assert "loaded in" in result.stdout and "without weights" in result.stdout
    # bfloat16 on a CPU: codes take the order of torch's own product, which a model that never ran has not yet.
    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ours = generate(fresh, ids(1), 12, eos_token_id=[], compile=made)
    assert (ours == generate(fresh, ids(1), 12, eos_token_id=[])).float().mean() > 0.8


def write(folder: Path, facts: compiled.Facts) -> None:
    folder.mkdir()
    (folder / compiled.FACTS).write_text(json.dumps(vars(facts)))
    (folder / compiled.CODE).write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"torch": "1.0"}, "another state of torch: 1.0"),
        ({"machine": "sm_80"}, "another state of the machine: sm_80"),
        ({"tensors": "x"}, "the model's config, or its tensors: x"),
        ({"attention": "eager"}, "another state of the attention: eager"),
        ({"version": 0}, "the version of packages: 0"),
    ],
)
def test_a_package_for_something_else_is_refused(
    model: Any, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    facts = compiled.facts_of(model, 2, 64)
    write(tmp_path / "step", compiled.Facts(**{**vars(facts), **change}))
    for call in (compiled.load, lambda m, f: compiled.compile_step(m, f, batch=2, slots=64)):
        with pytest.raises(InputError, match=words):
            call(model, tmp_path / "step")
    with pytest.raises(InputError, match=words):
        generate(model, ids(), 4, compile=str(tmp_path / "step"))


def test_what_is_no_package_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no package; quantkit compile makes one"):
        compiled.load(model, tmp_path)
    write(tmp_path / "broken", compiled.facts_of(model, 2, 64))
    with pytest.raises(InputError, match="the package cannot be loaded"):
        compiled.load(model, tmp_path / "broken")
    (tmp_path / "letter").mkdir()
    (tmp_path / "letter" / "text").write_text("dear reader")
    with pytest.raises(InputError, match="holds something else; choose another --out"):
        compiled.compile_step(model, tmp_path / "letter", batch=2, slots=64)


def test_the_facts_follow_the_model(model: Any) -> None:
    facts = compiled.facts_of(model, 2, 64)
    assert facts == compiled.facts_of(copy.deepcopy(model), 2, 64)
    assert facts.folder != compiled.facts_of(model, 2, 128).folder
    other = copy.deepcopy(model)
    other.config.rms_norm_eps *= 2
    assert compiled.facts_of(other, 2, 64).tensors != facts.tensors
    other = copy.deepcopy(model).to(torch.bfloat16)
    assert compiled.facts_of(other, 2, 64) != facts


def test_calls_that_a_package_is_not_for(tmp_path: Path) -> None:
    package = compiled.Package(tmp_path, lambda *inputs: inputs[0], 2, 64)
    package.check_fits(2, 64, None)
    for arguments, words in (
        ((1, 20, None), "for a batch of 2, this is 1"),
        ((2, 65, None), "for 64 tokens; 65 are needed"),
        ((2, 20, "fp8"), "leave out past_key_values"),
    ):
        with pytest.raises(InputError, match=words):
            package.check_fits(*arguments)


def test_without_a_compiler(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(MissingError, match=r"a C\+\+ compiler is needed"):
        compiled.compile_step(model, tmp_path / "step", batch=1, slots=32)
