"""Shards on their way to the Hub while the next block is quantized.

A shard goes up as an object that no branch names; the one commit of hub_push.py names it later, or never. What does not
go through here is told, and sent by the push at the end, which asks the Hub what it lacks.
"""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from quantkit.hub_commit import Place
from quantkit.progress import Progress


class Ahead:
    """Sends each file that it is told of, one after the other, in a thread of its own.

    with Ahead(place, progress) as ahead:
        api.quantize(..., shards=ahead)
    """

    def __init__(self, place: Place, progress: Progress) -> None:
        self.sent: list[str] = []
        self._place = place
        self._progress = progress
        self._files: queue.Queue[tuple[int, Path] | None] = queue.Queue()
        self._round = 0  # files of an earlier one are not wanted any more
        self._bars = False

    def __enter__(self) -> Ahead:
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

        self._bars = not are_progress_bars_disabled()
        disable_progress_bars()  # the client's would cross the run's own
        threading.Thread(target=self._work, name="quantkit-ahead", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        from huggingface_hub.utils import enable_progress_bars

        self.dropped()
        self._files.put(None)
        if self._bars:
            enable_progress_bars()

    def finished(self, file: Path) -> None:
        """The file is whole and stays as it is until `wait` or `dropped`."""
        self._files.put((self._round, file))

    def dropped(self) -> None:
        """The files so far go away. What is on its way is not waited for, and nothing is said of it any more."""
        self._round += 1

    def wait(self) -> None:
        """Until everything is sent or has failed; after it the files may move."""
        if self._files.unfinished_tasks:
            self._progress.say(f"{self._place.repo}: waiting for the shards that are on their way")
        self._files.join()

    def _work(self) -> None:
        while (item := self._files.get()) is not None:
            if item[0] == self._round:
                self._send(*item)
            self._files.task_done()

    def _send(self, turn: int, file: Path) -> None:
        from huggingface_hub import CommitOperationAdd

        where = self._place
        try:
            size = file.stat().st_size
            what, send = f"send {file.name} ahead", where.api.preupload_lfs_files
            addition: Any = [CommitOperationAdd(file.name, file)]
            where.calls(
                what, send, where.repo, addition, once=True, revision=where.sends_to, create_pr=where.pull_request
            )
        except Exception as e:  # whatever it is: the push at the end meets it again, and tells it
            if turn == self._round:
                self._progress.warn(where.calls.clean(f"{e}; {file.name} is sent at the end"))
            return
        if turn == self._round:
            self.sent.append(file.name)
            self._progress.say(f"{file.name}: sent ahead, {size:,} bytes")
