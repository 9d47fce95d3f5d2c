"""Algorithms: which code each weight gets. One file an algorithm; the file's name is `method:` in a recipe."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType

from quantkit.errors import InputError


def names() -> list[str]:
    """The algorithms there are, found by listing this folder."""
    return list(_names())


@functools.cache
def _names() -> tuple[str, ...]:
    found = (info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))
    return tuple(sorted(found))


def get(name: str) -> ModuleType:
    """The module of an algorithm: Options, needs, quantize. Raises InputError with the known names."""
    if name not in names():
        raise InputError(f"unknown method {name!r}; known: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")
