"""gpt-oss: the MXFP4 experts of OpenAI's own checkpoints, `quant_method: mxfp4`. Read only.

    mlp.experts.gate_up_proj_blocks  uint8 (E, 2 I, H / 32, 16)    gate_up_proj_scales  uint8 (E, 2 I, H / 32)
    mlp.experts.down_proj_blocks     uint8 (E, H, I / 32, 16)      down_proj_scales     uint8 (E, H, I / 32)

    byte j of a block = code[2 j] | code[2 j + 1] << 4          w[e, n, k] = e2m1(code) * 2^(scale - 127)

Rows are out_features, as everywhere here; transformers' dense parameter is the transpose. Rows of gate_up_proj take
turns: even ones are gate, odd ones up. Nothing but these experts is quantized, and no other architecture is stored
like this, which is why there is nothing to write: compressed-tensors has MXFP4 for every linear layer.
Source: transformers' MXFP4 loader, on CPU (tests/test_format_gpt_oss.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from quantkit.errors import InputError
from quantkit.formats._shared import Override, ReadConfig, check, reading, strings, unpack_pairs
from quantkit.types import QParams, QuantizedTensor, Scheme, TensorScheme, TensorSpec

QUANT_METHOD = "mxfp4"
MARKER = "_blocks"  # after the parameter's name, without a dot
GROUP = 32
WEIGHTS = TensorScheme("mxfp4", "group", GROUP)
PARAMETERS = ("gate_up_proj", "down_proj")


def _refuse() -> NoReturn:
    raise InputError(
        "gpt-oss: is read, not written: it holds the experts of gpt-oss alone; export MXFP4 as compressed-tensors"
    )


def tensors(shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
    """Raises InputError: the format is not written."""
    _refuse()


def pack(
    q: QuantizedTensor, activations: TensorScheme | None = None, inputs: QParams | None = None
) -> dict[str, torch.Tensor]:
    """Raises InputError: the format is not written."""
    _refuse()


def config(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """Raises InputError: the format is not written."""
    _refuse()


def files(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """Raises InputError: the format is not written."""
    _refuse()


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor:
    """The codes and scales of one expert's weight (N, K).

    tensors  "_blocks" uint8 (N, K / 32, 16) and "_scales" uint8 (N, K / 32): one entry of the first dimension on disk
    Raises InputError for tensors that are missing or do not fit, or a scale that stands for NaN.
    """
    if "_blocks" not in tensors or tensors["_blocks"].ndim != 3:
        raise InputError("gpt-oss: _blocks (N, K / 32, 16) of one expert is missing")
    n, groups, size = tensors["_blocks"].shape
    if size != GROUP // 2:
        raise InputError(f"gpt-oss: _blocks has {size} bytes a block, not {GROUP // 2}")
    specs = {"_blocks": TensorSpec("U8", (n, groups, GROUP // 2)), "_scales": TensorSpec("U8", (n, groups))}
    check("gpt-oss", tensors, specs)
    scales = tensors["_scales"]
    if bool((scales == 255).any()):
        raise InputError(f"gpt-oss: {int((scales == 255).sum())} of {scales.numel()} scales are 255, which is NaN")
    return QuantizedTensor(unpack_pairs(tensors["_blocks"]).flatten(1), QParams(scales), scheme.weights)


def unpack_experts(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> list[QuantizedTensor]:
    """`unpack` of every expert: "_blocks" uint8 (E, N, K / 32, 16) and "_scales" uint8 (E, N, K / 32) as on disk."""
    for name in ("_blocks", "_scales"):
        if name not in tensors:
            raise InputError(f"gpt-oss: {name} is missing")
    blocks, scales = tensors["_blocks"], tensors["_scales"]
    if len(blocks) != len(scales):
        raise InputError(f"gpt-oss: _blocks has {len(blocks)} experts, _scales {len(scales)}")
    return [unpack({"_blocks": b, "_scales": s}, scheme) for b, s in zip(blocks, scales)]


def split_gate_up(q: QuantizedTensor) -> tuple[QuantizedTensor, QuantizedTensor]:
    """gate and up of one expert's gate_up_proj (2 I, K): its even and its odd rows, (I, K) each."""

    def rows(first: int) -> QuantizedTensor:
        scale = q.qparams.scale_NG[first::2].contiguous()
        return QuantizedTensor(q.codes_NK[first::2].contiguous(), QParams(scale), q.scheme)

    return rows(0), rows(1)


def shape(specs: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int] | None:
    """Shape (N, K) of one expert from the header of its "_blocks", with or without the dimension of experts."""
    if MARKER not in specs:
        return None
    n, groups, _ = specs[MARKER].shape[-3:]
    return n, groups * GROUP


def read_config(quantization_config: Mapping[str, Any]) -> ReadConfig:
    """Reads a `quantization_config`. What cannot be held is said in `unsupported`."""
    return reading(QUANT_METHOD, _read, quantization_config)


def _read(c: Mapping[str, Any]) -> ReadConfig:
    ignore = strings("modules_to_not_convert", c.get("modules_to_not_convert"))
    experts = tuple(Override(rf".*\.experts\.{name}$", Scheme(WEIGHTS)) for name in PARAMETERS)
    return ReadConfig(None, ignore, experts, unpack)
