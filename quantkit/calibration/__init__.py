"""Calibration texts to token rows. Rows have one length; padding, where there is any, is at the right.

Right padding needs no attention mask in a causal model: no real token ever looks at it. What matters is that it
enters no statistic, which the mask sees to; so does a chat's every token that the assistant does not say, when only
the assistant counts.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from quantkit.calibration.chat import ChatTemplate, Dropped
from quantkit.calibration.sources import PYTHON, Document, Source, from_iterable, open_source, pin, shuffled
from quantkit.errors import InputError

__all__ = ["PYTHON", "Rows", "from_iterable", "load_texts", "open_source", "pack_rows", "pin", "said"]

Which = Literal["all", "assistant"]

# A larger source of held-out texts is read up to here: a few dozen windows need no more.
HELDOUT_CHARACTERS = 16_000_000


@dataclass(frozen=True)
class Rows:
    """Token rows, and a report of where they come from.

    ids_RL   (R, L) int64
    mask_RL  (R, L) bool: the tokens that enter statistics. Padding never does.
    """

    ids_RL: torch.Tensor
    mask_RL: torch.Tensor
    report: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Hash of ids and mask: the identity of the calibration data."""
        digest = hashlib.sha256(self.ids_RL.numpy().tobytes())
        digest.update(self.mask_RL.numpy().tobytes())
        return digest.hexdigest()


def load_texts(
    data: str,
    *,
    subset: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    column: str | None = None,
    tokenizer: Any = None,
    characters: int = HELDOUT_CHARACTERS,
) -> list[str]:
    """The texts of a source, as `open_source` takes it, up to a number of characters; empty ones are left out.

    tokenizer  writes chats as text, by its chat template; without one a chat is an InputError
    """
    source = open_source(data, subset=subset, split=split, revision=revision, column=column)
    texts: list[str] = []
    template: ChatTemplate | None = None
    for document in source.documents:
        if not any(text.strip() for text in document.texts):
            continue
        if isinstance(document.content, list):
            if tokenizer is None:
                raise InputError(f"{document.where}: is a chat, and texts are expected here")
            template = template or ChatTemplate(tokenizer)
            try:
                texts.append(template.render(document.content))
            except Dropped as e:
                raise InputError(f"{document.where}: {e.reason}: {e.detail}") from None
        else:
            texts += document.texts
        characters -= len(texts[-1])
        if characters <= 0:
            break
    if not texts:
        raise InputError(f"{data}: holds no text")
    return texts


def pack_rows(
    source: Source | Iterable[Any],
    tokenizer: Any,
    *,
    samples: int | None,
    length: int,
    packing: Literal["concat", "document"] = "concat",
    min_tokens: int = 1,
    shuffle: int | None = None,
    chat_template: Literal["auto", "never"] = "auto",
    tokens: Which = "all",
) -> Rows:
    """Tokenizes documents into at most `samples` rows of `length` tokens (None: as many as there are).

    source         of `open_source`, or texts and lists of messages
    packing        concat: documents are joined and cut; the last, short row is dropped.
                   document: one document a row; longer ones are cut, shorter ones padded at the right
    min_tokens     with packing document, documents of fewer tokens that do not fill a row are dropped
    shuffle        seed of the documents' order
    chat_template  auto: chats go through the tokenizer's template; never: their texts are joined by empty lines
    tokens         assistant: the mask is True only where the assistant speaks, and documents must be chats

    A text begins with the special tokens of the tokenizer's own rule and ends with its end-of-sequence token; a chat
    is what the template makes of it. Empty and repeated documents are dropped; the report counts them. Reading stops
    when the rows are full. Raises InputError when not one row comes out.
    """
    source = source if isinstance(source, Source) else from_iterable(source)
    encoder = _Encoder(tokenizer, chat_template, tokens)
    tally = _Tally()
    pack = _Pack(length, samples, packing == "concat", encoder.filler)
    documents = source.documents if shuffle is None else shuffled(source.documents, shuffle)
    exhausted = True
    for document in documents:
        tally.read += 1
        try:
            key = tally.check(document)
            encoded = encoder(document)
            if packing == "document" and len(encoded.ids) < min(min_tokens, length):
                raise Dropped("shorter than min_tokens")
        except Dropped as e:
            tally.drop(e, document.where)
            continue
        except InputError as e:
            raise InputError(f"{document.where}: {e}") from None
        tally.keep(key, encoded)
        pack.add(encoded)
        if pack.full:
            exhausted = False
            break
    source.documents.close()
    if not pack.rows:
        raise InputError(_no_row(source.name, tally, pack))
    report = {"source": source.report, **tally.report(), "source_exhausted": exhausted, **pack.report()}
    settings = {"packing": packing, "shuffle": shuffle, "counting": tokens}
    return Rows(torch.stack(pack.rows), torch.stack(pack.masks), {**report, **settings})


