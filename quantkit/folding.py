"""The scaling transforms of a recipe on one block: choose, fold, check, and let the statistics follow.

What a scale does to the statistics of the inputs behind it is known exactly, so nothing is observed twice: the mean of
x xᵀ becomes diag(1/s) H diag(1/s), maxima and means are divided by s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quantkit import blocks, skeleton, solve
from quantkit.checkpoint import DTYPES
from quantkit.errors import InputError
from quantkit.links import Link
from quantkit.observation import Observed
from quantkit.passes import Passes
from quantkit.plan import Plan
from quantkit.progress import Progress
from quantkit.ranks import ALONE, Ranks
from quantkit.recipe.named import Transform
from quantkit.transforms import Consumer
from quantkit.transforms._fold import fold_all
from quantkit.transforms.rotation import TOLERANCE, Rotation
from quantkit.types import Notes, Stats


def fold(
    plan: Plan,
    block: blocks.Block,
    batch: blocks.Batch,
    passes: Passes,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> list[dict[str, Any]]:
    """Applies the recipe's scaling transforms, in their order, to a loaded block. Leaves its parameters in float32.

    batch  the block is checked on its first row
    passes the statistics of the block's inputs, which are told of each fold
    ranks  each chooses scales by the statistics that it has; rank 0 folds and checks, the others take its weights
    Returns a line a fold for the report: transform, producer, consumers, smallest and largest scale.
    """
    ghost = plan.skeleton
    passes.keep()
    for name in ghost.parameters(block.name + "."):
        tensor = ghost.get(name)
        if tensor.is_floating_point():
            ghost.put(name, tensor.to(torch.float32, copy=True))
    module, one = ghost.model.get_submodule(block.name), blocks.first_row(batch, block.index)
    links = [x for x in plan.links if x.block == block.name]
    report: list[dict[str, Any]] = []
    device = one.mask.device
    for transform in plan.recipe.transforms:
        if not hasattr(transform.module, "scales"):
            continue
        found, notes = _chosen(plan, links, transform, passes, ranks)
        wanted = _known(found, links, ranks, device)
        done: dict[Link, torch.Tensor] = {}
        if ranks.first:
            done = fold_all(
                ghost.model,
                wanted,
                lambda: blocks.run(module, one, block.index),
                stored=lambda name: DTYPES[skeleton.spec_of(ghost, name).dtype],
                notes=notes,
                hidden=one.hidden.to(device),
            )
        if not ranks.alone:
            done = _known({i: done.get(x) for i, x in enumerate(links)} if ranks.first else {}, links, ranks, device)
            _same_weights(plan, block, ranks, device)
            notes = Notes([line for lines in ranks.everyone(notes.lines) for line in lines])
        for link, s in done.items():
            passes.follow(link, link.spread(s))
            report.append(_line(transform.name, link, s))
        for line in notes.lines:
            progress.warn(f"{transform.name}: {line}")
    return report


def _chosen(
    plan: Plan, links: list[Link], transform: Transform, passes: Passes, ranks: Ranks
) -> tuple[dict[int, torch.Tensor | None], Notes]:
    """What a transform chooses for the links whose statistics this rank has, by their numbers; what it has to say."""
    found: dict[int, torch.Tensor | None] = {}
    said: dict[int, list[str]] = {}
    left = dict(enumerate(links))
    for count, (_, seen) in enumerate(passes, 1):
        last = count == len(passes.parts)
        for i, link in list(left.items()):
            mixture = _mixture(link, passes.mixtures)
            where = None if mixture else next((seen.where[n] for n in link.consumers if n in seen.where), None)
            # How many tokens reach each expert is known once all were observed.
            if where is None and not last:
                continue
            del left[i]
            if (where or 0) == ranks.rank:
                notes = Notes()
                found[i] = _scales(plan, link, transform, seen, mixture, notes)
                said[i] = notes.lines
    return found, Notes([line for i in sorted(said) for line in said[i]])


def _mixture(link: Link, mixtures: tuple[str, ...]) -> str | None:
    """The module of experts that a norm's link leads into: their input is its own, the statistics of all tokens."""
    if link.kind != "norm":
        return None
    return next((m for m in mixtures if any(name.startswith(m + ".") for name in link.consumers)), None)


