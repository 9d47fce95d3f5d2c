"""Statistics of one block, some of its inputs at a time where those of all would not fit into memory.

A layer of 128 experts has 257 inputs to observe, each with a matrix as large as it is wide squared. They are divided
into parts, and the block is run over the calibration rows once for each part: a part is observed, its weights are
solved, its statistics are freed. The experts' inputs do not depend on weights that are solved meanwhile, since those
stay as they were until all parts are through; so the bytes of an output do not depend on the number of parts.

Only experts are divided: what else is in a block belongs to the first part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch

from quantkit import solve
from quantkit.blocks import Block
from quantkit.experts import inside
from quantkit.links import Link
from quantkit.observation import Observed, follow
from quantkit.plan import Plan

Group = tuple[str, ...]


def divided(
    plan: Plan, block: Block, parts: int, owners: Mapping[str, int], device: torch.device
) -> list[tuple[Group, ...]]:
    """The groups of linears of a block, that read one input each, in `parts` parts or fewer, of about equal size.

    owners  the rank of each group, by its first linear: each rank's own are divided
    device  where weights are solved: what is solved at once there stays together
    """
    place = {group[0]: i for i, group in enumerate(block.groups)}
    found: list[list[Group]] = [[] for _ in range(parts)]
    for rank in sorted({owners[group[0]] for group in block.groups}):
        units = _units(plan, block, [g for g in block.groups if owners[g[0]] == rank], device)
        sizes = [sum(nbytes(plan, g) for g in unit) for unit in units]
        whole, before = max(1, sum(sizes)), 0
        for unit, size in zip(units, sizes, strict=True):
            found[min(parts - 1, (before + size // 2) * parts // whole)] += unit
            before += size
    return [tuple(sorted(part, key=lambda g: place[g[0]])) for part in found if part] or [()]


def most(plan: Plan, device: torch.device) -> int:
    """Into how many parts a block can be divided at most; 1 without experts, or where a method rounds whole blocks."""
    if hasattr(plan.recipe.method.module, "quantize_block"):
        return 1
    return max(len(_units(plan, block, block.groups, device)) for block in plan.structure.blocks)


def nbytes(plan: Plan, group: Group) -> int:
    """Bytes of the statistics of one input that are as large as its width squared."""
    layer = plan.linears[group[0]]
    wanted = frozenset().union(*(plan.needs(plan.linears[name]) for name in group))
    return 4 * layer.shape[1] ** 2 * len(wanted & {"gram", "drift"})


def _units(plan: Plan, block: Block, groups: Iterable[Group], device: torch.device) -> list[list[Group]]:
    """What is not divided: all that belongs to no expert; then of the experts what is solved at once."""
    apart = [g for g in groups if g[0] in plan.routed]
    others = [g for g in groups if g[0] not in plan.routed]
    solved = {i: [x for name in g if (x := plan.linears[name]).scheme is not None] for i, g in enumerate(apart)}
    stacks = {i: solve.by_scheme(layers)[0] for i, layers in solved.items() if layers}
    together = [[apart[i] for i in places] for places in solve.together(plan, stacks, device)]
    dense = [apart[i] for i, layers in solved.items() if not layers]
    return [unit for unit in ([*others, *dense], *together) if unit]


@dataclass
class Passes:
    """The statistics of one block, part by part; those of the part asked for last are kept.

    plan, block
    parts    as `divided` gives them
    observe  runs the block over all batches, for the part of a number
    told     is called once all parts were observed, with the tokens of each expert and what must be told of them
    """

    plan: Plan
    block: Block
    parts: list[tuple[Group, ...]]
    observe: Callable[[int], Observed]
    told: Callable[[Mapping[str, int], Iterable[str]], None]
    tokens: dict[str, int] = field(default_factory=dict)
    _notes: dict[int, list[str]] = field(default_factory=dict)
    _now: tuple[int, Observed] | None = None
    _folds: list[tuple[Link, torch.Tensor]] = field(default_factory=list)
    _kept: dict[str, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def mixtures(self) -> tuple[str, ...]:
        """Names of the modules that hold experts."""
        return tuple(name for name, _ in inside(self.plan.skeleton.model, self.block.name))

    def at(self, part: int) -> Observed:
        """The statistics of a part, as they are behind all folds that were told of.

        Of each expert's tokens it knows what was observed so far; all of them with the last part of the first round.
        """
        if self._now is not None and self._now[0] == part:
            return self._now[1]
        self._now = None
        with self._as_they_were():
            seen = self.observe(part)
        if len(self._notes) < len(self.parts):
            self.tokens |= seen.tokens
            self._notes[part] = seen.notes
            if len(self._notes) == len(self.parts):
                lines = [line for i in sorted(self._notes) for line in self._notes[i]]
                self.told(self.tokens, dict.fromkeys(lines))
        seen.tokens |= self.tokens
        for link, s_K in self._folds:
            follow(seen, link, s_K, self.mixtures)
        self._now = (part, seen)
        return seen

    def __iter__(self) -> Iterator[tuple[int, Observed]]:
        """Every part once, the one that is there already first."""
        first = 0 if self._now is None else self._now[0]
        for part in (first, *(i for i in range(len(self.parts)) if i != first)):
            yield part, self.at(part)

    def keep(self) -> None:
        """To be called before the block's weights are rewritten: with several parts it is observed as it was."""
        if len(self.parts) > 1:
            ghost = self.plan.skeleton
            self._kept = {name: ghost.get(name) for name in ghost.parameters(self.block.name + ".")}

    def follow(self, link: Link, s_K: torch.Tensor) -> None:
        """The inputs behind a link are divided by s (K,) from now on."""
        if len(self.parts) > 1:
            self._folds.append((link, s_K))
        if self._now is not None:
            follow(self._now[1], link, s_K, self.mixtures)

    @contextmanager
    def _as_they_were(self) -> Iterator[None]:
        """With the weights that the block had before it was rewritten."""
        ghost = self.plan.skeleton
        rewritten = {name: ghost.get(name) for name in self._kept}
        for name, tensor in self._kept.items():
            ghost.put(name, tensor)
        try:
            yield
        finally:
            for name, tensor in rewritten.items():
                ghost.put(name, tensor)
