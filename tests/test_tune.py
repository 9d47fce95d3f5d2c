"""The tuner without a GPU: what it tries, what it never chooses, what it writes; kernels are compiled, none is run."""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from quantkit_kernels import choice as choosing
from quantkit_kernels import layout
from quantkit_kernels.choice import Choice, Gpu, Problem

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
CPU = torch.device("cpu")
GPU = Gpu()
ABOUT = {"device": "NVIDIA H200"}


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts of kernels/ import each other by their plain names."""
    monkeypatch.syspath_prepend(KERNELS)


def script(name: str) -> Any:
    return importlib.import_module(name)


def cost(one: Choice) -> float:
    """Microseconds with one valley, away from the heuristic: 16 x 128, split 2, 3 stages."""
    if one.path != "gemm":
        return 900.0
    tile = 5 * (one.block_m != 16) + 5 * abs(math.log2(one.block_n / 128)) + 3 * (one.warps != 4)
    return (
        20
        + tile
        + abs(math.log2(max(one.split, 0.25) / 2))
        + abs(one.stages - 3)
        + (one.unroll - 1)
        + (one.where == "group")
    )


class Bench:
    """A tuner whose kernel is plain torch, wrong for some configurations, and whose timer is `cost`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Choice], bool]) -> None:
        self.folder, self.wrong = folder, wrong
        self.timed: list[Choice] = []
        self.said: list[str] = []
        weights = script("bench_weights")
        found = weights.kernel

        def kernel(module: str, name: str) -> Any:
            return self.run_with if name == "run_with" else found(module, name)

        monkeypatch.setattr(weights, "kernel", kernel)

    def run_with(self, one: Choice, x: torch.Tensor, packed: Any, *_: Any) -> torch.Tensor:
        self.last = one
        y = F.linear(x, layout.decode(packed, x.dtype))
        if self.wrong(one):
            y[:, 3] *= 1.05
        return y

    def timer(self, run: Any, sets: Any, replays: int) -> Any:
        run(*sets[0])
        self.timed.append(self.last)
        us = cost(self.last)
        return script("bench_timing").Times(us, us, us, 20, replays)

    def log(self) -> Any:
        return script("tune_search").Log(self.folder / "tune.jsonl", ABOUT)

    def search(self, items: list[Any], seconds: float = 1e9) -> tuple[bool, Any]:
        tune, core = script("tune"), script("bench_core")
        log = self.log()
        tuner = tune.Tuner(core.Maker(CPU, rotate=0), log, self.timer, self.said.append)
        path = self.folder / "tables" / "h200.json"

        def written() -> None:
            if best := script("tune_search").filled(log.best()):
                choosing.save_table(path, GPU, best)

        done = tune.search(items, tuner, GPU, time.monotonic() + seconds, written, tune.Ahead(None))
        return done, log


def items(*tokens: int) -> list[Any]:
    form = script("bench_weights").INT4
    return [(form, 64, 512, m) for m in tokens]


def test_it_finds_the_valley_and_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, lambda one: False)
    done, log = bench.search(items(16))
    key = script("bench_weights").problem(*items(16)[0])
    best = log.best()[key]
    assert done and cost(best) == min(map(cost, bench.timed)) < min(map(cost, choosing.candidates(key, GPU)))
    assert (best.block_m, best.block_n, best.warps, best.stages) == (16, 128, 4, 3)
    found = json.loads((tmp_path / "tables" / "h200.json").read_text())["entries"][choosing.table_key(key)]
    assert Choice(**found["16"]) == best
    assert set(found) == {"4", "8", "16"} and found["8"] == found["16"]
    monkeypatch.setenv("QUANTKIT_KERNELS_TABLES", str(tmp_path / "tables"))
    choosing.load_tables.cache_clear()
    choosing._choose.cache_clear()
    try:
        assert choosing.choose(key, GPU) == choosing.fitted(best, key, GPU)
    finally:
        monkeypatch.delenv("QUANTKIT_KERNELS_TABLES")
        choosing.load_tables.cache_clear()
        choosing._choose.cache_clear()


def test_a_wrong_configuration_is_never_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, lambda one: one.block_n == 128)
    _, log = bench.search(items(16))
    (best,) = log.best().values()
    assert best.block_n != 128 and all(one.block_n != 128 for one in bench.timed)
    assert any("worst" in text or "relative" in text for text in bench.said)
    assert any(why for why in log.why.values())


def test_nothing_is_written_when_all_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, lambda one: True)
    done, log = bench.search(items(16))
    assert done and not log.best() and not (tmp_path / "tables").exists()
    assert "no configuration is right" in bench.said[-1]


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, lambda one: False)
    assert bench.search(items(16), seconds=-1)[0] is False and not bench.timed
    bench.search(items(16))
    first = len(bench.timed)
    bench.search(items(16))
    assert len(bench.timed) == first
    done, log = bench.search(items(16, 64))
    assert done and {key.m for key in log.best()} == {16, 64}


def test_what_ended_the_process_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, lambda one: False)
    key = script("bench_weights").problem(*items(16)[0])
    deadly = choosing.candidates(key, GPU)[0]
    bench.log().put(key, deadly, math.inf, script("tune_search").RUNNING)
    _, log = bench.search(items(16))
    assert deadly not in bench.timed and "ended or hung" in log.why[key, deadly]


