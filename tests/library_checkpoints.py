"""Tiny compressed-tensors checkpoints: compressed by the library itself, or packed by quantkit; and the same dense."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
from library_layers import inputs, library_inputs, library_qparams, quantized
from safetensors.torch import load_file, save_file

from quantkit.formats import compressed_tensors as ct
from quantkit.types import Scheme, TensorScheme

SMALL = {"vocab_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}


def llama(hidden: int = 128, inner: int = 256, heads: int = 4, **more: Any) -> Any:
    config = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    return transformers.LlamaConfig(**{**SMALL, **config, **more})


def qwen2(**more: Any) -> Any:
    config = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.Qwen2Config(**{**SMALL, **config, "tie_word_embeddings": True, **more})


def w(
    num_bits: int, strategy: str, group_size: int | None = None, symmetric: bool = True, **more: Any
) -> dict[str, Any]:
    """Arguments of a weight's scheme in the library's words."""
    return {"num_bits": num_bits, "strategy": strategy, "group_size": group_size, "symmetric": symmetric, **more}


def random_model(config: Any, kind: Any = transformers.AutoModelForCausalLM) -> Any:
    """A model in bfloat16 whose weights are large enough that its logits differ, and whose biases are not zero."""
    model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    model = model.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator) * 0.1
            p.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return model


def compress_by_library(folder: Path, model: Any, weights: dict[str, Any], **activations: Any) -> Path:
    """The library's own way from a model to a checkpoint, scales from minima and maxima."""
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights, **activations})
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]), show_progress=False
    )
    for module in (m for m in model.modules() if hasattr(m, "quantization_scheme")):
        found = library_qparams(module.weight.detach(), module.quantization_scheme.weights)
        for name, value in {**found, **library_inputs(module.quantization_scheme.input_activations)}.items():
            parameter = getattr(module, name)
            parameter.data.copy_(value.reshape(parameter.shape))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def layers(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of a checkpoint by layer, for the layers that are packed."""
    names = [key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")]
    return {n: {k.removeprefix(f"{n}."): v for k, v in tensors.items() if k.startswith(f"{n}.weight_")} for n in names}


def decoded(folder: Path, out: Path) -> Path:
    """The same checkpoint dense: each packed weight decompressed by the library."""
    config, tensors = config_of(folder), load_file(folder / "model.safetensors")
    quantization = config.pop("quantization_config")
    read = ct.read_config(quantization)
    for name, packed in layers(tensors).items():
        group = next(
            g for g in quantization["config_groups"].values() if g["targets"] == ["Linear"] or name in g["targets"]
        )
        assert read.scheme_for(name) is not None
        library = BaseCompressor.get_value_from_registry("pack-quantized")
        tensors[f"{name}.weight"] = library.decompress(packed, QuantizationScheme.model_validate(group))["weight"]
        for key in packed:
            del tensors[f"{name}.{key}"]
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


def pack_folder(
    folder: Path,
    schemes: Mapping[str, TensorScheme | Scheme],
    *,
    ignore: Iterable[str] = (),
    kv_cache: TensorScheme | None = None,
) -> Path:
    """Packs layers of a dense checkpoint in place with quantkit. schemes: name on disk -> scheme of the layer."""
    tensors, config = load_file(folder / "model.safetensors"), config_of(folder)
    named = {name: s if isinstance(s, Scheme) else Scheme(s) for name, s in schemes.items()}
    for name, scheme in named.items():
        q = quantized(tensors.pop(f"{name}.weight"), scheme.weights)
        tensors |= {f"{name}.{key}": t for key, t in ct.pack(q, scheme.activations, inputs(scheme)).items()}
    config["quantization_config"] = ct.config({**named, **dict.fromkeys(ignore)}, kv_cache)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
