"""Weights that need no calibration: tensor by tensor from shard to shard, several at once. The model is never built.

A job is one tensor that is copied, or the layers that are rounded together: those of one input, when they share the
scale of a whole tensor, else one layer. A few jobs are under way at a time, so that one reads while another computes
and a third writes; what they hold is all that is in memory, however many layers there are. Rows of a weight do not
influence each other, so some rows at a time are read, rounded, packed and written, each time in the same memory: what
fits in a cache is done several times faster, and memory that is new costs as much again. NVFP4 is read twice: first for
the largest weight, to which its scales are relative. Weights with a scale of the whole tensor, and parts of a tensor
that holds several weights, are read at once; codes that the format does not have row by row are written at once.
The bytes do not depend on how many jobs run at once, nor on how many rows are taken at a time.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

import torch

from quantkit import heap, numerics, resuming, skeleton, solve
from quantkit.checkpoint import DTYPES
from quantkit.errors import InputError
from quantkit.linears import Linear, whole
from quantkit.plan import Plan, outside
from quantkit.progress import Progress
from quantkit.shards import ShardWriter
from quantkit.types import Format, Notes, QParams, QuantizedTensor, RowFormat, TensorScheme

OUTSIDE = "embeddings"
JOBS = 4  # under way at once, where there are as many cores
ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}  # of a weight that are rounded at a time
ACROSS = ("nvfp4",)  # numbers whose scales are relative to one of the whole tensor, that of its largest weight

Report = dict[str, Any]
Rows = Callable[[Linear, int], Iterable[torch.Tensor]]
Write = Callable[[str, torch.Tensor], None]
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
    alone = by_rows(scheme.weights) and scheme.weights.number not in ACROSS
    return [(layer,) for layer in layers] if alone else [tuple(layers)]


def by_rows(scheme: TensorScheme) -> bool:
    """Whether a row's codes depend on that row alone, or on those of its tile, and on the largest weight of all."""
    return scheme.strategy != "tensor"


def _do(plan: Plan, job: Job, writer: ShardWriter, device: torch.device) -> list[Report]:
    ghost = plan.skeleton
    if job.tensor:
        shape = ghost.checkpoint.specs[job.tensor].shape
        for part in ghost.checkpoint.rows(job.tensor, rows_at_once(shape)):
            writer.append(job.tensor, part)
        return []
    if job.parameter:
        spec = skeleton.spec_of(ghost, job.parameter)
        for part in ghost.rows(job.parameter, rows_at_once(spec.shape)):
            writer.append(ghost.to_disk[job.parameter], part.to(DTYPES[spec.dtype]))
        return []

    def rows(layer: Linear, count: int) -> Iterator[torch.Tensor]:
        return ghost.rows(f"{layer.module}.weight", count, device)

    return rounded(plan, job.layers, rows, writer.append, device)


def rounded(plan: Plan, layers: Sequence[Linear], rows: Rows, write: Write, device: torch.device) -> list[Report]:
    """Rounds layers of one scheme that are rounded together, on `device` -> their lines of the report.

    rows   gives a layer's weight (N, K), so many rows at a time
    write  takes what becomes of it: a tensor's name on disk and its next rows
    """
    scheme = layers[0].scheme
    assert scheme is not None
    if by_rows(scheme.weights):
        whole = _largest(layers, rows, device) if scheme.weights.number in ACROSS else None
        return [_rows(plan, layer, rows, write, device, whole) for layer in layers]
    weights = [weight for layer in layers for weight in rows(layer, layer.shape[0])]
    solved = solve.solve(plan, layers, weights, None)
    del weights
    for x in solved:
        for leaf, tensor in plan.format.pack(x.tensor, scheme.activations, None).items():
            write(f"{x.layer.name}.{leaf}", tensor)
    return [x.report for x in solved]


def _largest(layers: Sequence[Linear], rows: Rows, device: torch.device) -> torch.Tensor:
    """The largest magnitude of weights that share a scale, float32 (); NaN where there is one."""
    parts = (part for layer in layers for part in rows(layer, rows_at_once(layer.shape, device)))
    return functools.reduce(torch.maximum, (part.abs().amax().float() for part in parts))


