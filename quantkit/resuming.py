"""What of a run is finished: noted in its journal block by block, and found there again by the run that goes on.

A block is finished in this order, each step durable before the next: its tensors in the shards, the hidden states
before the next block, the journal's record, which has the checksums of both and what quantkit.json says of the block.
Where the hidden states are large, a thread does so while the next block is computed. Blocks that are done before the
thread is wait for it, in memory, and are then finished together by one record, with the hidden states after the last
of them. So a run that is killed does these again; one that ends in any other way makes them durable first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from quantkit import hidden, output
from quantkit.background import Background
from quantkit.blocks import Batch
from quantkit.errors import InputError, Interrupted
from quantkit.journal import Journal, exists
from quantkit.progress import Progress
from quantkit.ranks import ALONE, Ranks
from quantkit.shards import ShardWriter

HIDDEN = "hidden"  # the folder beside the journal


@dataclass
class Report:
    """What quantkit.json says of some of the blocks, and what was warned of on the way: plain JSON values."""

    layers: list[dict[str, Any]] = field(default_factory=list)
    folds: list[dict[str, Any]] = field(default_factory=list)
    experts: dict[str, int] = field(default_factory=dict)
    kv_scales: dict[str, list[float]] = field(default_factory=lambda: {"k_scale": [], "v_scale": []})
    warnings: list[str] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Appends that of later blocks."""
        self.layers += other.layers
        self.folds += other.folds
        self.experts |= other.experts
        self.warnings += other.warnings
        self.memory += other.memory
        for side, found in other.kv_scales.items():
            self.kv_scales[side] += found


@dataclass(frozen=True)
class Waiting:
    """Blocks that are done and not durable; replaced as a whole, so that an interrupt finds it as it was or will be.

    tensors  checksums of what they wrote; report: what quantkit.json says of them
    blocks   how many are done with the last of them, from the first on
    batches  with the hidden states after it; None once these are gone. number: of batches
    """

    writer: ShardWriter
    tensors: dict[str, int]
    report: Report
    blocks: int
    batches: Sequence[Batch] | None
    number: int

    @property
    def there(self) -> bool:
        """Whether the hidden states can be saved still. Batches that were cut since are not those of the report."""
        return self.batches is not None and len(self.batches) == self.number


def count(journal: Journal) -> int:
    """How many blocks of the pass that a journal is at are finished, from the first on."""
    records = journal.current("block")
    return records[-1]["index"] + 1 if records else 0


@contextmanager
def journaled(
    folder: Path, identity: Mapping[str, Any], *, fresh: bool, progress: Progress
) -> Iterator[tuple[Path, Journal]]:
    """The folder to write the output in, and the journal of a run that has the lock of `folder`.

    identity  what decides the bytes of the run; plain JSON values
    fresh     give up what an earlier run has finished
    When the body does not end well, what is finished is kept, and said; nothing is, when nothing is finished.
    Raises InputError when what is there is another run's, or damaged.
    """
    if fresh or not exists(folder / output.JOURNAL):
        output.empty(folder)
    journal = Journal(folder / output.JOURNAL, identity)
    try:
        (folder / output.OUTPUT).mkdir(exist_ok=True)
        yield folder / output.OUTPUT, journal
    except BaseException:
        if any(record["kind"] in ("allocation", "pass", "block") for record in journal.records):
            progress.say(
                f"{folder}: keeps what is finished, {count(journal)} blocks; the same command goes on "
                "from there, with --fresh it starts over, and removing the folder gives it up"
            )
        else:
            output.empty(folder)
        raise
    finally:
        journal.close()


