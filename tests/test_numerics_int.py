"""Integers against compressed-tensors, and at the edges: ties, saturation, zeros, the smallest floats."""

from __future__ import annotations

import itertools

import ct_numbers
import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import numerics
from quantkit.errors import InputError
from quantkit.types import QParams, TensorScheme

BITS = range(2, 9)
SHAPES = [("tensor", None), ("channel", None), ("group", 32)]
SCHEMES = [
    TensorScheme(f"int{bits}", strategy, group, symmetric)  # type: ignore[arg-type]
    for bits, (strategy, group), symmetric in itertools.product(BITS, SHAPES, (True, False))
]


def name(scheme: TensorScheme) -> str:
    return f"{scheme.number}-{scheme.strategy}-{'sym' if scheme.symmetric else 'asym'}"


def weight(n: int = 37, k: int = 128) -> torch.Tensor:
    """Outliers, a row of zeros, a group of zeros, rows of one sign, a row of the smallest floats."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n)) * 0.02
    w[:, 3] *= 9
    w[5], w[6, 32:64] = 0, 0
    w[7], w[8] = w[7].abs(), -w[8].abs()
    w[9] *= 1e-41
    return w


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_scales_zero_points_and_codes_equal_the_library_in_float32(scheme):
    w = weight()
    q = numerics.get(scheme.number).qparams(w, scheme, scale_dtype=torch.float32)
    scale, zero, _ = ct_numbers.qparams(w, scheme)
    assert torch.equal(q.scale_NG.flatten(), scale.flatten())
    if zero is None:
        assert q.zero_NG is None
    else:
        assert q.zero_NG is not None and torch.equal(q.zero_NG.flatten(), zero.flatten())
    codes = numerics.quantize(w, q, scheme).codes_NK
    assert codes.dtype == torch.int8
    assert torch.equal(codes, ct_numbers.codes(w, scheme, torch.int8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.symmetric], ids=name)
def test_of_16_bit_weights_the_symmetric_scales_are_equal_too(scheme, dtype):
    """The codes are those of the library's float32 arithmetic; on a CPU it divides 16-bit weights in 16 bits."""
    w = weight()[:9].to(dtype)
    q = numerics.get(scheme.number).qparams(w, scheme, scale_dtype=dtype)
    scale, zero, _ = ct_numbers.qparams(w, scheme)
    assert zero is None and q.scale_NG.dtype == dtype
    assert torch.equal(q.scale_NG.flatten(), scale.flatten())
    wanted = quantize(w.float(), scale, None, ct_numbers.args(scheme), dtype=torch.int8)
    assert torch.equal(numerics.quantize(w, q, scheme).codes_NK, wanted)


@pytest.mark.parametrize("number", ["int2", "int4", "int8"])
def test_in_bfloat16_our_asymmetric_scales_miss_less(number):
    """There the library rounds max - min, the quotient and w / scale to 8 bits each, so its numbers are others."""
    scheme = TensorScheme(number, "group", 32, symmetric=False)
    w = weight()[:5].bfloat16()
    q = numerics.get(scheme.number).qparams(w, scheme, scale_dtype=torch.bfloat16)
    scale, zero, _ = ct_numbers.qparams(w, scheme)
    theirs = numerics.get(number).decode(ct_numbers.codes(w, scheme, torch.int8), QParams(scale, zero), scheme)
    missed = (numerics.dequantize(numerics.quantize(w, q, scheme)) - w.float()).square().sum()
    assert missed < (theirs - w.float()).square().sum()


@pytest.mark.parametrize("bits", BITS)
def test_ties_go_to_even_and_what_is_beyond_saturates(bits):
    scheme = TensorScheme(f"int{bits}", "channel")
    half = 1 << (bits - 1)
    codes = torch.arange(-half, half)
    one = QParams(torch.ones(1, 1))
    module = numerics.get(scheme.number)
    assert torch.equal(module.encode(codes[None].float(), one, scheme)[0].long(), codes)
    ties = codes[:-1] + 0.5
    even = torch.where(codes[:-1] % 2 == 0, codes[:-1], codes[1:])
    assert torch.equal(module.encode(ties[None], one, scheme)[0].long(), even)
    far = torch.tensor([[half - 0.4, half, 3e38, float("inf"), -half - 0.6, -3e38, -float("inf")]])
    assert module.encode(far, one, scheme).tolist() == [[half - 1] * 4 + [-half] * 3]
    zero = QParams(torch.ones(1, 1), torch.full((1, 1), -half, dtype=torch.int8))
    assert torch.equal(module.encode((codes + half)[None].float(), zero, scheme)[0].long(), codes)
    assert torch.equal(module.decode(codes[None], zero, scheme)[0].long(), codes + half)


