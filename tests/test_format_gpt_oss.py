"""quantkit.formats.gpt_oss against transformers on CPU and a reader of its own kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import readers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantkit import formats, numerics
from quantkit.errors import InputError
from quantkit.formats import gpt_oss
from quantkit.types import QParams, QuantizedTensor, Scheme, TensorScheme, TensorSpec

SCHEME = Scheme(TensorScheme("mxfp4", "group", 32))
CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def random_experts(e: int, n: int, k: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every byte is a pair of codes, so any bytes will do."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "_blocks": torch.randint(0, 256, (e, n, k // 32, 16), generator=generator, dtype=torch.uint8),
        "_scales": torch.randint(115, 125, (e, n, k // 32), generator=generator, dtype=torch.uint8),
    }


@given(
    e=st.integers(1, 3),
    n=st.integers(1, 9),
    groups=st.integers(1, 4),
    scale=st.integers(0, 252),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=50, deadline=None)
def test_an_independent_reader_agrees(e: int, n: int, groups: int, scale: int, seed: int) -> None:
    tensors = random_experts(e, n, 32 * groups, seed)
    tensors["_scales"][:, 0, 0] = scale  # 2^-127, a subnormal number, to 2^125: 6 times that is still finite
    read = gpt_oss.unpack_experts(tensors, SCHEME)
    ours = torch.stack([numerics.dequantize(q) for q in read])
    theirs = readers.gpt_oss(tensors["_blocks"].numpy(), tensors["_scales"].numpy())
    assert np.array_equal(ours.numpy(), theirs)
    assert {q.shape for q in read} == {(n, 32 * groups)} and {q.codes_NK.dtype for q in read} == {torch.uint8}


def field_writer(w: torch.Tensor) -> dict[str, torch.Tensor]:
    """gpt-oss's own packing by its formula: the dense parameter (E, in, out) to blocks of 32 along in."""
    e, k, n = w.shape
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    groups = w.float().transpose(1, 2).reshape(e, n, k // 32, 32)
    exponent = torch.floor(torch.log2(groups.abs().amax(-1))) - 2
    index = ((groups / torch.exp2(exponent)[..., None])[..., None] - table).abs().argmin(-1)
    blocks = (index[..., 0::2] | (index[..., 1::2] << 4)).to(torch.uint8)
    return {"_blocks": blocks, "_scales": (exponent + 127).to(torch.uint8)}


@pytest.mark.usefixtures("stock_transformers")
def test_transformers_loads_the_same_experts(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
    )
    model = GptOssForCausalLM(config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.05).bfloat16()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    read, expected = gpt_oss.read_config(CONFIG), {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        scheme = read.scheme_for(name)
        assert scheme == SCHEME
        packed = field_writer(tensors.pop(name))
        decoded = [numerics.dequantize(q) for q in gpt_oss.unpack_experts(packed, scheme)]
        expected[name] = torch.stack(decoded).transpose(1, 2).bfloat16()  # in memory: (E, in, out)
        tensors |= {name + leaf: t for leaf, t in packed.items()}
    assert len(expected) == 2
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "quantization_config": CONFIG}))
    state = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert [name for name, weight in expected.items() if not torch.equal(state[name], weight)] == []


def test_gate_and_up_take_turns() -> None:
    tensors = random_experts(1, 6, 64)
    whole = gpt_oss.unpack_experts(tensors, SCHEME)[0]
    decoded = numerics.dequantize(whole)
    gate, up = gpt_oss.split_gate_up(whole)
    assert torch.equal(numerics.dequantize(gate), decoded[0::2]) and torch.equal(numerics.dequantize(up), decoded[1::2])
    assert gate.shape == up.shape == (3, 64)


def test_it_is_not_written() -> None:
    q = QuantizedTensor(
        torch.zeros(2, 32, dtype=torch.uint8), QParams(torch.zeros(2, 1, dtype=torch.uint8)), SCHEME.weights
    )
    for refused in (
        lambda: gpt_oss.tensors((2, 32), SCHEME, "BF16"),
        lambda: gpt_oss.pack(q),
        lambda: gpt_oss.config({"a": SCHEME}),
        lambda: gpt_oss.files({"a": SCHEME}),
    ):
        with pytest.raises(InputError, match="is read, not written"):
            refused()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("_blocks", None, "_blocks is missing"),
        ("_scales", None, "_scales is missing"),
        ("_blocks", torch.zeros(2, 4, 2, 15, dtype=torch.uint8), "15 bytes a block"),
        ("_blocks", torch.zeros(3, 4, 2, 16, dtype=torch.uint8), "_blocks has 3 experts, _scales 2"),
        ("_blocks", torch.zeros(2, 4, 2, 16, dtype=torch.int8), "_blocks is torch.int8"),
        ("_scales", torch.zeros(2, 4, 3, dtype=torch.uint8), r"U8 \(4, 2\) is needed"),
        ("_scales", torch.full((2, 4, 2), 255, dtype=torch.uint8), "8 of 8 scales are 255, which is NaN"),
    ],
)
def test_unpack_refuses(name: str, value: torch.Tensor | None, says: str) -> None:
    tensors = random_experts(2, 4, 64)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    with pytest.raises(InputError, match=says):
        gpt_oss.unpack_experts(tensors, SCHEME)


def test_config_names_experts_alone() -> None:
    read = gpt_oss.read_config(CONFIG)
    assert read.scheme_for("model.layers.3.mlp.experts.down_proj") == SCHEME
    for name in ("model.layers.3.self_attn.q_proj", "model.layers.3.mlp.router", "lm_head", "model.embed_tokens"):
        assert read.scheme_for(name) is None
    assert gpt_oss.read_config({"quant_method": "fp8"}).unsupported == "quant_method is 'fp8', not 'mxfp4'"
    one = {name: t[0] for name, t in random_experts(1, 4, 64).items()}
    assert read.unpack("model.layers.0.mlp.experts.gate_up_proj", one).shape == (4, 64)


def test_shape_and_registry() -> None:
    assert gpt_oss.shape({"_blocks": TensorSpec("U8", (8, 192, 2, 16))}, SCHEME) == (192, 64)
    assert gpt_oss.shape({}, SCHEME) is None
    assert formats.get("gpt-oss") is formats.by_method("mxfp4") is gpt_oss
