"""`effort:` in a recipe, one word for how much is done for accuracy at equal bits.

fast     round to nearest under searched scales: no calibration data, seconds
default  gptq: scales searched against the inputs, one loop over the columns, two rounds of refinement; for
         MXFP4, whose scales are powers of two that refinement rarely moves, a shift towards the dense model too
best     gptq with more rounds, a shift towards the dense model, and, where every engine that the recipe names reads
         them, signed scales; the dense model runs beside the quantized one, so observing costs twice as much
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from quantkit.recipe.named import Method
from quantkit.types import Scheme

Effort = Literal["fast", "default", "best"]


def method_of(effort: Effort, schemes: Sequence[Scheme], engines: Sequence[str]) -> Method:
    """The method that an effort stands for.

    schemes  all that the recipe names; engines: those that must read the output
    """
    from quantkit import lint

    methods: dict[str, Any] = {
        "fast": "rtn",
        "default": {"gptq": {"pre_shift": 0.25}} if any(s.weights.number == "mxfp4" for s in schemes) else "gptq",
        "best": {"gptq": {"pre_shift": 0.5, "sweeps": 8, "signed_scales": not lint.unsigned(schemes, engines)}},
    }
    return Method.model_validate(methods[effort])
