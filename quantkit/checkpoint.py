"""Safetensors on disk: a lazy reader over shards, and a writer that knows where every byte goes before the first.

Reader: opening reads headers only; a tensor is a name, a shape and a shard until `read` is called.
Writer: names, shapes and dtypes of the output are known before the work starts, so shards are laid out, sized and
given their headers first; each tensor is then written at its own offset as soon as it exists. Memory: one tensor.
The bytes are those of safetensors' own `save_file` for the same tensors.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from quantkit.errors import InputError, MissingError
from quantkit.types import TensorSpec

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
OTHER_WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot", ".tflite")

# safetensors' names, in the order in which its serializer sorts tensors within a file (widest first)
DTYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def nbytes(spec: TensorSpec) -> int:
    """Bytes that a tensor takes on disk."""
    size = DTYPES[spec.dtype].itemsize
    for d in spec.shape:
        size *= d
    return size


def bits_per_weight(parts: Mapping[str, TensorSpec], weights: int) -> float:
    """What the tensors of a packed layer take on disk, scales included; those of its input and its bias apart.

    parts    name after the layer's own -> dtype and shape
    weights  N * K
    """
    size = sum(nbytes(spec) for leaf, spec in parts.items() if leaf != "bias" and not leaf.startswith("input_"))
    return 8 * size / weights


@dataclass(frozen=True)
class Shard:
    """A file of tensors as it was when it was looked into: its size and time, and each tensor's first byte."""

    stamp: tuple[int, int]
    begins: dict[str, int]

    @classmethod
    def of(cls, file: Path) -> Shard:
        """Reads the header, which safetensors' own reader checks first. Raises InputError as that does."""
        with _open(file), file.open("rb") as shard:
            stamp = _stamp(os.fstat(shard.fileno()))
            length = int.from_bytes(shard.read(8), "little")
            header = json.loads(shard.read(length))
        begins = {name: 8 + length + x["data_offsets"][0] for name, x in header.items() if name != "__metadata__"}
        return cls(stamp, begins)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a model folder, unread. `where` maps a tensor's name to its shard.

    shards    what is known of the files that were looked into: filled as it goes
    unlisted  tensors of the shards that the index does not name, or names in another shard: no reader reads them
    """

    folder: Path
    specs: dict[str, TensorSpec]
    where: dict[str, Path]
    shards: dict[Path, Shard] = field(default_factory=dict)
    unlisted: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Reads the headers of all shards. Raises InputError for what is missing, truncated or not safetensors."""
        files, index = _shards(folder)
        found = cls(folder, {}, {})
        for file in files:
            found.shards[file] = Shard.of(file)
            for name, spec in _header(file).items():
                if index is None or index.get(name) == file.name:
                    found.specs[name], found.where[name] = spec, file
                elif name not in index:
                    found.unlisted.append(name)
        for name, shard in (index or {}).items():
            if name not in found.specs:
                raise InputError(
                    f"{folder / INDEX}: names tensor {name!r} in {shard}, but that shard does not hold it; "
                    "the download is incomplete or the index belongs to another model"
                )
        if not found.specs:
            raise InputError(f"{folder}: its safetensors files hold no tensors")
        return found

    def read(self, name: str, entry: int | None = None) -> torch.Tensor:
        """One tensor, on the CPU, in its stored dtype. Raises InputError when its shard is not what it was.

        entry  reads one entry of its first dimension alone

        Read into memory of its own, not mapped: what is read counts once, and is free again when the tensor is.
        """
        spec, file = self.specs[name], self.where[name]
        known = self.shards.get(file) or self.shards.setdefault(file, Shard.of(file))
        tensor = torch.empty(spec.shape if entry is None else spec.shape[1:], dtype=DTYPES[spec.dtype])
        left = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            with open(file, "rb", buffering=0) as shard:
                if _stamp(os.fstat(shard.fileno())) != known.stamp:
                    raise InputError(f"{file}: has changed since it was opened; start again when it changes no more")
                offset = known.begins[name] + (entry or 0) * len(left)
                while left:
                    count = os.preadv(shard.fileno(), [left], offset)
                    if not count:
                        raise InputError(f"{file}: ends before the end of tensor {name!r}; download this shard again")
                    offset, left = offset + count, left[count:]
        except OSError as e:
            raise InputError(f"{file}: cannot be read ({e.strerror}); see that the disk is well") from None
        return tensor

    def read_finite(self, name: str, device: torch.device | str = "cpu", entry: int | None = None) -> torch.Tensor:
        """`read`, refusing NaN and Inf in a floating-point tensor; looked for on `device`, where it is returned."""
        tensor = self.read(name, entry).to(device)
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not _finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"{self.where[name]}: tensor {name!r} holds {bad} NaN or Inf of {tensor.numel()} values; "
                "the checkpoint is damaged, download it again or use another revision"
            )
        return tensor

    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(nbytes(spec) for spec in self.specs.values())


