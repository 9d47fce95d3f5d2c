"""NVFP4: 16 weights of a row share an E4M3 scale, and the whole tensor one float32 scale.

    codes         uint8 0..15: sign in bit 3, then the index into 0, 0.5, 1, 1.5, 2, 3, 4, 6
    scale         torch.float8_e4m3fn (N, K / 16)
    global_scale  float32 (1,) = 448 * 6 / amax(W)                          w = value * scale / global_scale
                  so the group with the largest weight has the largest scale, 448. Layers that an engine fuses
                  (q, k, v; gate, up) must have one global scale between them: stack their rows before `qparams`.

`search` chooses the scale of each group among the 126 that E4M3 has:
    "absmax"    the largest weight becomes 6: E4M3(amax / 6 * global_scale); compressed-tensors' rule
    "four_six"  6 or 4, by squared error: the grid is coarse between 4 and 6 (arXiv 2512.02010)
    "mse"       the least squared error, weighted by `importance_K`, of all scales from a half to twice absmax's. Beyond
                twice, the grid has only values that it has at half that scale; below a half, too much is clipped.
The relative squared error of normal weights, times 1000: absmax 9.1, four_six 7.6, mse 6.6.
"""

from __future__ import annotations

import torch

from quantkit import numerics
from quantkit.errors import InputError
from quantkit.numerics import _minifloat
from quantkit.numerics._minifloat import E2M1, E4M3
from quantkit.numerics._tiles import check_finite, divide, least_error, pick_scales, squared_error
from quantkit.numerics.fp8 import cast
from quantkit.types import QParams, TensorScheme
from quantkit_kernels import scales
from quantkit_kernels.gptq import available

NUMBERS = ("nvfp4",)
SEARCHES = ("absmax", "mse", "four_six")
GROUP = 16
ZERO_GROUP = 0.125  # the scale where E4M3 would have 0; compressed-tensors takes this one
SWEEP = (0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6, -7, 7)  # codes of E4M3 around absmax's; 8 are a factor of two


def qparams(
    w_NK: torch.Tensor,
    scheme: TensorScheme,
    *,
    scale_dtype: torch.dtype,
    search: str = "absmax",
    importance_K: torch.Tensor | None = None,
) -> QParams:
    """Scales of a weight (N, K): float8_e4m3fn (N, K / 16) and the global scale, whatever `scale_dtype` is.

    search        "absmax", "four_six" or "mse"
    importance_K  (K,) float, weight of each column's squared error in "mse"
    Raises InputError for another strategy or group size, zero points, K not a multiple of 16, NaN or Inf.
    """
    return local_qparams(w_NK, global_scale(w_NK.abs().max()), scheme, search=search, importance_K=importance_K)


def global_scale(amax: torch.Tensor) -> torch.Tensor:
    """448 * 6 / amax as float32 (1,); 1 for a tensor of zeros, or so small that the quotient overflows."""
    quotient = E4M3.max * E2M1.max / amax.float().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.nan_to_num(quotient, nan=1.0, posinf=1.0).reshape(1)


def local_qparams(
    w_NK: torch.Tensor,
    global_scale: torch.Tensor,
    scheme: TensorScheme,
    *,
    search: str = "absmax",
    importance_K: torch.Tensor | None = None,
) -> QParams:
    """As `qparams`, under a global scale (1,) that is given: what an engine does with activations."""
    numerics.check_search(scheme.number, search)
    if scheme.strategy != "group" or scheme.group_size != GROUP or not scheme.symmetric:
        raise InputError(
            f"{scheme.number} has a scale for {GROUP} columns and no zero points: strategy group, size {GROUP}"
        )

    if search == "mse" and available(w_NK.device) and w_NK.shape[1] % GROUP == 0:
        importance = None if importance_K is None else importance_K.float()
        found = scales.search_scales_nvfp4(w_NK.contiguous(), importance, global_scale)
        return check_finite(w_NK, QParams(found, None, global_scale), scheme)

    def pick(w: torch.Tensor, importance: torch.Tensor | None) -> QParams:
        amax = w.abs().amax(1, keepdim=True)

        def scale(largest: float) -> torch.Tensor:
            return cast(divide(amax, largest) * global_scale, E4M3, torch.float8_e4m3fn).float()

        def error(s: torch.Tensor) -> torch.Tensor:
            step = s / global_scale
            return squared_error(_minifloat.nearest(w / step, E2M1).mul_(step), w, importance)

        best = torch.where(scale(6) == 0, ZERO_GROUP, scale(6))
        if search == "four_six":
            best = least_error([best, torch.where(scale(4) == 0, ZERO_GROUP, scale(4))], error)
        elif search == "mse":
            best = least_error([best, *_around(scale(6))], error)
        return QParams(best.to(torch.float8_e4m3fn))

    return QParams(pick_scales(w_NK, scheme, importance_K, pick, search=search).scale_NG, None, global_scale)


def _around(scale: torch.Tensor) -> list[torch.Tensor]:
    """The E4M3 values up to 7 codes below and above, positive ones only; float32 like `scale`."""
    code = scale.to(torch.float8_e4m3fn).view(torch.uint8).int()
    near = [(code + step).clamp(1, 126).to(torch.uint8) for step in SWEEP]
    return [c.view(torch.float8_e4m3fn).float() for c in near]


def encode(w_NK: torch.Tensor, qparams: QParams, scheme: TensorScheme) -> torch.Tensor:
    """Nearest code of each weight, ties to even, saturating: (N, K) float -> uint8 (N, K)."""
    w, fine = numerics.aligned(w_NK.float(), qparams, scheme)
    return _minifloat.encode(w / fine.scale_NG, E2M1).reshape(w_NK.shape)


def decode(codes_NK: torch.Tensor, qparams: QParams, scheme: TensorScheme) -> torch.Tensor:
    """value * scale / global_scale, float32 (N, K)."""
    values, fine = numerics.aligned(_minifloat.decode(codes_NK, E2M1), qparams, scheme)
    return (values * fine.scale_NG).reshape(codes_NK.shape)
