"""Scales of a KV cache: calibrated, written, read by others, and computed with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.llama import modeling_llama
from transformers.quantizers import auto
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig

import quantkit
from quantkit import blocks, calibration, calibration_rows, estimate, kv_cache, output
from quantkit import plan as planning
from quantkit.checkpoint import Checkpoint
from quantkit.errors import InputError
from quantkit.recipe import Recipe
from quantkit.runtime.linear import PackedLinear

CALIBRATION: dict[str, Any] = {"data": "builtin:pydocs", "samples": 6, "length": 48, "batch_size": 4}
LAST = [{"match": "model.layers.1.mlp.down_proj", "scheme": {"preset": "W8A16", "group_size": 32}}]
ONLY_THE_LAST: dict[str, Any] = {"scheme": "none", "rules": LAST}  # no key or value depends on a rounded weight


def recipe(model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "scheme": {"preset": "W4A16", "group_size": 32},
        "method": "rtn",
        "kv_cache": "fp8",
        "calibration": CALIBRATION,
        "validate": "none",
        **changes,
    }


def quantized(model: Path, out: Path, **changes: Any) -> dict[str, torch.Tensor]:
    quantkit.quantize(recipe(model, **changes), out=out, device="cpu")
    return load_file(out / "model.safetensors")


class Recording(DynamicCache):
    """Keeps all keys and values of each layer, also those that a sliding window drops."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.seen[layer_idx] = key_states, value_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def brute_force(model: Path, settled: Recipe, *, masked: bool = True) -> list[list[torch.Tensor]]:
    """[layer][k, v]: the largest magnitude of each head, from the whole dense model."""
    rows = calibration_rows.read(planning.make(settled), quantkit.progress.Silent())
    assert rows is not None
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found: list[list[torch.Tensor]] = []
    size = settled.calibration.batch_size
    for ids, mask in zip(rows.ids_RL.split(size), rows.mask_RL.split(size), strict=True):
        cache = Recording()
        with torch.no_grad():
            dense(input_ids=ids, past_key_values=cache, use_cache=True)
        for layer, states in sorted(cache.seen.items()):
            tokens = [x.transpose(1, 2)[mask if masked else torch.ones_like(mask)] for x in states]
            peaks = [x.abs().amax((0, 2)) for x in tokens]
            if len(found) == layer:
                found.append(peaks)
            found[layer] = [a.maximum(b) for a, b in zip(found[layer], peaks, strict=True)]
    return found


