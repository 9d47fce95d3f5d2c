"""eval/speed_generate.py: its cases, its packed models, a line for each case, the table."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open

from quantkit import api, packed, presets

EVAL = Path(__file__).resolve().parents[1] / "eval"
TINY = [
    *("--device", "cpu", "--layers", "2", "--hidden", "256", "--intermediate", "512", "--head-dim", "64"),
    *("--vocabulary", "512", "--prompt", "8", "--new", "6", "--prefill", "16", "--eager", "1", "--eager-tokens", "3"),
    *("--loops", "quantkit", "--context", "256", "--runs", "1", "--batches", "1", "2", "--long-batch", "2"),
]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EVAL)
    return importlib.import_module("speed_generate")


def test_cases(script: Any) -> None:
    names = [case.name for case in script.cases(script.arguments([]))]
    assert len(names) == len(set(names))
    wanted = {"bf16/generate/b1/transformers-static", "bf16/generate/b16/transformers-static"}
    wanted |= {f"{v}/generate/b{b}/{loop}" for v in script.VARIANTS for b in (1, 16) for loop in script.OURS}
    wanted |= {f"{v}/eager/b{b}" for v in script.VARIANTS for b in (1, 16, 64, 256)}
    wanted |= {f"w4a16/long/{number}" for number in ("bf16", "fp8")} | {"fp8/prefill/4096", "nvfp4/load"}
    assert wanted <= set(names)
    few = [case.name for case in script.cases(script.arguments(["--loops", "quantkit"]))]
    assert set(names) - set(few) == {f"{v}/generate/b{b}/quantkit-compiled" for v in script.VARIANTS for b in (1, 16)}
    some = script.cases(script.arguments(["--only", "w4a16/generate/*", "*/load"]))
    assert {case.group for case in some} == {"load", "generate"} and len(some) == 11
    assert set(script.VARIANTS.values()) - {None} <= presets.PRESETS.keys()


@pytest.mark.parametrize("variant", ["w4a16", "fp8", "mxfp4", "nvfp4"])
def test_a_written_checkpoint_is_one_that_loads(script: Any, tmp_path: Path, variant: str) -> None:
    args = script.arguments(TINY)
    scheme = presets.PRESETS[script.VARIANTS[variant]]
    script.write(tmp_path / variant, script.config_of(args), scheme, "cpu")
    opened = packed.open_folder(tmp_path / variant)
    assert len(opened.layers) == 14
    assert {layer.scheme for layer in opened.layers.values()} == {scheme}
    model = api.load(tmp_path / variant, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(1, 9)[None]).logits).all()
    files = sorted(file.name for file in (tmp_path / variant).glob("*.safetensors"))
    assert files == ["model-0.safetensors", "model-1.safetensors", "model-outside.safetensors"]
    with safe_open(tmp_path / variant / "model-outside.safetensors", "pt") as outside:
        assert set(outside.keys()) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_a_line_for_every_case(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.jsonl"
    only = ["bf16/*", "w4a16/load", "w4a16/generate/b1/*", "w4a16/long/*"]
    args = script.arguments([*TINY, "--profile", "--out", str(out), "--only", *only])
    script.work_through(args, tmp_path)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["name"] for line in lines] == [case.name for case in script.cases(args)]
    assert not [line for line in lines if "error" in line]
    by_name = {line["name"]: line for line in lines}
    assert by_name["w4a16/load"]["weights"]["all"] < by_name["bf16/load"]["weights"]["all"]
    assert by_name["w4a16/long/fp8"]["decode_tokens_per_second"] > 0
    assert by_name["w4a16/long/fp8"]["attention"] == "quantkit"
    assert by_name["bf16/generate/b2/transformers-static"]["attention"] == "sdpa"
    table = script.table(lines)
    assert "| bf16/generate/b1/transformers-static |" in table and "1.00x" in table
    said = capsys.readouterr().out
    assert "w4a16/generate/b1/quantkit" in said and "Ordered by: internal time" in said
    assert 100 < by_name["bf16/eager/b1"]["operators"] < 1000


def test_a_case_that_fails_costs_only_itself(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(case: Any, model: Any, args: Any) -> dict[str, Any]:
        if case.group == "prefill":
            raise RuntimeError("no room")
        return {"seconds": 1.0, "tokens_per_second": 8.0, "attention": "sdpa"}

    monkeypatch.setattr(script, "measure", measure)
    out = tmp_path / "speed.jsonl"
    script.work_through(script.arguments([*TINY, "--out", str(out), "--only", "bf16/*"]), tmp_path)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["error"] for line in lines if "error" in line] == ["RuntimeError: no room"]
    assert len(lines) == 7
    assert "RuntimeError: no room" in script.table(lines)
    script.work_through(script.arguments([*TINY, "--out", str(out), "--only", "bf16/*", "--budget", "-1"]), tmp_path)
    assert "left out" in json.loads(out.read_text().splitlines()[-1])["error"]
