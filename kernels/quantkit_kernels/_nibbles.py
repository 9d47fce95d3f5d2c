"""The Triton kernel that brings a file's four-bit codes and their scales to the words of layout.py, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _half(c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor, other: tl.tensor) -> tl.tensor:
    """A half of a word of E2M1 but for its bits 5 and 13, as `_words._e2m1_words`; other: code 2 of the other half."""
    half = (c0 >> 3) << 15 | (c0 & 7) << 6 | (c1 >> 3) << 9 | (c1 & 7) | (c2 & 7) << 10 | (other >> 3) << 3
    return half | ((c3 & 1) ^ (half >> 12 & 1)) << 4 | ((c3 >> 2 & 1) ^ (half >> 6 & 1)) << 14


@triton.jit
def _code(words: tl.tensor, shift: tl.tensor) -> tl.tensor:
    return (words >> shift) & 15


@triton.jit
def _codes(
    line: tl.tensor,
    src_ptr: tl.tensor,
    out_ptr: tl.tensor,
    n: tl.tensor,
    high: tl.tensor,
    words: tl.tensor,
    row_stride: tl.tensor,
    line_stride: tl.tensor,
    FILL: tl.constexpr,
    E2M1: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """ROWS rows of a line of 128 columns.

    src (n, words) int32, row_stride between rows, eight codes in a word, the first lowest; out (lines, high, 16) int32,
    line_stride between lines. FILL: a word of codes that stand for zero, for columns beyond those of src.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, 16)
    shift = (place // 4 * 8)[None, :]  # word 4 t + j has from four words of src the codes 2 t and 2 t + 1
    first = line * 16 + (place % 4) * 4
    at = src_ptr + row.to(tl.int64)[:, None] * row_stride + first[None, :]
    there = (row < n)[:, None]
    a = tl.load(at, there & (first < words)[None, :], FILL)
    b = tl.load(at + 1, there & (first + 1 < words)[None, :], FILL)
    c = tl.load(at + 2, there & (first + 2 < words)[None, :], FILL)
    d = tl.load(at + 3, there & (first + 3 < words)[None, :], FILL)
    a0, b0, c0, d0 = _code(a, shift), _code(b, shift), _code(c, shift), _code(d, shift)
    a1, b1, c1, d1 = _code(a, shift + 4), _code(b, shift + 4), _code(c, shift + 4), _code(d, shift + 4)
    if E2M1:
        low, top = _half(a0, b0, c0, d0, c1), _half(a1, b1, c1, d1, c0)
        bit = d1 >> 3
        top = top | bit << 13 | ((d1 >> 1 & 1) ^ bit) << 5
        bit = (d0 >> 3) ^ (top >> 5 & 1)
        low = low | bit << 13 | ((d0 >> 1 & 1) ^ bit) << 5
    else:
        low = a0 | b0 << 4 | c0 << 8 | d0 << 12
        top = a1 | b1 << 4 | c1 << 8 | d1 << 12
    out = tl.where(there, low | top << 16, 0)
    to = out_ptr + line.to(tl.int64) * line_stride + (row.to(tl.int64) * 16)[:, None] + place[None, :]
    tl.store(to, out, (row < high)[:, None])


@triton.jit
def _e5m3(code: tl.tensor) -> tl.tensor:
    """E4M3, not negative, as E5M3, which has no subnormal numbers: `_words._e5m3_words` says of what value."""
    small = tl.where(code < 4, 112 + code * 4, tl.where(code < 8, 120 + code * 2, code + 128))
    return tl.where(code < 2, code * 112, small)


@triton.jit
def _scales(
    part: tl.tensor,
    parts: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    out_ptr: tl.tensor,
    zero_out_ptr: tl.tensor,
    wrong_ptr: tl.tensor,
    n: tl.tensor,
    high: tl.tensor,
    groups: tl.tensor,
    words: tl.tensor,
    line_stride: tl.tensor,
    FIELDS: tl.constexpr,
    WIDTH: tl.constexpr,
    MASK: tl.constexpr,
    LARGEST: tl.constexpr,
    SIGN: tl.constexpr,
    RAISED: tl.constexpr,
    E4M3: tl.constexpr,
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """WORDS words of scales for ROWS rows: part `part` of `parts`.

    scale (n, groups), the bits of each as integers; zero int32 (ceil(n / 8), groups), eight zero points in a word, the
    first lowest; out (words / WIDTH, high, WIDTH) int32, line_stride along its first dimension, zero_out alike.
    wrong (programs of rows, parts) int32: the least row * groups + group of a scale whose bits without SIGN are above
    LARGEST, 0x7FFFFFFF if there is none. MASK: the bits of a scale. ZERO: as `layout.zero_mode`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = part * WORDS + tl.arange(0, WORDS)
    there = (row < n)[:, None]
    out = tl.zeros([ROWS, WORDS], tl.int32)
    zeros = out
    nowhere = 0x7FFFFFFF
    least = tl.full([ROWS, WORDS], nowhere, tl.int32)
    for f in tl.static_range(FIELDS):
        group = (word * FIELDS + f)[None, :]
        here = there & (group < groups) & (word < words)[None, :]
        index = row[:, None] * groups + group
        bits = tl.load(scale_ptr + index, here, 0).to(tl.int32) & MASK
        least = tl.minimum(least, tl.where(here & ((bits & ~SIGN) > LARGEST), index, nowhere))
        if E4M3:
            bits = _e5m3(bits)
        bits = tl.where(here, bits + RAISED, 0)
        if ZERO > 0:
            packed = tl.load(zero_ptr + (row // 8)[:, None] * groups + group, here, 0)
            zeros = _code(packed, (row % 8 * 4)[:, None])
        if ZERO == 1:
            bits = bits << 16 | zeros
        if E4M3:  # scales 0 and 2 in the low half, all rotated left by four
            out = out | bits << ((f % 2) * 16 + f // 2 * 8 + 4)
            if f == 3:
                out = out | bits >> 4
        else:
            out = out | bits << (32 // FIELDS * f)
    tl.store(wrong_ptr + tl.program_id(0) * parts + part, tl.min(tl.min(least, 1), 0))
    to = (word // WIDTH).to(tl.int64)[None, :] * line_stride + row[:, None] * WIDTH + (word % WIDTH)[None, :]
    stored = (row < high)[:, None] & (word < words)[None, :]
    tl.store(out_ptr + to, out, stored)
    if ZERO == 2:
        tl.store(zero_out_ptr + to, zeros, stored)


@triton.jit
def lay(
    src_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    scale_out_ptr: tl.tensor,
    zero_out_ptr: tl.tensor,
    wrong_ptr: tl.tensor,
    n: tl.tensor,
    high: tl.tensor,
    words: tl.tensor,
    row_stride: tl.tensor,
    line_stride: tl.tensor,
    lines: tl.tensor,
    groups: tl.tensor,
    scale_words: tl.tensor,
    scale_stride: tl.tensor,
    FILL: tl.constexpr,
    E2M1: tl.constexpr,
    FIELDS: tl.constexpr,
    WIDTH: tl.constexpr,
    MASK: tl.constexpr,
    LARGEST: tl.constexpr,
    SIGN: tl.constexpr,
    RAISED: tl.constexpr,
    E4M3: tl.constexpr,
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """Grid: rows / ROWS; `lines` for the codes, then one for each WORDS words of scales."""
    part = tl.program_id(1)
    if part < lines:
        _codes(part, src_ptr, out_ptr, n, high, words, row_stride, line_stride, FILL, E2M1, ROWS)
    else:
        _scales(
            part - lines, tl.num_programs(1) - lines, scale_ptr, zero_ptr, scale_out_ptr, zero_out_ptr, wrong_ptr,
            n, high, groups, scale_words, scale_stride,
            FIELDS, WIDTH, MASK, LARGEST, SIGN, RAISED, E4M3, ZERO, ROWS, WORDS,
        )  # fmt: skip
