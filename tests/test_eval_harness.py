"""lm-eval's harness on the embedded model: its figures by an independent way, pairs, a user's tasks, silence."""

from __future__ import annotations

import copy
import json
import logging
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from quantkit import api
from quantkit.errors import GateError, InputError
from quantkit.hub import resolve as find_model
from quantkit_eval import harness, task_list
from quantkit_eval.results_cache import ResultsCache
from quantkit_eval.task_list import CLOZE, COMPLETION, FOLDER, PERPLEXITY
from quantkit_eval.task_results import TaskResult, TaskResults, paired

FEW = 4


@pytest.fixture(scope="module")
def model() -> Any:
    return api.load(find_model("builtin:pydocs-llama-7m").folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(find_model("builtin:pydocs-llama-7m").folder)


@pytest.fixture(scope="module")
def tasks() -> harness.Tasks:
    return harness.load(harness.resolve(["pydocs"]))


@pytest.fixture(scope="module")
def results(model: Any, tokenizer: Any, tasks: harness.Tasks) -> TaskResults:
    return harness.run(model, tokenizer, tasks, limit=FEW)


def items(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()[:FEW]]


def likelihood(model: Any, before: list[int], after: list[int]) -> float:
    """Log-likelihood of the tokens `after` those `before`, one sequence, nothing shared with lm-eval."""
    with torch.no_grad():
        logits = model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(before) + n - 1, token]) for n, token in enumerate(after))


# Figures


def test_results_say_what_was_run(results: TaskResults) -> None:
    assert [task.name for task in results.tasks] == [PERPLEXITY, CLOZE, COMPLETION]
    assert [task.metric for task in results.tasks] == ["word_perplexity", "acc", "exact_match"]
    assert [task.higher_is_better for task in results.tasks] == [False, True, True]
    for task in results.tasks:
        assert task.version == "1.0" and task.shots == 0 and task.seconds > 0 and task.warnings == ()
        for per_item in (task.scores, task.documents, task.prompts, task.tokens, task.answers):
            assert len(per_item) == FEW
        for digests in (task.documents, task.prompts, task.tokens):
            assert len(set(digests)) == FEW
    asked = results.arguments
    assert (asked.limit, asked.batch_size, asked.max_length, asked.seed) == (FEW, 4, 2048, 0)
    assert (asked.first_token, asked.chat_template, asked.dtype) == (None, None, "float32")


def test_cloze_equals_an_independent_computation(model: Any, tokenizer: Any, results: TaskResults) -> None:
    found = results.tasks[1]
    for item, answer, score in zip(items(CLOZE), found.answers, found.scores, strict=True):
        context = tokenizer(item["context"])["input_ids"]
        whole = [tokenizer(item["context"] + choice)["input_ids"] for choice in item["choices"]]
        values = [likelihood(model, context, ids[len(context) :]) for ids in whole]
        best = max(range(4), key=values.__getitem__)
        assert answer == str(best)
        assert score == float(best == item["answer"])
    assert found.value == sum(found.scores) / FEW
    assert found.stderr == pytest.approx(np.std(found.scores, ddof=1) / FEW**0.5)


def test_perplexity_equals_an_independent_computation(model: Any, tokenizer: Any, results: TaskResults) -> None:
    found = results.tasks[0]
    for number, item in enumerate(items(PERPLEXITY)):
        ids = tokenizer(item["text"])["input_ids"]
        assert found.scores[number] == pytest.approx(likelihood(model, [tokenizer.bos_token_id], ids), rel=1e-5)
        assert found.lengths["words"][number] == len(re.split(r"\s+", item["text"]))
        assert found.lengths["bytes"][number] == len(item["text"].encode())
    total = sum(found.scores)
    assert found.value == pytest.approx(np.exp(-total / sum(found.lengths["words"])))
    assert found.metrics["bits_per_byte,none"] == pytest.approx(-total / sum(found.lengths["bytes"]) / np.log(2))


def test_completion_equals_an_independent_computation(model: Any, tokenizer: Any, results: TaskResults) -> None:
    found = results.tasks[2]
    for item, answer, score in zip(items(COMPLETION), found.answers, found.scores, strict=True):
        ids = tokenizer(item["prompt"])["input_ids"]
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        text = tokenizer.decode(ids)[len(item["prompt"]) :].split("<|endoftext|>")[0]
        for stop in "`*\n":
            text = text.split(stop)[0]
        assert answer == text
        assert score == float(text == item["target"])


