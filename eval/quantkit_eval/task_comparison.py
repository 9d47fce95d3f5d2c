"""Two models on the same tasks: what is recovered of each score, and whether the difference is more than chance.

recovery   quantized / original of a task's score, with a paired bootstrap over items; of a perplexity the inverse,
           so that 1 is as good and less is worse throughout
lost, won  items that went from right to wrong, and the other way, with McNemar's exact test
changed    share of items with another answer, right or not: a model may differ at the same score
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.errors import InputError
from quantkit_eval.intervals import (
    Interval,
    mcnemar,
    mean_interval,
    ratio_interval,
    smallest_loss,
    student,
)
from quantkit_eval.task_results import TaskResult, TaskResults, paired

NORMAL = 10**6  # degrees of freedom at which Student's t is the normal distribution


@dataclass(frozen=True)
class TaskComparison:
    """One task. Scores are its main metric's; None where items are not right or wrong.

    smallest_loss  the smallest drop of the score that so many items could have shown
    """

    name: str
    version: str
    metric: str
    shots: int
    items: int
    original: float
    quantized: float
    recovery: Interval
    lost: int | None
    won: int | None
    p: float | None
    changed: float | None
    smallest_loss: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_tasks(original: TaskResults, quantized: TaskResults) -> list[TaskComparison]:
    """Each task that both models did. Raises InputError when they were not asked the same (`paired`)."""
    return [_compare(a, b) for a, b in paired(original, quantized)]


def recoveries(tasks: Sequence[TaskComparison]) -> dict[str, Interval]:
    """What gates read: "recovery.TASK" each, and their mean as "recovery". Tasks are taken as independent."""
    found = {f"recovery.{task.name}": task.recovery for task in tasks}
    if not tasks:
        return found
    each = [task.recovery for task in tasks]
    value = math.fsum(x.value for x in each) / len(each)
    error = math.sqrt(math.fsum((x.stderr or 0.0) ** 2 for x in each)) / len(each)
    half = student(each[0].confidence, NORMAL) * error
    items = sum(task.items for task in tasks)
    return {"recovery": Interval(value, value - half, value + half, error, items, each[0].confidence), **found}


def _compare(a: TaskResult, b: TaskResult) -> TaskComparison:
    right = _right(a, b)
    lost, won, p = mcnemar(*right) if right else (None, None, None)
    answered = [x != y for x, y in zip(a.answers, b.answers, strict=True)] if any(a.answers) else None
    # Half an item more of each case, as in the bounds: none that changed is no proof that none would.
    disagree = (lost + won + 1) / (len(a.scores) + 2) if lost is not None and won is not None else None
    return TaskComparison(
        name=a.name,
        version=a.version,
        metric=a.metric,
        shots=a.shots,
        items=len(a.scores),
        original=a.value,
        quantized=b.value,
        recovery=_recovery(a, b),
        lost=lost,
        won=won,
        p=p,
        changed=sum(answered) / len(answered) if answered else None,
        smallest_loss=None if disagree is None else smallest_loss(disagree, len(a.scores)),
    )


def _right(a: TaskResult, b: TaskResult) -> tuple[list[bool], list[bool]] | None:
    """Both models' items as right and wrong; None for a score that is neither."""
    if a.lengths or not {*a.scores, *b.scores} <= {0.0, 1.0}:
        return None
    return [s == 1 for s in a.scores], [s == 1 for s in b.scores]


def _recovery(a: TaskResult, b: TaskResult) -> Interval:
    if a.lengths:
        return _of_likelihood(a, b)
    scores = (b.scores, a.scores) if a.higher_is_better else (a.scores, b.scores)
    if any(map(math.isnan, (*a.scores, *b.scores))):
        return mean_interval([math.nan])
    try:
        return ratio_interval(*scores)
    except ValueError as e:
        raise InputError(
            f"task {a.name}: the original's {a.metric} is {a.value:g} on {len(a.scores)} items: {e}; a task that the "
            "original cannot do says nothing about its quantization"
        ) from None


def _of_likelihood(a: TaskResult, b: TaskResult) -> Interval:
    """Perplexity of the original over the quantized model's: exp of the mean difference of log-likelihood a word."""
    words = a.lengths[next(iter(a.lengths))]
    total = math.fsum(words)
    # Documents are the samples: n words' worth of difference each, scaled so that their mean is the difference a word.
    scaled = [(y - x) * len(words) / total for x, y in zip(a.scores, b.scores, strict=True)]
    found = mean_interval(scaled)
    error = None if found.stderr is None else found.stderr * math.exp(found.value)
    return Interval(math.exp(found.value), math.exp(found.low), math.exp(found.high), error, found.samples)
