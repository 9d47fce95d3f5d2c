"""transformers with quantkit imported: checkpoints that the compressed-tensors library compressed stay packed."""

from __future__ import annotations

import json
import logging
import pickle
import shutil

import pytest
import torch
import transformers
from library_checkpoints import (
    compress_by_library,
    config_of,
    decoded,
    layers,
    llama,
    pack_folder,
    qwen2,
    random_model,
    w,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CompressedTensorsConfig

from quantkit.errors import InputError, MissingError
from quantkit.formats import compressed_tensors as ct
from quantkit.presets import PRESETS
from quantkit.runtime import planning, quantizer
from quantkit.runtime.experts import PackedExperts
from quantkit.runtime.linear import PackedLinear
from quantkit.types import Scheme, TensorScheme
from quantkit_kernels import layout

IDS = torch.arange(3, 19)[None]
CHECKPOINTS = {
    "w4g128": (llama(), w(4, "group", 128)),
    "w4g32-asym-bias-tied": (qwen2(), w(4, "group", 32, symmetric=False)),
    "w3-channel-asym-odd": (llama(50, 70, 5), w(3, "channel", symmetric=False)),
    "w8g64-asym": (llama(64, 128), w(8, "group", 64, symmetric=False)),
    "w4-tensor": (llama(64, 70), w(4, "tensor")),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name -> (packed folder, the same dense), made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            config, weights = CHECKPOINTS[name]
            packed = compress_by_library(folder / "packed", random_model(config), weights)
            made[name] = packed, decoded(packed, folder / "dense")
        return made[name]

    return get


def packed_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def same(ours, theirs, *, exact):
    """Not to the bit where torch's own int4 product, which does not round the weight, computes in bfloat16."""
    assert torch.equal(ours, theirs) if exact else (ours - theirs).float().norm() <= 3e-2 * theirs.float().norm()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_stays_packed_and_computes_the_dense_reference(name, checkpoints, caplog):
    folder, dense = checkpoints(name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(dense)
    tensors = load_file(folder / "model.safetensors")
    assert packed_layers(model).keys() == layers(tensors).keys()
    assert len(packed_layers(model)) == 14
    footprint = model.get_memory_footprint()
    for layer in packed_layers(model).values():  # codes are padded to whole lines, of 256 columns at 3 bits
        line = layout.get(layer.held.kind).line
        columns, rows = -(-layer.in_features // line) * line, -(-layer.out_features // 8) * 8
        assert layer.codes.nbytes == columns * rows * layout.get(layer.held.kind).bits // 8
    same(logits(model), logits(reference), exact=name != "w4g128")
    scales = sum(b.nbytes for n, b in model.named_buffers() if n.endswith("cpu_scale"))  # of torch's own int4 product
    assert model.get_memory_footprint() == footprint + scales  # the forward has unpacked nothing for good
    assert not [r for r in caplog.records if r.name == "quantkit" and r.levelno > logging.INFO]


@pytest.mark.parametrize("name", ["w4g32-asym-bias-tied", "w8g64-asym"])
def test_loading_decodes_no_weight(name, checkpoints, monkeypatch):
    """Nor does it draw random numbers: transformers initializes the `weight` of a Linear that it takes for missing."""
    folder, _ = checkpoints(name)
    state, decoded = torch.get_rng_state(), []

    def record(self, dtype):
        decoded.append(self)
        return torch.zeros(1)

    monkeypatch.setattr(PackedLinear, "decoded", record)
    AutoModelForCausalLM.from_pretrained(folder)
    assert not decoded
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_saves_the_same_bytes(name, checkpoints, tmp_path):
    folder, _ = checkpoints(name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    logits(model)
    model.save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in before)
    assert config_of(folder)["quantization_config"] == config_of(tmp_path)["quantization_config"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype, checkpoints):
    folder, dense = checkpoints("w8g64-asym")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    layer = packed_layers(model)["model.layers.0.mlp.down_proj"]
    assert layer.weight.dtype == dtype and layer.codes.dtype == layer.scale.dtype == torch.int32
    # in float32 the reference's weights are those that were rounded to bfloat16, ours were not
    tolerance = 0.0 if dtype == torch.bfloat16 else 0.05
    reference = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    torch.testing.assert_close(logits(model), logits(reference), atol=tolerance, rtol=tolerance)


def test_generates_what_the_reference_generates(checkpoints):
    folder, dense = checkpoints("w4g32-asym-bias-tied")
    out = [
        AutoModelForCausalLM.from_pretrained(f).generate(IDS, max_new_tokens=12, do_sample=False)
        for f in (folder, dense)
    ]
    assert out[0].shape == (1, IDS.shape[1] + 12)
    assert torch.equal(*out)


def test_gradients_reach_the_inputs_and_nothing_packed_is_trained(checkpoints):
    folder, dense = checkpoints("w4g32-asym-bias-tied")
    grads = []
    for path in (folder, dense):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        x = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        model(inputs_embeds=x).logits.square().mean().backward()
        assert x.grad is not None
        grads.append(x.grad)
        if path == folder:
            packed = [p for layer in packed_layers(model).values() for p in layer.parameters()]
            assert not any(p.requires_grad or p.grad is not None for p in packed)
            assert model.hf_quantizer.is_trainable and not model.hf_quantizer.is_qat_trainable
            assert model.hf_quantizer.is_compileable and model.hf_quantizer.is_serializable()
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads, atol=1e-3, rtol=0.05)


def test_the_layer(checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints("w3-channel-asym-odd")[0])
    dense = AutoModelForCausalLM.from_pretrained(checkpoints("w3-channel-asym-odd")[1])
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    shape = "in_features=70, out_features=50, bias=False"
    assert repr(layer) == f"PackedLinear({shape}, int3, group=channel, zero_point=True, inputs=None, path=packed)"
    weight = layer.weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, dense.get_submodule("model.layers.0.mlp.down_proj").weight)
    assert list(layer.state_dict()) == ["codes", "scale"]
    model.dequantize()
    assert not packed_layers(model)
    assert torch.equal(logits(model), logits(dense))


def test_a_base_model_and_a_head_load_from_the_same_checkpoint(checkpoints):
    folder, dense = checkpoints("w4g128")
    with torch.no_grad():
        ours, theirs = (AutoModel.from_pretrained(f)(IDS).last_hidden_state for f in (folder, dense))
    same(ours, theirs, exact=False)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert len(packed_layers(classifier)) == 14
    assert type(classifier.score) is nn.Linear  # not in the checkpoint: new, dense


def test_offload_to_disk(checkpoints, tmp_path):
    folder, dense = checkpoints("w4g128")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    assert packed_layers(model)["model.layers.1.mlp.up_proj"].codes.device.type == "meta"
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(dense)))


