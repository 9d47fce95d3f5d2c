"""Validation: more windows where fewer decide nothing, repair of what fails, outputs side by side."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import comparison, convert, output, repair
from quantkit import plan as planning
from quantkit.errors import InputError
from quantkit.progress import Silent
from quantkit.recipe import Recipe
from quantkit.recipe.validation import Repair

CHECK: dict[str, Any] = {
    "perplexity": {"data": "builtin:pydocs-heldout", "windows": 4, "length": 32},
    "generation": {"prompts": 2, "tokens": 4},
}


class Listening(Silent):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sharper than a fresh one, so that rounding changes what it says, and layers differ in what they lose."""
    folder = tiny.save(tmp_path_factory.mktemp("validation") / "model")
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i, (name, p) in enumerate(found.named_parameters()):
            if p.ndim == 2:
                p.mul_(6 if "lm_head" in name else 2)
                heavy = torch.rand(p.shape, generator=generator) < 0.002 * (i % 5)
                p[heavy] = p[heavy] * 3
    found.save_pretrained(folder)
    return folder


def recipe(model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "scheme": {"preset": "W3A16", "group_size": 32},
        "method": "rtn",
        "export": {"engines": ["transformers"]},
        "validate": CHECK,
        **changes,
    }


@pytest.fixture(scope="module")
def first(model: Path, tmp_path_factory: pytest.TempPathFactory) -> quantkit.Result:
    check = {**CHECK, "gates": {}, "perplexity": {**CHECK["perplexity"], "windows": 24}}
    return quantkit.quantize(recipe(model, validate=check), out=tmp_path_factory.mktemp("first") / "out")


def test_what_is_measured_is_told(first: quantkit.Result) -> None:
    found = json.loads((first.out / output.SUMMARY).read_text())["validation"]
    assert found["status"] == "validated" and found["gates"] == [] and found["comparison"]["windows"] == 24
    assert 0 < found["flips"]["rate"]["value"] <= 1 and found["flips"]["floor"] == 0
    assert found["flips"]["prompts"] == 2 and found["flips"]["tokens"] == 4


def test_more_windows_decide_what_few_do_not(model: Path, first: quantkit.Result, tmp_path: Path) -> None:
    """A limit a little above what 24 windows gave: 4 cannot tell, more can, and the sample is one."""
    assert first.validation is not None
    found = first.validation.comparison
    limit = found.kl + 2.5 * (found.kl_stderr or 0)
    check = {**CHECK, "gates": {"kl": limit}, "perplexity": {**CHECK["perplexity"], "most": 60}}
    progress = Listening()
    result = quantkit.quantize(recipe(model, validate=check), out=tmp_path / "out", progress=progress)
    assert result.validation is not None
    (judged,) = result.validation.gates
    assert 4 < judged.samples <= 60 and result.validation.comparison.windows == judged.samples
    assert any(line.startswith("validation: 4 windows do not decide kl; going on to") for line in progress.said)
    own = quantkit.validate(result.out, windows=judged.samples, gates={})
    assert own.comparison.kl_by_window == pytest.approx(result.validation.comparison.kl_by_window)


def test_what_stays_undecided_is_no_success(model: Path, first: quantkit.Result, tmp_path: Path) -> None:
    assert first.validation is not None
    limit = sum(first.validation.comparison.kl_by_window[:4]) / 4
    check = {**CHECK, "gates": {"kl": limit}, "perplexity": {**CHECK["perplexity"], "most": 4}}
    result = quantkit.quantize(recipe(model, validate=check), out=tmp_path / "out")
    assert result.validation is not None and result.validation.status == "failed"
    assert "Not proved: kl is" in result.validation.message and "it would take" in result.validation.message


def test_gates_given_to_validate_are_checked_like_a_recipes(first: quantkit.Result) -> None:
    with pytest.raises(InputError, match=r"gate kl: Input should be greater than or equal to 0; got -1"):
        quantkit.validate(first.out, gates={"kl": -1})
    with pytest.raises(InputError, match="gate perplexty: Extra inputs"):
        quantkit.validate(first.out, gates={"perplexty": 1.1})
    warned = quantkit.validate(first.out, gates={"kl": {"limit": 0.0, "level": "warn"}})
    assert warned.status == "validated" and warned.gates[0].outcome == "fail"


# Repair --------------------------------------------------------------------------------------------------------------


def test_repair_takes_the_worst_groups_twice_as_many_each_time(model: Path, first: quantkit.Result) -> None:
    plan = planning.make(Recipe.from_any(recipe(model)))
    layers = first.summary["layers"]
    errors = {x["name"]: x["relative_error"] for x in layers}
    steps: list[repair.Step] = []
    while step := repair.next_step(plan, Repair(size=100), layers, steps[-1] if steps else None):
        steps.append(step)
    assert [len(s.groups) for s in steps] == [1, 2, 4, 8]
    worst = max(errors, key=lambda name: errors[name])
    assert worst.rpartition(".")[2] in steps[0].groups[0] and worst.rpartition(".")[0] in steps[0].groups[0]
    for before, after in itertools.pairwise(steps):
        assert after.groups[: len(before.groups)] == before.groups
        assert after.plan.output_bytes > before.plan.output_bytes
    assert steps[0].scheme == "W8A16-g32"
    assert all(x.scheme is not None and x.scheme.weights.number == "int8" for x in steps[-1].plan.quantized)


def test_repair_keeps_its_budget(model: Path, first: quantkit.Result) -> None:
    plan = planning.make(Recipe.from_any(recipe(model)))
    layers = first.summary["layers"]
    assert repair.next_step(plan, Repair(size=1.0), layers, None) is None
    largest, step = None, repair.next_step(plan, Repair(size=1.02), layers, None)
    while step is not None:
        largest, step = step, repair.next_step(plan, Repair(size=1.02), layers, step)
    assert largest is not None and largest.plan.output_bytes <= 1.02 * plan.output_bytes


