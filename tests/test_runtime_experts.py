"""Mixtures of experts stay packed: right where stock transformers fails or is wrong, and saved as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from packed_models import inputs_of, quantized, write_config
from safetensors.torch import load_file, save_file
from test_runtime_formats import logits, saved_alike

from quantkit import formats, numerics
from quantkit.checkpoint import DTYPES
from quantkit.errors import MissingError
from quantkit.numerics._activations import fake_quantize
from quantkit.presets import PRESETS
from quantkit.runtime.experts import PackedExperts
from quantkit.types import QParams, QuantizedTensor, Scheme, TensorScheme

SIZES: dict[str, Any] = {"hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 256}


def pack(folder: Path, form: str, scheme: Scheme, *, uneven: bool = False) -> dict[str, torch.Tensor]:
    """Packs the experts of a saved model in place; decoded weights, float32, by names on disk."""
    module, tensors = formats.get(form), load_file(folder / "model.safetensors")
    stored = DTYPES[formats.scale_dtype(module, "BF16")]
    decoded: dict[str, torch.Tensor] = {}
    schemes: dict[str, Scheme | None] = {}
    for key in [k for k in tensors if ".experts." in k and tensors[k].ndim == 2]:
        name = key.removesuffix(".weight")
        w = tensors.pop(key).float()
        q = quantized(w * (1 + uneven * (len(decoded) % 5)), scheme)
        decoded[name], schemes[name] = numerics.dequantize(q), scheme
        if q.qparams.scale_NG.dtype.itemsize > 1:
            q = QuantizedTensor(q.codes_NK, QParams(q.qparams.scale_NG.to(stored), q.qparams.zero_NG), q.scheme)
        tensors |= {f"{name}.{leaf}": t for leaf, t in module.pack(q, scheme.activations, inputs_of(scheme)).items()}
    rest = {
        k.removesuffix(".weight"): None for k in tensors if k.endswith("proj.weight") and tensors[k].dtype.itemsize > 1
    }
    if form != "compressed-tensors":
        rest = {}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_config(folder, module.config({**schemes, **rest, "lm_head": None}))
    return decoded


class Rounded(torch.nn.Module):
    """Experts as linears one by one, inputs rounded by numerics."""

    fused: Any

    def __init__(self, fused: Any, up: torch.Tensor, down: torch.Tensor, scheme: Scheme) -> None:
        super().__init__()
        self.__dict__["fused"] = fused
        self.up, self.down, self.a = up, down, scheme.activations
        given = inputs_of(scheme)
        self.scale = None
        if given is not None and self.a is not None:
            self.scale = given.global_scale if self.a.number == "nvfp4" else given.scale_NG

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for e in range(len(self.up)):
            token, k = torch.where(index == e)
            if len(token):
                y = self.fused._apply_gate(fake_quantize(x[token], self.a, self.scale) @ self.up[e].t())
                y = fake_quantize(y, self.a, self.scale) @ self.down[e].t()
                out.index_add_(0, token, y * weights[token, k, None])
        return out


def reference(folder: Path, decoded: dict[str, torch.Tensor], scheme: Scheme) -> Any:
    """The model in float32 with decoded experts."""
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    tensors = load_file(folder / "model.safetensors")
    state = {k.replace("block_sparse_moe", "mlp"): t for k, t in tensors.items()}
    own = model.state_dict()
    with torch.no_grad():
        for name in own:
            if name in state:
                own[name].copy_(state[name])
    for owner, module in list(model.named_modules()):
        if not owner.endswith(".experts") or not hasattr(module, "down_proj"):
            continue
        disk = next(n for n in decoded if n.replace("block_sparse_moe", "mlp").startswith(owner + ".")).partition(
            ".experts."
        )[0]
        gate, up, down = (
            ("w1", "w3", "w2") if f"{disk}.experts.0.w1" in decoded else ("gate_proj", "up_proj", "down_proj")
        )
        at = [{n: decoded[f"{disk}.experts.{e}.{n}"] for n in (gate, up, down)} for e in range(len(module.down_proj))]
        ups = torch.stack([torch.cat([x[gate], x[up]]) for x in at])
        model.set_submodule(owner, Rounded(module, ups, torch.stack([x[down] for x in at]), scheme))
    return model


SCHEMES: dict[str, tuple[str, Scheme]] = {
    "W4A16": ("compressed-tensors", PRESETS["W4A16"]),
    "W4A16_ASYM": ("compressed-tensors", PRESETS["W4A16_ASYM"]),
    "W3A16": ("compressed-tensors", PRESETS["W3A16"]),
    "W8A8": ("compressed-tensors", PRESETS["W8A8"]),
    "FP8": ("compressed-tensors", PRESETS["FP8"]),
    "FP8_DYNAMIC": ("compressed-tensors", PRESETS["FP8_DYNAMIC"]),
    "FP8_BLOCK": ("compressed-tensors", PRESETS["FP8_BLOCK"]),
    "NVFP4A16": ("compressed-tensors", PRESETS["NVFP4A16"]),
    "NVFP4": ("compressed-tensors", PRESETS["NVFP4"]),
    "MXFP4": ("compressed-tensors", PRESETS["MXFP4"]),
    "MXFP6A16": ("compressed-tensors", PRESETS["MXFP6A16"]),
    "MXFP8": ("compressed-tensors", PRESETS["MXFP8"]),
    "gptq": ("gptq", PRESETS["W4A16"]),
    "awq": ("awq", PRESETS["W4A16_ASYM"]),
    "fp8": ("fp8-block", PRESETS["FP8_BLOCK"]),
    "modelopt FP8": ("modelopt", PRESETS["FP8"]),
    "modelopt NVFP4": ("modelopt", PRESETS["NVFP4"]),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_experts_stay_packed_and_compute_and_are_saved_alike(name: str, tmp_path: Path) -> None:
    form, scheme = SCHEMES[name]
    folder = tiny.save(tmp_path / "m", "qwen3-moe", **SIZES, num_experts=4)
    decoded = pack(folder, form, scheme)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, PackedExperts)
    ours, theirs = logits(model), logits(reference(folder, decoded, scheme))
    assert (ours - theirs).norm() <= 2e-3 * theirs.norm()
    saved_alike(transformers.AutoModelForCausalLM.from_pretrained(folder), folder, tmp_path / "again")


@pytest.mark.parametrize(("kind", "name"), [("mixtral", "W4A16"), ("deepseek", "fp8"), ("qwen2-moe", "W8A8")])
def test_architectures(kind: str, name: str, tmp_path: Path) -> None:
    form, scheme = SCHEMES[name]
    sizes = {**SIZES, "intermediate_size": 128} if kind == "mixtral" else {**SIZES, "num_hidden_layers": 2}
    folder = tiny.save(tmp_path / "m", kind, **sizes)
    decoded = pack(folder, form, scheme)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert any(isinstance(m, PackedExperts) for m in model.modules())
    ours, theirs = logits(model), logits(reference(folder, decoded, scheme))
    assert (ours - theirs).norm() <= 2e-3 * theirs.norm()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    saved_alike(model, folder, tmp_path / "again")
    assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("name", ["NVFP4A16", "NVFP4", "modelopt NVFP4", "FP8"])
def test_scales_that_gate_and_up_do_not_share(name: str, tmp_path: Path) -> None:
    form, scheme = SCHEMES[name]
    folder = tiny.save(tmp_path / "m", "qwen3-moe", **SIZES, num_experts=4)
    decoded = pack(folder, form, scheme, uneven=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    experts = model.model.layers[0].mlp.experts
    assert experts.stacks["up"].uneven == ("NVFP4" in name)
    up = torch.cat([decoded[f"model.layers.0.mlp.experts.2.{n}_proj"] for n in ("gate", "up")])
    torch.testing.assert_close(experts.decoded("up")[2], up, rtol=1e-6, atol=0)
    ours, theirs = logits(model), logits(reference(folder, decoded, scheme))
    assert (ours - theirs).norm() <= 2e-3 * theirs.norm()
    saved_alike(transformers.AutoModelForCausalLM.from_pretrained(folder), folder, tmp_path / "again")


def gpt_oss(folder: Path) -> dict[str, torch.Tensor]:
    """A tiny gpt-oss as OpenAI stores it; its dense experts as transformers has them."""
    config = transformers.GptOssConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = (torch.randn(p.shape, generator=generator) * 0.2).to(p.dtype)
    model.save_pretrained(folder)
    tensors, dense = load_file(folder / "model.safetensors"), {}
    for key in [k for k in tensors if k.endswith(("gate_up_proj", "down_proj"))]:
        e, k, n = tensors.pop(key).shape
        blocks = torch.randint(0, 256, (e, n, k // 32, 16), generator=generator).to(torch.uint8)
        scales = torch.randint(118, 124, (e, n, k // 32), generator=generator).to(torch.uint8)
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
        codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).long()
        dense[key] = (values[codes] * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).transpose(1, 2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ignored = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    write_config(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ignored})
    return dense


def test_gpt_oss_as_openai_stores_it(tmp_path: Path) -> None:
    dense = gpt_oss(tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert sum(isinstance(m, PackedExperts) for m in model.modules()) == 2
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    del config.quantization_config
    exact = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    state = {**load_file(tmp_path / "m" / "model.safetensors"), **dense}
    with torch.no_grad():
        for name, p in exact.named_parameters():
            p.copy_(state[name])
    ours, theirs = logits(model), logits(exact)
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    saved_alike(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m"), tmp_path / "m", tmp_path / "again")
    model.dequantize()
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj, dense["model.layers.0.mlp.experts.gate_up_proj"])
    assert (logits(model) - theirs).norm() <= 1e-4 * theirs.norm()


def llama4(folder: Path) -> Any:
    config = transformers.Llama4TextConfig(
        hidden_size=64,
        intermediate_size=96,
        intermediate_size_mlp=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        attention_chunk_size=64,
    )
    model = transformers.Llama4ForCausalLM(config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("scheme", [PRESETS["FP8_DYNAMIC"], Scheme(TensorScheme("int4", "group", 32))])
def test_llama_4(scheme: Scheme, tmp_path: Path) -> None:
    """A tensor an expert and projection on disk, as llm-compressor writes them."""
    folder = tmp_path / "m"
    saved = llama4(folder)
    exact = transformers.Llama4ForCausalLM(saved.config).float().eval()
    exact.load_state_dict(saved.state_dict())
    tensors, schemes, ct = load_file(folder / "model.safetensors"), {}, formats.get("compressed-tensors")
    for key in [k for k in tensors if "feed_forward.experts." in k]:
        stem, leaf = key.rsplit(".", 1)
        weight = tensors.pop(key)
        decoded = torch.empty(weight.shape)
        for e in range(4):
            names = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
            parts = weight[e].t().chunk(len(names))
            for i, (part, name) in enumerate(zip(parts, names)):
                q = quantized(part.float().contiguous(), scheme)
                rows = part.shape[0]
                decoded[e, :, i * rows : (i + 1) * rows] = numerics.dequantize(q).t()
                schemes[f"{stem}.{e}.{name}"] = scheme
                packed = ct.pack(q, scheme.activations, None)
                tensors |= {f"{stem}.{e}.{name}.{x}": t for x, t in packed.items()}
        exact.get_parameter(key).data = decoded
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    rest = [
        k.removesuffix(".weight") for k in tensors if k.endswith("weight") and k.removesuffix(".weight") not in schemes
    ]
    write_config(folder, ct.config({**schemes, **dict.fromkeys(rest)}))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert sum(isinstance(m, PackedExperts) for m in model.modules()) == 2
    if scheme.activations is None:
        ours, theirs = logits(model), logits(exact)
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    assert torch.equal(
        model.model.layers[1].feed_forward.experts.to_fused().down_proj,
        exact.model.layers[1].feed_forward.experts.down_proj,
    )
    saved_alike(transformers.AutoModelForCausalLM.from_pretrained(folder), folder, tmp_path / "again")


def test_a_dense_copy_has_every_experts_tensors(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m", "mixtral", **{**SIZES, "intermediate_size": 128})
    before = load_file(folder / "model.safetensors")
    decoded = pack(folder, "compressed-tensors", PRESETS["W4A16"])
    assert decoded
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.dequantize()
    model.save_pretrained(tmp_path / "dense")
    after = load_file(tmp_path / "dense" / "model.safetensors")
    assert after.keys() == before.keys() and "quantization_config" not in json.loads(
        (tmp_path / "dense" / "config.json").read_text()
    )
    assert all(torch.equal(after[f"{name}.weight"], weight) for name, weight in decoded.items())


@pytest.mark.parametrize("same", [True, False])
def test_experts_in_act_order(same: bool, tmp_path: Path) -> None:
    """gate and up of an expert have one order, because GPTQ sees one input; each expert has its own."""
    folder = tiny.save(tmp_path / "m", "qwen3-moe", **SIZES, num_experts=4)
    scheme = Scheme(TensorScheme("int4", "group", 32))
    decoded = pack(folder, "gptq", scheme)
    tensors = load_file(folder / "model.safetensors")
    for name in decoded:
        e, leaf = name.split(".")[-2:]
        seed = int(e) + 10 * (leaf == "down_proj") + 20 * (leaf == "up_proj" and not same)
        g_idx = tensors[f"{name}.g_idx"]
        g_idx = g_idx[torch.randperm(len(g_idx), generator=torch.Generator().manual_seed(seed))]
        plain = tensors[f"{name}.scales"].float()[tensors[f"{name}.g_idx"].long()].t()
        decoded[name] = decoded[name] / plain * tensors[f"{name}.scales"].float()[g_idx.long()].t()
        tensors[f"{name}.g_idx"] = g_idx
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if not same:
        with pytest.raises(MissingError, match=r"columns in another order .*g_idx.*, and .* package.*--to dense"):
            transformers.AutoModelForCausalLM.from_pretrained(folder)
        return
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.model.layers[0].mlp.experts.stacks["up"].ordered
    ours, theirs = logits(model), logits(reference(folder, decoded, scheme))
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    saved_alike(transformers.AutoModelForCausalLM.from_pretrained(folder), folder, tmp_path / "again")


def test_gradients_reach_hidden_states_and_routers(tmp_path: Path) -> None:
    for name in ("W4A16", "FP8_DYNAMIC"):
        folder = tiny.save(tmp_path / name, "qwen3-moe", **SIZES, num_experts=4)
        decoded = pack(folder, *SCHEMES[name])
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        plain = Scheme(SCHEMES[name][1].weights)  # rounding the input counts as nothing
        grads = []
        for m in (model, reference(folder, decoded, plain)):
            x = torch.randn(1, 8, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
            m(inputs_embeds=x).logits.square().mean().backward()
            assert x.grad is not None
            grads.append(x.grad)
        assert (grads[0] - grads[1]).norm() < (0.1 if name == "FP8_DYNAMIC" else 1e-4) * grads[1].norm()


def test_it_compiles_whole(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m", "qwen3-moe", **SIZES, num_experts=4)
    pack(folder, *SCHEMES["W4A16"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(3, 19)[None]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
