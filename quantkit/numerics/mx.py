"""Microscaling (MX) formats: 32 weights of a row share one power of two. OCP MX v1.0.

    number       code                                    element values
    mxfp8_e4m3   torch.float8_e4m3fn                     up to 448
    mxfp8_e5m2   torch.float8_e5m2                       up to 57344
    mxfp6_e2m3   uint8 0..63, sign in bit 5              up to 7.5
    mxfp6_e3m2   uint8 0..63, sign in bit 5              up to 28
    mxfp4        uint8 0..15, sign in bit 3              0, 0.5, 1, 1.5, 2, 3, 4, 6
    mxint8       int8 -127..127                          code / 64

    scale        uint8 E8M0: 2^(scale - 127); 255 is NaN, zero cannot be said          w = element * 2^(scale - 127)

Only the exponent is left to choose. With amax = s * 2^e, 1 <= s < 2, it is e - emax or one more (emax is 2 for mxfp4,
whose largest value is 1.5 * 2^2). One more saves the largest weights from saturating and makes all steps twice as wide.
    "ocp"     never more: the standard's own conversion; of mxfp8_e4m3 it clips all above 1.75 * 2^e
    "even"    more when s is at least `carry`: when s rounds to 2 with the element's bits, so that mxfp4's 6.9 is 6 but
              7 is 8. That is compressed-tensors' and vLLM's rule, and what "absmax" stands for here
    "rceil"   more when the largest weight would saturate at all: ceil(log2(amax / largest element))
    "mse"     whichever has the least squared error, weighted by `importance_K`
The relative squared error of normal weights, times 1000, in that order: mxfp4 13.4, 12.6, 13.7, 12.5;
mxfp8_e4m3 0.90, 0.70, 0.70, 0.70.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit import numerics
from quantkit.errors import InputError
from quantkit.numerics import _minifloat, fp8
from quantkit.numerics._minifloat import E2M1, E2M3, E3M2, E4M3, E5M2, Minifloat
from quantkit.numerics._tiles import check_finite, least_error, pick_scales, squared_error
from quantkit.types import QParams, TensorScheme
from quantkit_kernels import scales
from quantkit_kernels.gptq import available

SEARCHES = ("absmax", "mse", "ocp", "even", "rceil")
GROUP = 32


@dataclass(frozen=True)
class Element:
    """form: its values; code: dtype of a code; carry: the significand of amax from which "even" takes one more."""

    form: Minifloat
    code: torch.dtype
    carry: float


# As a float, INT8 is one octave [1, 2) in steps of 1/64, and those same steps below it.
INT8 = Minifloat(8, 0, 6, 127 / 64)

ELEMENTS = {
    # compressed-tensors carries at mxfp4's significand here as well, which is where mxfp8_e4m3 starts to saturate
    "mxfp8_e4m3": Element(E4M3, torch.float8_e4m3fn, 1.75),
    "mxfp8_e5m2": Element(E5M2, torch.float8_e5m2, 1.875),
    "mxfp6_e2m3": Element(E2M3, torch.uint8, 1.9375),
    "mxfp6_e3m2": Element(E3M2, torch.uint8, 1.875),
    "mxfp4": Element(E2M1, torch.uint8, 1.75),
    "mxint8": Element(INT8, torch.int8, 1.9921875),
}
NUMBERS = tuple(ELEMENTS)


def qparams(
    w_NK: torch.Tensor,
    scheme: TensorScheme,
    *,
    scale_dtype: torch.dtype,
    search: str = "absmax",
    importance_K: torch.Tensor | None = None,
) -> QParams:
    """Scales of a weight (N, K): uint8 (N, K / 32), whatever `scale_dtype` is. A group of zeros has the smallest scale.

    search        "absmax" (which is "even"), "mse", "ocp", "even" or "rceil"
    importance_K  (K,) float, weight of each column's squared error in "mse"
    Raises InputError for another strategy or group size, zero points, K not a multiple of 32, NaN or Inf.
    """
    numerics.check_search(scheme.number, search)
    if scheme.strategy != "group" or scheme.group_size != GROUP or not scheme.symmetric:
        raise InputError(
            f"{scheme.number} has a scale for {GROUP} columns and no zero points: strategy group, size {GROUP}"
        )
    element = ELEMENTS[scheme.number]
    if search == "mse" and available(w_NK.device) and w_NK.shape[1] % GROUP == 0:
        importance = None if importance_K is None else importance_K.float()
        found = QParams(scales.search_scales_mx(w_NK.contiguous(), importance, scheme.number))
        return check_finite(w_NK, found, scheme)

    def pick(w: torch.Tensor, importance: torch.Tensor | None) -> QParams:
        amax = w.abs().amax(1, keepdim=True)
        if search != "mse":
            return QParams(_scale(amax, element, "even" if search == "absmax" else search))

        def error(scale: torch.Tensor) -> torch.Tensor:
            value = numerics.e8m0(scale)
            return squared_error(_minifloat.nearest(w / value, element.form).mul_(value), w, importance)

        return QParams(least_error([_scale(amax, element, rule) for rule in ("ocp", "more")], error))

    return pick_scales(w_NK, scheme, importance_K, pick, search=search)


def _scale(amax: torch.Tensor, element: Element, rule: str) -> torch.Tensor:
    """E8M0 scale of each group by its largest absolute weight: float32 -> uint8, same shape."""
    form = element.form
    half, exponent = torch.frexp(amax)  # half in [0.5, 1)
    significand = 2 * half
    if rule == "ocp":
        more = torch.zeros_like(amax, dtype=torch.bool)
    elif rule == "even":
        more = significand >= element.carry
    elif rule == "rceil":
        more = significand > form.max / 2.0**form.emax
    else:
        more = torch.ones_like(amax, dtype=torch.bool)
    power = exponent - 1 - form.emax + more.int()
    power = torch.where(amax == 0, -127, power)
    # The upper end keeps the decoded weight finite: 4 * 2^126 would not be.
    return (power.clamp(-127, 127 - form.emax) + 127).to(torch.uint8)


def encode(w_NK: torch.Tensor, qparams: QParams, scheme: TensorScheme) -> torch.Tensor:
    """Nearest code of each weight, ties to even, saturating: (N, K) float -> (N, K), dtype as in the table above."""
    element = ELEMENTS[scheme.number]
    w, fine = numerics.aligned(w_NK.float(), qparams, scheme)
    x = (w / fine.scale_NG).reshape(w_NK.shape)
    if element.code == torch.uint8:
        return _minifloat.encode(x, element.form)
    if element.code == torch.int8:
        return (x * 64).round_().clamp_(-127, 127).to(torch.int8)
    return fp8.cast(x, element.form, element.code)


def decode(codes_NK: torch.Tensor, qparams: QParams, scheme: TensorScheme) -> torch.Tensor:
    """element * 2^(scale - 127), float32 (N, K)."""
    element = ELEMENTS[scheme.number]
    if element.code == torch.uint8:
        values = _minifloat.decode(codes_NK, element.form)
    elif element.code == torch.int8:
        values = codes_NK.float() / 64
    else:
        values = fp8.floats(codes_NK)
    values, fine = numerics.aligned(values, qparams, scheme)
    return (values * fine.scale_NG).reshape(codes_NK.shape)
