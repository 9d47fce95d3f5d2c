"""The presets are the library's, a recipe may name each, and the pipeline makes what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import numerics
from quantkit import plan as planning
from quantkit.errors import InputError
from quantkit.formats import compressed_tensors as ct
from quantkit.presets import PRESETS, UNQUANTIZED, group_size
from quantkit.recipe import Recipe
from quantkit.types import Scheme, TensorScheme


def test_every_preset_of_the_library_is_known_and_no_other() -> None:
    assert set(PRESETS) == set(PRESET_SCHEMES) - {UNQUANTIZED}
    assert PRESET_SCHEMES[UNQUANTIZED] == {}
    assert {"W2A16", "W3A16", "W4A16_ASYM", "W8A8", "FP8_BLOCK", "NVFP4", "MXFP4", "MXFP8"} <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_mean_what_the_library_means(name: str) -> None:
    """Down to the bytes of the config, but for the preset that is packed on purpose (test_format_*)."""
    theirs = QuantizationScheme(targets=["Linear"], **PRESET_SCHEMES[name])
    group = ct.config({"a": PRESETS[name]})["config_groups"]["group_0"]
    assert group["weights"] == json.loads(theirs.weights.model_dump_json())
    given = theirs.input_activations
    assert group["input_activations"] == (None if given is None else json.loads(given.model_dump_json()))
    if given is not None:
        assert PRESETS[name].calibrates_input == (given.dynamic is not True)


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_may_name_every_preset(name: str) -> None:
    recipe = Recipe.parse(f"model: m\nscheme: {name}\n")
    assert recipe.scheme.resolve() == PRESETS[name]
    assert recipe.scheme.label == name
    assert Recipe.parse(recipe.to_yaml()) == recipe


def test_unquantized_is_none() -> None:
    recipe = Recipe.parse("model: m\nscheme: UNQUANTIZED\nrules: [{match: a, scheme: FP8_DYNAMIC}]\n")
    assert recipe.scheme.resolve() is None
    assert recipe.to_dict()["scheme"] == "none"
    with pytest.raises(InputError, match="nothing would be quantized"):
        Recipe.parse("model: m\nscheme: UNQUANTIZED\n")


def test_only_integers_have_a_choice_of_groups() -> None:
    changeable = {name for name, scheme in PRESETS.items() if group_size(scheme) is not None}
    assert changeable == {n for n, s in PRESETS.items() if s.weights.number.startswith("int")}
    recipe = Recipe.parse("model: m\nscheme: {preset: W4AFP8, group_size: 64}\n")
    w4afp8 = PRESETS["W4AFP8"]
    assert recipe.scheme.resolve() == replace(w4afp8, weights=replace(w4afp8.weights, group_size=64))
    for preset, why in (("MXFP4", "no other groups"), ("FP8_DYNAMIC", "no groups"), ("FP8_BLOCK", "no groups")):
        with pytest.raises(InputError, match=f"{preset} has {why}; leave group_size out"):
            Recipe.parse(f"model: m\nscheme: {{preset: {preset}, group_size: 64}}\n")


FP8 = "fp8_e4m3"
SPELT_OUT = {
    "{weights: {number: int8}, activations: {number: int8}}": ("W8A8", "int8-channel-int8-token"),
    "{weights: {number: fp8_e4m3}, activations: {number: fp8_e4m3, strategy: token}}": (
        "FP8_DYNAMIC",
        "fp8_e4m3-channel-fp8_e4m3-token",
    ),
    "{weights: {number: fp8_e4m3, strategy: tensor}, activations: {number: fp8_e4m3, dynamic: false}}": (
        "FP8",
        "fp8_e4m3-tensor-fp8_e4m3-tensor-static",
    ),
    "{weights: {number: fp8_e4m3, block_shape: [128, 128]}, activations: {number: fp8_e4m3, group_size: 128}}": (
        "FP8_BLOCK",
        "fp8_e4m3-block-fp8_e4m3-g128",
    ),
    "{weights: {number: nvfp4}}": ("NVFP4A16", "nvfp4"),
    "{weights: {number: nvfp4}, activations: {number: nvfp4}}": ("NVFP4", "nvfp4-nvfp4"),
    "{weights: {number: mxfp4, group_size: 32}, activations: {number: fp8_e4m3, group_size: 128}}": (
        "MXFP4XFP8",
        "mxfp4-fp8_e4m3-g128",
    ),
}


@pytest.mark.parametrize("text", SPELT_OUT)
def test_a_preset_spelt_out(text: str) -> None:
    preset, label = SPELT_OUT[text]
    recipe = Recipe.parse(f"model: m\nscheme: {text}\n")
    assert recipe.scheme.resolve() == PRESETS[preset]
    assert recipe.scheme.label == label
    assert Recipe.parse(recipe.to_yaml()) == recipe


def test_static_and_dynamic_activations_of_a_tensor() -> None:
    for text, expected in (
        ("strategy: tensor", TensorScheme("int8", "tensor")),
        ("strategy: tensor, dynamic: true", TensorScheme("int8", "tensor", dynamic=True)),
        ("symmetric: false", TensorScheme("int8", "token", symmetric=False, dynamic=True)),
    ):
        recipe = Recipe.parse(
            f"model: m\nscheme: {{weights: {{number: int8}}, activations: {{number: int8, {text}}}}}\n"
        )
        assert recipe.scheme.resolve() == Scheme(TensorScheme("int8"), expected)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{preset: W4A16, activations: {number: int8}}", "scheme: activations go with weights"),
        ("{weights: {number: mxfp4, group_size: 64}}", "mxfp4 has a scale for 32 columns"),
        ("{weights: {number: nvfp4, strategy: channel}}", "nvfp4 has a scale for 16 columns"),
        ("{weights: {number: fp8_e4m3, symmetric: false}}", "fp8_e4m3 has no zero points"),
        ("{weights: {number: int8, strategy: block}}", "block_shape goes with strategy block"),
        (
            "{weights: {number: fp8_e4m3, strategy: tensor, block_shape: [8, 8]}}",
            "block_shape goes with strategy block",
        ),
        ("{weights: {number: fp8_e4m3, block_shape: [0, 8]}}", "block_shape.0: expected a number greater than"),
        ("{weights: {number: int8}, activations: {number: int9}}", "unknown number format int9; did you mean int8?"),
        ("{weights: {number: int8}, activations: {number: int8, strategy: channel}}", "expected 'tensor', 'token' or"),
        ("{weights: {number: int8}, activations: {number: int8, strategy: group}}", "group_size goes with strategy"),
        (
            "{weights: {number: int8}, activations: {number: int8, strategy: token, dynamic: false}}",
            "only a scale of the whole tensor can be calibrated",
        ),
        ("{weights: {number: int8}, activations: {nubmer: int8}}", "did you mean number?"),
    ],
)
def test_what_cannot_be_meant(text: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        Recipe.parse(f"model: m\nscheme: {text}\n")
    assert says in str(caught.value)


# through the pipeline ------------------------------------------------------------------------------------------------

CALIBRATION = {"data": "builtin:pydocs", "samples": 4, "length": 32, "batch_size": 2}


def recipe(model: Path, scheme: object, **changes: object) -> dict[str, object]:
    return {
        "model": str(model),
        "scheme": scheme,
        "method": "rtn",
        "calibration": CALIBRATION,
        "validate": "none",
        "export": {"engines": ["transformers"]},
        **changes,
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny") / "model", hidden_size=128, head_dim=32, intermediate_size=192)


def absmax(model: Path, recipe: Recipe) -> dict[str, float]:
    """The largest |x| that each linear of the original sees on the calibration rows; exact for the first block."""
    from quantkit import calibration_rows

    rows = calibration_rows.read(planning.make(recipe), quantkit.progress.Silent())
    assert rows is not None
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    seen: dict[str, float] = {}

    def watch(name: str) -> Any:
        return lambda _, x: seen.__setitem__(name, max(seen.get(name, 0.0), float(x[0].abs().max())))

    for name, module in original.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        original(rows.ids_RL)
    return seen


@pytest.mark.parametrize(
    ("scheme", "tensor", "expected"),
    [
        ("FP8", "input_scale", lambda amax: torch.tensor([amax / 448], dtype=torch.bfloat16)),
        ("NVFP4", "input_global_scale", lambda amax: torch.tensor([448 * 6 / amax])),
        (
            {"weights": {"number": "int8"}, "activations": {"number": "int8", "dynamic": False}},
            "input_scale",
            lambda amax: torch.tensor([2 * amax / 255], dtype=torch.bfloat16),
        ),
    ],
)
def test_scales_of_inputs_are_calibrated_whatever_the_method(
    scheme: Any, tensor: str, expected: Any, model: Path, tmp_path: Path
) -> None:
    settled = recipe(model, scheme)
    assert planning.make(Recipe.from_any(settled)).needs_data
    out = quantkit.quantize(settled, out=tmp_path / "out", device="cpu").out
    tensors = load_file(out / "model.safetensors")
    seen = absmax(model, Recipe.from_any(settled))
    first = [name for name in seen if ".layers.0." in name]
    assert len(first) == 7
    for name in first:
        found, wanted = tensors[f"{name}.{tensor}"], expected(seen[name])
        assert (found.dtype, found.shape) == (wanted.dtype, (1,))
        # behind a sum over channels, the last bits depend on how many rows went through at once
        tolerance = 0.0 if name.endswith(("q_proj", "k_proj", "v_proj")) else 0.01
        assert torch.allclose(found.float(), wanted.float(), rtol=tolerance, atol=0), name


@pytest.mark.parametrize("preset", ["FP8", "NVFP4"])
def test_layers_that_engines_fuse_share_their_scales(preset: str, model: Path, tmp_path: Path) -> None:
    """vLLM takes the largest of q, k and v, and loses accuracy when they differ."""
    out = quantkit.quantize(recipe(model, preset), out=tmp_path / "out", device="cpu").out
    tensors = load_file(out / "model.safetensors")
    names = ("weight_scale", "input_scale") if preset == "FP8" else ("weight_global_scale", "input_global_scale")
    for block in range(2):
        for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            for name in names:
                values = {float(tensors[f"model.layers.{block}.{layer}.{name}"]) for layer in fused}
                assert len(values) == 1, (fused, name)
    assert len({float(t) for n, t in tensors.items() if n.endswith(names[0])}) > 5


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("intermediate", [256, 320])
def test_tiles_never_reach_from_one_layer_into_the_next(method: str, intermediate: int, tmp_path: Path) -> None:
    """gate and up have 320 rows: 2.5 tiles. Solved as one weight, up's first tile would be half gate's."""
    model = tiny.save(
        tmp_path / "model", hidden_size=128, head_dim=32, intermediate_size=intermediate, num_hidden_layers=1
    )
    dense = [{"match": "*down_proj", "scheme": "none"}] if intermediate % 128 else []
    out = quantkit.quantize(
        recipe(model, "FP8_BLOCK", rules=dense, method={method: {"scale_search": "absmax"}}),
        out=tmp_path / "out",
        device="cpu",
    ).out
    read = ct.read_config(json.loads((out / "config.json").read_text())["quantization_config"])
    tensors, original = load_file(out / "model.safetensors"), load_file(model / "model.safetensors")
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"):
        layer = f"model.layers.0.{name}"
        q = read.unpack(layer, {k.removeprefix(f"{layer}."): t for k, t in tensors.items() if k.startswith(layer)})
        weight = original[f"{layer}.weight"]
        alone = numerics.get(FP8).qparams(weight, q.scheme, scale_dtype=torch.bfloat16)
        assert torch.equal(q.qparams.scale_NG, alone.scale_NG), name
        error = (numerics.dequantize(q) - weight.float()).norm() / weight.float().norm()
        assert error < (0.04 if method == "rtn" else 0.06), name


def test_dynamic_schemes_need_no_data(model: Path) -> None:
    for preset in ("FP8_DYNAMIC", "W8A8", "MXFP4A16", "NVFP4A16"):
        assert not planning.make(Recipe.from_any(recipe(model, preset))).needs_data
    assert planning.make(Recipe.from_any(recipe(model, "FP8_DYNAMIC", method="gptq"))).needs_data


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        ("FP8_BLOCK", r"mlp.down_proj 128x192: fp8_e4m3 activations: group_size 128 does not divide in_features 192"),
        ("MXFP4XFP8", r"mlp.down_proj 128x192: fp8_e4m3 activations: group_size 128"),
        ({"weights": {"number": "fp8_e5m2"}}, "fp8_e5m2 weights per channel cannot be written"),
        ({"weights": {"number": "mxint8"}}, "mxint8 weights per group of 32 cannot be written"),
        (
            {
                "weights": {"number": "int8"},
                "activations": {"number": "int8", "dynamic": False, "symmetric": False},
            },
            "static activations with zero points cannot be calibrated; make them symmetric or dynamic",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_work(scheme: object, says: str, model: Path) -> None:
    with pytest.raises(InputError, match=says):
        planning.make(Recipe.from_any(recipe(model, scheme)))


@pytest.mark.parametrize("preset", ["FP8", "FP8_DYNAMIC", "NVFP4", "MXFP4", "MXFP6A8", "MXFP8", "W8A8", "W4A8"])
def test_an_output_is_reloaded_and_measured(preset: str, model: Path, tmp_path: Path) -> None:
    check = {"perplexity": {"data": "builtin:pydocs-heldout", "windows": 2, "length": 32}, "gates": {"kl": 1.0}}
    rules = [{"match": "*down_proj", "scheme": "none"}] if preset == "W4A8" else []
    result = quantkit.quantize(recipe(model, preset, validate=check, rules=rules), out=tmp_path / "out", device="cpu")
    assert result.validation is not None and result.validation.status == "validated"
    assert 0 < result.validation.comparison.kl < (0.3 if "4" in preset else 0.02)


def test_args_that_the_library_would_refuse_are_never_written() -> None:
    for scheme in PRESETS.values():
        for group in ct.config({"a": scheme})["config_groups"].values():
            for args in (group["weights"], group["input_activations"]):
                assert args is None or QuantizationArgs.model_validate(args)
