"""Integers of 2 to 8 bits.

    codes  q in [-2^(b-1), 2^(b-1) - 1], signed, also when asymmetric      w = (q - zero) * scale
    int4   q -8..7; symmetric: zero absent, scale = 2 amax / 15, so the grid is -8..7 steps: lopsided by one
    error  a weight drawn evenly within a step: scale^2 / 12; clipping the largest few buys a finer step for the rest

`search` chooses the scale of each group:
    "absmax"  nothing clips: scale = 2 amax / (2^b - 1), asymmetric (max - min) / (2^b - 1); what peers do by default
    "mse"     a grid of smaller scales as well; the one with the least squared error wins, each weight's error counted
              `importance_K` times (diag of the Hessian: how much the layer's output feels that column). Then, for the
              codes that it gives, the scale that fits them best, w·c / c·c, as often as that helps.
    "signed"  as "mse", among negative scales as well: those turn the lopsided symmetric grid around, to -7..8 steps.
              Worth a tenth of the error at 4 bits, half at 2; not every engine's kernel reads a scale as signed.
              Asymmetric grids lie where they are wanted already: there it is "mse".
              Every candidate is rounded to `scale_dtype` first: the scale that is stored is the scale that is judged.
"""

from __future__ import annotations

import torch

from quantkit import numerics
from quantkit.errors import InputError
from quantkit.numerics._tiles import check_finite, divide, pick_scales, squared_error
from quantkit.types import QParams, TensorScheme
from quantkit_kernels import scales
from quantkit_kernels.gptq import available

NUMBERS = ("int2", "int3", "int4", "int5", "int6", "int7", "int8")
SEARCHES = ("absmax", "mse", "signed")

SHRINK_STEP, SHRINK_COUNT = 0.02, 32  # candidates s0 * (1 - 0.02 i), i < 32
FITS = 3  # least-squares fits after the grid


def bits(scheme: TensorScheme) -> int:
    """Bits of an integer number format: 4 for "int4"."""
    return int(scheme.number[3:])


def limits(scheme: TensorScheme) -> tuple[int, int]:
    """Smallest and largest code: (-8, 7) for int4."""
    half = 1 << (bits(scheme) - 1)
    return -half, half - 1


def qparams(
    w_NK: torch.Tensor,
    scheme: TensorScheme,
    *,
    scale_dtype: torch.dtype,
    search: str = "absmax",
    importance_K: torch.Tensor | None = None,
) -> QParams:
    """Scales (and zero points) of a weight.

    w_NK          (N, K) float
    scale_dtype   dtype in which scales are stored; candidates are rounded to it before they are judged
    search        "absmax", "mse" or "signed", see the module's docstring
    importance_K  (K,) float, weight of each column's squared error in a search; None counts all alike
    Returns QParams with scale (N, G) in `scale_dtype` and zero (N, G) int8, or None when symmetric.
    Raises InputError for a strategy or group size that does not fit, NaN or Inf.
    """
    numerics.check_search(scheme.number, search)
    if scheme.strategy not in ("tensor", "channel", "group"):
        raise InputError(f"{scheme.number} has no scale per {scheme.strategy}; use tensor, channel or group")

    span = w_NK.shape[1] // numerics.groups(scheme, w_NK.shape[1])
    if search != "absmax" and scheme.strategy != "tensor" and span <= scales.WIDEST and available(w_NK.device):
        scale, zero = scales.search_scales_int(
            w_NK.contiguous(),
            None if importance_K is None else importance_K.float(),
            group_size=span,
            bits=bits(scheme),
            symmetric=scheme.symmetric,
            scale_dtype=scale_dtype,
            signed=search == "signed" and scheme.symmetric,
        )
        return check_finite(w_NK, QParams(scale, zero), scheme)

    def pick(w: torch.Tensor, importance: torch.Tensor | None) -> QParams:
        return _qparams_rows(w, scheme, scale_dtype, search, importance)

    return pick_scales(w_NK, scheme, importance_K, pick, search=search)