def said(report: dict[str, Any], name: str) -> list[str]:
    """The data report in a few lines, for a reader."""
    rows, tokens = report["rows"], report["tokens"]
    lines = [f"calibration: {tokens:,} tokens in {rows} rows of {report['length']} from {name}"]
    lengths = report["document_tokens"]
    whole = "all there are" if report["source_exhausted"] else "then the rows were full"
    read, kept, cut = (f"{report[f'documents_{what}']:,}" for what in ("read", "kept", "cut"))
    lines.append(
        f"documents: {read} read, {whole}; {kept} kept, {cut} cut; {lengths['min']:,} to {lengths['max']:,} tokens, "
        f"median {lengths['median']:,}"
    )
    dropped = [f"{count:,} {reason}" for reason, count in report["documents_dropped"].items()]
    if dropped:
        first = [f"{reason}: {where}" for reason, where in report["first_dropped"].items()]
        lines.append(f"documents dropped: {', '.join(dropped)} (first {'; '.join(first)})")
    shares = []
    if report["padding"]:
        shares.append(f"{report['padding_share']:.1%} of the rows is padding")
    if report["template_tokens"]:
        shares.append(f"{report['template_share']:.1%} of the documents' tokens are the chat template's")
    if report["counted_tokens"] != tokens:
        shares.append(f"{report['counted_tokens']:,} tokens are the assistant's and enter statistics")
    return [*lines, "; ".join(shares)] if shares else lines


@dataclass(frozen=True)
class _Encoded:
    """A document's tokens, which of them count, and how many of them its chat template added."""

    ids: list[int]
    counted: list[bool]
    template: int = 0


class _Encoder:
    """Documents to tokens, by the tokenizer's rules. The chat template is looked up when the first chat comes."""

    def __init__(self, tokenizer: Any, chat_template: str, tokens: str) -> None:
        self._tokenizer = tokenizer
        self._use_template = chat_template == "auto"
        self._only_assistant = tokens == "assistant"
        self._template: ChatTemplate | None = None
        self.filler = next((x for x in (tokenizer.eos_token_id, _pad(tokenizer)) if x is not None), 0)

    def __call__(self, document: Document) -> _Encoded:
        if isinstance(document.content, list) and self._use_template:
            return self._chat(document)
        if self._only_assistant:
            raise InputError(
                "is plain text, and calibration.tokens: assistant counts only what the assistant says in a chat"
            )
        end = self._tokenizer.eos_token_id
        if end is None:
            raise InputError("the tokenizer has no end-of-sequence token to separate documents with")
        ids = self._ids("\n\n".join(document.texts))
        if not ids or ids[-1] != end:
            ids.append(end)
        return _Encoded(ids, [True] * len(ids))

    def _chat(self, document: Document) -> _Encoded:
        assert isinstance(document.content, list)
        self._template = self._template or ChatTemplate(self._tokenizer)
        if self._only_assistant:
            ids, counted = self._template.encode_turns(document.content)
        else:
            ids = self._template.encode(document.content)
            counted = [True] * len(ids)
        spoken = sum(len(self._ids(text, add_special_tokens=False)) for text in document.texts)
        return _Encoded(ids, counted, max(0, len(ids) - spoken))

    def _ids(self, text: str, **options: Any) -> list[int]:
        return list(self._tokenizer(text, verbose=False, **options)["input_ids"])


def _pad(tokenizer: Any) -> int | None:
    return getattr(tokenizer, "pad_token_id", None)


