"""Hidden states between blocks: where they wait, and the copy on disk from which an interrupted run goes on.

On a GPU they stay where they are computed, or wait in page-locked memory of the host, which a GPU reads and writes
without waiting. Where the host has no room for them either, they wait in files without a name that are mapped into
memory: the system writes what it has no room for, and reads it again. They are gone with the process.

The copy on disk is one safetensors file a block, in the run's dtype: written under another name, made durable, then
renamed; the file before it goes only when the journal names the new one. So two of them are on the disk at most, and
one that the journal names is always whole.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from quantkit import heap
from quantkit.blocks import Batch, on_disk
from quantkit.checkpoint import NAMES, Checkpoint
from quantkit.errors import InputError, MissingError
from quantkit.journal import sync
from quantkit.progress import Progress
from quantkit.ranks import ALONE, Parcel, Ranks
from quantkit.shards import ShardWriter
from quantkit.types import TensorSpec

LARGE = 64 << 20  # bytes of all of them from which on a thread makes them durable
SHARE = 0.25  # of the GPU memory that is free: what hidden states may take of it
HOST_SHARE = 0.5  # of the host's
KEPT = ("hidden", "dense")
WHOLE = 1 << 62  # bytes a shard: all in one file


def chosen(size: int, wanted: str, device: torch.device) -> str:
    """Where hidden states wait: "device", "host" or "disk".

    size    bytes of all of them
    wanted  one of those, or "auto": the first of them that has memory enough free. A CPU has no other than the host's
    """
    if wanted == "disk" or (wanted == "host" and device.type != "cpu"):
        return wanted
    if device.type != "cpu" and (wanted == "device" or size <= torch.cuda.mem_get_info(device)[0] * SHARE):
        return "device"
    free = heap.available()
    return "disk" if wanted == "auto" and free and size > free * HOST_SHARE else "host"


def say(size: int, where: str, device: torch.device, progress: Progress) -> None:
    """Tells where hidden states of so many bytes wait, when it is not where they are computed anyway."""
    if device.type != "cpu" or where == "disk":
        words = {"device": "on the GPU", "host": "on the host", "disk": "in a file on the disk"}[where]
        progress.say(f"hidden states: {size / 2**30:.1f} GiB, {words} between blocks")


def keeping(where: str, device: torch.device, folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """What is done with the hidden states of a batch: left where they are, or copied to the host or into `folder`."""
    if where == "disk":
        return functools.partial(to_disk, folder)
    return to_host if where == "host" and device.type != "cpu" else _stay


def _stay(x: torch.Tensor) -> torch.Tensor:
    return x


def to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy in page-locked memory of the host, which a GPU reads and writes without waiting."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=torch.cuda.is_available()).copy_(x)


def to_disk(folder: Path, x: torch.Tensor) -> torch.Tensor:
    """A copy in a file that is mapped into memory and has no name. Raises MissingError for a full disk."""
    try:
        with tempfile.TemporaryFile(dir=folder if folder.is_dir() else None) as file:  # other machines have no such one
            if hasattr(os, "posix_fallocate"):  # a hole that the disk has no room for would end the process
                os.posix_fallocate(file.fileno(), 0, max(1, x.nbytes))
            name = f"/dev/fd/{file.fileno()}"
            found = torch.from_file(name, shared=True, size=x.numel(), dtype=x.dtype).view(x.shape)
    except OSError as e:
        raise MissingError(
            f"{folder}: the hidden states of a batch ({x.nbytes:,} bytes) cannot be kept there: {e.strerror or e}; "
            "free some of the disk, or set calibration.hidden to host"
        ) from None
    return found.copy_(x)


def settle(device: torch.device | str) -> None:
    """Returns when copies to the host that a GPU was told to make are there: they are not waited for otherwise."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def size(batches: Sequence[Batch]) -> int:
    """Bytes of what is kept of batches."""
    return sum(x.nbytes for batch in batches for x in _tensors(batch, ALONE, "cpu"))


def snapshot(batches: Sequence[Batch], device: torch.device | str, room: Sequence[Batch] = ()) -> list[Batch]:
    """Batches for `save` alone, with the hidden states as they are now, whatever becomes of them; on the host.

    device  where blocks are computed: on the CPU each gives new tensors, so nothing is copied
    room    an earlier snapshot that is not needed any more, of which the memory is used again
    """
    if torch.device(device).type == "cpu" and not any(on_disk(b.hidden) for b in batches):
        return [Batch(b.hidden, b.mask, [], b.dense) for b in batches]
    found = []
    for i, batch in enumerate(batches):
        old = _tensors(room[i], ALONE, "cpu") if i < len(room) else []
        kept = _tensors(batch, ALONE, "cpu")
        same = len(old) == len(kept) and all(
            x.shape == y.shape and x.dtype == y.dtype for x, y in zip(old, kept, strict=True)
        )
        copies = [y.copy_(x) for x, y in zip(kept, old, strict=True)] if same else [to_host(x) for x in kept]
        found.append(Batch(copies[0], batch.mask, [], copies[1] if len(copies) > 1 else None))
    return found


