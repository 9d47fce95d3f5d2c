"""Attention of many query tokens (prefill): causal, sliding window, soft cap, sinks, grouped heads, ragged batches.

    q             (B, Hq, Lq, D) float, or packed (T, Hq, D) with cu_seqlens_q
    k, v          (B, H, Lk, D), or (S, H, D) with cu_seqlens_k; dtype of q, any strides. Hq is a multiple of H: query
                  head h has key head h H / Hq
    scale         what q kᵀ is multiplied by, positive
    causal        query i is at position Lk - Lq + i, that of the last query is the last key's, and sees none after it
    window        a query sees itself and window - 1 keys before it; when not causal, as many after it. None: all
    soft_cap      c of c tanh(x / c), applied to scaled scores, or None
    sinks         (Hq,) float, one more logit of each head in the denominator, or None
    cu_seqlens_q, cu_seqlens_k  (B + 1,) int32, where each packed sequence begins, from 0 to T and S, or None
    max_len_q     the longest packed sequence of queries (only for those)
    key_starts    (B,) int32, the first key that counts (left padding), or None
    key_lengths   (B,) int32, how many of the Lk keys there are (a cache that is not full), or None
    out           like q, dtype of q or `out_dtype`: softmax(scale q kᵀ) v, zeros where there is nothing to see
    lse           (B, Hq, Lq) or (T, Hq) float32, the logarithm of the denominator, -inf where there is nothing; (0,)
                  unless `with_lse`

Heads of up to 256 channels; on a GPU float16 or bfloat16, other dtypes go the reference's way. Forward only. The
operator chooses: `prefer_sdpa` says where torch's own attention does the same and is faster; all else is a kernel's.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from quantkit_kernels._attention_launch import Problem, empty, prefer_sdpa, run, sdpa
from quantkit_kernels.kv_layout import MaybeTensor, named

WAYS = ("auto", "sdpa", "pointers", "descriptors", "flight")


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: MaybeTensor = None,
    cu_seqlens_q: MaybeTensor = None,
    cu_seqlens_k: MaybeTensor = None,
    max_len_q: int = 0,
    key_starts: MaybeTensor = None,
    key_lengths: MaybeTensor = None,
    out_dtype: torch.dtype | None = None,
    with_lse: bool = False,
    way: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch with the whole matrix of scores, in float32, or in float64 for inputs in float64; any `way`."""
    _check(q, k, v, scale, window, soft_cap, sinks, cu_seqlens_q, cu_seqlens_k, max_len_q, key_starts, key_lengths, way)
    common: dict[str, Any] = {"scale": scale, "causal": causal, "window": window, "soft_cap": soft_cap, "sinks": sinks}
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        out, lse = q.new_empty(q.shape, dtype=out_dtype or q.dtype), q.new_empty(q.shape[:2], dtype=torch.float32)
        at_q, at_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        for b in range(len(at_q) - 1):
            rows, cols = slice(at_q[b], at_q[b + 1]), slice(at_k[b], at_k[b + 1])
            first = None if key_starts is None else key_starts[b : b + 1]
            length = None if key_lengths is None else key_lengths[b : b + 1]
            one = [t[part].transpose(0, 1)[None] for t, part in ((q, rows), (k, cols), (v, cols))]
            found, logs = _dense(*one, **common, starts=first, lengths=length)
            out[rows], lse[rows] = found[0].transpose(0, 1), logs[0].T
        return out, lse if with_lse else lse.new_empty(0)
    out, lse = _dense(q, k, v, **common, starts=key_starts, lengths=key_lengths)
    return _as_made(out.to(out_dtype or q.dtype)), _as_made(lse) if with_lse else lse.new_empty(0)


def _dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    sinks: MaybeTensor,
    starts: MaybeTensor,
    lengths: MaybeTensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output in the dtype of the computation, and lse, of a batch that is not packed."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, len_q, _ = q.shape
    groups, n = k.shape[1], torch.arange(k.shape[2], device=q.device)
    end = torch.full((batch,), k.shape[2], device=q.device) if lengths is None else lengths.long().clamp(max=k.shape[2])
    end, first = end[:, None, None], 0 if starts is None else starts.long()[:, None, None]
    position = end - len_q + torch.arange(len_q, device=q.device)[:, None]
    seen = ((n < end) & (n >= first)).expand(batch, len_q, -1)
    k, v = (t.to(work).where(seen[:, None, :1, :].mT, torch.zeros((), dtype=work)) for t in (k, v)) if len_q else (k, v)
    if causal:
        seen = seen & (n <= position)
    if window is not None:
        seen = seen & (n > position - window) & (n < position + window)
    s = torch.einsum("bgrid,bgnd->bgrin", q.to(work).unflatten(1, (groups, -1)), k.to(work)).flatten(1, 2) * scale
    if soft_cap is not None:
        s = soft_cap * torch.tanh(s / soft_cap)
    s = s.masked_fill(~seen[:, None], -math.inf)
    sink = s.new_full((batch, heads, len_q, 1), -math.inf)
    if sinks is not None:
        sink = sinks.to(work)[:, None, None].expand_as(sink)
    lse = torch.logsumexp(torch.cat([s, sink], -1), -1)
    p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0)[..., None])
    out = torch.einsum("bgrin,bgnd->bgrid", p.unflatten(1, (groups, -1)), v.to(work)).flatten(1, 2)
    return out, lse.float()


