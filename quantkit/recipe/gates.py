"""`validate.gates` in a recipe: limits that the output must keep, and those that apply when a recipe gives none.

    gates:
      kl: 0.06                                   # short for {limit: 0.06, level: fail}
      top1_agreement: {limit: 0.9, level: warn}  # told when it is missed, but no reason to fail
      recovery: {average: 0.98, gsm8k: 0.97}     # of tasks' scores; a number alone is the average's

A gate is a test of non-inferiority (quantkit_eval/intervals.py). Defaults are wide: they are there to catch an output
that is broken, whatever the model; a limit that says what an application can bear is the user's to give.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_serializer

from quantkit.errors import InputError
from quantkit.recipe.scheme import Part
from quantkit.types import Scheme

AVERAGE = "average"
# Bits of the coarsest numbers, weights or inputs -> KL in nats, perplexity ratio, share of tokens. About three times
# what round to nearest loses on a model of 7 M weights; larger models lose less.
_DEFAULTS = (
    (8, 0.04, 1.04, 0.9),
    (5, 0.06, 1.06, 0.88),
    (4, 0.15, 1.15, 0.78),
    (3, 0.6, 1.6, 0.6),
    (0, 1.2, 3.0, 0.45),
)
_WEIGHTS_OF_8 = (0.01, 1.01, 0.95)  # weights of 8-bit integers, inputs untouched: next to nothing is lost
_INPUTS_OF_4 = (0.4, 1.4, 0.65)


def _spread(value: Any) -> Any:
    return {"limit": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


def _spread_recovery(value: Any) -> Any:
    return {AVERAGE: value} if isinstance(value, int | float) and not isinstance(value, bool) else value


class Limit(Part):
    """One gate. `level`: whether missing it fails the run or is only told."""

    limit: float
    level: Literal["fail", "warn"] = "fail"

    @model_serializer
    def _short(self) -> Any:
        return self.limit if self.level == "fail" else {"limit": self.limit, "level": self.level}


class _AtMost(Limit):
    limit: float = Field(ge=0)


class _Factor(Limit):
    limit: float = Field(gt=0)


class _Share(Limit):
    limit: float = Field(ge=0, le=1)


class Gates(Part):
    """Limits that the output must keep; a gate that is not given is not checked."""

    kl: Annotated[_AtMost | None, BeforeValidator(_spread)] = Field(
        default=None, description="Largest mean KL divergence, in nats a token."
    )
    perplexity_ratio: Annotated[_Factor | None, BeforeValidator(_spread)] = Field(
        default=None, description="Largest perplexity, as a multiple of the original's."
    )
    top1_agreement: Annotated[_Share | None, BeforeValidator(_spread)] = Field(
        default=None, description="Smallest share of tokens whose likeliest next token is the original's."
    )
    flips: Annotated[_Share | None, BeforeValidator(_spread)] = Field(
        default=None,
        description="Largest share of the original's greedily generated tokens that are not likeliest now.",
    )
    recovery: Annotated[
        dict[str, Annotated[_AtMost, BeforeValidator(_spread)]] | None, BeforeValidator(_spread_recovery)
    ] = Field(default=None, description="Smallest score of a task, by its name, or of all (average), as a multiple.")

    def limits(self) -> dict[str, Limit]:
        """By name; recovery's are called "recovery" (the average) and "recovery.TASK"."""
        found: dict[str, Limit] = {
            name: limit for name in type(self).model_fields if isinstance(limit := getattr(self, name), Limit)
        }
        for task, limit in (self.recovery or {}).items():
            found["recovery" if task == AVERAGE else f"recovery.{task}"] = limit
        return found


def default(schemes: Sequence[Scheme]) -> Gates:
    """Gates of a recipe that gives none, by the coarsest numbers that it names."""
    numbers = [(_bits(s.weights.number), _bits(s.activations.number) if s.activations else 16) for s in schemes]
    worst = min((min(pair) for pair in numbers), default=16)
    if any(inputs <= 4 for _, inputs in numbers) and worst == 4:
        figures = _INPUTS_OF_4
    elif all(s.weights.number == "int8" and s.activations is None for s in schemes):
        figures = _WEIGHTS_OF_8
    else:
        figures = next(row[1:] for row in _DEFAULTS if worst >= row[0])
    return Gates.model_validate(dict(zip(("kl", "perplexity_ratio", "top1_agreement"), figures, strict=True)))


def _bits(number: str) -> int:
    """Of a number format's name: "int4", "fp8_e4m3", "mxfp4", "nvfp4"."""
    found = re.match(r"[a-z]+(\d+)", number)
    assert found is not None
    return int(found[1])


def limits(gates: Mapping[str, Any]) -> dict[str, Limit]:
    """Limits by name from plain values, as a recipe has them. Raises InputError."""
    try:
        return Gates.model_validate(dict(gates)).limits()
    except ValidationError as e:
        found = e.errors()[0]
        where = ".".join(str(part) for part in found["loc"] if isinstance(part, str) and part not in ("limit", "level"))
        raise InputError(f"gate {where}: {found['msg']}; got {found['input']!r}") from None
