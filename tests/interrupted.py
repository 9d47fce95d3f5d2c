"""Runs that are cut short, for tests of how they go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit.errors import Interrupted
from quantkit.progress import Silent

CHECK: dict[str, Any] = {
    "perplexity": {"data": "builtin:pydocs-heldout", "windows": 2, "length": 32},
    "generation": {"prompts": 0},
    "gates": {"kl": 5.0},
}
BLOCKS = 3
SMALL: dict[str, Any] = {"num_hidden_layers": BLOCKS}


def recipe(model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "scheme": {"preset": "W4A16", "group_size": 32},
        "calibration": {"data": "builtin:pydocs", "samples": 4, "length": 32, "batch_size": 2},
        "validate": "none",
        "export": {"engines": ["transformers"]},
        **changes,
    }


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def untimed(folder: Path) -> dict[str, bytes]:
    """The files that do not tell of times."""
    return {name: data for name, data in content(folder).items() if name not in ("report.html", "results.json")}


class Saying(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def _print(self, line: str) -> None:
        self.said.append(line)


class Stopping(Saying):
    """Asks for the end while block `at` is worked on."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def item(self, k: int, name: str) -> None:
        super().item(k, name)
        if k == self.at and self._what == "block":
            self.stop()


def stopped(what: dict[str, Any], out: Path, after: int) -> Path:
    """The folder of a run that was ended after some of its blocks."""
    with pytest.raises(Interrupted, match=f"after block {after} of {BLOCKS}"):
        quantkit.quantize(what, out=out, device="cpu", progress=Stopping(after))
    return out.parent / f".{out.name}.partial"
