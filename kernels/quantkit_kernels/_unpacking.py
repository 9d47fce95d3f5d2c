"""What the unpacking of a weight is compiled for: the constants that all kernels on packed weights share."""

from __future__ import annotations

import functools

import torch

from quantkit_kernels import layout
from quantkit_kernels.choice import Problem, exact_scale
from quantkit_kernels.layout import Packed

FLOATS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def constants(packed: Packed, dtype: torch.dtype, where: str, assembly: bool) -> dict[str, object]:
    """The constants by which _unpack.py turns the words of a weight into floats of `dtype`.

    where     "before": HOW is "mul", or "split" where the scale is not exact in `dtype`; else "raw"
    assembly  false: the plain twin
    """
    dividing = global_mode(packed)
    return constants_of(packed.kind, packed.scale_dtype, packed.group, FLOATS[dtype], where, assembly, dividing)


def global_mode(packed: Packed) -> int:
    """GLOBAL, how `finish` divides by a global scale: 0 not at all; 1 one for all rows (of an expert); 2 one a row."""
    if packed.global_scale is None:
        return 0
    return 1 if packed.codes.dim() == 4 or packed.global_scale.numel() == 1 else 2


@functools.lru_cache(maxsize=256)
def constants_of(
    kind: str, scale_dtype: str, group: int, dtype: str, where: str, assembly: bool, dividing: int
) -> dict[str, object]:
    from quantkit_kernels._unpack_ptx import assembly as text

    form, how = layout.get(kind), layout.geometry(kind, scale_dtype, 1, group)
    mode, two = layout.zero_mode(kind, scale_dtype), group > 0 and group * 4 < form.line
    exact = exact_scale(Problem(kind, scale_dtype, 0, 0, group, 0, dtype))
    scaling = "raw" if where != "before" else "mul" if exact else "split"
    return {
        "CODE": form.code,
        "DT": dtype,
        "SCALE": scale_dtype,
        "LINE": form.line,
        "GROUP": group,
        "SPAN": how.span,
        "WIDTH": how.width,
        "FIELDS": how.fields,
        "ZERO": mode,
        "HOW": scaling,
        "ASM": text(form.code, dtype, scale_dtype, scaling, mode, two) if assembly else "",
        "GLOBAL": dividing,
    }
