"""Next-token flips: how often a quantized model would have gone another way where its original generates greedily.

The original continues each prompt, its likeliest token every time. Then the quantized model reads what was written, all
at once, and a token that is not its own likeliest one counts as a flip: 0 means that both write the same text. A flip
early in a text does not spoil what follows, unlike a comparison of two generated texts.

Greedy generation has a floor of its own: logits differ in the last bits with the size of a batch and with the cache, so
near ties fall either way. The original is measured against itself in the same way, and that is given beside.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from quantkit.errors import InputError
from quantkit_eval.intervals import Interval, mean_interval


@dataclass(frozen=True)
class Flips:
    """rate: share of tokens that flip, prompts as samples; floor: the original's own, read in another batch."""

    rate: Interval
    floor: float
    prompts: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Written:
    """What the original went on to: int64 (P, T), the first `prompt` tokens given; floor: as in Flips."""

    text_PT: torch.Tensor
    prompt: int
    floor: float


def generated(model: Any, prompts_PL: torch.Tensor, new_tokens: int, *, batch_size: int = 16) -> torch.Tensor:
    """int64 (P, L + new_tokens): what a model writes greedily after each prompt. It does not stop at EOS."""
    device = model.get_input_embeddings().weight.device
    written = []
    with torch.no_grad():
        for batch in prompts_PL.split(batch_size):
            ids = batch.to(device)
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                use_cache=True,
                eos_token_id=None,
                pad_token_id=0,
            )
            written.append(out.cpu())
    return torch.cat(written)


def flipped(model: Any, text_PT: torch.Tensor, prompt: int, *, batch_size: int = 8) -> torch.Tensor:
    """bool (P, T - prompt): the tokens after the prompt that are not the model's likeliest."""
    device = model.get_input_embeddings().weight.device
    found = []
    with torch.no_grad():
        for batch in text_PT.split(batch_size):
            logits = model(input_ids=batch.to(device), use_cache=False).logits[:, prompt - 1 : -1]
            found.append(logits.argmax(-1).cpu() != batch[:, prompt:])
    return torch.cat(found)


def flips(original: Any, quantized: Any, prompts_PL: torch.Tensor, new_tokens: int) -> Flips:
    """Flips of `quantized` on what `original` writes. prompts_PL: int64 (P, L), unpadded; raises as `written`."""
    return flips_on(written(original, prompts_PL, new_tokens), quantized)


def written(original: Any, prompts_PL: torch.Tensor, new_tokens: int) -> Written:
    """The half of `flips` that the original does.

    Raises InputError when prompts and what is generated do not fit the model's positions.
    """
    length = prompts_PL.shape[1]
    positions = getattr(original.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length + new_tokens > positions:
        raise InputError(
            f"validate.generation: prompts of {length} tokens and {new_tokens} generated ones are more than the "
            f"model's {positions} positions; lower validate.generation.tokens"
        )
    text = generated(original, prompts_PL, new_tokens)
    return Written(text, length, flipped(original, text, length).double().mean().item())


def flips_on(found: Written, quantized: Any) -> Flips:
    """The half of `flips` that the quantized model does."""
    prompts, length = found.text_PT.shape
    rate = mean_interval(flipped(quantized, found.text_PT, found.prompt).double().mean(1).tolist())
    return Flips(rate, found.floor, prompts, length - found.prompt)
