"""Layers with one input in one launch: the same numbers, the same names, the same bytes when saved."""

from __future__ import annotations

import copy
from pathlib import Path

import packed_models
import pytest
import torch
from test_runtime_formats import IDS, loaded, logits, saved_alike

from quantkit.presets import PRESETS
from quantkit.runtime.joint import join, separate
from quantkit.types import Scheme, TensorScheme

CASES: dict[str, tuple[str, Scheme]] = {
    "W4A16": ("compressed-tensors", PRESETS["W4A16"]),
    "W3A16": ("compressed-tensors", PRESETS["W3A16"]),
    "asymmetric": ("gptq", PRESETS["W4A16_ASYM"]),
    "W8A8": ("compressed-tensors", PRESETS["W8A8"]),
    "W8A8 asymmetric inputs": (
        "compressed-tensors",
        Scheme(TensorScheme("int8"), TensorScheme("int8", "token", None, False, True)),
    ),
    "FP8": ("compressed-tensors", PRESETS["FP8"]),
    "fp8": ("fp8-block", PRESETS["FP8_BLOCK"]),
    "MXFP4": ("compressed-tensors", PRESETS["MXFP4"]),
    "NVFP4A16": ("compressed-tensors", PRESETS["NVFP4A16"]),
    "NVFP4": ("modelopt", PRESETS["NVFP4"]),
}


def sizes(layers: int = 2) -> dict[str, int]:
    return {**packed_models.DIMS, "num_hidden_layers": layers}


@pytest.mark.parametrize("name", CASES)
def test_joined_layers_compute_the_same_and_are_saved_alike(name: str, tmp_path: Path) -> None:
    packed_models.save(tmp_path / "m", *CASES[name], model=sizes())
    model, layers = loaded(tmp_path / "m")
    packed_models.decoding(model)
    before, footprint = logits(model), model.get_memory_footprint()
    weights = {key: layer.weight for key, layer in layers.items()}
    assert join(model) == 4 and join(model) == 0
    assert model.get_memory_footprint() <= footprint * 1.02  # scales of whole tensors become those of rows
    after = logits(model)
    assert (before - after).norm() <= 2e-3 * before.norm()
    assert all(torch.equal(layer.weight, weights[key]) for key, layer in layers.items())
    saved_alike(model, tmp_path / "m", tmp_path / "again")
    assert torch.equal(logits(copy.deepcopy(model)), after)
    separate(model)
    assert torch.equal(logits(model), before) and model.get_memory_footprint() == footprint
    saved_alike(model, tmp_path / "m", tmp_path / "once more")


def test_global_scales_of_their_own_become_one_a_row(tmp_path: Path) -> None:
    packed_models.save(tmp_path / "m", "compressed-tensors", PRESETS["NVFP4A16"], model=sizes(1))
    model, layers = loaded(tmp_path / "m", dtype=torch.float32)
    group = [layers[f"model.layers.0.self_attn.{n}_proj"] for n in "qkv"]
    wholes = [layer.tensors()["global_scale"].view(torch.float32).clone() for layer in group]
    assert len({float(whole) for whole in wholes}) == 3
    x = torch.eye(128)
    apart = [layer(x) for layer in group]  # the weights: each output is one product
    assert join(model) == 2
    joined = group[0].joint.lead.global_scale.view(torch.float32)
    assert torch.equal(joined, torch.cat(wholes).repeat_interleave(128))
    assert all(torch.equal(layer(x), y) for layer, y in zip(group, apart))
    own = [layer.tensors()["global_scale"].view(torch.float32) for layer in group]
    assert all(torch.equal(a, b) for a, b in zip(own, wholes))
    state = model.state_dict()
    assert state["model.layers.0.self_attn.k_proj.global_scale"].shape == (1,)


def test_what_differs_keeps_layers_apart(tmp_path: Path) -> None:
    mixed = {"": PRESETS["W4A16"], "k_proj": PRESETS["W8A16"], "up_proj": PRESETS["W4A16"]}
    packed_models.save(tmp_path / "mixed", "compressed-tensors", mixed, model=sizes(1))
    model, layers = loaded(tmp_path / "mixed")
    assert join(model) == 1
    assert layers["model.layers.0.self_attn.q_proj"].joint is None


def test_another_input_is_computed_apart(tmp_path: Path) -> None:
    packed_models.save(tmp_path / "m", *CASES["W4A16"], model=sizes(1))
    model, layers = loaded(tmp_path / "m", dtype=torch.float32)
    q, k = (layers[f"model.layers.0.self_attn.{n}_proj"] for n in "qk")
    x, y = torch.randn(3, 128), torch.randn(3, 128)
    expected = q(x), k(y), k(x)
    join(model)
    for _ in range(2):
        for found, wanted in zip((q(x), k(y), k(x)), expected):
            torch.testing.assert_close(found, wanted)


def test_it_compiles_whole_and_adapters_find_the_layers(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    packed_models.save(tmp_path / "m", *CASES["W4A16"], model=sizes())
    model = packed_models.decoding(loaded(tmp_path / "m")[0])
    join(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    wrapped = [name for name, module in tuned.named_modules() if hasattr(module, "lora_A")]
    assert len(wrapped) == 14 and not any("lead" in name for name in wrapped)
    tuned(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in tuned.named_parameters() if "lora_B" in name)
