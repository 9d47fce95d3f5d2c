"""What a recipe with `scheme: {auto: ...}` has to choose from: known from headers alone, before anything is measured.

    groups    layers of a block that get one scheme: those that read one tensor (q/k/v, gate/up) or that engines fuse by
              their names, and all experts of a layer
    sizes     bytes on disk of each group under each candidate
    refusals  what the checkpoint format, or an engine of the recipe, does not take is no candidate: for some groups, or
              beside other candidates. Nothing is said of this here: a plan is made, and refuses.

A choice is written out as a recipe: the most frequent candidate is its scheme, and rules name the layers of the others.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from quantkit import formats, hub
from quantkit import plan as planning
from quantkit.checkpoint import DTYPES, bits_per_weight
from quantkit.errors import InputError
from quantkit.linears import Linear
from quantkit.plan import Plan
from quantkit.recipe import Recipe, Rule
from quantkit.recipe.scheme import AutoScheme, RecipeScheme, SchemeSpec

DENSE = SchemeSpec.model_validate("none")
_EXPERTS = re.compile(r"(.*\.experts)\.\d+\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Group:
    """Layers of one block that get one scheme.

    sizes  bytes on disk by candidate; None where the candidate is refused for these layers
    """

    block: int
    layers: tuple[Linear, ...]
    sizes: tuple[int | None, ...] = ()

    @property
    def weights(self) -> int:
        return sum(x.shape[0] * x.shape[1] for x in self.layers)

    @property
    def allowed(self) -> list[int]:
        """The candidates that are not refused."""
        return [c for c, size in enumerate(self.sizes) if size is not None]

    @property
    def name(self) -> str:
        """ "model.layers.0.self_attn: q_proj, k_proj, v_proj"; the number of an expert is *."""
        owners: dict[str, dict[str, None]] = {}
        for x in self.layers:
            owner, _, leaf = _EXPERTS.sub(r"\1.*.", x.name).rpartition(".")
            owners.setdefault(owner, {})[leaf] = None
        return "; ".join(f"{owner}: {', '.join(leaves)}" for owner, leaves in owners.items())

    @property
    def kind(self) -> tuple[tuple[str, tuple[int, int], str], ...]:
        """Equal for groups of several blocks whose layers have the same names, shapes and dtypes."""
        return tuple((_NUMBER.sub("*", x.name), x.shape, x.dtype) for x in self.layers)


@dataclass(frozen=True)
class Outline:
    """What there is to choose.

    plan      of the model with one of the candidates for all, to measure on
    capacity  bytes that all groups together may take
    """

    recipe: Recipe
    auto: AutoScheme
    plan: Plan
    groups: tuple[Group, ...]
    capacity: int
    warnings: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """What each candidate is called."""
        return [spec.name for spec in self.auto.candidates]

    def bits(self, size: int) -> float:
        """Bits a weight, when all groups together take `size` bytes."""
        return 8 * size / sum(group.weights for group in self.groups)

    def size(self, chosen: Sequence[int]) -> int:
        """Bytes of a choice, the candidate of each group."""
        return sum(group.sizes[c] or 0 for group, c in zip(self.groups, chosen, strict=True))

    def settled(self, chosen: Sequence[int]) -> Recipe:
        """The recipe with the candidate of each group written out. Of equally frequent candidates the first leads."""
        often = Counter(chosen)
        default = max(range(len(self.auto.candidates)), key=lambda c: (often[c], -c))
        specs = [self.auto.candidates[c] for c in chosen]
        return written(self.recipe, self.groups, specs, self.auto.candidates[default])


def outline(recipe: Recipe, source: hub.Source | None = None) -> Outline:
    """Groups, sizes and refusals. Raises InputError when there is nothing to choose, or the budget is too small.

    source  where the model was found already
    """
    auto = recipe.scheme.auto
    if auto is None:
        raise InputError("scheme: is not auto, so there is nothing to choose")
    model = planning.look(recipe, source)
    # Without transforms: a rotation is planned once on a model, for the plan that is measured on.
    trials = _Trials(recipe.model_copy(update={"transforms": ()}), auto, model)
    first, groups = trials.groups()
    groups, warnings = trials.narrowed(groups)
    weights = sum(group.weights for group in groups)
    capacity = math.floor(Fraction(str(auto.bits)) * weights / 8)
    least = sum(min(size for size in group.sizes if size is not None) for group in groups)
    if least > capacity:
        reach = math.ceil(Fraction(8 * 10**4 * least, weights)) / 10**4
        raise InputError(
            f"scheme.auto.bits: {auto.bits:g} bits a weight cannot be reached; the smallest candidate for every layer "
            f"takes {reach:.4f}: raise bits to that, or add a smaller candidate"
        )
    plan = planning.make(written(recipe, (), (), auto.candidates[first]), model)
    return Outline(recipe, auto, plan, groups, capacity, tuple(warnings))


# Groups --------------------------------------------------------------------------------------------------------------


def groups_of(plan: Plan) -> tuple[Group, ...]:
    """The layers that the recipe's scheme decides, those of one group together, in the order of the model."""
    by_module = plan.linears
    alike = [[by_module[m].name for m in group] for block in plan.structure.blocks for group in block.groups]
    alike += [[layer.name for layer in fused] for fused in planning.described(plan).fused()]
    experts: dict[str, list[str]] = {}
    for x in by_module.values():
        if found := _EXPERTS.match(x.name):
            experts.setdefault(found[1], []).append(x.name)
    leader = _leaders([*alike, *experts.values()])
    groups = []
    for block in plan.structure.blocks:
        together: dict[str, list[Linear]] = {}
        for x in (by_module[m] for m in block.linears):
            if x.scheme is not None and not any(rule.matches(x.name) for rule in plan.recipe.rules):
                together.setdefault(leader[x.name], []).append(x)
        groups += [Group(block.index, tuple(layers)) for layers in together.values()]
    return tuple(groups)


