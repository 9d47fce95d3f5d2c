"""A few seconds of the run's own work on random weights, timed: what `plan` takes a machine's speed from.

Nothing of the model is loaded. Weights are random, tokens few; what grows with the number of tokens, of weights or of
layers is multiplied up. A weight that is too large for a second's work is timed at smaller sizes, and the three terms
of its cost (N K², N K, K³: products, elements, factorisation) are fitted to those.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantkit import blocks, observation, shares, solve, streaming
from quantkit import passes as dividing
from quantkit.linears import Linear
from quantkit.plan import Plan, outside
from quantkit.shards import ShardWriter
from quantkit.types import Stats

DISK = 1 << 27  # bytes written and read back
PATIENCE = 1.0  # seconds that one measurement may take
TOKENS = 512  # of random inputs for a Hessian
SIZES = (256, 512, 1024)  # of the smaller weights
CUDA_START = 1.2  # seconds of a process that calibrates, until CUDA's libraries and compiled kernels are loaded (H200)

Kind = tuple[Any, ...]


@dataclass(frozen=True)
class Rates:
    """Of the disk, bytes a second, and of matrix products, operations a second."""

    read: float
    write: float
    products: float


@dataclass(frozen=True)
class Seconds:
    """What the parts of a run take."""

    disk: float
    observe: float = 0.0
    solve: float = 0.0
    propagate: float = 0.0
    stream: float = 0.0
    start: float = 0.0

    @property
    def total(self) -> float:
        # What streams, computes while it reads and writes.
        one_by_one = self.start + self.disk + self.observe + self.solve + self.propagate
        return max(self.disk, self.stream) if self.stream else one_by_one


def rehearse(plan: Plan, device: torch.device, folder: Path, passes: int = 1) -> Seconds:
    """Seconds that a run of `plan` will take on this machine, validation apart.

    device  where it would compute; folder: an existing one on the disk where it would write
    passes  in which the inputs of a block's experts are observed
    """
    with torch.no_grad():
        rates = Rates(*disk(folder), products(device))
        read = plan.skeleton.checkpoint.size() / rates.read
        if not plan.needs_data:
            return Seconds(read + plan.output_bytes / rates.write, stream=_streamed(plan, device, folder))
        observe, propagate = _blocks(plan, device, rates, passes)
        # Each block's hidden states are written too, so that an interrupted run goes on from there.
        hidden = hidden_bytes(plan, device) * (len(plan.structure.blocks) - 1)
        written = (plan.output_bytes + hidden) / rates.write
        start = CUDA_START if device.type == "cuda" else 0.0
        return Seconds(read + written, observe, _solved(plan, device, rates), propagate, start=start)


def hidden_bytes(plan: Plan, device: torch.device) -> int:
    """Bytes of the hidden states of all calibration rows, of both models where two run."""
    wanted, size = plan.recipe.calibration, 4 if device.type == "cpu" else plan.skeleton.dtype.itemsize
    width = int(plan.skeleton.model.config.get_text_config().hidden_size)
    return wanted.samples * wanted.length * width * size * (3 if plan.carries_dense else 1)


def disk(folder: Path) -> tuple[float, float]:
    """Bytes a second that are read and written in a folder, the system's cache apart."""
    data = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".quantkit-", buffering=0) as file:
        start = time.perf_counter()
        for _ in range(DISK // len(data)):
            file.write(data)
        os.fsync(file.fileno())
        write = DISK / (time.perf_counter() - start)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        buffer = bytearray(1 << 22)
        start = time.perf_counter()
        while file.readinto(buffer):
            pass
        return DISK / (time.perf_counter() - start), write


def products(device: torch.device) -> float:
    """Operations a second of a float32 matrix product on a CPU, a bfloat16 one on a GPU."""
    size, dtype = (1024, torch.float32) if device.type == "cpu" else (4096, torch.bfloat16)
    a = torch.full((size, size), 0.01, dtype=dtype, device=device)
    return 2 * size**3 / timed(lambda: a @ a, device)


def timed(work: Callable[[], Any], device: torch.device, repeats: int = 2) -> float:
    """Seconds that `work` takes once it is warm, the best of a few."""

    def once() -> float:
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        return time.perf_counter() - start

    first = once()
    return first if first > PATIENCE else min(once() for _ in range(repeats))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _noise(shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small random numbers: one stretch of them again and again, since only their size matters."""
    count = 1
    for n in shape:
        count *= n
    stretch = torch.randn(min(count, 1 << 20), generator=torch.Generator().manual_seed(0)) * 0.02
    return stretch.to(device, dtype).repeat(-(-count // len(stretch)))[:count].reshape(tuple(shape))


# Without calibration -------------------------------------------------------------------------------------------------


def _streamed(plan: Plan, device: torch.device, folder: Path) -> float:
    """Seconds of rounding and writing every weight, several at once."""
    kinds: dict[Kind, list[Linear]] = {}
    for layer in plan.quantized:
        kinds.setdefault((layer.scheme, layer.dtype, layer.shape[1]), []).append(layer)
    total = 0.0
    for layers in kinds.values():
        n, k = layers[0].shape
        small = replace(layers[0], shape=(min(n, max(128, (1 << 20) // k // 128 * 128)), k))
        weight = _noise(small.shape, device, plan.skeleton.dtype)
        at_once, threads = streaming.workers()

        def all_of_them(
            small: Linear = small, weight: torch.Tensor = weight, at_once: int = at_once, threads: int = threads
        ) -> None:
            tensors = plan.tensors(small)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".quantkit-") as there:
                specs = {f"{i}.{small.name}.{leaf}": tensors[leaf] for i in range(2 * at_once) for leaf in tensors}
                writer = ShardWriter(Path(there), specs, DISK)

                def work(i: int) -> None:
                    one = replace(small, name=f"{i}.{small.name}")
                    streaming.rounded(plan, [one], lambda _, count: weight.split(count), writer.append, device)

                try:
                    for _ in streaming.in_order(range(2 * at_once), work, at_once, threads=threads):
                        pass
                finally:
                    writer.abort()

        cores = torch.get_num_threads()
        try:
            seconds = timed(all_of_them, device, repeats=1)
        finally:
            torch.set_num_threads(cores)
        weights = sum(x.shape[0] * x.shape[1] for x in layers)
        total += seconds * weights / (2 * at_once * small.shape[0] * k)
    return total


# With calibration ----------------------------------------------------------------------------------------------------


def _blocks(plan: Plan, device: torch.device, rates: Rates, passes: int) -> tuple[float, float]:
    """Seconds of observing all blocks, and of running them again."""
    kinds: dict[Kind, list[blocks.Block]] = {}
    for block in plan.structure.blocks:
        key = tuple((plan.linears[g[0]].shape, len(g)) for g in block.groups)
        kinds.setdefault(key, []).append(block)
    observe = propagate = 0.0
    for alike in kinds.values():
        first, second = _one_block(plan, alike[0], device, rates, passes)
        observe, propagate = observe + first * len(alike), propagate + second * len(alike)
    return observe, propagate * (1 - 1 / len(plan.structure.blocks))


def _one_block(plan: Plan, block: blocks.Block, device: torch.device, rates: Rates, passes: int) -> tuple[float, float]:
    """Seconds of observing one block and of running it again, for all calibration rows."""
    ghost, wanted = plan.skeleton, plan.recipe.calibration
    dtype = torch.float32 if device.type == "cpu" else ghost.dtype
    widths = [plan.linears[g[0]].shape[1] for g in block.groups]
    weights = sum(plan.linears[m].shape[0] * plan.linears[m].shape[1] for m in block.linears)
    limit = int(PATIENCE / 2 * rates.products / (2 * weights + 2 * sum(k * k for k in widths)))
    rows = max(1, min(wanted.batch_size, wanted.samples, limit // wanted.length))
    length = min(wanted.length, max(32, limit))
    names = ghost.parameters(block.name + ".")
    for name in names:
        old = ghost.get(name)
        ghost.put(name, _noise(old.shape, device, dtype if old.is_floating_point() else old.dtype))
    try:
        batch = _batch(plan, rows, length, device, dtype)
        module = ghost.model.get_submodule(block.name)
        again = timed(lambda: blocks.run(module, batch, block.index), device)
        batches = wanted.samples * wanted.length / (rows * length)

        def observed(groups: Sequence[dividing.Group], dense: bool) -> float:
            needs = {name: plan.needs(plan.linears[name]) for group in groups for name in group}
            seen = functools.partial(observation.observe, ghost.model, block, needs=needs, dense=dense)
            one = timed(lambda: seen([batch]), device)
            each = max(timed(lambda: seen([batch, batch]), device, repeats=1) - one, again)
            return max(0.0, one - each) + each * batches * (2 if dense and plan.carries_dense else 1)

        parts = dividing.divided(plan, block, passes, shares.owners(block, plan, 1), device)
        observe = observed(parts[0], dense=True)
        if len(parts) > 1:  # those after the first are of one size
            observe += observed(parts[1], dense=False) * (len(parts) - 1)
    finally:
        ghost.unload(names)
    return observe, again * batches


def _batch(plan: Plan, rows: int, length: int, device: torch.device, dtype: torch.dtype) -> blocks.Batch:
    """A batch before the first block. What is in no block is one number, in all places of its tensor."""
    ghost = plan.skeleton
    names = [name for name in outside(ghost, plan.structure) if not name.startswith(plan.structure.idle)]
    for name in names:
        ghost.put(name, torch.full((), 0.02, dtype=dtype, device=device).expand(ghost.get(name).shape))
    try:
        for buffer in ghost.model.buffers():
            buffer.data = buffer.data.to(device)
        ids = torch.zeros(rows, length, dtype=torch.long, device=device)
        (batch,) = blocks.begin(ghost, plan.structure, [(ids, torch.ones_like(ids, dtype=torch.bool))])
    finally:
        ghost.unload(names)
    batch.hidden = _noise(batch.hidden.shape, device, dtype)
    if plan.carries_dense:
        batch.dense = batch.onward = batch.hidden
    return batch


def _solved(plan: Plan, device: torch.device, rates: Rates) -> float:
    """Seconds of rounding all groups of linears that share an input."""
    kinds: dict[Kind, list[list[Linear]]] = {}
    for block in plan.structure.blocks:
        for group in block.groups:
            for alike in solve.by_scheme([plan.linears[m] for m in group if plan.linears[m].scheme is not None]):
                n, k = sum(x.shape[0] for x in alike), alike[0].shape[1]
                kinds.setdefault((alike[0].scheme, alike[0].dtype, n, k), []).append(alike)
    fits: dict[Kind, list[float]] = {}
    total = 0.0
    for (scheme, dtype, n, k), groups in kinds.items():
        layer = groups[0][0]
        if (8 * n * k * k + k**3) / rates.products < PATIENCE / 2:
            seconds = _one_solve(plan, layer, n, k, device)
        else:
            if (scheme, dtype) not in fits:
                fits[scheme, dtype] = _fit(plan, layer, device)
            seconds = sum(c * t for c, t in zip(fits[scheme, dtype], _terms(n, k), strict=True))
        total += seconds * len(groups)
    return total


def _terms(n: int, k: int) -> tuple[float, float, float]:
    return float(n) * k * k, float(n) * k, float(k) ** 3


def _fit(plan: Plan, layer: Linear, device: torch.device) -> list[float]:
    """What each of the three terms costs, at least 0, least squares of relative errors."""
    sizes = [(n, k) for n in SIZES for k in SIZES if n in (SIZES[0], SIZES[-1]) or n == k]
    times = [_one_solve(plan, layer, n, k, device) for n, k in sizes]
    rows = torch.tensor([_terms(n, k) for n, k in sizes], dtype=torch.float64) / torch.tensor(times)[:, None].double()
    kept = [0, 1, 2]
    while True:
        found = torch.linalg.lstsq(rows[:, kept], torch.ones(len(sizes), 1, dtype=torch.float64)).solution.flatten()
        if bool((found >= 0).all()) or len(kept) == 1:
            break
        kept.pop(int(found.argmin()))
    costs = [0.0, 0.0, 0.0]
    for i, value in zip(kept, found.tolist(), strict=True):
        costs[i] = max(0.0, value)
    return costs


def _one_solve(plan: Plan, layer: Linear, n: int, k: int, device: torch.device) -> float:
    """Seconds of rounding one weight (n, k) of the layer's scheme, packing included."""
    needs = plan.needs(layer)
    small = replace(layer, shape=(n, k))
    x = torch.randn(TOKENS, k, generator=torch.Generator().manual_seed(1)).to(device)
    gram = x.T @ x / TOKENS
    stats = Stats(
        TOKENS,
        gram_KK=gram if "gram" in needs else None,
        energy_K=gram.diagonal().clone() if "energy" in needs else None,
        absmax_K=x.abs().amax(0) if "absmax" in needs else None,
        drift_KK=gram * 0.01 if "drift" in needs else None,
    )
    weight = _noise((n, k), device)

    def work() -> None:
        for found in solve.solve(plan, [small], [weight], stats):
            assert small.scheme is not None
            plan.format.pack(found.tensor, small.scheme.activations, found.inputs)

    return timed(work, device, repeats=1)
