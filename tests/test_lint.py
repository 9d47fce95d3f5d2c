"""The engines' rules: each is broken by a checkpoint that quantkit or the library wrote, and a clean one passes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from library_checkpoints import compress_by_library, llama, pack_folder, random_model, w
from lint_checkpoints import ALL, LAYER, Checkpoints, Tensors, errors, group, says
from safetensors.torch import load_file, save_file

from quantkit import lint
from quantkit import plan as planning
from quantkit.errors import InputError
from quantkit.recipe import Recipe
from quantkit.types import TensorScheme

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("lint"))


# Clean outputs -------------------------------------------------------------------------------------------------------

LOADED_BY = {
    "W4A16": {"vllm", "sglang", "transformers"},
    "W8A8": {"vllm", "sglang", "transformers"},
    "FP8": {"vllm", "sglang", "transformers"},
    "FP8_DYNAMIC": ALL,
    "NVFP4": ALL,
    "NVFP4A16": {"vllm", "transformers"},
    "MXFP4A16": {"vllm", "transformers", "tensorrt-llm"},
    "MXFP8": {"vllm", "transformers"},
    "MXFP6A16": {"transformers"},
}


@pytest.mark.parametrize("preset", LOADED_BY)
def test_a_clean_output_is_loaded_by_whom_the_table_says(preset: str, made: Checkpoints) -> None:
    """No rule but `supported` speaks, neither of errors nor of warnings."""
    found = lint.folder(made.clean(preset))
    assert {f.rule for f in found} <= {"supported"}
    assert ALL - {f.engine for f in found} == LOADED_BY[preset]


@pytest.mark.parametrize(
    ("form", "scheme", "loaded_by"),
    [
        ("gptq", "W4A16", {"vllm", "sglang", "transformers"}),
        ("awq", "W4A16", {"vllm", "sglang", "transformers"}),
        ("fp8-block", "FP8_BLOCK", ALL),
        ("modelopt", "NVFP4", {"vllm", "sglang", "tensorrt-llm"}),
        ("modelopt", "W4A16", {"tensorrt-llm"}),
    ],
)
def test_other_formats(form: str, scheme: str, loaded_by: set[str], made: Checkpoints) -> None:
    model = {"num_key_value_heads": 4}
    folder = made.clean(scheme, model=model, export={"format": form, "engines": []})
    assert ALL - set(errors(folder)) == loaded_by
    assert {f.rule for f in lint.folder(folder)} <= {"supported"}


def test_what_the_library_writes_is_clean(made: Checkpoints) -> None:
    folder = compress_by_library(made.folder / "library", random_model(llama()), w(4, "group", 128))
    assert {(f.rule, f.engine) for f in lint.folder(folder)} == {
        ("supported", "tensorrt-llm"),
        *(("tokenizer_files", engine) for engine in ALL),
    }


def test_asymmetric_integers_do_not_load_in_stock_transformers(made: Checkpoints) -> None:
    folder = made.clean("W4A16_ASYM")
    assert says(folder, "supported", "warning") == {"transformers", "sglang"}
    assert errors(folder) == {"tensorrt-llm": {"supported"}}
    assert any("import quantkit before" in f.fix for f in lint.folder(folder, ["transformers"]))


INT8_IN = {"number": "int8"}
VERDICTS = [
    ("vllm", "W3A16", "warning", "needs a version of 2026"),
    ("vllm", "W4A8", "warning", "on ARM processors alone"),
    ("vllm", "W4AFP8", "warning", "Hopper"),
    ("vllm", "MXFP6A16", "error", "no branch in its dispatch"),
    ("vllm", "MXFP4XFP8", "warning", "inputs may not become fp8_e4m3"),
    ("vllm", {"weights": {"number": "int4", "strategy": "tensor"}}, "error", "one scale for the tensor"),
    ("vllm", {"weights": {"number": "int3", "group_size": 32, "symmetric": False}}, "error", "asymmetric int3"),
    ("vllm", {"weights": {"number": "fp8_e4m3", "group_size": 32}}, "error", "fp8_e4m3 weights per group of 32"),
    ("vllm", {"weights": {"number": "int8", "group_size": 32}, "activations": INT8_IN}, "error", "int8 weights"),
    ("sglang", "W3A16", "error", "int3 weights per group of 128 has no kernel"),
    ("sglang", "W4AFP8", "error", "int4 and int8 weights alone have"),
    ("sglang", "W4A8", "error", "int4 weights per group of 128 with dynamic int8"),
    ("sglang", {"weights": {"number": "fp8_e4m3"}}, "warning", "FP8 weights alone per channel"),
    ("sglang", {"weights": {"number": "fp8_e4m3", "group_size": 32}}, "warning", "FP8 weights alone per group"),
    ("sglang", "MXFP8A16", "error", "mxfp8-quantized has no branch"),
    ("sglang", "NVFP4A16", "error", "NVFP4 weights alone"),
    ("tensorrt-llm", "W8A16", "error", "int8 weights per group of 128 is not loaded"),
    ("tensorrt-llm", "FP8", "error", "fp8_e4m3 weights per tensor"),
    ("tensorrt-llm", "NVFP4A16", "error", "NVFP4 weights alone"),
    ("tensorrt-llm", "MXFP4", "error", "mxfp4 weights per group of 32 with dynamic mxfp4"),
    ("tensorrt-llm", "MXFP8A16", "error", "mxfp8_e4m3 weights per group of 32"),
]


@pytest.mark.parametrize(("engine", "scheme", "level", "text"), VERDICTS)
def test_schemes_that_an_engine_refuses_or_takes_with_reserve(
    engine: str, scheme: object, level: str, text: str, made: Checkpoints
) -> None:
    plan = planning.make(Recipe.from_any(made.settings(scheme)))
    found = [f for f in lint.check(planning.described(plan), [engine]) if f.rule == "supported"]
    assert [(f.level, text in f.what) for f in found] == [(level, True)]


def test_int8_would_be_taken_for_fp8_by_tensorrt_llm(made: Checkpoints) -> None:
    found = [f for f in lint.folder(made.clean("W8A8"), ["tensorrt-llm"]) if f.level == lint.ERROR]
    assert len(found) == 1 and "int8 is taken for FP8" in found[0].what


# Each rule, broken ---------------------------------------------------------------------------------------------------


def test_unknown_keys(made: Checkpoints) -> None:
    folder = made.copy(made.clean(), quantization=lambda q: group(q).update(made_by="quantkit"))
    assert says(folder, "strict_group_keys") == {"transformers"}
    assert says(folder, "strict_group_keys", "warning") == {"vllm", "sglang"}
    folder = made.copy(made.clean(), quantization=lambda q: group(q)["weights"].update(method="gptq"))
    assert says(folder, "strict_argument_keys") == {"transformers", "vllm", "sglang"}
    assert says(folder, "schemes_readable", "warning") == ALL
    folder = made.copy(made.clean(), quantization=lambda q: q.update(made_by="quantkit"))
    assert "strict_group_keys" not in {f.rule for f in lint.folder(folder)}


def test_status_format_and_sparsity(made: Checkpoints) -> None:
    folder = made.copy(made.clean(), quantization=lambda q: q.update(quantization_status="initialized"))
    assert says(folder, "packed_status") == {"transformers"}

    def unnamed(q: dict[str, Any]) -> None:
        q["format"] = "mixed-precision"
        del group(q)["format"]

    assert says(made.copy(made.clean(), quantization=unnamed), "formats_named") == {"transformers", "vllm", "sglang"}
    sparse = {"format": "sparse-bitmask"}
    folder = made.copy(made.clean(), quantization=lambda q: q.update(sparsity_config=sparse))
    assert says(folder, "no_sparsity") == {"vllm"}


def test_several_groups(made: Checkpoints) -> None:
    folder = made.copy(made.clean("FP8_DYNAMIC"), quantization=lambda q: group(q)["weights"].pop("strategy"))
    assert "explicit_strategies" in errors(folder)["tensorrt-llm"]

    def by_class(q: dict[str, Any]) -> None:
        q["config_groups"]["group_1"] = {**group(q), "targets": ["re:.*down_proj"]}

    folder = made.copy(made.clean("FP8_DYNAMIC"), quantization=by_class)
    assert errors(folder) == {"tensorrt-llm": {"targets_by_name"}}
    folder = made.clean(rules=[{"match": "*down_proj", "scheme": "W8A8"}])
    assert says(folder, "one_format", "warning") == {"sglang"}
    assert says(folder, "targets_by_name") == says(made.clean(), "one_format", "warning") == set()


def test_fused_layers(made: Checkpoints) -> None:
    fuse = {"vllm", "sglang", "tensorrt-llm"}
    folder = made.clean(rules=[{"match": "*k_proj", "scheme": "W8A16"}])
    assert says(folder, "fused_schemes") == fuse
    found = next(f for f in lint.folder(folder, ["vllm"]) if f.rule == "fused_schemes")
    assert found.where == f"{LAYER}.self_attn.q_proj" and "k_proj int8 weights per group of 128" in found.what
    folder = made.clean(rules=[{"match": "*up_proj", "scheme": "none"}])
    assert says(folder, "fused_all_or_none") == fuse
    assert "fused_schemes" not in errors(folder)["vllm"]


@pytest.mark.parametrize(
    ("preset", "tensor"),
    [
        ("NVFP4", "weight_global_scale"),
        ("NVFP4", "input_global_scale"),
        ("FP8", "weight_scale"),
        ("FP8", "input_scale"),
    ],
)
def test_fused_layers_share_their_scales(preset: str, tensor: str, made: Checkpoints) -> None:
    folder = made.copy(made.clean(preset), tensors=lambda t: t[f"{LAYER}.mlp.up_proj.{tensor}"].mul_(2))
    assert says(folder, "fused_scales", "warning") == {"vllm", "sglang", "tensorrt-llm"}
    assert lint.folder(folder, ["vllm"])[0].what.startswith(f"{tensor} differs")


def test_the_list_of_dense_layers(made: Checkpoints) -> None:
    folder = made.copy(made.clean(), quantization=lambda q: q["ignore"].remove("lm_head"))
    assert says(folder, "ignore_list") == ALL
    folder = made.copy(made.clean(), quantization=lambda q: q["ignore"].append(f"{LAYER}.mlp.up_proj"))
    found = [f for f in lint.folder(folder, ["vllm"]) if f.rule == "ignore_list"]
    assert [f.what for f in found] == ["is quantized on disk, and dense by the config"]
    folder = made.copy(made.clean(), quantization=lambda q: q["ignore"].append("LlamaAttention"))
    assert says(folder, "ignore_names", "warning") == {"vllm", "sglang", "tensorrt-llm"}
    folder = made.copy(made.clean(), quantization=lambda q: q.update(ignore=["re:lm_.*"]))
    assert says(folder, "ignore_list") == says(folder, "ignore_names", "warning") == set()


def test_the_lists_of_an_fp8_config(made: Checkpoints) -> None:
    folder = made.clean("FP8_BLOCK", model={"num_key_value_heads": 4}, export={"format": "fp8-block", "engines": []})
    folder = made.copy(folder, quantization=lambda q: q.pop("modules_to_not_convert"))
    assert errors(folder) == {"transformers": {"dense_lists"}, "tensorrt-llm": {"dense_lists"}}


def test_tied_head(made: Checkpoints) -> None:
    dense = made.folder / "head"
    shutil.copytree(made.model(), dense)
    linears = [k.removesuffix(".weight") for k in load_file(dense / "model.safetensors") if k.endswith("proj.weight")]
    folder = pack_folder(dense, dict.fromkeys([*linears, "lm_head"], TensorScheme("int4", "group", 32)))
    assert "tied_head" not in {f.rule for f in lint.folder(folder)}
    folder = made.copy(folder, config=lambda c: c.update(tie_word_embeddings=True))
    assert says(folder, "tied_head") == ALL


def test_groups_and_tensor_parallel(made: Checkpoints) -> None:
    folder = made.clean()
    assert says(folder, "groups_divide", tp=2) == ALL  # o_proj has 128 columns, in groups of 128
    where = {f.where for f in lint.folder(folder, ["vllm"], tp=4) if f.rule == "groups_divide"}
    assert where == {f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.down_proj"}
    folder = made.clean({"preset": "W4A16", "group_size": 32})
    assert says(folder, "groups_divide", tp=4) == set()
    weights = {"number": "int4", "strategy": "channel", "symmetric": False}
    folder = made.clean({"weights": weights}, model={"intermediate_size": 264})
    assert says(folder, "groups_divide") == set()
    found = [f.what for f in lint.folder(folder, ["vllm"], tp=2) if f.rule == "groups_divide"]
    assert any(text.startswith("zero points of 132 rows of 4 bits") for text in found)
    assert any(text.startswith("132 columns of 4 bits") for text in found)


def test_shapes_of_marlin(made: Checkpoints) -> None:
    folder = made.clean({"preset": "W4A16", "group_size": 32}, model={"intermediate_size": 192})
    found = [f for f in lint.folder(folder, ["vllm"]) if f.rule == "marlin_shapes"]
    assert [(f.level, f.where, f.what) for f in found] == [
        ("warning", f"{LAYER}.mlp.down_proj", "128 x 192 in groups of 32 does not fit Marlin")
    ]
    assert says(made.clean(), "marlin_shapes", "warning", tp=2) == {"vllm", "sglang"}


def test_gptq_packs_zero_points_along_rows_also_when_they_are_equal(made: Checkpoints) -> None:
    weights = {"number": "int4", "strategy": "channel"}
    export = {"format": "gptq", "engines": []}
    folder = made.clean({"weights": weights}, model={"intermediate_size": 264}, export=export)
    found = [f.what for f in lint.folder(folder, ["vllm"], tp=2) if f.rule == "groups_divide"]
    assert any(text.startswith("zero points of 132 rows of 4 bits") for text in found)
    assert any(text.startswith("132 columns of 4 bits") for text in found)


def test_fp8_blocks(made: Checkpoints) -> None:
    folder = made.clean("FP8_BLOCK")  # k_proj and v_proj have 64 rows
    assert errors(folder) == {"vllm": {"fp8_blocks_of_rows"}}
    assert says(folder, "fp8_blocks_of_rows", "warning") == {"vllm"}  # v_proj, the last of three
    assert says(folder, "fp8_blocks_ragged", "warning") == {"sglang", "tensorrt-llm"}
    whole = made.clean("FP8_BLOCK", model={"num_key_value_heads": 4})
    assert errors(whole) == {}
    assert errors(whole, tp=2)["vllm"] == {"fp8_blocks_of_rows"}


@pytest.mark.parametrize("form", ["fp8-block", "compressed-tensors"])
def test_a_ragged_fp8_block_loads_wrong_in_transformers(form: str, made: Checkpoints) -> None:
    """448 rows of DeepSeek's layout load without a word, and wrong; compressed-tensors minds columns only."""
    folder = made.clean("FP8_BLOCK", model={"num_key_value_heads": 4}, export={"format": form, "engines": []})

    def cut(t: Tensors) -> None:
        for name in ("gate_proj", "up_proj"):
            t[f"{LAYER}.mlp.{name}.weight"] = t[f"{LAYER}.mlp.{name}.weight"][:192]
        t[f"{LAYER}.mlp.down_proj.weight"] = t[f"{LAYER}.mlp.down_proj.weight"][:, :192]

    folder = made.copy(folder, config=lambda c: c.update(intermediate_size=192), tensors=cut)
    found = [f for f in lint.folder(folder, ["transformers"]) if f.level == lint.ERROR]
    assert {f.rule for f in found} == {"fp8_blocks_exact"}
    rows = {f"{LAYER}.mlp.gate_proj and 1 more"} if form == "fp8-block" else set()
    assert {f.where for f in found} == {f"{LAYER}.mlp.down_proj", *rows}


