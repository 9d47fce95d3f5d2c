"""quantkit.formats.gptq against a reader of its own kind, and against GPTQModel's and AutoGPTQ's ways of writing."""

from __future__ import annotations

import json
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
from quantkit.formats import gptq
from quantkit.types import QParams, QuantizedTensor, Scheme, TensorScheme, TensorSpec

BITS = (2, 3, 4, 8)
W4 = Scheme(TensorScheme("int4", "group", 32))
KINDS = {torch.int32: "I32", torch.float16: "F16"}


def scheme_of(bits: int, symmetric: bool, group: int | None) -> TensorScheme:
    return TensorScheme(f"int{bits}", "channel" if group is None else "group", group, symmetric)


def random_q(scheme: TensorScheme, n: int, k: int, seed: int = 0) -> QuantizedTensor:
    """Random codes and zero points over their whole range, and scales that fp16 has."""
    generator = torch.Generator().manual_seed(seed)
    half, groups = 1 << (int(scheme.number[3:]) - 1), numerics.groups(scheme, k)
    codes = torch.randint(-half, half, (n, k), generator=generator, dtype=torch.int8)
    scale = (torch.rand(n, groups, generator=generator) + 0.01).half()
    zero = torch.randint(-half, half, (n, groups), generator=generator, dtype=torch.int8)
    return QuantizedTensor(codes, QParams(scale, None if scheme.symmetric else zero), scheme)


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    zeros = (a.qparams.zero_NG, b.qparams.zero_NG)
    return (
        a.scheme == b.scheme
        and a.codes_NK.dtype == b.codes_NK.dtype
        and torch.equal(a.codes_NK, b.codes_NK)
        and torch.equal(a.qparams.scale_NG, b.qparams.scale_NG)
        and (zeros[0] is zeros[1] is None or (None not in zeros and torch.equal(*zeros)))  # type: ignore[arg-type]
    )


# What GPTQModel writes, from its formulas: a stream is one long number, cut into words.


