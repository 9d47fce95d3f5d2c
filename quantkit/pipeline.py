"""The whole story of a run, top to bottom: one block in memory at a time, from the source's shards to the output's.

    open the writer        every byte of the output has its place, the disk's room is reserved
    run up to the blocks   calibration rows become hidden states
    for each block         load it; observe each distinct input of its linears; fold scales, where the recipe has
                           transforms; round each weight once; write it; put the decoded weights in its place and run
                           it again, so that the next block sees what it will see in production
    finish                 the rest of the tensors, config.json, every other file of the source

What needs no calibration goes from shard to shard instead (`streaming`).
Writes into a folder that the caller made, and never to any other place. Nothing here says that the output is good:
that is for validation, after a reload from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from quantkit import (
    blocks,
    calibration,
    folding,
    formats,
    kv_cache,
    observation,
    shares,
    skeleton,
    solve,
    streaming,
    tuning,
)
from quantkit.checkpoint import DTYPES, Shards, ShardWriter
from quantkit.errors import InputError
from quantkit.experts import FEW, coverage
from quantkit.hub import read_json
from quantkit.inventory import account
from quantkit.output import copy_files, write_json
from quantkit.plan import Linear, Plan, outside, tokenizer, whole
from quantkit.profile import Profile
from quantkit.progress import Progress
from quantkit.ranks import ALONE, Ranks
from quantkit.transforms.rotation import TOLERANCE, Rotation

CONFIG = "config.json"
HIDDEN_SHARE = 0.25  # of the GPU memory that is free: what hidden states may take of it


@dataclass
class Run:
    """One run under way: the plan, where it computes, what it has found out so far."""

    plan: Plan
    writer: ShardWriter
    device: torch.device
    dtype: torch.dtype
    progress: Progress
    profile: Profile
    ranks: Ranks = ALONE
    layers: list[dict[str, Any]] = field(default_factory=list)
    folds: list[dict[str, Any]] = field(default_factory=list)
    experts: dict[str, int] = field(default_factory=dict)
    kv_scales: dict[str, list[float]] = field(default_factory=lambda: {"k_scale": [], "v_scale": []})

    def record(self, found: solve.Solved) -> None:
        """One line of the report, and what a user must be told at once."""
        self.layers.append(found.report)
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
) -> dict[str, Any]:
    """Quantizes a planned model into an empty folder; returns what quantkit.json says of the layers, data and files.

    device   where blocks are computed; on the CPU in float32, on a GPU in the checkpoint's dtype
    profile  takes the seconds of each part of the work
    calibration_data  texts or chats in place of the recipe's; read once
    shards   is told of each file of weights when it is whole
    ranks    who else works on it; all call this, rank 0 alone reads the data, writes, and has something to return
    """
    for warning in plan.warnings:
        progress.warn(warning)
    rows = shares.rows(_rows(plan, progress, calibration_data) if ranks.first else None, plan, ranks)
    if rows is None and not ranks.first:
        return {}  # the disk's work, which several ranks would not do faster
    dtype = torch.float32 if device.type == "cpu" else plan.skeleton.dtype
    size = plan.recipe.export.shard_bytes
    writer = ShardWriter(folder, plan.specs, size, shards) if ranks.first else shares.Nowhere()
    run = Run(plan, writer, device, dtype, progress, profile or Profile(device, on=False), ranks)
    try:
        if rows is None:
            with run.profile("stream"):
                run.layers += streaming.stream(plan, writer, device, progress)
        else:
            _calibrated(run, rows)
        weights = writer.close()
    finally:
        writer.abort()
    if not ranks.first:
        return {}
    files = _files(plan, folder, weights)
    return {
        "data": _data(rows),
        "kv_cache": _kv_range(run),
        "layers": run.layers,
        "folds": run.folds,
        "experts": run.experts,
        "files": files,
        "tensors": account(plan, folder, files).to_dict(),
    }


def _calibrated(run: Run, rows: calibration.Rows) -> None:
    """Block by block, each with what the calibration rows are by then."""
    plan, progress = run.plan, run.progress
    progress.begin(len(plan.structure.blocks), "block")
    batches = _outside(run, rows)
    for block in plan.structure.blocks:
        progress.item(block.index + 1, block.name)
        _block(run, block, batches)
    for name in plan.skeleton.unknown:
        run.writer.write(name, plan.skeleton.checkpoint.read_finite(name))
    progress.end()


def _rows(plan: Plan, progress: Progress, texts: Iterable[Any] | None = None) -> calibration.Rows | None:
    """The calibration rows, or None for a method that needs none.

    texts  take the place of the recipe's calibration.data
    """
    if not plan.needs_data:
        if texts is not None:
            progress.warn("calibration_data is not read: this method and scheme observe nothing")
        return None
    wanted = plan.recipe.calibration
    if texts is None:
        place = {key: getattr(wanted, key) for key in ("subset", "split", "revision", "column")}
        source = calibration.open_source(wanted.data, **place)
    else:
        source = calibration.from_iterable(texts, wanted.column)
    rows = calibration.pack_rows(
        source,
        tokenizer(plan.source, trust_remote_code=plan.recipe.trust_remote_code),
        samples=wanted.samples,
        length=wanted.length,
        packing=wanted.packing,
        min_tokens=wanted.min_tokens,
        shuffle=wanted.shuffle,
        chat_template=wanted.chat_template,
        tokens=wanted.tokens,
    )
    vocabulary = plan.skeleton.model.get_input_embeddings().num_embeddings
    if int(rows.ids_RL.max()) >= vocabulary:
        raise InputError(
            f"{plan.source.folder}: the tokenizer gives token {int(rows.ids_RL.max())}, but the model has only "
            f"{vocabulary} embeddings; they do not belong together"
        )
    _tell(rows.report, source.name, max(x.shape[1] for x in plan.quantized), progress)
    return rows


def _tell(report: dict[str, Any], name: str, widest: int, progress: Progress) -> None:
    """The data report in a few lines, with a warning where there are fewer rows or tokens than it takes."""
    for line in calibration.said(report, name):
        progress.say(line)
    if report["rows"] < report["rows_wanted"]:
        progress.warn(
            f"calibration data {name} gives {report['rows']} rows of {report['length']} tokens, "
            f"not the {report['rows_wanted']} that the recipe asks for"
        )
    if report["counted_tokens"] < 4 * widest:
        progress.warn(
            f"only {report['counted_tokens']:,} calibration tokens for layers of {widest} inputs; below {4 * widest:,} "
            f"the statistics fit the calibration text more than the model, and {16 * widest:,} are better: raise "
            "calibration.samples or length"
        )


def _data(rows: calibration.Rows | None) -> dict[str, Any] | None:
    return None if rows is None else {"sha256": rows.sha256, **rows.report}


def _kv_range(run: Run) -> dict[str, Any] | None:
    """The smallest and the largest scale of keys and of values, for the report."""
    scheme = run.plan.kv_scheme
    if scheme is None:
        return None
    return {
        "number": scheme.number,
        "strategy": scheme.strategy,
        **{side: {"least": min(found), "largest": max(found)} for side, found in run.kv_scales.items()},
    }


def _outside(run: Run, rows: calibration.Rows) -> list[blocks.Batch]:
    """Writes what is in no block, and takes the calibration rows up to the first block."""
    plan, ghost = run.plan, run.plan.skeleton
    names = outside(ghost, plan.structure)
    run.progress.doing("embeddings")
    for name in names:
        dtype = DTYPES[skeleton.spec_of(ghost, name).dtype]
        run.writer.write(ghost.to_disk[name], ghost.read(name).to(dtype))
    names = [name for name in names if not name.startswith(plan.structure.idle)]  # no text reads the others
    ghost.load(names, run.device, run.dtype)
    ghost.tie()
    for buffer in ghost.model.buffers():
        buffer.data = buffer.data.to(run.device)
    size = plan.recipe.calibration.batch_size
    pairs = run.ranks.share(zip(rows.ids_RL.split(size), rows.mask_RL.split(size), strict=True))
    on_device = ((i.to(run.device), m.to(run.device)) for i, m in pairs)
    keep = _host if _on_host(run, rows) else (lambda x: x)
    batches = blocks.begin(ghost, plan.structure, on_device, keep)
    if plan.carries_dense:
        for batch in batches:
            batch.dense, batch.onward = keep(batch.hidden), keep(batch.hidden)
    ghost.unload(names)
    return batches


def _on_host(run: Run, rows: calibration.Rows) -> bool:
    """Whether hidden states wait on the host between blocks, as the recipe says or the memory that is free decides."""
    if run.device.type == "cpu":
        return False
    hidden = run.plan.skeleton.model.config.get_text_config().hidden_size
    size = rows.ids_RL.numel() // run.ranks.size * hidden * run.dtype.itemsize * (3 if run.plan.carries_dense else 1)
    free, _ = torch.cuda.mem_get_info(run.device)
    wanted = run.plan.recipe.calibration.hidden
    host = wanted == "host" or (wanted == "auto" and size > free * HIDDEN_SHARE)
    run.progress.say(f"hidden states: {size / 2**30:.1f} GiB, on the {'host' if host else 'GPU'} between blocks")
    return host


def _host(x: torch.Tensor) -> torch.Tensor:
    """A copy in page-locked memory of the host, which a GPU reads and writes without waiting."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)


