"""Makes the table of configurations of weight-only products for the GPU at hand.

    python kernels/tune.py [--kinds int4_g128,mxfp4] [--shapes 28672x4096,6144x4096] [--tokens 1,8,16,...]
                           [--budget SECONDS] [--out kernels/quantkit_kernels/tables/NAME.json]

For every kind, shape and number of tokens: the heuristic's configuration and one of each tile first, then more of the
two best tiles and what differs from the best in one thing, three rounds in all. A configuration is checked against
float64 before it is timed, as bench.py does both; a wrong one is named and never chosen. What was found is written
after every round, to the table and, with all times, to the log, from which the same command goes on. Other processes
compile meanwhile.

Exit codes: 0 done, or out of time; 1 a configuration was wrong, failed or ended the process; 2 the arguments; 4 no
CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import torch  # noqa: E402

import bench  # noqa: E402
import bench_anchors  # noqa: E402
import bench_timing  # noqa: E402
import bench_weights  # noqa: E402
from bench_core import Maker, compiling_only  # noqa: E402
from bench_gate import errors, product, same_bytes, sample_rows  # noqa: E402
from bench_weights import FORMATS, Format, problem, shown  # noqa: E402
from quantkit_kernels import choice as choosing  # noqa: E402
from quantkit_kernels.choice import Choice  # noqa: E402
from tune_search import RUNNING, Log, filled, proposals  # noqa: E402

TOKENS = (16, 1, 8, 64, 32, 128, 256, 1024, 4096, 512, 2048)
ROUNDS = 3
QUICK, SURE = 5, 20  # replays of a candidate, of the best ones
FINALISTS = 3
SOURCES = (
    "_wxa16.py",
    "_wxa16_stream.py",
    "_wxa16_hopper.py",
    "_hopper_words.py",
    "_hopper_launch.py",
    "_unpack.py",
    "_unpack_ptx.py",
    "_words.py",
    "layout.py",
    "wxa16.py",
)  # what is timed
COMPILE_LIMIT = 120  # seconds

Item = tuple[Format, int, int, int]  # a format, N, K, tokens


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    shapes = ",".join(f"{n}x{k}" for n, k in bench_anchors.SHAPES)
    made.add_argument("--kinds", default="int4_g128", help=f"of {', '.join(FORMATS)}; several with commas")
    made.add_argument("--shapes", default=shapes, help=f"out_features x in_features; default {shapes}")
    made.add_argument(
        "--tokens", default=",".join(map(str, TOKENS)), help="numbers of tokens, the most important first"
    )
    made.add_argument("--budget", type=float, default=math.inf, help="seconds after which no configuration is timed")
    made.add_argument("--out", type=Path, help="the table; default: quantkit_kernels/tables, by the GPU's name")
    made.add_argument("--log", type=Path, default=Path("build/tune.jsonl"), help="all times, to go on from")
    made.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes that compile")
    made.add_argument("--case-limit", type=float, default=240, help="seconds without a result after which it hangs")
    made.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("--until", type=float, default=math.inf, help=argparse.SUPPRESS)
    return made


def wanted(arguments: argparse.Namespace) -> list[Item]:
    """(format, N, K, tokens), by tokens first. Raises ValueError for names and numbers that are none."""
    kinds = [name for name in arguments.kinds.split(",") if name]
    for name in kinds:
        if name not in FORMATS:
            raise ValueError(f"--kinds {name!r}; there are {', '.join(FORMATS)}")
    shapes = []
    for text in filter(None, arguments.shapes.split(",")):
        found = re.fullmatch(r"(\d+)x(\d+)", text)
        if not found or not int(found[1]) or not int(found[2]):
            raise ValueError(f"--shapes {text!r}; a shape is written 28672x4096, rows by columns")
        shapes.append((int(found[1]), int(found[2])))
    tokens = []
    for text in filter(None, arguments.tokens.split(",")):
        if not text.isdigit() or int(text) not in choosing.BUCKETS:
            raise ValueError(f"--tokens {text!r}; tables hold {', '.join(map(str, choosing.BUCKETS))}")
        tokens.append(int(text))
    return [(FORMATS[name], n, k, m) for name in kinds for m in tokens for n, k in shapes]


class Tuner:
    """Checks and times configurations of one problem after the other."""

    def __init__(self, maker: Maker, log: Log, timer: bench_timing.Timer, say: Callable[[str], None]) -> None:
        self.maker, self.log, self.timer, self.say = maker, log, timer, say

    def reference(self, form: Format, n: int, k: int, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows that are compared, their values in float64, and the size of those."""
        made = bench_weights.weight(self.maker, form, n, k)
        x = self.maker.normal(m, k, seed=bench_weights.seed_of("x", m, k))
        rows = sample_rows(m, n * k, self.maker.device)
        return rows, *product(x[rows], made.rows, n)

    def one(self, item: Item, choice: Choice, known: Any, replays: int, sure: bool) -> float:
        """Microseconds of a configuration, inf when it is wrong or fails. Raises when the device answers no more."""
        form, n, k, m = item
        key = problem(*item)
        self.log.put(key, choice, math.inf, RUNNING, sure=sure)
        us, why = math.inf, ""
        try:
            work = bench_weights.weight_only(self.maker, form, n, k, m, choice)
            rows, wanted_rows, size = known
            y = work.run(*work.sets[0])
            found = [*errors(y[rows], wanted_rows, form.limits, size), same_bytes(y, work.run(*work.sets[0]))]
            why = "; ".join(str(check) for check in found if not check.ok)
            if not why:
                us = self.timer(work.run, work.sets, replays).us
        except bench_timing.CaptureFailed as error:
            self.log.put(key, choice, us, str(error)[:200], sure=sure)
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {str(error)[:200]}"
        self.log.put(key, choice, us, why, sure=sure)
        if why:
            self.say(f"{key.kind} {n}x{k} M={m} {shown(choice)}: {why}")
            if self.maker.device.type == "cuda":
                torch.cuda.synchronize()  # raises again after an illegal access: the process is of no more use
        return us


