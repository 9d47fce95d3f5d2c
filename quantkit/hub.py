"""From what a recipe calls a model to a folder with its files."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from quantkit.errors import InputError, MissingError

ASSETS = Path(__file__).parent / "assets"
BUILTIN = "builtin:"
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A model's files on this machine. `revision` is the Hub commit, None for a folder."""

    model: str
    folder: Path
    revision: str | None = None

    @property
    def name(self) -> str:
        """Short name for output folders: the last part of the id, without revision."""
        return self.model.removeprefix(BUILTIN).split("@")[0].rstrip("/").split("/")[-1]

    def fingerprint(self) -> str:
        """sha256 of config.json and every shard's header and size: tells models apart without reading the weights."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in sorted(self.folder.glob("*.safetensors")):
            with file.open("rb") as f:
                length = int.from_bytes(f.read(8), "little")
                digest.update(f"{file.name} {file.stat().st_size} ".encode() + f.read(min(length, 1 << 27)))
        return digest.hexdigest()

    def stamp(self) -> dict[str, str]:
        """Size and time of config.json and every shard: tells whether a file was written to since."""
        found = {}
        for file in [self.folder / "config.json", *sorted(self.folder.glob("*.safetensors"))]:
            stat = file.stat()
            time = datetime.fromtimestamp(stat.st_mtime_ns // 10**9, timezone.utc)
            found[file.name] = f"{stat.st_size} bytes of {time:%Y-%m-%d %H:%M:%S}.{stat.st_mtime_ns % 10**9:09d}"
        return found


def resolve(model: str) -> Source:
    """Finds a model: `builtin:NAME`, a folder, a Hub id, or a Hub id with `@revision`.

    A Hub model's safetensors and small files are downloaded to the Hub cache; pickles are not.
    Raises InputError when there is no such model, MissingError when the Hub cannot be reached.
    """
    if model.startswith(BUILTIN):
        folder = ASSETS / model.removeprefix(BUILTIN)
        if not (folder / "config.json").is_file() or folder.parent != ASSETS:
            known = ", ".join(sorted(BUILTIN + p.parent.name for p in ASSETS.glob("*/config.json")))
            raise InputError(f"no built-in model is named {model!r}; known: {known}")
        return Source(model, folder)
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder}: no config.json, so it is not a model folder")
        return Source(model, folder)
    name, _, revision = model.partition("@")
    if folder.exists() or not REPO_ID.fullmatch(name) or name.startswith("."):
        raise InputError(
            f"model {model!r} is neither a folder on this machine nor a Hub id (org/name or org/name@revision)"
        )
    return _download(model, name, revision or None)


def _download(model: str, name: str, revision: str | None) -> Source:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.py", "LICENSE*", "*.tiktoken"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise InputError(f"{name} is gated: accept its terms on its page, then `hf auth login`") from None
    except RevisionNotFoundError:
        raise InputError(f"{name} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"model {name!r} is neither a folder on this machine nor a repository that you can see on the Hub; "
            "check the name, or `hf auth login` if it is private"
        ) from None
    except HFValidationError as e:
        raise InputError(f"model {name!r} is not a Hub id: {e}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as e:
        why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
        raise MissingError(f"{name}: no such folder, and the Hub could not be asked ({why})") from None
    if not (folder / "config.json").is_file():
        raise InputError(f"{name} on the Hub has no config.json, so it is not a transformers model")
    if not list(folder.glob("*.safetensors")):
        files = HfApi().list_repo_files(name, revision=revision)
        pickles = [f for f in files if f.endswith((".bin", ".pt", ".pth"))]
        why = (
            f"its weights are pickles ({', '.join(pickles[:2])}), which are refused" if pickles else "it has no weights"
        )
        raise InputError(f"{name} on the Hub has no safetensors: {why}")
    return Source(model, folder, folder.name)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError with the file and the place of the fault."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as e:
        raise InputError(f"{file}: not readable as JSON ({e})") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds a {type(content).__name__} where an object is expected")
    return content