def _block(run: Run, block: blocks.Block, batches: list[blocks.Batch]) -> None:
    """One block: observe, rewrite, quantize, write, and run on with the decoded weights."""
    plan, ghost, profile = run.plan, run.plan.skeleton, run.profile
    names = ghost.parameters(block.name + ".")
    with profile("read"):
        ghost.load(names, run.device, run.dtype)
    module = ghost.model.get_submodule(block.name)
    if plan.rotation is not None:
        with profile("transform"):
            _check_rotation(run, plan.rotation, block, batches[0])
    peaks = kv_cache.Peaks() if plan.caches else None
    with profile("observe"):
        seen = _observe(run, block, batches, None if plan.links else peaks)
    if plan.links:
        run.progress.doing("transform")
        with profile("transform"):
            run.folds += folding.fold(plan, block, batches[0], seen, run.progress, run.ranks)
        with profile("observe"):
            _observe_folded(run, block, batches, seen, peaks)
    if peaks is not None:
        _write_kv(run, block, peaks)
    solved = _solve(run, block, batches, seen)
    with profile("write"):
        _write(run, names, solved)
    last = block.index + 1 == len(plan.structure.blocks)
    if not last:
        run.progress.doing("run with quantized weights")
        with profile("propagate"):
            for batch in batches:
                batch.hidden = blocks.store(blocks.run(module, batch, block.index), batch.hidden)
                batch.dense, batch.onward = batch.onward, batch.dense
    ghost.unload(names)