def stream(values: list[int], bits: int) -> list[int]:
    line = sum(value << (bits * i) for i, value in enumerate(values))
    return [(line >> (32 * i)) & 0xFFFFFFFF for i in range(len(values) * bits // 32)]


def signed(words: list[list[int]]) -> torch.Tensor:
    return torch.from_numpy(np.array(words, np.uint32).view(np.int32).copy())


def field_writer(
    q_KN: torch.Tensor, z_GN: torch.Tensor, scale_GN: torch.Tensor, g_idx: torch.Tensor, bits: int, version: str
) -> dict[str, torch.Tensor]:
    """The tensors that GPTQModel saves. v1: 0x11111111 is subtracted from each word, borrows and all."""
    ones = sum(1 << shift for shift in range(0, 32, bits)) if 32 % bits == 0 else None
    zeros = [stream(row, bits) for row in z_GN.tolist()]
    if version == "v1" and ones is not None:
        zeros = [[(word - ones) & 0xFFFFFFFF for word in row] for row in zeros]
    elif version == "v1":
        zeros = [stream([(z - 1) & 7 for z in row], bits) for row in z_GN.tolist()]
    return {
        "qweight": signed([stream(column, bits) for column in q_KN.t().tolist()]).t().contiguous(),
        "qzeros": signed(zeros),
        "scales": scale_GN.half(),
        "g_idx": g_idx.int(),
    }


def field_case(bits: int, symmetric: bool, desc_act: bool, lowest: int = 1) -> tuple[Any, ...]:
    """Random codes (K, N), zero points from `lowest` up, scales, g_idx, and the weight that they stand for."""
    generator = torch.Generator().manual_seed(bits)
    k, n, groups = 128, 32, 4
    q = torch.randint(0, 1 << bits, (k, n), generator=generator)
    z = torch.randint(lowest, 1 << bits, (groups, n), generator=generator)
    if symmetric:
        z = torch.full_like(z, 1 << (bits - 1))
    scale = (torch.rand(groups, n, generator=generator) + 0.01).half()
    g_idx = torch.arange(k) // 32
    if desc_act:
        g_idx = g_idx[torch.randperm(k, generator=generator)]
    return q, z, scale, g_idx, ((q - z[g_idx]).float() * scale.float()[g_idx]).t()


# Ours, by the independent reader -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 32, 64, None])
def test_an_independent_reader_decodes_what_is_written(bits: int, symmetric: bool, group: int | None) -> None:
    scheme = scheme_of(bits, symmetric, group)
    q = random_q(scheme, 32, 64)
    config = json.loads(json.dumps(gptq.config({"a": Scheme(scheme), "lm_head": None})))
    assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    theirs = readers.gptq(readers.parse(save(gptq.pack(q))), config)
    assert np.array_equal(theirs, numerics.dequantize(q).numpy())


@given(
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    group=st.sampled_from([16, 32, None]),
    rows=st.integers(1, 3),
    columns=st.integers(1, 4),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=60, deadline=None)
def test_round_trip(bits: int, symmetric: bool, group: int | None, rows: int, columns: int, seed: int) -> None:
    scheme = scheme_of(bits, symmetric, group)
    q = random_q(scheme, 32 * rows, 32 * columns, seed)
    packed = gptq.pack(q)
    assert same(gptq.unpack(packed, Scheme(scheme)), q)
    specs = gptq.tensors(q.shape, Scheme(scheme), "BF16")
    assert specs == {name: TensorSpec(KINDS[t.dtype], tuple(t.shape)) for name, t in packed.items()}
    assert gptq.shape(specs, Scheme(scheme)) == q.shape
    again = gptq.pack(gptq.unpack(packed, Scheme(scheme)))
    assert all(torch.equal(again[name], packed[name]) and t.is_contiguous() for name, t in packed.items())
    read = gptq.read_config(gptq.config({"a": Scheme(scheme)}))
    assert same(read.unpack("a", packed), q)


@given(n=st.integers(1, 70), k=st.integers(1, 70), bits=st.sampled_from(BITS))
@settings(max_examples=60, deadline=None)
def test_odd_sizes_are_refused_by_name(n: int, k: int, bits: int) -> None:
    whole = {2: 16, 3: 32, 4: 8, 8: 4}[bits]
    scheme = Scheme(scheme_of(bits, True, None))
    if n % whole or k % whole:
        with pytest.raises(InputError, match=f"(in|out)_features (?:{n}|{k}) .* multiple of {whole}"):
            gptq.tensors((n, k), scheme, "F16")
    else:
        assert gptq.shape(gptq.tensors((n, k), scheme, "F16"), scheme) == (n, k)


# What the field's tools write ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_what_gptqmodel_writes_is_read(bits: int, symmetric: bool, desc_act: bool, version: str) -> None:
    q, z, scale, g_idx, weight = field_case(bits, symmetric, desc_act)
    written = field_writer(q, z, scale, g_idx, bits, version)
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": 32,
        "desc_act": desc_act,
        "sym": symmetric,
        "checkpoint_format": "gptq" if version == "v1" else "gptq_v2",
        "meta": {"quantizer": ["gptqmodel:7.3.4"]},
    }
    read = gptq.read_config(config).unpack("model.layers.0.a", written)
    assert torch.equal(numerics.dequantize(read), weight)
    assert torch.equal(read.codes_NK.long() + (1 << (bits - 1)), q.t())
    assert read.scheme.group_size == (1 if desc_act else 32)


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_layers_tell_v1_and_v2_apart_without_a_config(bits: int) -> None:
    q, z, scale, g_idx, weight = field_case(bits, True, False)
    for version in ("v1", "v2"):
        written = field_writer(q, z, scale, g_idx, bits, version)
        assert torch.equal(
            numerics.dequantize(gptq.unpack(written, Scheme(scheme_of(bits, True, 32)))),
            weight,
        )


def test_symmetric_words_are_the_documented_ones() -> None:
    q, z, scale, g_idx, _ = field_case(4, True, False)
    ours = gptq.pack(gptq.unpack(field_writer(q, z, scale, g_idx, 4, "v2"), W4))
    assert {int(word) & 0xFFFFFFFF for word in ours["qzeros"].flatten()} == {0x77777777}
    assert all(torch.equal(t, field_writer(q, z, scale, g_idx, 4, "v1")[name]) for name, t in ours.items())


def test_a_ragged_last_group_is_read() -> None:
    """GPTQModel rounds the number of groups up; nothing of that kind is written here."""
    q, z, scale, _, _ = field_case(4, False, False)
    g_idx = torch.arange(128) // 48
    written = field_writer(q, z[:3], scale[:3], g_idx, 4, "v2")
    read = gptq.unpack(written, Scheme(scheme_of(4, False, 48)))
    expected = ((q - z[g_idx]).float() * scale.float()[g_idx]).t()
    assert torch.equal(numerics.dequantize(read), expected)


def test_permuted_groups_cannot_be_written_back() -> None:
    q, z, scale, g_idx, _ = field_case(4, True, True)
    read = gptq.unpack(field_writer(q, z, scale, g_idx, 4, "v1"), W4)
    with pytest.raises(InputError, match="group_size 1 cannot be written"):
        gptq.pack(read)


def test_gptq_v1_with_zero_point_0() -> None:
    """z = 0 is stored as 15. Kernels add 1 and get 16, or 0, or carry into the next nibble."""
    q, z, scale, g_idx, weight = field_case(4, False, False, lowest=0)
    assert bool((z == 0).any())
    written = field_writer(q, z, scale, g_idx, 4, "v1")
    kernel = readers.gptq({k: v.numpy() for k, v in written.items()}, {"bits": 4, "checkpoint_format": "gptq"})
    assert not np.array_equal(kernel, weight.numpy())
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq"}
    with pytest.raises(
        InputError, match=r"zero points are stored as 15, which .* some readers take for 0, some for 16"
    ):
        gptq.read_config(config).unpack("a", written)
    # GPTQModel undoes its own borrows, so what it wrote is certain
    known = gptq.read_config({**config, "meta": {"quantizer": "gptqmodel:0.9.1"}}).unpack("a", written)
    assert torch.equal(numerics.dequantize(known), weight)
    # ours are v2, which every reader of it agrees on
    ours = readers.parse(save(gptq.pack(known)))
    assert np.array_equal(readers.gptq(ours, gptq.config({"a": Scheme(known.scheme)})), weight.numpy())


def test_gptq_v1_with_zero_point_0_in_three_bits_is_refused() -> None:
    q, z, scale, g_idx, _ = field_case(3, False, False, lowest=0)
    written = field_writer(q, z, scale, g_idx, 3, "v1")
    for zeros in ("v1", "v1-words"):
        with pytest.raises(InputError, match="stored as 7"):
            gptq.unpack(written, Scheme(scheme_of(3, False, 32)), zeros=zeros)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("qweight", None, "qweight"),
        ("qzeros", None, "qzeros is missing"),
        ("scales", None, "qzeros is torch.int32"),
        ("g_idx", None, "g_idx is missing"),
        ("qzeros", torch.zeros(4, 3, dtype=torch.int32), r"\(4, 4\) is needed"),
        ("scales", torch.ones(4, 32, dtype=torch.int32), "scales is torch.int32"),
        ("g_idx", torch.full((128,), 4, dtype=torch.int32), "g_idx goes from 4 to 4, but there are 4 groups"),
        ("g_idx", torch.full((128,), -1, dtype=torch.int32), "g_idx goes from -1"),
        ("qzeros", torch.zeros(4, 4, dtype=torch.int32), "zero points are not all 8"),
    ],
)
def test_unpack_refuses(name: str, value: torch.Tensor | None, says: str) -> None:
    tensors = gptq.pack(random_q(W4.weights, 32, 128))
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    with pytest.raises(InputError, match=says):
        gptq.unpack(tensors, W4)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        (Scheme(TensorScheme("int5", "group", 32)), "int5 cannot be written; .* int2, int3, int4 and int8"),
        (Scheme(TensorScheme("nvfp4", "group", 16)), "nvfp4 cannot be written"),
        (Scheme(TensorScheme("int4", "tensor")), "a scale per tensor"),
        (Scheme(TensorScheme("int4", "group", 48)), "group_size 48 cannot be written"),
        (Scheme(W4.weights, TensorScheme("int8", "token", dynamic=True)), "weights alone, not int8 activations"),
        (Scheme(TensorScheme("int4", "group", 64)), "group_size 64 does not divide in_features 96"),
    ],
)
def test_schemes_that_are_refused(scheme: Scheme, says: str) -> None:
    with pytest.raises(InputError, match=says):
        gptq.tensors((32, 96), scheme, "BF16")