def test_figures_are_those_of_simple_evaluate(
    model: Any, tokenizer: Any, tasks: harness.Tasks, results: TaskResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)  # seconds, for nothing that is compared
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, softmax_dtype="float32")
    found = lm_eval.evaluator.simple_evaluate(
        lm, tasks=[task.task for task in tasks.tasks], limit=FEW, task_manager=task_list.resolve(["pydocs"]).manager
    )
    for task in results.tasks:
        for name, value in task.metrics.items():
            theirs = found["results"][task.name][name]
            assert theirs == value or (theirs == "N/A" and value is None), name
        theirs = [sample[task.metric] for sample in found["samples"][task.name]]
        assert [x[0] if isinstance(x, tuple) else x for x in theirs] == list(task.scores)


# Pairs


def test_two_runs_of_one_model_pair_item_by_item(
    model: Any, tokenizer: Any, tasks: harness.Tasks, results: TaskResults
) -> None:
    again = harness.run(model, tokenizer, tasks, limit=FEW)
    for a, b in paired(results, again):
        assert replace(a, seconds=0) == replace(b, seconds=0)


def test_another_batch_size_pairs_only_when_asked_for(results: TaskResults) -> None:
    other = replace(results, arguments=replace(results.arguments, batch_size=1))
    with pytest.raises(InputError, match="batch_size is 4 for the original, 1 for"):
        paired(results, other)
    assert paired(results, other, may_differ=("batch_size",)) == paired(results, results)


def test_likelihoods_of_a_bfloat16_model_are_float32(
    tokenizer: Any, tasks: harness.Tasks, results: TaskResults
) -> None:
    model = api.load(find_model("builtin:pydocs-llama-7m").folder, dtype=torch.bfloat16)
    found = harness.run(model, tokenizer, tasks, limit=FEW)
    assert found.arguments.dtype == "bfloat16"
    for a, b in zip(paired(results, found)[0][0].scores, found.tasks[0].scores, strict=True):
        assert b == pytest.approx(a, rel=5e-3) and torch.tensor(b).bfloat16().item() != b


@pytest.mark.parametrize(
    ("field", "reason"),
    [("documents", "the data differ"), ("prompts", "chat template"), ("tokens", "BOS")],
)
def test_another_item_is_refused(results: TaskResults, field: str, reason: str) -> None:
    task = results.tasks[1]
    digests = list(getattr(task, field))
    digests[2] = "0" * 16
    change: dict[str, Any] = {field: tuple(digests)}
    other = replace(results, tasks=(results.tasks[0], replace(task, **change), results.tasks[2]))
    with pytest.raises(InputError, match=f"{CLOZE}, item 2: .*{reason}"):
        paired(results, other)


def test_another_order_of_items_is_refused(results: TaskResults) -> None:
    task = results.tasks[1]
    turned: dict[str, Any] = {
        name: getattr(task, name)[::-1] for name in ("scores", "documents", "prompts", "tokens", "answers")
    }
    with pytest.raises(InputError, match="item 0"):
        paired(results, replace(results, tasks=(results.tasks[0], replace(task, **turned), results.tasks[2])))


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"digest": "0"}, "digest"), ({"shots": 2}, "shots"), ({"version": "2"}, "version"), ({"scores": ()}, "items")],
)
def test_another_task_is_refused(results: TaskResults, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        paired(results, replace(results, tasks=(replace(results.tasks[0], **change), *results.tasks[1:])))
    with pytest.raises(InputError, match="different tasks"):
        paired(results, replace(results, tasks=results.tasks[1:]))


def test_a_bos_that_one_tokenizer_adds_is_refused(
    model: Any, tokenizer: Any, tasks: harness.Tasks, results: TaskResults
) -> None:
    other = copy.deepcopy(tokenizer)
    bos = other.bos_token
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, other.bos_token_id)]
    )
    found = harness.run(model, other, tasks, limit=FEW)
    assert found.arguments.first_token == other.bos_token_id
    with pytest.raises(InputError, match="first_token"):
        paired(results, found)
    same = replace(found, arguments=results.arguments)
    with pytest.raises(InputError, match=rf"{PERPLEXITY}, item 0: .*BOS"):
        paired(results, same)
    for number in (1, 2):
        assert found.tasks[number].prompts == results.tasks[number].prompts
        assert not set(found.tasks[number].tokens) & set(results.tasks[number].tokens)


def test_a_chat_template_on_one_side_is_refused(
    model: Any, tokenizer: Any, tasks: harness.Tasks, results: TaskResults
) -> None:
    found = harness.run(model, tokenizer, tasks, limit=FEW, apply_chat_template=True)
    assert found.arguments.chat_template is not None
    with pytest.raises(InputError, match="chat_template"):
        paired(results, found)
    with pytest.raises(InputError, match=rf"{CLOZE}, item 0: .*chat template"):
        paired(results, replace(found, arguments=results.arguments))


def test_results_are_plain_json_and_back(results: TaskResults) -> None:
    plain = json.loads(json.dumps(results.to_dict()))
    assert tuple(TaskResult.from_dict(task) for task in plain["tasks"]) == results.tasks
    assert "scores" not in results.tasks[0].to_dict(by_item=False)


