"""Proof that an output still works: it is loaded from disk as a user would load it, and measured beside its original.

windows      perplexity, KL divergence and top-1 agreement on held-out text; more windows where fewer decide nothing
tasks        lm-eval's own harness on both models, item by item
generation   flips of the next token on what the original writes; a few texts of both, to look at
gates        each figure against its limit, with its uncertainty; see quantkit_eval/gate.py

Both models are in memory at once where they fit; else the original answers everything first, what is needed of its
logits waits on disk (quantkit_eval/kept_logits.py), and the output answers the same after it.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from quantkit import calibration, hub, integrity, tokenization
from quantkit import plan as planning
from quantkit.errors import MissingError
from quantkit.loading import load, load_original, loadable
from quantkit.profile import Profile
from quantkit.progress import Progress
from quantkit.recipe.calibration import TextSource
from quantkit.recipe.gates import Limit
from quantkit.recipe.validation import Validation as Settings
from quantkit.results import Text, Validation
from quantkit_eval import gate, harness
from quantkit_eval.compare import Tokens, measure, summary, working_bytes
from quantkit_eval.flips import Flips, Written, flips_on, generated, written
from quantkit_eval.generate import continuation, until_end
from quantkit_eval.intervals import Interval
from quantkit_eval.kept_logits import Bounds, KeptLogits, Spread
from quantkit_eval.results_cache import ResultsCache, model_identity
from quantkit_eval.task_comparison import compare_tasks, recoveries
from quantkit_eval.task_list import Tasks as LoadedTasks
from quantkit_eval.task_list import load as load_tasks
from quantkit_eval.task_list import resolve
from quantkit_eval.task_results import TaskResults
from quantkit_eval.two_models import SHARE, TwoModels, free_memory, model_bytes, specs_bytes
from quantkit_eval.windows import heldout_windows

SAMPLE_TOKENS = 48
PROMPT_TOKENS = 32  # of a window, for the original to go on from
SHOWN = 4  # texts of both models that a report shows
MORE = 4  # times the windows asked for, where validate.perplexity.most says nothing


@dataclass
class _Run:
    """Both models, with the original's tokenizer, and what was measured so far.

    What the original answers is asked once: the output may take its place in memory afterwards.
    kept    of the original's logits, where the models are loaded one after the other; None side by side
    spread  how sure the KL divergence of each position is, then
    """

    models: TwoModels
    tokenizer: Any
    settings: Settings
    source: hub.Source
    loaded: LoadedTasks | None
    windows_WL: torch.Tensor
    progress: Progress
    timed: Profile
    kept: KeptLogits | None = None
    spread: Spread | None = None

    @property
    def bounds(self) -> Bounds | None:
        return self.spread.bounds(self.kept.kept, self.kept.draws) if self.spread and self.kept else None

    @functools.cached_property
    def written(self) -> Written | None:
        """What the original goes on to; None where the recipe leaves it out."""
        wanted = self.settings.generation
        if not wanted.prompts:
            return None
        prompts = self.windows_WL[: wanted.prompts, :PROMPT_TOKENS]
        self.progress.say(
            f"validation: the original goes on from {len(prompts)} prompts for {wanted.tokens} tokens each"
        )
        with self.timed("generation"):
            return written(self.models.original, prompts, wanted.tokens)

    @functools.cached_property
    def original_tasks(self) -> TaskResults | None:
        """The original's results, kept for the next recipe; None without tasks."""
        if self.settings.tasks is None:
            return None
        cache = ResultsCache(warn=self.progress.warn) if self.settings.tasks.cache else None
        return _run_tasks(self, "original", cache=cache, identity=model_identity(self.source) if cache else None)

    @functools.cached_property
    def original_sample(self) -> str:
        """How the original goes on after the recipe's prompt."""
        return _sample(self, self.models.original)


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
    profile: Profile | None = None,
) -> Validation:
    """Loads both models, measures, and judges.

    limits  gates by name, as `Gates.limits` gives them
    layers  of quantkit.json, so that a failure can name the worst
    profile takes the seconds of each part of the work
    Raises InputError when one of them cannot be loaded or measured, GateError when the output computes NaN or Inf.
    """
    timed = profile or Profile(device)
    with timed("marks of the layers"):
        integrity.check(folder, layers)
    with timed("texts and tasks read"):
        tokenizer = planning.tokenizer(source, trust_remote_code=trust_remote_code)
        texts = _texts(settings, tokenizer)
        note = tokenization.check(folder, tokenizer, texts, trust_remote_code=trust_remote_code)
        windows = _windows(settings, texts, tokenizer, progress)
        loaded = None if settings.tasks is None else load_tasks(resolve(settings.tasks.names, settings.tasks.folder))
    gate.known(limits, _measurable(settings, loaded))
    with loadable(folder, progress, trust=trust_remote_code) as (place, notes), contextlib.ExitStack() as stack:
        models = TwoModels(
            functools.partial(_original, source, device, trust_remote_code, timed),
            functools.partial(_load, place, device, trust_remote_code, timed),
            side_by_side=_side_by_side(settings, source, place, device, len(tokenizer), progress),
        )
        kept = None if models.side_by_side else stack.enter_context(_kept(folder))
        run = _Run(models, tokenizer, settings, source, loaded, windows, progress, timed, kept)
        tokens = _measured(run, windows)
        if _undecided(tokens, limits):
            tokens = _with_more(run, tokens, limits, _most(settings, texts, tokenizer))
        comparison = summary(tokens)
        measured: dict[str, Interval] = gate.figures(comparison)
        flipped, shown = _generated(run)
        if flipped is not None:
            measured["flips"] = flipped.rate
        by_item = _by_item(run)
        tasks = compare_tasks(*by_item) if by_item else []
        measured |= recoveries(tasks)
        samples = _samples(run)
    if run.bounds is not None:
        progress.say(f"validation: {run.bounds}")
    results = gate.check(measured, limits)
    message = gate.failure_message(results, gate.worst_layers(layers))
    texts_of = settings.perplexity
    return Validation(
        comparison,
        results,
        samples,
        message,
        (*notes, *([note] if note else [])),
        flipped,
        tuple(tasks),
        by_item[1].to_dict(by_item=False)["arguments"] if by_item else None,
        run.bounds,
        texts_of.data if texts_of.revision is None else f"{texts_of.data}@{texts_of.revision}",
        shown,
        by_item,
    )