@pytest.mark.parametrize("value", [1e-9, 7e4, float("nan"), 1 + 2**-12])
def test_scales_that_fp16_does_not_have_are_refused(value: float) -> None:
    q = random_q(W4.weights, 32, 64)
    scale = q.qparams.scale_NG.float()
    scale[3, 1] = value
    with pytest.raises(InputError, match="1 of 64 scales change as F16"):
        gptq.pack(QuantizedTensor(q.codes_NK, QParams(scale), q.scheme))


def test_bfloat16_scales_of_ordinary_size_are_exact() -> None:
    q = random_q(W4.weights, 32, 64)
    scale = (torch.rand(32, 2) * 0.1 + 1e-3).bfloat16()
    back = gptq.unpack(gptq.pack(QuantizedTensor(q.codes_NK, QParams(scale), q.scheme)), W4)
    assert back.qparams.scale_NG.dtype == torch.float16
    assert torch.equal(back.qparams.scale_NG.float(), scale.float())


def test_codes_and_zero_points_must_fit_the_scheme() -> None:
    q = random_q(W4.weights, 32, 64)
    with pytest.raises(InputError, match="int4 with the offset 8"):
        gptq.pack(QuantizedTensor(q.codes_NK + 8, q.qparams, q.scheme))
    with pytest.raises(InputError, match="zero points are absent"):
        gptq.pack(QuantizedTensor(q.codes_NK, q.qparams, scheme_of(4, False, 32)))