def _finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf. The extremes tell, in one pass and without a tensor of their own."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _stamp(file: os.stat_result) -> tuple[int, int]:
    return file.st_size, file.st_mtime_ns


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as e:
        size = file.stat().st_size if file.exists() else 0
        raise InputError(
            f"{file}: not a complete safetensors file ({e}; {size} bytes on disk); download this shard again"
        ) from None


def _header(file: Path) -> dict[str, TensorSpec]:
    with _open(file) as shard:
        specs = {}
        for name in shard.keys():  # noqa: SIM118 (not a dict)
            part = shard.get_slice(name)
            specs[name] = TensorSpec(str(part.get_dtype()), tuple(part.get_shape()))
            if specs[name].dtype not in DTYPES:
                raise InputError(f"{file}: tensor {name!r} has dtype {specs[name].dtype}, which quantkit does not know")
    return specs


def _shards(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The shard files of a folder, and the index's weight map when there is one."""
    index_file = folder / INDEX
    if index_file.is_file():
        try:
            weight_map = json.loads(index_file.read_text("utf-8"))["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{index_file}: not a safetensors index ({type(e).__name__}: {e})") from None
        for shard in shards:
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise InputError(f"{index_file}: names the shard {shard!r}, which is not a file of this folder")
            if not (folder / shard).is_file():
                raise InputError(f"{folder}: shard {shard} is missing, though {INDEX} names it; download it again")
        return [folder / s for s in shards], weight_map
    single = folder / SINGLE
    found = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found, None
    if found:
        raise InputError(f"{folder}: {len(found)} safetensors files but no {INDEX} to say which tensor is where")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise InputError(
            f"{folder}: its weights are pickles ({', '.join(pickles[:3])}), which can run code when opened and are "
            "refused; convert them to safetensors first, or use a revision that has safetensors"
        )
    raise InputError(f"{folder}: no safetensors weights ({SINGLE} or {INDEX})")


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

    Raises MissingError when the disk has no room for the whole checkpoint, before anything is computed.
    """

    def __init__(
        self, folder: Path, specs: Mapping[str, TensorSpec], shard_size: int, shards: Shards | None = None
    ) -> None:
        self.folder = folder
        self._shards = shards
        self._specs = dict(specs)
        self._places, headers = lay_out(specs, shard_size)
        self._left = set(specs)
        self._lock = threading.Lock()  # tensors may come from several threads
        self._missing = Counter(place.shard for place in self._places.values())
        self._files: dict[str, int] = {}
        ends: dict[str, int] = {shard: len(header) for shard, header in headers.items()}
        for place in self._places.values():
            ends[place.shard] = max(ends[place.shard], place.end)
        for shard, header in headers.items():
            handle = os.open(folder / shard, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            self._files[shard] = handle
            try:
                _reserve(handle, ends[shard])
            except OSError as e:
                self.abort()
                raise MissingError(
                    f"{folder}: no room for the output, {sum(ends.values()):,} bytes ({e.strerror}); free some"
                ) from None
            os.pwrite(handle, header, 0)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor to its place. Shape and dtype must be the announced ones."""
        spec = TensorSpec(NAMES[tensor.dtype], tuple(tensor.shape))
        if spec != self._specs[name]:
            raise ValueError(f"{name} was announced as {self._specs[name]} but is {spec}")
        if name not in self._left:
            raise ValueError(f"{name} is written twice")
        place = self._places[name]
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        data = memoryview(raw)  # type: ignore[arg-type]
        offset = place.begin
        while data:
            count = os.pwrite(self._files[place.shard], data, offset)
            offset, data = offset + count, data[count:]
        with self._lock:
            self._left.remove(name)
            self._missing[place.shard] -= 1
            whole = not self._missing[place.shard]
        if self._shards is not None and whole:
            os.fsync(self._files[place.shard])
            self._shards.finished(self.folder / place.shard)

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


def _reserve(handle: int, size: int) -> None:
    """Asks the disk for `size` bytes now, so that a full disk is met before hours of work and not after."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.ftruncate(handle, size)


def is_other_weights(file: Path) -> bool:
    """True for weight files in any format and their indexes: they are rewritten or dropped, never copied."""
    return file.suffix in OTHER_WEIGHTS or file.name.endswith((".safetensors.index.json", ".bin.index.json"))


def other_files(folder: Path) -> Iterable[Path]:
    """Every file of a model folder that is not hidden, relative to it, in a fixed order."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield relative
