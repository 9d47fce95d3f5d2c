"""Floats of a few bits: a sign, an exponent and a mantissa, and no infinities that a weight may become.

              bits  emin  mantissa  max      step by step from zero
    E2M1       4      0      1      6        0, 0.5, 1, 1.5, 2, 3, 4, 6
    E2M3       6      0      3      7.5      0.125 below 2, then 0.25, then 0.5
    E3M2       6     -2      2      28       0.0625 below 0.5, then twice as much each octave
    E4M3       8     -6      3      448      codes 0x7F and 0xFF are NaN; there is no infinity
    E5M2       8    -14      2      57344    IEEE: 0x7C is infinity, above it NaN

Below 2^emin the step stays what it is just above (subnormals), so zero is a value like any other.
Source: OCP Microscaling Formats (MX) v1.0, section 5.3; OCP 8-bit Floating Point (OFP8) v1.0.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Minifloat:
    """bits: of a code; emin: exponent of the smallest normal; mantissa: bits after the point; max: largest finite."""

    bits: int
    emin: int
    mantissa: int
    max: float

    @property
    def emax(self) -> int:
        """Exponent of the largest value: 2 for 6 = 1.5 * 2^2."""
        return math.frexp(self.max)[1] - 1


E2M1 = Minifloat(4, 0, 1, 6.0)
E2M3 = Minifloat(6, 0, 3, 7.5)
E3M2 = Minifloat(6, -2, 2, 28.0)
E4M3 = Minifloat(8, -6, 3, 448.0)
E5M2 = Minifloat(8, -14, 2, 57344.0)


def nearest(x: torch.Tensor, form: Minifloat) -> torch.Tensor:
    """Nearest value that the format has: ties to even, saturating, NaN stays NaN. Float32 -> new float32 tensor."""
    x = x.clamp(-form.max, form.max)
    step = _exponent(x, form).sub_(form.mantissa << 23).view(torch.float32)
    return x.div_(step).round_().mul_(step)


def encode(x: torch.Tensor, form: Minifloat) -> torch.Tensor:
    """Code of the nearest value, the sign in the top bit: float32 -> uint8. -0 keeps its sign. Not for NaN.

    Sign and magnitude count upwards with the value, so a code is its octave's number of steps plus the steps inside.
    """
    x = x.clamp(-form.max, form.max)
    exponent = _exponent(x, form)
    # As floats, which are exact here: a CPU does that several times faster than shifts of integers.
    octave = exponent.float().sub_((form.emin + 127) << 23)
    step = exponent.sub_(form.mantissa << 23).view(torch.float32)
    magnitude = torch.div(x, step, out=step).round_().abs_().add_(octave, alpha=2.0 ** (form.mantissa - 23))
    sign = (x.view(torch.int32) >> 31).to(torch.uint8) & (1 << (form.bits - 1))
    return magnitude.to(torch.int8).view(torch.uint8) | sign


def decode(codes: torch.Tensor, form: Minifloat) -> torch.Tensor:
    """Value of each code, uint8 -> float32."""
    return _values(form, codes.device).index_select(0, codes.reshape(-1).int()).reshape(codes.shape)


def _exponent(x: torch.Tensor, form: Minifloat) -> torch.Tensor:
    """Bits of 2^e, e = floor(log2 |x|) but at least emin: int32, biased as in float32 and in its place there."""
    return (x.view(torch.int32) & 0x7F800000).clamp_(min=(form.emin + 127) << 23)


@functools.cache
def _values(form: Minifloat, device: torch.device) -> torch.Tensor:
    """What each code stands for, for formats without NaN and infinity: float32 (2^bits,)."""
    half, per_octave = 1 << (form.bits - 1), 1 << form.mantissa
    magnitude = torch.arange(half)
    octave = magnitude // per_octave
    steps = torch.where(octave > 0, per_octave + magnitude % per_octave, magnitude)
    value = steps * torch.exp2((octave - 1).clamp(min=0) + form.emin - form.mantissa)
    return torch.cat([value, -value]).float().to(device)
