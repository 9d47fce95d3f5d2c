"""Triton kernel of wxa16.py for shapes whose tiles do not fill the multiprocessors evenly: Stream-K (arXiv 2301.03598).

As many programs as there are multiprocessors, or twice as many. Tiles that are left over from whole rounds are cut into
as many equal parts as there are programs, along the columns and across tiles; then each program has whole tiles. A tile
that several programs share is added up by the one that comes last, in the order of its parts: the same bits every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels._wxa16 import _place, finish, product, tile_rows, token_columns


@triton.jit
def first_unit(program: tl.tensor, programs: tl.tensor, units: tl.tensor) -> tl.tensor:
    """Of the units that are shared out evenly (int64), the first one of a program."""
    return (program * units // programs).to(tl.int32)


@triton.jit
def program_of(unit: tl.tensor, programs: tl.tensor, units: tl.tensor) -> tl.tensor:
    """Which program has a unit: the inverse of `first_unit`."""
    return (((unit + 1) * programs - 1) // units).to(tl.int32)


@triton.jit
def added(
    part_ptr: tl.tensor,
    place: tl.tensor,
    start: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    programs: tl.tensor,
    units: tl.tensor,
) -> tl.tensor:
    """The sum of what programs first to last have left of the tile that begins with unit `start`, in their order."""
    SIZE: tl.constexpr = place.shape[0] * place.shape[1]
    acc = tl.zeros(place.shape, tl.float32)
    for other in tl.range(first, last + 1, num_stages=1):
        slot = 2 * other + (first_unit(other, programs, units) <= start).to(tl.int32)
        acc += tl.load(part_ptr + slot.to(tl.int64) * SIZE + place, cache_modifier=".cg")
    return acc


@triton.jit(do_not_specialize=["m"])  # its value would decide what is compiled
def gemm_stream(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    s_ptr: tl.tensor,
    z_ptr: tl.tensor,
    global_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    part_ptr: tl.tensor,
    count_ptr: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    n_padded: tl.tensor,
    k: tl.tensor,
    n_lines: tl.tensor,
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
    GROUP_M: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    GLOBAL: tl.constexpr,
    MMA_SYNC: tl.constexpr,
) -> None:
    """All tiles of y, BM tokens by BN rows of W, shared by all programs. Arguments as of `_wxa16.gemm`, but

    part   two tiles of float32 a program: slot 1 for what begins with a tile's first columns, slot 0 for the rest
    count  a counter for each tile that is left over, at zero before and after
    """
    me, programs = tl.program_id(0), tl.num_programs(0)
    m_tiles, n_tiles, steps = tl.cdiv(m, BM), tl.cdiv(n, BN), tl.cdiv(n_lines, UNROLL)
    shared = m_tiles * n_tiles % programs  # tiles that are left over come first
    units = tl.cast(shared * steps, tl.int64)
    sharers = tl.maximum(tl.minimum(units, programs), 1)  # each has a unit; int64
    own = first_unit(tl.minimum(me, sharers), sharers, units)
    after = first_unit(tl.minimum(me + 1, sharers), sharers, units)
    pieces = tl.where(after > own, (after - 1) // steps - own // steps + 1, 0)
    place = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    for piece in range(pieces + m_tiles * n_tiles // programs):
        tile = tl.where(piece < pieces, own // steps + piece, shared + me + (piece - pieces) * programs)
        start = tile * steps
        begin = tl.where(piece < pieces, tl.maximum(own - start, 0), 0)
        end = tl.where(piece < pieces, tl.minimum(after - start, steps), steps)
        pn, pm = _place(tile, m_tiles, n_tiles, GROUP_M)
        row, words_row, sums_row = tile_rows(pn, n_padded, BN, WARPS)
        token = pm * BM + tl.arange(0, BM)
        exists = token[:, None] < m
        x_base, x_offset = token_columns(x_ptr, pm * BM, m, x_stride, BM, LINE)
        x_base += begin * UNROLL * LINE
        acc = product(
            x_base, x_offset, exists, w_ptr, s_ptr, z_ptr, words_row, sums_row, begin, end, n_padded, k, n_lines,
            CODE, DT, SCALE, LINE, GROUP, SPAN, WIDTH, FIELDS, ZERO, HOW, WHERE, ASM, UNROLL, WARPS, EVEN, MMA_SYNC,
        )  # fmt: skip
        last = end - begin == steps
        if end - begin < steps:
            slot = 2 * me + (begin == 0).to(tl.int32)
            tl.store(part_ptr + slot.to(tl.int64) * (BN * BM) + place, acc)
            tl.debug_barrier()  # all threads have stored before one of them says so
            low, high = program_of(start, sharers, units), program_of(start + steps - 1, sharers, units)
            last = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == high - low
            if last:
                acc = added(part_ptr, place, start, low, high, sharers, units)
                tl.store(count_ptr + tile, 0)
        if last:
            acc = finish(
                acc, s_ptr, global_ptr, bias_ptr, row, sums_row, n, DT, SCALE, ZERO, WHERE, BIAS, GLOBAL
            )  # fmt: skip
            at = y_ptr + token.to(tl.int64)[:, None] * n + row[None, :]
            tl.store(at, acc.T.to(y_ptr.dtype.element_ty), exists & (row[None, :] < n))
