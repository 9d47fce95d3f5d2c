"""Triton kernels that choose scales: each group of weights is read once, and all candidates are judged in registers.

A program owns ROWS groups of SPAN columns. Of candidates that are equally good the earliest wins, as in torch. An error
is a sum over a group, and sums come out in another order than torch's: where two candidates differ by less than the
last bits of the sum, the other one may win.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels._rounding import decode, nearest, round_even, stored


@triton.jit
def _tile(
    w_ptr: tl.tensor,
    importance_ptr: tl.tensor,
    tiles: tl.tensor,
    groups: tl.tensor,
    span: tl.tensor,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Index of this program's groups, which of them exist, their weights (ROWS, SPAN) and how much each counts.

    Columns beyond a group hold 0, which changes neither its range nor its error.
    """
    tile = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tile < tiles
    column = tl.arange(0, SPAN)
    here = inside[:, None] & (column < span)[None, :]
    w = tl.load(w_ptr + tile.to(tl.int64)[:, None] * span + column[None, :], here, 0.0).to(tl.float32)
    weight = w
    if WEIGHTED:
        weight = tl.load(importance_ptr + ((tile % groups) * span)[:, None] + column[None, :], here, 0.0)
    return tile, inside, w, weight


@triton.jit
def _squared(
    element: tl.tensor, scale: tl.tensor, w: tl.tensor, weight: tl.tensor, WEIGHTED: tl.constexpr
) -> tl.tensor:
    """Sum over each group of importance * (element * scale - w)²."""
    error = element * scale[:, None] - w
    error = error * error
    if WEIGHTED:
        error = error * weight
    return tl.sum(error, 1)


@triton.jit
def _integer(w: tl.tensor, scale: tl.tensor, zero: tl.tensor, LOW: tl.constexpr, HIGH: tl.constexpr) -> tl.tensor:
    """Nearest codes less the zero point."""
    spread = tl.broadcast_to(scale[:, None], w.shape)
    shift = tl.broadcast_to(zero[:, None], w.shape)
    _, element = nearest(tl.div_rn(w, spread), shift, False, LOW, HIGH, 1, 8, 0, 0)
    return element


@triton.jit
def search_integer(
    w_ptr: tl.tensor,
    importance_ptr: tl.tensor,
    shrink_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    tiles: tl.tensor,
    groups: tl.tensor,
    span: tl.tensor,
    tiny: tl.tensor,
    SYMMETRIC: tl.constexpr,
    SIGNED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    STORED: tl.constexpr,
    SHRINKS: tl.constexpr,
    FITS: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
) -> None:
    """Scale, and zero point when asymmetric, of each group: (tiles,) float32 each.

    SHRINKS candidates that span the group's range times shrink, with SIGNED the negative of each as well, then FITS
    times the scale that fits the best one's codes. `tiny` stands in for a scale that rounds to zero.
    """
    tile, inside, w, weight = _tile(w_ptr, importance_ptr, tiles, groups, span, WEIGHTED, ROWS, SPAN)
    low = tl.minimum(tl.min(w, 1), 0.0)
    high = tl.maximum(tl.max(w, 1), 0.0)
    if SYMMETRIC:
        reach = 2 * tl.maximum(high, -low)
    else:
        reach = high - low
    steps = tl.full((ROWS,), HIGH - LOW, tl.float32)
    best = tl.zeros((ROWS,), tl.float32)
    best_zero = tl.zeros((ROWS,), tl.float32)
    least = tl.full((ROWS,), float("inf"), tl.float32)
    for i in range(SHRINKS):
        shrink = tl.load(shrink_ptr + i)
        scale = stored(tl.div_rn(reach * shrink, steps), STORED)
        scale = tl.where(scale == 0, tiny, scale)
        zero = tl.zeros((ROWS,), tl.float32)
        if not SYMMETRIC:
            zero = tl.minimum(tl.maximum(LOW - tl.div_rn(low * shrink, scale), LOW), HIGH)
            zero = tl.where(reach == 0, 0.0, round_even(zero))
        error = _squared(_integer(w, scale, zero, LOW, HIGH), scale, w, weight, WEIGHTED)
        better = (error < least) | (i == 0)
        least = tl.where(better, error, least)
        best = tl.where(better, scale, best)
        best_zero = tl.where(better, zero, best_zero)
        if SIGNED:
            error = _squared(_integer(w, -scale, zero, LOW, HIGH), -scale, w, weight, WEIGHTED)
            better = error < least
            least = tl.where(better, error, least)
            best = tl.where(better, -scale, best)
    for _ in range(FITS):
        code = _integer(w, best, best_zero, LOW, HIGH)
        counted = code
        if WEIGHTED:
            counted = code * weight
        below = tl.sum(code * counted, 1)
        scale = stored(tl.div_rn(tl.sum(w * counted, 1), tl.where(below > 0, below, 1.0)), STORED)
        usable = (below > 0) & (scale != 0) & ((scale > 0) == (best > 0))
        scale = tl.where(usable, scale, best)
        error = _squared(_integer(w, scale, best_zero, LOW, HIGH), scale, w, weight, WEIGHTED)
        better = error < least
        least = tl.where(better, error, least)
        best = tl.where(better, scale, best)
    tl.store(scale_ptr + tile, best, inside)
    if not SYMMETRIC:
        tl.store(zero_ptr + tile, best_zero, inside)


