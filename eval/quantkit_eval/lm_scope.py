"""What lm-eval must not leave behind or show: its log, bars and seeds; and its model class, which tells what it asked.

Written against lm-eval 0.4.13. lm-eval is imported inside functions: it is an extra, and takes a second.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from quantkit.errors import MissingError

_Base: Any = object  # HFLM in effect, which is not imported here
DIGEST = 16  # hexadecimal digits that are kept of a SHA-256: 64 bits tell the items of one task apart
INSTALL = "pip install 'quantkit[eval]'"


def need_library() -> None:
    """Raises MissingError where lm-eval is not installed, or lacks what we call."""
    try:
        importlib.import_module("lm_eval")
        manager = importlib.import_module("lm_eval.tasks").TaskManager
        importlib.import_module("lm_eval.tasks._yaml_loader")
    except ImportError as e:
        raise MissingError(f"tasks run in lm-eval, which cannot be imported ({e}); {INSTALL}") from None
    if not hasattr(manager, "load"):
        version = importlib.import_module("importlib.metadata").version("lm-eval")
        raise MissingError(f"lm-eval {version} is too old: its TaskManager has no `load`; {INSTALL} --upgrade")


def digest(value: Any) -> str:
    """The first DIGEST digits of the SHA-256 of a value as JSON. What JSON lacks goes in as `stable` has it."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=stable)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST]


def stable(value: Any) -> str:
    """Words for a value that JSON lacks, the same in every process: a function by its source, never by its address."""
    import inspect

    if callable(value):
        try:
            return inspect.getsource(value)
        except (OSError, TypeError):
            return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if hasattr(value, "tobytes"):  # an image, an array
        return hashlib.sha256(value.tobytes()).hexdigest()
    return str(value)


# Silence --------------------------------------------------------------------------------------------------------------


class _Collector(logging.Handler):
    """Keeps each warning once, in order."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.messages[" ".join(record.getMessage().split())] = None


@contextmanager
def quiet() -> Iterator[Callable[[], tuple[str, ...]]]:
    """No log, bar or warning of lm-eval, datasets or transformers reaches the terminal; all is as it was afterwards.

    Gives a function that returns what lm-eval warned of so far.
    """
    import datasets
    import transformers.utils.logging as transformers_log

    collector = _Collector()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        log = logging.getLogger("lm_eval")
        stack.callback(_restore_log, log, log.handlers[:], log.level, log.propagate)
        log.handlers, log.propagate = [collector], False
        log.setLevel(logging.WARNING)
        for library in (transformers_log, datasets.utils.logging):
            stack.callback(library.set_verbosity, library.get_verbosity())
            library.set_verbosity_error()
        if datasets.are_progress_bars_disabled() is False:
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        _swap(stack, "datasets.config", "HF_UPDATE_DOWNLOAD_COUNTS", False)  # a request for each local file, else
        _swap(stack, "lm_eval.api.task", "tqdm", lambda items, **_: items)
        # Standard errors other than those of means start a pool of processes and print; ours are paired anyway.
        _swap(stack, "lm_eval.api.metrics", "bootstrap_stderr", lambda *_, **__: float("nan"))
        yield lambda: tuple(collector.messages)


def _restore_log(log: logging.Logger, handlers: list[logging.Handler], level: int, propagate: bool) -> None:
    log.handlers, log.propagate = handlers, propagate
    log.setLevel(level)


def _swap(stack: ExitStack, module: str, name: str, value: Any) -> None:
    """A name of a module means something else until the stack is left."""
    target = importlib.import_module(module)
    if hasattr(target, name):
        stack.callback(setattr, target, name, getattr(target, name))
        setattr(target, name, value)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds random, numpy and torch for lm-eval, which draws from all three; their states come back afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    before, numpy_before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(numpy_before)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """lm-eval turns training off and leaves it off: here it is as it was afterwards."""
    training = model.training
    try:
        yield
    finally:
        model.train(training)


# The model ------------------------------------------------------------------------------------------------------------


def language_model(model: Any, tokenizer: Any, *, device: Any = None, **options: Any) -> Any:
    """lm-eval's own HFLM around a loaded causal model, silent, with two more attributes.

    asked        request as lm-eval has it (a tuple of its strings) -> digest of the token ids that the model gets
    on_progress  None, or called with (sequences done, sequences) after each batch
    device       where the inputs go; None: where the model's input embeddings are
    options      of HFLM: batch_size, max_length, add_bos_token
    The tokenizer is copied, because lm-eval gives one without a pad token another. The model's generation_config may
    hold max_new_tokens, which transformers prefers to the task's limit: the task's limit is given in its place.
    """
    lm = _recorder()(pretrained=model, tokenizer=deepcopy(tokenizer), backend="causal", **options)
    lm._device = torch.device(device) if device is not None else model.get_input_embeddings().weight.device
    return lm


class _Recording(_Base):
    """What is laid over HFLM; `super()` is HFLM."""

    on_progress: Callable[[int, int], None] | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked: dict[tuple[str, ...], str] = {}
        self._done = self._total = 0
        self._rolling = False

    def _begin(self, total: int) -> None:
        self._done, self._total = 0, total

    def _step(self, sequences: int) -> None:
        self._done += sequences
        if self.on_progress:
            self.on_progress(min(self._done, self._total), self._total)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        windows = 0
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text)
            windows += -(-len(ids) // self.max_length)
            self.asked[(text,)] = digest([self.prefix_token_id, *ids])
        self._begin(windows)
        self._rolling = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self._rolling = False

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **options: Any) -> Any:
        if not self._rolling:
            for key, context, continuation in requests:
                self.asked[tuple(key)] = digest([context, continuation])
            # Continuations that differ in their last token only are answered by one sequence.
            self._begin(len({hash((*context, *more[:-1])) for _, context, more in requests}))
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self._begin(len(requests))
        return super().generate_until(requests, disable_tqdm=True)

    def tok_batch_encode(self, strings: Sequence[str], *args: Any, **options: Any) -> Any:
        ids_BL, mask_BL = super().tok_batch_encode(strings, *args, **options)
        for text, ids, mask in zip(strings, ids_BL, mask_BL, strict=True):
            self.asked[(text,)] = digest(ids[mask.bool()].tolist())
        return ids_BL, mask_BL

    def _model_call(self, inps: torch.Tensor, *args: Any, **options: Any) -> Any:
        logits = super()._model_call(inps, *args, **options)
        self._step(inps.shape[0])
        return logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> Any:
        options = {"max_new_tokens": max_length - context.shape[1], **options}
        with torch.no_grad():
            out = super()._model_generate(context, max_length, stop, **options)
        self._step(context.shape[0])
        return out


@lru_cache(maxsize=1)
def _recorder() -> Any:
    from lm_eval.models.huggingface import HFLM

    return type("Recorder", (_Recording, HFLM), {})
