"""Round to nearest: each weight gets the code nearest to it. No calibration data, seconds for a model.

Its accuracy is decided by the scales alone: searching them for the least squared error instead of taking the
absolute maximum is worth about a seventh of the KL divergence at 4 bits and costs nothing at run time.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from quantkit import numerics
from quantkit.algorithms import _output, _weights
from quantkit.errors import InputError
from quantkit.types import Notes, QuantizedTensor, Stats, TensorScheme


class Options(BaseModel):
    """Options of `method: rtn`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale_search: Literal["auto", "absmax", "mse", "diagh", "output", "ocp", "even", "rceil", "four_six"] = Field(
        "auto",
        description="How scales are chosen: absmax spans the largest weight, mse has the least squared error, "
        "diagh that weighted by the mean square of each input, output the least error of each group's part of the "
        "output; the last two need calibration data. auto is output behind a transform that has the second moments "
        "of inputs observed, as awq does, and mse otherwise. "
        "MX formats also have ocp, even and rceil, nvfp4 has four_six.",
    )


def needs(options: Options) -> frozenset[str]:
    """The statistics that `quantize` reads."""
    return frozenset({"diagh": {"energy"}, "output": {"gram"}}.get(options.scale_search, ()))


def quantize(
    w_NK: torch.Tensor,
    scheme: TensorScheme,
    stats: Stats | None,
    *,
    options: Options,
    scale_dtype: torch.dtype,
    notes: Notes,
    global_scale: torch.Tensor | None = None,
) -> QuantizedTensor:
    """Rounds a weight (N, K) float to nearest.

    global_scale  (1,) float32 of NVFP4, where w_NK is some rows of a weight; else it is found from w_NK
    Raises InputError when scales are to be weighted by the inputs and their statistics are missing or not finite.
    """
    w, search, importance = w_NK.float(), options.scale_search, None
    if search == "auto":
        search = "mse" if stats is None or stats.gram_KK is None else "output"
    if search == "output":
        if stats is None or stats.gram_KK is None:
            raise InputError("scale_search output needs calibration data: the mean of x xᵀ of this layer's inputs")
        return numerics.quantize(w, _output.qparams(w, stats.gram_KK, scheme, scale_dtype=scale_dtype), scheme)
    if search == "diagh":
        if stats is None or (stats.energy_K is None and stats.gram_KK is None):
            raise InputError("scale_search diagh needs calibration data: the mean square of this layer's inputs")
        energy = stats.energy_K if stats.energy_K is not None else stats.gram_KK.diagonal()  # type: ignore[union-attr]
        importance, search = _weights.importance(energy), "mse"
    number: Any = numerics.get(scheme.number)
    if global_scale is not None:
        qparams = number.local_qparams(w, global_scale, scheme, search=search, importance_K=importance)
    else:
        qparams = number.qparams(w, scheme, scale_dtype=scale_dtype, search=search, importance_K=importance)
    return numerics.quantize(w, qparams, scheme)
