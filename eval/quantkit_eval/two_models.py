"""An original and its quantized model: both in memory, or, where they do not fit together, one after the other."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint import DTYPES, OTHER_WEIGHTS, Checkpoint, nbytes
from quantkit.errors import InputError
from quantkit.types import TensorSpec

SHARE = 0.9  # of the memory that is free
CGROUP = Path("/sys/fs/cgroup")


class TwoModels:
    """Loads each model when it is first asked for. One after the other, what was loaded makes room for it.

    Whoever asks for a model must not hold on to it: memory is free only when nobody does.
    """

    def __init__(self, original: Callable[[], Any], quantized: Callable[[], Any], *, side_by_side: bool) -> None:
        self.side_by_side = side_by_side
        self._load = {"original": original, "quantized": quantized}
        self._loaded: dict[str, Any] = {}

    @property
    def original(self) -> Any:
        return self._get("original")

    @property
    def quantized(self) -> Any:
        return self._get("quantized")

    def _get(self, which: str) -> Any:
        if which not in self._loaded:
            if self._loaded and not self.side_by_side:
                self._loaded.clear()
                gc.collect()
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()
            self._loaded[which] = self._load[which]()
        return self._loaded[which]


def model_bytes(folder: Path, device: torch.device) -> int:
    """`specs_bytes` of a folder. Files that are not safetensors count as they lie on disk."""
    try:
        specs = Checkpoint.open(folder).specs
    except InputError:  # whether it can be loaded is the loader's to say
        return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in OTHER_WEIGHTS)
    return specs_bytes(specs.values(), device)


def specs_bytes(specs: Iterable[TensorSpec], device: torch.device) -> int:
    """What tensors on disk take when they are loaded: on a CPU, floats become float32.

    A format that its loader unpacks takes more.
    """
    total = 0
    for spec in specs:
        dtype, size = DTYPES[spec.dtype], nbytes(spec)
        widened = device.type == "cpu" and dtype.is_floating_point and dtype.itemsize == 2
        total += 2 * size if widened else size
    return total


def free_memory(device: torch.device) -> int | None:
    """Bytes that could be had on a device now; None where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    found = [x for x in (_available(), _of_control_group()) if x is not None]
    return min(found, default=None)


def _available() -> int | None:
    """Memory of the machine that is unused, or holds nothing but copies of files."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return None


def _of_control_group() -> int | None:
    """What a container's own limit leaves; None without one."""
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return int(limit) - int(used) + int(stat["inactive_file"])  # "max" is no number: no limit
    except (OSError, ValueError, KeyError):
        return None
