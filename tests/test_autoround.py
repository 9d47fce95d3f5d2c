"""AutoRound: its gradients against autograd, its result against brute force, and what it leaves behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from quantkit import numerics
from quantkit.algorithms import autoround, gptq, rtn
from quantkit.algorithms._signsgd import Rounding, grid_step
from quantkit.errors import InputError
from quantkit.numerics._activations import fake_quantize
from quantkit.progress import Silent
from quantkit.types import Notes, QuantizedTensor, Stats, TensorScheme

INT4 = TensorScheme("int4", "group", 16)
KEYWORDS: dict[str, Any] = {"scale_dtype": torch.float32}


def layer(n: int, k: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, Stats]:
    """A weight and the second moments of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=g) @ (torch.randn(k, k, generator=g) * torch.linspace(1, 0.05, k))
    return torch.randn(n, k, generator=g) * 0.05, Stats(tokens, x.T @ x / tokens)


def output_error(w: torch.Tensor, q: QuantizedTensor, stats: Stats) -> torch.Tensor:
    """Of each row, float64."""
    assert stats.gram_KK is not None
    d = w.double() - numerics.dequantize(q).double()
    return ((d @ stats.gram_KK.double()) * d).sum(1)


def solve(w: torch.Tensor, scheme: TensorScheme, stats: Stats | None, **options: Any) -> QuantizedTensor:
    return autoround.quantize(
        w, scheme, stats, options=autoround.Options(**options), notes=Notes(), scale_dtype=torch.bfloat16
    )


def nearest(w: torch.Tensor, scheme: TensorScheme, stats: Stats, search: Any) -> QuantizedTensor:
    options = rtn.Options(scale_search=search)
    return rtn.quantize(w, scheme, stats, options=options, scale_dtype=torch.bfloat16, notes=Notes())


# One layer


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("number", ["int2", "int3", "int4"])
def test_it_beats_nearest_codes_whatever_their_scales(number, symmetric):
    w, stats = layer(24, 64, 800, seed=int(number[3:]))
    scheme = TensorScheme(number, "group", 32, symmetric)
    rounded = {s: float(output_error(w, nearest(w, scheme, stats, s), stats).sum()) for s in ("absmax", "mse", "diagh")}
    for init in ("absmax", "mse", "diagh", "gptq"):
        found = float(output_error(w, solve(w, scheme, stats, init=init), stats).sum())
        assert found < 0.9 * min(rounded.values()), (init, found, rounded)


@pytest.mark.parametrize("init", ["gptq", "mse"])
def test_close_to_the_best_of_all_codes(init):
    """Rows of 4 columns at 2 bits: under the scales that it chose, all 256 roundings of each row are tried."""
    w, stats = layer(12, 4, 60, seed=3)
    scheme = TensorScheme("int2", "channel")
    q = solve(w, scheme, stats, init=init)
    grid = torch.tensor(list(itertools.product(range(-2, 2), repeat=4)), dtype=torch.float64)
    d = w.double()[:, None] - grid[None] * q.qparams.scale_NG.double()[:, None]
    assert stats.gram_KK is not None
    best = ((d @ stats.gram_KK.double()) * d).sum(-1).min(1).values
    found = output_error(w, q, stats)
    assert (best <= found * (1 + 1e-6)).all()
    assert found.sum() <= 1.3 * best.sum()
    assert found.sum() < 0.9 * output_error(w, nearest(w, scheme, stats, "mse"), stats).sum()


@pytest.mark.parametrize("rate", [None, 0.5])
@pytest.mark.parametrize(
    "scheme",
    [
        TensorScheme("int3", "group", 16),
        TensorScheme("int4", "channel", symmetric=False),
        TensorScheme("int4", "tensor"),
        TensorScheme("fp8_e4m3", "block", block_shape=(16, 32)),
        TensorScheme("nvfp4", "group", 16),
        TensorScheme("mxfp4", "group", 32),
    ],
    ids=lambda s: f"{s.number}-{s.strategy}" if isinstance(s, TensorScheme) else None,
)
def test_no_row_is_worse_than_its_start(scheme, rate):
    """Also with a rate that throws codes about: rows that share no scale keep their own best."""
    w, stats = layer(20, 64, 300, seed=7)
    start = nearest(w, scheme, stats, "mse")
    before = output_error(w, start, stats)
    q = solve(w, scheme, stats, init="mse", iterations=30, learning_rate=rate)
    after = output_error(w, q, stats)
    if scheme.strategy == "tensor":  # one scale for all rows: they are judged together
        before, after = before.sum(), after.sum()
    else:
        assert after.sum() < before.sum()
    assert (after <= before * (1 + 1e-5)).all()


