"""Triton kernel for attention whose loads, and halves of whose queries, go to warps of their own (Hopper only).

Triton's warp specialisation accepts one loop over descriptors and four warps, and has given wrong results in some
versions. So this kernel knows nothing but whole tiles of keys and the causal mask, is used only where it is asked for,
and is tested on the GPU at hand before its first use (`_attention_launch.specialized_works`).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["len_q", "heads"])
def attend_specialized(
    q_desc: tl.tensor,
    k_desc: tl.tensor,
    v_desc: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scale: tl.tensor,
    len_q: tl.tensor,
    len_k: tl.tensor,
    heads: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_column: tl.tensor,
    desc_batch: tl.tensor,
    desc_head: tl.tensor,
    k_column: tl.tensor,
    v_column: tl.tensor,
    RATIO: tl.constexpr,
    CAUSAL: tl.constexpr,
    WS: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """Program (tile of queries, head, batch); len_k a multiple of BN; names as in _attention.py."""
    head, batch = tl.program_id(1), tl.program_id(2)
    key_head = head // RATIO
    tile = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    row, d = tile * BM + tl.arange(0, BM), tl.arange(0, D)
    position, n = row + (len_k - len_q), tl.arange(0, BN)
    q = q_desc.load([batch * q_batch + head * q_head + tile * BM, head * q_column])
    line = batch * desc_batch + key_head * desc_head
    acc, m = tl.zeros((BM, D), tl.float32), tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    stop = len_k
    if CAUSAL:
        stop = tl.minimum(stop, tile * BM + BM + (len_k - len_q))
    for n0 in tl.range(0, stop, BN, warp_specialize=WS):
        s = tl.dot(q, k_desc.load([line + n0, key_head * k_column]).T)
        v = v_desc.load([line + n0, key_head * v_column])
        if CAUSAL:
            s = tl.where((n0 + n)[None, :] <= position[:, None], s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1) * scale)
        base = tl.where(new == float("-inf"), 0.0, new)
        keep, p = tl.exp2(m - base), tl.exp2(s * scale - base[:, None])
        total = total * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None])
        m = new
    acc *= (1 / tl.where(total == 0, 1.0, total))[:, None]
    to = (batch.to(tl.int64) * len_q + row) * heads + head
    tl.store(out_ptr + to[:, None] * D + d[None, :], acc.to(out_ptr.dtype.element_ty), (row < len_q)[:, None])
    tl.store(lse_ptr + to, (m + tl.log2(total)) * 0.6931471805599453, row < len_q)