def save(
    folder: Path, k: int, batches: Sequence[Batch], ranks: Ranks = ALONE, device: torch.device | str = "cpu"
) -> dict[str, int]:
    """Makes the hidden states before block k durable, on rank 0's disk. Returns each tensor's checksum, for `load`.

    batches  of this rank; they are numbered as they were dealt, so that other ranks may go on
    device   by which ranks exchange tensors
    Raises MissingError when the disk has no room for them.
    """
    fresh, final = folder / f"{k}.new", folder / str(k)
    specs, rounds = _specs(batches, ranks), ranks.told(len(batches))
    writer: ShardWriter | None = None
    try:
        if ranks.first:
            for left in (fresh, final):  # by a run that ended before its journal spoke of them
                shutil.rmtree(left, ignore_errors=True)
            fresh.mkdir(parents=True)
            writer = _writer(fresh, specs)
        for i in range(rounds):
            mine = [Parcel(ranks.rank + i * ranks.size, [0], _tensors(b, ranks, device)) for b in batches[i : i + 1]]
            for number, _, tensors in ranks.deliver(mine, device):
                assert writer is not None
                for name, x in zip(KEPT, tensors, strict=False):
                    writer.write(f"{name}.{number}", x)
        if writer is None:
            return {}
        sums = writer.sync()
        writer.close()
    finally:
        if writer is not None:
            writer.abort()
    sync(fresh)
    os.rename(fresh, final)
    sync(folder)
    return sums


def load(
    folder: Path,
    k: int,
    sums: Mapping[str, int],
    batches: Sequence[Batch],
    ranks: Ranks = ALONE,
    device: torch.device | str = "cpu",
) -> None:
    """Puts the hidden states before block k, as `save` left them, into batches that are at the first block.

    Raises InputError when they are not there, or not what was written.
    """
    specs, rounds = _specs(batches, ranks), ranks.told(len(batches))
    found = _open(folder / str(k), specs, sums) if ranks.first else Checkpoint(folder, {}, {})
    for i in range(rounds):
        parcels = []
        for number in range(i * ranks.size, (i + 1) * ranks.size) if ranks.first else ():
            names = [f"{name}.{number}" for name in KEPT if f"{name}.{number}" in specs]
            if names:
                to = number % ranks.size
                tensors = [found.read(name) if ranks.alone else found.read(name).to(device) for name in names]
                parcels.append(Parcel(number, [to], tensors))
        for _, _, tensors in ranks.deliver(parcels, device):
            batch = batches[i]
            batch.hidden = _put(tensors[0], batch.hidden)
            if batch.dense is not None:
                batch.dense = _put(tensors[1], batch.dense)


def _open(folder: Path, specs: Mapping[str, TensorSpec], sums: Mapping[str, int]) -> Checkpoint:
    try:
        if not folder.is_dir():
            raise InputError(f"{folder} is missing")
        found = Checkpoint.open(folder)
        if found.specs != specs or sums.keys() != specs.keys():
            raise InputError(f"{folder}: other tensors than these calibration rows have")
        ShardWriter(folder, specs, WHOLE, written=sums).abort()  # compares every tensor with its checksum
    except InputError as e:
        raise InputError(
            f"the hidden states from which the run would go on cannot be read ({e}); start over with --fresh"
        ) from None
    return found


def _writer(folder: Path, specs: Mapping[str, TensorSpec]) -> ShardWriter:
    try:
        return ShardWriter(folder, specs, WHOLE)
    except MissingError as e:
        raise MissingError(f"hidden states: {e}") from None


def _tensors(batch: Batch, ranks: Ranks, device: torch.device | str) -> list[torch.Tensor]:
    """What is kept of a batch, by `KEPT`; where ranks exchange it."""
    kept = [batch.hidden] if batch.dense is None else [batch.hidden, batch.dense]
    return kept if ranks.alone else [x.to(device).contiguous() for x in kept]


def _specs(batches: Sequence[Batch], ranks: Ranks) -> dict[str, TensorSpec]:
    """Of what is kept of all ranks' batches."""
    mine = [[(NAMES[x.dtype], list(x.shape)) for x in _tensors(batch, ALONE, "cpu")] for batch in batches]
    found = {}
    for rank, listed in enumerate(ranks.everyone(mine)):
        for i, tensors in enumerate(listed):
            for name, (dtype, shape) in zip(KEPT, tensors, strict=False):
                found[f"{name}.{rank + i * ranks.size}"] = TensorSpec(dtype, tuple(shape))
    return found


def _put(x: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Where the tensor waits that `x` takes the place of."""
    return (
        there.copy_(x) if on_disk(there) or (there.device.type == "cpu" and there.is_pinned()) else x.to(there.device)
    )


def drop(folder: Path, before: int) -> None:
    """Removes the hidden states before all blocks below `before`."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if int(path.name.split(".")[0]) < before:
            shutil.rmtree(path)
