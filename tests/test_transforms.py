"""AWQ and SmoothQuant choose the scales that their papers define: against direct computation on the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from quantkit import algorithms, numerics, transforms
from quantkit.errors import InputError
from quantkit.links import Link
from quantkit.numerics import _activations
from quantkit.stats import KNOWN, Observer
from quantkit.transforms import Consumer, awq, output_error, rounded, rounding_error, smoothquant, spread, stacked
from quantkit.types import Notes, Scheme, Stats, TensorScheme

W4 = Scheme(TensorScheme("int4", "group", 32))
INT8 = TensorScheme("int8", "channel")
W8A8 = Scheme(INT8, TensorScheme("int8", "token", dynamic=True))


def tokens(k: int = 64, m: int = 512, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Correlated inputs (M, K), a few channels much louder than the others."""
    generator = torch.Generator().manual_seed(seed)
    loud = torch.exp(torch.randn(k, generator=generator))
    loud[torch.randperm(k, generator=generator)[:3]] *= 20
    mixed = torch.randn(m, 8, generator=generator) @ torch.randn(8, k, generator=generator)
    return ((mixed + torch.randn(m, k, generator=generator)) * loud).to(dtype)


def observed(x: torch.Tensor, needs: frozenset[str] = KNOWN - {"magnitudes", "drift"}) -> Stats:
    observer = Observer(needs, x.shape[1], "cpu")
    observer.update(x)
    return observer.result()


def consumer(n: int, k: int = 64, seed: int = 1, scheme: Scheme | None = W4, share: float = 1.0) -> Consumer:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / k**0.5
    return Consumer(f"layer{seed}", w, scheme, torch.bfloat16, share)


def chosen(module: ModuleType, consumers: list[Consumer], stats: Stats, options: dict[str, Any], **more: Any) -> Any:
    return module.scales(consumers, stats, options=module.Options(**options), notes=Notes(), **more)


def output_loss(consumers: list[Consumer], x: torch.Tensor, s: torch.Tensor, search: str) -> float:
    """The mean of |x Wᵀ - (x / s) Q(W s)ᵀ|² over tokens, in float64, one consumer at a time."""
    total = 0.0
    for c in consumers:
        if c.scheme is not None:
            q = rounded(c.weight_NK * s, c.scheme.weights, c.scale_dtype, search).double()
            missed = x.double() @ c.weight_NK.double().T - (x.double() / s.double()) @ q.T
            total += c.share * float(missed.square().sum()) / len(x)
    return total


# What they share ------------------------------------------------------------------------------------------------------


def test_they_are_found_by_name_and_ask_for_what_there_is() -> None:
    assert {"awq", "rotation", "smoothquant"} <= set(transforms.names()) and "_fold" not in transforms.names()
    with pytest.raises(InputError, match=r"unknown transform 'awk'; known: awq, "):
        transforms.get("awk")
    assert not set(transforms.names()) & set(algorithms.names())
    for name in transforms.names():
        module = transforms.get(name)
        assert module.needs(module.Options()) <= KNOWN
        assert all(field.description for field in module.Options.model_fields.values())
        assert module.Options.model_config["extra"] == "forbid" and module.Options.model_config["frozen"]


@pytest.mark.parametrize("scheme", [TensorScheme("int4", "group", 32), TensorScheme("int3", "group", 64, False), INT8])
def test_the_gram_matrix_tells_the_error_of_the_outputs(scheme: TensorScheme) -> None:
    x = tokens(dtype=torch.float64)
    w, s = consumer(40).weight_NK, torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(3)))
    delta = rounded(w * s, scheme, torch.bfloat16, "mse").double() / s.double() - w.double()
    by_gram = output_error(delta, x.T @ x / len(x))
    direct = (x @ delta.T).square().mean(0)
    assert by_gram.dtype == torch.float64
    assert float(((by_gram - direct) / direct).abs().max()) < 1e-12
    assert float(by_gram.sum() / direct.sum() - 1) == pytest.approx(0, abs=1e-12)


