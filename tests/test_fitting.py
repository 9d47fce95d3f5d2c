"""The GPU runs out of memory, by fault injection: the run goes on with less, and gives what less would have given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import quantkit
from quantkit import blocks, output, pipeline, solve
from quantkit.errors import MissingError
from quantkit.progress import Silent

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
Fault = Callable[[int], bool]


def recipe(model: Path, rows: int = 8, **changes: Any) -> dict[str, Any]:
    calibration = {"samples": 11, "length": 48, "batch_size": rows}
    scheme = {"preset": "W4A16", "group_size": 32}
    return {"model": str(model), "scheme": scheme, "calibration": calibration, "validate": "none", **changes}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def memory(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / output.SUMMARY).read_text())["memory"]
    return found


def batches_above(monkeypatch: pytest.MonkeyPatch, rows: int, when: Fault = lambda call: True) -> list[int]:
    """Blocks have no memory for batches of more rows; `when` chooses the calls in which that shows. The rows run."""
    run, seen = blocks.run, []

    def tight(module: Any, batch: blocks.Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(batch.hidden.shape[0])
        if seen[-1] > rows and when(len(seen)):
            raise FULL
        return run(module, batch, *args, **kwargs)

    monkeypatch.setattr(blocks, "run", tight)
    return seen


@pytest.mark.parametrize(
    "kind, changes", [("llama", {}), ("mixtral", {}), ("mistral", {"method": "rtn", "kv_cache": "fp8"})]
)
def test_smaller_batches_give_the_bytes_of_a_run_with_smaller_batches(kind, changes, tmp_path, monkeypatch):
    folder = tiny.save(tmp_path / "model", kind)
    want = quantkit.quantize(recipe(folder, 2, **changes), out=tmp_path / "small", device="cpu").out
    seen = batches_above(monkeypatch, 2)
    progress = Silent()
    got = quantkit.quantize(recipe(folder, 8, **changes), out=tmp_path / "out", device="cpu", progress=progress).out
    assert weights(got) == weights(want)
    assert memory(want) == []
    assert [(x["at"], x["batch_size"]) for x in memory(got)] == [("model.layers.0", 4), ("model.layers.0", 2)]
    assert max(seen[2:]) == 2, "a batch that was too large came back"
    assert sum("the GPU's memory ran out" in line for line in progress.warnings) == 2


def test_in_the_middle_of_running_on(tmp_path, monkeypatch):
    """The rows that are through the block stay so; only the others are cut, and every row goes through once."""
    folder = tiny.save(tmp_path / "model", num_hidden_layers=3)
    plain = quantkit.quantize(recipe(folder, 4), out=tmp_path / "plain", device="cpu")
    # Three batches are observed in calls 1 to 3, and run on in calls 4 to 6.
    seen = batches_above(monkeypatch, 2, when=lambda call: call == 5)
    got = quantkit.quantize(recipe(folder, 4), out=tmp_path / "out", device="cpu")
    assert seen[3:9] == [4, 4, 2, 2, 2, 1], "4 rows are through; 4 were cut in 2 and 2, then come the last 3"
    assert memory(got.out) == [{"at": "model.layers.0", "batch_size": 2, "hidden": "device"}]
    for a, b in zip(plain.summary["layers"], got.summary["layers"], strict=True):
        assert a["tokens"] == b["tokens"] == 11 * 48
        assert b["relative_error"] == pytest.approx(a["relative_error"], rel=0.05)


def test_without_room_to_solve_hidden_states_go_to_the_host(tmp_path, monkeypatch):
    folder = tiny.save(tmp_path / "model")
    want = quantkit.quantize(recipe(folder), out=tmp_path / "plain", device="cpu").out
    solved, calls = solve.solve, []

    def tight(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise FULL
        return solved(*args)

    monkeypatch.setattr(solve, "solve", tight)
    got = quantkit.quantize(recipe(folder), out=tmp_path / "out", device="cpu").out
    assert weights(got) == weights(want)
    assert memory(got) == [{"at": "model.layers.0", "batch_size": 8, "hidden": "host"}]
    layers = json.loads((got / output.SUMMARY).read_text())["layers"]
    assert len(layers) == 14, "a layer is told of twice"


def test_nothing_helps_and_nothing_is_lost(tmp_path, monkeypatch):
    """What does not fit ends with a sentence; what was finished is kept, and a run with room goes on from there."""
    folder = tiny.save(tmp_path / "model", num_hidden_layers=3)
    want = quantkit.quantize(recipe(folder, 1), out=tmp_path / "plain", device="cpu").out
    with monkeypatch.context() as patch:
        block = pipeline._block

        def from_the_second(run: Any, one: blocks.Block, batches: list[blocks.Batch]) -> None:
            if one.index == 1:
                batches_above(patch, 0)
            block(run, one, batches)

        patch.setattr(pipeline, "_block", from_the_second)
        with pytest.raises(MissingError, match=r"model.layers.1: does not fit into the GPU's memory.*--device cpu"):
            quantkit.quantize(recipe(folder, 1), out=tmp_path / "out", device="cpu")
    done = quantkit.quantize(recipe(folder, 1), out=tmp_path / "out", device="cpu").out
    assert weights(done) == weights(want)


def test_an_interrupted_run_goes_on_with_the_batches_it_had(tmp_path, monkeypatch):
    folder = tiny.save(tmp_path / "model", num_hidden_layers=3)
    want = quantkit.quantize(recipe(folder, 2), out=tmp_path / "small", device="cpu").out
    block = pipeline._block

    def interrupted(run: Any, one: blocks.Block, batches: list[blocks.Batch]) -> None:
        if one.index == 2:
            raise KeyboardInterrupt
        block(run, one, batches)

    with monkeypatch.context() as patch:
        batches_above(patch, 2)
        patch.setattr(pipeline, "_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantkit.quantize(recipe(folder), out=tmp_path / "out", device="cpu")
    got = quantkit.quantize(recipe(folder), out=tmp_path / "out", device="cpu").out
    assert weights(got) == weights(want)
    assert [x["batch_size"] for x in memory(got)] == [4, 2]
