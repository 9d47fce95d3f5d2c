"""Triton kernels for a few queries over a long cache of keys and values, 16, 8 or 4 bits wide; layouts in kv_layout.py.

A program takes the query heads of one key head (times the query tokens) as the columns of its tiles, and one of
`splits` ranges of the cache, whose tokens are the rows: codes become the left operand of the tensor cores in registers,
without a way through shared memory. What a program has found, normalised, and its log-sum-exp go to `combine`, which
adds the ranges up in one order.

Codes become fp16, whole numbers first, so that each is exact; scales are applied elsewhere:
    keys     a token's scale multiplies its row of scores (and its zero point times the sum of the query is taken off);
             the query itself is divided by a power of two, so that fp16 holds it
    values   a token's scale multiplies its row of probabilities. Its power of two is added to the scores in the
             exponent, so that the running maximum bounds what fp16 has to hold; the sum of probabilities takes it off
             again in fp32
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels._kv_layout import key_token, value_channel
from quantkit_kernels._kv_tiles import (
    columns_in_two,
    key_tile,
    page_of,
    place,
    power_of,
    queries,
    rows_in_two,
    scale_and_zero,
    value_tile,
    within,
)


@triton.jit
def _scores(
    q: tl.tensor,
    sums: tl.tensor,
    k: tl.tensor,
    at: tl.tensor,
    here: tl.tensor,
    SCALES: tl.constexpr,
    GROUPS: tl.constexpr,
    FORMAT: tl.constexpr,
) -> tl.tensor:
    """k qᵀ (BN, BM) times the scales that tokens have; `sums` (BM, GROUPS) are those of the query, for zero points."""
    if FORMAT == "int4" and GROUPS == 2:
        q1, q2 = columns_in_two(q)
        k1, k2 = columns_in_two(k)
        sum1, sum2 = tl.split(sums)
        scale1, zero1 = scale_and_zero(at, here)
        scale2, zero2 = scale_and_zero(at + 1, here)
        s = (tl.dot(k1, q1.T) - zero1[:, None] * sum1[None, :]) * scale1[:, None]
        s += (tl.dot(k2, q2.T) - zero2[:, None] * sum2[None, :]) * scale2[:, None]
    elif FORMAT == "int4":
        scale1, zero1 = scale_and_zero(at, here)
        s = (tl.dot(k, q.T) - zero1[:, None] * tl.sum(sums, 1)[None, :]) * scale1[:, None]
    elif SCALES == 2:
        s = tl.dot(k, q.T) * tl.load(at, here, 0.0)[:, None]
    else:
        s = tl.dot(k, q.T)
    return s


@triton.jit
def _visible(
    s: tl.tensor,
    n: tl.tensor,
    position: tl.tensor,
    here: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
) -> tl.tensor:
    """Scores (BN, BM) in powers of two, capped; -inf where a query may not look."""
    if CAP:  # cap * tanh, by exp2, whose overflow is a 1
        s = cap - 2 * cap / (tl.exp2(s) + 1)
    seen = (n[:, None] <= position[None, :]) & here[:, None]
    if WINDOW:
        seen &= n[:, None] > position[None, :] - window
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _token_scales(
    at: tl.tensor, here: tl.tensor, GROUPS: tl.constexpr, FORMAT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Scale and zero point of a token's values, then those of its second group; without one the first ones again."""
    if FORMAT == "int4":
        scale1, zero1 = scale_and_zero(at, here)
    else:
        scale1 = tl.load(at, here, 0.0)
        zero1 = scale1
    scale2, zero2 = scale1, zero1
    if GROUPS == 2:
        scale2, zero2 = scale_and_zero(at + 1, here)
    return scale1, zero1, scale2, zero2