def test_scales_are_not_0_d(made: Checkpoints) -> None:
    name = f"{LAYER}.mlp.up_proj.weight_scale"
    folder = made.copy(made.clean("FP8"), tensors=lambda t: t.update({name: t[name].reshape(())}))
    assert says(folder, "scale_shapes", "warning") == ALL
    assert says(folder, "layer_tensors") == set()


def test_tensors_of_a_layer(made: Checkpoints) -> None:
    up = f"{LAYER}.mlp.up_proj"
    folder = made.copy(made.clean(), tensors=lambda t: t.pop(f"{up}.weight_shape"))
    assert says(folder, "weight_shape") == {"vllm", "sglang", "transformers"}
    zero = torch.zeros(32, 1, dtype=torch.int32)
    folder = made.copy(made.clean(), tensors=lambda t: t.update({f"{up}.weight_zero_point": zero}))
    assert says(folder, "zero_points") == {"vllm", "sglang"}
    assert says(folder, "zero_points", "warning") == {"transformers"}
    folder = made.copy(made.clean(), tensors=lambda t: t.pop(f"{up}.weight_scale"))
    assert says(folder, "layer_tensors") == ALL
    assert says(made.clean("W4A16_ASYM"), "zero_points") == set()

    def narrower(t: Tensors) -> None:
        t[f"{up}.weight_packed"] = t[f"{up}.weight_packed"][:, :-1]

    found = [f for f in lint.folder(made.copy(made.clean(), tensors=narrower), ["vllm"]) if f.rule == "layer_tensors"]
    assert [f.what for f in found] == ["weight_packed is I32 (256, 15), expected I32 (256, 16)"]


