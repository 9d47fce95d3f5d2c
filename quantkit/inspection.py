"""`quantkit inspect`: what a model, or a quantized checkpoint, is made of; from headers and config alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from quantkit import blocks, experts, formats, hub, inventory, output, packed, skeleton
from quantkit import summary as reading
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
    checkpoint = source.checkpoint()
    facts: list[tuple[str, str]] = [
        ("model", _architecture(config)),
        (
            "size",
            f"{checkpoint.size():,} bytes in {len(checkpoint.specs)} tensors",
        ),
    ]
    quantization = packed.find_config(source.folder, config)
    if quantization is not None:
        return _quantized(source, checkpoint, quantization, facts)
    return _original(source, checkpoint, facts)


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    known = [x for x in named if isinstance(x, str)] if isinstance(named, list) else []
    return ", ".join(known) or str(config.get("model_type", "?"))


def _original(source: hub.Source, checkpoint: Checkpoint, facts: list[tuple[str, str]]) -> dict[str, Any]:
    ghost = skeleton.build(source.folder, checkpoint)
    structure = blocks.find(ghost)
    block = max(structure.blocks, key=lambda b: len(b.linears))  # the first of them: one with experts, if there is any
    kinds: dict[tuple[str, str], list[int]] = {}  # name and shape -> how many, and the number of their input
    inputs: list[list[str]] = []
    for group in block.groups:
        names = [_starred(name).removeprefix(block.name + ".") for name in group]
        if names not in inputs:
            inputs.append(names)
        for name, own in zip(names, group, strict=True):
            n, k = ghost.model.get_submodule(own).weight.shape
            kinds.setdefault((name, f"{n} x {k}"), [0, inputs.index(names) + 1])[0] += 1
    rows = [[_times(name, count), shape, str(number)] for (name, shape), (count, number) in kinds.items()]
    facts += [
        ("blocks", f"{len(structure.blocks)}: {structure.blocks[0].name} to {structure.blocks[-1].name}"),
        ("outside blocks", ", ".join(structure.outside) or "no linear layer"),
        ("dtype", str(ghost.dtype).removeprefix("torch.")),
    ]
    routers = [n.removeprefix(block.name + ".") for n in experts.routers(ghost.model) if n.startswith(block.name + ".")]
    if routers:
        facts.append(("routers", ", ".join(sorted(routers))))
    if ghost.unknown:
        facts.append(("without a place", ", ".join(ghost.unknown[:8])))
    alike = all(_shape(b, ghost) == _shape(block, ghost) for b in structure.blocks)
    warnings = [*structure.warnings, *([] if alike else [f"the blocks differ; the table shows {block.name}"])]
    table = {"columns": ["linear in a block", "shape", "input"], "rows": rows}
    return {"title": f"{source.model}", "facts": facts, "table": table, "warnings": warnings}


def _starred(name: str) -> str:
    """The name of one expert's projection with * for its number: model.layers.0.mlp.experts.*.up_proj."""
    return re.sub(r"(\.\d+\..*)\.\d+\.(\w+)$", r"\1.*.\2", name)


def _times(name: str, count: int) -> str:
    return f"{name} ({count})" if count > 1 else name


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
    summary = reading.read(source.folder) if (source.folder / output.SUMMARY).is_file() else {}
    if summary:
        facts.append(("status", str(summary.get("status"))))
        facts.append(("made from", str((summary.get("source") or {}).get("model", "another tool's checkpoint"))))
    if tensors := summary.get("tensors"):
        kinds = [f"{tensors[kind]} {kind}" for kind in inventory.KINDS[:-1] if kind in tensors]
        facts.append(("source's tensors", f"{', '.join([*kinds, str(len(tensors['dropped'])) + ' dropped'])}"))
    errors = {x["name"]: x["relative_error"] for x in summary.get("layers", []) if x.get("relative_error") is not None}
    found = packed.groups(form, checkpoint.specs)
    alike: dict[tuple[str, str, str], list[tuple[str, int, int]]] = {}
    for name in sorted({*found, *_dense(checkpoint, found)}, key=packed.natural):
        if name in found:
            scheme = None if config.unsupported else config.scheme_for(name)
            shape, what, size = _packed(form, checkpoint, name, found[name], scheme)
        else:
            spec = checkpoint.specs[f"{name}.weight"]
            shape, what, size = spec.shape, spec.dtype, nbytes(spec)
        key = (_starred(name), " x ".join(map(str, shape)) or "?", what)
        alike.setdefault(key, []).append((name, size, math.prod(shape) if shape else 0))
    rows = []
    for (name, shown, what), members in alike.items():
        size, weights = sum(m[1] for m in members), sum(m[2] for m in members)
        known = [errors[m[0]] for m in members if m[0] in errors]
        rows.append(
            [
                _times(name, len(members)) if len(members) > 1 else members[0][0],
                shown,
                what,
                f"{8 * size / weights:.3f}" if weights else "?",
                f"{size:,}",
                f"{max(known):.2e}" if known else "",
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
