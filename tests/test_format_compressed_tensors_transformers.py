"""Folders of compressed-tensors through stock transformers on the CPU: what loads, and what is known not to."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.quantizers.auto as auto
from library_checkpoints import compress_by_library, config_of, llama, pack_folder, random_model, w
from library_layers import INPUT_GLOBAL_SCALE, INPUT_SCALE
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from quantkit import numerics
from quantkit.checkpoint import Checkpoint
from quantkit.formats import compressed_tensors as ct
from quantkit.presets import PRESETS
from quantkit.types import Scheme, TensorScheme

IDS = torch.arange(3, 19)[None]
TINY = {"num_hidden_layers": 1}
LINEARS = [
    *(f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"),
    *(f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")),
]


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers as it is without quantkit."""
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "compressed-tensors", CompressedTensorsHfQuantizer)
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "compressed-tensors", CompressedTensorsConfig)


def packed(folder: Path, schemes: dict[str, Scheme], config: Any = None, **more: Any) -> Path:
    random_model(config or llama(**TINY)).save_pretrained(folder)
    return pack_folder(folder, schemes, ignore=["lm_head"], **more)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """Every layer's weight in bfloat16, read by quantkit."""
    tensors = load_file(folder / "model.safetensors")
    read = ct.read_config(quantization(folder))
    found = {}
    for name in LINEARS:
        own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        found[name] = numerics.dequantize(read.unpack(name, own)).bfloat16()
    return found


def quantization(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = config_of(folder)["quantization_config"]
    return config


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: model.get_submodule(name).weight.detach() for name in LINEARS}


