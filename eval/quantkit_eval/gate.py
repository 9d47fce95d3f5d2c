"""Gates: the figures a quantized model must keep before it counts as done, each judged with its uncertainty.

A gate asks for non-inferiority: it passes when the figure is on the good side of its limit with 95 % confidence, fails
when it is on the bad side with as much, and is inconclusive between, with the number of samples that it would take.
What does not pass is not proved, so it is no success either; a gate of level "warn" is told and stops nothing. NaN
fails.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from quantkit.errors import InputError
from quantkit.recipe.gates import Limit
from quantkit_eval.compare import Comparison
from quantkit_eval.intervals import Interval, Outcome, Sense, mean_interval, verdict

# What is counted where a figure's samples are not windows.
UNITS = {"flips": "prompts", "recovery": "items"}


# What windows say, whatever the recipe.
ON_WINDOWS = ("kl", "perplexity_ratio", "top1_agreement")


@dataclass(frozen=True)
class GateResult:
    """One gate, judged.

    low, high  one-sided bounds of 95 % each; needed: samples (`unit`) that would decide an inconclusive one
    """

    name: str
    limit: float
    value: float
    low: float
    high: float
    outcome: Outcome
    needed: int | None
    samples: int
    unit: str
    level: str
    sense: Sense

    @property
    def passed(self) -> bool:
        """Whether nothing stands in the way: it passed, or only warns."""
        return self.outcome == "pass" or self.level == "warn"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def sense(name: str) -> Sense:
    """On which side of its limit a figure must be."""
    return "min" if name == "top1_agreement" or name.startswith("recovery") else "max"


def figures(comparison: Comparison) -> dict[str, Interval]:
    """What a comparison on windows says: kl, perplexity_ratio and top1_agreement, with windows as samples."""
    pairs = zip(comparison.nll_by_window, comparison.nll_by_window_original, strict=True)
    log_ratio = mean_interval([q - p for q, p in pairs])
    return {
        "kl": mean_interval(comparison.kl_by_window),
        "perplexity_ratio": _exp(log_ratio),
        "top1_agreement": mean_interval(comparison.top1_by_window),
    }


def _exp(x: Interval) -> Interval:
    def exp(y: float) -> float:
        return math.exp(y) if y < 709 else math.inf

    error = None if x.stderr is None else x.stderr * exp(x.value)
    return replace(x, value=exp(x.value), low=exp(x.low), high=exp(x.high), stderr=error)


def known(gates: Mapping[str, Limit], measured: Collection[str]) -> None:
    """Raises InputError for a gate of something that is not measured."""
    for name in gates:
        if name not in measured:
            close = difflib.get_close_matches(name, measured, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise InputError(f"gate {name!r}: nothing of that name is measured; {hint}there are {', '.join(measured)}")


def check(measured: Mapping[str, Interval], gates: Mapping[str, Limit]) -> list[GateResult]:
    """Judges each gate of `gates`, in its order. Raises InputError for a gate of something that was not measured."""
    known(gates, measured)
    results = []
    for name, gate in gates.items():
        found, side = measured[name], sense(name)
        judged = verdict(found, gate.limit, side)
        figures = (gate.limit, found.value, found.low, found.high, judged.outcome, judged.needed, found.samples)
        results.append(GateResult(name, *figures, UNITS.get(name.split(".")[0], "windows"), gate.level, side))
    return results


def worst_layers(layers: Sequence[Mapping[str, Any]], n: int = 3) -> list[Mapping[str, Any]]:
    """The `n` layers with the largest "relative_error", worst first. NaN is the worst; layers without one are left out.

    layers  as in quantkit.json: {"name", "scheme", "bits_per_weight", "relative_error", "notes"}
    """

    def badness(layer: Mapping[str, Any]) -> tuple[bool, float]:
        error = float(layer["relative_error"])
        return math.isnan(error), 0.0 if math.isnan(error) else error

    measured = [layer for layer in layers if layer.get("relative_error") is not None]
    return sorted(measured, key=badness, reverse=True)[:n]


def said(result: GateResult) -> str:
    """ "kl is 0.0712 (0.0698 to 0.0726), the gate wants at most 0.06"."""
    wants = f"at {'most' if result.sense == 'max' else 'least'} {result.limit:.5g}"
    text = f"{result.name} is {result.value:.5g} ({result.low:.5g} to {result.high:.5g}), the gate wants {wants}"
    if result.outcome != "inconclusive":
        return text
    return f"{text}: inconclusive with {result.samples} {result.unit}, it would take {result.needed}"


def failure_message(results: Sequence[GateResult], worst: Sequence[Mapping[str, Any]]) -> str:
    """One paragraph: which gates were missed by what figures, the worst layers, what to try; "" if none was."""
    missed = [result for result in results if not result.passed]
    if not missed:
        return ""
    failed = [r for r in missed if r.outcome == "fail"]
    parts = []
    if failed:
        parts.append(f"{'gate' if len(failed) == 1 else 'gates'} failed: {'; '.join(map(said, failed))}.")
    if undecided := [r for r in missed if r.outcome == "inconclusive"]:
        parts.append(f"Not proved: {'; '.join(map(said, undecided))}.")
        parts.append("Give more samples (validate.perplexity.most, or more items), or a limit that leaves room.")
    if not failed:
        return " ".join(parts)
    keep = "a rule {match: LAYER, scheme: W8A16} for the layers that lose most"
    if worst:
        layers = ", ".join(f"{w['name']} ({w.get('scheme')}) {float(w['relative_error']):.3g}" for w in worst)
        parts.append(f"Layers with the largest relative error: {layers}.")
        keep = f"a rule {{match: {worst[0]['name']}, scheme: W8A16}}, and the same for the others named"
    parts.append(
        f"Try a finer group (group_size 64 or 32), {keep}, another method (gptq instead of rtn), or more bits; "
        "validate.repair does the second by itself."
    )
    return " ".join(parts)
