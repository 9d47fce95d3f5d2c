"""Calibration text to token rows. Rows have one length; padding, where there is any, is at the right and masked.

Right padding needs no attention mask in a causal model: no real token ever looks at it. What matters is that it
enters no statistic, which the mask sees to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from quantkit.errors import InputError
from quantkit.hub import ASSETS, BUILTIN

BUILTIN_TEXTS = {"pydocs": "pydocs-calibration.jsonl", "pydocs-heldout": "pydocs-heldout.jsonl"}


@dataclass(frozen=True)
class Rows:
    """Token rows: ids_RL (R, L) int64, mask_RL (R, L) bool (False is padding), and a report of where they come from."""

    ids_RL: torch.Tensor
    mask_RL: torch.Tensor
    report: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Hash of ids and mask: the identity of the calibration data."""
        digest = hashlib.sha256(self.ids_RL.numpy().tobytes())
        digest.update(self.mask_RL.numpy().tobytes())
        return digest.hexdigest()


def load_texts(source: str) -> list[str]:
    """Documents of `builtin:pydocs`, `builtin:pydocs-heldout`, or a .jsonl, .json or .txt file.

    .jsonl: an object with the key `text` a line. .json: a list of strings or of such objects. .txt: one document.
    Raises InputError with file and line for what cannot be read, and for a source without any text.
    """
    if source.startswith(BUILTIN):
        name = source.removeprefix(BUILTIN)
        if name not in BUILTIN_TEXTS:
            raise InputError(
                f"no built-in text is named {source!r}; known: {', '.join(BUILTIN + n for n in BUILTIN_TEXTS)}"
            )
        file = ASSETS / "text" / BUILTIN_TEXTS[name]
    else:
        file = Path(source).expanduser()
    if not file.is_file():
        raise InputError(f"calibration data {source!r} is not a file on this machine")
    try:
        content = file.read_text("utf-8")
    except (UnicodeDecodeError, OSError) as e:
        raise InputError(f"{file}: not readable as UTF-8 text ({e})") from None
    if file.suffix == ".txt":
        texts = [content]
    elif file.suffix == ".jsonl":
        lines = [(i, line) for i, line in enumerate(content.split("\n"), 1) if line.strip()]
        texts = [_text(_parse(line, f"{file}, line {i}"), f"{file}, line {i}") for i, line in lines]
    elif file.suffix == ".json":
        entries = _parse(content, str(file))
        if not isinstance(entries, list):
            raise InputError(f"{file}: holds a {type(entries).__name__} where a list of documents is expected")
        texts = [_text(entry, f"{file}, entry {i}") for i, entry in enumerate(entries)]
    else:
        raise InputError(f"{file}: unknown kind of text {file.suffix!r}; known: .jsonl, .json, .txt")
    texts = [t for t in texts if t.strip()]
    if not texts:
        raise InputError(f"{file}: holds no text")
    return texts


def _parse(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as e:
        raise InputError(f"{where}: not JSON ({e})") from None


def _text(entry: Any, where: str) -> str:
    text = entry.get("text") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise InputError(f"{where}: no string under the key 'text'")
    return text


def pack_rows(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    samples: int | None,
    length: int,
    packing: Literal["concat", "document"] = "concat",
) -> Rows:
    """Tokenizes documents into at most `samples` rows of `length` tokens (None: as many as there are).

    concat    documents, each followed by the end-of-sequence token, are joined and cut; the last, short row is dropped
    document  one document a row: longer ones are cut, shorter ones padded at the right

    Special tokens at a document's start are the tokenizer's own rule. Raises InputError when not one row comes out.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError("the tokenizer has no end-of-sequence token to separate documents with")
    rows: list[list[int]] = []
    masks: list[int] = []
    stream: list[int] = []
    used = cut = tokens = 0
    for text in texts:
        if samples is not None and len(rows) >= samples:
            break
        ids = _with_end(list(tokenizer(text, verbose=False)["input_ids"]), end)
        used += 1
        tokens += len(ids)
        if packing == "document":
            cut += len(ids) > length
            ids = ids[:length]
            masks.append(len(ids))
            rows.append(ids + [end] * (length - len(ids)))
            continue
        stream += ids
        while len(stream) >= length and (samples is None or len(rows) < samples):
            rows.append(stream[:length])
            masks.append(length)
            stream = stream[length:]
    if not rows:
        raise InputError(
            f"the text has {tokens} tokens, less than one row of {length}; give more text or a smaller length"
        )
    lengths = torch.tensor(masks)
    mask_RL = torch.arange(length)[None] < lengths[:, None]
    report = {
        "documents_used": used,
        "documents_unused": len(texts) - used,
        "documents_cut": cut,
        "rows": len(rows),
        "rows_wanted": samples,
        "length": length,
        "tokens": int(mask_RL.sum()),
        "padding": int((~mask_RL).sum()),
        "tokens_dropped": len(stream),
        "packing": packing,
    }
    return Rows(torch.tensor(rows, dtype=torch.int64), mask_RL, report)


def _with_end(ids: list[int], end: int) -> list[int]:
    return ids if ids and ids[-1] == end else [*ids, end]
