"""Where texts come from: built-in ones, files and folders, the Hub, or a Python iterable; one document at a time.

Nothing is read before it is asked for, so 128 rows of a file of gigabytes cost what 128 rows cost. The exception is
.json, which is one value and is read whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.calibration import hub, parquet
from quantkit.calibration.chat import Message, kind, messages, text_of
from quantkit.errors import InputError
from quantkit.hub import ASSETS, BUILTIN

BUILTIN_TEXTS = {"pydocs": "pydocs-calibration.jsonl", "pydocs-heldout": "pydocs-heldout.jsonl"}
COLUMNS = ("text", "messages", "conversations")
HUB = "hub:"
# What a recipe says of data that came from Python: they are not in the recipe, so it cannot give them again.
PYTHON = "python:iterable"

_DATASET = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_PART = 4_000_000  # characters of a .txt file that make a document
_HASHED = 2**30  # larger files are known by their size: a hash would read them whole
_WINDOW, _WINDOW_CHARACTERS = 10_000, 100_000_000

Record = tuple[Any, str]
Records = Generator[Record, None, None]


@dataclass(frozen=True)
class Document:
    """A text, a chat, or None where a record has neither; and its place, for errors."""

    content: str | list[Message] | None
    where: str

    @property
    def texts(self) -> list[str]:
        """The text, or what each message says."""
        if isinstance(self.content, list):
            return [text_of(message) for message in self.content]
        return [] if self.content is None else [self.content]


Documents = Generator[Document, None, None]


@dataclass(frozen=True)
class Source:
    """Documents, to be gone through once, and what is known of their origin; more of it when they have been read."""

    name: str
    documents: Documents
    report: dict[str, Any] = field(default_factory=dict)


def open_source(
    data: str,
    *,
    subset: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    column: str | None = None,
) -> Source:
    """Documents of `builtin:NAME`, a file or folder on this machine, or a dataset of the Hub.

    .jsonl    a record a line        .json  a list of records
    .parquet  a record a row         .txt   one document; one of more than 4 million characters is cut at a line's end

    A record is a text, a list of messages, or an object that has one of them under `column` (None: the first of text,
    messages and conversations that is there). A folder stands for all such files in it, by name; with a subset or a
    split it is read by the datasets library, as a copy of a Hub repository. `org/name@revision` is short for revision.
    Raises InputError when there is no such source, MissingError when the Hub cannot be asked. What is wrong with a
    record is raised when its turn comes, with file and line, entry or row.
    """
    if data == PYTHON:
        raise InputError(
            "the calibration data of this recipe came from Python; give them again with calibration_data, or name a "
            "file or dataset as calibration.data"
        )
    of_hub = {"subset": subset, "split": split, "revision": revision}
    if data.startswith(BUILTIN):
        name = data.removeprefix(BUILTIN)
        if name not in BUILTIN_TEXTS:
            known = ", ".join(BUILTIN + n for n in BUILTIN_TEXTS)
            raise InputError(f"no built-in text is named {data!r}; known: {known}")
        return _files(data, [ASSETS / "text" / BUILTIN_TEXTS[name]], column)
    path = Path(os.path.expanduser(data))
    if data.startswith(HUB) or not os.path.exists(path):  # also False for what cannot be a path
        return _of_hub(data, column, **of_hub)
    if revision is not None:
        raise InputError(f"{data}: is on this machine, so it has no revision; leave revision out, or write {HUB}{data}")
    if not path.is_dir():
        _refuse(data, "a file", of_hub)
        if path.suffix not in READERS:
            raise InputError(f"{data}: unknown kind of text {path.suffix!r}; known: {', '.join(READERS)}")
        return _files(data, [path], column)
    if subset is not None or split is not None:
        return _of_dataset(hub.open_folder(path, subset, split), column)
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        raise InputError(
            f"{data}: was written by save_to_disk of the datasets library; write it with to_parquet, or give what "
            "load_from_disk returns as calibration_data"
        )
    inside = (f for f in path.rglob("*") if f.suffix in READERS and f.is_file())
    found = sorted(f for f in inside if not any(p.startswith(".") for p in f.relative_to(path).parts))
    if not found:
        raise InputError(f"{data}: this folder holds no file of the kinds {', '.join(READERS)}")
    return _files(data, found, column)


def from_iterable(items: Iterable[Any], column: str | None = None) -> Source:
    """Documents of a Python iterable: each item a text, a list of messages, or a mapping as in `open_source`."""
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        raise InputError(
            f"calibration_data is {kind(items)}; expected an iterable of texts or lists of messages "
            "(a path or the name of a dataset is the recipe's calibration.data)"
        )
    records = ((item, f"calibration_data, item {i}") for i, item in enumerate(items))
    return Source(PYTHON, _documents(records, column), {"kind": "python", "data": PYTHON})


def shuffled(documents: Iterable[Document], seed: int) -> Documents:
    """The documents in an order drawn by `seed`: each the next of a window, which is all of a source that fits in it.

    The window holds 10,000 documents or 100 million characters.
    """
    draw = random.Random(seed)
    window: list[Document] = []
    size = 0
    for document in documents:
        window.append(document)
        size += sum(map(len, document.texts))
        while len(window) > _WINDOW or size > _WINDOW_CHARACTERS:
            k = draw.randrange(len(window))
            window[k], window[-1] = window[-1], window[k]
            chosen = window.pop()
            size -= sum(map(len, chosen.texts))
            yield chosen
    draw.shuffle(window)
    yield from window


def _refuse(data: str, what: str, options: Mapping[str, str | None]) -> None:
    for key, value in options.items():
        if value is not None:
            raise InputError(f"{data}: is {what}, which has no {key} {value!r}; leave {key} out")


def pin(data: str, *, subset: str | None = None, split: str | None = None, revision: str | None = None) -> str | None:
    """The commit that a dataset of the Hub is at now, of its branch main or `revision`; None for other sources.

    Offline, the commit that is in the cache. Raises as `open_source`.
    """
    if data == PYTHON or data.startswith(BUILTIN):
        return None
    if not data.startswith(HUB) and os.path.exists(os.path.expanduser(data)):
        return None
    return hub.commit_of(*_named(data, revision), subset, split)


def _named(data: str, revision: str | None) -> tuple[str, str | None]:
    """Name and revision of a dataset of the Hub."""
    name = data.removeprefix(HUB)
    local = Path(name).suffix in READERS or not _DATASET.fullmatch(name) or name.startswith(".")
    if local and not data.startswith(HUB):
        raise InputError(
            f"calibration data {data!r} is not a file on this machine, and not the name of a dataset (org/name)"
        )
    name, _, short = name.partition("@")
    if short and revision not in (None, short):
        raise InputError(f"{data}: names revision {short!r}, and the key revision says {revision!r}; keep one of them")
    return name, short or revision


def _of_hub(data: str, column: str | None, subset: str | None, split: str | None, revision: str | None) -> Source:
    name, revision = _named(data, revision)
    return _of_dataset(hub.open_hub(name, subset, split, revision), column)


def _of_dataset(found: hub.Dataset, column: str | None) -> Source:
    return Source(found.name, _documents(found.rows(_columns(column)), column), found.report)


def _files(data: str, files: list[Path], column: str | None) -> Source:
    """The documents of files; each is noted in the report when it is opened."""
    opened: list[dict[str, Any]] = []

    def read() -> Records:
        for file in files:
            try:
                opened.append(_identity(file))
                yield from READERS[file.suffix](file, column)
            except OSError as e:
                raise InputError(f"{file}: cannot be read ({e.strerror or e})") from None

    report = {"kind": "builtin" if data.startswith(BUILTIN) else "files", "data": data, "files": opened}
    return Source(data, _documents(read(), column), report)


def _identity(file: Path) -> dict[str, Any]:
    """Name, size and hash of a file; no hash for one of more than a gibibyte."""
    size = file.stat().st_size
    if size > _HASHED:
        return {"name": file.name, "bytes": size, "sha256": None}
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while part := f.read(1 << 20):
            digest.update(part)
    return {"name": file.name, "bytes": size, "sha256": digest.hexdigest()}


def _documents(records: Records, column: str | None) -> Documents:
    """What the records say. Closing it closes what they are read from."""
    with closing(records):
        for record, where in records:
            yield _document(record, where, column)


def _document(record: Any, where: str, column: str | None) -> Document:
    """What a record says, found under the column or by its kind."""
    value, where_value = record, where
    if isinstance(record, Mapping):
        names = _columns(column)
        present = [name for name in names if name in record]
        if not present:
            raise InputError(f"{where}: {parquet.no_column(names, record)}")
        name = next((name for name in present if record[name] is not None), present[0])
        value, where_value = record[name], f"{where}, column {name!r}"
    elif column is not None and record is not None:
        raise InputError(f"{where}: holds {kind(record)}, so it has no column {column!r}; leave column out")
    if value is None or isinstance(value, str):
        return Document(value, where)
    if isinstance(value, list | tuple | Mapping):
        return Document(messages(value, where_value), where)
    raise InputError(f"{where_value}: holds {kind(value)} where a text or a list of messages is expected")


def _columns(column: str | None) -> tuple[str, ...]:
    return COLUMNS if column is None else (column,)


# Readers: records of a file, each with its place. `column` is for those that can leave the others unread.


def _jsonl(file: Path, column: str | None) -> Records:
    with file.open("rb") as f:
        for i, line in enumerate(f, 1):
            where = f"{file}, line {i}"
            text = _decode(line, where).strip().removeprefix("\ufeff")
            if text:
                yield _parse(text, where), where


def _json(file: Path, column: str | None) -> Records:
    with file.open("rb") as f:
        entries = _parse(_decode(f.read(), str(file)).removeprefix("\ufeff"), str(file))
    if not isinstance(entries, list):
        raise InputError(f"{file}: holds {kind(entries)} where a list of documents is expected")
    for i, entry in enumerate(entries):
        yield entry, f"{file}, entry {i}"


def _txt(file: Path, column: str | None) -> Records:
    if column is not None:
        raise InputError(f"{file}: is plain text, so it has no column {column!r}; leave column out")
    lines: list[str] = []
    size, parts = 0, 0
    with file.open("rb") as f:
        for i, line in enumerate(f, 1):
            text = _decode(line, f"{file}, line {i}")
            lines.append(text)
            size += len(text)
            if size >= _PART:
                yield "".join(lines).removeprefix("\ufeff"), f"{file}, part {parts}"
                lines, size, parts = [], 0, parts + 1
    if lines or not parts:
        yield "".join(lines).removeprefix("\ufeff"), f"{file}, part {parts}" if parts else str(file)


def _parquet(file: Path, column: str | None) -> Records:
    yield from parquet.rows(file.open("rb"), str(file), _columns(column))


READERS: dict[str, Callable[[Path, str | None], Records]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _txt,
}


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"{where}: not readable as UTF-8 text (byte {e.start}: {e.reason})") from None


def _parse(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: not JSON ({e})") from None
