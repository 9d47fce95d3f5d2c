"""Triton kernels for products of 8-bit weights and 8-bit activations, each with one scale a row.

small   few tokens. The weight is the left operand, acc (N, M) = w xᵀ: tensor cores take 64 rows at a time there, and
        weights have them. K may be split over programs; the last one of a tile adds the parts, in their order
large   many tokens, acc (M, N) = x wᵀ. Tiles follow each other down GROUP rows of tiles, so that both operands stay in
        L2. FP8 needs a second accumulator, so a wide tile of it is made in two halves, one after the other

int8 is summed in int32, exactly. FP8 products are summed by the tensor core with few digits before Blackwell, so
every 128 columns its sum is added to one in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from quantkit_kernels._launch import Start
from quantkit_kernels._w8a8_choice import Config, choose, device_of, library, library_fits, tiles

GROUP = 8  # tiles below each other that are worked off together
_SCALED = (16, 256)  # tile of the kernel that only scales


@triton.jit
def product(a: tl.tensor, b: tl.tensor, acc: tl.tensor, PROMOTE: tl.constexpr) -> tl.tensor:
    """acc + a b. PROMOTE: at most 128 columns of FP8, summed apart and then added."""
    if a.dtype == tl.int8:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    elif PROMOTE:
        # Said aloud, 128 also keeps the compiler from making one sum of the two.
        most: tl.constexpr = 128 if a.shape[1] > 128 else a.shape[1]
        acc += tl.dot(a, b, max_num_imprecise_acc=most)
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def tile_of(pid: tl.tensor, down: tl.tensor, across: tl.tensor, GROUP: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Row and column of the tile that a program makes: down GROUP of them, then the next column."""
    first = pid // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = pid % (GROUP * across)
    return first + inside % height, inside // height


