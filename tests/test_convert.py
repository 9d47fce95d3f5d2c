"""quantkit.convert: the same codes in another format, or a refusal with its reason and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_models
import pytest
import readers
import tiny
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import quantkit
from quantkit import api, formats, inspection, loading, numerics, output, packed
from quantkit import convert as converting
from quantkit.checkpoint import Checkpoint
from quantkit.cli import app
from quantkit.convert import convert
from quantkit.errors import InputError
from quantkit.presets import FP8_TENSOR, PRESETS, with_group_size
from quantkit.types import Scheme, TensorScheme
from quantkit_eval.compare import compare
from quantkit_eval.windows import heldout_windows

CT, GPTQ, AWQ, MODELOPT, FP8_BLOCK = "compressed-tensors", "gptq", "awq", "modelopt", "fp8-block"
SCHEMES: dict[str, Scheme] = {
    **{name: PRESETS[name] for name in ("FP8", "FP8_BLOCK", "FP8_DYNAMIC", "NVFP4", "NVFP4A16", "W4AFP8", "W8A8")},
    **{f"W{bits}": with_group_size(PRESETS[f"W{bits}A16"], 64) for bits in (2, 3, 4, 5, 8)},
    "W4-32": with_group_size(PRESETS["W4A16"], 32),
    "W4-128": PRESETS["W4A16"],
    "W4-channel": with_group_size(PRESETS["W4A16"], "channel"),
    "W4-asym": with_group_size(PRESETS["W4A16_ASYM"], 64),
    "W8-channel": with_group_size(PRESETS["W8A16"], "channel"),
    "W8-tensor": Scheme(TensorScheme("int8", "tensor")),
    "FP8_BLOCK16": Scheme(PRESETS["FP8_BLOCK"].weights),
    "MXFP4": PRESETS["MXFP4A16"],
}
# Formats that hold the same codes: every two of a row convert into each other.
ALIKE = {
    "W2": (CT, GPTQ),
    "W3": (CT, GPTQ),
    "W4": (CT, GPTQ, AWQ, MODELOPT),
    "W4-32": (CT, GPTQ, AWQ),
    "W4-128": (CT, GPTQ, AWQ, MODELOPT),
    "W4-channel": (CT, GPTQ, AWQ),
    "W4-asym": (CT, GPTQ, AWQ),
    "W8": (CT, GPTQ),
    "W8-channel": (CT, GPTQ),
    "FP8": (CT, MODELOPT),
    "NVFP4": (CT, MODELOPT),
    "NVFP4A16": (CT, MODELOPT),
    "FP8_BLOCK": (CT, FP8_BLOCK),
}
PAIRS = [(scheme, a, b) for scheme, held in ALIKE.items() for a in held for b in held if a != b]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.specs}


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """The same dtype, shape and bytes."""
    if a is None or b is None:
        return a is b
    raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*raw)


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def refused(tmp_path: Path, folder: Path, to: str, says: str) -> None:
    """convert refuses with that reason, and leaves the disk as it was."""
    before = names(tmp_path)
    with pytest.raises(InputError, match=says):
        convert(folder, to, tmp_path / "out")
    assert names(tmp_path) == before


def is_reciprocal(name: str) -> bool:
    """What ModelOpt stores as 1 / x comes back within a rounding."""
    return name.endswith("global_scale")


# What converts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "a", "b"), PAIRS)
def test_there_and_back_gives_the_same_bytes(scheme: str, a: str, b: str, tmp_path: Path) -> None:
    decoded = packed_models.save(tmp_path / "a", a, SCHEMES[scheme])
    convert(tmp_path / "a", b, tmp_path / "b")
    convert(tmp_path / "b", a, tmp_path / "back")
    one, other = packed.open_folder(tmp_path / "a"), packed.open_folder(tmp_path / "b")
    assert other.format == b and [*one.layers] == [*other.layers] and len(one.layers) == 7
    for name in one.layers:
        (q, inputs), (r, others) = one.unpack(name), other.unpack(name)
        assert same(q.codes_NK, r.codes_NK)
        if q.qparams.scale_NG.dtype.itemsize == 1:
            assert same(q.qparams.scale_NG, r.qparams.scale_NG)
        assert torch.equal(q.qparams.scale_NG.float(), r.qparams.scale_NG.float())
        zeros = [x.qparams.zero_NG for x in (q, r)]
        if None in zeros:  # AWQ writes the zero points of symmetric weights
            assert all(x is None or not x.any() for x in zeros)
        else:
            assert same(*zeros)
        exact = 2**-22 if "NVFP4" in scheme else 0
        torch.testing.assert_close(numerics.dequantize(r), decoded[name], rtol=exact, atol=0)
        assert (inputs is None) == (others is None)
        if inputs is not None and inputs.scale_NG.numel():
            assert torch.equal(inputs.scale_NG.float(), others.scale_NG.float())
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, t in before.items():
        if is_reciprocal(name):
            torch.testing.assert_close(after[name], t, rtol=2**-23, atol=0)
        else:
            assert same(t, after[name]), name
    was, now = (json.loads((tmp_path / x / "config.json").read_text())["quantization_config"] for x in ("a", "back"))
    assert {k: v for k, v in now.items() if k != "ignore"} == {k: v for k, v in was.items() if k != "ignore"}
    assert packed.open_folder(tmp_path / "back").read.scheme_for("lm_head") is None


def test_modelopt_to_compressed_tensors_and_back_keeps_global_scales(tmp_path: Path) -> None:
    """Once it is the reciprocal of a float32, a global scale survives any number of conversions."""
    packed_models.save(tmp_path / "a", MODELOPT, SCHEMES["NVFP4"])
    convert(tmp_path / "a", CT, tmp_path / "b")
    convert(tmp_path / "b", MODELOPT, tmp_path / "c")
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "c")
    assert all(same(t, after[name]) for name, t in before.items()) and before.keys() == after.keys()


def test_every_pair_of_formats_that_accepts_a_scheme_is_in_the_list(tmp_path: Path) -> None:
    """The list above is not shorter than what is possible."""
    for name, scheme in SCHEMES.items():
        holds = []
        for form in (CT, GPTQ, AWQ, MODELOPT, FP8_BLOCK):
            try:
                formats.get(form).tensors((256, 128), scheme, "BF16")
            except InputError:
                continue
            holds.append(form)
        assert tuple(holds) == ALIKE.get(name, (CT,)), name


@pytest.mark.parametrize(("scheme", "form"), [(s, f) for s, held in ALIKE.items() for f in held] + [("MXFP4", CT)])
def test_dense_is_the_decoded_weight_in_the_models_dtype(scheme: str, form: str, tmp_path: Path) -> None:
    decoded = packed_models.save(tmp_path / "a", form, SCHEMES[scheme])
    result = convert(tmp_path / "a", "dense", tmp_path / "out")
    found, source = tensors(tmp_path / "out"), tensors(tmp_path / "a")
    for name, w in decoded.items():
        weight = numerics.dequantize(packed.open_folder(tmp_path / "a").unpack(name)[0])
        torch.testing.assert_close(weight, w, rtol=2**-22 if "NVFP4" in scheme else 0, atol=0)
        assert same(found.pop(f"{name}.weight"), weight.bfloat16())
    assert all(same(t, source[name]) for name, t in found.items())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {*formats.CONFIG_FILES} & {*names(tmp_path / "out")}
    assert (result.layers, result.source_format, result.to) == (7, form, "dense")
    model = quantkit.load(tmp_path / "out", dtype=torch.bfloat16)
    assert same(
        model.model.layers[0].mlp.up_proj.weight, tensors(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"]
    )


def test_act_order_and_pre_quant_scale_are_decoded_to_dense(tmp_path: Path) -> None:
    for form, change in ((GPTQ, permute_groups), (MODELOPT, scale_inputs)):
        packed_models.save(tmp_path / form, form, SCHEMES["W4"])
        change(tmp_path / form)
        convert(tmp_path / form, "dense", tmp_path / f"{form}-dense")
        config = json.loads((tmp_path / form / "config.json").read_text())["quantization_config"]
        own = {
            name.rpartition(".")[2]: t
            for name, t in readers.parse((tmp_path / form / "model.safetensors").read_bytes()).items()
            if name.startswith("model.layers.0.mlp.up_proj.")
        }
        if form == MODELOPT:
            config = json.loads((tmp_path / form / "hf_quant_config.json").read_text())
        theirs = torch.from_numpy(getattr(readers, form)(own, config)).bfloat16()
        assert same(tensors(tmp_path / f"{form}-dense")["model.layers.0.mlp.up_proj.weight"], theirs)


def test_a_bias_and_what_is_not_packed_are_copied_to_the_byte(tmp_path: Path) -> None:
    packed_models.save(tmp_path / "a", CT, SCHEMES["W4"])
    before = load_file(tmp_path / "a" / "model.safetensors")
    extra = {"model.layers.0.mlp.up_proj.bias": torch.randn(256), "rotary.table": torch.arange(5)}
    save_file({**before, **extra}, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    for to in (GPTQ, "dense"):
        convert(tmp_path / "a", to, tmp_path / to)
        after = tensors(tmp_path / to)
        copied = [name for name in before if "_proj." not in name]
        assert copied and all(same(after[name], {**before, **extra}[name]) for name in [*copied, *extra])


def test_many_shards_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, model = SCHEMES["W4"], {**packed_models.DIMS, "num_hidden_layers": 3}
    packed_models.save(tmp_path / "one", CT, scheme, model=model)
    packed_models.save(tmp_path / "many", CT, scheme, model=model, shard="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 15
    convert(tmp_path / "one", GPTQ, tmp_path / "a")
    seen: list[str] = []
    read, write = Checkpoint.read, converting.ShardWriter.write

    def spy_read(self: Checkpoint, name: str) -> torch.Tensor:
        seen.append(f"read {name}")
        return read(self, name)

    def spy_write(self: converting.ShardWriter, name: str, tensor: torch.Tensor) -> None:
        seen.append(f"write {name}")
        write(self, name, tensor)

    monkeypatch.setattr(Checkpoint, "read", spy_read)
    monkeypatch.setattr(converting.ShardWriter, "write", spy_write)
    plan = converting.make(tmp_path / "many", GPTQ)
    assert not [x for x in seen if not x.endswith("weight_shape")], "planning read weights"
    convert(tmp_path / "many", GPTQ, tmp_path / "b", shard_size="30KB")
    events = [x for x in seen if not x.endswith("weight_shape")]
    one, many = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert one.keys() == many.keys() and all(same(t, many[name]) for name, t in one.items())
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 10
    assert json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())["weight_map"].keys() == one.keys()
    for name in plan.layers:  # what is read of a layer is written before another layer is read
        own = [i for i, x in enumerate(events) if f" {name}." in x]
        assert own == [*range(own[0], own[0] + 2 + 4)]  # weight_packed and weight_scale in, four tensors of gptq out


# Files ---------------------------------------------------------------------------------------------------------------


def test_files_are_copied_and_the_old_formats_own_are_not(tmp_path: Path) -> None:
    packed_models.save(tmp_path / "a", MODELOPT, SCHEMES["W4"])
    (tmp_path / "a" / "quantize_config.json").write_text('{"bits": 99}')
    (tmp_path / "a" / "extra").mkdir()
    (tmp_path / "a" / "extra" / "notes.txt").write_text("kept")
    (tmp_path / "a" / "consolidated.safetensors").write_bytes(b"other weights")
    convert(tmp_path / "a", GPTQ, tmp_path / "out")
    found = names(tmp_path / "out")
    assert "extra/notes.txt" in found and "tokenizer.json" in found
    assert "hf_quant_config.json" not in found and "consolidated.safetensors" not in found
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config and config["bits"] == 4
    summary = json.loads((tmp_path / "out" / output.SUMMARY).read_text())
    assert [x["name"] for x in summary["files"]["dropped"]] == [
        "consolidated.safetensors",
        "hf_quant_config.json",
        "quantize_config.json",
    ]
    assert summary["status"] == "unvalidated" and summary["validation"] is None and summary["source"] is None
    assert summary["converted_from"]["format"] == MODELOPT and summary["converted_from"]["to"] == GPTQ


def test_the_files_that_formats_write_are_known_as_theirs() -> None:
    for form in (CT, GPTQ, AWQ, MODELOPT, FP8_BLOCK):
        scheme = SCHEMES["FP8_BLOCK" if form == FP8_BLOCK else "W4"]
        assert all(formats.CONFIG_FILES[file] == form for file in formats.get(form).files({"x": scheme}))


@pytest.mark.parametrize(("form", "file"), [(GPTQ, "quantize_config.json"), (MODELOPT, "hf_quant_config.json")])
def test_a_config_beside_config_json_is_read_when_that_has_none(form: str, file: str, tmp_path: Path) -> None:
    packed_models.save(tmp_path / "a", form, SCHEMES["W4"])
    convert(tmp_path / "a", CT, tmp_path / "one")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "a", CT, tmp_path / "two")
    assert all((tmp_path / x / file).exists() == (x == "a") for x in ("a", "one", "two"))
    assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "two" / "config.json").read_bytes()


def test_a_quantization_config_in_text_config_moves_to_the_top(tmp_path: Path) -> None:
    packed_models.save(tmp_path / "a", CT, SCHEMES["W4"])
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["text_config"] = {"quantization_config": config.pop("quantization_config"), "hidden_size": 128}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "a", AWQ, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["text_config"] == {"hidden_size": 128} and found["quantization_config"]["quant_method"] == "awq"


def test_layers_that_stay_dense_are_named(tmp_path: Path) -> None:
    """Those on disk, without embeddings; a tied head, which is not there; the source's own list."""
    packed_models.save(tmp_path / "a", AWQ, SCHEMES["W4"])
    content = load_file(tmp_path / "a" / "model.safetensors")
    del content["lm_head.weight"]
    content["model.layers.0.router.weight"] = torch.zeros(4, 128, dtype=torch.bfloat16)
    save_file(content, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    config = formats.get(AWQ).config({"x": SCHEMES["W4"], "lm_head": None, "vision.head": None})
    packed_models.write_config(tmp_path / "a", config)
    convert(tmp_path / "a", CT, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert found["ignore"] == ["lm_head", "model.layers.0.router", "vision.head"]
    assert found["config_groups"]["group_0"]["weights"]["symmetric"] is True


def test_an_output_that_is_not_ours_is_refused_and_the_same_conversion_replaces_itself(tmp_path: Path) -> None:
    folder, out = tmp_path / "a", tmp_path / "out"
    packed_models.save(folder, CT, SCHEMES["W4"])
    out.mkdir()
    (out / "thesis.txt").write_text("the only copy")
    refused(tmp_path, folder, GPTQ, "was not written by quantkit; choose another --out")
    (out / "thesis.txt").unlink()
    convert(folder, GPTQ, out)
    first = {name: (out / name).read_bytes() for name in names(out)}
    convert(folder, GPTQ, out)
    assert {name: (out / name).read_bytes() for name in names(out)} == first
    refused(tmp_path, folder, AWQ, "holds another result; choose another --out, or --overwrite")
    assert {name: (out / name).read_bytes() for name in names(out)} == first
    convert(folder, AWQ, out, overwrite=True)
    assert "quantize_config.json" not in names(out)
    with pytest.raises(InputError, match="overlaps the source"):
        convert(folder, GPTQ, folder / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed_models.save(tmp_path / "a", CT, SCHEMES["W4"])

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(converting, "_config", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "a", GPTQ, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "form", "to", "says"),
    [
        ("W4-asym", CT, MODELOPT, "modelopt: int4 weights per group, asymmetric alone cannot be written"),
        ("W4-asym", AWQ, MODELOPT, "modelopt: int4 weights per group, asymmetric alone cannot be written"),
        ("W4-asym", GPTQ, MODELOPT, "modelopt: int4 weights per group, asymmetric alone cannot be written"),
        ("W3", CT, AWQ, "awq: int3 cannot be written; the gemm layout has 4 bits"),
        ("W8", GPTQ, AWQ, "awq: int8 cannot be written"),
        ("W5", CT, GPTQ, "gptq: int5 cannot be written; its readers have kernels for int2, int3, int4 and int8"),
        ("W4-32", CT, MODELOPT, "modelopt: group_size 32 of int4 cannot be written"),
        ("W4-channel", AWQ, MODELOPT, "modelopt: int4 weights per channel"),
        ("W8-tensor", CT, GPTQ, "gptq: a scale per tensor cannot be written"),
        ("W4AFP8", CT, GPTQ, "gptq: holds weights alone, not fp8_e4m3 activations"),
        ("W4AFP8", CT, AWQ, "awq: holds weights alone, not fp8_e4m3 activations"),
        ("W8A8", CT, GPTQ, "gptq: holds weights alone, not int8 activations"),
        ("FP8_DYNAMIC", CT, MODELOPT, "modelopt: fp8_e4m3 weights per channel"),
        ("FP8_DYNAMIC", CT, FP8_BLOCK, "fp8-block: fp8_e4m3 weights per channel cannot be written"),
        ("FP8_BLOCK16", CT, FP8_BLOCK, "fp8-block: weights alone cannot be said"),
        ("FP8", MODELOPT, GPTQ, "gptq: holds weights alone"),
        ("FP8_BLOCK", FP8_BLOCK, AWQ, "awq: holds weights alone"),
        ("FP8_BLOCK", FP8_BLOCK, MODELOPT, "modelopt: fp8_e4m3 weights per block"),
        ("NVFP4A16", MODELOPT, GPTQ, "gptq: nvfp4 cannot be written"),
        ("MXFP4", CT, "gpt-oss", "gpt-oss: is read, not written"),
        ("W4", CT, CT, "is compressed-tensors already"),
        ("W4", AWQ, "gtpq", "unknown checkpoint format 'gtpq'; did you mean gptq?"),
        ("W4", AWQ, "Dense", "unknown checkpoint format 'Dense'; did you mean dense?"),
        ("W4", AWQ, "xyz", "unknown checkpoint format 'xyz'; known: dense, awq"),
    ],
)
def test_what_the_target_cannot_hold(scheme: str, form: str, to: str, says: str, tmp_path: Path) -> None:
    packed_models.save(tmp_path / "a", form, SCHEMES[scheme])
    refused(tmp_path, tmp_path / "a", to, says)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of a folder in place."""
    content = load_file(folder / "model.safetensors")
    change(content)
    save_file(content, folder / "model.safetensors", {"format": "pt"})


def permute_groups(folder: Path) -> None:
    """act-order: columns of a group that are not neighbours."""

    def change(content: dict[str, torch.Tensor]) -> None:
        for name in [n for n in content if n.endswith(".g_idx")]:
            order = torch.randperm(len(content[name]), generator=torch.Generator().manual_seed(0))
            content[name] = content[name][order].contiguous()

    edit(folder, change)


def scale_inputs(folder: Path) -> None:
    """An AWQ scaling that was not folded into the layer before."""

    def change(content: dict[str, torch.Tensor]) -> None:
        for name in [n for n in content if n.endswith(".pre_quant_scale")]:
            content[name] = torch.linspace(0.5, 2, len(content[name]))

    edit(folder, change)


@pytest.mark.parametrize(
    ("form", "change", "targets"),
    [(GPTQ, permute_groups, (CT, AWQ, MODELOPT)), (MODELOPT, scale_inputs, (CT, GPTQ, AWQ))],
)
def test_groups_that_are_not_runs_of_columns(
    form: str, change: Callable[[Path], None], targets: tuple[str, ...], tmp_path: Path
) -> None:
    packed_models.save(tmp_path / "a", form, SCHEMES["W4"])
    change(tmp_path / "a")
    for to in targets:
        refused(tmp_path, tmp_path / "a", to, rf"_proj: .*g_idx.*pre_quant_scale.*{to} has no place .* --to dense")


@pytest.mark.parametrize(
    ("form", "scheme", "exact", "to", "dtype"),
    [
        (GPTQ, "W4", "F16", CT, "BF16"),
        (AWQ, "W4-asym", "F16", CT, "BF16"),
        (MODELOPT, "W4", "F32", GPTQ, "F16"),
        (MODELOPT, "W4", "F32", AWQ, "F16"),
        (MODELOPT, "FP8", "F32", CT, "BF16"),
        (FP8_BLOCK, "FP8_BLOCK", "F32", CT, "BF16"),
    ],
)
def test_scales_that_the_target_would_round(
    form: str, scheme: str, exact: str, to: str, dtype: str, tmp_path: Path
) -> None:
    packed_models.save(tmp_path / "a", form, SCHEMES[scheme], exact=exact)
    refused(tmp_path, tmp_path / "a", to, rf"_proj: {to}: \d+ of \d+ scales change as {dtype}, .* codes were rounded")


def test_scales_of_fp16_go_into_a_model_of_fp16(tmp_path: Path) -> None:
    """What bfloat16 would round is exact where the model's dtype is that of the scales."""
    decoded = packed_models.save(tmp_path / "a", GPTQ, SCHEMES["W4"], exact="F16")
    packed_models.write_config(tmp_path / "a", None, dtype="float16")
    convert(tmp_path / "a", CT, tmp_path / "out")
    other = packed.open_folder(tmp_path / "out")
    assert all(torch.equal(numerics.dequantize(other.unpack(name)[0]), w) for name, w in decoded.items())
    assert other.checkpoint.specs["model.layers.0.mlp.up_proj.weight_scale"].dtype == "F16"


def test_mixed_schemes(tmp_path: Path) -> None:
    mixed = {"down_proj": SCHEMES["W8"], "": SCHEMES["W4"]}
    decoded = packed_models.save(tmp_path / "a", CT, mixed)
    for to in (GPTQ, AWQ, MODELOPT):
        refused(tmp_path, tmp_path / "a", to, rf"{to}: .*_proj has .*int.*; use compressed-tensors")
    convert(tmp_path / "a", "dense", tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert all(same(found[f"{name}.weight"], w.bfloat16()) for name, w in decoded.items())


def test_an_fp8_block_with_a_ragged_dimension(tmp_path: Path) -> None:
    packed_models.save(tmp_path / "a", CT, SCHEMES["FP8_BLOCK"], model={**packed_models.DIMS, "intermediate_size": 320})
    says = "fp8-block: in_features 320 is not a multiple of 128"
    refused(tmp_path, tmp_path / "a", FP8_BLOCK, says)


def test_a_quantized_kv_cache(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    decoded = packed_models.save(folder, CT, SCHEMES["W4"])
    own = formats.get(CT).config(dict.fromkeys(decoded, SCHEMES["W4"]) | {"lm_head": None}, FP8_TENSOR)  # type: ignore[call-arg]
    packed_models.write_config(folder, own)
    edit(folder, lambda content: content.update({f"model.layers.0.self_attn.{x}_scale": torch.ones(1) for x in "kv"}))
    refused(
        tmp_path, folder, GPTQ, "its KV cache is fp8_e4m3, whose scales are not carried over to gptq; use --to dense"
    )
    warned = quantkit.progress.Silent()
    convert(folder, "dense", tmp_path / "out", progress=warned)
    assert warned.warnings == [
        "2 scales of the KV cache are left out, model.layers.0.self_attn.k_scale among them",
    ]
    assert not [name for name in tensors(tmp_path / "out") if name.endswith(("k_scale", "v_scale"))]


def test_folders_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path / "none", GPTQ, "none: no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path, tmp_path / "empty", GPTQ, "no config.json, so it is not a model folder")
    tiny.save(tmp_path / "plain")
    refused(tmp_path, tmp_path / "plain", GPTQ, "plain: is not quantized")
    packed_models.write_config(tmp_path / "plain", {"quant_method": "bitsandbytes"})
    refused(tmp_path, tmp_path / "plain", GPTQ, "quant_method 'bitsandbytes' are not known")
    packed_models.write_config(tmp_path / "plain", formats.get(AWQ).config({"x": SCHEMES["W4"]}))
    refused(tmp_path, tmp_path / "plain", GPTQ, "holds no packed layer, though its config says awq")
    packed_models.write_config(tmp_path / "plain", {"quant_method": "awq", "bits": 4, "version": "gemv"})
    refused(tmp_path, tmp_path / "plain", GPTQ, "cannot be read: version is 'gemv'")


def test_tensors_that_are_missing_or_unknown(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    packed_models.save(folder, AWQ, SCHEMES["W4-asym"])
    edit(folder, lambda content: content.update({"model.layers.0.mlp.up_proj.secret": torch.ones(1)}))
    refused(tmp_path, folder, GPTQ, "up_proj: has the tensor 'secret', whose meaning in awq is unknown")
    edit(folder, lambda content: content.pop("model.layers.0.mlp.up_proj.secret"))
    edit(folder, lambda content: content.pop("model.layers.0.mlp.up_proj.scales"))
    refused(tmp_path, folder, GPTQ, "mlp.up_proj: awq: scales is missing")
    own = formats.get(AWQ).config({"x": SCHEMES["W4-asym"], "model.layers.0.mlp.up_proj": None})
    packed_models.write_config(folder, own)
    refused(tmp_path, folder, GPTQ, "mlp.up_proj is packed, but by the quantization_config it is dense")


def test_stacked_experts(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "a")
    edit(
        folder,
        lambda content: content.update(
            {
                "model.layers.0.mlp.experts.gate_up_proj_blocks": torch.zeros(3, 64, 2, 16, dtype=torch.uint8),
                "model.layers.0.mlp.experts.gate_up_proj_scales": torch.zeros(3, 64, 2, dtype=torch.uint8),
                "model.layers.0.mlp.experts.gate_up_proj_bias": torch.zeros(3, 64),
            }
        ),
    )
    packed_models.write_config(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    refused(tmp_path, folder, CT, "gpt-oss is not converted: its experts lie stacked")
    rows = {row[0]: row[1:] for row in inspection.inspect(str(folder))["table"]["rows"]}
    assert rows["model.layers.0.mlp.experts.gate_up_proj"][:3] == ["3 x 64 x 64", "mxfp4, group 32, symmetric", "4.250"]


# What else reads every format ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "form"), [(s, f) for s, held in ALIKE.items() for f in held])
def test_inspect_knows_every_format(scheme: str, form: str, tmp_path: Path) -> None:
    packed_models.save(tmp_path / "a", form, SCHEMES[scheme])
    info = inspection.inspect(str(tmp_path / "a"))
    rows = {row[0]: row[1:] for row in info["table"]["rows"]}
    assert info["warnings"] == [] and len(rows) == 9
    shape, what, bits, size, _ = rows["model.layers.0.mlp.up_proj"]
    number = SCHEMES[scheme].weights.number
    assert shape == "256 x 128" and what.startswith(number + ", ")
    own = {n: t for n, t in tensors(tmp_path / "a").items() if ".up_proj." in n and ".input_" not in n}
    expected = sum(t.nbytes for t in own.values())
    assert size == f"{expected:,}" and bits == f"{8 * expected / (256 * 128):.3f}"
    assert rows["lm_head"][:3] == ["4096 x 128", "BF16", "16.000"]


EXPORTS = {
    GPTQ: {"preset": "W4A16", "group_size": 64},
    AWQ: {"preset": "W4A16_ASYM", "group_size": 32},
    MODELOPT: "W4A16",
    FP8_BLOCK: "FP8_BLOCK",
}
CHECK = {
    "perplexity": {"data": "builtin:pydocs-heldout", "windows": 2, "length": 32},
    "generation": {"prompts": 2, "tokens": 4},
    "gates": {"kl": 1.0},
}


def exported(tmp_path: Path, form: str, scheme: Any, **changes: Any) -> Path:
    """A tiny model quantized by a recipe whose export.format is `form`."""
    source = tiny.save(tmp_path / "model", **packed_models.DIMS)
    (source / "hf_quant_config.json").write_text('{"of": "the source"}')
    (source / "quantize_config.json").write_text('{"of": "the source"}')
    recipe = {
        "model": str(source),
        "scheme": scheme,
        "method": "rtn",
        "calibration": {"data": "builtin:pydocs", "samples": 2, "length": 32},
        "validate": "none",
        "export": {"format": form, "engines": []},
    }
    return quantkit.quantize({**recipe, **changes}, out=tmp_path / "out", device="cpu").out


def by_independent_reader(folder: Path, form: str) -> dict[str, torch.Tensor]:
    """Every packed layer as tests/readers.py sees it, float32."""
    arrays = readers.parse((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if form == MODELOPT:
        config = json.loads((folder / "hf_quant_config.json").read_text())
    read = getattr(readers, form.replace("-", "_"))
    found = {}
    for name in [n.rpartition(".")[0] for n in arrays if n.endswith("." + formats.get(form).MARKER)]:
        own = {n.rpartition(".")[2]: t for n, t in arrays.items() if n.startswith(name + ".")}
        found[name] = torch.from_numpy(read(own, config))
    return found


@pytest.mark.parametrize(
    ("form", "scheme"),
    [
        *EXPORTS.items(),
        (GPTQ, "W8A16"),
        (GPTQ, {"preset": "W4A16_ASYM", "group_size": 32}),
        (AWQ, "W4A16"),
        (MODELOPT, "FP8"),
        (MODELOPT, "NVFP4"),
    ],
    ids=str,
)
def test_a_recipe_exports_what_an_independent_reader_decodes(form: str, scheme: Any, tmp_path: Path) -> None:
    out = exported(tmp_path, form, scheme)
    source, found = packed.open_folder(out), by_independent_reader(out, form)
    original = load_file(tmp_path / "model" / "model.safetensors")
    assert found.keys() == source.layers.keys() and len(found) == 7
    summary = json.loads((out / output.SUMMARY).read_text())
    bits = {x["name"]: x["bits_per_weight"] for x in summary["layers"]}
    for name, theirs in found.items():
        ours = numerics.dequantize(source.unpack(name)[0])
        if scheme == "NVFP4":  # the reader multiplies in another order
            torch.testing.assert_close(theirs, ours, rtol=2**-22, atol=0)
        else:
            assert torch.equal(theirs, ours)
        w = original[f"{name}.weight"].float()
        assert (ours - w).norm() / w.norm() < 0.2
        parts = [t for n, t in load_file(out / "model.safetensors").items() if n.startswith(name + ".")]
        assert 0 < bits[name] <= 8 * sum(t.nbytes for t in parts) / w.numel() + 1e-4
    for file, owner in formats.CONFIG_FILES.items():
        assert not (out / file).exists() or (owner == form and "of" not in json.loads((out / file).read_text()))


@pytest.mark.parametrize("form", EXPORTS)
def test_what_stock_transformers_cannot_load_is_measured_packed(form: str, tmp_path: Path) -> None:
    out = exported(tmp_path, form, EXPORTS[form], validate=CHECK)
    summary = json.loads((out / output.SUMMARY).read_text())
    assert summary["status"] == "validated" and summary["validation"]["notes"] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
    original = quantkit.load(tmp_path / "model", dtype=torch.float32)
    decoded = quantkit.load(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        for name, w in by_independent_reader(out, form).items():
            decoded.get_parameter(f"{name}.weight").copy_(w)
    texts = api.calibration.load_texts("builtin:pydocs-heldout")
    tokenizer = api.planning.tokenizer(api.hub.resolve(str(out)))
    windows = heldout_windows(texts, tokenizer, length=32, count=2)
    kl, measured = compare(original, decoded, windows).kl, summary["validation"]["comparison"]["kl"]
    assert kl > 1e-4 and measured == pytest.approx(compare(original, quantkit.load(out), windows).kl, rel=0.5)
    if form != FP8_BLOCK:  # which rounds inputs as well
        assert measured == pytest.approx(kl, rel=1e-3)
    else:
        assert measured > kl


def test_what_is_not_held_packed_is_measured_by_its_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = exported(tmp_path, MODELOPT, "FP8", validate=CHECK)

    def refuses(*args: Any, **kwargs: Any) -> Any:
        raise loading.planning.NotHeld("a reason")

    monkeypatch.setattr(loading.planning, "plan", refuses)
    found = api.validate(out)
    assert found.status == "validated"
    assert "not kept packed (a reason): what is measured is a dense copy" in found.notes[0]
    assert found.notes[1:] == ("inputs, which are fp8_e4m3 in the source, are not quantized in a dense copy",)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"], "the dense copy stayed"
    with pytest.raises(InputError, match=r"a reason.*--to dense"):
        quantkit.load(out)


def test_a_converted_output_is_validated_against_the_same_original(tmp_path: Path) -> None:
    out = exported(tmp_path, CT, {"preset": "W4A16", "group_size": 64}, validate=CHECK)
    before = json.loads((out / output.SUMMARY).read_text())
    convert(out, GPTQ, tmp_path / "gptq")
    convert(tmp_path / "gptq", "dense", tmp_path / "dense")
    summary = json.loads((tmp_path / "gptq" / output.SUMMARY).read_text())
    assert (summary["status"], summary["validation"]) == ("unvalidated", None)
    assert summary["source"] == before["source"] and summary["converted_from"]["format"] == CT
    assert summary["layers"][0]["bits_per_weight"] != before["layers"][0]["bits_per_weight"]
    assert (tmp_path / "gptq" / output.RECIPE).read_bytes() == (out / output.RECIPE).read_bytes()
    chain = json.loads((tmp_path / "dense" / output.SUMMARY).read_text())["converted_from"]
    assert (chain["format"], chain["converted_from"]["format"]) == (GPTQ, CT)
    kl = {x: api.validate(tmp_path / x).comparison.kl for x in ("gptq", "dense")}
    # the dense copy's weights are rounded to bfloat16
    assert kl["gptq"] == pytest.approx(kl["dense"], rel=0.05)
    assert kl["gptq"] == pytest.approx(before["validation"]["comparison"]["kl"], rel=0.05)
    assert json.loads((tmp_path / "gptq" / output.SUMMARY).read_text())["status"] == "validated"


def test_another_tools_checkpoint_converted_is_validated_with_against(tmp_path: Path) -> None:
    packed_models.save(tmp_path / "a", GPTQ, SCHEMES["W8"])
    tiny.save(tmp_path / "model", **packed_models.DIMS)
    convert(tmp_path / "a", CT, tmp_path / "out")
    with pytest.raises(InputError, match="--against"):
        api.validate(tmp_path / "out")
    found = api.validate(tmp_path / "out", against=tmp_path / "model", windows=2, length=32)
    assert found.status == "validated" and found.comparison.kl < 0.01


def test_the_command(tmp_path: Path) -> None:
    packed_models.save(tmp_path / "a", CT, SCHEMES["W4"])
    args = ["convert", str(tmp_path / "a"), "--to", GPTQ, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.stderr
    assert "7, from compressed-tensors to gptq" in result.stdout and "unvalidated" in result.stdout
    result = CliRunner().invoke(app, [*args, "--shard-size", "big"])
    assert result.exit_code == 2 and "'big': expected a size such as 500MB" in result.stderr
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "a"), "--to", "gptQ2", "--out", str(tmp_path / "b")])
    assert result.exit_code == 2 and "did you mean gptq?" in result.stderr and "Traceback" not in result.stderr
