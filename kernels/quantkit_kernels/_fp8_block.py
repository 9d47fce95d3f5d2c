"""Triton kernels for FP8 products with a scale for each 128 x 128 of the weight and each 1 x 128 of a token.

Each 128 columns are summed apart by the tensor cores and added to a float32 sum, sum += dot * (x_scale * w_scale),
which is also what keeps FP8's short sums short. The kernels are those of _w8a8, `small` with the weight on the left and
K in parts, `large` with the tokens there: on Hopper a tile of 128 x 256 in two halves, because its sums take half of
the registers and a product on its way needs room beside them. Scales are read one step ahead.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from quantkit_kernels._launch import Start
from quantkit_kernels._w8a8 import GROUP, gathered, tile_of, workspace
from quantkit_kernels._w8a8_choice import Config, choose_block, device_of, tiles

BLOCK = 128


@triton.jit
def added(a: tl.tensor, b: tl.tensor, scale: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """acc + scale * (a b), with `scale` one row or one column. In two steps an element: with one, ptxas starts the next
    product before these, and runs out of registers."""
    return acc + tl.dot(a, b) * scale


@triton.jit
def written(
    y: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    y_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    BIAS: tl.constexpr,
) -> None:
    """y + bias, in float32. row, column: broadcastable."""
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
    part_ptr: tl.tensor,
    count_ptr: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    x_stride: tl.tensor,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """One tile (BN, BM), or the part of it that some columns make. Grid: tiles along M, along N, SPLIT."""
    part = tl.program_id(2)
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    groups = tl.cdiv(k, BK)
    steps = tl.cdiv(groups, SPLIT)
    first = part * steps
    stop = tl.minimum(first + steps, groups)
    inside = tl.arange(0, BK)
    exists = row < m
    # Rows of the weight beyond its last are read as the last: nothing of them is written.
    w_at = w_ptr + tl.minimum(column, n - 1)[:, None] * k + (first * BK + inside)[None, :]
    x_at = x_ptr + row[:, None] * x_stride + (first * BK + inside)[None, :]
    x_scale_at = x_scale_ptr + first.to(tl.int64) * m + row
    w_scale_at = w_scale_ptr + tl.program_id(1).to(tl.int64) * BN // BK * groups + first
    scale = tl.load(x_scale_at, exists & (first < stop), 0.0) * tl.load(w_scale_at, first < stop, 0.0)
    acc = tl.zeros((BN, BM), tl.float32)
    for group in range(first, stop):
        more = group + 1 < stop
        x_scale_at += m
        w_scale_at += 1
        following = tl.load(x_scale_at, exists & more, 0.0) * tl.load(w_scale_at, more, 0.0)
        if EVEN:
            w = tl.load(w_at)
            x = tl.load(x_at, exists[:, None], 0.0)
        else:
            left = (inside < k - group * BK)[None, :]
            w = tl.load(w_at, left, 0.0)
            x = tl.load(x_at, exists[:, None] & left, 0.0)
        acc = added(w, x.T, scale[None, :], acc)
        scale = following
        w_at += BK
        x_at += BK
    last = True
    if SPLIT > 1:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        count = tl.num_programs(0) * tl.num_programs(1)
        acc, last = gathered(acc, part_ptr, count_ptr, tile, count, part, SPLIT, BN, BM)
    if last:
        written(acc, row[None, :], column[:, None], m, n, y_ptr, bias_ptr, BIAS)


@triton.jit
def large(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    y_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    w_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    x_stride: tl.tensor,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    HALVES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """One tile (BM, HALVES * BN), a half of it one block wide. Grid: all tiles."""
    down, across = tl.cdiv(m, BM), tl.cdiv(n, HALVES * BN)
    tile_row, tile_column = tile_of(tl.program_id(0), down, across, GROUP)
    top, left = tile_row.to(tl.int64) * BM, tile_column.to(tl.int64) * (HALVES * BN)
    groups = tl.cdiv(k, BK)
    # A place for the tile and 32-bit steps inside it take half the registers of a pointer for each 16 bytes.
    x_at, w_at = x_ptr + top * x_stride, w_ptr + left * k
    inside = tl.arange(0, BK)
    tokens = tl.minimum(tl.arange(0, BM), (m - 1 - top).to(tl.int32))
    x_steps = tokens[:, None] * x_stride + inside[None, :]
    w_steps = tl.minimum(tl.arange(0, BN), (n - 1 - left).to(tl.int32))[:, None] * k + inside[None, :]
    x_scale_at, w_scale_at = x_scale_ptr + top, w_scale_ptr + left // BK * groups
    x_scale, scale = tl.load(x_scale_at + tokens), tl.load(w_scale_at)
    acc = tl.zeros((BM, BN), tl.float32)
    if HALVES == 2:
        other_steps = tl.minimum(tl.arange(0, BN) + BN, (n - 1 - left).to(tl.int32))[:, None] * k + inside[None, :]
        # A second half may lie beyond the last row of blocks.
        other_scale_at = w_scale_at + tl.where(n > left + BN, groups, 0)
        other_scale = tl.load(other_scale_at)
        other_acc = tl.zeros((BM, BN), tl.float32)
    for group in range(groups):
        ahead = tl.where(group + 1 < groups, 1, 0)
        x_scale_at += ahead * m
        w_scale_at += ahead
        next_x_scale, next_scale = tl.load(x_scale_at + tokens), tl.load(w_scale_at)
        some = (inside < k - group * BK)[None, :]
        x = tl.load(x_at + x_steps) if EVEN else tl.load(x_at + x_steps, some, 0.0)
        w = tl.load(w_at + w_steps) if EVEN else tl.load(w_at + w_steps, some, 0.0)
        acc = added(x, w.T, (x_scale * scale)[:, None], acc)
        if HALVES == 2:
            other_scale_at += ahead
            next_other = tl.load(other_scale_at)
            w = tl.load(w_at + other_steps) if EVEN else tl.load(w_at + other_steps, some, 0.0)
            other_acc = added(x, w.T, (x_scale * other_scale)[:, None], other_acc)
            other_scale = next_other
        x_scale, scale = next_x_scale, next_scale
        x_at += BK
        w_at += BK
    row, column = top + tl.arange(0, BM), left + tl.arange(0, BN)
    written(acc, row[:, None], column[None, :], m, n, y_ptr, bias_ptr, BIAS)
    if HALVES == 2:
        written(other_acc, row[:, None], (column + BN)[None, :], m, n, y_ptr, bias_ptr, BIAS)


def linear(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    config: Config | None = None,
) -> torch.Tensor:
    """(..., K) -> (..., N), arguments as `fp8_block` has them. `config` None: chosen for the shape and the GPU."""
    (n, k), weight = weight.shape, weight.contiguous()
    x_MK = x_q.reshape(-1, k)
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    m, shape = x_MK.shape[0], (*x_q.shape[:-1], n)
    if m * n == 0:
        return torch.empty(shape, dtype=out_dtype, device=x_q.device)
    sizes = (m, n, k, x_MK.stride(0))
    dtypes = (out_dtype, x_scale.dtype, weight_scale.dtype, None if bias is None else bias.dtype)
    config, start = _prepared(config, sizes, dtypes, x_q.device)
    x_scale, weight_scale = x_scale.contiguous(), weight_scale.contiguous()
    if start is None:
        return library(x_MK, x_scale, weight, weight_scale, bias, out_dtype).view(shape)
    y = torch.empty(shape, dtype=out_dtype, device=x_q.device)
    tensors = (x_MK, weight, y, x_scale, weight_scale, y if bias is None else bias.contiguous())
    if config.path == "large":
        start(*tensors)
    else:
        start(*tensors, *workspace(config, m, n, torch.float32, y))
    return y


@functools.lru_cache(maxsize=4096)
def _prepared(
    config: Config | None, sizes: tuple[int, ...], dtypes: tuple[torch.dtype | None, ...], device: torch.device
) -> tuple[Config, Start | None]:
    """The configuration, chosen if it is None, and its kernel; none where torch's own product does all.

    sizes   numbers of the kernels: m, n, k, and the stride of x
    dtypes  of the output, both scales and the bias
    """
    m, n, k, _ = sizes
    capability, processors = device_of(device)
    if config is None:
        fits = capability == (9, 0) and has_library() and n % 128 == k % 128 == m % 4 == 0
        config = choose_block(m, n, k, fits=fits, capability=capability, processors=processors)
    if config.path == "library":
        return config, None
    told: dict[str, Any] = {
        "BIAS": dtypes[-1] is not None,
        "EVEN": k % BLOCK == 0,
        "BM": config.bm,
        "BN": config.bn,
        "BK": BLOCK,
    }
    told |= {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": False}
    if config.path == "large":
        told |= {"HALVES": config.halves, "GROUP": GROUP}
        return config, Start(large, (tiles(config, m, n),), sizes, told)
    grid = (-(-m // config.bm), -(-n // config.bn), config.split)  # tokens first: they share a tile of the weight
    return config, Start(small, grid, sizes, {**told, "SPLIT": config.split})


def has_library() -> bool:
    """Whether this torch has a product of FP8 with scales of blocks: from 2.10 on, with CUDA 12.9."""
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    return hasattr(F, "scaled_mm") and hasattr(F, "ScalingType") and cuda >= (12, 9)


def library(
    x_MK: torch.Tensor,
    x_scale_GM: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """torch's own: `has_library`, capability 9.0, N and K multiples of 128, M of 4.

    It takes the weight's scales with rows of a multiple of 4 blocks, and copies them where that takes padding.
    """
    blocks = weight_scale.shape[1]
    padded = F.pad(weight_scale.float(), (0, -blocks % 4)) if blocks % 4 else weight_scale.float()
    made = F.scaled_mm(
        x_MK.contiguous(),
        weight.t(),
        x_scale_GM.float().t(),
        F.ScalingType.BlockWise1x128,
        padded.t(),
        F.ScalingType.BlockWise128x128,
        output_dtype=out_dtype,
    )
    return made if bias is None else (made.float() + bias.float()).to(out_dtype)
