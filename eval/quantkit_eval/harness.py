"""lm-eval's own harness on a loaded model: one score for each item, so that two models can be compared item by item.

    tasks = load(resolve(["pydocs_cloze", "gsm8k"]))
    pairs = paired(run(original, tokenizer, tasks), run(quantized, tokenizer, tasks))

`run` calls lm_eval.evaluate with its HFLM, as lm_eval.simple_evaluate does, and gives the same figures; what
simple_evaluate adds (a git command, a request to the Hub, seeds left changed) is left out. Each task runs by itself
and from the same seeds: a result does not depend on what else is run, and can be kept.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

from quantkit.errors import GateError, InputError
from quantkit_eval.lm_scope import digest, evaluating, language_model, need_library, quiet, seeded
from quantkit_eval.results_cache import ResultsCache
from quantkit_eval.task_list import LoadedTask, Tasks, load, resolve
from quantkit_eval.task_results import Arguments, TaskResult, TaskResults, paired

__all__ = ["Arguments", "TaskResult", "TaskResults", "load", "paired", "resolve", "run"]

# The metric of a task: the first of these that it has, else the first of its own that is a number for each item.
PREFERRED = ("acc_norm", "acc", "exact_match", "prompt_level_strict_acc", "word_perplexity")
# Metrics that lm-eval computes from (log-likelihood, length) of each document, and what the length counts.
ROLLING = {"word_perplexity": "words", "byte_perplexity": "bytes", "bits_per_byte": "bytes"}
SOFTMAX = "float32"  # in bfloat16, as lm-eval has it else, likelihoods have three digits and choices tie
LOGITS_BYTES = 1 << 31  # of a batch of 1024 tokens a sequence on a GPU, float32
Progress = Callable[[str, int, int], None]


def run(
    model: Any,
    tokenizer: Any,
    tasks: Tasks,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | None = None,
    apply_chat_template: bool = False,
    add_bos_token: bool | None = None,
    seed: int = 0,
    max_length: int | None = None,
    device: Any = None,
    on_progress: Progress | None = None,
    cache: ResultsCache | None = None,
    identity: str | None = None,
) -> TaskResults:
    """Runs each task on a causal model of transformers, as it is loaded, and its tokenizer; neither is changed.

    limit        the first items of each task only; None: all
    num_fewshot  examples before each item; a task whose author wrote 0 keeps 0
    batch_size   sequences at once; None: 4 on a CPU, else up to 16, by the vocabulary. Sums of floats depend on it
    seed         of everything random in lm-eval; its states outside are as they were afterwards
    device       where inputs go; None: where the model's input embeddings are
    on_progress  called with (task, sequences done, sequences)
    cache        results of `identity` (results_cache.model_identity) are taken from it, and kept in it
    Raises InputError for arguments that do not fit, or a task that gives no score for each item; GateError where the
    model answers NaN; MissingError without lm-eval.
    """
    need_library()
    _check(tokenizer, limit, num_fewshot, batch_size, max_length, apply_chat_template)
    if cache is not None and identity is None:
        raise InputError("a cache of results needs the identity of the model that they belong to")
    options = {"max_length": max_length, "add_bos_token": add_bos_token, "softmax_dtype": SOFTMAX}
    results = []
    with quiet(), evaluating(model), seeded(seed):
        size = batch_size or _batch_size(model)
        lm = language_model(model, tokenizer, device=device, batch_size=size, **options)
        arguments = _arguments(lm, limit, num_fewshot, apply_chat_template, seed)
        for task in tasks.tasks:
            parts = {"model": identity, "task": [task.name, task.version, task.digest], **asdict(arguments)}
            kept = _kept(cache, parts)
            if kept is None:
                kept = _evaluate(lm, task, arguments, on_progress)
                if cache is not None:
                    cache.put(parts, kept.to_dict())
            results.append(kept)
        groups = _aggregate(tasks.groups, results)
    return TaskResults(arguments, tuple(results), groups)


# Arguments ------------------------------------------------------------------------------------------------------------


def _check(
    tokenizer: Any, limit: int | None, shots: int | None, size: int | None, length: int | None, chat: bool
) -> None:
    least = {"limit": (limit, 1), "num_fewshot": (shots, 0), "batch_size": (size, 1), "max_length": (length, 2)}
    for name, (value, low) in least.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
            raise InputError(f"{name} of the tasks must be a whole number of at least {low}; got {value!r}")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "the tasks ask for the chat template, but the tokenizer has none; set apply_chat_template: false"
        )


def _batch_size(model: Any) -> int:
    if model.get_input_embeddings().weight.device.type == "cpu":
        return 4
    return max(1, min(16, LOGITS_BYTES // (1024 * int(model.config.get_text_config().vocab_size) * 4)))


def _arguments(lm: Any, limit: int | None, shots: int | None, chat: bool, seed: int) -> Arguments:
    import torch

    ids, bare = lm.tok_encode("a"), lm.tokenizer.encode("a", add_special_tokens=False)
    template = str(lm.tokenizer.chat_template)
    device = lm.device
    return Arguments(
        limit=limit,
        num_fewshot=shots,
        batch_size=int(lm.batch_size),
        add_bos_token=lm.add_bos_token,
        first_token=ids[0] if ids[:1] != bare[:1] else None,
        chat_template=hashlib.sha256(template.encode()).hexdigest() if chat else None,
        max_length=int(lm.max_length),
        softmax_dtype=SOFTMAX,
        seed=seed,
        dtype=str(lm.model.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        versions={name: version(name) for name in ("lm-eval", "transformers", "torch")},
    )


def _kept(cache: ResultsCache | None, parts: Mapping[str, Any]) -> TaskResult | None:
    found = cache.get(parts) if cache is not None else None
    try:
        return None if found is None else TaskResult.from_dict(found)
    except (TypeError, KeyError, AttributeError):  # written by another version of quantkit
        return None


# One task -------------------------------------------------------------------------------------------------------------


def _evaluate(lm: Any, task: LoadedTask, arguments: Arguments, on_progress: Progress | None) -> TaskResult:
    """Runs one task. lm-eval's evaluate takes shots and seed from the task object, not as arguments."""
    from lm_eval import evaluate

    shots = task.shots if task.shots == 0 or arguments.num_fewshot is None else arguments.num_fewshot
    task.task.set_config(key="num_fewshot", value=shots or 0)
    task.task.set_fewshot_seed(seed=arguments.seed)
    lm.on_progress = (lambda done, total: on_progress(task.name, done, total)) if on_progress else None
    lm.asked.clear()
    start = time.monotonic()
    try:
        with quiet() as warned, seeded(arguments.seed):
            out = evaluate(
                lm=lm,
                task_dict={"tasks": {task.name: task.task}},
                limit=arguments.limit,
                cache_requests=False,
                bootstrap_iters=1,  # closed forms only: see lm_scope.quiet
                apply_chat_template=arguments.chat_template is not None,
                fewshot_as_multiturn=arguments.chat_template is not None,
            )
    except (ValueError, AssertionError, KeyError) as e:  # code that must be confirmed, prompts longer than the model
        raise InputError(f"task {task.name}: lm-eval cannot run it ({type(e).__name__}: {e})") from e
    result = _result(task, shots or 0, out, lm.asked)
    return replace(result, seconds=time.monotonic() - start, warnings=warned())


