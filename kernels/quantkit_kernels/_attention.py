"""Triton kernel for attention of many query tokens: FlashAttention's online softmax (arXiv 2205.14135, 2307.08691).

A program has BM query tokens of one head and goes over the keys in tiles of BN: first those at the window's left edge,
then those that every query of it sees, without masks, then those at the right edge. It works in powers of two: log2 e
is part of the scale in the one multiply-add before exp2. Late queries come first where they see more keys (causal), so
that what is left at the end is light.

Keys and values come through pointers or, in tiles that all queries see, through tensor descriptors (TMA).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scores(
    q: tl.tensor,
    k: tl.tensor,
    n: tl.tensor,
    position: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """q kᵀ (BM, BN): capped in powers of two, else still to be scaled; -inf where a query may not look."""
    s = tl.dot(q, k.T)
    if CAP:  # cap * tanh, by exp2, whose overflow is a 1
        s = cap - 2 * cap / (tl.exp2(s * scale) + 1)
    if MASKED:
        seen = ((n >= first) & (n < last))[None, :]
        if CAUSAL:
            seen &= n[None, :] <= position[:, None]
        if WINDOW:
            seen &= n[None, :] > position[:, None] - window
            if not CAUSAL:
                seen &= n[None, :] < position[:, None] + window
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def _step(
    acc: tl.tensor,
    m: tl.tensor,
    total: tl.tensor,
    s: tl.tensor,
    v: tl.tensor,
    scale: tl.tensor,
    CAP: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One tile more: acc (BM, BD), the maximum and the sum of each row. Rows without any score keep -inf and zeros."""
    factor = 1.0 if CAP else scale
    new = tl.maximum(m, tl.max(s, 1) * factor)
    base = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
    keep, p = tl.exp2(m - base), tl.exp2(s * factor - base[:, None])
    return tl.dot(p.to(v.dtype), v, acc * keep[:, None]), new, total * keep + tl.sum(p, 1)


