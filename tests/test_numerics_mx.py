"""MX formats: every code, every exponent and every rule, against plain Python and compressed-tensors."""

from __future__ import annotations

import math

import ct_numbers
import minifloats
import pytest
import torch
from compressed_tensors.compressors.mx_utils import compress_mx_scale
from compressed_tensors.compressors.mxfp6.helpers import pack_fp6_to_uint8
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import numerics
from quantkit.errors import InputError
from quantkit.types import QParams, TensorScheme

# magnitudes of the finite codes, in their order; bits of a code; bits after the point
ELEMENTS: dict[str, tuple[list[float], int, int]] = {
    "mxfp8_e4m3": (minifloats.table(4, 3, 7)[:-1], 8, 3),
    "mxfp8_e5m2": (minifloats.table(5, 2, 15)[:-4], 8, 2),
    "mxfp6_e2m3": (minifloats.table(2, 3, 1), 6, 3),
    "mxfp6_e3m2": (minifloats.table(3, 2, 3), 6, 2),
    "mxfp4": (minifloats.table(2, 1, 1), 4, 1),
    "mxint8": ([q / 64 for q in range(128)], 8, 6),
}
LIBRARY = ("mxfp8_e4m3", "mxfp6_e2m3", "mxfp4")
NUMBERS = sorted(ELEMENTS)
CODES = {"mxfp8_e4m3": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2, "mxint8": torch.int8}
ONE = torch.tensor([[127]], dtype=torch.uint8)


def scheme(number: str) -> TensorScheme:
    return TensorScheme(number, "group", 32)


def patterns(codes: torch.Tensor, number: str) -> torch.Tensor:
    """Codes as sign and magnitude, whatever their dtype."""
    assert codes.dtype == CODES.get(number, torch.uint8)
    if number == "mxint8":
        return codes.abs().int() + 128 * (codes < 0)
    return codes.contiguous().view(torch.uint8).int()


