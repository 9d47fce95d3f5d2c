"""What a run will take of this machine, before it starts: memory, disk and time, and what to change so that it fits.

Memory is reckoned from shapes: what is held at once in each phase of the work, of which the largest is the peak. Time
comes from a rehearsal (`rehearsal`); without one it is left out.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantkit import inventory, lint, rehearsal, room, shares, skeleton, solve, streaming
from quantkit import passes as dividing
from quantkit.blocks import Block
from quantkit.checkpoint import DTYPES, nbytes
from quantkit.heap import available
from quantkit.hidden import LARGE, chosen
from quantkit.linears import Linear
from quantkit.plan import Plan, described, outside, short
from quantkit.progress import duration

CPU_HOST = 64 << 20  # what texts, torch's kernels on a CPU and memory between allocations come to, once it computes
CUDA_HOST = 900 << 20  # host memory that CUDA, torch's kernels and compiled ones take once a GPU is used
CUDA_STREAMED = 500 << 20  # the same where nothing is calibrated
SPARE = 0.9  # of the memory that is free: what a run may take
ROUNDING = 6  # float32 copies of a weight while its codes are found
STREAMED = 3  # the same on a GPU, where no statistics are read
FACTORS = 3  # matrices of a Hessian's size while it is factored
FACTORED = 4, 2  # copies of a weight and of a Hessian on a GPU, where the second are larger


@dataclass(frozen=True)
class Memory:
    """Peaks in bytes: of this process's resident memory, and of the GPU's. Parts by what they are for."""

    host: int
    gpu: int
    parts: dict[str, int]


def memory(
    plan: Plan, device: torch.device, *, place: str | None = None, passes: int | None = None, ranks: int = 1
) -> Memory:
    """The peaks of a run.

    place   where hidden states wait, "device", "host" or "disk"; by default as `hidden_place` has it
    passes  in how many parts the inputs of a block are observed; by default as `passes_needed` has it
    ranks   processes that share a block's statistics
    """
    base, on_cpu = _resident(), device.type == "cpu"
    if not plan.needs_data:
        base, work = base + (0 if on_cpu else CUDA_STREAMED), _streamed(plan, device)
        parts = {"this process": base, "tensors under way": work}
        return Memory(base + work, 0, parts) if on_cpu else Memory(base, work, parts)
    base += CPU_HOST if on_cpu else CUDA_HOST
    size = 4 if on_cpu else plan.skeleton.dtype.itemsize
    held = rehearsal.hidden_bytes(plan, device)
    phases = _phases(plan, size, device, passes or passes_needed(plan, device), ranks)
    products = 0 if on_cpu else _workspace(device)
    kept = held * 2 // 3 if plan.carries_dense else held
    place = place or hidden_place(plan, device)
    copy = kept if kept >= LARGE and place != "disk" else 0  # on the way to the disk, while the next block is computed
    parts = {"this process": base, "hidden states": held, "their copy for the disk": copy, **phases}
    work = max(phases["embeddings and head"], phases["one block"] + phases["one block's work"])
    if on_cpu:
        return Memory(base + (held if place != "disk" else held // _batches(plan)) + copy + work, 0, parts)
    largest = max(nbytes(spec) for spec in plan.skeleton.checkpoint.specs.values())
    host = base + copy + 2 * largest + (held if place == "host" else 0)
    gpu = work + products + (held if place == "device" else held // _batches(plan))
    return Memory(host, gpu, {**parts, "the library of products": products})


def hidden_place(plan: Plan, device: torch.device) -> str:
    """Where hidden states wait between blocks, as `hidden.chosen` has it."""
    return chosen(rehearsal.hidden_bytes(plan, device), plan.recipe.calibration.hidden, device)


def _workspace(device: torch.device) -> int:
    """Bytes that cuBLAS keeps once it multiplied: torch gives it more from compute capability 9.0 on."""
    large = not torch.cuda.is_available() or torch.cuda.get_device_capability(device)[0] >= 9
    return 32 << 20 if large else 8_519_680


def _batches(plan: Plan) -> int:
    wanted = plan.recipe.calibration
    return max(1, -(-wanted.samples // wanted.batch_size))


def passes_needed(plan: Plan, device: torch.device, ranks: int = 1) -> int:
    """In how many passes over a block the inputs of its experts are observed: the fewest, doubled, that fit."""
    count, most = 1, dividing.most(plan, device) if plan.needs_data else 1
    while count < most and not _fits(memory(plan, device, passes=count, ranks=ranks), device):
        count = min(2 * count, most)
    return count


def experts_said(plan: Plan, device: torch.device, count: int, ranks: int = 1) -> str:
    """How the experts of a block are observed, in words, in `count` passes."""
    once, parts = (max(_statistics(plan, b, device, n, ranks) for b in plan.structure.blocks) for n in (1, count))
    if count == 1:
        return f"all of a block at once, {once:,} bytes"
    return f"in {count} passes over each block, {parts:,} bytes at a time; all at once, {once:,}, would not fit"


def _statistics(plan: Plan, block: Block, device: torch.device, passes: int, ranks: int) -> int:
    """Bytes of the statistics of a block's inputs that are held at once, on the rank that has most of them."""
    owners = shares.owners(block, plan, ranks)
    largest = 0
    for part in dividing.divided(plan, block, passes, owners, device):
        sizes = [0] * ranks
        for group in part:
            sizes[owners[group[0]]] += dividing.nbytes(plan, group)
        largest = max(largest, *sizes)
    return largest