# Arguments


@pytest.mark.parametrize(
    "options",
    [{"limit": 0}, {"limit": 0.5}, {"num_fewshot": -1}, {"batch_size": True}, {"max_length": 1}],
)
def test_arguments_out_of_range(model: Any, tokenizer: Any, tasks: harness.Tasks, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        harness.run(model, tokenizer, tasks, **options)


def test_a_chat_template_that_is_not_there(model: Any, tokenizer: Any, tasks: harness.Tasks) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(InputError, match="chat template"):
        harness.run(model, bare, tasks, apply_chat_template=True)


# What is left behind


def test_nothing_is_shown_and_nothing_is_left_changed(
    model: Any, tokenizer: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import lm_eval.api.task
    import transformers

    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    model.train()
    logger = logging.getLogger("lm_eval")

    def state() -> list[Any]:
        return [
            random.getstate(),
            str(np.random.get_state()),
            torch.get_rng_state().tolist(),
            (logger.handlers[:], logger.level, logger.propagate),
            (transformers.utils.logging.get_verbosity(), datasets.utils.logging.get_verbosity()),
            (datasets.are_progress_bars_disabled(), datasets.config.HF_UPDATE_DOWNLOAD_COUNTS),
            (lm_eval.api.task.tqdm, lm_eval.api.metrics.bootstrap_stderr),
            (bare.pad_token, bare.padding_side, model.training),
        ]

    try:
        before = state()
        monkeypatch.chdir(tmp_path)  # no git repository
        harness.run(model, bare, harness.load(harness.resolve(["pydocs"])), limit=2)
        assert state() == before
    finally:
        model.eval()
    shown = capfd.readouterr()
    assert shown.out == "" and shown.err == ""


def test_progress_ends_at_the_end(model: Any, tokenizer: Any, tasks: harness.Tasks) -> None:
    seen: list[tuple[str, int, int]] = []
    harness.run(model, tokenizer, tasks, limit=3, batch_size=2, on_progress=lambda *step: seen.append(step))
    assert [step for step in seen if step[1] == step[2]] == [(PERPLEXITY, 3, 3), (CLOZE, 12, 12), (COMPLETION, 3, 3)]
    assert all(0 < done <= total for _, done, total in seen) and len(seen) > 6


def test_a_cut_prompt_is_told(model: Any, tokenizer: Any, tasks: harness.Tasks) -> None:
    one = replace(tasks, tasks=tasks.tasks[1:2])
    (found,) = harness.run(model, tokenizer, one, limit=1, max_length=20).tasks
    assert any("runcat" in message for message in found.warnings)


def ruined(model: Any) -> Any:
    """A copy with NaN in one weight."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.layers[3].mlp.up_proj.weight[5, 7] = torch.nan
    return copied


def test_nan_is_no_answer(model: Any, tokenizer: Any, tasks: harness.Tasks) -> None:
    for number in (0, 1):
        one = replace(tasks, tasks=tasks.tasks[number : number + 1])
        with pytest.raises(GateError, match="log-likelihood is NaN"):
            harness.run(ruined(model), tokenizer, one, limit=2)


# Kept results


def test_kept_results_spare_the_second_run(
    model: Any, tokenizer: Any, tasks: harness.Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ResultsCache(tmp_path, lambda _: None)
    first = harness.run(model, tokenizer, tasks, limit=2, cache=cache, identity="a")
    calls = []
    real = type(model).forward

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        return real(self, *args, **options)

    monkeypatch.setattr(type(model), "forward", counted)
    assert harness.run(model, tokenizer, tasks, limit=2, cache=cache, identity="a") == first
    assert not calls
    one = replace(tasks, tasks=tasks.tasks[1:2])
    assert harness.run(model, tokenizer, one, limit=2, cache=cache, identity="a").tasks == first.tasks[1:2]
    assert not calls, "a task is kept whatever it was run with"
    usual: dict[str, Any] = {"limit": 2, "identity": "a", "cache": cache}
    for other in ({"limit": 3}, {"identity": "b"}, {"seed": 1}, {"batch_size": 2}, {"apply_chat_template": True}):
        calls.clear()
        harness.run(model, tokenizer, one, **{**usual, **other})
        assert calls, other
    with pytest.raises(InputError, match="identity"):
        harness.run(model, tokenizer, one, cache=cache)


# Slow


@pytest.mark.slow
def test_the_embedded_model_is_well_above_chance(model: Any, tokenizer: Any, tasks: harness.Tasks) -> None:
    perplexity, cloze, completion = harness.run(model, tokenizer, tasks).tasks
    assert 1.7 < perplexity.metrics["byte_perplexity,none"] < 2.1  # type: ignore[operator]
    assert 0.50 < cloze.value < 0.85, "chance is 0.25"
    assert 0.40 < completion.value < 0.80, "chance is none"