@dataclass
class _Tally:
    """What became of the documents."""

    read: int = 0
    lengths: list[int] = field(default_factory=list)
    template: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    seen: set[bytes] = field(default_factory=set)
    digest: Any = field(default_factory=hashlib.sha256)

    def check(self, document: Document) -> bytes:
        """The hash of a document. Raises Dropped for what is no text, empty, or was there before."""
        if document.content is None:
            raise Dropped("not text", "null")
        if not any(text.strip() for text in document.texts):
            raise Dropped("empty")
        key = _hash(document)
        if key in self.seen:
            raise Dropped("duplicate")
        self.seen.add(key)
        return key

    def drop(self, why: Dropped, where: str) -> None:
        self.dropped[why.reason] += 1
        self.first.setdefault(why.reason, f"{where}: {why.detail}" if why.detail else where)

    def keep(self, key: bytes, encoded: _Encoded) -> None:
        self.lengths.append(len(encoded.ids))
        self.template += encoded.template
        self.digest.update(key)

    def report(self) -> dict[str, Any]:
        found = self.lengths
        return {
            "documents_read": self.read,
            "documents_kept": len(found),
            "documents_dropped": dict(sorted(self.dropped.items())),
            "first_dropped": dict(sorted(self.first.items())),
            "documents_sha256": self.digest.hexdigest(),
            "document_tokens": {"min": min(found), "median": statistics.median_low(found), "max": max(found)},
            "template_tokens": self.template,
            "template_share": round(self.template / sum(found), 4),
        }


def _hash(document: Document) -> bytes:
    """Of the content. Raises Dropped for half a surrogate pair, which is no character and has no UTF-8."""
    try:
        content = json.dumps(document.content, sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(content.encode("utf-8")).digest()
    except UnicodeEncodeError:
        raise Dropped("not text", "half a surrogate pair") from None


class _Pack:
    """Rows under way."""

    def __init__(self, length: int, samples: int | None, joined: bool, filler: int) -> None:
        self.length, self.samples, self.joined, self.filler = length, samples, joined, filler
        self.rows: list[torch.Tensor] = []
        self.masks: list[torch.Tensor] = []
        self.cut = self.uncounted = self.padding = 0
        self._ids: list[int] = []
        self._counted: list[bool] = []

    @property
    def full(self) -> bool:
        return self.samples is not None and len(self.rows) >= self.samples

    def add(self, document: _Encoded) -> None:
        """Puts a document into the rows, as far as there is room."""
        length = self.length
        if not self.joined:
            self.cut += len(document.ids) > length
            self._row(document.ids[:length], document.counted[:length])
            return
        self._ids += document.ids
        self._counted += document.counted
        start = 0
        while len(self._ids) - start >= length and not self.full:
            self._row(self._ids[start : start + length], self._counted[start : start + length])
            start += length
        del self._ids[:start], self._counted[:start]

    def _row(self, ids: list[int], counted: list[bool]) -> None:
        """One row, padded; none where no token counts, since it would change nothing."""
        missing = self.length - len(ids)
        if not any(counted):
            self.uncounted += 1
            return
        self.padding += missing
        self.rows.append(torch.tensor(ids + [self.filler] * missing, dtype=torch.int64))
        self.masks.append(torch.tensor(counted + [False] * missing))

    def report(self) -> dict[str, Any]:
        size = len(self.rows) * self.length
        return {
            "documents_cut": self.cut,
            "rows": len(self.rows),
            "rows_wanted": self.samples,
            "rows_uncounted": self.uncounted,
            "length": self.length,
            "tokens": size - self.padding,
            "counted_tokens": sum(int(mask.sum()) for mask in self.masks),
            "padding": self.padding,
            "padding_share": round(self.padding / size, 4),
            "tokens_dropped": len(self._ids),
        }


def _no_row(name: str, tally: _Tally, pack: _Pack) -> str:
    dropped = "; ".join(f"{n} {reason} (first {tally.first[reason]})" for reason, n in sorted(tally.dropped.items()))
    why = f"{tally.read} documents read" + (f", dropped: {dropped}" if dropped else "")
    if not tally.lengths:
        return f"{name}: holds no text to calibrate with ({why})"
    if pack.uncounted:
        return (
            f"{name}: the assistant says nothing in the {pack.uncounted} rows of {pack.length} tokens ({why}); "
            "give more text or a larger length"
        )
    return (
        f"{name}: the text has {sum(tally.lengths)} tokens, less than one row of {pack.length} ({why}); give more text "
        "or a smaller length"
    )
