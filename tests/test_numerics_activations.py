"""Activations against the library's own forward pass, and the calibration of static scales."""

from __future__ import annotations

import ct_numbers
import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as library_fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import numerics
from quantkit.errors import InputError
from quantkit.numerics import nvfp4
from quantkit.numerics._activations import Magnitudes, fake_quantize, kv_absmax, kv_scale
from quantkit.types import QParams, TensorScheme

DYNAMIC = [
    TensorScheme("int8", "token", dynamic=True),
    TensorScheme("int8", "token", symmetric=False, dynamic=True),
    TensorScheme("int4", "token", dynamic=True),
    TensorScheme("int8", "tensor", dynamic=True),
    TensorScheme("fp8_e4m3", "token", dynamic=True),
    TensorScheme("fp8_e4m3", "tensor", dynamic=True),
    TensorScheme("fp8_e4m3", "group", 128, dynamic=True),
    TensorScheme("mxfp8_e4m3", "group", 32, dynamic=True),
    TensorScheme("mxfp6_e2m3", "group", 32, dynamic=True),
    TensorScheme("mxfp4", "group", 32, dynamic=True),
]
NVFP4 = TensorScheme("nvfp4", "group", 16, dynamic=True)
STATIC = [TensorScheme("int8", "tensor"), TensorScheme("fp8_e4m3", "tensor")]


def name(scheme: TensorScheme) -> str:
    return f"{scheme.number}-{scheme.strategy}{scheme.group_size or ''}{'' if scheme.symmetric else '-asym'}"


