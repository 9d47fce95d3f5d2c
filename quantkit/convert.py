"""`quantkit convert`: a quantized checkpoint in another format, or dense, without rounding its weights again.

Codes, scales and zero points are taken from the source and laid out anew; integer codes are never derived from floats.
What the target cannot hold is refused with the reason: before anything is written where config and headers tell,
otherwise nothing is left behind. One layer is in memory at a time.

Three things change that are no rounding of weights. AWQ has no symmetric form, so symmetric weights get zero points of
8 there, and lose them again on the way back. ModelOpt's NVFP4 has the reciprocal of the global scale, which float32
may round in the last place. And `dense` is the decoded weight rounded to the model's dtype, which is what an engine
multiplies with; how inputs were quantized is no part of it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from quantkit import formats, hub, numerics, output, packed, stacking
from quantkit import summary as reading
from quantkit.checkpoint import DTYPES, bits_per_weight, nbytes
from quantkit.errors import InputError
from quantkit.formats import awq, gptq
from quantkit.formats._shared import fits
from quantkit.packed import KV_SCALES, Layer, Packed, natural
from quantkit.progress import Progress, Silent
from quantkit.recipe import Export
from quantkit.recipe.errors import hint
from quantkit.shards import ShardWriter
from quantkit.types import Format, QParams, QuantizedTensor, Scheme, TensorSpec

DENSE = "dense"
CONFIG = "config.json"
MAX_WORKERS = 8  # layers at once: each takes about ten times its packed size while it is converted
# Every tensor that a format has for a packed layer. One of another name would be lost without a word.
_PARTS = {
    *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale"),
    *("weight_scale_2", "weight_scale_inv", "qweight", "qzeros", "scales", "g_idx", "pre_quant_scale"),
    *("input_scale", "input_zero_point", "input_global_scale"),
}


@dataclass(frozen=True)
class Plan:
    """A conversion, decided from config and headers.

    target   module of the format to write; None: dense
    dtype    safetensors' name of what scales, or dense weights, are stored as
    layers   the packed layers with the schemes that they will have
    specs    every tensor of the output, in the order of writing
    wholes   those of a dense output that hold all experts of a layer
    """

    source: Packed
    to: str
    target: Format | None
    dtype: str
    layers: dict[str, Layer]
    specs: dict[str, TensorSpec]
    schemes: dict[str, Scheme | None]
    warnings: tuple[str, ...] = ()
    wholes: stacking.Wholes = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A finished conversion: its folder, and how much it is."""

    out: Path
    source_format: str
    to: str
    layers: int
    source_bytes: int
    output_bytes: int


def convert(
    folder: str | Path,
    to: str,
    out: str | Path,
    *,
    overwrite: bool = False,
    shard_size: str = "5GB",
    progress: Progress | None = None,
) -> Result:
    """Writes a quantized folder in another format.

    to          a checkpoint format ("gptq"), or "dense": weights in the model's dtype, not quantized
    overwrite   replace an earlier output that is not the same conversion
    shard_size  largest file of weights, such as 500MB, 5GB or 4GiB

    The output is not validated: its quantkit.json says so. Raises InputError, with the reason, for what the target
    cannot hold, and for an output folder that is not ours; then nothing is left behind.
    """
    progress = progress or Silent()
    source, place = Path(folder).expanduser(), Path(out).expanduser()
    try:
        size = Export(shard_size=shard_size).shard_bytes
    except ValueError:
        raise InputError(f"shard size {shard_size!r}: expected a size such as 500MB, 5GB or 4GiB") from None
    plan = make(source, to)
    history = _history(plan)
    output.check(place, source, None, overwrite=overwrite or _is_same(place, history))
    with output.staged(place) as staging:
        files = _write(plan, staging, size, progress)
        output.write_json(staging / output.SUMMARY, _summary(plan, history, files))
    total = sum(nbytes(spec) for spec in plan.specs.values())
    return Result(place, plan.source.format, to, len(plan.layers), plan.source.checkpoint.size(), total)


