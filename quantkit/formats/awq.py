"""AWQ, the "gemm" layout of AutoAWQ: read by vLLM, SGLang and GPTQModel (transformers needs gptqmodel for it).

    qweight   int32 (K, N / 8)   codes 0 .. 15, eight neighbours along N a word; nibble i of word c is column
                                 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i], an order that a kernel's shifts like
    qzeros    int32 (G, N / 8)   zero points z, in the same order; z itself, not z - 1 as GPTQ's v1 has
    scales    fp16 (G, N)                                             w[n, k] = scales[g, n] * (q[k, n] - z[g, n])

4 bits only. What awq does to the weights before rounding, and folds into the layer before, leaves no trace here.
vLLM's kernels ask for zero points, so symmetric weights are written with z = 8 everywhere and `zero_point: true`; such
a checkpoint reads back as asymmetric, with the same weights. Scales must be exact in fp16, or they are refused.
Source: AutoAWQ, bit for bit (tests/test_format_awq.py holds its formulas).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantkit import numerics
from quantkit.errors import InputError
from quantkit.formats._shared import (
    FLOAT,
    ReadConfig,
    Unsupported,
    check,
    dense,
    fits,
    integer,
    offset_binary,
    one_scheme,
    reading,
    strings,
)
from quantkit.types import QParams, QuantizedTensor, Scheme, TensorScheme, TensorSpec
from quantkit_kernels.bits import pack_bits, unpack_bits

QUANT_METHOD = "awq"
MARKER = "qweight"
SCALE_DTYPE = "F16"
GROUP_SIZES = (16, 32, 64, 128)

# nibble i of a word holds column ORDER[i] of its eight
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)


def _check_scheme(scheme: Scheme) -> TensorScheme:
    w = scheme.weights
    if scheme.activations is not None:
        raise InputError(
            f"awq: holds weights alone, not {scheme.activations.number} activations; use compressed-tensors"
        )
    if w.number != "int4":
        raise InputError(f"awq: {w.number} cannot be written; the gemm layout has 4 bits")
    if w.strategy not in ("channel", "group"):
        raise InputError(f"awq: a scale per {w.strategy} cannot be written; use channel or group")
    if w.strategy == "group" and w.group_size not in GROUP_SIZES:
        known = ", ".join(map(str, GROUP_SIZES))
        raise InputError(f"awq: group_size {w.group_size} cannot be written; its readers have {known}, and channel")
    return w


def tensors(shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
    """Every tensor that a linear layer (N, K) has on disk, bias apart. `dtype`, the model's, plays no part.

    Raises InputError for a scheme that is not held, or out_features that are not a multiple of 8.
    """
    (n, k), groups = shape, numerics.groups(_check_scheme(scheme), shape[1])
    if n % 8:
        raise InputError(f"awq: out_features {n} is not a multiple of 8, the columns of a word; leave the layer dense")
    return {
        "qweight": TensorSpec("I32", (k, n // 8)),
        "qzeros": TensorSpec("I32", (groups, n // 8)),
        "scales": TensorSpec("F16", (groups, n)),
    }


def pack(
    q: QuantizedTensor, activations: TensorScheme | None = None, inputs: QParams | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a quantized weight, contiguous, as `tensors` lists them.

    Raises InputError for what `tensors` refuses, a code outside its range, or a scale that fp16 does not have.
    """
    tensors(q.shape, Scheme(q.scheme, activations), "F16")
    scale, zero = q.qparams.scale_NG, q.qparams.zero_NG
    if (zero is None) != q.scheme.symmetric:
        raise InputError(f"awq: zero points are {'absent' if zero is None else 'given'}, the scheme says else")
    if zero is None:
        zero = torch.zeros_like(scale, dtype=torch.int8)
    return {
        "qweight": _pack(q.codes_NK.t()),
        "qzeros": _pack(zero.t()),
        "scales": fits("awq", "scales", scale, torch.float16).t().contiguous(),
    }


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor:
    """The codes, scales and zero points of a layer; the inverse of `pack`.

    Raises InputError for tensors that are missing or do not fit, and zero points that contradict a symmetric scheme.
    """
    w = scheme.weights
    if "qweight" not in tensors or tensors["qweight"].ndim != 2:
        raise InputError("awq: qweight (K, N / 8) is missing")
    k, words = tensors["qweight"].shape
    groups = numerics.groups(w, k)
    check(
        "awq",
        tensors,
        {
            "qweight": TensorSpec("I32", (k, words)),
            "qzeros": TensorSpec("I32", (groups, words)),
            "scales": TensorSpec(FLOAT, (groups, words * 8)),
        },
    )
    zero = _unpack(tensors["qzeros"]).t().contiguous()
    if w.symmetric and bool((zero != 0).any()):
        raise InputError("awq: the config says zero_point: false, but zero points are not all 8")
    codes = _unpack(tensors["qweight"]).t().contiguous()
    return QuantizedTensor(codes, QParams(tensors["scales"].t().contiguous(), None if w.symmetric else zero), w)


