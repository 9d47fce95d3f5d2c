"""Grids and tiles of grouped.py, from shapes alone: nobody on the host knows how the rows are distributed.

Tiles are those that were the fastest for one dense weight on an H200 (tables/nvidia-h200.json). None of the grouped
kernels has been timed yet: when to go from one height to the next, and to split, are figures to start from.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

from quantkit_kernels import layout
from quantkit_kernels._w8a8_choice import Config
from quantkit_kernels._w8a8_choice import choose as choose_dense_8
from quantkit_kernels.choice import SHARED, Choice, Gpu, Problem, fitted, portable, shared_bytes

FEW = 2  # rows of an expert for which a tile of 8 is the fastest
MANY = 512  # rows of an expert from which a tile of 256 leaves few of its rows empty
HEADROOM = 1.25  # rows of a tile over the mean of an expert's: most experts then have one tile
ZEROS = 2e-6  # seconds of the kernel that clears the counters of split sums


def tile_bound(m: int, experts: int, block_m: int) -> int:
    """The most tiles that m rows can need: as many experts as possible with one row, the others' rows together.

    The rows that are nobody's count as one expert more.
    """
    return m if m <= experts else experts + -(-(m - experts) // block_m)


def active_experts(m: int, experts: int) -> int:
    """How many experts have rows, when each row's is drawn evenly; m is rounded up to a power of two."""
    rows = 1 << max(0, m - 1).bit_length()
    return max(1, round(experts * (1 - (1 - 1 / experts) ** rows)))


def tile_height(m: int, experts: int, sizes: tuple[int, ...]) -> int:
    """The smallest of some heights, which ascend, that has room for more than the mean of an expert's rows."""
    return next((size for size in sizes if HEADROOM * m <= size * experts), sizes[-1])


def choose(problem: Problem, experts: int, gpu: Gpu) -> Choice:
    """The configuration for packed weights of `experts` experts and m rows in all."""
    mean = problem.m / experts
    if mean <= FEW:
        height = 8
    elif mean >= MANY and gpu.capability in (90, 100, 103):
        height = 256
    else:
        height = tile_height(problem.m, experts, (16, 32, 64))
    return _choose(problem._replace(m=height), active_experts(problem.m, experts), gpu)


@functools.lru_cache(maxsize=4096)
def _choose(one: Problem, active: int, gpu: Gpu) -> Choice:
    """For `active` experts with a tile of one.m rows each: as for one weight with all their rows."""
    dense = one._replace(n=active * one.n)
    found = portable(dense, gpu)
    found = replace(found, split=max(1, found.split))
    return fitted(_filling(found, one, active, gpu) if one.m <= 16 else found, one, gpu)


def _filling(found: Choice, one: Problem, active: int, gpu: Gpu) -> Choice:
    """For few rows of an expert: the width of a tile, and the parts of its sum, so that all multiprocessors are busy.

    A model of the time: the bytes at the rate of an H200, by how full the last wave is and whether there are twelve
    warps a multiprocessor; what partial sums cost, and clearing their counters. At least 512 columns for each part.
    Then as many stages as leave room for the programs that run at once.
    """
    found = replace(found, block_n=64, warps=4, unroll=256 // layout.get(one.kind).line)
    share = gpu.sms / 132
    work = active * one.n * one.k * layout.get(one.kind).bits / 8 / 4.3e12 / share
    widths = ((64, 4), (32, 2))

    def programs(block_n: int, split: int) -> int:
        return active * -(-one.n // block_n) * split

    def time(way: tuple[tuple[int, int], int]) -> float:
        (block_n, warps), split = way
        count = programs(block_n, split)
        busy = math.sqrt(min(1.0, count * warps / (12 * gpu.sms))) * count / (gpu.sms * -(-count // gpu.sms))
        partial = 8 * split * active * one.m * one.n / 4e12 / share + ZEROS if split > 1 else 0.0
        return work / busy + partial

    ways = [(width, split) for split in range(1, 9) if split == 1 or one.k >= 512 * split for width in widths]
    best = ways[0]
    for way in ways:  # the widest first: a narrower one must gain something
        best = way if time(way) < 0.95 * time(best) else best
    (block_n, warps), split = best
    found = replace(found, block_n=block_n, warps=warps, split=split)
    at_once = min(-(-programs(block_n, split) // gpu.sms), 32 // warps)
    room = SHARED.get(gpu.capability, 101_376) // at_once
    stages = [s for s in (3, 4, 5, 6) if shared_bytes(found, one, s, gpu) <= room]
    return replace(found, stages=max(stages, default=3))


def choose_8(m: int, n: int, k: int, experts: int, fp8: bool, capability: tuple[int, int], processors: int) -> Config:
    """The configuration for 8-bit codes of `experts` experts and m rows in all."""
    return _choose_8(
        tile_height(m, experts, (16, 32, 64, 128)), active_experts(m, experts) * n, k, fp8, capability, processors
    )


@functools.lru_cache(maxsize=4096)
def _choose_8(height: int, n: int, k: int, fp8: bool, capability: tuple[int, int], processors: int) -> Config:
    return choose_dense_8(height, n, k, fp8=fp8, fits=False, capability=capability, processors=processors)
