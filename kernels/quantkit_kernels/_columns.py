"""Triton kernels that walk over the columns of a block: GPTQ's loop, coordinate descent, least-squares scales.

A program owns some rows and keeps SUB of their columns at a time in registers. Columns depend on each other through
`total`, which gathers what the columns before have left over:

    total_j = start_j + sum over i < j of carry_i * matrix_ij          one product and one sum an i, in order, as torch

What the block's earlier columns carried is read back from memory, where this program has written it; the SUB columns at
hand are updated in registers. Selecting one of them costs nothing but the exchange among the few threads of a row: the
loop is unrolled, so the compiler knows which register it is. No atomics, no order left open: the same bits every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels._rounding import decode, nearest, stored


@triton.jit
def columns(
    start_ptr: tl.tensor,
    matrix_ptr: tl.tensor,
    w_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    code_ptr: tl.tensor,
    carry_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    n: tl.tensor,
    width: tl.tensor,
    start_stride: tl.tensor,
    matrix_stride: tl.tensor,
    matrix_batch: tl.tensor,
    w_stride: tl.tensor,
    scale_stride: tl.tensor,
    zero_stride: tl.tensor,
    code_stride: tl.tensor,
    carry_stride: tl.tensor,
    delta_stride: tl.tensor,
    DESCENT: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    SUB: tl.constexpr,
    UNROLL: tl.constexpr,
    FLOAT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    UNIT: tl.constexpr,
    BITS: tl.constexpr,
    EMIN: tl.constexpr,
    MANTISSA: tl.constexpr,
) -> None:
    """One block of `width` columns. All pointers are to its first column, rows `*_stride` apart.

    Grid: rows of a problem, problems. Problem i has the rows from i n on, and its own matrix, `matrix_batch` apart.
    GPTQ       code = nearest(total / s); carry = w - decoded, which is also what the loop outside needs
    DESCENT    code = nearest((decoded + total / H_jj) / s); carry = old - new decoded; delta = w - new decoded
    scale and zero are spread, one for every column: side by side, or the compiler would lay out all else for a gather
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    problem = tl.program_id(1).to(tl.int64)
    row += problem * n
    matrix_ptr += problem * matrix_batch
    local = tl.arange(0, SUB)
    for first in range(0, width, SUB):
        column = first + local
        exists = column < width
        here = inside[:, None] & exists[None, :]
        total = tl.load(start_ptr + row[:, None] * start_stride + column[None, :], here, 0.0)
        for before in range(0, first, UNROLL):
            for i in tl.static_range(UNROLL):
                past = tl.load(carry_ptr + row * carry_stride + before + i, inside, 0.0)
                line = tl.load(matrix_ptr + (before + i) * matrix_stride + column, exists, 0.0)
                total = total + past[:, None] * line[None, :]

        w = tl.load(w_ptr + row[:, None] * w_stride + column[None, :], here, 0.0)
        scale = tl.load(scale_ptr + row[:, None] * scale_stride + column[None, :], here, 1.0)
        zero = tl.zeros((ROWS, SUB), tl.float32)
        if ASYMMETRIC:
            zero = tl.load(zero_ptr + row[:, None] * zero_stride + column[None, :], here, 0.0)
        code_at = code_ptr + row[:, None] * code_stride + column[None, :]
        if DESCENT:
            codes = tl.load(code_at, here, 0).to(tl.int32)
            base = decode(codes, zero, FLOAT, LOW, HIGH, UNIT, BITS, EMIN, MANTISSA) * scale
            diagonal = tl.load(matrix_ptr + column * (matrix_stride + 1), exists, 1.0)
            diagonal = tl.broadcast_to(diagonal[None, :], (ROWS, SUB))
        else:
            codes = tl.zeros((ROWS, SUB), tl.int32)
            base = w
        carries = tl.zeros((ROWS, SUB), tl.float32)

        for i in tl.static_range(SUB):
            # Computed for all columns at hand and used for one: what is not used is not computed.
            if DESCENT:
                wanted = base + tl.div_rn(total, diagonal)
            else:
                wanted = total
            code, element = nearest(tl.div_rn(wanted, scale), zero, FLOAT, LOW, HIGH, UNIT, BITS, EMIN, MANTISSA)
            carry = base - element * scale
            chosen = local[None, :] == i
            # As integers, because adding an integer zero is free and adding 0.0 is not.
            only = tl.where(chosen, carry.to(tl.int32, bitcast=True), 0)
            left = tl.sum(only, 1).to(tl.float32, bitcast=True)
            line_at = matrix_ptr + (first + i) * matrix_stride + column
            line = tl.load(line_at, exists & (first + i + 0 * local < width), 0.0)
            total = total + left[:, None] * line[None, :]
            codes = tl.where(chosen, code, codes)
            carries = tl.where(chosen, carry, carries)

        tl.store(code_at, codes.to(tl.int8), here)
        tl.store(carry_ptr + row[:, None] * carry_stride + column[None, :], carries, here)
        if DESCENT:
            value = decode(codes, zero, FLOAT, LOW, HIGH, UNIT, BITS, EMIN, MANTISSA) * scale
            tl.store(delta_ptr + row[:, None] * delta_stride + column[None, :], w - value, here)
        tl.debug_barrier()  # the carries are read by other threads of this program