def _result(task: LoadedTask, shots: int, out: Mapping[str, Any], asked: Mapping[Any, str]) -> TaskResult:
    name = task.name
    every = out["samples"][name]
    kind = every[0]["filter"]  # a task may read one answer in several ways: its first is its strictest
    samples = sorted((s for s in every if s["filter"] == kind), key=lambda s: s["doc_id"])
    _finite(name, samples)
    metric = _main_metric(name, samples[0])
    figures = {k: _number(v) for k, v in out["results"][name].items() if "," in k}
    value = figures[f"{metric},{kind}"]
    higher = out["higher_is_better"].get(name, {}).get(metric)
    lengths = {unit: tuple(int(s[m][1]) for s in samples) for m, unit in ROLLING.items() if m in samples[0]}
    return TaskResult(
        name=name,
        version=task.version,
        kind=task.kind,
        shots=shots,
        digest=task.digest,
        metric=metric,
        higher_is_better=metric not in ROLLING and higher is not False,
        value=math.nan if value is None else value,
        stderr=figures.get(f"{metric}_stderr,{kind}"),
        metrics=figures,
        scores=tuple(_score(s[metric], metric) for s in samples),
        lengths=lengths if metric in ROLLING else {},
        answers=tuple(_answer(s, task.kind) for s in samples),
        documents=tuple(str(s["doc_hash"])[:16] for s in samples),
        prompts=tuple(digest([s["arguments"], s["target_hash"]]) for s in samples),
        tokens=tuple(digest([asked.get(_request(a), "") for a in s["arguments"]]) for s in samples),
        seconds=0.0,
    )


