"""Names of tasks: a user's YAML files and their data, lm-eval's own, what is unknown, and what cannot be fetched."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from quantkit import api
from quantkit.errors import InputError, MissingError
from quantkit.hub import resolve as find_model
from quantkit_eval import harness
from quantkit_eval.task_list import CLOZE


@pytest.fixture(scope="module")
def model() -> Any:
    return api.load(find_model("builtin:pydocs-llama-7m").folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(find_model("builtin:pydocs-llama-7m").folder)


def write(folder: Path, name: str, **content: Any) -> Path:
    """A YAML file of a task; gives its folder."""
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's folder: a task with its data beside it in a folder of its own, a function, and a group."""
    (tmp_path / "mine" / "data").mkdir(parents=True)
    rows = [{"q": f"{n} and {n} is", "options": ["one", "two", "three"], "right": n % 3} for n in range(5)]
    (tmp_path / "mine" / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine" / "shout.py").write_text("def text(doc):\n    return doc['q'].upper()\n")
    (tmp_path / "mine" / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\ndataset_kwargs: {data_files: {test: data/rows.jsonl}}\n"
        "output_type: multiple_choice\ntest_split: test\nfewshot_split: test\ndoc_to_text: !function shout.text\n"
        "doc_to_choice: options\ndoc_to_target: right\n"
        "metric_list:\n- {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "- {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"
    )
    write(
        tmp_path,
        "suite",
        group="suite",
        task=["sums", CLOZE],
        aggregate_metric_list=[{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
    )
    return tmp_path


def test_a_users_folder_with_a_group(model: Any, tokenizer: Any, own: Path) -> None:
    loaded = harness.load(harness.resolve(["suite", "sums"], own))
    assert [(task.name, task.items) for task in loaded.tasks] == [("sums", 5), (CLOZE, 520)]
    found = harness.run(model, tokenizer, loaded, limit=3)
    sums, cloze = found.tasks
    assert sums.metric == "acc_norm", "lm-eval's leaderboards read it where a task has it"
    (group,) = found.groups.values()
    assert group["acc,none"] == pytest.approx(np.mean([x.metrics["acc,none"] or 0.0 for x in (sums, cloze)]))
    shots = harness.run(model, tokenizer, loaded, limit=3, num_fewshot=2)
    assert shots.tasks[0].shots == 2 and shots.tasks[0].prompts != sums.prompts
    assert harness.run(model, tokenizer, loaded, limit=3).tasks[0].prompts == sums.prompts, "shots of before are gone"


def test_the_data_are_part_of_a_task(own: Path) -> None:
    def digest() -> str:
        return harness.load(harness.resolve(["sums"], own)).tasks[0].digest

    first = digest()
    assert digest() == first
    file = own / "mine" / "shout.py"
    file.write_text(file.read_text().replace("upper", "lower"))
    second = digest()
    rows = own / "mine" / "data" / "rows.jsonl"
    rows.write_text(rows.read_text().replace("three", "four"))
    assert len({first, second, digest()}) == 3


def test_a_task_fewer_shots_wait_for(model: Any, tokenizer: Any, own: Path) -> None:
    file = own / "mine" / "sums.yaml"
    file.write_text(file.read_text() + "num_fewshot: 0\n")
    loaded = harness.load(harness.resolve(["sums"], own))
    assert harness.run(model, tokenizer, loaded, limit=2, num_fewshot=2).tasks[0].shots == 0, "the author's 0 holds"


def test_the_tasks_limit_of_tokens_holds(model: Any, tokenizer: Any, own: Path) -> None:
    write(
        own,
        "tell",
        task="tell",
        dataset_path="json",
        dataset_kwargs={"data_files": {"test": "mine/data/rows.jsonl"}},
        output_type="generate_until",
        test_split="test",
        doc_to_text="q",
        doc_to_target="q",
        generation_kwargs={"until": ["never"], "max_gen_toks": 3},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    assert model.generation_config.max_new_tokens == 64
    (found,) = harness.run(model, tokenizer, harness.load(harness.resolve(["tell"], own))).tasks
    assert all(1 <= len(tokenizer(answer)["input_ids"]) <= 3 for answer in found.answers)


@pytest.fixture
def no_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own tasks, which take 10 s to read, are left out."""
    import lm_eval.tasks

    class Manager(lm_eval.tasks.TaskManager):
        def __init__(self, include_defaults: bool = True, **options: Any) -> None:
            super().__init__(include_defaults=False, **options)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Manager)


def test_an_unknown_task_and_those_like_it(no_defaults: None, own: Path) -> None:
    with pytest.raises(InputError, match=f"unknown task 'pydocs_close'; did you mean '{CLOZE}'"):
        harness.resolve(["pydocs_close"])
    (own / "broken.yaml").write_text("task: [broken\n")
    with pytest.raises(InputError, match=r"unknown task 'broken'.*broken\.yaml"):
        harness.resolve(["broken"], own)


@pytest.mark.parametrize(
    ("names", "change", "message"),
    [
        ([], None, "no task is named"),
        (["./mine/sums.yaml"], None, r"is a file; give its folder as tasks\.folder"),
        (["sums"], lambda folder: folder / "nowhere", "not a folder"),
        (["sums"], lambda folder: folder / "mine" / "data", "no file that ends in .yaml"),
        ([CLOZE], lambda folder: write(folder, "x", task=CLOZE), "quantkit's own task; rename"),
        (["x"], lambda folder: write(folder, "x", task="x", dataset_path="json"), "task x"),
    ],
)
def test_what_a_user_can_get_wrong(
    names: list[str], change: Callable[[Path], Path] | None, message: str, own: Path
) -> None:
    with pytest.raises(InputError, match=message):
        harness.load(harness.resolve(names, change(own) if change else own))


def test_data_that_cannot_be_fetched(own: Path) -> None:
    write(own, "far", task="far", dataset_path="nobody/nothing", output_type="multiple_choice", test_split="test")
    with pytest.raises(MissingError, match=r"task far: its data cannot be fetched .*pydocs_cloze"):
        harness.load(harness.resolve(["far"], own))


def test_lm_eval_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingError, match=r"pip install 'quantkit\[eval\]'"):
        harness.resolve([CLOZE])


# Slow


@pytest.mark.slow
def test_lm_evals_own_tasks_by_name() -> None:
    found = harness.resolve(["hellaswag", "leaderboard"])
    assert found.names == ("hellaswag", "leaderboard")
    with pytest.raises(MissingError, match="task hellaswag: its data cannot be fetched"):
        harness.load(replace(found, names=("hellaswag",)))
    with pytest.raises(InputError, match="did you mean 'hellaswag'"):
        harness.resolve(["hellaswagg"])