def test_rows_that_share_a_scale_are_tuned_together():
    w, stats = layer(20, 64, 300, seed=7)
    scheme = TensorScheme("int4", "tensor")
    start = nearest(w, scheme, stats, "mse")
    q = solve(w, scheme, stats, init="mse")
    assert output_error(w, q, stats).sum() < 0.97 * output_error(w, start, stats).sum()
    assert float(q.qparams.scale_NG) != float(start.qparams.scale_NG)


def test_gptq_is_not_made_worse():
    w, stats = layer(24, 64, 600)
    scheme = TensorScheme("int3", "group", 32)
    start = gptq.quantize(w, scheme, stats, options=gptq.Options(), scale_dtype=torch.bfloat16, notes=Notes())
    q = solve(w, scheme, stats, init="gptq")
    assert (output_error(w, q, stats) <= output_error(w, start, stats) * (1 + 1e-5)).all()


def test_statistics_that_are_missing_or_broken_are_refused():
    w, _ = layer(4, 16, 50)
    with pytest.raises(InputError, match="needs calibration data"):
        solve(w, INT4, None)
    with pytest.raises(InputError, match="NaN or Inf"):
        solve(w, INT4, Stats(1, torch.full((16, 16), float("nan"))))


@pytest.mark.parametrize(
    "wrong",
    [{"iterations": 0}, {"learning_rate": 0.0}, {"learning_rate": 0.7}, {"init": "zeros"}, {"seed": -1}, {"epochs": 2}],
    ids=str,
)
def test_bad_options_are_refused(wrong):
    with pytest.raises(ValidationError):
        autoround.Options(**wrong)


