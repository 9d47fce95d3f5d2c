"""Small floats written out bit by bit in Python's own arithmetic, to compare with what tensors compute."""

from __future__ import annotations

import bisect
import math

import torch


def table(exponent_bits: int, mantissa_bits: int, bias: int) -> list[float]:
    """Value of every magnitude, in the order of the codes: the OCP formula, infinities and NaN not told apart."""
    found = []
    for e in range(1 << exponent_bits):
        for m in range(1 << mantissa_bits):
            fraction = m / (1 << mantissa_bits)
            found.append(math.ldexp(1 + fraction, e - bias) if e else math.ldexp(fraction, 1 - bias))
    return found


def nearest(x: float, magnitudes: list[float]) -> int:
    """Code of the magnitude nearest to |x|, of two that are as near the even one; the largest for all beyond."""
    x = abs(x)
    above = bisect.bisect_left(magnitudes, x)
    if above == 0:
        return 0
    if above == len(magnitudes):
        return above - 1
    low, high = x - magnitudes[above - 1], magnitudes[above] - x  # exact in float64
    if low == high:
        return above if above % 2 == 0 else above - 1
    return above - 1 if low < high else above


def hard_inputs(magnitudes: list[float]) -> torch.Tensor:
    """Every magnitude and every midpoint of two, and the floats just below and above: float32, both signs."""
    values = torch.tensor(magnitudes, dtype=torch.float64)
    values = torch.cat([values, (values[1:] + values[:-1]) / 2]).float()
    up = torch.nextafter(values, torch.tensor(torch.inf))
    values = torch.cat([values, up, torch.nextafter(values, torch.tensor(-torch.inf)).clamp(min=0)])
    return torch.cat([values, -values])


def all_bfloat16() -> torch.Tensor:
    """All 65536 bfloat16 patterns, as float32."""
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16).float()