def _as_made(t: torch.Tensor) -> torch.Tensor:
    """The same with a token's heads side by side in memory, as what follows attention wants them."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: MaybeTensor,
    cu_q: MaybeTensor,
    cu_k: MaybeTensor,
    max_len_q: int,
    starts: MaybeTensor,
    lengths: MaybeTensor,
    way: str,
) -> None:
    """Raises ValueError, with the measured ones, for shapes, dtypes and numbers that do not belong together."""
    packed = cu_q is not None
    if q.dim() != (3 if packed else 4) or k.dim() != q.dim() or packed != (cu_k is not None):
        raise ValueError(f"q is {named(q)}, k {named(k)}: expected 4 dimensions, or 3 and cu_seqlens of both")
    same = k.shape == v.shape and k.dtype == q.dtype == v.dtype and (packed or k.shape[0] == q.shape[0])
    if not same or not q.is_floating_point() or k.shape[-1] != q.shape[-1] or q.shape[1] % max(k.shape[1], 1):
        raise ValueError(f"q is {named(q)}, k {named(k)}, v {named(v)}; they do not belong together")
    if not 8 <= q.shape[-1] <= 256 or q.shape[-1] % 8:
        raise ValueError(f"heads of {q.shape[-1]} channels; known are multiples of 8 up to 256")
    batch = q.shape[0]
    if cu_q is not None and cu_k is not None:
        batch = cu_q.numel() - 1
        if cu_q.dtype != torch.int32 or cu_k.dtype != torch.int32 or cu_k.shape != cu_q.shape or cu_q.dim() != 1:
            raise ValueError(f"cu_seqlens are {named(cu_q)} and {named(cu_k)}; expected int32 (B + 1,) of both")
        if max_len_q < 1 and q.shape[0]:
            raise ValueError(f"max_len_q is {max_len_q}; packed sequences need the longest one's length")
    for name, t in (("key_starts", starts), ("key_lengths", lengths)):
        if t is not None and (tuple(t.shape) != (batch,) or t.dtype != torch.int32):
            raise ValueError(f"{name} is {named(t)}; expected int32 ({batch},)")
    if sinks is not None and tuple(sinks.shape) != (q.shape[1],):
        raise ValueError(f"sinks are {named(sinks)}; q has {q.shape[1]} heads")
    if scale <= 0 or (window is not None and window < 1) or (soft_cap is not None and soft_cap <= 0):
        raise ValueError(f"scale {scale}, window {window} and soft_cap {soft_cap} must be positive")
    if way not in WAYS:
        raise ValueError(f"no way {way!r}; known are {', '.join(WAYS)}")


@torch.library.custom_op("quantkit::attention", mutates_args=())
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_len_q: int = 0,
    key_starts: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    with_lse: bool = False,
    way: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator: out and lse, see the module's docstring.

    way  "auto"; "sdpa" for torch's own attention; or how the kernel loads keys and values: "pointers", which always
         works, "descriptors" and "flight" (`_attention.py`). What does not apply raises ValueError.
    """
    return attention_reference(
        q, k, v, scale, causal, window, soft_cap, sinks, cu_seqlens_q, cu_seqlens_k, max_len_q, key_starts,
        key_lengths, out_dtype, with_lse, way,
    )  # fmt: skip


@attention.register_fake
def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: MaybeTensor = None,
    cu_seqlens_q: MaybeTensor = None,
    cu_seqlens_k: MaybeTensor = None,
    max_len_q: int = 0,
    key_starts: MaybeTensor = None,
    key_lengths: MaybeTensor = None,
    out_dtype: torch.dtype | None = None,
    with_lse: bool = False,
    way: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(q, k, v, scale, window, soft_cap, sinks, cu_seqlens_q, cu_seqlens_k, max_len_q, key_starts, key_lengths, way)
    return empty(q, out_dtype, with_lse)


@attention.register_kernel("cuda")
def attention_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: MaybeTensor = None,
    cu_seqlens_q: MaybeTensor = None,
    cu_seqlens_k: MaybeTensor = None,
    max_len_q: int = 0,
    key_starts: MaybeTensor = None,
    key_lengths: MaybeTensor = None,
    out_dtype: torch.dtype | None = None,
    with_lse: bool = False,
    way: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses, by shapes, dtypes and what is asked for, never by values."""
    _check(q, k, v, scale, window, soft_cap, sinks, cu_seqlens_q, cu_seqlens_k, max_len_q, key_starts, key_lengths, way)
    problem = Problem(
        q, k, v, scale, causal, window, soft_cap, sinks, cu_seqlens_q, cu_seqlens_k, max_len_q, key_starts,
        key_lengths, out_dtype, with_lse,
    )  # fmt: skip
    if way == "sdpa" or (way == "auto" and prefer_sdpa(problem)):
        return sdpa(problem)
    if q.dtype not in (torch.float16, torch.bfloat16) and q.device.type == "cuda":
        return attention_reference(
            q, k, v, scale, causal, window, soft_cap, sinks, cu_seqlens_q, cu_seqlens_k, max_len_q, key_starts,
            key_lengths, out_dtype, with_lse, way,
        )  # fmt: skip
    return run(problem, way)
