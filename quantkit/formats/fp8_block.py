"""FP8 in blocks of 128 x 128, the layout of DeepSeek-V3: `quant_method: fp8`, read by transformers and every engine.

    weight             float8_e4m3fn (N, K)
    weight_scale_inv   float32 (ceil(N / 128), ceil(K / 128))        w = weight * weight_scale_inv, despite its name

Readers quantize activations as they come, a scale for each 1 x 128 of a token; the config has no word for weights
alone, so that scheme is refused. So are dimensions that are not multiples of 128: transformers takes N // scale rows
for the block, and with 448 rows it loads wrong weights without a warning. They are read, with blocks of 128: DeepSeek's
own kv_a_proj_with_mqa has 576 rows. Scales of other floats, and E8M0 (`scale_fmt: ue8m0`), are read as what they are
worth. A scale per tensor is not read: transformers and vLLM call its tensor by different names.
Source: transformers' FP8 quantizer, on CPU (tests/test_format_fp8_block.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantkit.errors import InputError
from quantkit.formats._shared import (
    FLOATS,
    LARGEST,
    ReadConfig,
    Unsupported,
    check,
    dense,
    fits,
    one_scheme,
    reading,
    strings,
)
from quantkit.types import QParams, QuantizedTensor, Scheme, TensorScheme, TensorSpec

QUANT_METHOD = "fp8"
MARKER = "weight_scale_inv"
SCALE_DTYPE = "F32"
BLOCK = 128
WEIGHTS = TensorScheme("fp8_e4m3", "block", block_shape=(BLOCK, BLOCK))
ACTIVATIONS = TensorScheme("fp8_e4m3", "group", BLOCK, dynamic=True)


def tensors(shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
    """Every tensor that a linear layer (N, K) has on disk, bias apart. `dtype`, the model's, plays no part.

    Raises InputError for a scheme that is not held, or a shape that blocks do not divide.
    """
    if scheme.weights != WEIGHTS:
        w = scheme.weights
        raise InputError(f"fp8-block: {w.number} weights per {w.strategy} cannot be written; fp8_e4m3 in 128 x 128 can")
    if scheme.activations != ACTIVATIONS:
        a = scheme.activations
        what = f"{a.number} activations per {a.strategy}" if a else "weights alone"
        raise InputError(
            f"fp8-block: {what} cannot be said; its readers quantize activations to fp8_e4m3 in groups of 128, "
            "dynamic; use compressed-tensors"
        )
    n, k = shape
    for name, size in (("out_features", n), ("in_features", k)):
        if size % BLOCK:
            raise InputError(
                f"fp8-block: {name} {size} is not a multiple of 128, and transformers would infer another block and "
                "load wrong weights without a warning; use FP8_DYNAMIC, or leave the layer dense"
            )
    return {
        "weight": TensorSpec("F8_E4M3", shape),
        "weight_scale_inv": TensorSpec("F32", (n // BLOCK, k // BLOCK)),
    }


def pack(
    q: QuantizedTensor, activations: TensorScheme | None = None, inputs: QParams | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a quantized weight, contiguous, as `tensors` lists them.

    activations  of the layer, when they are known; nothing of them is stored
    Raises InputError for what `tensors` refuses, or a scale that float32 does not have.
    """
    tensors(q.shape, Scheme(q.scheme, activations or ACTIVATIONS), "BF16")
    scale = fits("fp8-block", "weight_scale_inv", q.qparams.scale_NG, torch.float32)
    return {"weight": q.codes_NK.contiguous(), "weight_scale_inv": scale.contiguous()}


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor:
    """The codes and scales of a layer; the inverse of `pack`, and more: a ragged last block, scales of other dtypes.

    Raises InputError for tensors that are missing or do not fit.
    """
    if "weight" not in tensors or tensors["weight"].ndim != 2:
        raise InputError("fp8-block: weight (N, K) is missing")
    n, k = tensors["weight"].shape
    rows, columns = scheme.weights.block_shape or (BLOCK, BLOCK)
    found = dict(tensors)
    scale = found.get("weight_scale_inv")
    if scale is not None and scale.dtype in (*FLOATS, torch.float8_e8m0fnu):
        found["weight_scale_inv"] = scale = scale.float()  # exact from each of them
    grid = (-(-n // rows), -(-k // columns))
    check("fp8-block", found, {"weight": TensorSpec("F8_E4M3", (n, k)), "weight_scale_inv": TensorSpec("F32", grid)})
    return QuantizedTensor(found["weight"], QParams(found["weight_scale_inv"]), scheme.weights)


def shape(specs: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int] | None:
    """Shape (N, K) of a layer from the headers of its tensors; None when it is not packed."""
    if MARKER not in specs or "weight" not in specs:
        return None
    n, k = specs["weight"].shape
    return n, k


# quantization_config -------------------------------------------------------------------------------------------------


def config(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    schemes  every linear layer's on-disk name -> its scheme, or None when it is left dense. Dense layers go by their
             whole names into `modules_to_not_convert` (transformers, TensorRT-LLM) and `ignored_layers` (vLLM).
    Raises InputError for mixed schemes, one that is not held, or a dense name inside a quantized one.
    """
    tensors((BLOCK, BLOCK), one_scheme("fp8-block", schemes, "its config has one scheme for all layers"), "BF16")
    names = dense("fp8-block", schemes)
    return {
        "quant_method": QUANT_METHOD,
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": names,
        "ignored_layers": names,
    }


def files(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """Further files that belong beside the weights: none."""
    return {}


def read_config(quantization_config: Mapping[str, Any]) -> ReadConfig:
    """Reads a `quantization_config`. Never raises for its content: what cannot be held is said in `unsupported`."""
    return reading(QUANT_METHOD, _read, quantization_config)


def _read(c: Mapping[str, Any]) -> ReadConfig:
    block = c.get("weight_block_size")
    if block is None:
        raise Unsupported("weight_block_size is not set: a scale per tensor, which readers find under different names")
    if (
        not isinstance(block, list | tuple)
        or [type(x) for x in block] != [int, int]
        or min(block) < 1
        or max(block) > LARGEST
    ):
        raise Unsupported(f"weight_block_size is {block!r}, not two positive integers")
    for key, known in (("fmt", "e4m3"), ("activation_scheme", "dynamic"), ("expert_dtype", "fp8")):
        if c.get(key, known) != known:
            raise Unsupported(f"{key} is {c[key]!r}, not {known!r}")
    if c.get("scale_fmt", "float") not in ("float", "ue8m0"):
        raise Unsupported(f"scale_fmt is {c['scale_fmt']!r}, not 'float' or 'ue8m0'")
    names = [*strings("modules_to_not_convert", c.get("modules_to_not_convert"))]
    names += [x for x in strings("ignored_layers", c.get("ignored_layers")) if x not in names]
    scheme = Scheme(TensorScheme("fp8_e4m3", "block", block_shape=(block[0], block[1])), ACTIVATIONS)
    return ReadConfig(scheme, tuple(names) or ("lm_head",), reads=unpack)
