"""A case of the benchmark, and how cases are run: the check first, then the time, then the file."""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import bench_timing
from bench_gate import Check
from bench_store import Record, Store
from bench_timing import Ceilings, Environment, Timer

ERROR_LENGTH = 400


class Missing(Exception):
    """What a case needs is not here: it is skipped, and the message says why."""


@dataclass
class Work:
    """A case that is ready to run: `run(*inputs)` for each of the rotated inputs."""

    run: Callable[..., Any]
    sets: Sequence[tuple[Any, ...]]
    checks: Callable[[], list[Check]]
    moved: int  # bytes: inputs read once, outputs written once
    operations: int = 0
    rate_bits: int = 16
    note: str = ""  # which kernel was chosen
    also: Sequence[Callable[..., Any]] = ()  # what the checks run besides, with the inputs of `run`


@dataclass(frozen=True)
class Goal:
    """What a case should reach. `kind` says what is compared with `bound`:

    us         microseconds, at the most
    ratio      time over that of the fastest of `versus`, at the most
    floor      floor over time, at the least
    tflops     10^12 operations a second, at the least
    bandwidth  bytes a second over those of the fastest of `versus`, at the least
    """

    kind: str
    bound: float
    versus: tuple[str, ...] = ()

    def measured(self, record: Record, others: Mapping[str, Record]) -> float | None:
        """None when something was not timed."""
        if record.times is None:
            return None
        if self.kind in ("ratio", "bandwidth"):
            known = [others[name] for name in self.versus if name in others and others[name].times is not None]
            if not known:
                return None
            if self.kind == "bandwidth":
                return record.gbs / max(one.gbs for one in known)
            return record.times.us / min(one.times.us for one in known if one.times is not None)
        return {"us": record.times.us, "floor": record.of_floor, "tflops": record.tflops}[self.kind]

    def holds(self, value: float) -> bool:
        return value <= self.bound if self.kind in ("us", "ratio") else value >= self.bound

    def __str__(self) -> str:
        other = " or ".join(dict.fromkeys(name.split("/")[0] for name in self.versus))
        return {
            "us": f"<= {self.bound:g} us",
            "ratio": f"<= {self.bound:g} x {other}",
            "floor": f">= {self.bound:.0%} of the floor",
            "tflops": f">= {self.bound:g} TFLOP/s",
            "bandwidth": f">= {self.bound:.0%} of {other}",
        }[self.kind]


@dataclass(frozen=True)
class Case:
    """One line of a table. `make` builds inputs and finds the kernel; it raises `Missing` where there is none."""

    name: str  # family/kind/shape/size: "wxa16/int4_g128/28672x4096/16"
    make: Callable[[Maker], Work]
    baselines: tuple[str, ...] = ()  # cases timed in the same run, to compare with
    goals: tuple[Goal, ...] = ()
    ours: bool = True  # compiles kernels of this project

    @property
    def family(self) -> str:
        return self.name.split("/")[0]

    @property
    def compared(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.baselines, *(name for goal in self.goals for name in goal.versus)]))


