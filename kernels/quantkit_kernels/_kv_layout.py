"""Codes of keys and values in Triton: how words become fp16 in a tensor core's order, and how new tokens become codes.

Why indices look as they do: a thread loads 16 bytes, and they are the fragments that the tensor cores want of it. A
word's elements are therefore places (hi, b) of 4 t + 2 hi + b in a step of 16, t the thread of its quad, and channels
and tokens are counted in that order. The query and the scores follow, where reordering costs nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels._rounding import nearest, round_even, stored

# Words to pairs of fp16; the operand after the word is what is added.
INT8_ASM = tl.constexpr(
    "{ .reg .b32 h; shr.u32 h, $2, 8; "
    "lop3.b32 $0, $2, 0x00ff00ff, 0x64806480, 0x6a; lop3.b32 $1, h, 0x00ff00ff, 0x64806480, 0x6a; "
    "add.f16x2 $0, $0, $3; add.f16x2 $1, $1, $3; }"
)
FP8_ASM = tl.constexpr("{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h; }")
INT4_ASM = tl.constexpr(
    "{ .reg .b32 x, y, z; shr.u32 x, $4, 4; shr.u32 y, $4, 8; shr.u32 z, $4, 12; "
    "lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea; lop3.b32 $1, x, 0x000f000f, 0x64006400, 0xea; "
    "lop3.b32 $2, y, 0x000f000f, 0x64006400, 0xea; lop3.b32 $3, z, 0x000f000f, 0x64006400, 0xea; "
    "add.f16x2 $0, $0, $5; add.f16x2 $1, $1, $5; add.f16x2 $2, $2, $5; add.f16x2 $3, $3, $5; }"
)
MINUS_1152 = tl.constexpr(-461314944)  # two fp16
MINUS_1024 = tl.constexpr(-469703680)
SMALLEST = tl.constexpr(2.0**-100)  # of a scale, so that neither it nor its inverse leaves float32's normal numbers


@triton.jit
def _halves(pair: tl.tensor) -> tl.tensor:
    """int32 (...) of two fp16 -> fp16 (..., 2), the low one first."""
    low = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    high = ((pair >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _fp8_pair(pair: tl.tensor) -> tl.tensor:
    """Two e4m3 in bits 0..7 and 16..23 of an int32 -> two fp16 of 1/256 of them; NaN stays NaN. For any GPU."""
    size = pair & 0x007F007F
    nan = (size + 0x00010001) & 0x00800080
    return ((pair & 0x00800080) << 8) | (size << 7) | ((nan << 8) - (nan << 2))


@triton.jit
def pairs(
    word: tl.tensor, FORMAT: tl.constexpr, ASM: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """int32 words -> int32 of two fp16 each: (hi = 0, 1) of 8-bit codes, the last two again the first; of int4 four.

    int8  bytes 0, 2 | 1, 3, which is what one mask gives; fp16 0x64.. is 1024 and its last bit is a one
    fp8   bytes 0, 1 | 2, 3, which is what one instruction converts
    int4  nibbles 0, 4 | 1, 5 | 2, 6 | 3, 7
    """
    if FORMAT == "int8" and ASM:
        a, b = tl.inline_asm_elementwise(
            INT8_ASM,
            "=&r,=&r,r,r",
            [word, MINUS_1152],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        c, d = a, b
    elif FORMAT == "int8":
        a, b = (word & 0x00FF00FF) ^ 0x64806480, ((word >> 8) & 0x00FF00FF) ^ 0x64806480
        c, d = a, b
    elif FORMAT == "fp8" and ASM:
        a, b = tl.inline_asm_elementwise(
            FP8_ASM,
            "=r,=r,r",
            [word],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        c, d = a, b
    elif FORMAT == "fp8":
        a = _fp8_pair((word & 0xFF) | ((word & 0xFF00) << 8))
        b = _fp8_pair(((word >> 16) & 0xFF) | ((word >> 8) & 0xFF0000))
        c, d = a, b
    elif ASM:
        a, b, c, d = tl.inline_asm_elementwise(
            INT4_ASM,
            "=&r,=&r,=&r,=&r,r,r",
            [word, MINUS_1024],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        a, b = (word & 0x000F000F) | 0x64006400, ((word >> 4) & 0x000F000F) | 0x64006400
        c, d = ((word >> 8) & 0x000F000F) | 0x64006400, ((word >> 12) & 0x000F000F) | 0x64006400
    return a, b, c, d


@triton.jit
def unpack(word: tl.tensor, FORMAT: tl.constexpr, ASM: tl.constexpr) -> tl.tensor:
    """int32 words (...) -> fp16 (..., b, hi), int4 (..., b, hi, half of the word). Zero points are not taken off."""
    a, b, c, d = pairs(word, FORMAT, ASM)
    found = tl.join(_halves(a), _halves(b))
    if FORMAT == "int4":
        found = tl.join(found, tl.join(_halves(c), _halves(d)))
        if not ASM:
            found -= 1024.0
    elif FORMAT == "int8" and not ASM:
        found -= 1152.0
    elif FORMAT == "fp8" and not ASM:
        found *= 256.0  # the exponents' biases are 7 and 15
    return found


@triton.jit
def key_channel(x: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Channel of a head at place x of the order in which `keys` gives them."""
    t, hi, b = (x // 4) % 4, (x // 2) % 2, x % 2
    if FORMAT == "int4":
        word, nibble = (x // 32) % 4, 2 * ((x // 16) % 2) + hi + 4 * b
        channel = x - x % 128 + 64 * (word // 2) + 16 * t + 8 * (word % 2) + nibble
    elif FORMAT == "int8":
        channel = x - x % 64 + 16 * t + 4 * ((x // 16) % 4) + hi + 2 * b
    elif FORMAT == "fp8":
        channel = x - x % 64 + 16 * t + 4 * ((x // 16) % 4) + 2 * hi + b
    else:
        channel = x
    return channel


@triton.jit
def key_token(row: tl.tensor, FORMAT: tl.constexpr, NW: tl.constexpr) -> tl.tensor:
    """Token of a tile that row `row` of the words has: NW warps get rows 8 at a time, and want 16 of the tokens."""
    if FORMAT == "none":
        token = row
    else:
        half, warp = (row // (8 * NW)) % 2, (row // 8) % NW
        token = row - row % (16 * NW) + 16 * warp + 8 * half + row % 8
    return token


@triton.jit
def value_channel(x: tl.tensor, D: tl.constexpr, FORMAT: tl.constexpr, NW: tl.constexpr) -> tl.tensor:
    """Channel of a head at place x of the order in which `values` gives them."""
    lane, i0, i1, warp = x % 8, (x // 8) % 2, x // (D // 2), (x // 16) % NW
    if FORMAT == "int4":
        row = (x % (D // 2)) // (32 * NW) * (8 * NW) + 8 * warp + lane
        channel = (D // 2) * i1 + 4 * row + 2 * i0 + (x // (16 * NW)) % 2
    elif FORMAT == "none":
        channel = x
    else:
        row = (x % (D // 2)) // (16 * NW) * (8 * NW) + 8 * warp + lane
        channel = 4 * row + 2 * i1 + i0
    return channel


@triton.jit
def keys(
    word: tl.tensor, BN: tl.constexpr, D: tl.constexpr, FORMAT: tl.constexpr, ASM: tl.constexpr, NW: tl.constexpr
) -> tl.tensor:
    """Words (slabs * BN, words of a slab), rows in `key_token`'s order -> fp16 (BN, D), channels in `key_channel`'s."""
    found = unpack(word, FORMAT, ASM)
    if FORMAT == "int4":
        W: tl.constexpr = min(4, D // 32)
        found = found.reshape(
            D // (32 * W), BN // (16 * NW), 2, NW, 8, 4, W, 2, 2, 2
        )  # .. half, warp, 8, t, w, b, hi, .
        found = found.permute(1, 3, 2, 4, 0, 6, 9, 5, 8, 7)
    else:
        found = found.reshape(D // 64, BN // (16 * NW), 2, NW, 8, 4, 4, 2, 2)  # slab, rest, half, warp, 8, t, w, b, hi
        found = found.permute(1, 3, 2, 4, 0, 6, 5, 8, 7)
    return found.reshape(BN, D)


@triton.jit
def values(
    word: tl.tensor, BN: tl.constexpr, D: tl.constexpr, FORMAT: tl.constexpr, ASM: tl.constexpr, NW: tl.constexpr
) -> tl.tensor:
    """Words (BN / 16 blocks * rows, 16) -> fp16 (D, BN): channels in `value_channel`'s order, tokens in their own."""
    found = unpack(word, FORMAT, ASM)
    if FORMAT == "int4":
        found = found.reshape(
            BN // 16, D // (64 * NW), NW, 8, 4, 2, 2, 2, 2, 2
        )  # block, rest, warp, 8, t, i1, i0, b, hi, c
        found = found.permute(5, 1, 9, 2, 6, 3, 0, 4, 8, 7)
    else:
        found = found.reshape(BN // 16, D // (32 * NW), NW, 8, 4, 2, 2, 2, 2)  # block, rest, warp, 8, t, i1, i0, b, hi
        found = found.permute(5, 1, 2, 6, 3, 0, 4, 8, 7)
    return found.reshape(D, BN)


@triton.jit
def _joined(parts: tl.tensor, step: tl.constexpr) -> tl.tensor:
    """int32 (..., C) of small numbers -> (...), number c shifted by step * c."""
    shift = tl.arange(0, parts.shape[-1]) * step
    for _ in tl.static_range(len(parts.shape) - 1):
        shift = shift[None]
    return tl.sum(parts << shift, len(parts.shape) - 1)


@triton.jit
def pack_keys(codes: tl.tensor, D: tl.constexpr) -> tl.tensor:
    """int4 codes (16, D) in int32 -> words (16, D / 8)."""
    if D == 64:
        words = _joined(codes.reshape(16, 8, 8), 4)
    else:
        words = _joined(codes.reshape(16, D // 128, 2, 4, 2, 8), 4)  # token, slab, w1, t, w0, nibble
        words = words.permute(0, 1, 3, 2, 4).reshape(16, D // 8)
    return words


@triton.jit
def pack_values(codes: tl.tensor, FORMAT: tl.constexpr, D: tl.constexpr) -> tl.tensor:
    """Codes (16, D) of a block in int32, 8 or 4 bits of them in use -> its words, in their order."""
    if FORMAT == "int4":
        parts = codes.reshape(4, 2, 2, 2, D // 8, 2, 2).permute(4, 0, 3, 5, 2, 6, 1)  # row, t, i1, i0 | b, c, hi
        words = _joined(parts.reshape(D // 8, 4, 2, 2, 8), 4).reshape(2 * D)
    elif FORMAT == "int8":
        parts = codes.reshape(4, 2, 2, D // 4, 4).permute(3, 0, 4, 2, 1)  # row, t, i | b, hi
        words = _joined(parts.reshape(D // 4, 4, 4, 4), 8).reshape(4 * D)
    else:
        parts = codes.reshape(4, 4, D // 4, 4).permute(2, 0, 3, 1)  # row, t, i | token of four
        words = _joined(parts, 8).reshape(4 * D)
    return words


@triton.jit
def _codes(
    x: tl.tensor, size: tl.tensor, fixed: tl.tensor, FORMAT: tl.constexpr, SCALES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Codes of x (16, G, C) in int32, scales and zero points (16, G), as kv_layout.quantize; `size`: magnitudes."""
    zero = tl.zeros(size.shape, tl.float32)
    if FORMAT == "int4":
        low, high = tl.minimum(tl.min(x, 2), 0.0), tl.maximum(tl.max(x, 2), 0.0)
        scale = tl.maximum(stored(tl.div_rn(high - low, tl.full(size.shape, 15.0, tl.float32)), "bfloat16"), SMALLEST)
    elif SCALES == 1:
        scale = fixed + zero
    else:
        scale = tl.maximum(
            tl.div_rn(size, tl.full(size.shape, 448.0 if FORMAT == "fp8" else 127.0, tl.float32)), SMALLEST
        )
    if SCALES == 2:
        scale = tl.where(size == 0, 1.0, scale)
        scale = tl.where(tl.max((x != x).to(tl.int32), 2) > 0, float("nan"), scale)
    if FORMAT == "int4":
        zero = round_even(tl.div_rn(-low, scale))
    part = tl.div_rn(x, tl.broadcast_to(scale[:, :, None], x.shape))
    if FORMAT == "fp8":
        codes, _ = nearest(part, zero[:, :, None], True, -448.0, 448.0, 1.0, 8, -6, 3)
        codes = tl.where(part != part, 127, codes)
    elif FORMAT == "int8":
        codes, _ = nearest(part, zero[:, :, None], False, -127.0, 127.0, 1.0, 8, 0, 0)
        codes = codes & 255
    else:
        codes, _ = nearest(part, zero[:, :, None], False, 0.0, 15.0, 1.0, 4, 0, 0)
    return codes, scale, zero


@triton.jit
def _quantized(
    x: tl.tensor,
    scale_ptr: tl.tensor,
    at: tl.tensor,
    here: tl.tensor,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    GROUPS: tl.constexpr,
) -> tl.tensor:
    """Codes (16, D) of new rows x, zeros where there is none; their scales are written to scale_ptr + at."""
    fixed = tl.load(scale_ptr) if SCALES == 1 else 0.0
    wide = x.to(tl.float32).reshape(16, GROUPS, x.shape[1] // GROUPS)
    codes, scale, zero = _codes(wide, tl.max(tl.abs(wide), 2), fixed, FORMAT, SCALES)
    group = tl.arange(0, GROUPS)
    at = scale_ptr + at[:, None] * GROUPS + group[None, :]
    if FORMAT == "int4":
        word = scale.to(tl.int32, bitcast=True) | ((zero.to(tl.int32, bitcast=True) >> 16) & 0xFFFF)
        tl.store(at, word, here[:, None])
    elif SCALES == 2:
        tl.store(at, scale, here[:, None])
    return tl.where(here[:, None], codes.reshape(16, x.shape[1]), 0)


@triton.jit(do_not_specialize=["len_new", "capacity"])  # their values would decide what is compiled
def append(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    table_ptr: tl.tensor,
    start_ptr: tl.tensor,
    count_ptr: tl.tensor,
    len_new: tl.tensor,
    capacity: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_token: tl.tensor,
    k_cache_page: tl.tensor,
    k_cache_head: tl.tensor,
    k_cache_row: tl.tensor,
    v_cache_page: tl.tensor,
    v_cache_head: tl.tensor,
    v_cache_row: tl.tensor,
    k_scale_page: tl.tensor,
    k_scale_head: tl.tensor,
    v_scale_page: tl.tensor,
    v_scale_head: tl.tensor,
    table_batch: tl.tensor,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    GROUPS: tl.constexpr,
    PAGE: tl.constexpr,
    COUNTS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    """Program (block of 16 tokens, key head, batch): a block has one owner, so its words can be read and merged."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = tl.load(start_ptr + batch)
    count = tl.minimum(tl.load(count_ptr + batch), len_new) if COUNTS else len_new
    first = (start // 16 + tl.program_id(0)) * 16
    n, d = first + tl.arange(0, 16), tl.arange(0, BD)
    here = (n >= start) & (n < tl.minimum(start + count, capacity))
    if tl.max(here.to(tl.int32), 0) > 0:
        page, slot = batch, first
        if PAGE > 0:
            page = tl.load(table_ptr + batch * table_batch + first // PAGE).to(tl.int64)
            slot = first % PAGE
        k_at = (
            k_ptr
            + batch * k_batch
            + head.to(tl.int64) * k_head
            + (n - start).to(tl.int64)[:, None] * k_token
            + d[None, :]
        )
        v_at = (
            v_ptr
            + batch * v_batch
            + head.to(tl.int64) * v_head
            + (n - start).to(tl.int64)[:, None] * v_token
            + d[None, :]
        )
        new = here[:, None] & (d < D)[None, :]
        k, v = tl.load(k_at, new, 0.0), tl.load(v_at, new, 0.0)
        row = slot + tl.arange(0, 16).to(tl.int64)
        k_to = k_cache_ptr + page * k_cache_page + head.to(tl.int64) * k_cache_head + row[:, None] * k_cache_row
        v_to = v_cache_ptr + page * v_cache_page + head.to(tl.int64) * v_cache_head
        if FORMAT == "none":
            tl.store(k_to + d[None, :], k.to(k_cache_ptr.dtype.element_ty), new)
            tl.store(v_to + row[:, None] * v_cache_row + d[None, :], v.to(v_cache_ptr.dtype.element_ty), new)
        else:
            scale_at = k_scale_ptr + page * k_scale_page + head * k_scale_head
            codes = _quantized(k, scale_at, row, here, FORMAT, SCALES, GROUPS)
            if FORMAT == "int4":
                word = tl.arange(0, BD // 8)
                tl.store(k_to + word[None, :], pack_keys(codes, BD), here[:, None])
            else:
                tl.store(k_to + d[None, :], codes.to(tl.int8), new)
            scale_at = v_scale_ptr + page * v_scale_page + head * v_scale_head
            words = pack_values(_quantized(v, scale_at, row, here, FORMAT, SCALES, GROUPS), FORMAT, BD)
            full = tl.where(here, 15 if FORMAT == "int4" else 255, 0)
            kept = ~pack_values(tl.broadcast_to(full[:, None], (16, BD)), FORMAT, BD)
            word = tl.arange(0, BD * 2 if FORMAT == "int4" else BD * 4)
            mask = word < (D * 2 if FORMAT == "int4" else D * 4)
            to = v_to + (slot // 16) * v_cache_row + word
            old = tl.load(to, mask & (kept != 0), 0)
            tl.store(to, words | (old & kept), mask & (kept != -1))


@triton.jit
def decoded(word_ptr: tl.tensor, out_ptr: tl.tensor, FORMAT: tl.constexpr, ASM: tl.constexpr, N: tl.constexpr) -> None:
    """The elements of N words a program, in `unpack`'s order: assembly and integers are to give the same bits."""
    at = tl.program_id(0) * N + tl.arange(0, N)
    PER: tl.constexpr = 8 if FORMAT == "int4" else 4
    found = unpack(tl.load(word_ptr + at), FORMAT, ASM).reshape(N, PER)
    tl.store(out_ptr + at[:, None] * PER + tl.arange(0, PER)[None, :], found)
