"""Held-out text as windows of tokens, always the same ones.

The documents are shuffled by `random.Random(seed)`, each is tokenized without special tokens and followed by EOS, all
are concatenated and cut into windows of `length` tokens; the rest is left out. Shuffled, the first `count` windows are
a sample of the whole text. Windows, not tokens, are the unit of every statistic: tokens of a document are alike.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from quantkit.errors import InputError


def heldout_windows(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int = 512,
    count: int | None = None,
    seed: int = 1,
    warn: Callable[[str], None] = warnings.warn,
) -> torch.Tensor:
    """The first `count` windows of the text (all of them when None), int64 (W, L) on the CPU.

    warn  gets one sentence when the text has fewer windows than `count`; what there is, is returned.
    Raises InputError when the text is too short for one window, or the tokenizer has no EOS token.
    """
    if length < 2 or (count is not None and count < 1):
        raise InputError(f"windows need a length of at least 2 and a count of at least 1; got {length} and {count}")
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError(
            "the tokenizer has no EOS token to put between documents; set eos_token in tokenizer_config.json"
        )
    shuffled = list(texts)
    random.Random(seed).shuffle(shuffled)
    wanted = None if count is None else count * length
    ids: list[int] = []
    for text in shuffled:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids.append(eos)
        if wanted is not None and len(ids) >= wanted:
            break
    found = len(ids) // length
    if found == 0:
        raise InputError(
            f"the validation text has {len(ids)} tokens in {len(shuffled)} documents, less than one window of "
            f"{length}; give more text or a smaller length"
        )
    if count is not None and found < count:
        warn(f"the validation text has {found} windows of {length} tokens, {count} were asked for; using {found}")
    used = found if count is None else min(count, found)
    return torch.tensor(ids[: used * length], dtype=torch.int64).view(used, length)
