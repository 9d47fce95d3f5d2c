"""Datasets of the Hub, by the real libraries against a Hub on this machine: what travels, and what can be wrong."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hub_server import HubServer
from pyarrow import parquet

TEXTS = ["".join(random.Random(i).choices("abcdefgh ", k=2000)) for i in range(6000)]
CARD = """---
configs:
- config_name: plain
  default: true
  data_files: [{split: train, path: train.parquet}, {split: test, path: test.parquet}]
---
"""

# The settings of the Hub are read when its library is imported, so each Hub needs a process of its own.
SCRIPT = """
import itertools, json, sys
from quantkit import pinning
from quantkit.calibration import sources
from quantkit.errors import QuantkitError
from quantkit.recipe.calibration import Calibration
for data, options in json.loads(sys.argv[1]):
    try:
        if options.pop("pin", False):
            pinned = pinning.texts(Calibration(data=data, **options))
            print(json.dumps([pinned.data, pinned.revision]), flush=True)
            continue
        source = sources.open_source(data, **options)
        found = [document.content for document in itertools.islice(source.documents, 3)]
        source.documents.close()
        answer = [found, source.report]
    except QuantkitError as e:
        answer = [type(e).__name__, str(e)]
    print(json.dumps(answer), flush=True)
"""


def as_parquet(texts: list[str]) -> bytes:
    """One row group, in which the text is not the only column."""
    content = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": texts, "other": texts[::-1]}), content)
    return content.getvalue()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {"README.md": CARD.encode(), "train.parquet": as_parquet(TEXTS), "test.parquet": as_parquet(["a", "b"])}


@pytest.fixture(scope="module")
def lines() -> dict[str, bytes]:
    return {"validation.jsonl": b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS[:50])}


@pytest.fixture(scope="module")
def hub(files: dict[str, bytes], lines: dict[str, bytes]) -> Iterator[HubServer]:
    with HubServer() as hub:
        hub.add("datasets:org/name", files)
        hub.add("datasets:org/lines", lines)
        hub.add("datasets:org/empty", {"README.md": b""})
        hub.add("datasets:org/gated", lines, gated="manual")
        yield hub


def lines_report(hub: HubServer) -> dict[str, str]:
    place = {"kind": "hub", "data": "org/lines", "revision": hub.head("datasets:org/lines")}
    return {**place, "subset": "default", "split": "validation"}


def ask(url: str, home: Path, questions: list[tuple[str, dict[str, Any]]], **environment: str) -> list[Any]:
    """What comes of each source; the process must end well, whatever it left unread."""
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", **environment}
    command = [sys.executable, "-c", SCRIPT, json.dumps(questions)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_datasets_of_the_hub(hub, files, lines, tmp_path):
    commit = hub.head("datasets:org/name")
    train = {"kind": "hub", "data": "org/name", "revision": commit, "subset": "plain", "split": "train"}
    answers = ask(
        hub.url,
        tmp_path,
        [
            ("org/name", {}),
            ("hub:org/name", {"split": "test", "revision": commit}),
            ("org/name@main", {"column": "other"}),
            ("org/lines", {}),
            ("org/name@main", {"pin": True}),
            ("hub:org/name", {"pin": True, "revision": commit}),
            ("builtin:pydocs", {"pin": True}),
            ("org/name", {"split": "trian"}),
            ("org/name", {"subset": "code"}),
            ("org/name", {"revision": "v9"}),
            ("org/name", {"column": "body"}),
            ("org/none", {}),
            ("org/empty", {}),
            ("org/gated", {}),
            ("hub:a/b/c", {}),
        ],
    )
    expected = [
        [TEXTS[:3], train],
        [["a", "b"], {**train, "split": "test"}],
        [TEXTS[::-1][:3], train],
        [TEXTS[:3], lines_report(hub)],
        ["org/name", commit],
        ["hub:org/name", commit],
        ["builtin:pydocs", None],
    ]
    assert answers[:7] == expected
    for (kind, message), words in zip(
        answers[7:],
        [
            "org/name: has no split 'trian'; known: train, test",
            "BuilderConfig 'code' not found. Available: ['plain']",
            "dataset org/name has no revision 'v9'",
            "org/name, split train, train.parquet: no column 'body'; there is 'text', 'other'",
            "'org/none' is neither a file or folder on this machine nor a dataset that you can see on the Hub",
            "dataset org/empty: ",
            "is gated: accept its terms on its page, then `hf auth login`",
            "'a/b/c' is not the name of a dataset",
        ],
        strict=True,
    ):
        assert kind == "InputError" and words in message, message
    # Two columns were asked for in turn, three rows of each: the rest of the file did not travel.
    assert 0 < hub.served["train.parquet"] < 0.4 * len(files["train.parquet"])


def test_offline_the_cache_of_the_datasets_library_is_read(hub, lines, tmp_path):
    load = "import datasets; datasets.load_dataset('org/lines')"
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    subprocess.run([sys.executable, "-c", load], env={**os.environ, **settings}, check=True, capture_output=True)
    commit = hub.head("datasets:org/lines")
    questions: list[tuple[str, dict[str, Any]]] = [
        ("org/lines", {}),
        ("org/lines", {"revision": commit}),
        ("org/lines", {"revision": "main"}),
        ("org/name", {}),
        ("org/lines", {"pin": True}),
    ]
    found, same, other, absent, pinned = ask("http://127.0.0.1:9", tmp_path, questions, HF_HUB_OFFLINE="1")
    assert found == same == [TEXTS[:3], lines_report(hub)]
    assert pinned == ["org/lines", commit]
    assert other[0] == "MissingError" and f"is of commit {commit}, so that revision 'main' cannot be had" in other[1]
    assert absent[0] == "MissingError" and "offline mode is on, and it is not in the cache" in absent[1]


def test_a_hub_that_does_not_answer(tmp_path):
    ((kind, message),) = ask("http://127.0.0.1:9", tmp_path, [("org/name", {})])
    assert kind == "MissingError" and "dataset org/name: the Hub could not be asked (ConnectError: " in message