def test_several_schemes_and_exact_names(tmp_path):
    random_model(llama()).save_pretrained(tmp_path / "packed")
    schemes = {}
    for i, number in enumerate(("int4", "int8")):
        for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"):
            schemes[f"model.layers.{i}.{name}"] = TensorScheme(number, "group", 64, symmetric=bool(i))
    folder = pack_folder(tmp_path / "packed", schemes, ignore=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {n: layer.held.disk.scheme.weights for n, layer in packed_layers(model).items()} == schemes
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(decoded(folder, tmp_path / "d"))))
    assert len(packed_layers(AutoModel.from_pretrained(folder))) == 6  # there the names lose their "model."


def test_names_that_transformers_renames(tmp_path):
    """Multimodal checkpoints have other names on disk than in memory; targets and ignore are those on disk."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=8),
        text_config=llama(),
        image_token_index=63,
    )
    random_model(config, transformers.LlavaForConditionalGeneration).save_pretrained(tmp_path / "packed")
    on_disk = [k for k in load_file(tmp_path / "packed" / "model.safetensors") if k.endswith("up_proj.weight")]
    schemes = {
        key.removesuffix(".weight"): TensorScheme(number, "group", 32)
        for key, number in zip(sorted(on_disk), ("int4", "int8"))
    }
    folder = pack_folder(tmp_path / "packed", schemes)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    found = {name: layout.get(layer.held.kind).bits for name, layer in packed_layers(model).items()}
    assert not found.keys() & schemes.keys()
    assert sorted(found.values()) == [4, 8]
    dense = transformers.LlavaForConditionalGeneration.from_pretrained(decoded(folder, tmp_path / "dense"))
    same(logits(model), logits(dense), exact=False)


# what is not kept packed ---------------------------------------------------------------------------------------------


def said(caplog):
    lines = [r.getMessage() for r in caplog.records if r.name == "quantkit"]
    assert len(lines) == 1 and "\n" not in lines[0]
    return lines[0]


def test_dequantize_decodes_while_loading(checkpoints, caplog, tmp_path):
    folder, dense = checkpoints("w4g32-asym-bias-tied")
    loading = CompressedTensorsConfig(dequantize=True)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):  # transformers' own
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=loading)
    assert not packed_layers(model) and not caplog.records
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(dense)))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in config_of(tmp_path)
    before, after = load_file(dense / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_dequantize_of_several_schemes(tmp_path):
    """Stock transformers cannot: it wants one format for all."""
    random_model(llama()).save_pretrained(tmp_path / "m")
    schemes = {f"model.layers.{i}.mlp.up_proj": TensorScheme(f"int{4 * (i + 1)}", "group", 64) for i in range(2)}
    folder = pack_folder(tmp_path / "m", schemes, ignore=["lm_head"])
    reference = AutoModelForCausalLM.from_pretrained(decoded(folder, tmp_path / "d"))
    with pytest.warns(UserWarning):
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    assert torch.equal(logits(model), logits(reference))


def test_dequantize_over_several_devices_is_transformers_own(checkpoints, caplog):
    folder, dense = checkpoints("w4g128")
    with pytest.warns(UserWarning):
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=CompressedTensorsConfig(dequantize=True), device_map="auto"
        )
    assert "dequantize=True, on more than one device" in said(caplog)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(dense)))


def test_a_config_is_pickled(checkpoints):
    config = AutoModelForCausalLM.from_pretrained(checkpoints("w4g128")[0]).config
    assert pickle.loads(pickle.dumps(config)).quantization_config == config.quantization_config


def test_missing_package_is_said(checkpoints, caplog, tmp_path, monkeypatch):
    folder = checkpoints("w4g128")[0]
    monkeypatch.setattr(quantizer, "is_compressed_tensors_available", lambda: False)
    shutil.copytree(folder, tmp_path / "m")
    config = config_of(folder)
    config["quantization_config"]["transform_config"] = {"config_groups": {"R4": {}}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MissingError, match=r"transform_config is set.*pip install compressed-tensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert packed_layers(AutoModelForCausalLM.from_pretrained(folder))
    assert not [r for r in caplog.records if r.levelno > logging.INFO]


def test_fp8_block_with_a_width_that_128_does_not_divide(tmp_path):
    """Stock transformers' forward raises."""
    random_model(llama(128, 320)).save_pretrained(tmp_path / "m")
    schemes = {f"model.layers.{i}.mlp.{n}_proj": PRESETS["FP8_BLOCK"] for i in range(2) for n in ("gate", "up", "down")}
    model = AutoModelForCausalLM.from_pretrained(pack_folder(tmp_path / "m", schemes, ignore=["lm_head"]))
    assert len(packed_layers(model)) == 6 and torch.isfinite(logits(model)).all()
    original = logits(random_model(llama(128, 320)))
    assert (logits(model) - original).norm() < 0.1 * original.norm()