def _request(argument: Sequence[Any]) -> tuple[str, ...]:
    """The strings of a request: what `asked` of the model class goes by."""
    return tuple(part for part in argument if isinstance(part, str))


def _finite(name: str, samples: Sequence[Mapping[str, Any]]) -> None:
    """NaN is no answer: the likeliest of four NaNs is the first, which is right now and then."""
    for sample in samples:
        for answer in sample["filtered_resps"]:
            likelihood = answer[0] if isinstance(answer, tuple | list) and answer else answer
            if isinstance(likelihood, float) and math.isnan(likelihood):
                raise GateError(
                    f"task {name}, item {sample['doc_id']}: the model's log-likelihood is NaN. Look for NaN or Inf in "
                    "its scales, or load it in bfloat16 or float32"
                )


def _main_metric(name: str, sample: Mapping[str, Any]) -> str:
    known = [m for m in (*PREFERRED, *sample["metrics"]) if m in sample["metrics"] and _is_score(sample[m], m)]
    if not known:
        raise InputError(
            f"task {name} gives no number for each item, only {', '.join(sample['metrics'])}: two models cannot be "
            "compared on it item by item; choose another task"
        )
    return known[0]


def _is_score(value: Any, metric: str) -> bool:
    return metric in ROLLING or _number(value) is not None or (isinstance(value, tuple) and len(value) == 2)


def _score(value: Any, metric: str) -> float:
    """One item's score. Metrics over (right answer, answer), such as f1, have no score an item: 1 where they agree."""
    if isinstance(value, tuple):
        return float(value[0]) if metric in ROLLING else float(value[0] == value[1])
    number = _number(value)
    return math.nan if number is None else number


def _answer(sample: Mapping[str, Any], kind: str) -> str:
    answers = sample["filtered_resps"]
    if kind == "multiple_choice":
        likelihoods = [answer[0] for answer in answers]
        return str(likelihoods.index(max(likelihoods)))
    return str(answers[0])[:500] if kind == "generate_until" else ""


def _number(value: Any) -> float | None:
    """A finite or infinite number as a float; None for "N/A", NaN, text and lists."""
    try:
        number = float(value) if not isinstance(value, str | tuple | list) else math.nan
    except (TypeError, ValueError):
        return None
    return None if math.isnan(number) else number


def _aggregate(groups: Mapping[str, Any], results: Sequence[TaskResult]) -> dict[str, dict[str, float | None]]:
    """What lm-eval says of each group that has a rule for it."""
    metrics = {
        r.name: {**{k: "N/A" if v is None else v for k, v in r.metrics.items()}, "sample_len": len(r.scores)}
        for r in results
    }
    found = {name: group.aggregate(metrics) for name, group in groups.items()}
    figures = {name: {k: _number(v) for k, v in found[name].items() if "," in k} for name in found}
    return {name: values for name, values in figures.items() if values}