def dense_copy(folder: Path, into: Path, *, progress: Progress | None = None) -> tuple[str, ...]:
    """Decodes a quantized folder, from the codes on disk, into an existing empty one, which anything can load.

    Returns what of the quantization is not in the copy: that of inputs, of the KV cache. Raises InputError as `make`.
    """
    plan = make(folder, DENSE)
    _write(plan, into, Export().shard_bytes, progress or Silent())
    return plan.warnings


# Planning ------------------------------------------------------------------------------------------------------------


def make(folder: Path, to: str) -> Plan:
    """Decides the whole conversion without reading weights. Raises InputError for what the target cannot hold."""
    known = [DENSE, *formats.names()]
    if to not in known:
        raise InputError(f"unknown checkpoint format {to!r}; {hint(to, known)}")
    source = packed.open_folder(folder)
    _check(source, to)
    target = None if to == DENSE else formats.get(to)
    model = packed.model_dtype(source)
    dtype = model if target is None else formats.scale_dtype(target, model)
    layers = _layers(source, to)
    schemes: dict[str, Scheme | None] = dict.fromkeys(packed.dense_linears(source))
    schemes |= {name: layer.scheme for name, layer in layers.items()}
    if target is not None:
        target.config(schemes)  # mixed schemes, and what else is a matter of all layers together
    specs: dict[str, TensorSpec] = {}
    dropped = []
    for name in sorted(source.checkpoint.specs, key=natural):
        owner, _, leaf = name.rpartition(".")
        layer = layers.get(owner)
        if layer is not None and leaf in layer.parts:
            if layer.name + "." + next(iter(layer.parts)) == name:
                specs |= {f"{owner}.{part}": spec for part, spec in _tensors(layer, target, dtype).items()}
        elif target is None and source.read.kv_cache is not None and leaf in KV_SCALES:
            dropped.append(name)
        else:
            specs[name] = source.checkpoint.specs[name]
    warnings = [f"{len(dropped)} scales of the KV cache are left out, {dropped[0]} among them"] if dropped else []
    inputs = sorted({x.scheme.activations.number for x in layers.values() if x.scheme.activations is not None})
    if target is None and inputs:
        warnings.append(f"inputs, which are {' and '.join(inputs)} in the source, are not quantized in a dense copy")
    wholes = stacking.wholes(source, dtype) if target is None else {}
    specs = stacking.replaced(specs, wholes)
    return Plan(source, to, target, dtype, layers, specs, schemes, tuple(warnings), wholes)


def _check(source: Packed, to: str) -> None:
    """Refuses what is a matter of the whole checkpoint."""
    if source.format == to:
        raise InputError(f"{source.folder}: is {to} already")
    if source.form.MARKER.startswith("_"):
        raise InputError(
            f"{source.folder}: {source.format} is not converted: its experts lie stacked in one tensor, which no other "
            "format has; transformers decodes it by itself"
        )
    if to != DENSE and source.read.kv_cache is not None:
        raise InputError(
            f"{source.folder}: its KV cache is {source.read.kv_cache.number}, whose scales are not carried over to "
            f"{to}; use --to {DENSE}, which leaves them out"
        )
    for layer in source.layers.values():
        unknown = sorted(layer.parts.keys() - _PARTS)
        if unknown:
            raise InputError(
                f"{layer.name}: has the tensor {unknown[0]!r}, whose meaning in {source.format} is unknown"
            )


def _layers(source: Packed, to: str) -> dict[str, Layer]:
    """The packed layers with their schemes; those of AWQ are symmetric when all zero points say so."""
    if source.form.QUANT_METHOD != awq.QUANT_METHOD or to == DENSE:
        return source.layers
    words = (source.checkpoint.read(f"{name}.qzeros") for name in source.layers)
    if not all(awq.is_symmetric(zeros) for zeros in words):
        return source.layers

    def symmetric(layer: Layer) -> Layer:
        return replace(layer, scheme=replace(layer.scheme, weights=replace(layer.scheme.weights, symmetric=True)))

    return {name: symmetric(layer) for name, layer in source.layers.items()}


