"""The data of the three tasks that quantkit ships: what the items are, and that nothing but the text answers them."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "eval" / "quantkit_eval" / "tasks"
NAMES = ("pydocs_perplexity", "pydocs_cloze", "pydocs_completion")


@pytest.fixture(scope="module")
def items() -> dict[str, list[dict[str, Any]]]:
    return {name: [json.loads(line) for line in (FOLDER / f"{name}.jsonl").open(encoding="utf-8")] for name in NAMES}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "eval")
    return importlib.import_module("build_tasks")


def test_as_many_items_as_promised_in_few_bytes(items: Any) -> None:
    counts = {name: len(found) for name, found in items.items()}
    assert counts == {"pydocs_perplexity": 72, "pydocs_cloze": 520, "pydocs_completion": 240}
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 600_000
    for found in items.values():
        assert len({json.dumps(item) for item in found}) == len(found)


def test_the_script_writes_the_same_bytes_again(script: ModuleType, tmp_path: Path) -> None:
    script.write(script.build(script.documents(script.HELDOUT), script.documents(script.CALIBRATION)), tmp_path)
    for name in NAMES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (FOLDER / f"{name}.jsonl").read_bytes(), name


def test_yaml_of_each_task_names_its_data() -> None:
    for name in NAMES:
        task = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        assert task["task"] == name
        assert task["dataset_kwargs"] == {"data_files": {"test": f"{name}.jsonl"}}
        assert "num_fewshot" not in task, "lm-eval would ignore the caller's"
    assert yaml.safe_load((FOLDER / "pydocs.yaml").read_text())["task"] == list(NAMES)


def test_every_word_is_from_the_heldout_text(items: Any, script: ModuleType) -> None:
    texts = script.documents(script.HELDOUT)
    collapsed = [script.prose(text) for text in texts]
    for item in items["pydocs_perplexity"]:
        assert item["text"] in texts[item["document"]].replace("\n\n\n", "\n\n").replace("\n\n\n", "\n\n")
        assert script.PASSAGE // 2 <= len(item["text"]) <= script.PASSAGE
    for item in items["pydocs_cloze"]:
        assert item["context"] + item["choices"][item["answer"]] in collapsed[item["document"]]
    for item in items["pydocs_completion"]:
        assert item["prompt"] + item["target"] in texts[item["document"]]


def test_no_item_is_in_the_calibration_text(items: Any, script: ModuleType) -> None:
    known = script.plain(" ".join(script.documents(script.CALIBRATION)))
    for item in items["pydocs_perplexity"]:
        paragraphs = [script.plain(paragraph) for paragraph in item["text"].split("\n\n")]
        assert not [paragraph for paragraph in paragraphs if len(paragraph) >= 100 and paragraph in known]
    for item in items["pydocs_cloze"]:
        assert not any(script.plain(choice) in known for choice in item["choices"])
    for item in items["pydocs_completion"]:
        assert script.plain(item["prompt"][-40:] + item["target"]) not in known


# Cloze


def test_cloze_choices_are_alike(items: Any, script: ModuleType) -> None:
    found = items["pydocs_cloze"]
    assert Counter(item["answer"] for item in found) == {0: 130, 1: 130, 2: 130, 3: 130}
    for item in found:
        choices = item["choices"]
        assert len(set(choices)) == 4
        lengths = [len(choice) for choice in choices]
        assert min(lengths) >= script.CONTINUATION and max(lengths) - min(lengths) <= script.SPREAD
        assert len({script._kind(choice) for choice in choices}) == 1
        assert all(choice[0] == " " and choice == choice.rstrip() for choice in choices)
        assert not item["context"].endswith(" ")
        wrong = [choice for number, choice in enumerate(choices) if number != item["answer"]]
        assert not any(choice in item["context"] for choice in wrong)


@pytest.mark.parametrize(
    "rule",
    [
        lambda choice: len(choice),
        lambda choice: -len(choice),
        lambda choice: choice,
        lambda choice: sum(map(str.isalpha, choice)),
        lambda choice: hash(choice),
    ],
    ids=["longest", "shortest", "alphabet", "letters", "any"],
)
def test_a_rule_that_looks_at_the_choices_alone_has_one_in_four(items: Any, rule: Callable[[str], Any]) -> None:
    groups: dict[int, list[dict[str, Any]]] = {}
    for item in items["pydocs_cloze"]:
        groups.setdefault(item["group"], []).append(item)
    for group in groups.values():
        assert len(group) == 4 and len({frozenset(item["choices"]) for item in group}) == 1
        words = {item["context"].split()[-1] for item in group}
        assert len(words) == 1, "each choice follows the same word where it is from"
        right = [item["choices"][item["answer"]] for item in group]
        assert sorted(right) == sorted(group[0]["choices"]), "each is right once"
        picks = [max(item["choices"], key=lambda choice: (rule(choice), choice)) for item in group]
        assert sum(pick == item["choices"][item["answer"]] for pick, item in zip(picks, group)) == 1


# Completion


def test_completion_names_stood_in_the_prompt(items: Any, script: ModuleType) -> None:
    found = items["pydocs_completion"]
    assert Counter(item["kind"] for item in found) == script.NAMES
    least = {"parameter": 1, "role": 2}
    for item in found:
        assert item["prompt"].count(item["target"]) >= least[item["kind"]]
        assert item["prompt"][-1] == {"parameter": "*", "role": "`"}[item["kind"]]
        assert not set(item["target"]) & set("`*\n "), "where generation stops is no part of a name"
        assert script.FEWEST <= len(item["prompt"]) <= script.SCREEN
    per_name = Counter((item["document"], item["kind"], item["target"]) for item in found)
    assert max(per_name.values()) <= script.PER_NAME


def test_what_the_calibration_text_holds_is_left_out(script: ModuleType) -> None:
    heldout, calibration = script.documents(script.HELDOUT)[8:11], script.documents(script.CALIBRATION)[:3]
    both = script.build(heldout, [*calibration, heldout[0]])
    apart = script.build(heldout, calibration)
    for name in NAMES:
        assert {item["document"] for item in apart[name]} == {0, 1, 2}, name
        assert {item["document"] for item in both[name]} == {1, 2}, name
