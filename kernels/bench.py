"""Measures the kernels on one GPU: each is checked first, then timed beside the libraries that come with torch.

    python kernels/bench.py [--only PATTERN] [--out build/bench.json] [--budget SECONDS] [--table results.md]
    python kernels/bench.py --list [--only PATTERN]
    python kernels/bench.py --small
    python kernels/bench.py --render --out build/bench.json --table results.md

How times are taken is in bench_timing.py, what must hold before in bench_gate.py, the cases in bench_cases.py. Results
are written after every case; the same command goes on where it was stopped, and repeats what other code or another GPU
has measured. A case that kills its process or hangs is noted as failed, and the others go on in a new process.

Exit codes: 0 all that ran is right; 1 something is wrong, failed, or was killed; 2 the arguments; 4 no CUDA device.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import torch  # noqa: E402

import bench_cases  # noqa: E402
import bench_timing  # noqa: E402
import compare_marlin  # noqa: E402
from bench_core import Case, Maker, Missing, Runner, compiling_only  # noqa: E402
from bench_store import Store  # noqa: E402
from bench_table import Tables  # noqa: E402

WRONG = 10  # a child's exit code: it came to its end, and something it measured is not right
POLL = 0.5
RESTARTS = 20
NARROW = 512  # rows of a weight that kernels are compiled with: their code does not depend on the number


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="regular expression that a case's name must contain; several mean any of them",
    )
    made.add_argument("--out", type=Path, default=Path("build/bench.json"), help="JSON file of the results")
    made.add_argument("--table", type=Path, help="Markdown file for the tables")
    made.add_argument("--budget", type=float, default=math.inf, help="seconds after which no case begins")
    made.add_argument("--replays", type=int, default=bench_timing.REPLAYS, help="replays of each graph, 20 or more")
    made.add_argument("--jobs", type=int, default=1, help="processes that compile kernels before the first case")
    made.add_argument("--case-limit", type=float, default=150, help="seconds after which a case is taken to hang")
    made.add_argument("--marlin", type=Path, help="folder with Marlin's sources, to be built and timed beside")
    made.add_argument("--commit", default="", help="what the results are of, where there is no git")
    made.add_argument("--list", action="store_true", help="names the cases, and measures nothing")
    made.add_argument("--small", action="store_true", help="checks every kernel on small odd shapes, and times nothing")
    made.add_argument("--render", action="store_true", help="writes the tables of --out, and measures nothing")
    made.add_argument("--child", metavar="STARTED", help=argparse.SUPPRESS)
    made.add_argument("--until", type=float, default=math.inf, help=argparse.SUPPRESS)  # of time.time()
    made.add_argument("--shard", metavar="I/N", help=argparse.SUPPRESS)
    return made


def selected(cases: Sequence[Case], patterns: Sequence[str]) -> list[str]:
    """Names of the cases to run: all of ours and the ceilings, or whatever a pattern is found in.

    Raises ValueError for a pattern that is no regular expression or that nothing matches.
    """
    if not patterns:
        return [case.name for case in cases if case.ours or case.family == "ceiling"]
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            found = {case.name for case in cases if re.search(pattern, case.name)}
        except re.error as error:
            raise ValueError(f"--only {pattern!r} is no regular expression: {error}") from error
        if not found:
            raise ValueError(f"--only {pattern!r} matches none of {len(cases)} cases; --list names them")
        chosen |= found
    return [case.name for case in cases if case.name in chosen]


def supervise(command: Sequence[str], heartbeat: Path, *, end: float, case_limit: float) -> bool:
    """Runs a child to its end; begins it anew when it dies, or has written nothing for `case_limit` seconds.

    command    begins where it stopped when it is run again
    heartbeat  the file that it writes before and after every case
    end        of time.monotonic(), after which no child begins

    Whether the first child came to its end and found everything right.
    """
    for attempt in range(1 + RESTARTS):
        before = _written(heartbeat)
        child = subprocess.Popen(command)
        try:
            code = _watched(child, heartbeat, case_limit)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        if code in (0, WRONG):
            return attempt == 0 and code == 0
        print(f"bench: the process ended with {code}; the other cases go on in a new one", flush=True)
        if time.monotonic() > end or _written(heartbeat) == before:
            break
    return False


def _watched(child: subprocess.Popen[bytes], heartbeat: Path, limit: float) -> int | None:
    """The exit code; None when it was killed because it hung."""
    seen, last = _written(heartbeat), time.monotonic()
    while True:
        try:
            return child.wait(POLL)
        except subprocess.TimeoutExpired:
            pass
        if (now := _written(heartbeat)) != seen:
            seen, last = now, time.monotonic()
        elif time.monotonic() - last > limit:
            child.kill()
            child.wait()
            return None


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def compile_ahead(command: Sequence[str], jobs: int, limit: float) -> None:
    """Runs every case once in some processes, so that Triton's cache on disk holds its kernels."""
    began = time.monotonic()
    children = [subprocess.Popen([*command, "--shard", f"{i}/{jobs}"]) for i in range(jobs)]
    for child in children:
        try:
            child.wait(max(1.0, began + limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    print(f"bench: compiled ahead in {time.monotonic() - began:.0f} s", flush=True)


def compile_shard(cases: Sequence[Case], shard: str) -> None:
    """Of `compile_ahead`: every N-th case, without a launch. What fails here fails again where it is noted."""
    place, count = map(int, shard.split("/"))
    maker = Maker(torch.device("cuda"), rotate=0, narrow=NARROW)
    for case in [case for case in cases if case.ours][place::count]:
        try:
            work = case.make(maker)
            with compiling_only():
                for run in (work.run, *work.also):
                    run(*work.sets[0])
        except Missing:
            pass
        except Exception as error:
            print(f"bench: compiling for {case.name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            maker.forget()


def measure(cases: Sequence[Case], names: Sequence[str], arguments: argparse.Namespace) -> bool:
    """Of the child: the cases, in this process. Whether all is right."""
    end = time.monotonic() + arguments.until - time.time()
    about = bench_timing.environment(FOLDER, arguments.child, arguments.commit)
    store = Store(arguments.out)
    measured = None
    if not any(part in about.device for part in bench_timing.CEILINGS):
        measured = bench_cases.measured_ceilings(Maker(torch.device("cuda")), bench_timing.graph_timer)
    runner = Runner(
        cases,
        store,
        about,
        Maker(torch.device("cuda")),
        top=bench_timing.ceilings(about.device, measured),
        replays=arguments.replays,
        say=lambda text: print(text, flush=True),
    )
    note_clocks(store, runner.run, "at the start")
    try:
        return runner.all(names, end)
    finally:
        note_clocks(store, runner.run, "at the end")


def note_clocks(store: Store, run: str, when: str) -> None:
    found = store.runs[run].get("clocks", [])
    store.note(run, "clocks", [*found, f"{bench_timing.clocks()} {when}"])


def check_small(cases: Sequence[Case], device: torch.device) -> bool:
    """The checks alone, of every case; where there is no GPU, of the plain-torch functions. Whether all hold."""
    good = True
    maker = Maker(device, rotate=0)
    for case in cases:
        try:
            found = case.make(maker).checks()
        except Missing as error:
            print(f"skipped {case.name}: {error}", flush=True)
            continue
        except Exception as error:
            print(f"wrong {case.name} {type(error).__name__}: {str(error)[:300]}", flush=True)
            good = False
            continue
        wrong = [str(check) for check in found if not check.ok]
        good &= not wrong
        print(f"{'wrong' if wrong else 'ok'} {case.name} {'; '.join(wrong)}".rstrip(), flush=True)
    return good


def write_table(store: Store, cases: Sequence[Case], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(Tables(store, cases).text())


def checked(arguments: argparse.Namespace, fail: Callable[[str], object]) -> None:
    """Complains about arguments that make no sense."""
    if arguments.replays < 20:
        fail(f"--replays is {arguments.replays}; a median of fewer than 20 says little")
    if arguments.budget <= 0:
        fail(f"--budget is {arguments.budget:g} seconds; it must be more than 0")
    if not 1 <= arguments.jobs <= 64:
        fail(f"--jobs is {arguments.jobs}; 1 to 64 processes")
    if arguments.render and not arguments.out.exists():
        fail(f"--render reads {arguments.out}, which is not there")
    if arguments.render and arguments.table is None:
        fail("--render needs --table, the file to write")
    if arguments.marlin is not None and not arguments.marlin.is_dir():
        fail(f"--marlin {arguments.marlin} is no folder")


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    made = parser()
    arguments = made.parse_args(argv)
    checked(arguments, made.error)
    cases = bench_cases.all_cases(arguments.marlin)
    try:
        names = selected(cases, arguments.only)
    except ValueError as error:
        made.error(str(error))
    if arguments.list:
        print("\n".join(names))
        return 0
    if arguments.render:
        write_table(Store(arguments.out), cases, arguments.table)
        return 0
    if arguments.small:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return 0 if check_small(bench_cases.small_cases(), device) else 1
    if not torch.cuda.is_available():
        print("bench: no CUDA device: times are taken on a GPU", file=sys.stderr)
        return 4
    if arguments.shard:
        compile_shard([case for case in cases if case.name in names], arguments.shard)
        return 0
    if arguments.child:
        return 0 if measure(cases, names, arguments) else WRONG
    return parent(cases, argv, arguments)


def parent(cases: Sequence[Case], argv: Sequence[str], arguments: argparse.Namespace) -> int:
    """Compiles ahead, watches over the process that measures, writes the tables."""
    began = time.monotonic()
    end = began + arguments.budget
    command = [sys.executable, str(FOLDER / "bench.py"), *argv]
    Store(arguments.out)  # an unreadable file is an error now, not after the compilation
    if arguments.marlin is not None:
        try:
            compare_marlin.build(arguments.marlin)
        except Exception as error:  # its cases then say so too, and ours go on
            print(f"bench: Marlin cannot be built: {type(error).__name__}: {str(error)[-2000:]}", flush=True)
    if arguments.jobs > 1:
        compile_ahead(command, arguments.jobs, min(240.0, arguments.budget / 2))
    started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    until = time.time() + end - time.monotonic()
    good = supervise(
        [*command, "--child", started, "--until", repr(until)], arguments.out, end=end, case_limit=arguments.case_limit
    )
    if arguments.table is not None:
        write_table(Store(arguments.out), cases, arguments.table)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