def _leaders(alike: Iterable[Sequence[str]]) -> dict[str, str]:
    """Name -> one name that all have that are, directly or by others, in one list with it."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for first, *others in alike:
        for name in (first, *others):
            parent[root(name)] = root(first)
    return {name: root(name) for name in parent}


# Refusals ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trials:
    """Plans of the model with this and that candidate here and there."""

    recipe: Recipe
    auto: AutoScheme
    model: planning.Found

    def groups(self) -> tuple[int, tuple[Group, ...]]:
        """The first candidate that will do for every layer, and the groups of layers that take part, without sizes."""
        problems = []
        for c, spec in enumerate(self.auto.candidates):
            if spec.resolve() is None:
                continue
            try:
                groups = groups_of(planning.make(written(self.recipe, (), (), spec), self.model))
            except InputError as e:
                problems.append(f"{spec.name}: {e}")
                continue
            if not groups:
                raise InputError("scheme.auto: rules decide on every layer, so there is nothing to choose")
            return c, groups
        raise InputError(f"scheme.auto: no candidate will do for every layer. {problems[0]}")

    def problem(self, groups: Sequence[Group], chosen: Sequence[int | None]) -> str | None:
        """Why the groups cannot have these candidates (None: stays dense); None when they can."""
        specs = [DENSE if c is None else self.auto.candidates[c] for c in chosen]
        if all(spec.resolve() is None for spec in specs):
            return None
        try:
            planning.make(written(self.recipe, groups, specs, DENSE), self.model)
        except InputError as e:
            return str(e)
        return None

    def narrowed(self, groups: tuple[Group, ...]) -> tuple[tuple[Group, ...], list[str]]:
        """The groups with the sizes of the candidates that they can have, and a warning for each that is left out.

        Raises InputError when a group has none, or there is but one for all.
        """
        found, why = list(groups), {}
        for c in range(len(self.auto.candidates)):
            reason, kinds = self._refused(groups, c)
            tried = [replace(g, sizes=(*g.sizes, None if g.kind in kinds else self._size(g, c))) for g in found]
            if problem := self._beside(tried, c):
                reason = f"beside {', '.join(s.name for s in self.auto.candidates[:c])}: {problem}"
                tried = [replace(g, sizes=(*g.sizes, None)) for g in found]
            found = tried
            if reason is not None:
                why[c] = reason
        warnings = []
        for c, reason in why.items():
            without = [g for g in found if g.sizes[c] is None]
            where = "" if len(without) == len(found) else f" for {len(without)} groups, such as {without[0].name}"
            warnings.append(f"candidate {self.auto.candidates[c].name} is left out{where}: {reason}")
        if bare := next((g for g in found if not g.allowed), None):
            raise InputError(f"{bare.name}: no candidate can be used; give these layers a rule. {warnings[0]}")
        if len({c for g in found for c in g.allowed}) < 2:
            raise InputError(f"scheme.auto: there is but one candidate, so nothing to choose. {warnings[0]}")
        return tuple(found), warnings

    def _refused(self, groups: Sequence[Group], c: int) -> tuple[str | None, set[Any]]:
        """Why a candidate is refused, and for which kinds of groups; None and no kind when it will do for all."""
        problem = self.problem(groups, [c] * len(groups))
        if problem is None:
            return None, set()
        kinds = {g.kind for g in groups}
        alone = {k for k in kinds if self.problem(groups, [c if g.kind == k else None for g in groups]) is not None}
        return problem, alone or kinds

    def _beside(self, groups: Sequence[Group], c: int) -> str | None:
        """Why candidate `c` cannot stand beside those before it; None when it can."""
        if not any(group.sizes[c] is not None for group in groups):
            return None
        chosen: list[int | None] = []
        for i, group in enumerate(groups):
            some = group.allowed
            chosen.append(some[(i + group.block) % len(some)] if some else None)
        return self.problem(groups, chosen)

    def _size(self, group: Group, c: int) -> int:
        """Bytes of a group's weights on disk, with scales and zero points."""
        scheme = self.auto.candidates[c].resolve()
        form = formats.get(self.recipe.export.format)
        total = 0.0
        for x in group.layers:
            count = x.shape[0] * x.shape[1]
            if scheme is None:
                total += count * DTYPES[x.dtype].itemsize
            else:
                specs = form.tensors(x.shape, scheme, formats.scale_dtype(form, x.dtype))
                total += bits_per_weight(specs, count) * count / 8
        return round(total)