def compile_one(item: Item, choice: Choice) -> str:
    """In a process of its own: a configuration's kernels into Triton's cache, not launched. What went wrong."""
    form, n, k, m = item
    try:
        with compiling_only():
            maker = Maker(torch.device("cuda"), rotate=0, narrow=bench.NARROW)
            work = bench_weights.weight_only(maker, form, n, k, m, choice)
            work.run(*work.sets[0])
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


class Ahead:
    """Kernels that are compiled in other processes while this one takes times. Without a pool it does nothing."""

    def __init__(self, pool: Executor | None) -> None:
        self.pool = pool
        self.futures: dict[tuple[Any, ...], Future[str]] = {}

    def ask(self, tasks: Iterable[tuple[Item, Choice]]) -> None:
        for (form, n, k, m), choice in tasks:
            key = (form.name, min(n, bench.NARROW), k, m, choice)
            if self.pool is not None and key not in self.futures:
                try:
                    self.futures[key] = self.pool.submit(compile_one, (form, n, k, m), choice)
                except BrokenExecutor:
                    self.pool = None

    def wait(self, item: Item, choice: Choice) -> None:
        """Until it is compiled, or failed to: an error shows again where the configuration is timed."""
        form, n, k, m = item
        future = self.futures.get((form.name, min(n, bench.NARROW), k, m, choice))
        if future is not None:
            with contextlib.suppress(BrokenExecutor, TimeoutError):
                future.result(COMPILE_LIMIT)


def search(
    items: Sequence[Item],
    tuner: Tuner,
    gpu: choosing.Gpu,
    end: float,
    written: Callable[[], None],
    ahead: Ahead,
) -> bool:
    """The problems of one number of tokens and one format go together, round by round. False when out of time."""
    groups: dict[tuple[str, int], list[Item]] = {}
    for item in items:
        groups.setdefault((item[0].name, item[3]), []).append(item)
    order = list(groups.values())
    for place, group in enumerate(order):
        known: dict[Item, Any] = {}
        for turn in range(ROUNDS + 1):
            sure = turn == ROUNDS
            tasks = [(item, one) for item in group for one in due(tuner.log, item, gpu, sure)]
            ahead.ask(tasks)
            if turn == 0:
                ahead.ask((item, one) for item in [*order, []][place + 1] for one in due(tuner.log, item, gpu, False))
            for item, one in tasks:
                if time.monotonic() > end:
                    return False
                ahead.wait(item, one)
                if item not in known:
                    known = {item: tuner.reference(*item)}  # of one problem at a time: they are large
                tuner.one(item, one, known[item], SURE if sure else QUICK, sure)
            written()
        for item in group:
            report(tuner, item)
    return True


