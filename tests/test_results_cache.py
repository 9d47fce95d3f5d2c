"""Kept results: found by all that they depend on and by nothing less, never trusted when the file is bad."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny

from quantkit.hub import resolve
from quantkit_eval import results_cache
from quantkit_eval.results_cache import ResultsCache

PARTS: dict[str, Any] = {"model": "org/name@1", "task": ["gsm8k", "3.0", "ab"], "limit": None, "versions": {"a": "1"}}


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path: Path, said: list[str]) -> ResultsCache:
    return ResultsCache(tmp_path / "kept", said.append)


def test_a_result_comes_back(cache: ResultsCache, said: list[str]) -> None:
    assert cache.get(PARTS) is None
    cache.put(PARTS, {"scores": (1.0, 0.1), "name": "ä"})
    assert cache.get(PARTS) == {"scores": [1.0, 0.1], "name": "ä"}
    assert cache.get(dict(reversed(PARTS.items()))) is not None, "the order of the parts does not matter"
    (file,) = cache.folder.iterdir()
    assert file.name == f"{results_cache.key(PARTS)}.json"
    assert json.loads(file.read_text())["parts"] == PARTS
    assert said == []


@pytest.mark.parametrize(
    "change",
    [{"model": "org/name@2"}, {"task": ["gsm8k", "3.0", "ac"]}, {"limit": 10}, {"versions": {"a": "2"}}, {"new": None}],
)
def test_another_part_is_another_result(cache: ResultsCache, change: dict[str, Any]) -> None:
    cache.put(PARTS, 1)
    assert cache.get({**PARTS, **change}) is None


def test_numbers_are_exact_and_may_be_no_number(cache: ResultsCache) -> None:
    values = [0.1 + 0.2, 1e-300, math.inf, -math.inf, math.nan]
    cache.put(PARTS, values)
    found = cache.get(PARTS)
    assert found[:4] == values[:4] and math.isnan(found[4])


@pytest.mark.parametrize("change", ["cut", "empty", "text", "list", "value", "parts", "format"])
def test_a_bad_file_is_told_of_and_written_again(cache: ResultsCache, said: list[str], change: str) -> None:
    cache.put(PARTS, {"acc": 0.5})
    (file,) = cache.folder.iterdir()
    text = file.read_text()
    content = json.loads(text)
    bad = {
        "cut": text[:-9],
        "empty": "",
        "text": "\x80 no JSON",
        "list": "[1]",
        "value": json.dumps({**content, "value": {"acc": 0.6}}),
        "parts": json.dumps({**content, "parts": {**PARTS, "limit": 3}}),
        "format": json.dumps({**content, "format": 99}),
    }
    file.write_text(bad[change], encoding="latin-1" if change == "text" else "utf-8")
    assert cache.get(PARTS) is None
    assert len(said) == 1 and str(file) in said[0] and "again" in said[0]
    cache.put(PARTS, {"acc": 0.5})
    assert cache.get(PARTS) == {"acc": 0.5}
    assert len(said) == 1


def test_nothing_half_written_is_left(cache: ResultsCache, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(PARTS, 1)

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(results_cache.os, "replace", refuse)
        cache.put(PARTS, 2)
    assert len(said) == 1 and "No space left" in said[0]
    assert cache.get(PARTS) == 1, "the older result stays"
    assert len(list(cache.folder.iterdir())) == 1


def test_a_folder_that_cannot_be_made_costs_a_warning(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "file").write_text("")
    cache = ResultsCache(tmp_path / "file" / "kept", said.append)
    cache.put(PARTS, 1)
    assert len(said) == 1 and "could not be kept" in said[0]


def test_parts_must_be_plain_values(cache: ResultsCache) -> None:
    with pytest.raises(TypeError):
        cache.put({"model": Path("a")}, 1)
    with pytest.raises(ValueError):
        cache.get({"limit": math.nan})


def test_where_results_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QUANTKIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert results_cache.default_folder() == tmp_path / ".cache" / "quantkit" / "eval"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert results_cache.default_folder() == tmp_path / "xdg" / "quantkit" / "eval"
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "own"))
    assert results_cache.default_folder() == tmp_path / "own" / "eval"
    assert ResultsCache().folder == tmp_path / "own" / "eval"


def test_identity_tells_two_trainings_of_one_architecture_apart(tmp_path: Path) -> None:
    one, same, other = (
        resolve(str(tiny.save(tmp_path / name, seed=seed))) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one.fingerprint() == other.fingerprint(), "headers and sizes do not"
    identity = results_cache.model_identity
    assert identity(one) == identity(same) != identity(other)
    (same.folder / "chat_template.jinja").write_text("another")
    assert identity(one) != identity(same), "the tokenizer's files belong to it"
    hub = type(one)("org/name@main", one.folder, "0123abcd")
    assert identity(hub) == "org/name@0123abcd"
