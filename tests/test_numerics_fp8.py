"""FP8: every code and every bfloat16 input, against torch, plain Python, and compressed-tensors."""

from __future__ import annotations

import ct_numbers
import minifloats
import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import numerics
from quantkit.errors import InputError
from quantkit.types import QParams, TensorScheme

DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
# magnitudes of the finite codes, in their order
MAGNITUDES = {"fp8_e4m3": minifloats.table(4, 3, 7)[:-1], "fp8_e5m2": minifloats.table(5, 2, 15)[:-4]}
ONE = QParams(torch.ones(1, 1))
SCHEMES = [
    TensorScheme("fp8_e4m3", "tensor"),
    TensorScheme("fp8_e4m3", "channel"),
    TensorScheme("fp8_e4m3", "group", 32),
    TensorScheme("fp8_e4m3", "block", block_shape=(128, 128)),
    TensorScheme("fp8_e4m3", "block", block_shape=(16, 24)),
]


def name(scheme: TensorScheme) -> str:
    return "-".join(str(x) for x in (scheme.strategy, scheme.group_size or scheme.block_shape) if x)


def bits(t: torch.Tensor) -> torch.Tensor:
    assert t.dtype in DTYPES.values()
    return t.contiguous().view(torch.uint8)


def weight(n: int = 150, k: int = 160) -> torch.Tensor:
    """Neither is a multiple of 128. Outliers, a row, a block and a group of zeros."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(2)) * 0.02
    w[:, 3] *= 20
    w[5], w[128:, 128:], w[6, 32:64] = 0, 0, 0
    return w


@pytest.mark.parametrize("number", DTYPES)
def test_all_bfloat16_inputs_are_cast_as_torch_does(number):
    x = minifloats.all_bfloat16()
    largest = MAGNITUDES[number][-1]
    codes = numerics.get(number).encode(x[None], ONE, TensorScheme(number))[0]
    inside = x.abs() <= largest
    assert torch.equal(bits(codes[inside]), bits(x[inside].to(DTYPES[number])))
    beyond = codes[x.abs() > largest].float()
    assert torch.equal(beyond, x[x.abs() > largest].sign() * largest), "infinity saturates as well"
    assert codes[x.isnan()].float().isnan().all() and not codes[~x.isnan()].float().isnan().any()


@pytest.mark.parametrize("number", DTYPES)
def test_rounding_against_plain_python(number):
    magnitudes = MAGNITUDES[number]
    x = minifloats.hard_inputs([*magnitudes, 2 * magnitudes[-1]])
    codes = bits(numerics.get(number).encode(x[None], ONE, TensorScheme(number))[0]).tolist()
    wanted = [minifloats.nearest(v, magnitudes) + 128 * s for v, s in zip(x.tolist(), x.signbit().tolist())]
    assert codes == wanted


@pytest.mark.parametrize("number", DTYPES)
def test_all_codes_decode_to_what_the_standard_says(number):
    codes = torch.arange(256).to(torch.uint8).view(DTYPES[number])
    scale = QParams(torch.full((1, 1), 0.25, dtype=torch.bfloat16))
    values = numerics.get(number).decode(codes[None], scale, TensorScheme(number))[0]
    finite = len(MAGNITUDES[number])
    for sign, half in ((1, values[:128]), (-1, values[128:])):
        assert half[:finite].tolist() == [sign * v / 4 for v in MAGNITUDES[number]]
        assert half[127].isnan()
    assert values[0x7C].item() == (float("inf") if number == "fp8_e5m2" else 384 / 4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_scales_and_codes_equal_the_library(scheme):
    w = weight()
    q = numerics.get("fp8_e4m3").qparams(w, scheme, scale_dtype=torch.float32)
    scale, _, _ = ct_numbers.qparams(w, scheme)
    assert torch.equal(q.scale_NG.flatten(), scale.flatten())
    wanted = ct_numbers.codes(w, scheme, torch.float8_e4m3fn)
    assert torch.equal(bits(numerics.quantize(w, q, scheme).codes_NK), bits(wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_scales_of_16_bit_weights_equal_the_library(scheme, dtype):
    """The codes are those of the library's float32 arithmetic; on a CPU it divides 16-bit weights in 16 bits."""
    w = weight().to(dtype)
    q = numerics.get("fp8_e4m3").qparams(w, scheme, scale_dtype=dtype)
    scale, _, _ = ct_numbers.qparams(w, scheme)
    assert q.scale_NG.dtype == dtype and torch.equal(q.scale_NG.flatten(), scale.flatten())
    wanted = quantize(w.float(), scale, None, ct_numbers.args(scheme), dtype=torch.float8_e4m3fn)
    assert torch.equal(bits(numerics.quantize(w, q, scheme).codes_NK), bits(wanted))


