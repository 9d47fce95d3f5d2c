"""What to try next where gates were missed: a recipe that can be run, beside the output, with a little more of each.

    gptq in the place of rounding to nearest     where the method reads no data; costs minutes
    half as many columns a scale                 of integer weights, down to 32; costs a fraction of a bit
    the worst groups of layers in more bits      a tenth of them, worst first, as `validate.repair` begins

What this model, format or engine does not take is left out: each step is planned before it is written. An output of
that recipe that misses its gates again gets one that goes further.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import calibration, output, repair
from quantkit import plan as planning
from quantkit.errors import InputError
from quantkit.hub import Source
from quantkit.output import TRY_NEXT
from quantkit.plan import Plan
from quantkit.recipe import Recipe
from quantkit.recipe.validation import Repair
from quantkit_eval.gate import GateResult, said

FINEST = 32
BUDGET = 1.5  # times the size that the other steps give: what the worst groups may take
INTEGERS = ("int2", "int3", "int4", "int6")


@dataclass(frozen=True)
class Advice:
    """A recipe that goes further. changes: what is other than in the first one, a sentence's part each."""

    recipe: Recipe
    changes: tuple[str, ...]
    first_bytes: int
    output_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {"file": TRY_NEXT, "changes": list(self.changes), "output_bytes": self.output_bytes}

    def text(self, missed: Sequence[str]) -> str:
        """The file: what was missed and what is changed as comments, then the recipe."""
        head = [
            "What to try next, since gates were missed:",
            *(f"  {each}" for each in missed),
            "Other than in the first recipe:",
            *(f"  {each}" for each in self.changes),
            f"Tensors of {self.output_bytes:,} bytes, where the first output has {self.first_bytes:,}.",
            f"Run it with: quantkit quantize {TRY_NEXT} --out FOLDER",
        ]
        lines = [line for part in head for line in part.splitlines()]
        return "".join(f"# {line}\n" for line in lines) + self.recipe.to_yaml()


def advise(first: Plan, layers: Sequence[Mapping[str, Any]]) -> Advice | None:
    """What to try after an output that missed its gates; None where nothing is left, or the texts cannot be read again.

    layers  of that output's quantkit.json: names and relative errors
    """
    if first.recipe.calibration.data == calibration.PYTHON:
        return None
    plan, changes = first, []
    for step in (_method, _group):
        found = step(plan)
        if found is not None:
            plan, change = found
            changes.append(change)
    settings = first.recipe.validation.repair if first.recipe.validation else None
    more = Repair(size=BUDGET, scheme=settings.scheme if settings else None)
    try:
        kept = repair.next_step(plan, more, layers, None)
    except InputError:
        kept = None
    if kept is not None and kept.plan.output_bytes > plan.output_bytes:
        plan = kept.plan
        what = "16 bits, as they were" if kept.scheme == "none" else kept.scheme
        changes.append(f"{what} for the layers that lost most: {'; '.join(kept.groups)}")
    if not changes:
        return None
    return Advice(plan.recipe, tuple(changes), first.output_bytes, plan.output_bytes)


def leave(folder: Path, first: Plan, gates: Sequence[GateResult], layers: Sequence[Mapping[str, Any]]) -> Advice | None:
    """Puts the recipe into the folder of an output that missed its gates, and takes away that of an earlier one."""
    missed = [said(gate) for gate in gates if gate.outcome == "fail" and not gate.passed]
    found = advise(first, layers) if missed else None
    file = folder / TRY_NEXT
    if found is None:
        file.unlink(missing_ok=True)
    else:
        output.write_text(file, found.text(missed))
    return found


def again(
    folder: Path, recipe: Recipe | None, source: Source, gates: Sequence[GateResult], summary: Mapping[str, Any]
) -> Advice | None:
    """`leave` for an output that was written before; source: its original, which may have moved."""
    if recipe is None:
        return None
    try:
        plan = planning.make(recipe.model_copy(update={"model": source.pinned}), source=source)
    except InputError:  # of an original that can be measured, but no longer quantized
        return None
    return leave(folder, plan, gates, summary.get("layers", []))


def _method(plan: Plan) -> tuple[Plan, str] | None:
    if plan.recipe.method_name != "rtn":
        return None
    tried = _planned(plan, method="gptq")
    return (
        None if tried is None else (tried, f"gptq in the place of rtn, which observes {tried.recipe.calibration.data}")
    )


def _group(plan: Plan) -> tuple[Plan, str] | None:
    scheme = plan.recipe.scheme.resolve()
    if scheme is None or scheme.weights.number not in INTEGERS or scheme.weights.strategy not in ("group", "channel"):
        return None
    had = scheme.weights.group_size
    size = 128 if had is None else had // 2
    if size < FINEST or size % FINEST:
        return None
    written = plan.recipe.to_dict()["scheme"]
    if written.get("weights"):
        written["weights"] = {**written["weights"], "strategy": "group", "group_size": size}
    else:
        written["group_size"] = size
    tried = _planned(plan, scheme=written)
    return None if tried is None else (tried, f"groups of {size} columns in the place of {had or 'whole rows'}")


def _planned(plan: Plan, **changes: Any) -> Plan | None:
    """The plan of a changed recipe; None where model, format or engines refuse it."""
    try:
        return planning.make(Recipe.from_any({**plan.recipe.to_dict(), **changes}), source=plan.source)
    except InputError:
        return None
