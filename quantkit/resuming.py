"""What of a run is finished: noted in its journal block by block, and found there again by the run that goes on.

A block is finished in this order, each step durable before the next: its tensors in the shards, the hidden states
before the next block, the journal's record, which has the checksums of both and what quantkit.json says of the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantkit import hidden, output
from quantkit.blocks import Batch
from quantkit.errors import InputError
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
                f"{folder}: keeps what is finished, {len(journal.current('block'))} blocks; the same command goes on "
                "from there, with --fresh it starts over, and removing the folder gives it up"
            )
        else:
            output.empty(folder)
        raise
    finally:
        journal.close()


class Finished:
    """What is finished of the pass that a journal is at. Without a journal nothing is kept on disk.

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
        self.blocks, self._durable = ranks.told((len(self._records), journal is not None))
        self._begun = self.blocks

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
        """The next block was written: makes it durable.

        batches  with the hidden states after it; none where the block after it needs none
        names    of its tensors on disk; None: all that were written since the block before it
        """
        self.report.add(report)
        index, self.blocks = self.blocks, self.blocks + 1
        if not self._durable:
            return
        tensors = writer.sync(names)
        states = hidden.save(self._folder, index + 1, batches, self._ranks, self._device) if batches else {}
        if self._journal is None:
            return
        self._journal.append("block", index=index, tensors=tensors, hidden=states, report=asdict(report))
        hidden.drop(self._folder, before=index)

    def load(self, batches: Sequence[Batch]) -> None:
        """Takes batches that are at the first block to the first that is not finished."""
        if self._begun:
            sums = self._records[-1]["hidden"] if self._records else {}
            hidden.load(self._folder, self._begun, sums, batches, self._ranks, self._device)

    @property
    def _folder(self) -> Path:
        """Of hidden states; what it is matters on rank 0 alone."""
        return self._journal.file.parent / HIDDEN if self._journal else Path()
