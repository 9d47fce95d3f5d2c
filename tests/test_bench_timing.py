"""How the benchmark takes times: floors, copies, calls, and the timer itself on a GPU that only counts."""

from __future__ import annotations

import contextlib
import gc
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

KERNELS = Path(__file__).resolve().parents[1] / "kernels"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts of kernels/ import each other by their plain names."""
    monkeypatch.syspath_prepend(KERNELS)


def script(name: str) -> Any:
    return importlib.import_module(name)


# Arithmetic of times


@pytest.mark.parametrize(
    ("n", "k", "m", "bytes_a_weight", "bits", "microseconds"),
    [
        (28672, 4096, 1, 0.515625, 16, 14.1),
        (57344, 8192, 16, 0.53125, 16, 58.5),
        (6144, 4096, 64, 0.515625, 16, 4.1),  # bound by the products
        (4096, 14336, 4096, 2, 16, 608.9),
        (4096, 14336, 256, 1, 8, 19.0),
        (8192, 8192, 64, 1, 16, 16.1),
    ],
)
def test_floors_are_those_of_the_table(
    n: int, k: int, m: int, bytes_a_weight: float, bits: int, microseconds: float
) -> None:
    timing = script("bench_timing")
    moved = int(n * k * bytes_a_weight) + (2 if bits == 16 else 1) * m * k + 2 * m * n
    found = timing.floor_us(moved, 2 * m * n * k, bits, timing.ceilings("NVIDIA H200"))
    assert found == pytest.approx(microseconds, abs=0.06)


def test_ceilings_of_an_unknown_gpu_are_measured() -> None:
    timing = script("bench_timing")
    with pytest.raises(ValueError, match="NVIDIA A10"):
        timing.ceilings("NVIDIA A10")
    mine = timing.Ceilings(1.0, 2.0, 4.0)
    assert timing.ceilings("NVIDIA A10", mine) is mine
    assert timing.ceilings("NVIDIA H100 80GB HBM3", mine).bandwidth == 3.0e12
    with pytest.raises(ValueError, match="of 4"):
        mine.rate(4)


@pytest.mark.parametrize("each", [1, 8_912_896, 62_390_272, 242_221_056, 2_000_000_000])
def test_copies_are_more_than_the_cache(each: int) -> None:
    timing = script("bench_timing")
    copies = timing.copies_needed(each)
    assert 2 <= copies <= timing.MOST_COPIES
    assert copies * each > 240e6 or copies == timing.MOST_COPIES
    assert timing.copies_needed(each, 0) == 1


@pytest.mark.parametrize(
    ("each_us", "copies", "calls"),
    [(3.0, 29, 667), (20.0, 5, 100), (20.0, 2, 100), (1400.0, 2, 8), (20_000.0, 2, 2), (0.5, 256, 1024), (0, 3, 21)],
)
def test_a_replay_lasts_and_goes_whole_rounds(each_us: float, copies: int, calls: int) -> None:
    assert script("bench_timing").calls_planned(each_us, copies) == calls


def test_summary() -> None:
    times = script("bench_timing").summary([300.0, 100.0, 200.0, 400.0, 500.0], 10)
    assert (times.us, times.p10, times.p90) == pytest.approx((30.0, 14.0, 46.0))
    assert (times.calls, times.replays) == (10, 5)
    with pytest.raises(ValueError, match="no values"):
        script("bench_timing").quantile([], 0.5)


def test_bytes_of_nested_inputs() -> None:
    timing = script("bench_timing")
    x = torch.zeros(3, 5, dtype=torch.bfloat16)
    assert timing.bytes_of(x, [x, {"a": x.byte()}], 7, None) == 30 + 30 + 15
    copies = timing.rotated([x], 100)
    assert len(copies) == 4 and copies[0][0] is x and len({c[0].data_ptr() for c in copies}) == 4


# The timer, on a GPU that only counts


class FakeGpu:
    """torch.cuda as far as the timer needs it: a captured call takes 50 us, a replay 4 us besides."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.captured, self.capturing, self.replays = 0.0, 0, False, 0
        gpu = self

        class Graph:
            def capture_begin(self) -> None:
                gpu.capturing, gpu.captured = True, 0

            def capture_end(self) -> None:
                gpu.capturing, self.calls = False, gpu.captured

            def replay(self) -> None:
                gpu.replays += 1
                gpu.clock += 50.0 * self.calls + 4.0

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = gpu.clock

            def elapsed_time(self, other: Any) -> float:
                return (other.at - self.at) / 1e3

        class Stream:
            def wait_stream(self, other: Any) -> None: ...

        for name, fake in {"CUDAGraph": Graph, "Event": Event, "Stream": Stream}.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
        monkeypatch.setattr(script("bench_timing"), "_side_stream", Stream)

    def run(self, *inputs: Any) -> None:
        self.captured += self.capturing


def test_the_timer_captures_whole_rounds_and_takes_every_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, timing = FakeGpu(monkeypatch), script("bench_timing")
    times = timing.graph_timer(gpu.run, [(i,) for i in range(7)], 20)
    assert times.calls == timing.calls_planned(50.0 + 4 / 7, 7) == 42 and gpu.captured == 42
    assert times.us == pytest.approx(50 + 4 / 42) and times.p10 == pytest.approx(times.p90)
    assert times.replays == 20 and gpu.replays == 2 + 3 + 2 + 20
    assert gc.isenabled()


def test_what_fails_in_a_capture_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, timing = FakeGpu(monkeypatch), script("bench_timing")

    def run() -> None:
        if gpu.capturing:
            raise RuntimeError("waits for the GPU")

    with pytest.raises(timing.CaptureFailed, match="waits for the GPU"):
        timing.graph_timer(run, [()], 20)
    assert gc.isenabled() and not gpu.capturing
