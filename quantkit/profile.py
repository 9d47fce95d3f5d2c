"""Where the time of a run goes: seconds by the name of what was done, added up over all blocks.

Parts may lie in one another: the seconds of the inner one are its own, so that all parts together are the whole. On a
GPU a kernel runs on while Python is elsewhere, and its time is then that of whoever waits for it; a profile that is
exact waits at the end of each part.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Profile:
    """`with profile("observe"): ...` adds the seconds that it took to `seconds["observe"]`."""

    def __init__(self, device: torch.device, exact: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self.exact = exact
        self._device = device
        self._inner = 0.0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Times what is done inside, under the name `part`."""
        outer, self._inner = self._inner, 0.0
        self._wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            took = time.perf_counter() - start
            self.seconds[part] = self.seconds.get(part, 0.0) + took - self._inner
            self._inner = outer + took

    def _wait(self) -> None:
        if self.exact and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def lines(self) -> list[str]:
        """One line a part, the longest first: seconds and share of all parts together."""
        total = sum(self.seconds.values())
        ordered = sorted(self.seconds.items(), key=lambda item: -item[1])
        return [f"{seconds:8.2f} s {seconds / total:6.1%}  {part}" for part, seconds in ordered if total]
