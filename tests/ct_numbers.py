"""compressed-tensors as an oracle: the scales, zero points and codes that the library gives a tensor."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from quantkit.types import TensorScheme


def args(scheme: TensorScheme, **more: object) -> QuantizationArgs:
    """The library's description of a scheme."""
    fields: dict[str, object] = {"symmetric": scheme.symmetric, "strategy": scheme.strategy, "dynamic": scheme.dynamic}
    if scheme.strategy == "group":
        fields["group_size"] = scheme.group_size
    if scheme.block_shape:
        fields["block_structure"] = list(scheme.block_shape)
    if scheme.number.startswith("int"):
        fields |= {"type": "int", "num_bits": int(scheme.number[3:])}
    elif scheme.number == "nvfp4":
        scale = {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn, "strategy": "tensor_group"}
        fields |= {"type": "float", "num_bits": 4, **scale, "dynamic": "local" if scheme.dynamic else False}
    elif scheme.number.startswith("mx"):
        bits = {"mxfp8_e4m3": 8, "mxfp6_e2m3": 6, "mxfp4": 4}[scheme.number]
        fields |= {"type": "float", "num_bits": bits, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
    else:
        fields |= {"type": "float", "num_bits": {"fp8_e4m3": 8}[scheme.number]}
    return QuantizationArgs(**{**fields, **more})


def extremes(w: torch.Tensor, scheme: TensorScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value that share a scale, in the weight's dtype: (N, G), or () for the whole tensor."""
    n, k = w.shape
    if scheme.strategy == "tensor":
        return w.min(), w.max()
    if scheme.strategy == "block":
        assert scheme.block_shape is not None
        tiles = [list(rows.split(scheme.block_shape[1], 1)) for rows in w.split(scheme.block_shape[0], 0)]
        low, high = ([[f(t) for t in row] for row in tiles] for f in (torch.min, torch.max))
        return torch.stack([torch.stack(x) for x in low]), torch.stack([torch.stack(x) for x in high])
    groups = w.reshape(n, -1, scheme.group_size or k)
    return groups.amin(-1), groups.amax(-1)


def qparams(w: torch.Tensor, scheme: TensorScheme) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Scale, zero point (None when symmetric) and global scale (None but for NVFP4)."""
    low, high = extremes(w, scheme)
    whole = generate_gparam(w.min(), w.max()) if scheme.number == "nvfp4" else None
    scale, zero = calculate_qparams(low, high, args(scheme), global_scale=whole)
    return scale, None if scheme.symmetric else zero, whole


def codes(w: torch.Tensor, scheme: TensorScheme, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What each weight is rounded to, in units of its scale: as `dtype`, or as floats in the weight's dtype."""
    scale, zero, whole = qparams(w, scheme)
    return quantize(w, scale, zero, args(scheme), dtype=dtype, global_scale=whole)
