"""What a sample says about a figure: intervals, paired comparisons, and the test behind a gate.

Samples are windows or items, never tokens: tokens of one text are alike. Everything is paired, the same windows and
items for both models, because what they have in common then cancels out.

    mean_interval     Student's t on the samples' mean: for KL, log-perplexity ratio, agreement
    ratio_interval    paired bootstrap of sum(quantized) / sum(original): for the recovery of a task's score
    mcnemar           the exact test of how many items went from right to wrong against from wrong to right
    verdict           non-inferiority: pass, fail, or inconclusive with the number of samples that it would take

A gate asks whether the loss is below a margin, not whether there is one. At confidence 0.95 an output that lies exactly
on its limit passes one time in twenty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Sense = Literal["max", "min"]
Outcome = Literal["pass", "fail", "inconclusive"]
CONFIDENCE = 0.95
RESAMPLES = 10_000
MOST = 10**9  # samples beyond which a number that it would take means nothing


@dataclass(frozen=True)
class Interval:
    """A figure with its one-sided bounds: each holds with probability `confidence`, both together with 2 c - 1.

    samples    how many there were; stderr: None for one sample, whose bounds are infinite
    """

    value: float
    low: float
    high: float
    stderr: float | None
    samples: int
    confidence: float = CONFIDENCE


@dataclass(frozen=True)
class Verdict:
    """needed  samples that would decide, if the figure and its spread stay as they are; None when it is decided"""

    outcome: Outcome
    needed: int | None = None


def student(p: float, freedom: int) -> float:
    """The p-quantile of Student's t, 0.5 <= p < 1, to 1e-8: bisection on its integral by Simpson's rule."""
    if freedom < 1:
        return math.inf
    height = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)

    def above_half(t: float) -> float:
        # x = sqrt(freedom) tan(angle) makes the integrand cos^(freedom - 1), smooth on a short range
        angle = math.atan(t / math.sqrt(freedom))
        steps = 200
        h = angle / steps
        total = sum(
            (1 if i in (0, steps) else 4 if i % 2 else 2) * math.cos(i * h) ** (freedom - 1) for i in range(steps + 1)
        )
        return height * math.sqrt(freedom) * total * h / 3

    low, high = 0.0, 1.0
    while above_half(high) < p - 0.5:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above_half(middle) < p - 0.5 else (low, middle)
    return high


def mean_interval(samples: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """The mean of independent samples with one-sided bounds by Student's t. NaN or Inf among them goes through."""
    n = len(samples)
    if n == 0:
        raise ValueError("no samples, so there is no mean")
    mean = math.fsum(samples) / n if all(map(math.isfinite, samples)) else float(sum(samples))
    if n == 1 or not math.isfinite(mean):
        bounds = (-math.inf, math.inf) if math.isfinite(mean) else (mean, mean)
        return Interval(mean, *bounds, None, n, confidence)
    error = math.sqrt(math.fsum((x - mean) ** 2 for x in samples) / (n - 1) / n)
    half = student(confidence, n - 1) * error
    return Interval(mean, mean - half, mean + half, error, n, confidence)


def ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """sum(numerators) / sum(denominators) with bounds by a paired bootstrap: items are drawn, both figures with them.

    The bounds are the percentiles of the resampled ratios. Items that are right or wrong may hardly differ, and drawing
    them again would find as little: there half an item is added to each of the four cases (right and right, right and
    wrong, ...), as Agresti and Min do for a paired difference.
    Raises ValueError when the lengths differ, there is no item or the denominators add up to nothing, since then there
    is no ratio.
    """
    n = len(numerators)
    if n != len(denominators) or n == 0:
        raise ValueError(f"{n} and {len(denominators)} items; expected the same number of each, and some")
    top, below = torch.tensor(numerators, dtype=torch.float64), torch.tensor(denominators, dtype=torch.float64)
    if float(below.sum()) == 0:
        raise ValueError("the original's scores add up to 0, so there is nothing to recover")
    value = float(top.sum() / below.sum())
    generator = torch.Generator().manual_seed(seed)
    binary = bool(((top == 0) | (top == 1)).all() and ((below == 0) | (below == 1)).all())
    found = (_of_cases if binary else _of_items)(top, below, resamples, generator)
    low, high = torch.quantile(found, torch.tensor([1 - confidence, confidence], dtype=torch.float64)).tolist()
    return Interval(value, low, high, float(found.std()), n, confidence)


