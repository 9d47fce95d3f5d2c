"""The whole story of a run, top to bottom: one block in memory at a time, from the source's shards to the output's.

    open the writer        every byte of the output has its place, the disk's room is reserved
    run up to the blocks   calibration rows become hidden states
    for each block         load it; observe each distinct input of its linears; round each weight once; write it;
                           put the decoded weights in its place and run it again, so that the next block sees
                           what it will see in production
    finish                 the rest of the tensors, config.json, every other file of the source

Writes into a folder that the caller made, and never to any other place. Nothing here says that the output is good:
that is for validation, after a reload from disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit import algorithms, blocks, calibration, formats, kv_cache, numerics
from quantkit.checkpoint import DTYPES, ShardWriter, bits_per_weight
from quantkit.errors import InputError
from quantkit.hub import read_json
from quantkit.numerics._activations import Magnitudes
from quantkit.output import copy_files, write_json
from quantkit.plan import Linear, Plan, outside, short, tokenizer
from quantkit.progress import Progress
from quantkit.stats import Observer
from quantkit.types import Notes, QParams, QuantizedTensor, Scheme, Stats, TensorScheme

CONFIG = "config.json"


@dataclass
class Run:
    """One run under way: the plan, where it computes, what it has found out so far."""

    plan: Plan
    writer: ShardWriter
    device: torch.device
    dtype: torch.dtype
    progress: Progress
    layers: list[dict[str, Any]] = field(default_factory=list)
    kv_scales: dict[str, list[float]] = field(default_factory=lambda: {"k_scale": [], "v_scale": []})


@torch.no_grad()
def quantize(plan: Plan, folder: Path, *, device: torch.device, progress: Progress) -> dict[str, Any]:
    """Quantizes a planned model into an empty folder; returns what quantkit.json says of the layers, data and files.

    device  where blocks are computed; on the CPU in float32, on a GPU in the checkpoint's dtype
    """
    for warning in plan.warnings:
        progress.warn(warning)
    rows = _rows(plan, progress)
    dtype = torch.float32 if device.type == "cpu" else plan.skeleton.dtype
    writer = ShardWriter(folder, plan.specs, plan.recipe.export.shard_bytes)
    run = Run(plan, writer, device, dtype, progress)
    try:
        progress.begin(len(plan.structure.blocks), "block")
        batches = _outside(run, rows)
        for block in plan.structure.blocks:
            progress.item(block.index + 1, block.name)
            _block(run, block, batches)
        for name in plan.skeleton.unknown:
            writer.write(name, plan.skeleton.checkpoint.read_finite(name))
        progress.end()
        weights = writer.close()
    finally:
        writer.abort()
    files = _files(plan, folder, weights)
    return {"data": _data(rows), "kv_cache": _kv_range(run), "layers": run.layers, "files": files}


def _rows(plan: Plan, progress: Progress) -> calibration.Rows | None:
    """The calibration rows, or None for a method that needs none."""
    if not plan.needs_data:
        return None
    wanted = plan.recipe.calibration
    rows = calibration.pack_rows(
        calibration.load_texts(wanted.data),
        tokenizer(plan.source, trust_remote_code=plan.recipe.trust_remote_code),
        samples=wanted.samples,
        length=wanted.length,
        packing=wanted.packing,
    )
    report = rows.report
    if report["rows"] < wanted.samples:
        progress.warn(
            f"calibration data {wanted.data} gives {report['rows']} rows of {wanted.length} tokens, "
            f"not the {wanted.samples} that the recipe asks for"
        )
    vocabulary = plan.skeleton.model.get_input_embeddings().num_embeddings
    if int(rows.ids_RL.max()) >= vocabulary:
        raise InputError(
            f"{plan.source.folder}: the tokenizer gives token {int(rows.ids_RL.max())}, but the model has only "
            f"{vocabulary} embeddings; they do not belong together"
        )
    progress.say(
        f"calibration: {report['tokens']:,} tokens in {report['rows']} rows of {wanted.length} from {wanted.data}"
    )
    widest = max(x.shape[1] for x in plan.quantized)
    if report["tokens"] < 4 * widest:
        progress.warn(
            f"only {report['tokens']:,} calibration tokens for layers of {widest} inputs; below {4 * widest:,} "
            "the statistics fit the calibration text more than the model: raise calibration.samples or length"
        )
    return rows


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


def _outside(run: Run, rows: calibration.Rows | None) -> list[blocks.Batch]:
    """Writes what is in no block, and takes the calibration rows up to the first block."""
    plan, ghost = run.plan, run.plan.skeleton
    names = outside(ghost, plan.structure)
    run.progress.doing("embeddings")
    for name in names:
        disk = ghost.to_disk[name]
        run.writer.write(disk, ghost.checkpoint.read_finite(disk))
    if rows is None:
        return []
    ghost.load(names, run.device, run.dtype)
    ghost.tie()
    for buffer in ghost.model.buffers():
        buffer.data = buffer.data.to(run.device)
    size = plan.recipe.calibration.batch_size
    pairs = zip(rows.ids_RL.split(size), rows.mask_RL.split(size), strict=True)
    batches = blocks.begin(ghost, plan.structure, [(i.to(run.device), m.to(run.device)) for i, m in pairs])
    ghost.unload(names)
    return batches


def _block(run: Run, block: blocks.Block, batches: list[blocks.Batch]) -> None:
    """One block: observe, quantize, write, and run on with the decoded weights."""
    ghost, linears = run.plan.skeleton, run.plan.linears
    names = ghost.parameters(block.name + ".")
    ghost.load(names, run.device, run.dtype)
    module = ghost.model.get_submodule(block.name)
    peaks = kv_cache.Peaks() if run.plan.caches else None
    observers = _observe(run, block, module, batches, peaks)
    if peaks is not None:
        _write_kv(run, block, peaks)
    packed: set[str] = set()
    for k, group in enumerate(block.groups, 1):
        run.progress.doing(f"quantize {k}/{len(block.groups)}")
        for alike in _by_scheme([linears[m] for m in group if linears[m].scheme is not None]):
            observer = observers.get(alike[0].module)
            stats = None if observer is None else observer.result()
            _solve(run, alike, stats)
            packed.update(f"{x.module}.weight" for x in alike)
        for m in group:
            observers.pop(m, None)
    for name in names:
        if name not in packed:
            disk = ghost.to_disk[name]
            run.writer.write(disk, ghost.checkpoint.read(disk))
    if batches and block.index + 1 < len(run.plan.structure.blocks):
        run.progress.doing("run with quantized weights")
        for batch in batches:
            batch.hidden = blocks.run(module, batch, block.index)
    ghost.unload(names)


def _observe(
    run: Run, block: blocks.Block, module: nn.Module, batches: list[blocks.Batch], peaks: kv_cache.Peaks | None
) -> dict[str, Observer]:
    """Runs the block over all batches; one observer for each distinct input, under the name of each linear of it.

    peaks  takes the keys and values, when their scales are wanted
    """
    needs = algorithms.get(run.plan.recipe.method_name).needs(run.plan.recipe.method_options)
    linears = run.plan.linears
    shared: dict[str, Observer] = {}
    first: dict[str, Observer] = {}
    for group in block.groups if batches else ():
        schemes = [s for m in group if (s := linears[m].scheme) is not None]
        wanted = needs.union(*(_input_needs(run, s) for s in schemes))
        if schemes and wanted:
            observer = Observer(wanted, linears[group[0]].shape[1], run.device)
            first[group[0]] = observer
            shared.update(dict.fromkeys(group, observer))
    if not first and peaks is None:
        return {}
    run.progress.doing("observe")
    for batch in batches:

        def see(name: str, x: torch.Tensor, mask: torch.Tensor = batch.mask) -> None:
            try:
                first[name].update(x, mask)
            except InputError as e:
                raise InputError(f"{linears[name].name}: {e}") from None

        with blocks.watched(run.plan.skeleton.model, list(first), see):
            if peaks is None:
                blocks.run(module, batch, block.index)
            else:
                kv_cache.observe(module, batch, block, peaks)
    return shared


def _input_needs(run: Run, scheme: Scheme) -> frozenset[str]:
    """The statistics that the scale of a layer's input needs."""
    if not scheme.calibrates_input or scheme.activations is None:
        return frozenset()
    counted = not scheme.activations.dynamic and run.plan.recipe.calibration.input_scale != "absmax"
    return frozenset({"absmax", "magnitudes"} if counted else {"absmax"})


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


