"""Safetensors on disk, read lazily: a tensor is a name, a shape and a shard until `read` is called.

Opening reads headers only. A shard of a Hub model need not be on this machine before `read`. Their writer is in
shards.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from quantkit import hub, numerics
from quantkit.errors import InputError
from quantkit.hub_shards import HubShards
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
    """The weights of a model, unread. `where` maps a tensor's name to its shard.

    hub       fetches the shards of a Hub model as they are read; None for a folder
    shards    what is known of the files that were looked into: filled as it goes
    unlisted  tensors of the shards that the index does not name, or names in another shard: no reader reads them
    """

    folder: Path
    specs: dict[str, TensorSpec]
    where: dict[str, Path]
    hub: HubShards | None = None
    shards: dict[Path, Shard] = field(default_factory=dict)
    unlisted: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, hub: HubShards | None = None) -> Checkpoint:
        """Reads the headers of all shards. Raises InputError for what is missing, truncated or not safetensors."""
        here = (path.name for path in folder.glob("*.safetensors") if path.is_file())  # a pipe is not waited for
        names = set(here) if hub is None else set(hub.names)
        files, index = _shards(folder, names)
        found = cls(folder, {}, {}, hub)
        away = [] if hub is None else [file.name for file in files if hub.files.here(file.name) is None]
        headers = {} if hub is None else hub.headers(away)
        for file in files:
            if file.name in away:
                specs = _parsed(file, headers[file.name], hub.size(file.name) if hub else 0)
            else:
                specs = _header(file)  # first: it refuses what is no safetensors
                found.shards[file] = Shard.of(file)
            for name, spec in specs.items():
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
        A shard that is not on this machine is fetched, with the errors of `HubFiles.fetch`.
        """
        spec = self.specs[name]
        tensor = torch.empty(spec.shape if entry is None else spec.shape[1:], dtype=DTYPES[spec.dtype])
        with self._opened(name) as fill:
            fill(tensor, (entry or 0) * tensor.nbytes)
        return tensor

    def rows(self, name: str, count: int, device: torch.device | str = "cpu") -> Iterator[torch.Tensor]:
        """`read_finite` of a tensor, `count` entries of its first dimension at a time; a scalar at once.

        On the CPU each takes the place of the one before it in memory: what is to be kept must be copied.
        """
        spec, done = self.specs[name], 0
        entries = spec.shape[0] if spec.shape else 1
        shape = (min(count, entries), *spec.shape[1:]) if spec.shape else ()
        buffer = torch.empty(shape, dtype=DTYPES[spec.dtype])
        with self._opened(name) as fill:
            while done < max(1, entries):
                part = buffer[: entries - done] if spec.shape else buffer
                fill(part, done * (nbytes(spec) // max(1, entries)))
                done += count
                if not _sound(found := part.to(device)):
                    self.read_finite(name)  # which counts what is wrong in all of it
                yield found

    @contextmanager
    def _opened(self, name: str) -> Iterator[Callable[[torch.Tensor, int], None]]:
        """What fills a tensor with the bytes of the tensor `name` from one of them on; with the errors of `read`."""
        file = self.where[name]

        def fill(tensor: torch.Tensor, offset: int) -> None:
            left = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            offset += known.begins[name]
            while left:
                count = os.preadv(shard.fileno(), [left], offset)
                if not count:
                    raise InputError(f"{file}: ends before the end of tensor {name!r}; download this shard again")
                offset, left = offset + count, left[count:]

        with self.hub.reading(file.name) if self.hub is not None else nullcontext():
            known = self.shards.get(file) or self.shards.setdefault(file, Shard.of(file))
            try:
                with open(file, "rb", buffering=0) as shard:
                    if (stamp := _stamp(os.fstat(shard.fileno()))) != known.stamp:
                        if self.hub is None or stamp[0] != known.stamp[0]:
                            raise InputError(
                                f"{file}: has changed since it was opened; start again when it changes no more"
                            )
                        known = self.shards[file] = Shard.of(file)  # fetched again, compared with the Hub's hash
                    yield fill
            except OSError as e:
                raise InputError(f"{file}: cannot be read ({e.strerror}); see that the disk is well") from None

    def read_small(self, name: str) -> torch.Tensor:
        """`read` of a tensor of few values, for which no shard is fetched: it alone travels."""
        file = self.where[name]
        if self.hub is None or self.hub.files.here(file.name) is not None:
            return self.read(name)
        header = self.hub.headers([file.name])[file.name]
        begin, end = json.loads(header[8:])[name]["data_offsets"]
        content = self.hub.files.part(file.name, len(header) + begin, len(header) + end)
        spec = self.specs[name]
        return torch.frombuffer(bytearray(content), dtype=DTYPES[spec.dtype]).reshape(spec.shape)

    def expect(self, steps: Sequence[Iterable[str]], at: int) -> None:
        """Says that the tensors of step `at` are read now, and those of the later steps after it: a Hub model's shards
        are fetched ahead, and deleted afterwards where that was asked for.
        """
        if self.hub is not None:
            now, *later = self.in_shards(steps[at:])
            self.hub.step(now, (name for step in later for name in step))

    def in_shards(self, steps: Sequence[Iterable[str]]) -> list[list[str]]:
        """The shards that hold the tensors of each step."""
        return [list(dict.fromkeys(self.where[name].name for name in step)) for step in steps]

    def headers(self) -> Iterator[tuple[str, int, bytes]]:
        """Name, size in bytes and header of each shard, by name."""
        for file in sorted(set(self.where.values())):
            if self.hub is not None:
                yield file.name, self.hub.size(file.name), self.hub.headers([file.name])[file.name]
                continue
            with file.open("rb") as f:
                first, size = f.read(8), file.stat().st_size
                header = first + f.read(min(int.from_bytes(first, "little"), size, 1 << 27))
                yield file.name, size, header

    def read_finite(self, name: str, device: torch.device | str = "cpu", entry: int | None = None) -> torch.Tensor:
        """`read`, refusing NaN and Inf in a floating-point tensor; looked for on `device`, where it is returned."""
        tensor = self.read(name, entry).to(device)
        if not _sound(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"{self.where[name]}: tensor {name!r} holds {bad} NaN or Inf of {tensor.numel()} values; "
                "the checkpoint is damaged, download it again or use another revision"
            )
        return tensor

    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(nbytes(spec) for spec in self.specs.values())


def _sound(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN or Inf; of a float of 8 bits that is not asked."""
    return not (tensor.is_floating_point() and tensor.dtype.itemsize > 1) or numerics.finite(tensor)


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
    return _known(file, specs)


def _known(file: Path, specs: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    for name, spec in specs.items():
        if spec.dtype not in DTYPES:
            raise InputError(f"{file}: tensor {name!r} has dtype {spec.dtype}, which quantkit does not know")
    return specs


def _parsed(file: Path, raw: bytes, size: int) -> dict[str, TensorSpec]:
    """The tensors of a shard of `size` bytes that is not on this machine, by its header."""
    try:
        entries = {name: x for name, x in json.loads(raw[8:]).items() if name != "__metadata__"}
        specs = {name: TensorSpec(str(x["dtype"]), tuple(map(int, x["shape"]))) for name, x in entries.items()}
        ends = {name: [int(end) for end in x["data_offsets"]] for name, x in entries.items()}
        end = len(raw) + max((last for _, last in ends.values()), default=0)
        wrong = [name for name, spec in _known(file, specs).items() if _misplaced(spec, *ends[name])]
        if wrong:
            raise ValueError(f"{wrong[0]!r} does not have the bytes of its shape")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as e:
        raise InputError(f"{file}: its header on the Hub is not one of safetensors ({type(e).__name__}: {e})") from None
    if end != size:
        raise InputError(
            f"{file}: is {end:,} bytes by its header, and {size:,} on the Hub; it was not uploaded whole, use another "
            "revision"
        )
    return specs


def _misplaced(spec: TensorSpec, begin: int, end: int) -> bool:
    return begin < 0 or min(spec.shape, default=0) < 0 or end - begin != nbytes(spec)


def _shards(folder: Path, there: Collection[str]) -> tuple[list[Path], dict[str, str] | None]:
    """The shard files of a model, and the index's weight map when there is one. there: safetensors files that exist."""
    index_file = folder / INDEX
    if index_file.is_file():
        weight_map = read_index(folder)
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if Path(shard).name != shard:
                raise InputError(f"{index_file}: names the shard {shard!r}, which is not a file of this folder")
            if shard not in there:  # also for a name that no file can have
                raise InputError(f"{folder}: shard {shard!r} is missing, though {INDEX} names it; download it again")
        return [folder / s for s in shards], weight_map
    found = [folder / SINGLE] if SINGLE in there else [folder / name for name in sorted(there)]
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


def read_index(folder: Path) -> dict[str, str]:
    """The index of a folder: tensor -> shard. Raises InputError for anything else."""
    weight_map = hub.read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{folder / INDEX}: not a safetensors index: its weight_map does not name a shard a tensor")
    return weight_map


def is_other_weights(file: Path) -> bool:
    """True for weight files in any format and their indexes: they are rewritten or dropped, never copied."""
    return file.suffix in OTHER_WEIGHTS or file.name.endswith((".safetensors.index.json", ".bin.index.json"))


def other_files(folder: Path) -> Iterable[Path]:
    """Every file of a model folder that is not hidden, relative to it, in a fixed order.

    Raises InputError for a link to a file elsewhere, but for weights: what it leads to would be copied, and published.
    """
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            if path.is_symlink() and not is_other_weights(path) and not _is_inside(path.resolve(), folder.resolve()):
                raise InputError(
                    f"{path}: is a link to {path.resolve()}, outside the model's folder; put the file itself there"
                )
            yield relative


def _is_inside(file: Path, folder: Path) -> bool:
    """Whether a file belongs to a folder; the Hub's cache keeps those of snapshots/REVISION in blobs, beside it."""
    blobs = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
    return file.is_relative_to(folder) or file.is_relative_to(blobs)