def test_the_library_writes_w4afp8_in_a_way_that_vllm_refuses(made: Checkpoints) -> None:
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    model = random_model(llama())
    theirs = compress_by_library(made.folder / "w4afp8", model, w(4, "group", 128), input_activations=inputs)
    assert says(theirs, "w4afp8_packed") == {"vllm"}
    assert says(made.clean("W4AFP8"), "w4afp8_packed") == set()


def test_zero_points_of_gptq(made: Checkpoints) -> None:
    clean = made.clean("W4A16_ASYM", export={"format": "gptq", "engines": []})
    others = {"vllm", "sglang", "transformers"}
    assert "gptq_zero_points" not in {f.rule for f in lint.folder(clean)}

    def version_1(stored: int) -> Path:
        def change(t: Tensors) -> None:
            t[f"{LAYER}.mlp.up_proj.qzeros"].fill_(stored)
            for name in [k for k in t if k.endswith("qzeros") and "up_proj" not in k]:
                t[name].zero_()

        return made.copy(clean, quantization=lambda q: q.update(checkpoint_format="gptq"), tensors=change)

    assert says(version_1(-1), "gptq_zero_points") == others
    assert says(version_1(0), "gptq_zero_points", "warning") == others


KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False, "group_size": None}


def test_kv_cache(made: Checkpoints) -> None:
    scale = {f"{LAYER}.self_attn.{side}_scale": torch.ones(1, dtype=torch.bfloat16) for side in "kv"}
    fp8 = made.clean("FP8_DYNAMIC")
    folder = made.copy(fp8, quantization=lambda q: q.update(kv_cache_scheme=KV), tensors=lambda t: t.update(scale))
    assert errors(folder) == {}
    assert says(folder, "kv_cache_scales", "warning") == set()
    assert says(folder, "kv_cache_names", "warning") == {"sglang"}
    assert says(folder, "kv_cache_ignored", "warning") == {"transformers"}
    folder = made.copy(fp8, quantization=lambda q: q.update(kv_cache_scheme=KV))
    assert says(folder, "kv_cache_scales", "warning") == {"vllm"}
    for wrong in ({"type": "int"}, {"num_bits": 4}, {"dynamic": True}, {"symmetric": False}, {"strategy": "channel"}):
        content = json.loads((fp8 / "config.json").read_text())
        content["quantization_config"]["kv_cache_scheme"] = {**KV, **wrong}
        folder = made.copy(fp8)
        (folder / "config.json").write_text(json.dumps(content))
        assert says(folder, "kv_cache_scheme") == {"vllm", "sglang", "tensorrt-llm"}, wrong