def _of_items(top_N: torch.Tensor, below_N: torch.Tensor, resamples: int, generator: torch.Generator) -> torch.Tensor:
    """Ratios of samples of the items, with replacement; samples whose denominator is 0 are left out."""
    ratios, n = [], len(top_N)
    for start in range(0, resamples, 1000):  # bounds the memory: 1000 rows of n indices
        drawn = torch.randint(n, (min(1000, resamples - start), n), generator=generator)
        sums = below_N[drawn].sum(1)
        ratios.append(top_N[drawn].sum(1)[sums != 0] / sums[sums != 0])
    return torch.cat(ratios)


def _of_cases(top_N: torch.Tensor, below_N: torch.Tensor, resamples: int, generator: torch.Generator) -> torch.Tensor:
    """The same of items of 0 and 1, with half an item more of each case: only how many there are of each matters."""
    both, won = float((top_N * below_N).sum()), float((top_N * (1 - below_N)).sum())
    lost = float(below_N.sum()) - both
    cases = [count + 0.5 for count in (both, lost, won, len(top_N) - both - lost - won)]
    left, rest = torch.full((resamples,), len(top_N) + 2.0, dtype=torch.float64), math.fsum(cases)
    drawn = []
    for case in cases[:3]:  # a multinomial, case by case
        count = torch.binomial(left, torch.full_like(left, case / rest), generator=generator)
        drawn.append(count)
        left, rest = left - count, rest - case
    below = drawn[0] + drawn[1]
    return ((drawn[0] + drawn[2]) / below)[below != 0]


def mcnemar(original: Sequence[bool], quantized: Sequence[bool]) -> tuple[int, int, float]:
    """(right to wrong, wrong to right, two-sided p-value) of the same items judged for both models.

    The exact test of McNemar: under no difference each change is a fair coin. Small p: more than chance.
    """
    if len(original) != len(quantized):
        raise ValueError(f"{len(original)} and {len(quantized)} items; expected the same ones")
    lost = sum(a and not b for a, b in zip(original, quantized, strict=True))
    won = sum(b and not a for a, b in zip(original, quantized, strict=True))
    changed, fewer = lost + won, min(lost, won)
    if changed == 0:
        return 0, 0, 1.0
    # log-binomials: 2^-changed underflows for more than a thousand changes
    terms = [
        math.lgamma(changed + 1) - math.lgamma(k + 1) - math.lgamma(changed - k + 1) - changed * math.log(2)
        for k in range(fewer + 1)
    ]
    return lost, won, min(1.0, 2 * math.fsum(map(math.exp, terms)))


def smallest_loss(disagreement: float, items: int, *, power: float = 0.8) -> float:
    """The smallest drop of an accuracy that paired items could have shown, with `power` at 5 % two-sided.

    (z_0.975 + z_power) sqrt(disagreement / items), disagreement being the share of items on which the models differ.
    """
    from statistics import NormalDist

    normal = NormalDist()
    return (normal.inv_cdf(0.975) + normal.inv_cdf(power)) * math.sqrt(disagreement / items)


def verdict(interval: Interval, limit: float, sense: Sense) -> Verdict:
    """Whether a figure keeps its limit, with the interval's confidence: non-inferiority with `limit` as the margin.

    pass          the whole interval is on the good side, limit included
    fail          the whole interval is on the bad side, or the figure is NaN
    inconclusive  the limit lies inside: more samples are needed, `needed` of them as things stand
    """
    if math.isnan(interval.value):
        return Verdict("fail")
    good, bad = (interval.high, interval.low) if sense == "max" else (-interval.low, -interval.high)
    edge = limit if sense == "max" else -limit
    if good <= edge:
        return Verdict("pass")
    if bad > edge:
        return Verdict("fail")
    distance = abs(interval.value - limit)
    if interval.stderr is None:
        return Verdict("inconclusive", 2)
    half = max(interval.high - interval.value, interval.value - interval.low)
    needed = math.ceil(interval.samples * (half / distance) ** 2) if distance > 0 else MOST
    return Verdict("inconclusive", min(MOST, max(interval.samples + 1, needed)))
