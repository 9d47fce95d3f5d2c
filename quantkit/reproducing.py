"""An output made again from the recipe beside it, against the commits that it names, and compared file by file.

What is compared with is a folder, or a repository on the Hub, of which only the hashes are asked for: its weights are
not fetched. Not compared are quantkit.json and the recipe, which say more than the bytes depend on, times, and on the
Hub the card.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import api, hub, output
from quantkit.checkpoint import other_files
from quantkit.errors import InputError, MissingError
from quantkit.hub_files import Known
from quantkit.progress import Progress, Silent
from quantkit.recipe import Recipe

SAME, DIFFERENT, MISSING, NEW = "same", "different", "not made again", "not there before"
ABOUT = (output.SUMMARY, output.RECIPE)
CARD = "README.md"


@dataclass(frozen=True)
class Reproduction:
    """files: name -> "same", or what is wrong. surroundings: versions, hardware and data that differ, in words."""

    place: str
    files: Mapping[str, str]
    surroundings: tuple[str, ...]

    @property
    def same(self) -> bool:
        return all(found == SAME for found in self.files.values())

    @property
    def message(self) -> str:
        """What came of it, in a sentence."""
        if self.same:
            return f"{self.place}: all {len(self.files)} files are the same, byte for byte"
        other = [name for name, found in self.files.items() if found != SAME]
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        why = "; ".join(self.surroundings) or "versions, hardware and calibration data are the same, so it is a bug"
        return f"{self.place}: {', '.join(other[:3])}{more} of {len(self.files)} files differ ({why})"


def reproduce(
    place: str | Path,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    delete_shards: bool = False,
    calibration_data: Iterable[Any] | None = None,
    progress: Progress | None = None,
) -> Reproduction:
    """Makes an output of quantkit again, without validation, and says which of its files have the same bytes.

    place   a folder that quantize wrote, or org/name or org/name@revision on the Hub
    out     where the copy is kept; by default it is made in a hidden folder, and removed
    delete_shards, calibration_data  as for `quantize`

    Raises InputError for what is no output, whose source has changed or which was converted; otherwise as `quantize`.
    """
    progress = progress or Silent()
    summary, recipe, known = _read(str(place), progress)
    recipe = _again(str(place), summary, recipe, progress)
    with _scratch(place, out) as scratch:
        done = api.quantize(
            recipe,
            out=scratch,
            device=device,
            delete_shards=delete_shards,
            calibration_data=calibration_data,
            progress=progress,
        )
        made = {path.as_posix() for path in other_files(done.out)}
        files = {name: _compared(known.get(name), done.out / name) for name in sorted(made | known.keys())}
    skipped = (*ABOUT, output.BENCH, *output.OF_THE_OUTPUT, *(() if Path(place).is_dir() else (CARD,)))
    files = {name: found for name, found in files.items() if name not in skipped}
    return Reproduction(str(place), files, tuple(_surroundings(summary, done.summary)))


def _read(place: str, progress: Progress) -> tuple[dict[str, Any], Recipe, dict[str, Known]]:
    """quantkit.json and recipe of an output, and the hashes of its files."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        missing = [name for name in ABOUT if not (folder / name).is_file()]
        known = {path.as_posix(): Known.of(folder / path) for path in other_files(folder)}
    else:
        name, _, revision = place.partition("@")
        if not hub.REPO_ID.fullmatch(name):
            raise InputError(
                f"{place}: is neither a folder on this machine nor a Hub id (org/name or org/name@revision)"
            )
        files = hub.open_files(name, revision or None, progress)
        missing = [name for name in ABOUT if name not in files.known]
        folder = files.folder
        for about in (x for x in ABOUT if x not in missing):
            files.fetch(about)
        known = {path: entry for path, entry in files.known.items() if not path.startswith(".")}
    if missing:
        raise InputError(f"{place}: holds no {missing[0]}, so it is no output of quantkit quantize")
    return hub.read_json(folder / output.SUMMARY), Recipe.load(folder / output.RECIPE), known


def _again(place: str, summary: dict[str, Any], recipe: Recipe, progress: Progress) -> Recipe:
    """The recipe without validation, for exactly the source that it was made from."""
    if summary.get("converted_from"):
        raise InputError(f"{place}: was converted from another format; reproduce what it was converted from")
    told = summary.get("source") or {}
    model = recipe.model
    if told.get("revision") and "@" not in model:
        model = f"{model}@{told['revision']}"
    source = hub.resolve(model, progress=progress)
    if told.get("fingerprint") not in (None, source.fingerprint()):
        raise InputError(
            f"{source.folder}: is not the model that {place} was made from (fingerprint {source.fingerprint()[:12]}, "
            f"expected {told['fingerprint'][:12]}); put the original there again"
        )
    return recipe.model_copy(update={"model": model, "validation": None})


@contextlib.contextmanager
def _scratch(place: str | Path, out: str | Path | None) -> Iterator[Path]:
    if out is not None:
        yield Path(out).expanduser()
        return
    parent = Path(place).expanduser().resolve().parent if Path(place).expanduser().is_dir() else Path.cwd()
    try:
        folder = tempfile.TemporaryDirectory(prefix=".quantkit-reproduce-", dir=parent)
    except OSError as e:
        raise MissingError(f"{parent}: cannot be written to ({e.strerror}); name a folder with --out") from None
    with folder as name:
        yield Path(name) / "again"


def _compared(known: Known | None, file: Path) -> str:
    if known is None:
        return NEW
    if not file.is_file():
        return MISSING
    fault = known.fault(file)
    return SAME if fault is None else f"{DIFFERENT}: {fault}"


def _surroundings(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What may be the reason for other bytes: "torch 2.12 then, 2.13 now"."""
    for part in ("versions", "hardware"):
        old, new = before.get(part) or {}, now.get(part) or {}
        for key in dict.fromkeys((*old, *new)):
            if old.get(key) != new.get(key):
                yield f"{key} {old.get(key, 'not noted')} then, {new.get(key, 'not noted')} now"
    if ((before.get("data") or {}).get("sha256")) != ((now.get("data") or {}).get("sha256")):
        yield "the calibration data give other tokens"
