"""The scripts of eval/ that tables come from: a copy with outliers, the log of runs, paired differences, the clock."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import InputError

EVAL = Path(__file__).resolve().parents[1] / "eval"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script of eval/ by its name, as a module; scripts import each other by their plain names."""
    monkeypatch.syspath_prepend(EVAL)

    def find(name: str) -> ModuleType:
        return importlib.import_module(name)

    return find


# Outliers


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe"])
def test_outliers_leave_every_logit_as_it_is(script: Any, tmp_path: Path, kind: str) -> None:
    source = tiny.save(tmp_path / "source", kind)
    chosen, difference = script("outliers").write_copy(source, tmp_path / "copy", share=0.05, seed=3)
    assert difference == 0.0
    assert len(chosen) == 4, "two norms in each of two blocks"
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "copy"))
    for norm, channels in chosen.items():
        assert len(channels) == 4 and set(channels.values()) <= {32, 64}  # 5 % of 64, rounded up
        grown = after[norm].float() / before[norm].float()
        assert {k: int(grown[k]) for k in channels} == channels
        assert int((grown == 1).sum()) == 64 - len(channels)
    readers = script("outliers").norms(list(before))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {*readers, *(name for names in readers.values() for name in names)}
    assert not any("down_proj" in name or "o_proj" in name for name in changed)
    if kind == "qwen3-moe":
        assert "model.layers.0.mlp.gate.weight" in changed, "the router reads the norm too"
        assert sum("experts" in name for name in changed) == 2 * 6 * 2


def test_outliers_at_least_two_and_the_same_for_a_seed(script: Any) -> None:
    tensors = {
        "model.layers.0.input_layernorm.weight": torch.ones(16, dtype=torch.bfloat16),
        "model.layers.0.self_attn.q_proj.weight": torch.ones(4, 16, dtype=torch.bfloat16),
    }
    inject = script("outliers").inject
    (_, first), (_, again), (_, other) = (inject(tensors, seed=seed) for seed in (0, 0, 1))
    assert len(first["model.layers.0.input_layernorm.weight"]) == 2
    assert first == again != other
    assert script("outliers").powers_of_two(30, 100) == [32, 64]


def test_outliers_refuse_what_would_change_the_model(script: Any, tmp_path: Path) -> None:
    outliers = script("outliers")
    gemma = tiny.save(tmp_path / "gemma", "gemma")  # its norms multiply by 1 + w
    with pytest.raises(InputError, match="not the same function"):
        outliers.write_copy(gemma, tmp_path / "out")
    assert [x.name for x in tmp_path.iterdir()] == ["gemma"], "nothing is left behind"
    with pytest.raises(InputError, match="no power of two"):
        outliers.powers_of_two(33, 63)
    with pytest.raises(InputError, match="no norm"):
        outliers.inject({"model.weight": torch.ones(4)})
    with pytest.raises(InputError, match="exists"):
        outliers.write_copy(gemma, tmp_path)


# The log of runs


def test_each_run_is_planned_once_and_order_0_comes_first(script: Any) -> None:
    cases = script("accuracy_cases")
    gptq = cases.peer(cases.PYDOCS, "W4A16", "gptq")
    both = [
        cases.Case("a", cases.ours(cases.PYDOCS, "W4A16", "rtn"), (gptq,)),
        cases.Case("b", cases.ours(cases.PYDOCS, "W4A16", "effort best"), (gptq,)),
    ]
    runs = script("accuracy").planned(both, 2, [cases.OURS, cases.PEER])
    assert [(job.label, order) for job, order in runs] == [
        ("W4A16: rtn", 0),
        ("W4A16: gptq", 0),
        ("W4A16: effort best", 0),
        ("W4A16: gptq", 1),
        ("W4A16: effort best", 1),
    ]
    assert both[1].ours.settings == {"scheme": "W4A16", "effort": "best"}


def test_every_case_has_a_name_and_a_label_of_its_own(script: Any) -> None:
    cases = script("accuracy_cases")
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    jobs = {json.dumps([j.model, j.tool, j.settings]): j for c in cases.CASES for j in (c.ours, *c.peers)}
    assert len({(j.model, j.tool, j.label) for j in jobs.values()}) == len(jobs)
    assert all(peer.model == case.ours.model for case in cases.CASES for peer in case.peers)


def test_log_survives_a_line_that_was_cut_off(script: Any, tmp_path: Path) -> None:
    accuracy, log = script("accuracy"), tmp_path / "log.jsonl"
    assert accuracy.read_log(log) == {}
    accuracy.append(log, {"key": "a", "n": 1})
    with log.open("a") as stream:
        stream.write('{"key": "b", "n"')  # the script was killed here
    assert [*accuracy.read_log(log)] == ["a"]
    accuracy.append(log, {"key": "c", "n": 3})
    accuracy.append(log, {"key": "a", "n": 4})
    assert accuracy.read_log(log) == {"a": {"key": "a", "n": 4}, "c": {"key": "c", "n": 3}}


