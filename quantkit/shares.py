"""How a run is divided among ranks: which of them solves which matrices of a block, and how the codes come to all.

Linears that read one input stay together, with its statistics: the rank that has these needs nothing of the others to
solve. Afterwards each gets all codes, and decodes them by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from quantkit.blocks import Block
from quantkit.calibration import Rows
from quantkit.errors import InputError
from quantkit.linears import Linear
from quantkit.plan import Plan
from quantkit.ranks import Ranks, assign
from quantkit.shards import ShardWriter
from quantkit.skeleton import Skeleton
from quantkit.solve import Solved
from quantkit.types import QParams, QuantizedTensor

# What a column costs whatever the number of rows, in rows: measured, as kernels/RESULTS.md has it (4096 rows of 4096
# columns take 20 ms, 28672 take 54).
COLUMN = 1 << 25
WRITING = 2300.0  # for a weight: what packing and writing it, which rank 0 does, takes of the same


def rows(found: Rows | None, plan: Plan, ranks: Ranks) -> Rows | None:
    """The calibration rows that rank 0 found, on every rank; None for a plan that needs none.

    Raises InputError when they are too few batches for as many ranks.
    """
    report = ranks.told(None if found is None else found.report)
    if report is None or ranks.alone:
        return found
    ids, mask = ranks.spread({} if found is None else {0: [found.ids_RL, found.mask_RL]}, "cpu")[0]
    size = plan.recipe.calibration.batch_size
    if ranks.size > (most := -(-len(ids) // size)):
        raise InputError(
            f"{len(ids)} calibration rows are {most} batches of up to {size}, too few for {ranks.size} ranks; start no "
            f"more than {most}, or lower calibration.batch_size or raise calibration.samples"
        )
    return Rows(ids, mask, report)


class Nowhere(ShardWriter):
    """The writer of all ranks but the first: what they have to write, rank 0 has too."""

    def __init__(self) -> None:
        pass

    def write(self, name: str, tensor: torch.Tensor) -> None:
        pass

    def take(self, names: Iterable[str] | None = None) -> dict[str, int]:
        return {}

    def flush(self, names: Iterable[str]) -> None:
        pass

    def close(self) -> list[str]:
        return []

    def abort(self) -> None:
        pass


def owners(block: Block, plan: Plan, size: int) -> dict[str, int]:
    """The rank of each group of linears that read one input, by its first: for its statistics, and to solve it."""
    shapes = [
        (sum(plan.linears[m].shape[0] for m in group if plan.linears[m].scheme), plan.linears[group[0]].shape[1])
        for group in block.groups
    ]
    ranks = assign([cost(*shape) for shape in shapes], size, WRITING * sum(n * k for n, k in shapes))
    return {group[0]: rank for group, rank in zip(block.groups, ranks, strict=True)}


def load(ghost: Skeleton, names: Sequence[str], device: torch.device, dtype: torch.dtype, ranks: Ranks) -> None:
    """As `Skeleton.load`: each rank reads some of the matrices, and gives them to the others."""
    large = [] if ranks.alone else [name for name in names if ghost.get(name).ndim > 1]
    ghost.load([name for name in names if name not in large], device, dtype)
    readers = assign([float(ghost.get(name).numel()) for name in large], ranks.size)
    mine = [name for name, rank in zip(large, readers, strict=True) if rank == ranks.rank]
    ghost.load(mine, device, dtype)
    everything = ranks.spread({i: [ghost.get(name)] for i, name in enumerate(large) if name in mine}, device)
    for name, (tensor,) in zip(large, everything, strict=True):
        ghost.put(name, tensor)


def cost(n: int, k: int) -> float:
    """Of solving a weight (N, K), about: the products N K² and a column's own time."""
    return float(k) * (n * k + COLUMN)


def exchange(
    stacks: Sequence[Sequence[Linear]], mine: Mapping[int, Sequence[Solved]], ranks: Ranks, device: torch.device
) -> list[Solved]:
    """All layers, solved, in the order of the stacks, on every rank.

    stacks  layers that are solved as one weight
    mine    those that were solved here, by the number of their stack
    """
    if ranks.alone:
        return [x for k in sorted(mine) for x in mine[k]]
    parts = {k: [_parts(x) for x in solved] for k, solved in mine.items()}
    said = {k: [[list(part), x.report] for part, x in zip(parts[k], solved, strict=True)] for k, solved in mine.items()}
    reports = {int(k): x for one in ranks.everyone(said) for k, x in one.items()}
    tensors = ranks.spread({k: [t for part in one for t in part.values()] for k, one in parts.items()}, device)
    found: list[Solved] = []
    for k, layers in enumerate(stacks):
        if k in mine:
            found += mine[k]
            continue
        left = iter(tensors[k])
        for layer, (names, report) in zip(layers, reports[k], strict=True):
            found.append(_whole(layer, {name: next(left) for name in names}, report))
    return found


def _parts(x: Solved) -> dict[str, torch.Tensor]:
    """The tensors of a solved layer, without those that it does not have."""
    q, own = x.tensor.qparams, {"codes": x.tensor.codes_NK}
    own |= {"scale": q.scale_NG, "zero": q.zero_NG, "global": q.global_scale}  # type: ignore[dict-item]
    if x.inputs is not None:
        inputs = {"scale": x.inputs.scale_NG, "zero": x.inputs.zero_NG, "global": x.inputs.global_scale}
        own |= {f"input_{name}": t for name, t in inputs.items()}  # type: ignore[misc]
    return {name: t for name, t in own.items() if t is not None}


def _whole(layer: Linear, parts: Mapping[str, torch.Tensor], report: dict[str, object]) -> Solved:
    assert layer.scheme is not None
    qparams = QParams(parts["scale"], parts.get("zero"), parts.get("global"))
    q = QuantizedTensor(parts["codes"], qparams, layer.scheme.weights)
    inputs = None
    if "input_scale" in parts:
        inputs = QParams(parts["input_scale"], parts.get("input_zero"), parts.get("input_global"))
    return Solved(layer, q, inputs, report)
