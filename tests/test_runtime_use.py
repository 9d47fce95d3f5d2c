"""What users do with a packed model: adapters, offloading, drafts, pipelines, compiling, files beside config.json."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import packed_models
import pytest
import torch
import transformers
from packed_models import quantized, write_config
from safetensors.torch import load_file, save_file
from test_runtime_formats import IDS, loaded, logits, saved_alike

from quantkit import formats
from quantkit.errors import InputError
from quantkit.hub import resolve
from quantkit.presets import PRESETS
from quantkit.types import Scheme, TensorScheme

SCHEMES: dict[str, tuple[str, Scheme]] = {
    "W4A16": ("compressed-tensors", PRESETS["W4A16"]),
    "gptq": ("gptq", PRESETS["W4A16"]),
    "FP8_DYNAMIC": ("compressed-tensors", PRESETS["FP8_DYNAMIC"]),
    "fp8": ("fp8-block", PRESETS["FP8_BLOCK"]),
    "NVFP4": ("compressed-tensors", PRESETS["NVFP4"]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("models") / name
            packed_models.save(made[name], *SCHEMES[name], model={**packed_models.DIMS, "num_hidden_layers": 2})
        return made[name]

    return get


@pytest.mark.parametrize("name", SCHEMES)
def test_an_adapter_is_trained_on_it(name: str, folders: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model, layers = loaded(folders(name), dtype=torch.float32)
    before = logits(model)
    codes = {key: layer.codes.clone() for key, layer in layers.items()}
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert torch.equal(logits(tuned), before)
    rate = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = tuned(IDS, labels=IDS).loss
        loss.backward()
        rate.step()
        rate.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert all(torch.equal(layer.codes, codes[key]) for key, layer in layers.items())
    tuned.save_pretrained(str(tmp_path))
    assert all("lora" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(loaded(folders(name), dtype=torch.float32)[0], tmp_path)
    assert torch.equal(logits(again), logits(tuned))
    with pytest.raises((RuntimeError, ValueError), match=r"merge"):  # into codes that are not there
        tuned.merge_and_unload()


@pytest.mark.parametrize("name", ["W4A16", "FP8_DYNAMIC"])
def test_gradients_are_those_of_the_decoded_weight(name: str, folders: Any) -> None:
    _, layers = loaded(folders(name), dtype=torch.float32)
    layer = layers["model.layers.0.mlp.down_proj"]
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0), requires_grad=True)
    grad = torch.randn(5, layer.out_features, generator=torch.Generator().manual_seed(1))
    layer(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.weight)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("device_map", ["auto", "disk"])
def test_offloading(name: str, device_map: str, folders: Any, tmp_path: Path) -> None:
    plain, _ = loaded(folders(name))
    where: Any = device_map
    if device_map == "disk":
        where = dict.fromkeys(
            ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
        )
        where["model.layers.1"] = "disk"
    model, layers = loaded(folders(name), device_map=where, offload_folder=tmp_path / "offloaded")
    if device_map == "disk":
        assert layers["model.layers.1.mlp.up_proj"].codes.is_meta
    if device_map == "disk":
        packed_models.decoding(plain)  # as layers do that hooks move
    assert torch.equal(logits(model), logits(plain))
    saved_alike(model, folders(name), tmp_path / "again")


def test_a_copy_and_a_cast_keep_the_codes(folders: Any, tmp_path: Path) -> None:
    model, _ = loaded(folders("FP8_DYNAMIC"))
    twin = copy.deepcopy(model).to(torch.float32)
    assert twin.model.norm.weight.dtype == torch.float32
    wide, _ = loaded(folders("FP8_DYNAMIC"), dtype=torch.float32)
    assert torch.equal(logits(twin), logits(wide))
    saved_alike(twin.to(torch.bfloat16), folders("FP8_DYNAMIC"), tmp_path / "again")


def test_shards_of_any_size(folders: Any, tmp_path: Path) -> None:
    packed_models.save(tmp_path / "m", *SCHEMES["W4A16"], shard="100KB")
    model, layers = loaded(tmp_path / "m")
    assert len(layers) == 7
    model.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    before, after = (
        {k: t for f in (tmp_path / x).glob("*.safetensors") for k, t in load_file(f).items()} for x in ("m", "again")
    )
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("name", ["W4A16", "FP8_DYNAMIC", "NVFP4"])
@pytest.mark.parametrize("grad", [True, False])
def test_it_compiles_whole(name: str, grad: bool, folders: Any) -> None:
    torch._dynamo.reset()
    model = packed_models.decoding(loaded(folders(name))[0])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        assert torch.equal(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


@pytest.mark.slow
def test_inductor_compiles_it_whole(folders: Any) -> None:
    torch._dynamo.reset()
    model, _ = loaded(folders("W4A16"), dtype=torch.float32)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        ours, theirs = compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# the embedded model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pydocs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """The embedded model, the same packed, and the tokenizer."""
    source, folder = resolve("builtin:pydocs-llama-7m").folder, tmp_path_factory.mktemp("pydocs")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    original = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    transformers.AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ct, tensors, schemes = formats.get("compressed-tensors"), load_file(folder / "model.safetensors"), {}
    scheme = Scheme(TensorScheme("int4", "group", 32))
    for key in [k for k in tensors if "_proj." in k]:
        name = key.removesuffix(".weight")
        tensors |= {f"{name}.{leaf}": t for leaf, t in ct.pack(quantized(tensors.pop(key).float(), scheme)).items()}
        schemes[name] = scheme
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_config(folder, ct.config({**schemes, "lm_head": None}))
    return original, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def test_a_draft_of_its_own_original(pydocs: tuple[Any, Any, Any]) -> None:
    original, packed, tokenizer = pydocs
    ids = tokenizer("def open(file, mode=", return_tensors="pt").input_ids
    alone = original.generate(ids, max_new_tokens=24, do_sample=False, use_cache=True)
    drafted = original.generate(ids, max_new_tokens=24, do_sample=False, use_cache=True, assistant_model=packed)
    assert torch.equal(alone, drafted)


def test_a_pipeline(pydocs: tuple[Any, Any, Any]) -> None:
    _, packed, tokenizer = pydocs
    pipe = transformers.pipeline("text-generation", model=packed, tokenizer=tokenizer)
    (found,) = pipe("Return the", max_new_tokens=8, do_sample=False)
    assert len(found["generated_text"]) > len("Return the")


# what lies beside config.json, and what other tools write -------------------------------------------------------------


@pytest.mark.parametrize("form", ["modelopt", "gptq"])
def test_a_config_beside_config_json_counts(form: str, tmp_path: Path) -> None:
    packed_models.save(tmp_path / "m", form, PRESETS["NVFP4"] if form == "modelopt" else PRESETS["W4A16"])
    expected = logits(loaded(tmp_path / "m")[0])
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    if form == "gptq":  # as AutoGPTQ wrote it
        file = tmp_path / "m" / "quantize_config.json"
        file.write_text(json.dumps({"bits": 4, "group_size": 128, "desc_act": False, "sym": True}))
    model, layers = loaded(tmp_path / "m")
    assert len(layers) == 7 and torch.equal(logits(model), expected)


def test_what_transformers_would_load_as_random_weights_is_refused(tmp_path: Path) -> None:
    packed_models.save(tmp_path / "m", "modelopt", PRESETS["FP8"])
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    for changes, says in (
        ({"quant_algo": "W4A8_AWQ"}, "quant_algo is 'W4A8_AWQ'.*--to dense"),
        ({"quant_algo": None}, "quant_algo is None.*--to dense"),
    ):
        write_config(tmp_path / "m", {**config, **changes})
        with pytest.raises(InputError, match=says):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_what_is_said(folders: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "quantkit"):
        loaded(folders("NVFP4"))
    lines = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "quantkit"]
    assert [level for level, _ in lines] == ["INFO", "WARNING"]
    assert "14 packed layers of nvfp4 run in plain torch on the CPU" in lines[0][1]
    assert "inputs of 14 layers are rounded to nvfp4" in lines[1][1]
