"""Gates: the figures a quantized model must reach before it counts as done.

A gate is a name, the side on which its limit lies, and where its value is read from a Comparison.
A value that is NaN passes no gate. A new gate is one line in `GATES`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quantkit.errors import InputError
from quantkit_eval.compare import Comparison

Sense = Literal["max", "min"]


@dataclass(frozen=True)
class Gate:
    """sense "max": the value must not be above the limit; "min": not below it."""

    sense: Sense
    read: Callable[[Comparison], float]


GATES: dict[str, Gate] = {
    "kl": Gate("max", lambda c: c.kl),
    "perplexity_ratio": Gate("max", lambda c: c.perplexity_ratio),
    "top1_agreement": Gate("min", lambda c: c.top1_agreement),
}


@dataclass(frozen=True)
class GateResult:
    """One gate, judged."""

    name: str
    limit: float
    value: float
    passed: bool
    sense: Sense


def check(comparison: Comparison, gates: Mapping[str, float]) -> list[GateResult]:
    """Judges each gate of `gates` (name -> limit), in its order; a value equal to its limit passes.

    Raises InputError for a gate that does not exist, or a limit that is no number.
    """
    results = []
    for name, limit in gates.items():
        if name not in GATES:
            close = difflib.get_close_matches(name, GATES, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise InputError(f"unknown gate {name!r}; {hint}known: {', '.join(GATES)}")
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or math.isnan(limit):
            raise InputError(f"gate {name!r} needs a number as its limit; got {limit!r}")
        gate = GATES[name]
        value = gate.read(comparison)
        passed = value <= limit if gate.sense == "max" else value >= limit  # false for NaN either way
        results.append(GateResult(name, float(limit), value, passed, gate.sense))
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


def failure_message(results: Sequence[GateResult], worst: Sequence[Mapping[str, Any]]) -> str:
    """One paragraph: which gates failed by what figures, the worst layers, what to try; "" if all passed."""
    failed = [result for result in results if not result.passed]
    if not failed:
        return ""
    figures = "; ".join(
        f"{r.name} is {r.value:.5g}, the gate wants {'at most' if r.sense == 'max' else 'at least'} {r.limit:.5g}"
        for r in failed
    )
    parts = [f"{'gate' if len(failed) == 1 else 'gates'} failed: {figures}."]
    keep = "a rule {match: LAYER, scheme: W8A16} for the layers that lose most"
    if worst:
        layers = ", ".join(f"{w['name']} ({w.get('scheme')}) {float(w['relative_error']):.3g}" for w in worst)
        parts.append(f"Layers with the largest relative error: {layers}.")
        keep = f"a rule {{match: {worst[0]['name']}, scheme: W8A16}}, and the same for the others named"
    parts.append(
        f"Try a finer group (group_size 64 or 32), {keep}, another method (gptq instead of rtn), or more bits."
    )
    return " ".join(parts)
