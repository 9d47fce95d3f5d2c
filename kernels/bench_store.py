"""What was measured, on disk after every case: a run that is killed loses nothing, the next one goes on.

The file is one JSON object: {"schema": 1, "runs": {id: environment}, "cases": {name: record}}. A record has `run`,
`status` ("ok", "red": the result is wrong, "failed": an error, "skipped") and `why`; with "ok" also the times. A case
that was timed before and is timed again, because others are compared with it, is kept as "name @ id": a ratio is only
ever taken between two times of one run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench_gate import Check
from bench_timing import SAME, Environment, Times

SCHEMA = 1


@dataclass
class Record:
    """One case of one run."""

    name: str
    run: str
    status: str
    why: str = ""
    checks: list[Check] = field(default_factory=list)
    times: Times | None = None
    floor_us: float = 0.0
    moved: int = 0
    operations: int = 0
    note: str = ""

    @property
    def us(self) -> float | None:
        return None if self.times is None else self.times.us

    @property
    def gbs(self) -> float:
        return 0.0 if self.times is None else self.moved / self.times.us / 1e3

    @property
    def tflops(self) -> float:
        return 0.0 if self.times is None else self.operations / self.times.us / 1e6

    @property
    def of_floor(self) -> float:
        """1 is as fast as can be."""
        return 0.0 if self.times is None else self.floor_us / self.times.us

    def plain(self) -> dict[str, Any]:
        """As it is written."""
        made = {key: value for key, value in asdict(self).items() if key not in ("name", "times")}
        made["checks"] = [asdict(check) | {"ok": check.ok, "value": repr(check.value)} for check in self.checks]
        if self.times is not None:
            made |= asdict(self.times) | {"gbs": self.gbs, "tflops": self.tflops, "of_floor": self.of_floor}
        return made

    @classmethod
    def read(cls, name: str, found: Mapping[str, Any]) -> Record:
        checks = [Check(c["name"], float(c["value"]), c["limit"]) for c in found["checks"]]
        times = None
        if "us" in found:
            times = Times(*(found[key] for key in ("us", "p10", "p90", "calls", "replays")))
        rest = {key: found[key] for key in ("run", "status", "why", "floor_us", "moved", "operations", "note")}
        return cls(name=name, checks=checks, times=times, **rest)


class Store:
    """The results of all runs in one file. Without a path nothing is written."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.runs: dict[str, dict[str, Any]] = {}
        self._records: dict[str, Record] = {}
        if path is not None and path.exists():
            found = json.loads(path.read_text())
            if found.get("schema") != SCHEMA:
                raise ValueError(f"{path} has schema {found.get('schema')}, this program reads {SCHEMA}")
            self.runs = found["runs"]
            self._records = {key: Record.read(key.split(" @ ")[0], value) for key, value in found["cases"].items()}

    def begin(self, environment: Environment) -> str:
        """Notes a run; its id."""
        run = f"{environment.started} {environment.source[:8]}"
        self.runs[run] = asdict(environment)
        self.write()
        return run

    def note(self, run: str, key: str, value: Any) -> None:
        """One more fact of a run: clocks, ceilings measured in it."""
        self.runs[run][key] = value
        self.write()

    def put(self, record: Record) -> None:
        """Under its name; beside it when a record of another run is still good there, or when it is only a baseline."""
        self._records[self._key(record)] = record
        self.write()

    def _key(self, record: Record) -> str:
        there = self._records.get(record.name)
        if there is None or there.run == record.run:
            return record.name
        old, new = self.runs[there.run], self.runs[record.run]
        kept = there.status == "ok" and all(old.get(name) == new.get(name) for name in SAME)
        return f"{record.name} @ {record.run}" if kept else record.name

    def get(self, name: str) -> Record | None:
        """The record of a case, of whichever run."""
        return self._records.get(name)

    def of_run(self, name: str, run: str) -> Record | None:
        """The record of a case in one run."""
        for record in (self._records.get(name), self._records.get(f"{name} @ {run}")):
            if record is not None and record.run == run:
                return record
        return None

    def records(self) -> list[Record]:
        return list(self._records.values())

    def done(self, name: str, environment: Environment) -> bool:
        """Whether a case was timed by this code on such a machine, so that it need not be again."""
        record = self._records.get(name)
        return record is not None and record.status == "ok" and environment.same(self.runs[record.run])

    def write(self) -> None:
        """All of it, in one step: a reader finds the old file or the new one."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cases = {key: record.plain() for key, record in self._records.items()}
        text = json.dumps({"schema": SCHEMA, "runs": self.runs, "cases": cases}, indent=1)
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(text + "\n")
        os.replace(beside, self.path)
