"""When the GPU's memory runs out: smaller batches, hidden states to the host, experts in more parts; the block again.

A try that ran out of memory has written nothing and has left the hidden states before the block as they were, so the
block is simply begun again with more room. Rows do not influence each other, so what a block computes stays the same
but for the order of float sums. Where `calibration.batch_size` is a power of two, a run that gave something up at its
first block has the bytes of one that began with the smaller batches.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from quantkit.blocks import Batch, cut
from quantkit.errors import MissingError
from quantkit.progress import Progress

Result = TypeVar("Result")
Step = dict[str, Any]


@dataclass
class Fitting:
    """What a run has given up so far to stay within the GPU's memory.

    rows     the most rows of a batch
    to_host  copies hidden states to the host
    passes   into how many parts the inputs of a block's experts are divided, each observed in a pass of its own
    most     the most of them that there can be
    alone    whether this process may do otherwise than others; of several ranks none may
    place    where hidden states wait, "device", "host" or "disk"
    solving  set by the work once it is past its batches: then smaller ones are no help
    steps    what was given up, and where
    """

    rows: int
    to_host: Callable[[torch.Tensor], torch.Tensor]
    progress: Progress
    alone: bool = True
    passes: int = 1
    most: int = 1
    place: str = "device"
    solving: bool = False
    steps: list[Step] = field(default_factory=list)

    def attempt(self, what: str, batches: list[Batch], work: Callable[[], Result]) -> Result:
        """What `work` returns; begun again with more room each time that the GPU's memory does not suffice.

        what     the block, for messages
        batches  changed in place: more and smaller ones, or with hidden states on the host; `work` uses this list
        Raises MissingError when there is nothing left to give up.
        """
        while True:
            self.solving = False
            try:
                return work()
            except torch.OutOfMemoryError as e:
                if not self.alone:
                    raise
                said = (str(e).splitlines() or ["no more is said"])[0]
            # Outside of the handler: the error's traceback holds on to what the work had.
            self._give_up(what, said)
            self.apply(batches)
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def _give_up(self, what: str, said: str) -> None:
        if self.rows > 1 and not self.solving:
            self.rows //= 2
            changed = f"batches of {self.rows} rows"
        elif self.place == "device":
            self.place = "host"
            changed = "hidden states on the host"
        elif self.passes < self.most:
            self.passes = min(2 * self.passes, self.most)
            changed = f"the experts' statistics in {self.passes} passes"
        else:
            raise MissingError(
                f"{what}: does not fit into the GPU's memory, not with batches of {self.rows} rows and hidden states "
                f"on the {self.place} either ({said}); take a GPU with more memory, a smaller calibration.length, or "
                "--device cpu"
            )
        step: Step = {"at": what, "batch_size": self.rows, "hidden": self.place}
        self.steps.append(step | ({"passes": self.passes} if self.passes > 1 else {}))
        self.progress.warn(f"{what}: the GPU's memory ran out ({said}); again with {changed}")

    def apply(self, batches: list[Batch]) -> None:
        """Brings batches to what was settled: cut where they have too many rows, on the host if they are to be."""
        batches[:] = [part for batch in batches for part in cut(batch, self.rows)]
        for batch in batches if self.place == "host" else ():
            for name in ("hidden", "dense", "onward"):
                x = getattr(batch, name)
                if x is not None and x.device.type != "cpu":
                    setattr(batch, name, self.to_host(x))

    def again(self, steps: Sequence[Step], batches: list[Batch]) -> None:
        """Cuts batches as an earlier run did, step by step, whose hidden states are to take their place."""
        for step in steps:
            self.rows = int(step["batch_size"])
            self.passes = max(self.passes, min(int(step.get("passes", 1)), self.most))
            self.apply(batches)

    def take(self) -> list[Step]:
        """The steps since the last call."""
        steps, self.steps = self.steps, []
        return steps