# Config --------------------------------------------------------------------------------------------------------------

SCHEMES: dict[str, Scheme | None] = {
    "model.layers.0.mlp.up_proj": W4,
    "model.layers.1.mlp.up_proj": None,
    "model.layers.1.mlp.down_proj": W4,
    "lm_head": None,
}


def test_config_and_files() -> None:
    config = gptq.config(SCHEMES)
    assert config == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "format": "gptq",
        "pack_dtype": "int32",
        "dynamic": {r"-:^model\.layers\.1\.mlp\.up_proj$": {}},
    }
    assert gptq.files(SCHEMES) == {"quantize_config.json": config}
    assert json.loads(json.dumps(config)) == config
    read = gptq.read_config(config)
    assert {name: read.scheme_for(name) for name in SCHEMES} == SCHEMES


def test_transformers_takes_the_config() -> None:
    from transformers import GPTQConfig

    theirs = GPTQConfig.from_dict(gptq.config({"a": Scheme(scheme_of(4, False, None))}))
    assert (theirs.bits, theirs.group_size, theirs.sym, theirs.desc_act) == (4, -1, False, False)
    assert theirs.format == "gptq_v2"


def test_mixed_schemes_are_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match="engines that fuse q, k and v"):
        gptq.config({"a": W4, "b": Scheme(scheme_of(8, True, 32))})
    with pytest.raises(InputError, match="none of the 1 layers"):
        gptq.config({"a": None})


