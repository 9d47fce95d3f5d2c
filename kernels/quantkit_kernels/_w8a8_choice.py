"""Which kernel makes a product of 8-bit operands, and with which tile: by shape and GPU, before the launch.

Figures are from resources that compiled kernels use and from an H200 (kernels/RESULTS.md); torch's own products are
taken where they were the faster ones there.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch

_PARTS = (1, 2, 3, 4, 6, 8, 12, 16)  # of K
_STEPS = 4  # of a part at least: shorter ones are all beginning and end
_FLYING = 48 << 10  # bytes of the weight on their way to a multiprocessor at full bandwidth
_LAUNCH = 6 << 20  # bytes of the weight that are read in the time of a launch, that of the counters' zeros
_FILLED = 0.75  # of the multiprocessors that a tile must occupy, or a smaller one is taken


@dataclass(frozen=True)
class Config:
    """How a product is made.

    path           "small", "large": the kernels; "library": torch's own
    bm, bn, bk     a tile's tokens, its rows of the weight, the columns of a step
    halves         a tile has so many times bn
    split          parts of K
    warps, stages  of a program, of its pipeline of loads
    """

    path: str
    bm: int = 16
    bn: int = 64
    bk: int = 128
    halves: int = 1
    split: int = 1
    warps: int = 4
    stages: int = 4


def tiles(config: Config, m: int, n: int) -> int:
    """Tiles of a product (m, n)."""
    return -(-m // config.bm) * -(-n // (config.bn * config.halves))


def choose(m: int, n: int, k: int, *, fp8: bool, fits: bool, capability: tuple[int, int], processors: int) -> Config:
    """For one scale a row. fits: torch's own FP8 product takes these operands."""
    if fp8 and fits and m > 64:
        return Config("library")
    if fp8 and capability < (10, 0):
        return _filling(_wide_by_halves(capability), m, n, k, processors, tallest=128)
    # Hopper's integer units take their operands from shared memory, the others from registers.
    wide = Config("large", 128, 256, 128 if fp8 or capability == (9, 0) else 64, warps=8)
    square = replace(wide, bn=128, bk=128, stages=4 if capability >= (9, 0) else 3)
    return _filling((wide, square), m, n, k, processors, tallest=128)


def choose_block(m: int, n: int, k: int, *, fits: bool, capability: tuple[int, int], processors: int) -> Config:
    """For FP8 with scales of 128 x 128 and 1 x 128. fits: torch's own product takes these operands."""
    if fits and m >= 64:
        return Config("library")
    return _filling(_wide_by_halves(capability), m, n, k, processors, tallest=64)


def _wide_by_halves(capability: tuple[int, int]) -> tuple[Config, ...]:
    """Tiles with a second accumulator: the wide one fits the registers of Hopper alone."""
    square = Config("large", 128, 128, warps=8, stages=4 if capability >= (9, 0) else 3)
    return (replace(square, halves=2), square) if capability == (9, 0) else (square,)


def _filling(wide: tuple[Config, ...], m: int, n: int, k: int, processors: int, *, tallest: int) -> Config:
    """The first tile of which there are enough; for few tokens, or few tiles, parts of K."""
    for config in wide if m > 128 else ():
        if tiles(config, m, n) >= _FILLED * processors:
            return config
    bm = next((size for size in (16, 32, 64) if m <= size), tallest)
    stages = {64: 4, 128: 3}.get(bm, 5)
    few = Config("small", bm, 128 if bm == 128 else 64, warps=8 if bm == 128 else 4, stages=stages)
    return replace(few, split=_parts(few, m, n, k, processors))


def _parts(config: Config, m: int, n: int, k: int, processors: int) -> int:
    """Parts of K with the least estimated time, in units of reading the weight once at full bandwidth."""

    def time(parts: int) -> float:
        each = tiles(config, m, n) * parts / processors
        flying = max(each, 1) * (config.stages - 1) * config.bn * config.bk
        busy = min(1, each) * min(1, flying / _FLYING) * (0.9 + 0.1 * each / math.ceil(each))
        sums = 4 * parts * config.bm / k  # 4 bytes, written and read in L2, which is twice as fast
        return 1 / busy + (sums + _LAUNCH / (n * k) if parts > 1 else 0)

    steps = -(-k // config.bk)
    return min((p for p in _PARTS if p == 1 or steps >= _STEPS * p), key=time)


def device_of(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors of a GPU; those of an H200 where there is none."""
    if device.type != "cuda":
        return (9, 0), 132
    return _device(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _device(index: int) -> tuple[tuple[int, int], int]:
    found = torch.cuda.get_device_properties(index)
    return (found.major, found.minor), found.multi_processor_count


def library_fits(
    x_MK: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> bool:
    """Whether `torch._scaled_mm` takes the operands: sizes of 16 and 16-byte rows; with scales a row only bfloat16 out,
    and float32 never with a bias."""
    n, k = weight.shape
    whole = x_scale.numel() == weight_scale.numel() == 1
    dtype = out_dtype == torch.bfloat16 or (whole and out_dtype == torch.float16)
    return dtype and n % 16 == 0 and k % 16 == 0 and x_MK.stride(0) == k and x_MK.data_ptr() % 16 == 0


def library(
    x_MK: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """FP8 by torch's own product, its sums promoted to float32."""
    if x_scale.numel() == weight_scale.numel() == 1:
        x_scale, weight_scale = x_scale.float().reshape(()), weight_scale.float().reshape(())
    else:
        x_scale = x_scale.float().reshape(-1, 1).expand(x_MK.shape[0], 1).contiguous()
        weight_scale = weight_scale.float().reshape(1, -1).expand(1, weight.shape[0]).contiguous()
    return torch._scaled_mm(
        x_MK,
        weight.t(),
        scale_a=x_scale,
        scale_b=weight_scale,
        bias=None if bias is None else bias.to(out_dtype),
        out_dtype=out_dtype,
        use_fast_accum=False,
    )
