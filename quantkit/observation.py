"""One block, seen at work: the statistics of every input of its linears, over all calibration tokens.

Linears that read one tensor share one observer. The experts of a mixture see few tokens each; what all tokens would
have given them is observed too, and their own statistics are drawn towards it (`experts.shrink`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from quantkit import blocks, kv_cache
from quantkit.errors import InputError
from quantkit.experts import Experts, shrink
from quantkit.stats import SAMPLE, Observer
from quantkit.types import Notes, Stats


@dataclass
class Observed:
    """What was seen: statistics by name of linear, and by name of the modules that hold experts, of their own input.

    tokens  of each expert (its name): how many it was given
    notes   what must be told of an expert's statistics
    """

    stats: dict[str, Stats] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def observe(
    model: nn.Module,
    block: blocks.Block,
    batches: Sequence[blocks.Batch],
    needs: Mapping[str, frozenset[str]],
    *,
    peaks: kv_cache.Peaks | None = None,
    prior: float = 1.0,
) -> Observed:
    """Runs a loaded block over all batches.

    needs  statistics by name of linear; those with none are left out
    peaks  takes keys and values too, when their scales are wanted
    prior  weight of what all tokens would give an expert, in tokens per input channel
    Where a batch carries the dense model's hidden states, they are taken through the block as well (`Batch.onward`).
    Raises InputError naming the linear whose input holds NaN or Inf.
    """
    seen = _Seen(model, block, batches, needs)
    module = model.get_submodule(block.name)
    for batch in batches:
        dense: dict[str, torch.Tensor] = {}
        if batch.dense is not None:
            with blocks.watched(model, seen.drifting, dense.__setitem__):
                batch.onward = blocks.store(blocks.run(module, batch, block.index, hidden=batch.dense), batch.onward)
        with seen.watching(batch, dense):
            if peaks is None:
                blocks.run(module, batch, block.index)
            else:
                kv_cache.observe(module, batch, block, peaks)
    return seen.result(prior)


class _Seen:
    """The observers of one block."""

    def __init__(
        self,
        model: nn.Module,
        block: blocks.Block,
        batches: Sequence[blocks.Batch],
        needs: Mapping[str, frozenset[str]],
    ) -> None:
        self.model = model
        total = sum(batch.mask.numel() for batch in batches)
        device = batches[0].mask.device
        stride = max(1, total // SAMPLE)
        self.groups: dict[str, tuple[str, ...]] = {}
        self.observers: dict[str, Observer] = {}
        self.experts: dict[str, Experts] = {}
        self.everyone: dict[str, Observer] = {}
        inside = {f"{block.name}.{name}" if name else block.name: m for name, m in _experts(model, block)}
        for group in block.groups:
            wanted = frozenset().union(*(needs.get(name, frozenset()) for name in group))
            owner = next((name for name in inside if group[0].startswith(name + ".")), None)
            if owner is not None:
                # Routes differ between the dense and the quantized model, so their tokens cannot be paired.
                wanted -= {"drift"}
            if not wanted:
                continue
            weight = model.get_parameter(f"{group[0]}.weight")
            self.groups[group[0]] = group
            self.observers[group[0]] = Observer(wanted, weight.shape[1], device, stride=stride)
            if owner is not None and owner not in self.experts:
                self.experts[owner] = inside[owner]
                self.everyone[owner] = Observer(wanted | {"sample"}, inside[owner].width, device, stride=stride)
        self.owner = {n: o for n in self.groups for o in self.experts if n.startswith(o + ".")}

    @property
    def drifting(self) -> list[str]:
        """Linears whose input in the dense model is wanted beside that in the quantized one."""
        return [name for name, observer in self.observers.items() if "drift" in observer.needs]

    @contextmanager
    def watching(self, batch: blocks.Batch, dense: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Everything that runs meanwhile is observed, as one batch."""

        def see(name: str, x: torch.Tensor) -> None:
            mask = batch.mask
            if name in self.owner:
                experts = self.experts[self.owner[name]]
                mask = mask.reshape(-1)[experts.routed(experts.number(name.removeprefix(self.owner[name] + ".")))]
            try:
                self.observers[name].update(x, mask, dense.get(name))
            except InputError as e:
                raise InputError(f"{name}: {e}") from None

        def see_all(name: str, x: torch.Tensor) -> None:
            self.everyone[name].update(*self.experts[name].given(x, batch.mask))

        with (
            blocks.watched(self.model, list(self.experts), see_all),
            blocks.watched(self.model, list(self.groups), see),
        ):
            yield

    def result(self, prior: float) -> Observed:
        found = Observed()
        for owner, observer in self.everyone.items():
            found.stats[owner] = observer.result()
        for first, group in self.groups.items():
            stats = self.observers[first].result()
            if first in self.owner:
                stats = self._drawn(first, stats, found, prior)
            found.stats |= dict.fromkeys(group, stats)
        return found

    def _drawn(self, first: str, stats: Stats, found: Observed, prior: float) -> Stats:
        """An expert's statistics, drawn towards those that all tokens would have given it."""
        owner = self.owner[first]
        experts, everyone = self.experts[owner], found.stats[owner]
        number = experts.number(first.removeprefix(owner + "."))
        found.tokens[f"{owner}.{number}"] = stats.tokens
        if not experts.reads_hidden(first.removeprefix(owner + ".")):
            assert everyone.sample_MK is not None
            x = experts.intermediate(number, everyone.sample_MK)
            observer = Observer(self.observers[first].needs, x.shape[1], x.device)
            observer.update(x)
            everyone = observer.result()
        notes = Notes()
        drawn = shrink(stats, everyone, prior, notes=notes)
        found.notes += [f"{owner}.{number}: {line}" for line in notes.lines]
        return drawn


def _experts(model: nn.Module, block: blocks.Block) -> list[tuple[str, Experts]]:
    inside = model.get_submodule(block.name).named_modules()
    return [(name, module) for name, module in inside if isinstance(module, Experts)]
