"""Triton kernel of RMSNorm and rounding to 8 bits for wide tokens: a token is read in parts, and none is padded much.

`_activation.norm` holds a token in one tensor, whose width is a power of two: 14336 columns become 16384, and every
instruction is spent on what is not there too. Here a program has a token in parts of PART columns, kept in 16 bits
between the steps, and adds up the parts element by element, so that there is one sum and one maximum over threads.
With HARDWARE two bfloat16 are multiplied by one instruction: their product rounded once, as the reference has it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels._activation import divided, encoded, lifted, rounded, spanning


@triton.jit
def _weighted(value: tl.tensor, weight: tl.tensor, DTYPE: tl.constexpr, HARDWARE: tl.constexpr) -> tl.tensor:
    """value * weight rounded to DTYPE, in which value (float32) already is; as 16-bit floats where DTYPE is one."""
    if HARDWARE and DTYPE == "bfloat16" and weight.dtype == tl.bfloat16:
        value = tl.inline_asm_elementwise(
            "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }",
            "=r,r,r",
            [value.to(tl.bfloat16), weight],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        value = rounded(rounded(value, DTYPE, HARDWARE) * weight.to(tl.float32), DTYPE, HARDWARE)
        value = _kept(value, DTYPE, HARDWARE)
    return value


@triton.jit
def _kept(value: tl.tensor, DTYPE: tl.constexpr, HARDWARE: tl.constexpr) -> tl.tensor:
    """float32 that DTYPE holds exactly, in DTYPE; the interpreter's bfloat16 is left alone."""
    if DTYPE == "float16":
        value = value.to(tl.float16)
    elif DTYPE == "bfloat16" and HARDWARE:
        value = value.to(tl.bfloat16)
    return value


@triton.jit
def norm_parts(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    total_ptr: tl.tensor,
    m: tl.tensor,
    k: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    RESIDUAL: tl.constexpr,
    FORM: tl.constexpr,
    DTYPE: tl.constexpr,
    HARDWARE: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """As `_activation.norm` of one token with one scale. EVEN: whether PARTS parts are all of its columns."""
    row = tl.program_id(0).to(tl.int64)
    inside = tl.arange(0, PART)
    values: tl.tuple = ()
    squares = tl.zeros((PART,), tl.float32)
    for i in tl.static_range(PARTS):
        column = i * PART + inside
        here = column < (PARTS * PART if EVEN else k)
        value = tl.load(x_ptr + row * x_stride + column, here, 0.0).to(tl.float32)
        if RESIDUAL:
            value += tl.load(residual_ptr + row * residual_stride + column, here, 0.0).to(tl.float32)
            value = rounded(value, DTYPE, HARDWARE)
            tl.store(total_ptr + row * k + tl.max_contiguous(column, 8), value.to(total_ptr.dtype.element_ty), here)
        squares = tl.fma(value, value, squares) if HARDWARE else squares + value * value
        values = values + (_kept(value, DTYPE, HARDWARE),)  # noqa: RUF005
    mean = tl.div_rn(tl.sum(squares, 0), tl.zeros((), tl.float32) + k)
    factor = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    normed: tl.tuple = ()
    most = tl.zeros((PART,), tl.int32)
    for i in tl.static_range(PARTS):
        column = i * PART + inside
        here = column < (PARTS * PART if EVEN else k)
        weight = tl.load(weight_ptr + column, here, 0.0)
        value = _weighted(values[i].to(tl.float32) * factor, weight, DTYPE, HARDWARE)
        # As integers: there NaN is the largest of all.
        most = tl.maximum(most, value.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        normed = normed + (value,)  # noqa: RUF005
    out_at = out_ptr + row * k
    if FORM == "none":
        for i in tl.static_range(PARTS):
            column = i * PART + inside
            here = column < (PARTS * PART if EVEN else k)
            tl.store(out_at + tl.max_contiguous(column, 8), normed[i].to(out_ptr.dtype.element_ty), here)
    else:
        scale = spanning(tl.max(most, 0).to(tl.float32, bitcast=True), 127.5 if FORM == "int8" else 448.0)
        tl.store(scale_ptr + row, scale)
        tiny = scale < 8.673617379884035e-19
        if tiny:
            for i in tl.static_range(PARTS):
                column = i * PART + inside
                here = column < (PARTS * PART if EVEN else k)
                code = encoded(lifted(normed[i].to(tl.float32), scale, HARDWARE), FORM, True, HARDWARE)
                tl.store(out_at + tl.max_contiguous(column, 8), code, here)
        else:
            for i in tl.static_range(PARTS):
                column = i * PART + inside
                here = column < (PARTS * PART if EVEN else k)
                code = encoded(divided(normed[i].to(tl.float32), scale, HARDWARE), FORM, True, HARDWARE)
                tl.store(out_at + tl.max_contiguous(column, 8), code, here)
