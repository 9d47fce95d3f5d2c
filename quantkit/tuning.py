"""Methods that round all linears of a block together, so that the block's output is right, not each layer's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from quantkit import blocks, observation, solve
from quantkit.algorithms.autoround import Data, Stack
from quantkit.errors import InputError
from quantkit.linears import Linear
from quantkit.plan import Plan
from quantkit.progress import Progress
from quantkit.ranks import ALONE, Ranks
from quantkit.types import Notes, QParams, Stats


def tune(
    plan: Plan,
    block: blocks.Block,
    batches: Sequence[blocks.Batch],
    stats: Mapping[str, Stats],
    progress: Progress,
    ranks: Ranks = ALONE,
) -> list[solve.Solved]:
    """Rounds a loaded block's linears by a method that has `quantize_block`; its weights are as before afterwards.

    batches  with the hidden states of the quantized model, and those of the dense one after this block (`onward`)
    stats    of the linears' inputs, by name in memory
    ranks    each has batches of its own. All take every step; its gradient comes from the rank that has the batch, so
             the codes are those of one process, and so is the time
    Raises InputError naming the block.
    """
    model, module = plan.skeleton.model, plan.skeleton.model.get_submodule(block.name)
    stats = _everywhere(stats, block, ranks, batches[0].mask.device) if batches else stats
    stacks: list[Stack] = []
    layers: list[list[Linear]] = []
    inputs: list[QParams | None] = []
    for group in block.groups:
        for alike in solve.by_scheme([plan.linears[m] for m in group if plan.linears[m].scheme is not None]):
            first, scheme = alike[0], alike[0].scheme
            assert scheme is not None
            seen = stats.get(first.module)
            scales = solve.input_scales(plan, first, seen)
            modules = tuple(_linear(model, x.module) for x in alike)
            dtype = solve.scale_dtype(plan, first)
            activations = scheme.activations if scales is not None or not scheme.calibrates_input else None
            stacks.append(Stack(modules, scheme.weights, seen, dtype, activations, _number(scales)))
            layers.append(alike)
            inputs.append(scales)
    if not stacks:
        return []
    data = _data(module, block, batches, ranks)
    notes = Notes()
    try:
        tuned = plan.recipe.method.module.quantize_block(
            stacks, data, options=plan.recipe.method_options, notes=notes, progress=progress
        )
    except InputError as e:
        raise InputError(f"{block.name}: {e}") from None
    progress.say(f"{block.name}: error of its output {tuned.error_before:.3g} before tuning, {tuned.error:.3g} after")
    found: list[solve.Solved] = []
    for alike, stack, q in zip(layers, stacks, tuned.weights, strict=True):
        parts = solve.split(q, [x.shape[0] for x in alike])
        for layer, one, part in zip(alike, stack.modules, parts, strict=True):
            said = notes if not found else Notes()
            found.append(solve.finish(plan, layer, one.weight, part, stack.stats, said))
    return found


def _everywhere(
    stats: Mapping[str, Stats], block: blocks.Block, ranks: Ranks, device: torch.device
) -> Mapping[str, Stats]:
    """The statistics of each group of linears, which one rank has, on all ranks."""
    if ranks.alone:
        return stats
    mine = {i: stats[group[0]] for i, group in enumerate(block.groups) if group[0] in stats}
    numbers = sorted({i for one in ranks.everyone(list(mine)) for i in one})
    spread = observation.everywhere(mine, ranks, device)
    return {name: x for i, x in zip(numbers, spread, strict=True) for name in block.groups[i]}


def _data(module: nn.Module, block: blocks.Block, batches: Sequence[blocks.Batch], ranks: Ranks) -> Data:
    """The batches of all ranks, numbered as they were dealt: batch i is on rank i % size."""
    n = ranks.size
    total = sum(ranks.everyone(len(batches)))

    def gather(rows: list[list[float]]) -> list[list[float]]:
        dealt = ranks.everyone(rows)
        return [dealt[i % n][i // n] for i in range(total)]

    def share(i: int, found: list[torch.Tensor] | None) -> list[torch.Tensor]:
        if ranks.alone:
            assert found is not None
            return found
        return ranks.spread({} if found is None else {0: found}, batches[0].mask.device)[0]

    return Data(
        total,
        forward=lambda i: blocks.run(module, batches[i // n], block.index),
        target=lambda i: _target(batches[i // n]),
        mask=lambda i: batches[i // n].mask,
        here=lambda i: i % n == ranks.rank,
        share=share,
        gather=gather,
    )


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _target(batch: blocks.Batch) -> torch.Tensor:
    assert batch.onward is not None
    return batch.onward.to(batch.mask.device, non_blocking=True)


def _number(scales: QParams | None) -> torch.Tensor | None:
    """The one float that a stored scale of inputs is."""
    if scales is None:
        return None
    return scales.scale_NG if scales.global_scale is None else scales.global_scale