@dataclass
class Maker:
    """What cases are built with: the device, how much to rotate, and the weights of the case before."""

    device: torch.device
    rotate: int = bench_timing.ROTATED
    narrow: int = 0  # the most rows of a packed weight, where it is only compiled for; 0: all of them
    _kept: tuple[Any, Any] | None = field(default=None, repr=False)

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator(seed), device=self.device, dtype=torch.float32).to(dtype)

    def kept(self, key: Any, build: Callable[[], Any]) -> Any:
        """What `build` gives; built once for consecutive cases with one key, and freed for the next key."""
        if self._kept is None or self._kept[0] != key:
            self._kept = None
            self._kept = (key, build())
        return self._kept[1]

    def forget(self) -> None:
        self._kept = None

    def rotated(self, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        return bench_timing.rotated(tensors, self.rotate)


class Runner:
    """Runs cases, each at most once a run, and keeps what they give."""

    def __init__(
        self,
        cases: Sequence[Case],
        store: Store,
        environment: Environment,
        maker: Maker,
        *,
        timer: Timer = bench_timing.graph_timer,
        top: Ceilings,
        replays: int = bench_timing.REPLAYS,
        say: Callable[[str], None] = print,
    ) -> None:
        self.cases = {case.name: case for case in cases}
        self.store, self.environment, self.maker = store, environment, maker
        self.timer, self.top, self.replays, self.say = timer, top, replays, say
        self.run = store.begin(environment)
        for record in store.records():
            if record.run == self.run and record.status == "running":  # this run was here before, and did not return
                record.status, record.why = "failed", "the process ended or hung in this case"
                store.put(record)

    def all(self, names: Sequence[str], end: float) -> bool:
        """Runs cases in order until time.monotonic() passes `end`. Whether every one of them that ran is right."""
        left = 0
        for name in names:
            if self.store.done(name, self.environment) or self.here(name) is not None:
                continue
            if time.monotonic() > end:
                left += 1
                continue
            for other in self.cases[name].compared:
                if other in self.cases and self.here(other) is None:
                    self.one(self.cases[other])
            if self.here(name) is None:
                self.one(self.cases[name])
        if left:
            self.say(f"{left} cases left out: no time; the same command goes on with them")
        found = [self.store.get(name) for name in names]
        return all(record is None or record.status in ("ok", "skipped") for record in found)

    def here(self, name: str) -> Record | None:
        """The record of a case in this run."""
        return self.store.of_run(name, self.run)

    def one(self, case: Case) -> Record:
        """Makes, checks and times one case. Raises when the process is of no more use; the record then says why."""
        record = Record(case.name, self.run, "running")
        self.store.put(record)
        began, of_no_use = time.monotonic(), None
        try:
            self._measure(case, record)
        except Missing as error:
            record.status, record.why = "skipped", str(error)
        except Exception as error:
            record.status = "failed"
            record.why = f"{type(error).__name__}: {str(error)[:ERROR_LENGTH]}"
            self.say(traceback.format_exc(limit=-4))
            self.maker.forget()
            of_no_use = error if isinstance(error, bench_timing.CaptureFailed) else None
        self.store.put(record)
        self.say(line(record, time.monotonic() - began))
        if of_no_use is not None:
            raise of_no_use
        if record.status == "failed" and self.maker.device.type == "cuda":
            torch.cuda.synchronize()  # raises again after an illegal access
            torch.cuda.empty_cache()
        return record

    def _measure(self, case: Case, record: Record) -> None:
        work = case.make(self.maker)
        record.moved, record.operations, record.note = work.moved, work.operations, work.note
        record.checks = work.checks()
        if not all(check.ok for check in record.checks):
            record.status = "red"
            record.why = "; ".join(str(check) for check in record.checks if not check.ok)
            return
        record.floor_us = bench_timing.floor_us(work.moved, work.operations, work.rate_bits, self.top)
        record.times = self.timer(work.run, work.sets, self.replays)
        record.status = "ok"


def line(record: Record, took: float) -> str:
    """One line for people; no time for a case whose check is red."""
    if record.times is None:
        return f"{record.name:44} {record.status}: {record.why}   [{took:.1f} s]"
    worst = max((check.value / check.limit for check in record.checks if check.limit > 0), default=0.0)
    return (
        f"{record.name:44} {record.times.us:9.2f} us ({record.times.p10:.2f}-{record.times.p90:.2f}) "
        f"{record.gbs:7.0f} GB/s {record.tflops:7.1f} TFLOP/s  {record.of_floor:5.1%} of floor  "
        f"check {worst:4.2f} of limit  {record.note}   [{took:.1f} s]"
    )


def kernel(module: str, name: str) -> Any:
    """A function of the kernels' package. Raises `Missing` where this version has none."""
    try:
        return getattr(importlib.import_module(f"quantkit_kernels.{module}"), name)
    except ModuleNotFoundError as error:
        if error.name != f"quantkit_kernels.{module}":
            raise
        raise Missing(f"quantkit_kernels.{module} does not exist yet") from error
    except AttributeError as error:
        raise Missing(f"quantkit_kernels.{module} has no {name}") from error


def with_changed(module: str, function: Callable[..., Any], **values: Any) -> Callable[..., Any]:
    """A function during whose calls names of a module of the kernels' package stand for other values."""
    target = importlib.import_module(f"quantkit_kernels.{module}")

    def call(*args: Any, **kw: Any) -> Any:
        before = {name: getattr(target, name) for name in values}
        try:
            for name, value in values.items():
                setattr(target, name, value)
            return function(*args, **kw)
        finally:
            for name, value in before.items():
                setattr(target, name, value)

    return call


@contextmanager
def compiling_only() -> Iterator[None]:
    """Inside, Triton's kernels are compiled into its cache on disk where they would be launched, and not launched."""
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = launch