def _measurable(settings: Settings, loaded: LoadedTasks | None) -> list[str]:
    """Names of the figures that gates may ask for."""
    found = [*gate.ON_WINDOWS, *(["flips"] if settings.generation.prompts else [])]
    return [*found, "recovery", *(f"recovery.{task.name}" for task in loaded.tasks)] if loaded else found


# Memory --------------------------------------------------------------------------------------------------------------


def _load(folder: Path, device: torch.device, trust: bool, timed: Profile) -> Any:
    dtype = torch.float32 if device.type == "cpu" else "auto"
    with timed("models loaded"):
        return load(folder, dtype=dtype, trust_remote_code=trust).to(device)


def _original(source: hub.Source, device: torch.device, trust: bool, timed: Profile) -> Any:
    dtype = torch.float32 if device.type == "cpu" else "auto"
    with timed("models loaded"):
        return load_original(source, trust=trust, dtype=dtype).to(device)


def _side_by_side(
    settings: Settings, original: hub.Source, quantized: Path, device: torch.device, vocabulary: int, progress: Progress
) -> bool:
    """What the recipe says, or what the memory that is free decides. Said where it is one after the other."""
    why = "validate.side_by_side is false"
    if settings.side_by_side == "auto":
        needed = specs_bytes(original.checkpoint().specs.values(), device) + model_bytes(quantized, device)
        needed += working_bytes(settings.perplexity.length, vocabulary)
        free = free_memory(device)
        if free is None or needed <= SHARE * free:
            return True
        why = f"together they take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on {device}"
    elif settings.side_by_side:
        return True
    progress.say(f"validation: original and output one after the other ({why})")
    return False


@contextlib.contextmanager
def _kept(folder: Path) -> Iterator[KeptLogits]:
    """A new folder beside the output, for as long as this lasts: nothing of another run is ever found in it."""
    parent = folder.resolve().parent
    try:
        place = tempfile.TemporaryDirectory(prefix=f".{folder.name}.logits-", dir=parent)
    except OSError as e:
        raise MissingError(f"{parent}: the original's logits cannot be kept here ({e.strerror})") from None
    with place as name:
        yield KeptLogits(Path(name))


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


def _measured(run: _Run, windows_WL: torch.Tensor) -> Tokens:
    with run.timed("windows"):
        return _on_windows(run, windows_WL)


