"""quantkit.formats.compressed_tensors against the compressed-tensors library itself: tensors byte for byte, configs."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_named_modules, match_targets

from quantkit import formats, numerics
from quantkit.errors import InputError
from quantkit.formats import compressed_tensors as ct
from quantkit.presets import PRESETS
from quantkit.types import QuantizedTensor, Scheme, TensorScheme

SHAPES = [
    ("group", 32, (70, 96)),
    ("group", 64, (33, 64)),
    ("group", 128, (16, 256)),
    ("channel", None, (33, 50)),
    ("channel", None, (32, 64)),
    ("tensor", None, (9, 50)),
]
CASES = [
    (bits, symmetric, *shape)
    for bits in (2, 3, 4, 5, 6, 7, 8)
    for symmetric in (True, False)
    for shape in SHAPES
    if bits in (3, 4, 8) or shape[0] == "group"
]
ST_DTYPES = {torch.int32: "I32", torch.int64: "I64", torch.bfloat16: "BF16", torch.int8: "I8"}


def scheme_of(bits, symmetric, strategy, group_size) -> TensorScheme:
    return TensorScheme(f"int{bits}", strategy, group_size, symmetric)


def library_scheme(scheme: TensorScheme) -> QuantizationScheme:
    """The library's object, read from the config that quantkit writes."""
    group = ct.config({"a": Scheme(scheme)})["config_groups"]["group_0"]
    return QuantizationScheme.model_validate(group)


def case(bits, symmetric, strategy, group_size, shape):
    """A random weight, its scheme and its qparams."""
    scheme = scheme_of(bits, symmetric, strategy, group_size)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(bits + shape[0])) + 0.3
    return w, scheme, numerics.get(scheme.number).qparams(w, scheme, scale_dtype=torch.bfloat16)


def library_compress(w, scheme, qparams):
    """The layer's tensors as the library's own compressor makes them from a float weight."""
    whole = scheme.strategy == "tensor"
    state = {"weight": w, "weight_scale": qparams.scale_NG.reshape(1) if whole else qparams.scale_NG}
    if qparams.zero_NG is not None:
        state["weight_zero_point"] = qparams.zero_NG.reshape(1) if whole else qparams.zero_NG
    return compressor().compress(state, library_scheme(scheme))


def compressor():
    return BaseCompressor.get_value_from_registry("pack-quantized")


def same_bytes(a, b) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a, b) and a.is_contiguous()


@pytest.mark.parametrize("arguments", CASES)
def test_what_the_library_writes_is_read_and_written_alike(arguments):
    w, scheme, qparams = case(*arguments)
    theirs = library_compress(w, scheme, qparams)
    q = ct.unpack(theirs, Scheme(scheme))
    assert torch.equal(q.codes_NK, unpack_from_int32(theirs["weight_packed"], arguments[0], w.shape))
    assert q.codes_NK.dtype == torch.int8
    assert torch.equal(q.qparams.scale_NG, qparams.scale_NG)
    if qparams.zero_NG is None:
        assert q.qparams.zero_NG is None
    else:
        assert q.qparams.zero_NG is not None and torch.equal(q.qparams.zero_NG, qparams.zero_NG)
    ours = ct.pack(q)
    assert ours.keys() == theirs.keys()
    assert all(same_bytes(ours[name], theirs[name]) for name in theirs)
    specs = ct.tensors((w.shape[0], w.shape[1]), Scheme(scheme), "BF16")
    assert {k: (s.dtype, s.shape) for k, s in specs.items()} == {
        k: (ST_DTYPES[t.dtype], tuple(t.shape)) for k, t in theirs.items()
    }


@pytest.mark.parametrize("arguments", CASES)
def test_what_quantkit_writes_the_library_decompresses_to_the_same_weight(arguments):
    w, scheme, qparams = case(*arguments)
    q = numerics.quantize(w, qparams, scheme)
    theirs = compressor().decompress(ct.pack(q), library_scheme(scheme))["weight"]
    assert torch.equal(theirs, numerics.dequantize(q).to(theirs.dtype))
    assert theirs.dtype == torch.bfloat16