def _check_rotation(run: Run, rotation: Rotation, block: blocks.Block, batch: blocks.Batch) -> None:
    """Runs the original block beside the rotated one, in float32. Raises InputError when they do not agree."""
    ghost = run.plan.skeleton
    names = ghost.parameters(block.name + ".")
    kept = {name: ghost.get(name) for name in names}
    module = ghost.model.get_submodule(block.name)

    def through(read: Callable[..., torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        for name in names:
            tensor = read(name, run.device)
            ghost.put(name, tensor.float() if tensor.is_floating_point() else tensor)
        return blocks.run(module, batch, block.index, hidden=hidden)

    before = rotation.original(batch.hidden.to(run.device).float())
    error = rotation.error(
        before, through(ghost.original, before), through(ghost.read, rotation.hidden(before)), batch.mask
    )
    for name, tensor in kept.items():
        ghost.put(name, tensor)
    if not error <= TOLERANCE:
        raise InputError(
            f"{block.name}: rotated, it does something else (relative error {error:.2g}, above {TOLERANCE:g}, more "
            "than rounding explains); this architecture cannot be rotated, leave rotation out of transforms"
        )


def _observe(
    run: Run, block: blocks.Block, batches: list[blocks.Batch], peaks: kv_cache.Peaks | None
) -> observation.Observed:
    """The statistics of this block's inputs that the method, the transforms and the schemes of inputs ask for."""
    plan = run.plan
    needs = {name: plan.needs(plan.linears[name]) for name in block.linears}
    if plan.links:
        needs = {name: wanted - {"magnitudes"} for name, wanted in needs.items()}
    if peaks is None and not any(needs.values()) and batches[0].dense is None:
        return observation.Observed()
    run.progress.doing("observe")
    prior = plan.recipe.calibration.expert_prior
    owners = shares.owners(block, plan, run.ranks.size)
    seen = observation.observe(
        plan.skeleton.model, block, batches, needs, peaks=peaks, prior=prior, ranks=run.ranks, owners=owners
    )
    run.experts |= seen.tokens
    for line in dict.fromkeys(seen.notes):
        run.progress.warn(line)
    for owner, tokens in _by_owner(seen.tokens).items():
        width = int(plan.skeleton.model.get_submodule(owner).width)
        found = coverage(tokens, width)
        if found["few"]:
            run.progress.warn(
                f"{owner}: {found['few']} of {found['experts']} experts saw fewer than {FEW} tokens an input channel "
                f"({FEW * width}), the least {found['min']}, the median {found['median']:g}; their statistics lean on "
                "those of all tokens: raise calibration.samples"
            )
    return seen


def _by_owner(tokens: Mapping[str, int]) -> dict[str, list[int]]:
    """Tokens of each expert, by the module that holds the experts."""
    found: dict[str, list[int]] = {}
    for name, count in tokens.items():
        found.setdefault(name.rpartition(".")[0], []).append(count)
    return found


def _observe_folded(
    run: Run,
    block: blocks.Block,
    batches: list[blocks.Batch],
    seen: observation.Observed,
    peaks: kv_cache.Peaks | None,
) -> None:
    """What a fold changes in ways that cannot be reckoned: a histogram over all channels, the peaks of values."""
    plan = run.plan
    needs = {name: plan.needs(plan.linears[name]) & {"magnitudes"} for name in block.linears}
    if peaks is None and not any(needs.values()):
        return
    owners = shares.owners(block, plan, run.ranks.size)
    again = observation.observe(plan.skeleton.model, block, batches, needs, peaks=peaks, ranks=run.ranks, owners=owners)
    for name, stats in again.stats.items():
        if name in seen.stats:
            seen.stats[name] = replace(seen.stats[name], magnitudes=stats.magnitudes)


def _solve(
    run: Run, block: blocks.Block, batches: list[blocks.Batch], seen: observation.Observed
) -> dict[str, solve.Solved]:
    """Codes of every linear of the block that is quantized, by name in memory; the decoded weights are in place."""
    with run.profile("quantize"):
        if hasattr(run.plan.recipe.method.module, "quantize_block"):
            found = tuning.tune(run.plan, block, batches, seen.stats, run.progress, run.ranks)
        else:
            found = _solve_each(run, block, seen)
    for x in found:
        # What an engine multiplies with is rounded to the model's dtype.
        run.plan.skeleton.put(f"{x.layer.module}.weight", x.decoded_NK.to(DTYPES[x.layer.dtype]).to(run.dtype))
        run.record(x)
    return {x.layer.module: x for x in found}


def _solve_each(run: Run, block: blocks.Block, seen: observation.Observed) -> list[solve.Solved]:
    """Layers that share an input together, one such group after the other; frees their statistics."""
    linears, model = run.plan.linears, run.plan.skeleton.model
    owners = shares.owners(block, run.plan, run.ranks.size)
    stacks: list[list[Linear]] = []
    found: dict[int, list[solve.Solved]] = {}
    for k, group in enumerate(block.groups, 1):
        run.progress.doing(f"quantize {k}/{len(block.groups)}")
        for alike in solve.by_scheme([linears[m] for m in group if linears[m].scheme is not None]):
            if owners[group[0]] == run.ranks.rank:
                weights = [model.get_submodule(x.module).weight for x in alike]
                found[len(stacks)] = solve.solve(run.plan, alike, weights, seen.stats.get(alike[0].module))
            stacks.append(alike)
        for m in group:
            seen.stats.pop(m, None)
    return shares.exchange(stacks, found, run.ranks, run.device)


def _write(run: Run, names: Sequence[str], solved: dict[str, solve.Solved]) -> None:
    """Writes a block: codes of what was quantized, the rest as it is now. Leaves its parameters in the run's dtype."""
    plan, ghost = run.plan, run.plan.skeleton
    for found in solved.values():
        layer = found.layer
        assert layer.scheme is not None
        for suffix, tensor in plan.format.pack(found.tensor, layer.scheme.activations, found.inputs).items():
            run.writer.write(f"{layer.name}.{suffix}", tensor)
    wholes = dict.fromkeys(whole(ghost, plan.linears, name) for name in names)
    for disk in wholes:
        if disk is not None:
            run.writer.write(disk, ghost.whole(disk) if plan.rewrites else ghost.checkpoint.read(disk))
    for name in names:
        if name.removesuffix(".weight") in solved and name.endswith(".weight"):
            continue
        if plan.rewrites:
            spec = skeleton.spec_of(ghost, name)
            if whole(ghost, plan.linears, name) is None:
                run.writer.write(ghost.to_disk[name], ghost.get(name).to(DTYPES[spec.dtype]))
            if ghost.get(name).is_floating_point():
                ghost.put(name, ghost.get(name).to(DTYPES[spec.dtype]).to(run.dtype))
        elif whole(ghost, plan.linears, name) is None:
            run.writer.write(ghost.to_disk[name], ghost.original(name))


def _write_kv(run: Run, block: blocks.Block, peaks: kv_cache.Peaks) -> None:
    """The scales of a block's keys and values, found before its weights are rounded."""
    plan, scheme = run.plan, run.plan.kv_scheme
    assert scheme is not None
    attention = plan.caches[block.index]
    try:
        scales = peaks.scales(scheme.strategy, plan.skeleton.dtype)
    except InputError as e:
        raise InputError(f"{block.name}: {e}") from None
    for leaf, tensor in formats.with_kv_cache(plan.format).pack_kv(*scales, scheme).items():
        run.writer.write(f"{attention.name}.{leaf}", tensor)
        run.kv_scales[leaf] += tensor.flatten().tolist()


def _files(plan: Plan, folder: Path, weights: list[str]) -> dict[str, Any]:
    """config.json with what was done, every other file of the source, and the format's own."""
    config = read_json(plan.source.folder / CONFIG)
    config["quantization_config"] = plan.config()
    if plan.untied:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict) and (part is config or "tie_word_embeddings" in part):
                part["tie_word_embeddings"] = False
    write_json(folder / CONFIG, config)
    sources = plan.skeleton.checkpoint.where.values()
    files = copy_files(plan.source.folder, folder, set(sources), skip=(CONFIG,))
    for name, content in plan.files().items():
        write_json(folder / name, content)
    return {"weights": weights, **files}
