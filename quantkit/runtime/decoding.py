"""One step of generation, on buffers that stay where they are: run as it is, compiled, or as one CUDA graph.

A step reads the last token of each row and its position, runs the model on them, chooses the next token, and writes it
down; it also notes which rows have ended. Nothing of that waits for the host, so that a graph of a step is replayed as
often as tokens are wanted, and the host looks only now and then whether all rows are done.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, StaticCache, StaticLayer, StaticSlidingWindowLayer

from quantkit.errors import InputError
from quantkit.runtime.sampling import Sampling, pick

WARM_UP = 2  # steps before a capture: kernels are compiled and loaded in them
ROOM = WARM_UP + 1  # slots that they write and that are written again
SMALL = 65_536  # elements of a tensor that says how full a cache is; keys and values have more


@dataclass
class Fill:
    """How full a cache is: `length` (1,) int64, and on the host only whether it is empty."""

    length: torch.Tensor
    empty: bool = True


class FullLayer(StaticLayer):
    """A static layer that shares one counter with all others: whoever drives the model moves it on, once a step.

    transformers' own counts in each layer by itself, which is three small kernels a layer and token.
    """

    def __init__(self, max_cache_len: int, fill: Fill) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.fill = fill
        self.cumulative_length = fill.length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, H, L, D) into the slots that come next; gives back all slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens, slots = key_states.shape[-2], self.fill.length
        if tokens > 1:
            slots = slots + torch.arange(tokens, device=slots.device)
        self.keys.index_copy_(2, slots, key_states)
        self.values.index_copy_(2, slots, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """A number for an empty cache: then no mask needs to be made for the prompt."""
        return 0 if self.fill.empty else self.fill.length

    def reset(self) -> None:
        """Empty again, at the same addresses. What is not finite must not stay: a mask does not hide it."""
        if self.is_initialized:
            self.keys.zero_()
            self.values.zero_()
        self.fill.length.zero_()
        self.fill.empty = True


class FullCache(Cache):
    """Keys and values of every token in every layer; a sliding window is left to the mask."""

    def __init__(self, config: Any, capacity: int, device: torch.device) -> None:
        self.fill = Fill(torch.zeros(1, dtype=torch.int64, device=device))
        layers = StaticCache(config=config, max_cache_len=capacity).layers
        for layer in layers:
            if type(layer) not in (StaticLayer, StaticSlidingWindowLayer):
                raise InputError(
                    f"quantkit.generate keeps keys and values of attention, but this model also has a "
                    f"{type(layer).__name__}; use model.generate"
                )
        text = config.get_text_config(decoder=True)
        if getattr(text, "attention_chunk_size", None) is not None:
            raise InputError("quantkit.generate does not do attention in chunks; use model.generate")
        super().__init__(layers=[FullLayer(capacity, self.fill) for _ in layers])

    @classmethod
    def over(cls, length: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> FullCache:
        """A cache on tensors that are there: keys and values (B, H, slots, D) of each layer, and its length (1,)."""
        cache = cls.__new__(cls)
        cache.fill = Fill(length, empty=False)
        layers = []
        for k, v in zip(keys, values):
            layer = FullLayer(k.shape[2], cache.fill)
            layer.keys, layer.values, layer.dtype, layer.device = k, v, k.dtype, k.device
            layer.is_initialized = True
            layers.append(layer)
        Cache.__init__(cache, layers=layers)
        return cache

    def advance(self, tokens: int) -> None:
        """After a forward over so many tokens."""
        self.fill.length.add_(tokens)
        self.fill.empty = False


def capacity_of(cache: Cache) -> int | None:
    """Tokens that a cache holds of a sequence; None when it grows, or slides, without end."""
    found = [layer.get_max_length() for layer in cache.layers if not getattr(layer, "is_sliding", False)]
    return min((length for length in found if length >= 0), default=None) if found else None


def counts_on_host(cache: Cache) -> str:
    """The name of a kind of layer that counts, or grows, where a CUDA graph does not see it; "" if there is none."""
    known = (layer for layer in cache.layers if isinstance(layer, StaticSlidingWindowLayer) or not layer.is_compileable)
    return next((type(layer).__name__ for layer in known), "") if cache.layers else type(cache).__name__


def counters(cache: Cache) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[tuple[Any, str, int]]]:
    """How full a cache is: its small integer tensors with a copy of each, and the integers of its objects."""
    tensors: dict[int, torch.Tensor] = {}
    integers = []
    for owner in (cache, *cache.layers, *([cache.fill] if isinstance(cache, FullCache) else [])):
        for name, value in vars(owner).items():
            if isinstance(value, torch.Tensor) and not value.is_floating_point() and value.numel() <= SMALL:
                tensors[id(value)] = value
            elif isinstance(value, int) and not isinstance(value, bool):
                integers.append((owner, name, value))
    return [(t, t.clone()) for t in tensors.values()], integers


class Decoder:
    """Buffers of a batch, the cache, and the step that works on them.

    batch, tokens   rows, and how many tokens at most are chosen for each
    cache           anything that transformers' layers take; a FullCache is moved on by the step
    mask            (B, slots) int64 of the cache, 0 where there is padding, or None
    eos, pad        tokens that end a row, and what follows them
    compiled        a step goes through torch.compile, without graph breaks, in two graphs: the model, and the choice
    """

    def __init__(
        self,
        model: Any,
        cache: Cache,
        batch: int,
        tokens: int,
        sampling: Sampling,
        eos: Sequence[int] = (),
        pad: int = 0,
        mask: torch.Tensor | None = None,
        compiled: bool = False,
    ) -> None:
        self.model, self.cache, self.sampling, self.mask = model, cache, sampling, mask
        device = model.get_input_embeddings().weight.device
        self.device = device
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.done = torch.zeros(batch, dtype=torch.bool, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(tokens + ROOM, batch, dtype=torch.int64, device=device)
        self.uniform = torch.zeros(tokens + ROOM if sampling.do_sample else 1, batch, device=device)
        self.eos = torch.tensor(list(eos), dtype=torch.int64, device=device)
        self.pad = torch.tensor(pad, dtype=torch.int64, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.forward, self.finish = self._forward, self._finish
        if compiled:
            self.forward = torch.compile(_own_code(Decoder._forward).__get__(self), fullgraph=True, dynamic=False)
            if not sampling.do_sample:  # what is drawn must not depend on how sums are compiled
                self.finish = torch.compile(_own_code(Decoder._finish).__get__(self), fullgraph=True, dynamic=False)

    def __deepcopy__(self, memo: Any) -> None:
        """A copied model has captured nothing yet."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def close(self) -> None:
        """Lets go of the graph and of all buffers; a compiled forward refers to its decoder."""
        self.graph = None
        self.__dict__.clear()

    def start(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, uniform: torch.Tensor | None
    ) -> None:
        """Runs the prompt, in eager mode, and chooses the first token.

        input_ids, positions  (B, L) int64; mask (B, tokens in the cache + L) or None
        uniform               (tokens, B) float32 in [0, 1), or None when greedy
        """
        self.done.zero_()
        self.count.zero_()
        if uniform is not None:
            self.uniform[: uniform.shape[0]].copy_(uniform)
        if self.mask is not None:
            self.mask.fill_(1)
            if mask is not None:
                self.mask[:, : mask.shape[1]].copy_(mask)
        last = {"logits_to_keep": 1} if _takes(self.model, "logits_to_keep") else {}
        logits = self._run(input_ids, mask, positions, **last)
        if isinstance(self.cache, FullCache):
            self.cache.advance(input_ids.shape[1])
        self.position.copy_(positions[:, -1:])
        self._choose(logits[:, -1].float())

    def step(self) -> None:
        """One more token for each row."""
        self.finish(self.forward())

    def all_done(self) -> bool:
        """Waits for the device."""
        return bool(self.done.all())

    def _run(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, **more: Any) -> torch.Tensor:
        logits: torch.Tensor = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **more,
        ).logits
        return logits

    def _forward(self) -> torch.Tensor:
        return self._run(self.token, self.mask, self.position)[:, -1].float()

    def _finish(self, logits_BV: torch.Tensor) -> None:
        if isinstance(self.cache, FullCache):
            self.cache.advance(1)
        self._choose(logits_BV)

    def _choose(self, logits_BV: torch.Tensor) -> None:
        """Writes down the next token of each row and moves on."""
        uniform = self.uniform.index_select(0, self.count)[0] if self.sampling.do_sample else self.uniform[0]
        token = pick(logits_BV, self.sampling, uniform)
        if self.eos.numel():
            token = torch.where(self.done, self.pad, token)
            self.done |= (token[:, None] == self.eos).any(-1)
        self.token.copy_(token[:, None])
        self.tokens.index_copy_(0, self.count, token[None])
        self.count.add_(1)
        self.position.add_(1)

    def capture(self) -> str | None:
        """Records a step as a CUDA graph; returns why that could not be. State and cache are afterwards as they were.

        Raises InputError for a cache that counts on the host: steps may have changed what it holds.
        """
        state = [(t, t.clone()) for t in (self.token, self.position, self.done, self.count)]
        tensors, integers = counters(self.cache)
        try:
            self._warm_up()
            for owner, name, value in integers:
                if getattr(owner, name) != value:
                    raise InputError(
                        f"{type(self.cache).__name__} counts on the host ({type(owner).__name__}.{name}), which a CUDA "
                        "graph cannot; pass another cache, or graph=False"
                    )
            self.graph = self._captured()
        except RuntimeError as e:
            torch.cuda.synchronize(self.device)
            return f"{type(self.model).__name__} cannot be captured ({str(e).splitlines()[0]})"
        finally:
            for t, old in (*state, *tensors):
                t.copy_(old)
            for owner, name, value in integers:
                setattr(owner, name, value)
        return None

    def _warm_up(self) -> None:
        current, side = torch.cuda.current_stream(self.device), _side_stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.step()
        current.wait_stream(side)

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.step()
        return graph


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One a GPU: cuBLAS keeps a workspace of 32 MiB for every stream that it was called on."""
    return torch.cuda.Stream(device)


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def _own_code(function: Any) -> Any:
    """A copy of a function with a code object of its own, since torch.compile keeps at most eight graphs of one."""
    copy = type(function)(function.__code__.replace(), function.__globals__, function.__name__)
    copy.__kwdefaults__, copy.__defaults__ = function.__kwdefaults__, function.__defaults__
    return copy
