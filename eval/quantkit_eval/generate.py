"""What a model writes, as text: a look at it that no figure replaces."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from quantkit.errors import InputError

# The end of a sentence: a stop before white space, but not the dots of "e.g. " or "i.e. ".
SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)[.!?][\"')\]]*(?=\s|$)")


def continuation(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int = 48) -> str:
    """How the model goes on after `prompt`: its likeliest tokens (greedy), cut after the first sentence, on one line.

    Without a stop in `max_new_tokens` tokens the last, perhaps halved, word goes and "..." ends the text. Sampling
    settings of the model's generation_config are not used: the same model and prompt always give the same text.
    Raises InputError for an empty prompt.
    """
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=True)
    ids = encoded["input_ids"]
    if ids.shape[1] == 0:
        raise InputError("the prompt is empty; give a few words to go on from")
    device = model.get_input_embeddings().weight.device
    config = model.generation_config
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        out = model.generate(
            ids.to(device),
            attention_mask=torch.ones_like(ids, device=device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            eos_token_id=config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id,
            pad_token_id=pad,
        )
    new = out[0, ids.shape[1] :]
    ended = len(new) < max_new_tokens
    return first_sentence(tokenizer.decode(new, skip_special_tokens=True), ended=ended)


def first_sentence(text: str, *, ended: bool) -> str:
    """The first sentence of `text`, white space collapsed. `ended`: it stops by itself, its last word is whole."""
    line = " ".join(text.split())
    stop = SENTENCE_END.search(line)
    if stop:
        return line[: stop.end()]
    if ended or not line:
        return line
    whole, _, _ = line.rpartition(" ")
    return f"{whole or line}..."


def until_end(tokenizer: PreTrainedTokenizerBase, ids_T: torch.Tensor) -> str:
    """Generated tokens as text, up to the first end of text."""
    ids: list[int] = ids_T.tolist()
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(ids))
