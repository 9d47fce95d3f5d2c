"""Where the time of a run goes: seconds by the name of what was done, added up over all blocks.

On a GPU a kernel runs on while Python is elsewhere, so a profile that is on waits for it at the end of each part;
one that is off costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Profile:
    """`with profile("observe"): ...` adds the seconds that it took to `seconds["observe"]`."""

    def __init__(self, device: torch.device, on: bool = True) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._on = on

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Times what is done inside, under the name `part`."""
        if not self._on:
            yield
            return
        self._wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def lines(self) -> list[str]:
        """One line a part, the longest first: seconds and share of all parts together."""
        total = sum(self.seconds.values())
        ordered = sorted(self.seconds.items(), key=lambda item: -item[1])
        return [f"{seconds:8.2f} s {seconds / total:6.1%}  {part}" for part, seconds in ordered if total]