def _tensors(layer: Layer, target: Format | None, dtype: str) -> dict[str, TensorSpec]:
    """The tensors of a layer in the target. Raises InputError, with the layer, for what it cannot hold."""
    if target is None:
        return {"weight": TensorSpec(dtype, layer.shape)}
    try:
        return target.tensors(layer.shape, layer.scheme, dtype)
    except InputError as e:
        raise InputError(f"{layer.name} {layer.shape[0]}x{layer.shape[1]}: {e}") from None


# Writing -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _write(plan: Plan, folder: Path, shard_bytes: int, progress: Progress) -> dict[str, Any]:
    """Everything but quantkit.json, into an existing empty folder; returns quantkit.json's list of files."""
    for warning in plan.warnings:
        progress.warn(warning)
    source = plan.source
    writer = ShardWriter(folder, plan.specs, shard_bytes)
    try:
        for name in plan.specs:
            if name in plan.wholes:
                writer.write(name, stacking.put_together(*plan.wholes[name], lambda n: _of_expert(plan, n)))
            elif not _is_packed(plan, name):
                writer.write(name, source.checkpoint.read(name))
        _layers_at_once(plan, writer, progress)
        weights = writer.close()
    finally:
        writer.abort()
    files = output.copy_files(
        source.folder, folder, set(source.checkpoint.where.values()), skip=(CONFIG, output.SUMMARY)
    )
    output.write_json(folder / CONFIG, _config(plan))
    for file, content in (plan.target.files(plan.schemes) if plan.target else {}).items():
        output.write_json(folder / file, content)
    return {"weights": weights, **files}


def _of_expert(plan: Plan, name: str) -> torch.Tensor:
    """The decoded weight of one expert's projection, or its bias."""
    layer, _, leaf = name.rpartition(".")
    return _convert(plan, layer)["weight"] if leaf == "weight" else plan.source.checkpoint.read(name)


def _layers_at_once(plan: Plan, writer: ShardWriter, progress: Progress) -> None:
    """Converts and writes the packed layers, one a core: their places in the file are known, so order does not matter.

    Unpacking and packing are bound by memory, one thread of torch a layer does as well as all of them on it.
    """

    @torch.no_grad()  # a mode of the thread, not of the process
    def one(name: str) -> None:
        for leaf, tensor in _convert(plan, name).items():
            writer.write(f"{name}.{leaf}", tensor)

    threads = torch.get_num_threads()
    workers, layers = min(threads, MAX_WORKERS), [x for x in plan.layers if not _together(plan, x)]
    progress.begin(len(layers), "layer")
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        work = [(name, pool.submit(one, name)) for name in layers]
        for k, (name, done) in enumerate(work, 1):
            progress.item(k, name)
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    progress.end()


def _together(plan: Plan, layer: str) -> bool:
    return any(f"{layer}.weight" in pieces for _, pieces in plan.wholes.values())


def _is_packed(plan: Plan, name: str) -> bool:
    layer, _, leaf = name.rpartition(".")
    return layer in plan.layers and leaf in _PARTS


def _convert(plan: Plan, name: str) -> dict[str, torch.Tensor]:
    """One layer in the target's layout. Raises InputError that names it when its content does not fit there."""
    if (moved := _moved(plan, name)) is not None:
        return moved
    q, inputs = plan.source.unpack(name)
    if plan.target is None:
        return {"weight": numerics.dequantize(q).to(DTYPES[plan.dtype])}
    scheme = plan.layers[name].scheme
    if q.scheme.group_size == 1:
        raise InputError(
            f"{name}: its columns are not in groups that follow each other (act-order's g_idx), or each has a factor "
            f"(pre_quant_scale): {plan.to} has no place for either; use --to {DENSE}"
        )
    if scheme.weights.symmetric and not q.scheme.symmetric:  # AWQ's zero points of 8, see `_layers`
        q = QuantizedTensor(q.codes_NK, replace(q.qparams, zero_NG=None), scheme.weights)
    try:
        q = replace(q, qparams=_stored(plan, q.qparams))
        return plan.target.pack(q, scheme.activations, None if inputs is None else _stored(plan, inputs))
    except InputError as e:
        raise InputError(f"{name}: {e}") from None


