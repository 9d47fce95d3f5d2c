"""GPTQ against brute force in float64, and its behaviour on bad Hessians."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from quantkit import numerics
from quantkit.algorithms import _output, gptq, rtn
from quantkit.errors import InputError
from quantkit.types import Notes, QuantizedTensor, Stats, TensorScheme


def layer(n: int, k: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, Stats]:
    """A weight and the second moments of inputs with a steep spectrum and a few loud channels."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g) * torch.linspace(1, 0.05, k)
    x = torch.randn(tokens, k, generator=g) @ mix
    x[:, :2] *= 6
    w = torch.randn(n, k, generator=g) * 0.05
    return w, Stats(tokens, (x.T @ x) / tokens)


def gram(stats: Stats) -> torch.Tensor:
    assert stats.gram_KK is not None
    return stats.gram_KK


def output_error(w: torch.Tensor, q: QuantizedTensor, stats: Stats) -> float:
    d = w.double() - numerics.dequantize(q).double()
    return float(((d @ gram(stats).double()) * d).sum())


def textbook_gptq(w, scale, hessian, low, high, order, zero=None):
    """The inverse form of the paper, one column at a time, float64: remove a column, correct the rest."""
    w = w.double().clone()
    scale = scale.double()
    zero = torch.zeros_like(scale) if zero is None else zero.double()
    left = list(order)
    codes = torch.zeros_like(w)
    margin = torch.full_like(w, 9.0)  # distance of w/scale from the nearest rounding boundary
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        j = left[0]
        x = w[:, j] / scale[:, j] + zero[:, j]
        codes[:, j] = x.round().clamp(low, high)
        margin[:, j] = (x - x.floor() - 0.5).abs()
        error = (w[:, j] - (codes[:, j] - zero[:, j]) * scale[:, j]) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return codes, margin


