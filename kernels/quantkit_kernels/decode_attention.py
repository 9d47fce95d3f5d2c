"""Attention of a few query tokens over a long cache of keys and values in 16, 8 or 4 bits, dense or in pages.

    q             (B, Hq, Lq, D) float, the last Lq tokens of each sequence; their keys are in the cache
    k_cache, v_cache, k_scale, v_scale  as in kv_layout.py, H heads; query head h has key head h H / Hq
    lengths       (B,) int32, tokens of each sequence that are in the cache, the query's included
    scale         what q kᵀ is multiplied by
    block_table   (B, pages) int32, or None where the cache is dense
    starts        (B,) int32, the first token that counts (left padding), or None
    sinks         (Hq,) float, one more logit of each head in the denominator, or None
    window        a token sees itself and window - 1 tokens before it; None sees all of them
    soft_cap      c of c tanh(x / c), applied to scaled scores, or None
    out           (B, Hq, Lq, D), dtype of q or `out_dtype`: softmax(scale q kᵀ) v, token i of the query at position
                  length - Lq + i and seeing no later one; zeros where there is nothing to see
    lse           (B, Hq, Lq) float32, the logarithm of the denominator, -inf where there is nothing

On a GPU (`_decode_attention.py`) the cache is cut into ranges that are worked on side by side, as in Flash-Decoding,
and added up in one order: the same input on the same device gives the same bytes. How many there are follows from
shapes alone, never from `lengths`, so that nothing waits for the GPU.
"""

from __future__ import annotations

import math

import torch

from quantkit_kernels.kv_layout import Layout, MaybeTensor, check_sequences, dequantize, layout, named, scale_strides

LOG2E = 1.0 / math.log(2.0)
WAVES = 4  # programs for each multiprocessor at the most, where several ranges are needed to have them
MIN_TILES = 4  # of a range


def decode_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: MaybeTensor,
    v_scale: MaybeTensor,
    lengths: torch.Tensor,
    scale: float,
    block_table: MaybeTensor = None,
    starts: MaybeTensor = None,
    sinks: MaybeTensor = None,
    window: int | None = None,
    soft_cap: float | None = None,
    out_dtype: torch.dtype | None = None,
    splits: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch on the decoded cache, in float32, or in float64 for a query in float64; `splits` is not needed."""
    form = _check(q, k_cache, v_cache, k_scale, v_scale, lengths, block_table, starts, sinks, window, soft_cap)
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = dequantize(k_cache, k_scale, values=False, dtype=work)
    values = dequantize(v_cache, v_scale, values=True, dtype=work)
    if block_table is not None:
        keys, values = (t[block_table.long()].transpose(1, 2).flatten(2, 3) for t in (keys, values))
    length_q, ratio = q.shape[2], q.shape[1] // form.heads
    n = torch.arange(keys.shape[2], device=q.device)
    end = lengths.long().clamp(max=keys.shape[2])[:, None, None]
    position = end - length_q + torch.arange(length_q, device=q.device)[:, None]
    first = torch.zeros_like(end) if starts is None else starts.long()[:, None, None]
    seen = (n <= position) & (n >= first)
    used = (n < end[:, 0]) & (n >= first[:, 0])
    if window is not None:
        seen &= n > position - window
    keys, values = (t.where(used[:, None, :, None], torch.zeros_like(t)) for t in (keys, values))  # whatever is there
    grouped = q.to(work).unflatten(1, (form.heads, ratio))
    s = torch.einsum("bhrid,bhnd->bhrin", grouped, keys).flatten(1, 2) * scale
    if soft_cap is not None:
        s = soft_cap * torch.tanh(s / soft_cap)
    s = s.masked_fill(~seen[:, None], -math.inf)
    sink = s.new_full(s[..., :1].shape, -math.inf)
    if sinks is not None:
        sink = sinks.to(work)[:, None, None].expand_as(sink)
    lse = torch.logsumexp(torch.cat([s, sink], -1), -1)
    p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0)[..., None])
    out = torch.einsum("bhrin,bhnd->bhrid", p.unflatten(1, (form.heads, ratio)), values).flatten(1, 2)
    return _as_made(out.to(out_dtype or q.dtype)), lse.float().transpose(1, 2).contiguous().transpose(1, 2)


def _as_made(out: torch.Tensor) -> torch.Tensor:
    """The same with a token's heads side by side in memory, as what follows attention wants them."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: MaybeTensor,
    v_scale: MaybeTensor,
    lengths: torch.Tensor,
    block_table: MaybeTensor,
    starts: MaybeTensor,
    sinks: MaybeTensor,
    window: int | None,
    soft_cap: float | None,
) -> Layout:
    """What the cache is. Raises ValueError for shapes and dtypes that do not belong together."""
    form = layout(k_cache, v_cache, k_scale, v_scale)
    if q.dim() != 4 or not q.is_floating_point() or q.shape[3] != form.head_dim or q.shape[1] % form.heads:
        raise ValueError(f"q is {named(q)}; the cache has {form.heads} heads of {form.head_dim} channels")
    if form.number == "none" and q.dtype != k_cache.dtype:
        raise ValueError(f"q is {named(q)}, a cache of 16 bits {k_cache.dtype}; they must have one dtype")
    check_sequences(q.shape[0], form, block_table, lengths=lengths, starts=starts)
    if sinks is not None and tuple(sinks.shape) != (q.shape[1],):
        raise ValueError(f"sinks are {named(sinks)}; q has {q.shape[1]} heads")
    if (window is not None and window < 1) or (soft_cap is not None and soft_cap <= 0):
        raise ValueError(f"window {window} and soft_cap {soft_cap} must be positive")
    return form