# The gradients


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Rounds; the gradient passes."""
    return x + (x.round() - x).detach()


def written_out(
    w: torch.Tensor, start: QuantizedTensor, v: torch.Tensor, upper: torch.Tensor, lower: torch.Tensor
) -> torch.Tensor:
    """The decoded weight as the paper writes it, in float64, for autograd."""
    bits = int(start.scheme.number[3:])
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    s0, z0 = start.qparams.scale_NG.double(), start.qparams.zero_NG
    if z0 is None:
        s, z = s0 * upper, torch.zeros_like(s0)
    else:
        top, bottom = (high - z0.double()) * s0 * upper, (low - z0.double()) * s0 * lower
        s = (top - bottom) / (high - low)
        z = rounded(low - bottom / s)
    width = w.shape[1] // s.shape[1]
    s, z = (t.expand(len(w), -1).repeat_interleave(width, 1) for t in (s, z))
    return ((rounded(w.double() / s + v) + z).clamp(low, high) - z) * s


@pytest.mark.parametrize("number", ["int2", "int4"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_steps_follow_the_gradients_of_the_written_out_form(number, symmetric, strategy):
    """Three steps, so that offsets and factors are no longer where they began, then signs against autograd."""
    g = torch.Generator().manual_seed(5)
    w = torch.randn(12, 32, generator=g)
    scheme = TensorScheme(number, strategy, 16 if strategy == "group" else None, symmetric)
    # scales that clip the largest weights
    qparams = numerics.get(number).qparams(w * 0.6, scheme, scale_dtype=torch.float32)
    rounding = Rounding(w, numerics.quantize(w, qparams, scheme))
    for _ in range(3):
        rounding.descend(torch.randn(12, 32, generator=g), 0.07)
    one = torch.ones_like(qparams.scale_NG)
    assert rounding.upper is not None and (rounding.lower is None) == symmetric
    v = rounding.offset.double().requires_grad_()
    upper = rounding.upper.double().requires_grad_()
    lower = (one if rounding.lower is None else rounding.lower).double().requires_grad_()
    decoded = written_out(w, rounding.start, v, upper, lower)
    torch.testing.assert_close(numerics.dequantize(rounding.quantized), decoded.float(), rtol=1e-5, atol=1e-6)
    gradient = torch.randn(12, 32, generator=g)
    wanted = torch.autograd.grad((decoded * gradient).sum(), [v, upper, lower], allow_unused=True)
    before = [
        rounding.offset.clone(),
        rounding.upper.clone(),
        None if rounding.lower is None else rounding.lower.clone(),
    ]
    rounding.descend(gradient, 0.001)
    for was, now, grad in zip(before, [rounding.offset, rounding.upper, rounding.lower], wanted, strict=True):
        if was is None or now is None:
            continue
        assert grad is not None and grad.abs().max() > 0
        # Offsets stop at a half; what a zero point's own rounding adds to a clear gradient is left out.
        felt = (grad.abs() > (1e-4 if was is before[0] else 0.02 * grad.abs().max())) & (was.abs() != 0.5)
        assert felt.any()
        assert torch.equal(torch.sign(now - was)[felt], -torch.sign(grad).float()[felt])


@pytest.mark.parametrize("number", sorted(numerics.registry()))
def test_half_a_step_reaches_the_neighbour_on_either_side(number):
    """Over every value of the grid and the middle between them: the step is the distance of the two around it."""
    group = 16 if number == "nvfp4" else 32
    scheme = TensorScheme(number, "group", group)
    small = torch.linspace(-34, 0, 3200).exp2()
    points = torch.cat([torch.linspace(-1, 1, 1600), small, -small]).reshape(-1, group).clone()
    points[:, 0] = 1.0  # one scale for all
    qparams = numerics.get(number).qparams(points, scheme, scale_dtype=torch.float32)

    def nearest_value(x: torch.Tensor) -> torch.Tensor:
        row = x.repeat(-(-points.numel() // len(x)))[: points.numel()].reshape(points.shape)
        return numerics.dequantize(numerics.quantize(row, qparams, scheme)).flatten()[: len(x)]

    grid = numerics.dequantize(numerics.quantize(points, qparams, scheme)).unique()
    low, high = grid[:-1], grid[1:]
    assert len(low) < points.numel()
    middle = low * 0.4 + high * 0.6
    whole = middle.repeat(-(-points.numel() // len(low)))[: points.numel()].reshape(points.shape)
    step = grid_step(whole, qparams, scheme).flatten()[: len(low)]
    torch.testing.assert_close(step, high - low, rtol=1e-4, atol=0)
    torch.testing.assert_close(nearest_value(middle - 0.49 * step), low)
    torch.testing.assert_close(nearest_value(middle + 0.49 * step), high)


@pytest.mark.parametrize("number", ["int3", "nvfp4", "mxfp4", "fp8_e4m3"])
def test_offsets_start_where_the_start_has_its_codes(number):
    """Whatever codes it starts with: random ones too."""
    w, _ = layer(16, 64, 100)
    scheme = TensorScheme(number, "group", 16 if number == "nvfp4" else 32)
    qparams = numerics.get(number).qparams(w, scheme, scale_dtype=torch.bfloat16)
    far = numerics.quantize(
        w + 0.03 * torch.randn(w.shape, generator=torch.Generator().manual_seed(2)), qparams, scheme
    )
    rounding = Rounding(w, far)
    again = numerics.quantize(rounding.w, qparams, scheme)
    assert torch.equal(numerics.dequantize(again), numerics.dequantize(far))
    kept = Rounding(w, numerics.quantize(w, qparams, scheme))
    assert torch.equal(kept.w, w)


# A block


class Block(nn.Module):
    """Gate, up and down around a residual, and an expert that few or no tokens go to."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(11)
        self.gate, self.up = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
        self.down, self.idle = nn.Linear(48, 32, bias=False), nn.Linear(32, 32, bias=False)
        for p in self.parameters():
            p.data = (torch.randn(p.shape, generator=g) * 0.2).to(dtype)
            p.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Case:
    """A block, its stacks and its data; `forward` may be given another behaviour."""

    def __init__(self, scheme: TensorScheme, dtype: torch.dtype = torch.float32, **stack: Any) -> None:
        g = torch.Generator().manual_seed(4)
        self.block = Block(dtype)
        mix = torch.randn(32, 32, generator=g) / 6
        self.dense = [(torch.randn(4, 20, 32, generator=g) @ mix).to(dtype) for _ in range(5)]
        self.inputs = [x + 0.02 * torch.randn(x.shape, generator=g).to(dtype) for x in self.dense]
        self.masks = [torch.arange(20)[None] < torch.tensor([20, 20, 13, 9])[:, None] for _ in self.dense]
        self.targets = [self.block(x) for x in self.dense]
        self.seen: list[list[torch.Tensor]] = []
        hidden = [nn.functional.silu(self.block.gate(x)) * self.block.up(x) for x in self.inputs]
        self.stacks = [
            autoround.Stack(modules, scheme, stats, torch.bfloat16, **stack)
            for modules, stats in (
                ((self.block.gate, self.block.up), self.stats(self.inputs)),
                ((self.block.down,), self.stats(hidden)),
                ((self.block.idle,), self.stats(self.inputs)),
            )
        ]

    def stats(self, inputs: list[torch.Tensor]) -> Stats:
        x = torch.cat([x[m] for x, m in zip(inputs, self.masks, strict=True)]).float()
        return Stats(len(x), x.T @ x / len(x))

    def forward(self, i: int) -> torch.Tensor:
        self.seen.append([s.modules[0].weight.detach().clone() for s in self.stacks])
        return self.block(self.inputs[i])

    def run(self, forward: Callable[[int], torch.Tensor] | None = None, **options: Any) -> autoround.Tuned:
        data = autoround.Data(
            len(self.inputs), forward or self.forward, lambda i: self.targets[i], lambda i: self.masks[i]
        )
        self.notes = Notes()
        settings = autoround.Options(**{"iterations": 60, "init": "mse", **options})
        with torch.no_grad():  # as its caller does
            return autoround.quantize_block(self.stacks, data, options=settings, notes=self.notes, progress=Silent())

    def error(self, weights: tuple[QuantizedTensor, ...]) -> float:
        """Relative squared error of the block's output, float64, real tokens only."""
        block = Block().double()
        for stack, q in zip(self.stacks, weights, strict=True):
            parts = numerics.dequantize(q).split([m.out_features for m in stack.modules])
            for m, part in zip(stack.modules, parts, strict=True):
                name = next(n for n, mine in self.block.named_children() if mine is m)
                block.get_submodule(name).weight.data = part.double()
        error = whole = 0.0
        for x, y, mask in zip(self.inputs, self.targets, self.masks, strict=True):
            error += float((block(x.double()) - y)[mask].square().sum())
            whole += float(y.double()[mask].square().sum())
        return error / whole


