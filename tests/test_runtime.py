"""transformers with quantkit imported: checkpoints that the compressed-tensors library compressed stay packed."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

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
from transformers import AutoModel, AutoModelForCausalLM, CompressedTensorsConfig

import quantkit
from quantkit.errors import InputError, MissingError
from quantkit.formats import compressed_tensors as ct
from quantkit.runtime import plugin, quantizer
from quantkit.runtime.linear import PackedLinear
from quantkit.types import Scheme, TensorScheme

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


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_stays_packed_and_computes_the_dense_reference(name, checkpoints, caplog):
    folder, dense = checkpoints(name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(dense)
    tensors = load_file(folder / "model.safetensors")
    assert packed_layers(model).keys() == layers(tensors).keys()
    assert len(packed_layers(model)) == 14
    footprint = model.get_memory_footprint()
    saved = sum(reference.get_submodule(n).weight.nbytes for n in layers(tensors))
    saved -= sum(t.nbytes for layer in layers(tensors).values() for t in layer.values())
    assert footprint == reference.get_memory_footprint() - saved
    assert saved > 0
    assert torch.equal(logits(model), logits(reference))
    assert model.get_memory_footprint() == footprint  # the forward has unpacked nothing for good
    assert not [r for r in caplog.records if r.name == "quantkit"]


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
    assert layer.weight_scale.dtype == dtype and layer.weight_packed.dtype == torch.int32
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


@pytest.mark.parametrize("grad", [True, False])
def test_compiles_whole(grad, checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints("w4g32-asym-bias-tied")[0])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        assert torch.equal(compiled(IDS, use_cache=False).logits, logits(model))


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
    assert repr(layer) == f"PackedLinear({shape}, bits=3, group=channel, zero_point=True)"
    weight = layer.weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, dense.get_submodule("model.layers.0.mlp.down_proj").weight)
    assert list(layer.state_dict()) == ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape"]
    model.dequantize()
    assert not packed_layers(model)
    assert torch.equal(logits(model), logits(dense))


def test_a_base_model_and_a_head_load_from_the_same_checkpoint(checkpoints):
    folder, dense = checkpoints("w4g128")
    with torch.no_grad():
        ours, theirs = (AutoModel.from_pretrained(f)(IDS).last_hidden_state for f in (folder, dense))
    assert torch.equal(ours, theirs)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert len(packed_layers(classifier)) == 14
    assert type(classifier.score) is nn.Linear  # not in the checkpoint: new, dense


def test_offload_to_disk(checkpoints, tmp_path):
    folder, dense = checkpoints("w4g128")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    assert packed_layers(model)["model.layers.1.mlp.up_proj"].weight_packed.device.type == "meta"
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(dense)))


def test_several_schemes_and_exact_names(tmp_path):
    random_model(llama()).save_pretrained(tmp_path / "packed")
    schemes = {}
    for i, number in enumerate(("int4", "int8")):
        for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"):
            schemes[f"model.layers.{i}.{name}"] = TensorScheme(number, "group", 64, symmetric=bool(i))
    folder = pack_folder(tmp_path / "packed", schemes, ignore=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {n: layer.scheme.weights for n, layer in packed_layers(model).items()} == schemes
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
    found = {name: layer.bits for name, layer in packed_layers(model).items()}
    assert not found.keys() & schemes.keys()
    assert sorted(found.values()) == [4, 8]
    dense = transformers.LlavaForConditionalGeneration.from_pretrained(decoded(folder, tmp_path / "dense"))
    assert torch.equal(logits(model), logits(dense))


# what is not kept packed ---------------------------------------------------------------------------------------------


def said(caplog):
    lines = [r.getMessage() for r in caplog.records if r.name == "quantkit"]
    assert len(lines) == 1 and "\n" not in lines[0]
    return lines[0]


def test_dequantize_is_transformers_own(checkpoints, caplog, tmp_path):
    folder, dense = checkpoints("w4g32-asym-bias-tied")
    loading = CompressedTensorsConfig(dequantize=True)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):  # transformers' own
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=loading)
    assert "dequantize=True" in said(caplog)
    assert not packed_layers(model)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(dense)))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in config_of(tmp_path)


FP8 = w(8, "channel", type="float")
FP8_INPUT = w(8, "token", type="float", dynamic=True)


def test_fp8_falls_back(caplog, tmp_path):
    folder = compress_by_library(tmp_path / "fp8", random_model(llama()), FP8, input_activations=FP8_INPUT)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert "group_0 quantizes input activations" in said(caplog)
    assert model.get_submodule("model.layers.0.mlp.up_proj").weight.dtype == torch.float8_e4m3fn
    model.save_pretrained(tmp_path / "again")  # as it would be without quantkit: the library's object is what is saved
    assert (
        config_of(tmp_path / "again")["quantization_config"]["config_groups"]["group_0"]["weights"]["type"] == "float"
    )
    assert torch.isfinite(logits(model)).all()


def test_missing_package_is_said(checkpoints, caplog, tmp_path, monkeypatch):
    folder = compress_by_library(tmp_path / "fp8", random_model(llama()), FP8)
    monkeypatch.setattr(quantizer, "is_compressed_tensors_available", lambda: False)
    with pytest.raises(MissingError, match=r"float8 per channel.*pip install compressed-tensors"):
        AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(checkpoints("w4g128")[0])
    assert packed_layers(model)
    with pytest.raises(MissingError, match="pip install compressed-tensors"):
        _ = model.config.quantization_config.quantization_config
    assert not caplog.records


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
    """Packed experts are merged into one tensor while loading: not held. Dense ones beside packed attention are."""
    names = [n for n in mixtral(tmp_path / "packed") if experts or "experts" not in n]
    folder = pack_folder(
        tmp_path / "packed", dict.fromkeys(names, TensorScheme("int4", "group", 32)), ignore=["lm_head"]
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    if experts:
        assert "fused experts" in said(caplog)
    else:
        assert packed_layers(model).keys() == set(names) and not caplog.records
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
    _, reason = quantizer.plan(random_model(model), ct.read_config(config), [str(tmp_path / "model.safetensors")])
    assert reason is not None and says in reason


def test_plan_without_files_goes_by_the_config():
    config = ct.read_config(
        ct.config({"a": Scheme(TensorScheme("int4", "channel")), "model.layers.0.mlp.up_proj": None})
    )
    swaps, reason = quantizer.plan(random_model(qwen2()), config, None)
    assert reason is None and len(swaps) == 13  # neither the ignored layer nor the head, which is tied
    assert quantizer.plan(random_model(qwen2()), config, ["model.bin"]) == ({}, "the checkpoint is not in safetensors")


def test_another_shape_in_config_is_refused(checkpoints):
    folder, _ = checkpoints("w3-channel-asym-odd")  # 50 codes of 3 bits and 51 fill the same five words
    layer = PackedLinear(51, 50, Scheme(TensorScheme("int3", "channel", symmetric=False)), bias=False)
    tensors = layers(load_file(folder / "model.safetensors"))["model.layers.0.self_attn.q_proj"]
    layer.load_state_dict(tensors)
    with pytest.raises(InputError, match=r"q\.weight_shape says \(50, 50\), the model's config says \(50, 51\)"):
        layer.check_loaded("q")


# registration --------------------------------------------------------------------------------------------------------


def test_install_is_idempotent():
    auto = sys.modules["transformers.quantizers.auto"]
    before = list(sys.meta_path)
    plugin.install()
    assert sys.meta_path == before
    assert not any(isinstance(f, plugin.RegisterOnImport) for f in sys.meta_path)
    assert auto.AUTO_QUANTIZER_MAPPING["compressed-tensors"] is quantizer.PackedQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] is quantizer.CompressedTensorsConfig
    assert quantizer.CompressedTensorsConfig.__name__ == CompressedTensorsConfig.__name__


def test_a_transformers_that_cannot_be_extended_stays_usable(caplog):
    plugin.register(sys)  # a module without the tables
    assert "5.17 or newer" in said(caplog)


ORDERS = {
    "quantkit first": """
import sys, quantkit
heavy = {"torch", "transformers", "triton", "numpy", "pydantic"} & set(sys.modules)
assert not heavy, heavy
quantkit.runtime.plugin.install()
assert sum("quantkit" in type(f).__module__ for f in sys.meta_path) == 1
import importlib.util
importlib.util.find_spec("transformers.quantizers.auto")  # looking is not importing
class Blocked:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] != "compressed_tensors", "the library was imported"
sys.meta_path.insert(0, Blocked())
from transformers import AutoModelForCausalLM
""",
    "transformers first": """
import sys
from transformers import AutoModelForCausalLM
import quantkit
""",
}


@pytest.mark.parametrize("order", ORDERS)
def test_import_order(order, checkpoints):
    code = ORDERS[order] + (
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
        "assert not any('quantkit' in type(f).__module__ for f in sys.meta_path)\n"
    )
    paths = {str(Path(m.__file__ or "").parents[1]) for m in (quantkit, sys.modules["quantkit_kernels"])}
    code = f"import sys; sys.path[:0] = {sorted(paths)}\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkpoints("w4g128")[0])], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["PackedLinear"], done.stderr
