"""Models one after the other: the figures of side by side, bounds that hold, and nothing left on disk."""

from __future__ import annotations

import copy
import functools
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import quantkit
from quantkit import output, validation
from quantkit.errors import GateError, InputError, MissingError
from quantkit.hub import resolve
from quantkit.progress import Silent
from quantkit.recipe import Recipe
from quantkit.recipe.validation import Validation
from quantkit_eval import compare, kept_logits, two_models
from quantkit_eval.compare import measure, summary
from quantkit_eval.gate import figures
from quantkit_eval.kept_logits import KeptLogits, Spread
from quantkit_eval.two_models import TwoModels, free_memory, model_bytes

VOCABULARY = 331


class Listening(Silent):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        original = LlamaForCausalLM(config).float().eval()
        quantized = copy.deepcopy(original)
        for p in quantized.parameters():
            p.data += 0.02 * torch.randn_like(p)
    return original, quantized


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (10, 48), generator=torch.Generator().manual_seed(2))


def in_turn(models: tuple[Any, Any], windows: torch.Tensor, folder: Path, **options: Any) -> tuple[Any, Spread]:
    logits = KeptLogits(folder, **options)
    logits.add(models[0], windows)
    found = logits.measure(models[1])
    assert not list(folder.iterdir()), "a file goes when it was read"
    return found


# The figures


@pytest.mark.parametrize("kept", [1, 8, 64, 300, VOCABULARY, 5000])
def test_bounds_hold_at_every_position(
    models: tuple[Any, Any], windows: torch.Tensor, tmp_path: Path, kept: int
) -> None:
    exact = measure(*models, windows)
    tokens, spread = in_turn(models, windows, tmp_path, kept=kept)
    assert torch.equal(tokens.nll_original, exact.nll_original) and torch.equal(tokens.nll, exact.nll)
    assert torch.equal(tokens.agree_WL, exact.agree_WL)
    slack = 2e-6  # sums of float32 in another order
    assert (spread.low_WL <= exact.kl_WL + slack).all() and (exact.kl_WL <= spread.high_WL + slack).all()
    bounds = spread.bounds(kept)
    mean = exact.kl_WL.mean().item()
    assert abs(tokens.kl_WL.mean().item() - mean) <= 4 * bounds.error + slack
    if kept < VOCABULARY:
        assert bounds.at_least < mean < bounds.at_most and bounds.mass > 0 and bounds.error > 0
    else:
        assert bounds.mass == bounds.drawn == bounds.error == 0
        assert bounds.at_least == pytest.approx(bounds.at_most) == pytest.approx(mean, abs=slack)


