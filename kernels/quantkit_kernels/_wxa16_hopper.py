"""Gluon kernel of wxa16.py for 4-bit weights and many tokens on Hopper: decodes while the tensor cores work.

What Triton makes of `_wxa16.gemm` decodes a line, multiplies it, waits, and decodes the next. Here the product of half
a line (64 columns) is started, and while the tensor cores work on it the other half is decoded. Two groups of four
warps are half a line apart, so that one's product follows the other's; in tiles of 256 tokens each group has a product
of its own under way at any time, and waits for the one before it only. Tokens come by the copy engine (TMA), lines
ahead; words straight into the registers of the lanes that decode them.

Tiles that are left over from whole rounds are cut into equal parts, one a program (Stream-K, arXiv 2301.03598). The
program with a tile's last part adds the others' to its own, in their order, and writes the tile: the same bits every
run. It waits for the others, which have lower numbers and do such parts first: never for one that has not started.

    x_desc   (m, k), blocks of (BM, 128);  y_desc  (m, n), blocks of (64, BN), or (32, BN)
    w_ptr, s_ptr   words and words with scales, as layout.py lays them out
    part     BN * BM float32 a program;  count  a counter for each tile that is left over, at zero before and after
    other constants as of `_wxa16.gemm`; WHERE is "before" or, with a scale a row, "end"
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from quantkit_kernels._hopper_words import decoded, halves, scales, select, words_layout

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name until Triton 3.6


@gluon.jit
def _first_unit(program: gl.tensor, programs: gl.tensor, units: gl.tensor) -> gl.tensor:
    """Of the units that are shared out evenly, the first one of a program. hopper_fits keeps products below 2^31."""
    return program * units // programs


@gluon.jit
def _program_of(unit: gl.tensor, programs: gl.tensor, units: gl.tensor) -> gl.tensor:
    """Which program has a unit: the inverse of `_first_unit`."""
    return ((unit + 1) * programs - 1) // units


@gluon.jit
def _place(
    tile: gl.tensor, m_tiles: gl.tensor, n_tiles: gl.tensor, GROUP_M: gl.constexpr
) -> tuple[gl.tensor, gl.tensor]:
    """Tile number to (row tile, token tile), as `_wxa16._place`."""
    if GROUP_M == 0:
        return tile % n_tiles, tile // n_tiles
    else:
        wide = GROUP_M * n_tiles
        first = tile // wide * GROUP_M
        size = gl.minimum(m_tiles - first, GROUP_M)
        return tile % wide // size, first + tile % wide % size


@gluon.jit
def _piece(
    i: gl.tensor,
    me: gl.tensor,
    programs: gl.tensor,
    pieces: gl.tensor,
    own: gl.tensor,
    after: gl.tensor,
    shared: gl.tensor,
    n_lines: gl.tensor,
) -> tuple[gl.tensor, gl.tensor, gl.tensor]:
    """The i-th piece of work of a program: tile, first line, line after the last. Shared tiles first, from the last."""
    part = own // n_lines + pieces - 1 - i
    tile = gl.where(i < pieces, part, shared + me + (i - pieces) * programs)
    begin = gl.where(i < pieces, gl.maximum(own - tile * n_lines, 0), 0)
    end = gl.where(i < pieces, gl.minimum(after - tile * n_lines, n_lines), n_lines)
    return tile, begin, end


@gluon.jit
def _fetch(
    x_desc: tma.tensor_descriptor,
    tokens: gl.shared_memory_descriptor,
    ready: gl.shared_memory_descriptor,
    slot: gl.tensor,
    line: gl.tensor,
    token: gl.tensor,
    wanted: gl.tensor,
) -> None:
    """Starts the copy of the tokens' columns in one line into a slot of the ring."""
    mbarrier.expect(ready.index(slot), x_desc.block_type.nbytes, wanted)
    tma.async_copy_global_to_shared(x_desc, [token, line * 128], ready.index(slot), tokens.index(slot), wanted)


@gluon.jit
def _fetch_first(
    x_desc: tma.tensor_descriptor,
    tokens: gl.shared_memory_descriptor,
    ready: gl.shared_memory_descriptor,
    slot: gl.tensor,
    begin: gl.tensor,
    end: gl.tensor,
    token: gl.tensor,
    STAGES: gl.constexpr,
) -> None:
    """Starts the copies of the first lines of a piece, from `slot` on, all but the last slot."""
    for i in gl.static_range(STAGES - 1):
        to = gl.where(slot + i >= STAGES, slot + i - STAGES, slot + i)
        _fetch(x_desc, tokens, ready, to, begin + i, token, begin + i < end)


