"""Triton kernels of wxa16.py: y = x Wᵀ with W decoded in registers, and W decoded to memory.

The product is taken as W xᵀ: the decoded weights are the operand that a tensor core takes from registers, and a weight
goes from memory to the tensor core without a second visit to shared memory. _unpack.py is where codes become floats.

SPLIT programs may share a tile of the output, each with some of the columns. They leave their sums in a workspace; the
one that comes last, by a counter, adds them in their order, whoever came when: the same bits every run. It also puts
the counter back to zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels._unpack import fragments, line_scales, row_order, scale_values, spread_plane, with_power


@triton.jit
def _place(
    tile: tl.tensor, m_tiles: tl.tensor, n_tiles: tl.tensor, GROUP_M: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Tile number to (row tile, token tile). GROUP_M token tiles go together over the rows; 0: one after the other."""
    if GROUP_M == 0:
        return tile % n_tiles, tile // n_tiles
    wide = GROUP_M * n_tiles
    first = tile // wide * GROUP_M
    size = tl.minimum(m_tiles - first, GROUP_M)
    return tile % wide // size, first + tile % wide % size


@triton.jit
def line_words(
    at: tl.tensor, plane_at: tl.tensor, inside: tl.tensor, CODE: tl.constexpr, EVEN: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Code words of one line, (ROWS, 16), and those with the third bits, "u3" only. Zeros beyond the last line."""
    p = tl.load(at) if EVEN else tl.load(at, inside, 0)
    if CODE != "u3":
        return p, p
    plane = tl.load(plane_at) if EVEN else tl.load(plane_at, inside, 0)
    return p, spread_plane(plane, at.shape[0])


@triton.jit
def line_pointers(
    w_ptr: tl.tensor, row: tl.tensor, line: tl.tensor, n_padded: tl.tensor, CODE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Where `line_words` finds one line of some rows, and by how much to go on for the next line."""
    stride = n_padded.to(tl.int64) * (24 if CODE == "u3" else 16)
    base = w_ptr + line * stride
    c = tl.arange(0, 8)[None, :]
    plane_at = base + n_padded * 16 + (row // 8 * 64 + row % 8 * 2)[:, None] + c // 2 * 16 + c % 2
    return base + row[:, None] * 16 + tl.arange(0, 16)[None, :], plane_at, stride


@triton.jit
def scale_row(line: tl.tensor, LINE: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """Where the scales of a line begin, in words of each row before it."""
    if SPAN == 0:
        return line.to(tl.uint32) * 0
    else:
        return line.to(tl.uint32) * LINE // SPAN * WIDTH


@triton.jit
def scale_field(line: tl.tensor, LINE: tl.constexpr, GROUP: tl.constexpr, FIELDS: tl.constexpr) -> tl.tensor:
    """Which field of its word is the scale of each of a line's 16 code words, (1, 16)."""
    word = tl.arange(0, 16)[None, :] & 3
    if FIELDS == 1:
        return word * 0
    elif GROUP >= LINE:
        return word * 0 + ((line // (GROUP // LINE)) & (FIELDS - 1))
    else:
        return ((line * (LINE // GROUP)) & (FIELDS - 1)) + (word * (LINE // 4) // GROUP) % FIELDS


@triton.jit
def tile_rows(
    pn: tl.tensor, n_padded: tl.tensor, BN: tl.constexpr, WARPS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Rows of the weight of a tile: in order; in the order of the words; in order, where there are such scales."""
    row = pn * BN + tl.arange(0, BN)
    words_row = pn * BN + row_order(tl.arange(0, BN), WARPS)
    return row, tl.minimum(words_row, n_padded - 1), tl.minimum(row, n_padded - 1)


@triton.jit
def token_columns(
    x_ptr: tl.tensor, first: tl.tensor, last: tl.tensor, x_stride: tl.tensor, BM: tl.constexpr, LINE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The first columns of BM tokens from `first` on: a scalar pointer, and offsets (BM, LINE) below 2^32.

    Tokens from `last` on are read as the last one: nothing of them is written, and a load needs no mask.
    """
    token = tl.maximum(tl.minimum(tl.arange(0, BM), last - 1 - first), 0)
    offset = (token[:, None] * x_stride + tl.arange(0, LINE)[None, :]).to(tl.uint32)
    return x_ptr + first.to(tl.int64) * x_stride, offset


@triton.jit
def product(
    x_base: tl.tensor,
    x_offset: tl.tensor,
    exists: tl.tensor,
    w_ptr: tl.tensor,
    s_ptr: tl.tensor,
    z_ptr: tl.tensor,
    words_row: tl.tensor,
    sums_row: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    n_padded: tl.tensor,
    k: tl.tensor,
    n_lines: tl.tensor,
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
    UNROLL: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN: tl.constexpr,
    MMA_SYNC: tl.constexpr,
) -> tl.tensor:
    """W xᵀ (rows, tokens) float32 of one tile, over the steps begin to end of UNROLL lines each.

    x_base, x_offset   as `token_columns`, from the first step on;  exists  (tokens, 1) which tokens there are
    w_ptr, s_ptr, z_ptr   one weight as layout.py lays it out
    words_row, sums_row   (rows,) of `tile_rows`
    LINE    columns of a line;  GROUP  columns of a scale, 0 for all;  SPAN, WIDTH, FIELDS  the Geometry of the scales
    HOW, ZERO, SCALE, DT, ASM   as in _unpack.py
    WHERE   "before": codes are decoded with their scale (HOW "mul" or "split"); else HOW is "raw", and
            "group": the sum over a group is scaled; "end": there is one scale a row, which `finish` applies
    EVEN    whether all steps are full: the columns fill the lines, and the lines the steps
    """
    TWO: tl.constexpr = GROUP > 0 and GROUP * 4 < LINE
    WHOLE: tl.constexpr = EVEN and SPAN > 0 and UNROLL * LINE % (SPAN + (SPAN == 0)) == 0  # a step has words of its own
    BN: tl.constexpr = words_row.shape[0]
    column = tl.arange(0, LINE)
    _, plane_at, stride = line_pointers(w_ptr, words_row, begin * UNROLL, n_padded, CODE)
    # Addresses that go on are scalars, and each lane's offsets stay as they are: most additions are done once a warp.
    w_base = w_ptr + begin * UNROLL * stride
    w_offset = (words_row[:, None] * 16 + tl.arange(0, 16)[None, :]).to(tl.uint32)
    s_offset = (words_row * WIDTH).to(tl.uint32)
    s_first = scale_row(begin * UNROLL, LINE, SPAN, WIDTH).to(tl.int64) * n_padded
    s_base, z_base = s_ptr + s_first, z_ptr + s_first
    sw = tl.zeros((BN, 1 if WIDTH == 1 else 16), tl.int32)
    zw = sw
    if GROUP == 0 and ZERO > 0:
        sw = line_scales(s_base + s_offset, 1)
        zw = line_scales(z_base + s_offset, 1) if ZERO == 2 else sw
    BM: tl.constexpr = x_offset.shape[0]
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(begin, end):
        for u in tl.static_range(UNROLL):
            line = step * UNROLL + u
            p, plane = line_words(w_base + u * stride + w_offset, plane_at + u * stride, line < n_lines, CODE, EVEN)
            if EVEN and BM >= 16:
                x = tl.load(x_base + u * LINE + x_offset)
            else:
                mask = exists if EVEN else exists & ((line * LINE + column)[None, :] < k)
                x = tl.load(x_base + u * LINE + x_offset, mask, 0.0)
            held = line if EVEN else tl.minimum(line, n_lines - 1)
            if GROUP > 0 and (HOW != "raw" or ZERO > 0):
                if WHOLE:
                    if u * LINE % SPAN == 0:
                        first = (u * LINE // SPAN) * WIDTH * n_padded
                        sw = line_scales(s_base + first + s_offset, WIDTH)
                        zw = line_scales(z_base + first + s_offset, WIDTH) if ZERO == 2 else sw
                else:
                    first = scale_row(held, LINE, SPAN, WIDTH).to(tl.int64) * n_padded + words_row * WIDTH
                    sw = line_scales(s_ptr + first, WIDTH)
                    zw = line_scales(z_ptr + first, WIDTH) if ZERO == 2 else sw
            field = scale_field(u if WHOLE else line, LINE, GROUP, FIELDS)
            s, z = tl.broadcast_to(sw, (BN, 16)), tl.broadcast_to(zw, (BN, 16))
            w = fragments(
                p, plane, s, z, field, CODE, DT, SCALE, HOW, ZERO, TWO, LINE // 32, ASM, WARPS, MMA_SYNC
            )  # fmt: skip
            if WHERE == "group":
                scales = _row_scales(s_ptr, sums_row, held, n_padded, LINE, GROUP, SPAN, FIELDS, SCALE, ZERO)
                acc += tl.dot(w, x.T) * scales
            else:
                acc = tl.dot(w, x.T, acc)
        x_base += UNROLL * LINE
        w_base += UNROLL * stride
        plane_at += UNROLL * stride
        if WHOLE:
            s_base += (UNROLL * LINE // SPAN) * WIDTH * n_padded
            z_base += (UNROLL * LINE // SPAN) * WIDTH * n_padded
    return acc


@triton.jit
def finish(
    acc: tl.tensor,
    s_ptr: tl.tensor,
    global_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    row: tl.tensor,
    sums_row: tl.tensor,
    n: tl.tensor,
    DT: tl.constexpr,
    SCALE: tl.constexpr,
    ZERO: tl.constexpr,
    WHERE: tl.constexpr,
    BIAS: tl.constexpr,
    GLOBAL: tl.constexpr,
) -> tl.tensor:
    """What is left to do with the sums of `product`: powers of two, one scale a row, the global scale, the bias.

    GLOBAL  0: there is no global scale; 1: one divides all rows; 2: each row has its own
    """
    acc = with_power(acc, DT, SCALE)
    if WHERE == "end":
        scale, _ = scale_values(tl.load(s_ptr + sums_row)[:, None], 0, "", SCALE, ZERO, False)
        acc *= scale
    if GLOBAL == 1:
        acc /= tl.load(global_ptr)
    elif GLOBAL == 2:
        acc /= tl.load(global_ptr + row, row < n, 1.0)[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + row, row < n, 0.0).to(tl.float32)[:, None]
    return acc


@triton.jit(do_not_specialize=["m"])  # its value would decide what is compiled
def gemm(
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
    SPLIT: tl.constexpr,
    GROUP_M: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    GLOBAL: tl.constexpr,
    MMA_SYNC: tl.constexpr,
) -> None:
    """One tile of y, BM tokens by BN rows of W, or SPLIT's part of its sum.

    x (m, k) rows x_stride apart; y (m, n); part, count: the workspace, counters at zero; the rest as `product`
    """
    tile = tl.program_id(0)
    pn, pm = _place(tile, tl.cdiv(m, BM), tl.cdiv(n, BN), GROUP_M)
    row, words_row, sums_row = tile_rows(pn, n_padded, BN, WARPS)
    token = pm * BM + tl.arange(0, BM)
    exists = token[:, None] < m
    each = tl.cdiv(tl.cdiv(n_lines, UNROLL), SPLIT)
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, tl.cdiv(n_lines, UNROLL))
    x_base, x_offset = token_columns(x_ptr, pm * BM, m, x_stride, BM, LINE)
    x_base += begin * UNROLL * LINE
    acc = product(
        x_base, x_offset, exists, w_ptr, s_ptr, z_ptr, words_row, sums_row, begin, end, n_padded, k, n_lines,
        CODE, DT, SCALE, LINE, GROUP, SPAN, WIDTH, FIELDS, ZERO, HOW, WHERE, ASM, UNROLL, WARPS, EVEN, MMA_SYNC,
    )  # fmt: skip
    last = True
    if SPLIT > 1:
        place = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        part_at = part_ptr + tile.to(tl.int64) * (SPLIT * BN * BM) + place
        tl.store(part_at + tl.program_id(1) * (BN * BM), acc)
        tl.debug_barrier()  # all threads have stored before one of them says so
        last = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == SPLIT - 1
    if last:
        if SPLIT > 1:
            acc = tl.zeros((BN, BM), tl.float32)
            if BN * BM <= 512 * WARPS:  # so few that all are waited for together
                for part in tl.static_range(SPLIT):
                    acc += tl.load(part_at + part * (BN * BM), cache_modifier=".cg")
            else:
                for other in tl.range(0, SPLIT, num_stages=1):
                    acc += tl.load(part_at + other * (BN * BM), cache_modifier=".cg")
            tl.store(count_ptr + tile, 0)
        acc = finish(
            acc, s_ptr, global_ptr, bias_ptr, row, sums_row, n, DT, SCALE, ZERO, WHERE, BIAS, GLOBAL
        )  # fmt: skip
        at = y_ptr + token.to(tl.int64)[:, None] * n + row[None, :]
        tl.store(at, acc.T.to(y_ptr.dtype.element_ty), exists & (row[None, :] < n))


@triton.jit
def _row_scales(
    s_ptr: tl.tensor,
    row: tl.tensor,
    line: tl.tensor,
    n_padded: tl.tensor,
    LINE: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    FIELDS: tl.constexpr,
    SCALE: tl.constexpr,
    ZERO: tl.constexpr,
) -> tl.tensor:
    """The scale of each row in one line, which belongs to one group: (rows, 1) float32."""
    sw = tl.load(s_ptr + scale_row(line, LINE, SPAN, 1).to(tl.int64) * n_padded + row)[:, None]
    index = (line // (GROUP // LINE)) & (FIELDS - 1) if FIELDS > 1 else 0
    first, _ = scale_values(sw, index, "", SCALE, ZERO, False)
    return first


@triton.jit(do_not_specialize=["first_row"])
def dequantize(
    w_ptr: tl.tensor,
    s_ptr: tl.tensor,
    z_ptr: tl.tensor,
    global_ptr: tl.tensor,
    out_ptr: tl.tensor,
    first_row: tl.tensor,
    n: tl.tensor,
    n_padded: tl.tensor,
    k: tl.tensor,
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
    BN: tl.constexpr,
    WARPS: tl.constexpr,
    GLOBAL: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """Rows first_row to n of the weight, BN of them and one line a program, to out (rows, k) in DT."""
    TWO: tl.constexpr = GROUP > 0 and GROUP * 4 < LINE
    line = tl.program_id(0)
    start = tl.program_id(1) * BN
    words_row = tl.minimum(first_row + start + row_order(tl.arange(0, BN), WARPS), n_padded - 1)
    at, plane_at, _ = line_pointers(w_ptr, words_row, line, n_padded, CODE)
    p, plane = line_words(at, plane_at, True, CODE, True)
    s_row = scale_row(line, LINE, SPAN, WIDTH).to(tl.int64) * n_padded + words_row * WIDTH
    s = tl.broadcast_to(line_scales(s_ptr + s_row, WIDTH), (BN, 16))
    z = tl.broadcast_to(line_scales(z_ptr + s_row, WIDTH), (BN, 16)) if ZERO == 2 else s
    field = scale_field(line, LINE, GROUP, FIELDS)
    w = fragments(p, plane, s, z, field, CODE, DT, SCALE, HOW, ZERO, TWO, LINE // 32, ASM, WARPS, False).to(tl.float32)
    w = with_power(w, DT, SCALE)
    row = start + tl.arange(0, BN)
    if GLOBAL == 1:
        w /= tl.load(global_ptr)
    elif GLOBAL == 2:
        w /= tl.load(global_ptr + first_row + row, first_row + row < n, 1.0)[:, None]
    column = line * LINE + tl.arange(0, LINE)
    out_at = out_ptr + row.to(tl.int64)[:, None] * k + column[None, :]
    tl.store(out_at, w.to(out_ptr.dtype.element_ty), (first_row + row < n)[:, None] & (column < k)[None, :])
