"""compressed-tensors: the format that vLLM, SGLang, TensorRT-LLM and transformers all read.

`quantization_config` in config.json names groups of layers, each with a scheme and one of the library's formats; the
tensors of a layer depend on that format. Three parts, each a page:

    _ct_layouts.py     the formats: which tensors hold a weight's codes and scales
    _ct_calibrated.py  scales that calibration found: of inputs, of the KV cache
    _ct_config.py      `quantization_config`, written and read
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantkit import numerics
from quantkit.errors import InputError
from quantkit.formats._ct_calibrated import (
    input_specs,
    kv_tensors,
    pack_input,
    pack_kv,
    unpack_input,
    unpack_kv,
)
from quantkit.formats._ct_config import QUANT_METHOD, Group, ReadConfig, config, read_config
from quantkit.formats._ct_layouts import LAYOUTS, TORCH_DTYPES, layout, words
from quantkit.types import QParams, QuantizedTensor, Scheme, TensorScheme, TensorSpec

MARKER = "weight_scale"  # a tensor that quantized layers have, and dense ones lack

__all__ = [
    "LAYOUTS",
    "MARKER",
    "QUANT_METHOD",
    "TORCH_DTYPES",
    "Group",
    "ReadConfig",
    "config",
    "files",
    "kv_tensors",
    "layout",
    "pack",
    "pack_codes",
    "pack_kv",
    "pack_scales",
    "read_config",
    "shape",
    "tensors",
    "unpack",
    "unpack_input",
    "unpack_kv",
]


def tensors(shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
    """Every tensor that a linear layer (N, K) has on disk, bias apart: name after the layer's own -> dtype and shape.

    dtype  safetensors name of the model's dtype, which the scales have: "BF16"
    Raises InputError for a scheme that is not held, or a group size, of weights or inputs, that does not divide K.
    """
    specs = layout(scheme).tensors(shape, scheme.weights, dtype)
    if scheme.activations is not None:
        try:
            numerics.groups(scheme.activations, shape[1])
        except InputError as error:
            raise InputError(f"{scheme.activations.number} activations: {error}") from None
    return {**specs, **input_specs(scheme.activations, dtype)}


def pack(
    q: QuantizedTensor, activations: TensorScheme | None = None, inputs: QParams | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a quantized weight, contiguous, as `tensors` lists them.

    activations  the scheme of the layer's input: it takes part in the choice of the layout
    inputs       the calibrated scales of the input, where the scheme has them (`Scheme.calibrates_input`): scale (1, 1)
                 and zero (1, 1); of NVFP4 only the global scale is written
    Raises InputError for a scheme that is not held, a code outside its range, or scales that are missing.
    """
    scheme = Scheme(q.scheme, activations)
    return {**pack_codes(q.codes_NK, scheme), **pack_scales(q.qparams, scheme, q.shape, inputs)}


def pack_codes(codes_NK: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The tensor of `pack` that holds the codes, of some rows: a weight's is those of its rows, one after another."""
    held = layout(scheme)
    return {held.main: held.codes(codes_NK, scheme.weights).contiguous()}


def pack_scales(
    qparams: QParams, scheme: Scheme, shape: tuple[int, int], inputs: QParams | None = None
) -> dict[str, torch.Tensor]:
    """The other tensors of `pack`, of a weight of that shape (N, K)."""
    found = {**layout(scheme).scales(qparams, scheme.weights, shape), **pack_input(scheme.activations, inputs)}
    return {name: t.contiguous() for name, t in found.items()}


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor:
    """The codes, scales and zero points of a layer; the inverse of `pack`. `unpack_input` reads the input's scales.

    tensors  name after the layer's own -> tensor; other names are left alone. Where several layouts hold a scheme, they
             decide: codes of four bits lie in `weight` (a byte each) or in `weight_packed`.
    Raises InputError for a missing tensor, or one of another dtype or shape than the scheme needs.
    """
    held = [x for x in LAYOUTS.values() if x.holds(scheme)]
    if not held:
        raise InputError(f"compressed-tensors: {words(scheme)} cannot be read")
    return next((x for x in held if x.main in tensors), held[0]).unpack(tensors, scheme.weights)


def shape(specs: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int] | None:
    """Shape (N, K) of a layer from the headers of its tensors; None when it is not packed, or not to be seen there.

    pack-quantized pads its rows, so with a scale a row, or a tensor, only the content of weight_shape says what K is.
    """
    if MARKER not in specs:
        return None
    if "weight" in specs:
        n, k = specs["weight"].shape
        return n, k
    size = scheme.weights.group_size
    if size is None:
        return None
    n, groups = specs[MARKER].shape
    return n, groups * size


def files(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """Further files that belong beside the weights: none."""
    return {}
