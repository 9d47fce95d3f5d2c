"""The whole story of a run, top to bottom: one block in memory at a time, from the source's shards to the output's.

    open the writer        every byte of the output has its place, the disk's room is reserved
    run up to the blocks   calibration rows become hidden states
    for each block         load it; observe each distinct input of its linears; fold scales, where the recipe has
                           transforms; round each weight once; write it; put the decoded weights in its place and run
                           it again, so that the next block sees what it will see in production; make it durable:
                           its tensors, then the hidden states, then the journal's record of it; where they are large
                           a thread does so while the next block is computed
    finish                 the rest of the tensors, config.json, every other file of the source

What needs no calibration goes from shard to shard instead (`streaming`), finished block by block all the same.
With a journal that has blocks already, the run goes on with the next one, and gives what it would have given in one go.
Writes into the folder that the caller made and beside the journal, and never to any other place. Nothing here says that
the output is good: that is for validation, after a reload from disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from quantkit import (
    blocks,
    calibration,
    calibration_rows,
    estimate,
    experts,
    folding,
    heap,
    hidden,
    kv_cache,
    observation,
    output,
    passes,
    shares,
    solve,
    streaming,
    tuning,
    writing,
)
from quantkit.checkpoint import DTYPES
from quantkit.errors import InputError
from quantkit.fitting import Fitting
from quantkit.inventory import account
from quantkit.journal import Journal
from quantkit.linears import Linear
from quantkit.plan import Plan, outside
from quantkit.profile import Profile
from quantkit.progress import Progress
from quantkit.ranks import ALONE, Ranks
from quantkit.resuming import Finished, Report
from quantkit.shards import Shards, ShardWriter


@dataclass
class Run:
    """One run under way: the plan, where it computes, what it has found out so far.

    finished  the blocks before the one that is worked on; found: what the report will say of that one
    """

    plan: Plan
    folder: Path
    writer: ShardWriter
    device: torch.device
    dtype: torch.dtype
    progress: Progress
    profile: Profile
    ranks: Ranks
    finished: Finished
    fitting: Fitting
    found: Report = field(default_factory=Report)

    def record(self, found: solve.Solved) -> None:
        """One line of the report, and what a user must be told at once."""
        self.found.layers.append(found.report)
        for line in found.report["notes"]:
            self.progress.warn(f"{found.layer.name}: {line}")


@torch.no_grad()
def quantize(
    plan: Plan,
    folder: Path,
    *,
    device: torch.device,
    progress: Progress,
    profile: Profile | None = None,
    calibration_data: Iterable[Any] | None = None,
    shards: Shards | None = None,
    ranks: Ranks = ALONE,
    journal: Journal | None = None,
) -> dict[str, Any]:
    """Quantizes a planned model into a folder; returns what quantkit.json says of the layers, data and files.

    device   where blocks are computed; on the CPU in float32, on a GPU in the checkpoint's dtype
    profile  takes the seconds of each part of the work
    calibration_data  texts or chats in place of the recipe's; read once
    shards   is told of each file of weights when it is whole
    ranks    who else works on it; all call this, rank 0 alone reads the data, writes, and has something to return
    journal  has what is finished, and takes more; None: nothing of a run that is cut short can be used again
    """
    for warning in plan.warnings:
        progress.warn(warning)
    timed = profile or Profile(device)
    with timed("calibration texts"):
        own = calibration_rows.read(plan, progress, calibration_data) if ranks.first else None
        rows = shares.rows(own, plan, ranks)
    if rows is None and not ranks.first:
        return {}  # the disk's work, which several ranks would not do faster
    dtype = torch.float32 if device.type == "cpu" else plan.skeleton.dtype
    finished = Finished(journal, ranks if rows is not None else ALONE, device)
    finished.same_data(None if rows is None else rows.sha256)
    if journal is not None and finished.written is None:
        output.empty(folder)  # nothing that is there was finished
    size = plan.recipe.export.shard_bytes
    writer = ShardWriter(folder, plan.specs, size, shards, finished.written) if ranks.first else shares.Nowhere()
    fitting = Fitting(plan.recipe.calibration.batch_size, hidden.to_host, progress, ranks.alone)
    if rows is not None:
        fitting.passes = ranks.told(estimate.passes_needed(plan, device, ranks.size) if ranks.first else None)
        fitting.most = passes.most(plan, device)
        if fitting.passes > 1:
            progress.say(f"experts' statistics: {estimate.experts_said(plan, device, fitting.passes, ranks.size)}")
    run = Run(plan, folder, writer, device, dtype, progress, timed, ranks, finished, fitting)
    with ExitStack() as ends:
        ends.callback(writer.abort)
        ends.enter_context(finished)
        if finished.blocks:
            progress.say(finished.told(len(plan.structure.blocks)))
            progress.warnings += finished.report.warnings
        if rows is None:
            with run.profile("stream"):
                streaming.stream(plan, writer, device, progress, finished)
        else:
            _calibrated(run, rows)
        with timed("write"):
            weights = writer.close()
    if not ranks.first:
        return {}
    files = output.write_others(plan, folder, weights)
    tensors = account(plan, folder, files).to_dict()
    return {"data": calibration_rows.noted(rows), **_found(plan, finished.report), "files": files, "tensors": tensors}


def _found(plan: Plan, report: Report) -> dict[str, Any]:
    """What quantkit.json says of the layers."""
    return {
        "kv_cache": kv_cache.span(plan.kv_scheme, report.kv_scales),
        "layers": report.layers,
        "folds": report.folds,
        "experts": report.experts,
        "memory": report.memory,
    }


def _calibrated(run: Run, rows: calibration.Rows) -> None:
    """Block by block, each with what the calibration rows are by then."""
    plan, progress, finished = run.plan, run.progress, run.finished
    left = plan.structure.blocks[finished.blocks :]
    progress.begin(len(plan.structure.blocks), "block", done=finished.blocks)
    with run.profile("embeddings"):
        if finished.written is None:
            run.progress.doing("embeddings")
            writing.embeddings(plan, run.writer)
            finished.outside(run.writer)
        batches = _to_blocks(run, rows) if left else []
    for block in left:
        progress.item(block.index + 1, block.name)
        run.found, heard = Report(), len(progress.warnings)
        _block(run, block, batches)
        run.found.warnings, run.found.memory = progress.warnings[heard:], run.fitting.take()
        progress.doing("make durable")
        with run.profile("make durable"):
            finished.block(run.writer, run.found, [] if block is left[-1] else batches)
    plan.skeleton.checkpoint.expect(plan.reading, -1)
    for name in plan.skeleton.unknown:
        run.writer.write(name, plan.skeleton.checkpoint.read_finite(name))
    progress.end()


def _to_blocks(run: Run, rows: calibration.Rows) -> list[blocks.Batch]:
    """Takes the calibration rows up to the first block that is not finished."""
    plan, ghost = run.plan, run.plan.skeleton
    idle = plan.structure.idle  # no text reads it
    names = [name for name in outside(ghost, plan.structure) if not name.startswith(idle)]
    ghost.checkpoint.expect([plan.reading[0], *plan.reading[1 + run.finished.blocks :]], 0)
    ghost.load(names, run.device, run.dtype)
    ghost.tie()
    for buffer in ghost.model.buffers():
        buffer.data = buffer.data.to(run.device)
    width = ghost.model.config.get_text_config().hidden_size
    size = rows.ids_RL.numel() // run.ranks.size * width * run.dtype.itemsize * (3 if plan.carries_dense else 1)
    where = hidden.chosen(size, plan.recipe.calibration.hidden, run.device)
    hidden.say(size, where, run.device, run.progress)
    # The host of a CPU is the device that computes: nothing was moved away from it yet.
    run.fitting.place = "device" if where == "host" and run.device.type == "cpu" else where

    def begin() -> list[blocks.Batch]:
        pairs = [x.split(run.fitting.rows) for x in (rows.ids_RL, rows.mask_RL)]
        mine = run.ranks.share(zip(*pairs, strict=True))
        on_device = ((i.to(run.device), m.to(run.device)) for i, m in mine)
        there = hidden.keeping(run.fitting.place, run.device, run.folder)
        found = blocks.begin(ghost, plan.structure, on_device, there)
        for batch in found if plan.carries_dense else ():
            batch.dense, batch.onward = there(batch.hidden), there(batch.hidden)
        return found

    batches = run.fitting.attempt("embeddings", [], begin)
    ghost.unload(names)
    _same_batches(run)
    run.fitting.again(run.finished.report.memory, batches)
    run.finished.load(batches)
    return batches


def _same_batches(run: Run) -> None:
    """Raises InputError where several ranks would deal batches that one process had to cut."""
    if run.finished.report.memory and not run.ranks.alone:
        raise InputError(
            "the run that was cut short made its batches smaller to fit into one GPU, so one process must go on with "
            "it; --fresh starts over on several"
        )


def _block(run: Run, block: blocks.Block, batches: list[blocks.Batch]) -> None:
    """One block: observe, rewrite, quantize, write, and run on with the decoded weights."""
    names = run.plan.skeleton.parameters(block.name + ".")
    solved, peaks = run.fitting.attempt(block.name, batches, lambda: _rounded(run, block, names, batches))
    if peaks is not None:
        run.found.kv_scales |= writing.kv_cache(run.plan, run.writer, block, peaks)
    with run.profile("write"):
        writing.block(run.plan, run.writer, names, solved, run.dtype)
    if block.index + 1 < len(run.plan.structure.blocks):
        run.progress.doing("run with quantized weights")
        with run.profile("propagate"):
            _run_on(run, block, batches)
    run.plan.skeleton.unload(names)
    heap.give_back()


def _rounded(
    run: Run, block: blocks.Block, names: list[str], batches: list[blocks.Batch]
) -> tuple[dict[str, solve.Solved], kv_cache.Peaks | None]:
    """Observes, rewrites and rounds a block. Changes neither the hidden states before it nor the output."""
    plan, ghost, profile = run.plan, run.plan.skeleton, run.profile
    run.found = Report()  # of an earlier try nothing counts
    ghost.unload(names)
    ghost.checkpoint.expect(plan.reading, block.index + 1)
    with profile("read"):
        shares.load(ghost, names, run.device, run.dtype, run.ranks)
    if plan.rotation is not None:
        with profile("transform"):
            folding.check_rotation(plan, plan.rotation, block, batches[0], run.device)
    peaks = kv_cache.Peaks() if plan.caches else None
    statistics = _passes(run, block, batches, peaks)
    statistics.at(0)
    if plan.links:
        run.progress.doing("transform")
        with profile("transform"):
            run.found.folds += folding.fold(plan, block, batches[0], statistics, run.progress, run.ranks)
    return _solve(run, block, batches, statistics, peaks), peaks


def _run_on(run: Run, block: blocks.Block, batches: list[blocks.Batch]) -> None:
    """The hidden states after a block, batch by batch; those that are through stay so when memory runs out."""
    run.finished.leave()
    module = run.plan.skeleton.model.get_submodule(block.name)
    done: list[blocks.Batch] = []
    left = list(batches)

    def rest() -> None:
        while left:
            batch = left[0]
            batch.hidden = blocks.store(blocks.run(module, batch, block.index), batch.hidden)
            batch.dense, batch.onward = batch.onward, batch.dense
            done.append(left.pop(0))

    run.fitting.attempt(block.name, left, rest)
    batches[:] = done
    run.fitting.apply(batches)


def _passes(run: Run, block: blocks.Block, batches: list[blocks.Batch], peaks: kv_cache.Peaks | None) -> passes.Passes:
    """The statistics of this block's inputs that the method, the transforms and the schemes of inputs ask for."""
    plan, wanted = run.plan, run.plan.recipe.calibration
    parts = passes.divided(plan, block, run.fitting.passes, shares.owners(block, plan, run.ranks.size), run.device)

    def observe(part: int) -> observation.Observed:
        needs = {name: plan.needs(plan.linears[name]) for group in parts[part] for name in group}
        if plan.links:  # otherwise after the folds
            needs = {name: x - {"magnitudes"} for name, x in needs.items()}
        return _observe(run, block, batches, part, needs, None if plan.links else peaks)

    def told(tokens: Mapping[str, int], notes: Iterable[str]) -> None:
        run.found.experts |= tokens
        for line in (*notes, *experts.few(plan.skeleton.model, {} if wanted.all_experts else tokens)):
            run.progress.warn(line)

    return passes.Passes(plan, block, parts, observe, told)


