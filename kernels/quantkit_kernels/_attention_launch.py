"""Chooses between torch's attention and the kernels for a prefill, and launches these; the operator is attention.py's.

The choice follows from shapes, dtypes, strides and what is asked for. Nothing here waits for the GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

LOG2E = 1.0 / math.log(2.0)
SHORT = 64  # queries up to which tiles are shorter
LONG = 1024  # keys from which on torch's own attention is to be cuDNN's


@dataclass(frozen=True)
class Problem:
    """The operator's arguments, checked."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    causal: bool
    window: int | None
    soft_cap: float | None
    sinks: torch.Tensor | None
    cu_q: torch.Tensor | None
    cu_k: torch.Tensor | None
    max_len_q: int
    starts: torch.Tensor | None
    lengths: torch.Tensor | None
    out_dtype: torch.dtype | None
    with_lse: bool


class Tiling(NamedTuple):
    """Queries and keys of a tile, warps, stages of the loads."""

    queries: int
    keys: int
    warps: int
    stages: int


class Matrix(NamedTuple):
    """Keys or values as rows of one matrix: token n of batch b, head h is row b batch + h head + n, column h column."""

    batch: int
    head: int
    column: int
    rows: int
    columns: int


def tiling(capability: int, head_dim: int, len_q: int) -> Tiling:
    """What compiles without spilling, with all features, by GPU and width; by measurement where one was made."""
    wide = head_dim > 128
    if capability < 90:
        tall = 64 if head_dim > 64 else 128
        return Tiling(tall, 32 if wide else 64, 4 if tall == 64 and not wide else 8, 2)
    if len_q <= SHORT:
        return Tiling(64, 32, 8, 2) if wide else Tiling(64, 64, 4, 2)
    return Tiling(128, 32 if wide else 64, 8, 2 if wide or capability >= 100 else 3)


def prefer_sdpa(p: Problem) -> bool:
    """Whether torch's attention does what is asked for without a mask in memory: then it is the faster one.

    On an H200 cuDNN's has 650 TFLOP/s where a Triton kernel is expected to have some 500 (causal, D = 128, S = 8192).
    """
    plain = p.soft_cap is None and p.sinks is None and p.starts is None and p.lengths is None and p.cu_q is None
    len_q, len_k = p.q.shape[-2], p.k.shape[-2]
    everything = p.window is None or p.window >= max(len_q, len_k)
    aligned = not p.causal or len_q in (1, len_k)
    return plain and everything and aligned and not p.with_lse and p.out_dtype in (None, p.q.dtype) and p.q.numel() > 0