def due(log: Log, item: Item, gpu: choosing.Gpu, sure: bool) -> list[Choice]:
    """What to time in a round: proposals, or at the end the fastest ones once more, with care."""
    tried = log.times.get(problem(*item), {})
    if not sure and log.sure.get(problem(*item)):
        return []  # it was done with before
    if not sure:
        return proposals(tried, problem(*item), gpu)
    fastest = sorted((one for one in tried if math.isfinite(tried[one])), key=lambda one: tried[one])[:FINALISTS]
    return [one for one in fastest if one not in log.sure.get(problem(*item), {})]


def report(tuner: Tuner, item: Item) -> None:
    key = problem(*item)
    one = tuner.log.best().get(key)
    if one is None:
        tuner.say(f"{item[0].name} {key.n}x{key.k} M={key.m}: no configuration is right")
        return
    us = tuner.log.sure.get(key, tuner.log.times[key])[one]
    tuner.say(f"{item[0].name} {key.n}x{key.k} M={key.m}: {us:.2f} us {shown(one)}; {len(tuner.log.times[key])} tried")


def default_table(gpu: choosing.Gpu) -> Path:
    return FOLDER / "quantkit_kernels" / "tables" / (re.sub(r"\W+", "-", gpu.name.lower()).strip("-") + ".json")


def child(items: Sequence[Item], arguments: argparse.Namespace) -> int:
    """Of the process that measures."""
    gpu = choosing.gpu_of(torch.device("cuda"))
    about = bench_timing.environment(FOLDER, "")
    package = FOLDER / "quantkit_kernels"
    source = bench_timing.fingerprint(path for path in package.glob("*.py") if path.name in SOURCES)
    versions = {"device": about.device, "driver": about.driver, "torch": about.torch, "triton": about.triton}
    log = Log(arguments.log, versions | {"source": source})
    path = arguments.out or default_table(gpu)
    notes = [f"{name} {value}" for name, value in versions.items()] + [f"commit {about.commit or 'unknown'}"]

    def written() -> None:
        if best := filled(log.best()):
            choosing.save_table(path, gpu, best, notes=notes)

    end = time.monotonic() + arguments.until - time.time()
    tuner = Tuner(Maker(torch.device("cuda")), log, bench_timing.graph_timer, lambda text: print(text, flush=True))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        done = search(items, tuner, gpu, end, written, Ahead(pool))
        pool.shutdown(wait=False, cancel_futures=True)
    written()
    print(f"tune: {path}" + ("" if done else "; out of time, the same command goes on"), flush=True)
    return bench.WRONG if any(log.why.values()) else 0


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    made = parser()
    arguments = made.parse_args(argv)
    if arguments.budget <= 0 or not 1 <= arguments.jobs <= 64:
        made.error("--budget must be more than 0 seconds, --jobs 1 to 64")
    try:
        items = wanted(arguments)
    except ValueError as error:
        made.error(str(error))
    if not torch.cuda.is_available():
        print("tune: no CUDA device: times are taken on a GPU", file=sys.stderr)
        return 4
    if arguments.child:
        return child(items, arguments)
    end = time.monotonic() + arguments.budget
    command = [
        sys.executable,
        str(FOLDER / "tune.py"),
        *argv,
        "--child",
        "--until",
        repr(time.time() + arguments.budget),
    ]
    return 0 if bench.supervise(command, arguments.log, end=end, case_limit=arguments.case_limit) else 1


if __name__ == "__main__":
    sys.exit(main())
