"""Gates: which figures pass, and what a failure says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from quantkit.errors import InputError
from quantkit_eval.compare import Comparison
from quantkit_eval.gate import GATES, check, failure_message, worst_layers

GOOD = Comparison(
    tokens=1024,
    windows=2,
    perplexity_original=9.2,
    perplexity=9.4,
    perplexity_ratio=1.0217,
    kl=0.03,
    kl_stderr=0.001,
    kl_p99=0.2,
    kl_max=1.0,
    top1_agreement=0.9,
    kl_by_window=(0.029, 0.031),
    nll_by_window_original=(2.2, 2.2),
    nll_by_window=(2.2, 2.3),
)


@pytest.mark.parametrize(
    ("name", "limit", "passed"),
    [
        ("kl", 0.05, True),
        ("kl", 0.03, True),
        ("kl", 0.0299, False),
        ("perplexity_ratio", 1.05, True),
        ("perplexity_ratio", 1.02, False),
        ("top1_agreement", 0.85, True),
        ("top1_agreement", 0.9, True),
        ("top1_agreement", 0.95, False),
    ],
)
def test_limits(name, limit, passed):
    (result,) = check(GOOD, {name: limit})
    assert (result.name, result.limit, result.passed) == (name, limit, passed)
    assert result.value == getattr(GOOD, name)
    assert result.sense == GATES[name].sense


def test_every_gate_reads_a_figure_and_order_is_kept():
    assert [r.name for r in check(GOOD, dict.fromkeys(reversed(GATES), 1))] == list(reversed(GATES))
    assert check(GOOD, {}) == []


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("limit", [-math.inf, 0.0, math.inf])
def test_nan_passes_no_gate(name, limit):
    figures: dict[str, Any] = {name: math.nan}
    (result,) = check(replace(GOOD, **figures), {name: limit})
    assert not result.passed
    assert "nan" in failure_message([result], [])


def test_infinite_perplexity_fails():
    assert not check(replace(GOOD, perplexity_ratio=math.inf), {"perplexity_ratio": 1.05})[0].passed


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"perplexity_ration": 1.05}, "unknown gate 'perplexity_ration'; did you mean 'perplexity_ratio'"),
        ({"zzz": 1}, "unknown gate 'zzz'; known: kl, perplexity_ratio, top1_agreement"),
        ({"kl": "low"}, "gate 'kl' needs a number as its limit; got 'low'"),
        ({"kl": True}, "needs a number"),
        ({"kl": math.nan}, "needs a number"),
    ],
)
def test_bad_gates_are_refused(gates, message):
    with pytest.raises(InputError, match=message):
        check(GOOD, gates)


def layer(name: str, error: float | None) -> dict:
    return {"name": name, "scheme": "W4A16", "bits_per_weight": 4.125, "relative_error": error, "notes": []}


def test_worst_layers_are_the_largest_errors():
    layers = [layer("a", 0.1), layer("b", 0.3), layer("c", None), layer("d", math.nan), layer("e", 0.2), {"name": "f"}]
    assert [w["name"] for w in worst_layers(layers)] == ["d", "b", "e"]
    assert [w["name"] for w in worst_layers(layers, n=1)] == ["d"]
    assert worst_layers([]) == []


def test_failure_message_names_gate_figure_limit_layers_and_remedies():
    results = check(GOOD, {"kl": 0.01, "perplexity_ratio": 1.05, "top1_agreement": 0.95})
    layers = [layer("model.layers.0.mlp.down_proj", 0.123456), layer("model.layers.1.mlp.up_proj", 0.05)]
    message = failure_message(results, worst_layers(layers))
    assert "kl is 0.03, the gate wants at most 0.01" in message
    assert "top1_agreement is 0.9, the gate wants at least 0.95" in message
    assert "perplexity_ratio" not in message
    assert "model.layers.0.mlp.down_proj (W4A16) 0.123, model.layers.1.mlp.up_proj (W4A16) 0.05" in message
    for remedy in ("group_size", "{match: model.layers.0.mlp.down_proj, scheme: W8A16}", "gptq"):
        assert remedy in message
    assert "\n" not in message


def test_failure_message_without_layers_or_failures():
    failed = check(GOOD, {"kl": 0.01})
    assert "gate failed" in failure_message(failed, []) and "W8A16" in failure_message(failed, [])
    assert failure_message(check(GOOD, {"kl": 0.05}), []) == ""
