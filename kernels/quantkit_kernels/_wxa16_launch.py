"""Starts the kernels that multiply by packed codes. What a configuration, sizes and dtypes decide is prepared once.

`prepared` gives a `Gemm` or a `Hopper`; called, it allocates what only this call needs, and launches.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from quantkit_kernels import layout
from quantkit_kernels._hopper_launch import Hopper
from quantkit_kernels._launch import Start
from quantkit_kernels._unpacking import constants_of
from quantkit_kernels.choice import Choice, Gpu, Problem, mma_sync, resident
from quantkit_kernels.layout import Packed

# Of constants_of, what the kernel for Hopper is told.
USED = ("DT", "SCALE", "GROUP", "SPAN", "WIDTH", "FIELDS", "HOW", "ASM", "GLOBAL")


@dataclass(frozen=True, eq=False)
class Gemm:
    """`_wxa16.gemm` or `_wxa16_stream.gemm_stream` for one problem.

    partial   float32 values that parts of sums take, 0 where no sum is split
    tiles     counters that a split needs
    """

    start: Start
    partial: int
    tiles: int

    def __call__(
        self,
        x: torch.Tensor,
        packed: Packed,
        bias: torch.Tensor | None,
        counters: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """out = x times the weight, (tokens, n) contiguous; x with the stride that was prepared for."""
        _, _, _, _, _, _, codes, scale, zero, whole = packed
        part = out
        if self.partial:
            part = torch.empty(self.partial, dtype=torch.float32, device=x.device)
            if counters is None or counters.numel() < self.tiles:
                counters = torch.zeros(self.tiles, dtype=torch.int32, device=x.device)
        self.start(
            x,
            codes,
            scale,
            scale if zero is None else zero,
            scale if whole is None else whole,
            out if bias is None else bias,
            out,
            part,
            codes if counters is None else counters,
        )


@functools.lru_cache(maxsize=4096)
def prepared(
    choice: Choice,
    problem: Problem,
    gpu: Gpu,
    x_stride: int,
    bias_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
    assembly: bool,
    dividing: int,
) -> Gemm | Hopper:
    """A product of the path "gemm" or "hopper", for all weights and inputs of a problem. At least one token and row.

    dividing  as _unpacking.global_mode has it
    """
    p = problem
    common = constants_of(p.kind, p.scale_dtype, p.group, p.dtype, choice.where, assembly, dividing)
    given = {"WHERE": choice.where, "BM": choice.block_m, "BN": choice.block_n, "GROUP_M": choice.group_m}
    given |= {"WARPS": choice.warps, "BIAS": bias_dtype is not None, "num_warps": choice.warps}
    lines, high = layout.lines(p.kind, p.k), layout.padded_rows(p.n)
    tiles = -(-p.m // choice.block_m) * -(-p.n // choice.block_n)
    if choice.path == "hopper":
        if not assembly:
            raise ValueError("the kernel for Hopper has no plain twin of its assembly")
        used = {name: common[name] for name in USED}
        return Hopper.of(choice, problem, gpu, x_stride, out_dtype, {**used, **given}, (p.m, p.n, high, lines))
    programs = resident(choice, problem, gpu) if choice.split == 0 else tiles
    parts = 0 if choice.split == 1 else 2 * programs if choice.split == 0 else tiles * choice.split
    given |= {"UNROLL": choice.unroll, "EVEN": p.k == lines * layout.get(p.kind).line and lines % choice.unroll == 0}
    given |= {"MMA_SYNC": mma_sync(choice.block_m, choice.warps, gpu), "num_stages": choice.stages}
    numbers = (p.m, p.n, high, p.k, lines, x_stride)
    if choice.split == 0:
        from quantkit_kernels import _wxa16_stream

        start = Start(_wxa16_stream.gemm_stream, (programs,), numbers, {**common, **given})
    else:
        from quantkit_kernels import _wxa16

        start = Start(_wxa16.gemm, (tiles, choice.split), numbers, {**common, **given, "SPLIT": choice.split})
    return Gemm(start, parts * choice.block_m * choice.block_n, tiles)