@pytest.mark.parametrize("number", DTYPES)
def test_ragged_blocks_count_only_what_is_there(number):
    w = torch.full((130, 200), 0.5)
    w[128:, :128], w[:128, 128:], w[128:, 128:] = 1, 2, 3
    scheme = TensorScheme(number, "block", block_shape=(128, 128))
    q = numerics.get(number).qparams(w, scheme, scale_dtype=torch.float32)
    largest = MAGNITUDES[number][-1]
    torch.testing.assert_close(q.scale_NG, torch.tensor([[0.5, 2], [1, 3]]) / largest, rtol=1e-6, atol=0)
    quantized = numerics.quantize(w, q, scheme)
    assert quantized.codes_NK.shape == (130, 200)
    assert (quantized.codes_NK.float() == largest).all()
    torch.testing.assert_close(numerics.dequantize(quantized), w, rtol=1e-6, atol=0)


def test_a_block_as_large_as_the_weight_is_a_tensor_and_one_row_high_is_groups():
    w, module = weight(), numerics.get("fp8_e4m3")
    for search in module.SEARCHES:
        importance = torch.linspace(1, 3, 160)
        run = {"scale_dtype": torch.float32, "search": search, "importance_K": importance}
        whole = module.qparams(w, TensorScheme("fp8_e4m3", "tensor"), **run).scale_NG
        for shape in ((150, 160), (512, 512)):
            block = module.qparams(w, TensorScheme("fp8_e4m3", "block", block_shape=shape), **run).scale_NG
            assert torch.equal(block, whole)
        rows = module.qparams(w, TensorScheme("fp8_e4m3", "group", 32), **run).scale_NG
        assert torch.equal(
            module.qparams(w, TensorScheme("fp8_e4m3", "block", block_shape=(1, 32)), **run).scale_NG, rows
        )


@pytest.mark.parametrize("number", DTYPES)
def test_searched_scales_miss_less(number):
    w, scheme, module = weight(), TensorScheme(number, "group", 32), numerics.get(number)

    def missed(by: torch.Tensor | None, **kwargs: object) -> torch.Tensor:
        q = module.qparams(w, scheme, scale_dtype=torch.bfloat16, **kwargs)
        error = (numerics.dequantize(numerics.quantize(w, q, scheme)) - w).square()
        return (error if by is None else error * by).reshape(150, 5, 32).sum(-1)

    plain, searched = missed(None), missed(None, search="mse")
    assert (searched <= plain * (1 + 1e-6)).all() and searched.sum() < 0.9 * plain.sum()
    importance = torch.linspace(0.1, 5, 160) ** 3
    weighted = missed(importance, search="mse", importance_K=importance)
    assert (weighted <= missed(importance, search="mse") * (1 + 1e-6)).all()
    assert weighted.sum() < missed(importance, search="mse").sum()


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(-100, 90), st.sampled_from(sorted(DTYPES)))
def test_the_error_is_half_a_step_at_most(seed, power, number):
    w = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    scheme = TensorScheme(number, "channel")
    q = numerics.quantize(w, numerics.get(number).qparams(w, scheme, scale_dtype=torch.float32), scheme)
    mantissa, smallest = (3, 2.0**-9) if number == "fp8_e4m3" else (2, 2.0**-16)
    bound = torch.maximum(w.abs() * 2.0 ** -(mantissa + 1), q.qparams.scale_NG * smallest / 2)
    assert ((numerics.dequantize(q) - w).abs() <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("number", DTYPES)
def test_the_smallest_and_largest_weights(number):
    w = torch.tensor([[0.0, -0.0], [1e-45, -1e-45], [1e-38, 2e-39], [3e38, -1e38], [2.0**-126, 2.0**-130]])
    scheme = TensorScheme(number, "channel")
    q = numerics.quantize(w, numerics.get(number).qparams(w, scheme, scale_dtype=torch.float32), scheme)
    decoded = numerics.dequantize(q)
    assert decoded.isfinite().all() and (q.qparams.scale_NG > 0).all()
    assert ((decoded - w).abs() <= 0.13 * w.abs() + 1e-40).all()


def test_what_does_not_fit_is_refused():
    module, w = numerics.get("fp8_e4m3"), weight()
    with pytest.raises(InputError, match="no zero points"):
        module.qparams(w, TensorScheme("fp8_e4m3", symmetric=False), scale_dtype=torch.float32)
    with pytest.raises(InputError, match="group_size 128 does not divide in_features 160"):
        module.qparams(w, TensorScheme("fp8_e4m3", "group", 128), scale_dtype=torch.float32)
    w[7, 9] = float("nan")
    for scheme in SCHEMES:
        with pytest.raises(InputError, match="1 of 24000 values are NaN or Inf, the first at row 7, column 9"):
            module.qparams(w, scheme, scale_dtype=torch.float32)
