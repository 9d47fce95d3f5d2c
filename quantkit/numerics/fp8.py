"""FP8: a float of 8 bits times a scale per tensor, row, group or block of the weight.

    codes     torch.float8_e4m3fn (largest 448) or torch.float8_e5m2 (57344)         w = code * scale
    scale     amax / 448 (57344), so that nothing saturates, rounded to `scale_dtype`
    rounding  to nearest, ties to even; values beyond the largest saturate, and NaN stays NaN
    error     relative: a float grid is about as fine everywhere, so a scale 10% off costs next to nothing

"mse" tries scales over half an octave below and above: where the grid's octaves begin is nearly all that they change.
Of the squared error of normal weights it takes 14% in groups of 128, 5% in rows of 2048, 1% in blocks.
Where blocks do not divide the weight's shape, the last ones hold fewer weights; codes keep the weight's shape.
"""

from __future__ import annotations

import functools

import torch

from quantkit import numerics
from quantkit.errors import InputError
from quantkit.numerics._minifloat import E4M3, E5M2, Minifloat, nearest
from quantkit.numerics._tiles import divide, least_error, pick_scales, squared_error
from quantkit.types import QParams, TensorScheme

NUMBERS = ("fp8_e4m3", "fp8_e5m2")
SEARCHES = ("absmax", "mse")

FORMATS: dict[str, tuple[Minifloat, torch.dtype]] = {
    "fp8_e4m3": (E4M3, torch.float8_e4m3fn),
    "fp8_e5m2": (E5M2, torch.float8_e5m2),
}
FACTORS = tuple(2 ** (i / 8) for i in (0, -1, -2, -3, -4, 1, 2, 3, 4))  # of the scale that spans the largest weight


def qparams(
    w_NK: torch.Tensor,
    scheme: TensorScheme,
    *,
    scale_dtype: torch.dtype,
    search: str = "absmax",
    importance_K: torch.Tensor | None = None,
) -> QParams:
    """Scales of a weight: (1, 1), (N, 1), (N, G) or (ceil(N / bn), ceil(K / bk)), in `scale_dtype`.

    w_NK          (N, K) float
    search        "absmax" or "mse"
    importance_K  (K,) float, weight of each column's squared error in "mse"
    Raises InputError for zero points, a group size that does not divide K, NaN or Inf.
    """
    numerics.check_search(scheme.number, search)
    if not scheme.symmetric:
        raise InputError(f"{scheme.number} has no zero points; use symmetric: true")
    form, _ = FORMATS[scheme.number]

    def pick(w: torch.Tensor, importance: torch.Tensor | None) -> QParams:
        # Both extremes in half the time of the largest of the magnitudes, which would be written out first.
        spanning = divide(torch.maximum(w.amax(1, keepdim=True), -w.amin(1, keepdim=True)), form.max)

        def scale(factor: float) -> torch.Tensor:
            s = (spanning * factor).to(scale_dtype)
            # Zeros alone, or a scale that underflows: any scale does; compressed-tensors takes this one.
            return torch.where(s == 0, torch.finfo(scale_dtype).eps, s)

        def error(s: torch.Tensor) -> torch.Tensor:
            return squared_error(nearest(w / s.float(), form).mul_(s.float()), w, importance)

        if search == "absmax":
            return QParams(scale(1.0))
        return QParams(least_error((scale(f) for f in FACTORS), error))

    return pick_scales(w_NK, scheme, importance_K, pick, search=search)


def encode(w_NK: torch.Tensor, qparams: QParams, scheme: TensorScheme) -> torch.Tensor:
    """Nearest code of each weight: (N, K) float -> (N, K) float8."""
    w, fine = numerics.aligned(w_NK.float(), qparams, scheme)
    return cast(w / fine.scale_NG, *FORMATS[scheme.number]).reshape(w_NK.shape)


def decode(codes_NK: torch.Tensor, qparams: QParams, scheme: TensorScheme) -> torch.Tensor:
    """code * scale, float32 (N, K)."""
    values, fine = numerics.aligned(floats(codes_NK), qparams, scheme)
    return (values * fine.scale_NG).reshape(codes_NK.shape)


def floats(codes: torch.Tensor) -> torch.Tensor:
    """float8 -> float32. A CPU looks the values up: that is five times faster than torch's own cast."""
    if codes.device.type != "cpu":
        return codes.float()
    places = codes.contiguous().view(torch.uint8).reshape(-1).int()
    return _values(codes.dtype).index_select(0, places).reshape(codes.shape)


@functools.cache
def _values(dtype: torch.dtype) -> torch.Tensor:
    """What each of the 256 codes stands for, float32."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def cast(x: torch.Tensor, form: Minifloat, dtype: torch.dtype) -> torch.Tensor:
    """To float8, saturating; overwrites `x`.

    What torch's own cast makes of larger values (NaN, infinity) depends on its version.
    """
    return x.clamp_(-form.max, form.max).to(dtype)