def _observe(
    run: Run,
    block: blocks.Block,
    batches: list[blocks.Batch],
    part: int,
    needs: Mapping[str, frozenset[str]],
    peaks: kv_cache.Peaks | None,
) -> observation.Observed:
    """Statistics of a part of a block's inputs; with the first, what is observed besides."""
    first, dense = part == 0, part == 0 and batches[0].dense is not None
    if not any(needs.values()) and not (first and peaks) and not dense:
        return observation.Observed()
    run.progress.doing("observe" if first else f"observe, part {part + 1}")
    run.fitting.solving = False
    wanted, owners = run.plan.recipe.calibration, shares.owners(block, run.plan, run.ranks.size)
    how: dict[str, Any] = {"prior": wanted.expert_prior, "all_experts": wanted.all_experts, "dense": dense}
    how |= {"peaks": peaks if first else None, "ranks": run.ranks, "owners": owners}
    with run.profile("observe"):
        return observation.observe(run.plan.skeleton.model, block, batches, needs, **how)


def _observe_folded(
    run: Run,
    block: blocks.Block,
    batches: list[blocks.Batch],
    part: int,
    seen: observation.Observed,
    peaks: kv_cache.Peaks | None,
) -> None:
    """What a fold changes in ways that cannot be reckoned: a histogram over all channels, the peaks of values."""
    plan = run.plan
    needs = {name: plan.needs(plan.linears[name]) & {"magnitudes"} for name in seen.where}
    again = _observe(run, block, batches, part, needs, peaks)
    for name, stats in again.stats.items():
        if name in seen.stats:
            seen.stats[name] = replace(seen.stats[name], magnitudes=stats.magnitudes)