@torch.library.custom_op("quantkit::decode_attention", mutates_args=())
def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    lengths: torch.Tensor,
    scale: float,
    block_table: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    out_dtype: torch.dtype | None = None,
    splits: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator: out and lse, see the module's docstring; `splits`: ranges of the cache, 0 for one by shapes."""
    return decode_attention_reference(
        q,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        lengths,
        scale,
        block_table,
        starts,
        sinks,
        window,
        soft_cap,
        out_dtype,
        splits,
    )


@decode_attention.register_fake
def _fake(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: MaybeTensor,
    v_scale: MaybeTensor,
    lengths: torch.Tensor,
    scale: float,
    block_table: MaybeTensor = None,
    starts: MaybeTensor = None,
    sinks: MaybeTensor = None,
    window: int | None = None,
    soft_cap: float | None = None,
    out_dtype: torch.dtype | None = None,
    splits: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(q, k_cache, v_cache, k_scale, v_scale, lengths, block_table, starts, sinks, window, soft_cap)
    b, h, length, d = q.shape
    out = q.new_empty(b, length, h, d, dtype=out_dtype or q.dtype)
    return out.transpose(1, 2), q.new_empty(b, length, h, dtype=torch.float32).transpose(1, 2)


def tiling(number: str, head_dim: int, columns: int) -> tuple[int, int, int, int]:
    """Columns and tokens of a tile, warps, stages: what compiles without spilling on every GPU that is tested for."""
    if number == "none":
        return (16 if columns <= 16 or head_dim > 128 else 32), 32, 4, (4 if head_dim <= 128 else 3)
    wide = columns > 8
    tokens = 32 if head_dim > 128 and wide else 64
    return (16 if wide else 8), tokens, (1 if number == "int4" and head_dim == 64 else 2), 3


def ranges(programs: int, tiles: int, multiprocessors: int) -> int:
    """Into how many ranges to cut a cache of `tiles` tiles, when `programs` others work side by side anyway."""
    wanted = WAVES * multiprocessors // max(programs, 1)
    return max(1, min(wanted, tiles // MIN_TILES))


@decode_attention.register_kernel("cuda")
def decode_kernel(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: MaybeTensor,
    v_scale: MaybeTensor,
    lengths: torch.Tensor,
    scale: float,
    block_table: MaybeTensor = None,
    starts: MaybeTensor = None,
    sinks: MaybeTensor = None,
    window: int | None = None,
    soft_cap: float | None = None,
    out_dtype: torch.dtype | None = None,
    splits: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two launches: every range of every sequence, then their sum."""
    form = _check(q, k_cache, v_cache, k_scale, v_scale, lengths, block_table, starts, sinks, window, soft_cap)
    from quantkit_kernels import _decode_attention as kernels

    q = q if q.stride(3) == 1 else q.contiguous()
    batch, heads, length_q, head_dim = q.shape
    out = torch.empty(batch, length_q, heads, head_dim, dtype=out_dtype or q.dtype, device=q.device)
    lse = torch.empty(batch, length_q, heads, dtype=torch.float32, device=q.device)
    if q.numel():
        columns = heads // form.heads * length_q
        bm, bn, warps, stages = tiling(form.number, head_dim, columns)
        tiles_m = -(-columns // bm)
        capacity = form.length * (1 if block_table is None else block_table.shape[1])
        seen = capacity if window is None else min(capacity, window + length_q + bn)
        splits = splits or ranges(batch * form.heads * tiles_m, -(-seen // bn), _multiprocessors(q.device))
        constants = {
            "WINDOW": window is not None,
            "CAP": soft_cap is not None,
            "START": starts is not None,
            "ASM": _has_conversions(q.device),
            "BM": bm,
            "BN": bn,
            "NW": warps,
            "num_warps": warps,
            "num_stages": stages,
        }
        sizes = [
            scale * LOG2E if soft_cap is None else scale * 2 * LOG2E / soft_cap,
            0.0 if soft_cap is None else soft_cap * LOG2E,
            window or 0,
            length_q,
            capacity,
        ]
        caches, grid = (k_cache, v_cache, k_scale, v_scale), (splits, form.heads * tiles_m, batch)
        part, part_lse = _every_range(form, q, caches, (lengths, block_table, starts), sizes, grid, constants)
        with torch.cuda.device_of(q):
            kernels.combine[(batch * length_q * heads,)](
                *(part, part_lse, lse if sinks is None else sinks, out, lse, splits, heads),
                SINKS=sinks is not None,
                D=head_dim,
                BD=head_width(head_dim),
                BS=16,
            )
    return out.transpose(1, 2), lse.transpose(1, 2)


def _every_range(
    form: Layout,
    q: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor, MaybeTensor, MaybeTensor],
    sequences: tuple[torch.Tensor, MaybeTensor, MaybeTensor],
    sizes: list[int | float],
    grid: tuple[int, int, int],
    constants: dict[str, int | bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each range of the cache gives: outputs (B Lq Hq ranges, D) and log-sum-exps, in powers of two, of each."""
    from quantkit_kernels import _decode_attention as kernels

    lines = grid[0] * q.numel() // q.shape[3]
    part = torch.empty(lines, q.shape[3], dtype=torch.float32, device=q.device)
    part_lse = torch.empty(lines, dtype=torch.float32, device=q.device)
    keys, values = (t if form.number == "none" else t.view(torch.int32) for t in caches[:2])
    k_scale, v_scale = caches[2:]
    lengths, table, starts = sequences
    # A tensor that is not asked for is replaced by any other: it is not read.
    with torch.cuda.device_of(q):
        kernels.decode[grid](
            q,
            keys,
            values,
            keys if k_scale is None else k_scale,
            values if v_scale is None else v_scale,
            lengths if table is None else table,
            lengths,
            lengths if starts is None else starts,
            part,
            part_lse,
            *sizes,
            *q.stride()[:3],
            *_strides(keys),
            *_strides(values),
            *scale_strides(form, k_scale),
            *scale_strides(form, v_scale),
            0 if table is None else table.stride(0),
            FORMAT=form.number,
            SCALES=form.scales,
            GROUPS=form.groups,
            PAGE=0 if table is None else form.length,
            RATIO=q.shape[1] // form.heads,
            D=form.head_dim,
            BD=head_width(form.head_dim),
            **constants,
        )
    return part, part_lse


def head_width(head_dim: int) -> int:
    """Channels of a tile: a power of two."""
    return max(64, 1 << (head_dim - 1).bit_length())


def _strides(t: torch.Tensor) -> list[int]:
    """Of all dimensions but the last one, in units of 16 bytes. Raises ValueError where they are not."""
    unit = 16 // t.element_size()
    if any(s % unit for s in t.stride()[:3]) or t.data_ptr() % 16:
        raise ValueError(f"strides {t.stride()} of a cache of {t.dtype}, or its address, are no multiples of 16 bytes")
    return [s // unit for s in t.stride()[:3]]


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _has_conversions(device: torch.device) -> bool:
    """Whether the GPU converts e4m3 itself, and the interpreter does not run instead of a GPU."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
