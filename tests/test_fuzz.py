"""Bad checkpoints and recipes: a thousand cases each time, and by name what such cases have found.

`python tests/fuzz.py` runs as many as one likes; the slow test here runs 100,000.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fuzz
import pytest
import tiny
from fuzz_mutations import Mutator
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import comparison, formats, hub, inspection, patterns, strict_yaml
from quantkit.checkpoint import INDEX, SINGLE, Checkpoint, other_files
from quantkit.errors import InputError
from quantkit.output import copy_files
from quantkit.recipe import Recipe

SEED = 20261123
FEW = {
    "convert": 6,
    "config": 8,
    "held": 6,
    "inspect": 6,
    "lint": 6,
    "recipe": 25,
    "mapping": 25,
    "yaml": 60,
    "summary": 15,
}


@pytest.fixture(scope="module")
def beds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[fuzz.Beds, fuzz.Watch]]:
    root = tmp_path_factory.mktemp("fuzz").resolve() / "root"
    found = fuzz.Beds(root)
    yield found, fuzz.Watch(found)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_nothing_but_a_sentence_comes_of_damage(name: str, beds: tuple[fuzz.Beds, fuzz.Watch]) -> None:
    found = fuzz.Found()
    for number in range(FEW.get(name, 5 * fuzz.TARGETS[name][1])):
        fuzz.one(name, number, SEED, *beds, found)
    assert found.findings == {}
    assert found.refused  # the damage is seen


@pytest.mark.slow
def test_nothing_but_a_sentence_comes_of_100_000_cases() -> None:
    script = Path(fuzz.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "--cases", "100000", "--seed", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_watch_sees_what_it_watches_for(
    beds: tuple[fuzz.Beds, fuzz.Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that crashes, hangs, takes memory, and opens what it may not."""
    own, watch = beds
    kept: list[bytes] = []
    bad = {
        "crash": lambda m, b: [][1],
        "hang": lambda m, b: all(iter(lambda: True, False)),
        "memory": lambda m, b: kept.append(b"\1" * (fuzz.MEMORY + (1 << 22))),
        "outside": lambda m, b: (b.outside / "canary.txt").read_bytes(),
        "written": lambda m, b: (b.outside / "new").write_bytes(b""),
    }
    monkeypatch.setattr(fuzz, "LIMIT", 0.2)
    seen = {}
    for name, target in bad.items():
        monkeypatch.setitem(fuzz.TARGETS, name, (target, 1))
        found = fuzz.Found(cases=100)
        fuzz.one(name, 0, 0, own, watch, found)
        seen[name] = " ".join(found.findings)
    assert "IndexError" in seen["crash"] and "Hang" in seen["hang"] and "memory" in seen["memory"]
    assert "opened /outside/canary.txt" in seen["outside"] and "opened /outside/new" in seen["written"]


def test_the_same_seed_does_the_same_damage() -> None:
    content = {"a": [1, {"b": "c"}], "d": None}
    one, two, other = (Mutator(seed) for seed in ("x", "x", "y"))
    same = [(one.json(content), one.blob(b"0123456789")) for _ in range(50)]
    assert same == [(two.json(content), two.blob(b"0123456789")) for _ in range(50)]
    assert same != [(other.json(content), other.blob(b"0123456789")) for _ in range(50)]


# What hypothesis thinks of --------------------------------------------------------------------------------------------

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    LEAVES, lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=8), inside, max_size=4)
)


@settings(max_examples=40, deadline=None)
@given(content=st.dictionaries(st.text(max_size=8), JSON, max_size=5), method=st.sampled_from(formats.names()))
def test_any_mapping_is_a_readable_config_or_not(content: dict[str, object], method: str) -> None:
    module = formats.get(method)
    read = module.read_config({**content, "quant_method": module.QUANT_METHOD})  # never raises for content
    if read.unsupported is None:
        read.scheme_for("model.layers.0.self_attn.q_proj")


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="ab01 \n:-[]{}'\"&*!|>%@#,?~.", max_size=40))
def test_any_text_is_a_recipe_or_a_sentence(text: str) -> None:
    with pytest.raises(InputError):
        Recipe.parse(text)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=64), length=st.integers(0, 2**64 - 1))
def test_any_bytes_are_a_checkpoint_or_a_sentence(tmp_path_factory, data: bytes, length: int) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    (folder / SINGLE).write_bytes(length.to_bytes(8, "little") + data)
    with pytest.raises(InputError):
        Checkpoint.open(folder)