def _by_scheme(group: Sequence[Linear]) -> list[list[Linear]]:
    """Layers that can be solved together: those with one scheme and one dtype.

    They then share scales of the whole tensor, as engines that fuse them want it. A tile of rows must not reach from
    one layer into the next: layers whose rows are no multiple of it are solved alone.
    """
    alike: dict[tuple[Any, str], list[Linear]] = {}
    for layer in group:
        alike.setdefault((layer.scheme, layer.dtype), []).append(layer)
    found: list[list[Linear]] = []
    for layers in alike.values():
        tile = _tile(layers[0].scheme.weights) if layers[0].scheme else 1
        straddles = any(x.shape[0] % tile for x in layers[:-1])
        found += [[x] for x in layers] if straddles else [layers]
    return found


def _tile(scheme: TensorScheme) -> int:
    """Rows of a weight that share their scales."""
    return scheme.block_shape[0] if scheme.strategy == "block" and scheme.block_shape else 1


def _solve(run: Run, layers: list[Linear], stats: Stats | None) -> None:
    """Quantizes linears of one input and scheme as one stacked weight; writes them, puts the decoded ones in place."""
    recipe, model = run.plan.recipe, run.plan.skeleton.model
    scheme = layers[0].scheme
    assert scheme is not None
    weights = [model.get_submodule(x.module).weight for x in layers]
    algorithm = algorithms.get(recipe.method_name)
    scale_dtype = DTYPES[formats.scale_dtype(run.plan.format, layers[0].dtype)]
    notes = Notes()
    try:
        q = algorithm.quantize(
            torch.cat(weights).float(),
            scheme.weights,
            stats,
            options=recipe.method_options,
            scale_dtype=scale_dtype,
            notes=notes,
        )
        inputs = _input_scales(scheme, stats, scale_dtype, recipe.calibration.input_scale)
    except InputError as e:
        raise InputError(f"{', '.join(x.name for x in layers)}: {e}") from None
    for layer, weight, part in zip(layers, weights, _split(q, [x.shape[0] for x in layers]), strict=True):
        decoded = numerics.dequantize(part)
        _record(run, layer, weight, decoded, stats, notes)
        for suffix, tensor in run.plan.format.pack(part, scheme.activations, inputs).items():
            run.writer.write(f"{layer.name}.{suffix}", tensor)
        # What an engine multiplies with is rounded to the model's dtype.
        run.plan.skeleton.put(f"{layer.module}.weight", decoded.to(DTYPES[layer.dtype]).to(run.dtype))


