"""Weights that need no calibration: tensor by tensor from shard to shard, several at once. The model is never built.

A job is one tensor that is copied, or the layers that are rounded together: those of one input, when they share the
scale of a whole tensor, else one layer. A few jobs are under way at a time, so that one reads while another computes
and a third writes; what they hold is all that is in memory, however many layers there are. Rows of a weight do not
influence each other, so a weight is rounded some rows at a time: what fits in a cache is done several times faster.
The bytes do not depend on how many jobs run at once, nor on how many rows are taken at a time.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from quantkit import heap, numerics, resuming, skeleton, solve
from quantkit.checkpoint import DTYPES
from quantkit.errors import InputError
from quantkit.linears import Linear, whole
from quantkit.plan import Plan, outside
from quantkit.progress import Progress
from quantkit.shards import ShardWriter
from quantkit.types import Notes, QParams, QuantizedTensor, TensorScheme

OUTSIDE = "embeddings"
JOBS = 4  # under way at once, where there are as many cores
ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}  # of a weight that are rounded at a time
ACROSS = ("nvfp4",)  # numbers whose scales are relative to one of the whole tensor

Report = dict[str, Any]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """Layers to round, or one tensor, by its name in memory or else on disk, to copy."""

    layers: tuple[Linear, ...] = ()
    parameter: str = ""
    tensor: str = ""


@dataclass(frozen=True)
class Part:
    """Jobs that are told of together: a block by its index, or what is in none."""

    name: str
    index: int | None
    jobs: tuple[Job, ...]


def stream(
    plan: Plan, writer: ShardWriter, device: torch.device, progress: Progress, finished: resuming.Finished
) -> None:
    """Writes every tensor of a plan that needs no data. The layers' lines of the report come in the plan's order.

    device    where weights are rounded
    finished  what is written already, and takes each block as soon as it and those before it are
    Raises InputError naming the tensor that cannot be read or rounded.
    """
    cores = torch.get_num_threads()
    at_once, threads = workers()
    written = (finished.written or {}).keys()
    progress.begin(len(plan.structure.blocks), "block", done=finished.blocks)

    def jobs() -> Iterator[tuple[Part, Job]]:
        left = [(i, part) for i, part in enumerate(parts(plan)) if not written >= _names(plan, part)]
        reading: list[list[str]] = [[], *(plan.reading[i] for i, _ in left)]
        for k, (_, part) in enumerate(left):
            # The jobs of the part before are still under way.
            plan.skeleton.checkpoint.expect([[*reading[k], *reading[k + 1]], *reading[k + 2 :]], 0)
            yield from ((part, job) for job in part.jobs)

    def do(item: tuple[Part, Job]) -> list[Report]:
        return _do(plan, item[1], writer, device)

    try:
        # Closed at the end, whatever it is: nothing is under way when the writer's files are closed.
        with contextlib.closing(in_order(jobs(), do, at_once, threads=threads)) as results:
            for part, found in itertools.groupby(results, lambda result: result[0][0]):
                report, names = _told(part, found, progress), _names(plan, part)
                if part.index is not None:
                    finished.block(writer, report, names=names)
                    heap.give_back()
                elif part.name == OUTSIDE:
                    finished.outside(writer, names)
    finally:
        torch.set_num_threads(cores)
    progress.end()


def _told(part: Part, results: Iterable[tuple[tuple[Part, Job], list[Report]]], progress: Progress) -> resuming.Report:
    """Waits for the jobs of a part, and says what there is to say."""
    if part.index is None:
        progress.doing(part.name)
    else:
        progress.item(part.index + 1, part.name)
    found, heard = resuming.Report(), len(progress.warnings)
    for _, lines in results:
        found.layers += lines
        for line in lines:
            for note in line["notes"]:
                progress.warn(f"{line['name']}: {note}")
    found.warnings = progress.warnings[heard:]
    return found


def _names(plan: Plan, part: Part) -> set[str]:
    """The tensors on disk that a part writes."""
    ghost = plan.skeleton
    packed = {f"{x.name}.{leaf}" for job in part.jobs for x in job.layers for leaf in plan.tensors(x)}
    copied = {ghost.to_disk[job.parameter] for job in part.jobs if job.parameter}
    return packed | copied | {job.tensor for job in part.jobs if job.tensor}


def workers() -> tuple[int, int]:
    """Jobs at once, and torch's threads for each."""
    cores = torch.get_num_threads()
    at_once = max(2, min(JOBS, cores))
    return at_once, max(1, cores // at_once)


def parts(plan: Plan) -> list[Part]:
    """All the work, in the order in which it is reported."""
    ghost, structure = plan.skeleton, plan.structure
    found = [Part(OUTSIDE, None, tuple(Job(parameter=name) for name in outside(ghost, structure)))]
    for block in structure.blocks:
        layers = [[plan.linears[m] for m in group if plan.linears[m].scheme is not None] for group in block.groups]
        alike = [part for group in layers for same in solve.by_scheme(group) for part in _apart(same)]
        rounded = {f"{layer.module}.weight" for part in alike for layer in part}
        copied = [name for name in ghost.parameters(block.name + ".") if name not in rounded]
        wholes = {name: whole(ghost, plan.linears, name) for name in copied}  # of the experts of a layer
        jobs = [*(Job(layers=part) for part in alike), *(Job(parameter=name) for name in copied if not wholes[name])]
        jobs += [Job(tensor=disk) for disk in dict.fromkeys(wholes.values()) if disk]
        found.append(Part(block.name, block.index, tuple(jobs)))
    found.append(Part("further tensors", None, tuple(Job(tensor=name) for name in ghost.unknown)))
    return found


def _apart(layers: Sequence[Linear]) -> list[tuple[Linear, ...]]:
    """Layers that could be rounded together, each alone where that makes no difference."""
    scheme = layers[0].scheme
    assert scheme is not None
    return [(layer,) for layer in layers] if by_rows(scheme.weights) else [tuple(layers)]


def by_rows(scheme: TensorScheme) -> bool:
    """Whether a row's codes depend on that row, or on those of its tile, alone."""
    return scheme.strategy != "tensor" and scheme.number not in ACROSS


def _do(plan: Plan, job: Job, writer: ShardWriter, device: torch.device) -> list[Report]:
    ghost = plan.skeleton
    if job.tensor:
        writer.write(job.tensor, ghost.checkpoint.read_finite(job.tensor))
        return []
    if job.parameter:
        dtype = DTYPES[skeleton.spec_of(ghost, job.parameter).dtype]
        writer.write(ghost.to_disk[job.parameter], ghost.read(job.parameter).to(dtype))
        return []
    weights = [ghost.read(f"{layer.module}.weight", device) for layer in job.layers]
    done = rounded(plan, job.layers, weights)
    del weights
    for layer, (q, _) in zip(job.layers, done, strict=True):
        assert layer.scheme is not None
        for suffix, tensor in plan.format.pack(q, layer.scheme.activations, None).items():
            writer.write(f"{layer.name}.{suffix}", tensor)
    return [report for _, report in done]


def rounded(
    plan: Plan, layers: Sequence[Linear], weights: Sequence[torch.Tensor]
) -> list[tuple[QuantizedTensor, Report]]:
    """Codes and lines of the report of layers of one scheme that are rounded together, weights (N, K)."""
    assert layers[0].scheme is not None
    if by_rows(layers[0].scheme.weights):
        return [_rows(plan, layer, weight) for layer, weight in zip(layers, weights, strict=True)]
    return [(x.tensor, x.report) for x in solve.solve(plan, layers, weights, None)]


def _rows(plan: Plan, layer: Linear, weight_NK: torch.Tensor) -> tuple[QuantizedTensor, Report]:
    """Rounds one layer's weight, some rows at a time -> its codes and its line in the report."""
    assert layer.scheme is not None
    scheme, recipe, notes, tally = layer.scheme.weights, plan.recipe, Notes(), solve.Tally()
    tile = scheme.block_shape[0] if scheme.strategy == "block" and scheme.block_shape else 1
    n, k = weight_NK.shape
    rows = tile * max(1, ELEMENTS.get(weight_NK.device.type, 1 << 20) // (k * tile))
    codes: torch.Tensor | None = None
    found: list[QParams] = []
    for start in range(0, n, rows):
        w = weight_NK[start : start + rows].float()
        try:
            q = recipe.method.module.quantize(
                w,
                scheme,
                None,
                options=recipe.method_options,
                scale_dtype=solve.scale_dtype(plan, layer),
                notes=notes,
            )
        except InputError as e:
            raise InputError(f"{layer.name}: {e}") from None
        if codes is None:
            codes = torch.empty((n, k), dtype=q.codes_NK.dtype, device=w.device)
        codes[start : start + rows] = q.codes_NK
        found.append(q.qparams)
        tally.add(w, numerics.dequantize(q))
    assert codes is not None
    zeros = [q.zero_NG for q in found if q.zero_NG is not None]
    qparams = QParams(torch.cat([q.scale_NG for q in found]), torch.cat(zeros) if zeros else None)
    report = solve.report(plan, layer, tally.error, tally.mark, notes)
    return QuantizedTensor(codes, qparams, scheme), report


def in_order(
    items: Iterable[Item], work: Callable[[Item], Result], at_once: int, *, threads: int
) -> Generator[tuple[Item, Result], None, None]:
    """Results of `work` in the order of `items`, `at_once` of them under way, each with `threads` threads of torch.

    The first error ends it: what has not begun is not done.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(at_once, "quantkit", torch.set_num_threads, (threads,)) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                while len(waiting) > 2 * at_once:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