def test_dynamic_rules_and_listed_modules_are_read() -> None:
    base = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    rules = {r"-:.*\.gate$": {}, r"+:.*\.down_proj": {"bits": 8, "group_size": -1}, r".*\.o_proj": {"sym": False}}
    read = gptq.read_config({**base, "dynamic": rules})
    assert read.scheme_for("model.layers.0.mlp.gate") is None
    assert read.scheme_for("model.layers.0.mlp.down_proj") == Scheme(scheme_of(8, True, None))
    assert read.scheme_for("model.layers.0.self_attn.o_proj") == Scheme(scheme_of(4, False, 32))
    assert read.scheme_for("model.layers.0.self_attn.q_proj") == W4
    assert read.scheme_for("lm_head") is None
    assert gptq.read_config({**base, "lm_head": True}).scheme_for("lm_head") == W4
    listed = gptq.read_config({**base, "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]})
    assert listed.scheme_for("model.layers.3.mlp.up_proj") == W4
    assert listed.scheme_for("model.layers.3.mlp.down_proj") is None
    with pytest.raises(InputError, match=r"down_proj: is dense"):
        listed.unpack("model.layers.3.mlp.down_proj", {})


def test_synonyms_are_read() -> None:
    old = {"wbits": 4, "q_group_size": 32, "zero_point": True}
    assert gptq.read_config(old).scheme_for("a") == Scheme(scheme_of(4, False, 32))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quant_method": "awq"}, "quant_method is 'awq'"),
        ({"bits": 5}, "bits is 5"),
        ({"bits": "4"}, "bits is '4'"),
        ({"bits": None}, "bits is missing"),
        ({"checkpoint_format": "gptq_p"}, "checkpoint_format is 'gptq_p'"),
        ({"is_marlin_format": True}, "'marlin'|marlin"),
        ({"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
        ({"group_size": 0}, "group_size 0"),
        ({"sym": "yes"}, "sym is 'yes'"),
        ({"dynamic": {"+:(": {}}}, "does not compile"),
        ({"dynamic": ["a"]}, "dynamic is not a mapping"),
        ({"modules_in_block_to_quantize": [[1]]}, "modules_in_block_to_quantize is not a list of strings"),
    ],
)
def test_unsupported_configs_say_why(change: dict[str, Any], says: str) -> None:
    read = gptq.read_config({**gptq.config({"a": W4}), **change})
    assert read.unsupported is not None
    with pytest.raises(InputError, match=f"cannot be held: .*(?:{says})"):
        read.scheme_for("a")


def test_registry() -> None:
    assert formats.get("gptq") is gptq
    assert formats.by_method("gptq") is gptq
    assert formats.by_method("fp8") is formats.get("fp8-block")
    assert formats.by_method("mxfp4") is formats.get("gpt-oss")
    with pytest.raises(InputError, match=r"'bitsandbytes' are not known; known: .*modelopt"):
        formats.by_method("bitsandbytes")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 130) | st.sampled_from(["lm_head", "re:(", "+:(", "FP8", "gptq"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "-:a", "weights"]), inner, max_size=2)
    ),
    max_leaves=4,
)
KEYS = {
    "gptq": ["bits", "group_size", "sym", "dynamic", "meta", "lm_head", "modules_in_block_to_quantize", "pack_dtype"],
    "awq": ["bits", "group_size", "zero_point", "version", "modules_to_not_convert", "lm_head"],
    "fp8-block": [
        "weight_block_size",
        "fmt",
        "activation_scheme",
        "scale_fmt",
        "modules_to_not_convert",
        "ignored_layers",
    ],
    "modelopt": [
        "quant_algo",
        "group_size",
        "config_groups",
        "ignore",
        "kv_cache_scheme",
        "quantized_layers",
        "quantization",
    ],
    "gpt-oss": ["modules_to_not_convert"],
}


@given(form=st.sampled_from(sorted(KEYS)), data=st.data())
@settings(max_examples=200, deadline=None)
def test_no_content_of_a_config_raises(form: str, data: st.DataObject) -> None:
    """Of all five formats: what cannot be held is said, and only InputError leaves."""
    module = formats.get(form)
    changes = data.draw(st.dictionaries(st.sampled_from([*KEYS[form], "quant_method"]), JSON, max_size=3))
    algo = {"quant_algo": data.draw(st.sampled_from(["FP8", "NVFP4", "W4A16_AWQ", "MIXED_PRECISION"]))}
    read = module.read_config({"quant_method": module.QUANT_METHOD, "bits": 4, **algo, **changes})
    try:
        assert read.scheme_for("model.layers.0.mlp.up_proj") is None or read.unsupported is None
    except InputError:
        assert read.unsupported


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("number", ["int2", "int3", "int4", "int8"])
def test_words_of_compressed_tensors_are_moved_to_what_packing_the_codes_gives(number, strategy, symmetric):
    scheme = TensorScheme(number, strategy, 32 if strategy == "group" else None, symmetric)
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).half()
    q = numerics.quantize(w, numerics.get(number).qparams(w, scheme, scale_dtype=torch.float16), scheme)
    moved = gptq.from_packed(formats.get("compressed-tensors").pack(q), (64, 96), Scheme(scheme))
    packed = gptq.pack(q)
    assert moved.keys() == packed.keys()
    for name, tensor in packed.items():
        assert torch.equal(moved[name], tensor) and moved[name].is_contiguous(), name


def test_moved_words_keep_the_refusals_of_packing():
    scheme = TensorScheme("int4", "group", 32)
    q = QuantizedTensor(torch.zeros(32, 64, dtype=torch.int8), QParams(torch.full((32, 2), 1e-9)), scheme)
    with pytest.raises(InputError, match="scales change as F16"):
        gptq.from_packed(formats.get("compressed-tensors").pack(q), (32, 64), Scheme(scheme))