def _on_windows(run: _Run, windows_WL: torch.Tensor) -> Tokens:
    if run.kept is None:
        with _told(run.progress, len(windows_WL), "compared") as on_progress:
            return measure(run.models.original, run.models.quantized, windows_WL, on_progress=on_progress)
    with _told(run.progress, len(windows_WL), "kept") as on_progress:
        run.kept.add(run.models.original, windows_WL, on_progress=on_progress)
    # All that is asked of the original, before its memory goes to the output.
    _ = run.written, run.original_tasks, run.original_sample
    with _told(run.progress, len(windows_WL), "compared") as on_progress:
        tokens, spread = run.kept.measure(run.models.quantized, on_progress=on_progress)
    run.spread = spread if run.spread is None else run.spread.plus(spread)
    return tokens


@contextlib.contextmanager
def _told(progress: Progress, windows: int, what: str) -> Iterator[Callable[[int, int], None]]:
    progress.begin(windows, "window")
    try:
        yield lambda done, _: progress.item(done, what)
    finally:
        progress.end()


def _undecided(tokens: Tokens, limits: Mapping[str, Limit]) -> list[gate.GateResult]:
    """Gates on windows that stop a run only because there are too few of them."""
    found = gate.figures(summary(tokens))
    results = gate.check(found, {name: limit for name, limit in limits.items() if name in found})
    return [r for r in results if r.outcome == "inconclusive" and r.level == "fail"]


def _with_more(run: _Run, tokens: Tokens, limits: Mapping[str, Limit], most_WL: torch.Tensor) -> Tokens:
    """The sample with more windows, until every gate is decided or there are no more."""
    while (undecided := _undecided(tokens, limits)) and len(tokens.kl_WL) < len(most_WL):
        have = len(tokens.kl_WL)
        # A tenth more than it would take: the spread of the new windows is not that of the old ones.
        wanted = max(min(r.needed or 0 for r in undecided) * 11 // 10, have + 8)
        upto = min(wanted, len(most_WL))
        names = ", ".join(r.name for r in undecided)
        run.progress.say(f"validation: {have} windows do not decide {names}; going on to {upto}")
        tokens = tokens.plus(_measured(run, most_WL[have:upto]))
    return tokens


# Tasks ---------------------------------------------------------------------------------------------------------------


def _by_item(run: _Run) -> tuple[TaskResults, TaskResults] | None:
    """What lm-eval finds on original and output; None without tasks."""
    original = run.original_tasks
    if original is None:
        return None
    quantized = _run_tasks(run, "quantized")
    for task in (*original.tasks, *quantized.tasks):
        for warning in task.warnings:
            run.progress.warn(f"{task.name}: {warning}")
    return original, quantized


def _run_tasks(run: _Run, which: Literal["original", "quantized"], **kept: Any) -> TaskResults:
    wanted = run.settings.tasks
    assert wanted is not None and run.loaded is not None
    names = ", ".join(task.name for task in run.loaded.tasks)
    run.progress.say(f"validation: {names} on the {which} model")
    with run.timed(f"tasks on the {which} model"):
        return harness.run(
            run.models.original if which == "original" else run.models.quantized,
            run.tokenizer,
            run.loaded,
            limit=wanted.limit,
            num_fewshot=wanted.num_fewshot,
            batch_size=wanted.batch_size,
            apply_chat_template=wanted.chat_template,
            add_bos_token=wanted.add_bos_token,
            max_length=wanted.max_length,
            **kept,
        )


# Text ----------------------------------------------------------------------------------------------------------------


def _generated(run: _Run) -> tuple[Flips | None, tuple[Text, ...]]:
    """Flips on what the original wrote, and how the output goes on after the first of the same prompts."""
    found = run.written
    if found is None:
        return None, ()
    model = run.models.quantized
    with run.timed("generation"):
        flipped = flips_on(found, model)
        original = found.text_PT[:SHOWN]
        own = generated(model, original[:, : found.prompt], original.shape[1] - found.prompt)
    pairs = zip(original, own, strict=True)
    decode = functools.partial(until_end, run.tokenizer)
    prompts = [run.tokenizer.decode(row[: found.prompt]) for row in original]
    texts = [(decode(a[found.prompt :]), decode(b[found.prompt :])) for a, b in pairs]
    return flipped, tuple(Text(prompt, *both) for prompt, both in zip(prompts, texts, strict=True))


def _samples(run: _Run) -> dict[str, str]:
    prompt = run.settings.prompt
    if not prompt:
        return {}
    return {"prompt": prompt, "original": run.original_sample, "quantized": _sample(run, run.models.quantized)}


def _sample(run: _Run, model: Any) -> str:
    prompt = run.settings.prompt
    with run.timed("generation"):
        return continuation(model, run.tokenizer, prompt, SAMPLE_TOKENS) if prompt else ""
