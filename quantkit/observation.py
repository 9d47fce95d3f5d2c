"""One block, seen at work: the statistics of every input of its linears, over all calibration tokens.

Linears that read one tensor share one observer. The experts of a mixture see few tokens each; what all tokens would
have given them is observed too, and their own statistics are drawn towards it (`experts.shrink`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from quantkit import blocks, kv_cache
from quantkit.errors import InputError
from quantkit.experts import Experts, inside, shrink
from quantkit.links import Link
from quantkit.ranks import ALONE, Parcel, Ranks
from quantkit.stats import BLOCK, SAMPLE, Observer, counted, strips_of
from quantkit.types import Notes, Stats


@dataclass
class Observed:
    """What was seen: statistics by name of linear, and by name of the modules that hold experts, of their own input.

    where   the rank that has the statistics of a name; those of experts' own input are on all
    tokens  of each expert (its name): how many it was given
    notes   what must be told of an expert's statistics
    """

    stats: dict[str, Stats] = field(default_factory=dict)
    where: dict[str, int] = field(default_factory=dict)
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
    all_experts: bool = False,
    dense: bool = True,
    ranks: Ranks = ALONE,
    owners: Mapping[str, int] | None = None,
) -> Observed:
    """Runs a loaded block over all batches.

    needs  statistics by name of linear; those with none are left out
    peaks  takes keys and values too, when their scales are wanted
    prior  weight of what all tokens would give an expert, in tokens per input channel
    all_experts  every expert is observed on all tokens, whatever the router chooses
    ranks  who else runs the block: each has every size-th batch, as `share` in the pipeline deals them
    owners the rank that gets the statistics of a group, by its first linear
    dense  where a batch carries the dense model's hidden states, take them through the block as well (`Batch.onward`)
    Raises InputError naming the linear whose input holds NaN or Inf.
    """
    seen = _Seen(model, block, batches, needs, ranks, owners or {}, all_experts)
    module = model.get_submodule(block.name)
    for batch in batches:
        beside: dict[str, torch.Tensor] = {}
        if dense and batch.dense is not None:
            with blocks.watched(model, seen.drifting, beside.__setitem__):
                batch.onward = blocks.store(blocks.run(module, batch, block.index, hidden=batch.dense), batch.onward)
        with seen.watching(batch, beside):
            if peaks is None:
                blocks.run(module, batch, block.index)
            else:
                kv_cache.observe(module, batch, block, peaks)
        seen.deliver()
    for _ in range(seen.rounds - len(batches)):
        seen.deliver()
    if peaks is not None:
        ranks.largest(peaks.absmax or ())
    return seen.result(prior)


class _Seen:
    """The observers of one block.

    Of several ranks, each has the observers of some of the inputs, and is sent what the others see of them: after each
    batch, in the order of the batches. So an observer adds up the same numbers in the same order, however many ranks
    there are. Of a large Gram matrix some strips may be summed on other ranks than the owner's.
    """

    def __init__(
        self,
        model: nn.Module,
        block: blocks.Block,
        batches: Sequence[blocks.Batch],
        needs: Mapping[str, frozenset[str]],
        ranks: Ranks,
        owners: Mapping[str, int],
        all_experts: bool,
    ) -> None:
        self.model, self.ranks, self.all_experts = model, ranks, all_experts
        sizes = ranks.everyone([len(batches), sum(batch.mask.numel() for batch in batches)])
        self.rounds = max(count for count, _ in sizes)
        self.device = batches[0].mask.device
        self.stride = max(1, sum(tokens for _, tokens in sizes) // SAMPLE)
        self.groups: dict[str, tuple[str, ...]] = {}
        self.experts: dict[str, Experts] = {}
        self.needs: dict[str, frozenset[str]] = {}  # of each input that is observed: a group's, an `Experts`' own
        self.widths: dict[str, int] = {}
        mixtures = dict(inside(model, block.name))
        for group in block.groups:
            wanted = frozenset().union(*(needs.get(name, frozenset()) for name in group))
            owner = next((name for name in mixtures if group[0].startswith(name + ".")), None)
            if not wanted:
                continue
            self.groups[group[0]] = group
            self.needs[group[0]], self.widths[group[0]] = wanted, model.get_parameter(f"{group[0]}.weight").shape[1]
            if owner is not None and owner not in self.experts:
                self.experts[owner] = mixtures[owner]
                self.needs[owner], self.widths[owner] = wanted | {"sample"}, mixtures[owner].width
        self.owner = {n: o for n in self.groups for o in self.experts if n.startswith(o + ".")}
        self.where = {key: owners.get(key, 0) for key in self.needs}
        self.strips = _divided(self.needs, self.widths, self.where, ranks.size)
        self.observers = {key: self._observer(key) for key in self.needs if ranks.rank in self.strips[key]}
        self.routed: dict[str, int] = dict.fromkeys(self.owner, 0)  # tokens that the router gave, with all_experts
        self._waiting: list[Parcel] = []

    def _observer(self, key: str) -> Observer:
        own = self.where[key] == self.ranks.rank
        needs = self.needs[key] if own else frozenset({"gram"})
        strips = self.strips[key][self.ranks.rank]
        return Observer(needs, self.widths[key], self.device, stride=self.stride, strips=strips)

    @property
    def drifting(self) -> list[str]:
        """Linears whose input in the dense model is wanted beside that in the quantized one."""
        return [name for name, needs in self.needs.items() if "drift" in needs]

    @contextmanager
    def watching(self, batch: blocks.Batch, dense: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Everything that runs meanwhile is observed, as one batch."""

        whole = bool(batch.mask.all())  # asked once: an answer of a GPU is waited for

        def see(name: str, x: torch.Tensor) -> None:
            mask = batch.mask
            if name in self.owner:
                experts = self.experts[self.owner[name]]
                number = experts.number(name.removeprefix(self.owner[name] + "."))
                mask = experts.rows(number, batch.mask)
                if self.all_experts:
                    self.routed[name] += int(batch.mask.reshape(-1)[experts.routed(number)].sum())
            self._see(name, x, None if whole else mask, dense.get(name))

        def see_all(name: str, x: torch.Tensor) -> None:
            x, mask = self.experts[name].given(x, batch.mask)
            self._see(name, x, None if whole else mask, None)

        for experts in self.experts.values():
            experts.all_tokens = self.all_experts
        try:
            with (
                blocks.watched(self.model, list(self.experts), see_all),
                blocks.watched(self.model, list(self.groups), see),
            ):
                yield
        finally:
            for experts in self.experts.values():
                experts.all_tokens = False

    def _see(self, key: str, x: torch.Tensor, mask: torch.Tensor | None, dense: torch.Tensor | None) -> None:
        if self.ranks.alone:
            self._update(key, x, mask, dense)
            return
        # Copied: what runs next may write into it before it is sent.
        tensors = [counted(t, mask).clone() for t in (x, dense) if t is not None]
        self._waiting.append(Parcel(list(self.needs).index(key), list(self.strips[key]), tensors))

    def _update(self, key: str, x: torch.Tensor, mask: torch.Tensor | None, dense: torch.Tensor | None = None) -> None:
        try:
            self.observers[key].update(x, mask, dense)
        except InputError as e:
            raise InputError(f"{key}: {e}") from None

    def deliver(self) -> None:
        """Brings what one batch of each rank gave to its observers."""
        if self.ranks.alone:
            return
        keys = list(self.needs)
        parcels, self._waiting = self._waiting, []
        for number, _, (x, *dense) in self.ranks.deliver(parcels, self.device):
            self._update(keys[number], x, None, *dense)

    def _gather_strips(self) -> None:
        """Brings the strips of a Gram matrix to the rank that has the others of it."""
        keys = list(self.needs)
        parcels = []
        for i, key in enumerate(keys):
            if self.ranks.rank in self.strips[key] and self.where[key] != self.ranks.rank:
                parcels.append(Parcel(i, [self.where[key]], list(self.observers.pop(key).gram.values())))
        for i, source, strips in self.ranks.deliver(parcels, self.device):
            self.observers[keys[i]].gram |= zip(self.strips[keys[i]][source], strips, strict=True)

    def result(self, prior: float) -> Observed:
        found = Observed(where={name: self.where[key] for key, group in self.groups.items() for name in group})
        self._gather_strips()
        tokens = {key: x.tokens for key, x in self.observers.items()}
        own = {i: self.observers.pop(key).result() for i, key in enumerate(self.experts) if key in self.observers}
        found.stats |= zip(self.experts, everywhere(own, self.ranks, self.device), strict=True)
        counts = {key: n for one in self.ranks.everyone(tokens) for key, n in one.items()}
        if self.all_experts:
            routed = self.ranks.everyone(self.routed)
            counts |= {key: sum(one[key] for one in routed) for key in self.routed}
        notes: dict[str, list[str]] = {}
        for first, group in self.groups.items():
            if first in self.owner:
                found.tokens[self._expert(first)] = counts[first]
            if self.where[first] != self.ranks.rank:
                continue
            stats = self.observers.pop(first).result()
            if first in self.owner:
                lines = Notes()
                stats = self._drawn(first, stats, found.stats[self.owner[first]], prior, lines)
                notes[first] = [f"{self._expert(first)}: {line}" for line in lines.lines]
            found.stats |= dict.fromkeys(group, stats)
        said = {key: lines for one in self.ranks.everyone(notes) for key, lines in one.items()}
        found.notes = [line for first in self.groups for line in said.get(first, [])]
        return found

    def _expert(self, first: str) -> str:
        """The name of the expert that a linear belongs to."""
        owner = self.owner[first]
        return f"{owner}.{self.experts[owner].number(first.removeprefix(owner + '.'))}"

    def _drawn(self, first: str, stats: Stats, everyone: Stats, prior: float, notes: Notes) -> Stats:
        """An expert's statistics, drawn towards those that all tokens would have given it."""
        owner = self.owner[first]
        experts, name = self.experts[owner], first.removeprefix(owner + ".")
        if not experts.reads_hidden(name):
            assert everyone.sample_MK is not None
            x = experts.intermediate(experts.number(name), everyone.sample_MK)
            observer = Observer(self.needs[first], x.shape[1], x.device)
            observer.update(x)
            everyone = observer.result()
        return shrink(stats, everyone, prior, notes=notes)


