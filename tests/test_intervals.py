"""Intervals that cover, tests that decide as often as they say, and sample sizes that suffice."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from quantkit_eval.intervals import (
    MOST,
    Interval,
    mcnemar,
    mean_interval,
    ratio_interval,
    smallest_loss,
    student,
    verdict,
)


@pytest.mark.parametrize(
    ("p", "freedom", "expected"),
    [
        (0.95, 1, 6.313751515),
        (0.975, 1, 12.706204736),
        (0.95, 2, 2.919985580),
        (0.975, 10, 2.228138852),
        (0.95, 39, 1.684875122),
        (0.99, 120, 2.357824589),
        (0.5, 7, 0.0),
    ],
)
def test_students_quantiles_are_those_of_the_tables(p: float, freedom: int, expected: float) -> None:
    assert student(p, freedom) == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_no_freedom_has_no_bound() -> None:
    assert student(0.95, 0) == math.inf


def test_one_sample_bounds_nothing_and_none_has_no_mean() -> None:
    found = mean_interval([0.3])
    assert (found.value, found.low, found.high, found.stderr) == (0.3, -math.inf, math.inf, None)
    with pytest.raises(ValueError, match="no samples"):
        mean_interval([])
    assert math.isnan(mean_interval([0.1, math.nan]).high)


def coverage(covers: list[bool]) -> float:
    return sum(covers) / len(covers)


def test_the_bounds_of_a_mean_hold_as_often_as_they_say() -> None:
    """Windows' KL is skewed: log-normal with the spread that was measured (0.15 of the mean), 40 windows."""
    rng = random.Random(0)
    truth = math.exp(0.15**2 / 2)
    upper, lower = [], []
    for _ in range(4000):
        found = mean_interval([rng.lognormvariate(0, 0.15) for _ in range(40)])
        upper.append(truth <= found.high)
        lower.append(truth >= found.low)
    assert abs(coverage(upper) - 0.95) < 0.02 and abs(coverage(lower) - 0.95) < 0.02


def held(trials: int, items: int, lose: float, win: float) -> tuple[float, float, float]:
    """How often the lower, the upper and both bounds of a recovery hold, of items right with probability 0.7.

    lose, win  probability that an item goes from right to wrong, from wrong to right
    """
    rng = random.Random(1)
    truth = (0.7 * (1 - lose) + 0.3 * win) / 0.7
    below, above = [], []
    for seed in range(trials):
        before = [rng.random() < 0.7 for _ in range(items)]
        after = [rng.random() >= lose if right else rng.random() < win for right in before]
        found = ratio_interval(after, before, resamples=1000, seed=seed)
        below.append(found.low <= truth)
        above.append(truth <= found.high)
    return coverage(below), coverage(above), coverage([a and b for a, b in zip(below, above, strict=True)])


@pytest.mark.parametrize(("items", "lose", "win"), [(500, 0.05, 0.025), (1300, 0.02, 0.01)])
def test_the_bounds_of_a_recovery_hold_as_often_as_they_say(items: int, lose: float, win: float) -> None:
    """3000 trials have a standard error of 0.0055."""
    lower, upper, both = held(3000, items, lose, win)
    assert abs(both - 0.90) < 0.02 and abs(lower - 0.95) < 0.02 and abs(upper - 0.95) < 0.02


@pytest.mark.parametrize(("items", "lose", "win"), [(16, 0.02, 0.005), (50, 0.01, 0.01), (240, 0.01, 0.01)])
def test_few_changes_do_not_make_bounds_that_are_too_narrow(items: int, lose: float, win: float) -> None:
    """Where an item or two changes, or none, bounds may be wide; drawing the items alone held in 20, 29 and 76 %."""
    lower, upper, both = held(400, items, lose, win)
    assert both > 0.88 and lower > 0.93 and upper > 0.93


def test_no_change_is_no_proof() -> None:
    found = ratio_interval([1] * 12 + [0] * 4, [1] * 12 + [0] * 4)
    assert found.value == 1 and found.low < 0.95 and found.high > 1.03
    many = ratio_interval([1] * 1200 + [0] * 400, [1] * 1200 + [0] * 400)
    assert 0.997 < many.low < 1 < many.high < 1.003


