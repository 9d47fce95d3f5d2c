"""NVFP4 against compressed-tensors, and its searches against trying all 126 scales."""

from __future__ import annotations

import ct_numbers
import minifloats
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization.utils import generate_gparam

from quantkit import numerics
from quantkit.errors import InputError
from quantkit.numerics import nvfp4
from quantkit.types import QParams, TensorScheme

SCHEME = TensorScheme("nvfp4", "group", 16)
MAGNITUDES = minifloats.table(2, 1, 1)
E4M3 = torch.tensor(minifloats.table(4, 3, 7)[1:-1])  # the 126 positive values


def weight(n: int = 33, k: int = 96) -> torch.Tensor:
    """Outliers, groups of zeros, a row whose scales are E4M3 subnormals, a row whose scales are all zero in E4M3."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(6)) * 0.02
    w[:, 3] *= 10
    w[5], w[6, 16:32] = 0, 0
    w[7] *= 1e-4
    w[8] *= 1e-6
    return w


def run(w: torch.Tensor, search: str = "absmax", importance: torch.Tensor | None = None) -> QParams:
    return nvfp4.qparams(w, SCHEME, scale_dtype=torch.bfloat16, search=search, importance_K=importance)


def missed(w: torch.Tensor, q: QParams, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Squared error of each group, (N, G) float64."""
    d = (numerics.dequantize(numerics.quantize(w, q, SCHEME)) - w).double().square()
    d = d if importance is None else d * importance
    return d.reshape(w.shape[0], -1, 16).sum(-1)


@pytest.mark.parametrize("seed", range(4))
def test_scales_and_codes_equal_the_library_in_float32(seed):
    w = weight() * (1 + torch.rand(33, 1, generator=torch.Generator().manual_seed(seed)))
    q = run(w)
    scale, _, whole = ct_numbers.qparams(w, SCHEME)
    assert q.global_scale is not None and q.global_scale.dtype == torch.float32 and whole is not None
    assert torch.equal(q.global_scale, whole) and q.global_scale.shape == (1,)
    assert q.scale_NG.dtype == torch.float8_e4m3fn and torch.equal(q.scale_NG.float(), scale)
    packed = pack_fp4_to_uint8(ct_numbers.codes(w, SCHEME))
    codes = numerics.quantize(w, q, SCHEME).codes_NK
    assert codes.dtype == torch.uint8
    assert torch.equal(codes, torch.stack([packed & 15, packed >> 4], -1).reshape(w.shape))


def test_bfloat16_weights_are_computed_in_float32():
    """The library would round their global scale to bfloat16, and a few group scales with it."""
    w = weight().bfloat16()
    ours, wide, theirs = run(w), run(w.float()), generate_gparam(w.min(), w.max())
    assert torch.equal(ours.scale_NG.view(torch.uint8), wide.scale_NG.view(torch.uint8))
    assert ours.global_scale is not None and wide.global_scale is not None
    assert torch.equal(ours.global_scale, wide.global_scale)
    torch.testing.assert_close(ours.global_scale, theirs, rtol=2**-8, atol=0)


@pytest.mark.parametrize("amax", [0.0, 1e-45, 2e-38, 7e-36, 9e-36, 1e-20, 1.0, 6.0, 3.4e38])
def test_global_scale_equals_the_library(amax):
    value = torch.tensor(amax)
    assert torch.equal(nvfp4.global_scale(value), generate_gparam(-value, value))
    w = torch.zeros(2, 32)
    w[1, 4], w[0, 20] = amax, -amax / 3
    decoded = numerics.dequantize(numerics.quantize(w, run(w), SCHEME))
    assert decoded.isfinite().all()
    if amax > 1e-35:
        torch.testing.assert_close(decoded, w, rtol=0.07, atol=0)


