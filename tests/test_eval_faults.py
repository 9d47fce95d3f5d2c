"""A fault that no figure of the text can show: every logit is right, what is generated is not, and a task tells."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import tiny

import quantkit

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
    few = {"windows": 4, "length": 128, "limit": 40}
    fine = faults.judged(faults.broken(good, none, tmp_path / "copy"), none.tasks, **few)
    assert not fine["caught"] and fine["recovery"] == [1.0]
    folder = faults.broken(good, fault, tmp_path / "broken")
    found = faults.judged(folder, fault.tasks, **few)
    assert found["caught"] and found["by"] == "recovery (fail)" and found["recovery"][0] < 0.8
    assert found["kl"] == fine["kl"] and found["ratio"] == fine["ratio"]


def test_a_tokenizer_that_gives_other_tokens_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the output alone: every figure is measured with the original's, so none of them would show it."""
    monkeypatch.syspath_prepend(EVAL)
    faults: Any = importlib.import_module("faults")
    recipe = {"perplexity": {"windows": 2, "length": 64}, "generation": {"prompts": 0}}
    model = {"model": str(tiny.save(tmp_path / "model")), "scheme": {"preset": "W8A16", "group_size": 32}}
    settings = {"method": "rtn", "validate": recipe, "export": {"engines": ["transformers"]}}
    good = quantkit.quantize({**model, **settings}, out=tmp_path / "good").out
    (none, *_) = faults.FAULTS
    assert not faults.judged(faults.broken(good, none, tmp_path / "copy"), windows=2, length=64)["caught"]
    of_files = [fault for fault in faults.FAULTS if fault.files is not None]
    said = {"a BOS": "tokens of a held-out text", "a chat template": "tokens of a chat"}
    assert len(of_files) == len(said)
    for i, fault in enumerate(of_files):
        found = faults.judged(faults.broken(good, fault, tmp_path / f"broken-{i}"), windows=2, length=64)
        assert found["caught"] and found["by"] == "GateError"
        assert any(fault.name.startswith(name) and text in found["said"] for name, text in said.items())
    (good / "tokenizer.json").write_text("{}")
    assert "tokenizer cannot be loaded" in faults.judged(good)["said"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (good / name).unlink()
    (note,) = quantkit.validate(good, windows=2, length=64).notes
    assert note == "there is no tokenizer beside the weights: the original's was used"
