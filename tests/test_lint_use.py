"""Where the engines' rules are used: before `quantize` starts, and by `quantkit lint`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lint_checkpoints import ALL, LAYER, Checkpoints, says
from typer.testing import CliRunner

import quantkit
from quantkit import lint
from quantkit import plan as planning
from quantkit.cli import app
from quantkit.errors import InputError
from quantkit.recipe import Recipe

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("lint"))


# Before the work -----------------------------------------------------------------------------------------------------


def test_quantize_refuses_what_an_engine_would_not_load(made: Checkpoints, tmp_path: Path) -> None:
    settings = made.settings("W4A16", export={"engines": ["tensorrt-llm"]})
    with pytest.raises(InputError) as caught:
        quantkit.quantize(settings, out=tmp_path / "out", device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("tensorrt-llm: ", f"{LAYER}.", " and 6 more", "int4 weights per group of 128", "rule supported"):
        assert part in message
    assert "or leave the engine out of export.engines" in message
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match=r"transformers: .*modelopt is unknown"):
        planning.make(Recipe.from_any(made.settings("NVFP4", export={"format": "modelopt"})))


def test_warnings_go_to_the_plan(made: Checkpoints) -> None:
    plan = planning.make(Recipe.from_any(made.settings("W4A16_ASYM", export={})))
    assert len(plan.warnings) == 1 and plan.warnings[0].startswith("transformers: ")
    assert planning.make(Recipe.from_any(made.settings("W4A16", export={}))).warnings == ()
    rules = [{"match": "*k_proj", "scheme": "none"}]
    with pytest.raises(InputError, match="rule fused_all_or_none"):
        planning.make(Recipe.from_any(made.settings("W4A16", export={}, rules=rules)))
    assert planning.make(Recipe.from_any(made.settings("W4A16", export={"engines": ["transformers"]}, rules=rules)))


@pytest.mark.parametrize("preset", ["W4A16", "FP8_BLOCK", "NVFP4A16", "W8A8"])
def test_the_plan_and_the_folder_are_judged_alike(preset: str, made: Checkpoints) -> None:
    plan = planning.make(Recipe.from_any(made.settings(preset)))
    before = lint.check(planning.described(plan), lint.names())
    after = lint.folder(made.clean(preset))
    key = ("rule", "engine", "level", "what")
    assert {tuple(getattr(f, k) for k in key) for f in before} == {tuple(getattr(f, k) for k in key) for f in after}


# The command ---------------------------------------------------------------------------------------------------------


def run(*args: object) -> Any:
    return CliRunner().invoke(app, ["lint", *map(str, args)])


def test_the_command(made: Checkpoints) -> None:
    clean = run(made.clean(), "--engine", "vllm", "--engine", "transformers")
    assert clean.exit_code == 0
    assert "0 errors, 0 warnings" in clean.stdout and "sglang" not in clean.stdout
    broken = run(made.clean())
    assert broken.exit_code == 2
    assert broken.stderr.endswith("1 error, for tensorrt-llm\n")
    assert "supported" in broken.stdout and len(broken.stderr.splitlines()) == 1
    assert run(made.clean(), "--engine", "vllm", "--tp", "4").exit_code == 2
    wrong = run(made.clean(), "--engine", "vlm")
    assert wrong.exit_code == 2 and "unknown engine vlm; did you mean vllm?" in wrong.stderr


def test_what_cannot_be_checked(made: Checkpoints, tmp_path: Path) -> None:
    for folder, message in ((made.model(), "is not quantized"), (tmp_path / "absent", "no such folder")):
        result = run(folder)
        assert result.exit_code == 2 and message in result.stderr
    folder = made.copy(made.clean(), quantization=lambda q: q.update(quant_method="novel"))
    assert "checkpoints of quant_method 'novel' are not known" in run(folder).stderr


def test_a_model_that_transformers_does_not_know(made: Checkpoints) -> None:
    folder = made.copy(made.clean(), config=lambda c: c.update(model_type="novel"))
    found = lint.folder(folder, ["vllm"])
    assert [(f.rule, f.level) for f in found] == [("tensors_accounted", "warning")]
    assert "tensors were not compared" in found[0].fix
    folder = made.copy(folder, quantization=lambda q: q.update(ignore=[]))
    assert says(folder, "ignore_list") == ALL  # lm_head is known by its looks


def test_no_config_can_crash_it(made: Checkpoints) -> None:
    """Any value of the quantization_config may be nonsense: it is a finding, or one sentence."""
    clean = made.clean("W8A8")
    config = json.loads((clean / "config.json").read_text())
    folder = made.copy(clean)

    nonsense: list[Any] = [None, 5, "x", [], ["x", 5], {}, {"x": {}}]

    def spoil(node: Any) -> None:
        for key in list(node if isinstance(node, dict) else range(len(node))):
            good = node[key]
            for junk in nonsense:
                node[key] = junk
                (folder / "config.json").write_text(json.dumps(spoilt))
                try:
                    assert all(f.where and f.what and f.fix for f in lint.folder(folder))
                except InputError as error:
                    assert "quant_method" in str(error) or "not quantized" in str(error)
            node[key] = good
            if isinstance(good, dict | list):
                spoil(good)

    spoilt = copy.deepcopy(config)
    spoil(spoilt["quantization_config"])


def test_every_rule_has_a_source_and_a_test() -> None:
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_lint*.py"))
    for name in lint.names():
        for rule in lint.get(name).RULES:
            assert f'"{rule.__name__}"' in text, rule.__name__
            assert rule.__doc__ and len(rule.__doc__) > 40, rule.__name__