def test_codes_outside_the_range_are_refused():
    _, scheme, qparams = case(4, True, "channel", None, (4, 50))
    codes = torch.full((4, 50), 8, dtype=torch.int8)
    with pytest.raises(InputError, match="int4: with the offset 8"):
        ct.pack(QuantizedTensor(codes, qparams, scheme))


def test_zero_points_must_agree_with_the_scheme():
    w, scheme, qparams = case(4, False, "channel", None, (4, 50))
    q = numerics.quantize(w, qparams, scheme)
    with pytest.raises(InputError, match="zero points are given"):
        ct.pack(QuantizedTensor(q.codes_NK, qparams, scheme_of(4, True, "channel", None)))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("weight_shape", None, "weight_shape"),
        ("weight_packed", None, "weight_packed is missing"),
        ("weight_zero_point", None, "weight_zero_point is missing; .* of int4 per group needs it"),
        ("weight_packed", torch.zeros(70, 12, dtype=torch.int64), "torch.int64"),
        ("weight_packed", torch.zeros(70, 11, dtype=torch.int32), r"\(70, 11\)"),
        ("weight_scale", torch.ones(70, 2), r"needs float \(70, 3\)"),
        ("weight_scale", torch.ones(70, 3, dtype=torch.int32), "weight_scale is torch.int32"),
        ("weight_shape", torch.tensor([70, 64]), r"weight \(70, 64\)"),
        ("weight_shape", torch.tensor([70]), "weight_shape"),
    ],
)
def test_unpack_refuses(name, value, says):
    w, scheme, qparams = case(4, False, "group", 32, (70, 96))
    tensors = ct.pack(numerics.quantize(w, qparams, scheme))
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    with pytest.raises(InputError, match=says):
        ct.unpack(tensors, Scheme(scheme))


def test_a_group_size_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="group_size 32 does not divide in_features 50"):
        ct.tensors((4, 50), Scheme(TensorScheme("int4", "group", 32)), "BF16")


def test_registry():
    assert formats.get("compressed-tensors") is ct
    assert "compressed-tensors" in formats.names()
    with pytest.raises(InputError, match=r"'compressed_tensor'; known: .*compressed-tensors"):
        formats.get("compressed_tensor")


# quantization_config -------------------------------------------------------------------------------------------------

W4 = Scheme(TensorScheme("int4", "group", 128))
W4_ASYM = Scheme(TensorScheme("int4", "group", 32, symmetric=False))
W8 = Scheme(TensorScheme("int8", "channel"))
W3_TENSOR = Scheme(TensorScheme("int3", "tensor"))
W8A8_STATIC = Scheme(TensorScheme("int8"), TensorScheme("int8", "tensor", symmetric=False))
KV_TENSOR, KV_HEAD = TensorScheme("fp8_e4m3", "tensor"), TensorScheme("fp8_e4m3", "head")


def test_config_of_one_scheme():
    config = ct.config({"model.layers.0.mlp.up_proj": W4, "lm_head": None, "model.layers.0.mlp.down_proj": W4})
    assert config == {
        "config_groups": {
            "group_0": {
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "dynamic": False,
                    "group_size": 128,
                    "num_bits": 4,
                    "strategy": "group",
                    "symmetric": True,
                    "type": "int",
                },
            }
        },
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    assert json.loads(json.dumps(config)) == config


SCHEMES: dict[str, dict[str, Scheme | None]] = {
    "one": {"a.q": W4, "a.k": W4, "lm_head": None},
    "asym": {"a.q": W4_ASYM},
    "channel": {"a.q": W8, "router": None, "lm_head": None},
    "tensor": {"a.q": W3_TENSOR},
    "several": {"z.up": W4, "a.q": W8, "b.down": W4_ASYM, "a.k": W4, "lm_head": None, "router": None},
    "mixed": {
        "a.q": W4,
        "a.up": PRESETS["FP8_BLOCK"],
        "a.down": PRESETS["NVFP4"],
        "a.gate": W8A8_STATIC,
        "lm_head": None,
    },
    **{name: {"a.q": preset, "lm_head": None} for name, preset in PRESETS.items()},
}


