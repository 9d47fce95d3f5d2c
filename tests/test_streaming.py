"""Weights that need no calibration: the bytes of rounding whole groups at once, from a few tensors in memory."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit import blocks, solve, streaming
from quantkit import plan as planning
from quantkit.checkpoint import Checkpoint
from quantkit.errors import InputError
from quantkit.progress import Silent
from quantkit.recipe import Recipe
from quantkit.resuming import Finished
from quantkit.shards import ShardWriter
from quantkit.skeleton import Skeleton

CPU = torch.device("cpu")
SCHEMES: list[Any] = [
    {"preset": "W8A16", "group_size": 32},
    {"preset": "W4A16_ASYM", "group_size": 32},
    "FP8_DYNAMIC",
    {"weights": {"number": "fp8_e4m3", "strategy": "tensor"}},
    "MXFP4A16",
    "NVFP4A16",
]


def settled(model: object, scheme: Any = "FP8_DYNAMIC", **changes: Any) -> Recipe:
    return Recipe.from_any({"model": str(model), "scheme": scheme, "method": "rtn", "validate": "none", **changes})


def streamed(plan: planning.Plan, folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    folder.mkdir()
    writer = ShardWriter(folder, plan.specs, plan.recipe.export.shard_bytes)
    finished = Finished(None)
    streaming.stream(plan, writer, CPU, Silent(), finished)
    writer.close()
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}, finished.report.layers


def at_once(plan: planning.Plan) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The same by the functions that a calibrated run uses: each group stacked, whole weights."""
    found, reports, source = {}, [], plan.skeleton.checkpoint
    for block in plan.structure.blocks:
        for group in block.groups:
            for alike in solve.by_scheme([plan.linears[m] for m in group if plan.linears[m].scheme]):
                for x in solve.solve(plan, alike, [source.read(f"{y.name}.weight") for y in alike], None):
                    assert x.layer.scheme is not None
                    for suffix, tensor in plan.format.pack(x.tensor, x.layer.scheme.activations, None).items():
                        found[f"{x.layer.name}.{suffix}"] = tensor
                    reports.append(x.report)
    return found | {name: source.read(name) for name in plan.specs if name not in found}, reports


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


@pytest.mark.parametrize("kind", ["llama-tied", "qwen3-moe"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s if isinstance(s, str) else s.get("preset", "tensor"))
def test_the_bytes_of_rounding_whole_groups_at_once(scheme, kind, tmp_path, monkeypatch):
    monkeypatch.setitem(streaming.ELEMENTS, "cpu", 25 * 64)  # several rows at a time, and some left over
    changes: dict[str, Any] = {"num_experts": 3} if kind == "qwen3-moe" else {}
    folder = tiny.save(tmp_path / "model", kind, vocab_size=256, **changes)
    plan = planning.make(settled(folder, scheme, export={"engines": []}))
    assert not plan.needs_data
    (got, lines), (want, expected) = streamed(plan, tmp_path / "out"), at_once(plan)
    assert got.keys() == want.keys() == plan.specs.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert same(got[name], tensor), name
    assert lines == expected


def test_tiles_of_rows_are_not_cut(tmp_path, monkeypatch):
    monkeypatch.setitem(streaming.ELEMENTS, "cpu", 1)
    folder = tiny.save(tmp_path / "model", hidden_size=256, intermediate_size=384, head_dim=64, num_hidden_layers=1)
    plan = planning.make(settled(folder, "FP8_BLOCK"))
    (got, lines), (want, expected) = streamed(plan, tmp_path / "out"), at_once(plan)
    assert all(same(got[name], want[name]) for name in plan.specs)
    assert lines == expected


def test_neither_jobs_nor_threads_nor_rows_change_a_byte(tmp_path, monkeypatch):
    folder = tiny.save(tmp_path / "model", vocab_size=256)
    threads = torch.get_num_threads()
    outs = []
    for jobs, rows, count in [(4, 1 << 18, 2), (2, 640, 1), (3, 3000, 3)]:
        monkeypatch.setattr(streaming, "JOBS", jobs)
        monkeypatch.setitem(streaming.ELEMENTS, "cpu", rows)
        torch.set_num_threads(count)
        try:
            result = quantkit.quantize(settled(folder), out=tmp_path / f"out-{jobs}", device="cpu")
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)
        outs.append({p.name: p.read_bytes() for p in result.out.iterdir()})
    assert outs[0] == outs[1] == outs[2]


def test_the_model_is_neither_filled_nor_run(tmp_path, monkeypatch):
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model is not to be built")

    plan = planning.make(settled(tiny.save(tmp_path / "model")))
    for owner, name in [(Skeleton, "load"), (Skeleton, "put"), (blocks, "begin"), (torch.nn.Module, "__call__")]:
        monkeypatch.setattr(owner, name, never)
    _, lines = streamed(plan, tmp_path / "out")
    assert len(lines) == len(plan.quantized)