@pytest.mark.parametrize("act_order", ["none", "static"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("number", "block_size"), [("int4", 128), ("int3", 7), ("int8", 16)])
def test_codes_equal_the_textbook_form_in_float64(act_order, symmetric, number, block_size):
    w, stats = layer(24, 48, 400)
    scheme = TensorScheme(number, "group", 16, symmetric)
    options = gptq.Options(act_order=act_order, block_size=block_size, sweeps=0)
    q = gptq.quantize(w, scheme, stats, options=options, scale_dtype=torch.float32, notes=Notes())
    hessian = gram(stats).double()
    order = torch.argsort(hessian.diagonal(), descending=True).tolist() if act_order == "static" else range(48)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(48)
    fine = numerics.expand(q.qparams, scheme, w.shape)
    half = 1 << (int(number[3:]) - 1)
    codes, margin = textbook_gptq(w, fine.scale_NG, hessian, -half, half - 1, order, fine.zero_NG)
    wrong = codes != q.codes_NK
    # A tie may fall either way in float32; after it, the rest of that row sees another error.
    for row in wrong.any(1).nonzero().flatten().tolist():
        first = next(j for j in order if wrong[row, j])
        assert margin[row, first] < 1e-3, (row, first, float(margin[row, first]))
    assert wrong.any(1).float().mean() <= 0.1


def test_close_to_the_best_of_all_roundings():
    """2 rows of 5 columns at 2 bits: every rounding is tried. GPTQ is greedy, but must beat RTN and come near."""
    w, stats = layer(12, 5, 60, seed=3)
    scheme = TensorScheme("int2", "channel")
    q = gptq.quantize(w, scheme, stats, options=gptq.Options(), scale_dtype=torch.float32, notes=Notes())
    grid = torch.tensor(list(itertools.product(range(-2, 2), repeat=5)), dtype=torch.float64)
    scale = q.qparams.scale_NG.double()
    d = w.double()[:, None] - grid[None] * scale[:, None]
    best = ((d @ gram(stats).double()) * d).sum(-1).min(1).values.sum()
    nearest = output_error(w, numerics.quantize(w, q.qparams, scheme), stats)
    found = output_error(w, q, stats)
    assert best <= found <= nearest
    assert found <= 1.5 * best


@pytest.mark.parametrize("number", ["int4", "int3"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_sweep_lowers_the_error_that_was_minimised(number, symmetric):
    w, stats = layer(24, 64, 600)
    scheme = TensorScheme(number, "group", 32, symmetric)
    damped = gram(stats) + 0.01 * gram(stats).diagonal().mean() * torch.eye(64)
    errors = []
    for sweeps in range(4):
        options = gptq.Options(sweeps=sweeps, block_size=24)
        q = gptq.quantize(w, scheme, stats, options=options, scale_dtype=torch.bfloat16, notes=Notes())
        assert q.qparams.scale_NG.dtype == torch.bfloat16 and bool((q.qparams.scale_NG > 0).all())
        errors.append(output_error(w, q, Stats(600, damped)))
    assert errors[0] > errors[1] > errors[2] >= errors[3]


def test_a_sweep_ends_where_no_single_code_can_be_better():
    """Brute force in float64: after enough sweeps, no code of any weight has a better neighbour."""
    w, stats = layer(6, 16, 100, seed=5)
    scheme = TensorScheme("int3", "channel")
    options = gptq.Options(sweeps=60, dampening=1e-6)
    q = gptq.quantize(w, scheme, stats, options=options, scale_dtype=torch.float32, notes=Notes())
    found = output_error(w, q, stats)
    for row, j, step in itertools.product(range(6), range(16), (-1, 1)):
        codes = q.codes_NK.clone()
        codes[row, j] = (codes[row, j] + step).clamp(-4, 3)
        assert output_error(w, QuantizedTensor(codes, q.qparams, scheme), stats) >= found * (1 - 1e-5)


def test_searched_scales_help_and_the_stored_scale_is_the_judged_one():
    w, stats = layer(32, 128, 2000)
    scheme = TensorScheme("int4", "group", 64)
    errors = {}
    for search in ("absmax", "mse", "diagh"):
        options = gptq.Options(scale_search=search)
        q = gptq.quantize(w, scheme, stats, options=options, scale_dtype=torch.bfloat16, notes=Notes())
        assert q.qparams.scale_NG.dtype == torch.bfloat16
        errors[search] = output_error(w, q, stats)
    nearest = rtn.quantize(w, scheme, None, options=rtn.Options(), scale_dtype=torch.bfloat16, notes=Notes())
    assert errors["diagh"] < errors["mse"] < errors["absmax"] < output_error(w, nearest, stats)


def test_stacked_rows_get_the_codes_they_get_alone():
    w, stats = layer(40, 64, 500)
    scheme = TensorScheme("int4", "group", 32, symmetric=False)

    def run(part):
        return gptq.quantize(
            part, scheme, stats, options=gptq.Options(), scale_dtype=torch.float32, notes=Notes()
        ).codes_NK

    assert torch.equal(run(w), torch.cat([run(w[:16]), run(w[16:])]))


def test_dead_channels_are_rounded_and_told():
    w, stats = layer(8, 32, 300)
    assert stats.gram_KK is not None
    stats.gram_KK[5] = 0
    stats.gram_KK[:, 5] = 0
    notes = Notes()
    scheme = TensorScheme("int4", "group", 32)
    q = gptq.quantize(w, scheme, stats, options=gptq.Options(), scale_dtype=torch.float32, notes=notes)
    assert torch.equal(q.codes_NK[:, 5], numerics.quantize(w, q.qparams, scheme).codes_NK[:, 5])
    assert any("1 of 32 input channels" in line for line in notes.lines)


def test_a_hessian_that_cannot_be_factored_climbs_the_ladder_aloud():
    w, stats = layer(8, 32, 300)
    assert stats.gram_KK is not None
    indefinite = stats.gram_KK - 0.3 * stats.gram_KK.diagonal().mean() * torch.eye(32)
    indefinite.diagonal().clamp_(min=1e-3)
    notes = Notes()
    scheme = TensorScheme("int4", "group", 32)
    gptq.quantize(w, scheme, Stats(1, indefinite), options=gptq.Options(), scale_dtype=torch.float32, notes=notes)
    assert any("not positive definite" in line and "dampening" in line for line in notes.lines)
    notes = Notes()
    hopeless = torch.full((32, 32), 1e4).fill_diagonal_(1.0)
    q = gptq.quantize(w, scheme, Stats(1, hopeless), options=gptq.Options(), scale_dtype=torch.float32, notes=notes)
    assert any("rounded to nearest" in line for line in notes.lines)
    assert torch.equal(q.codes_NK, numerics.quantize(w, q.qparams, scheme).codes_NK)


def test_missing_or_broken_statistics_are_refused():
    w, _ = layer(4, 8, 100)
    scheme = TensorScheme("int4", "channel")
    kwargs: dict[str, Any] = {"options": gptq.Options(), "scale_dtype": torch.float32, "notes": Notes()}
    with pytest.raises(InputError, match="needs calibration data"):
        gptq.quantize(w, scheme, None, **kwargs)
    with pytest.raises(InputError, match="NaN or Inf"):
        gptq.quantize(w, scheme, Stats(1, torch.full((8, 8), float("nan"))), **kwargs)


def test_signed_scales_lower_the_error_and_keep_the_grid():
    w, stats = layer(32, 64, 512)
    scheme = TensorScheme("int3", "group", 32)
    run: dict[str, Any] = {"scale_dtype": torch.bfloat16, "notes": Notes()}
    plain = gptq.quantize(w, scheme, stats, options=gptq.Options(), **run)
    signed = gptq.quantize(w, scheme, stats, options=gptq.Options(signed_scales=True), **run)
    share = float((signed.qparams.scale_NG < 0).float().mean())
    assert 0.2 < share < 0.8
    assert output_error(w, signed, stats) < 0.95 * output_error(w, plain, stats)
    with pytest.raises(InputError, match="scale_search is mse or diagh, not absmax"):
        gptq.quantize(w, scheme, stats, options=gptq.Options(signed_scales=True, scale_search="absmax"), **run)


def test_the_shift_is_the_least_squares_solution():
    """argmin over V of |W x' - V x|² by lstsq on the tokens themselves, float64, with next to no dampening."""
    g = torch.Generator().manual_seed(3)
    n, k, tokens = 6, 16, 400
    dense = torch.randn(tokens, k, generator=g) @ torch.randn(k, k, generator=g)
    x = dense + 0.3 * torch.randn(tokens, k, generator=g)
    w = torch.randn(n, k, generator=g)
    stats = Stats(tokens, gram_KK=x.T @ x / tokens, drift_KK=(dense - x).T @ x / tokens)
    best = torch.linalg.lstsq(x.double(), dense.double() @ w.double().T).solution.T
    for order in (None, torch.randperm(k, generator=g)):
        hessian = gram(stats) if order is None else gram(stats)[order][:, order]
        factored = gptq._factor(hessian, None, 1e-9, Notes())
        assert factored is not None
        upper, _ = factored
        shifted = gptq._shifted(w, stats, upper, order, 1.0)
        assert (shifted.double() - best).norm() / best.norm() < 1e-4
        half = gptq._shifted(w, stats, upper, order, 0.5)
        assert torch.allclose(half, (w + shifted) / 2, atol=1e-5)


def test_a_shift_makes_up_for_what_came_before():
    g = torch.Generator().manual_seed(4)
    w, _ = layer(32, 64, 10)
    dense = torch.randn(1024, 64, generator=g) @ torch.randn(64, 64, generator=g)
    x = dense + 0.5 * torch.randn(1024, 64, generator=g) @ torch.randn(64, 64, generator=g)
    stats = Stats(1024, gram_KK=x.T @ x / 1024, drift_KK=(dense - x).T @ x / 1024)
    scheme = TensorScheme("int4", "group", 32)

    def missed(share: float) -> float:
        options = gptq.Options(pre_shift=share)
        q = gptq.quantize(w, scheme, stats, options=options, scale_dtype=torch.bfloat16, notes=Notes())
        return float((dense @ w.T - x @ numerics.dequantize(q).T).square().sum())

    assert missed(1.0) < missed(0.5) < missed(0.0)
    assert gptq.needs(gptq.Options(pre_shift=0.5)) == {"gram", "drift"}
    with pytest.raises(InputError, match="pre_shift needs what the dense model has"):
        gptq.quantize(
            w,
            scheme,
            Stats(9, gram_KK=stats.gram_KK),
            options=gptq.Options(pre_shift=0.5),
            scale_dtype=torch.float32,
            notes=Notes(),
        )


def test_rounding_can_weigh_scales_by_the_inputs():
    w, stats = layer(32, 64, 512)
    scheme = TensorScheme("int3", "group", 32)
    run: dict[str, Any] = {"scale_dtype": torch.bfloat16, "notes": Notes()}
    energy = Stats(512, energy_K=gram(stats).diagonal().clone())
    plain = rtn.quantize(w, scheme, None, options=rtn.Options(), **run)
    weighted = rtn.quantize(w, scheme, energy, options=rtn.Options(scale_search="diagh"), **run)
    assert output_error(w, weighted, stats) < output_error(w, plain, stats)
    assert rtn.needs(rtn.Options(scale_search="diagh")) == {"energy"} and not rtn.needs(rtn.Options())
    with pytest.raises(InputError, match="the mean square of this layer's inputs"):
        rtn.quantize(w, scheme, None, options=rtn.Options(scale_search="diagh"), **run)


@pytest.mark.parametrize(
    "scheme",
    [
        TensorScheme("int4", "group", 32),
        TensorScheme("int4", "group", 32, symmetric=False),
        TensorScheme("int3", "channel"),
        TensorScheme("mxfp4", "group", 32),
        TensorScheme("fp8_e4m3", "channel"),
    ],
    ids=lambda scheme: f"{scheme.number}-{scheme.strategy}-{scheme.symmetric}",
)
def test_rounding_can_choose_scales_by_the_output(scheme: TensorScheme):
    """Of each group's part of the output, no choice of another search has a smaller error; all rows at once or few."""
    w, stats = layer(48, 64, 512)
    run: dict[str, Any] = {"scale_dtype": torch.bfloat16, "notes": Notes()}
    found = rtn.quantize(w, scheme, stats, options=rtn.Options(), **run)
    size = 64 if scheme.strategy == "channel" else 32

    def errors(q: QuantizedTensor) -> torch.Tensor:
        missed = (numerics.dequantize(q) - w.float()).double().view(48, -1, size)
        blocks = torch.stack([gram(stats)[i : i + size, i : i + size] for i in range(0, 64, size)]).double()
        return torch.einsum("ngi,gij,ngj->ng", missed, blocks, missed)

    others = [rtn.quantize(w, scheme, stats, options=rtn.Options(scale_search=x), **run) for x in ("mse", "diagh")]
    for other in others:
        assert bool((errors(found) <= errors(other) * (1 + 1e-5)).all())
    assert min(float(errors(other).sum()) for other in others) > 1.01 * float(errors(found).sum())
    asked = rtn.quantize(w, scheme, stats, options=rtn.Options(scale_search="output"), **run)
    assert torch.equal(asked.codes_NK.float(), found.codes_NK.float()), "auto is output where H is known"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_output, "ELEMENTS", {"cpu": 5 * 64})
        few = rtn.quantize(w, scheme, stats, options=rtn.Options(), **run)
    assert torch.equal(few.qparams.scale_NG, found.qparams.scale_NG)


def test_rounding_by_the_output_needs_it_and_one_scale_a_group():
    w, stats = layer(32, 64, 512)
    run: dict[str, Any] = {"scale_dtype": torch.bfloat16, "notes": Notes()}
    assert rtn.needs(rtn.Options(scale_search="output")) == {"gram"}
    with pytest.raises(InputError, match="scale_search output needs calibration data"):
        rtn.quantize(w, TensorScheme("int4", "group", 32), None, options=rtn.Options(scale_search="output"), **run)
    for scheme in (TensorScheme("nvfp4", "group", 16), TensorScheme("int8", "tensor")):
        found, weighted = (
            rtn.quantize(w, scheme, stats, options=rtn.Options(scale_search=x), **run) for x in ("output", "diagh")
        )
        assert torch.equal(found.codes_NK.float(), weighted.codes_NK.float())
