"""Triton kernels of grouped.py: rows of x lie by expert, and every expert has a weight of its own.

The grid is as large as any distribution of the rows needs; which expert's tile a program makes it finds out itself,
from the offsets: nobody on the host has to know them, and a graph that was captured goes on with other ones. Programs
that are left over end at once. The rows behind the last expert are a group of their own, whose tiles are zeros.

wxa16   tiles and inner loop are those of _wxa16.py, at the place of the expert's weight
w8a8    as `small` of _w8a8.py: acc (N, M) = w xᵀ
SPLIT programs may share a tile: they leave their sums in a workspace, and the one that comes last, by a counter, adds
them in their order: the same bits every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantkit_kernels import layout
from quantkit_kernels._grouped_choice import tile_bound
from quantkit_kernels._w8a8 import product as product_8
from quantkit_kernels._w8a8 import written
from quantkit_kernels._w8a8_choice import Config, device_of
from quantkit_kernels._wxa16 import _place, finish, product, tile_rows, token_columns
from quantkit_kernels.choice import Choice, gpu_of, mma_sync
from quantkit_kernels.layout import Packed
from quantkit_kernels.wxa16 import FARTHEST, constants

GROUP_M = 8  # tiles of an expert below each other that go over the rows of its weight together
STAYS = 1 << 23  # bytes of x that stay in the L2 cache, and may be read again for each tile across
LARGEST = 1 << 16  # a grid is smaller in its second dimension


@triton.jit
def _inside(row: tl.tensor, m: tl.tensor) -> tl.tensor:
    """A number of rows from 0 to m: wrong offsets are to make wrong sums, and no access outside."""
    return tl.minimum(tl.maximum(row, 0), m)


@triton.jit
def find_tile(
    offsets_ptr: tl.tensor,
    m: tl.tensor,
    experts: tl.tensor,
    n_tiles: tl.tensor,
    BM: tl.constexpr,
    GROUP_M: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """What a program makes: expert, first row of the tile, end of the expert's rows, tile across.

    offsets_ptr  (experts,) ends of the experts' rows
    GROUP_M      0: grid (slots, n_tiles, SPLIT), without a division. Else (slots n_tiles, 1, SPLIT), and so many of an
                 expert's tiles go over the rows of its weight together
    EXPERTS      a power of two, at least `experts`
    An expert from `experts` on means rows that are nobody's, or beyond the last of x: a program that is left over.
    """
    slot = tl.program_id(0) if GROUP_M == 0 else tl.program_id(0) // n_tiles
    e = tl.arange(0, EXPERTS)
    start = _inside(tl.load(offsets_ptr + e - 1, (e > 0) & (e < experts), 0), m)
    end = _inside(tl.load(offsets_ptr + e, e < experts, 0), m)
    before = tl.cumsum(tl.where(e < experts, tl.maximum(tl.cdiv(end - start, BM), 0), 0))
    # Experts whose tiles all come before this one are the first ones, so that the largest key says how many there are
    # and where the tiles of the next begin.
    key = tl.max(tl.where(before <= slot, before * (2 * EXPERTS) + e + 1, 0))
    expert, down = key % (2 * EXPERTS), slot - key // (2 * EXPERTS)
    first = _inside(tl.load(offsets_ptr + tl.minimum(expert, experts) - 1, expert > 0, 0), m)
    last = _inside(tl.load(offsets_ptr + expert, expert < experts, m), m)
    across = tl.program_id(1)
    if GROUP_M > 0:
        inside = tl.program_id(0) - key // (2 * EXPERTS) * n_tiles
        high = tl.maximum(tl.cdiv(last - first, BM), down + 1)  # the second for what is left over
        across, down = _place(inside, high, n_tiles, GROUP_M)
    return expert, first + down * BM, last, across


@triton.jit
def zeros(
    y_ptr: tl.tensor,
    token: tl.tensor,
    row: tl.tensor,
    exists: tl.tensor,
    n: tl.tensor,
) -> None:
    """Zeros in a tile of y, (tokens, rows of the weight)."""
    at = y_ptr + token.to(tl.int64)[:, None] * n + row[None, :]
    nothing = tl.zeros((token.shape[0], row.shape[0]), y_ptr.dtype.element_ty)
    tl.store(at, nothing, exists & (row[None, :] < n))


@triton.jit
def summed(
    acc: tl.tensor, part_ptr: tl.tensor, count_ptr: tl.tensor, SPLIT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """In the last of a tile's SPLIT programs the sum of their parts, and True; in the others False.

    part_ptr   (tiles, SPLIT, elements of acc), in its dtype;  count_ptr  (tiles,) int32 zeros
    """
    tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    WIDTH: tl.constexpr = acc.shape[1]
    SIZE: tl.constexpr = acc.shape[0] * acc.shape[1]
    place = tl.arange(0, acc.shape[0])[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    at = part_ptr + tile.to(tl.int64) * (SPLIT * SIZE) + place
    tl.store(at + tl.program_id(2) * SIZE, acc)
    tl.debug_barrier()  # all threads have stored before one of them says so
    last = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == SPLIT - 1
    total = acc
    if last:
        total = tl.load(at, cache_modifier=".cg")
        if SIZE <= 2048:  # so few that all are waited for together
            for part in tl.static_range(1, SPLIT):
                total += tl.load(at + part * SIZE, cache_modifier=".cg")
        else:
            for other in tl.range(1, SPLIT, num_stages=1):
                total += tl.load(at + other * SIZE, cache_modifier=".cg")
    return total, last


@triton.jit(do_not_specialize=["m"])  # its value would decide what is compiled
def wxa16(
    x_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    w_ptr: tl.tensor,
    s_ptr: tl.tensor,
    z_ptr: tl.tensor,
    global_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    part_ptr: tl.tensor,
    count_ptr: tl.tensor,
    m: tl.tensor,
    experts: tl.tensor,
    n: tl.tensor,
    n_padded: tl.tensor,
    k: tl.tensor,
    n_lines: tl.tensor,
    s_rows: tl.tensor,
    x_stride: tl.tensor,
    CODE: tl.constexpr,
    DT: tl.constexpr,
    SCALE: tl.constexpr,
    LINE: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    FIELDS: tl.constexpr,
    ZERO: tl.constexpr,
    HOW: tl.constexpr,
    WHERE: tl.constexpr,
    ASM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UNROLL: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP_M: tl.constexpr,
    EXPERTS: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    GLOBAL: tl.constexpr,
    MMA_SYNC: tl.constexpr,
) -> None:
    """One tile of y, BM tokens by BN rows of their expert's weight, or SPLIT's part of its sum.

    x (m, k) rows x_stride apart; y (m, n); codes, scales (s_rows of each), zero points, global scales and biases as one
    expert has them, one expert after the other; the rest as `_wxa16.product`. Grid: as `find_tile` says
    """
    expert, top, last, pn = find_tile(offsets_ptr, m, experts, tl.cdiv(n, BN), BM, GROUP_M, EXPERTS)
    row, words_row, sums_row = tile_rows(pn, n_padded, BN, WARPS)
    token = top + tl.arange(0, BM)
    exists = token[:, None] < last
    if expert >= experts:
        zeros(y_ptr, token, row, exists & (tl.program_id(2) == 0), n)
        return
    one = expert.to(tl.int64)
    w_ptr += one * n_lines * n_padded * (24 if CODE == "u3" else 16)
    s_ptr += one * s_rows * n_padded * WIDTH
    z_ptr += one * s_rows * n_padded * WIDTH
    each = tl.cdiv(tl.cdiv(n_lines, UNROLL), SPLIT)
    begin = tl.program_id(2) * each
    end = tl.minimum(begin + each, tl.cdiv(n_lines, UNROLL))
    # Wrong offsets are to make wrong sums, and no access outside.
    x_base, x_offset = token_columns(x_ptr, tl.minimum(top, m - 1), last, x_stride, BM, LINE)
    x_base += begin * UNROLL * LINE
    acc = product(
        x_base, x_offset, exists, w_ptr, s_ptr, z_ptr, words_row, sums_row, begin, end, n_padded, k, n_lines,
        CODE, DT, SCALE, LINE, GROUP, SPAN, WIDTH, FIELDS, ZERO, HOW, WHERE, ASM, UNROLL, WARPS, EVEN, MMA_SYNC,
    )  # fmt: skip
    complete = True
    if SPLIT > 1:
        acc, complete = summed(acc, part_ptr, count_ptr, SPLIT)
    if complete:
        acc = finish(
            acc, s_ptr, global_ptr + expert, bias_ptr + one * n, row, sums_row, n, DT, SCALE, ZERO, WHERE, BIAS, GLOBAL
        )  # fmt: skip
        at = y_ptr + token.to(tl.int64)[:, None] * n + row[None, :]
        tl.store(at, acc.T.to(y_ptr.dtype.element_ty), exists & (row[None, :] < n))


@triton.jit(do_not_specialize=["m"])
def w8a8(
    x_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    w_ptr: tl.tensor,
    y_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    w_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    part_ptr: tl.tensor,
    count_ptr: tl.tensor,
    m: tl.tensor,
    experts: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    x_stride: tl.tensor,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    PROMOTE: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP_M: tl.constexpr,
    EXPERTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """One tile (BN, BM) of a product of 8-bit codes, or the part of it that some columns make. Grid: `find_tile`."""
    expert, top, last, pn = find_tile(offsets_ptr, m, experts, tl.cdiv(n, BN), BM, GROUP_M, EXPERTS)
    token = top + tl.arange(0, BM)
    column = pn * BN + tl.arange(0, BN)
    exists = token[:, None] < last
    if expert >= experts:
        zeros(y_ptr, token, column, exists & (tl.program_id(2) == 0), n)
        return
    one = expert.to(tl.int64)
    steps = tl.cdiv(tl.cdiv(k, BK), SPLIT)
    inside = tl.arange(0, BK)
    first = tl.program_id(2) * steps * BK
    # Rows of the weight beyond its last are read as the last: nothing of them is written.
    w_row = tl.minimum(column, n - 1).to(tl.int64)[:, None] * k
    w_at = w_ptr + one * n * k + w_row + (first + inside)[None, :]
    x_at = x_ptr + token.to(tl.int64)[:, None] * x_stride + (first + inside)[None, :]
    acc = tl.zeros((BN, BM), tl.int32 if w_ptr.dtype.element_ty == tl.int8 else tl.float32)
    for start in range(first, tl.minimum(first + steps * BK, k), BK):
        if EVEN:
            w = tl.load(w_at)
            x = tl.load(x_at, exists, 0.0)
        else:
            left = (inside < k - start)[None, :]
            w = tl.load(w_at, left, 0.0)
            x = tl.load(x_at, exists & left, 0.0)
        acc = product_8(w, x.T, acc, PROMOTE)
        w_at += BK
        x_at += BK
    complete = True
    if SPLIT > 1:
        acc, complete = summed(acc, part_ptr, count_ptr, SPLIT)
    if complete:
        written(
            acc, token.to(tl.int64)[None, :], column[:, None], last, n, y_ptr, x_scale_ptr, w_scale_ptr + one * n,
            bias_ptr + one * n, bias_ptr, bias_ptr, 1, 1, BIAS, False,
        )  # fmt: skip


def linear(
    choice: Choice,
    x: torch.Tensor,
    offsets: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    assembly: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product of packed weights in one configuration, of arguments that the operator has checked.

    out_dtype  of the result, the dtype of x if None; float32 shows sums before they are rounded
    assembly   false: the plain twin of the unpacking, which is slow
    out        (M, N) contiguous of that dtype, to write into
    """
    experts, lines, high = packed.codes.shape[:3]
    m, n, k = x.shape[0], packed.n, packed.k
    x = x if k <= 1 or (x.stride(1) == 1 and x.stride(0) < FARTHEST) else x.contiguous()
    if out is None:
        out = torch.empty(m, n, dtype=out_dtype or x.dtype, device=x.device)
    if m * n == 0:
        return out
    grid, group_m = grid_of(x, n, experts, choice.block_m, choice.block_n, choice.split)
    part, count = workspace(grid, choice.block_m * choice.block_n, torch.float32, out)
    wxa16[grid](
        x,
        offsets,
        packed.codes,
        packed.scale,
        packed.scale if packed.zero is None else packed.zero,
        packed.scale if packed.global_scale is None else packed.global_scale,
        out if bias is None else bias,
        out,
        part,
        count,
        m,
        experts,
        n,
        high,
        k,
        lines,
        packed.scale.shape[1],
        x.stride(0),
        WHERE=choice.where,
        BM=choice.block_m,
        BN=choice.block_n,
        UNROLL=choice.unroll,
        SPLIT=choice.split,
        GROUP_M=group_m,
        EXPERTS=1 << (experts - 1).bit_length(),
        WARPS=choice.warps,
        EVEN=k == lines * layout.get(packed.kind).line and lines % choice.unroll == 0,
        BIAS=bias is not None,
        MMA_SYNC=mma_sync(choice.block_m, choice.warps, gpu_of(x.device)),
        num_warps=choice.warps,
        num_stages=choice.stages,
        **constants(packed, x.dtype, choice.where, assembly and x.is_cuda),
    )
    return out


