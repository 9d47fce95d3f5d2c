"""Times the configurations among which a kernel without a table chooses, for its heuristic to be set by.

    python kernels/sweep.py w8a8/int8/28672x4096/16 fp8_block/e4m3/7168x16384/4096 decode/int4/B16_S8192
                            [--out build/sweep.jsonl] [--budget SECONDS] [--jobs N]

The names are those of bench.py. Each configuration is checked as a case is; what is wrong has no time. Lines of the
output: {"case": ..., "config": ..., "us": ... or null, "why": ...}. Exit codes: 2 the arguments, 4 no CUDA device.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import torch  # noqa: E402

import bench_cases  # noqa: E402
import bench_timing  # noqa: E402
from bench_core import Case, Maker, compiling_only  # noqa: E402

FAMILIES = ("w8a8", "fp8_block", "decode", "act")
COMPILE_LIMIT = 120
QUICK = 10  # replays


def sizes(name: str) -> tuple[int, int, int]:
    """N, K, M of a case's name."""
    shape, m = name.split("/")[2:4]
    n, k = shape.split("x")
    return int(n), int(k), int(m)


def variants(case: Case) -> dict[str, dict[str, Any]]:
    """Configurations by what is shown of them: the arguments that `case.make` takes besides."""
    if case.family == "decode":
        tried: dict[str, dict[str, Any]] = {f"splits {n}": {"splits": n} for n in (0, 2, 4, 8, 12, 16, 24, 32, 48)}
        for one in itertools.product((8,), (32, 64, 128), (1, 2, 4), (2, 3, 4, 5)):
            tried["columns {} tokens {} warps {} stages {}".format(*one)] = {"sizes": one}
        return tried
    if case.family == "act":
        tiles = ((2048, 16), (1024, 8), (2048, 8), (4096, 16), (4096, 32), (8192, 32), (8192, 64), (2048, 32))
        return {f"tile {tile} elements {each}": {"sizes": (tile, each)} for tile, each in tiles}
    from quantkit_kernels._w8a8_choice import Config

    n, k, m = sizes(case.name)
    block = case.family == "fp8_block"
    made = [None, Config("library"), *small(Config, n, k, m, block), *large(Config, m, block)]
    return {"as it is" if one is None else shown(one): {"config": one} for one in made}


def shown(config: Any) -> str:
    c = config
    if c.path == "library":
        return c.path
    return f"{c.path} {c.bm}x{c.bn}x{c.bk} halves {c.halves} split {c.split} warps {c.warps} stages {c.stages}"


def small(config: Any, n: int, k: int, m: int, block: bool) -> Iterator[Any]:
    """The weight as the left operand, K split."""
    bm = next((size for size in (16, 32, 64) if m <= size), 128)
    if m > 512:
        return
    for bn, warps in ((64, 4), (128, 8)) if bm < 128 else ((128, 8),):
        for bk in (128,) if block else (128, 256):
            for split in (1, 2, 4, 8):
                for stages in (3, 4, 5):
                    fits = stages * bk * (bm + bn) <= 200_000
                    if fits and k >= 4 * bk * split:
                        yield config("small", bm, bn, bk, 1, split, warps, stages)


def large(config: Any, m: int, block: bool) -> Iterator[Any]:
    """Tokens as the left operand."""
    if m < 128:
        return
    for bm, bn, halves, warps in (
        (128, 128, 1, 8),
        (128, 128, 1, 4),
        (128, 128, 2, 8),
        (64, 128, 1, 4),
        (128, 256, 1, 8),
    ):
        for bk in (128,) if block else (64, 128):
            for stages in (3, 4, 5):
                if stages * bk * (bm + bn) <= 200_000 and not (block and bn > 128):
                    yield config("large", bm, bn, bk, halves, 1, warps, stages)


def compile_one(name: str, label: str) -> None:
    """In a process of its own: into Triton's cache, not launched."""
    case = {case.name: case for case in bench_cases.all_cases()}[name]
    with compiling_only():
        work = case.make(Maker(torch.device("cuda"), rotate=0), **variants(case)[label])
        work.run(*work.sets[0])


def measured(case: Case, arguments: dict[str, Any], maker: Maker, timer: bench_timing.Timer) -> tuple[float, str]:
    """Microseconds, or inf and why there are none."""
    try:
        work = case.make(maker, **arguments)
        wrong = "; ".join(str(check) for check in work.checks() if not check.ok)
        return (math.inf, wrong) if wrong else (timer(work.run, work.sets, QUICK).us, "")
    except bench_timing.CaptureFailed:
        raise
    except Exception as error:
        return math.inf, f"{type(error).__name__}: {str(error)[:200]}"


def run(cases: Sequence[Case], out: Path, end: float, jobs: int) -> None:
    maker = Maker(torch.device("cuda"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        ahead = {
            (case.name, label): pool.submit(compile_one, case.name, label) for case in cases for label in variants(case)
        }
        for case in cases:
            found = []
            for label, arguments in variants(case).items():
                if time.monotonic() > end:
                    break
                try:
                    ahead[case.name, label].exception(COMPILE_LIMIT)
                except (BrokenExecutor, TimeoutError):
                    continue  # what breaks or holds up the compiler would do so here
                us, why = measured(case, arguments, maker, bench_timing.graph_timer)
                found.append((us, label, why))
                row = {"case": case.name, "config": label, "us": us if math.isfinite(us) else None, "why": why}
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                if why:
                    torch.cuda.synchronize()  # raises again after an illegal access: the process is of no more use
            print(case.name)
            for us, label, why in sorted(found)[:8]:
                print(f"  {us:9.2f} us  {label}" if math.isfinite(us) else f"  {label}: {why}", flush=True)
        pool.shutdown(wait=False, cancel_futures=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"cases of {', '.join(FAMILIES)}")
    parser.add_argument("--out", type=Path, default=Path("build/sweep.jsonl"))
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which nothing is timed")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes that compile")
    arguments = parser.parse_args(argv)
    known = {case.name: case for case in bench_cases.all_cases() if case.family in FAMILIES}
    for name in arguments.names:
        if name not in known:
            parser.error(f"{name!r} is no case of {', '.join(FAMILIES)}; bench.py --list names them")
    if not torch.cuda.is_available():
        print("sweep: no CUDA device: times are taken on a GPU", file=sys.stderr)
        return 4
    run([known[name] for name in arguments.names], arguments.out, time.monotonic() + arguments.budget, arguments.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
