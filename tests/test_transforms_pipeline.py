"""Transforms from a recipe to an output: the function stays, the folds are in the file, and any method follows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import convert
from quantkit.errors import InputError

KINDS = ["llama-tied", "qwen2", "phi3", "gemma", "qwen3-moe", "deepseek"]
CALIBRATION = {"data": "builtin:pydocs", "samples": 4, "length": 32, "batch_size": 2}


def recipe(model: object, **changes: Any) -> dict[str, Any]:
    """Eight bits, so that what is left of a difference is small beside a wrong fold."""
    scheme = {"preset": "W8A16", "group_size": 32}
    export = {"engines": ["transformers"]}
    return {
        "model": str(model),
        "scheme": scheme,
        "method": "rtn",
        "calibration": CALIBRATION,
        "validate": "none",
        "export": export,
        **changes,
    }


def logits(folder: Path, scratch: Path | None = None) -> torch.Tensor:
    """Of a folder as stock transformers loads it; of a quantized one, of its decoded weights."""
    if scratch is not None:
        scratch.mkdir()
        convert.dense_copy(folder, scratch)
        folder = scratch
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(10, 4000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits.double()


def difference(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Of the median token, relative: rounding sends some token to another expert, and that one is far off."""
    return float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).median())


@pytest.mark.parametrize("transform", ["awq", {"smoothquant": {"alpha": 0.5}}, "rotation"], ids=["awq", "sq", "rot"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_computes_what_the_model_computes(kind: str, transform: Any, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", kind)
    plain = quantkit.quantize(recipe(folder), out=tmp_path / "plain", device="cpu")
    changed = quantkit.quantize(recipe(folder, transforms=[transform]), out=tmp_path / "out", device="cpu")
    exact = logits(folder)
    error = difference(logits(changed.out, tmp_path / "dense"), exact)
    without = difference(logits(plain.out, tmp_path / "dense-plain"), exact)
    # A rotation moves every weight that stays dense to other bfloat16 values, the embeddings among them.
    assert error < 2 * without + (0.04 if transform == "rotation" else 0.005)
    if transform == "rotation":
        assert changed.summary["folds"] == []
        assert json.loads((changed.out / "config.json").read_text())["tie_word_embeddings"] is False or kind in (
            "qwen2",
            "phi3",
            "qwen3-moe",
            "deepseek",
        )
    else:
        producers = {x["producer"] for x in changed.summary["folds"]}
        norms = load_file(changed.out / "model.safetensors")
        before = load_file(folder / "model.safetensors")
        moved = {n.removesuffix(".weight") for n, t in before.items() if "norm" in n and not torch.equal(t, norms[n])}
        assert moved and moved <= producers


def test_a_rotated_model_has_a_head_of_its_own(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "llama-tied")
    out = quantkit.quantize(recipe(folder, transforms=["rotation"]), out=tmp_path / "out", device="cpu").out
    tensors = load_file(out / "model.safetensors")
    assert tensors["lm_head.weight"].shape == tensors["model.embed_tokens.weight"].shape
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert bool((tensors["model.norm.weight"] == 1).all())


def test_transforms_follow_each_other_and_gptq_follows_them(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "qwen3")
    changes = {"transforms": ["rotation", {"smoothquant": {"alpha": 0.5}}, {"awq": {"grid": 4}}], "method": "gptq"}
    done = quantkit.quantize(recipe(folder, **changes), out=tmp_path / "out", device="cpu")
    exact = logits(folder)
    assert difference(logits(done.out, tmp_path / "dense"), exact) < 0.04
    assert {x["transform"] for x in done.summary["folds"]} == {"smoothquant", "awq"}


def test_the_statistics_that_followed_a_fold_are_those_of_the_folded_model(tmp_path: Path) -> None:
    """What gptq is given after a fold, against the inputs that the folded block itself has."""
    from quantkit import pipeline, plan
    from quantkit.progress import Silent
    from quantkit.recipe import Recipe

    folder = tiny.save(tmp_path / "model")
    planned = plan.make(Recipe.from_any(recipe(folder, transforms=["awq"], method="gptq")))
    compared: list[float] = []
    original = pipeline._solve

    def spy(run: Any, block: Any, batches: Any, statistics: Any, peaks: Any) -> Any:
        seen = statistics.at(0)
        for first, *_ in block.groups:
            inputs: list[torch.Tensor] = []

            def keep(_: str, x: torch.Tensor, into: list[torch.Tensor] = inputs) -> None:
                into.append(x)

            watch = pipeline.blocks.watched(planned.skeleton.model, [first], keep)
            module = planned.skeleton.model.get_submodule(block.name)
            with watch, torch.no_grad():
                for batch in batches:
                    pipeline.blocks.run(module, batch, block.index)
            x = torch.cat([i.reshape(-1, i.shape[-1]) for i in inputs]).double()
            gram = seen.stats[first].gram_KK.double()
            compared.append(float((gram - x.T @ x / len(x)).norm() / gram.norm()))
        return original(run, block, batches, statistics, peaks)

    (tmp_path / "out").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_solve", spy)
        pipeline.quantize(planned, tmp_path / "out", device=torch.device("cpu"), progress=Silent())
    assert len(compared) == 8 and max(compared) < 1e-5


def test_scales_of_the_kv_cache_are_those_of_folded_values(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    changes = {"kv_cache": "fp8", "transforms": ["awq"]}
    done = quantkit.quantize(recipe(folder, **changes), out=tmp_path / "out", device="cpu")
    folded = [x for x in done.summary["folds"] if x["producer"].endswith("v_proj")]
    assert folded, "no values were folded, so this shows nothing"
    plain = quantkit.quantize(recipe(folder, kv_cache="fp8"), out=tmp_path / "plain", device="cpu")
    a, b = (load_file(x.out / "model.safetensors") for x in (done, plain))
    name = folded[0]["producer"].removesuffix("v_proj")
    assert torch.allclose(a[f"{name}k_scale"], b[f"{name}k_scale"], rtol=0.02)
    assert not torch.allclose(a[f"{name}v_scale"], b[f"{name}v_scale"], rtol=0.001)


def test_a_fold_that_changes_the_function_is_undone_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the structure had missed a consumer: up_proj is left out of what norm feeds."""
    from dataclasses import replace

    from quantkit import links

    folder = tiny.save(tmp_path / "model")
    found = links.find

    def short(*args: Any) -> Any:
        pairs, warnings = found(*args)
        cut = [replace(x, consumers=tuple(c for c in x.consumers if not c.endswith("up_proj"))) for x in pairs]
        return tuple(cut), warnings

    monkeypatch.setattr(links, "find", short)
    progress = quantkit.progress.Silent()
    done = quantkit.quantize(recipe(folder, transforms=["awq"]), out=tmp_path / "out", device="cpu", progress=progress)
    assert any("post_attention_layernorm" in line and "undone" in line for line in progress.warnings)
    assert not any("post_attention_layernorm" in x["producer"] for x in done.summary["folds"])
    exact = logits(folder)
    assert difference(logits(done.out, tmp_path / "dense"), exact) < 0.02


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_an_architecture_that_cannot_be_rotated_is_refused(kind: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", kind)
    with pytest.raises(InputError, match="cannot be rotated, leave rotation out"):
        quantkit.quantize(recipe(folder, transforms=["rotation"]), out=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("transforms", "said"),
    [
        (["awk"], "unknown transform awk; known: awq, rotation, smoothquant"),
        (["awq", "awq"], "transform awq is given twice"),
        ([{"awq": {"gird": 3}}], "gird"),
        ([{"rotation": {"size": 48}}], "not a power of two"),
        ("awq", "a list"),
    ],
)
def test_bad_transforms_are_refused(transforms: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        quantkit.quantize(recipe("builtin:pydocs-llama-7m", transforms=transforms), out=tmp_path / "out")


@pytest.mark.parametrize("transform", ["awq", {"smoothquant": {"alpha": 0.3}}], ids=["awq", "sq"])
def test_rows_on_a_grid_of_powers_of_two_are_moved_along_it(transform: Any, tmp_path: Path) -> None:
    """Scales of MX formats are powers of two: divided by one, v and up round to the same values; by others, not."""
    folder = tiny.save(tmp_path / "model")
    what = recipe(folder, scheme="MXFP4A16", transforms=[transform])
    outputs = {"out": what, "plain": {**what, "transforms": []}}
    done = {name: quantkit.quantize(own, out=tmp_path / name, device="cpu") for name, own in outputs.items()}
    spans = {x["producer"]: (x["least"], x["largest"]) for x in done["out"].summary["folds"]}
    linear = {name: span for name, span in spans.items() if name.endswith("_proj")}
    assert all(math.log2(x).is_integer() for span in linear.values() for x in span)
    if transform != "awq":  # awq may find nothing better than 1
        assert {name.rpartition(".")[2] for name in linear} == {"v_proj", "up_proj"}
        assert any(span != (1.0, 1.0) for span in linear.values())
    assert not all(math.log2(x).is_integer() for name in spans.keys() - linear.keys() for x in spans[name])