def _qparams_rows(
    w: torch.Tensor, scheme: TensorScheme, dtype: torch.dtype, search: str, weight: torch.Tensor | None
) -> QParams:
    """One scale a row of `w` (R, k) -> scale (R, 1), zero (R, 1) or None."""
    low = w.amin(1, keepdim=True).clamp(max=0)
    high = w.amax(1, keepdim=True).clamp(min=0)
    best = _candidate(low, high, 1.0, scheme, dtype)
    if search == "absmax":
        return best
    best_error = _error(w, best, scheme, weight)
    signs = (1.0, -1.0) if search == "signed" and scheme.symmetric else (1.0,)
    grid = [sign * (1 - SHRINK_STEP * i) for i in range(SHRINK_COUNT) for sign in signs][1:]
    for shrink in [*grid, *[None] * FITS]:
        trial = _fit(w, best, scheme, weight) if shrink is None else _candidate(low, high, shrink, scheme, dtype)
        error = _error(w, trial, scheme, weight)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = QParams(
            torch.where(better, trial.scale_NG, best.scale_NG),
            torch.where(better, trial.zero_NG, best.zero_NG)
            if trial.zero_NG is not None and best.zero_NG is not None
            else None,
        )
    return best


def _fit(w: torch.Tensor, q: QParams, scheme: TensorScheme, weight: torch.Tensor | None) -> QParams:
    """The scale with the least squared error for the codes that `q` gives, rounded to its stored dtype."""
    zero = None if q.zero_NG is None else q.zero_NG.float()
    code = _nearest(w, q.scale_NG.float(), zero, scheme)
    if zero is not None:
        code.sub_(zero)
    counted = code if weight is None else code * weight
    below = (code * counted).sum(1, keepdim=True)
    scale = ((w * counted).sum(1, keepdim=True) / below).to(q.scale_NG.dtype)
    # no code but zero: nothing to fit; and a fit never turns the grid around
    return QParams(torch.where((below > 0) & (scale * q.scale_NG > 0), scale, q.scale_NG), q.zero_NG)


def _candidate(
    low: torch.Tensor, high: torch.Tensor, shrink: float, scheme: TensorScheme, dtype: torch.dtype
) -> QParams:
    """The scale that spans [low, high] * shrink, rounded to its stored dtype, and the zero point that goes with it."""
    code_min, code_max = limits(scheme)
    if scheme.symmetric:
        span = 2 * torch.maximum(high, -low)
    else:
        span = high - low
    scale = divide(span * shrink, code_max - code_min).to(dtype)
    # A row of zeros, or one whose scale underflows, gets the smallest step that the dtype's precision suggests.
    scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale)
    if scheme.symmetric:
        return QParams(scale)
    zero = (code_min - low * shrink / scale.float()).round().clamp(code_min, code_max)
    return QParams(scale, torch.where(span == 0, 0, zero).to(torch.int8))


def _error(w: torch.Tensor, q: QParams, scheme: TensorScheme, weight: torch.Tensor | None) -> torch.Tensor:
    """Sum over each row of the squared rounding error, in place on one buffer."""
    scale = q.scale_NG.float()
    zero = None if q.zero_NG is None else q.zero_NG.float()
    error = _nearest(w, scale, zero, scheme)
    if zero is not None:
        error.sub_(zero)
    return squared_error(error.mul_(scale), w, weight)


def _nearest(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: TensorScheme) -> torch.Tensor:
    """Nearest code as a new float tensor, ties to even, saturating; scale and zero broadcast against w."""
    q = w / scale
    if zero is not None:
        q.add_(zero)
    return q.round_().clamp_(*limits(scheme))


def encode(w_NK: torch.Tensor, qparams: QParams, scheme: TensorScheme) -> torch.Tensor:
    """Nearest code of each weight, ties to even, saturating. (N, K) float -> (N, K) int8."""
    w, fine = numerics.aligned(w_NK.float(), qparams, scheme)
    return _nearest(w, fine.scale_NG, fine.zero_NG, scheme).to(torch.int8).reshape(w_NK.shape)


def decode(codes_NK: torch.Tensor, qparams: QParams, scheme: TensorScheme) -> torch.Tensor:
    """(codes - zero) * scale, float32 (N, K)."""
    q, fine = numerics.aligned(codes_NK.float(), qparams, scheme)
    if fine.zero_NG is not None:
        q = q - fine.zero_NG
    return (q * fine.scale_NG).reshape(codes_NK.shape)
