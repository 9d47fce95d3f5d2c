"""How ranks learn that one of them is gone: by the reason that it leaves behind, or by its silence.

Every rank has a thread that says once a second that it is alive, in a store that all can reach, and looks there for a
reason to end. A rank that fails writes its reason and its exit code; the others end within a few seconds, whatever
they wait for. One that is killed or loses its machine writes nothing: those it talks to find the connection broken at
once, its launcher tells the others on that machine to end (SIGTERM), the rest note the silence.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from quantkit.errors import MissingError

EVERY = 1.0  # seconds between two beats
SILENCE = 60.0  # seconds without a beat after which a rank is dead; a machine that swaps can be slow
INTERRUPTED = 130  # exit code
LOST = "a rank ended without a word (killed, or its machine is gone)"
AGAIN = "the same command goes on, on as many ranks as there are"
STOPPED = f"told to end (SIGTERM): {LOST}, or the run was stopped; {AGAIN}"


class Heartbeat:
    """Of one rank. A context: the thread runs for as long as it lasts.

    store  a torch.distributed store of this run alone
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank = store, rank
        self._over = threading.Event()
        # Rank 0 watches all, the others watch it.
        self._seen = {r: (b"", time.monotonic()) for r in (range(1, size) if rank == 0 else (0,))}
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._ending = contextlib.ExitStack()
        self._signals: int | None = None

    def __enter__(self) -> Heartbeat:
        if threading.current_thread() is threading.main_thread():
            self._signals = self._ending.enter_context(_noted(signal.SIGTERM))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=5)
        self._ending.close()

    def report(self, code: int, message: str) -> bool:
        """Leaves the reason for which this rank ends. Returns whether it is for this rank to tell it to the user.

        The same sentence is told once: by rank 0 where rank 0 has it too, which the others give a second's time.
        """
        if self._rank:
            time.sleep(EVERY)
        first = self._claim(message)
        try:
            self._store.compare_set("reason", "", json.dumps({"rank": self._rank, "code": code, "message": message}))
        except (RuntimeError, OSError):
            return True
        return first

    def _claim(self, message: str) -> bool:
        """Whether this rank is the first to have this sentence to say."""
        key = hashlib.sha256(message.encode()).hexdigest()
        try:
            return int(self._store.add(f"told/{key}", 1)) == 1
        except (RuntimeError, OSError):
            return True

    def lost(self, why: str) -> NoReturn:
        """A connection to another rank broke: ends as that rank did, or says that it is gone."""
        if (reason := self._reason()) is not None:
            raise SystemExit(int(reason["code"]))
        # Said here and now: the launcher is about to end this process too.
        if self._claim(LOST):
            _say(f"{LOST}; {AGAIN} ({why})")
        time.sleep(2 * EVERY)  # a launcher shows who ended first: that is to be the one that is gone
        raise SystemExit(MissingError.exit_code)

    def _reason(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] | None = json.loads(self._store.get("reason")) if self._has("reason") else None
        except (RuntimeError, OSError):
            return None
        return found

    def _has(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def _run(self) -> None:
        beat, silent = 0, list[int]()
        while not self._over.wait(EVERY / 10):
            try:
                beat += 1
                if beat % 10 == 1:
                    self._store.set(f"beat/{self._rank}", str(beat))
                    silent = [rank for rank in self._seen if self._is_silent(rank)]
            except (RuntimeError, OSError):
                self._end(MissingError.exit_code, "the launcher is gone, and with it the other ranks")
            if (reason := self._reason()) is not None:
                time.sleep(2 * EVERY)  # a launcher ends all with the first: it is to be the one that has the reason
                self._end(int(reason["code"]), None)
            if self._signals is not None and signal.SIGTERM in _read(self._signals):
                self._end(INTERRUPTED, STOPPED if self._claim(LOST) else None)
            if silent:
                said = f"rank {silent[0]} has not been heard of for {SILENCE:.0f} s; {AGAIN}"
                self._end(MissingError.exit_code, said if self.report(MissingError.exit_code, said) else None)

    def _is_silent(self, rank: int) -> bool:
        key = f"beat/{rank}"
        beat = self._store.get(key) if self._has(key) else b""
        before, since = self._seen[rank]
        if beat != before:
            self._seen[rank] = (beat, time.monotonic())
            return False
        return time.monotonic() - since > SILENCE

    def _end(self, code: int, message: str | None) -> None:
        """Ends the process, which may hang in a collective: only this thread can."""
        if self._over.is_set():
            return
        if message is not None:
            _say(message)
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def _noted(number: signal.Signals) -> Iterator[int]:
    """A file from which a signal can be read by any thread, at once, whatever the main thread waits for."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    handler, file = signal.signal(number, lambda *_: None), signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield read
    finally:
        signal.set_wakeup_fd(file)
        signal.signal(number, handler)
        os.close(read)
        os.close(write)


def _read(file: int) -> bytes:
    try:
        return os.read(file, 64)
    except BlockingIOError:
        return b""


def _say(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
