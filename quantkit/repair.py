"""What to do about an output that misses its gates: keep the layers that lose most in higher precision, and try again.

Layers are taken in the groups that engines fuse (q/k/v, gate/up, all experts of a layer), worst first by the relative
error of their outputs; a tenth of the groups at first, twice as many each round, as far as the size budget goes. A
recipe comes out with a rule for each, so the result is one that could have been written by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit import plan as planning
from quantkit.allocation.candidates import DENSE, Group, groups_of, written
from quantkit.errors import InputError
from quantkit.plan import Plan
from quantkit.recipe import Recipe
from quantkit.recipe.scheme import SchemeSpec
from quantkit.recipe.validation import Repair

SHARE = 0.1


@dataclass(frozen=True)
class Step:
    """A recipe to try next. groups: those in higher precision, worst first, by what they are called."""

    recipe: Recipe
    plan: Plan
    groups: tuple[str, ...]
    scheme: str


def check(first: Plan, settings: Repair) -> None:
    """Raises InputError when the layers of a plan could not be kept in the scheme that repair would give them."""
    groups = groups_of(first)
    spec = settings.scheme or _finer(first.recipe)
    if groups and spec != DENSE:
        try:
            _planned(first, groups[:1], spec)
        except InputError as e:
            raise InputError(f"validate.repair: {spec.name} will not do here, give another scheme: {e}") from None


def next_step(first: Plan, settings: Repair, layers: Sequence[Mapping[str, Any]], before: Step | None) -> Step | None:
    """The next recipe, or None when rounds, groups or the size budget are used up.

    first   the plan whose output missed its gates first
    layers  of that output's quantkit.json: names and relative errors
    before  the step that was not enough
    """
    groups = _worst_first(groups_of(first), layers)
    had = len(before.groups) if before else 0
    wanted = min(len(groups), 2 * had if before else max(1, math.ceil(SHARE * len(groups))))
    spec = settings.scheme or _finer(first.recipe)
    for count in range(wanted, had, -1):
        found = _planned(first, groups[:count], spec)
        if found.plan.output_bytes <= settings.size * first.output_bytes:
            return found
    return None


def _worst_first(groups: Sequence[Group], layers: Sequence[Mapping[str, Any]]) -> list[Group]:
    errors = {str(x["name"]): float(x.get("relative_error") or 0.0) for x in layers}

    def badness(group: Group) -> float:
        found = [errors.get(x.name, 0.0) for x in group.layers]
        return math.inf if any(map(math.isnan, found)) else max(found)

    return sorted(groups, key=badness, reverse=True)


def _finer(recipe: Recipe) -> SchemeSpec:
    """Eight bits in the same groups where weights alone are integers of fewer; else as they were."""
    scheme = recipe.scheme.resolve()
    if (
        scheme is None
        or scheme.activations is not None
        or scheme.weights.number not in ("int2", "int3", "int4", "int6")
    ):
        return DENSE
    group = scheme.weights.group_size if scheme.weights.strategy == "group" else "channel"
    return SchemeSpec.model_validate({"preset": "W8A16", "group_size": group})


def _planned(first: Plan, groups: Sequence[Group], spec: SchemeSpec) -> Step:
    """The step with these groups in another scheme. Raises InputError when format or engines do not take it."""
    recipe = first.recipe
    default = SchemeSpec.model_validate(recipe.scheme.model_dump())
    changed = written(recipe, list(groups), [spec] * len(groups), default)
    return Step(changed, planning.make(changed, source=first.source), tuple(group.name for group in groups), spec.name)
