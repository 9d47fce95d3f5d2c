"""Work in a thread of its own, one piece at a time, so that the caller need not wait for a disk."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Background:
    """At most one piece of work under way. What it raises is raised by `wait` and `start`, each time, from then on."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._work: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a piece is under way."""
        return self._work is not None and not self._work.done()

    def start(self, work: Callable[[], None]) -> None:
        """Begins a piece, after the one before it."""
        self.wait()
        self._pool = self._pool or ThreadPoolExecutor(1, "quantkit-durable")
        self._work = self._pool.submit(work)

    def wait(self) -> None:
        """Returns when nothing is under way; Ctrl-C is raised then: files must not be closed under the thread."""
        interrupt: KeyboardInterrupt | None = None
        while self._work is not None and not self._work.done():
            try:
                wait([self._work])
            except KeyboardInterrupt as e:
                interrupt = e
        if interrupt is not None:
            raise interrupt
        if self._work is not None:
            self._work.result()

    def close(self) -> None:
        """Ends the thread, which has nothing to do any more."""
        if self._pool is not None:
            self._pool.shutdown()
        self._pool = None
