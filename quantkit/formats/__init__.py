"""Checkpoint formats: how codes lie in a file. One file a format; `compressed_tensors.py` is `compressed-tensors`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import cast

from quantkit.errors import InputError
from quantkit.types import Format


def names() -> list[str]:
    """Names of the formats, sorted, found by listing this folder."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get(name: str) -> Format:
    """The module of a checkpoint format, such as "compressed-tensors". Raises InputError with the known names."""
    if name not in names():
        raise InputError(f"unknown checkpoint format {name!r}; known: {', '.join(names())}")
    return cast(Format, importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))