def _solve(
    run: Run,
    block: blocks.Block,
    batches: list[blocks.Batch],
    statistics: passes.Passes,
    peaks: kv_cache.Peaks | None,
) -> dict[str, solve.Solved]:
    """Codes of every linear of the block that is quantized, by name in memory; the decoded weights are in place."""
    found: list[solve.Solved] = []
    for part, seen in statistics:
        if run.plan.links:
            _observe_folded(run, block, batches, part, seen, peaks)
        with run.profile("quantize"):
            if hasattr(run.plan.recipe.method.module, "quantize_block"):
                found += tuning.tune(run.plan, block, batches, seen.stats, run.progress, run.ranks)
            else:
                run.fitting.solving = True
                found += _solve_each(run, block, statistics.parts[part], seen)
    place = {name: i for i, group in enumerate(block.groups) for name in group}
    found.sort(key=lambda x: place[x.layer.module])
    for x in found:
        # What an engine multiplies with is rounded to the model's dtype.
        run.plan.skeleton.put(f"{x.layer.module}.weight", x.decoded().to(DTYPES[x.layer.dtype]).to(run.dtype))
        run.record(x)
    return {x.layer.module: x for x in found}


def _solve_each(
    run: Run, block: blocks.Block, groups: Iterable[passes.Group], seen: observation.Observed
) -> list[solve.Solved]:
    """Layers that share an input together, and experts of one shape at once; frees their statistics."""
    linears, model = run.plan.linears, run.plan.skeleton.model
    owners = shares.owners(block, run.plan, run.ranks.size)
    stacks: list[list[Linear]] = []
    tasks: dict[int, solve.Task] = {}  # of this rank
    for group in groups:
        for alike in solve.by_scheme([linears[m] for m in group if linears[m].scheme is not None]):
            if owners[group[0]] == run.ranks.rank:
                weights = [model.get_submodule(x.module).weight for x in alike]
                tasks[len(stacks)] = solve.Task(alike, weights, seen.stats.get(alike[0].module))
            stacks.append(alike)
        for m in group:
            seen.stats.pop(m, None)
    found: dict[int, list[solve.Solved]] = {}
    for places in solve.together(run.plan, {i: task.layers for i, task in tasks.items()}, run.device):
        run.progress.doing(f"quantize {len(found) + 1}/{len(found) + len(tasks)}")
        found |= zip(places, solve.solve_many(run.plan, [tasks.pop(i) for i in places]), strict=True)
    return shares.exchange(stacks, found, run.ranks, run.device)