def _fits(peaks: Memory, device: torch.device) -> bool:
    """Whether what is free is enough; so where the system does not say what is."""
    fits = not available() or peaks.host <= (available() + _resident()) * SPARE
    return fits and (device.type == "cpu" or peaks.gpu <= torch.cuda.mem_get_info(device)[0] * SPARE)


def _phases(plan: Plan, size: int, device: torch.device, passes: int, ranks: int) -> dict[str, int]:
    """Bytes of each thing that a calibrated run holds; `size` of an element of what runs."""
    ghost, wanted = plan.skeleton, plan.recipe.calibration
    width = int(ghost.model.config.get_text_config().hidden_size)
    tokens = min(wanted.samples, wanted.batch_size) * wanted.length
    blocks = works = 0
    for block in plan.structure.blocks:
        weights = sum(_numel(ghost, p) for p in ghost.parameters(block.name + "."))
        groups = [[plan.linears[m] for m in group] for group in block.groups]
        widths = [group[0].shape[1] for group in groups if any("gram" in plan.needs(x) for x in group)]
        grams = _statistics(plan, block, device, passes, ranks)
        inner = max(sum(x.shape[0] for x in group) for group in groups)
        observing = grams + max((k * k * 4 for k in widths), default=0) + tokens * (4 * width + 2 * inner) * size
        rounded = sum(x.shape[0] * x.shape[1] for group in groups for x in group if x.scheme)
        # A group's statistics are given back once it is solved: on a GPU that is where its codes go.
        solving = grams + (rounded if device.type == "cpu" else 0) + _solving(plan, groups, device)
        blocks, works = max(blocks, weights * size), max(works, observing, solving)
    read = [p for p in outside(ghost, plan.structure) if not p.startswith(plan.structure.idle)]
    embeddings = sum(_numel(ghost, p) for p in read) * size
    return {"embeddings and head": embeddings, "one block": blocks, "one block's work": works}


def _solving(plan: Plan, groups: list[list[Linear]], device: torch.device) -> int:
    """Bytes while linears are rounded: of one input together, and on a GPU several such of one shape at once."""
    layers = [s for group in groups for s in solve.by_scheme([x for x in group if x.scheme is not None])]
    stacks = {i: stack for i, stack in enumerate(layers) if stack}
    largest = 0
    for places in solve.together(plan, stacks, device):
        stack = stacks[places[0]]
        n, k = sum(x.shape[0] for x in stack), stack[0].shape[1]
        if device.type == "cpu":
            one = 4 * (ROUNDING * n * k + FACTORS * k * k)
        else:
            weights, factors = FACTORED
            one = 4 * max(ROUNDING * n * k + k * k, weights * n * k + factors * k * k)
        largest = max(largest, len(places) * (solve.size(stack) if len(places) > 1 else one))
    return largest


def _streamed(plan: Plan, device: torch.device) -> int:
    """Bytes of the jobs under way at once, where these are largest."""
    sizes = [_job(plan, job, device) for part in streaming.parts(plan) for job in part.jobs]
    at_once = streaming.workers()[0]
    return max(sum(sizes[i : i + at_once]) for i in range(max(1, len(sizes) - at_once + 1)))