def _moved(plan: Plan, name: str) -> dict[str, torch.Tensor] | None:
    """A layer without a look at its codes, where both formats have the same words in other places; else None."""
    layer = plan.source.layers[name]
    known = {"weight_packed", "weight_scale", "weight_zero_point", "weight_shape"}
    words = layer.parts.get("weight_packed")
    if plan.target is not gptq or words is None or words.dtype != "I32" or layer.parts.keys() - known:
        return None
    tensors = {leaf: plan.source.checkpoint.read(f"{name}.{leaf}") for leaf in layer.parts}
    try:
        return gptq.from_packed(tensors, layer.shape, layer.scheme)
    except InputError as e:
        raise InputError(f"{name}: {e}") from None


def _stored(plan: Plan, qparams: QParams) -> QParams:
    """Scales in the model's dtype, where that is the same number, for a format that has no dtype of its own.

    Others look for themselves whether theirs fits. Scales in FP8 and E8M0 are left as they are.
    """
    scale = qparams.scale_NG
    if hasattr(plan.target, "SCALE_DTYPE") or scale.dtype.itemsize == 1:
        return qparams
    return replace(qparams, scale_NG=fits(plan.to, "scales", scale, DTYPES[plan.dtype]))


def _config(plan: Plan) -> dict[str, Any]:
    """config.json with the target's quantization_config in place of the source's, wherever that was."""
    keys = ("quantization_config", "compression_config")
    config = {key: value for key, value in plan.source.config.items() if key not in keys}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {key: value for key, value in config["text_config"].items() if key not in keys}
    if plan.target is not None:
        config["quantization_config"] = plan.target.config(plan.schemes)
    return config


# quantkit.json -------------------------------------------------------------------------------------------------------


def _earlier(folder: Path) -> dict[str, Any]:
    """quantkit.json of a folder; empty when it has none."""
    return reading.read(folder) if (folder / output.SUMMARY).is_file() else {}


def _history(plan: Plan) -> dict[str, Any]:
    """What the output says of where it comes from, conversions before this one included."""
    fingerprint = hub.Source(str(plan.source.folder), plan.source.folder).fingerprint()
    before = _earlier(plan.source.folder).get("converted_from")
    return {
        "format": plan.source.format,
        "fingerprint": fingerprint,
        "to": plan.to,
        **({"converted_from": before} if before else {}),
    }


def _is_same(out: Path, history: dict[str, Any]) -> bool:
    """Whether a folder is the finished output of the same conversion."""
    return out.is_dir() and _earlier(out).get("converted_from") == history


def _summary(plan: Plan, history: dict[str, Any], files: dict[str, Any]) -> dict[str, Any]:
    """The source's quantkit.json, as far as it still holds; of another tool's checkpoint, what is known."""
    kept = _earlier(plan.source.folder) or {"source": None, "layers": [], "size": {}}
    layers = []
    for entry in kept.get("layers", []):
        layer = plan.layers.get(entry["name"])
        if layer is not None:
            bits = bits_per_weight(_tensors(layer, plan.target, plan.dtype), layer.shape[0] * layer.shape[1])
            entry = {**entry, "bits_per_weight": round(bits, 4)}
        layers.append(entry)
    return {
        **kept,
        "status": "unvalidated",
        "converted_from": history,
        "layers": layers,
        "files": files,
        "size": {**kept.get("size", {}), "output_bytes": sum(nbytes(spec) for spec in plan.specs.values())},
        "validation": None,
    }
