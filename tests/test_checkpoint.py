"""Reading and writing safetensors: the bytes are the library's own, and every kind of damage is a clear sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantkit import checkpoint
from quantkit.checkpoint import INDEX, SINGLE, Checkpoint
from quantkit.errors import InputError, MissingError
from quantkit.shards import ShardWriter, lay_out
from quantkit.types import TensorSpec


def some_tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(5, 7, generator=g).bfloat16(),
        "a.weight_packed": torch.randint(-9, 9, (3, 3), generator=g, dtype=torch.int32),
        "a.weight_shape": torch.tensor([3, 20]),
        "a.weight_scale": torch.randn(3, 1, generator=g),
        "ü.half": torch.randn(11, generator=g).half(),
        "codes": torch.randint(0, 255, (13,), generator=g, dtype=torch.uint8),
        "fp8": torch.randn(3, 5, generator=g).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.5),
    }


def specs(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {k: TensorSpec(checkpoint.NAMES[t.dtype], tuple(t.shape)) for k, t in tensors.items()}


def write(folder: Path, tensors: dict[str, torch.Tensor], shard_size: int = 1 << 30) -> list[str]:
    writer = ShardWriter(folder, specs(tensors), shard_size)
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    return writer.close()


def test_one_shard_has_the_bytes_of_the_library(tmp_path):
    tensors = some_tensors()
    assert write(tmp_path, tensors) == [SINGLE]
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / SINGLE).read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_shards_and_index_hold_everything_once(tmp_path):
    tensors = some_tensors()
    files = write(tmp_path, tensors, shard_size=64)
    assert files[-1] == INDEX and len(files) > 3
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    found = {}
    for file in files[:-1]:
        part = load_file(tmp_path / file)
        assert all(index["weight_map"][name] == file for name in part)
        assert sum(t.nbytes for t in part.values()) <= 64 or len(part) == 1
        found.update(part)
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[k].reshape(-1).view(torch.uint8), tensors[k].reshape(-1).view(torch.uint8)) for k in found
    )
    reader = Checkpoint.open(tmp_path)
    assert reader.specs == specs(tensors)
    assert reader.size() == index["metadata"]["total_size"]
    assert torch.equal(reader.read("b.weight"), tensors["b.weight"])


@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=8),
    dtypes=st.lists(st.sampled_from(["F32", "BF16", "I8", "I64", "U8", "F16"]), min_size=8, max_size=8),
    size=st.integers(1, 400),
)
def test_layout_has_no_hole_and_no_overlap(shapes, dtypes, size):
    wanted = {f"t{i}": TensorSpec(dtypes[i], tuple(shape)) for i, shape in enumerate(shapes)}
    places, headers = lay_out(wanted, size)
    for shard, header in headers.items():
        assert len(header) % 8 == 0
        end = len(header)
        inside = sorted((p for p in places.values() if p.shard == shard), key=lambda p: (p.begin, p.end))
        for place in inside:
            assert place.begin == end
            end = place.end
    assert places.keys() == wanted.keys()


def test_writer_refuses_what_was_not_announced(tmp_path):
    tensors = some_tensors()
    writer = ShardWriter(tmp_path, specs(tensors), 1 << 30)
    with pytest.raises(ValueError, match="announced"):
        writer.write("scalar", torch.tensor(1, dtype=torch.int8))
    writer.write("scalar", tensors["scalar"])
    with pytest.raises(ValueError, match="twice"):
        writer.write("scalar", tensors["scalar"])
    with pytest.raises(ValueError, match="never written"):
        writer.close()
    writer.abort()


def test_rows_one_after_another_are_the_tensor(tmp_path):
    tensors = some_tensors()
    (tmp_path / "rows").mkdir()
    (tmp_path / "whole").mkdir()
    rows, whole = (ShardWriter(tmp_path / name, specs(tensors), 1 << 30) for name in ("rows", "whole"))
    for name, tensor in tensors.items():
        whole.write(name, tensor)
        for part in tensor.split(2) if tensor.ndim else [tensor]:
            rows.append(name, part)
    assert rows.sync() == whole.sync()
    assert rows.close() == whole.close() == [SINGLE]
    assert (tmp_path / "rows" / SINGLE).read_bytes() == (tmp_path / "whole" / SINGLE).read_bytes()


def test_rows_that_were_not_announced(tmp_path):
    writer = ShardWriter(tmp_path, {"w": TensorSpec("F32", (4, 3))}, 1 << 30)
    writer.append("w", torch.ones(3, 3))
    assert writer.sync() == {}  # a tensor is written when all of it is
    for wrong in (torch.ones(1, 2), torch.ones(1, 3, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="is not to have"):
            writer.append("w", wrong)
    with pytest.raises(ValueError, match="only 4 entries"):
        writer.append("w", torch.ones(2, 3))
    with pytest.raises(ValueError, match="never written"):
        writer.close()
    writer.abort()


def test_no_room_is_met_before_the_work(tmp_path):
    with pytest.raises(MissingError, match="no room for the output"):
        ShardWriter(tmp_path, {"w": TensorSpec("F32", (1 << 24, 1 << 24))}, 1 << 60)


@pytest.fixture
def two_shards(tmp_path):
    write(tmp_path, some_tensors(), shard_size=100)
    return tmp_path


def test_missing_shard(two_shards):
    name = next(two_shards.glob("model-00002*")).name
    (two_shards / name).unlink()
    with pytest.raises(InputError, match=f"{name}' is missing"):
        Checkpoint.open(two_shards)


def test_truncated_shard(two_shards):
    shard = next(two_shards.glob("model-00001*"))
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(InputError, match="not a complete safetensors file"):
        Checkpoint.open(two_shards)


def test_index_names_an_absent_tensor(two_shards):
    index = json.loads((two_shards / INDEX).read_text())
    index["weight_map"]["ghost"] = next(two_shards.glob("model-00001*")).name
    (two_shards / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="'ghost'"):
        Checkpoint.open(two_shards)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{", '{"weight_map": {"a": null}}']
)
def test_broken_index(two_shards, text):
    (two_shards / INDEX).write_text(text)
    with pytest.raises(InputError):
        Checkpoint.open(two_shards)


def test_index_cannot_leave_the_folder(two_shards):
    (two_shards / INDEX).write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(InputError, match="not a file of this folder"):
        Checkpoint.open(two_shards)


def test_pickles_are_refused(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickles"):
        Checkpoint.open(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="no safetensors weights"):
        Checkpoint.open(tmp_path)


def test_several_files_without_index(tmp_path):
    for name in "ab":
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match="but no"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(tmp_path, value):
    w = torch.ones(4, 4)
    w[2, 1] = value
    save_file({"layer.weight": w}, tmp_path / SINGLE)
    with pytest.raises(InputError, match=r"'layer.weight' holds 1 NaN or Inf of 16"):
        Checkpoint.open(tmp_path).read_finite("layer.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite(tmp_path, value):
    w = torch.ones(5, 4, dtype=torch.bfloat16)
    w[3, 1] = w[4, 2] = value
    save_file({"layer.weight": w}, tmp_path / SINGLE)
    rows = Checkpoint.open(tmp_path).rows("layer.weight", 2)
    assert torch.equal(next(rows), w[:2])
    with pytest.raises(InputError, match=r"'layer.weight' holds 2 NaN or Inf of 20"):
        next(rows)


def test_numbers_whose_sum_overflows_are_finite(tmp_path):
    w = torch.full((4, 4), 3e38)
    save_file({"layer.weight": w, "half": torch.full((64,), 6e4, dtype=torch.float16)}, tmp_path / SINGLE)
    source = Checkpoint.open(tmp_path)
    assert torch.equal(source.read_finite("layer.weight"), w)
    assert bool((source.read_finite("half") == 6e4).all())


def test_rows_are_those_of_the_tensor(tmp_path):
    tensors = some_tensors()
    write(tmp_path, tensors, shard_size=100)
    source = Checkpoint.open(tmp_path)
    for name, tensor in tensors.items():
        for count in (1, 2, 1000):
            rows = [part.clone() for part in source.rows(name, count)]
            found = torch.cat(rows) if tensor.ndim else rows[0]
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (found, tensor)))


def test_reading_is_lazy(tmp_path, monkeypatch):
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, tmp_path / SINGLE)
    reader = Checkpoint.open(tmp_path)
    with safe_open(tmp_path / SINGLE, "pt") as f:
        assert set(f.keys()) == set(reader.specs)
    stat = (tmp_path / SINGLE).stat()
    save_file({"a": torch.full((4,), 2.0), "b": torch.ones(4)}, tmp_path / SINGLE)
    os.utime(tmp_path / SINGLE, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # one that changed is refused
    assert reader.read("a").tolist() == [2.0] * 4