@gluon.jit
def _row_scale(s_ptr: gl.tensor, row: gl.tensor, n_padded: gl.tensor, SCALE: gl.constexpr) -> gl.tensor:
    """The one scale of each row, float32."""
    bits = gl.load(s_ptr + gl.minimum(row, n_padded - 1)).to(gl.uint32, bitcast=True)
    if SCALE == "bf16":
        return (bits << 16).to(gl.float32, bitcast=True)
    elif SCALE == "fp16":
        return (bits & 0xFFFF).to(gl.uint16).to(gl.float16, bitcast=True).to(gl.float32)
    else:
        return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _finished(
    acc: gl.tensor,
    s_ptr: gl.tensor,
    global_ptr: gl.tensor,
    bias_ptr: gl.tensor,
    row: gl.tensor,
    n: gl.tensor,
    n_padded: gl.tensor,
    DT: gl.constexpr,
    SCALE: gl.constexpr,
    WHERE: gl.constexpr,
    BIAS: gl.constexpr,
    GLOBAL: gl.constexpr,
) -> gl.tensor:
    """As `_wxa16.finish`: powers of two, one scale a row, the global scale, the bias."""
    if DT == "bf16":  # the power of two that the weights lack, 103 or 40
        acc *= 1.0141204801825835e31 if SCALE == "e4m3" else 1099511627776.0
    if WHERE == "end":
        acc *= _row_scale(s_ptr, row, n_padded, SCALE)[:, None]
    if GLOBAL == 1:
        acc /= gl.load(global_ptr)
    elif GLOBAL == 2:
        acc /= gl.load(global_ptr + row, row < n, 1.0)[:, None]
    if BIAS:
        acc += gl.load(bias_ptr + row, row < n, 0.0).to(gl.float32)[:, None]
    return acc


@gluon.jit
def _product(
    tokens: gl.shared_memory_descriptor,
    ready: gl.shared_memory_descriptor,
    slot: gl.tensor,
    phase: gl.tensor,
    x_desc: tma.tensor_descriptor,
    w_ptr: gl.tensor,
    s_ptr: gl.tensor,
    begin: gl.tensor,
    end: gl.tensor,
    token: gl.tensor,
    w_row: gl.tensor,
    n_padded: gl.tensor,
    DT: gl.constexpr,
    SCALE: gl.constexpr,
    GROUP: gl.constexpr,
    SPAN: gl.constexpr,
    WIDTH: gl.constexpr,
    FIELDS: gl.constexpr,
    HOW: gl.constexpr,
    ASM: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    C: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor]:
    """W xᵀ (BN, BM) float32 of one tile over the lines begin to end, and the next slot of the ring with its phase.

    `_fetch_first` has been called for the same lines.
    """
    W: gl.constexpr = words_layout(BN, WARPS)
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    row = gl.minimum(w_row + gl.arange(0, BN, layout=gl.SliceLayout(1, W)), n_padded - 1)
    at = w_ptr + row[:, None] * 16 + gl.arange(0, 16, layout=gl.SliceLayout(0, W))[None, :]
    stride = n_padded.to(gl.int64) * 16
    # A product is started before the one before it is waited for where it takes long enough: that needs registers for a
    # second operand, so that words come one line ahead, not two. With fewer tokens it was slower (kernels/LOG.md).
    CHAINED: gl.constexpr = BM >= 256
    p = gl.load(at + begin * stride)
    s = scales(s_ptr, row, begin, n_padded, SPAN, WIDTH, HOW, W)
    p_next, s_next = p, s
    if not CHAINED:
        second = gl.minimum(begin + 1, end - 1)
        p_next = gl.load(at + second * stride)
        s_next = scales(s_ptr, row, second, n_padded, SPAN, WIDTH, HOW, W)
    acc = gl.full([BN, BM], 0.0, gl.float32, C)
    p0, p1 = halves(p)
    s0, s1 = halves(s)
    e0, e1 = halves(select(row, begin, GROUP, FIELDS, SCALE, W))
    a0 = decoded(p0, s0, e0, DT, ASM, A)
    a1 = a0  # the operand of the product before, of which none is under way yet
    mbarrier.wait(ready.index(slot), phase)
    for line in range(begin, end):
        later = gl.minimum(line + (1 if CHAINED else 2), end - 1)
        p_later = gl.load(at + later * stride)
        s_later = scales(s_ptr, row, later, n_padded, SPAN, WIDTH, HOW, W)
        if CHAINED:
            p_next, s_next = p_later, s_later
        x = tokens.index(slot)
        acc = warpgroup_mma(a0, x.slice(0, 64, dim=1).permute((1, 0)), acc, is_async=True)
        if CHAINED:  # one product stays under way: the tensor cores have the next before they are done with the last
            acc, a1 = warpgroup_mma_wait(1, deps=[acc, a1])
        a1 = decoded(p1, s1, e1, DT, ASM, A)
        if not CHAINED:
            acc = warpgroup_mma_wait(0, deps=[acc])
        acc = warpgroup_mma(a1, x.slice(64, 64, dim=1).permute((1, 0)), acc, is_async=True)
        if CHAINED:
            acc, a0 = warpgroup_mma_wait(1, deps=[acc, a0])
        # All warps have started their last product with this slot, so that they are done with the one before.
        barrier()
        to, ahead = gl.where(slot == 0, STAGES - 1, slot - 1), line + STAGES - 1
        _fetch(x_desc, tokens, ready, to, ahead, token, ahead < end)
        p0, p1 = halves(p_next)
        s0, s1 = halves(s_next)
        e0, e1 = halves(select(row, line + 1, GROUP, FIELDS, SCALE, W))
        a0 = decoded(p0, s0, e0, DT, ASM, A)
        p_next, s_next = p_later, s_later
        slot += 1
        phase = gl.where(slot == STAGES, phase ^ 1, phase)
        slot = gl.where(slot == STAGES, 0, slot)
        mbarrier.wait(ready.index(slot), phase, line + 1 < end)
        if not CHAINED:
            acc = warpgroup_mma_wait(0, deps=[acc])
    if CHAINED:
        acc = warpgroup_mma_wait(0, deps=[acc])
    return acc, slot, phase


