"""What a run has finished, on disk: an append-only file of records, from which the same command goes on.

Each record is one line, `CRC JSON`: a CRC-32 over the JSON and the CRC of the line before, and the record itself. It is
appended with one write and an fsync, after everything that it speaks of is durable; so at any moment the file says
nothing that is not true. What a kill or a full disk can leave is a torn last line, which is dropped. A line that is
damaged with others after it is no trace of a kill: it is refused.

    begin      what decides the bytes of the run (`identity`): another run is refused, with the differences
    pass       everything before it is of an earlier try and no longer counts
    others     as the run likes; `current` has those of this pass
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import InputError

FORMAT = 1
SHOWN = 4  # differences that a message names


class Journal:
    """The records of the file `file`, which is made when it is missing. One process at a time: the caller has a lock.

    file      in a folder that exists
    identity  plain JSON values, the same for every run that may go on from here
    Raises InputError when the file is damaged, or was begun with another identity.
    """

    def __init__(self, file: Path, identity: Mapping[str, Any]) -> None:
        self.file = file
        self.records, self._crc, end = _read(file)
        self._handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.ftruncate(self._handle, end)
            os.lseek(self._handle, end, os.SEEK_SET)
            if self.records:
                self._check(identity)
            else:
                self.append("begin", format=FORMAT, identity=dict(identity))
                sync(file.parent)
        except BaseException:
            self.close()
            raise

    def append(self, kind: str, **content: Any) -> None:
        """Makes one record durable. What it speaks of must be so already."""
        record = {"kind": kind, **content}
        line, self._crc = _line(record, self._crc)
        while line:
            line = line[os.write(self._handle, line) :]
        os.fsync(self._handle)
        self.records.append(json.loads(json.dumps(record)))  # as it will be read

    def current(self, kind: str) -> list[dict[str, Any]]:
        """The records of a kind since the last pass began."""
        passes = [i for i, record in enumerate(self.records) if record["kind"] == "pass"]
        since = passes[-1] if passes else 0
        return [record for record in self.records[since:] if record["kind"] == kind]

    def last(self, kind: str) -> dict[str, Any] | None:
        """The last record of a kind, of whichever pass."""
        return next((record for record in reversed(self.records) if record["kind"] == kind), None)

    def close(self) -> None:
        """No more records. What is there stays."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def _check(self, identity: Mapping[str, Any]) -> None:
        begin = self.records[0]
        if begin["kind"] != "begin" or begin.get("format") != FORMAT:
            raise InputError(f"{self.file}: not a journal that this version reads; --fresh starts over")
        if changes := differences(begin["identity"], json.loads(json.dumps(identity))):
            more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
            raise InputError(
                f"{self.file.parent}: an unfinished run there began otherwise: {'; '.join(changes[:SHOWN])}{more}; "
                "to go on, begin with the same again; to give it up and start over, add --fresh"
            )


def exists(file: Path) -> bool:
    """Whether there is a journal with anything in it. It may be damaged."""
    return file.is_file() and file.stat().st_size > 0


def differences(then: Any, now: Any, place: str = "") -> list[str]:
    """Where two JSON values differ: ["recipe.calibration.samples is 64, was 128"]."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [*then, *(key for key in now if key not in then)]
        parts = [
            differences(then.get(key), now.get(key), f"{place}.{key}" if place else str(key))
            for key in keys
            if then.get(key) != now.get(key)
        ]
        return [line for part in parts for line in part]
    return [] if then == now else [f"{place} is {_short(now)}, was {_short(then)}"]


def sync(path: Path) -> None:
    """Makes a file's bytes durable, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."


def _line(record: Mapping[str, Any], before: int) -> tuple[bytes, int]:
    """A record's line, and its CRC."""
    text = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()
    crc = zlib.crc32(text, before)
    return b"%08x %s\n" % (crc, text), crc


def _read(file: Path) -> tuple[list[dict[str, Any]], int, int]:
    """The records, the CRC of the last, and how many bytes of the file they are: what follows is a torn last line."""
    data = file.read_bytes() if file.exists() else b""
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    records: list[dict[str, Any]] = []
    crc, end = 0, 0
    for number, line in enumerate(lines, 1):
        text = line[9:]
        found = zlib.crc32(text, crc)
        if line[:9] != b"%08x " % found or end + len(line) == len(data):
            if number < len(lines):
                raise InputError(
                    f"{file}: line {number} of {len(lines)} is damaged, so what the run has finished is not known; "
                    "restore the file, or start over with --fresh"
                )
            break
        crc, end = found, end + len(line) + 1
        records.append(json.loads(text))
    return records, crc, end