@triton.jit
def _softmax_step(s: tl.tensor, m: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """New maximum, what to multiply older sums by, 2^(s - maximum). Columns without any score keep -inf and zeros."""
    new = tl.maximum(m, tl.max(s, 0))
    base = tl.where(new == float("-inf"), 0.0, new)
    return new, tl.exp2(m - base), tl.exp2(s - base[None, :])


@triton.jit
def _weigh(
    acc: tl.tensor, zeros: tl.tensor, keep: tl.tensor, p: tl.tensor, zero: tl.tensor, v: tl.tensor, FORMAT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """acc * keep + v p, (BD, BM). What zero points add to it is summed in `zeros`, from the same rounded p.

    Values of 16 bits come as (BN, BD) and give (BM, BD): it is how the tensor cores can read them from shared memory.
    """
    p = p.to(v.dtype)
    if FORMAT == "none":
        acc = tl.dot(p.T, v, acc * keep[:, None])
    else:
        acc = tl.dot(v, p, acc * keep[None, :])
    if FORMAT == "int4":
        zeros = zeros * keep[None, :] + p.to(tl.float32) * zero[:, None]
    return acc, zeros


@triton.jit
def _own_range(low: tl.tensor, length: tl.tensor, BN: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """First token of this program's tiles, and where they end: all programs have as many, but for one."""
    tiles = tl.maximum(tl.cdiv(length, BN) - low // BN, 0)
    first = tiles * tl.program_id(0) // tl.num_programs(0)
    last = tiles * (tl.program_id(0) + 1) // tl.num_programs(0)
    return (low // BN + first) * BN, (low // BN + last) * BN


@triton.jit
def _without_zeros(
    acc: tl.tensor, acc2: tl.tensor, zeros: tl.tensor, zeros2: tl.tensor, FORMAT: tl.constexpr, GROUPS: tl.constexpr
) -> tl.tensor:
    """The sums (BD, BM) less what the zero points have added, both groups in one."""
    if FORMAT == "int4":
        acc -= tl.sum(zeros, 0)[None, :]
        if GROUPS == 2:
            acc = tl.join(acc, acc2 - tl.sum(zeros2, 0)[None, :]).permute(2, 0, 1)
            acc = acc.reshape(acc.shape[0] * acc.shape[1], acc.shape[2])
    elif FORMAT == "none":
        acc = acc.T
    return acc


@triton.jit(do_not_specialize=["window", "len_q", "capacity"])  # their values would decide what is compiled
def decode(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    table_ptr: tl.tensor,
    length_ptr: tl.tensor,
    start_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    len_q: tl.tensor,
    capacity: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    k_page: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_page: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    k_scale_page: tl.tensor,
    k_scale_head: tl.tensor,
    v_scale_page: tl.tensor,
    v_scale_head: tl.tensor,
    table_batch: tl.tensor,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    GROUPS: tl.constexpr,
    PAGE: tl.constexpr,
    RATIO: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    START: tl.constexpr,
    ASM: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    NW: tl.constexpr,
) -> None:
    """Program (split, key head and tile of columns, batch); column m is the key head's m % RATIO-th, token m // RATIO.

    Strides of rows, heads and pages count 16 bytes, so that the compiler knows how they are aligned. PAGE: tokens of a
    page, 0 when dense. NW: the warps, on which the order of rows depends.
    """
    U: tl.constexpr = 128 // k_ptr.dtype.element_ty.primitive_bitwidth
    BLOCK: tl.constexpr = 1 if FORMAT == "none" else 16  # tokens in a row of values
    PER: tl.constexpr = BD if FORMAT == "none" else 8 if FORMAT == "int4" else 4  # channels in a row of values
    SLABS: tl.constexpr = 1 if FORMAT == "none" else max(1, BD // (16 * PER))
    tiles_m = tl.cdiv(RATIO * len_q, BM)
    head, batch = tl.program_id(1) // tiles_m, tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) % tiles_m * BM + tl.arange(0, BM)
    asked, query_head, token = column < RATIO * len_q, head * RATIO + column % RATIO, column // RATIO
    length = tl.minimum(tl.load(length_ptr + batch), capacity)
    position = length - len_q + token
    low = tl.load(start_ptr + batch) if START else 0
    low = tl.maximum(tl.maximum(low, length - len_q - window + 1) if WINDOW else low, 0)
    first, last = _own_range(low, length, BN)
    q_at = q_ptr + batch * q_batch + query_head.to(tl.int64) * q_head + token.to(tl.int64) * q_token
    q, factor = queries(q_at, asked, FORMAT, D, BD)
    factor *= scale
    if SCALES == 1:
        factor *= tl.load(k_scale_ptr + head * k_scale_head)
    sums = tl.sum(q.to(tl.float32).reshape(BM, GROUPS, BD // GROUPS), 2)
    table_at = table_ptr + batch * table_batch
    fixed = batch if PAGE == 0 else batch * 0  # where there is one page a batch
    k_at = k_ptr + (fixed * k_page + head * k_head) * U
    v_at = v_ptr + (fixed * v_page + head * v_head) * U
    k_scale_at = k_scale_ptr + fixed * k_scale_page + head * k_scale_head
    v_scale_at = v_scale_ptr + fixed * v_scale_page + head * v_scale_head
    n = tl.arange(0, BN)
    k_n = key_token(tl.arange(0, BN * SLABS) % BN, FORMAT, NW)
    v_n = tl.arange(0, BN // BLOCK * (BD // PER)) // (BD // PER) * BLOCK

    m, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BN, BM), tl.float32)
    acc = tl.zeros((BM, BD) if FORMAT == "none" else (BD // GROUPS, BM), tl.float32)
    zeros1 = tl.zeros((BN, BM), tl.float32)
    acc2, zeros2 = acc, zeros1
    page = page_of(table_at, first, length, PAGE, BN)
    for n0 in range(first, last, BN):
        here = within(n0 + n, low, length)
        at = k_at + place(table_at, page, n0, k_n, length, k_page * U, k_row * U, 1, PAGE, BN)
        k = key_tile(at, within(n0 + k_n, low, length), FORMAT, ASM, D, BD, BN, NW)
        at = k_scale_at + place(table_at, page, n0, n, length, k_scale_page, GROUPS, 1, PAGE, BN)
        s = _scores(q, sums, k, at, here, SCALES, GROUPS, FORMAT) * factor[None, :]
        s = _visible(s, n0 + n, position, here, cap, window, WINDOW, CAP)
        at = v_at + place(table_at, page, n0, v_n, length, v_page * U, v_row * U, BLOCK, PAGE, BN)
        v = value_tile(at, n0 + v_n, low, length, FORMAT, ASM, D, BD, BN, NW)
        at = v_scale_at + place(table_at, page, n0, n, length, v_scale_page, GROUPS, 1, PAGE, BN)
        if SCALES == 2:
            scale1, zero1, scale2, zero2 = _token_scales(at, here, GROUPS, FORMAT)
            exponent, _, inverse = power_of(tl.maximum(scale1, scale2))
            m, keep, p = _softmax_step(s + exponent[:, None], m)
            total = total * keep[None, :] + p * inverse[:, None]
            if GROUPS == 2:
                v, v2 = rows_in_two(v)
                acc2, zeros2 = _weigh(acc2, zeros2, keep, p * (scale2 * inverse)[:, None], zero2, v2, FORMAT)
            acc, zeros1 = _weigh(acc, zeros1, keep, p * (scale1 * inverse)[:, None], zero1, v, FORMAT)
        else:
            m, keep, p = _softmax_step(s, m)
            total = total * keep[None, :] + p
            acc, zeros1 = _weigh(acc, zeros1, keep, p, m, v, FORMAT)
        page = page_of(table_at, n0 + BN, length, PAGE, BN)

    acc = _without_zeros(acc, acc2, zeros1, zeros2, FORMAT, GROUPS)
    if SCALES == 1:
        acc *= tl.load(v_scale_ptr + head * v_scale_head)
    heads = tl.num_programs(1) // tiles_m * RATIO
    line = ((batch * len_q + token) * heads + query_head) * tl.num_programs(0) + tl.program_id(0)
    sums = tl.sum(total, 0)
    acc *= (1 / tl.where(sums == 0, 1.0, sums))[None, :]  # nothing seen: zeros
    channel = value_channel(tl.arange(0, BD), BD, FORMAT, NW)
    tl.store(out_ptr + line[None, :] * D + channel[:, None], acc, asked[None, :] & (channel < D)[:, None])
    tl.store(lse_ptr + line, m + tl.log2(sums), asked)


@triton.jit(do_not_specialize=["splits", "heads"])
def combine(
    part_ptr: tl.tensor,
    part_lse_ptr: tl.tensor,
    sink_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    splits: tl.tensor,
    heads: tl.tensor,
    SINKS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
) -> None:
    """The ranges of one line (batch, query token, query head) added up, BS at a time, always in the same order."""
    line = tl.program_id(0).to(tl.int64)
    channel, split = tl.arange(0, BD), tl.arange(0, BS)
    sink = tl.full((), float("-inf"), tl.float32)
    if SINKS:
        sink = tl.load(sink_ptr + line % heads).to(tl.float32) * 1.4426950408889634
    m = sink
    for first in range(0, splits, BS):
        lse = tl.load(part_lse_ptr + line * splits + first + split, first + split < splits, float("-inf"))
        m = tl.maximum(m, tl.max(lse, 0))
    base = tl.where(m == float("-inf"), 0.0, m)
    total, acc = tl.where(split == 0, tl.exp2(sink - base), 0.0), tl.zeros((BS, BD), tl.float32)
    for first in range(0, splits, BS):
        lse = tl.load(part_lse_ptr + line * splits + first + split, first + split < splits, float("-inf"))
        weight = tl.exp2(lse - base)
        at = part_ptr + (line * splits + first + split)[:, None] * D + channel[None, :]
        part = tl.load(at, (lse != float("-inf"))[:, None] & (channel < D)[None, :], 0.0)
        acc, total = acc + weight[:, None] * part, total + weight
    whole = tl.sum(total, 0)
    out = tl.sum(acc, 0) / tl.where(whole == 0, 1.0, whole)
    tl.store(out_ptr + line * D + channel, out.to(out_ptr.dtype.element_ty), channel < D)
    tl.store(lse_ptr + line, (base + tl.log2(whole)) * 0.6931471805599453)
