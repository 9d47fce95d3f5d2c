"""Generation for `quantkit serve`: stop strings, sampling by request, prompts that fit.

transformers' continuous batching knows no stop strings and samples every request like the first; without it a stop
string stays in the text. `Managed` stands between the server's handlers and its managers: a stop string ends a request
and is cut off, also where it comes in pieces, and each request has its own temperature, top_k and top_p.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from typing import Any

import torch


class StopFilter:
    """Text in pieces, up to the first of some stop strings. What may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held, self.stopped = tuple(stops), "", False

    def feed(self, text: str) -> str:
        """What can be given out now."""
        if self.stopped:
            return ""
        self.held += text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            out, self.held = self.held[: min(found)], ""
            return out
        keep = max((self._beginning(stop) for stop in self.stops), default=0)
        out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return out

    def _beginning(self, stop: str) -> int:
        """How many characters at the end of the text a stop string begins with."""
        longest = min(len(stop) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)

    def rest(self) -> str:
        """At the end: what was held back in vain."""
        out, self.held = self.held, ""
        return out


class StoppedQueue:
    """Stands for the queue from which a handler takes text: items pass through a StopFilter.

    Items are str, or others that pass (reasoning is a str of its own kind, and is not searched); None ends it.
    """

    def __init__(self, queue: Any, streamer: Any, stops: Sequence[str]) -> None:
        self.queue, self.streamer, self.filter = queue, streamer, StopFilter(stops)
        self.ready: list[Any] = []
        self.ended = False

    async def get(self) -> Any:
        while not self.ready:
            self._take(await self.queue.get())
        return self.ready.pop(0)

    def get_nowait(self) -> Any:
        while not self.ready:
            if self.ended:
                raise asyncio.QueueEmpty
            self._take(self.queue.get_nowait())
        return self.ready.pop(0)

    def _take(self, item: Any) -> None:
        if self.ended:
            return
        if type(item) is str:
            text = self.filter.feed(item)
            self.ready += [text] if text else []
            if self.filter.stopped:
                self.streamer.cancel()
                self._end(None)
        elif item is None or type(item).__name__ == "_StreamError":
            rest = self.filter.rest()
            self.ready += [rest] if rest else []
            self._end(item)
        else:
            self.ready.append(item)

    def _end(self, item: Any) -> None:
        self.ended = True
        self.ready.append(item)


class PerRequest:
    """transformers' manager of continuous batching, with what a request said about sampling added to it."""

    def __init__(self, manager: Any, sampling: dict[str, dict[str, Any]]) -> None:
        self._manager, self._sampling = manager, sampling

    def add_request(self, input_ids: Any, request_id: str | None = None, **options: Any) -> Any:
        own = self._sampling.pop(str(request_id), {})
        return self._manager.add_request(input_ids, request_id=request_id, **options, **own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


class Managed:
    """One of transformers' managers (sequential, or of continuous batching) behind the same methods.

    refuse   message -> the exception that a handler turns into a response of 400
    longest  tokens that the model takes
    words    of its vocabulary
    """

    def __init__(self, manager: Any, refuse: Any, longest: int, words: int) -> None:
        self.manager, self.refuse, self.longest, self.words = manager, refuse, longest, words
        self.sampling: dict[str, dict[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.manager, name)

    def init_cb(self, model: Any, gen_config: Any) -> None:
        """Once: a config in which every processor is there that a request may set."""
        if getattr(self.manager, "_cb", None) is not None:
            return
        config = copy.deepcopy(gen_config)
        config.do_sample, config.temperature, config.top_k, config.top_p = True, 0.5, 1, 0.5
        config.stop_strings = config.sequence_bias = config.repetition_penalty = None
        inner = model.init_continuous_batching(
            generation_config=config, continuous_batching_config=self.manager._cb_config
        )
        break_ties(inner.logit_processor.logits_processor)
        inner.start()
        self.manager._cb = PerRequest(inner, self.sampling)

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[Any, Any]:
        """As transformers' own: a queue of text, and the streamer that can be cancelled."""
        config, stops = self._prepared(inputs, gen_config, request_id)
        queue, streamer = self.manager.generate_streaming(
            model, processor, inputs, config, request_id=request_id, response_parser=response_parser
        )
        return (StoppedQueue(queue, streamer, stops) if stops else queue), streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        """As transformers' own: text, tokens of the prompt, and the tokens of the text."""
        if not gen_config.stop_strings:
            config, _ = self._prepared(inputs, gen_config, request_id)
            found: tuple[str, int, Any] = await self.manager.generate_non_streaming(
                model, processor, inputs, config, request_id=request_id
            )
            return found
        queue, streamer = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        text = ""
        try:
            while (item := await queue.get()) is not None:
                if not isinstance(item, str):
                    raise RuntimeError(getattr(item, "msg", str(item)))
                text += item
        except asyncio.CancelledError:  # the client went away
            streamer.cancel()
            raise
        tokenizer = getattr(processor, "tokenizer", processor)
        return text, _length(inputs), tokenizer(text, add_special_tokens=False)["input_ids"]

    def _prepared(self, inputs: Any, gen_config: Any, request_id: str) -> tuple[Any, list[str]]:
        """The config for transformers, which does not see stop strings, and these. Raises what `refuse` gives."""
        length = _length(inputs)
        if not 0 < length < self.longest:
            raise self.refuse(f"the prompt has {length} tokens; the model takes 1 to {self.longest - 1}")
        config = copy.deepcopy(gen_config)
        config.max_new_tokens = min(config.max_new_tokens, self.longest - length)
        stops, config.stop_strings = list(config.stop_strings or ()), None
        if hasattr(self.manager, "init_cb") and hasattr(self.manager, "_cb"):
            self.sampling[request_id] = sampling_of(config, self.words)
        return config, stops


def sampling_of(config: Any, words: int) -> dict[str, Any]:
    """What a request of continuous batching samples by. Greedy is the most likely one of all."""
    if not config.do_sample:
        return {"temperature": 1.0, "top_k": 1, "top_p": 1.0}
    top_k = 50 if config.top_k is None else config.top_k
    return {
        "temperature": float(config.temperature or 1.0),
        "top_k": int(min(top_k or words, words)),
        "top_p": float(1.0 if config.top_p is None else config.top_p),
    }


def break_ties(processors: list[Any]) -> None:
    """Of transformers' processors of a batch, makes that of top_k leave one token to requests with top_k 1.

    It keeps all that are as likely as the k-th, and half precision knows many ties: greedy would not be greedy.
    """
    from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingTopKLogitsWarper

    class OneOfTies(ContinuousBatchingTopKLogitsWarper):
        def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
            kept: torch.Tensor = super().__call__(scores, tensor_arg)
            words = torch.arange(kept.shape[-1], device=kept.device)
            others = (tensor_arg[: kept.shape[0], None] == 1) & (words != kept.argmax(-1, keepdim=True))
            return kept.masked_fill(others, self.filter_value)

    for i, processor in enumerate(processors):
        if type(processor) is ContinuousBatchingTopKLogitsWarper:
            processors[i] = OneOfTies(processor)


def _length(inputs: Any) -> int:
    ids = inputs["input_ids"]
    return len(ids) if isinstance(ids, list) else int(ids.shape[-1])