def activations(*shape: int, seed: int = 0) -> torch.Tensor:
    """Loud channels, a token of zeros, a faint one."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 7] *= 30
    x.reshape(-1, shape[-1])[1] = 0
    x.reshape(-1, shape[-1])[2] *= 1e-4
    return x


@pytest.mark.parametrize("scheme", DYNAMIC, ids=name)
def test_dynamic_schemes_equal_the_library(scheme):
    x = activations(2, 5, 256)
    args = ct_numbers.args(scheme)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    wanted = library_fake_quantize(x, scale, zero, args)
    assert torch.equal(fake_quantize(x, scheme), wanted)
    assert torch.equal(fake_quantize(x[1], scheme), wanted[1]) or scheme.strategy == "tensor"
    half = fake_quantize(x.bfloat16(), scheme)
    assert half.dtype == torch.bfloat16, "computed in float32, rounded once at the end"
    assert torch.equal(half, fake_quantize(x.bfloat16().float(), scheme).bfloat16())


def test_nvfp4_under_a_given_global_scale_equals_the_library():
    x = activations(2, 5, 256)
    whole = nvfp4.global_scale(x.abs().max() * 0.6)  # calibrated on other data: some groups saturate
    args = ct_numbers.args(NVFP4)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity(), global_scale=whole)
    wanted = library_fake_quantize(x, scale, zero, args, global_scale=whole)
    assert torch.equal(fake_quantize(x, NVFP4, whole), wanted)
    assert (fake_quantize(x, NVFP4, whole).abs() < x.abs().max() * 0.61).all()


@pytest.mark.parametrize("scheme", STATIC, ids=name)
def test_static_schemes_equal_the_library(scheme):
    x, scale = activations(2, 5, 256), torch.tensor([0.05])
    wanted = library_fake_quantize(x, scale, None, ct_numbers.args(scheme))
    assert torch.equal(fake_quantize(x, scheme, scale), wanted)
    assert torch.equal(fake_quantize(x, scheme, scale.reshape(())), wanted)
    largest = {"int8": 127, "fp8_e4m3": 448}[scheme.number]
    loud = fake_quantize(torch.tensor([[1e6, float("inf")]]), scheme, scale)
    torch.testing.assert_close(loud, torch.full((1, 2), largest * 0.05))


def test_nothing_to_do():
    x = activations(2, 3, 8)
    assert fake_quantize(x, None) is x
    assert fake_quantize(x[:0], DYNAMIC[0]).shape == (0, 3, 8)


def test_what_does_not_fit_is_refused():
    x = activations(4, 48)
    with pytest.raises(InputError, match="int8 activations need a calibrated scale"):
        fake_quantize(x, STATIC[0])
    with pytest.raises(InputError, match="nvfp4 activations need a calibrated scale"):
        fake_quantize(x, NVFP4)
    with pytest.raises(InputError, match="are dynamic; leave static_scale out"):
        fake_quantize(x, DYNAMIC[0], torch.ones(1))
    for bad in (torch.ones(2), torch.zeros(1), torch.tensor([float("nan")]), torch.tensor([float("inf")])):
        with pytest.raises(InputError, match="one positive number"):
            fake_quantize(x, STATIC[0], bad)
    with pytest.raises(InputError, match="one scale a tensor and no zero point, not one per channel"):
        fake_quantize(x, TensorScheme("int8", "channel"), torch.ones(1))
    with pytest.raises(InputError, match="group_size 32 does not divide in_features 48"):
        fake_quantize(x, TensorScheme("mxfp4", "group", 32, dynamic=True))


def seen(*batches: torch.Tensor) -> Magnitudes:
    found = Magnitudes()
    for batch in batches:
        found.update(batch)
    return found


@pytest.mark.parametrize("scheme", STATIC, ids=name)
def test_absmax_of_all_batches(scheme):
    batches = [activations(3, 64, seed=s).bfloat16() for s in range(3)]
    scale = seen(*batches).scale(scheme)
    assert scale.shape == (1,) and scale.dtype == torch.float32
    largest = {"int8": 127.5, "fp8_e4m3": 448}[scheme.number]
    assert float(scale) == pytest.approx(max(float(b.abs().max()) for b in batches) / largest, rel=1e-6)
    assert torch.equal(scale, seen(*reversed(batches)).scale(scheme))
    assert torch.equal(seen(*batches).counts, seen(torch.cat(batches)).counts)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 400), st.floats(0.1, 100))
def test_percentile_is_the_value_of_that_rank(seed, count, percentile):
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed)).bfloat16()
    scale = float(seen(x).scale(TensorScheme("fp8_e4m3", "tensor"), "percentile", percentile=percentile)) * 448
    inside = int((x.abs().float() <= scale * (1 + 1e-6)).sum())
    below = int((x.abs().float() < scale * (1 - 1e-6)).sum())
    assert below / count < percentile / 100 <= inside / count + 1e-12


def test_percentile_ignores_a_few_outliers():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[:5] = 1000
    scheme = TensorScheme("int8", "tensor")
    assert float(seen(x).scale(scheme)) == pytest.approx(1000 / 127.5)
    assert 3.5 < float(seen(x).scale(scheme, "percentile", percentile=99.99)) * 127.5 < 4.5
    assert float(seen(x).scale(scheme, "percentile", percentile=100)) == pytest.approx(1000 / 127.5)


@pytest.mark.parametrize("number", ["int4", "int8", "fp8_e4m3"])
def test_mse_has_the_least_error_of_many_scales(number):
    """Heavy tails, both signs alike, as the calibration takes them to be."""
    g = torch.Generator().manual_seed(5)
    half = (torch.randn(20_000, generator=g) * torch.rand(20_000, generator=g).pow(-0.4)).bfloat16()
    x, scheme = torch.cat([half, -half]), TensorScheme(number, "tensor")

    def missed(scale: torch.Tensor) -> float:
        q = numerics.quantize(x[None].float(), QParams(scale.reshape(1, 1)), scheme)
        return float((numerics.dequantize(q) - x.float()).double().square().sum())

    found, plain = seen(x).scale(scheme, "mse"), seen(x).scale(scheme)
    least = min(missed(plain * factor) for factor in torch.logspace(-2.2, 0.05, 60))
    assert missed(found) <= min(missed(plain), least * 1.02)
    assert number == "fp8_e4m3" or missed(found) < 0.97 * missed(plain)


def test_nvfp4_is_calibrated_by_its_global_scale():
    x = activations(4, 64).bfloat16()
    assert torch.equal(seen(x).scale(NVFP4), nvfp4.global_scale(x.abs().max()))
    assert float(seen(x).scale(NVFP4, "percentile", percentile=90)) > float(seen(x).scale(NVFP4))
    with pytest.raises(InputError, match="has no rule mse"):
        seen(x).scale(NVFP4, "mse")


def test_calibration_refuses_what_it_cannot_use():
    scheme = STATIC[0]
    for nothing in (seen(), seen(torch.zeros(3, 4))):
        with pytest.raises(InputError, match="no activation but zeros"):
            nothing.scale(scheme)
    with pytest.raises(InputError, match="2 of 4 activations are NaN or Inf"):
        seen(torch.tensor([1.0, float("nan"), -float("inf"), 2.0]))
    some = seen(torch.ones(3))
    with pytest.raises(InputError, match="unknown rule 'max'"):
        some.scale(scheme, "max")
    with pytest.raises(InputError, match="above 0 and at most 100, not 0"):
        some.scale(scheme, "percentile", percentile=0)


def test_kv_scales_of_heads_and_of_the_whole():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 5, 8, generator=g) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    x[1, :, 3:] = 1e6  # padding
    by_head = kv_absmax(x, per_head=True, mask_BL=mask)
    left = torch.cat([x[0], x[1, :, :3]], 1)
    assert torch.equal(by_head, left.abs().amax((1, 2)))
    assert torch.equal(kv_absmax(x, per_head=False, mask_BL=mask), left.abs().amax().reshape(1))
    assert torch.equal(kv_absmax(x, per_head=False), torch.tensor([1e6]))
    assert torch.equal(kv_scale(by_head), by_head / 448)
    largest = fake_quantize(left, TensorScheme("fp8_e4m3", "tensor"), kv_scale(left.abs().amax().reshape(1)))
    torch.testing.assert_close(largest.abs().max(), left.abs().max(), rtol=1e-6, atol=0)
    assert float(kv_scale(torch.zeros(1))) == pytest.approx(1e-5 / 448)
    with pytest.raises(InputError, match="keys or values of this layer hold NaN or Inf"):
        kv_scale(torch.tensor([1.0, float("nan")]))