@pytest.mark.parametrize("schemes", SCHEMES.values(), ids=SCHEMES)
def test_config_is_what_the_library_would_write(schemes):
    ours = ct.config(schemes)
    theirs = json.loads(QuantizationConfig.model_validate(ours).model_dump_json())
    assert theirs.pop("moe_sparsity_config", None) is None
    assert ours == theirs
    assert json.loads(json.dumps(ours)) == ours


@pytest.mark.parametrize("schemes", SCHEMES.values(), ids=SCHEMES)
def test_config_reads_back(schemes):
    read = ct.read_config(ct.config(schemes))
    assert read.unsupported is None
    assert {name: read.scheme_for(name) for name in schemes} == schemes


def test_mixed_precision_says_each_groups_format():
    config = ct.config(SCHEMES["mixed"])
    assert config["format"] == "mixed-precision"
    formats = {g["targets"][0]: g["format"] for g in config["config_groups"].values()}
    assert formats == {
        "a.q": "pack-quantized",
        "a.up": "float-quantized",
        "a.down": "nvfp4-pack-quantized",
        "a.gate": "int-quantized",
    }
    for group in config["config_groups"].values():
        del group["format"]
    read = ct.read_config(config)
    assert read.unsupported == "group_0 has int4 weights per group of 128 as 'mixed-precision'"


@pytest.mark.parametrize(("scheme", "strategy"), [(KV_TENSOR, "tensor"), (KV_HEAD, "attn_head")])
def test_config_of_a_kv_cache(scheme, strategy):
    config = ct.config({"a": W4}, kv_cache=scheme)
    assert config["kv_cache_scheme"] == {
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "strategy": strategy,
        "symmetric": True,
        "type": "float",
    }
    theirs = json.loads(QuantizationConfig.model_validate(config).model_dump_json())
    assert theirs["kv_cache_scheme"] == config["kv_cache_scheme"]
    assert ct.read_config(config).kv_cache == scheme
    assert ct.read_config(ct.config({"a": W4})).kv_cache is None


def test_config_of_several_schemes_names_layers_exactly():
    config = ct.config(SCHEMES["several"])
    assert [g["targets"] for g in config["config_groups"].values()] == [["a.k", "z.up"], ["a.q"], ["b.down"]]
    assert config["ignore"] == ["lm_head", "router"]
    assert ct.read_config(config).scheme_for("c.new") is None


def test_config_of_nothing_is_refused():
    with pytest.raises(InputError, match="none of the 1 layers is quantized"):
        ct.config({"a": None})


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.gate = (torch.nn.Linear(4, 4) for _ in range(3))
        self.norm = torch.nn.LayerNorm(4)


@pytest.mark.parametrize(
    ("targets", "ignore"),
    [
        ([["Linear"], ["re:.*q_proj"]], []),
        ([["Linear"], ["re:.*q_proj", "0.k_proj"]], ["re:.*gate$"]),
        ([["re:.*_proj$"], ["re:.*q_proj$", "1.k_proj"]], ["0.q_proj"]),
        ([["re:.*proj"], ["Linear"]], ["re:q_proj"]),  # matched from the start: ignores nothing
        ([["1.q_proj"], ["re:1.*"]], ["LayerNorm"]),
        ([["Linear"], ["0.gate"]], ["Linear"]),
        ([["re:a", "0.gate"], ["0.gate", "re:1[.]k"]], []),
        ([["Linear"], ["Linear"]], ["1"]),
    ],
)
def test_targets_are_resolved_in_the_librarys_order(targets, ignore):
    model = torch.nn.ModuleList([Block(), Block()])
    config = ct.config({"a": W4, "b": W8})
    for group, names in zip(config["config_groups"].values(), targets):
        group["targets"] = names
    config["ignore"] = ignore
    read = ct.read_config(config)
    schemes = {t: s for names, s in zip(targets, (W4, W8)) for t in names}
    theirs = {
        name: schemes[match_targets(name, module, schemes)[0]]
        for name, module in match_named_modules(model, schemes, ignore)
        if isinstance(module, torch.nn.Linear)
    }
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert {n: s for n in linears if (s := read.scheme_for(n)) is not None} == theirs