def test_config_and_tokenizer(made: Checkpoints) -> None:
    folder = made.copy(made.clean(), config=lambda c: c.pop("architectures"))
    assert says(folder, "config_keys") == ALL
    folder = made.copy(made.clean())
    (folder / "tokenizer_config.json").unlink()
    assert says(folder, "tokenizer_files", "warning") == ALL
    (folder / "tokenizer.json").unlink()
    assert {f.where for f in lint.folder(folder) if f.rule == "tokenizer_files"} == {"tokenizer.json"}


def test_index_and_files(made: Checkpoints) -> None:
    clean = made.clean(export={"shard_size": "40KB", "engines": []})
    assert (clean / "model.safetensors.index.json").is_file()
    assert says(clean, "index_agrees") == set()
    folder = made.copy(clean)
    save_file({"stray": torch.ones(1)}, folder / "stray.safetensors")
    found = [f for f in lint.folder(folder, ["vllm"]) if f.rule == "index_agrees"]
    assert [f.where for f in found] == ["stray.safetensors"]
    index = json.loads((clean / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    folder = made.copy(clean)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert says(folder, "index_agrees") == says(folder, "tensors_accounted") == ALL
    index["weight_map"]["model.norm.weight"] = "absent.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"absent\.safetensors' is missing"):
        lint.folder(folder)


def test_all_tensors_of_the_model_are_there_and_no_other(made: Checkpoints) -> None:
    folder = made.copy(made.clean(), tensors=lambda t: t.pop("model.norm.weight"))
    found = lint.folder(folder, ["vllm"])
    assert [(f.rule, f.level, f.where) for f in found] == [("tensors_accounted", "error", "model.norm.weight")]
    folder = made.copy(made.clean(), tensors=lambda t: t.update({"value_head.weight": torch.ones(2, 2)}))
    assert says(folder, "tensors_accounted", "warning") == ALL

    def without_a_layer(t: Tensors) -> None:
        for name in [k for k in t if ".mlp.up_proj." in k]:
            del t[name]

    found = lint.folder(made.copy(made.clean(), tensors=without_a_layer), ["vllm"])
    assert ("error", f"{LAYER}.mlp.up_proj.weight") in {(f.level, f.where) for f in found}
