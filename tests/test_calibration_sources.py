"""Where texts come from: each kind of file, by the library that writes it; and what each of them can get wrong."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from quantkit.calibration import load_texts, sources
from quantkit.errors import InputError, MissingError

CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
OTHER = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Thus."}]


def contents(data: Any, **options: Any) -> list[Any]:
    return [document.content for document in sources.open_source(str(data), **options).documents]


def write_parquet(file: Path, columns: dict[str, Any], **options: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), file, **options)
    return file


# Kinds of files


def test_file_kinds(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two\u2028x"}\r\n"three"\n', "utf-8")
    (tmp_path / "b.json").write_text(json.dumps(["one", {"text": "two"}, CHAT]))
    (tmp_path / "c.txt").write_text("all of it\nis one document")
    write_parquet(tmp_path / "d.parquet", {"id": [1, 2], "text": ["one", "two"]})
    assert contents(tmp_path / "a.jsonl") == ["one", "two\u2028x", "three"]
    assert contents(tmp_path / "b.json") == ["one", "two", CHAT]
    assert contents(tmp_path / "c.txt") == ["all of it\nis one document"]
    assert contents(tmp_path / "d.parquet") == ["one", "two"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, content in [("a.txt", "one"), ("a.json", '["one"]'), ("a.jsonl", '"one"\n')]:
        (tmp_path / name).write_text(content, "utf-8-sig")
        assert contents(tmp_path / name) == ["one"]


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_files_that_the_datasets_library_writes(kind, tmp_path):
    made = datasets.Dataset.from_list([{"messages": CHAT, "n": 1}, {"messages": OTHER, "n": 2}])
    file = tmp_path / ("a.jsonl" if kind == "json" else "a.parquet")
    getattr(made, f"to_{kind}")(file)
    assert contents(file) == [CHAT, OTHER]


def test_a_long_text_file_is_cut_at_the_ends_of_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_PART", 20)
    lines = [f"line {i}: ä\n" for i in range(7)]
    (tmp_path / "a.txt").write_text("".join(lines), "utf-8")
    found = list(sources.open_source(str(tmp_path / "a.txt")).documents)
    assert "".join(str(d.content) for d in found) == "".join(lines)
    assert [len(str(d.content).splitlines()) for d in found] == [2, 2, 2, 1]
    assert found[1].where.endswith("a.txt, part 1")


def test_a_folder_is_all_its_files_by_name(tmp_path):
    for name, text in [("b.jsonl", '"two"'), ("a/z.txt", "one"), ("c.json", '["three"]'), (".x/d.txt", "hidden")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "README.md").write_text("not a text")
    source = sources.open_source(str(tmp_path))
    assert [d.content for d in source.documents] == ["one", "two", "three"]
    assert [f["name"] for f in source.report["files"]] == ["z.txt", "b.jsonl", "c.json"]


def test_the_report_knows_the_files_that_were_opened(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    source = sources.open_source(str(tmp_path))
    next(source.documents)
    hashed = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"  # sha256sum of "one"
    assert source.report["files"] == [{"name": "a.txt", "bytes": 3, "sha256": hashed}]


def test_a_file_too_large_to_hash_is_known_by_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_HASHED", 2)
    (tmp_path / "a.txt").write_text("one")
    source = sources.open_source(str(tmp_path / "a.txt"))
    next(source.documents)
    assert source.report["files"] == [{"name": "a.txt", "bytes": 3, "sha256": None}]


def test_large_files_are_read_only_as_far_as_needed(tmp_path):
    """What follows the first documents is broken, and nobody notices."""
    (tmp_path / "a.jsonl").write_bytes(b'"one"\n"two"\n' + b"\xff{broken\n")
    assert [d.content for d in itertools.islice(sources.open_source(str(tmp_path / "a.jsonl")).documents, 2)]
    with pytest.raises(InputError, match=r"a.jsonl, line 3: not readable as UTF-8 text \(byte 0"):
        contents(tmp_path / "a.jsonl")
    texts = [f"{i}" * 1000 for i in range(1000)]
    file = write_parquet(tmp_path / "b.parquet", {"text": texts}, row_group_size=100, use_dictionary=False)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4000] = b"\xff" * 4000
    file.write_bytes(content)
    assert [d.content for d in itertools.islice(sources.open_source(str(file)).documents, 100)] == texts[:100]
    with pytest.raises(InputError, match=r"b.parquet: not readable as parquet \("):
        contents(file)


def test_closing_lets_go_of_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('"one"\n"two"\n')
    source = sources.open_source(str(tmp_path / "a.jsonl"))
    next(source.documents)
    source.documents.close()
    assert list(source.documents) == []


# Columns and chats


def test_columns_are_found_or_named(tmp_path):
    records = [
        {"text": "plain", "messages": CHAT, "body": "other"},
        {"text": None, "messages": OTHER, "body": "more"},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because.", "weight": 1}]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert contents(tmp_path / "a.jsonl") == ["plain", OTHER, CHAT]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:2]))
    assert contents(tmp_path / "b.jsonl", column="body") == ["other", "more"]
    assert contents(tmp_path / "b.jsonl", column="messages") == [CHAT, OTHER]
    file = write_parquet(tmp_path / "c.parquet", {"text": ["x", None], "body": ["other", None], "n": [1, 2]})
    assert contents(file) == ["x", None] and contents(file, column="body") == ["other", None]


def test_messages_as_datasets_keep_them(tmp_path):
    """Keys that are null in every other message, and a list of mappings that became a mapping of lists."""
    mixed: list[dict[str, Any]] = [{"role": "user", "content": "Why?", "tool_calls": None, "name": None}]
    mixed += [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "name": None}]
    columns = {"role": ["user", "assistant"], "content": ["Why?", "Because."]}
    (tmp_path / "a.json").write_text(json.dumps([{"messages": mixed}, {"messages": columns}]))
    calls: dict[str, Any] = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    assert contents(tmp_path / "a.json") == [[{"role": "user", "content": "Why?"}, calls], CHAT]


def test_any_role_is_left_to_the_template(tmp_path):
    shared = [{"from": "system", "value": "a"}, {"from": "observation", "value": "b"}]
    (tmp_path / "a.json").write_text(json.dumps([[{"role": "oracle", "content": "x"}], {"conversations": shared}]))
    oracle, turns = contents(tmp_path / "a.json")
    assert oracle[0]["role"] == "oracle" and [m["role"] for m in turns] == ["system", "observation"]


def test_a_python_iterable():
    items: list[Any] = ["one", CHAT, {"text": "two", "id": 3}, tuple(CHAT), None]
    source = sources.from_iterable(iter(items))
    assert [d.content for d in source.documents] == ["one", CHAT, "two", CHAT, None]
    made = datasets.Dataset.from_dict({"text": ["one", "two"], "body": ["three", "four"]})
    assert [d.content for d in sources.from_iterable(made).documents] == ["one", "two"]
    assert [d.content for d in sources.from_iterable(made, "body").documents] == ["three", "four"]


@pytest.mark.parametrize("items", ["a text", b"bytes", {"text": "one"}, 5, None])
def test_what_is_no_iterable_of_texts(items):
    with pytest.raises(InputError, match=r"calibration_data is .*; expected an iterable of texts or lists of messages"):
        sources.from_iterable(items)


def test_a_copy_of_a_hub_repository(tmp_path):
    """Read by the datasets library, which knows its subsets and splits."""
    configs = (
        "- config_name: plain\n  data_files: [{split: train, path: p/*.parquet}, {split: test, path: t.parquet}]\n"
    )
    configs += "- config_name: chat\n  data_files: [{split: validation, path: c.jsonl}]\n"
    (tmp_path / "p").mkdir()
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    write_parquet(tmp_path / "p" / "0.parquet", {"text": ["one"], "n": [0]})
    write_parquet(tmp_path / "p" / "1.parquet", {"text": ["two"], "n": [0]})
    write_parquet(tmp_path / "t.parquet", {"text": ["three"], "n": [0]})
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    source = sources.open_source(str(tmp_path), subset="plain")
    assert [d.content for d in source.documents] == ["one", "two"]
    report = {"kind": "folder", "data": str(tmp_path), "subset": "plain", "split": "train"}
    assert source.report == report
    assert contents(tmp_path, subset="plain", split="test") == ["three"]
    assert load_texts(str(tmp_path), subset="plain", split="test") == ["three"]
    for options, says in [
        ({"subset": "plain", "split": "trian"}, "has no split 'trian'; known: train, test"),
        ({"subset": "code"}, r"BuilderConfig 'code' not found. Available: \['plain', 'chat'\]"),
        ({"split": "train"}, "Config name is missing. Please pick one among the available configs"),
        ({"subset": "plain", "column": "body"}, "0.parquet: no column 'body'; there is 'text', 'n'"),
        ({"subset": "plain", "revision": "main"}, "is on this machine, so it has no revision; leave revision out"),
    ]:
        with pytest.raises(InputError, match=says):
            contents(tmp_path, **options)


def test_splits_without_a_train_split(tmp_path):
    for name in ("validation", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(InputError, match="has no split 'train'; known: validation, test"):
        contents(tmp_path, split="train")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: '*.jsonl'\n---\n")
    assert contents(tmp_path, subset="a") == ["one", "one"]


def test_the_hub_offline():
    """The tests run offline: no dataset is asked for, and the sentence says so."""
    for name in ("org/name", "hub:name", "org/name@main"):
        with pytest.raises(
            MissingError, match="offline mode is on, and it is not in the cache of the datasets library"
        ):
            contents(name)


# What can be wrong


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl, line 2: not JSON"),
        (
            "a.jsonl",
            b'{"words": "x", "n": 1}',
            "line 1: no column 'text', 'messages' or 'conversations'; there is 'words'",
        ),
        ("a.jsonl", b'{"text": NaN}', "line 1, column 'text': holds the value nan where a text or a list of messages"),
        ("a.jsonl", b"\n7\n", "line 2: holds the value 7 where a text"),
        ("a.jsonl", b'{"text": "\xff"}', r"line 1: not readable as UTF-8 text \(byte 10"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.json", b'{"text": "x"}', "holds an object with text where a list of documents is expected"),
        ("a.json", b"[1]", "a.json, entry 0: holds the value 1 where"),
        ("a.json", b'[{"text": {"a": 1}}]', "entry 0, column 'text': holds an object with a where a list of messages"),
        ("a.json", b'[{"messages": [{"role": "user"}]}]', "column 'messages', message 0: has no content where text"),
        ("a.json", b'[[{"content": "x"}]]', "entry 0, message 0: has no role where text such as user"),
        ("a.json", b'[[{"role": 3, "content": "x"}]]', "message 0: role holds the value 3 where text"),
        ("a.json", b'[[{"role": "user", "content": NaN}]]', "message 0: content holds the value nan where text"),
        (
            "a.json",
            b'[[{"role": "user", "content": [{"text": 1}]}]]',
            "message 0: content holds the value 1 where text",
        ),
        ("a.json", b'[[{"role": "user", "content": ["x"]}]]', "message 0: content holds a list of 1 where text"),
        ("a.json", b'[["x"]]', "entry 0, message 0: holds text where an object with role and content"),
        ("a.json", b'[{"conversations": [{"from": "human"}]}]', "message 0: has no content where text"),
        ("a.json", b'[{"conversations": {"from": ["human"], "value": []}}]', "message 0: has no content where text"),
        ("a.txt", b"\xff\xfe\x00", "a.txt, line 1: not readable as UTF-8"),
        ("a.parquet", b"PAR1 no", r"a.parquet: not readable as parquet \("),
        ("a.parquet", b"", r"a.parquet: not readable as parquet \("),
        ("a.csv", b"x", "unknown kind of text '.csv'; known: .jsonl, .json, .parquet, .txt"),
    ],
)
def test_bad_files(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says):
        contents(tmp_path / name)


def test_bad_columns(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.json").write_text('["one"]')
    write_parquet(tmp_path / "a.parquet", {"n": [1], "text": [2.5]})
    write_parquet(tmp_path / "b.parquet", {"n": [1]})
    for name, column, says in [
        ("a.txt", "text", "is plain text, so it has no column 'text'; leave column out"),
        ("a.json", "text", "entry 0: holds text, so it has no column 'text'; leave column out"),
        ("a.parquet", None, "a.parquet, row 0, column 'text': holds the value 2.5 where a text"),
        ("a.parquet", "body", "a.parquet: no column 'body'; there is 'n', 'text'"),
        ("b.parquet", None, "no column 'text', 'messages' or 'conversations'; there is 'n'"),
    ]:
        with pytest.raises(InputError, match=says):
            contents(tmp_path / name, column=column)


def test_no_such_source(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("one")
    for data, options, says in [
        ("nowhere.jsonl", {}, "'nowhere.jsonl' is not a file on this machine, and not the name of a dataset"),
        ("texts/nowhere.parquet", {}, "is not a file on this machine"),
        ("../nowhere", {}, "is not a file on this machine"),
        ("nowhere", {}, "is not a file on this machine"),
        ("a text, not a name " * 500, {}, "is not a file on this machine"),
        ("~nobody/a\0b.txt", {}, "is not a file on this machine"),
        ("builtin:x", {}, "no built-in text is named 'builtin:x'; known: builtin:pydocs"),
        (tmp_path / "empty", {}, "this folder holds no file of the kinds .jsonl, .json, .parquet, .txt"),
        (tmp_path / "a.txt", {"split": "train"}, "is a file, which has no split 'train'; leave split out"),
        (tmp_path / "a.txt", {"revision": "x"}, "so it has no revision"),
        ("org/name@a", {"revision": "b"}, "names revision 'a', and the key revision says 'b'"),
    ]:
        with pytest.raises(InputError, match=says):
            contents(data, **options)


def test_a_folder_of_save_to_disk(tmp_path):
    made = datasets.Dataset.from_dict({"text": ["one"]})
    made.save_to_disk(tmp_path / "a")
    with pytest.raises(
        InputError, match="was written by save_to_disk of the datasets library; write it with to_parquet"
    ):
        contents(tmp_path / "a")
    loaded = sources.from_iterable(datasets.load_from_disk(tmp_path / "a"))
    assert [d.content for d in loaded.documents] == ["one"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json", "a.parquet"])
def test_a_file_that_cannot_be_read(tmp_path, name):
    (tmp_path / name).symlink_to("/proc/self/mem")  # it opens, and reading it is an error of the device
    with pytest.raises(InputError, match=r"cannot be read \(Input/output error\)"):
        contents(tmp_path / name)


# Texts to validate with


def test_held_out_texts(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(["one", "", None, " ", "two", "two", "three"]))
    assert load_texts(str(tmp_path / "a.json")) == ["one", "two", "two", "three"]
    assert load_texts(str(tmp_path / "a.json"), characters=4) == ["one", "two"]
    (tmp_path / "b.json").write_text('["", null]')
    with pytest.raises(InputError, match="holds no text"):
        load_texts(str(tmp_path / "b.json"))
    assert len(load_texts("builtin:pydocs-heldout")) == 19


def test_shuffling_a_source_larger_than_the_window(monkeypatch):
    documents = [sources.Document(str(i), "") for i in range(200)]
    monkeypatch.setattr(sources, "_WINDOW", 10)
    one, two = (list(sources.shuffled(iter(documents), 5)) for _ in range(2))
    assert one == two != documents and sorted(one, key=documents.index) == documents
    assert all(documents.index(d) < i + 11 for i, d in enumerate(one))
    monkeypatch.setattr(sources, "_WINDOW", 10_000)
    monkeypatch.setattr(sources, "_WINDOW_CHARACTERS", 20)
    small = list(sources.shuffled(iter(documents), 5))
    assert sorted(small, key=documents.index) == documents != small
    assert all(documents.index(d) < i + 22 for i, d in enumerate(small))
