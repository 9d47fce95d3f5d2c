"""YAML that refuses what a reader would misread, and remembers the line of every key.

YAML 1.1 as PyYAML reads it, with three differences: a key given twice is an error (PyYAML keeps the last one), `1e-2`
is a number (YAML 1.1 asks for `1.0e-2` and reads anything less as text), and what a page of settings does not need is
refused: anchors and aliases, which can make a small file grow without bound, tags, deep nesting, long numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from quantkit.errors import InputError

DEPTH = 64  # levels; a recipe has seven
DIGITS = 100

KeyPath = tuple[str | int, ...]

_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+")


class _Loader(yaml.SafeLoader):
    """The safe loader: it makes plain values only, never objects."""


class _Dumper(yaml.SafeDumper):
    """The safe dumper; it quotes what `_Loader` would read as something other than text."""


SURROGATE = re.compile("[\ud800-\udfff]")
_BREAKS = re.compile("[\x85\u2028\u2029\r]")


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    """PyYAML folds these line breaks into spaces unless they are written as escapes, in double quotes."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if _BREAKS.search(value) else None)


_Dumper.add_representer(str, _text)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


@dataclass
class Document:
    """A YAML text as plain values; `lines` says where each key or list item stands, from 1; `()` is the whole."""

    data: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)


def parse(text: str, where: str) -> Document:
    """Reads one YAML document. Raises InputError with `where`, line and column for anything that is not clean YAML."""
    try:
        _check_events(text, where)
        node = yaml.compose(text, Loader=_Loader)
        lines: dict[KeyPath, int] = {}
        if node is not None:
            _walk(node, (), lines, where)
        return Document(_Loader(text).get_single_data(), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = where if mark is None else f"{where}:{mark.line + 1}:{mark.column + 1}"
        raise InputError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line, code = text.count("\n", 0, error.position) + 1, ord(text[error.position])
        raise InputError(f"{where}:{line}: the character U+{code:04X} is not allowed in YAML") from None
    except ValueError as error:  # a date such as 2024-13-40, a number of more digits than Python converts
        raise InputError(f"{where}: not valid YAML: {error}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply to be read") from None


def _check_events(text: str, where: str) -> None:
    """Refuses, as soon as they are met, what makes a small text large or slow: aliases, tags, deep nesting."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        place = f"{where}:{event.start_mark.line + 1 if event.start_mark else 1}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise InputError(f"{place}: anchors and aliases are not supported; write the value out")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise InputError(f"{place}: the tag {tag} is not supported; write the value without it")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEPTH:
            raise InputError(f"{place}: nested too deeply to be read: more than {DEPTH} levels")


def _walk(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], where: str) -> None:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if isinstance(node, yaml.ScalarNode):
        if SURROGATE.search(node.value):
            raise InputError(f"{where}:{line}: holds half of a surrogate pair, which is no character")
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > DIGITS:
            raise InputError(f"{where}:{line}: a number of {len(node.value)} characters; {DIGITS} are the most")
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str":  # a list, a number, `on`, which YAML reads as true, or `<<`
                shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise InputError(f"{where}:{line}: {shown} cannot be a key: YAML does not read it as text")
            inner = (*path, str(key.value))
            if inner in lines:
                raise InputError(
                    f"{where}:{line}: {dotted(inner)} is given twice, first on line {lines[inner]}; keep one of them"
                )
            lines[inner] = line
            _walk(value, inner, lines, where)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _walk(value, (*path, index), lines, where)


def dump(data: Any) -> str:
    """Plain values as YAML: block style, keys in their order; `parse` gives the same values back."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)


def dotted(path: KeyPath) -> str:
    """("rules", 0, "match") -> "rules.0.match"."""
    return ".".join(map(str, path))
