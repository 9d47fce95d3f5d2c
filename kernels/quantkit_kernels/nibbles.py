"""Four-bit codes as files have them, to the words of layout.py: one launch a weight, and nothing waits for the GPU.

What `layout.pack` makes of codes, for codes that need not be taken apart: those of compressed-tensors (int4, MXFP4,
NVFP4) and of gpt-oss lie in rows, eight in a word of 32 bits, the first lowest. `layout.pack` is the reference, takes
everything else, and is what computes on a CPU.

    words   (N, K / 8) int32: codes from 0, column 8 i + j at bit 4 j of word i; K a multiple of 8, of 128 for "int4z"
    scale   (N, G), one for `group` columns, or (N, 1) for group 0; dtypes as of layout.py
    zero    "int4z" only: (ceil(N / 8), G) int32, zero points along N as codes lie along K
"""

from __future__ import annotations

import torch

from quantkit_kernels import layout
from quantkit_kernels._launch import capability
from quantkit_kernels._words import RAISED

KINDS = ("int4", "int4z", "mxfp4", "nvfp4")
NOWHERE = 0x7FFF_FFFF  # in `wrong`: no scale is

# dtype of scales -> integers of as many bits, their bits, the greatest without its sign, the sign
_BITS = {
    "bf16": (torch.int16, 0xFFFF, (127 + 33) << 7, 1 << 15),
    "fp16": (torch.int16, 0xFFFF, 0x7BFF, 1 << 15),
    "fp32": (torch.int32, -1, (127 + 33) << 23, -1 << 31),
    "e8m0": (torch.uint8, 0xFF, 127 + 33, 0),
    "e4m3": (torch.uint8, 0xFF, 0x7E, 0),
}
_ROWS, _WORDS = 32, 16  # of a program: rows, and words of scales of each


def fits(
    kind: str,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    *,
    scale_dtype: str,
    k: int,
    group: int,
) -> bool:
    """Whether `lay` takes these, and can compute where they lie; whoever calls it has asked this."""
    if kind not in KINDS or capability(words.device) < (8, 0):
        return False
    return well_formed(kind, words, scale, zero, scale_dtype=scale_dtype, k=k, group=group)


def well_formed(
    kind: str,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    *,
    scale_dtype: str,
    k: int,
    group: int,
) -> bool:
    """Whether dtypes and shapes are those of the module's docstring."""
    n, groups = words.shape[0], -(-k // group) if group else 1
    if k % (128 if kind == "int4z" else 8) or words.dtype != torch.int32 or tuple(words.shape) != (n, k // 8):
        return False
    if words.stride(1) != 1:
        return False
    if scale.dtype != layout.SCALE_DTYPES[scale_dtype] or tuple(scale.shape) != (n, groups):
        return False
    if (zero is not None) != layout.get(kind).zero:
        return False
    return zero is None or (zero.dtype == torch.int32 and tuple(zero.shape) == (-(-n // 8), groups))


def checks(rows: int, *, kind: str, scale_dtype: str, k: int, group: int) -> int:
    """How many numbers `lay` puts into `wrong`, for so many rows of codes as laid out."""
    return -(-rows // _ROWS) * -(-_scale_words(kind, scale_dtype, k, group) // _WORDS)


def _scale_words(kind: str, scale_dtype: str, k: int, group: int) -> int:
    how = layout.geometry(kind, scale_dtype, k, group)
    return how.rows * how.width


def lay(
    kind: str,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    codes_out: torch.Tensor,
    scale_out: torch.Tensor,
    zero_out: torch.Tensor | None,
    wrong: torch.Tensor,
    *,
    scale_dtype: str,
    k: int,
    group: int,
) -> None:
    """Writes codes, scales and zero points of a weight as layout.py has them.

    *_out   (L, N', 16), and as `Geometry.shape`: rows and words contiguous, so they may be some rows of a larger weight
    wrong   (checks,) int32, of any content: the least of them becomes the least n * G + g of a scale that `layout.pack`
            refuses, or NOWHERE
    """
    from quantkit_kernels import _nibbles

    how, count = layout.geometry(kind, scale_dtype, k, group), _scale_words(kind, scale_dtype, k, group)
    n, high, lines = words.shape[0], codes_out.shape[1], codes_out.shape[0]
    assert wrong.numel() == checks(high, kind=kind, scale_dtype=scale_dtype, k=k, group=group)
    integers, mask, largest, sign = _BITS[scale_dtype]
    scale = scale.contiguous()
    zero = scale if zero is None else zero.contiguous()
    with torch.cuda.device_of(words):
        _nibbles.lay[(-(-high // _ROWS), lines + -(-count // _WORDS))](
            words,
            codes_out,
            scale.view(integers),
            zero,
            scale_out,
            scale_out if zero_out is None else zero_out,
            wrong,
            n,
            high,
            k // 8,
            words.stride(0),
            codes_out.stride(0),
            lines,
            scale.shape[1],
            count,
            scale_out.stride(0),
            FILL=-0x77777778 if kind == "int4" else 0,
            E2M1=layout.get(kind).code == "e2m1",
            FIELDS=how.fields,
            WIDTH=how.width,
            MASK=mask,
            LARGEST=largest,
            SIGN=sign,
            RAISED=RAISED.get(kind, 0),
            E4M3=scale_dtype == "e4m3",
            ZERO=layout.zero_mode(kind, scale_dtype),
            ROWS=_ROWS,
            WORDS=_WORDS,
        )
