"""Methods that round all linears of a block together, so that the block's output is right, not each layer's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from quantkit import blocks, solve
from quantkit.algorithms.autoround import Data, Stack
from quantkit.errors import InputError
from quantkit.plan import Linear, Plan
from quantkit.progress import Progress
from quantkit.types import Notes, QParams, Stats


def tune(
    plan: Plan,
    block: blocks.Block,
    batches: Sequence[blocks.Batch],
    stats: Mapping[str, Stats],
    progress: Progress,
) -> list[solve.Solved]:
    """Rounds a loaded block's linears by a method that has `quantize_block`; its weights are as before afterwards.

    batches  with the hidden states of the quantized model, and those of the dense one after this block (`onward`)
    stats    of the linears' inputs, by name in memory
    Raises InputError naming the block.
    """
    model, module = plan.skeleton.model, plan.skeleton.model.get_submodule(block.name)
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
    data = Data(
        len(batches),
        forward=lambda i: blocks.run(module, batches[i], block.index),
        target=lambda i: _target(batches[i]),
        mask=lambda i: batches[i].mask,
    )
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
