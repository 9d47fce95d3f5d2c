"""How fast a model in memory generates and reads prompts, and how many bytes its weights take.

A time is the median of several runs after one that compiles and captures what there is to; the device has finished
before a clock is read. Prompts are random tokens, nothing ends a row early.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from quantkit.errors import InputError
from quantkit.runtime.generate import generate

# name -> what generates the tokens
LOOPS = {
    "quantkit": "quantkit.generate; on a GPU a decoding step is one CUDA graph",
    "quantkit-compiled": "quantkit.generate with the step compiled",
    "quantkit-eager": "quantkit.generate step by step",
    "transformers": "model.generate, eager, with a cache that grows",
    "transformers-static": "model.generate with a static cache, which compiles the step on a GPU",
}


@dataclass(frozen=True)
class Speed:
    """Of `batch` rows, each with `prompt` tokens read and `new` ones generated.

    seconds   median of the whole
    first     median of the same with one token: reading the prompt, mostly
    compiled  seconds of the first run, in which everything is compiled
    """

    loop: str
    batch: int
    prompt: int
    new: int
    seconds: float
    first: float
    compiled: float
    runs: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Tokens a second, the prompt's time included."""
        return self.batch * self.new / self.seconds

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first token."""
        return self.batch * (self.new - 1) / max(self.seconds - self.first, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "tokens_per_second": self.rate, "decode_tokens_per_second": self.decode_rate}


def wait(device: torch.device) -> None:
    """Until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(call: Callable[[], object], device: torch.device, runs: int) -> tuple[float, tuple[float, ...]]:
    """The median of `runs` times of a call, and all of them."""
    times = []
    for _ in range(runs):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times), tuple(times)


@contextmanager
def endless(model: Any) -> Iterator[None]:
    """The model's generation config without tokens that end a row, sampling, and all else."""
    kept = model.generation_config
    model.generation_config = GenerationConfig(pad_token_id=0)
    try:
        yield
    finally:
        model.generation_config = kept


def prompt_ids(model: Any, batch: int, length: int) -> torch.Tensor:
    """The same random tokens each time, (batch, length) int64."""
    device = model.get_input_embeddings().weight.device
    words = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(1, words, (batch, length), generator=torch.Generator().manual_seed(0))
    return ids.to(device)


def tokens_of(model: Any, ids: torch.Tensor, new: int, loop: str, cache: Any = None) -> torch.Tensor:
    """Generates `new` tokens by one of LOOPS. Raises InputError for another name."""
    if loop == "quantkit":
        return generate(model, ids, new, past_key_values=cache)
    if loop == "quantkit-compiled":
        return generate(model, ids, new, past_key_values=cache, compile=True)
    if loop == "quantkit-eager":
        return generate(model, ids, new, past_key_values=cache, graph=False)
    if loop not in LOOPS:
        raise InputError(f"unknown loop {loop!r}; known: {', '.join(LOOPS)}")
    static = {"cache_implementation": "static"} if loop == "transformers-static" else {}
    mask = torch.ones_like(ids)
    found: torch.Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, use_cache=True, **static
    )
    return found


def generation(
    model: Any, batch: int, prompt: int, new: int, *, loop: str = "quantkit", runs: int = 5, cache: Any = None
) -> Speed:
    """Times generation. Raises InputError when a model gives fewer tokens than asked for."""
    ids = prompt_ids(model, batch, prompt)
    device = ids.device
    with endless(model):
        wait(device)
        start = time.perf_counter()
        made = tokens_of(model, ids, new, loop, cache)
        wait(device)
        compiled = time.perf_counter() - start
        if made.shape[1] != prompt + new:
            raise InputError(f"{loop} gave {made.shape[1] - prompt} tokens; {new} were asked for")
        seconds, times = median_seconds(lambda: tokens_of(model, ids, new, loop, cache), device, runs)
        first, _ = median_seconds(lambda: tokens_of(model, ids, 1, loop, cache), device, runs)
    return Speed(loop, batch, prompt, new, seconds, first, compiled, times)


@torch.no_grad()
def prefill(model: Any, batch: int, length: int, *, runs: int = 5) -> float:
    """Median seconds of one forward over `length` tokens that keeps keys and values, and gives the last logits."""
    ids = prompt_ids(model, batch, length)

    def forward() -> None:
        model(input_ids=ids, use_cache=True, logits_to_keep=1)

    forward()
    return median_seconds(forward, ids.device, runs)[0]


def weight_bytes(model: Any) -> dict[str, int]:
    """Bytes of all parameters and buffers, what is shared counted once, and of embeddings and head among them."""
    seen: dict[tuple[torch.device, int], int] = {}
    outside: dict[tuple[torch.device, int], int] = {}
    head = model.get_output_embeddings()
    for module in (model, model.get_input_embeddings(), head):
        for t in () if module is None else (*module.parameters(), *module.buffers()):
            place = (t.device, t.data_ptr())
            (seen if module is model else outside)[place] = t.nbytes
    return {"all": sum(seen.values()), "embeddings": sum(size for place, size in outside.items() if place in seen)}


def random_dense(config: PretrainedConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A dense model of a config, with random weights, on a device. A quantized model's config is taken as dense."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)
