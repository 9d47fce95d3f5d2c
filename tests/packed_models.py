"""Tiny models in any checkpoint format, written by the format's own functions; no calibration, no pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file

from quantkit import formats, numerics
from quantkit.checkpoint import DTYPES
from quantkit.runtime.linear import PackedLinear
from quantkit.types import QParams, QuantizedTensor, Scheme

# Dimensions that every format takes: blocks of 128, groups of 128, words of 32.
DIMS: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_hidden_layers": 1,
}


def inputs_of(scheme: Scheme) -> QParams | None:
    """A calibrated scale of a layer's input, exact in every dtype."""
    if not scheme.calibrates_input:
        return None
    return QParams(torch.full((1, 1), 0.125, dtype=torch.bfloat16), None, torch.tensor([3.5]))


def quantized(w: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    number = numerics.get(scheme.weights.number)
    return numerics.quantize(w, number.qparams(w, scheme.weights, scale_dtype=scale_dtype), scheme.weights)


def save(
    folder: Path,
    form: str,
    scheme: Scheme | Mapping[str, Scheme],
    *,
    model: Mapping[str, Any] = DIMS,
    exact: str = "BF16",
    shard: str = "",
) -> dict[str, torch.Tensor]:
    """Writes a tiny llama whose projections are packed; returns each layer's decoded weight, float32.

    scheme  one for all, or by the last part of a layer's name with "" for all others
    exact   dtype to which scales are rounded before codes are found: BF16 ones fit every format
    shard   size of a shard, as "100KB"; left out, there is one file
    """
    tiny.save(folder, "llama", **model)
    module, tensors = formats.get(form), load_file(folder / "model.safetensors")
    stored = DTYPES[formats.scale_dtype(module, "BF16")]
    schemes: dict[str, Scheme | None] = {"lm_head": None}
    decoded = {}
    for key in [key for key in tensors if "_proj." in key]:
        name = key.removesuffix(".weight")
        own = scheme if isinstance(scheme, Scheme) else scheme.get(name.rpartition(".")[2], scheme[""])
        q = quantized(tensors.pop(key).float(), own, DTYPES[exact])
        decoded[name], schemes[name] = numerics.dequantize(q), own
        if q.qparams.scale_NG.dtype.itemsize > 1:
            q = QuantizedTensor(q.codes_NK, QParams(q.qparams.scale_NG.to(stored), q.qparams.zero_NG), q.scheme)
        tensors |= {f"{name}.{leaf}": t for leaf, t in module.pack(q, own.activations, inputs_of(own)).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if shard:
        split(folder, tensors, int(shard.removesuffix("KB")) * 1000)
    write_config(folder, module.config(schemes))
    for file, content in module.files(schemes).items():
        (folder / file).write_text(json.dumps(content))
    return decoded


def split(folder: Path, tensors: dict[str, torch.Tensor], size: int) -> None:
    """The same tensors in shards, cut without regard to layers."""
    (folder / "model.safetensors").unlink()
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, t in tensors.items():
        if shards[-1] and sum(x.nbytes for x in shards[-1].values()) + t.nbytes > size:
            shards.append({})
        shards[-1][name] = t
    weight_map: dict[str, str] = {}
    for i, part in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_config(folder: Path, quantization: dict[str, Any] | None, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


def decoding(model: Any) -> Any:
    """The model, which on a CPU too multiplies by decoded int4 weights, as compiled, joined and offloaded layers do."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.fits_words = False
    return model
