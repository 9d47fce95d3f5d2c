"""Starts `_wxa16_hopper.gemm_hopper`: the descriptors by which Hopper's copy engine finds tokens, words and outputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from quantkit_kernels._launch import launch
from quantkit_kernels.choice import Choice
from quantkit_kernels.layout import Packed

USED = ("DT", "SCALE", "GROUP", "SPAN", "WIDTH", "FIELDS", "HOW", "ASM", "GLOBAL")  # of wxa16.constants


def launch_hopper(
    choice: Choice,
    programs: int,
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None,
    counters: torch.Tensor,
    out: torch.Tensor,
    constants: Mapping[str, object],
) -> None:
    """out (m, n) = x (m, k) times the weight; `choice.hopper_fits` says for which weights.

    counters  (tiles or programs, the fewer,) int32 zeros;  out  contiguous, of the dtype of x, or float32
    """
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from quantkit_kernels import _wxa16_hopper

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
    options: dict[str, object] = {name: constants[name] for name in USED}
    options |= {"WHERE": choice.where, "BM": choice.block_m, "BN": choice.block_n, "STAGES": choice.stages}
    options |= {"GROUP_M": choice.group_m, "WARPS": choice.warps, "BIAS": bias is not None, "COPIED": copied}
    options["num_warps"] = choice.warps
    kind = (packed.kind, packed.scale_dtype, packed.n, packed.k, packed.group)
    key = (kind, choice, x.dtype, bias is None or bias.dtype, out.dtype, copied)
    launch(_wxa16_hopper.gemm_hopper, (programs,), arguments, options, key)