def linear_8(
    config: Config,
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The product of 8-bit codes in one configuration, of arguments that the operator has checked."""
    (experts, n, k), m = weight.shape, x_q.shape[0]
    x_q = x_q if k <= 1 or x_q.stride(1) == 1 else x_q.contiguous()
    y = torch.empty(m, n, dtype=out_dtype, device=x_q.device)
    if m * n == 0:
        return y
    grid, group_m = grid_of(x_q, n, experts, config.bm, config.bn, config.split)
    total = torch.int32 if weight.dtype == torch.int8 else torch.float32
    part, count = workspace(grid, config.bm * config.bn, total, y)
    w8a8[grid](
        x_q,
        offsets,
        weight,
        y,
        x_scale.contiguous(),
        weight_scale.contiguous(),
        y if bias is None else bias,
        part,
        count,
        m,
        experts,
        n,
        k,
        x_q.stride(0),
        BIAS=bias is not None,
        EVEN=k % config.bk == 0,
        PROMOTE=device_of(x_q.device)[0] < (10, 0),
        SPLIT=config.split,
        GROUP_M=group_m,
        EXPERTS=1 << (experts - 1).bit_length(),
        BM=config.bm,
        BN=config.bn,
        BK=config.bk,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=False,
    )
    return y


def grid_of(
    x: torch.Tensor, n: int, experts: int, block_m: int, block_n: int, split: int
) -> tuple[tuple[int, int, int], int]:
    """The grid that holds any distribution of the rows, and GROUP_M of `find_tile`."""
    slots, across = tile_bound(x.shape[0], experts, block_m), -(-n // block_n)
    if x.numel() * x.element_size() <= STAYS and across < LARGEST:
        return (slots, across, split), 0
    return (slots * across, 1, split), GROUP_M


def workspace(
    grid: tuple[int, int, int], elements: int, dtype: torch.dtype, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the parts of every tile's sum, and a counter of zero for each; without a split nothing is read there."""
    tiles, split = grid[0] * grid[1], grid[2]
    if split == 1:
        return out, out
    part = torch.empty(tiles * split * elements, dtype=dtype, device=out.device)
    return part, torch.zeros(tiles, dtype=torch.int32, device=out.device)
