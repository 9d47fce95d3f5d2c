"""What of a plan goes into the output's shards: tensors in no block, a block's, the scales of its KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantkit import blocks, formats, skeleton, solve
from quantkit import kv_cache as kv
from quantkit.checkpoint import DTYPES
from quantkit.errors import InputError
from quantkit.linears import whole
from quantkit.plan import Plan, outside
from quantkit.shards import ShardWriter


def embeddings(plan: Plan, writer: ShardWriter) -> None:
    """Writes what is in no block: embeddings, last norm, head."""
    ghost = plan.skeleton
    ghost.checkpoint.expect(plan.reading, 0)
    for name in outside(ghost, plan.structure):
        dtype = DTYPES[skeleton.spec_of(ghost, name).dtype]
        writer.write(ghost.to_disk[name], ghost.read(name).to(dtype))


def block(
    plan: Plan, writer: ShardWriter, names: Sequence[str], solved: dict[str, solve.Solved], dtype: torch.dtype
) -> None:
    """Writes a block: codes of what was quantized, the rest as it is now. Leaves its parameters in `dtype`."""
    ghost = plan.skeleton
    for found in solved.values():
        layer = found.layer
        assert layer.scheme is not None
        for suffix, tensor in plan.format.pack(found.tensor, layer.scheme.activations, found.inputs).items():
            writer.write(f"{layer.name}.{suffix}", tensor)
    wholes = dict.fromkeys(whole(ghost, plan.linears, name) for name in names)
    for disk in wholes:
        if disk is not None:
            writer.write(disk, ghost.whole(disk) if plan.rewrites else ghost.checkpoint.read(disk))
    for name in names:
        if name.removesuffix(".weight") in solved and name.endswith(".weight"):
            continue
        if plan.rewrites:
            spec = skeleton.spec_of(ghost, name)
            if whole(ghost, plan.linears, name) is None:
                writer.write(ghost.to_disk[name], ghost.get(name).to(DTYPES[spec.dtype]))
            if ghost.get(name).is_floating_point():
                ghost.put(name, ghost.get(name).to(DTYPES[spec.dtype]).to(dtype))
        elif whole(ghost, plan.linears, name) is None:
            writer.write(ghost.to_disk[name], ghost.original(name))


def kv_cache(plan: Plan, writer: ShardWriter, block: blocks.Block, peaks: kv.Peaks) -> dict[str, list[float]]:
    """Writes the scales of a block's keys and values, and gives them, by name after the attention layer's own."""
    scheme = plan.kv_scheme
    assert scheme is not None
    attention = plan.caches[block.index]
    try:
        scales = peaks.scales(scheme.strategy, plan.skeleton.dtype)
    except InputError as e:
        raise InputError(f"{block.name}: {e}") from None
    tensors = formats.with_kv_cache(plan.format).pack_kv(*scales, scheme)
    for leaf, tensor in tensors.items():
        writer.write(f"{attention.name}.{leaf}", tensor)
    return {leaf: tensor.flatten().tolist() for leaf, tensor in tensors.items()}
