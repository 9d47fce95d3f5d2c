"""Static scales of inputs: each choice against the same function applied to the inputs themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import calibration_rows, numerics
from quantkit import plan as planning
from quantkit.errors import InputError
from quantkit.numerics._activations import Magnitudes
from quantkit.recipe import Recipe
from quantkit.stats import Observer

STATIC_INT8 = {"weights": {"number": "int8"}, "activations": {"number": "int8", "dynamic": False}}
FIRST = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")  # exact: nothing before is rounded
CHOICES = ("absmax", "percentile", "mse")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token of the calibration rows, which occurs once, has an outlier: there the choices differ."""
    folder = tiny.save(tmp_path_factory.mktemp("models") / "model")
    rows = calibration_rows.read(planning.make(recipe(folder, "FP8", "mse")), quantkit.progress.Silent())
    assert rows is not None
    tokens, counts = rows.ids_RL.unique(return_counts=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][int(tokens[counts == 1][0]), 5] = 50
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def recipe(model: Path, scheme: Any, rule: str) -> Recipe:
    return Recipe.from_any(
        {
            "model": str(model),
            "scheme": scheme,
            "method": "rtn",
            "calibration": {"samples": 6, "length": 48, "batch_size": 4, "input_scale": rule},
            "validate": "none",
        }
    )


def inputs(model: Path, settled: Recipe) -> torch.Tensor:
    """All that the first block's projections see, padding left out, float32 (tokens, K)."""
    rows = calibration_rows.read(planning.make(settled), quantkit.progress.Silent())
    assert rows is not None
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    dense.get_submodule(FIRST[0]).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        for ids, mask in zip(rows.ids_RL.split(4), rows.mask_RL.split(4), strict=True):
            dense(input_ids=ids)
            seen[-1] = seen[-1][mask]
    return torch.cat(seen)


@pytest.mark.parametrize("scheme", ["FP8", STATIC_INT8], ids=["fp8", "int8"])
def test_each_choice_is_the_function_of_the_inputs(scheme: Any, model: Path, tmp_path: Path) -> None:
    found = {}
    for rule in CHOICES:
        settled = recipe(model, scheme, rule)
        activations = next(iter(planning.make(settled).quantized)).scheme.activations  # type: ignore[union-attr]
        assert activations is not None
        written = load_file(quantkit.quantize(settled, out=tmp_path / rule, device="cpu").out / "model.safetensors")
        x = inputs(model, settled)
        if rule == "absmax":
            number = numerics.get(activations.number)
            expected = number.qparams(x, activations, scale_dtype=torch.bfloat16).scale_NG.reshape(1)
        else:
            counted = Magnitudes()
            counted.update(x)
            expected = counted.scale(activations, rule).bfloat16()
        for name in FIRST:
            assert torch.equal(written[f"{name}.input_scale"], expected), (rule, name)
        found[rule] = expected.item()
    assert found["mse"] < found["absmax"] or scheme == "FP8", found
    assert found["percentile"] < found["absmax"], found


def test_the_global_scale_of_nvfp4_stays_that_of_the_largest(model: Path, tmp_path: Path) -> None:
    outs = [quantkit.quantize(recipe(model, "NVFP4", rule), out=tmp_path / rule, device="cpu").out for rule in CHOICES]
    weights = [load_file(out / "model.safetensors") for out in outs]
    for other in weights[1:]:
        assert all(torch.equal(weights[0][n].view(torch.uint8), t.view(torch.uint8)) for n, t in other.items())


def test_the_observer_counts_magnitudes_without_padding() -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    observer = Observer(frozenset({"magnitudes"}), 8, "cpu")
    observer.update(x, mask)
    alone = Magnitudes()
    alone.update(x[mask])
    stats = observer.result()
    assert stats.magnitudes is not None and torch.equal(stats.magnitudes, alone.counts)
    assert stats.absmax_K is None and stats.tokens == 7 and int(alone.counts.sum()) == 56
    with pytest.raises(InputError, match="NaN or Inf"):
        observer.update(torch.full((1, 1, 8), float("inf")))