def test_the_part_drawn_is_unbiased_and_its_error_is_what_it_says(
    models: tuple[Any, Any], windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean = measure(*models, windows).kl_WL.mean().item()
    off = []
    for seed in range(12):
        monkeypatch.setattr(kept_logits, "SEED", 1000 * seed)
        tokens, spread = in_turn(models, windows, tmp_path, kept=8, draws=4)
        off.append((tokens.kl_WL.mean().item() - mean) / spread.bounds().error)
    assert abs(sum(off)) / math.sqrt(len(off)) < 3, "the mean of twelve is as near as their errors say"
    assert 0.4 < math.sqrt(sum(x * x for x in off) / len(off)) < 1.8


def test_a_tail_that_is_lost_is_noticed(
    models: tuple[Any, Any], windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above can fail: leaving the rest out of the mean is seen."""
    exact = measure(*models, windows).kl_WL.mean().item()
    whole = kept_logits._divergence

    def without_rest(kept: Any, logq: torch.Tensor) -> Any:
        low, high, drawn, variance, mass = whole(kept, logq)
        return low, high, torch.zeros_like(drawn), variance, mass

    monkeypatch.setattr(kept_logits, "_divergence", without_rest)
    tokens, spread = in_turn(models, windows, tmp_path, kept=8)
    assert exact - tokens.kl_WL.mean().item() > 10 * spread.bounds().error


def test_windows_in_two_parts_are_those_in_one(models: tuple[Any, Any], windows: torch.Tensor, tmp_path: Path) -> None:
    logits = KeptLogits(tmp_path, kept=64)
    parts = []
    for part in windows.split([4, 6]):
        logits.add(models[0], part)
        parts.append(logits.measure(models[1]))
    together = parts[0][0].plus(parts[1][0])
    exact = measure(*models, windows)
    assert summary(together).nll_by_window == summary(exact).nll_by_window
    assert figures(summary(together))["kl"].value == pytest.approx(exact.kl_WL.mean().item(), rel=0.02)
    assert parts[0][1].plus(parts[1][1]).low_WL.shape == windows.shape


def test_what_cannot_be_compared(models: tuple[Any, Any], windows: torch.Tensor, tmp_path: Path) -> None:
    logits = KeptLogits(tmp_path)
    logits.add(models[0], windows)
    broken = copy.deepcopy(models[1])
    broken.lm_head.weight.data[5] = math.nan
    with pytest.raises(GateError, match="quantized model's logits are NaN"):
        logits.measure(broken)
    other = copy.deepcopy(models[1])
    other.config.vocab_size = VOCABULARY + 1
    with pytest.raises(InputError, match="different vocabularies: original 331, quantized 332"):
        logits.measure(other)


def test_a_disk_without_room_is_told_first(
    models: tuple[Any, Any], windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(kept_logits.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(MissingError, match=r"logits take .* GiB .* 0\.0 GiB are free"):
        KeptLogits(tmp_path).add(models[0], windows)


# Memory


def test_one_model_at_a_time() -> None:
    class Model:
        alive = 0

        def __init__(self) -> None:
            Model.alive += 1

        def __del__(self) -> None:
            Model.alive -= 1

    one = TwoModels(Model, Model, side_by_side=False)
    for name in ("original", "original", "quantized", "original"):
        assert isinstance(getattr(one, name), Model) and Model.alive == 1
    both = TwoModels(Model, Model, side_by_side=True)
    assert both.original is both.original is not both.quantized and Model.alive == 3


def test_sizes_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve("builtin:pydocs-llama-7m").folder
    file = (folder / "model.safetensors").stat().st_size
    assert model_bytes(folder, torch.device("cuda")) == pytest.approx(file, rel=0.01)
    (tmp_path / "pytorch_model.bin").write_bytes(b"0123")
    assert model_bytes(tmp_path, torch.device("cpu")) == 4
    assert model_bytes(folder, torch.device("cpu")) == 2 * model_bytes(folder, torch.device("cuda"))
    free = free_memory(torch.device("cpu"))
    assert free is not None and free > 2**20
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 50000\n")
    monkeypatch.setattr(two_models, "CGROUP", tmp_path)
    assert free_memory(torch.device("cpu")) == 450000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(torch.device("cpu")) != 450000


# The embedded model


CHECK = {
    "perplexity": {"windows": 4, "length": 256},
    "generation": {"prompts": 2, "tokens": 8},
    "prompt": "The module",
    "gates": {"kl": 0.2, "flips": 0.9, "top1_agreement": 0.5},
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = {
        "model": "builtin:pydocs-llama-7m",
        "scheme": "W4A16",
        "method": "rtn",
        "validate": {**CHECK, "side_by_side": True},
        "export": {"engines": ["transformers"]},
    }
    return quantkit.quantize(recipe, out=tmp_path_factory.mktemp("turns") / "out").out


def test_one_after_the_other_measures_the_same(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []

    def alone(whole: Callable[..., Any], *args: Any) -> Any:
        assert all(model() is None for model in loaded), "the other model is still in memory"
        model = whole(*args)
        loaded.append(weakref.ref(model))
        return model

    beside = json.loads((out / output.SUMMARY).read_text())["validation"]
    assert beside["side_by_side"] is True and beside["kl_bounds"] is None
    assert beside["data"] == "builtin:pydocs-heldout"
    progress = Listening()
    for name in ("_load", "_original"):
        monkeypatch.setattr(validation, name, functools.partial(alone, getattr(validation, name)))
    quantkit.validate(out, side_by_side=False, progress=progress)
    assert len(loaded) == 2
    after = json.loads((out / output.SUMMARY).read_text())["validation"]
    assert after["side_by_side"] is False
    assert any("one after the other (validate.side_by_side is false)" in line for line in progress.said)
    bounds = after["kl_bounds"]
    exact, found = beside["comparison"], after["comparison"]
    assert bounds["at_least"] <= exact["kl"] <= bounds["at_most"]
    assert abs(found["kl"] - exact["kl"]) <= 4 * bounds["error"] + 1e-6
    assert found["kl"] == pytest.approx(exact["kl"], rel=2e-3)
    assert {k: v for k, v in found.items() if "kl" not in k} == {k: v for k, v in exact.items() if "kl" not in k}
    for same in ("flips", "samples", "status", "message", "notes", "tasks"):
        assert after[same] == beside[same]
    assert [(g["name"], g["outcome"]) for g in after["gates"]] == [(g["name"], g["outcome"]) for g in beside["gates"]]
    assert after.keys() == beside.keys() and found.keys() == exact.keys()
    assert not list(out.parent.glob(".*")), "what was kept is deleted"


def test_memory_decides_unless_the_recipe_does(monkeypatch: pytest.MonkeyPatch) -> None:
    source, cpu = resolve("builtin:pydocs-llama-7m"), torch.device("cpu")
    folder = source.folder

    def decided(wanted: bool | Literal["auto"], free: int | None) -> tuple[bool, list[str]]:
        monkeypatch.setattr(validation, "free_memory", lambda _: free)
        settings, progress = Validation(side_by_side=wanted), Listening()
        return validation._side_by_side(settings, source, folder, cpu, 4096, progress), progress.said

    needed = 2 * model_bytes(folder, cpu) + compare.working_bytes(512, 4096)
    side_by_side, said = decided("auto", needed)
    assert not side_by_side and len(said) == 1
    size = f"{needed / 2**30:.1f} GiB"
    assert f"one after the other (together they take {size}, {size} are free on cpu)" in said[0]
    assert decided("auto", needed * 5 // 4) == decided("auto", None) == decided(True, 0) == (True, [])
    assert decided(False, None)[0] is False


# A tiny model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    recipe = {
        "model": str(tiny.save(folder / "model")),
        "scheme": {"preset": "W4A16", "group_size": 32},
        "method": "rtn",
        "validate": {
            "perplexity": {"windows": 2, "length": 32},
            "generation": {"prompts": 2, "tokens": 4},
            "gates": {},
        },
    }
    return quantkit.quantize(recipe, out=folder / "out").out


def test_nothing_half_written_is_read_or_stays(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = small.parent / f".{small.name}.logits-left"
    left.mkdir()
    (left / "000000.safetensors").write_bytes(b"half")
    seen = []
    whole = compare._logits

    def interrupted(model: Any, which: str, *rest: Any) -> Any:
        seen.append([x for x in small.parent.glob(".*") if x != left])
        if which == "quantized":
            raise KeyboardInterrupt
        return whole(model, which, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(compare, "_logits", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantkit.validate(small, side_by_side=False)
    assert len(seen) == 2 and all(len(names) == 1 for names in seen)
    assert [*small.parent.glob(".*")] == [left]
    with pytest.raises(InputError, match="side_by_side: expected True, False or 'auto'; got 'maybe'"):
        quantkit.validate(small, side_by_side="maybe")
    found = quantkit.validate(small, side_by_side=False)
    assert found.kl_bounds is not None and found.comparison.windows == 2
    assert (left / "000000.safetensors").read_bytes() == b"half" and [*small.parent.glob(".*")] == [left]


def test_more_windows_ask_each_model_again(small: Path) -> None:
    """A limit that two windows cannot tell from what is measured: the sample goes on, as side by side."""
    limit = quantkit.validate(small, side_by_side=True).comparison.kl
    progress = Listening()
    after = quantkit.validate(small, gates={"kl": limit}, side_by_side=False, progress=progress)
    assert sum("2 windows do not decide kl; going on to" in line for line in progress.said) == 1
    assert after.comparison.windows == 8 and after.kl_bounds is not None
    beside = quantkit.validate(small, windows=8, side_by_side=True, gates={})
    assert after.comparison.nll_by_window == pytest.approx(beside.comparison.nll_by_window, abs=1e-5)
    assert after.comparison.kl == pytest.approx(beside.comparison.kl, abs=4 * after.kl_bounds.error + 1e-6)
    assert beside.flips is not None and after.flips == beside.flips


@pytest.mark.parametrize(("given", "settled"), [("auto", "auto"), ("true", True), ("false", False)])
def test_forms_in_a_recipe(given: str, settled: object) -> None:
    recipe = Recipe.parse(f"model: m\nscheme: W4A16\nvalidate: {{side_by_side: {given}}}\n")
    assert recipe.validation is not None and recipe.validation.side_by_side == settled
    assert Recipe.parse(recipe.to_yaml()) == recipe
    with pytest.raises(InputError, match="side_by_side"):
        Recipe.parse("model: m\nscheme: W4A16\nvalidate: {side_by_side: maybe}\n")
