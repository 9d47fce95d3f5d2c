"""Results of an original model, kept from one validation to the next: a second recipe then runs its own model only.

One JSON file for each result, named by the SHA-256 of everything that the result depends on, which also stands in it.
Nothing is unpickled. A file that cannot be read, or does not hold what its name says, is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.hub import Source

FORMAT = 1
CHUNK = 1 << 22
TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py")  # beside the weights: they change results


def default_folder() -> Path:
    """Where results are kept: `eval` in $QUANTKIT_CACHE, in $XDG_CACHE_HOME/quantkit, or in ~/.cache/quantkit."""
    if root := os.environ.get("QUANTKIT_CACHE"):
        return Path(root).expanduser() / "eval"
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root).expanduser() / "quantkit" / "eval"
    return Path.home() / ".cache" / "quantkit" / "eval"


def model_identity(source: Source) -> str:
    """What a model is, for a key: the commit of a Hub model, the SHA-256 of every file of a folder.

    A folder's weights are read (about a second for each GB and core): two trainings of one architecture differ in
    nothing else, so names, sizes and headers would take one's results for the other's.
    """
    if source.revision is not None:
        return f"{source.model.split('@')[0]}@{source.revision}"
    files = sorted({f for pattern in ("*.safetensors", *TEXT_FILES) for f in source.folder.glob(pattern)})
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_sha256, files))
    return _hash([[file.name, digest] for file, digest in zip(files, digests, strict=True)])


def key(parts: Mapping[str, Any]) -> str:
    """SHA-256 of plain JSON values, whatever their order. Raises TypeError or ValueError for what JSON cannot hold."""
    return _hash(parts)


@dataclass(frozen=True)
class ResultsCache:
    """A folder of results. It is made by the first `put`; `warn` gets a sentence where a file is bad or the disk is."""

    folder: Path = field(default_factory=default_folder)
    warn: Callable[[str], None] = warnings.warn

    def get(self, parts: Mapping[str, Any]) -> Any:
        """The value that was kept for these parts, or None."""
        file = self._file(parts)
        try:
            content = json.loads(file.read_text("utf-8"))
            same = content["format"] == FORMAT and content["parts"] == _plain(parts)
            if same and content["sha256"] == _hash(content["value"], strict=False):
                return content["value"]
            fault = "it does not hold what was written"
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as e:
            fault = f"{type(e).__name__}: {e}"
        self.warn(f"kept result {file} is not used ({fault}); it is computed again and rewritten")
        return None

    def put(self, parts: Mapping[str, Any], value: Any) -> None:
        """Keeps a JSON value; the file appears whole or not at all. A disk that refuses costs a warning, no error."""
        file = self._file(parts)
        content = {"format": FORMAT, "parts": parts, "sha256": _hash(value, strict=False), "value": value}
        text = json.dumps(content)
        scratch = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, scratch = tempfile.mkstemp(prefix=".", suffix=".part", dir=self.folder)
            with os.fdopen(handle, "w", encoding="utf-8") as f:
                f.write(text)
            os.replace(scratch, file)
            scratch = None
        except OSError as e:
            self.warn(f"a result could not be kept in {self.folder} ({e}); the next run computes it again")
        finally:
            if scratch is not None:
                Path(scratch).unlink(missing_ok=True)

    def _file(self, parts: Mapping[str, Any]) -> Path:
        return self.folder / f"{key(parts)}.json"


def _plain(value: Any) -> Any:
    """The value as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))


def _hash(value: Any, *, strict: bool = True) -> str:
    """`strict` refuses NaN, which equals nothing, in a key; a result may hold it."""
    text = json.dumps(value, sort_keys=True, allow_nan=not strict)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while chunk := f.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
