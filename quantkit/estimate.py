"""What a run will take of this machine, before it starts: the plan in words and numbers for `quantkit plan`."""

from __future__ import annotations

from typing import Any

import torch

from quantkit import inventory, skeleton
from quantkit.checkpoint import DTYPES, nbytes
from quantkit.plan import Linear, Plan, outside, short


def memory(plan: Plan, device: torch.device, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that the work will hold at once, part by part; `total` is the estimated peak without the Python process."""
    ghost, recipe = plan.skeleton, plan.recipe
    size = dtype.itemsize
    block = max(sum(_numel(ghost, p) for p in ghost.parameters(b.name + ".")) for b in plan.structure.blocks)
    stacked = max(
        sum(plan.linears[m].shape[0] for m in group) * plan.linears[group[0]].shape[1]
        for b in plan.structure.blocks
        for group in b.groups
    )
    parts = {"one block": block * size, "one group of linears while it is solved": stacked * 4 * 6}
    if plan.needs_data:
        hidden = int(ghost.model.config.get_text_config().hidden_size)
        rows, length = recipe.calibration.samples, recipe.calibration.length
        blocks = ([plan.linears[g[0]].shape[1] for g in b.groups] for b in plan.structure.blocks)
        inputs = max(blocks, key=lambda widths: sum(k * k for k in widths))
        widest = max(inputs)
        parts["embeddings and head"] = sum(_numel(ghost, p) for p in outside(ghost, plan.structure)) * size
        parts["hidden states"] = rows * length * hidden * size
        parts["statistics"] = sum(k * k * 4 for k in inputs) + 5 * widest * widest * 4
        parts["one batch in a block"] = (
            min(rows, recipe.calibration.batch_size) * length * (4 * hidden + 3 * widest) * size
        )
    return {**parts, "total": sum(parts.values())}


def _numel(ghost: skeleton.Skeleton, name: str) -> int:
    return nbytes(skeleton.spec_of(ghost, name)) // DTYPES[skeleton.spec_of(ghost, name).dtype].itemsize


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as plain values for a person: title, facts, a table of what happens to which layers, warnings."""
    recipe = plan.recipe
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else plan.skeleton.dtype
    parts = memory(plan, device, dtype)
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
        ("disk", f"{output:,} bytes, reserved before the work starts"),
        ("device", str(device)),
        ("memory", f"about {parts['total']:,} bytes beside the Python process"),
        *((f"  {name}", f"{size:,} bytes") for name, size in parts.items() if name != "total"),
    ]
    if plan.needs_data:
        wanted = recipe.calibration
        facts.append(("calibration", f"{wanted.samples} rows of {wanted.length} tokens from {wanted.data}"))
    else:
        facts.append(("calibration", f"none: {recipe.method_name} reads no data"))
    return {
        "title": f"plan for {plan.source.name}",
        "facts": facts,
        "table": {"columns": ["layers", "how many", "shape", "becomes"], "rows": _kinds(list(plan.linears.values()))},
        "warnings": list(plan.warnings),
    }


def _kinds(linears: list[Linear]) -> list[list[str]]:
    """Linears of one kind in one row: their names with the block's number as *."""
    kinds: dict[tuple[str, str, str], int] = {}
    for x in linears:
        name = ".".join("*" if part.isdigit() else part for part in x.name.split("."))
        what = short(x.scheme) if x.scheme else f"stays {x.dtype}: {x.reason}"
        key = (name, f"{x.shape[0]} x {x.shape[1]}", what)
        kinds[key] = kinds.get(key, 0) + 1
    return [[name, str(count), shape, what] for (name, shape, what), count in kinds.items()]
