"""Progress: plain lines for logs, a live line for terminals, and nothing lost in either."""

from __future__ import annotations

import io
import re

import pytest

from quantkit.progress import Live, Progress, Silent, duration, peak_memory


class Clock:
    """A clock that stands still until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """What rich takes for a terminal."""

    def isatty(self) -> bool:
        return True


PEAK = r" · peak \d+\.\d\d GiB( · GPU \d+\.\d\d GiB)?"


def test_plain_lines_one_an_item_with_time_left_and_memory() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream, clock) as progress:
        progress.begin(4, "block")
        for k in range(4):
            progress.item(k + 1, f"model.layers.{k}")
            progress.doing("observe")
            clock.now += 30
            progress.doing("quantize 1/4")
        progress.end()
    expected = [
        f"block 1/4 model.layers.0{PEAK}",
        f"block 2/4 model.layers.1 · 1 min 30 s left{PEAK}",
        f"block 3/4 model.layers.2 · 1 min 0 s left{PEAK}",
        f"block 4/4 model.layers.3 · 30 s left{PEAK}",
        "block 4/4: done in 2 min 0 s",
    ]
    lines = stream.getvalue().splitlines()
    assert len(lines) == len(expected)
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, lines, strict=True)), lines


def test_status_says_what_is_done_and_counts_the_time_within_an_item() -> None:
    clock = Clock()
    progress = Progress(io.StringIO(), clock)
    progress.begin(3, "block")
    progress.doing("embeddings")
    assert re.fullmatch(f"block 0/3 · embeddings{PEAK}", progress.status())
    progress.item(1, "a")
    clock.now += 60
    progress.item(2, "b")
    clock.now += 20
    progress.doing("observe")
    assert re.fullmatch(f"block 2/3 b · observe · 1 min 40 s left{PEAK}", progress.status())
    clock.now += 1000
    assert " · 0 s left" in progress.status(), "an item slower than the others does not make the time negative"


def test_what_is_said_and_warned() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    progress.say("calibration: 3 rows")
    progress.warn("rule 'x' matches nothing")
    assert stream.getvalue() == "calibration: 3 rows\nwarning: rule 'x' matches nothing\n"
    assert progress.warnings == ["rule 'x' matches nothing"]


def test_a_new_stage_ends_the_open_one() -> None:
    stream = io.StringIO()
    progress = Progress(stream, Clock())
    progress.begin(1, "block")
    progress.begin(2, "window")
    progress.end()
    progress.end()
    assert stream.getvalue().splitlines() == ["block 1/1: done in 0 s", "window 2/2: done in 0 s"]


def test_an_error_does_not_read_as_done() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(stream, Clock()) as progress:
        progress.begin(2, "block")
        raise KeyboardInterrupt
    assert stream.getvalue() == ""


def test_plain_lines_go_to_stderr_and_are_what_a_pipe_gets(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress.for_terminal()
    assert type(progress) is Progress
    progress.say("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_silent_keeps_its_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    with Silent() as progress:
        progress.begin(1, "block")
        progress.item(1, "a")
        progress.say("hello")
        progress.warn("careful")
        progress.end()
    assert capsys.readouterr() == ("", "")
    assert progress.warnings == ["careful"]


def test_live_line_shows_the_status_and_gives_the_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), Live(stream, Clock()) as progress:
        progress.begin(2, "block")
        progress.item(1, "model.layers.0")
        progress.doing("[observe]")
        progress.warn("a [bold] name")
        raise KeyboardInterrupt
    written = stream.getvalue()
    assert "block 1/2 model.layers.0 · [observe] · peak" in written
    assert "warning: a [bold] name" in written, "names are not markup"
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor is shown again"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (8.4, "8 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (1500, "25 min"), (7500, "2 h 5 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_peak_memory_is_that_of_this_process() -> None:
    before = float(peak_memory()[0].split()[1])
    ballast = bytearray(b"x") * (256 << 20)
    grown = float(peak_memory()[0].split()[1])
    assert len(ballast) == 256 << 20
    assert before > 0.005
    assert grown >= 0.25
