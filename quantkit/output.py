"""The output folder: built beside its final place under another name, and moved there only when it is whole.

OUT           absent, empty, or the finished output of an earlier run of the same recipe (or `overwrite`)
.OUT.partial  where the work happens, one run at a time; known by its lock file, anything else of that name is refused
  output      what becomes OUT
  journal     what is finished, and hidden: from where the same command goes on; see quantkit/resuming.py
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit import journal
from quantkit.checkpoint import is_other_weights, other_files
from quantkit.errors import InputError, MissingError
from quantkit.formats import CONFIG_FILES
from quantkit.hub import read_json
from quantkit.plan import Plan

CONFIG = "config.json"
SUMMARY = "quantkit.json"
RECIPE = "quantkit-recipe.yaml"
BENCH = "quantkit-bench.json"  # of quantkit bench --save
RESULTS = "results.json"
REPORT = "report.html"
TRY_NEXT = "quantkit-try-next.yaml"
OF_THE_OUTPUT = (RESULTS, REPORT, TRY_NEXT)
LOCK = ".quantkit-running"
OUTPUT = "output"
JOURNAL = "journal"


def check(out: Path, source: Path, recipe_yaml: str | None, *, overwrite: bool) -> None:
    """Refuses an output folder that is not ours to write. Raises InputError that says what is there.

    recipe_yaml  an output of this recipe is replaced; None: no output is, without `overwrite`
    """
    place, origin = out.resolve(), source.resolve()
    if place == origin or place in origin.parents or origin in place.parents:
        raise InputError(f"{out}: overlaps the source model's folder {source}; choose another --out")
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise InputError(f"{out}: is a file, not a folder; choose another --out")
    if not any(out.iterdir()):
        return
    if not (out / SUMMARY).is_file():
        raise InputError(f"{out}: exists and was not written by quantkit; choose another --out or move it away")
    if overwrite:
        return
    if recipe_yaml is None:
        raise InputError(f"{out}: holds another result; choose another --out, or --overwrite to replace it")
    recipe = out / RECIPE
    if not recipe.is_file() or recipe.read_text("utf-8") != recipe_yaml:
        raise InputError(
            f"{out}: holds the result of another recipe; choose another --out, or --overwrite to replace it"
        )


@contextmanager
def working(out: Path) -> Iterator[Path]:
    """Gives the folder of a run, locked, with whatever an earlier run left; its `output` becomes `out` at a good end.

    When the body does not end well, everything stays as it is, if there is a journal, and is removed if there is none.
    """
    folder = out.parent / f".{out.name}.partial"
    lock = _acquire(folder)
    try:
        if not (folder / OUTPUT).exists() and (out / SUMMARY).is_file():
            empty(folder)  # killed at the very end: the output is in its place, this was left to be removed
        yield folder
        _replace(out, folder / OUTPUT)
        discard(folder)
    except BaseException:
        if not journal.exists(folder / JOURNAL):
            discard(folder)
        raise
    finally:
        os.close(lock)


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Gives a fresh folder to write in; moves it to `out` when the body ends well, removes it when it does not.

    Raises InputError when an unfinished run for `out` could be continued.
    """
    with working(out) as folder:
        if journal.exists(folder / JOURNAL):
            raise InputError(
                f"{folder}: holds an unfinished run of quantkit quantize; end that first by the same command, remove "
                "the folder, or choose another --out"
            )
        empty(folder)
        (folder / OUTPUT).mkdir()
        yield folder / OUTPUT


def empty(folder: Path) -> None:
    """Removes what is in a folder, but for the lock."""
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def discard(folder: Path) -> None:
    """Removes the folder of a run. The lock goes last: what a kill leaves meanwhile is still known as a leftover."""
    empty(folder)
    shutil.rmtree(folder)


def _acquire(folder: Path) -> int:
    """Makes the folder, with a lock in it that another run can see and that ends with this process."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not (folder / LOCK).exists() and any(folder.iterdir()):
            raise InputError(f"{folder}: exists and is not a leftover of quantkit; move it away")
        folder.mkdir(exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except PermissionError as e:
        raise MissingError(f"{e.filename}: no permission to write here; choose another --out") from None
    except NotADirectoryError as e:
        raise InputError(f"{e.filename}: is a file, so no folder can be made in it; choose another --out") from None
    except OSError as e:
        raise MissingError(f"{folder.parent}: cannot be written to ({e.strerror}); choose another --out") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise InputError(
            f"{folder}: another run is writing this output; wait for it, or choose another --out"
        ) from None
    return handle


def _replace(out: Path, folder: Path) -> None:
    """Puts `folder` in the place of `out`, durably. The old one goes last: at any moment one of them is whole."""
    for path in folder.rglob("*"):
        journal.sync(path)
    journal.sync(folder)
    old = out.parent / f".{out.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(folder, out)
    journal.sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def copy_files(
    source: Path,
    into: Path,
    rewritten: Collection[Path],
    *,
    skip: Collection[str] = (),
    names: Iterable[Path] | None = None,
    left: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Copies what is neither weights nor a config that says how the source is quantized.

    rewritten  the source's weights that the output has in another form; other weights are listed as dropped
    skip       names that the caller writes itself
    names      the files that count, relative to `source`; None: all that are not hidden
    left       further files that are not on this machine, with the reason: listed as dropped
    Returns {"copied": [name], "dropped": [{"name", "reason"}]}.
    """
    copied: list[str] = []
    listed = source.iterdir() if left is None else ()
    hidden = sorted(p.name + "/" * p.is_dir() for p in listed if p.name.startswith("."))
    dropped = [{"name": name, "reason": "hidden: not a part of the model"} for name in hidden]
    for relative in other_files(source) if names is None else names:
        if str(relative) in skip:
            continue
        if str(relative) in OF_THE_OUTPUT:
            dropped.append({"name": str(relative), "reason": "tells of the source, not of the output"})
        elif is_other_weights(relative):
            if source / relative not in rewritten:
                dropped.append({"name": str(relative), "reason": "weights or an index of the source"})
        elif str(relative) in CONFIG_FILES:
            dropped.append({"name": str(relative), "reason": "says how the source was quantized, not the output"})
        elif str(relative) == BENCH:
            dropped.append({"name": str(relative), "reason": "how fast the source was, not the output"})
        else:
            (into / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / relative, into / relative)
            copied.append(str(relative))
    dropped += [{"name": name, "reason": reason} for name, reason in (left or {}).items()]
    return {"copied": copied, "dropped": dropped}


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes JSON whole or not at all."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(file: Path, content: str) -> None:
    """Writes a text whole or not at all."""
    fresh = file.with_name(f".{file.name}.new")
    with fresh.open("w", encoding="utf-8") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(fresh, file)


def write_others(plan: Plan, folder: Path, weights: list[str]) -> dict[str, Any]:
    """config.json with what was done, every other file of the source, and the format's own."""
    config = read_json(plan.source.folder / CONFIG)
    config["quantization_config"] = plan.config()
    if plan.untied:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict) and (part is config or "tie_word_embeddings" in part):
                part["tie_word_embeddings"] = False
    write_json(folder / CONFIG, config)
    sources = plan.skeleton.checkpoint.where.values()
    files = copy_files(
        plan.source.folder, folder, set(sources), skip=(CONFIG,), names=plan.source.files(), left=plan.source.left()
    )
    for name, content in plan.files().items():
        write_json(folder / name, content)
    return {"weights": weights, **files}