def test_what_fails_is_repaired_and_says_what_it_cost(model: Path, first: quantkit.Result, tmp_path: Path) -> None:
    assert first.validation is not None
    limit = first.validation.comparison.kl / 2
    check = {**CHECK, "gates": {"kl": limit}, "repair": {"size": 3}, "perplexity": {**CHECK["perplexity"], "most": 40}}
    progress = Listening()
    result = quantkit.quantize(recipe(model, validate=check), out=tmp_path / "out", progress=progress)
    assert result.validation is not None and result.validation.status == "validated"
    cost = result.summary["repair"]
    assert cost["steps"][-1]["status"] == "validated" and cost["steps"][-1]["kl"] < limit
    assert cost["steps"][-1]["output_bytes"] > cost["first_bytes"]
    (told,) = [line for line in progress.said if line.startswith("repair: kl is")][:1]
    assert "Again, with W8A16-g32 for model.layers" in told
    on_disk = json.loads((result.out / output.SUMMARY).read_text())
    assert on_disk["repair"] == cost and on_disk["status"] == "validated"
    # The recipe beside the weights is that of the repaired output: it gives the same bytes without repairing.
    again = quantkit.quantize(result.out / output.RECIPE, out=tmp_path / "again")
    assert "repair" not in again.summary
    assert (again.out / "model.safetensors").read_bytes() == (result.out / "model.safetensors").read_bytes()
    bits = {x["name"]: x["bits_per_weight"] for x in on_disk["layers"]}
    assert min(bits.values()) < 4 < 8 < max(bits.values())


def test_what_cannot_be_repaired_stays_failed(model: Path, tmp_path: Path) -> None:
    check = {**CHECK, "gates": {"kl": 0.0}, "repair": {"size": 1.0}}
    progress = Listening()
    result = quantkit.quantize(recipe(model, validate=check), out=tmp_path / "out", progress=progress)
    assert result.validation is not None and result.validation.status == "failed" and "repair" not in result.summary
    assert "repair: no more layers can be kept in higher precision within validate.repair.size" in progress.said


def test_a_scheme_that_will_not_do_is_told_before_the_work(model: Path, tmp_path: Path) -> None:
    check = {**CHECK, "gates": {"kl": 0.0}, "repair": {"scheme": "W8A16"}}
    with pytest.raises(InputError, match=r"validate\.repair: W8A16 will not do here, give another scheme: .*128"):
        quantkit.quantize(recipe(model, validate=check), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("given", "size"), [("true", 1.25), ("{size: 2}", 2.0), ("false", None), ("none", None)])
def test_forms_of_repair(given: str, size: float | None) -> None:
    settled = Recipe.parse(f"model: m\nscheme: W4A16\nvalidate: {{repair: {given}}}\n")
    assert settled.validation is not None
    assert (settled.validation.repair.size if settled.validation.repair else None) == size
    assert Recipe.parse(settled.to_yaml()) == settled


# Side by side --------------------------------------------------------------------------------------------------------


def test_outputs_side_by_side(model: Path, first: quantkit.Result, tmp_path: Path) -> None:
    check = {**CHECK, "gates": {}, "perplexity": {**CHECK["perplexity"], "windows": 24}}
    scheme = {"preset": "W8A16", "group_size": 32}
    second = quantkit.quantize(recipe(model, scheme=scheme, validate=check), out=tmp_path / "better")
    found = comparison.read([first.out, second.out])
    section = comparison.report(found)
    assert [row[0] for row in section["table"]["rows"]] == ["better", "out"] and section["warnings"] == []
    assert section["table"]["rows"][0][1:3] == ["W8A16-g32", "rtn"]
    assert "| better | W8A16-g32 | rtn |" in comparison.markdown(section)
    comparison.write(found, tmp_path / "compared")
    for name in ("report.html", "compare.svg"):
        drawn = (tmp_path / "compared" / name).read_text()
        assert drawn.count("<use ") > 2 and ">better<" in drawn
    content = json.loads((tmp_path / "compared" / "results.json").read_text())
    assert [x["kl"] for x in content["outputs"]] == [x["kl"] for x in found]
    quantkit.validate(second.out, windows=3, gates={})
    (warning,) = comparison.report(comparison.read([first.out, second.out]))["warnings"]
    assert "measured on different windows (better: 3 of 32 tokens" in warning


def test_what_cannot_stand_side_by_side(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no quantkit\.json"):
        comparison.read([model])
    out = quantkit.quantize(recipe(model, validate="none"), out=tmp_path / "out").out
    with pytest.raises(InputError, match="was not measured; run quantkit validate"):
        comparison.read([out])


def test_the_packed_output_diverges_as_its_decoded_codes_do(tmp_path: Path) -> None:
    recipe = {"model": "builtin:pydocs-llama-7m", "scheme": "W4A16", "method": "rtn"}
    few = {"perplexity": {"windows": 4, "length": 256}, "gates": {"kl": 1.0}}
    packed = quantkit.quantize({**recipe, "validate": few}, out=tmp_path / "packed", device="cpu")
    convert.convert(packed.out, "dense", tmp_path / "dense")
    dense = quantkit.validate(tmp_path / "dense", against="builtin:pydocs-llama-7m", windows=4, length=256)
    assert packed.validation is not None and packed.validation.comparison.kl > 0.01
    assert abs(packed.validation.comparison.kl - dense.comparison.kl) < 2e-4
