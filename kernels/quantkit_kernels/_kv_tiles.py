"""Triton functions for tiles of a cache of keys and values: where their tokens lie, and their codes as fp16."""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels._kv_layout import key_channel, keys, values


@triton.jit
def place(
    table_ptr: tl.tensor,
    page: tl.tensor,
    n0: tl.tensor,
    n: tl.tensor,
    length: tl.tensor,
    page_stride: tl.tensor,
    row_stride: tl.tensor,
    UNIT: tl.constexpr,
    PAGE: tl.constexpr,
    BN: tl.constexpr,
) -> tl.tensor:
    """Offsets of tokens n0 + n, int64, where a row holds UNIT tokens. `page` is the tile's, when it has only one."""
    if PAGE == 0:
        found = tl.cast(n0 // UNIT, tl.int64) * row_stride + (n // UNIT).to(tl.int64) * row_stride
    elif PAGE % BN == 0:
        found = page * page_stride + (n0 % PAGE // UNIT) * row_stride + (n // UNIT).to(tl.int64) * row_stride
    else:
        token = n0 + n
        pages = tl.load(table_ptr + token // PAGE, token < length, 0).to(tl.int64)
        found = pages * page_stride + (token % PAGE // UNIT) * row_stride
    return found


@triton.jit
def page_of(table_ptr: tl.tensor, n: tl.tensor, length: tl.tensor, PAGE: tl.constexpr, BN: tl.constexpr) -> tl.tensor:
    """The page of a tile that begins with token n; 0 where there is none, or several."""
    page = tl.full((), 0, tl.int64)
    if PAGE > 0 and PAGE % BN == 0:
        page = tl.load(table_ptr + n // PAGE, n < length, 0).to(tl.int64)
    return page


@triton.jit
def within(n: tl.tensor, low: tl.tensor, length: tl.tensor) -> tl.tensor:
    """low <= n < length, by one comparison."""
    return (n - low).to(tl.uint32, bitcast=True) < (length - low).to(tl.uint32, bitcast=True)


@triton.jit
def scale_and_zero(at: tl.tensor, here: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """int32 of two bf16 -> scale, zero point, fp32; both 0 where there is no token."""
    word = tl.load(at, here, 0)
    return (word & -65536).to(tl.float32, bitcast=True), (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def power_of(size: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of a positive normal fp32 its exponent e, in fp32, 2^e and 2^-e; of a zero e = -127 and 0 for 2^e."""
    bits = size.to(tl.int32, bitcast=True) & 0x7F800000
    power, inverse = bits.to(tl.float32, bitcast=True), ((254 << 23) - bits).to(tl.float32, bitcast=True)
    return ((bits >> 23) - 127).to(tl.float32), power, inverse


@triton.jit
def columns_in_two(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """(R, C) -> its first and its last C / 2 columns, without an exchange between threads."""
    return tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def rows_in_two(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """(R, C) -> its first and its last R / 2 rows, without an exchange between threads."""
    return tl.split(x.reshape(2, x.shape[0] // 2, x.shape[1]).permute(1, 2, 0))


@triton.jit
def queries(
    at: tl.tensor, asked: tl.tensor, FORMAT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Queries (BM, BD), channels in the order of the keys, zeros outside; and what each has been divided by."""
    channel = key_channel(tl.arange(0, BD), FORMAT)
    q = tl.load(at[:, None] + channel[None, :], asked[:, None] & (channel < D)[None, :], 0.0)
    divisor = tl.full((q.shape[0],), 1.0, tl.float32)
    if FORMAT != "none":
        wide = q.to(tl.float32)
        _, divisor, inverse = power_of(tl.max(tl.abs(wide), 1))
        q = (wide * inverse[:, None]).to(tl.float16)
    return q, divisor


@triton.jit
def key_tile(
    at: tl.tensor,
    here: tl.tensor,
    FORMAT: tl.constexpr,
    ASM: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    NW: tl.constexpr,
) -> tl.tensor:
    """Keys (BN, BD), channels in their order; zeros where there is no token, or no channel."""
    if FORMAT == "none":
        column = tl.arange(0, BD)
        mask = here[:, None] & (column < D)[None, :] if BD != D else here[:, None]
        k = tl.load(at[:, None] + column[None, :], mask, 0.0)
    else:
        PER: tl.constexpr = 8 if FORMAT == "int4" else 4
        SLAB: tl.constexpr = min(16, BD // PER)
        column, slab = tl.arange(0, SLAB), tl.arange(0, at.shape[0]) // BN * SLAB
        mask = here[:, None]
        if BD != D:  # four words at once, which the compiler is to see
            mask &= (slab[:, None] + column[None, :] // 4 * 4) * PER < D
        k = keys(tl.load(at[:, None] + slab[:, None] + column[None, :], mask, 0), BN, BD, FORMAT, ASM, NW)
    return k


@triton.jit
def value_tile(
    at: tl.tensor,
    n: tl.tensor,
    low: tl.tensor,
    length: tl.tensor,
    FORMAT: tl.constexpr,
    ASM: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    NW: tl.constexpr,
) -> tl.tensor:
    """Values (BD, BN), or (BN, BD) of 16 bits; zeros where no token is. `n`: the first token of each row of `at`."""
    if FORMAT == "none":
        column = tl.arange(0, BD)
        here = within(n, low, length)
        mask = here[:, None] & (column < D)[None, :] if BD != D else here[:, None]
        v = tl.load(at[:, None] + column[None, :], mask, 0.0)
    else:
        PER: tl.constexpr = 8 if FORMAT == "int4" else 4
        row, column = tl.arange(0, at.shape[0]) % (BD // PER), tl.arange(0, 16)
        here = (n + 15 >= low) & (n < length)
        if BD != D:
            here &= row * PER < D
        word = tl.load(at[:, None] + (row * 16)[:, None] + column[None, :], here[:, None], 0)
        if FORMAT == "fp8":  # an e4m3 in an unused slot can be NaN, and 0 * NaN is NaN
            token = n[:, None] + column[None, :] // 4 * 4
            for j in tl.static_range(4):
                used = within(token + j, low, length)
                word = tl.where(used, word, word & (-1 - (255 << (8 * j)) if j < 3 else 0x00FFFFFF))
        v = values(word, BN, BD, FORMAT, ASM, NW)
    return v
