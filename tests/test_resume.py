"""A run that is cut short at any moment goes on by the same command, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from interrupted import BLOCKS, CHECK, SMALL, Saying, Stopping, content, recipe, stopped, untimed

import quantkit
from quantkit import cli_running, output, pipeline
from quantkit.errors import InputError, Interrupted
from quantkit.progress import Silent
from quantkit.resuming import HIDDEN

DURABLE = ("write", "pwrite", "fsync", "ftruncate", "posix_fallocate", "rename", "replace", "unlink", "rmdir")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("resume") / "model", **SMALL)


@pytest.fixture(scope="module")
def whole(model: Path) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    return content(quantkit.quantize(recipe(model), out=model.parent / "whole", device="cpu").out)


# Killed ---------------------------------------------------------------------------------------------------------------


def counted(see: Callable[[str, Callable[[], None]], None], patch: pytest.MonkeyPatch) -> None:
    """Calls `see(name, half)` before each call that changes the disk; `half` does a write by half."""
    for name in DURABLE:
        real = getattr(os, name)

        def call(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
            def half() -> None:
                if name in ("write", "pwrite"):
                    real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])

            see(name, half)
            return real(*args, **kwargs)

        patch.setattr(os, name, call)


def steps(what: dict[str, Any], out: Path) -> list[str]:
    """The calls of a whole run that change the disk."""
    names: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        counted(lambda name, _: names.append(name), patch)
        quantkit.quantize(what, out=out, device="cpu")
    return names


def killed(what: dict[str, Any], out: Path, at: int) -> None:
    """Runs in a process of its own, which is killed in the middle of its call number `at` that changes the disk."""
    child = os.fork()
    if child == 0:
        count = 0

        def see(name: str, half: Callable[[], None]) -> None:
            nonlocal count
            count += 1
            if count == at:
                half()
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            counted(see, pytest.MonkeyPatch())
            quantkit.quantize(what, out=out, device="cpu")
        finally:
            os._exit(1)  # it was to be killed
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def protocol(names: list[str]) -> Iterator[int]:
    """Calls of the second block from its last tensor on: everything by which it becomes finished."""
    fallocated = [i for i, name in enumerate(names) if name == "posix_fallocate"]
    second = fallocated[2]  # the output, the hidden states of the first block, of the second
    while names[second - 1] != "pwrite":
        second -= 1
    end = fallocated[2] + names[fallocated[2] :].index("write") + 2
    yield from range(second, end + 2)


def distinct(names: list[str]) -> Iterator[int]:
    """All calls but those in the middle of a row of pwrites: tensor after tensor into one file."""
    for at in range(1, len(names) + 1):
        if names[max(0, at - 2) : at + 1] != ["pwrite"] * 3:
            yield at


def test_killed_at_each_step_by_which_a_block_is_finished(model, whole, tmp_path):
    what, out = recipe(model), tmp_path / "out"
    names = steps(what, out)
    places = list(protocol(names))
    assert {"pwrite", "fsync", "rename", "write"} <= {names[i - 1] for i in places}
    for at in places:
        shutil.rmtree(out, ignore_errors=True)
        killed(what, out, at)
        assert not out.exists()
        assert content(quantkit.quantize(what, out=out, device="cpu").out) == whole, (at, names[at - 1])
        assert not (tmp_path / ".out.partial").exists()


def test_killed_at_each_step_by_which_a_run_ends(model, whole, tmp_path):
    """From the output's move to its place on; what is left then is removed by the same command."""
    what, out = recipe(model), tmp_path / "out"
    names = steps(what, out)
    last = max(i for i, name in enumerate(names, 1) if name == "rename")
    assert names[last:].count("rmdir") == 3 and len(names) - last < 12
    for at in range(last, len(names) + 1):
        shutil.rmtree(out, ignore_errors=True)
        killed(what, out, at)
        assert content(out) == whole if at > last else not out.exists()
        assert content(quantkit.quantize(what, out=out, device="cpu").out) == whole, (at, names[at - 1])
        assert not (tmp_path / ".out.partial").exists()


