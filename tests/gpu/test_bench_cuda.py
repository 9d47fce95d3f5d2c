"""The benchmark's timer, its processes and the tuner on a GPU, on small work."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts of kernels/ import each other by their plain names."""
    monkeypatch.syspath_prepend(KERNELS)


def script(name: str) -> Any:
    return importlib.import_module(name)


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(KERNELS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_twice_the_work_takes_twice_the_time() -> None:
    """A kernel that waits for a number of clocks; what is in a graph and is not the kernel does not grow with it.

    Other processes on the GPU take their turns in between, so one good pair of several is enough.
    """
    timer = script("bench_timing").graph_timer
    ratios = []
    for _ in range(8):
        short, long = (timer(torch.cuda._sleep, [(clocks,)], 20).us for clocks in (200_000, 400_000))
        ratios.append(long / short)
    assert min(abs(ratio - 2) for ratio in ratios) < 0.2, ratios


def test_every_copy_is_used_equally() -> None:
    """Each call adds one to a copy of its own: after whole rounds all have the same number."""
    timing = script("bench_timing")
    sets = [(torch.zeros(64, device="cuda"),) for _ in range(7)]
    times = timing.graph_timer(lambda t: t.add_(1), sets, 20)
    counts = {float(t.max()) for (t,) in sets[2:]}
    assert len(counts) == 1 and times.calls % 7 == 0 and counts.pop() >= 20 * times.calls / 7


def test_bench_runs_in_its_processes(tmp_path: Path) -> None:
    out, table = tmp_path / "bench.json", tmp_path / "results.md"
    done = run("bench.py", "--only", "^ceiling/empty$", "--out", str(out), "--table", str(table), "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())["cases"]["ceiling/empty"]
    assert record["status"] == "ok" and 0 < record["p10"] <= record["us"] <= record["p90"]
    assert "an empty kernel in a graph takes" in table.read_text()


def test_tune_writes_a_table_of_right_configurations(tmp_path: Path) -> None:
    table, log = tmp_path / "table.json", tmp_path / "tune.jsonl"
    places = ("--out", str(table), "--log", str(log), "--jobs", "4", "--budget", "40")
    done = run("tune.py", "--kinds", "int4_g128", "--shapes", "256x512", "--tokens", "16", *places)
    assert table.exists(), done.stdout + done.stderr
    rows = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    best = json.loads(table.read_text())["entries"]["int4/bf16/g128/16x18"]["16"]
    assert any(row["choice"] == best and row["us"] for row in rows)
