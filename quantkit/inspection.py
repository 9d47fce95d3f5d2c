"""`quantkit inspect`: what a model, or a quantized checkpoint, is made of; from headers and config alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from quantkit import blocks, formats, hub, output, packed, skeleton
from quantkit.checkpoint import Checkpoint, nbytes
from quantkit.plan import short
from quantkit.types import Format, Scheme, TensorSpec


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
    quantization = packed.find_config(source.folder, config)
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
    form = formats.by_method(method)
    config = form.read_config(quantization)
    warnings = [f"quantkit cannot read this checkpoint: {config.unsupported}"] if config.unsupported else []
    summary_file = source.folder / output.SUMMARY
    summary = hub.read_json(summary_file) if summary_file.is_file() else {}
    if summary:
        facts.append(("status", str(summary.get("status"))))
        facts.append(("made from", str((summary.get("source") or {}).get("model", "another tool's checkpoint"))))
    errors = {x["name"]: x["relative_error"] for x in summary.get("layers", [])}
    found = packed.groups(form, checkpoint.specs)
    rows = []
    for name in sorted({*found, *_dense(checkpoint, found)}, key=packed.natural):
        if name in found:
            scheme = None if config.unsupported else config.scheme_for(name)
            shape, what, size = _packed(form, checkpoint, name, found[name], scheme)
        else:
            spec = checkpoint.specs[f"{name}.weight"]
            shape, what, size = spec.shape, spec.dtype, nbytes(spec)
        weights = math.prod(shape)
        rows.append(
            [
                name,
                " x ".join(map(str, shape)) or "?",
                what,
                f"{8 * size / weights:.3f}" if shape else "?",
                f"{size:,}",
                f"{errors[name]:.2e}" if name in errors else "",
            ]
        )
    columns = ["layer", "shape", "scheme", "bits a weight", "bytes", "relative error"]
    return {"title": source.model, "facts": facts, "table": {"columns": columns, "rows": rows}, "warnings": warnings}


def _dense(checkpoint: Checkpoint, found: Mapping[str, Any]) -> list[str]:
    """Matrices that are not packed, embeddings among them."""
    names = [n.removesuffix(".weight") for n, s in checkpoint.specs.items() if n.endswith(".weight")]
    return [n for n in names if n not in found and len(checkpoint.specs[f"{n}.weight"].shape) == 2]


def _packed(
    form: Format, checkpoint: Checkpoint, name: str, parts: Mapping[str, TensorSpec], scheme: Scheme | None
) -> tuple[tuple[int, ...], str, int]:
    """Shape of a packed layer, () when nothing tells it; its scheme in words; bytes of its weight with scales.

    Experts that are stacked in one tensor have their number in front of the shape.
    """
    weight = {leaf: spec for leaf, spec in parts.items() if not leaf.startswith("input_")}
    size = sum(nbytes(spec) for spec in weight.values())
    if scheme is None:
        return (), "packed", size
    shape: tuple[int, ...] = packed.shape_of(form, checkpoint, name, parts, scheme) or ()
    if form.MARKER.startswith("_"):
        shape = (*parts[form.MARKER].shape[:-3], *shape)
    return shape, short(scheme), size