def test_rounding_and_decoding_of_all_codes():
    x = minifloats.hard_inputs([*MAGNITUDES, 12])
    one = QParams(torch.ones(1, 1))
    codes = nvfp4.encode(x[None], one, TensorScheme("nvfp4", "channel"))[0].tolist()
    assert codes == [minifloats.nearest(v, MAGNITUDES) + 8 * s for v, s in zip(x.tolist(), x.signbit().tolist())]
    all_codes = torch.arange(16, dtype=torch.uint8)[None]
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for scale in scales:
        q = QParams(scale.reshape(1, 1), None, torch.tensor([3.0]))
        step = scale.float() / 3
        wanted = torch.tensor([*MAGNITUDES, *(-v for v in MAGNITUDES)]) * step
        assert torch.equal(nvfp4.decode(all_codes, q, SCHEME)[0], wanted)


@pytest.mark.parametrize("weighted", [False, True])
def test_mse_against_all_126_scales(weighted):
    w = weight()[:7]
    importance = torch.rand(96, generator=torch.Generator().manual_seed(1)) ** 4 * 9 if weighted else None
    q = run(w, "mse", importance)
    best = torch.full((7, 6), torch.inf, dtype=torch.float64)
    for scale in E4M3:
        trial = QParams(torch.full((7, 6), float(scale)).to(torch.float8_e4m3fn), None, q.global_scale)
        best = torch.minimum(best, missed(w, trial, importance))
    found = missed(w, q, importance)
    assert (found <= best * (1 + 1e-5)).double().mean() >= (0.85 if weighted else 1)
    assert found.sum() <= best.sum() * (1.01 if weighted else 1 + 1e-5)


def test_each_search_misses_less_than_the_one_before():
    w = weight()
    plain, either, swept = (missed(w, run(w, search)) for search in ("absmax", "four_six", "mse"))
    assert (either <= plain * (1 + 1e-6)).all() and (swept <= plain * (1 + 1e-6)).all()
    assert swept.sum() < 0.95 * either.sum() and either.sum() < 0.95 * plain.sum()
    importance = torch.linspace(0.1, 4, 96) ** 2
    weighted = missed(w, run(w, "mse", importance), importance)
    assert (weighted <= missed(w, run(w, "mse"), importance) * (1 + 1e-6)).all()


def test_four_six_makes_the_largest_weight_a_four_or_a_six():
    w = weight()[:5, :32].contiguous()
    q = run(w, "four_six")
    codes = numerics.quantize(w, q, SCHEME).codes_NK.reshape(5, 2, 16) & 7
    largest = codes.amax(-1)
    assert ((largest == 6) | (largest == 7)).all()
    assert (largest == 6).any() and (largest == 7).any()


def test_stacked_rows_share_the_global_scale():
    """Layers that an engine fuses are stacked before qparams; apart, each has its own."""
    w = weight()
    w[20:] *= 0.3
    stacked = run(w)
    assert stacked.global_scale is not None
    assert float(stacked.global_scale) == pytest.approx(448 * 6 / float(w.abs().max()))
    alone = run(w[20:])
    assert alone.global_scale is not None and float(alone.global_scale) > float(stacked.global_scale)
    again = nvfp4.local_qparams(w[20:], stacked.global_scale, SCHEME)
    assert torch.equal(again.scale_NG.view(torch.uint8), stacked.scale_NG[20:].view(torch.uint8))


def test_what_does_not_fit_is_refused():
    w = weight()
    for wrong in (
        TensorScheme("nvfp4", "channel"),
        TensorScheme("nvfp4", "group", 32),
        TensorScheme("nvfp4", "group", 16, symmetric=False),
    ):
        with pytest.raises(InputError, match="nvfp4 has a scale for 16 columns and no zero points"):
            nvfp4.qparams(w, wrong, scale_dtype=torch.float32)
    with pytest.raises(InputError, match="group_size 16 does not divide in_features 95"):
        run(w[:, 1:])
    with pytest.raises(InputError, match="no scale search 'rceil'; known: absmax, mse, four_six"):
        run(w, "rceil")
    for bad in (float("nan"), float("inf")):
        w[30, 1] = bad
        with pytest.raises(InputError, match="1 of 3168 values are NaN or Inf, the first at row 30, column 1"):
            run(w)