@triton.jit
def _span(
    acc: tl.tensor,
    m: tl.tensor,
    total: tl.tensor,
    q: tl.tensor,
    k_at: tl.tensor,
    v_at: tl.tensor,
    k_row: tl.tensor,
    v_row: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    position: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The tiles that begin at start, start + BN, ... before stop, by pointers."""
    n, d = tl.arange(0, BN), tl.arange(0, BD)
    for n0 in range(start, stop, BN):
        k_tile = k_at + tl.cast(n0, tl.int64) * k_row
        v_tile = v_at + tl.cast(n0, tl.int64) * v_row
        if MASKED:
            here = ((n0 + n >= first) & (n0 + n < last))[:, None] & (d < D)[None, :]
            k, v = tl.load(k_tile, here, 0.0), tl.load(v_tile, here, 0.0)
        elif D != BD:
            k, v = tl.load(k_tile, (d < D)[None, :], 0.0), tl.load(v_tile, (d < D)[None, :], 0.0)
        else:
            k, v = tl.load(k_tile), tl.load(v_tile)
        s = _scores(q, k, n0 + n, position, first, last, scale, cap, window, CAUSAL, WINDOW, CAP, MASKED)
        acc, m, total = _step(acc, m, total, s, v, scale, CAP, MASKED)
    return acc, m, total


@triton.jit
def _span_by_descriptor(
    acc: tl.tensor,
    m: tl.tensor,
    total: tl.tensor,
    q: tl.tensor,
    k_desc: tl.tensor,
    v_desc: tl.tensor,
    row: tl.tensor,
    k_column: tl.tensor,
    v_column: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    CAP: tl.constexpr,
    BN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The same without masks and by descriptors: token n is row `row` + n of a matrix."""
    for n0 in range(start, stop, BN):
        s = tl.dot(q, k_desc.load([row + n0, k_column]).T)
        if CAP:
            s = cap - 2 * cap / (tl.exp2(s * scale) + 1)
        acc, m, total = _step(acc, m, total, s, v_desc.load([row + n0, v_column]), scale, CAP, False)
    return acc, m, total


@triton.jit
def _span_in_flight(
    acc: tl.tensor,
    m: tl.tensor,
    total: tl.tensor,
    q: tl.tensor,
    k_desc: tl.tensor,
    v_desc: tl.tensor,
    row: tl.tensor,
    k_column: tl.tensor,
    v_column: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    CAP: tl.constexpr,
    BN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The same, each product with values one tile late, so that it runs while the next tile's exponentials are taken.

    Probabilities are carried over in float32 and rounded when they are used: registers that a running product reads
    must not be written, and the compiler would rather make all products wait than copy them.
    """
    factor = 1.0 if CAP else scale
    if start < stop:
        s = tl.dot(q, k_desc.load([row + start, k_column]).T)
        p, keep = tl.zeros(s.shape, tl.float32), tl.full(m.shape, 1.0, tl.float32)
        for n0 in range(start, stop, BN):
            k = k_desc.load([row + tl.minimum(n0 + BN, stop - BN), k_column])
            later = tl.dot(q, k.T)
            v = v_desc.load([row + tl.maximum(n0 - BN, start), v_column])
            acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None])
            if CAP:
                s = cap - 2 * cap / (tl.exp2(s * scale) + 1)
            new = tl.maximum(m, tl.max(s, 1) * factor)
            keep, p = tl.exp2(m - new), tl.exp2(s * factor - new[:, None])
            total = total * keep + tl.sum(p, 1)
            m, s = new, later
        v = v_desc.load([row + stop - BN, v_column])
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None])
    return acc, m, total


@triton.jit(do_not_specialize=["window", "len_q", "len_k", "heads"])  # their values would decide what is compiled
def attend(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_desc: tl.tensor,
    v_desc: tl.tensor,
    sink_ptr: tl.tensor,
    cu_q_ptr: tl.tensor,
    cu_k_ptr: tl.tensor,
    start_ptr: tl.tensor,
    length_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    len_q: tl.tensor,
    len_k: tl.tensor,
    heads: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_row: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    desc_batch: tl.tensor,
    desc_head: tl.tensor,
    k_column: tl.tensor,
    v_column: tl.tensor,
    RATIO: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SINKS: tl.constexpr,
    PACKED: tl.constexpr,
    START: tl.constexpr,
    LENGTH: tl.constexpr,
    MODE: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """Program (tile of queries, head, batch). Strides count elements, those of rows of keys and values 16 bytes.

    Descriptors: token n of a batch and key head is row batch * desc_batch + head * desc_head + n of a matrix, its
    channels begin at column head * k_column, or v_column. MODE: "pointers", "descriptors", or "flight", descriptors
    too.
    """
    U: tl.constexpr = 128 // k_ptr.dtype.element_ty.primitive_bitwidth
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    key_head = head // RATIO
    q_first, k_first = batch * 0, batch * 0
    if PACKED:
        q_first, k_first = tl.load(cu_q_ptr + batch).to(tl.int64), tl.load(cu_k_ptr + batch).to(tl.int64)
        len_q = tl.load(cu_q_ptr + batch + 1) - q_first.to(tl.int32)
        len_k = tl.load(cu_k_ptr + batch + 1) - k_first.to(tl.int32)
    if LENGTH:
        len_k = tl.minimum(tl.load(length_ptr + batch), len_k)
    first = tl.maximum(tl.load(start_ptr + batch), 0) if START else 0
    tile = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    if tile * BM < len_q:
        row, d = tile * BM + tl.arange(0, BM), tl.arange(0, BD)
        position = row + (len_k - len_q)
        low, high = tile * BM + len_k - len_q, tile * BM + BM - 1 + len_k - len_q  # of all positions
        start, stop, full_start, full_stop = first, len_k, first, len_k
        if CAUSAL:
            stop, full_stop = tl.minimum(stop, high + 1), tl.minimum(full_stop, low + 1)
        if WINDOW:
            start, full_start = tl.maximum(start, low - window + 1), tl.maximum(full_start, high - window + 1)
            if not CAUSAL:
                stop, full_stop = tl.minimum(stop, high + window), tl.minimum(full_stop, low + window)
        start = start // BN * BN
        full_start = tl.minimum(tl.cdiv(full_start, BN) * BN, tl.maximum(tl.cdiv(stop, BN) * BN, start))
        full_stop = tl.maximum(tl.maximum(full_stop, 0) // BN * BN, full_start)

        q_at = q_ptr + (batch * q_batch + head * q_head) + (q_first + row)[:, None] * q_row + d[None, :]
        q = tl.load(q_at, (row < len_q)[:, None] & (d < D)[None, :], 0.0)
        n = tl.arange(0, BN).to(tl.int64)
        k_at = k_ptr + (batch * k_batch + key_head * k_head) + (k_first + n)[:, None] * (k_row * U) + d[None, :]
        v_at = v_ptr + (batch * v_batch + key_head * v_head) + (k_first + n)[:, None] * (v_row * U) + d[None, :]
        acc, m = tl.zeros((BM, BD), tl.float32), tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        if WINDOW or START:
            acc, m, total = _span(
                acc, m, total, q, k_at, v_at, k_row * U, v_row * U, start, full_start, position, first, len_k, scale,
                cap, window, CAUSAL, WINDOW, CAP, True, D, BD, BN,
            )  # fmt: skip
        line = (batch * desc_batch + key_head * desc_head + k_first).to(tl.int32)
        k_column, v_column = (key_head * k_column).to(tl.int32), (key_head * v_column).to(tl.int32)
        if MODE == "flight":
            acc, m, total = _span_in_flight(
                acc, m, total, q, k_desc, v_desc, line, k_column, v_column, full_start, full_stop, scale, cap, CAP, BN
            )  # fmt: skip
        elif MODE == "descriptors":
            acc, m, total = _span_by_descriptor(
                acc, m, total, q, k_desc, v_desc, line, k_column, v_column, full_start, full_stop, scale, cap, CAP, BN
            )  # fmt: skip
        else:
            acc, m, total = _span(
                acc, m, total, q, k_at, v_at, k_row * U, v_row * U, full_start, full_stop, position, first, len_k,
                scale, cap, window, CAUSAL, WINDOW, CAP, False, D, BD, BN,
            )  # fmt: skip
        acc, m, total = _span(
            acc, m, total, q, k_at, v_at, k_row * U, v_row * U, full_stop, stop, position, first, len_k, scale, cap,
            window, CAUSAL, WINDOW, CAP, True, D, BD, BN,
        )  # fmt: skip
        if SINKS:
            sink = tl.load(sink_ptr + head).to(tl.float32) * 1.4426950408889634
            new = tl.maximum(m, sink)
            base = tl.where(new == float("-inf"), 0.0, new)
            keep = tl.exp2(m - base)
            acc, total, m = acc * keep[:, None], total * keep + tl.exp2(sink - base), new
        acc *= (1 / tl.where(total == 0, 1.0, total))[:, None]  # nothing seen: zeros
        line = (q_first + row if PACKED else batch * len_q + row) * heads + head
        tl.store(out_ptr + line[:, None] * D + d[None, :], acc, (row < len_q)[:, None] & (d < D)[None, :])
        tl.store(lse_ptr + line, (m + tl.log2(total)) * 0.6931471805599453, row < len_q)
