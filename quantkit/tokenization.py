"""Does the tokenizer beside the weights give the tokens that the original's gives? Who loads the output gets this one.

A BOS that is added or lost, another merge, a chat template that is applied twice: the weights are right then, each
figure of them too, and every answer is worse. So texts and a chat go through both, with all that each adds of itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from quantkit.errors import GateError

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
TEXTS, LENGTH = 16, 2000  # of the held-out texts, characters of each
CHAT = [
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "A sequence."},
    {"role": "user", "content": "And a tuple?"},
]


def check(folder: Path, original: Any, texts: Sequence[str], *, trust_remote_code: bool = False) -> str:
    """Compares a folder's tokenizer with the original's; gives a note where there is none to compare, else "".

    Raises GateError at the first text, or the chat, of which the two make other tokens.
    """
    if not any((folder / name).is_file() for name in FILES):
        return "there is no tokenizer beside the weights: the original's was used"
    try:
        own = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, ImportError) as e:
        line = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise GateError(f"{folder}: its tokenizer cannot be loaded ({line}); copy the original's files") from None
    for text in texts[:TEXTS]:
        found, wanted = (x(text[:LENGTH], verbose=False)["input_ids"] for x in (own, original))
        if found != wanted:
            raise GateError(_said(folder, "a held-out text", found, wanted))
    if original.chat_template is not None:
        if own.chat_template is None:
            raise GateError(f"{folder}: its tokenizer has lost the chat template; copy the original's files")
        found, wanted = (_chat(x) for x in (own, original))
        if found != wanted:
            raise GateError(_said(folder, "a chat", found, wanted))
    return ""


def _chat(tokenizer: Any) -> list[int]:
    """Tokens of a chat with a further turn to come; of two turns fewer, where a template refuses more."""
    for chat in (CHAT, CHAT[:1]):
        try:
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        except Exception:  # a template is a program, and raises what it likes
            continue
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
    return []


def _said(folder: Path, what: str, found: Sequence[int], wanted: Sequence[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(found, wanted)) if a != b), min(len(found), len(wanted)))
    shown = [list(x[at : at + 4]) for x in (found, wanted)]
    return (
        f"{folder}: its tokenizer makes {len(found)} tokens of {what}, the original's {len(wanted)}; from the "
        f"{at + 1}. on they are {shown[0]}, not {shown[1]}: a BOS, a chat template or the vocabulary differs. Copy the "
        "original's tokenizer files"
    )