def _input_scales(scheme: Scheme, stats: Stats | None, dtype: torch.dtype, rule: str) -> QParams | None:
    """The scales of a layer's input that are stored; None for a scheme without them.

    rule  how a static scale is found, by the names of `Magnitudes.scale`; "absmax" is exact, from the largest |x|
    """
    if not scheme.calibrates_input or scheme.activations is None:
        return None
    if stats is None or stats.absmax_K is None or not float(stats.absmax_K.max()) > 0:
        raise InputError(
            "no calibration token gave this layer an input, so its input scale cannot be found; use more calibration "
            "data, or a scheme with dynamic activations"
        )
    number = numerics.get(scheme.activations.number)
    found: QParams = number.qparams(stats.absmax_K[None], scheme.activations, scale_dtype=dtype)
    if rule == "absmax" or scheme.activations.dynamic or stats.magnitudes is None:
        return found
    scale = Magnitudes(counts=stats.magnitudes).scale(scheme.activations, rule).to(dtype)
    return QParams(torch.where(scale == 0, torch.finfo(dtype).eps, scale).reshape(1, 1))


def _split(q: QuantizedTensor, rows: list[int]) -> list[QuantizedTensor]:
    """Takes a stacked weight apart again, by rows. Scales of a whole tensor go to every part."""
    parts = []
    whole, tile = q.scheme.strategy == "tensor", _tile(q.scheme)
    for start, count in zip(torch.tensor([0, *rows]).cumsum(0).tolist(), rows, strict=False):

        def cut(t: torch.Tensor | None, start: int = start, count: int = count) -> torch.Tensor | None:
            return t if t is None or whole else t[start // tile : -(-(start + count) // tile)].contiguous()

        scale = cut(q.qparams.scale_NG)
        assert scale is not None
        qparams = QParams(scale, cut(q.qparams.zero_NG), q.qparams.global_scale)
        parts.append(QuantizedTensor(q.codes_NK[start : start + count].contiguous(), qparams, q.scheme))
    return parts


def _record(
    run: Run, layer: Linear, weight: torch.Tensor, decoded: torch.Tensor, stats: Stats | None, notes: Notes
) -> None:
    """One line of the report: how far the layer is from what it was, in its output when its inputs are known."""
    w, d = weight.float(), weight.float() - decoded
    gram = None if stats is None else stats.gram_KK
    if gram is None:
        kind, error, whole = "weight", float(d.square().sum()), float(w.square().sum())
    else:
        kind, error, whole = "output", float(((d @ gram) * d).sum()), float(((w @ gram) * w).sum())
    bits = bits_per_weight(run.plan.tensors(layer), layer.shape[0] * layer.shape[1])
    run.layers.append(
        {
            "name": layer.name,
            "scheme": short(layer.scheme),
            "shape": list(layer.shape),
            "bits_per_weight": round(bits, 4),
            "relative_error": error / whole if whole else 0.0,
            "error_of": kind,
            "tokens": stats.tokens if stats else 0,
            "notes": list(notes.lines),
        }
    )
    for line in notes.lines:
        run.progress.warn(f"{layer.name}: {line}")


def _files(plan: Plan, folder: Path, weights: list[str]) -> dict[str, Any]:
    """config.json with what was done, every other file of the source, and the format's own."""
    config = read_json(plan.source.folder / CONFIG)
    config["quantization_config"] = plan.config()
    write_json(folder / CONFIG, config)
    sources = plan.skeleton.checkpoint.where.values()
    files = copy_files(plan.source.folder, folder, set(sources), skip=(CONFIG,))
    for name, content in plan.files().items():
        write_json(folder / name, content)
    return {"weights": weights, **files}