def test_the_error_of_several_consumers_is_their_sum() -> None:
    x, s = tokens(), torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(3)))
    w8, block = Scheme(INT8), Scheme(TensorScheme("fp8_e4m3", "block", block_shape=(32, 32)))
    consumers = [
        consumer(20, seed=1),
        consumer(7, seed=2, scheme=w8, share=0.25),
        consumer(9, seed=3, scheme=None),
        consumer(12, seed=4),
        consumer(40, seed=5, scheme=block),
        consumer(40, seed=6, scheme=block),
    ]
    # Tiles of rows stay inside a weight; weights of one scheme and strategy otherwise are judged together.
    assert sorted(len(stack.weight_NK) for stack in stacked(consumers)) == [7, 32, 40, 40]
    found = rounding_error(consumers, s, observed(x).gram_KK, "absmax")  # type: ignore[arg-type]
    assert found == pytest.approx(output_loss(consumers, x, s, "absmax"), rel=1e-5)


def test_what_does_not_fit_at_once_is_judged_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, s = tokens(), torch.ones(64)
    consumers = [consumer(20, seed=i) for i in range(5)]
    gram = observed(x).gram_KK
    assert gram is not None
    whole = rounding_error(consumers, s, gram, "absmax")
    monkeypatch.setattr(transforms, "ELEMENTS", {"cpu": 45 * 64})
    assert [len(stack.weight_NK) for stack in stacked(consumers)] == [40, 40, 20]
    assert rounding_error(consumers, s, gram, "absmax") == pytest.approx(whole, rel=1e-6)


def test_columns_that_share_a_channel() -> None:
    link = Link("", "v", "linear", (0, 4), ("o",), head_dim=2, repeat=3)
    x = torch.arange(12.0)
    assert transforms.gathered(x, link.channels()).tolist() == [4, 5, 10, 11]
    s = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spread(s, link.channels()).tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]
    assert transforms.gathered(x, None) is x and spread(s, None) is s


# AWQ ------------------------------------------------------------------------------------------------------------------


def autoawq(consumers: list[Consumer], x: torch.Tensor, duo: bool, search: str) -> Iterator[tuple[float, torch.Tensor]]:
    """AutoAWQ's candidates, judged on the tokens themselves."""
    w = torch.cat([c.weight_NK for c in consumers]).abs()
    w_mean = (w.view(len(w), -1, 32) / w.view(len(w), -1, 32).amax(2, keepdim=True)).view(w.shape).mean(0)
    x_mean = x.abs().mean(0)
    for step in range(21):
        r = step / 20
        s = (x_mean**r / (w_mean ** (1 - r) + 1e-4) if duo else x_mean**r).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        yield output_loss(consumers, x, s, search), s


@pytest.mark.parametrize("duo", [True, False])
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_awq_takes_the_best_of_its_grid(duo: bool, search: str) -> None:
    x, consumers = tokens(), [consumer(24, seed=1), consumer(16, seed=2)]
    loss, best = min(autoawq(consumers, x, duo, search), key=lambda pair: pair[0])
    s = chosen(awq, consumers, observed(x), {"duo": duo, "search": search})
    assert s.shape == (64,) and s.dtype == torch.float32
    assert torch.allclose(s, best, rtol=1e-3)  # 1 + 1e-4 is divided by where the paper has no divisor
    assert loss < 0.8 * output_loss(consumers, x, torch.ones(64), search)


