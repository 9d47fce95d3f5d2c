"""transformers' own compressed-tensors, for what quantkit does not hold packed: with three of its faults mended.

It decompresses every layer to dense at the first forward, or at once with `dequantize=True`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from quantkit.errors import InputError
from quantkit.experts import is_fused
from quantkit.formats import compressed_tensors
from quantkit.formats.compressed_tensors import read_config
from quantkit.formats.compressed_tensors import words as in_words
from quantkit.runtime.planning import Files, NotHeld, expert_of

logger = logging.getLogger("quantkit")


class StockCompressedTensors(CompressedTensorsHfQuantizer):
    """Refuses experts that it would decode wrong, and keeps every weight in the model's dtype."""

    content: dict[str, Any]  # of the quantization_config, as it is in config.json

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        _check_experts(model, self.content, kwargs.get("checkpoint_files"))
        super()._process_model_before_weight_loading(model, **kwargs)
        _follow_dtype(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> Any:
        _experts_follow_dtype(model)
        return super()._process_model_after_weight_loading(model, **kwargs)

    @property
    def is_qat_trainable(self) -> bool:
        # transformers defines it as a property in one class and as a method in the other
        return bool(super().is_qat_trainable())


def _follow_dtype(model: nn.Module) -> None:
    """Gives weights that the library has decompressed the model's dtype.

    At the first forward it makes MX and NVFP4 weights bfloat16, whatever the model is, which in a float32 model cannot
    be multiplied. Its hook for that is there already, so this one comes after it.
    """

    def cast(module: nn.Module, args: Any) -> None:
        handle.remove()
        dtype: torch.dtype = module.dtype  # type: ignore[assignment]
        for linear in module.modules():
            if isinstance(linear, nn.Linear) and hasattr(linear, "quantization_scheme"):
                linear.weight.data = linear.weight.data.to(dtype)

    handle = model.register_forward_pre_hook(cast)


def _experts_follow_dtype(model: nn.Module) -> None:
    """Gives experts the model's dtype, and what else is too narrow for it, such as a router.

    The library decodes experts to the dtype of their scales, and transformers 5.17 leaves routers in theirs; in a
    float32 model neither can be multiplied.
    """
    dtype: torch.dtype = model.dtype  # type: ignore[assignment]
    for module in model.modules():
        for parameter in module._parameters.values() if not hasattr(module, "quantization_scheme") else ():
            if parameter is None or not parameter.is_floating_point() or parameter.dtype.itemsize == 1:
                continue
            if parameter.dtype.itemsize < dtype.itemsize or (is_fused(module) and parameter.dtype != dtype):
                parameter.data = parameter.data.to(dtype)


def _check_experts(model: nn.Module, content: dict[str, Any], files: Sequence[str] | None) -> None:
    """Refuses packed experts that transformers' own loader, which decodes and merges them, gets wrong or fails on.

    It was tried with every preset: right are symmetric integers that are packed, and FP8 a channel or a tensor. NVFP4
    loads without a word, and wrong. Raises InputError that names the first such expert.
    """
    config = read_config({"quant_method": "compressed-tensors", **content})
    if config.unsupported is not None or not files:
        return
    try:
        opened = Files.open(model, files, compressed_tensors)
    except NotHeld:
        return
    inputs: str | None = None
    modules = dict(model.named_modules())
    for key, name in opened.names.items():
        layer = key.rpartition(".")[0]
        expert = expert_of(layer, name, modules) if key.endswith("weight_packed") else None
        kind = "" if expert is None else type(modules[expert.owner]).__name__
        if kind not in ("", "Llama4TextExperts") and name.part is None:
            raise InputError(
                f"{layer}: is an expert of {kind}, whose experts transformers' own loader looks for in one tensor; "
                "load them packed, or quantkit convert FOLDER --to dense, and load that"
            )
        group = config.group_for(layer) if name.part is not None else None
        if group is None:
            continue
        w, a = group.scheme.weights, group.scheme.activations
        ints = group.format == "pack-quantized" and w.symmetric
        if not ints and not (group.format == "float-quantized" and w.strategy in ("channel", "tensor")):
            raise InputError(
                f"{layer}: experts of {in_words(group.scheme)} ({group.format}) are decoded wrong by transformers' own "
                "loader, or not at all; load them packed, or quantkit convert FOLDER --to dense, and load that"
            )
        inputs = inputs or (a.number if a is not None else None)
    if inputs is not None:
        logger.warning("quantkit: transformers runs experts dense, so their inputs are not quantized to %s", inputs)
