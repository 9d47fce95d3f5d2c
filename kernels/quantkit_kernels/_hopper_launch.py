"""Starts `_wxa16_hopper.gemm_hopper`: the descriptors by which Hopper's copy engine finds tokens, words and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantkit_kernels._launch import Start
from quantkit_kernels.choice import Choice, Gpu, Problem, resident
from quantkit_kernels.layout import Packed


class Blocks:
    """How the copy engine cuts a matrix (height, width) of 16-bit floats, whose rows are `stride` apart."""

    def __init__(self, height: int, width: int, stride: int, block: list[int]) -> None:
        from triton.experimental.gluon.language import NVMMASharedLayout
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        self.type = TensorDescriptor
        swizzled = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        self.rest = {"shape": [height, width], "strides": [stride, 1], "block_shape": block, "layout": swizzled}

    def of(self, base: torch.Tensor) -> Any:
        """A descriptor without Triton's checks, which take longer than all else; base begins at 16 bytes."""
        made = object.__new__(self.type)
        made.__dict__.update(self.rest, base=base)
        return made


@dataclass(frozen=True, eq=False)
class Hopper:
    """`gemm_hopper` for one problem; `choice.hopper_fits` says for which weights.

    starts    the second where outputs go through the copy engine, which they do if they begin at 16 bytes
    x         tokens as they were announced, None if the copy engine cannot read such; and in rows side by side
    y         outputs; first what is told where they go another way
    copied    whether outputs may go through the copy engine
    partial   float32 values that parts of sums take
    counters  how many a split needs
    """

    starts: tuple[Start, Start]
    x: tuple[Blocks | None, Blocks]
    y: tuple[Blocks, Blocks]
    copied: bool
    partial: int
    counters: int

    @classmethod
    def of(
        cls,
        choice: Choice,
        problem: Problem,
        gpu: Gpu,
        x_stride: int,
        out_dtype: torch.dtype,
        constants: Mapping[str, Any],
        numbers: tuple[int, ...],
    ) -> Hopper:
        """constants  of the kernel, but for STAGES and COPIED;  numbers  m, n, n_padded, n_lines"""
        from quantkit_kernels._wxa16_hopper import gemm_hopper

        m, n, k = problem.m, problem.n, problem.k
        tiles = -(-m // choice.block_m) * -(-n // choice.block_n)
        programs, height = resident(choice, problem, gpu), min(64, choice.block_m)
        dense = Blocks(m, k, k, [choice.block_m, 128])
        x = dense if x_stride == k else None if x_stride % 8 else Blocks(m, k, x_stride, [choice.block_m, 128])
        y = Blocks(m, k, k, [height, 128]), Blocks(m, n, n, [height, choice.block_n])
        told = {**constants, "STAGES": choice.stages}
        plain, copying = (Start(gemm_hopper, (programs,), numbers, {**told, "COPIED": way}) for way in (False, True))
        partial = programs * choice.block_m * choice.block_n if tiles % programs else 1
        copied = out_dtype != torch.float32 and n % 8 == 0
        return cls((plain, copying), (x, dense), y, copied, partial, min(tiles, programs))

    def __call__(
        self,
        x: torch.Tensor,
        packed: Packed,
        bias: torch.Tensor | None,
        counters: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """out (m, n) = x (m, k) times the weight.

        counters  int32 zeros, or None;  out  contiguous, of the dtype of x, or float32
        """
        codes, scale, whole = packed.codes, packed.scale, packed.global_scale
        part = torch.empty(self.partial, dtype=torch.float32, device=x.device)
        if counters is None or counters.numel() < self.counters:
            counters = torch.zeros(self.counters, dtype=torch.int32, device=x.device)
        tokens = self.x[0]
        if tokens is None or x.data_ptr() % 16:
            x, tokens = x.clone(memory_format=torch.contiguous_format), self.x[1]
        copied = self.copied and out.data_ptr() % 16 == 0
        self.starts[copied](
            codes,
            scale,
            scale if whole is None else whole,
            out if bias is None else bias,
            out,
            part,
            counters,
            before=(tokens.of(x), self.y[copied].of(out if copied else x)),
        )
