"""quantkit bench: what is timed, what is counted, and where it says that bf16 is the better choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import packed_models
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from quantkit import card_parts, presets, report
from quantkit.cli import app
from quantkit.errors import InputError
from quantkit.runtime import bench, timing
from quantkit.runtime.bench import Bench, Measured
from quantkit.runtime.timing import Speed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    packed_models.save(folder, "compressed-tensors", presets.PRESETS["W4A16"])
    return folder


def speed(seconds: float, batch: int = 1, first: float = 0.5) -> Speed:
    return Speed("quantkit", batch, 128, 128, seconds, first, 9.0, (seconds,) * 5)


def measured(seconds: float, size: int, reading: float) -> Measured:
    return Measured("m", size, 10, (speed(seconds), speed(4 * seconds, 16)), {128: reading, 4096: 20 * reading})


def test_the_command_prints_both(folder: Path) -> None:
    options = ["--batch", "1,2", "--prompt", "8", "--new", "4", "--runs", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, ["bench", str(folder), *options])
    assert result.exit_code == 0, result.stderr
    for words in ("8 + 4 tokens, batch 2: tok/s", "bf16, random weights of the same config", "prompt of 8 tokens, ms"):
        assert words in result.stdout
    assert "measured on a CPU: its figures say nothing about a GPU" in result.stdout
    result = CliRunner().invoke(app, ["bench", str(folder), *options, "--json", "--save", "--against", str(folder)])
    found = json.loads(result.stdout)
    assert found["dense"]["name"] == f"bf16, {folder.name}"
    assert found["packed"]["bytes"] == found["dense"]["bytes"]
    assert [s["batch"] for s in found["packed"]["speeds"]] == [1, 2]
    assert found["packed"]["speeds"][0]["tokens_per_second"] > 0
    assert found["versions"]["torch"] == torch.__version__
    file = folder / "quantkit-bench.json"
    kept = json.loads(file.read_text())
    file.unlink()
    assert kept["packed"]["speeds"] == found["packed"]["speeds"] and kept["versions"] == found["versions"]
    assert str(folder.parent) not in json.dumps(kept), "others will read it"
    rows = card_parts.speed(kept)
    assert len(rows) == 7 and all(all(row) for row in rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch", "1,x"], "--batch 1,x: expected numbers"),
        (["--batch", "0"], "must be 1 or more"),
        (["--prompt", "100", "--new", "100"], "takes 128 tokens, and --prompt 100 with --new 100 are more"),
        (["--loop", "warp", "--prompt", "8", "--new", "4"], "unknown loop 'warp'; known: quantkit"),
    ],
)
def test_bad_options(folder: Path, options: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["bench", str(folder), "--device", "cpu", *options])
    assert result.exit_code == 2
    assert words in result.stderr


def test_where_bf16_is_better() -> None:
    ours, dense = measured(1.0, 100, 0.03), measured(2.0, 300, 0.02)
    assert bench.advice(Bench("GPU", ours, dense)) == [
        "bf16 is the better choice where memory does not matter and most of the work is of this kind:",
        "a prompt of 128 tokens: bf16 reads it 1.50 times as fast",
        "a prompt of 4096 tokens: bf16 reads it 1.50 times as fast",
        "it takes 3.00 times the memory for its weights",
    ]
    assert bench.advice(Bench("GPU", measured(1.0, 100, 0.01), dense)) == [
        "bf16 is slower in everything that was measured"
    ]
    slow = bench.advice(Bench("GPU", measured(3.0, 100, 0.01), dense))
    assert slow[1:3] == ["batch 1: bf16 generates 1.50 times as fast", "batch 16: bf16 generates 1.50 times as fast"]
    assert bench.advice(Bench("GPU", ours, None)) == []


def test_the_report_without_a_dense_model(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_section(bench.section(Bench("GPU", measured(1.0, 100, 0.03), None, ["does not fit"]), report.size))
    out = capsys.readouterr().out
    assert "does not fit" in out and "128 + 128 tokens, batch 16: tok/s" in out


def test_a_dense_model_that_does_not_fit_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(timing, "random_dense", too_large)
    found = bench.bench(folder, device=torch.device("cpu"), batches=(1,), prompt=4, new=2, runs=1)
    assert found.dense is None
    assert any("does not fit into the memory of cpu" in note for note in found.notes)


def test_rates() -> None:
    assert speed(2.0, 16).rate == 16 * 128 / 2
    assert speed(2.0, 16).decode_rate == 16 * 127 / 1.5


def test_bytes_are_counted_once(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    size = timing.weight_bytes(model)
    assert size["embeddings"] == 2 * 4096 * 128 * 2
    assert size["all"] == model.get_memory_footprint()
    model.lm_head.weight = model.model.embed_tokens.weight
    tied = timing.weight_bytes(model)
    assert tied == {"all": size["all"] - 4096 * 128 * 2, "embeddings": 4096 * 128 * 2}
    dense = timing.random_dense(model.config, torch.device("cpu"))
    assert dense.dtype == torch.bfloat16
    assert not hasattr(dense.config, "quantization_config")
    assert hasattr(model.config, "quantization_config"), "the config that was given is as it was"
    assert timing.weight_bytes(dense)["all"] > 1.5 * tied["all"]


@pytest.mark.parametrize("loop", [name for name in timing.LOOPS if "compiled" not in name])
def test_every_loop_gives_as_many_tokens(folder: Path, loop: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = model.generation_config
    config.eos_token_id, config.do_sample = list(range(4096)), True  # would end at once
    found = timing.generation(model, 2, 6, 5, loop=loop, runs=2)
    assert (found.batch, found.prompt, found.new, len(found.runs)) == (2, 6, 5, 2)
    assert model.generation_config is config


def test_an_unknown_loop(folder: Path) -> None:
    with pytest.raises(InputError, match="unknown loop 'x'"):
        timing.tokens_of(AutoModelForCausalLM.from_pretrained(folder), torch.ones(1, 1, dtype=torch.int64), 1, "x")
