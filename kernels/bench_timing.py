"""Times of one call on a GPU, and the least time that it could take.

A case is timed as a CUDA graph of many calls, replayed at least 20 times: no launch overhead is in the figure. The
calls go round copies of their inputs that are larger together than any L2 cache, so each call finds its weights in
device memory, as a model does. What is given is the median over the replays with the 10th and the 90th percentile.

The floor is max(bytes / bandwidth, operations / rate): each input read once, each output written once. A kernel in a
graph costs a few microseconds more than its work, even if it does nothing; `launch_us` of the ceilings is that cost,
measured in the same run.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import itertools
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROTATED = 256_000_000  # bytes that the copies of the inputs hold together at the least: four times an H200's L2
MOST_COPIES = 256
REPLAYS = 20
REPLAY_US = 2000.0  # what a replay should last: the events around it cost some microseconds
FEWEST_CALLS, MOST_CALLS = 20, 1024
MOST_RESERVED = 32 << 30  # bytes that torch's allocator may hold before its cache is emptied
LONG_REPLAY_US = 10_000.0  # calls that are long themselves need not be 20 to last


@dataclass(frozen=True)
class Ceilings:
    """What a GPU can do at the most: bytes a second, operations a second by the width of what is multiplied."""

    bandwidth: float
    rate_16: float
    rate_8: float

    def rate(self, bits: int) -> float:
        if bits not in (8, 16):
            raise ValueError(f"rates are known for operands of 8 and 16 bits, not of {bits}")
        return self.rate_8 if bits == 8 else self.rate_16


# By a part of the device's name. Copy bandwidth and bf16 rate were measured, the 8-bit rate is twice the 16-bit one.
CEILINGS = {"H200": Ceilings(4.3e12, 790e12, 1580e12), "H100": Ceilings(3.0e12, 790e12, 1580e12)}


def ceilings(device_name: str, measured: Ceilings | None = None) -> Ceilings:
    """The known ceilings of a device; of another one those `measured` in this run. Raises ValueError without either."""
    for part, known in CEILINGS.items():
        if part in device_name:
            return known
    if measured is None:
        raise ValueError(f"no ceilings are known for {device_name!r}: measure them first")
    return measured


def floor_us(moved: int, operations: int, rate_bits: int, top: Ceilings) -> float:
    """Microseconds that no call can beat: `moved` bytes at the bandwidth, or `operations` at the rate."""
    return max(moved / top.bandwidth, operations / top.rate(rate_bits)) * 1e6


def copies_needed(bytes_each: int, total: int = ROTATED) -> int:
    """How many copies of an input are more than `total` bytes: 2 at the least, `MOST_COPIES` at the most; 1 for 0."""
    if total <= 0:
        return 1
    if bytes_each <= 0:
        return MOST_COPIES
    return min(MOST_COPIES, max(2, total // bytes_each + 1))


def calls_planned(each_us: float, copies: int) -> int:
    """Calls in one graph: whole rounds over the copies, enough to last, and not so many that the case takes long."""
    fewest = FEWEST_CALLS if each_us <= 0 else min(FEWEST_CALLS, max(2, math.ceil(LONG_REPLAY_US / each_us)))
    wanted = FEWEST_CALLS if each_us <= 0 else math.ceil(REPLAY_US / each_us)
    rounds = math.ceil(min(MOST_CALLS, max(fewest, wanted)) / copies)
    return max(1, rounds) * copies


@dataclass(frozen=True)
class Times:
    """Microseconds of one call over the replays of a graph."""

    us: float
    p10: float
    p90: float
    calls: int
    replays: int


def quantile(values: Sequence[float], q: float) -> float:
    """By linear interpolation between the ordered values."""
    if not values:
        raise ValueError("no values to take a quantile of")
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(replay_us: Sequence[float], calls: int) -> Times:
    """Of the microseconds of whole replays, each of `calls` calls."""
    each = [value / calls for value in replay_us]
    return Times(quantile(each, 0.5), quantile(each, 0.1), quantile(each, 0.9), calls, len(each))


Timer = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]], int], Times]


def graph_timer(run: Callable[..., Any], sets: Sequence[tuple[Any, ...]], replays: int = REPLAYS) -> Times:
    """Times `run(*inputs)` over the rotated `sets` of inputs: see the head of this file.

    run  launches on the current stream and does not wait for the GPU
    """
    torch.cuda.synchronize()
    with torch.cuda.stream(_side_stream()):
        for inputs in sets[:2]:
            run(*inputs)  # compiles, and lets libraries make what they keep for a stream
    torch.cuda.synchronize()
    graph = _captured(run, sets, 1)
    _replayed(graph, 2)
    each = quantile(_replayed(graph, 3), 0.5) / len(sets)
    calls = calls_planned(each, len(sets))
    if calls > len(sets):
        graph = _captured(run, sets, calls // len(sets))
    _replayed(graph, 2)
    return summary(_replayed(graph, replays), calls)


class CaptureFailed(RuntimeError):
    """What was to be timed cannot be captured. torch's allocator may still wait for the capture's end: begin anew."""


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """One stream for all captures: cuBLAS has a workspace for each stream that it meets."""
    return torch.cuda.Stream()


def _captured(run: Callable[..., Any], sets: Sequence[tuple[Any, ...]], rounds: int) -> torch.cuda.CUDAGraph:
    """What torch.cuda.graph does, but for emptying the allocator's cache, which costs more than most measurements."""
    if torch.cuda.memory_reserved() > MOST_RESERVED:
        torch.cuda.empty_cache()
    graph, stream = torch.cuda.CUDAGraph(), _side_stream()
    torch.cuda.synchronize()
    collecting = gc.isenabled()
    gc.disable()  # what it frees might not be freed during a capture
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                for _ in range(rounds):
                    for inputs in sets:
                        run(*inputs)
            except Exception as error:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise CaptureFailed(f"in a CUDA graph: {type(error).__name__}: {error}") from error
            graph.capture_end()
    finally:
        if collecting:
            gc.enable()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def _replayed(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    """Microseconds of each replay. All are queued before any is waited for, so the GPU never waits for Python."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(last) * 1e3 for first, last in itertools.pairwise(marks)]


def rotated(tensors: Sequence[torch.Tensor], total: int = ROTATED) -> list[tuple[torch.Tensor, ...]]:
    """Copies of some tensors at other addresses, the given ones first."""
    count = copies_needed(sum(t.numel() * t.element_size() for t in tensors), total)
    return [tuple(tensors), *(tuple(t.clone() for t in tensors) for _ in range(count - 1))]


def bytes_of(*tensors: Any) -> int:
    """Bytes of the tensors among the arguments and of those in lists, tuples, mappings and objects with fields."""
    total = 0
    for value in tensors:
        if isinstance(value, torch.Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, dict):
            total += bytes_of(*value.values())
        elif isinstance(value, (list, tuple)):
            total += bytes_of(*value)
        elif hasattr(value, "__dict__"):
            total += bytes_of(*vars(value).values())
    return total


# What a result must be read with

SAME = ("device", "driver", "torch", "triton", "source")  # of an environment: results hold where these are equal


@dataclass(frozen=True)
class Environment:
    """The machine and the code of a run: times compare only within one."""

    device: str
    driver: str
    torch: str
    triton: str
    cuda: str
    cudnn: str
    python: str
    commit: str
    source: str
    started: str

    def same(self, other: dict[str, Any]) -> bool:
        """Whether results of `other` still hold: one model of GPU, one software, one source of the kernels."""
        mine = asdict(self)
        return all(mine[name] == other.get(name) for name in SAME)


def fingerprint(files: Iterable[Path]) -> str:
    """Of the names and the contents of files."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def kernel_source(folder: Path) -> str:
    """Fingerprint of the kernels and of the tables that choose among them."""
    files = [path for suffix in ("*.py", "*.json") for path in (folder / "quantkit_kernels").rglob(suffix)]
    if tables := os.environ.get("QUANTKIT_KERNELS_TABLES"):
        files += Path(tables).glob("*.json")
    return fingerprint(files)


def answer(*command: str) -> str:
    """What a program prints, or nothing when it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit_of(folder: Path) -> str:
    """The commit of a checkout, with `+` behind it when files differ from it; nothing where there is no git."""
    commit = answer("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    changed = commit and answer("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no", "--", ".")
    return commit + ("+" if changed else "")


def environment(folder: Path, started: str, commit: str = "") -> Environment:
    """Of this process on its CUDA device. `commit` is for a copy of the checkout that has no git."""
    try:
        import triton

        triton_version = str(triton.__version__)
    except ImportError:
        triton_version = "none"
    cuda = torch.cuda.is_available()
    return Environment(
        device=torch.cuda.get_device_name() if cuda else platform.machine(),
        driver=answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        torch=str(torch.__version__),
        triton=triton_version,
        cuda=str(torch.version.cuda),
        cudnn=str(torch.backends.cudnn.version()) if cuda else "none",
        python=sys.version.split()[0],
        commit=commit or commit_of(folder),
        source=kernel_source(folder),
        started=started,
    )


def clocks() -> str:
    """Clocks, power and temperature now, as nvidia-smi gives them."""
    fields = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    return answer("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").split("\n")[0]
