"""Bit allocation: from `scheme: {auto: ...}` to a recipe that says of each layer which of several schemes it gets.

    outline   what there is to choose, from headers alone (quantkit/allocation/candidates.py)
    measure   what each candidate costs each group of layers: KL divergence at the end of the model, predicted from the
              error of the group's outputs and the model's answer to such an error (quantkit/allocation/sensitivity.py)
    choose    the choice of least predicted KL within the budget, exactly (quantkit/allocation/knapsack.py)

What comes out is a recipe like one written by hand, so everything after it is as for any other, and the recipe beside
the weights gives the same bytes again without measuring. The budget is in bits a weight as stored, scales and zero
points included, over the layers that take part: those that a rule of the recipe names, and those in no block, do not.

The prediction is a sum over groups, each measured alone. It ranks choices; as a figure it is good while it is small,
and what is true is measured after the run (`verdict`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from quantkit import calibration, calibration_rows, estimate, hub
from quantkit import plan as planning
from quantkit.allocation import knapsack, losses, sensitivity
from quantkit.allocation.candidates import Outline, outline
from quantkit.allocation.sensitivity import Measured
from quantkit.linears import Linear
from quantkit.progress import Progress, Silent
from quantkit.recipe import Recipe

LINEAR = (0.8, 1.25)  # what a quarter of the noise may do, times four, over what all of it does


def allocate(
    recipe: Recipe,
    *,
    device: torch.device,
    progress: Progress,
    texts: Iterable[Any] | None = None,
    source: hub.Source | None = None,
) -> tuple[Recipe, dict[str, Any]]:
    """Chooses a scheme for each layer of a recipe with `scheme: {auto: ...}`.

    device  where blocks are computed
    texts   take the place of the recipe's calibration.data
    source  where the model was found already
    Returns the recipe with the choice written out, and what quantkit.json says of it. Raises InputError when no choice
    keeps the budget, with the least that can be reached, and for whatever a plan refuses.
    """
    found = outline(recipe, source)
    for warning in found.warnings:
        progress.warn(warning)
    rows = _rows(found, texts)
    measured, quarter = _measure(found, rows, device, progress)
    chosen = choose(found, measured)
    report = _report(found, measured, chosen, rows, quarter)
    if not LINEAR[0] <= quarter <= LINEAR[1]:
        progress.warn(
            f"allocation: a quarter of the noise has {quarter:.2f} times the effect that it should have, so "
            f"sensitivities are {'too high, by rounding' if quarter > 1 else 'too low'}; the choice may not be the best"
        )
    progress.say(said(report))
    return found.settled(chosen), report


def _rows(found: Outline, texts: Iterable[Any] | None) -> calibration.Rows:
    """The calibration rows of the run itself, then those to measure on; the latter alone for a method of energies.

    Nothing is said of them: the run will.
    """
    recipe, auto = found.recipe, found.auto
    exact, cheap = losses.methods(recipe.method)
    wanted = recipe.calibration.model_copy(update={"samples": recipe.calibration.samples + auto.rows})
    if exact == cheap:
        wanted = recipe.calibration.model_copy(update={"samples": auto.rows, "length": auto.length})
    method = losses.GPTQ  # one that reads data, whatever the recipe's own does
    asks = replace(found.plan, recipe=recipe.model_copy(update={"method": method, "calibration": wanted}))
    rows = calibration_rows.read(asks, Silent(), texts)
    assert rows is not None
    return rows


def _measure(
    found: Outline, rows: calibration.Rows, device: torch.device, progress: Progress
) -> tuple[list[Measured | None], float]:
    """What was measured of each group, None for one that can only stay dense; and the effect of a quarter of noise."""
    schemes = [spec.resolve() for spec in found.auto.candidates]
    subjects: dict[int, losses.Subject] = {}
    for i, group in enumerate(found.groups):
        tried = tuple(scheme if size is not None else None for scheme, size in zip(schemes, group.sizes, strict=True))
        by_size = sorted((size, c) for c, size in enumerate(group.sizes) if size is not None and tried[c] is not None)
        if by_size:
            probe = by_size[(len(by_size) - 1) // 2][1]
            subjects[i] = losses.Subject(group.block, group.layers, tried, probe)
    tokens = (found.auto.rows, found.auto.length)
    done, quarter = sensitivity.measure(
        found.plan, [*subjects.values()], rows, tokens, device=device, progress=progress
    )
    measured = dict(zip(subjects, done, strict=True))
    return [measured.get(i) for i in range(len(found.groups))], quarter


def choose(found: Outline, measured: Sequence[Measured | None]) -> list[int]:
    """The candidate of each group: least total predicted KL within the budget."""
    options = [
        [knapsack.Option(group.sizes[c] or 0, _predicted(m, c)) for c in group.allowed]
        for group, m in zip(found.groups, measured, strict=True)
    ]
    solved = knapsack.solve(options, found.capacity)
    assert solved is not None  # the outline has seen to it that the smallest fit
    return [group.allowed[c] for group, c in zip(found.groups, solved, strict=True)]


def _predicted(measured: Measured | None, candidate: int) -> float:
    return measured.predicted(candidate) if measured else 0.0


# The report ----------------------------------------------------------------------------------------------------------


def _report(
    found: Outline, measured: Sequence[Measured | None], chosen: Sequence[int], rows: calibration.Rows, quarter: float
) -> dict[str, Any]:
    """What quantkit.json says of the choice, under "allocation"."""
    names, auto = found.names, found.auto

    def total(choice: Sequence[int]) -> float:
        return sum(_predicted(m, c) for m, c in zip(measured, choice, strict=True))

    uniform = []
    for c, name in enumerate(names):
        size = found.size([c] * len(chosen))
        if size <= found.capacity and all(c in group.allowed for group in found.groups):
            predicted = total([c] * len(chosen))
            uniform.append({"candidate": name, "bits": round(found.bits(size), 4), "predicted_kl": predicted})
    groups = []
    for group, m, chose in zip(found.groups, measured, chosen, strict=True):
        per_candidate = {
            names[c]: {
                "bits": round(8 * (group.sizes[c] or 0) / group.weights, 4),
                "relative_error": m.losses[c] if m else 0.0,
                "predicted_kl": _predicted(m, c),
            }
            for c in group.allowed
        }
        groups.append(
            {
                "layers": group.name,
                "weights": group.weights,
                "sensitivity": m.sensitivity if m else None,
                "candidates": per_candidate,
                "chosen": names[chose],
            }
        )
    return {
        "auto": auto.model_dump(mode="json"),
        "budget_bits": auto.bits,
        "bits": round(found.bits(found.size(chosen)), 4),
        "weights": sum(group.weights for group in found.groups),
        "tokens": int(rows.mask_RL[-auto.rows :, : auto.length].sum()),
        "noise": sensitivity.NOISE,
        "quarter_noise": quarter,
        "predicted_kl": total(chosen),
        "uniform": uniform,
        "groups": groups,
    }


def said(report: Mapping[str, Any]) -> str:
    """The choice in one line: "4.2461 of 4.25 bits a weight: W3A16 for 10 groups of layers, ...; predicted KL ..."."""
    chosen = [group["chosen"] for group in report["groups"]]
    counts = ", ".join(f"{name} for {chosen.count(name)}" for name in dict.fromkeys(sorted(chosen)))
    best = min(report["uniform"], key=lambda u: u["predicted_kl"], default=None)
    beside = f", {best['predicted_kl']:.4f} with {best['candidate']} for all at {best['bits']:g} bits" if best else ""
    return (
        f"allocation: {report['bits']:g} of {report['budget_bits']:g} bits a weight; {counts} of {len(chosen)} groups "
        f"of layers; predicted KL {report['predicted_kl']:.4f}{beside}"
    )


def verdict(report: Mapping[str, Any], kl: float) -> str:
    """The prediction beside what validation measured, in one line. `kl`: nats a token, of the finished output."""
    return f"allocation: KL {kl:.4f} measured, {report['predicted_kl']:.4f} predicted as a sum over groups of layers"


# The plan ------------------------------------------------------------------------------------------------------------


def describe(recipe: Recipe) -> dict[str, Any]:
    """The plan of a recipe with `scheme: {auto: ...}`, in the form of `estimate.describe`: nothing is measured.

    Raises InputError as `allocate` does, but for what only the calibration text shows.
    """
    found = outline(recipe)
    base = estimate.describe(found.plan)
    names = found.names
    least = sum(min(size for size in group.sizes if size is not None) for group in found.groups)
    taken = sum(planning.nbytes(spec) for x in _linears(found) for spec in found.plan.tensors(x).values())
    others = found.plan.output_bytes - taken
    hidden = int(found.plan.skeleton.model.config.get_text_config().hidden_size)
    tokens = found.auto.rows * found.auto.length
    facts = [(key, value) for key, value in base["facts"] if key not in ("output", "disk")]
    facts += [
        ("scheme", f"auto: of {', '.join(names)} the best for each of {len(found.groups)} groups of layers"),
        ("budget", f"{found.auto.bits:g} bits a weight; the smallest candidates take {found.bits(least):.4f}"),
        ("output", f"{others + least:,} to {others + found.capacity:,} bytes of tensors"),
        ("the choice", f"is made when the run starts, by measuring {len(found.groups)} groups on {tokens:,} tokens"),
        ("  memory", f"{(len(found.groups) + 1) * tokens * hidden * 4:,} bytes more, while it is made"),
    ]
    kinds: dict[Any, list[int]] = {}
    for i, group in enumerate(found.groups):
        kinds.setdefault(group.kind, []).append(i)
    rows = []
    for kind, members in kinds.items():
        group = found.groups[members[0]]
        layers = ", ".join(dict.fromkeys(name for name, _, _ in kind))
        bits = ["refused" if size is None else f"{8 * size / group.weights:.4f}" for size in group.sizes]
        rows.append([layers, str(len(members)), *bits])
    table = {"columns": ["layers of a group", "groups", *(f"{name} bits" for name in names)], "rows": rows}
    return {**base, "facts": facts, "table": table, "warnings": [*found.warnings, *base["warnings"]]}


def _linears(found: Outline) -> Iterable[Linear]:
    return (found.plan.linears[x.module] for group in found.groups for x in group.layers)
