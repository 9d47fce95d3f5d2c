"""Large hidden states are made durable by a thread while the next block is computed: nothing that a user sees changes.

Here every hidden state is large. The thread is held at its first step until the run is as far as a test wants it.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from interrupted import Saying, Stopping, content, recipe

import quantkit
from quantkit import hidden, output, pipeline, resuming
from quantkit.blocks import Batch
from quantkit.errors import Interrupted, MissingError
from quantkit.journal import _read

BLOCKS = 4
STEPS = ("write", "pwrite", "fsync", "posix_fallocate", "rename")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("background") / "model", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def whole(model: Path) -> dict[str, bytes]:
    """What a run writes that makes each block durable before the next."""
    return content(quantkit.quantize(recipe(model), out=model.parent / "whole", device="cpu").out)


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden, "LARGE", 0)


def quantize(model: Path, out: Path, **more: Any) -> dict[str, bytes]:
    return content(quantkit.quantize(recipe(model), out=out, device="cpu", **more).out)


def in_thread(patch: pytest.MonkeyPatch, see: Callable[[str, Callable[[], None]], None]) -> None:
    """Calls `see(name, half)` before each step of the thread; `half` does a write by half."""
    for name in STEPS:
        real = getattr(os, name)

        def call(*args: Any, name: str = name, real: Any = real) -> Any:
            def half() -> None:
                if name in ("write", "pwrite"):
                    real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])

            if threading.current_thread().name.startswith("quantkit-durable"):
                see(name, half)
            return real(*args)

        patch.setattr(os, name, call)


def after_block(patch: pytest.MonkeyPatch, number: int) -> threading.Event:
    """Set once the run has handed over so many blocks."""
    event, real = threading.Event(), resuming.Finished.block

    def block(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        if self.blocks == number:
            event.set()

    patch.setattr(resuming.Finished, "block", block)
    return event


def held(until: threading.Event) -> Callable[[str, Callable[[], None]], None]:
    """For `in_thread`: no step before the event."""

    def see(*_: Any) -> None:
        until.wait()

    return see


def kept(out: Path) -> tuple[list[int], list[str]]:
    """The last block of each record of an unfinished run, and the hidden states that are there."""
    partial = out.parent / f".{out.name}.partial"
    records = _read(partial / output.JOURNAL)[0]
    there = sorted(p.name for p in (partial / resuming.HIDDEN).iterdir())
    return [r["index"] for r in records if r["kind"] == "block"], there


def test_the_same_bytes_and_one_block_after_the_other(model, whole, tmp_path, monkeypatch):
    steps: list[str] = []
    in_thread(monkeypatch, lambda name, _: steps.append(name))
    assert quantize(model, tmp_path / "out") == whole
    assert {"fsync", "pwrite", "rename", "write"} <= set(steps), "it is the thread that makes things durable"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not any(t.name.startswith("quantkit-durable") for t in threading.enumerate())


def killed(model: Path, out: Path, at: int) -> None:
    """In a process of its own, killed at step `at` of the thread, at which it waits until the second block is done."""
    child = os.fork()
    if child == 0:
        count = 0
        patch = pytest.MonkeyPatch()
        done = after_block(patch, 2)

        def see(name: str, half: Callable[[], None]) -> None:
            nonlocal count
            count += 1
            if count == at:
                done.wait()
                half()
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            in_thread(patch, see)
            quantkit.quantize(recipe(model), out=out, device="cpu")
        finally:
            os._exit(1)  # it was to be killed
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_at_each_step_of_the_thread(model, whole, tmp_path):
    steps: list[str] = []
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        in_thread(patch, lambda name, _: steps.append(name))
        quantize(model, out)
    first = steps[: steps.index("write") + 2]  # of the first block: the record, and its fsync
    assert first[0] == "fsync" and first[-4:] == ["rename", "fsync", "write", "fsync"]
    tensor = len(first) - 1 - first[::-1].index("pwrite")
    places = [0, first.index("posix_fallocate"), tensor, len(first) - 4, len(first) - 2, len(first) - 1]
    for at in places:
        shutil.rmtree(out, ignore_errors=True)
        killed(model, out, at + 1)
        assert not out.exists()
        progress = Saying()
        assert quantize(model, out, progress=progress) == whole, (at, first[at])
        goes_on = f"continuing at block 2 of {BLOCKS}" in progress.said
        assert goes_on == (at == places[-1]), "the record is there, or what it speaks of does not count"


def test_blocks_that_a_slow_disk_holds_up_are_finished_together(model, whole, tmp_path):
    out, progress = tmp_path / "out", Stopping(3)
    with pytest.raises(Interrupted, match=f"after block 3 of {BLOCKS}"), pytest.MonkeyPatch.context() as patch:
        done = after_block(patch, 3)
        in_thread(patch, held(done))
        quantize(model, out, progress=progress)
    assert "keeps what is finished, 3 blocks" in progress.said[-1]
    assert kept(out) == ([0, 2], ["1", "3"]), "one record for the second block and the third"
    again = Saying()
    assert quantize(model, out, progress=again) == whole
    assert f"continuing at block 4 of {BLOCKS}" in again.said


def test_a_record_of_several_blocks_that_is_torn_costs_them_all(model, whole, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Interrupted), pytest.MonkeyPatch.context() as patch:
        done = after_block(patch, 3)
        in_thread(patch, held(done))
        quantize(model, out, progress=Stopping(3))
    journal = tmp_path / ".out.partial" / output.JOURNAL
    os.truncate(journal, journal.stat().st_size - 7)
    again = Saying()
    assert quantize(model, out, progress=again) == whole
    assert f"continuing at block 2 of {BLOCKS}" in again.said


def test_a_slow_disk_to_the_end(model, whole, tmp_path, monkeypatch):
    """The last block waits for the thread, which is let go when all others are handed over."""
    done = after_block(monkeypatch, BLOCKS - 1)
    in_thread(monkeypatch, held(done))
    assert quantize(model, tmp_path / "out") == whole


@pytest.mark.parametrize(("where", "finished"), [("_rounded", [0, 1]), ("_run_on", [0])])
def test_an_error_in_a_later_block_keeps_what_can_be_kept(where, finished, model, whole, tmp_path):
    """The second block waits: its hidden states are there until the third takes their place."""
    out, broken, real = tmp_path / "out", threading.Event(), getattr(pipeline, where)

    def fails(run: Any, block: Any, *args: Any) -> Any:
        if block.index != 2:
            return real(run, block, *args)
        if where == "_run_on":
            run.finished.leave()
        broken.set()
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), pytest.MonkeyPatch.context() as patch:
        in_thread(patch, held(broken))
        patch.setattr(pipeline, where, fails)
        quantize(model, out)
    assert kept(out)[0] == finished
    again = Saying()
    assert quantize(model, out, progress=again) == whole
    assert f"continuing at block {len(finished) + 1} of {BLOCKS}" in again.said


@pytest.mark.parametrize("stop", [None, 1])
def test_what_the_thread_meets_is_told_at_the_next_block(stop, model, whole, tmp_path):
    out, block, begun = tmp_path / "out", pipeline._block, []

    def full(name: str, _: Callable[[], None]) -> None:
        if name == "posix_fallocate":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def counted(run: Any, one: Any, batches: Any) -> None:
        begun.append(one.index)
        if one.index == 1:
            wait([run.finished._background._work])
        block(run, one, batches)

    with pytest.raises(MissingError, match="No space left on device"), pytest.MonkeyPatch.context() as patch:
        in_thread(patch, full)
        patch.setattr(pipeline, "_block", counted)
        quantize(model, out, progress=Stopping(stop) if stop else Saying())
    assert begun == ([0] if stop else [0, 1])
    assert not out.exists()
    assert quantize(model, out) == whole


def test_a_snapshot_is_a_copy_in_the_room_of_the_one_before():
    batches = [Batch(torch.randn(2, 3, 4), torch.ones(2, 3), [], torch.randn(2, 3, 4)) for _ in range(2)]
    wanted = [b.hidden.clone() for b in batches]
    first = hidden.snapshot(batches, "cuda")  # as it is for hidden states that wait on the host
    for batch in batches:
        batch.hidden.zero_()
    assert all(torch.equal(x.hidden, y) for x, y in zip(first, wanted, strict=True))
    again = hidden.snapshot(batches, "cuda", first)
    assert [x.hidden.data_ptr() for x in again] == [x.hidden.data_ptr() for x in first]
    assert not any(x.hidden.any() for x in again)
    assert again[1].dense is not None and batches[1].dense is not None
    assert again[1].dense is not batches[1].dense and torch.equal(again[1].dense, batches[1].dense)
    smaller = [Batch(b.hidden[:1], b.mask, []) for b in batches]
    assert [x.hidden.shape[0] for x in hidden.snapshot(smaller, "cuda", first)] == [1, 1]
    assert hidden.size(batches) == 4 * 24 * 4
