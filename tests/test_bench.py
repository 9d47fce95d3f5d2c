"""The benchmark without a GPU: its checks on planted bugs, what it runs again, what it keeps on disk."""

from __future__ import annotations

import functools
import importlib
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts of kernels/ import each other by their plain names."""
    monkeypatch.syspath_prepend(KERNELS)


def script(name: str) -> Any:
    return importlib.import_module(name)


# The check before the time

N, K = 96, 512


def product(bug: str = "") -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A kernel y = x Wᵀ with an output in bfloat16 and a planted bug; x; W."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(40, K, generator=g).bfloat16()
    steps = 2.0 ** (torch.arange(N) % 5)[:, None] * 1.1 ** (torch.arange(K) // 128)
    w = torch.randn(N, K, generator=g).bfloat16().double() * steps.double()
    state = {"calls": 0}

    def run(a: torch.Tensor) -> torch.Tensor:
        state["calls"] += 1
        wrong = w.clone()
        if bug == "tile":
            wrong[:, -16:] = 0
        elif bug == "group":
            wrong[:, 128:256] /= 1.1
        elif bug == "row of W":
            wrong[7] *= 1.02
        y = (a.double() @ wrong.T).bfloat16()
        if bug == "unwritten":
            y[3, 5] = math.nan
        elif bug == "token":
            y[11] *= 1.05
        elif bug == "element":
            y[5, 2] += 0.05 * y[5].double().square().mean().sqrt().bfloat16()
        elif bug == "differs":
            y[0, 0] += state["calls"] % 2 * y[0, 0] / 128
        elif bug == "shape":
            y = y[:-1]
        return y

    return run, x, w


def checks(bug: str) -> list[Any]:
    gate = script("bench_gate")
    run, x, w = product(bug)
    return gate.weight_times(run, (x,), x, lambda a, b: w[a:b], N, gate.BF16_OUT)


def test_a_right_kernel_passes() -> None:
    assert all(check.ok for check in checks(""))


@pytest.mark.parametrize("bug", ["tile", "group", "row of W", "unwritten", "token", "element", "differs"])
def test_a_wrong_kernel_does_not(bug: str) -> None:
    assert not all(check.ok for check in checks(bug))


def test_a_result_of_another_shape_is_an_error() -> None:
    with pytest.raises((ValueError, IndexError)):
        checks("shape")


def test_rows_are_sampled_only_when_there_are_too_many() -> None:
    gate = script("bench_gate")
    assert gate.sample_rows(300, 1000, CPU).tolist() == list(range(300))
    some = gate.sample_rows(4096, gate.FULL_PRODUCT // 2, CPU).tolist()
    assert len(set(some)) == gate.SAMPLED_ROWS and some[0] == 0 and some[-1] == 4095


def test_nan_passes_nothing() -> None:
    gate = script("bench_gate")
    assert not gate.Check("", math.nan, 1.0).ok and not gate.Check("", math.inf, math.inf).ok
    y = torch.zeros(4, 4)
    assert all(check.ok for check in gate.errors(y, y, gate.BF16_OUT))
    assert not all(check.ok for check in gate.errors(y + math.nan, y, gate.BF16_OUT))


# Running and keeping


def environment(**changes: str) -> Any:
    timing = script("bench_timing")
    names = list(timing.Environment.__dataclass_fields__)
    return timing.Environment(**{name: name for name in names} | {"device": "NVIDIA H200"} | changes)


class Bench:
    """Cases with planted bugs, a timer that only counts, and a file."""

    def __init__(self, path: Path, us: float = 10.0) -> None:
        self.timed: list[str] = []
        self.said: list[str] = []
        self.path, self.us = path, us

    def case(self, name: str, bug: str = "", **more: Any) -> Any:
        core = script("bench_core")

        def make(maker: Any) -> Any:
            if bug == "missing":
                raise core.Missing("no such kernel yet")
            if bug == "error":
                raise RuntimeError("cannot be built")
            run, x, w = product(bug)
            run.__name__ = name
            verify = functools.partial(
                script("bench_gate").weight_times,
                run,
                (x,),
                x,
                lambda a, b: w[a:b],
                N,
                script("bench_gate").BF16_OUT,
            )
            return core.Work(run, [(x,)], verify, 43_000_000, 10**9)

        return core.Case(name, make, **more)

    def timer(self, run: Any, sets: Any, replays: int) -> Any:
        self.timed.append(run.__name__)
        return script("bench_timing").Times(self.us, self.us - 1, self.us + 1, 20, replays)

    def runner(self, cases: list[Any], **changes: str) -> Any:
        core, timing = script("bench_core"), script("bench_timing")
        store = script("bench_store").Store(self.path)
        return core.Runner(
            cases,
            store,
            environment(**changes),
            core.Maker(CPU),
            timer=self.timer,
            top=timing.ceilings("NVIDIA H200"),
            say=self.said.append,
        )

    def run(self, cases: list[Any], seconds: float = 1e9, **changes: str) -> bool:
        names = [case.name for case in cases if case.ours]
        return self.runner(cases, **changes).all(names, time.monotonic() + seconds)

    def written(self) -> dict[str, Any]:
        return json.loads(self.path.read_text())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "deep" / "bench.json")


def test_no_time_for_a_wrong_result(bench: Bench) -> None:
    cases = [bench.case("a/wrong", "group"), bench.case("a/right"), bench.case("a/none", "missing")]
    assert not bench.run([*cases, bench.case("a/broken", "error")])
    assert bench.timed == ["a/right"]
    found = bench.written()["cases"]
    assert [found[f"a/{name}"]["status"] for name in ("wrong", "right", "none", "broken")] == [
        "red",
        "ok",
        "skipped",
        "failed",
    ]
    assert "us" not in found["a/wrong"] and "relative" in found["a/wrong"]["why"]
    assert "cannot be built" in found["a/broken"]["why"]
    wrong = next(text for text in bench.said if text.startswith("a/wrong"))
    assert "red" in wrong and " us" not in wrong
    assert found["a/right"]["gbs"] == pytest.approx(4300) and found["a/right"]["of_floor"] == pytest.approx(1.0)


def test_a_second_run_goes_on_and_compares_within_itself(bench: Bench) -> None:
    base = bench.case("base/x", ours=False)
    first, second = (bench.case(f"a/{i}", baselines=("base/x",)) for i in (1, 2))
    assert bench.run([base, first])
    assert bench.timed == ["base/x", "a/1"]
    bench.us = 20.0
    assert bench.run([base, first, second], started="later")
    assert bench.timed == ["base/x", "a/1", "base/x", "a/2"]
    store = script("bench_store").Store(bench.path)
    tables = script("bench_table").Tables(store, [base, first, second])
    for case, us in ((first, 10.0), (second, 20.0)):
        record = store.get(case.name)
        assert tables.others(case, record.run)["base/x"].us == us
    assert bench.run([base, first, second], started="later") and len(bench.timed) == 4


def test_other_code_is_measured_again(bench: Bench) -> None:
    case = bench.case("a/1")
    changes: list[dict[str, Any]] = [{}, {"started": "later"}, {"source": "changed"}, {"device": "NVIDIA H100"}]
    for change in changes:
        assert bench.run([case], **change)
    assert len(bench.timed) == 3


def test_a_case_that_ended_the_process_is_not_tried_again(bench: Bench) -> None:
    cases = [bench.case("a/1"), bench.case("a/2")]
    runner = bench.runner(cases)
    runner.store.put(script("bench_store").Record("a/1", runner.run, "running"))
    assert not bench.run(cases)
    assert bench.timed == ["a/2"] and "ended or hung" in bench.written()["cases"]["a/1"]["why"]


def test_a_broken_capture_ends_the_process_when_it_is_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = script("bench_timing").CaptureFailed

    def timer(run: Any, sets: Any, replays: int) -> Any:
        raise failed("in a CUDA graph: waits")

    monkeypatch.setattr(bench, "timer", timer)
    with pytest.raises(failed):
        bench.run([bench.case("a/1"), bench.case("a/2")])
    assert bench.written()["cases"]["a/1"]["status"] == "failed" and "a/2" not in bench.written()["cases"]


def test_the_budget_leaves_cases_out(bench: Bench) -> None:
    cases = [bench.case("a/1"), bench.case("a/2")]
    assert bench.run(cases, seconds=-1)
    assert bench.timed == [] and "2 cases left out" in bench.said[-1]
    assert bench.run(cases) and bench.timed == ["a/1", "a/2"]


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="schema 0"):
        script("bench_store").Store(path)


@pytest.mark.parametrize(
    ("kind", "bound", "value", "holds"),
    [
        ("us", 20, 10.0, True),
        ("us", 5, 10.0, False),
        ("ratio", 0.5, 0.5, True),
        ("ratio", 0.4, 0.5, False),
        ("floor", 0.8, 1.0, True),
        ("floor", 1.1, 1.0, False),
        ("tflops", 100, 100.0, True),
        ("bandwidth", 2.0, 2.0, True),
        ("bandwidth", 2.1, 2.0, False),
    ],
)
def test_goals(kind: str, bound: float, value: float, holds: bool) -> None:
    core, store, timing = script("bench_core"), script("bench_store"), script("bench_timing")
    record = store.Record(
        "a", "r", "ok", times=timing.Times(10, 9, 11, 20, 20), floor_us=10, moved=100, operations=10**9
    )
    slow = store.Record("b", "r", "ok", times=timing.Times(20, 9, 11, 20, 20), moved=100)
    slower = store.Record("c", "r", "ok", times=timing.Times(40, 9, 11, 20, 20), moved=100)
    goal = core.Goal(kind, bound, ("b", "c", "absent"))
    found = goal.measured(record, {"b": slow, "c": slower})
    assert found == pytest.approx(value) and goal.holds(found) is holds
    assert goal.measured(store.Record("a", "r", "red"), {"b": slow}) is None
    if kind in ("ratio", "bandwidth"):
        assert goal.measured(record, {}) is None
