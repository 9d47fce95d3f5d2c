"""`quantkit inspect`: what a model, or a quantized checkpoint, is made of; from headers and config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit import blocks, formats, hub, output, skeleton
from quantkit.checkpoint import Checkpoint, nbytes
from quantkit.errors import InputError
from quantkit.plan import short
from quantkit.types import Scheme


def inspect(path: str) -> dict[str, Any]:
    """Describes a model: its blocks, the linears that share an input; or, when quantized, the scheme of each layer.

    path  a Hub id, a folder, or builtin:NAME
    Returns plain values: title, facts, table, warnings. Raises InputError for what cannot be read.
    """
    source = hub.resolve(path)
    config = hub.read_json(source.folder / "config.json")
    checkpoint = Checkpoint.open(source.folder)
    facts: list[tuple[str, str]] = [
        ("model", ", ".join(config.get("architectures") or [str(config.get("model_type", "?"))])),
        (
            "size",
            f"{checkpoint.size():,} bytes in {len(checkpoint.specs)} tensors",
        ),
    ]
    quantization = formats.quantization_config(config)
    if quantization is not None:
        return _quantized(source, checkpoint, quantization, facts)
    return _original(source, checkpoint, facts)


def _original(source: hub.Source, checkpoint: Checkpoint, facts: list[tuple[str, str]]) -> dict[str, Any]:
    ghost = skeleton.build(source.folder, checkpoint)
    structure = blocks.find(ghost)
    block = structure.blocks[0]
    rows = []
    for i, group in enumerate(block.groups, 1):
        for name in group:
            weight = ghost.model.get_submodule(name).weight
            rows.append([name.removeprefix(block.name + "."), f"{weight.shape[0]} x {weight.shape[1]}", str(i)])
    facts += [
        ("blocks", f"{len(structure.blocks)}: {block.name} to {structure.blocks[-1].name}"),
        ("outside blocks", ", ".join(structure.outside) or "no linear layer"),
        ("dtype", str(ghost.dtype).removeprefix("torch.")),
    ]
    if ghost.unknown:
        facts.append(("without a place", ", ".join(ghost.unknown[:8])))
    alike = all(_shape(b, ghost) == _shape(block, ghost) for b in structure.blocks)
    warnings = [*structure.warnings, *([] if alike else ["the blocks differ; the table shows the first"])]
    table = {"columns": ["linear in a block", "shape", "input"], "rows": rows}
    return {"title": f"{source.model}", "facts": facts, "table": table, "warnings": warnings}


def _shape(block: blocks.Block, ghost: skeleton.Skeleton) -> list[tuple[str, tuple[int, ...]]]:
    return [(n.removeprefix(block.name), tuple(ghost.model.get_submodule(n).weight.shape)) for n in block.linears]


def _quantized(
    source: hub.Source, checkpoint: Checkpoint, quantization: dict[str, Any], facts: list[tuple[str, str]]
) -> dict[str, Any]:
    method = str(quantization.get("quant_method"))
    facts.append(("quantized by", method + (f", {quantization['format']}" if "format" in quantization else "")))
    errors, warnings = {}, []
    summary_file = Path(source.folder) / output.SUMMARY
    if summary_file.is_file():
        summary = hub.read_json(summary_file)
        facts.append(("status", str(summary.get("status"))))
        facts.append(("made from", str(summary.get("source", {}).get("model"))))
        errors = {x["name"]: x["relative_error"] for x in summary.get("layers", [])}
    if method not in formats.names():
        raise InputError(f"{source.folder}: is quantized by {method!r}; inspect knows {', '.join(formats.names())}")
    config = formats.get(method).read_config(quantization)
    if config.unsupported:
        warnings.append(f"quantkit cannot read this checkpoint: {config.unsupported}")
    rows = []
    for name in sorted(checkpoint.specs, key=_natural):
        layer, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "weight_packed") or len(checkpoint.specs[name].shape) != 2:
            continue
        parts = [n for n in checkpoint.specs if n.startswith(layer + ".weight")]
        size = sum(nbytes(checkpoint.specs[n]) for n in parts)
        dense = leaf == "weight" and f"{layer}.weight_scale" not in checkpoint.specs
        scheme = None if config.unsupported or dense else config.scheme_for(layer)
        n, k = _dense_shape(checkpoint, layer, leaf, scheme)
        what = short(scheme) if scheme else (checkpoint.specs[name].dtype if leaf == "weight" else "packed")
        error = f"{errors[layer]:.2e}" if layer in errors else ""
        rows.append([layer, f"{n} x {k}", what, f"{8 * size / (n * k):.3f}", f"{size:,}", error])
    columns = ["layer", "shape", "scheme", "bits a weight", "bytes", "relative error"]
    return {"title": source.model, "facts": facts, "table": {"columns": columns, "rows": rows}, "warnings": warnings}


def _dense_shape(checkpoint: Checkpoint, layer: str, leaf: str, scheme: Scheme | None) -> tuple[int, int]:
    shape_name = f"{layer}.weight_shape"
    if leaf == "weight_packed" and shape_name in checkpoint.specs:
        n, k = checkpoint.read(shape_name).tolist()
        return int(n), int(k)
    if leaf == "weight_packed" and scheme is not None and scheme.weights.group_size is not None:
        n, groups = checkpoint.specs[f"{layer}.weight_scale"].shape
        return n, groups * scheme.weights.group_size
    n, k = checkpoint.specs[f"{layer}.{leaf}"].shape
    return n, k


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")]