def starts(case: Case, init: str) -> tuple[QuantizedTensor, ...]:
    """What every stack has before the first step."""
    found = []
    for s in case.stacks:
        w = torch.cat([m.weight for m in s.modules])
        if init == "gptq":
            q = gptq.quantize(w, s.scheme, s.stats, options=gptq.Options(), scale_dtype=s.scale_dtype, notes=Notes())
        else:
            assert s.stats is not None
            q = nearest(w, s.scheme, s.stats, init)
        found.append(q)
    return tuple(found)


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    return torch.equal(numerics.dequantize(a), numerics.dequantize(b))


@pytest.mark.parametrize("init", ["gptq", "diagh", "mse", "absmax"])
@pytest.mark.parametrize(
    "scheme", [INT4, TensorScheme("int2", "group", 16), TensorScheme("int3", "channel", symmetric=False)], ids=str
)
def test_the_blocks_error_falls_below_its_start(scheme, init):
    case = Case(scheme)
    tuned = case.run(init=init)
    start = starts(case, init)
    assert tuned.error_before == pytest.approx(case.error(start), rel=1e-4)
    assert tuned.error == pytest.approx(case.error(tuned.weights), rel=1e-4)
    assert tuned.error <= tuned.error_before
    if init != "gptq":  # whose codes are hard to better where inputs are as correlated as here
        assert tuned.error < 0.9 * tuned.error_before and not case.notes.lines
    assert same(tuned.weights[2], start[2]), "no token went there"
    for stack, q in zip(case.stacks, tuned.weights, strict=True):
        assert q.shape == (sum(m.out_features for m in stack.modules), stack.modules[0].in_features)
        assert q.qparams.scale_NG.dtype == torch.bfloat16 and q.scheme == scheme


@pytest.mark.parametrize(
    "scheme", [TensorScheme("nvfp4", "group", 16), TensorScheme("mxfp4", "group", 32)], ids=lambda s: s.number
)
def test_floats_of_few_bits_keep_their_scales(scheme):
    case = Case(replace(scheme, group_size=16)) if scheme.number == "nvfp4" else Case(scheme)
    case.stacks = [s for s in case.stacks if s.modules[0].in_features % (scheme.group_size or 1) == 0]
    start, tuned = starts(case, "mse"), case.run(init="mse")
    assert tuned.error < 0.95 * tuned.error_before
    for a, b in zip(start, tuned.weights, strict=True):
        assert torch.equal(a.qparams.scale_NG.view(torch.uint8), b.qparams.scale_NG.view(torch.uint8))


def test_the_result_decodes_to_a_weight_that_the_block_ran_with():
    case = Case(TensorScheme("int3", "group", 16, symmetric=False))
    tuned = case.run()
    decoded = [
        numerics.dequantize(q)[: s.modules[0].out_features] for q, s in zip(tuned.weights, case.stacks, strict=True)
    ]
    assert any(all(torch.equal(a, b) for a, b in zip(decoded, seen, strict=True)) for seen in case.seen)