@gluon.jit
def _flat(sums: gl.tensor) -> gl.tensor:
    """Sums (rows, tokens) in the order in which lanes hold them, four each, so that whole cache lines move."""
    rows: gl.constexpr = sums.shape[0]
    apart = sums.reshape(rows // 16, 2, 8, sums.shape[1] // 8, 4, 2)
    return apart.permute(0, 3, 2, 4, 1, 5).reshape(rows * sums.shape[1])


@gluon.jit
def _unflat(flat: gl.tensor, rows: gl.constexpr, C: gl.constexpr) -> gl.tensor:
    """The inverse of `_flat`."""
    tokens: gl.constexpr = flat.shape[0] // rows
    apart = flat.reshape(rows // 16, tokens // 8, 8, 4, 2, 2)
    return gl.convert_layout(apart.permute(0, 4, 2, 1, 3, 5).reshape(rows, tokens), C)


@gluon.jit
def _halved(sums: gl.tensor) -> tuple[gl.tensor, gl.tensor]:
    """Sums (rows, tokens) of the first and of the second half of the tokens."""
    return gl.split(sums.reshape(sums.shape[0], 2, sums.shape[1] // 2).permute(0, 2, 1))


@gluon.jit
def _put(
    y_desc: tma.tensor_descriptor,
    staged: gl.shared_memory_descriptor,
    i: gl.constexpr,
    sums: gl.tensor,
    token: gl.tensor,
    w_row: gl.tensor,
) -> None:
    """Sums (rows, 64 tokens) to y, by the copy engine from the i-th of two buffers in turns."""
    tma.store_wait(1)
    barrier()  # for all: what was in this buffer has left
    staged.index(i % 2).store(sums.to(y_desc.dtype).permute(1, 0))
    fence_async_shared()
    barrier()
    tma.async_copy_shared_to_global(y_desc, [token + 64 * i, w_row], staged.index(i % 2))


@gluon.jit
def _put_all(
    y_desc: tma.tensor_descriptor,
    staged: gl.shared_memory_descriptor,
    sums: gl.tensor,
    token: gl.tensor,
    w_row: gl.tensor,
) -> None:
    """Sums (rows, tokens) of a tile to y."""
    if sums.shape[1] <= 64:
        _put(y_desc, staged, 0, sums, token, w_row)
    else:
        a, b = _halved(sums)
        if sums.shape[1] == 128:
            _put(y_desc, staged, 0, a, token, w_row)
            _put(y_desc, staged, 1, b, token, w_row)
        else:
            first, second = _halved(a)
            third, fourth = _halved(b)
            _put(y_desc, staged, 0, first, token, w_row)
            _put(y_desc, staged, 1, second, token, w_row)
            _put(y_desc, staged, 2, third, token, w_row)
            _put(y_desc, staged, 3, fourth, token, w_row)


@gluon.jit(do_not_specialize=["m"])
def gemm_hopper(
    x_desc: tma.tensor_descriptor,
    y_desc: tma.tensor_descriptor,
    w_ptr: gl.tensor,
    s_ptr: gl.tensor,
    global_ptr: gl.tensor,
    bias_ptr: gl.tensor,
    y_ptr: gl.tensor,
    part_ptr: gl.tensor,
    count_ptr: gl.tensor,
    m: gl.tensor,
    n: gl.tensor,
    n_padded: gl.tensor,
    n_lines: gl.tensor,
    DT: gl.constexpr,
    SCALE: gl.constexpr,
    GROUP: gl.constexpr,
    SPAN: gl.constexpr,
    WIDTH: gl.constexpr,
    FIELDS: gl.constexpr,
    HOW: gl.constexpr,
    WHERE: gl.constexpr,
    ASM: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    WARPS: gl.constexpr,
    BIAS: gl.constexpr,
    GLOBAL: gl.constexpr,
    COPIED: gl.constexpr,
) -> None:
    """All tiles of y, BM tokens by BN rows of W, shared by all programs. COPIED: whether y_desc is used, else y_ptr."""
    C: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    tokens = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BM, 128], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    staged = gl.allocate_shared_memory(y_desc.dtype, [2, y_desc.block_shape[0], BN], y_desc.layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    barrier()
    me, programs = gl.program_id(0), gl.num_programs(0)
    m_tiles, n_tiles = gl.cdiv(m, BM), gl.cdiv(n, BN)
    shared = m_tiles * n_tiles % programs  # tiles that are left over
    units = shared * n_lines
    sharers = gl.maximum(gl.minimum(units, programs), 1)  # each has a unit
    own = _first_unit(gl.minimum(me, sharers), sharers, units)
    after = _first_unit(gl.minimum(me + 1, sharers), sharers, units)
    pieces = gl.where(after > own, (after - 1) // n_lines - own // n_lines + 1, 0)
    total = pieces + m_tiles * n_tiles // programs
    in_tile = gl.arange(0, BN, layout=gl.SliceLayout(1, C))
    of_tokens = gl.arange(0, BM, layout=gl.SliceLayout(0, C))
    slot, phase = gl.to_tensor(0), gl.to_tensor(0)
    tile, begin, end = _piece(0, me, programs, pieces, own, after, shared, n_lines)
    pn, pm = _place(tile, m_tiles, n_tiles, GROUP_M)
    _fetch_first(x_desc, tokens, ready, slot, begin, gl.where(total > 0, end, 0), pm * BM, STAGES)
    for i in range(total):
        acc, slot, phase = _product(
            tokens, ready, slot, phase, x_desc, w_ptr, s_ptr, begin, end, pm * BM, pn * BN, n_padded,
            DT, SCALE, GROUP, SPAN, WIDTH, FIELDS, HOW, ASM, BM, BN, STAGES, WARPS, C,
        )  # fmt: skip
        next_tile, next_begin, next_end = _piece(i + 1, me, programs, pieces, own, after, shared, n_lines)
        next_pn, next_pm = _place(next_tile, m_tiles, n_tiles, GROUP_M)
        # While sums are written, the next piece's tokens are on their way; the slot used last stays free.
        _fetch_first(
            x_desc, tokens, ready, slot, next_begin, gl.where(i + 1 < total, next_end, 0), next_pm * BM, STAGES
        )  # fmt: skip
        if end < n_lines:
            flat = _flat(acc)
            place = gl.arange(0, BN * BM, layout=flat.type.layout)
            gl.store(part_ptr + me.to(gl.int64) * (BN * BM) + place, flat)
            barrier()  # all threads have stored before one of them says so
            gl.atomic_add(count_ptr + tile, 1, sem="release")
        else:
            if begin > 0:
                first = _program_of(tile * n_lines, sharers, units)
                while gl.atomic_add(count_ptr + tile, 0, sem="acquire") < me - first:
                    pass
                flat = _flat(acc)
                place = gl.arange(0, BN * BM, layout=flat.type.layout)
                for other in range(first, me):
                    flat += gl.load(part_ptr + gl.cast(other, gl.int64) * (BN * BM) + place, cache_modifier=".cg")
                acc = _unflat(flat, BN, C)
                gl.store(count_ptr + tile, 0)
            row = pn * BN + in_tile
            acc = _finished(
                acc, s_ptr, global_ptr, bias_ptr, row, n, n_padded, DT, SCALE, WHERE, BIAS, GLOBAL
            )  # fmt: skip
            if COPIED:
                _put_all(y_desc, staged, acc, pm * BM, pn * BN)
            else:
                token = pm * BM + of_tokens
                at = y_ptr + token.to(gl.int64)[None, :] * n + row[:, None]
                gl.store(at, acc.to(y_ptr.dtype.element_ty), (token < m)[None, :] & (row < n)[:, None])
        tile, begin, end, pn, pm = next_tile, next_begin, next_end, next_pn, next_pm
    if COPIED:
        tma.store_wait(0)
