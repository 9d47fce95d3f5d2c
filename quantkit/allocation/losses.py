"""What rounding does to the outputs of a group of linears, for each of several schemes.

    loss   |fq(x) Qᵀ - x Wᵀ|² / |x Wᵀ|², both summed over tokens and over the linears of the group. Q is the rounded
           weight, fq(x) the input as the scheme has it. Where inputs are left as they are this is
           tr(D H Dᵀ) / tr(W H Wᵀ), D = Q - W, H = E[x xᵀ].

One of the schemes, the probe, is rounded by GPTQ where the recipe's method reads second moments: the share of the error
that GPTQ avoids differs between layers by a factor of three. The other schemes are rounded to nearest, and their losses
multiplied by what GPTQ leaves of the probe's. The errors of weights and of inputs are added as if they had nothing to
do with each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import linear

from quantkit import blocks, solve, summation
from quantkit.errors import InputError
from quantkit.linears import Linear
from quantkit.numerics._activations import fake_quantize
from quantkit.plan import Plan
from quantkit.recipe.named import Method
from quantkit.types import QParams, Scheme, Stats

GPTQ = Method.model_validate("gptq")
TO_NEAREST = Method.model_validate({"rtn": {"scale_search": "diagh"}})
CHUNK = 512  # tokens of a sample that are run at once


@dataclass(frozen=True)
class Subject:
    """A group of layers of one block, and the schemes that are tried on it.

    schemes  candidates; None stays dense, and has no loss
    probe    the candidate that is rounded by the better method; one with a scheme
    """

    block: int
    layers: tuple[Linear, ...]
    schemes: tuple[Scheme | None, ...]
    probe: int

    @property
    def names(self) -> str:
        """The first layers, for messages."""
        return ", ".join(x.name for x in self.layers[:3]) + (", ..." if len(self.layers) > 3 else "")


@dataclass(frozen=True)
class Rounded:
    """A scheme on one linear: D = Q - W (N, K) float32, and, where its input is rounded, how, and Q."""

    scheme: Scheme
    difference_NK: torch.Tensor
    weight_NK: torch.Tensor | None = None
    static_scale: torch.Tensor | None = None

    def of_weight(self, x: torch.Tensor) -> torch.Tensor:
        """x Dᵀ: what rounding the weight adds to the output for x (..., K) float32."""
        return linear(x, self.difference_NK)

    def of_input(self, x: torch.Tensor) -> torch.Tensor:
        """(fq(x) - x) Qᵀ: what rounding the input adds, to the output of the rounded weight."""
        assert self.weight_NK is not None
        return linear(fake_quantize(x, self.scheme.activations, self.static_scale) - x, self.weight_NK)

    def error(self, x: torch.Tensor) -> torch.Tensor:
        """fq(x) Qᵀ - x Wᵀ in two parts, so that neither is the difference of two large numbers."""
        return self.of_weight(x) if self.weight_NK is None else self.of_weight(x) + self.of_input(x)


@dataclass(frozen=True)
class Methods:
    """Plans of one model with two methods: `exact` rounds the probe, `cheap` the other schemes."""

    exact: Plan
    cheap: Plan

    @classmethod
    def of(cls, plan: Plan) -> Methods:
        """Those for the method of a recipe; the same plan twice for a method that reads no second moments."""
        exact, cheap = methods(plan.recipe.method)
        recipes = [plan.recipe.model_copy(update={"method": m, "transforms": ()}) for m in (exact, cheap)]
        first = replace(plan, links=(), recipe=recipes[0])
        return cls(first, first if exact == cheap else replace(first, recipe=recipes[1]))

    @property
    def one(self) -> bool:
        """Whether both are the same."""
        return self.exact is self.cheap

    def needs(self, subject: Subject) -> frozenset[str]:
        """The statistics of inputs that rounding a subject needs."""
        found: frozenset[str] = frozenset()
        for layer in subject.layers:
            tried = [replace(layer, scheme=scheme) for scheme in subject.schemes if scheme is not None]
            found = found.union(*(plan.needs(x) for x in tried for plan in (self.exact, self.cheap)))
        return found


def methods(method: Method) -> tuple[Method, Method]:
    """By which method the probe is rounded, and by which the other schemes, for a recipe with this one."""
    if method.module.needs(method.options) <= {"energy"}:
        return method, method
    return GPTQ, TO_NEAREST


def losses(
    by: Methods, block: blocks.Block, subject: Subject, stats: Mapping[str, Stats], samples: Mapping[str, Stats]
) -> tuple[list[float], dict[str, Rounded]]:
    """The loss of each scheme, and the probe on each linear, by name in memory. The block is loaded.

    stats    by linear: what `Methods.needs` lists
    samples  by linear: a sample of the inputs on which the losses are
    Raises InputError naming the layers whose outputs are zero, or that cannot be rounded.
    """
    ghost = by.exact.skeleton
    weights = {x.module: ghost.get(f"{x.module}.weight").float() for x in subject.layers}
    whole = sum(_energy(samples[name], functools.partial(linear, weight=w)) for name, w in weights.items())
    if not whole > 0:
        raise InputError(f"{subject.names}: the outputs are zero on all calibration tokens; give these layers a rule")

    def tried(plan: Plan, scheme: Scheme | None) -> tuple[dict[str, Rounded], float, float]:
        assert scheme is not None
        rounded = _round(plan, block, [replace(x, scheme=scheme) for x in subject.layers], weights, stats)
        in_weight = sum(_energy(samples[name], r.of_weight) for name, r in rounded.items())
        in_input = sum(_energy(samples[name], r.of_input) for name, r in rounded.items() if r.weight_NK is not None)
        return rounded, in_weight / whole, in_input / whole

    probe, in_weight, in_input = tried(by.exact, subject.schemes[subject.probe])
    to_nearest = in_weight if by.one else tried(by.cheap, subject.schemes[subject.probe])[1]
    left = in_weight / to_nearest if to_nearest > 0 else 1.0
    found = [0.0] * len(subject.schemes)
    for c, scheme in enumerate(subject.schemes):
        if c == subject.probe:
            found[c] = in_weight + in_input
        elif scheme is not None:
            _, of_weight, of_input = tried(by.cheap, scheme)
            found[c] = left * of_weight + of_input
    return found, probe


def _round(
    plan: Plan,
    block: blocks.Block,
    layers: list[Linear],
    weights: Mapping[str, torch.Tensor],
    stats: Mapping[str, Stats],
) -> dict[str, Rounded]:
    """Rounds the layers of a group, those of one input together, as a run would."""
    found: dict[str, Rounded] = {}
    for group in block.groups:
        for alike in solve.by_scheme([x for x in layers if x.module in group]):
            own = [weights[x.module] for x in alike]
            for done, w in zip(solve.solve(plan, alike, own, stats[alike[0].module]), own, strict=True):
                scheme = done.layer.scheme
                assert scheme is not None
                decoded = done.decoded()
                q = None if scheme.activations is None else decoded
                found[done.layer.module] = Rounded(scheme, decoded - w, q, _static(done.inputs))
    return found


def _static(inputs: QParams | None) -> torch.Tensor | None:
    """The calibrated scale of an input, as `fake_quantize` takes it."""
    if inputs is None:
        return None
    return inputs.scale_NG if inputs.global_scale is None else inputs.global_scale


def _energy(sample: Stats, of: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Sum over all tokens of |of(x)|², from a sample of them; 0 for an expert that no token reached."""
    if sample.sample_MK is None or not sample.tokens:
        return 0.0
    parts = sample.sample_MK.split(CHUNK)
    total = sum(summation.total(of(x.float()).square()) for x in parts)
    return total * sample.tokens / len(sample.sample_MK)
