"""A fault that no figure of the text can show: every logit is right, what is generated is not, and a task tells."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

EVAL = Path(__file__).resolve().parents[1] / "eval"


def test_a_task_catches_what_the_text_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EVAL)
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    faults: Any = importlib.import_module("faults")
    few: dict[str, Any] = {"perplexity": {"windows": 2, "length": 64}, "generation": {"prompts": 0}}
    good = faults.made("W8A16", faults.LLAMA, tmp_path / "good", validate=few)
    of_generation = [f for f in faults.FAULTS if f.generation]
    assert {next(iter(f.generation)) for f in of_generation} == {"repetition_penalty", "eos_token_id"}
    (fault,) = [f for f in of_generation if "repetition_penalty" in f.generation]
    (none,) = [f for f in faults.FAULTS if f.tasks and not f.generation]
    few = {"windows": 4, "length": 128, "limit": 24}
    fine = faults.judged(faults.broken(good, none, tmp_path / "copy"), none.tasks, **few)
    assert not fine["caught"] and fine["recovery"] == [1.0]
    folder = faults.broken(good, fault, tmp_path / "broken")
    found = faults.judged(folder, fault.tasks, **few)
    assert found["caught"] and found["by"] == "recovery (fail)" and found["recovery"][0] < 0.8
    assert found["kl"] == fine["kl"] and found["ratio"] == fine["ratio"]
