"""The experts of a block, observed in several passes: the same bytes, and only a part of the statistics at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from interrupted import content, recipe

import quantkit
from quantkit import estimate, observation, passes, pipeline, shares
from quantkit import plan as planning
from quantkit.progress import Silent
from quantkit.recipe import Recipe

CPU = torch.device("cpu")
ALL = 1000  # more than there are inputs: each is a part of its own


def in_passes(count: int, monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Runs take so many passes from now on. Returns what will be observed in each, by name of linear."""
    seen: list[set[str]] = []
    real = observation.observe

    def watching(model: Any, block: Any, batches: Any, needs: Any, **how: Any) -> observation.Observed:
        seen.append({name for name, wanted in needs.items() if wanted})
        return real(model, block, batches, needs, **how)

    monkeypatch.setattr(observation, "observe", watching)
    monkeypatch.setattr(estimate, "passes_needed", lambda *_: count)
    return seen


STATIC: dict[str, Any] = {"scheme": "FP8", "kv_cache": "fp8", "method": "gptq", "transforms": ["smoothquant"]}
STATIC |= {"calibration": {"data": "builtin:pydocs", "samples": 3, "length": 32, "input_scale": "mse"}}
DRIFT = {"method": {"gptq": {"pre_shift": 0.5}}, "transforms": ["smoothquant", "awq"]}


@pytest.mark.parametrize(
    "kind, count, changes",
    [
        ("qwen3-moe", 3, {}),
        ("deepseek", ALL, {}),
        ("deepseek", 3, {"transforms": ["awq"]}),
        ("qwen3-moe", 4, DRIFT),
        ("qwen3-moe", 2, STATIC),
        ("llama4-text", 4, {"scheme": {"preset": "W8A16", "group_size": "channel"}}),
    ],
)
def test_the_bytes_are_those_of_one_pass(
    kind: str, count: int, changes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save(tmp_path / "model", kind)
    what = recipe(folder, **changes)
    want = quantkit.quantize(what, out=tmp_path / "one", device="cpu").out
    with monkeypatch.context() as patch:
        seen = in_passes(count, patch)
        got = quantkit.quantize(what, out=tmp_path / "out", device="cpu").out
    assert content(got) == content(want)
    experts = [{name for name in names if ".experts." in name} for names in seen]
    assert len([names for names in experts if names]) > 2
    assert max(map(len, experts)) < len(set().union(*experts)), "all experts of a block were observed at once"


def test_all_belong_to_one_part(tmp_path: Path) -> None:
    plan = planning.make(Recipe.from_any(recipe(tiny.save(tmp_path / "model", "deepseek"))))
    dense, mixed = plan.structure.blocks
    owners = shares.owners(mixed, plan, 1)
    assert passes.divided(plan, mixed, 1, owners, CPU) == [mixed.groups]
    assert passes.divided(plan, dense, 4, shares.owners(dense, plan, 1), CPU) == [dense.groups]
    assert passes.most(plan, CPU) == 17, "8 experts with 2 inputs each, and all else"
    for count in (2, 5, ALL):
        parts = passes.divided(plan, mixed, count, owners, CPU)
        assert sorted(g for part in parts for g in part) == sorted(mixed.groups)
        assert all(g in parts[0] for g in mixed.groups if ".experts." not in g[0])
        assert len(parts) == min(count, 17)
        rest = [sum(passes.nbytes(plan, g) for g in part) for part in parts[1:]]
        assert max(rest) <= 2 * sum(passes.nbytes(plan, g) for g in mixed.groups) / count + 64 * 64 * 4
    two = shares.owners(mixed, plan, 2)
    parts = passes.divided(plan, mixed, 3, two, CPU)
    assert sorted(g for part in parts for g in part) == sorted(mixed.groups)
    for part in parts:
        assert {two[g[0]] for g in part} == {0, 1}, "every rank has something to do in each pass"


def test_a_method_that_rounds_whole_blocks_observes_them_at_once(tmp_path: Path) -> None:
    plan = planning.make(Recipe.from_any(recipe(tiny.save(tmp_path / "model", "qwen3-moe"), method="autoround")))
    assert passes.most(plan, CPU) == 1 == estimate.passes_needed(plan, CPU)


def test_as_many_passes_as_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.save(
        tmp_path / "model", "qwen3-moe", hidden_size=512, num_experts=16, vocab_size=4096, num_hidden_layers=1
    )
    plan = planning.make(Recipe.from_any(recipe(folder)))
    base = estimate._resident()
    monkeypatch.setattr(estimate, "_resident", lambda: base)
    peaks = {n: estimate.memory(plan, CPU, passes=n).host for n in (1, 2, 4, 8)}
    assert peaks[1] - peaks[4] > 8 * 512 * 512 * 4, "statistics of experts are not counted"
    assert estimate.passes_needed(plan, CPU) == 1
    assert dict(estimate.describe(plan, device=CPU, folder=tmp_path)["facts"])["experts' statistics"].startswith("all")
    monkeypatch.setattr(estimate, "available", lambda: int(peaks[4] / estimate.SPARE) + 2 - base)
    assert estimate.passes_needed(plan, CPU) == 4
    assert estimate.memory(plan, CPU).host == peaks[4]
    told = estimate.describe(plan, device=CPU, folder=tmp_path, rehearse=True)
    assert dict(told["facts"])["time"].startswith("about ")
    assert "in 4 passes over each block" in dict(told["facts"])["experts' statistics"]
    assert not any("memory" in line for line in told["warnings"]), "it fits"
    progress = Silent()
    said: list[str] = []
    monkeypatch.setattr(progress, "_print", said.append)
    quantkit.quantize(recipe(folder), out=tmp_path / "out", device="cpu", progress=progress)
    assert any(line.startswith("experts' statistics: in 4 passes over each block") for line in said)


def test_out_of_memory_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing else to give up, experts are observed in more passes; the bytes stay."""
    folder = tiny.save(tmp_path / "model", "qwen3-moe")
    one = {"data": "builtin:pydocs", "samples": 3, "length": 32, "batch_size": 1}
    want = quantkit.quantize(recipe(folder, calibration=one), out=tmp_path / "one", device="cpu").out
    divided, seen = passes.divided, []

    def tight(plan: Any, block: Any, parts: int, *rest: Any) -> Any:
        seen.append(parts)
        if parts < 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return divided(plan, block, parts, *rest)

    monkeypatch.setattr(passes, "divided", tight)
    monkeypatch.setattr(estimate, "passes_needed", lambda *_: 1)
    got = quantkit.quantize(recipe(folder, calibration=one), out=tmp_path / "out", device="cpu")
    assert seen == [1, 1, 2, 4, 4]
    assert (got.out / "model.safetensors").read_bytes() == (want / "model.safetensors").read_bytes()
    steps = got.summary["memory"]
    assert [step.get("passes") for step in steps] == [None, 2, 4] and steps[-1]["hidden"] == "host"
    assert pipeline.passes.most(planning.make(Recipe.from_any(recipe(folder))), CPU) == 13
