"""Triton kernel that turns queries and keys by their positions, both in one launch."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from quantkit_kernels._activation import rounded
from quantkit_kernels._launch import Start

_HEADS = 8  # of a program


@triton.jit
def turned(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    row: tl.tensor,
    position: tl.tensor,
    head: tl.tensor,
    heads: tl.tensor,
    length: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    position_stride: tl.tensor,
    cos_low: tl.tensor,
    cos_high: tl.tensor,
    sin_low: tl.tensor,
    sin_high: tl.tensor,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    DTYPE: tl.constexpr,
    HARDWARE: tl.constexpr,
) -> None:
    """Some heads of one token: x cos + rotate_half(x) sin, each step rounded as torch's are. out (B, L, H, DIM)."""
    column = tl.arange(0, HALF)
    here = (head < heads)[:, None] & (column < DIM // 2)[None, :]
    at = x_ptr + row * row_stride + position * position_stride + (head.to(tl.int64) * head_stride)[:, None]
    low = tl.load(at + column[None, :], here, 0.0).to(tl.float32)
    high = tl.load(at + (column + DIM // 2)[None, :], here, 0.0).to(tl.float32)
    first = rounded(low * cos_low, DTYPE, HARDWARE) + rounded(-high * sin_low, DTYPE, HARDWARE)
    second = rounded(high * cos_high, DTYPE, HARDWARE) + rounded(low * sin_high, DTYPE, HARDWARE)
    to = out_ptr + (row * length + position) * heads * DIM + (head * DIM)[:, None]
    element = out_ptr.dtype.element_ty
    tl.store(to + column[None, :], rounded(first, DTYPE, HARDWARE).to(element), here)
    tl.store(to + (column + DIM // 2)[None, :], rounded(second, DTYPE, HARDWARE).to(element), here)


@triton.jit(do_not_specialize=["length"])  # its value would decide what is compiled
def rotate(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    q_out_ptr: tl.tensor,
    k_out_ptr: tl.tensor,
    length: tl.tensor,
    q_heads: tl.tensor,
    k_heads: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    q_position: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    k_position: tl.tensor,
    cos_row: tl.tensor,
    cos_position: tl.tensor,
    sin_row: tl.tensor,
    sin_position: tl.tensor,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    DTYPE: tl.constexpr,
    HARDWARE: tl.constexpr,
) -> None:
    """HEADS heads of one token, of q or of k. Grid: tokens; programs for the heads of q, then for those of k.

    q_row, q_head, ...   strides
    """
    token = tl.program_id(0).to(tl.int64)
    row, position = token // length, token % length
    column = tl.arange(0, HALF)
    inside = column < DIM // 2
    cos_at = cos_ptr + row * cos_row + position * cos_position + column
    sin_at = sin_ptr + row * sin_row + position * sin_position + column
    cos_low = tl.load(cos_at, inside, 0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos_at + DIM // 2, inside, 0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin_at, inside, 0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin_at + DIM // 2, inside, 0.0).to(tl.float32)[None, :]
    of_q = tl.cdiv(q_heads, HEADS)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    if tl.program_id(1) < of_q:
        turned(
            q_ptr, q_out_ptr, row, position, head, q_heads, length, q_row, q_head, q_position,
            cos_low, cos_high, sin_low, sin_high, DIM, HALF, DTYPE, HARDWARE,
        )  # fmt: skip
    else:
        turned(
            k_ptr, k_out_ptr, row, position, head - of_q * HEADS, k_heads, length, k_row, k_head, k_position,
            cos_low, cos_high, sin_low, sin_high, DIM, HALF, DTYPE, HARDWARE,
        )  # fmt: skip


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, hardware: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rope` has it: (B, H, L, D) each, in the memory of (B, L, H, D). Columns of all four lie side by side."""
    (b, q_heads, length, dim), k_heads = q.shape, k.shape[1]
    q_out, k_out = (
        torch.empty_strided(x.shape, (length * heads * dim, dim, heads * dim, 1), dtype=x.dtype, device=x.device)
        for x, heads in ((q, q_heads), (k, k_heads))
    )
    if b * length * q_heads * k_heads:
        strides = (q.stride(), k.stride(), cos.stride(), sin.stride())
        _start(q.shape, k_heads, cos.shape[0] != 1, strides, q.dtype, hardware)(q, k, cos, sin, q_out, k_out)
    return q_out, k_out


@functools.lru_cache(maxsize=4096)
def _start(
    shape: tuple[int, ...],
    k_heads: int,
    every: bool,
    strides: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    hardware: bool,
) -> Start:
    """For a shape of q, and the strides of q, k, cos and sin. every: each row has a cos and sin of its own."""
    b, q_heads, length, dim = shape
    q, k, cos, sin = strides
    numbers = (length, q_heads, k_heads, *q[:3], *k[:3], cos[0] * every, cos[1], sin[0] * every, sin[1])
    constants = {"DIM": dim, "HALF": triton.next_power_of_2(dim // 2), "HEADS": _HEADS, "HARDWARE": hardware}
    constants |= {"DTYPE": str(dtype).removeprefix("torch."), "num_warps": 4, "enable_fp_fusion": False}
    programs = -(-q_heads // _HEADS) + -(-k_heads // _HEADS)
    return Start(rotate, (b * length, programs), numbers, constants)
