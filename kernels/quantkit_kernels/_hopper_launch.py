"""Starts `_wxa16_hopper.gemm_hopper`: the descriptors by which Hopper's copy engine finds tokens, words and outputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from quantkit_kernels._launch import launch
from quantkit_kernels.choice import Choice, Problem, gpu_of, resident
from quantkit_kernels.layout import Packed

USED = ("DT", "SCALE", "GROUP", "SPAN", "WIDTH", "FIELDS", "HOW", "ASM", "GLOBAL")  # of wxa16.constants


def launch_hopper(
    choice: Choice,
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None,
    counters: torch.Tensor | None,
    out: torch.Tensor,
    constants: Mapping[str, object],
) -> None:
    """out (m, n) = x (m, k) times the weight; `choice.hopper_fits` says for which weights.

    counters  (tiles or programs, the fewer,) int32 zeros, or None;  out  contiguous, of the dtype of x, or float32
    """
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from quantkit_kernels import _wxa16_hopper

    tiles = -(-x.shape[0] // choice.block_m) * -(-packed.n // choice.block_n)
    dtype = "bf16" if x.dtype == torch.bfloat16 else "fp16"
    problem = Problem(packed.kind, packed.scale_dtype, packed.n, packed.k, packed.group, x.shape[0], dtype)
    programs = resident(choice, problem, gpu_of(x.device))
    if counters is None or counters.numel() < min(tiles, programs):
        counters = torch.zeros(min(tiles, programs), dtype=torch.int32, device=x.device)
    if x.data_ptr() % 16 or x.stride(0) % 8 or x.stride(1) != 1:
        x = x.clone(memory_format=torch.contiguous_format)
    swizzled = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    x_blocks = TensorDescriptor.from_tensor(x, [choice.block_m, 128], swizzled)
    copied = out.dtype == x.dtype and out.data_ptr() % 16 == 0 and packed.n % 8 == 0
    y_block = [min(64, choice.block_m), choice.block_n if copied else 128]
    y_blocks = TensorDescriptor.from_tensor(out if copied else x, y_block, swizzled)
    part = torch.empty(programs * choice.block_m * choice.block_n, dtype=torch.float32, device=x.device)
    arguments = (
        x_blocks,
        y_blocks,
        packed.codes,
        packed.scale,
        packed.scale if packed.global_scale is None else packed.global_scale,
        out if bias is None else bias,
        out,
        part,
        counters,
        x.shape[0],
        packed.n,
        packed.codes.shape[1],
        packed.codes.shape[0],
    )

    def options() -> dict[str, object]:
        made: dict[str, object] = {name: constants[name] for name in USED}
        made |= {"WHERE": choice.where, "BM": choice.block_m, "BN": choice.block_n, "STAGES": choice.stages}
        made |= {"GROUP_M": choice.group_m, "WARPS": choice.warps, "BIAS": bias is not None, "COPIED": copied}
        return made | {"num_warps": choice.warps}

    key = (problem._replace(m=0), choice, bias is None or bias.dtype, out.dtype, copied, constants["GLOBAL"])
    launch(_wxa16_hopper.gemm_hopper, (programs,), arguments, options, key)