OLD_ARGS: dict[str, object] = {
    "actorder": "weight",
    "block_structure": None,
    "observer": "minmax",
    "observer_kwargs": {},
}


@pytest.mark.parametrize(
    "weights",
    [
        {"num_bits": 4, "type": "int", "group_size": 128},
        {"num_bits": 4, "group_size": 128, "strategy": "group", "symmetric": True, "type": "int", **OLD_ARGS},
        {"num_bits": 4, "group_size": 128, "scale_dtype": "torch.bfloat16", "zp_dtype": "torch.int8"},
    ],
)
def test_other_spellings_of_the_same_scheme(weights):
    config = ct.config({"a": W4})
    config["config_groups"]["group_0"]["weights"] = weights
    del config["config_groups"]["group_0"]["format"]  # older checkpoints have it at the top only
    assert QuantizationScheme.model_validate(config["config_groups"]["group_0"]).weights.group_size == 128
    assert ct.read_config({**config, "version": "0.9.0", "sparsity_config": {}}).scheme_for("a") == W4


# What versions 0.5 to 0.13 wrote in every block of arguments, whether it was used or not.
OLD_INPUT: dict[str, object] = {**OLD_ARGS, "actorder": None}
OLD_SPELLINGS: dict[str, tuple[str, dict[str, object], dict[str, object] | None]] = {
    "W8A8": (
        "int-quantized",
        {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None, **OLD_ARGS},
        {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, **OLD_INPUT, "observer": "memoryless"},
    ),
    "FP8": (
        "naive-quantized",
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
    ),
    "FP8_DYNAMIC": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, **OLD_ARGS},
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, **OLD_INPUT, "observer": None},
    ),
    "FP8_BLOCK": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", **OLD_ARGS, "block_structure": "128x128"},
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True},
    ),
    "NVFP4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, **OLD_ARGS},
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
    ),
    "MXFP4A16": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "FLOAT", "strategy": "GROUP", "group_size": 32},
        None,
    ),
}


@pytest.mark.parametrize("status", ["compressed", "frozen"])
@pytest.mark.parametrize("name", OLD_SPELLINGS)
def test_what_older_versions_wrote(name, status):
    layout, weights, activations = OLD_SPELLINGS[name]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    QuantizationScheme.model_validate(copy.deepcopy(group))
    read = ct.read_config(
        {
            "config_groups": {"group_0": group},
            "format": layout,
            "global_compression_ratio": 1.24,
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": status,
            "sparsity_config": {"format": "dense", "global_sparsity": 0.1, "registry_requires_subclass": False},
        }
    )
    assert read.unsupported is None
    assert read.scheme_for("model.layers.0.mlp.up_proj") == PRESETS[name]
    assert [(g.name, g.format) for g in read.groups] == [("group_0", layout)]


def test_a_group_may_be_a_presets_name():
    config = {**ct.config({"a": W4}), "config_groups": {"W4A16": ["Linear"]}}
    assert QuantizationConfig.model_validate(config).config_groups["W4A16"].weights.num_bits == 4
    assert ct.read_config(config).scheme_for("a") == PRESETS["W4A16"]