def test_an_error_ends_it_and_what_has_not_begun_is_left(tmp_path, monkeypatch):
    folder = tiny.save(tmp_path / "model", num_hidden_layers=8)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    seen: list[str] = []
    read = Checkpoint.read

    def noted(self: Checkpoint, name: str, *args: Any) -> torch.Tensor:
        seen.append(name)
        return read(self, name, *args)

    monkeypatch.setattr(Checkpoint, "read", noted)
    with pytest.raises(InputError, match=r"'model.layers.1.mlp.up_proj.weight' holds 1 NaN or Inf"):
        quantkit.quantize(settled(folder), out=tmp_path / "out")
    assert not [name for name in seen if name.startswith("model.layers.7.")]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["changed", "gone", "shorter"])
def test_a_source_that_changes_under_the_run(what, tmp_path):
    folder = tiny.save(tmp_path / "model")
    source = Checkpoint.open(folder)
    file = folder / "model.safetensors"
    if what == "changed":
        save_file(load_file(file), file)
    elif what == "gone":
        file.unlink()
    else:
        with file.open("r+b") as f:
            f.truncate(file.stat().st_size - 8)
    with pytest.raises(InputError, match=r"has changed since|cannot be read"):
        source.read("model.norm.weight")


def test_what_is_read_is_what_safetensors_reads(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "codes": torch.randint(0, 255, (7, 3), dtype=torch.uint8),
        "eight": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "bits": torch.tensor([True, False, True]),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = Checkpoint.open(tmp_path)
    for name, tensor in tensors.items():
        got = source.read(name)
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert same(got, tensor)


@pytest.mark.parametrize(("layers", "scheme"), [(2, "FP8_DYNAMIC"), (12, "FP8_DYNAMIC"), (2, "NVFP4A16")])
def test_some_rows_of_a_few_tensors_are_all_that_is_read_or_written_at_once(layers, scheme, tmp_path, monkeypatch):
    """Whatever the number of layers; neither a weight, nor its codes, nor a tensor that is copied is held whole."""
    monkeypatch.setitem(streaming.ELEMENTS, "cpu", 10 * 64)
    monkeypatch.setattr(streaming, "JOBS", 2)
    lock, opened, most, read, written = threading.Lock(), [0], [0], [0], [0]
    opening, append = Checkpoint._opened, ShardWriter.append

    @contextlib.contextmanager
    def counted(self: Checkpoint, name: str) -> Any:
        def filling(tensor: torch.Tensor, offset: int) -> None:
            read[0] = max(read[0], tensor.numel())
            fill(tensor, offset)

        with opening(self, name) as fill:
            with lock:
                opened[0] += 1
                most[0] = max(most[0], opened[0])
            yield filling
            with lock:
                opened[0] -= 1

    def appended(self: ShardWriter, name: str, rows: torch.Tensor) -> None:
        written[0] = max(written[0], rows.numel())
        append(self, name, rows)

    monkeypatch.setattr(Checkpoint, "_opened", counted)
    monkeypatch.setattr(ShardWriter, "append", appended)
    folder = tiny.save(tmp_path / "model", num_hidden_layers=layers, vocab_size=512)
    plan = planning.make(settled(folder, scheme, export={"engines": []}))
    streamed(plan, tmp_path / "out")
    assert read[0] == written[0] == 10 * 64
    assert 1 <= most[0] <= 2
    assert opened[0] == 0


def test_a_format_that_has_no_rows_is_packed_whole(tmp_path, monkeypatch):
    monkeypatch.setitem(streaming.ELEMENTS, "cpu", 10 * 64)
    folder = tiny.save(tmp_path / "model", vocab_size=256)
    scheme = {"preset": "W4A16", "group_size": 32}
    plan = planning.make(settled(folder, scheme, export={"format": "gptq", "engines": []}))
    assert not streaming.packs_rows(plan.format)
    (got, lines), (want, expected) = streamed(plan, tmp_path / "out"), at_once(plan)
    assert all(same(got[name], want[name]) for name in plan.specs)
    assert lines == expected


def test_nan_in_later_rows_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(streaming.ELEMENTS, "cpu", 10 * 64)
    folder = tiny.save(tmp_path / "model")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][-1, 3] = float("nan")
    save_file(tensors, file)
    with pytest.raises(InputError, match=rf"{name}' holds 1 NaN or Inf of {tensors[name].numel()} values"):
        streamed(planning.make(settled(folder)), tmp_path / "out")
