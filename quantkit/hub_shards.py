"""A Hub model's shards as a run needs them: fetched when they are read, one ahead of that, deleted afterwards if asked.

One thread fetches, so that the next shard travels while a block is computed. `step` says what is read now and what
after that; without it a shard is fetched when it is asked for, and the last two that were stay. With deletion there are
two shards at once, more only where a block lies in more: then none is fetched ahead.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

from quantkit.hub_files import HubFiles
from quantkit.progress import Progress


class HubShards:
    """The safetensors files of a model on the Hub.

    delete  what this run fetched is deleted when neither the present step nor the next needs it; what was in the cache
            before stays
    """

    def __init__(self, files: HubFiles, progress: Progress, *, delete: bool = False) -> None:
        self.files, self.delete = files, delete
        self.names = sorted(path for path in files.known if path.endswith(".safetensors") and "/" not in path)
        self._progress = progress
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._queue: SimpleQueue[tuple[str, Future[Path]]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._headers: dict[str, bytes] = {}
        self._fetching: dict[str, Future[Path]] = {}
        self._ours: set[str] = set()
        self._keep: set[str] = set()
        self._readers: Counter[str] = Counter()
        self._last: str | None = None

    def size(self, name: str) -> int:
        """Bytes of a shard; 0 when neither the Hub nor the cache says."""
        known = self.files.known[name].size
        here = self.files.here(name)
        return known if known is not None else here.stat().st_size if here else 0

    def headers(self, names: Collection[str]) -> Mapping[str, bytes]:
        """The header of each shard, its 8 bytes of length included. No weights travel, and no header twice."""
        asked = [name for name in names if name not in self._headers]
        with ThreadPoolExecutor(max_workers=8) as pool:
            self._headers.update(zip(asked, pool.map(self.files.header, asked), strict=True))
        return self._headers

    def file(self, name: str) -> Path:
        """A shard, fetched when it is not there; waits for it. Raises what its download raised, as HubFiles.fetch."""
        with self._lock:
            if name not in self._keep:
                self._keep = {x for x in (self._last, name) if x is not None}
                self._drop()
            self._last = name
            if (here := self.files.here(name)) is not None:
                return here
            future = self._start(name)
        try:
            return future.result()
        except BaseException:
            with self._lock:  # a later read tries again
                self._fetching.pop(name, None)
            raise

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """A shard, as `file`, that is not deleted as long as this lasts."""
        with self._lock:
            self._readers[name] += 1
        try:
            yield self.file(name)
        finally:
            with self._lock:
                self._readers[name] -= 1

    def step(self, now: Collection[str], later: Iterable[str]) -> None:
        """These shards are read now, those later, in this order: fetches the former and the first of the latter."""
        self._want(_there(now, later, self.delete))

    def fetch_all(self, names: Collection[str]) -> None:
        """Sees to it that all of these are in the cache at once."""
        self._want(names)
        for name in names:
            self.file(name)

    def close(self) -> None:
        """Ends what is being fetched; with `delete`, removes what was."""
        self._stop.set()
        for future in list(self._fetching.values()):
            if not future.cancel():
                future.exception()  # waits until it has noticed
        with self._lock:
            self._keep = set()
            self._drop()

    def missing(self, names: Iterable[str]) -> int:
        """Bytes of these shards that are not in the cache."""
        return sum(self.size(name) for name in names if self.files.here(name) is None)

    def most(self, steps: Sequence[Collection[str]]) -> int:
        """Bytes that a run of these steps has in the cache at once with `delete`, beside what is there already."""
        later = ([name for step in steps[i + 1 :] for name in step] for i in range(len(steps)))
        return max(self.missing(_there(now, after, True)) for now, after in zip(steps, later, strict=True))

    def _want(self, names: Collection[str]) -> None:
        with self._lock:
            self._keep = set(names)
            self._drop()
            for name in names:
                if self.files.here(name) is None and self.files.online:
                    self._start(name)

    def _start(self, name: str) -> Future[Path]:
        if name not in self._fetching:
            self._fetching[name] = Future()
            self._queue.put((name, self._fetching[name]))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)  # no run waits for it to end
                self._thread.start()
        return self._fetching[name]

    def _work(self) -> None:
        while True:
            name, future = self._queue.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                self._progress.say(f"fetching {name}, {self.size(name):,} bytes")
                found = self.files.fetch(name, self._stop)
                with self._lock:
                    self._ours.add(name)
                    self._fetching.pop(name, None)
                future.set_result(found)
            except BaseException as e:
                future.set_exception(e)

    def _drop(self) -> None:
        gone = {name for name in self._ours - self._keep if not self._readers[name]} if self.delete else set()
        if gone:
            self.files.delete(gone)
            self._ours -= gone


def _there(now: Collection[str], later: Iterable[str], delete: bool) -> list[str]:
    """What is to be in the cache: what is read, and one shard more; where they are deleted, up to two in all."""
    ahead = next((name for name in later if name not in now), None)
    return [*now, ahead] if ahead and (len(now) < 2 or not delete) else [*now]
