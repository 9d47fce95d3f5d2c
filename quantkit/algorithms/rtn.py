"""Round to nearest: each weight gets the code nearest to it. No calibration data, seconds for a model.

Its accuracy is decided by the scales alone: searching them for the least squared error instead of taking the
absolute maximum is worth about a seventh of the KL divergence at 4 bits and costs nothing at run time.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from quantkit import numerics
from quantkit.types import Notes, QuantizedTensor, Stats, TensorScheme

NEEDS: frozenset[str] = frozenset()


class Options(BaseModel):
    """Options of `method: rtn`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale_search: Literal["absmax", "mse", "ocp", "even", "rceil", "four_six"] = Field(
        "mse",
        description="How scales are chosen: absmax spans the largest weight, mse has the least squared error. "
        "MX formats also have ocp, even and rceil, nvfp4 has four_six.",
    )


def quantize(
    w_NK: torch.Tensor,
    scheme: TensorScheme,
    stats: Stats | None,
    *,
    options: Options,
    scale_dtype: torch.dtype,
    notes: Notes,
) -> QuantizedTensor:
    """Rounds a weight (N, K) float to nearest. `stats` and `notes` are not used."""
    w = w_NK.float()
    qparams = numerics.get(scheme.number).qparams(w, scheme, scale_dtype=scale_dtype, search=options.scale_search)
    return numerics.quantize(w, qparams, scheme)
