"""What a long run says while it works, on stderr: block k of n, what it is doing, time left, peak memory so far.

    progress = Progress.for_terminal()
    with progress:
        progress.begin(32, "block")
        for k, name in enumerate(blocks, 1):
            progress.item(k, name)
            progress.doing("observe")
        progress.end()

`Progress` itself prints plain lines, one an item, for logs and pipes; `Live` keeps one moving line on a terminal;
`Silent` prints nothing. All of them keep their warnings.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from quantkit.errors import Interrupted

if TYPE_CHECKING:
    from rich.live import Live as RichLive
    from rich.text import Text


class Progress:
    """Plain lines. `stream` is stderr unless told otherwise; `clock` gives seconds."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.warnings: list[str] = []
        self._stream = stream
        self._clock = clock
        self._total = 0
        self._what = ""
        self._k = self._before = 0
        self._stopping = False
        self._name = ""
        self._doing = ""
        self._start = self._item_start = clock()

    @staticmethod
    def for_terminal() -> Progress:
        """A live line when stderr is a terminal that can move its cursor, plain lines otherwise."""
        from rich.console import Console

        console = Console(stderr=True)
        return Live() if console.is_terminal and not console.is_dumb_terminal else Progress()

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping

    def stop(self) -> None:
        """Ends the work after the item that it is at; may be called by a signal handler or another thread."""
        self._stopping = True

    def say(self, line: str) -> None:
        """One line that stays on the screen."""
        self._print(line)

    def warn(self, line: str) -> None:
        """One warning, kept in `warnings` and printed."""
        self.warnings.append(line)
        self._print(f"warning: {line}")

    def begin(self, total: int, what: str, *, done: int = 0) -> None:
        """Starts a stage of `total` items, such as (32, "block"); it ends a stage that is still open.

        done  how many of the items an earlier run has finished
        """
        self.end()
        self._total, self._what, self._k, self._name, self._doing = total, what, done, "", ""
        self._before = done
        self._start = self._clock()
        self._began()

    def item(self, k: int, name: str) -> None:
        """Item `k` of the total, counted from 1, starts now. Raises Interrupted when `stop` was called."""
        if self._stopping:
            at = f"after {self._what} {self._k} of {self._total}" if self._k else f"before the first {self._what}"
            raise Interrupted(f"interrupted {at}; run the same command again")
        self._k, self._name, self._doing = k, name, ""
        self._item_start = self._clock()
        self._moved()

    def doing(self, what: str) -> None:
        """What is done within the item, such as "observe". Plain lines leave it out."""
        self._doing = what
        self._changed()

    def end(self) -> None:
        """The stage is over. May be called twice, and after an error."""
        if self._what:
            self._ended()
        self._what = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._closed()
            self._what = ""  # nothing was finished, so nothing says so
        self.end()

    def status(self) -> str:
        """The line itself: "block 3/32 model.layers.2 · observe · 4 min 10 s left · peak 1.25 GiB"."""
        parts = [f"{self._what} {self._k}/{self._total} {self._name}".rstrip()]
        if self._doing:
            parts.append(self._doing)
        done = self._k - 1
        if done > self._before:
            mean = (self._item_start - self._start) / (done - self._before)
            left = mean * (self._total - done) - (self._clock() - self._item_start)
            parts.append(f"{duration(left)} left")
        return " · ".join([*parts, *peak_memory()])

    # What a subclass shows when something happens.

    def _print(self, line: str) -> None:
        print(line, file=self._stream or sys.stderr, flush=True)

    def _began(self) -> None:
        pass

    def _moved(self) -> None:
        self._print(self.status())

    def _changed(self) -> None:
        pass

    def _ended(self) -> None:
        self._print(f"{self._what} {self._total}/{self._total}: done in {duration(self._clock() - self._start)}")

    def _closed(self) -> None:
        pass


class Live(Progress):
    """One line that moves, on a terminal; what `say` and `warn` print scrolls above it."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream, clock)
        from rich.console import Console

        self._console = Console(file=stream, stderr=stream is None, highlight=False)
        self._live: RichLive | None = None

    def _line(self) -> Text:
        from rich.text import Text

        return Text(self.status(), no_wrap=True, overflow="ellipsis")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)

    def _began(self) -> None:
        from rich.live import Live as RichLive

        self._live = RichLive(get_renderable=self._line, console=self._console, refresh_per_second=4, transient=True)
        self._live.start()

    def _moved(self) -> None:
        pass  # the live line is drawn anew four times a second

    def _ended(self) -> None:
        self._closed()
        super()._ended()

    def _closed(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class Silent(Progress):
    """Prints nothing; keeps its warnings."""

    def _print(self, line: str) -> None:
        pass


def duration(seconds: float) -> str:
    """Seconds for a reader: "8 s", "3 min 20 s", "2 h 5 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole < 600 else f"{round(whole / 60)} min"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def peak_memory() -> list[str]:
    """The most memory that this process has used so far: ["peak 1.25 GiB", "GPU 3.10 GiB"].

    Resident memory, where the system reports it; the GPU only when torch has already started it.
    """
    found = []
    try:
        import resource
    except ImportError:  # not a Unix system
        pass
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        found.append(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB")
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
        found.append(f"GPU {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    return found