def weight(n: int = 40, k: int = 96) -> torch.Tensor:
    """Rows of all magnitudes, an outlier in each, groups of zeros."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(4)) * torch.logspace(-8, 8, n)[:, None]
    w[:, 7] *= 10
    w[3, 32:64], w[4] = 0, 0
    return w


def test_the_tables_are_those_of_the_standard():
    assert ELEMENTS["mxfp4"][0] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert [ELEMENTS[n][0][-1] for n in NUMBERS] == [6, 7.5, 28, 448, 57344, 127 / 64]
    assert [ELEMENTS[n][0][1] for n in NUMBERS] == [0.5, 2**-3, 2**-4, 2**-9, 2**-16, 2**-6]


@pytest.mark.parametrize("number", NUMBERS)
def test_all_codes_decode_under_all_scales(number):
    magnitudes, bits, _ = ELEMENTS[number]
    half = 1 << (bits - 1)
    codes = torch.arange(2 * half).to(torch.uint8)
    if number in CODES:
        codes = codes.view(CODES[number])
    exact = torch.tensor(magnitudes, dtype=torch.float64)
    module = numerics.get(number)
    for scale in range(256):
        q = QParams(torch.tensor([[scale]], dtype=torch.uint8))
        values = module.decode(codes.repeat(32)[None], q, scheme(number))[0, : 2 * half]
        assert values.dtype == torch.float32
        if scale == 255:
            assert values.isnan().all()
            continue
        wanted = (exact * 2.0 ** (scale - 127)).float()  # beyond the largest float32: infinity
        assert torch.equal(values[: len(wanted)], wanted)
        if number == "mxint8":
            assert torch.equal(values[129:], -wanted[1:].flip(0))
            assert values[128] == -(2.0 ** (scale - 126)) if scale < 254 else values[128] == -torch.inf
        else:
            assert torch.equal(values[half : half + len(wanted)], -wanted)


@pytest.mark.parametrize("number", NUMBERS)
def test_rounding_against_plain_python(number):
    magnitudes, bits, _ = ELEMENTS[number]
    x = minifloats.hard_inputs([*magnitudes, 2 * magnitudes[-1]])
    codes = patterns(numerics.get(number).encode(x[None], QParams(ONE), scheme(number))[0], number)
    for value, code in zip(x.tolist(), codes.tolist()):
        nearest = minifloats.nearest(value, magnitudes)
        signed = math.copysign(1, value) < 0 and (number != "mxint8" or nearest > 0)  # integers have no -0
        assert code == nearest + (signed << (bits - 1)), value


@pytest.mark.parametrize("number", NUMBERS)
def test_all_bfloat16_inputs(number):
    """Nearest by trying all codes; what is beyond the largest saturates, infinity too."""
    magnitudes, _, _ = ELEMENTS[number]
    x = minifloats.all_bfloat16()
    x = x[~x.isnan()]
    q = QParams(ONE)
    values = numerics.get(number).decode(numerics.get(number).encode(x[None], q, scheme(number)), q, scheme(number))[0]
    grid = torch.tensor(magnitudes)
    near = torch.searchsorted(grid, x.abs()).clamp(1, len(grid) - 1)
    best = torch.minimum((grid[near] - x.abs()).abs(), (grid[near - 1] - x.abs()).abs())
    inside = x.abs() <= magnitudes[-1]
    assert torch.equal((values - x).abs()[inside], best[inside])
    assert torch.equal(values[~inside], x[~inside].sign() * magnitudes[-1])


def plain_exponent(amax: float, number: str, rule: str) -> int:
    """E8M0 scale by the words of each rule, in exact arithmetic."""
    magnitudes, _, mantissa = ELEMENTS[number]
    largest = magnitudes[-1]
    emax = math.floor(math.log2(largest))
    if amax == 0:
        return 0
    exponent = math.frexp(amax)[1] - 1
    if rule == "ocp":
        shift = exponent
    elif rule == "rceil":
        shift = exponent + (math.ldexp(amax, -exponent) > math.ldexp(largest, -emax))
    else:
        bits = 1 if number == "mxfp8_e4m3" else mantissa  # the library rounds E4M3 with the bits of E2M1
        shift = exponent + (math.floor(math.ldexp(amax, bits - exponent) + 0.5) == 2 << bits)
    return min(max(shift - emax, -127), 127 - emax) + 127


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("rule", ["ocp", "even", "rceil"])
def test_rules_at_every_exponent(number, rule):
    """Every power of two that float32 has, and the significands between which a rule decides."""
    largest = ELEMENTS[number][0][-1]
    edges = torch.tensor([1, 1.5, 1.75, 1.8125, 1.875, 1.9375, 1.984375, 1.9921875, math.frexp(largest)[0] * 2, 1.999])
    edges = torch.cat([edges, torch.nextafter(edges, torch.tensor(0.0)), torch.nextafter(edges, torch.tensor(2.0))])
    amax = torch.cat([edges * 2.0**e for e in (-149, -140, *range(-127, 127))] + [edges * 2.0**126 * 2, torch.zeros(1)])
    amax = amax[amax.isfinite()].unique()
    w = torch.zeros(len(amax), 32)
    w[:, 5] = -amax
    q = numerics.get(number).qparams(w, scheme(number), scale_dtype=torch.bfloat16, search=rule)
    assert q.scale_NG.dtype == torch.uint8 and q.zero_NG is None and q.global_scale is None
    assert q.scale_NG[:, 0].tolist() == [plain_exponent(v, number, rule) for v in amax.tolist()]
    assert numerics.dequantize(numerics.quantize(w, q, scheme(number))).isfinite().all()
    if rule == "even":
        same = numerics.get(number).qparams(w, scheme(number), scale_dtype=torch.float32)
        assert torch.equal(same.scale_NG, q.scale_NG), "absmax is another name for it"


@pytest.mark.parametrize("number", NUMBERS)
def test_rceil_is_the_smallest_power_of_two_that_clips_nothing(number):
    w, module = weight(), numerics.get(number)
    scale = numerics.e8m0(module.qparams(w, scheme(number), scale_dtype=torch.float32, search="rceil").scale_NG)
    amax, largest = w.reshape(40, 3, 32).abs().amax(-1), ELEMENTS[number][0][-1]
    live = amax > 0
    assert (amax <= largest * scale)[live].all() and (amax > largest * scale / 2)[live].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", LIBRARY)
def test_scales_and_codes_equal_the_library(number, dtype):
    w = weight().to(dtype)
    q = numerics.get(number).qparams(w, scheme(number), scale_dtype=dtype)
    scale, _, _ = ct_numbers.qparams(w, scheme(number))
    assert torch.equal(q.scale_NG, compress_mx_scale(scale, torch.uint8))
    codes = numerics.quantize(w, q, scheme(number)).codes_NK
    if number == "mxfp8_e4m3":
        wanted = ct_numbers.codes(w, scheme(number), torch.float8_e4m3fn)
        assert torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8))
    elif number == "mxfp4":
        packed = pack_fp4_to_uint8(ct_numbers.codes(w, scheme(number)))
        assert torch.equal(codes, torch.stack([packed & 15, packed >> 4], -1).reshape(w.shape))
    else:
        word = codes.reshape(40, -1, 4).int() << torch.tensor([0, 6, 12, 18])
        ours = (word.sum(-1)[..., None] >> torch.tensor([0, 8, 16]) & 255).to(torch.uint8).reshape(40, -1)
        assert torch.equal(ours, pack_fp6_to_uint8(ct_numbers.codes(w, scheme(number))))


@pytest.mark.parametrize("number", LIBRARY)
def test_where_the_library_is_left(number):
    """Near the largest float32 the library's scale is 255, which is NaN; ours is the largest that is of use."""
    w = torch.full((1, 32), 3.4e38)
    q = numerics.get(number).qparams(w, scheme(number), scale_dtype=torch.float32)
    amax = torch.tensor([3.4e38])
    theirs = ct_numbers.qparams(w, scheme(number))[0]
    assert theirs.isinf().all() and int(q.scale_NG) < 255
    assert (numerics.dequantize(numerics.quantize(w, q, scheme(number))) > 0.74 * amax).all()
    if number == "mxfp4":  # and of -0 it keeps no sign, which no value depends on
        minus = torch.tensor([[-0.0] * 31 + [1.0]])
        q = numerics.get(number).qparams(minus, scheme(number), scale_dtype=torch.float32)
        assert numerics.quantize(minus, q, scheme(number)).codes_NK[0, 0] == 8
        assert pack_fp4_to_uint8(ct_numbers.codes(minus, scheme(number)))[0, 0] == 0