# Rules ---------------------------------------------------------------------------------------------------------------


def written(recipe: Recipe, groups: Sequence[Group], specs: Sequence[SchemeSpec], default: SchemeSpec) -> Recipe:
    """The recipe with `default` as its scheme and, after its own rules, some for the groups that have another."""
    wanted = {x.name: spec for group, spec in zip(groups, specs, strict=True) for x in group.layers}
    others: dict[tuple[Any, SchemeSpec], list[Group]] = {}
    for group, spec in zip(groups, specs, strict=True):
        if spec != default:
            others.setdefault((group.kind, spec), []).append(group)
    rules = [rule for (_, spec), alike in others.items() for rule in _rules(alike, spec)]
    scheme = RecipeScheme.model_validate(default.model_dump())
    done = recipe.model_copy(update={"scheme": scheme, "rules": (*recipe.rules, *rules)})
    assigned, _ = done.assign(list(wanted))
    if any(assigned[name] != spec.resolve() for name, spec in wanted.items()):
        # Numbers in names mean something else here: one rule a layer, by its name.
        rules = [Rule(match=name, scheme=spec) for name, spec in wanted.items() if spec != default]
        done = recipe.model_copy(update={"scheme": scheme, "rules": (*recipe.rules, *rules)})
    return done


def _rules(alike: Sequence[Group], spec: SchemeSpec) -> list[Rule]:
    r"""Rules for groups of one kind: `re:model\.layers\.(0|3)\.self_attn\.(q_proj|k_proj|v_proj)$`.

    The first number of a name is taken for that of its block, further ones for those of experts.
    """
    owners: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for group in alike:
        for x in group.layers:
            *parts, leaf = x.name.split(".")
            numbers = [part for part in parts if part.isdigit()]
            words = [re.escape(part) for part in parts if not part.isdigit()]
            places = iter(["{}", *([r"\d+"] * len(numbers))])
            rest = iter(words)
            pattern = r"\.".join(next(places) if part.isdigit() else next(rest) for part in parts)
            blocks, leaves = owners.setdefault(pattern, ({}, {}))
            leaves[re.escape(leaf)] = None
            if numbers:
                blocks[numbers[0]] = None
    return [
        Rule(match=rf"re:{pattern.replace('{}', _either(blocks))}\.{_either(leaves)}$", scheme=spec)
        for pattern, (blocks, leaves) in owners.items()
    ]


def _either(words: Iterable[str]) -> str:
    """ "a", or "(a|b)"; "" for no word."""
    found = list(words)
    return f"({'|'.join(found)})" if len(found) > 1 else "".join(found)