def test_times_of_other_code_are_taken_again(tmp_path: Path) -> None:
    search = script("tune_search")
    key = Problem("int4", "bf16", 64, 512, 128, 16)
    search.Log(tmp_path / "log", ABOUT).put(key, Choice(), 3.0)
    assert search.Log(tmp_path / "log", ABOUT).times == {key: {Choice(): 3.0}}
    assert search.Log(tmp_path / "log", ABOUT | {"source": "other"}).times == {}


def test_times_taken_with_care_decide(tmp_path: Path) -> None:
    log = script("tune_search").Log(tmp_path / "log", ABOUT)
    key, fast, slow = Problem("int4", "bf16", 64, 512, 128, 16), Choice(split=2), Choice(split=4)
    log.put(key, fast, 3.0)
    log.put(key, slow, 3.1)
    assert log.best()[key] == fast
    log.put(key, fast, 3.3, sure=True)
    log.put(key, slow, 3.1, sure=True)
    assert log.best()[key] == slow


def test_tokens_between_are_filled_from_above_only() -> None:
    search = script("tune_search")
    key = Problem("int4", "bf16", 64, 512, 128, 8)
    made = search.filled({key: Choice(split=2), key._replace(m=64): Choice(split=4)})
    assert {one.m: found.split for one, found in made.items()} == {2: 2, 4: 2, 8: 2, 16: 4, 32: 4, 64: 4}


def test_rounds_go_from_all_tiles_to_what_is_near_the_best() -> None:
    search = script("tune_search")
    key = Problem("int4", "bf16", 28672, 4096, 128, 16)
    candidates = choosing.candidates(key, GPU)
    begun = search.proposals({}, key, GPU)
    assert begun[0] == choosing.heuristic(key, GPU)
    assert {search.tile(one) for one in begun} == {search.tile(one) for one in candidates}
    tried = {one: cost(one) for one in begun}
    best = sorted(tried, key=lambda one: tried[one])[:2]
    more = search.proposals(tried, key, GPU)
    assert more and not set(more) & set(begun)
    near = choosing.neighbours(best[0], key, GPU)
    tiles = {search.tile(one) for one in best}
    assert all(one in near or (one in candidates and search.tile(one) in tiles) for one in more)
    assert any(one.stages != best[0].stages for one in more)
    assert search.proposals(dict.fromkeys(begun, math.inf), key, GPU) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kinds", "int5"], "--kinds 'int5'"),
        (["--shapes", "4096"], "--shapes '4096'"),
        (["--shapes", "0x4096"], "--shapes '0x4096'"),
        (["--tokens", "3"], "--tokens '3'"),
        (["--budget", "0"], "--budget must be"),
        (["--jobs", "0"], "--jobs 1 to 64"),
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script("tune").main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script("tune").main([]) == 4 and "no CUDA device" in capsys.readouterr().err
    assert script("tune").default_table(GPU).name == "nvidia-h200.json"


# Sweeps of kernels without a table


def swept(name: str) -> Any:
    return {case.name: case for case in script("bench_cases").all_cases()}[name]


@pytest.mark.parametrize(
    "name", ["w8a8/int8/28672x4096/16", "w8a8/fp8/28672x4096/4096", "fp8_block/e4m3/7168x16384/4096"]
)
def test_configurations_of_a_sweep_fit(name: str) -> None:
    found = script("sweep").variants(swept(name))
    configs = [arguments["config"] for arguments in found.values() if arguments["config"] is not None]
    assert "as it is" in found and len(configs) == len(found) - 1 > 5
    for one in configs:
        assert one.path == "library" or one.stages * one.bk * (one.bm + one.bn) <= 227 << 10
    assert script("sweep").sizes(name)[1] == int(name.split("x")[1].split("/")[0])


def test_a_sweep_times_only_what_is_right() -> None:
    sweep, core, gate = script("sweep"), script("bench_core"), script("bench_gate")

    def make(maker: Any, off: float) -> Any:
        if off > 1:
            raise RuntimeError("does not compile")
        return core.Work(lambda: None, [()], lambda: [gate.Check("off", off, 0.5)], 0)

    def timer(run: Any, sets: Any, replays: int) -> Any:
        return script("bench_timing").Times(7.0, 7.0, 7.0, 20, replays)

    case, maker = core.Case("decode/fp8/B1_S8", make), core.Maker(CPU, rotate=0)
    assert sweep.measured(case, {"off": 0.1}, maker, timer) == (7.0, "")
    us, why = sweep.measured(case, {"off": 0.9}, maker, timer)
    assert us == math.inf and why.startswith("off 0.9")
    us, why = sweep.measured(case, {"off": 2.0}, maker, timer)
    assert us == math.inf and "does not compile" in why
    assert "splits 8" in sweep.variants(case)


def test_a_sweep_of_another_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script("sweep").main(["wxa16/int4_g128/28672x4096/16"])
    assert stopped.value.code == 2 and "is no case of w8a8" in capsys.readouterr().err


# Compiling ahead


class Driver:
    """A GPU that compiles and does not run."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def test_compiling_ahead_launches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache on disk has the kernel's machine code afterwards; a launch on this driver would be an error."""
    from triton.runtime import driver

    weights, core = script("bench_weights"), script("bench_core")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    maker = core.Maker(CPU, rotate=0, narrow=64)
    with mock.patch.object(type(driver), "active", Driver()), core.compiling_only():
        work = weights.weight_only(
            maker, weights.INT4, 28672, 512, 16, Choice(block_m=16, block_n=64, split=2, stages=3)
        )
        work.run(*work.sets[0])
    assert [path.name for path in tmp_path.rglob("*.cubin")] == ["gemm.cubin"]
    assert work.sets[0][0].n == 64
