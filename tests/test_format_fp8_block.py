"""quantkit.formats.fp8_block against transformers on CPU, a reader of its own kind, and DeepSeek's way of writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import readers
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from quantkit import formats, numerics
from quantkit.errors import InputError
from quantkit.formats import fp8_block
from quantkit.types import QParams, QuantizedTensor, Scheme, TensorScheme, TensorSpec

BLOCK = TensorScheme("fp8_e4m3", "block", block_shape=(128, 128))
SCHEME = Scheme(BLOCK, TensorScheme("fp8_e4m3", "group", 128, dynamic=True))
# dimensions that blocks of 128 divide
MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "num_hidden_layers": 1,
}


def quantized(w: torch.Tensor) -> QuantizedTensor:
    return numerics.quantize(w, numerics.get("fp8_e4m3").qparams(w, BLOCK, scale_dtype=torch.float32), BLOCK)


def random_q(n: int, k: int, seed: int = 0) -> QuantizedTensor:
    """Every finite code at random, and scales over many orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 255, (n, k), generator=generator, dtype=torch.uint8)
    codes = torch.where(codes == 127, 0, codes).to(torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.exp2(torch.randn(-(-n // 128), -(-k // 128), generator=generator) * 8)
    return QuantizedTensor(codes, QParams(scale), BLOCK)


def deepseek(w: torch.Tensor) -> dict[str, torch.Tensor]:
    """weight_quant of DeepSeek-V3's repository by its formula: amax / 448 of each 128 x 128, edges with zeros."""
    n, k = w.shape
    padded = torch.nn.functional.pad(w, (0, -k % 128, 0, -n % 128))
    blocks = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))  # (n / 128, 128, k / 128, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return {"weight": codes.flatten(2).flatten(0, 1)[:n, :k].contiguous(), "weight_scale_inv": scale}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@given(rows=st.integers(1, 3), columns=st.integers(1, 3), seed=st.integers(0, 1 << 30))
@settings(max_examples=25, deadline=None)
def test_round_trip_and_independent_reader(rows: int, columns: int, seed: int) -> None:
    q = random_q(128 * rows, 128 * columns, seed)
    packed = fp8_block.pack(q, SCHEME.activations)
    back = fp8_block.unpack(packed, SCHEME)
    assert back.scheme == BLOCK and same_bits(back.codes_NK, q.codes_NK)
    assert same_bits(back.qparams.scale_NG, q.qparams.scale_NG)
    specs = fp8_block.tensors(q.shape, SCHEME, "BF16")
    assert specs == {
        "weight": TensorSpec("F8_E4M3", q.shape),
        "weight_scale_inv": TensorSpec("F32", (rows, columns)),
    }
    assert {name: tuple(t.shape) for name, t in packed.items()} == {name: s.shape for name, s in specs.items()}
    assert fp8_block.shape(specs, SCHEME) == q.shape
    theirs = readers.fp8_block(readers.parse(save(packed)), fp8_block.config({"a": SCHEME}))
    assert np.array_equal(theirs, numerics.dequantize(q).numpy())


@given(n=st.integers(1, 300), k=st.integers(1, 300), seed=st.integers(0, 1 << 30))
@settings(max_examples=25, deadline=None)
def test_a_ragged_dimension_is_read_with_blocks_of_128(n: int, k: int, seed: int) -> None:
    """DeepSeek's kv_a_proj_with_mqa has 576 rows; its last block is half a block."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    written = deepseek(w)
    read = fp8_block.unpack(written, SCHEME)
    theirs = readers.fp8_block(readers.parse(save(written)), {"weight_block_size": [128, 128]})
    decoded = numerics.dequantize(read)
    assert np.array_equal(theirs, decoded.numpy())
    # half a step of E4M3's coarsest octave is 16 of 448
    bound = 16.5 * written["weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
    assert bool(((decoded - w).abs() <= bound).all())
    ragged = n % 128 or k % 128
    if ragged:
        with pytest.raises(InputError, match="not a multiple of 128, and transformers would infer another block"):
            fp8_block.pack(read)
    else:
        assert all(same_bits(t, written[name]) for name, t in fp8_block.pack(read).items())


@pytest.mark.parametrize(("n", "k", "says"), [(448, 128, "out_features 448"), (128, 320, "in_features 320")])
def test_an_fp8_block_with_a_ragged_dimension_is_not_written(n: int, k: int, says: str) -> None:
    with pytest.raises(InputError, match=f"{says} is not a multiple of 128.* use FP8_DYNAMIC"):
        fp8_block.tensors((n, k), SCHEME, "BF16")


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """A tiny model with every projection in FP8 blocks, config and all; returns its weights as we decode them."""
    tiny.save(folder, "llama", **MODEL)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    schemes: dict[str, Scheme | None] = {"lm_head": None}
    for key in [key for key in tensors if "_proj." in key]:
        name = key.removesuffix(".weight")
        q = quantized(tensors.pop(key).float())
        schemes[name], expected[key] = SCHEME, numerics.dequantize(q).bfloat16()
        tensors |= {f"{name}.{leaf}": t for leaf, t in fp8_block.pack(q).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = fp8_block.config(schemes)
    (folder / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.usefixtures("stock_transformers")
def test_transformers_loads_what_is_written(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    expected = checkpoint(tmp_path)
    assert len(expected) == 7
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = model.state_dict()
    assert [key for key, weight in expected.items() if not torch.equal(state[key], weight)] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
def test_scales_of_other_dtypes_are_read_for_what_they_are_worth(dtype: torch.dtype) -> None:
    q = random_q(128, 256)
    scale = torch.tensor([[0.25, 8.0]])
    tensors = {"weight": q.codes_NK, "weight_scale_inv": scale.to(dtype)}
    read = fp8_block.unpack(tensors, SCHEME)
    assert read.qparams.scale_NG.dtype == torch.float32 and torch.equal(read.qparams.scale_NG, scale)
    theirs = readers.fp8_block(readers.parse(save(tensors)), {"weight_block_size": [128, 128]})
    assert np.array_equal(theirs, numerics.dequantize(read).numpy())


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        (Scheme(BLOCK), "weights alone cannot be said"),
        (
            Scheme(BLOCK, TensorScheme("fp8_e4m3", "token", dynamic=True)),
            "fp8_e4m3 activations per token cannot be said",
        ),
        (Scheme(TensorScheme("fp8_e4m3", "channel"), SCHEME.activations), "weights per channel cannot be written"),
        (Scheme(TensorScheme("fp8_e5m2", "block", block_shape=(128, 128)), SCHEME.activations), "fp8_e5m2 weights"),
        (Scheme(TensorScheme("fp8_e4m3", "block", block_shape=(64, 64)), SCHEME.activations), "per block cannot"),
    ],
)
def test_schemes_that_are_refused(scheme: Scheme, says: str) -> None:
    with pytest.raises(InputError, match=says):
        fp8_block.tensors((128, 128), scheme, "BF16")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("weight", None, "weight"),
        ("weight_scale_inv", None, "weight_scale_inv is missing"),
        ("weight", torch.zeros(128, 256), "weight is torch.float32"),
        ("weight_scale_inv", torch.ones(1, 1), r"F32 \(1, 2\) is needed"),
        ("weight_scale_inv", torch.ones(1, 2, dtype=torch.uint8), "weight_scale_inv is torch.uint8"),
    ],
)
def test_unpack_refuses(name: str, value: torch.Tensor | None, says: str) -> None:
    tensors = fp8_block.pack(random_q(128, 256))
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    with pytest.raises(InputError, match=says):
        fp8_block.unpack(tensors, SCHEME)


# Config --------------------------------------------------------------------------------------------------------------


def test_config() -> None:
    schemes: dict[str, Scheme | None] = {"model.layers.0.up": SCHEME, "model.layers.1.up": None, "lm_head": None}
    config = fp8_block.config(schemes)
    assert config == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.1.up"],
        "ignored_layers": ["lm_head", "model.layers.1.up"],
    }
    assert fp8_block.files(schemes) == {} and json.loads(json.dumps(config)) == config
    read = fp8_block.read_config(config)
    assert {name: read.scheme_for(name) for name in schemes} == schemes
    with pytest.raises(InputError, match="stays dense, and its name is a part of"):
        fp8_block.config({"mlp.gate": None, "mlp.gate_proj": SCHEME})


def test_deepseeks_own_config_is_read() -> None:
    theirs = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    read = fp8_block.read_config(theirs)
    assert read.scheme_for("model.layers.0.mlp.up_proj") == SCHEME and read.scheme_for("lm_head") is None
    tensors = deepseek(torch.randn(576, 256, generator=torch.Generator().manual_seed(0)))
    assert read.unpack("model.layers.0.self_attn.kv_a_proj_with_mqa", tensors).qparams.scale_NG.shape == (5, 2)
    other = fp8_block.read_config({**theirs, "weight_block_size": [64, 32], "scale_fmt": "ue8m0"}).scheme_for("a")
    assert other is not None and other.weights.block_shape == (64, 32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quant_method": "mxfp8"}, "quant_method is 'mxfp8'"),
        ({"weight_block_size": None}, "a scale per tensor"),
        ({"weight_block_size": [128]}, "weight_block_size is [128]"),
        ({"weight_block_size": [0, 128]}, "weight_block_size is [0, 128]"),
        ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"activation_scheme": "static"}, "activation_scheme is 'static'"),
        ({"expert_dtype": "fp4"}, "expert_dtype is 'fp4'"),
        ({"scale_fmt": "int"}, "scale_fmt is 'int'"),
        ({"ignored_layers": {}}, "ignored_layers is not a list"),
    ],
)
def test_unsupported_configs_say_why(change: dict[str, Any], says: str) -> None:
    read = fp8_block.read_config({**fp8_block.config({"a": SCHEME}), **change})
    assert read.unsupported is not None and says in read.unsupported
    with pytest.raises(InputError, match="cannot be held"):
        read.unpack("a", {})


def test_registry() -> None:
    assert formats.get("fp8-block") is formats.by_method("fp8") is fp8_block