def sdpa(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's attention; for long sequences on Hopper the first choice is cuDNN's. Raises ValueError."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not prefer_sdpa(p):
        raise ValueError(
            "torch's attention has no soft cap, sinks, windows, ragged batches or lse as they are asked for"
        )
    causal = p.causal and p.q.shape[2] > 1
    ratio = p.q.shape[1] // p.k.shape[1]
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if _capability(p.q.device) == 90 and p.k.shape[2] >= LONG:
        backends.insert(0, SDPBackend.CUDNN_ATTENTION)
    with sdpa_kernel(backends, set_priority=True):
        out = F.scaled_dot_product_attention(p.q, p.k, p.v, is_causal=causal, scale=p.scale, enable_gqa=ratio > 1)
    made, lse = empty(p.q, p.out_dtype, False)
    if out.stride() == made.stride():
        return out, lse
    return made.copy_(out), lse


def run(p: Problem, way: str, sizes: Tiling | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel, with keys and values loaded in this way ("auto": the best that applies). Raises ValueError."""
    out, lse = empty(p.q, p.out_dtype, p.with_lse)
    if p.q.numel() == 0:
        return out, lse
    from quantkit_kernels import _attention as kernels

    packed = p.cu_q is not None
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (p.q, p.k, p.v))
    k, v = (t if _aligned(t) else t.clone(memory_format=torch.contiguous_format) for t in (k, v))
    len_q = p.max_len_q if packed else q.shape[2]
    batch = p.cu_q.numel() - 1 if p.cu_q is not None else q.shape[0]
    sizes = sizes or tiling(_capability(q.device), q.shape[-1], len_q)
    mode, k_desc, v_desc, at = _descriptors(way, p, k, v, sizes)
    width = head_width(q.shape[-1])
    logs = lse if p.with_lse else torch.empty(q.numel() // q.shape[-1], dtype=torch.float32, device=q.device)
    # A tensor that is not asked for is replaced by any other: it is not read.
    with torch.cuda.device_of(q):
        kernels.attend[(-(-len_q // sizes.queries), q.shape[1], batch)](
            q,
            k,
            v,
            k_desc,
            v_desc,
            *(logs if t is None else t for t in (p.sinks, p.cu_q, p.cu_k, p.starts, p.lengths)),
            out,
            logs,
            p.scale * LOG2E if p.soft_cap is None else p.scale * 2 * LOG2E / p.soft_cap,
            0.0 if p.soft_cap is None else p.soft_cap * LOG2E,
            p.window or 0,
            len_q,
            k.shape[-2] if not packed else 0,
            q.shape[1],
            *_strides(q, packed),
            *_strides(k, packed)[:2],
            _strides(k, packed)[2] * k.element_size() // 16,
            *_strides(v, packed)[:2],
            _strides(v, packed)[2] * v.element_size() // 16,
            *at,
            RATIO=q.shape[1] // k.shape[1],
            CAUSAL=p.causal,
            WINDOW=p.window is not None,
            CAP=p.soft_cap is not None,
            SINKS=p.sinks is not None,
            PACKED=packed,
            START=p.starts is not None,
            LENGTH=p.lengths is not None,
            MODE=mode,
            D=q.shape[-1],
            BD=width,
            BM=sizes.queries,
            BN=sizes.keys,
            num_warps=sizes.warps,
            num_stages=sizes.stages,
        )
    return out, lse


def head_width(head_dim: int) -> int:
    """Channels of a tile: a power of two."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _strides(t: torch.Tensor, packed: bool) -> tuple[int, int, int]:
    """From batch to batch, head to head, token to token."""
    return (0, t.stride(1), t.stride(0)) if packed else (t.stride(0), t.stride(1), t.stride(2))


def _aligned(t: torch.Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes."""
    unit = 16 // t.element_size()
    return t.data_ptr() % 16 == 0 and all(s % unit == 0 for s in t.stride()[:-1])


def _matrix(t: torch.Tensor, packed: bool) -> Matrix | None:
    """Keys or values as a matrix for a descriptor, where heads lie side by side in a row or one after the other."""
    batch, head, row = _strides(t, packed)
    heads, length = t.shape[1], t.shape[0] if packed else t.shape[2]
    count = 1 if packed else t.shape[0]
    if row == 0 or batch % row:
        return None
    if head * (heads - 1) + t.shape[-1] <= row:
        return Matrix(batch // row, 0, head, (count - 1) * (batch // row) + length, head * (heads - 1) + t.shape[-1])
    if head % row:
        return None
    last = (count - 1) * (batch // row) + (heads - 1) * (head // row)
    return Matrix(batch // row, head // row, 0, last + length, t.shape[-1])


def _descriptors(
    way: str, p: Problem, k: torch.Tensor, v: torch.Tensor, sizes: Tiling
) -> tuple[str, Any, Any, list[int]]:
    """Mode, descriptors of keys and values, and the strides that place them. Raises ValueError where there are none."""
    packed = p.cu_q is not None
    both = _matrix(k, packed), _matrix(v, packed)
    none: tuple[str, Any, Any, list[int]] = ("pointers", None, None, [0, 0, 0, 0])
    known = both[0] is not None and both[1] is not None and both[0][:2] == both[1][:2]
    if k.numel() == 0:
        return none
    if not known or head_width(k.shape[-1]) != k.shape[-1] or way == "pointers":
        if way in ("descriptors", "flight"):
            raise ValueError(f"no tensor descriptors for keys {tuple(k.shape)} of strides {k.stride()}")
        return none
    if way == "auto" and (_capability(k.device) != 90 or sizes.queries < 128 or k.shape[-1] > 128):
        return none
    from triton.tools.tensor_descriptor import TensorDescriptor

    mode = way if way != "auto" else "flight" if p.soft_cap is None else "descriptors"
    found, at = [], []
    for t, m in zip((k, v), both):
        assert m is not None
        block = [sizes.keys, t.shape[-1]]
        found.append(TensorDescriptor(t, [m.rows, m.columns], [_strides(t, packed)[2], 1], block))
        at.append(m.column)
    assert both[0] is not None
    return mode, found[0], found[1], [both[0].batch, both[0].head, *at]


def empty(q: torch.Tensor, out_dtype: torch.dtype | None, with_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse, with a token's heads side by side in memory."""
    shape = q.shape if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    out = torch.empty(shape, dtype=out_dtype or q.dtype, device=q.device)
    lse = torch.empty(shape[:-1] if with_lse else (0,), dtype=torch.float32, device=q.device)
    if q.dim() == 3:
        return out, lse
    return out.transpose(1, 2), lse.transpose(1, 2) if with_lse else lse


def _capability(device: torch.device) -> int:
    """90 for a Hopper GPU; 80 where there is none."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
