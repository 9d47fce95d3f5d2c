"""The engines' rules: will they load this checkpoint, and compute with it what it means.

    engines/         one file an engine: which rules it has, and which schemes it loads
    rules_config.py  rules about config.json and files; rules_layers.py: about schemes and shapes of layers;
                     rules_tensors.py: about the tensors of a layer
    described.py     what rules look at, from a folder: headers and config, and the scales that are one number

A rule is a small function from a `Described` checkpoint to the `Problem`s that it finds; its docstring names where the
engine says so. A plan describes what it will write, so that the same rules speak before the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quantkit.lint.engines import get, names

if TYPE_CHECKING:
    from quantkit.lint.described import Described
    from quantkit.types import Scheme

__all__ = ["ERROR", "WARNING", "Finding", "check", "folder", "get", "names", "section", "unsigned"]

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


def check(described: Described, engines: Sequence[str]) -> list[Finding]:
    """What the rules of each engine find, engine by engine, errors first."""
    found = [
        Finding(rule.__name__, engine, problem.level, problem.where, problem.what, problem.fix)
        for engine in engines
        for rule in get(engine).RULES
        for problem in rule(described)
    ]
    return sorted(found, key=lambda f: (engines.index(f.engine), f.level != ERROR))


def unsigned(schemes: Sequence[Scheme], engines: Sequence[str]) -> list[str]:
    """Engines of which it is not known that they read negative scales of integer weights under all of the schemes."""
    inputs = any(s.activations is not None and s.weights.number.startswith("int") for s in schemes)
    return [name for name in engines if inputs or not get(name).SIGNED_SCALES]


def section(path: Path, found: Sequence[Finding], engines: Sequence[str]) -> dict[str, Any]:
    """Findings as plain values for a person: one row each, the same of several engines in one."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for f in found:
        alike.setdefault((f.level, f.rule, f.where, f.what, f.fix), []).append(f.engine)
    rows = [
        [level, ", ".join(by), rule, where, f"{what}; {fix}"]
        for (level, rule, where, what, fix), by in sorted(alike.items(), key=lambda item: item[0][0] != ERROR)
    ]
    facts = []
    for engine in engines:
        levels: list[str] = [f.level for f in found if f.engine == engine]
        facts.append((engine, f"{levels.count(ERROR)} errors, {levels.count(WARNING)} warnings"))
    table = {"columns": ["level", "engines", "rule", "where", "what; what to do"], "rows": rows}
    return {"title": f"lint of {path}", "facts": facts, **({"table": table} if rows else {})}


def folder(path: Path, engines: Sequence[str] | None = None, *, tp: int = 1) -> list[Finding]:
    """Checks a quantized checkpoint on disk. Nothing of its size is read.

    engines  all when not given; tp: GPUs that a layer is split over (tensor parallel)
    Raises InputError for a folder that holds no quantized checkpoint whose format quantkit knows, or a damaged file.
    """
    from quantkit.lint import described

    return check(described.from_folder(path, tp), names() if engines is None else list(dict.fromkeys(engines)))
