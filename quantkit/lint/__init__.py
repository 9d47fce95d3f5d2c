"""The engines' rules: will they load this checkpoint, and compute with it what it means.

One file an engine; `tensorrt_llm.py` is `tensorrt-llm`. Each has `RULES`, small functions that look at a `Described`
checkpoint and yield a `Problem` for what they find; a docstring names where the engine says so. `_described.py` reads a
folder, from headers and config alone but for scales of one number; a plan describes what will be written.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

if TYPE_CHECKING:
    from quantkit.lint._described import Described, Rule

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Finding:
    """What one rule says of a checkpoint.

    level  "error": the engine refuses the checkpoint or computes something else; "warning": it may, or it is slow
    where  a layer, a tensor or a key, and how many more are alike
    what   the measured value; fix: what to change
    """

    rule: str
    engine: str
    level: Literal["error", "warning"]
    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.engine}: {self.where}: {self.what}; {self.fix} (rule {self.rule})"


class Engine(Protocol):
    """A file of quantkit/lint."""

    RULES: tuple[Rule, ...]


def names() -> list[str]:
    """Names of the engines, sorted, found by listing this folder."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get(name: str) -> Engine:
    """The module of an engine, such as "tensorrt-llm"."""
    return cast(Engine, importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))


def check(described: Described, engines: Sequence[str]) -> list[Finding]:
    """What the rules of each engine find, engine by engine, errors first."""
    found = [
        Finding(rule.__name__, engine, problem.level, problem.where, problem.what, problem.fix)
        for engine in engines
        for rule in get(engine).RULES
        for problem in rule(described)
    ]
    return sorted(found, key=lambda f: (engines.index(f.engine), f.level != ERROR))


def folder(path: Path, engines: Sequence[str] | None = None, *, tp: int = 1) -> list[Finding]:
    """Checks a quantized checkpoint on disk. Nothing of its size is read.

    engines  all when not given; tp: GPUs that a layer is split over (tensor parallel)
    Raises InputError for a folder that holds no quantized checkpoint whose format quantkit knows, or a damaged file.
    """
    from quantkit.lint import _described

    return check(_described.from_folder(path, tp), names() if engines is None else list(dict.fromkeys(engines)))
