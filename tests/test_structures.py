"""Experts in one tensor, language models in wrappers: what is quantized computes what its codes stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

import quantkit
from quantkit import blocks, convert, inspection, lint, numerics, packed, skeleton
from quantkit.checkpoint import Checkpoint
from quantkit.errors import InputError
from quantkit.experts import Experts, is_fused
from quantkit.runtime.experts import PackedExperts

torch.set_num_threads(1)

IDS = torch.randint(4, 4096, (2, 24), generator=torch.Generator().manual_seed(0))
INT4 = {"weights": {"number": "int4", "strategy": "group", "group_size": 16}}
FUSED = ("gpt-oss", "llama4", "qwen3-vl-moe")  # all experts of a layer in one tensor on disk


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"model": str(folder), "scheme": INT4, "method": "rtn", "validate": "none", **changes}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", [*FUSED, "qwen3-next"])
def test_taken_apart_it_computes_what_transformers_does(kind: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / kind, kind)
    ghost = skeleton.build(folder, Checkpoint.open(folder))
    structure = blocks.find(ghost)
    assert structure.warnings == () and ghost.unknown == []
    ghost.load(ghost.to_disk, "cpu", torch.float64)
    ghost.tie()
    stock = skeleton.auto_class(ghost.model.config).from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    assert type(ghost.model) is type(stock)
    assert (logits(ghost.model) - logits(stock)).abs().max() < 1e-9
    mixtures = {name for name, m in ghost.model.named_modules() if isinstance(m, Experts)}
    assert mixtures == {name for name, m in stock.named_modules() if is_fused(m)} != set()
    for disk in {piece.disk for piece in ghost.pieces.values()}:
        assert torch.equal(ghost.whole(disk), tensors(folder)[disk])


CASES = ["gpt-oss", "llama4", "gemma3-vision", "qwen3-vl-moe"]
SLOW = ["qwen3-moe", "mixtral", "deepseek", "llama4-text", "qwen2.5-vl", "qwen3-vl", "mistral3", "qwen3-next"]


@pytest.mark.parametrize("kind", [*CASES, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_packed_it_computes_what_its_codes_stand_for(kind: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", kind)
    out = quantkit.quantize(
        recipe(folder, method="gptq", calibration={"samples": 4, "length": 32}), out=tmp_path / "out"
    ).out
    found, source, written = packed.open_folder(out), tensors(folder), tensors(out)
    assert not [f for f in lint.folder(out) if f.level == lint.ERROR and f.engine in ("transformers", "vllm")]

    # what was not quantized is what it was, bit for bit, a vision tower included
    copied = source.keys() & written.keys()
    assert all(torch.equal(source[name], written[name]) for name in copied)
    towers = {n for n in source if "vis" in n or "projector" in n}
    assert towers <= copied and bool(towers) == (kind in tiny.WRAPPED)

    # a dense copy has the source's tensors: those of quantized layers decoded by the format's reader
    dense = convert.convert(out, "dense", tmp_path / "dense").out
    decoded = {n: numerics.dequantize(found.unpack(n)[0]).bfloat16() for n in found.layers}
    again = tensors(dense)
    assert again.keys() == source.keys()
    ghost = skeleton.build(dense, Checkpoint.open(dense))
    for name, disk in ghost.to_disk.items():
        layer = disk.removesuffix(".weight")
        if disk.endswith(".weight") and layer in decoded:
            assert torch.equal(ghost.original(name), decoded[layer]), name

    # in float32 the packed model computes what the decoded weights do, whoever loads it
    stored = skeleton.auto_class(ghost.model.config).from_pretrained(dense, dtype=torch.float32)
    model = skeleton.auto_class(ghost.model.config).from_pretrained(out, dtype=torch.float32)
    assert any(isinstance(m, PackedExperts) for m in model.modules()) == any(is_fused(m) for m in stored.modules())
    ours = logits(model)
    model.dequantize()
    exact = logits(model)
    assert (ours - exact).norm() <= 1e-4 * exact.norm()
    for name, parameter in stored.named_parameters():
        assert torch.equal(model.get_parameter(name).bfloat16().float(), parameter), name


def test_packed_experts_of_gpt_oss_are_saved_as_they_were(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "gpt-oss")
    out = quantkit.quantize(recipe(folder), out=tmp_path / "out").out
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    model.save_pretrained(tmp_path / "again")
    before, after = tensors(out), tensors(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    name = "model.layers.0.mlp.experts"
    bias = tensors(folder)[f"{name}.gate_up_proj_bias"]
    assert torch.equal(before[f"{name}.2.up_proj.bias"], bias[2, 1::2])
    assert torch.equal(before[f"{name}.2.gate_proj.bias"], bias[2, ::2])


@pytest.mark.parametrize("kind", FUSED)
def test_experts_that_stay_dense_stay_in_one_tensor(kind: str, tmp_path: Path) -> None:
    """Also where a fold rewrites them; and the model loads."""
    folder = tiny.save(tmp_path / "model", kind)
    leave = [{"match": "*.experts.*", "scheme": "none"}]
    plain = quantkit.quantize(recipe(folder, rules=leave), out=tmp_path / "plain").out
    source, written = tensors(folder), tensors(plain)
    whole = {n for n in source if ".experts." in n}
    assert whole and all(torch.equal(source[n], written[n]) for n in whole)
    data = {"samples": 4, "length": 32}
    awq = recipe(folder, rules=leave, transforms=["awq"], calibration=data)
    done = quantkit.quantize(awq, out=tmp_path / "folded")
    moved = {x["producer"]: x["consumers"] for x in done.summary["folds"]}
    written = tensors(done.out)
    changed = {n for n in whole if not torch.equal(source[n], written[n])}
    behind = [c for consumers in moved.values() for c in consumers if ".experts." in c]
    assert bool(changed) == bool(behind)
    assert logits(quantkit.load(done.out, dtype=torch.float32)).isfinite().all()


def test_experts_in_one_tensor_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "gpt-oss")
    some = [{"match": "*.experts.1.down_proj", "scheme": "none"}]
    with pytest.raises(InputError, match=r"layers.0.mlp.experts: its experts lie together.*experts.1.down_proj is not"):
        quantkit.quantize(recipe(folder, rules=some), out=tmp_path / "out")
    good = tensors(folder)

    def build(change: dict[str, torch.Tensor | None]) -> None:
        changed = {n: t for n, t in {**good, **change}.items() if t is not None}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        skeleton.build(folder, Checkpoint.open(folder))

    name = "model.layers.1.mlp.experts.gate_up_proj"
    with pytest.raises(
        InputError, match=rf"'{name}' holds the gate_up_proj of all experts and has shape \(3, 64, 192\)"
    ):
        build({name: good[name][:3].clone()})
    with pytest.raises(InputError, match=r"makes it \(4, 64, 192\)"):
        build({name: good[name].transpose(1, 2).contiguous()})
    with pytest.raises(InputError, match=r"layers.1.mlp.experts: no tensor on disk holds the gate_up_proj of"):
        build({name: None})
    with pytest.raises(InputError, match=r"layers.1.mlp.experts: no tensor on disk holds the down_proj_bias"):
        build({name.replace("gate_up_proj", "down_proj_bias"): None})
    broken = good[name].clone()
    broken[2, 5, 7] = float("nan")
    build({name: broken})
    with pytest.raises(InputError, match=rf"'{name}' holds 1 NaN or Inf"):
        quantkit.quantize(recipe(folder), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_mxfp4_already_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "gpt-oss")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(InputError, match=r"is already quantized \(mxfp4\)"):
        quantkit.quantize(recipe(folder), out=tmp_path / "out")


def test_inspect_shows_experts_in_one_tensor(tmp_path: Path) -> None:
    shown = inspection.inspect(str(tiny.save(tmp_path / "model", "llama4")))
    facts, rows = dict(shown["facts"]), [row[0] for row in shown["table"]["rows"]]
    assert facts["routers"] == "feed_forward.router" and "feed_forward.experts.*.gate_proj (4)" in rows
