"""Every format that quantkit reads stays packed in transformers, computes what its codes say, and is saved alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import packed_models
import pytest
import torch
import transformers
from library_checkpoints import config_of
from packed_models import inputs_of
from safetensors.torch import load_file

from quantkit.numerics._activations import fake_quantize
from quantkit.presets import PRESETS
from quantkit.runtime.linear import PackedLinear
from quantkit.types import Scheme, TensorScheme

IDS = torch.arange(3, 19)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits.float()
    return found


def reference(folder: Path, decoded: dict[str, torch.Tensor], schemes: dict[str, Scheme], dtype: torch.dtype) -> Any:
    """The dense model with decoded weights, its inputs rounded by numerics."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    tensors = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, p in model.named_parameters():
            layer = name.removesuffix(".weight")
            p.copy_(decoded[layer] if layer in decoded else tensors[name])
    for name, scheme in schemes.items():
        if scheme.activations is None:
            continue
        given = inputs_of(scheme)
        scale = (
            None if given is None else given.global_scale if scheme.activations.number == "nvfp4" else given.scale_NG
        )

        def rounds(module: Any, args: Any, a: Any = scheme.activations, scale: Any = scale) -> Any:
            return (fake_quantize(args[0], a, scale),)

        model.get_submodule(name).register_forward_pre_hook(rounds)
    return model


def loaded(folder: Path, **kwargs: Any) -> tuple[Any, dict[str, PackedLinear]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    return model, {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


def saved_alike(model: Any, folder: Path, place: Path) -> None:
    model.save_pretrained(place)
    before, after = load_file(folder / "model.safetensors"), load_file(place / "model.safetensors")
    assert before.keys() == after.keys()
    for key, t in before.items():
        if key.endswith("e_score_correction_bias"):  # transformers keeps it in float32
            t = t.float()
        assert (t.dtype, t.shape) == (after[key].dtype, after[key].shape), key
        assert t.reshape(-1).view(torch.uint8).equal(after[key].reshape(-1).view(torch.uint8)), key
    assert config_of(folder)["quantization_config"] == config_of(place)["quantization_config"]


CASES: dict[str, tuple[str, Scheme, str]] = {
    **{f"ct {name}": ("compressed-tensors", scheme, "") for name, scheme in PRESETS.items() if name != "INT8"},
    "gptq": ("gptq", PRESETS["W4A16"], ""),
    "gptq asymmetric, v2": ("gptq", PRESETS["W4A16_ASYM"], ""),
    "gptq 3 bits": ("gptq", PRESETS["W3A16"], ""),
    "awq": ("awq", PRESETS["W4A16_ASYM"], ""),
    "awq symmetric": ("awq", PRESETS["W4A16"], ""),
    "fp8": ("fp8-block", PRESETS["FP8_BLOCK"], ""),
    "modelopt FP8": ("modelopt", PRESETS["FP8"], ""),
    "modelopt NVFP4": ("modelopt", PRESETS["NVFP4"], ""),
    "modelopt W4A16_NVFP4": ("modelopt", PRESETS["NVFP4A16"], ""),
    "modelopt W4A16_AWQ": ("modelopt", PRESETS["W4A16"], ""),
    "ct W8A8 asymmetric inputs": (
        "compressed-tensors",
        Scheme(TensorScheme("int8"), TensorScheme("int8", "token", None, False, True)),
        "",
    ),
    "ct W8A8 static": ("compressed-tensors", Scheme(TensorScheme("int8"), TensorScheme("int8", "tensor")), ""),
    "ct W8A8 whole tensors": (
        "compressed-tensors",
        Scheme(TensorScheme("int8", "tensor"), TensorScheme("int8", "tensor", dynamic=True)),
        "",
    ),
    "ct int8 with zero points": (
        "compressed-tensors",
        Scheme(TensorScheme("int8", symmetric=False), TensorScheme("int8", "token", dynamic=True)),
        "",
    ),
    "ct FP8 for weights alone": ("compressed-tensors", Scheme(TensorScheme("fp8_e4m3", "tensor")), ""),
    "ct FP8 tiles for weights alone": (
        "compressed-tensors",
        Scheme(TensorScheme("fp8_e4m3", "block", block_shape=(128, 128))),
        "",
    ),
    "ct FP8 small tiles": (
        "compressed-tensors",
        Scheme(TensorScheme("fp8_e4m3", "block", block_shape=(64, 32)), PRESETS["FP8_BLOCK"].activations),
        "",
    ),
    "ct int4 in groups of 8": ("compressed-tensors", Scheme(TensorScheme("int4", "group", 8, False)), "plain"),
    "ct int5 a channel": ("compressed-tensors", Scheme(TensorScheme("int5", symmetric=False)), ""),
}


@pytest.mark.parametrize("name", CASES)
def test_a_format_stays_packed_and_computes_and_is_saved_alike(name: str, tmp_path: Path) -> None:
    form, scheme, path = CASES[name]
    decoded = packed_models.save(tmp_path / "m", form, scheme)
    model, layers = loaded(tmp_path / "m", dtype=torch.float32)
    assert layers.keys() == decoded.keys()
    if path:
        assert {m.held.path for m in layers.values()} == {path}
    exact = reference(tmp_path / "m", decoded, dict.fromkeys(decoded, scheme), torch.float32)
    for layer, m in layers.items():
        last_bit = 1e-6 if scheme.weights.number == "nvfp4" else 0  # its two scales, in one order or the other
        torch.testing.assert_close(m.weight, decoded[layer], rtol=last_bit, atol=0)
    ours, theirs = logits(model), logits(exact)
    assert (ours - theirs).norm() <= 2e-3 * theirs.norm()
    saved_alike(loaded(tmp_path / "m")[0], tmp_path / "m", tmp_path / "again")