@pytest.mark.parametrize("strategy", ["tensor", "head"])
@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_scales_are_the_largest_key_and_value_by_448(kind: str, strategy: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", kind)
    changes = {"kv_cache": {"strategy": strategy}, **ONLY_THE_LAST}
    written = quantized(folder, tmp_path / "out", **changes)
    for layer, expected in enumerate(brute_force(folder, Recipe.from_any(recipe(folder, **changes)))):
        for side, peaks in zip("kv", expected, strict=True):
            scale = written[f"model.layers.{layer}.self_attn.{side}_scale"]
            amax = peaks.reshape(-1, 1, 1) if strategy == "head" else peaks.amax().reshape(1)
            assert scale.dtype == torch.bfloat16 and scale.shape == ((2, 1, 1) if strategy == "head" else (1,))
            # the second block's inputs went through another attention mask: the last bit of bfloat16 may differ
            tolerance = 0.0 if layer == 0 else 2**-7
            torch.testing.assert_close(scale, (amax / 448).bfloat16(), rtol=tolerance, atol=0)
    assert sum(name.endswith(("k_scale", "v_scale")) for name in written) == 4


@pytest.mark.parametrize(("given", "theirs"), [("fp8", "tensor"), ({"strategy": "head"}, "attn_head")])
def test_the_library_reads_the_config_and_the_report_has_the_range(given: Any, theirs: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    changes = {"kv_cache": given, "method": "gptq"}
    plan = planning.make(Recipe.from_any(recipe(folder, **changes)))
    written = quantized(folder, tmp_path / "out", **changes)
    assert Checkpoint.open(tmp_path / "out").specs == plan.specs
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    args = QuantizationConfig.model_validate(config).kv_cache_scheme
    assert args is not None and (args.num_bits, args.type, args.strategy) == (8, "float", theirs)
    assert args.symmetric and not args.dynamic
    summary = json.loads((tmp_path / "out" / output.SUMMARY).read_text())["kv_cache"]
    for leaf in ("k_scale", "v_scale"):
        values = torch.cat([t.flatten() for name, t in written.items() if name.endswith(leaf)])
        assert summary[leaf] == {"least": values.min().item(), "largest": values.max().item()}
    facts = dict(estimate.describe(plan)["facts"])
    assert "fp8_e4m3" in facts["KV cache"]
    assert written["model.layers.0.self_attn.k_scale"].dtype == torch.bfloat16


def test_without_a_quantized_cache_nothing_is_calibrated_or_written(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    settled = Recipe.from_any(recipe(folder, kv_cache="none"))
    assert not planning.make(settled).needs_data
    result = quantkit.quantize(settled, out=tmp_path / "out", device="cpu")
    assert result.summary["kv_cache"] is None and result.summary["data"] is None
    assert not any(name.endswith("k_scale") for name in load_file(result.out / "model.safetensors"))


def test_padding_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are padded with a token that is in no text, and whose value is made larger than every other."""
    pack_rows = calibration.pack_rows

    def padded(*args: Any, **kwargs: Any) -> calibration.Rows:
        rows = pack_rows(*args, **kwargs)
        rows.ids_RL[~rows.mask_RL] = tiny.BASE["pad_token_id"]
        return rows

    monkeypatch.setattr(calibration, "pack_rows", padded)
    folder = tiny.save(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    norm = tensors["model.layers.0.input_layernorm.weight"].float()
    row = tensors["model.layers.0.self_attn.v_proj.weight"].float().square().sum(1).argmax()
    loud = tensors["model.layers.0.self_attn.v_proj.weight"][row].float() * norm
    tensors["model.embed_tokens.weight"][tiny.BASE["pad_token_id"]] = loud.bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"def f{i}(x): return x" * (i + 1)}) for i in range(6)))
    changes: dict[str, Any] = {
        "calibration": {**CALIBRATION, "data": str(texts), "packing": "document"},
        **ONLY_THE_LAST,
    }
    written = quantized(folder, tmp_path / "out", **changes)
    settled = Recipe.from_any(recipe(folder, **changes))
    (_, v), (_, every) = brute_force(folder, settled)[0], brute_force(folder, settled, masked=False)[0]
    assert every.max() > 1.5 * v.max(), "the padding is not loud enough to be noticed"
    assert written["model.layers.0.self_attn.v_scale"].item() == (v.max() / 448).bfloat16().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_scale_is_never_zero(dtype: torch.dtype) -> None:
    peaks = kv_cache.Peaks()
    peaks.update(torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    k, v = peaks.scales("head", dtype)
    assert (k > 0).all() and torch.equal(v, torch.full((2,), 1 / 448).to(dtype))
    with pytest.raises(InputError, match="NaN or Inf"):
        peaks.update(torch.full((1, 2, 3, 4), float("nan")), torch.ones(1, 2, 3, 4))
        peaks.scales("tensor", dtype)


def test_a_scale_that_does_not_fit_is_refused() -> None:
    peaks = kv_cache.Peaks()
    peaks.update(torch.full((1, 2, 3, 4), 1e9), torch.ones(1, 2, 3, 4))
    with pytest.raises(InputError, match="overflows"):
        peaks.scales("tensor", torch.float16)


@pytest.mark.parametrize("form", ["awq", "gptq", "fp8-block", "modelopt", "gpt-oss"])
def test_formats_without_a_place_for_the_scales_refuse(form: str, tmp_path: Path) -> None:
    given = recipe(tiny.save(tmp_path / "model"), export={"format": form, "engines": []})
    with pytest.raises(InputError, match=f"kv_cache: .* not written to {form}; .* one of compressed-tensors, or"):
        planning.make(Recipe.from_any(given))


def test_a_block_that_fills_no_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.save(tmp_path / "model")
    forward = modeling_llama.LlamaAttention.forward

    def forgetful(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **{**kwargs, "past_key_values": None} if self.layer_idx == 1 else kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forgetful)
    with pytest.raises(InputError, match=r"model\.layers\.1: hands no keys and values to a cache"):
        planning.make(Recipe.from_any(recipe(folder)))


def test_a_block_that_asks_more_of_its_cache_is_named() -> None:
    class Curious(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(3))

        def forward(self, x: torch.Tensor, past_key_values: Any = None) -> Any:
            return x + self.bias + past_key_values.get_seq_length()

    batch = blocks.Batch(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), [((), {"past_key_values": None})])
    with pytest.raises(InputError, match=r"a\.b: asks its cache for 'get_seq_length'"):
        kv_cache.observe(Curious(), batch, blocks.Block(0, "a.b", ()), kv_cache.Peaks())


def test_a_model_that_has_such_scales_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.0.self_attn.k_scale": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.layers\.0\.self_attn\.k_scale: is in the model already"):
        planning.make(Recipe.from_any(recipe(folder)))


# Loading -------------------------------------------------------------------------------------------------------------

IDS = torch.arange(3, 23)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize(("kind", "strategy"), [("llama", "head"), ("phi3", "tensor"), ("gemma3", "head")])
def test_stays_packed_and_computes_what_the_library_computes(
    kind: str, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    written = quantized(tiny.save(tmp_path / "model", kind), out, kv_cache={"strategy": strategy})
    ours = quantkit.load(out, dtype=torch.float32)
    assert any(isinstance(m, PackedLinear) for m in ours.modules())
    answer, text = logits(ours), ours.generate(IDS, max_new_tokens=4, do_sample=False)
    assert not any(p.requires_grad for name, p in ours.named_parameters() if name.endswith("k_scale"))

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "compressed-tensors", CompressedTensorsHfQuantizer)
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "compressed-tensors", CompressedTensorsConfig)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(logits(theirs), answer)
    assert torch.equal(theirs.generate(IDS, max_new_tokens=4, do_sample=False), text)
    monkeypatch.undo()

    model = quantkit.load(out)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == written.keys()
    assert all(again[k].dtype == written[k].dtype and torch.equal(again[k], written[k]) for k in written)
    configs = [json.loads((f / "config.json").read_text()) for f in (out, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_a_dense_copy_of_the_loaded_model_has_no_scales_left(tmp_path: Path) -> None:
    quantized(tiny.save(tmp_path / "model"), tmp_path / "out")
    model = quantkit.load(tmp_path / "out", dtype=torch.float32)
    rounded = logits(model)
    model.dequantize()
    assert not any(name.endswith(("k_scale", "v_scale")) for name, _ in model.named_parameters())
    assert 0 < (logits(model) - rounded).abs().max() < 1
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    plain = {name: t for name, t in tensors.items() if not name.endswith(("k_scale", "v_scale"))}
    save_file(plain, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(quantkit.load(tmp_path / "out", dtype=torch.float32)), logits(model))


@pytest.mark.parametrize(
    ("drop", "reason"),
    [
        ("model.layers.1.self_attn.v_scale", "no scales of keys and values that an attention layer could hold"),
        ("_scale", "the checkpoint has no k_scale and v_scale"),
    ],
)
def test_scales_that_are_missing_fall_back_and_say_so(
    drop: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = quantized(tiny.save(tmp_path / "model"), tmp_path / "out")
    left = {n: t for n, t in written.items() if not (n.endswith(drop) and n.endswith(("k_scale", "v_scale")))}
    assert len(left) < len(written)
    save_file(left, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    model = quantkit.load(tmp_path / "out")
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    assert reason in caplog.text


def test_an_output_with_a_quantized_cache_is_validated(tmp_path: Path) -> None:
    check = {"perplexity": {"data": "builtin:pydocs-heldout", "windows": 2, "length": 32}, "gates": {"kl": 1.0}}
    result = quantkit.quantize(
        recipe(tiny.save(tmp_path / "model"), kv_cache={"strategy": "head"}, validate=check),
        out=tmp_path / "out",
        device="cpu",
    )
    assert result.validation is not None and result.validation.status == "validated"
    assert quantkit.validate(tmp_path / "out", device="cpu").status == "validated"
