"""Number formats as the kernels see them: what an element's code means before it is multiplied by its scale.

integers     a code is the element, from `low` to `high`; mxint8's element is code / 64
minifloats   sign, exponent and `mantissa` bits; `emin` is the exponent of the smallest normal, below it the step
             stays. A code is the sign in the top bit and a magnitude that counts upwards with the value
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Number:
    """low, high: smallest and largest code of an integer, value of a float; unit: codes an integer element of 1 has."""

    dtype: torch.dtype
    low: float
    high: float
    unit: int = 1
    is_float: bool = False
    bits: int = 8
    emin: int = 0
    mantissa: int = 0

    def constants(self) -> dict[str, Any]:
        """The kernels' compile-time arguments."""
        return {
            "FLOAT": self.is_float,
            "LOW": self.low,
            "HIGH": self.high,
            "UNIT": self.unit,
            "BITS": self.bits,
            "EMIN": self.emin,
            "MANTISSA": self.mantissa,
        }


def _integer(bits: int) -> Number:
    half = float(1 << (bits - 1))
    return Number(torch.int8, -half, half - 1)


def _minifloat(dtype: torch.dtype, bits: int, emin: int, mantissa: int, largest: float) -> Number:
    return Number(dtype, -largest, largest, 1, True, bits, emin, mantissa)


_E2M1 = _minifloat(torch.uint8, 4, 0, 1, 6.0)
_E4M3 = _minifloat(torch.float8_e4m3fn, 8, -6, 3, 448.0)
_E5M2 = _minifloat(torch.float8_e5m2, 8, -14, 2, 57344.0)

NUMBERS: dict[str, Number] = {
    **{f"int{bits}": _integer(bits) for bits in range(2, 9)},
    "mxint8": Number(torch.int8, -127.0, 127.0, 64),
    "mxfp4": _E2M1,
    "nvfp4": _E2M1,
    "mxfp6_e2m3": _minifloat(torch.uint8, 6, 0, 3, 7.5),
    "mxfp6_e3m2": _minifloat(torch.uint8, 6, -2, 2, 28.0),
    "mxfp8_e4m3": _E4M3,
    "mxfp8_e5m2": _E5M2,
    "fp8_e4m3": _E4M3,
    "fp8_e5m2": _E5M2,
}


def get(name: str) -> Number:
    """The format of that name. Raises ValueError with the known ones."""
    if name not in NUMBERS:
        raise ValueError(f"no kernel for number format {name!r}; known: {', '.join(NUMBERS)}")
    return NUMBERS[name]
