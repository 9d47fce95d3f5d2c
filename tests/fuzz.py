"""Bad checkpoints and recipes, by the hundred thousand: no crash, no hang, no memory, nothing outside the folder.

    python tests/fuzz.py --cases 100000 --seed 0        all targets; prints a table, and each finding
    python tests/fuzz.py --target header --only 1234    one case again, with its traceback

A crash is whatever is not one of quantkit's own errors. A hang is a case of more than LIMIT seconds. Memory is what a
case takes above what there was, against the size of the model folder that it reads.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "critical"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from fuzz_mutations import Mutator
from fuzz_targets import TARGETS, Beds

from quantkit.errors import QuantkitError

LIMIT = 20  # seconds a case; a few milliseconds are usual
MEMORY = 64 << 20  # bytes that a case may add at most; the folders have less than 1 MB
ADDRESSES = 8 << 30  # bytes of address space beyond what the process has at first


class Hang(BaseException):
    """A case took too long."""


@dataclass
class Found:
    """What came of the cases of one target."""

    cases: int = 0
    refused: int = 0
    seconds: float = 0.0
    memory: int = 0
    findings: dict[str, list[int]] = field(default_factory=dict)

    def add(self, what: str, number: int) -> None:
        self.findings.setdefault(what, []).append(number)


class Watch:
    """Sees files opened outside, time, and memory. Its audit hook stays for the life of the process."""

    def __init__(self, beds: Beds) -> None:
        self.root, self.outside = str(beds.root), str(beds.outside)
        self.active = False
        self.opened: list[str] = []
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active or event != "open" or not isinstance(args[0], str | bytes):
            return
        path = os.path.realpath(os.fsdecode(args[0])) if b"\0" not in os.fsencode(args[0]) else ""
        writes = (isinstance(args[1], str) and args[1][0] in "wxa") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        inside = path.startswith((self.root, "/dev/null", "/proc")) and not path.startswith(self.outside)
        if path.startswith(self.outside) or (writes and not inside):
            self.opened.append(path)

    @contextlib.contextmanager
    def case(self) -> Iterator[Callable[[], int]]:
        """Gives a function that tells the memory that was added."""

        def late(*_: Any) -> None:
            raise Hang(f"more than {LIMIT} s")

        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        faulthandler.dump_traceback_later(3 * LIMIT, exit=True)  # a loop in C that never looks at signals
        Path("/proc/self/clear_refs").write_text("5")
        start = _status("VmRSS")
        self.opened.clear()
        self.active = True
        try:
            yield lambda: _status("VmHWM") - start
        finally:
            self.active = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            faulthandler.cancel_dump_traceback_later()


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM its peak."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))


def one(name: str, number: int, seed: int, beds: Beds, watch: Watch, found: Found, *, raising: bool = False) -> None:
    """One case: adds what it finds to `found`."""
    mutator = Mutator(f"{seed}/{name}/{number}")
    began = time.perf_counter()
    screen = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with watch.case() as added, contextlib.redirect_stdout(screen), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            TARGETS[name][0](mutator, beds)
        except QuantkitError:
            found.refused += 1
        except (Exception, Hang) as error:
            if raising:
                raise
            at = [f for f in traceback.extract_tb(error.__traceback__) if "/quantkit/" in f.filename]
            place = f"{Path(at[-1].filename).name}:{at[-1].lineno}" if at else "?"
            found.add(f"{type(error).__name__} at {place}: {str(error)[:100]!r}", number)
        memory = added()
        for path in watch.opened:
            found.add(f"opened {path.removeprefix(watch.root)}", number)
    if memory > MEMORY and found.cases > 20:  # at first modules are imported
        found.add(f"memory: {memory >> 20} MiB", number)
    found.cases += 1
    found.seconds += time.perf_counter() - began
    found.memory = max(found.memory, memory if found.cases > 20 else 0)


def run(cases: int, seed: int, root: Path, names: list[str] | None = None) -> dict[str, Found]:
    """Runs so many cases, shared out among the targets."""
    beds = Beds(root)
    watch = Watch(beds)
    names = names or list(TARGETS)
    shares = sum(TARGETS[name][1] for name in names)
    result = {}
    for name in names:
        result[name] = Found()
        for number in range(-(-cases * TARGETS[name][1] // shares)):
            one(name, number, seed, beds, watch, result[name])
    return result


def table(result: dict[str, Found]) -> str:
    """The outcome as Markdown."""
    rows = ["| target | cases | refused | findings | seconds | most memory, MiB |", "|---|---|---|---|---|---|"]
    for name, f in result.items():
        count = sum(map(len, f.findings.values()))
        rows.append(f"| {name} | {f.cases} | {f.refused} | {count} | {f.seconds:.0f} | {f.memory / 2**20:.0f} |")
    total = Counter({k: sum(getattr(f, k) for f in result.values()) for k in ("cases", "refused", "seconds")})
    findings = sum(len(x) for f in result.values() for x in f.findings.values())
    rows.append(f"| all | {total['cases']} | {total['refused']} | {findings} | {total['seconds']:.0f} | |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=[*TARGETS], action="append")
    parser.add_argument("--only", type=int, help="number of one case, of one --target")
    args = parser.parse_args()
    sys.dont_write_bytecode = True  # a module that is imported for the first time in a case would write its .pyc
    soft = _status("VmSize") + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="quantkit-fuzz-", dir=fast) as place:
        root = Path(place).resolve() / "root"
        if args.only is not None:
            beds = Beds(root)
            found = Found()
            one(args.target[0], args.only, args.seed, beds, Watch(beds), found, raising=True)
            print(found)
            return
        result = run(args.cases, args.seed, root, args.target)
    print(table(result))
    bad = {name: f.findings for name, f in result.items() if f.findings}
    for name, findings in bad.items():
        for what, numbers in sorted(findings.items(), key=lambda item: -len(item[1])):
            print(f"{name}: {len(numbers)} x {what}; --only {numbers[0]}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
