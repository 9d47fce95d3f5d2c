"""What is wrong with a recipe, in words: each problem with its key, its line, and the nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from quantkit.errors import InputError
from quantkit.strict_yaml import KeyPath, dotted

_EXPECTED = {
    "model_type": "a mapping of keys to values",
    "dict_type": "a mapping of keys to values",
    "tuple_type": "a list",
    "list_type": "a list",
    "string_type": "text",
    "string_too_short": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` most looks like, whatever its case; None when none is close."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def hint(word: str, known: Sequence[str]) -> str:
    """ "did you mean X?" when a known word is close, else the list of known words."""
    close = nearest(word, known)
    return f"did you mean {close}?" if close else f"known: {', '.join(known) or 'none'}"


def problem(message: str, **values: Any) -> PydanticCustomError:
    """An error to raise inside a validator; {name} in the message stands for a value."""
    return PydanticCustomError("quantkit", message, values)


def shown(value: Any) -> str:
    """A value as a reader of YAML would write it, cut short when long."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return f"a mapping of {', '.join(map(str, value)) or 'nothing'}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def explain(
    error: ValidationError,
    schema: dict[str, Any],
    where: str,
    lines: Mapping[KeyPath, int],
    sets: Mapping[KeyPath, str],
) -> InputError:
    """Every problem that pydantic found, one a line, in the order of the file.

    schema   the recipe's JSON schema, in which the nearest known key is looked up
    lines    where each key stands in the file `where`
    sets     the `--set` or `--model` that gave each key which does not come from the file
    """
    found = []
    for detail in error.errors(include_url=False):
        path: KeyPath = detail["loc"]
        place, line = _place(path, where, lines, sets)
        found.append((line, f"{place}: {_sentence(detail, path, schema)}"))
    found.sort(key=lambda item: item[0])
    texts = list(dict.fromkeys(text for _, text in found))
    if len(texts) == 1:
        return InputError(texts[0])
    return InputError("\n  ".join([f"{len(texts)} problems in {where}:", *texts]))


def _place(path: KeyPath, where: str, lines: Mapping[KeyPath, int], sets: Mapping[KeyPath, str]) -> tuple[str, float]:
    """Who gave this key: "recipe.yaml:12" or "--set a.b=c", and the line to sort by."""
    for end in range(len(path), 0, -1):
        if path[:end] in sets:
            return sets[path[:end]], float("inf")
        if path[:end] in lines:
            return f"{where}:{lines[path[:end]]}", lines[path[:end]]
    return where, 0


def _sentence(detail: ErrorDetails, path: KeyPath, schema: dict[str, Any]) -> str:
    kind, key, given = detail["type"], dotted(path), detail["input"]
    if kind == "extra_forbidden":
        return f"unknown key {key}; {hint(str(path[-1]), known_keys(schema, path[:-1]))}"
    if kind == "missing":
        return f"{key} is missing" + ("; name one here or with --model" if key == "model" else "")
    if kind == "quantkit":
        return f"{key}: {detail['msg']}" if key else detail["msg"]
    if kind in _EXPECTED:
        expected = _EXPECTED[kind]
    else:
        expected = detail["msg"].removeprefix("Input should be ")
        if expected.startswith(("greater", "less")):
            expected = f"a number {expected}"
    return f"{key or 'the recipe'}: expected {expected}, got {shown(given)}"


def known_keys(schema: dict[str, Any], path: KeyPath) -> list[str]:
    """The keys that a recipe may have at `path`, from its JSON schema."""
    nodes = _alternatives(schema, schema)
    for step in path:
        below = []
        for node in nodes:
            inner = node.get("items") if isinstance(step, int) else node.get("properties", {}).get(step)
            if inner is not None:
                below += _alternatives(inner, schema)
        nodes = below
    return [name for node in nodes for name in node.get("properties", {})]


def _alternatives(node: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """A schema node with its references followed and its `anyOf` spread out."""
    if "$ref" in node:
        return _alternatives(schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
    inner = [*node.get("anyOf", []), *node.get("allOf", [])]
    return [node, *(found for part in inner for found in _alternatives(part, schema))]
