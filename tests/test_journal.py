"""The journal: what was appended is there, a torn tail is dropped, any other damage is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import InputError
from quantkit.journal import Journal, differences, exists

WHO = {"recipe": {"samples": 4, "rules": [1.5, "ü"]}, "device": "CPU"}
RECORDS: list[dict[str, Any]] = [
    {"kind": "outside", "tensors": {"a": 1}},
    {"kind": "block", "index": 0, "report": {"layers": [{"error": 1e-300, "text": "a\nb\r\u2028"}], "x": None}},
    {"kind": "block", "index": 1, "report": {}},
]


def filled(file: Path) -> list[int]:
    """Writes RECORDS; returns where each line ends."""
    log = Journal(file, WHO)
    ends = [file.stat().st_size]
    for record in RECORDS:
        log.append(**record)
        ends.append(file.stat().st_size)
    log.close()
    return ends


def test_what_was_appended_is_found_again(tmp_path):
    file = tmp_path / "journal"
    assert not exists(file)
    filled(file)
    assert exists(file)
    log = Journal(file, WHO)
    assert log.records[1:] == RECORDS and log.current("block") == RECORDS[1:] and log.last("block") == RECORDS[2]
    log.append("pass", steps=[])
    log.append("block", index=0)
    log.close()
    log = Journal(file, WHO)
    assert log.current("block") == [{"kind": "block", "index": 0}] and log.current("outside") == []
    assert log.last("outside") == RECORDS[0] and log.last("nothing") is None
    log.close()


def test_a_torn_tail_is_dropped_wherever_it_is_torn(tmp_path):
    file = tmp_path / "journal"
    ends = filled(file)
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        log = Journal(file, WHO)
        kept = sum(end <= size for end in ends)
        assert log.records[1:] == RECORDS[: max(0, kept - 1)], size
        log.append("more")
        log.close()
        log = Journal(file, WHO)
        assert log.records[-1] == {"kind": "more"} and len(log.records) == max(kept, 1) + 1
        log.close()


def test_a_tail_of_zeros_is_dropped(tmp_path):
    """What a file system may leave after a loss of power."""
    file = tmp_path / "journal"
    ends = filled(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: ends[-2]] + bytes(ends[-1] - ends[-2]))
    log = Journal(file, WHO)
    assert log.records[1:] == RECORDS[:-1]
    log.close()


@given(data=st.data())
def test_no_byte_can_change_unnoticed(data, tmp_path_factory):
    file = tmp_path_factory.mktemp("journal") / "journal"
    ends = filled(file)
    whole = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    file.write_bytes(whole)
    line = sum(end <= at for end in ends)
    try:
        log = Journal(file, WHO)
    except InputError as e:
        assert "is damaged" in str(e) and "--fresh" in str(e) and str(file) in str(e)
        assert file.read_bytes() == whole, "a journal that is refused is left as it is"
    else:  # the last line, or the end of the line before it: what they say is lost, and known to be
        assert line >= len(ends) - 2
        assert log.records[1:] == RECORDS[: len(log.records) - 1] and len(log.records) <= line
        log.close()


def test_another_run_is_refused_with_what_differs(tmp_path):
    file = tmp_path / "journal"
    filled(file)
    before = file.read_bytes()
    other = {"recipe": {"samples": 8, "rules": [1.5, "ü"]}, "device": "GPU", "more": {"a": 1}}
    with pytest.raises(InputError) as caught:
        Journal(file, other)
    assert "recipe.samples is 8, was 4; device is GPU, was CPU; more is " in str(caught.value)
    assert file.read_bytes() == before
    assert differences(WHO, WHO) == []
    assert differences({"a": {"b": 1}}, {"a": {}}) == ["a.b is null, was 1"]