@triton.jit
def gathered(
    acc: tl.tensor,
    part_ptr: tl.tensor,
    count_ptr: tl.tensor,
    tile: tl.tensor,
    tiles: tl.tensor,
    part: tl.tensor,
    SPLIT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """In the last of a tile's SPLIT programs: the sum of their parts, and True. In the others: False.

    part_ptr   (SPLIT, tiles, HEIGHT * WIDTH), in the dtype of acc;  count_ptr  (tiles,) int32 zeros
    The parts are added in their order, whoever comes last: the same bits every run.
    """
    inside = tl.arange(0, HEIGHT)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    at = part_ptr + tile.to(tl.int64) * (HEIGHT * WIDTH) + inside
    step = tiles.to(tl.int64) * (HEIGHT * WIDTH)
    tl.store(at + part * step, acc)
    tl.debug_barrier()  # the counter speaks for all threads of this program
    last = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == SPLIT - 1
    total = acc
    if last:
        total = tl.load(at, cache_modifier=".cg")
        for _ in range(1, SPLIT):
            at += step
            total += tl.load(at, cache_modifier=".cg")
    return total, last


@triton.jit
def written(
    acc: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    y_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    w_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    x_scale_stride: tl.tensor,
    w_scale_stride: tl.tensor,
    BIAS: tl.constexpr,
    SHIFTED: tl.constexpr,
) -> None:
    """y = (acc - zero * sum) * x_scale * w_scale + bias, in float32 from left to right. row, column: broadcastable."""
    if SHIFTED:
        zero = tl.load(zero_ptr + row * x_scale_stride, row < m, 0).to(tl.int32)
        acc -= zero * tl.load(sum_ptr + column, column < n, 0)
    y = acc.to(tl.float32) * tl.load(x_scale_ptr + row * x_scale_stride, row < m, 0.0).to(tl.float32)
    y *= tl.load(w_scale_ptr + column * w_scale_stride, column < n, 0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + column, column < n, 0.0).to(tl.float32)
    tl.store(y_ptr + row * n + column, y.to(y_ptr.dtype.element_ty), (row < m) & (column < n))


@triton.jit
def small(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    y_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    w_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    part_ptr: tl.tensor,
    count_ptr: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    x_stride: tl.tensor,
    x_scale_stride: tl.tensor,
    w_scale_stride: tl.tensor,
    BIAS: tl.constexpr,
    SHIFTED: tl.constexpr,
    EVEN: tl.constexpr,
    PROMOTE: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """One tile (BN, BM), or the part of it that some columns make. Grid: tiles along M, along N, SPLIT."""
    part = tl.program_id(2)
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    steps = tl.cdiv(tl.cdiv(k, BK), SPLIT)
    inside = tl.arange(0, BK)
    first = part * steps * BK
    # Rows of the weight beyond its last are read as the last: nothing of them is written.
    w_at = w_ptr + tl.minimum(column, n - 1)[:, None] * k + (first + inside)[None, :]
    x_at = x_ptr + row[:, None] * x_stride + (first + inside)[None, :]
    exists = (row < m)[:, None]
    acc = tl.zeros((BN, BM), tl.int32 if w_ptr.dtype.element_ty == tl.int8 else tl.float32)
    for start in range(first, tl.minimum(first + steps * BK, k), BK):
        if EVEN:
            w = tl.load(w_at)
            x = tl.load(x_at, exists, 0.0)
        else:
            left = (inside < k - start)[None, :]
            w = tl.load(w_at, left, 0.0)
            x = tl.load(x_at, exists & left, 0.0)
        acc = product(w, x.T, acc, PROMOTE)
        w_at += BK
        x_at += BK
    last = True
    if SPLIT > 1:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tiles = tl.num_programs(0) * tl.num_programs(1)
        acc, last = gathered(acc, part_ptr, count_ptr, tile, tiles, part, SPLIT, BN, BM)
    if last:
        written(
            acc,
            row[None, :],
            column[:, None],
            m,
            n,
            y_ptr,
            x_scale_ptr,
            w_scale_ptr,
            bias_ptr,
            zero_ptr,
            sum_ptr,
            x_scale_stride,
            w_scale_stride,
            BIAS,
            SHIFTED,
        )


@triton.jit
def large(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    y_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    w_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    x_stride: tl.tensor,
    x_scale_stride: tl.tensor,
    w_scale_stride: tl.tensor,
    BIAS: tl.constexpr,
    SHIFTED: tl.constexpr,
    EVEN: tl.constexpr,
    PROMOTE: tl.constexpr,
    HALVES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """One tile (BM, HALVES * BN). Grid: all tiles."""
    down, across = tl.cdiv(m, BM), tl.cdiv(n, HALVES * BN)
    tile_row, tile_column = tile_of(tl.program_id(0), down, across, GROUP)
    top, left = tile_row.to(tl.int64) * BM, tile_column.to(tl.int64) * (HALVES * BN)
    # A place for the tile and 32-bit steps inside it take half the registers of a pointer for each 16 bytes.
    x_at, w_at = x_ptr + top * x_stride, w_ptr + left * k
    inside = tl.arange(0, BK)
    x_steps = tl.minimum(tl.arange(0, BM), (m - 1 - top).to(tl.int32))[:, None] * x_stride + inside[None, :]
    w_steps = tl.minimum(tl.arange(0, BN), (n - 1 - left).to(tl.int32))[:, None] * k + inside[None, :]
    acc = tl.zeros((BM, BN), tl.int32 if w_ptr.dtype.element_ty == tl.int8 else tl.float32)
    if HALVES == 2:
        other_steps = tl.minimum(tl.arange(0, BN) + BN, (n - 1 - left).to(tl.int32))[:, None] * k + inside[None, :]
        other_acc = acc
    for start in range(0, k, BK):
        some = (inside < k - start)[None, :]
        x = tl.load(x_at + x_steps) if EVEN else tl.load(x_at + x_steps, some, 0.0)
        w = tl.load(w_at + w_steps) if EVEN else tl.load(w_at + w_steps, some, 0.0)
        acc = product(x, w.T, acc, PROMOTE)
        if HALVES == 2:
            w = tl.load(w_at + other_steps) if EVEN else tl.load(w_at + other_steps, some, 0.0)
            other_acc = product(x, w.T, other_acc, PROMOTE)
        x_at += BK
        w_at += BK
    row, column = top + tl.arange(0, BM), left + tl.arange(0, BN)
    for half in tl.static_range(HALVES):
        written(
            acc if half == 0 else other_acc,
            row[:, None],
            (column + half * BN)[None, :],
            m,
            n,
            y_ptr,
            x_scale_ptr,
            w_scale_ptr,
            bias_ptr,
            zero_ptr,
            sum_ptr,
            x_scale_stride,
            w_scale_stride,
            BIAS,
            SHIFTED,
        )


@triton.jit
def scaled(
    acc_ptr: tl.tensor,
    y_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    w_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    x_scale_stride: tl.tensor,
    w_scale_stride: tl.tensor,
    BIAS: tl.constexpr,
    SHIFTED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """y from sums (m, n) int32 that a library has made."""
    row = (tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    column = (tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN))[None, :]
    acc = tl.load(acc_ptr + row * n + column, (row < m) & (column < n), 0)
    written(
        acc,
        row,
        column,
        m,
        n,
        y_ptr,
        x_scale_ptr,
        w_scale_ptr,
        bias_ptr,
        zero_ptr,
        sum_ptr,
        x_scale_stride,
        w_scale_stride,
        BIAS,
        SHIFTED,
    )


def linear(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    x_zero: torch.Tensor | None = None,
    weight_sum: torch.Tensor | None = None,
    *,
    config: Config | None = None,
) -> torch.Tensor:
    """(..., K) -> (..., N), arguments as `w8a8` has them. `config` None: chosen for the shape and the GPU."""
    (n, k), weight = weight.shape, weight.contiguous()
    x_MK = x_q.reshape(-1, k)
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    m, shape = x_MK.shape[0], (*x_q.shape[:-1], n)
    if m * n == 0:
        return torch.empty(shape, dtype=out_dtype, device=x_q.device)
    fits = weight.dtype != torch.int8 and library_fits(x_MK, weight, x_scale, weight_scale, out_dtype)
    sizes = (m, n, k, x_MK.stride(0), int(x_scale.numel() > 1), int(weight_scale.numel() > 1))
    dtypes = (weight.dtype, out_dtype, x_scale.dtype, weight_scale.dtype, None if bias is None else bias.dtype)
    config, start = _prepared(config, sizes, dtypes, x_zero is not None, fits, x_q.device)
    if start is None:
        return library(x_MK, x_scale, weight, weight_scale, bias, out_dtype).view(shape)
    y = torch.empty(shape, dtype=out_dtype, device=x_q.device)
    common = (
        y,
        x_scale.contiguous(),
        weight_scale.contiguous(),
        y if bias is None else bias.contiguous(),
        y if x_zero is None else x_zero.contiguous(),
        y if weight_sum is None else weight_sum.contiguous(),
    )
    if config.path == "library":
        start(torch._int_mm(x_MK, weight.t()), *common)
    elif config.path == "large":
        start(x_MK, weight, *common)
    else:
        dtype = torch.int32 if weight.dtype == torch.int8 else torch.float32
        start(x_MK, weight, *common, *workspace(config, m, n, dtype, y))
    return y


@functools.lru_cache(maxsize=4096)
def _prepared(
    config: Config | None,
    sizes: tuple[int, ...],
    dtypes: tuple[torch.dtype | None, ...],
    shifted: bool,
    fits: bool,
    device: torch.device,
) -> tuple[Config, Start | None]:
    """The configuration, chosen if it is None, and its kernel; none where torch's own product does all.

    sizes   numbers of the kernels: m, n, k, and the strides of x and of both scales
    dtypes  of the weight, the output, both scales and the bias
    """
    m, n, k, _, *scales = sizes
    fp8, (capability, processors) = dtypes[0] != torch.int8, device_of(device)
    config = config or choose(m, n, k, fp8=fp8, fits=fits, capability=capability, processors=processors)
    told: dict[str, Any] = {"BIAS": dtypes[-1] is not None, "SHIFTED": shifted, "enable_fp_fusion": False}
    if config.path == "library":
        bm, bn = _SCALED
        told |= {"BM": bm, "BN": bn, "num_warps": 4}
        return config, None if fp8 else Start(scaled, (-(-n // bn), -(-m // bm)), (m, n, *scales), told)
    told |= {"EVEN": k % config.bk == 0, "PROMOTE": capability < (10, 0), "BM": config.bm, "BN": config.bn}
    told |= {"BK": config.bk, "num_warps": config.warps, "num_stages": config.stages}
    if config.path == "large":
        told |= {"HALVES": config.halves, "GROUP": GROUP}
        return config, Start(large, (tiles(config, m, n),), sizes, told)
    grid = (-(-m // config.bm), -(-n // config.bn), config.split)  # tokens first: they share a tile of the weight
    return config, Start(small, grid, sizes, {**told, "SPLIT": config.split})


def workspace(config: Config, m: int, n: int, dtype: torch.dtype, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the parts of every tile, and a counter of zero for each; y twice where there are none."""
    if config.split == 1:
        return y, y
    count = tiles(config, m, n)
    part = torch.empty((config.split, count, config.bn * config.bm), dtype=dtype, device=y.device)
    return part, torch.zeros(count, dtype=torch.int32, device=y.device)
