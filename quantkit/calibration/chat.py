"""Chats to tokens: the tokenizer's own chat template, and which of the tokens the assistant says.

What the template writes is what a model sees in production, so it is taken as it is: nothing is put before or after it,
and a template without a start token gets none. A template that prints the day is given one fixed day, because the same
chat has to give the same tokens tomorrow.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from quantkit.errors import InputError

Message = dict[str, Any]

# Llama 3.2's template falls back on this day where it has no clock.
DAY = datetime.date(2024, 7, 26)
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])([^"'\\]*)\1\s*\)""")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # what transformers looks for
# Private-use characters: in no template, and hardly ever in a text.
_MARKS = tuple(map(chr, range(0xE000, 0xF8FF)))
_SHAREGPT = {"human": "user", "gpt": "assistant"}


class Dropped(Exception):
    """A document that gives no tokens: `reason` in two or three words, `detail` for the first of its kind."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason, self.detail = reason, detail


def messages(value: Any, where: str) -> list[Message]:
    """A chat as a list of {"role", "content", ...}, without the keys that are null.

    Takes {"from", "value"} too, and one mapping of lists, as some datasets keep a list of mappings. Any role will do:
    whether there is such a role is for the chat template to say. Raises InputError that names the message.
    """
    if isinstance(value, Mapping) and value and all(isinstance(x, list) for x in value.values()):
        value = [dict(zip(value, row)) for row in itertools.zip_longest(*value.values())]
    if not isinstance(value, list | tuple):
        raise InputError(f"{where}: holds {kind(value)} where a list of messages is expected")
    return [_message(entry, f"{where}, message {i}") for i, entry in enumerate(value)]


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, Mapping):
        raise InputError(f"{where}: holds {kind(entry)} where an object with role and content is expected")
    found = {str(key): value for key, value in entry.items() if value is not None}
    if "role" not in found and "from" in found:
        role = found["from"]
        found = {"role": _SHAREGPT.get(role, role) if isinstance(role, str) else role, "content": found.get("value")}
    if not isinstance(found.get("role"), str):
        raise InputError(f"{where}: {_lacks(found, 'role')} where text such as user or assistant is expected")
    content = found.get("content")
    if content is None and found.get("tool_calls"):
        return found
    parts = content if isinstance(content, list) else [{"text": content}]
    if content is None or not all(isinstance(part, Mapping) for part in parts):
        raise InputError(f"{where}: {_lacks(found, 'content')} where text is expected")
    for part in parts:
        if not isinstance(part.get("text"), str | None):
            raise InputError(f"{where}: content holds {kind(part['text'])} where text is expected")
    return found


def _lacks(found: Mapping[str, Any], key: str) -> str:
    return f"{key} holds {kind(found[key])}" if found.get(key) is not None else f"has no {key}"


def kind(value: Any) -> str:
    """What a value is, for an error: "the number nan", "a list of 3", "an object"."""
    if value is None:
        return "nothing"
    if isinstance(value, bool | int | float):
        return f"the value {value}"
    if isinstance(value, Mapping):
        return "an object with " + (", ".join(map(str, list(value)[:8])) or "no keys")
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return f"a list of {len(value)}"
    return "text" if isinstance(value, str) else f"a {type(value).__name__}"


def text_of(message: Message) -> str:
    """What a message says: its content, or the texts of its parts. Tool calls are no text."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