def test_where_a_config_lies():
    ours = ct.config({"a": W4})
    bare = {k: v for k, v in ours.items() if k != "quant_method"}
    for config in (
        {"quantization_config": ours},
        {"text_config": {"quantization_config": ours}},
        {"compression_config": bare},
        {"compression_config": {"quantization_config": bare, "sparsity_config": {}}},
    ):
        found = formats.quantization_config(config)
        assert found is not None and found["quant_method"] == "compressed-tensors"
        assert ct.read_config(found).scheme_for("a") == W4
    assert formats.quantization_config({"text_config": {"vocab_size": 3}}) is None


def test_channel_as_group_size_minus_one():
    config = ct.config({"a": W8})
    config["config_groups"]["group_0"]["weights"] = {"num_bits": 8, "group_size": -1}
    assert QuantizationArgs(num_bits=8, group_size=-1).strategy == "channel"
    assert ct.read_config(config).scheme_for("a") == W8


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (["quant_method"], "gptq", "quant_method is 'gptq'"),
        (["quantization_status"], "calibration", "quantization_status is 'calibration'"),
        (["kv_cache_scheme"], {"num_bits": 8}, "kv_cache_scheme is int8 per tensor"),
        (["kv_cache_scheme"], {"num_bits": 8, "novel": 1}, "kv_cache_scheme.novel is 1"),
        (["transform_config"], {"config_groups": {}}, "transform_config is set"),
        (["sparsity_config"], {"format": "sparse-24-bitmask"}, "sparsity_config is set"),
        (["ignore"], "lm_head", "ignore is not a list of strings"),
        (["ignore"], ["re:(", "a"], "does not compile"),
        (["config_groups"], {}, "names no group"),
        (["config_groups", "W4A17"], ["Linear"], "W4A17 is neither a scheme nor the name of a preset"),
        (["config_groups", "group_0", "format"], "dense", "int4 weights per group of 128 as 'dense'"),
        (["config_groups", "group_0", "format"], "mxfp4-pack-quantized", "of 128 as 'mxfp4-pack-quantized'"),
        (["config_groups", "group_0", "extra"], 1, "unknown key 'extra'"),
        (["config_groups", "group_0", "targets"], None, "targets is not a list of strings"),
        (["config_groups", "group_0", "output_activations"], {"num_bits": 8}, "quantizes output activations"),
        (["config_groups", "group_0", "input_activations"], {"num_bits": 16}, "input_activations is int16 per tensor"),
        (["config_groups", "group_0", "input_activations"], {"strategy": "token"}, "int8 per token, dynamic False"),
        (["config_groups", "group_0", "input_activations"], {"dynamic": "local"}, "dynamic is 'local'"),
        (["config_groups", "group_0", "weights"], None, "group_0.weights is not set"),
        (["config_groups", "group_0", "weights", "type"], "float", "float4 per group"),
        (["config_groups", "group_0", "weights", "num_bits"], 1, "int1 per group"),
        (["config_groups", "group_0", "weights", "num_bits"], "4", "num_bits '4'"),
        (["config_groups", "group_0", "weights", "group_size"], None, "group_size None"),
        (["config_groups", "group_0", "weights", "strategy"], "block", "block_structure is None"),
        (["config_groups", "group_0", "weights", "strategy"], "novel", "weights is int4 per novel"),
        (["config_groups", "group_0", "weights", "actorder"], "group", "actorder is 'group'"),
        (["config_groups", "group_0", "weights", "scale_dtype"], "torch.float8_e4m3fn", "scale_dtype"),
        (["config_groups", "group_0", "weights", "novel"], 1, "novel is 1"),
        (["config_groups", "group_0", "weights", "dynamic"], True, "int4 weights per group of 128 as"),
        (["config_groups", "group_0", "weights", "scale_dtype"], "torch.uint8", "int4 per group, scale_dtype"),
    ],
)
def test_unsupported_configs_say_why(path, value, says):
    config = copy.deepcopy(ct.config({"a": W4, "lm_head": None}))
    at = config
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    read = ct.read_config(config)
    assert read.unsupported is not None and says in read.unsupported
    with pytest.raises(InputError, match="cannot be read"):
        read.scheme_for("a")
