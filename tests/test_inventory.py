"""Nothing is lost: every tensor and file of a source is copied, quantized or dropped with the reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

import quantkit
from quantkit import estimate, inspection, inventory, lint
from quantkit import plan as planning
from quantkit.errors import InputError
from quantkit.recipe import Recipe

torch.set_num_threads(1)

INT4 = {"weights": {"number": "int4", "strategy": "group", "group_size": 16}}


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"model": str(folder), "scheme": INT4, "method": "rtn", "validate": "none", **changes}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def add(folder: Path, more: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {**load_file(folder / "model.safetensors"), **more}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def multi_token(tensors: dict[str, torch.Tensor], block: str, prefix: str) -> dict[str, torch.Tensor]:
    """Layers that predict several tokens ahead (MTP): a block, and what leads to it."""
    own = {prefix + n.removeprefix(block): t.clone() for n, t in tensors.items() if n.startswith(block)}
    return {**own, f"{prefix}eh_proj.weight": randn(64, 128), f"{prefix}enorm.weight": randn(64)}


@pytest.mark.parametrize(
    ("kind", "block", "prefix"),
    [
        ("deepseek", "model.layers.1.", "model.layers.2."),
        pytest.param("qwen3-next", "model.layers.3.", "mtp.layers.0.", marks=pytest.mark.slow),
    ],
)
def test_layers_that_predict_ahead_and_old_buffers_are_copied(
    kind: str, block: str, prefix: str, tmp_path: Path
) -> None:
    folder = tiny.save(tmp_path / "model", kind)
    more = multi_token(load_file(folder / "model.safetensors"), block, prefix)
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(8).float()
    source = add(folder, more)
    done = quantkit.quantize(recipe(folder), out=tmp_path / "out")
    written = load_file(done.out / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in more.items())
    ignored = json.loads((done.out / "config.json").read_text())["quantization_config"]["ignore"]
    dense = {n.removesuffix(".weight") for n in more if n.endswith(".weight") and more[n].ndim == 2}
    assert dense and dense <= set(ignored)  # an engine that runs these layers must not look for codes
    assert sorted(done.summary["copied_tensors"]) == sorted(more)
    found = done.summary["tensors"]
    assert found["source"] == len(source) == found["quantized"] + found["copied"] and not found["dropped"]
    assert found["quantized"] == len(done.summary["layers"]) and not found["added"]
    assert not [f for f in lint.folder(done.out, ["vllm", "transformers"]) if f.level == lint.ERROR]
    model = transformers.AutoModelForCausalLM.from_pretrained(done.out)
    assert model(input_ids=torch.arange(4)[None], use_cache=False).logits.isfinite().all()


def test_a_wrapper_with_its_processor(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "gemma3-vision")
    small = {
        "preprocessor_config.json": b'{"image_processor_type": "Gemma3ImageProcessor"}',
        "processor_config.json": b'{"processor_class": "Gemma3Processor"}',
        "chat_template.jinja": b"{{ messages }}",
        "tokenizer.model": b"\x00\x01not text",
        "generation_config.json": b'{"do_sample": false}',
        "figures/loss.png": b"\x89PNG",
    }
    for name, content in small.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "consolidated.00.pth").write_bytes(b"pickle")
    (folder / "original").mkdir()
    save_file({"x": torch.zeros(2)}, folder / "original" / "model.safetensors")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    source = load_file(folder / "model.safetensors")
    done = quantkit.quantize(recipe(folder), out=tmp_path / "out")
    assert all((done.out / name).read_bytes() == content for name, content in small.items())
    files = done.summary["files"]
    assert small.keys() <= {*files["copied"]}
    dropped = {x["name"]: x["reason"] for x in files["dropped"]}
    assert dropped.keys() == {"consolidated.00.pth", "original/model.safetensors", ".gitattributes"}
    assert all(dropped.values())
    found = done.summary["tensors"]
    assert found["source"] == len(source) == found["quantized"] + found["copied"]
    reasons = {x["name"]: x["reason"] for x in done.summary["not_quantized"]}
    assert reasons["vision_tower.encoder.layers.0.self_attn.q_proj"] == "no text goes through it"
    config = json.loads((done.out / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForConditionalGeneration"]
    model = transformers.AutoModelForImageTextToText.from_pretrained(done.out, dtype=torch.float32)
    assert type(model).__name__ == config["architectures"][0]
    ids = torch.full((1, 8), 7)
    ids[0, 1:5] = model.config.image_token_id
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    original = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        ours, theirs = (m.get_image_features(pixels).pooler_output for m in (model, original))
        assert torch.equal(torch.cat([*ours]), torch.cat([*theirs]))
        assert model(input_ids=ids, pixel_values=pixels, use_cache=False).logits.isfinite().all()


def test_what_the_index_does_not_name_is_dropped_and_said(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "llama", shard="200KB")
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    save_file({**load_file(shard), "stray": torch.ones(3)}, shard, {"format": "pt"})
    done = quantkit.quantize(recipe(folder), out=tmp_path / "out")
    assert done.summary["tensors"]["dropped"] == [
        {"name": "stray", "reason": "lies in a shard whose index does not name it"}
    ]
    facts = dict(inspection.inspect(str(done.out))["facts"])
    assert facts["source's tensors"] == "14 quantized, 7 copied, 1 dropped"


def test_a_plan_shows_what_becomes_of_the_tensors(tmp_path: Path) -> None:
    def said(kind: str, **changes: Any) -> str:
        folder = tiny.save(tmp_path / kind, kind)
        plan = planning.make(Recipe.from_any(recipe(folder, **changes)))
        return dict(estimate.describe(plan, rehearse=False)["facts"])["tensors"]

    assert said("llama") == "21: 14 quantized, 7 copied"
    assert said("gpt-oss") == "37: 12 quantized, 21 copied, 4 apart"
    assert said("llama-tied", transforms=["rotation"]) == "20: 14 quantized, 6 rewritten; 1 added"
    folded = said("gpt-oss", transforms=["awq"], rules=[{"match": "*.experts.*", "scheme": "none"}])
    assert folded == "37: 8 quantized, 29 rewritten"


def test_what_is_not_as_announced_is_found(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "llama")
    (folder / "notes.txt").write_text("kept")
    done = quantkit.quantize(recipe(folder), out=tmp_path / "out")
    plan, files = planning.make(Recipe.from_any(recipe(folder))), done.summary["files"]
    assert inventory.account(plan, done.out, files).counts() == {"quantized": 14, "copied": 7}
    with pytest.raises(InputError, match=r"notes.txt: is neither copied nor said to be dropped"):
        inventory.account(plan, done.out, {**files, "copied": [n for n in files["copied"] if n != "notes.txt"]})
    (done.out / "notes.txt").unlink()
    with pytest.raises(InputError, match=r"notes.txt: was to be copied from the source, and is not there"):
        inventory.account(plan, done.out, files)
    (done.out / "notes.txt").write_text("kept")
    forgotten = {n: s for n, s in plan.specs.items() if n != "model.norm.weight"}
    with pytest.raises(InputError, match=r"'model.norm.weight' and 0 more would be lost"):
        inventory.of(replace(plan, specs=forgotten))
    tensors = load_file(done.out / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, done.out / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"tensor 'model.norm.weight' is TensorSpec\(dtype='F32'"):
        inventory.account(plan, done.out, files)
