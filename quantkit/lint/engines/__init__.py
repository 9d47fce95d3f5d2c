"""The engines, one a file; `tensorrt_llm.py` is `tensorrt-llm`. Each lists its `RULES`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from quantkit.lint.described import Rule


class Engine(Protocol):
    """A file of this folder.

    RULES          what it refuses, or suffers from
    SIGNED_SCALES  whether it is known to multiply integer weights by negative scales as they are, inputs not quantized
    """

    RULES: tuple[Rule, ...]
    SIGNED_SCALES: bool


def names() -> list[str]:
    """Names of the engines, sorted, found by listing this folder."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__))


def get(name: str) -> Engine:
    """The module of an engine, such as "tensorrt-llm"."""
    return cast(Engine, importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))
