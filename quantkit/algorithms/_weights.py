"""How much the error of each column of a weight counts: as much as its input does."""

from __future__ import annotations

import torch

from quantkit.errors import InputError


def importance(energy_K: torch.Tensor) -> torch.Tensor:
    """The mean square of each input (K,), channels that never fired counted like the faintest: other text may use them.

    Raises InputError when it holds NaN or Inf.
    """
    if not bool(torch.isfinite(energy_K).all()):
        raise InputError("the calibration inputs of this layer hold NaN or Inf; load the model in bfloat16 or float32")
    live = energy_K[energy_K > 0]
    return energy_K.clamp(min=float(live.min()) if live.numel() else 1.0)
