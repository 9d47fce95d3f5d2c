"""What lm-eval found on one model, item by item, and whether two models were asked the same."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.errors import InputError


@dataclass(frozen=True)
class Arguments:
    """What was asked of lm-eval, as it took effect; two results are comparable when all of `asked` is equal.

    num_fewshot      None: as each task has it, else 0
    add_bos_token    None: as the tokenizer has it; `first_token` is what a text then begins with (an id)
    chat_template    SHA-256 of the template, None where none is applied
    max_length       tokens of a sequence, the model's own limit unless set
    softmax_dtype    in which likelihoods are computed, whatever the model's dtype
    """

    limit: int | None
    num_fewshot: int | None
    batch_size: int
    add_bos_token: bool | None
    first_token: int | None
    chat_template: str | None
    max_length: int
    softmax_dtype: str
    seed: int
    dtype: str
    device: str
    versions: Mapping[str, str]

    def asked(self) -> dict[str, Any]:
        """All but the model's dtype and device."""
        return {name: value for name, value in asdict(self).items() if name not in ("dtype", "device")}


@dataclass(frozen=True)
class TaskResult:
    """One task on one model. The tuples have one entry an item, in the order of the task's documents.

    metric, value, stderr  the task's main metric as lm-eval aggregates it; `metrics` has all, as "acc,none"
    scores      the metric of each item (1.0 for right); of a rolling task the log-likelihood in nats
    lengths     of a rolling task: "words" and "bytes" of each document. Its word perplexity is
                exp(-sum(scores) / sum(lengths["words"]))
    answers     the number of the likeliest choice, or the text that was generated, cut to 500 characters; else ""
    documents, prompts, tokens  digests of each item's data, of its prompts, and of the token ids that the model got
    digest      of the task's definition and data
    warnings    of lm-eval, such as of prompts that were cut
    """

    name: str
    version: str
    kind: str
    shots: int
    digest: str
    metric: str
    higher_is_better: bool
    value: float
    stderr: float | None
    metrics: Mapping[str, float | None]
    scores: tuple[float, ...]
    lengths: Mapping[str, tuple[int, ...]]
    answers: tuple[str, ...]
    documents: tuple[str, ...]
    prompts: tuple[str, ...]
    tokens: tuple[str, ...]
    seconds: float
    warnings: tuple[str, ...] = ()

    def to_dict(self, *, by_item: bool = True) -> dict[str, Any]:
        """Plain values for JSON; without `by_item` the figures of the task alone."""
        figures = asdict(self)
        per_item = ("scores", "lengths", "answers", "documents", "prompts", "tokens")
        return {name: _listed(value) for name, value in figures.items() if by_item or name not in per_item}

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> TaskResult:
        """The inverse of `to_dict`. Raises TypeError or KeyError for keys that are missing or unknown."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in figures.items()}
        lengths = {unit: tuple(counts) for unit, counts in figures["lengths"].items()}
        return cls(**{**values, "lengths": lengths})


@dataclass(frozen=True)
class TaskResults:
    """`tasks` in the order that was asked for; `groups` what lm-eval aggregates of each group, as "acc,none"."""

    arguments: Arguments
    tasks: tuple[TaskResult, ...]
    groups: Mapping[str, Mapping[str, float | None]]

    def to_dict(self, *, by_item: bool = True) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "arguments": asdict(self.arguments),
            "tasks": [task.to_dict(by_item=by_item) for task in self.tasks],
            "groups": {name: dict(metrics) for name, metrics in self.groups.items()},
        }


def paired(
    original: TaskResults, quantized: TaskResults, *, may_differ: Collection[str] = ()
) -> list[tuple[TaskResult, TaskResult]]:
    """The results of each task side by side when both models were asked the same: item i of one is item i of the other.

    may_differ  arguments that need not be equal: "batch_size", to see what it alone changes
    Raises InputError that names what differs: the arguments, a task's definition or data, or, at the first item that
    differs, its document, its prompt (a chat template, few-shot examples) or its tokens (a BOS, another tokenizer).
    """
    asked = original.arguments.asked(), quantized.arguments.asked()
    for name in asked[0]:
        if name not in may_differ and asked[0][name] != asked[1][name]:
            raise InputError(
                f"the two models were run with different arguments: {name} is {asked[0][name]!r} for the original, "
                f"{asked[1][name]!r} for the quantized model; run both with the same"
            )
    names = [[task.name for task in results.tasks] for results in (original, quantized)]
    if names[0] != names[1]:
        raise InputError(f"the two models ran different tasks: {names[0]} and {names[1]}; run both with the same")
    pairs = list(zip(original.tasks, quantized.tasks, strict=True))
    for a, b in pairs:
        _same_items(a, b)
    return pairs


def _same_items(a: TaskResult, b: TaskResult) -> None:
    for what in ("version", "digest", "shots", "metric"):
        if getattr(a, what) != getattr(b, what):
            raise InputError(
                f"task {a.name} is another one for each model: its {what} is {getattr(a, what)!r} and "
                f"{getattr(b, what)!r}; run both again with the same lm-eval and the same files"
            )
    if len(a.scores) != len(b.scores):
        raise InputError(f"task {a.name} has {len(a.scores)} items for the original, {len(b.scores)} for the other")
    reasons = {
        "documents": "the data differ",
        "prompts": "the prompts differ: a chat template or few-shot examples were applied differently",
        "tokens": "the same prompt gave other tokens: a BOS was added differently, or the tokenizers differ",
    }
    for what, reason in reasons.items():
        for item, (left, right) in enumerate(zip(getattr(a, what), getattr(b, what), strict=True)):
            if left != right:
                raise InputError(f"task {a.name}, item {item}: the two models were not asked the same; {reason}")


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(each) for key, each in value.items()}
    return list(value) if isinstance(value, tuple) else value