class ChatTemplate:
    """The chat template of a tokenizer. Raises InputError when it has none."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        try:
            source: str | None = tokenizer.get_chat_template()
        except NotImplementedError:  # mistral-common writes its chats without a template
            source = None
        except (ValueError, AttributeError):
            raise InputError(
                "the calibration data are chats, but the tokenizer has no chat template; put a chat_template.jinja "
                "beside it, or take the messages' text as it is with calibration.chat_template: never"
            ) from None
        fixed = None if source is None else _CLOCK.sub(lambda m: repr(DAY.strftime(m[2])), source)
        self._options: dict[str, Any] = {} if fixed is None else {"chat_template": fixed}
        # No word on the model's length, since rows are cut; mistral-common has no such word and takes no such option.
        quiet = {} if fixed is None else {"tokenizer_kwargs": {"verbose": False}}
        self._to_tokens = {"tokenize": True, "return_dict": True, **quiet}
        self._marks_turns = fixed is not None and _GENERATION.search(fixed) is not None
        self._fast = fixed is not None and bool(getattr(tokenizer, "is_fast", False))

    def encode(self, chat: list[Message]) -> list[int]:
        """Token ids of a chat, as the template writes it. Raises Dropped when the template refuses the chat."""
        return list(self._apply(chat, **self._to_tokens)["input_ids"])

    def encode_turns(self, chat: list[Message]) -> tuple[list[int], list[bool]]:
        """Token ids, and True where the assistant speaks: its text and the special token that ends its turn.

        A template with `{% generation %}` says itself where that is. For another, each of the assistant's texts is
        put in place by a mark: where the chat with the mark and the chat itself part, the text begins, and where they
        meet again, it ends. Raises Dropped when the assistant says nothing or the template refuses the chat, and
        InputError when the turns cannot be told apart.
        """
        if not any(m["role"] == "assistant" and text_of(m).strip() for m in chat):
            raise Dropped("no assistant text")
        if self._marks_turns:
            found = self._apply(chat, return_assistant_tokens_mask=True, **self._to_tokens)
            return list(found["input_ids"]), [bool(x) for x in found["assistant_masks"]]
        if not self._fast:
            raise InputError(
                "calibration.tokens: assistant needs a tokenizer that knows each token's place in the text (a fast "
                "one), or a chat template with {% generation %}; this one has neither, so use tokens: all"
            )
        whole = self._apply(chat, tokenize=False)
        found = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, counted = list(found["input_ids"]), [False] * len(found["input_ids"])
        for span in self._spans(chat, whole):
            for i in self._tokens(ids, found["offset_mapping"], *span):
                counted[i] = True
        return ids, counted

    def render(self, chat: list[Message]) -> str:
        """The chat as the template writes it. Raises Dropped when the template refuses it."""
        return str(self._apply(chat, tokenize=False))

    def _apply(self, chat: list[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(chat, **self._options, **options)
        except (TemplateError, TypeError, ValueError, KeyError) as e:
            raise Dropped("refused by the chat template", str(e).split("\n")[0][:200]) from None

    def _spans(self, chat: list[Message], whole: str) -> list[tuple[int, int]]:
        """Where each text of the assistant begins and ends in the chat as it is written."""
        mark = next(m for m in _MARKS if m not in whole)
        spans: list[tuple[int, int]] = []
        for i, message in enumerate(chat):
            if message["role"] != "assistant" or not text_of(message).strip():
                continue
            content = mark if isinstance(message["content"], str) else [{"type": "text", "text": mark}]
            marked = self._apply([*chat[:i], {**message, "content": content}, *chat[i + 1 :]], tokenize=False)
            if mark not in marked:
                continue  # the template leaves this turn out
            before, _, after = marked.partition(mark)
            start = _common(before, whole)
            end = len(whole) - _common(after[::-1], whole[start:][::-1])
            if mark in after or (spans and start < spans[-1][1]):
                raise InputError(
                    f"message {i}: the chat template does not write the turns one after another, so "
                    "calibration.tokens: assistant cannot tell them apart; use tokens: all"
                )
            spans.append((start, end))
        return spans

    def _tokens(self, ids: list[int], offsets: Sequence[tuple[int, int]], start: int, end: int) -> range:
        """The tokens of whole[start:end], and the special token that follows, if one does."""
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
        if not inside:
            return range(0)
        stop = inside[-1] + 1
        added = self.tokenizer.added_tokens_decoder
        if stop < len(ids) and ids[stop] in added and added[ids[stop]].special:
            stop += 1
        return range(inside[0], stop)


def _common(a: str, b: str) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
