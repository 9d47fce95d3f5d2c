"""Datasets of the Hub, streamed through the datasets library: only what the rows need travels.

The commit is settled first, so that the report can name it and a branch that moves does not change what is read.
Offline, what the datasets library has in its cache is read.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.calibration import parquet
from quantkit.errors import InputError, MissingError

Rows = Generator[tuple[dict[str, Any], str], None, None]


@dataclass(frozen=True)
class Dataset:
    """One split of a dataset. `rows(columns)` gives its rows, read as they are asked for, each with its place."""

    name: str
    rows: Callable[[tuple[str, ...]], Rows]
    report: dict[str, Any]


def open_hub(name: str, subset: str | None, split: str | None, revision: str | None) -> Dataset:
    """A dataset of the Hub. Raises InputError when it has no such revision, subset or split, is gated or is not there;
    MissingError when the Hub cannot be asked, or, offline, when nothing is in the cache.
    """
    datasets = _library()
    offline = bool(datasets.config.HF_HUB_OFFLINE)
    commit = None if offline else _commit(name, revision)
    with _explained(name, offline):
        builder = datasets.load_dataset_builder(f"hf://datasets/{name}", subset, revision=commit)
    if offline:
        commit = str(builder.hash)
        if revision is not None and not commit.startswith(revision):
            raise MissingError(
                f"{name}: offline, and the copy in the cache is of commit {commit}, so that revision {revision!r} "
                "cannot be had; name this commit, or go online"
            )
    return _streamed(builder, name, split, offline, {"kind": "hub", "data": name, "revision": commit})


def commit_of(name: str, revision: str | None, subset: str | None = None, split: str | None = None) -> str:
    """The commit of a dataset's revision; offline, that of the copy in the cache. Raises as `open_hub`."""
    if not _library().config.HF_HUB_OFFLINE:
        return _commit(name, revision)
    return str(open_hub(name, subset, split, revision).report["revision"])


def open_folder(folder: Path, subset: str | None, split: str | None) -> Dataset:
    """A folder on this machine that is laid out as a dataset's repository on the Hub."""
    datasets = _library()
    with _explained(str(folder), False):
        builder = datasets.load_dataset_builder(str(folder), subset)
    return _streamed(builder, str(folder), split, False, {"kind": "folder", "data": str(folder)})


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingError("reading a dataset needs the package datasets: pip install datasets") from None
    return datasets


def _streamed(builder: Any, name: str, split: str | None, offline: bool, report: dict[str, Any]) -> Dataset:
    with _explained(name, offline):
        files = dict(builder.config.data_files or {})
        # The library's reader of parquet fetches whole row groups, in threads that outlive it; ours does not.
        direct = bool(files) and all(str(f).endswith(".parquet") for found in files.values() for f in found)
        streams = files if direct else dict(builder.as_streaming_dataset())
    splits = {str(key): value for key, value in streams.items()}
    known = ", ".join(splits) or "none"
    if split is None:
        if "train" not in splits and len(splits) != 1:
            raise InputError(f"{name}: name one of its splits with the key split: {known}")
        split = "train" if "train" in splits else next(iter(splits))
    if split not in splits:
        raise InputError(f"{name}: has no split {split!r}; known: {known}")
    found, where = splits[split], f"{name}, split {split}"

    def rows(columns: tuple[str, ...]) -> Rows:
        with _explained(name, offline):
            if direct:
                for file in found:
                    place = str(file).rpartition(f"@{report.get('revision')}/")[2]
                    yield from parquet.rows(_open(str(file)), f"{where}, {place}", columns)
                return
            with closing(iter(found)) as records:
                for i, record in enumerate(records):
                    yield record, f"{where}, row {i}"

    return Dataset(where, rows, {**report, "subset": builder.config.name, "split": split})


def _open(file: str) -> Any:
    """A file of the Hub or of this machine, of which only what is asked for is fetched."""
    if not file.startswith("hf://"):
        return open(file, "rb")
    from huggingface_hub import HfFileSystem

    return HfFileSystem().open(file, "rb", block_size=1 << 20)


def _commit(name: str, revision: str | None) -> str:
    """The commit of a revision, from the Hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        found = HfApi().dataset_info(name, revision=revision, timeout=60)
    except GatedRepoError:
        raise _gated(name) from None
    except RevisionNotFoundError:
        raise InputError(f"dataset {name} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{name!r} is neither a file or folder on this machine nor a dataset that you can see on the Hub; check "
            "the name, or `hf auth login` if it is private"
        ) from None
    except HFValidationError as e:
        raise InputError(f"{name!r} is not the name of a dataset: {_line(e)}") from None
    except (HTTPError, OSError) as e:
        raise _unreachable(name, e) from None
    return str(found.sha)


@contextmanager
def _explained(name: str, offline: bool) -> Iterator[None]:
    """What goes wrong inside the datasets library, as a sentence."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError
    from pyarrow import ArrowException

    try:
        yield
    except FileNotFoundError as e:  # also a dataset without files that the library knows
        if "is a gated dataset" in str(e):  # its own words go on with another address
            raise _gated(name) from None
        raise InputError(f"dataset {name}: {_line(e)}") from None
    except (HTTPError, OSError) as e:
        if offline:
            raise MissingError(
                f"dataset {name}: offline mode is on, and it is not in the cache of the datasets library; go online "
                "once, or name a file or folder that holds it"
            ) from None
        raise _unreachable(name, e) from None
    except (DatasetsError, ArrowException, ValueError, RuntimeError, NotImplementedError, ImportError) as e:
        raise InputError(f"dataset {name}: {_line(e)}") from None


def _gated(name: str) -> InputError:
    return InputError(f"dataset {name} is gated: accept its terms on its page, then `hf auth login`")


def _unreachable(name: str, error: Exception) -> MissingError:
    return MissingError(f"dataset {name}: the Hub could not be asked ({type(error).__name__}: {_line(error)})")


def _line(error: Exception) -> str:
    """The error's own words on one line, cut short when long."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else f"{words[:297]}..."