def is_symmetric(qzeros: torch.Tensor) -> bool:
    """Whether all zero points are 8, as `pack` writes them for symmetric weights: then nothing is lost without them."""
    return bool((qzeros == 0x88888888 - (1 << 32)).all())


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Signed codes (R, N) -> words (R, N / 8)."""
    mixed = offset_binary(codes, 4).unflatten(-1, (-1, 8))[..., ORDER].flatten(-2)
    try:
        return pack_bits(mixed, 4)
    except ValueError as error:
        raise InputError(f"awq: with the offset 8, {error}") from error


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """Words (R, N / 8) -> signed codes (R, N)."""
    mixed = unpack_bits(words, 4, words.shape[-1] * 8).to(torch.int8) - 8
    return mixed.unflatten(-1, (-1, 8))[..., INVERSE].flatten(-2)


def shape(specs: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int] | None:
    """Shape (N, K) of a layer from the headers of its tensors; None when it is not packed."""
    if MARKER not in specs:
        return None
    k, words = specs[MARKER].shape
    return words * 8, k


# quantization_config -------------------------------------------------------------------------------------------------


def config(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    schemes  every linear layer's on-disk name -> its scheme, or None when it is left dense
    Raises InputError for mixed schemes, one that is not held, or a dense name inside a quantized one.
    """
    w = _check_scheme(one_scheme("awq", schemes, "its config has one scheme for all layers"))
    return {
        "quant_method": QUANT_METHOD,
        "bits": 4,
        "group_size": w.group_size if w.strategy == "group" else -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": dense("awq", schemes) or None,
    }


def files(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """Further files that belong beside the weights: none."""
    return {}


def read_config(quantization_config: Mapping[str, Any]) -> ReadConfig:
    """Reads a `quantization_config`. Never raises for its content: what cannot be held is said in `unsupported`."""
    return reading(QUANT_METHOD, _read, quantization_config)


def _read(c: Mapping[str, Any]) -> ReadConfig:
    version = str(c.get("version") or c.get("format") or "gemm").lower()
    if version != "gemm":
        raise Unsupported(f"version is {version!r}; only gemm is a portable layout")
    bits, size = integer(c, "bits", "w_bit"), integer(c, "group_size", "q_group_size", default=128)
    zero_point = c.get("zero_point", True)
    if bits != 4 or type(zero_point) is not bool or size == 0 or size < -1:
        raise Unsupported(f"bits is {bits}, group_size {size}, zero_point {zero_point!r}")
    ignore = strings("modules_to_not_convert", c.get("modules_to_not_convert"))
    strategy, group = ("channel", None) if size == -1 else ("group", size)
    scheme = Scheme(TensorScheme("int4", strategy, group, symmetric=not zero_point))  # type: ignore[arg-type]
    return ReadConfig(scheme, ignore if c.get("lm_head") else (*ignore, "lm_head"), reads=unpack)