def follow(seen: Observed, link: Link, s_K: torch.Tensor, mixtures: Iterable[str] = ()) -> None:
    """The statistics of x become those of x / s (K,), for all that read a link's channels and were observed.

    mixtures  names of the modules that hold experts: their own input is that of a norm's link into them
    """
    names = set(link.consumers)
    if link.kind == "norm":
        names |= {owner for owner in mixtures if any(name.startswith(owner + ".") for name in link.consumers)}
    became: dict[int, Stats] = {}
    for name in sorted(names & seen.stats.keys()):
        old = seen.stats[name]
        if id(old) not in became:
            became[id(old)] = old.divided(s_K)
        seen.stats[name] = became[id(old)]


def everywhere(mine: Mapping[int, Stats], ranks: Ranks, device: torch.device) -> list[Stats]:
    """Numbered statistics, each on one rank, on all ranks: by their numbers, 0, 1, 2, ..."""
    if ranks.alone:
        return [mine[i] for i in sorted(mine)]
    parts = {i: {k: t for k, t in vars(stats).items() if isinstance(t, torch.Tensor)} for i, stats in mine.items()}
    tensors = ranks.spread({i: list(own.values()) for i, own in parts.items()}, device)
    said = ranks.everyone({i: [mine[i].tokens, list(own)] for i, own in parts.items()})
    known = {int(i): x for one in said for i, x in one.items()}
    return [Stats(known[i][0], **dict(zip(known[i][1], own, strict=True))) for i, own in zip(sorted(known), tensors)]


def _divided(
    needs: Mapping[str, frozenset[str]], widths: Mapping[str, int], where: Mapping[str, int], size: int
) -> dict[str, dict[int, list[int]]]:
    """Of each input, the ranks that observe it, and the strips of its Gram matrix that each of them sums.

    where  the rank of each input; it gives strips away where that makes the work of all ranks more even
    """
    found = {key: {where[key]: list(strips_of(widths[key]))} for key in needs}
    strips = [
        (key, s, (widths[key] - s) * min(BLOCK, widths[key] - s)) for key in needs for s in strips_of(widths[key])
    ]
    strips = [x for x in strips if "gram" in needs[x[0]]]
    load = [0] * size
    for key, _, cost in strips:
        load[where[key]] += cost
    for key, start, cost in sorted(strips, key=lambda x: -x[2]):
        rank = load.index(min(load))
        if widths[key] > BLOCK and load[rank] + cost < load[where[key]]:
            load[rank] += cost
            load[where[key]] -= cost
            found[key][where[key]].remove(start)
            found[key].setdefault(rank, []).append(start)
    return found
