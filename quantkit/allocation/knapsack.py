"""One option for each group, least total cost, total size within a budget: the multiple-choice knapsack, exactly.

Groups are added one after the other. A state is what the groups so far take: (size, cost), with whole-number sizes that
are never rounded. Of the states after each group only those are kept that can still be the best:

    Pareto   another state that is no larger costs no more: out
    room     the smallest options of the groups to come do not fit any more: out
    bound    for any price p >= 0 of a byte, no way to go on costs less than
                 cost + p size + sum over the groups to come of min over options (cost + p size) - p capacity;
             out when that is more than a choice that is known already

The price is the one that makes the bound of the whole problem highest (found by bisection). The known choice comes from
those prices, then from a first round in which few states are kept: the nearer it is to the best, the fewer states the
second, exact round has to look at. Groups that are nearly undecided at that price come last, as they multiply states.
Nothing that the second round throws away could have won, so the answer is the minimum over all choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

BISECTIONS = 100
FIRST_ROUND = 500  # states kept
ROUNDING = 1e-12  # what sums in float64 may be off by, relative to their largest term: nothing is thrown away for less


@dataclass(frozen=True)
class Option:
    """One way to store a group. `size`: bytes, or any whole number up to 2^53; `cost`: finite."""

    size: int
    cost: float


def solve(groups: Sequence[Sequence[Option]], capacity: int) -> list[int] | None:
    """The index of the chosen option of each group; None when not even the smallest options fit in `capacity`.

    The same groups in the same order give the same choice; of choices that cost the same, one of least size.
    """
    if sum(min(option.size for option in options) for options in groups) > capacity:
        return None
    price = _price(groups, capacity)
    order = sorted(range(len(groups)), key=lambda i: -_lead(groups[i], price))
    sorted_groups = [groups[i] for i in order]
    choice = _filled(sorted_groups, capacity, price)
    for limit in (FIRST_ROUND, None):
        known = sum(options[c].cost for options, c in zip(sorted_groups, choice, strict=True))
        choice = _states(sorted_groups, capacity, price, known, limit) or choice
    return [choice[order.index(i)] for i in range(len(groups))]


def _states(
    groups: Sequence[Sequence[Option]], capacity: int, price: float, known: float, limit: int | None
) -> list[int] | None:
    """The best choice that costs no more than `known`, among the `limit` most promising states a group; None if none.

    limit  None keeps them all: the answer is then the best there is
    """
    room, bound = _to_come(groups, price)
    slack = ROUNDING * (abs(known) + price * capacity) * max(1, len(groups))
    sizes, costs = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    steps: list[tuple[torch.Tensor, torch.Tensor]] = []
    for i, options in enumerate(groups):
        came_from = torch.arange(len(sizes)).repeat(len(options))
        taken = torch.arange(len(options)).repeat_interleave(len(sizes))
        sizes = torch.cat([sizes + option.size for option in options])
        costs = torch.cat([costs + option.cost for option in options])
        below = costs + price * (sizes - capacity).double() + bound[i + 1]
        kept = ((sizes + room[i + 1] <= capacity) & (below <= known + slack)).nonzero().flatten()
        kept = kept[_pareto(sizes[kept], costs[kept])]
        if limit is not None and len(kept) > limit:
            kept = kept[torch.argsort(below[kept], stable=True)[:limit].sort().values]
        if not len(kept):
            return None
        sizes, costs = sizes[kept], costs[kept]
        steps.append((came_from[kept], taken[kept]))
    state = len(sizes) - 1  # sizes rise, costs fall
    chosen = []
    for came_from, taken in reversed(steps):
        chosen.append(int(taken[state]))
        state = int(came_from[state])
    return chosen[::-1]


def _pareto(sizes: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    """Indices of the states that no other beats, by rising size. Of equal states the first stays."""
    order = torch.argsort(costs, stable=True)
    order = order[torch.argsort(sizes[order], stable=True)]
    ranked = costs[order]
    lowest_before = torch.cat([torch.full((1,), torch.inf, dtype=torch.float64), ranked.cummin(0).values[:-1]])
    return order[ranked < lowest_before]


def _to_come(groups: Sequence[Sequence[Option]], price: float) -> tuple[list[int], list[float]]:
    """For each number of groups that are decided: the least size, and the least cost at `price`, of the others."""
    room, bound = [0], [0.0]
    for options in reversed(groups):
        room.append(room[-1] + min(option.size for option in options))
        bound.append(bound[-1] + min(option.cost + price * option.size for option in options))
    return room[::-1], bound[::-1]


def _cheapest(options: Sequence[Option], price: float) -> int:
    """The option of least cost when a byte has a price; of equal ones the smallest, then the first."""
    return min(range(len(options)), key=lambda c: (options[c].cost + price * options[c].size, options[c].size))


def _lead(options: Sequence[Option], price: float) -> float:
    """How much the cheapest option is ahead of the next: 0 for a group that is undecided at this price."""
    first, *others = sorted(option.cost + price * option.size for option in options)
    return others[0] - first if others else float("inf")


def _price(groups: Sequence[Sequence[Option]], capacity: int) -> float:
    """The price of a byte that just makes the cheapest options fit. All of it is decided by whole-number sizes."""

    def fits(price: float) -> bool:
        return sum(options[_cheapest(options, price)].size for options in groups) <= capacity

    if fits(0.0):
        return 0.0
    low, high = 0.0, 2 * max(_steepest(options) for options in groups)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _steepest(options: Sequence[Option]) -> float:
    """A price at which the smallest option is the cheapest, whatever the others."""
    small = min(options, key=lambda o: (o.size, o.cost))
    slopes = [(small.cost - o.cost) / (o.size - small.size) for o in options if o.size > small.size]
    return max(0.0, *slopes) if slopes else 0.0


def _filled(groups: Sequence[Sequence[Option]], capacity: int, price: float) -> list[int]:
    """A choice that fits: the cheapest options at `price`, then the best that the rest of the budget buys, in turn."""
    choice = [_cheapest(options, price) for options in groups]
    left = capacity - sum(options[c].size for options, c in zip(groups, choice, strict=True))
    if left < 0:  # the price that would have made them fit is below the smallest float
        choice = [min(range(len(options)), key=lambda c: (options[c].size, options[c].cost)) for options in groups]
        left = capacity - sum(options[c].size for options, c in zip(groups, choice, strict=True))
    for i, options in enumerate(groups):
        now = options[choice[i]].size
        affordable = [c for c in range(len(options)) if options[c].size - now <= left]
        choice[i] = min(affordable, key=lambda c: (options[c].cost, options[c].size))
        left -= options[choice[i]].size - now
    return choice
