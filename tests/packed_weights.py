"""Random weights of every kind that the weight-only kernels hold, with scales that differ by row and by group."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from quantkit_kernels import layout

# kind, dtype of the scales, group: each way in which a scale lies in its word, and each way in which a code is decoded
CASES: list[tuple[str, str, int]] = [
    ("int4", "bf16", 128),
    ("int4", "fp16", 64),
    ("int4", "fp16", 32),
    ("int4", "fp16", 16),
    ("int4", "fp32", 384),
    ("int4", "bf16", 0),
    ("int4z", "fp16", 128),
    ("int4z", "bf16", 32),
    ("int4z", "fp32", 64),
    ("int4z", "fp16", 0),
    ("int8", "fp16", 0),
    ("int8", "bf16", 128),
    ("int8", "fp32", 32),
    ("int8z", "fp16", 64),
    ("int8z", "fp32", 0),
    ("fp8_e4m3", "fp16", 0),
    ("fp8_e4m3", "fp32", 128),
    ("mxfp4", "e8m0", 32),
    ("mxfp8", "e8m0", 32),
    ("nvfp4", "e4m3", 16),
    ("int2", "fp16", 64),
    ("int2", "bf16", 32),
    ("int2z", "fp16", 128),
    ("int3", "fp16", 128),
    ("int3", "fp16", 32),
    ("int3z", "bf16", 64),
    ("int3z", "fp32", 0),
]


class Weight(NamedTuple):
    """What is packed: codes, scales and zero points as files have them."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    global_scale: torch.Tensor | None


def weight(kind: str, scale_dtype: str, group: int, n: int, k: int, seed: int = 0) -> Weight:
    g = torch.Generator().manual_seed(seed)
    form = layout.get(kind)
    groups = 1 if group == 0 else -(-k // group)
    codes = torch.randint(0, 1 << form.bits, (n, k), generator=g).to(torch.uint8)
    if form.code == "e4m3":
        codes[(codes & 0x7F) == 0x7F] = 0x08
        codes = codes.view(torch.float8_e4m3fn)
    if scale_dtype == "e8m0":
        scale = torch.randint(112, 125, (n, groups), generator=g).to(torch.uint8)
    elif scale_dtype == "e4m3":
        scale = torch.randint(1, 127, (n, groups), generator=g).to(torch.uint8).view(torch.float8_e4m3fn)
    else:
        steps = torch.exp2((torch.arange(n) % 5 - 6).float())[:, None] * 1.1 ** (torch.arange(groups) % 7)
        sign = 1 - 2 * (torch.arange(n) % 4 == 3).float()[:, None]
        scale = ((0.5 + torch.rand(n, groups, generator=g)) * steps * sign).to(layout.SCALE_DTYPES[scale_dtype])
    zero = torch.randint(0, 1 << form.bits, (n, groups), generator=g).to(torch.uint8) if form.zero else None
    return Weight(codes, scale, zero, torch.tensor([37.5]) if kind == "nvfp4" else None)


def packed(kind: str, scale_dtype: str, group: int, n: int, k: int, seed: int = 0, module: Any = layout) -> Any:
    """Packed by `module`, which is `layout`, maybe imported a second time."""
    w = weight(kind, scale_dtype, group, n, k, seed)
    return module.pack(kind, w.codes, w.scale, w.zero, group=group, global_scale=w.global_scale)


def exact(w: Weight, kind: str, group: int) -> torch.Tensor:
    """The weight in float64 from what files have, by the definition of the formats and nothing of the layout."""
    k = w.codes.shape[1]
    spread = torch.arange(k) // (group or k)
    if w.codes.dtype == torch.float8_e4m3fn:
        value = w.codes.double()
    elif kind in ("mxfp4", "nvfp4"):
        code = w.codes.long()
        exponent, mantissa = code >> 1 & 3, code & 1
        size = torch.where(exponent == 0, mantissa * 0.5, (1 + mantissa * 0.5) * torch.exp2(exponent.double() - 1))
        value = torch.where(code > 7, -size, size)
    else:
        bits = layout.get(kind).bits
        value = w.codes.double() - (1 << (bits - 1) if w.zero is None else w.zero.double()[:, spread])
    scale = torch.exp2(w.scale.double() - 127) if w.scale.dtype == torch.uint8 else w.scale.double()
    return value * scale[:, spread] / (1.0 if w.global_scale is None else w.global_scale.double())


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same dtype, shape and bits."""
    same = (a.dtype, a.shape) == (b.dtype, b.shape)
    return same and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
