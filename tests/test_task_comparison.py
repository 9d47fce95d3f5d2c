"""Tasks of two models side by side: recovery, items lost and won, and items that are not the same."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from quantkit.errors import InputError
from quantkit_eval.task_comparison import compare_tasks, recoveries
from quantkit_eval.task_results import Arguments, TaskResult, TaskResults

ARGUMENTS = Arguments(
    limit=None,
    num_fewshot=None,
    batch_size=4,
    add_bos_token=None,
    first_token=None,
    chat_template=None,
    max_length=512,
    seed=0,
    dtype="float32",
    softmax_dtype="float32",
    device="cpu",
    versions={"lm-eval": "1"},
)


def task(scores: list[float], **changes: Any) -> TaskResult:
    items = [str(i) for i in range(len(scores))]
    plain: dict[str, Any] = {
        "name": "t",
        "version": "1",
        "kind": "multiple_choice",
        "shots": 0,
        "digest": "d",
        "metric": "acc",
        "higher_is_better": True,
        "value": math.fsum(scores) / len(scores),
        "stderr": None,
        "metrics": {},
        "scores": tuple(scores),
        "lengths": {},
        "answers": tuple(str(int(s)) for s in scores),
        "documents": tuple(items),
        "prompts": tuple(items),
        "tokens": tuple(items),
        "seconds": 1.0,
    }
    return TaskResult(**{**plain, **changes})


def results(*tasks: TaskResult, **changes: Any) -> TaskResults:
    return TaskResults(replace(ARGUMENTS, **changes), tasks, {})


def test_right_and_wrong_items() -> None:
    original, quantized = [1.0] * 80 + [0.0] * 20, [1.0] * 70 + [0.0] * 25 + [1.0] * 5
    (found,) = compare_tasks(results(task(original)), results(task(quantized)))
    assert (found.original, found.quantized, found.lost, found.won) == (0.8, 0.75, 10, 5)
    assert (
        found.recovery.value == pytest.approx(0.75 / 0.8) and found.recovery.low < 0.9375 < found.recovery.high < 1.05
    )
    assert found.p is not None and found.p == pytest.approx(0.3018, abs=1e-3) and found.changed == pytest.approx(0.15)
    assert found.smallest_loss == pytest.approx(2.8 * math.sqrt(16 / 102 / 100), rel=0.01)


def test_a_perplexity_is_recovered_the_other_way_round() -> None:
    words = (10, 30, 20)
    a = task([-20.0, -66.0, -40.0], lengths={"words": words}, metric="word_perplexity", higher_is_better=False)
    b = task([-21.0, -69.0, -42.0], lengths={"words": words}, metric="word_perplexity", higher_is_better=False)
    (found,) = compare_tasks(results(a), results(b))
    assert found.recovery.value == pytest.approx(math.exp(-(126 + 6) / 60 + 126 / 60)) and found.lost is None
    assert found.recovery.low < found.recovery.value < found.recovery.high < 1.1


def test_scores_between_right_and_wrong() -> None:
    (found,) = compare_tasks(results(task([0.5, 0.25, 1.0])), results(task([0.5, 0.25, 0.5])))
    assert found.recovery.value == pytest.approx(1.25 / 1.75) and (found.lost, found.p) == (None, None)


def test_the_mean_of_recoveries() -> None:
    a = [task([1.0] * 50 + [0.0] * 50, name=n) for n in "xy"]
    b = [task([1.0] * 50 + [0.0] * 50, name="x"), task([1.0] * 40 + [0.0] * 60, name="y")]
    found = recoveries(compare_tasks(results(*a), results(*b)))
    assert list(found) == ["recovery", "recovery.x", "recovery.y"]
    assert found["recovery"].value == pytest.approx(0.9) and found["recovery"].samples == 200
    errors = [found[f"recovery.{name}"].stderr or 0 for name in "xy"]
    assert 0 < errors[0] < errors[1] and found["recovery"].stderr == pytest.approx(math.hypot(*errors) / 2)
    assert recoveries([]) == {}


def test_a_task_that_the_original_cannot_do_is_refused() -> None:
    with pytest.raises(InputError, match=r"task t: the original's acc is 0 on 3 items: .*nothing to recover"):
        compare_tasks(results(task([0.0] * 3)), results(task([1.0] * 3)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": ("0", "9", "2")}, "item 1: .*BOS was added differently"),
        ({"prompts": ("0", "1", "9")}, "item 2: .*a chat template or few-shot examples were applied differently"),
        ({"documents": ("9", "1", "2")}, "item 0: .*the data differ"),
        ({"digest": "other"}, "its digest is 'd' and 'other'"),
    ],
)
def test_models_that_were_not_asked_the_same_are_not_compared(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare_tasks(results(task([1.0, 0.0, 1.0])), results(task([1.0, 0.0, 1.0], **changes)))
    with pytest.raises(InputError, match="first_token is None for the original, 1 for the quantized model"):
        compare_tasks(results(task([1.0])), results(task([1.0]), first_token=1))