@pytest.mark.usefixtures("stock")
@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"INT8", "W4A16_ASYM"}))
def test_every_preset_that_quantkit_writes_loads_and_runs(preset: str, tmp_path: Path) -> None:
    folder = packed(tmp_path / "m", dict.fromkeys(LINEARS, PRESETS[preset]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.isfinite(logits(model)).all()
    ours = decoded(folder)
    assert all(torch.equal(weight, ours[name]) for name, weight in weights(model).items())
    linear = model.get_submodule(LINEARS[0])
    if preset == "FP8":
        assert linear.input_scale.tolist() == [INPUT_SCALE]
    if preset == "NVFP4":
        assert linear.input_global_scale.tolist() == [INPUT_GLOBAL_SCALE]


STATIC = Scheme(TensorScheme("int8"), TensorScheme("int8", "tensor"))
STATIC_ASYM = Scheme(TensorScheme("int8"), TensorScheme("int8", "tensor", symmetric=False))
OTHERS = {
    "W8A8 static": STATIC,
    "W8A8 static, asymmetric input": STATIC_ASYM,
    "FP8 weight only per tensor": Scheme(TensorScheme("fp8_e4m3", "tensor")),
    "FP8 weight only in tiles": Scheme(TensorScheme("fp8_e4m3", "block", block_shape=(128, 128))),
    "W8A8 asymmetric": Scheme(TensorScheme("int8", symmetric=False), TensorScheme("int8", "token", dynamic=True)),
}


@pytest.mark.usefixtures("stock")
@pytest.mark.parametrize("name", OTHERS)
def test_other_schemes_load_and_run(name: str, tmp_path: Path) -> None:
    config = llama(128, 320, **TINY) if "tiles" in name else llama(96, 160, **TINY)
    folder = packed(tmp_path / "m", dict.fromkeys(LINEARS, OTHERS[name]), config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.isfinite(logits(model)).all()
    ours = decoded(folder)
    assert all(torch.equal(weight, ours[key]) for key, weight in weights(model).items())


LIBRARY = {
    "FP8_DYNAMIC": {"type": "float", "num_bits": 8, "strategy": "channel"},
    "NVFP4": {
        "type": "float",
        "num_bits": 4,
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
    },
    "MXFP6A8": {"type": "float", "num_bits": 6, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
}


@pytest.mark.parametrize("preset", LIBRARY)
def test_a_folder_that_the_library_wrote_is_read(preset: str, tmp_path: Path) -> None:
    group = ct.config({"a": PRESETS[preset]})["config_groups"]["group_0"]
    scheme = {**w(8, "channel"), **LIBRARY[preset]}
    folder = compress_by_library(
        tmp_path / "m", random_model(llama(**TINY)), scheme, input_activations=group["input_activations"]
    )
    config = quantization(folder)
    assert {**group, "targets": ["Linear"]} == config["config_groups"]["group_0"]
    assert ct.read_config(config).scheme_for(LINEARS[0]) == PRESETS[preset]
    dense = random_model(llama(**TINY))
    for name, weight in decoded(folder).items():
        original = dense.get_submodule(name).weight
        assert (weight - original).norm() / original.norm() < 0.12, name


# the mixed checkpoint ------------------------------------------------------------------------------------------------

MIXED = {name: PRESETS["FP8_DYNAMIC" if "self_attn" in name else "W4A16"] for name in LINEARS}
MIXED[LINEARS[-1]] = PRESETS["NVFP4A16"]


@pytest.mark.usefixtures("stock")
def test_mixed_precision_loads_and_runs(tmp_path: Path) -> None:
    folder = packed(tmp_path / "m", MIXED)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.isfinite(logits(model)).all()
    ours = decoded(folder)
    assert all(torch.equal(weight, ours[key]) for key, weight in weights(model).items())


@pytest.mark.usefixtures("stock")
def test_stock_transformers_cannot_dequantize_mixed_precision_while_loading(tmp_path: Path) -> None:
    folder = packed(tmp_path / "m", MIXED)
    with pytest.raises(Exception, match=r"mixed|conver|format"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True))


# what is known to fail -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stock")
@pytest.mark.parametrize("scheme", [PRESETS["W4A16_ASYM"], Scheme(TensorScheme("int4", symmetric=False))])
def test_stock_transformers_loads_asymmetric_packed_integers_only_with_dequantize(
    scheme: Scheme, tmp_path: Path
) -> None:
    """Its empty model has zero points that are not packed; quantkit's own loader keeps them packed (test_runtime)."""
    folder = packed(tmp_path / "m", dict.fromkeys(LINEARS, scheme))
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.bfloat16
        )
    ours = decoded(folder)
    assert all(torch.equal(weight, ours[key]) for key, weight in weights(model).items())


@pytest.mark.parametrize("preset", ["MXFP4A16", "MXFP8", "NVFP4A16"])
def test_stock_transformers_runs_mx_and_nvfp4_in_bfloat16_only_and_quantkit_in_float32_too(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packed(tmp_path / "m", dict.fromkeys(LINEARS, PRESETS[preset]))
    ours = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert torch.isfinite(ours).all()
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "compressed-tensors", CompressedTensorsHfQuantizer)
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "compressed-tensors", CompressedTensorsConfig)
    with pytest.raises(RuntimeError, match="same dtype"):
        logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    theirs = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    assert (ours - theirs).norm() / theirs.norm() < 0.1


@pytest.mark.usefixtures("stock")
def test_stock_transformers_cannot_run_fp8_block_with_a_width_that_128_does_not_divide(tmp_path: Path) -> None:
    """Its weights are right, its forward raises; `tensors` refuses to plan such a layer. Rows may be ragged."""
    folder = packed(tmp_path / "m", dict.fromkeys(LINEARS, PRESETS["FP8_BLOCK"]), llama(128, 320, **TINY))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(RuntimeError, match="unflatten"):
        logits(model)
    ours = decoded(folder)
    assert all(torch.equal(weight, ours[key]) for key, weight in weights(model).items())
    rows = packed(tmp_path / "rows", dict.fromkeys(LINEARS[:-1], PRESETS["FP8_BLOCK"]), llama(128, 320, **TINY))
    assert load_file(rows / "model.safetensors")[f"{LINEARS[-2]}.weight_scale"].shape == (3, 1)


# the KV cache --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stock")
@pytest.mark.parametrize("strategy", ["tensor", "head"])
def test_scales_of_a_kv_cache_are_loaded(strategy: Any, tmp_path: Path) -> None:
    scheme = TensorScheme("fp8_e4m3", strategy)
    folder = packed(tmp_path / "m", dict.fromkeys(LINEARS, PRESETS["FP8_DYNAMIC"]), kv_cache=scheme)
    heads = 1 if strategy == "tensor" else 4
    k, v = torch.arange(1, heads + 1).bfloat16() / 64, torch.arange(2, heads + 2).bfloat16() / 64
    attention = "model.layers.0.self_attn"
    add(folder, {f"{attention}.{key}": t for key, t in ct.pack_kv(k, v, scheme).items()})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    loaded = model.get_submodule(attention)
    assert loaded.k_scale.flatten().tolist() == k.tolist() and loaded.v_scale.flatten().tolist() == v.tolist()
    assert torch.isfinite(logits(model)).all()
    specs = ct.kv_tensors(scheme, heads, "BF16")
    assert {key: Checkpoint.open(folder).specs[f"{attention}.{key}"] for key in specs} == specs


def add(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, {"format": "pt"})
