"""How the next token is chosen, without a word from the host: fit for a captured graph.

Greedy, or drawn by inversion: one uniform number a row decides, so that the numbers of a whole run can be drawn before
it by any `torch.Generator`, and the same numbers choose the same tokens with and without a graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantkit.errors import InputError

PARTS, WIDE = 64, 16_384  # of a row of logits that is searched in parts, and columns from which that pays

# What else transformers' generate can do, and the values that ask for none of it.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "repetition_penalty"), (1,)),
    **dict.fromkeys(("encoder_repetition_penalty", "typical_p", "guidance_scale", "length_penalty"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "min_p", "diversity_penalty", "penalty_alpha"), (0,)),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), (False,)),
    **dict.fromkeys(("return_dict_in_generate", "renormalize_logits", "remove_invalid_values"), (False,)),
    **dict.fromkeys(("token_healing", "early_stopping", "low_memory", "use_mtp", "is_assistant"), (False,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "constraints"), ()),
    **dict.fromkeys(("force_words_ids", "forced_bos_token_id", "forced_eos_token_id", "stop_strings", "max_time"), ()),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "prompt_lookup_num_tokens"), ()),
    **dict.fromkeys(("top_h", "dola_layers", "prefill_chunk_size", "assistant_model", "streamer"), ()),
    **dict.fromkeys(("logits_processor", "stopping_criteria", "inputs_embeds", "negative_prompt_ids"), ()),
    "use_cache": (True, False),
    "cache_implementation": ("static", "dynamic"),
}


@dataclass(frozen=True)
class Sampling:
    """temperature, then the top_k most likely (0: all), then the fewest that make up top_p, as transformers does."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Raises InputError for what cannot be meant."""
        if not self.temperature > 0:
            raise InputError(f"temperature is {self.temperature}; it must be above 0, or do_sample=False for greedy")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; it must be 0 (no limit) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    @classmethod
    def of(cls, config: Any, given: Mapping[str, Any]) -> Sampling:
        """What is given, else what a model's generation config says, else transformers' defaults (top_k 50)."""
        usual = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
        found: dict[str, Any] = {}
        for name, default in usual.items():
            values = (given.get(name), getattr(config, name, None), default)
            found[name] = next(value for value in values if value is not None)
        return cls(**found) if found["do_sample"] else cls()


def check_neutral(config: Any, given: Mapping[str, Any]) -> None:
    """Raises InputError that names what the model's generation config or the caller asks for and is not done here."""
    for name, value in given.items():
        if name not in NEUTRAL:
            raise InputError(f"quantkit.generate has no argument {name}; model.generate may have it")
        if not _is_neutral(name, value):
            raise InputError(f"quantkit.generate does not do {name}={value!r}; model.generate does")
    for name in NEUTRAL.keys() - given.keys():
        value = getattr(config, name, None)
        if not _is_neutral(name, value):
            raise InputError(
                f"the model's generation config asks for {name}={value!r}, which quantkit.generate does not do; "
                "use model.generate, or set it to None"
            )


def _is_neutral(name: str, value: Any) -> bool:
    return value is None or (not isinstance(value, torch.Tensor) and value in NEUTRAL[name]) or _is_empty(value)


def _is_empty(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict)) and not value


def pick(logits_BV: torch.Tensor, sampling: Sampling, uniform_B: torch.Tensor) -> torch.Tensor:
    """The next token of each row, int64 (B,). logits_BV float32; uniform_B in [0, 1), not read when greedy.

    Of equal logits at the end of the top_k, transformers keeps all; here k are kept.
    """
    if not sampling.do_sample:
        rows, columns = logits_BV.shape
        split = logits_BV.is_cuda and rows < PARTS and columns >= WIDE
        return argmax(logits_BV, math.gcd(columns, PARTS) if split else 1)
    p_BV, ids_BV = probabilities(logits_BV, sampling)
    sums = p_BV.cumsum(-1)
    at = (sums <= uniform_B[:, None] * sums[:, -1:]).sum(-1, keepdim=True).clamp(max=p_BV.shape[-1] - 1)
    # The product may round up to the whole sum, and a scan in parallel need not rise: then the most likely one.
    at = torch.where(p_BV.gather(-1, at) > 0, at, p_BV.argmax(-1, keepdim=True))
    return (at if ids_BV is None else ids_BV.gather(-1, at))[:, 0]


def argmax(x_BV: torch.Tensor, parts: int) -> torch.Tensor:
    """`x_BV.argmax(-1)`, of equal ones the first too, by way of as many parts of a row, which divide it.

    torch takes a row by one block of threads, so that the rest of a GPU stands idle while a few rows are read.
    """
    if parts == 1:
        return x_BV.argmax(-1)
    rows, columns = x_BV.shape
    best, at = x_BV.view(rows, parts, -1).max(-1)
    part = best.argmax(-1, keepdim=True)
    return torch.add(at.gather(-1, part), part, alpha=columns // parts)[:, 0]


def probabilities(logits_BV: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What tokens are drawn by, not normalized, and which tokens these are; None: all, in order."""
    scores, ids = logits_BV / sampling.temperature, None
    if 0 < sampling.top_k < scores.shape[-1]:
        scores, ids = scores.topk(sampling.top_k, dim=-1)
    elif sampling.top_p < 1:
        scores, ids = scores.sort(-1, descending=True)
    p = scores.softmax(-1)
    if sampling.top_p < 1 and ids is not None:
        p = torch.where(p.cumsum(-1) - p < sampling.top_p, p, 0.0)
    return p, ids