def mixtral(folder):
    config = {**llama(32, 64).to_dict(), "num_local_experts": 2, "num_experts_per_tok": 1}
    random_model(transformers.MixtralConfig(**{k: v for k, v in config.items() if k != "model_type"})).save_pretrained(
        folder
    )
    return [
        k.removesuffix(".weight") for k in load_file(folder / "model.safetensors") if "proj" in k or ".experts." in k
    ]


@pytest.mark.parametrize("experts", [True, False])
def test_experts(experts, caplog, tmp_path):
    """Packed experts stay packed; dense ones beside packed attention stay dense."""
    names = [n for n in mixtral(tmp_path / "packed") if experts or "experts" not in n]
    folder = pack_folder(
        tmp_path / "packed", dict.fromkeys(names, TensorScheme("int4", "group", 32)), ignore=["lm_head"]
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert packed_layers(model).keys() == {n for n in names if "experts" not in n}
    assert any(isinstance(m, PackedExperts) for m in model.modules()) == experts
    assert not [r for r in caplog.records if r.levelno > logging.INFO]
    reference = AutoModelForCausalLM.from_pretrained(decoded(folder, tmp_path / "dense"))
    torch.testing.assert_close(logits(model), logits(reference), atol=0.02, rtol=0.02)


def test_packed_on_disk_but_not_in_the_config(tmp_path, caplog):
    random_model(llama()).save_pretrained(tmp_path)
    schemes = dict.fromkeys(("model.layers.0.mlp.up_proj", "lm_head"), TensorScheme("int4", "channel"))
    pack_folder(tmp_path, schemes)
    config = config_of(tmp_path)
    config["quantization_config"]["ignore"] = ["lm_head"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, "quantkit"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "lm_head is packed in the checkpoint, but no group of its config names it" in said(caplog)


@pytest.mark.parametrize(
    ("packed", "model", "says"),
    [
        ("model.embed_tokens", qwen2(), "model.embed_tokens is packed, but here it is Embedding"),
        ("lm_head", qwen2(), "lm_head is packed, but the model ties its weight"),
        ("model.layers.1.mlp.up_proj", qwen2(num_hidden_layers=1), "none of the 1 packed layers of the checkpoint"),
    ],
)
def test_plan_refuses_what_a_packed_linear_cannot_replace(packed, model, says, tmp_path):
    random_model(qwen2(tie_word_embeddings=False)).save_pretrained(tmp_path)
    pack_folder(tmp_path, {packed: TensorScheme("int4", "channel")})
    config = config_of(tmp_path)["quantization_config"]
    config["config_groups"]["group_0"]["targets"] = [packed]
    with pytest.raises(planning.NotHeld, match=says):
        planning.plan(random_model(model), ct, ct.read_config(config), [str(tmp_path / "model.safetensors")])


def test_plan_without_files_goes_by_the_config():
    config = ct.read_config(
        ct.config({"a": Scheme(TensorScheme("int4", "channel")), "model.layers.0.mlp.up_proj": None})
    )
    found = planning.plan(random_model(qwen2()), ct, config, None)
    assert len(found.linears) == 13  # neither the ignored layer nor the head, which is tied
    with pytest.raises(planning.NotHeld, match="the checkpoint is not in safetensors"):
        planning.plan(random_model(qwen2()), ct, config, ["model.bin"])


def test_a_state_dict_is_loaded_without_files(checkpoints):
    folder, dense = checkpoints("w4g32-asym-bias-tied")
    config = AutoConfig.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    model = transformers.Qwen2ForCausalLM.from_pretrained(None, config=config, state_dict=tensors)
    assert len(packed_layers(model)) == 14
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(dense)))


@pytest.mark.parametrize("changed", [{"intermediate_size": 71}, {"intermediate_size": 128}])
def test_another_shape_in_config_is_refused(changed, checkpoints, tmp_path):
    shutil.copytree(checkpoints("w3-channel-asym-odd")[0], tmp_path / "m")  # 70 codes of 3 bits fill what 71 do
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config_of(tmp_path / "m"), **changed}))
    n = changed["intermediate_size"]
    with pytest.raises(InputError, match=rf"weight_shape says \(50, 70\), the model's config says \(50, {n}\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")
