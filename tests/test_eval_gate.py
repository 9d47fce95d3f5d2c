"""Gates: which figures pass, and what a failure says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from quantkit.errors import InputError
from quantkit.recipe.gates import Limit, limits
from quantkit_eval.compare import Comparison
from quantkit_eval.gate import GateResult, check, failure_message, figures, sense, worst_layers

GOOD = Comparison(
    tokens=2048,
    windows=4,
    perplexity_original=9.2,
    perplexity=9.4,
    perplexity_ratio=1.0217,
    kl=0.03,
    kl_stderr=0.001,
    kl_p99=0.2,
    kl_max=1.0,
    top1_agreement=0.9,
    kl_by_window=(0.029, 0.031, 0.0285, 0.0315),
    top1_by_window=(0.89, 0.91, 0.905, 0.895),
    nll_by_window_original=(2.2, 2.2, 2.1, 2.3),
    nll_by_window=(2.22, 2.2229, 2.1206, 2.3224),
)


def judged(**gates: float) -> list[GateResult]:
    return check(figures(GOOD), limits(gates))


@pytest.mark.parametrize(
    ("name", "limit", "outcome"),
    [
        ("kl", 0.05, "pass"),
        ("kl", 0.03, "inconclusive"),
        ("kl", 0.02, "fail"),
        ("perplexity_ratio", 1.05, "pass"),
        ("perplexity_ratio", 1.0215, "inconclusive"),
        ("perplexity_ratio", 1.001, "fail"),
        ("top1_agreement", 0.85, "pass"),
        ("top1_agreement", 0.9, "inconclusive"),
        ("top1_agreement", 0.95, "fail"),
    ],
)
def test_limits(name: str, limit: float, outcome: str) -> None:
    (result,) = judged(**{name: limit})
    assert (result.name, result.limit, result.outcome, result.passed) == (name, limit, outcome, outcome == "pass")
    assert result.value == pytest.approx(getattr(GOOD, name), rel=1e-3) and result.low < result.value < result.high
    assert result.sense == sense(name) and result.samples == 4 and result.unit == "windows"
    assert (result.needed is not None) == (outcome == "inconclusive")


def test_the_order_is_kept_and_no_gate_is_no_result() -> None:
    assert [r.name for r in judged(top1_agreement=0.1, kl=1.0)] == ["kl", "top1_agreement"]  # the recipe's order
    assert judged() == []


@pytest.mark.parametrize("name", ["kl", "top1_agreement"])
def test_nan_passes_no_gate(name: str) -> None:
    by_window = {"kl": "kl_by_window", "top1_agreement": "top1_by_window"}[name]
    changed: dict[str, Any] = {by_window: (0.03, math.nan, 0.03, 0.03)}
    (result,) = check(figures(replace(GOOD, **changed)), {name: Limit(limit=1.0)})
    assert not result.passed and "nan" in failure_message([result], [])


def test_infinite_perplexity_fails() -> None:
    broken = replace(GOOD, nll_by_window=(900.0, 901.0, 900.5, 900.2))
    (result,) = check(figures(broken), limits({"perplexity_ratio": 1.05}))
    assert result.outcome == "fail" and result.value == math.inf


def test_a_warning_stops_nothing_and_is_told() -> None:
    (result,) = check(figures(GOOD), limits({"kl": {"limit": 0.01, "level": "warn"}}))
    assert result.outcome == "fail" and result.passed and result.to_dict()["passed"] is True


def test_a_gate_of_what_was_not_measured_is_refused() -> None:
    with pytest.raises(InputError, match="gate 'recovery': nothing of that name is measured; there are kl"):
        check(figures(GOOD), limits({"recovery": 0.9}))


def layer(name: str, error: float | None) -> dict:
    return {"name": name, "scheme": "W4A16", "bits_per_weight": 4.125, "relative_error": error, "notes": []}


def test_worst_layers_are_the_largest_errors():
    layers = [layer("a", 0.1), layer("b", 0.3), layer("c", None), layer("d", math.nan), layer("e", 0.2), {"name": "f"}]
    assert [w["name"] for w in worst_layers(layers)] == ["d", "b", "e"]
    assert [w["name"] for w in worst_layers(layers, n=1)] == ["d"]
    assert worst_layers([]) == []


def test_failure_message_names_gate_figure_limit_layers_and_remedies():
    results = judged(kl=0.01, perplexity_ratio=1.05, top1_agreement=0.95)
    layers = [layer("model.layers.0.mlp.down_proj", 0.123456), layer("model.layers.1.mlp.up_proj", 0.05)]
    message = failure_message(results, worst_layers(layers))
    assert "kl is 0.03 (0.02" in message and "the gate wants at most 0.01" in message
    assert "top1_agreement is 0.9 (" in message and "the gate wants at least 0.95" in message
    assert "perplexity_ratio" not in message
    assert "model.layers.0.mlp.down_proj (W4A16) 0.123, model.layers.1.mlp.up_proj (W4A16) 0.05" in message
    for remedy in ("group_size", "{match: model.layers.0.mlp.down_proj, scheme: W8A16}", "gptq"):
        assert remedy in message
    assert "\n" not in message


def test_failure_message_without_layers_or_failures():
    failed = judged(kl=0.01)
    assert "gate failed" in failure_message(failed, []) and "W8A16" in failure_message(failed, [])
    assert failure_message(judged(kl=0.05), []) == ""


def test_what_is_not_proved_says_how_much_more_it_takes() -> None:
    (result,) = judged(kl=0.0303)
    message = failure_message([result], [layer("a", 0.1)])
    assert message.startswith("Not proved: kl is 0.03") and f"it would take {result.needed}" in message
    assert "inconclusive with 4 windows" in message and "validate.perplexity.most" in message
    assert "largest relative error" not in message  # nothing says that a layer is to blame