@st.composite
def weights(draw):
    n, groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    seed, power = draw(st.integers(0, 2**32)), draw(st.integers(-30, 30))
    w = torch.randn(n, groups * size, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    if draw(st.booleans()):
        w = w.abs()
    scheme = TensorScheme(f"int{draw(st.integers(2, 8))}", "group", size, draw(st.booleans()))
    return w, scheme, draw(st.sampled_from([torch.float32, torch.bfloat16]))


@settings(deadline=None)
@given(weights())
def test_every_weight_has_its_nearest_code(case):
    w, scheme, dtype = case
    module = numerics.get(scheme.number)
    for search in module.SEARCHES:
        q = module.qparams(w, scheme, scale_dtype=dtype, search=search)
        codes = module.encode(w, q, scheme)
        missed = (module.decode(codes, q, scheme) - w).abs().double()
        step = numerics.expand(q, scheme, w.shape).scale_NG.double().abs()
        bits = int(scheme.number[3:])
        for code in range(-(1 << (bits - 1)), 1 << (bits - 1)):
            other = (module.decode(torch.full_like(codes, code), q, scheme) - w).abs().double()
            assert (missed <= other + 1e-4 * step).all()  # w / scale is rounded: 128 * 2^-24 of a step
        if search == "absmax":  # nothing clips by more than the rounding of the scale and of the zero point
            slack = 0.51 if scheme.symmetric else 1.01
            span = 0 if dtype == torch.float32 else 2.0 ** (bits - 8)
            assert (missed <= step * (slack + span)).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_searched_scales_miss_less(symmetric):
    w, scheme = weight(), TensorScheme("int4", "group", 32, symmetric)
    importance = torch.linspace(0.1, 5, 128) ** 2
    found = {}
    for search, by in (("absmax", None), ("mse", None), ("weighted", importance)):
        q = numerics.get("int4").qparams(
            w, scheme, scale_dtype=torch.bfloat16, search="mse" if by is not None else search, importance_K=by
        )
        found[search] = (numerics.dequantize(numerics.quantize(w, q, scheme)) - w).square()
    per_group = {k: v.reshape(37, 4, 32).sum(-1) for k, v in found.items()}
    assert (per_group["mse"] <= per_group["absmax"] * (1 + 1e-6)).all()
    assert per_group["mse"].sum() < 0.98 * per_group["absmax"].sum()
    weighted = {k: (v * importance).reshape(37, 4, 32).sum(-1) for k, v in found.items()}
    assert (weighted["weighted"] <= weighted["absmax"] * (1 + 1e-6)).all()
    assert weighted["weighted"].sum() < weighted["mse"].sum()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("k", [1, 7])
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_odd_shapes(n, k, strategy):
    scheme = TensorScheme("int4", strategy, symmetric=False)
    w = weight(37)[:n, :k]
    q = numerics.quantize(w, numerics.get("int4").qparams(w, scheme, scale_dtype=torch.float32), scheme)
    assert q.codes_NK.shape == (n, k) and q.qparams.scale_NG.shape == ((1, 1) if strategy == "tensor" else (n, 1))
    assert (numerics.dequantize(q) - w).abs().max() <= q.qparams.scale_NG.max()


def test_what_does_not_fit_is_refused():
    w, module = weight(), numerics.get("int4")
    with pytest.raises(InputError, match="group_size 48 does not divide in_features 128"):
        module.qparams(w, TensorScheme("int4", "group", 48), scale_dtype=torch.float32)
    with pytest.raises(InputError, match="no scale per block"):
        module.qparams(w, TensorScheme("int4", "block", block_shape=(16, 16)), scale_dtype=torch.float32)
    with pytest.raises(InputError, match="int4 has no scale search 'ocp'; known: absmax, mse, signed"):
        module.qparams(w, TensorScheme("int4"), scale_dtype=torch.float32, search="ocp")
    with pytest.raises(InputError, match=r"a scale overflows torch\.float16"):
        module.qparams(w * 1e8, TensorScheme("int4"), scale_dtype=torch.float16)