@triton.jit
def _float_error(
    w: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    WEIGHTED: tl.constexpr,
    HIGH: tl.constexpr,
    BITS: tl.constexpr,
    EMIN: tl.constexpr,
    MANTISSA: tl.constexpr,
) -> tl.tensor:
    """Squared error of minifloats under a scale for each group."""
    x = tl.div_rn(w, tl.broadcast_to(scale[:, None], w.shape))
    _, element = nearest(x, x, True, -HIGH, HIGH, 1, BITS, EMIN, MANTISSA)
    return _squared(element, scale, w, weight, WEIGHTED)


@triton.jit
def search_nvfp4(
    w_ptr: tl.tensor,
    importance_ptr: tl.tensor,
    global_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    tiles: tl.tensor,
    groups: tl.tensor,
    span: tl.tensor,
    WEIGHTED: tl.constexpr,
    REACH: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
) -> None:
    """E4M3 code (int8 bits) of each group's scale: absmax's, or one of REACH codes below and above it."""
    tile, inside, w, weight = _tile(w_ptr, importance_ptr, tiles, groups, span, WEIGHTED, ROWS, SPAN)
    whole = tl.zeros((ROWS,), tl.float32) + tl.load(global_ptr)
    spanning = tl.div_rn(tl.max(tl.abs(w), 1), tl.full((ROWS,), 6.0, tl.float32)) * whole
    around, value = nearest(spanning, spanning, True, -448.0, 448.0, 1, 8, -6, 3)
    best = tl.where(around == 0, 0x20, around)  # 0.125 where E4M3 would have 0
    scale = tl.div_rn(tl.where(around == 0, 0.125, value), whole)
    least = _float_error(w, weight, scale, WEIGHTED, 6.0, 4, 0, 1)
    for i in range(2 * REACH + 1):
        far = (i + 1) // 2
        move = tl.where(i % 2 == 1, -far, far)  # 0, -1, 1, -2, 2, ...
        code = tl.minimum(tl.maximum(around + move, 1), 126)
        scale = tl.div_rn(decode(code, code, True, -448.0, 448.0, 1, 8, -6, 3), whole)
        error = _float_error(w, weight, scale, WEIGHTED, 6.0, 4, 0, 1)
        better = error < least
        least = tl.where(better, error, least)
        best = tl.where(better, code, best)
    tl.store(scale_ptr + tile, best.to(tl.int8), inside)


@triton.jit
def search_mx(
    w_ptr: tl.tensor,
    importance_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    tiles: tl.tensor,
    groups: tl.tensor,
    span: tl.tensor,
    WEIGHTED: tl.constexpr,
    EMAX: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    HIGH: tl.constexpr,
    BITS: tl.constexpr,
    EMIN: tl.constexpr,
    MANTISSA: tl.constexpr,
) -> None:
    """E8M0 scale (int8 bits) of each group: the exponent that the largest weight has, or one more.

    A group whose largest weight is below 2^-126 has the smallest scales.
    """
    tile, inside, w, weight = _tile(w_ptr, importance_ptr, tiles, groups, span, WEIGHTED, ROWS, SPAN)
    largest = tl.max(tl.abs(w), 1)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - EMAX
    exponent = tl.where(largest == 0, 0, exponent)
    best = tl.minimum(tl.maximum(exponent, 0), 254 - EMAX)
    least = tl.full((ROWS,), float("inf"), tl.float32)
    for more in range(2):
        code = tl.minimum(tl.maximum(tl.where(largest == 0, 0, exponent + more), 0), 254 - EMAX)
        # The exponent field of a float; 2^-127 is a subnormal, half of the smallest exponent's.
        bits = tl.where(code == 0, 0x00400000, code << 23)
        error = _float_error(w, weight, bits.to(tl.float32, bitcast=True), WEIGHTED, HIGH, BITS, EMIN, MANTISSA)
        better = error < least
        least = tl.where(better, error, least)
        best = tl.where(better, code, best)
    tl.store(scale_ptr + tile, best.to(tl.int8), inside)


@triton.jit
def difference(
    w_ptr: tl.tensor,
    s_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tiles: tl.tensor,
    groups: tl.tensor,
    span: tl.tensor,
    ASYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
) -> None:
    """(what w is rounded to - w) / s, in the dtype of the output; s is one factor a column."""
    tile, inside, w, s = _tile(w_ptr, s_ptr, tiles, groups, span, True, ROWS, SPAN)
    scale = tl.load(scale_ptr + tile, inside, 1.0).to(tl.float32)
    zero = tl.zeros((ROWS,), tl.float32)
    if ASYMMETRIC:
        zero = tl.load(zero_ptr + tile, inside, 0).to(tl.float32)
    missed = _integer(w, scale, zero, LOW, HIGH) * scale[:, None] - w
    column = tl.arange(0, SPAN)
    here = inside[:, None] & (column < span)[None, :]
    missed = tl.div_rn(missed, tl.where(here, s, 1.0))
    place = tile.to(tl.int64)[:, None] * span + column[None, :]
    tl.store(out_ptr + place, missed.to(out_ptr.dtype.element_ty), here)