def _rows(
    plan: Plan, layer: Linear, rows: Rows, write: Write, device: torch.device, largest: torch.Tensor | None
) -> Report:
    """Rounds one layer's weight, some rows at a time.

    largest  of the weights with which it shares a scale, where scales are relative to one of the whole tensor
    """
    assert layer.scheme is not None
    scheme, options, method = layer.scheme.weights, plan.recipe.method_options, plan.recipe.method.module
    dtype, notes, tally = solve.scale_dtype(plan, layer), Notes(), solve.Tally()
    tile = scheme.block_shape[0] if scheme.strategy == "block" and scheme.block_shape else 1
    codes = _Codes(plan, layer, write)
    scales, zeros = (_Stack(-(-layer.shape[0] // tile)) for _ in range(2))
    whole = None if largest is None else numerics.get(scheme.number).global_scale(largest)
    given = {} if whole is None else {"global_scale": whole}
    for part in rows(layer, rows_at_once(layer.shape, device, tile)):
        w = part.float()
        try:
            q = method.quantize(w, scheme, None, options=options, scale_dtype=dtype, notes=notes, **given)
        except InputError as e:
            raise InputError(f"{layer.name}: {e}") from None
        codes.add(q.codes_NK)
        scales.add(q.qparams.scale_NG)
        zeros.add(q.qparams.zero_NG)
        tally.add(w, numerics.dequantize(q))
    assert scales.whole is not None
    codes.end(QParams(scales.whole, zeros.whole, whole))
    return solve.report(plan, layer, tally.error, tally.mark, notes)


class _Codes:
    """Writes a layer: its codes as they come, where the format has the rows of a weight one after another."""

    def __init__(self, plan: Plan, layer: Linear, write: Write) -> None:
        self._plan, self._layer, self._write = plan, layer, write
        self._stack = _Stack(layer.shape[0])

    def add(self, codes_NK: torch.Tensor) -> None:
        """The codes of the next rows."""
        form, layer = self._plan.format, self._layer
        assert layer.scheme is not None
        if packs_rows(form):
            self._tensors(form.pack_codes(codes_NK, layer.scheme))
        else:
            self._stack.add(codes_NK)

    def end(self, qparams: QParams) -> None:
        """The scales of all rows."""
        form, layer = self._plan.format, self._layer
        assert layer.scheme is not None
        if packs_rows(form):
            self._tensors(form.pack_scales(qparams, layer.scheme, layer.shape))
        elif self._stack.whole is not None:
            q = QuantizedTensor(self._stack.whole, qparams, layer.scheme.weights)
            self._tensors(form.pack(q, layer.scheme.activations, None))

    def _tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for leaf, tensor in tensors.items():
            self._write(f"{self._layer.name}.{leaf}", tensor)


class _Stack:
    """Rows that come some at a time, in one tensor from the first on.

    Kept apart until the end, small ones would lie between large ones that do not stay, and the heap would grow.
    """

    def __init__(self, rows: int) -> None:
        self.whole: torch.Tensor | None = None
        self._rows, self._done = rows, 0

    def add(self, t: torch.Tensor | None) -> None:
        """The next rows, or None each time."""
        if t is None:
            return
        if self.whole is None:
            self.whole = t.new_empty((self._rows, *t.shape[1:]))
        self.whole[self._done : self._done + len(t)] = t
        self._done += len(t)


def packs_rows(form: Format) -> TypeGuard[RowFormat]:
    """Whether a format can pack some rows of a weight."""
    return hasattr(form, "pack_codes")


def rows_at_once(shape: tuple[int, ...], device: torch.device | None = None, tile: int = 1) -> int:
    """How many entries of a weight's first dimension are in memory at a time, whole tiles of them."""
    elements = ELEMENTS.get(device.type if device else "cpu", 1 << 20)
    return tile * max(1, elements // max(1, math.prod(shape[1:]) * tile))


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