# What was found, by name ----------------------------------------------------------------------------------------------


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "model", "llama", vocab_size=64, num_hidden_layers=1)


def set_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["a" * 300 + ".safetensors", "x\0y", "..", "", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_with_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match=r"is missing|not a file of this folder"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["a" * 5000, "~nobody-of-that-name/x", "~\0", "builtin:" + "a" * 5000, "\0"])
def test_names_that_no_model_has(name: str) -> None:
    with pytest.raises(InputError):
        hub.resolve(name)


def test_a_pipe_is_not_waited_for(dense: Path) -> None:
    before = hub.Source("x", dense).fingerprint()
    os.mkfifo(dense / "a.safetensors")
    assert hub.Source("x", dense).fingerprint() == before
    (dense / SINGLE).unlink()
    with pytest.raises(InputError, match="no safetensors weights"):
        Checkpoint.open(dense)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, '{"a": "\\ud800"}'])
def test_json_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match="not readable as JSON"):
        hub.read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "pattern, why",
    [
        ("(" * 2000 + ")" * 2000, "nested too deeply"),
        ("a{99999999999}", "counts in braces"),
        ("((a{1000}){1000}){1000}", "counts in braces"),
        ("(", "missing"),
        ("a" * 5000, "characters"),
    ],
)
def test_patterns_that_are_refused(pattern: str, why: str) -> None:
    with pytest.raises(patterns.PatternError, match=why):
        patterns.compiled(pattern)
    with pytest.raises(InputError, match="not a valid regular expression"):
        Recipe.from_any({"model": "x", "scheme": "W4A16", "rules": [{"match": f"re:{pattern}", "scheme": "none"}]})


def test_a_pattern_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    slow, name = r"(?:\w|\w\w|\.)*(?:\w|\w\w|\.)*(?:\w\w|\w|\.)*[^\w.]", "model.layers.0.self_attn.q_proj" * 3
    with pytest.raises(InputError, match="takes more than"):
        patterns.matches(slow, name)
    quantization = {"quant_method": "gptq", "bits": 4, "dynamic": {f"-:{slow}": {}}}
    with pytest.raises(InputError, match="takes more than"):
        formats.get("gptq").read_config(quantization).scheme_for(name)


@pytest.mark.parametrize(
    "text, why",
    [
        ("[" * 30_000, "nested too deeply"),
        ("- " * 30_000, "nested too deeply"),
        ("a: !!timestamp x", "the tag"),
        ("a: !!int ''", "the tag"),
        ("a: !!bool maybe", "the tag"),
        ("a: 0x" + "f" * 6000, "characters"),
        ('a: "\\ud800"', "surrogate"),
    ],
)
def test_yaml_that_is_refused(text: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        strict_yaml.parse(text, "recipe.yaml")


def test_a_size_beyond_all_sizes() -> None:
    with pytest.raises(InputError, match="expected a size"):
        Recipe.from_any({"model": "x", "scheme": "W4A16", "export": {"shard_size": "9" * 400 + "GB"}})


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1e\\+09, but the shards hold 12 tensors"),
        ({"vocab_size": 10**9}, "makes a model of .* but the shards have"),
        ({"intermediate_size": 10**9}, "makes a model of .* but the shards have"),
        ({"hidden_size": "x"}, "hidden_size"),
        ({"pad_token_id": 99}, "Padding_idx"),
        ({"head_dim": 0}, "config.json|cannot build"),
    ],
)
def test_a_config_that_asks_for_too_much(dense: Path, changes: dict[str, object], why: str) -> None:
    set_config(dense, **changes)
    with pytest.raises(InputError, match=why):
        inspection.inspect(str(dense))


def test_links_out_of_the_folder_are_not_copied(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (dense / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="outside the model's folder"):
        copy_files(dense, tmp_path / "out", [])


def test_links_of_the_hubs_cache_are_files_of_the_model(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    folder, blobs = repo / "snapshots" / "0123", repo / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (folder / "tokenizer.json").symlink_to("../../blobs/abc")
    assert list(other_files(folder)) == [Path("tokenizer.json")]


def test_a_damaged_summary_is_a_sentence(dense: Path) -> None:
    (dense / "quantkit.json").write_text(json.dumps({"layers": [{"relative_error": 1}], "validation": {}}))
    with pytest.raises(InputError, match=r"quantkit.json: layers.0.name"):
        comparison.read([dense])