def test_awq_walks_to_less_error_with_less_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against both lines of AutoAWQ; on layers so small the error is rough, so over several of them."""
    calls = 0
    judged = awq.rounding_error

    def counted(*args: Any) -> float:
        nonlocal calls
        calls += 1
        return judged(*args)

    monkeypatch.setattr(awq, "rounding_error", counted)
    ratios = []
    for seed in range(6):
        x, consumers = tokens(seed=seed), [consumer(200, seed=seed + 10)]
        lines = min(loss for duo in (True, False) for loss, _ in autoawq(consumers, x, duo, "mse"))
        s = chosen(awq, consumers, observed(x), {})
        ratios.append(output_loss(consumers, x, s, "mse") / lines)
    assert sum(ratios) / 6 < 1.02 and max(ratios) < 1.15
    assert calls <= 6 * 25


def test_the_walk_of_awq() -> None:
    """Down a bowl to within the last step, along the axes and along a + b = const; never out of the square."""
    for target in ((0.1, 0.0), (0.6, 0.4), (0.97, 0.03), (0.0, 1.0)):
        seen: list[tuple[float, float]] = []

        def bowl(a: float, b: float, target: tuple[float, float] = target, seen: Any = seen) -> float:
            seen.append((a, b))
            u, v = a + b - sum(target), a - b - (target[0] - target[1])
            return 20 * u * u + v * v

        a, b = awq._walk(bowl, 20)
        assert max(abs(a - target[0]), abs(b - target[1])) < 0.07
        assert len(seen) == len(set(seen)) <= 25 and all(0 <= c <= 1 for point in seen for c in point)
    assert awq._walk(lambda a, b: a + b, 4) == (0, 0)


def test_awq_helps_what_is_rounded_afterwards() -> None:
    x, consumers = tokens(), [consumer(48)]
    stats = observed(x)
    s = chosen(awq, consumers, stats, {})
    for method in ("rtn", "gptq"):
        module = algorithms.get(method)

        def left(w: torch.Tensor, after: Stats, s: torch.Tensor, module: ModuleType = module) -> float:
            run = {"options": module.Options(), "scale_dtype": torch.bfloat16, "notes": Notes()}
            q = numerics.dequantize(module.quantize(w, W4.weights, after, **run))
            return float((x @ (q / s - consumers[0].weight_NK).T).square().sum())

        w = consumers[0].weight_NK
        assert left(w * s, stats.divided(s), s) < left(w, stats, torch.ones(64)), method


def test_awq_of_repeated_heads_has_one_scale_a_channel() -> None:
    """Four query heads of 16 read two heads of v."""
    link = Link("", "v", "linear", (0, 32), ("o",), head_dim=16, repeat=2)
    x, consumers = tokens(), [consumer(24)]
    s = chosen(awq, consumers, observed(x), {}, channels_K=link.channels())
    assert s.shape == (32,)
    ones = torch.ones(64)
    assert output_loss(consumers, x, link.spread(s), "mse") < 0.95 * output_loss(consumers, x, ones, "mse")


def test_awq_counts_what_is_rounded_by_the_tokens_that_reach_it() -> None:
    x = tokens()
    stats = observed(x)
    one, other = consumer(24, seed=1), consumer(24, seed=2)
    alone = chosen(awq, [one], stats, {})
    assert torch.equal(chosen(awq, [one, consumer(8, seed=3, scheme=None)], stats, {}), alone)
    assert torch.equal(chosen(awq, [one, replace(other, share=0.0)], stats, {}), alone)
    both = chosen(awq, [one, other], stats, {})
    assert not torch.equal(both, alone)
    assert torch.allclose(chosen(awq, [one, replace(other, share=1e-6)], stats, {}), alone, rtol=1e-3)
    assert chosen(awq, [replace(one, scheme=None)], stats, {}) is None


def test_awq_leaves_channels_alone_that_never_fired() -> None:
    x = tokens()
    x[:, 5] = 0
    s = chosen(awq, [consumer(24)], observed(x), {})
    assert s[5] == 1 and bool((s > 0).all()) and float(s.max() / s.min()) > 2
    assert chosen(awq, [consumer(24)], observed(torch.zeros(10, 64)), {}) is None


def test_awq_returns_none_when_nothing_is_better() -> None:
    exact = torch.tensor([1.0, -8.0, 7.0, 0.5]).repeat(8, 16)
    assert chosen(awq, [replace(consumer(8), weight_NK=exact.round())], observed(tokens()), {}) is None


@pytest.mark.parametrize("number", [("nvfp4", 16), ("mxfp4", 32)])
def test_awq_for_other_number_formats(number: tuple[str, int]) -> None:
    scheme = Scheme(TensorScheme(number[0], "group", number[1]))
    x, consumers = tokens(), [consumer(24, scheme=scheme)]
    s = chosen(awq, consumers, observed(x), {})
    assert output_loss(consumers, x, s, "mse") < output_loss(consumers, x, torch.ones(64), "mse")


# SmoothQuant ----------------------------------------------------------------------------------------------------------


def test_smoothquant_is_the_paper_s_formula() -> None:
    x = torch.tensor([[16.0, -1.0, 2.0, 0.0], [-4.0, 0.5, 2.0, 0.0]])
    weights = [torch.tensor([[1.0, 4.0, -2.0, 1.0]]), torch.tensor([[-0.25, 1.0, 8.0, 1.0]])]
    consumers = [Consumer(str(i), w, W8A8, torch.bfloat16) for i, w in enumerate(weights)]
    stats = observed(x, frozenset({"absmax"}))
    # sqrt(16 / 1), sqrt(1 / 4), sqrt(2 / 8), and a channel of which nothing is known
    assert chosen(smoothquant, consumers, stats, {"alpha": 0.5}).tolist() == [4.0, 0.5, 0.5, 1.0]
    assert chosen(smoothquant, consumers, stats, {"alpha": 1.0}).tolist() == [16.0, 1.0, 2.0, 1.0]
    s = chosen(smoothquant, consumers, stats, {"alpha": 0.75})
    assert s.tolist() == pytest.approx([16**0.75, 4**-0.25, 2**0.75 / 8**0.25, 1.0])
    router = Consumer("router", torch.full((1, 4), 100.0), None, torch.bfloat16)
    assert torch.equal(chosen(smoothquant, [*consumers, router], stats, {"alpha": 0.75}), s)
    assert chosen(smoothquant, [router], stats, {"alpha": 0.5}) is None


ACTIVATIONS = [
    TensorScheme("int8", "token", dynamic=True),
    TensorScheme("int8", "tensor"),
    TensorScheme("fp8_e4m3", "token", dynamic=True),
    TensorScheme("fp8_e4m3", "tensor"),
]


@pytest.mark.parametrize("activations", ACTIVATIONS, ids=lambda a: f"{a.number}-{a.strategy}")
def test_smoothquant_search_is_near_the_best_alpha(activations: TensorScheme) -> None:
    """Against the whole layer with both roundings, of which the search adds up the two parts."""
    weights = INT8 if activations.number == "int8" else TensorScheme("fp8_e4m3", "channel")
    x, consumers = tokens(m=900), [consumer(48, scheme=Scheme(weights, activations))]
    stats, w = observed(x), consumers[0].weight_NK

    def loss(s: torch.Tensor) -> float:
        static = smoothquant.static_scale(x.abs().amax(0) / s, activations, torch.bfloat16)
        a = _activations.fake_quantize(x / s, activations, static)
        return float((a @ rounded(w * s, weights, torch.bfloat16, "mse").T - x @ w.T).square().sum())

    each = [chosen(smoothquant, consumers, stats, {"alpha": alpha}) for alpha in smoothquant.ALPHAS]
    best = min(loss(s) for s in [torch.ones(64), *each])
    s = chosen(smoothquant, consumers, stats, {})
    found = loss(torch.ones(64) if s is None else s)
    assert found < 1.05 * best
    if activations.number == "int8":
        assert found < 0.5 * loss(torch.ones(64))


def test_smoothquant_of_repeated_heads_and_of_nvfp4() -> None:
    link = Link("", "v", "linear", (0, 32), ("o",), head_dim=16, repeat=2)
    x = tokens()
    s = chosen(smoothquant, [consumer(24, scheme=W8A8)], observed(x), {}, channels_K=link.channels())
    assert s.shape == (32,)
    number = TensorScheme("nvfp4", "group", 16)
    found = chosen(
        smoothquant, [consumer(24, scheme=Scheme(number, replace(number, dynamic=True)))], observed(x), {"alpha": 0.5}
    )
    assert found.shape == (64,)
    chosen(smoothquant, [consumer(24, scheme=Scheme(number, replace(number, dynamic=True)))], observed(x), {})


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (awq, {"grid": 0}),
        (awq, {"duo": "maybe"}),
        (awq, {"search": "diagh"}),
        (awq, {"clip": True}),
        (smoothquant, {"alpha": 1.5}),
        (smoothquant, {"alpha": "best"}),
        (smoothquant, {"alpha": float("nan")}),
        (smoothquant, {"beta": 0.5}),
    ],
)
def test_options_that_do_not_exist(module: ModuleType, options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        module.Options(**options)


@pytest.mark.parametrize("module", [awq, smoothquant])
def test_statistics_that_are_missing_or_not_finite(module: ModuleType) -> None:
    options = module.Options()
    assert module.needs(options) >= {"gram"} and smoothquant.needs(smoothquant.Options(alpha=0.5)) == {"absmax"}
    for name in module.needs(options):
        stats = observed(tokens(), module.needs(options) - {name})
        with pytest.raises(InputError, match="needs"):
            chosen(module, [consumer(8, scheme=W8A8)], stats, {})
    x = tokens()
    x[3, 4] = float("nan")
    with pytest.raises(InputError, match="NaN or Inf"):
        chosen(module, [consumer(8, scheme=W8A8)], observed(x), {})