@triton.jit(do_not_specialize=["first_group"])  # its value would decide what is compiled
def refit(
    gradient_ptr: tl.tensor,
    hessian_ptr: tl.tensor,
    w_ptr: tl.tensor,
    code_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    carry_ptr: tl.tensor,
    n: tl.tensor,
    width: tl.tensor,
    first_group: tl.tensor,
    gradient_stride: tl.tensor,
    hessian_stride: tl.tensor,
    hessian_batch: tl.tensor,
    w_stride: tl.tensor,
    code_stride: tl.tensor,
    scale_stride: tl.tensor,
    zero_stride: tl.tensor,
    delta_stride: tl.tensor,
    carry_stride: tl.tensor,
    ASYMMETRIC: tl.constexpr,
    STORED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    UNROLL: tl.constexpr,
    FLOAT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    UNIT: tl.constexpr,
    BITS: tl.constexpr,
    EMIN: tl.constexpr,
    MANTISSA: tl.constexpr,
) -> None:
    """Least-squares scales of the groups of SPAN columns in one block, one after the other, in place.

    c    elements of a group, so that decoded = c * s;  g = (w - decoded) H
    s += c·g / (c H c), rounded to its stored dtype, kept where that lowers the error
    Writes scale, delta = w - decoded, and carry = its change. Scale and zero
    pointers are to their first column, the block's first group is number `first_group`. Grid as for `columns`.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    problem = tl.program_id(1).to(tl.int64)
    row += problem * n
    hessian_ptr += problem * hessian_batch
    column = tl.arange(0, WIDTH)
    exists = column < width
    here = inside[:, None] & exists[None, :]
    scale_at = scale_ptr + row * scale_stride + first_group
    zero_at = zero_ptr + row * zero_stride + first_group
    code_at = code_ptr + row * code_stride
    zero = tl.zeros((ROWS, WIDTH), tl.float32)
    if ASYMMETRIC:
        for j in range(WIDTH // SPAN):
            shift = tl.load(zero_at + j, inside & (j * SPAN + 0 * row < width), 0.0)
            zero = tl.where((column // SPAN == j)[None, :], shift[:, None], zero)
    gradient = tl.load(gradient_ptr + row[:, None] * gradient_stride + column[None, :], here, 0.0)
    codes = tl.load(code_at[:, None] + column[None, :], here, 0).to(tl.int32)
    c = tl.where(here, decode(codes, zero, FLOAT, LOW, HIGH, UNIT, BITS, EMIN, MANTISSA), 0.0)
    decoded = tl.zeros((ROWS, WIDTH), tl.float32)
    carry = tl.zeros((ROWS, WIDTH), tl.float32)
    for j in range(WIDTH // SPAN):
        owned = inside & (j * SPAN + 0 * row < width)
        shift = tl.zeros((ROWS,), tl.float32)
        if ASYMMETRIC:
            shift = tl.load(zero_at + j, owned, 0.0)
        moved = tl.zeros((ROWS, WIDTH), tl.float32)  # c H of this group's rows of H
        for start in range(j * SPAN, j * SPAN + SPAN, UNROLL):
            for i in tl.static_range(UNROLL):
                one = tl.load(code_at + start + i, inside & (start + i + 0 * row < width), 0).to(tl.int32)
                line_at = hessian_ptr + (start + i) * hessian_stride + column
                line = tl.load(line_at, exists & (start + i + 0 * column < width), 0.0)
                element = decode(one, shift, FLOAT, LOW, HIGH, UNIT, BITS, EMIN, MANTISSA)
                moved = tl.fma(
                    tl.broadcast_to(element[:, None], moved.shape), tl.broadcast_to(line[None, :], moved.shape), moved
                )
        mine = (column // SPAN == j)[None, :]
        curvature = tl.sum(tl.where(mine, moved * c, 0.0), 1)
        slope = tl.sum(tl.where(mine, gradient * c, 0.0), 1)
        old = tl.load(scale_at + j, owned, 1.0)
        new = tl.where(curvature > 0, old + tl.div_rn(slope, tl.where(curvature > 0, curvature, 1.0)), old)
        new = stored(new, STORED)
        step = new - old
        better = (step * step * curvature - 2 * step * slope < 0) & (new != 0) & ((new > 0) == (old > 0))
        step = tl.where(better, step, 0.0)
        new = tl.where(better, new, old)
        tl.store(scale_at + j, new, owned)
        decoded = tl.where(mine, c * new[:, None], decoded)
        carry = tl.where(mine, -(step[:, None] * c), carry)
        gradient = gradient - step[:, None] * moved
    w = tl.load(w_ptr + row[:, None] * w_stride + column[None, :], here, 0.0)
    tl.store(delta_ptr + row[:, None] * delta_stride + column[None, :], w - decoded, here)
    tl.store(carry_ptr + row[:, None] * carry_stride + column[None, :], carry, here)


@triton.jit
def residual(
    w_ptr: tl.tensor,
    code_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    out_ptr: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    w_stride: tl.tensor,
    code_stride: tl.tensor,
    scale_stride: tl.tensor,
    zero_stride: tl.tensor,
    out_stride: tl.tensor,
    ELEMENTS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FLOAT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    UNIT: tl.constexpr,
    BITS: tl.constexpr,
    EMIN: tl.constexpr,
    MANTISSA: tl.constexpr,
) -> None:
    """w - decoded (N, K); with ELEMENTS the decoded elements themselves, before their scale. Scale and zero spread."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    here = (row < n)[:, None] & (column < k)[None, :]
    zero = tl.zeros((ROWS, WIDTH), tl.float32)
    if ASYMMETRIC:
        zero = tl.load(zero_ptr + row[:, None] * zero_stride + column[None, :], here, 0.0)
    codes = tl.load(code_ptr + row[:, None] * code_stride + column[None, :], here, 0).to(tl.int32)
    out = decode(codes, zero, FLOAT, LOW, HIGH, UNIT, BITS, EMIN, MANTISSA)
    if not ELEMENTS:
        scale = tl.load(scale_ptr + row[:, None] * scale_stride + column[None, :], here, 1.0)
        w = tl.load(w_ptr + row[:, None] * w_stride + column[None, :], here, 0.0)
        out = w - out * scale
    tl.store(out_ptr + row[:, None] * out_stride + column[None, :], out, here)