def test_a_recovery_is_the_ratio_of_the_sums_and_the_same_every_time() -> None:
    found = ratio_interval([1, 0, 1, 1], [1, 1, 1, 1])
    assert (
        found.value == 0.75 and found.low <= 0.75 <= found.high and found == ratio_interval([1, 0, 1, 1], [1, 1, 1, 1])
    )
    with pytest.raises(ValueError, match="nothing to recover"):
        ratio_interval([1, 1], [0, 0])
    with pytest.raises(ValueError, match="2 and 1 items"):
        ratio_interval([1, 1], [1])


def test_mcnemar_is_the_binomial_test_of_the_changes() -> None:
    for lost, won in itertools.product(range(7), range(7)):
        original = [True] * lost + [False] * won + [True] * 5
        quantized = [False] * lost + [True] * won + [True] * 5
        n = lost + won
        tail = sum(math.comb(n, k) for k in range(min(lost, won) + 1)) / 2**n
        found = mcnemar(original, quantized)
        assert found[:2] == (lost, won) and found[2] == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar([True] * 1000 + [False] * 1000, [False] * 1000 + [True] * 1000)[2] == pytest.approx(1.0)


def test_the_smallest_loss_is_that_of_the_literature() -> None:
    """At 5 % two-sided and 80 % power: 1319 items and a tenth of them changed show 2.4 points."""
    assert smallest_loss(0.10, 1319) == pytest.approx(0.0244, abs=2e-4)
    assert smallest_loss(0.05, 3924) == pytest.approx(0.01, abs=1e-4)


def interval(value: float, half: float, samples: int = 40) -> Interval:
    return Interval(value, value - half, value + half, half / 1.7, samples)


@pytest.mark.parametrize(
    ("value", "limit", "sense", "expected"),
    [
        (0.05, 0.06, "max", "pass"),
        (0.0589, 0.06, "max", "pass"),
        (0.0595, 0.06, "max", "inconclusive"),
        (0.0605, 0.06, "max", "inconclusive"),
        (0.0611, 0.06, "max", "fail"),
        (0.90, 0.85, "min", "pass"),
        (0.8505, 0.85, "min", "inconclusive"),
        (0.8485, 0.85, "min", "fail"),
        (math.nan, 0.85, "min", "fail"),
        (math.inf, 1.05, "max", "fail"),
    ],
)
def test_three_outcomes(value: float, limit: float, sense: str, expected: str) -> None:
    assert verdict(interval(value, 0.001), limit, sense).outcome == expected  # type: ignore[arg-type]


def test_the_bound_itself_passes() -> None:
    assert verdict(Interval(0.5, 0.4, 0.6, 0.05, 9), 0.6, "max").outcome == "pass"
    assert verdict(Interval(0.5, 0.4, 0.6, 0.05, 9), 0.4, "min").outcome == "pass"


def test_as_many_samples_as_it_asks_for_decide() -> None:
    """With the spread as it is, the number that is named brings the bound to the limit; a quarter less does not."""
    found = verdict(interval(0.058, 0.004), 0.06, "max")
    assert found.outcome == "inconclusive" and found.needed in (160, 161)
    assert verdict(interval(0.058, 0.004 * math.sqrt(40 / 161), 161), 0.06, "max").outcome == "pass"
    assert verdict(interval(0.058, 0.004 * math.sqrt(40 / 120), 120), 0.06, "max").outcome == "inconclusive"
    assert verdict(interval(0.06, 0.004), 0.06, "max").needed == MOST
    assert verdict(mean_interval([0.05]), 0.06, "max").needed == 2


def test_an_output_on_its_limit_passes_one_time_in_twenty() -> None:
    rng = random.Random(2)
    trials = [
        verdict(mean_interval([rng.gauss(0.06, 0.01) for _ in range(40)]), 0.06, "max").outcome for _ in range(4000)
    ]
    assert abs(trials.count("pass") / 4000 - 0.05) < 0.02 and abs(trials.count("fail") / 4000 - 0.05) < 0.02