def _job(plan: Plan, job: streaming.Job, device: torch.device) -> int:
    """Bytes that a job of `streaming` holds: some rows of the source, their codes, what is kept of all rows."""
    ghost = plan.skeleton
    if not job.layers:
        spec = ghost.checkpoint.specs[job.tensor] if job.tensor else skeleton.spec_of(ghost, job.parameter)
        return nbytes(spec) if job.parameter in ghost.pieces else _part(spec.shape, None) * DTYPES[spec.dtype].itemsize
    total = 0
    for layer in job.layers:
        assert layer.scheme is not None
        weights = layer.shape[0] * layer.shape[1]
        packed = [nbytes(spec) for spec in plan.tensors(layer).values()]
        name, by_rows = f"{layer.module}.weight", streaming.by_rows(layer.scheme.weights)
        part = _part(layer.shape, device) if by_rows else weights
        whole = name in ghost.pieces or ghost.rewrite is not None
        copies = ROUNDING if device.type == "cpu" else STREAMED
        total += (weights if whole else part) * DTYPES[layer.dtype].itemsize + part * copies * 4
        if by_rows and streaming.packs_rows(plan.format):
            total += sum(packed) - max(packed)  # all but the codes
        else:
            total += weights + sum(packed)
    return total


def _part(shape: tuple[int, ...], device: torch.device | None) -> int:
    """Elements of a tensor that are read at a time."""
    return min(math.prod(shape), streaming.rows_at_once(shape, device) * math.prod(shape[1:]))


def _numel(ghost: skeleton.Skeleton, name: str) -> int:
    return nbytes(skeleton.spec_of(ghost, name)) // DTYPES[skeleton.spec_of(ghost, name).dtype].itemsize


