"""Proof that an output still works: it is loaded from disk as a user would load it, and measured beside its original.

windows      perplexity, KL divergence and top-1 agreement on held-out text; more windows where fewer decide nothing
tasks        lm-eval's own harness on both models, item by item
generation   flips of the next token on what the original writes
gates        each figure against its limit, with its uncertainty; see quantkit_eval/gate.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit import calibration, hub, integrity
from quantkit import plan as planning
from quantkit.loading import load, loadable
from quantkit.progress import Progress
from quantkit.recipe.calibration import TextSource
from quantkit.recipe.gates import Limit
from quantkit.recipe.validation import Tasks
from quantkit.recipe.validation import Validation as Settings
from quantkit_eval import gate, harness
from quantkit_eval.compare import Comparison, Tokens, measure, summary
from quantkit_eval.flips import Flips, flips
from quantkit_eval.generate import continuation
from quantkit_eval.intervals import Interval
from quantkit_eval.results_cache import ResultsCache, model_identity
from quantkit_eval.task_comparison import TaskComparison, compare_tasks, recoveries
from quantkit_eval.task_list import Tasks as LoadedTasks
from quantkit_eval.task_list import load as load_tasks
from quantkit_eval.task_list import resolve
from quantkit_eval.task_results import TaskResults
from quantkit_eval.windows import heldout_windows

VALIDATED, FAILED, UNVALIDATED = "validated", "failed", "unvalidated"
SAMPLE_TOKENS = 48
PROMPT_TOKENS = 32  # of a window, for the original to go on from
MORE = 4  # times the windows asked for, where validate.perplexity.most says nothing


@dataclass(frozen=True)
class Validation:
    """An output measured against its original. `status`: "validated" when no gate stands in the way, else "failed".

    notes  what was measured in the output's stead, and what of its quantization was not; empty when it was loaded
    """

    comparison: Comparison
    gates: list[gate.GateResult]
    samples: dict[str, str]
    message: str
    notes: tuple[str, ...] = ()
    flips: Flips | None = None
    tasks: tuple[TaskComparison, ...] = ()
    task_arguments: dict[str, Any] | None = None

    @property
    def status(self) -> str:
        return VALIDATED if all(g.passed for g in self.gates) else FAILED

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as quantkit.json has them."""
        return {
            "status": self.status,
            "message": self.message,
            "comparison": self.comparison.to_dict(),
            "flips": None if self.flips is None else self.flips.to_dict(),
            "tasks": {task.name: task.to_dict() for task in self.tasks},
            "task_arguments": self.task_arguments,
            "gates": [g.to_dict() for g in self.gates],
            "samples": self.samples,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class _Pair:
    """Both models, loaded, with the original's tokenizer."""

    original: Any
    quantized: Any
    tokenizer: Any
    notes: tuple[str, ...]
    progress: Progress


def validate(
    folder: Path,
    source: hub.Source,
    settings: Settings,
    limits: Mapping[str, Limit],
    *,
    device: torch.device,
    progress: Progress,
    layers: list[dict[str, Any]],
    trust_remote_code: bool = False,
) -> Validation:
    """Loads both models, measures, and judges.

    limits  gates by name, as `Gates.limits` gives them
    layers  of quantkit.json, so that a failure can name the worst
    Raises InputError when one of them cannot be loaded or measured, GateError when the output computes NaN or Inf.
    """
    integrity.check(folder, layers)
    tokenizer = planning.tokenizer(source, trust_remote_code=trust_remote_code)
    texts = _texts(settings, tokenizer)
    windows = _windows(settings, texts, tokenizer, progress)
    loaded = None if settings.tasks is None else load_tasks(resolve(settings.tasks.names, settings.tasks.folder))
    dtype = torch.float32 if device.type == "cpu" else "auto"
    original = load(source.folder, dtype=dtype, trust_remote_code=trust_remote_code).to(device)
    with loadable(folder, progress, trust=trust_remote_code) as (place, notes):
        quantized = load(place, dtype=dtype, trust_remote_code=trust_remote_code).to(device)
    pair = _Pair(original, quantized, tokenizer, notes, progress)
    tokens = _measured(pair, windows)
    if _undecided(tokens, limits):
        tokens = _with_more(pair, tokens, limits, _most(settings, texts, tokenizer))
    comparison = summary(tokens)
    measured: dict[str, Interval] = gate.figures(comparison)
    flipped = _flips(pair, settings, windows)
    if flipped is not None:
        measured["flips"] = flipped.rate
    tasks: list[TaskComparison] = []
    arguments: dict[str, Any] | None = None
    if settings.tasks is not None and loaded is not None:
        tasks, arguments = _tasks(pair, settings.tasks, loaded, source)
        measured |= recoveries(tasks)
    results = gate.check(measured, limits)
    samples = _samples(pair, settings.prompt)
    message = gate.failure_message(results, gate.worst_layers(layers))
    return Validation(comparison, results, samples, message, notes, flipped, tuple(tasks), arguments)


# Windows -------------------------------------------------------------------------------------------------------------


def _texts(settings: Settings, tokenizer: Any) -> list[str]:
    place = settings.perplexity.model_dump(include=set(TextSource.model_fields))
    return list(calibration.load_texts(**place, tokenizer=tokenizer))


def _windows(settings: Settings, texts: list[str], tokenizer: Any, progress: Progress) -> torch.Tensor:
    wanted = settings.perplexity
    found = heldout_windows(texts, tokenizer, length=wanted.length, count=wanted.windows, warn=progress.warn)
    progress.say(f"validation: {found.shape[0]} windows of {found.shape[1]} tokens from {wanted.data}")
    return found


def _most(settings: Settings, texts: list[str], tokenizer: Any) -> torch.Tensor:
    """The windows that there are to go to; the first of them are those of `_windows`."""
    wanted = settings.perplexity
    count = max(wanted.windows, wanted.most or MORE * wanted.windows)
    return heldout_windows(texts, tokenizer, length=wanted.length, count=count, warn=lambda _: None)


def _measured(pair: _Pair, windows_WL: torch.Tensor) -> Tokens:
    pair.progress.begin(len(windows_WL), "window")
    try:
        return measure(
            pair.original,
            pair.quantized,
            windows_WL,
            on_progress=lambda done, _: pair.progress.item(done, "compared"),
        )
    finally:
        pair.progress.end()


def _undecided(tokens: Tokens, limits: Mapping[str, Limit]) -> list[gate.GateResult]:
    """Gates on windows that stop a run only because there are too few of them."""
    found = gate.figures(summary(tokens))
    results = gate.check(found, {name: limit for name, limit in limits.items() if name in found})
    return [r for r in results if r.outcome == "inconclusive" and r.level == "fail"]


def _with_more(pair: _Pair, tokens: Tokens, limits: Mapping[str, Limit], most_WL: torch.Tensor) -> Tokens:
    """The sample with more windows, until every gate is decided or there are no more."""
    while (undecided := _undecided(tokens, limits)) and len(tokens.kl_WL) < len(most_WL):
        have = len(tokens.kl_WL)
        # A tenth more than it would take: the spread of the new windows is not that of the old ones.
        wanted = max(min(r.needed or 0 for r in undecided) * 11 // 10, have + 8)
        upto = min(wanted, len(most_WL))
        names = ", ".join(r.name for r in undecided)
        pair.progress.say(f"validation: {have} windows do not decide {names}; going on to {upto}")
        tokens = tokens.plus(_measured(pair, most_WL[have:upto]))
    return tokens


# Tasks ---------------------------------------------------------------------------------------------------------------


def _tasks(
    pair: _Pair, wanted: Tasks, loaded: LoadedTasks, source: hub.Source
) -> tuple[list[TaskComparison], dict[str, Any]]:
    """lm-eval on both models; the original's results are kept for the next recipe. Returns its arguments too."""
    cache = ResultsCache(warn=pair.progress.warn) if wanted.cache else None

    def run(model: Any, which: str, **kept: Any) -> TaskResults:
        names = ", ".join(task.name for task in loaded.tasks)
        pair.progress.say(f"validation: {names} on the {which} model")
        return harness.run(
            model,
            pair.tokenizer,
            loaded,
            limit=wanted.limit,
            num_fewshot=wanted.num_fewshot,
            batch_size=wanted.batch_size,
            apply_chat_template=wanted.chat_template,
            add_bos_token=wanted.add_bos_token,
            max_length=wanted.max_length,
            **kept,
        )

    original = run(pair.original, "original", cache=cache, identity=model_identity(source) if cache else None)
    quantized = run(pair.quantized, "quantized")
    for task in (*original.tasks, *quantized.tasks):
        for warning in task.warnings:
            pair.progress.warn(f"{task.name}: {warning}")
    return compare_tasks(original, quantized), quantized.to_dict(by_item=False)["arguments"]


# Text ----------------------------------------------------------------------------------------------------------------


def _flips(pair: _Pair, settings: Settings, windows_WL: torch.Tensor) -> Flips | None:
    wanted = settings.generation
    if not wanted.prompts:
        return None
    length = min(PROMPT_TOKENS, windows_WL.shape[1])
    prompts = windows_WL[: wanted.prompts, :length]
    pair.progress.say(f"validation: the original goes on from {len(prompts)} prompts for {wanted.tokens} tokens each")
    return flips(pair.original, pair.quantized, prompts, wanted.tokens)


def _samples(pair: _Pair, prompt: str | None) -> dict[str, str]:
    if not prompt:
        return {}
    return {
        "prompt": prompt,
        "original": continuation(pair.original, pair.tokenizer, prompt, SAMPLE_TOKENS),
        "quantized": continuation(pair.quantized, pair.tokenizer, prompt, SAMPLE_TOKENS),
    }