@pytest.mark.slow
def test_killed_at_each_call_that_changes_the_disk(tmp_path):
    folder = tiny.save(tmp_path / "model", **SMALL)
    method = {"autoround": {"iterations": 2}}
    what, out = recipe(folder, method=method, transforms=["awq"]), tmp_path / "out"
    names = steps(what, out)
    whole = content(out)
    places = list(distinct(names))
    assert len(places) > 60 and {names[at - 1] for at in places} == set(names)
    for at in places:
        shutil.rmtree(out)
        killed(what, out, at)
        assert content(quantkit.quantize(what, out=out, device="cpu").out) == whole, (at, names[at - 1])
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == [], (at, names[at - 1])


@pytest.mark.slow
def test_killed_at_30_random_moments(tmp_path):
    """The real command, killed by a timer over and over; each run goes on where the one before it was killed."""
    folder = tiny.save(tmp_path / "model", num_hidden_layers=8)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(folder, validate=CHECK, transforms=["awq"])))
    path = os.pathsep.join(p for p in sys.path if p)
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def command(out: str) -> list[str]:
        return [sys.executable, "-m", "quantkit", "quantize", "recipe.json", "--out", out, "--device", "cpu"]

    def same(out: str) -> bool:
        """Whether all files but those that tell of times are equal to those of the whole run."""
        names = [content(tmp_path / name).keys() for name in (out, "whole")]
        return names[0] == names[1] and untimed(tmp_path / out) == untimed(tmp_path / "whole")

    start = time.monotonic()
    subprocess.run(command("whole"), cwd=tmp_path, env=env, check=True, capture_output=True)
    length = time.monotonic() - start
    moments, kills = random.Random(0), 0
    while kills < 30:
        run = subprocess.Popen(command("out"), cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _, told = run.communicate(timeout=moments.uniform(0.2, 1.0) * length)
            assert run.returncode == 0, told
            assert same("out")
            shutil.rmtree(tmp_path / "out")
        except subprocess.TimeoutExpired:
            run.kill()
            run.communicate()
            kills += 1
    subprocess.run(command("out"), cwd=tmp_path, env=env, check=True, capture_output=True)
    assert same("out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "recipe.json", "whole"]


# Stopped --------------------------------------------------------------------------------------------------------------


def test_stopped_after_a_block_it_goes_on_with_the_next(model, whole, tmp_path):
    what, out = recipe(model), tmp_path / "out"
    progress = Stopping(2)
    with pytest.raises(Interrupted, match=f"after block 2 of {BLOCKS}; run the same command again") as caught:
        quantkit.quantize(what, out=out, device="cpu", progress=progress)
    assert caught.value.exit_code == 130
    partial = tmp_path / ".out.partial"
    assert f"{partial}: keeps what is finished, 2 blocks" in progress.said[-1] and "--fresh" in progress.said[-1]
    assert sorted(p.name for p in (partial / HIDDEN).iterdir()) == ["1", "2"], "two generations at most"
    again = Saying()
    assert content(quantkit.quantize(what, out=out, device="cpu", progress=again).out) == whole
    assert f"continuing at block 3 of {BLOCKS}" in again.said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_fresh_starts_over(model, whole, tmp_path):
    what, out = recipe(model), tmp_path / "out"
    stopped(what, out, 1)
    progress = Saying()
    assert content(quantkit.quantize(what, out=out, device="cpu", fresh=True, progress=progress).out) == whole
    assert not any(line.startswith("continuing") for line in progress.said)


def test_nothing_is_kept_of_a_run_that_finished_nothing(model, tmp_path, monkeypatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(pipeline, "_block", broken)
    with pytest.raises(RuntimeError, match="broken"):
        quantkit.quantize(recipe(model), out=tmp_path / "out", device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_validation_that_is_cut_short_is_done_again_and_nothing_else(model, tmp_path, monkeypatch):
    what = recipe(model, validate=CHECK)
    whole = content(quantkit.quantize(what, out=tmp_path / "whole", device="cpu").out)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:

        def interrupted(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(quantkit.validation, "validate", interrupted)
        quantkit.quantize(what, out=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()

    def never(*_: Any) -> None:
        raise AssertionError("a block was quantized again")

    monkeypatch.setattr(pipeline, "_block", never)
    assert content(quantkit.quantize(what, out=tmp_path / "out", device="cpu").out) == whole


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["recipe", "source", "version", "data", "threads"])
def test_another_run_is_refused_with_the_difference(what, model, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (tmp_path / "text.txt").write_text("It is what it is, and says so at some length, again and again. " * 40)
    mine = recipe(folder, calibration={"data": str(tmp_path / "text.txt"), "samples": 4, "length": 32})
    partial = stopped(mine, tmp_path / "out", 1)
    before = content(partial)
    if what == "recipe":
        mine["method"] = {"gptq": {"dampening": 0.02}}
        says = r"recipe\.method\.gptq\.dampening is 0\.02, was 0\.01"
    elif what == "source":
        tiny.save(folder, seed=1, **SMALL)
        says = r"source\.files\.model\.safetensors is .* bytes of .*, was .* bytes of"
    elif what == "threads":  # where sums depend on their number
        monkeypatch.setattr(quantkit.running.summation, "fixed", lambda: False)
        monkeypatch.setattr(quantkit.running.torch, "get_num_threads", lambda: 77)
        says = r"threads is 77, was null"
    elif what == "version":
        real = quantkit.running.versions
        monkeypatch.setattr(quantkit.running, "versions", lambda: {**real(), "torch": "1.0"})
        says = r"versions\.torch is 1\.0, was "
    else:
        (tmp_path / "text.txt").write_text("It is another text. " * 200)
        says = "the calibration data are not those with which the run began"
    with pytest.raises(InputError, match=says) as caught:
        quantkit.quantize(mine, out=tmp_path / "out", device="cpu")
    assert "--fresh" in str(caught.value) and "\n" not in str(caught.value)
    assert content(partial) == before
    monkeypatch.undo()  # what computes in one thread meanwhile would go back to 77, for all tests after this one
    assert quantkit.quantize(mine, out=tmp_path / "out", device="cpu", fresh=True).out.is_dir()


def test_a_source_that_changes_under_the_run(model, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    whole = content(quantkit.quantize(recipe(folder), out=tmp_path / "whole", device="cpu").out)
    file, block = folder / "model.safetensors", pipeline._block
    stat = file.stat()

    def meanwhile(run: Any, one: Any, batches: Any) -> None:
        if one.index == 1:
            os.utime(file)
        block(run, one, batches)

    with monkeypatch.context() as patch, pytest.raises(InputError, match="has changed since it was opened"):
        patch.setattr(pipeline, "_block", meanwhile)
        quantkit.quantize(recipe(folder), out=tmp_path / "out", device="cpu")
    with pytest.raises(InputError, match=r"source\.files\.model\.safetensors"):
        quantkit.quantize(recipe(folder), out=tmp_path / "out", device="cpu")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    progress = Saying()
    assert (
        content(quantkit.quantize(recipe(folder), out=tmp_path / "out", device="cpu", progress=progress).out) == whole
    )
    assert f"continuing at block 2 of {BLOCKS}" in progress.said


def test_a_second_run_into_one_folder_is_refused_and_does_no_harm(model, whole, tmp_path):
    what, out = recipe(model), tmp_path / "out"
    partial = stopped(what, out, 1)
    before = content(partial)
    with pytest.raises(ZeroDivisionError), output.working(out):
        for fresh in (False, True):
            with pytest.raises(InputError, match="another run is writing this output"):
                quantkit.quantize(what, out=out, device="cpu", fresh=fresh)
        with pytest.raises(InputError, match="another run is writing"), output.staged(out):
            pass
        raise ZeroDivisionError
    with pytest.raises(InputError, match="holds an unfinished run"), output.staged(out):
        pass  # a conversion does not take its place
    assert content(partial) == before
    assert content(quantkit.quantize(what, out=out, device="cpu").out) == whole


def test_the_second_signal_ends_at_once():
    progress = Silent()
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), cli_running.ending_gently(progress):
        signal.raise_signal(signal.SIGTERM)
        assert progress.stopping
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(Interrupted, match="before the first block"):
        progress.begin(3, "block")
        progress.item(1, "first")
