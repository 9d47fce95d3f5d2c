"""Rounding inside Triton kernels, to the last bit what quantkit's number formats do in torch.

Three things keep the bits: division is IEEE (`div_rn`; `/` is off by a last bit in Triton), rounding is half to even,
and every kernel that uses these is launched with `enable_fp_fusion=False`, because torch multiplies and then adds,
each with its own rounding, where a compiler would take one fused operation.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_even(x: tl.tensor) -> tl.tensor:
    """Nearest integer, half to even, for |x| < 2^22: beyond 2^23 float32 has no digits after the point.

    -0 becomes 0. What rounds to zero keeps its sign elsewhere (`nearest`).
    """
    return (x + 12582912.0) - 12582912.0


@triton.jit
def nearest(
    x: tl.tensor,
    zero: tl.tensor,
    FLOAT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    UNIT: tl.constexpr,
    BITS: tl.constexpr,
    EMIN: tl.constexpr,
    MANTISSA: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Code (int32) and element (float32, zero point taken off) nearest to x = w / scale; saturates."""
    if FLOAT:
        x = tl.minimum(tl.maximum(x, LOW), HIGH)
        bits = x.to(tl.int32, bitcast=True)
        exponent = tl.maximum(bits & 0x7F800000, (EMIN + 127) << 23)
        step = exponent - (MANTISSA << 23)
        # Its inverse is a power of two as well, so the product is the quotient.
        steps = round_even(tl.abs(x) * ((254 << 23) - step).to(tl.float32, bitcast=True))
        size = steps * step.to(tl.float32, bitcast=True)
        octave = (exponent >> 23) - (EMIN + 127)
        code = (octave << MANTISSA) + steps.to(tl.int32)
        code = tl.where(bits < 0, code + (1 << (BITS - 1)), code)
        element = tl.where(bits < 0, -size, size)
    else:
        steps = round_even(tl.minimum(tl.maximum(x * UNIT + zero, LOW), HIGH))
        code = steps.to(tl.int32)
        element = (steps - zero) * (1.0 / UNIT)
    return code, element


@triton.jit
def decode(
    code: tl.tensor,
    zero: tl.tensor,
    FLOAT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    UNIT: tl.constexpr,
    BITS: tl.constexpr,
    EMIN: tl.constexpr,
    MANTISSA: tl.constexpr,
) -> tl.tensor:
    """Element of each code (int32, sign-extended from int8) -> float32, zero point taken off, not yet scaled."""
    if FLOAT:
        magnitude = code & ((1 << (BITS - 1)) - 1)
        octave = magnitude >> MANTISSA
        steps = tl.where(octave > 0, (1 << MANTISSA) + (magnitude & ((1 << MANTISSA) - 1)), magnitude)
        power = (tl.maximum(octave, 1) + (EMIN - MANTISSA + 126)) << 23
        size = steps.to(tl.float32) * power.to(tl.float32, bitcast=True)
        element = tl.where((code & (1 << (BITS - 1))) != 0, -size, size)
    else:
        element = (code.to(tl.float32) - zero) * (1.0 / UNIT)
    return element


@triton.jit
def stored(x: tl.tensor, STORED: tl.constexpr) -> tl.tensor:
    """x rounded to the dtype in which it will be stored, float32 again. Not for NaN.

    bfloat16 by its bits: Triton's interpreter truncates where a GPU rounds.
    """
    if STORED == "bfloat16":
        bits = x.to(tl.int32, bitcast=True)
        kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = kept.to(tl.float32, bitcast=True)
    elif STORED == "float16":
        value = x.to(tl.float16).to(tl.float32)
    else:
        value = x
    return value
