"""quantkit.formats.modelopt against a reader of its own kind, ModelOpt's way of writing, and compressed-tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import readers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from quantkit import formats, numerics
from quantkit.errors import InputError
from quantkit.formats import compressed_tensors as ct
from quantkit.formats import modelopt
from quantkit.types import QParams, QuantizedTensor, Scheme, TensorScheme, TensorSpec

FP8, NVFP4, NVFP4A16, AWQ = (modelopt.ALGOS[name] for name in ("FP8", "NVFP4", "W4A16_NVFP4", "W4A16_AWQ"))
AWQ64 = Scheme(replace(AWQ.weights, group_size=64))
KINDS = {torch.float32: "F32", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}


def weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def quantized(scheme: Scheme, n: int, k: int, seed: int = 0) -> QuantizedTensor:
    w = weight(n, k, seed)
    qparams = numerics.get(scheme.weights.number).qparams(w, scheme.weights, scale_dtype=torch.bfloat16)
    return numerics.quantize(w, qparams, scheme.weights)


def inputs_of(scheme: Scheme, value: float = 3.7) -> QParams | None:
    """A calibrated input scale, in the place where each number format has it."""
    if scheme.activations is None:
        return None
    one = torch.tensor([value])
    if scheme.activations.number == "nvfp4":
        return QParams(torch.empty(1, 0), None, one)
    return QParams(one.reshape(1, 1))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


# Ours, by the independent reader -------------------------------------------------------------------------------------


@given(
    scheme=st.sampled_from([FP8, NVFP4, NVFP4A16, AWQ, AWQ64]),
    n=st.integers(1, 9),
    groups=st.integers(1, 4),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=60, deadline=None)
def test_round_trip_and_independent_reader(scheme: Scheme, n: int, groups: int, seed: int) -> None:
    n = n * 2 if scheme.weights.number == "int4" else n
    q = quantized(scheme, n, (scheme.weights.group_size or 7) * groups, seed)
    packed = modelopt.pack(q, scheme.activations, inputs_of(scheme))
    specs = modelopt.tensors(q.shape, scheme, "BF16")
    assert specs == {name: TensorSpec(KINDS[t.dtype], tuple(t.shape)) for name, t in packed.items()}
    assert all(t.is_contiguous() for t in packed.values())
    assert modelopt.shape(specs, scheme) == q.shape

    back = modelopt.unpack(packed, scheme)
    assert back.scheme == q.scheme and same_bits(back.codes_NK, q.codes_NK)
    assert torch.equal(back.qparams.scale_NG.float(), q.qparams.scale_NG.float())
    again = modelopt.pack(back, scheme.activations, modelopt.unpack_input(packed, scheme.activations))
    assert all(same_bits(again[name], t) for name, t in packed.items())

    file = json.loads(json.dumps(modelopt.files({"a": scheme, "lm_head": None})["hf_quant_config.json"]))
    theirs = readers.modelopt(readers.parse(save(packed)), file)
    ours = numerics.dequantize(q).numpy()
    if scheme.weights.number == "nvfp4":  # a reciprocal of float32 and another order of multiplying
        assert np.allclose(theirs, ours, rtol=2**-22, atol=0)
    else:
        assert np.array_equal(theirs, ours)


# What ModelOpt writes, from its formulas -----------------------------------------------------------------------------


def modelopt_fp8(w: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = w.abs().amax().float() / 448
    return {"weight": (w / scale).to(torch.float8_e4m3fn), "weight_scale": scale, "input_scale": torch.tensor(0.013)}


def modelopt_nvfp4(w: torch.Tensor) -> dict[str, torch.Tensor]:
    """NVFP4QTensor.quantize: two scales, then boundaries between the eight values, ties at the odd ones upwards."""
    scale_2 = w.abs().amax().float() / (6.0 * 448.0)
    blocks = w.reshape(w.shape[0], -1, 16)
    scale = blocks.abs().amax(-1).float() / (6.0 * scale_2)
    scale[scale == 0] = 1.0
    scale = scale.to(torch.float8_e4m3fn)
    x = blocks / (scale.float() * scale_2)[..., None]
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    index = torch.searchsorted(bounds, x.abs())
    index += (x.abs()[..., None] == bounds[[1, 3, 5]]).any(-1)
    codes = (index + 8 * (x < 0)).to(torch.uint8).reshape(w.shape)
    packed = (codes[..., 1::2] << 4) | codes[..., 0::2]
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": scale_2, "input_scale": torch.tensor(0.0021)}


def modelopt_awq(w: torch.Tensor, group: int) -> dict[str, torch.Tensor]:
    """pack_int4_in_uint8: amax / 7, two neighbouring output rows a byte."""
    n, k = w.shape
    scale = w.reshape(n, k // group, group).abs().amax(-1).float() / 7
    codes = (w / scale.repeat_interleave(group, 1)).round().clamp(-8, 7).to(torch.int8)
    pairs = codes.T.reshape(k, n // 2, 2)
    packed = (pairs[..., 0] & 0x0F) | (pairs[..., 1] << 4)
    return {"weight": packed.T.contiguous().view(torch.uint8), "weight_scale": scale}


def test_what_modelopt_writes_as_fp8_is_read() -> None:
    theirs = modelopt_fp8(weight(24, 40))
    config = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    read = modelopt.read_config(config)
    q = read.unpack("model.layers.0.mlp.up_proj", theirs)
    assert read.scheme_for("lm_head") is None and q.scheme == FP8.weights
    expected = readers.modelopt(readers.parse(save(theirs)), config)
    assert np.array_equal(numerics.dequantize(q).numpy(), expected)
    again = modelopt.pack(q, FP8.activations, modelopt.unpack_input(theirs, FP8.activations))
    assert all(same_bits(again[name], t) for name, t in theirs.items())


@pytest.mark.parametrize("seed", range(6))
def test_what_modelopt_writes_as_nvfp4_is_read(seed: int) -> None:
    theirs = modelopt_nvfp4(weight(24, 48, seed))
    config: dict[str, Any] = {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": []}}
    q = modelopt.read_config(config).unpack("a", theirs)
    expected = readers.modelopt(readers.parse(save(theirs)), config)
    assert np.allclose(numerics.dequantize(q).numpy(), expected, rtol=2**-22, atol=0)
    again = modelopt.pack(q, NVFP4.activations, modelopt.unpack_input(theirs, NVFP4.activations))
    assert all(same_bits(again[name], theirs[name]) for name in ("weight", "weight_scale"))
    for name in ("weight_scale_2", "input_scale"):
        assert torch.allclose(again[name], theirs[name], rtol=2**-22, atol=0)


@pytest.mark.parametrize("group", [64, 128])
def test_what_modelopt_writes_as_w4a16_awq_is_read(group: int) -> None:
    w = weight(6, 256)
    theirs = modelopt_awq(w, group)
    facts = {"quant_algo": "W4A16_AWQ", "group_size": group, "has_zero_point": False, "pre_quant_scale": True}
    read = modelopt.read_config({"quantization": facts})
    q = read.unpack("a", theirs)
    assert q.scheme == TensorScheme("int4", "group", group)
    step = theirs["weight_scale"].repeat_interleave(group, 1)
    assert torch.equal(numerics.dequantize(q), (w / step).round().clamp(-8, 7) * step)
    again = modelopt.pack(q)
    assert all(same_bits(again[name], t) for name, t in theirs.items())
    assert torch.equal(again["pre_quant_scale"], torch.ones(256))


def test_a_pre_quant_scale_is_read_into_the_scales() -> None:
    """y = (x * pre_quant_scale) W, where ModelOpt could not fold it into the layer before."""
    factor = (torch.rand(256, generator=torch.Generator().manual_seed(1)) + 0.5).bfloat16()
    theirs = {**modelopt_awq(weight(6, 256), 128), "pre_quant_scale": factor}
    q = modelopt.unpack(theirs, AWQ)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(2))
    plain = numerics.dequantize(modelopt.unpack({**theirs, "pre_quant_scale": torch.ones(256)}, AWQ))
    assert torch.allclose(x @ numerics.dequantize(q).T, (x * factor.float()) @ plain.T, atol=1e-6)
    assert q.scheme.group_size == 1
    with pytest.raises(InputError, match="group_size 1 of int4 cannot be written"):
        modelopt.pack(q)


# Pitfalls ------------------------------------------------------------------------------------------------------------


def test_nvfp4_reciprocal_global_scale_between_compressed_tensors_and_modelopt() -> None:
    """compressed-tensors divides by its global scales, ModelOpt multiplies; the codes and group scales are the same."""
    q = quantized(NVFP4, 24, 64)
    library = ct.pack(q, NVFP4.activations, inputs_of(NVFP4, 700.0))
    ours = modelopt.pack(q, NVFP4.activations, inputs_of(NVFP4, 700.0))
    assert same_bits(ours["weight"], library["weight_packed"])
    assert same_bits(ours["weight_scale"], library["weight_scale"])
    assert library["weight_global_scale"] > 1 > ours["weight_scale_2"]
    assert torch.equal(ours["weight_scale_2"].reshape(1), 1 / library["weight_global_scale"])
    assert torch.equal(ours["input_scale"].reshape(1), 1 / library["input_global_scale"])
    # taken for one another they are wrong by the square of the scale, not by a little
    wrong = QParams(q.qparams.scale_NG, None, ours["weight_scale_2"].reshape(1))
    decoded = numerics.dequantize(QuantizedTensor(q.codes_NK, wrong, q.scheme))
    assert decoded.abs().max() > 1e6 * numerics.dequantize(q).abs().max()


@given(mantissa=st.integers(0, (1 << 23) - 1), exponent=st.integers(-60, 60))
@settings(max_examples=200, deadline=None)
def test_a_global_scale_comes_back_to_the_same_bytes(mantissa: int, exponent: int) -> None:
    """1 / (1 / g) is not always g in float32, but 1 / (1 / (1 / g)) is 1 / g."""
    q = quantized(NVFP4A16, 1, 16)
    value = torch.tensor([(1 + mantissa / 2**23) * 2.0**exponent])
    packed = modelopt.pack(QuantizedTensor(q.codes_NK, replace(q.qparams, global_scale=value), q.scheme))
    back = modelopt.unpack(packed, NVFP4A16)
    assert back.qparams.global_scale is not None
    assert torch.allclose(back.qparams.global_scale, value, rtol=2**-22, atol=0)
    assert same_bits(modelopt.pack(back)["weight_scale_2"], packed["weight_scale_2"])


@pytest.mark.parametrize("scheme", [FP8, NVFP4], ids=["FP8", "NVFP4"])
def test_scalars_are_written_0_d_and_read_as_either(scheme: Scheme) -> None:
    """ModelOpt's scalars are 0-d, compressed-tensors' are (1,): loaders that stack experts cannot stack the former."""
    q = quantized(scheme, 4, 32)
    packed = modelopt.pack(q, scheme.activations, inputs_of(scheme))
    scalars = [name for name, t in packed.items() if t.numel() == 1]
    assert [packed[name].shape for name in scalars] == [()] * 2
    one = {name: t.reshape(1) if name in scalars else t for name, t in packed.items()}
    for form in (packed, one):
        read = modelopt.unpack(form, scheme)
        assert same_bits(read.codes_NK, q.codes_NK)
        library = ct.pack(read, scheme.activations, modelopt.unpack_input(form, scheme.activations))
        assert [tuple(t.shape) for t in library.values() if t.numel() == 1] == [(1,)] * 2


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "scheme", "says"),
    [
        ((4, 128), Scheme(FP8.weights), "fp8_e4m3 weights per tensor, symmetric alone cannot be written"),
        ((4, 128), Scheme(FP8.weights, TensorScheme("fp8_e4m3", "token", dynamic=True)), "with dynamic fp8_e4m3"),
        ((4, 128), Scheme(TensorScheme("int4", "group", 128, symmetric=False)), "int4 weights per group, asymmetric"),
        ((4, 128), Scheme(TensorScheme("int4", "channel")), "int4 weights per channel"),
        ((4, 128), Scheme(TensorScheme("int4", "group", 32)), "group_size 32 of int4 cannot be written"),
        ((5, 128), AWQ, "out_features 5 is odd"),
        ((4, 192), AWQ, "group_size 128 does not divide in_features 192"),
        ((4, 24), NVFP4, "group_size 16 does not divide in_features 24"),
        ((4, 128), Scheme(TensorScheme("mxfp4", "group", 32)), "held: FP8, NVFP4, W4A16_NVFP4, W4A16_AWQ"),
    ],
)
def test_what_is_refused(shape: tuple[int, int], scheme: Scheme, says: str) -> None:
    with pytest.raises(InputError, match=says):
        modelopt.tensors(shape, scheme, "BF16")


def test_pack_refuses_what_is_missing_or_out_of_range() -> None:
    with pytest.raises(InputError, match="fp8_e4m3 activations need a calibrated input scale"):
        modelopt.pack(quantized(FP8, 4, 8), FP8.activations)
    with pytest.raises(InputError, match="nvfp4 activations need a calibrated input scale"):
        modelopt.pack(quantized(NVFP4, 4, 16), NVFP4.activations, QParams(torch.ones(1, 1)))
    with pytest.raises(InputError, match=r"input scale is one positive number, not \[0.0\]"):
        modelopt.pack(quantized(FP8, 4, 8), FP8.activations, inputs_of(FP8, 0.0))
    q = quantized(NVFP4A16, 4, 16)
    with pytest.raises(InputError, match="need a global scale"):
        modelopt.pack(QuantizedTensor(q.codes_NK, QParams(q.qparams.scale_NG), q.scheme))
    with pytest.raises(InputError, match="weight_scale_2 is 1 / 1e\\+38, which float32 does not have"):
        modelopt.pack(QuantizedTensor(q.codes_NK, replace(q.qparams, global_scale=torch.tensor([1e38])), q.scheme))
    with pytest.raises(InputError, match=r"codes are torch\.uint8 up to 16"):
        modelopt.pack(QuantizedTensor(torch.full_like(q.codes_NK, 16), q.qparams, q.scheme))
    four = quantized(AWQ, 4, 128)
    with pytest.raises(InputError, match="outside -8 to 7"):
        modelopt.pack(QuantizedTensor(torch.full_like(four.codes_NK, 8), four.qparams, four.scheme))


@pytest.mark.parametrize(
    ("scheme", "name", "value", "says"),
    [
        (FP8, "weight", None, "weight is missing"),
        (FP8, "weight_scale", None, "weight_scale is missing"),
        (FP8, "weight_scale", torch.ones(4, 1), r"F32 \(\) is needed"),
        (FP8, "weight_scale", torch.tensor(float("inf")), "one positive number"),
        (NVFP4, "weight_scale_2", None, "weight_scale_2 is missing"),
        (NVFP4, "weight_scale_2", torch.tensor(1e-45), "1 / weight_scale_2 is one positive number"),
        (NVFP4, "weight_scale", torch.ones(4, 8), "F8_E4M3"),
        (AWQ, "weight_scale", torch.ones(4, 2), r"float \(4, 1\) is needed"),
        (AWQ, "pre_quant_scale", torch.ones(4), r"float \(128,\) is needed"),
    ],
)
def test_unpack_refuses(scheme: Scheme, name: str, value: torch.Tensor | None, says: str) -> None:
    tensors = modelopt.pack(quantized(scheme, 4, 128), scheme.activations, inputs_of(scheme))
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    with pytest.raises(InputError, match=says):
        modelopt.unpack(tensors, scheme)


def test_input_and_cache_scales_that_are_missing() -> None:
    assert modelopt.unpack_input({}, None) is None
    with pytest.raises(InputError, match="input_scale is missing"):
        modelopt.unpack_input({}, FP8.activations)
    cache = {"k_proj.k_scale": torch.tensor(0.5), "v_proj.v_scale": torch.tensor([0.25])}
    assert [float(t) for t in modelopt.unpack_kv(cache, FP8.weights)] == [0.5, 0.25]
    with pytest.raises(InputError, match=r"v_proj\.v_scale is missing"):
        modelopt.unpack_kv({"k_proj.k_scale": torch.tensor(0.5)}, FP8.weights)


# Config --------------------------------------------------------------------------------------------------------------

PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def test_nvfp4_configs_are_the_documented_ones() -> None:
    schemes = {"model.layers.0.mlp.up_proj": NVFP4, "model.layers.1.mlp.up_proj": None, "lm_head": None}
    dense = ["lm_head", "model.layers.1.mlp.up_proj"]
    four = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    assert modelopt.config(schemes) == {
        "config_groups": {"group_0": {"input_activations": four, "weights": four, "targets": ["Linear"]}},
        "ignore": dense,
        "quant_algo": "NVFP4",
        "group_size": 16,
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }
    assert modelopt.files(schemes) == {
        "hf_quant_config.json": {
            "producer": PRODUCER,
            "quantization": {
                "quant_algo": "NVFP4",
                "group_size": 16,
                "kv_cache_quant_algo": None,
                "exclude_modules": dense,
            },
        }
    }


@pytest.mark.parametrize("scheme", [FP8, NVFP4, NVFP4A16, AWQ, AWQ64])
def test_both_configs_read_back(scheme: Scheme) -> None:
    schemes = {"model.layers.0.mlp.up_proj": scheme, "model.layers.1.mlp.up_proj": None, "lm_head": None}
    for config in (modelopt.config(schemes), modelopt.files(schemes)["hf_quant_config.json"]):
        assert json.loads(json.dumps(config)) == config
        read = modelopt.read_config(config)
        assert {name: read.scheme_for(name) for name in schemes} == schemes
        assert read.kv_cache is None


def test_w4a16_awq_says_what_its_reader_asks_for() -> None:
    facts = modelopt.files({"a": AWQ64})["hf_quant_config.json"]["quantization"]
    assert facts | {"exclude_modules": None} == {
        "quant_algo": "W4A16_AWQ",
        "group_size": 64,
        "has_zero_point": False,
        "pre_quant_scale": True,
        "kv_cache_quant_algo": None,
        "exclude_modules": None,
    }


def test_mixed_precision_is_read_and_not_written() -> None:
    layers = {"a.q_proj": {"quant_algo": "FP8"}, "a.up_proj": {"quant_algo": "NVFP4", "group_size": 16}}
    config = {
        "quantization": {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8", "quantized_layers": layers}
    }
    read = modelopt.read_config(config)
    assert (read.scheme_for("a.q_proj"), read.scheme_for("a.up_proj")) == (FP8, NVFP4)
    assert read.scheme_for("a.q_proj_2") is None and read.scheme_for("lm_head") is None
    assert read.kv_cache == FP8.weights
    with pytest.raises(InputError, match="MIXED_PRECISION is not written"):
        modelopt.config({"a": FP8, "b": NVFP4})


def test_the_flat_config_of_modelopt_is_read() -> None:
    group = {"weights": {"num_bits": 4, "type": "int", "group_size": 64}, "targets": ["Linear"]}
    flat = {
        "config_groups": {"group_0": group},
        "ignore": ["model.layers.0*"],
        "quant_algo": "W4A16_AWQ",
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }
    read = modelopt.read_config(flat)
    assert read.scheme_for("model.layers.1.mlp.up_proj") == AWQ64 and read.kv_cache == FP8.weights
    assert read.scheme_for("model.layers.0.mlp.up_proj") is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quant_method": "fp8"}, "quant_method is 'fp8'"),
        ({"quant_algo": "NVFP4_SVD"}, "quant_algo is 'NVFP4_SVD'"),
        ({"quant_algo": None}, "quant_algo is None"),
        ({"group_size": 32}, "group_size of NVFP4 is 32"),
        ({"kv_cache_scheme": "NVFP4"}, "the KV cache is 'NVFP4'"),
        ({"ignore": "lm_head"}, "exclude_modules is not a list"),
        ({"quant_algo": "MIXED_PRECISION"}, "quantized_layers does not say"),
        ({"quant_algo": "W4A16_AWQ", "has_zero_point": True}, "has_zero_point is True"),
    ],
)
def test_unsupported_configs_say_why(change: dict[str, Any], says: str) -> None:
    read = modelopt.read_config({**modelopt.config({"a": NVFP4}), **change})
    assert read.unsupported is not None and says in read.unsupported
    with pytest.raises(InputError, match="cannot be held"):
        read.scheme_for("a")


def test_a_dense_name_inside_a_quantized_one_is_refused() -> None:
    with pytest.raises(InputError, match=r"mlp\.gate stays dense"):
        modelopt.config({"mlp.gate": None, "mlp.gate_proj": NVFP4})


def test_registry() -> None:
    assert formats.get("modelopt") is formats.by_method("modelopt") is modelopt