def test_a_run_has_one_name_on_every_machine(script: Any) -> None:
    cases = script("accuracy_cases")
    job = cases.ours(cases.PYDOCS, "W4A16", "gptq")
    here = cases.Setting(Path("a/rows.jsonl"), Path("a/held.jsonl"), 8, 64, 4, {})
    there = replace(here, calibration=Path("b/rows.jsonl"), heldout=Path("b/held.jsonl"), threads=2, peer_python="x")
    assert here.key(job, 0) == there.key(job, 0)
    assert len({s.key(job, k) for s in (here, replace(here, samples=9), replace(here, windows=5)) for k in (0, 1)}) == 6


# The table


def _runs(*kl_by_window: list[float]) -> dict[int, dict[str, Any]]:
    return {order: {"figures": {"kl_by_window": kl}} for order, kl in enumerate(kl_by_window)}


def test_differences_are_paired_by_window_and_by_order(script: Any) -> None:
    difference = script("accuracy_table").difference
    ours, peer = _runs([1.0, 2.0, 6.0], [3.0, 2.0, 6.0]), _runs([2.0, 4.0, 6.0])
    # Order 0 alone: -1, -2, 0; mean -1, s.d. 1, over the peer's 4. Both orders of ours: 0, -2, 0.
    assert difference(ours, peer, paired_orders=True) == f"-1.00000 ± {1 / math.sqrt(3):.5f} (-25.0%)"
    assert difference(ours, peer, paired_orders=False).startswith("-0.66667 ± 0.66667")
    assert difference({1: ours[1]}, peer, paired_orders=True) == "", "no order that both have"
    assert difference({}, peer, paired_orders=False) == ""


def test_table_shows_what_the_log_holds(script: Any) -> None:
    cases, accuracy_table = script("accuracy_cases"), script("accuracy_table")
    case = next(c for c in cases.CASES if c.name == "w4a16-gptq")
    setting = cases.Setting(Path("rows.jsonl"), Path("held.jsonl"), 8, 64, 2, {})
    log = {}
    for job, kl in ((case.ours, [0.02, 0.04]), (case.peers[0], [0.04, 0.06])):
        figures = {"kl": sum(kl) / 2, "kl_by_window": kl, "perplexity": 9.5, "perplexity_original": 9.2}
        key = setting.key(job, 0)
        log[key] = {
            "key": key,
            "bits": 4.126,
            "versions": {"torch": "1"},
            "hardware": "CPU",
            "figures": {**figures, "top1_agreement": 0.9},
        }
    text = accuracy_table.report([case], log, setting, orders=2)
    rows = [line for line in text.splitlines() if line.startswith("| w4a16")]
    assert [line.split(" | ")[1] for line in rows] == ["quantkit", "llm-compressor"], "what was not run has no row"
    assert rows[0].endswith("| 4.126 | 1 | 9.5000 | 0.03000 ± 0.01000 |  | 0.9000 |  |")
    assert rows[1].endswith("| -0.02000 ± 0.00000 (-40.0%) |")


def test_mean_bits_counts_each_layer_by_its_weights(script: Any, tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2, 4), "b.weight": torch.zeros(6, 4)}, tmp_path / "model.safetensors")
    layers = [{"name": "a", "bits_per_weight": 8.0}, {"name": "b", "bits_per_weight": 4.0}]
    assert script("accuracy").mean_bits(layers, tmp_path) == 5.0


# The clock


@pytest.mark.parametrize(
    ("times", "layer"),
    [([], None), ([0.0, 5.0], 5.0), ([0.0, 5.0, 7.0], 2.0), ([0.0, 9.0, 10.0, 12.0, 15.0, 15.5], 2.0)],
)
def test_a_layers_time_leaves_out_the_first_and_the_last(script: Any, times: list[float], layer: float | None) -> None:
    found = script("speed_gptq").layer_seconds(times)
    assert found["layer"] == layer
    assert len(found["layers"]) == max(0, len(times) - 1)


@pytest.mark.parametrize("experts", [0, 3])
def test_the_random_model_is_one_that_transformers_loads(script: Any, tmp_path: Path, experts: int) -> None:
    from transformers import AutoModelForCausalLM

    speed = script("speed_gptq")
    speed.build(speed.Shape(64, 96, 2, experts, 16), tmp_path / "model", "cpu")
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    assert type(model).__name__ == ("Qwen3MoeForCausalLM" if experts else "LlamaForCausalLM")
    assert model.dtype == torch.bfloat16 and torch.isfinite(model(torch.arange(8)[None]).logits).all()