def _resident() -> int:
    """Resident memory of this process now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


# What would have to change -------------------------------------------------------------------------------------------


def changes(plan: Plan, device: torch.device, folder: Path) -> list[str]:
    """What does not fit on this machine, each with what would make it fit."""
    found = []
    disk = shutil.disk_usage(folder).free
    copies = 0 if not plan.needs_data else 3 if hidden_place(plan, device) == "disk" else 2
    need = plan.output_bytes + copies * rehearsal.hidden_bytes(plan, device)
    if need > disk:
        found.append(f"disk: {need:,} bytes are needed and {disk:,} are free; write elsewhere with --out, or free some")
    here, free = memory(plan, device), available() + _resident()
    limits = [("host", here.host, free)] if available() else []
    if device.type == "cuda":
        limits.append(("GPU", here.gpu, torch.cuda.mem_get_info(device)[0]))
    for name, wanted, most in limits:
        if wanted > most * SPARE:
            found.append(f"{name} memory: {wanted:,} bytes of {most:,} that are free; {_fitting(plan, device)}")
    return found


def _fitting(plan: Plan, device: torch.device) -> str:
    """The smallest change of the recipe with which it fits, as what to put on the command line."""
    for changed, said in _smaller(plan):
        peaks = memory(changed, device)
        if _fits(peaks, device):
            return f"it fits with {said}"
    return "no smaller batch and no other place of the hidden states is enough: take a larger machine"


def _smaller(plan: Plan) -> Iterable[tuple[Plan, str]]:
    """The plan with less in memory, the least loss first. Neither changes what is computed but for rounding."""
    wanted, rows = plan.recipe.calibration, plan.recipe.calibration.batch_size
    places = dict.fromkeys([wanted.hidden, "host", "disk"])
    for place in places:
        size = rows
        while size >= 1:
            update = {"batch_size": size, "hidden": place}
            recipe = plan.recipe.model_copy(update={"calibration": wanted.model_copy(update=update)})
            told = [f"--set calibration.{k}={v}" for k, v in update.items() if v != getattr(wanted, k)]
            if told:
                yield replace(plan, recipe=recipe), " ".join(told)
            size //= 2


# In words ------------------------------------------------------------------------------------------------------------


def describe(
    plan: Plan, *, device: torch.device | None = None, folder: Path | None = None, rehearse: bool = False
) -> dict[str, Any]:
    """The plan as plain values for a person: title, facts, a table of what happens to which layers, warnings.

    device, folder  where it would compute, by default on a GPU if there is one; where it would write
    rehearse        time a few seconds of the work, and say how long it will take
    """
    recipe = plan.recipe
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = folder or Path()
    peaks = memory(plan, device)
    source, output = plan.skeleton.checkpoint.size(), plan.output_bytes
    params = sum(x.shape[0] * x.shape[1] for x in plan.quantized)
    facts = [
        ("model", f"{plan.source.model} ({type(plan.skeleton.model).__name__}, {len(plan.structure.blocks)} blocks)"),
        *([("transforms", ", then ".join(t.name for t in recipe.transforms))] if recipe.transforms else []),
        ("method", recipe.method_name),
        ("quantized", f"{len(plan.quantized)} linear layers, {params:,} weights"),
        *([("KV cache", f"{kv.number}, a scale a {kv.strategy}, calibrated")] if (kv := plan.kv_scheme) else []),
        ("source", f"{source:,} bytes of tensors"),
        ("tensors", str(inventory.of(plan))),
        ("output", f"{output:,} bytes of tensors, {output / source:.1%} of the source"),
        ("disk", f"{output:,} bytes, reserved before the work starts; {shutil.disk_usage(folder).free:,} are free"),
        *room.said(plan),
        ("device", str(device)),
        ("memory", _said(peaks)),
        *((f"  {name}", f"{size:,} bytes") for name, size in peaks.parts.items()),
    ]
    if plan.needs_data:
        wanted = recipe.calibration
        facts.append(("calibration", f"{wanted.samples} rows of {wanted.length} tokens from {wanted.data}"))
        facts.append(("hidden states", _PLACES[hidden_place(plan, device)]))
        if dividing.most(plan, device) > 1:
            facts.append(("experts' statistics", experts_said(plan, device, passes_needed(plan, device))))
    else:
        facts.append(("calibration", f"none: {recipe.method_name} reads no data; tensors stream from shard to shard"))
    if rehearse:
        facts.append(("time", _time(rehearsal.rehearse(plan, device, folder, passes_needed(plan, device)))))
    facts += [(f"loads in {name}", says) for name, says in engines(plan)]
    return {
        "title": f"plan for {plan.source.name}",
        "facts": facts,
        "table": {"columns": ["layers", "how many", "shape", "becomes"], "rows": _kinds(list(plan.linears.values()))},
        "warnings": [*plan.warnings, *(f"does not fit: {line}" for line in changes(plan, device, folder))],
    }


_PLACES = {
    "device": "on the GPU between blocks",
    "host": "in the host's memory between blocks",
    "disk": "in a file on the disk between blocks, mapped into memory",
}


def _said(peaks: Memory) -> str:
    gpu = f", {peaks.gpu:,} bytes of the GPU's" if peaks.gpu else ""
    return f"about {peaks.host:,} bytes at the peak{gpu}"


def _time(found: rehearsal.Seconds) -> str:
    parts = {"disk": found.disk, "observe": found.observe, "quantize": found.solve, "run on": found.propagate}
    parts = {"start": found.start, **parts} if found.start else parts
    parts = {"disk": found.disk, "quantize": found.stream} if found.stream else parts
    told = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
    return f"about {duration(found.total)} without validation ({told})"


def engines(plan: Plan) -> list[tuple[str, str]]:
    """Each engine by name, and whether its rules let it load the output."""
    what = described(plan)
    found = []
    for name in lint.names():
        errors = [f for f in lint.check(what, [name]) if f.level == lint.ERROR]
        found.append((name, f"no: {errors[0].where}: {errors[0].what}" if errors else "yes"))
    return found


def _kinds(linears: list[Linear]) -> list[list[str]]:
    """Linears of one kind in one row: their names with the block's number as *."""
    kinds: dict[tuple[str, str, str], int] = {}
    for x in linears:
        name = ".".join("*" if part.isdigit() else part for part in x.name.split("."))
        what = short(x.scheme) if x.scheme else f"stays {x.dtype}: {x.reason}"
        key = (name, f"{x.shape[0]} x {x.shape[1]}", what)
        kinds[key] = kinds.get(key, 0) + 1
    return [[name, str(count), shape, what] for (name, shape, what), count in kinds.items()]