def _scales(
    plan: Plan, link: Link, transform: Transform, seen: Observed, mixture: str | None, notes: Notes
) -> torch.Tensor | None:
    """What a transform chooses for a link; None to leave it as it is."""
    names = link.consumers if mixture is None else (mixture,)
    stats = next((seen.stats[name] for name in names if name in seen.stats), None)
    if stats is None or not stats.tokens:
        return None
    consumers = []
    for name in link.consumers:
        layer = plan.linears.get(name)
        weight = plan.skeleton.get(f"{name}.weight")
        dtype = weight.dtype if layer is None or layer.scheme is None else solve.scale_dtype(plan, layer)
        scheme = None if layer is None else layer.scheme
        consumers.append(Consumer(name, weight, scheme, dtype, _share(name, seen, stats)))
    if all(c.scheme is None for c in consumers):
        return None
    producer = plan.linears.get(link.producer)
    # Rows of the producer are divided: where its scales are powers of two, any other factor moves them on their grid.
    octaves = producer is not None and producer.scheme is not None and producer.scheme.weights.number.startswith("mx")
    how: dict[str, Any] = {"notes": notes, "channels_K": link.channels(), "octaves": octaves}
    try:
        found: torch.Tensor | None = transform.module.scales(consumers, stats, options=transform.options, **how)
    except InputError as e:
        raise InputError(f"{link.producer} -> {', '.join(link.consumers)}: {e}") from None
    return found


def _known(
    found: dict[int, torch.Tensor | None], links: list[Link], ranks: Ranks, device: torch.device
) -> dict[Link, torch.Tensor]:
    """Scales of links, by their numbers and each known to one rank, as all ranks have them."""
    everything = ranks.spread({i: [] if s is None else [s] for i, s in found.items()}, device)
    return {link: own[0] for link, own in zip(links, everything, strict=True) if own}


def _same_weights(plan: Plan, block: blocks.Block, ranks: Ranks, device: torch.device) -> None:
    """Gives every rank the weights that the block has on rank 0."""
    ghost = plan.skeleton
    names = ghost.parameters(block.name + ".")
    mine = {i: [ghost.get(name)] for i, name in enumerate(names)} if ranks.first else {}
    for name, (tensor,) in zip(names, ranks.spread(mine, device), strict=True):
        ghost.put(name, tensor)


def _share(name: str, seen: Observed, stats: Stats) -> float:
    """Of all tokens, how many reach a linear."""
    tokens = seen.tokens.get(name.rpartition(".")[0])
    return 1.0 if tokens is None else tokens / max(stats.tokens, 1)


def _line(transform: str, link: Link, s: torch.Tensor) -> dict[str, Any]:
    return {
        "transform": transform,
        "producer": link.producer,
        "consumers": list(link.consumers),
        "least": float(s.min()),
        "largest": float(s.max()),
    }


def check_rotation(
    plan: Plan, rotation: Rotation, block: blocks.Block, batch: blocks.Batch, device: torch.device
) -> None:
    """Runs the original block beside the rotated one, in float32. Raises InputError when they do not agree."""
    ghost = plan.skeleton
    names = ghost.parameters(block.name + ".")
    kept = {name: ghost.get(name) for name in names}
    module = ghost.model.get_submodule(block.name)

    def through(read: Callable[..., torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        for name in names:
            tensor = read(name, device)
            ghost.put(name, tensor.float() if tensor.is_floating_point() else tensor)
        return blocks.run(module, batch, block.index, hidden=hidden)

    before = rotation.original(batch.hidden.to(device).float())
    error = rotation.error(
        before, through(ghost.original, before), through(ghost.read, rotation.hidden(before)), batch.mask
    )
    for name, tensor in kept.items():
        ghost.put(name, tensor)
    if not error <= TOLERANCE:
        raise InputError(
            f"{block.name}: rotated, it does something else (relative error {error:.2g}, above {TOLERANCE:g}, more "
            "than rounding explains); this architecture cannot be rotated, leave rotation out of transforms"
        )
