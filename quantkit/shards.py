"""Writes safetensors, knowing where every byte goes before the first.

Names, shapes and dtypes of the output are known before the work starts, so shards are laid out, sized and given their
headers first; each tensor, or its next rows, is then written at its own offset as soon as it exists. The bytes are
those of safetensors' own `save_file` for the same tensors.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from quantkit.checkpoint import DTYPES, INDEX, NAMES, SINGLE, nbytes
from quantkit.errors import InputError, MissingError
from quantkit.types import TensorSpec

CHUNK = 1 << 24  # bytes read at once, where a file is only compared
AGAIN = "put it back as it was, or start over with --fresh"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its shard and its first and last byte in the file."""

    shard: str
    begin: int
    end: int


def lay_out(specs: Mapping[str, TensorSpec], shard_size: int) -> tuple[dict[str, Place], dict[str, bytes]]:
    """Fixes every byte of a checkpoint: where each tensor goes, and the header of each shard.

    Tensors fill shards in the given order, up to `shard_size` bytes a shard (one tensor may exceed it).
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + nbytes(spec) > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes(spec)
    rank = {dtype: i for i, dtype in enumerate(DTYPES)}
    places: dict[str, Place] = {}
    headers: dict[str, bytes] = {}
    for i, names in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in sorted(names, key=lambda n: (rank[specs[n].dtype], n)):
            end = offset + nbytes(specs[name])
            entries[name] = {
                "dtype": specs[name].dtype,
                "shape": list(specs[name].shape),
                "data_offsets": [offset, end],
            }
            offset = end
        header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % 8)
        headers[file] = len(header).to_bytes(8, "little") + header
        for name in names:
            begin, end = entries[name]["data_offsets"]
            places[name] = Place(file, begin + len(headers[file]), end + len(headers[file]))
    return places, headers


class Shards(Protocol):
    """Whoever wants to know when a shard is whole, as one who sends it somewhere while the next is written."""

    def finished(self, file: Path) -> None:
        """All tensors of the file are in it and on the disk. Must not take long."""

    def dropped(self) -> None:
        """The files so far are not wanted any more, and go away."""

    def wait(self) -> None:
        """The files are wanted and about to move: returns when they may."""


class ShardWriter:
    """Writes tensors into shards that are laid out beforehand, in any order, each exactly once.

    folder      an existing folder
    specs       every tensor that will be written
    shard_size  bytes of tensors a shard
    shards      is told of each file when it is whole
    written     tensors that an earlier writer of the same specs has written there, with their checksums; they are read
                and compared. None: the shards are new

    Raises MissingError when the disk has no room for the whole checkpoint, before anything is computed; InputError when
    what was written is not there.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, TensorSpec],
        shard_size: int,
        shards: Shards | None = None,
        written: Mapping[str, int] | None = None,
    ) -> None:
        self.folder = folder
        self._shards = shards
        self._specs = dict(specs)
        self._places, headers = lay_out(specs, shard_size)
        self._left = set(specs) - set(written or ())
        self._lock = threading.Lock()  # tensors may come from several threads
        self._missing = Counter(self._places[name].shard for name in self._left)
        self._sums: dict[str, int] = {}
        self._begun: dict[str, tuple[int, int]] = {}  # where the next entry of a tensor goes, and the checksum so far
        self._files: dict[str, int] = {}
        ends: dict[str, int] = {shard: len(header) for shard, header in headers.items()}
        for place in self._places.values():
            ends[place.shard] = max(ends[place.shard], place.end)
        try:
            for shard, header in headers.items():
                if written is None:
                    self._files[shard] = _create(folder / shard, header, ends[shard], sum(ends.values()))
                else:
                    self._files[shard] = _reopen(folder / shard, header, ends[shard])
            for name, expected in (written or {}).items():
                self._check(name, expected)
        except BaseException:
            self.abort()
            raise
        for shard in sorted(headers.keys() - self._missing.keys()):  # an earlier writer finished it
            self._whole(shard)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor to its place. Shape and dtype must be the announced ones."""
        spec = TensorSpec(NAMES[tensor.dtype], tuple(tensor.shape))
        if spec != self._specs[name]:
            raise ValueError(f"{name} was announced as {self._specs[name]} but is {spec}")
        if name not in self._left:
            raise ValueError(f"{name} is written twice")
        self.append(name, tensor)

    def append(self, name: str, rows: torch.Tensor) -> None:
        """Writes the next entries of a tensor's first dimension. With the last of them the tensor is written.

        Those of one tensor come from one thread, in order; dtype and the other dimensions must be the announced ones.
        """
        spec, place = self._specs[name], self._places[name]
        data = memoryview(rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        if name not in self._left or NAMES[rows.dtype] != spec.dtype or tuple(rows.shape[1:]) != spec.shape[1:]:
            raise ValueError(f"{name}, {spec}, is not to have {rows.dtype} {tuple(rows.shape)} here")
        offset, crc = self._begun.pop(name, (place.begin, 0))
        if offset + len(data) > place.end:
            raise ValueError(f"{name} has only {spec.shape[0]} entries")
        crc = zlib.crc32(data, crc)
        while data:
            count = os.pwrite(self._files[place.shard], data, offset)
            offset, data = offset + count, data[count:]
        if offset < place.end:
            self._begun[name] = (offset, crc)
        else:
            self._done(name, place.shard, crc)

    def _done(self, name: str, shard: str, crc: int) -> None:
        """Notes that a tensor is written."""
        with self._lock:
            self._left.remove(name)
            self._sums[name] = crc
            self._missing[shard] -= 1
            whole = not self._missing[shard]
        if whole:
            self._whole(shard)

    def sync(self, names: Iterable[str] | None = None) -> dict[str, int]:
        """Makes tensors that were written durable. Returns the CRC-32 of each.

        names  of them; None: all that were not taken before
        """
        sums = self.take(names)
        self.flush(sums)
        return sums

    def take(self, names: Iterable[str] | None = None) -> dict[str, int]:
        """The CRC-32 of tensors that were written, which is told once; names as for `sync`."""
        with self._lock:
            return {name: self._sums.pop(name) for name in (list(self._sums) if names is None else names)}

    def flush(self, names: Iterable[str]) -> None:
        """Makes the shards of tensors that were written durable. May be called while others are written."""
        for shard in sorted({self._places[name].shard for name in names}):
            os.fsync(self._files[shard])

    def close(self) -> list[str]:
        """Makes everything durable and writes the index. Returns the files written. All tensors must be there."""
        if self._left:
            raise ValueError(f"{len(self._left)} tensors were never written, {sorted(self._left)[0]} among them")
        for handle in self._files.values():
            os.fsync(handle)
            os.close(handle)
        files = list(self._files)
        self._files = {}
        if len(files) > 1:
            total = sum(nbytes(spec) for spec in self._specs.values())
            weight_map = {name: self._places[name].shard for name in sorted(self._specs)}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
            files.append(INDEX)
        return files

    def abort(self) -> None:
        """Closes the files as they are. The folder is the caller's to remove."""
        for handle in self._files.values():
            os.close(handle)
        self._files = {}

    def _whole(self, shard: str) -> None:
        if self._shards is not None:
            os.fsync(self._files[shard])
            self._shards.finished(self.folder / shard)

    def _check(self, name: str, expected: int) -> None:
        place = self._places.get(name)
        crc, offset = 0, place.begin if place else 0
        while place and offset < place.end:
            data = os.pread(self._files[place.shard], min(CHUNK, place.end - offset), offset)
            crc, offset = zlib.crc32(data, crc), offset + len(data)
        if place is None or crc != expected:
            where = f"{self.folder / place.shard}: {name}" if place else f"{self.folder}: {name}"
            raise InputError(f"{where} is not what the run wrote there: the file was changed or damaged since; {AGAIN}")


def _create(file: Path, header: bytes, size: int, total: int) -> int:
    """A new shard with its header, all of its room reserved."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        _reserve(handle, size)
        os.pwrite(handle, header, 0)
    except OSError as e:
        os.close(handle)
        raise MissingError(
            f"{file.parent}: no room for the output, {total:,} bytes ({e.strerror}); free some"
        ) from None
    return handle


def _reopen(file: Path, header: bytes, size: int) -> int:
    """A shard that an earlier writer made."""
    try:
        handle = os.open(file, os.O_RDWR)
    except FileNotFoundError:
        raise InputError(f"{file}: is missing, though the run has written to it; {AGAIN}") from None
    found = os.fstat(handle).st_size
    if found != size or os.pread(handle, len(header), 0) != header:
        os.close(handle)
        what = (
            f"has {found:,} bytes instead of {size:,}" if found != size else "has another header than the run gave it"
        )
        raise InputError(f"{file}: {what}: the file was changed or damaged since; {AGAIN}")
    return handle


def _reserve(handle: int, size: int) -> None:
    """Asks the disk for `size` bytes now, so that a full disk is met before hours of work and not after."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.ftruncate(handle, size)