class Finished:
    """What is finished of the pass that a journal is at. Without a journal nothing is kept on disk.

    A context manager: at its end, whatever the reason, what is done is durable as far as its hidden states are there.

    ranks, device  who else works on it, and where; rank 0 alone has a journal, all call `block` and `load`
    blocks         how many are finished, from the first on; report: of them
    """

    def __init__(self, journal: Journal | None, ranks: Ranks = ALONE, device: torch.device | str = "cpu") -> None:
        self.report = Report()
        self._journal, self._ranks, self._device = journal, ranks, device
        self._records = journal.current("block") if journal else []
        self._outside = journal.current("outside") if journal else []
        for record in self._records:
            self.report.add(Report(**record["report"]))
        self.blocks, self._durable = ranks.told((count(journal) if journal else 0, journal is not None))
        self._begun = self._named = self.blocks
        self._waiting: Waiting | None = None
        self._background, self._room = Background(), list[Batch]()

    def __enter__(self) -> Finished:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._background.wait()
            if self._waiting is not None and self._waiting.there:
                self._save(self._waiting, self._waiting.batches or ())
        except Exception:
            if kind is None or issubclass(kind, Interrupted):
                raise
            # Otherwise the first error is told; what is not durable is not in the journal.
        finally:
            self._background.close()

    def told(self, total: int) -> str:
        """Where a run of `total` blocks goes on."""
        left = self.blocks < total
        return (
            f"continuing at block {self.blocks + 1} of {total}" if left else f"all {total} blocks are finished already"
        )

    @property
    def written(self) -> dict[str, int] | None:
        """Checksums of all tensors that are durable, by name; None when the output is to be made new."""
        if not self._outside:
            return None
        return {name: crc for record in (*self._outside, *self._records) for name, crc in record["tensors"].items()}

    def same_data(self, sha256: str | None) -> None:
        """Notes the hash of the calibration rows, or compares it. Raises InputError when it is another."""
        if self._journal is None:
            return
        noted = self._journal.current("data")
        if not noted:
            self._journal.append("data", sha256=sha256)
        elif noted[0]["sha256"] != sha256:
            raise InputError(
                f"the calibration data are not those with which the run began (sha256 {sha256}, then "
                f"{noted[0]['sha256']}); give the same again to go on, or start over with --fresh"
            )

    def outside(self, writer: ShardWriter, names: Iterable[str] | None = None) -> None:
        """What is in no block was written. names: as for `block`."""
        if self._journal is not None:
            self._journal.append("outside", tensors=writer.sync(names))

    def block(
        self, writer: ShardWriter, report: Report, batches: Sequence[Batch] = (), names: Iterable[str] | None = None
    ) -> None:
        """The next block was written: makes it durable, or has a thread do so.

        batches  with the hidden states after it; none where the block after it needs none
        names    of its tensors on disk; None: all that were written since the block before it
        Raises what the thread met since the last call.
        """
        self.report.add(report)
        self.blocks += 1
        if not self._durable:
            return
        if batches:
            hidden.settle(self._device)
        before = self._waiting
        tensors, told = writer.take(names), Report()
        if before is not None:
            tensors = before.tensors | tensors
            told.add(before.report)
        told.add(report)
        done = Waiting(writer, tensors, told, self.blocks, batches, len(batches))
        large = bool(batches) and self._ranks.alone and hidden.size(batches) >= hidden.LARGE
        if large and not any(hidden.on_disk(b.hidden) for b in batches):  # a copy of those has no room in memory
            self._waiting = done
            self._begin()
        else:
            self._background.wait()
            self._waiting = None
            self._save(done, batches)

    def leave(self) -> None:
        """The hidden states after the last block that is done are about to become those after the next."""
        self._begin()
        if self._waiting is not None:
            self._waiting = replace(self._waiting, batches=None)

    def _begin(self) -> None:
        """Has the thread make what waits durable, unless it is at earlier blocks still."""
        if self._background.busy:
            return
        self._background.wait()
        waiting = self._waiting
        if waiting is None or not waiting.there:
            return
        copy = hidden.snapshot(waiting.batches or (), self._device, self._room)
        self._room = [] if torch.device(self._device).type == "cpu" else copy
        self._waiting = None
        self._background.start(lambda: self._save(waiting, copy))

    def _save(self, done: Waiting, batches: Sequence[Batch]) -> None:
        """Makes blocks durable, each step before the next. batches: with the hidden states after them."""
        done.writer.flush(done.tensors)
        states = hidden.save(self._folder, done.blocks, batches, self._ranks, self._device) if batches else {}
        if self._journal is None:
            return
        content = {"tensors": done.tensors, "hidden": states, "report": asdict(done.report)}
        self._journal.append("block", index=done.blocks - 1, **content)
        hidden.drop(self._folder, before=self._named)
        self._named = done.blocks

    def load(self, batches: Sequence[Batch]) -> None:
        """Takes batches that are at the first block to the first that is not finished."""
        if self._begun:
            sums = self._records[-1]["hidden"] if self._records else {}
            hidden.load(self._folder, self._begun, sums, batches, self._ranks, self._device)

    @property
    def _folder(self) -> Path:
        """Of hidden states; what it is matters on rank 0 alone."""
        return self._journal.file.parent / HIDDEN if self._journal else Path()