def test_the_same_seed_gives_the_same_bytes():
    scheme = TensorScheme("int3", "group", 16)
    one, two, other = Case(scheme).run(), Case(scheme).run(), Case(scheme).run(seed=1)
    assert all(same(a, b) for a, b in zip(one.weights, two.weights, strict=True))
    assert (one.error, one.error_before) == (two.error, two.error_before)
    assert not same(one.weights[0], other.weights[0])


def test_padding_counts_for_nothing():
    clean, dirty = Case(INT4), Case(INT4)
    for y, x, mask in zip(dirty.targets, dirty.inputs, dirty.masks, strict=True):
        y[~mask] = 1e6
        x[~mask] = 50.0
    a, b = clean.run(), dirty.run()
    assert a.error == b.error and all(same(p, q) for p, q in zip(a.weights, b.weights, strict=True))


def test_inputs_are_rounded_as_the_engine_will():
    token = TensorScheme("int8", "token", dynamic=True)
    plain, case = Case(INT4), Case(INT4, activations=token)
    tuned = case.run(iterations=1, init="mse")
    first = starts(case, "mse")
    gate_up, down, _ = (numerics.dequantize(q) for q in first)
    error = whole = 0.0
    for x, y, mask in zip(case.inputs, case.targets, case.masks, strict=True):
        gate, up = (fake_quantize(x, token) @ gate_up.T).chunk(2, -1)
        out = x + fake_quantize(nn.functional.silu(gate) * up, token) @ down.T
        error, whole = error + float((out - y)[mask].square().sum()), whole + float(y[mask].square().sum())
    assert tuned.error_before == pytest.approx(error / whole, rel=1e-4)
    assert tuned.error_before != plain.run(iterations=1, init="mse").error_before


def test_a_stored_input_scale_is_used():
    static = TensorScheme("fp8_e4m3", "tensor")
    fine = Case(INT4, activations=static, input_scale=torch.tensor([0.01])).run(iterations=1)
    coarse = Case(INT4, activations=static, input_scale=torch.tensor([0.001])).run(iterations=1)
    assert coarse.error_before > fine.error_before  # 0.448 is the largest input that the smaller scale can say
    with pytest.raises(InputError, match="static_scale"):
        Case(INT4, activations=static).run(iterations=1)


def test_bfloat16_blocks_are_tuned_too():
    case = Case(TensorScheme("int3", "group", 16), torch.bfloat16)
    tuned = case.run()
    assert tuned.error < 0.9 * tuned.error_before


@pytest.mark.parametrize("ends", ["well", "at the first look", "in a step", "in a later look"])
def test_the_module_is_as_before(ends):
    case = Case(INT4, activations=TensorScheme("int8", "token", dynamic=True))
    before = dict(case.block.named_parameters())
    values = {name: p.clone() for name, p in before.items()}
    calls = {"well": 10**9, "at the first look": 2, "in a step": 7, "in a later look": 5 + 15 + 3}[ends]
    count = itertools.count(1)

    def forward(i: int) -> torch.Tensor:
        if next(count) == calls:
            raise KeyboardInterrupt
        return case.forward(i)

    if ends == "well":
        case.run(forward)
    else:
        with pytest.raises(KeyboardInterrupt):
            case.run(forward)
    after = dict(case.block.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] and torch.equal(after[name], values[name]) for name in before)
    assert not any(p.requires_grad for p in after.values())
    assert not any(m._forward_pre_hooks for m in case.block.modules())


def test_a_start_that_cannot_be_bettered_is_kept_and_told():
    """The target is what the start gives: its error is 0."""
    case = Case(INT4)
    start = starts(case, "mse")
    block = Block()
    for name, q in zip(("down", "idle"), start[1:], strict=True):
        block.get_submodule(name).weight.data = numerics.dequantize(q)
    block.gate.weight.data, block.up.weight.data = numerics.dequantize(start[0]).split(48)
    case.targets = [block(x) for x in case.inputs]
    tuned = case.run(init="mse")
    assert tuned.error_before == tuned.error == 0
    assert all(same(a, b) for a, b in zip(start, tuned.weights, strict=True))
    assert any("stays as it started" in line for line in case.notes.lines)


def test_a_block_that_gives_nan_is_refused():
    case = Case(INT4)
    with pytest.raises(InputError, match="NaN or Inf"):
        case.run(lambda i: case.forward(i) * float("nan"))


def test_two_bits_become_usable():
    """W2 in groups of 16: what nearest codes lose, nearly halved, and less than what GPTQ loses."""
    case = Case(TensorScheme("int2", "group", 16))
    plain, solved = case.error(starts(case, "mse")), case.error(starts(case, "gptq"))
    tuned = case.run(iterations=200, learning_rate=0.02).error
    assert tuned < 0.6 * plain and tuned < 0.95 * solved
