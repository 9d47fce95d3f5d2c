"""quantkit.formats.awq against a reader of its own kind, and against AutoAWQ's way of writing."""

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
from quantkit.formats import awq
from quantkit.types import QParams, QuantizedTensor, Scheme, TensorScheme, TensorSpec

ASYM = Scheme(TensorScheme("int4", "group", 32, symmetric=False))
SYM = Scheme(TensorScheme("int4", "group", 32))
KINDS = {torch.int32: "I32", torch.float16: "F16"}


def random_q(scheme: TensorScheme, n: int, k: int, seed: int = 0) -> QuantizedTensor:
    """Random codes and zero points over their whole range, and scales that fp16 has."""
    generator = torch.Generator().manual_seed(seed)
    groups = numerics.groups(scheme, k)
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    scale = (torch.rand(n, groups, generator=generator) + 0.01).half()
    zero = torch.randint(-8, 8, (n, groups), generator=generator, dtype=torch.int8)
    return QuantizedTensor(codes, QParams(scale, None if scheme.symmetric else zero), scheme)


def autoawq(w_NK: torch.Tensor, scale_NG: torch.Tensor, zero_NG: torch.Tensor, group: int) -> dict[str, torch.Tensor]:
    """WQLinear_GEMM.from_linear by its formula: round((w + z s) / s), packed nibble by nibble with AutoAWQ's order."""

    def words(x: np.ndarray) -> torch.Tensor:
        packed = np.zeros((x.shape[0], x.shape[1] // 8), np.uint32)
        for column in range(packed.shape[1]):
            for i, place in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                packed[:, column] |= x[:, column * 8 + place].astype(np.uint32) << np.uint32(4 * i)
        return torch.from_numpy(packed.view(np.int32).copy())

    scale, zero = (t.float().repeat_interleave(group, 1) for t in (scale_NG, zero_NG))
    codes = torch.round((w_NK + zero * scale) / scale).to(torch.int64)
    return {
        "qweight": words(codes.t().numpy()),
        "qzeros": words(zero_NG.t().numpy()),
        "scales": scale_NG.t().half().contiguous(),
    }


@pytest.mark.parametrize("group", [16, 32, 64, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_independent_reader_decodes_what_is_written(group: int | None, symmetric: bool) -> None:
    scheme = TensorScheme("int4", "channel" if group is None else "group", group, symmetric)
    q = random_q(scheme, 40, 128)
    config = json.loads(json.dumps(awq.config({"a": Scheme(scheme), "lm_head": None})))
    theirs = readers.awq(readers.parse(save(awq.pack(q))), config)
    assert np.array_equal(theirs, numerics.dequantize(q).numpy())


@given(
    symmetric=st.booleans(),
    group=st.sampled_from([16, 32, None]),
    rows=st.integers(1, 9),
    groups=st.integers(1, 4),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=60, deadline=None)
def test_round_trip(symmetric: bool, group: int | None, rows: int, groups: int, seed: int) -> None:
    scheme = TensorScheme("int4", "channel" if group is None else "group", group, symmetric)
    q = random_q(scheme, 8 * rows, (group or 11) * groups, seed)
    packed = awq.pack(q)
    back = awq.unpack(packed, Scheme(scheme))
    assert back.scheme == q.scheme and torch.equal(back.codes_NK, q.codes_NK) and back.codes_NK.dtype == torch.int8
    assert torch.equal(back.qparams.scale_NG, q.qparams.scale_NG)
    if q.qparams.zero_NG is None:
        assert back.qparams.zero_NG is None
    else:
        assert back.qparams.zero_NG is not None and torch.equal(back.qparams.zero_NG, q.qparams.zero_NG)
    again = awq.pack(back)
    assert all(torch.equal(again[name], t) and t.is_contiguous() for name, t in packed.items())
    specs = awq.tensors(q.shape, Scheme(scheme), "BF16")
    assert specs == {name: TensorSpec(KINDS[t.dtype], tuple(t.shape)) for name, t in packed.items()}
    assert awq.shape(specs, Scheme(scheme)) == q.shape


def test_symmetric_weights_read_back_as_asymmetric_with_the_same_values() -> None:
    """vLLM's kernels want zero points; 8 everywhere is what symmetric means."""
    q = random_q(SYM.weights, 16, 64)
    packed = awq.pack(q)
    assert {int(word) & 0xFFFFFFFF for word in packed["qzeros"].flatten()} == {0x88888888}
    config = awq.config({"a": SYM})
    assert config["zero_point"] is True
    back = awq.read_config(config).unpack("a", packed)
    assert not back.scheme.symmetric
    assert torch.equal(numerics.dequantize(back), numerics.dequantize(q))


@pytest.mark.parametrize("group", [32, 128])
def test_what_autoawq_writes_is_read_and_written_alike(group: int) -> None:
    generator = torch.Generator().manual_seed(group)
    n, k = 96, 256
    zero = torch.randint(0, 16, (n, k // group), generator=generator)
    scale = (torch.rand(n, k // group, generator=generator) * 0.1 + 1e-3).half()
    codes = torch.randint(0, 16, (n, k), generator=generator)
    wide = (t.repeat_interleave(group, 1) for t in (zero, scale.float()))
    weight = (codes - next(wide)) * next(wide)
    theirs = autoawq(weight, scale, zero, group)
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    read = awq.read_config({**config, "modules_to_not_convert": None}).unpack("model.layers.0.mlp.up_proj", theirs)
    assert torch.equal(read.codes_NK + 8, codes.to(torch.int8))
    assert torch.equal(numerics.dequantize(read), weight)
    ours = awq.pack(read)
    assert all(torch.equal(ours[name], t) for name, t in theirs.items())


@pytest.mark.parametrize(
    ("shape", "scheme", "says"),
    [
        ((12, 64), ASYM, "out_features 12 is not a multiple of 8"),
        ((16, 80), ASYM, "group_size 32 does not divide in_features 80"),
        ((16, 64), Scheme(TensorScheme("int8", "group", 32)), "int8 cannot be written; the gemm layout has 4 bits"),
        ((16, 96), Scheme(TensorScheme("int4", "group", 48)), "group_size 48 cannot be written"),
        ((16, 64), Scheme(TensorScheme("int4", "tensor")), "a scale per tensor"),
        ((16, 64), Scheme(SYM.weights, TensorScheme("int8", "token", dynamic=True)), "weights alone, not int8"),
    ],
)
def test_what_is_refused(shape: tuple[int, int], scheme: Scheme, says: str) -> None:
    with pytest.raises(InputError, match=says):
        awq.tensors(shape, scheme, "BF16")


def test_scales_that_fp16_does_not_have_are_refused() -> None:
    q = random_q(SYM.weights, 16, 64)
    scale = q.qparams.scale_NG.float()
    scale[0, 0] = 1e5
    with pytest.raises(InputError, match="1 of 32 scales change as F16"):
        awq.pack(QuantizedTensor(q.codes_NK, QParams(scale), q.scheme))


def test_codes_and_zero_points_must_fit_the_scheme() -> None:
    q = random_q(SYM.weights, 16, 64)
    with pytest.raises(InputError, match="awq: with the offset 8"):
        awq.pack(QuantizedTensor(q.codes_NK + 1, q.qparams, q.scheme))
    with pytest.raises(InputError, match="zero points are absent"):
        awq.pack(QuantizedTensor(q.codes_NK, q.qparams, ASYM.weights))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("qweight", None, "qweight"),
        ("qzeros", None, "qzeros is missing"),
        ("scales", None, "scales is missing"),
        ("qzeros", torch.zeros(2, 3, dtype=torch.int32), r"\(2, 2\) is needed"),
        ("scales", torch.ones(2, 16, dtype=torch.int64), "scales is torch.int64"),
        ("qzeros", torch.zeros(2, 2, dtype=torch.int32), "zero points are not all 8"),
    ],
)
def test_unpack_refuses(name: str, value: torch.Tensor | None, says: str) -> None:
    tensors = awq.pack(random_q(SYM.weights, 16, 64))
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    with pytest.raises(InputError, match=says):
        awq.unpack(tensors, SYM)


# Config --------------------------------------------------------------------------------------------------------------


def test_config() -> None:
    schemes: dict[str, Scheme | None] = {"model.layers.0.up": ASYM, "model.layers.1.up": None, "lm_head": None}
    config = awq.config(schemes)
    assert config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", "model.layers.1.up"],
    }
    assert awq.files(schemes) == {}
    read = awq.read_config(config)
    assert {name: read.scheme_for(name) for name in schemes} == schemes
    assert awq.config({"a": ASYM})["modules_to_not_convert"] is None


def test_transformers_takes_the_config() -> None:
    from transformers import AwqConfig

    theirs = AwqConfig.from_dict(awq.config({"a": ASYM, "lm_head": None}))
    assert (theirs.bits, theirs.group_size, theirs.zero_point) == (4, 32, True)
    assert (theirs.format, theirs.modules_to_not_convert) == ("gemm", ["lm_head"])


def test_a_dense_name_inside_a_quantized_one_is_refused() -> None:
    """vLLM asks whether any name of the list is a part of a layer's name: mlp.gate would leave mlp.gate_proj dense."""
    with pytest.raises(
        InputError, match=r"layers\.0\.mlp\.gate stays dense, .* part of model\.layers\.0\.mlp\.gate_proj"
    ):
        awq.config({"model.layers.0.mlp.gate": None, "model.layers.0.mlp.gate_proj": ASYM})


def test_mixed_schemes_are_refused() -> None:
    with pytest.raises(InputError, match="one scheme for all layers; use compressed-tensors"):
        awq.config({"a": ASYM, "b": SYM})


@pytest.mark.parametrize(
    ("pattern", "name", "dense"),
    [
        ("gate", "model.layers.0.block_sparse_moe.gate", True),
        ("gate", "model.layers.0.mlp.gate_proj", False),
        ("model.layers.1", "model.layers.10.mlp.up_proj", False),
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1.*", "model.layers.10.mlp.up_proj", False),
        ("model.layers.1*", "model.layers.10.mlp.up_proj", True),
        ("model.layers.*.self_attn", "model.layers.7.self_attn.q_proj", True),
        ("model.layers.*.self_attn", "model.layers.7.mlp.up_proj", False),
        (".*router.*", "model.layers.7.router.proj", True),
        ("visual", "visual.blocks.3.attn.qkv", True),
    ],
)
def test_names_that_stay_dense(pattern: str, name: str, dense: bool) -> None:
    read = awq.read_config({**awq.config({"a": ASYM}), "modules_to_not_convert": [pattern]})
    assert (read.scheme_for(name) is None) is dense


def test_other_spellings() -> None:
    read = awq.read_config(
        {"quant_method": "awq", "w_bit": 4, "q_group_size": -1, "version": "GEMM", "zero_point": False}
    )
    assert read.scheme_for("a") == Scheme(TensorScheme("int4", "channel"))
    assert read.scheme_for("lm_head") is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"version": "gemv"}, "version is 'gemv'"),
        ({"bits": 8}, "bits is 8"),
        ({"group_size": -2}, "group_size -2"),
        ({"zero_point": 1}, "zero_point 1"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is not a list of strings"),
    ],
)
def test_unsupported_configs_say_why(change: dict[str, Any], says: str) -> None:
    read = awq.read_config({**awq.config({"a": ASYM}), **change})
    assert read.unsupported is not None and says in read.unsupported
    with pytest.raises(InputError, match="cannot be held"):
        read.scheme_for("a")


def test_registry() -> None:
    assert formats.get("awq") is formats.by_method("awq") is awq
