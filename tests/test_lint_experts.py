"""The engines' rules about mixtures of experts, on a Mixtral of two."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from library_checkpoints import pack_folder, random_model
from lint_checkpoints import ALL, LAYER, Checkpoints, Tensors, errors, says
from safetensors.torch import load_file

import quantkit
from quantkit import lint
from quantkit.hub import resolve
from quantkit.presets import PRESETS
from quantkit.types import Scheme

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("lint"))


def mixtral(folder: Path, scheme: Scheme, **others: Scheme) -> Path:
    """A packed Mixtral of two experts; others: leaf of expert 1 -> its scheme."""
    size = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = transformers.MixtralConfig(
        **size, num_local_experts=2, num_hidden_layers=1, vocab_size=64, max_position_embeddings=64
    )
    random_model(config).save_pretrained(folder)
    for name in tiny.TOKENIZER_FILES:
        shutil.copy(resolve("builtin:pydocs-llama-7m").folder / name, folder / name)
    names = [k.removesuffix(".weight") for k in load_file(folder / "model.safetensors")]
    linears = [n for n in names if n.endswith(("_proj", ".w1", ".w2", ".w3"))]
    schemes = {n: others.get(n.rpartition(".")[2], scheme) if ".experts.1." in n else scheme for n in linears}
    return pack_folder(folder, schemes, ignore=["lm_head", f"{LAYER}.block_sparse_moe.gate"])


def test_routers_must_be_ignored(made: Checkpoints) -> None:
    folder = mixtral(made.folder / "mixtral", PRESETS["W4A16"])
    assert {f.rule for f in lint.folder(folder)} == {"supported"}
    assert errors(folder) == {"tensorrt-llm": {"supported"}}
    broken = made.copy(folder, quantization=lambda q: q.update(ignore=["lm_head"]))
    found = lint.folder(broken, ["vllm"])
    assert [(f.rule, f.level, f.where) for f in found] == [("ignore_list", "error", f"{LAYER}.block_sparse_moe.gate")]

    def without_an_expert(t: Tensors) -> None:
        for name in [k for k in t if ".experts.1.w2." in k]:
            del t[name]

    assert says(made.copy(folder, tensors=without_an_expert), "tensors_accounted") == ALL


def test_experts_share_one_scheme(made: Checkpoints) -> None:
    folder = mixtral(made.folder / "unlike", PRESETS["W4A16"], w2=PRESETS["W8A16"])
    assert says(folder, "experts_alike") == {"vllm", "sglang"}
    folder = mixtral(made.folder / "unlike-fused", PRESETS["W4A16"], w3=PRESETS["W8A16"])
    assert "fused_schemes" in errors(folder)["vllm"]


@pytest.mark.parametrize("preset", ["NVFP4A16", "W8A8", "W4A16_ASYM", "MXFP8", "FP8_BLOCK"])
def test_experts_that_transformers_loads_wrong_or_not_at_all(preset: str, made: Checkpoints) -> None:
    folder = mixtral(made.folder / f"experts-{preset}", PRESETS[preset])
    assert errors(folder)["transformers"] == {"supported"}
    assert ("supported" in errors(folder).get("sglang", set())) == (preset in ("NVFP4A16", "W8A8", "MXFP8"))


def test_0_d_scales_of_experts_cannot_be_stacked(made: Checkpoints) -> None:
    name = f"{LAYER}.block_sparse_moe.experts.0.w1.weight_scale"
    folder = mixtral(made.folder / "experts-fp8", PRESETS["FP8"])
    assert says(folder, "scale_shapes") == set()
    folder = made.copy(folder, tensors=lambda t: t.update({name: t[name].reshape(())}))
    assert says(folder, "scale_shapes") == ALL


def test_what_vllm_makes_of_gpt_oss(tmp_path: Path) -> None:
    scheme = {"weights": {"number": "int4", "strategy": "group", "group_size": 16}}
    recipe = {"model": str(tiny.save(tmp_path / "model", "gpt-oss")), "scheme": scheme, "method": "rtn"}
    out = quantkit.quantize({**recipe, "validate": "none"}, out=tmp_path / "out").out
    said = [f for f in lint.folder(out, ["vllm"]) if f.rule == "experts_of_gpt_oss"]
    assert [f.level for f in said] == ["warning"] and "experts.0.down_proj and 23 more" in said[0].where
