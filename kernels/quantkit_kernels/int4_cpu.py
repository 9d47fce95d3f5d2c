"""y = x Wᵀ with symmetric 4-bit codes on a CPU: torch's own int4 product, on codes in the order that it wants.

    x       (..., K) bfloat16
    words   uint8 (N, K / 2): the bytes of torch's `_convert_weight_to_int4pack_for_cpu`, which differ by CPU
    scales  bfloat16 (K / size, N, 2): scale, and zero

The bytes are as many as those of layout.py, so a layer can hold one order or the other in the same tensor: `to_words`
and `from_words` go both ways, without loss. Sums are float32, and W is not rounded. A few tokens are multiplied at once
by torch's kernel; for many, the weight is decoded some rows at a time and multiplied dense.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from quantkit_kernels import layout
from quantkit_kernels.layout import Packed

SIZES = (256, 128, 64, 32)  # columns of a scale that torch's kernel has
SLAB = 64  # rows that torch orders by themselves, or a divisor of them
ROWS = 8 * SLAB  # decoded at once
FEW = 64  # tokens; beyond, decoding the weight costs less than torch's kernel, which is made for few


def size_of(kind: str, n: int, k: int, group: int) -> int:
    """Columns of a scale for torch's kernel; 0 where it has none for such a weight."""
    if kind != "int4" or n % 16 or k % 128 or not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return 0
    return next((s for s in SIZES if (group or k) % s == 0 and k % s == 0), 0)


def to_words(packed: Packed) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    """Words, scales and the columns of a scale; None where they do not fit, or bfloat16 lacks a scale."""
    n, k = packed.n, packed.k
    size = size_of(packed.kind, n, k, packed.group)
    if not size:
        return None
    codes, scale, _ = layout.unpack(packed)
    exact = scale.to(torch.bfloat16)
    if not torch.equal(exact.float(), scale.float()):
        return None
    wide = exact.repeat_interleave((packed.group or k) // size, 1).expand(n, k // size)
    scales = torch.stack((wide.t(), torch.zeros_like(wide.t())), -1).contiguous()
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    if words.numel() != n * k // 2 or not torch.equal(from_words(words, n, k), codes):
        return None  # a CPU whose order is not known here
    return words, scales, size


def from_words(words: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Codes uint8 (N, K) from the CPU's order."""
    flat = words.reshape(-1).view(torch.uint8)
    codes = torch.empty(n, k, dtype=torch.uint8)
    for start in range(0, n, SLAB):
        rows = min(SLAB, n - start)
        codes[start : start + rows] = _slab(flat, start, rows, k)
    return codes


def _slab(flat: torch.Tensor, start: int, rows: int, k: int) -> torch.Tensor:
    part = flat[start * k // 2 : (start + rows) * k // 2]
    nibbles = torch.stack((part & 15, part >> 4), -1).flatten()
    return nibbles[_places(rows, k)].view(rows, k)


@functools.lru_cache(maxsize=16)
def _places(rows: int, k: int) -> torch.Tensor:
    """For each code of some rows, in order, the nibble that torch puts it in. int64 (rows * K,).

    Found by asking: the number of each code is packed four bits at a time.
    """
    number = torch.arange(rows * k).view(rows, k)
    source = torch.zeros(rows * k, dtype=torch.int64)
    for shift in range(0, (rows * k - 1).bit_length(), 4):
        words = torch.ops.aten._convert_weight_to_int4pack_for_cpu((number >> shift & 15).int(), 2).flatten()
        source |= torch.stack((words & 15, words >> 4), -1).flatten().long() << shift
    return torch.argsort(source)


@torch.library.custom_op("quantkit::int4_cpu_linear", mutates_args=())
def linear(
    x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, size: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """(..., K) -> (..., N), bfloat16. words: int32 or uint8, of any shape of as many bytes.

    An operator, so that torch.export keeps `words` as they are, where it would make a constant of them seen as uint8.
    """
    n, k = scales.shape[1], x.shape[-1]
    flat = x.reshape(-1, k).contiguous()
    if flat.shape[0] <= FEW:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, words.view(torch.uint8).view(n, k // 2), size, scales)
        y = y if bias is None else y + bias.to(y.dtype)
    else:
        parts = [(start, min(n, start + ROWS)) for start in range(0, n, ROWS)]
        biases = [None if bias is None else bias[start:stop].to(x.dtype) for start, stop in parts]
        decoded = (_decoded(words, scales, size, k, *part) for part in parts)
        y = torch.cat([F.linear(flat, w, b) for w, b in zip(decoded, biases)], 1)
    return y.view(*x.shape[:-1], n)


@linear.register_fake
def _fake(
    x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, size: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], scales.shape[1])


def _decoded(words: torch.Tensor, scales: torch.Tensor, size: int, k: int, start: int, stop: int) -> torch.Tensor:
    """Some rows of the weight, rounded to bfloat16."""
    flat = words.reshape(-1).view(torch.uint8)
    slabs = [_slab(flat, s, min(SLAB, stop - s), k) for s in range(start, stop, SLAB)]
    codes = torch.cat(slabs).view(stop - start, -1, size)
    scale = scales[:, start:stop, 0].t()[..., None]
    return ((codes.to(torch.int8) - 8).float() * scale.float()).to(torch.bfloat16).view(stop - start, k)
