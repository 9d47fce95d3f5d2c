"""`--set path.to.key=value`: one value of a recipe replaced from the command line, remembered as such for errors."""

from __future__ import annotations

from typing import Any

from quantkit import strict_yaml
from quantkit.errors import InputError
from quantkit.strict_yaml import KeyPath

NONE = "none"


def override(tree: dict[str, Any], item: str, lines: dict[KeyPath, int], sets: dict[KeyPath, str]) -> None:
    """Puts one "path.to.key=value" into `tree`, in place, and notes where its keys come from now.

    tree    the recipe as plain values, before validation; mappings that are missing on the way are made
    lines   line of each key in the file; what is overridden is taken out
    sets    who gave each key that does not come from the file; the new one is put in
    Raises InputError for a text of another form, or an index that a list does not have. Whether the key is known is
    for the recipe's validation to say.
    """
    name, equals, text = item.partition("=")
    steps = name.strip().split(".")
    if not equals or not all(steps):
        raise InputError(f"--set {item}: expected path.to.key=value, such as calibration.samples=64")
    value = strict_yaml.parse(text, f"--set {item}").data
    node: Any = tree
    path: KeyPath = ()
    for position, step in enumerate(steps):
        key: str | int = step
        if isinstance(node, list):
            if not step.isdecimal() or int(step) >= len(node):
                what = strict_yaml.dotted(path)
                raise InputError(f"--set {item}: {what} is a list of {len(node)}, so {what}.{step} is not in it")
            key = int(step)
        path = (*path, key)
        if position == len(steps) - 1:
            node[key] = value
            break
        below = node.get(key) if isinstance(node, dict) else node[key]
        if not isinstance(below, dict | list):
            node[key] = _spread_short(path, below)
            sets[path] = f"--set {item}"
        node = node[key]
    _forget(lines, path)
    _forget(sets, path)
    sets[path] = f"--set {item}"


def _spread_short(path: KeyPath, short: Any) -> dict[str, Any]:
    """The mapping that a short form stands for, so that `--set` can reach into it."""
    if not isinstance(short, str) or short == NONE:
        return {}
    if path == ("method",):
        return {short: {}}
    if path == ("push",):
        return {"repo": short}
    return {"preset": short} if path[-1] == "scheme" else {}


def _forget(known: dict[KeyPath, Any], path: KeyPath) -> None:
    for stale in [old for old in known if old[: len(path)] == path]:
        del known[stale]