@pytest.mark.parametrize("number", NUMBERS)
def test_mse_takes_the_better_of_the_two_exponents(number):
    w, module = weight(), numerics.get(number)
    importance = torch.linspace(0.1, 4, 96) ** 2
    for by in (None, importance):
        q = module.qparams(w, scheme(number), scale_dtype=torch.float32, search="mse", importance_K=by)

        def missed(scale: torch.Tensor, by: torch.Tensor | None = by) -> torch.Tensor:
            d = numerics.dequantize(numerics.quantize(w, QParams(scale), scheme(number))) - w
            d = d.double().square() if by is None else d.double().square() * by
            return d.reshape(40, 3, 32).sum(-1)

        low = module.qparams(w, scheme(number), scale_dtype=torch.float32, search="ocp").scale_NG
        live = (w.reshape(40, 3, 32).abs().amax(-1) > 0).to(torch.uint8)
        best = torch.minimum(missed(low), missed(low + live))
        assert (missed(q.scale_NG) <= best * (1 + 1e-5)).all()
        for rule in ("even", "rceil"):
            other = module.qparams(w, scheme(number), scale_dtype=torch.float32, search=rule).scale_NG
            assert (missed(q.scale_NG) <= missed(other) * (1 + 1e-5)).all()


@settings(deadline=None)
@given(
    st.sampled_from(NUMBERS), st.integers(0, 2**32), st.integers(-110, 110), st.sampled_from(["even", "rceil", "mse"])
)
def test_the_error_is_bounded_by_the_steps(number, seed, power, rule):
    w = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    q = numerics.get(number).qparams(w, scheme(number), scale_dtype=torch.float32, search=rule)
    amax = w.reshape(2, 2, 32).abs().amax(-1, keepdim=True).expand(-1, -1, 32).reshape(2, 64)
    share = 1 / 127 if number == "mxint8" else 2.0 ** -(ELEMENTS[number][2] + 1)
    if rule == "mse":
        share = 0.26  # what saturates: of mxfp4, all from 6 to 7.99
    d = (numerics.dequantize(numerics.quantize(w, q, scheme(number))) - w).abs()
    assert (d <= amax * share).all()


def test_what_does_not_fit_is_refused():
    module, w = numerics.get("mxfp4"), weight()
    for wrong in (
        TensorScheme("mxfp4", "channel"),
        TensorScheme("mxfp4", "group", 16),
        TensorScheme("mxfp4", "group", 32, symmetric=False),
    ):
        with pytest.raises(InputError, match="mxfp4 has a scale for 32 columns and no zero points"):
            module.qparams(w, wrong, scale_dtype=torch.float32)
    with pytest.raises(InputError, match="group_size 32 does not divide in_features 95"):
        module.qparams(w[:, 1:], scheme("mxfp4"), scale_dtype=torch.float32)
    with pytest.raises(InputError, match="no scale search 'more'; known: absmax, mse, ocp, even, rceil"):
        module.qparams(w, scheme("mxfp4"), scale_dtype=torch.float32, search="more")
    w[2, 3] = -float("inf")
    with pytest.raises(InputError, match="NaN or Inf, the first at row 2, column 3"):
        module.qparams(w, scheme("mxfp4"), scale_dtype=torch.float32)
