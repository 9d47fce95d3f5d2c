"""From what a recipe calls a model to a folder with its files."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import InputError, MissingError
from quantkit.hub_calls import Calls
from quantkit.hub_files import HubFiles, Known
from quantkit.hub_shards import HubShards
from quantkit.progress import Progress, Silent

if TYPE_CHECKING:
    from quantkit.checkpoint import Checkpoint

ASSETS = Path(__file__).parent / "assets"
BUILTIN = "builtin:"
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.py", "LICENSE*", "*.tiktoken")  # fetched with the config
CONFIG = "config.json"


@dataclass(frozen=True)
class Source:
    """A model's files on this machine. For a model of the Hub, the weights come when they are read.

    model     a folder, builtin:NAME, or org/name without revision
    revision  the Hub commit, None for a folder
    shards    of a model of the Hub
    """

    model: str
    folder: Path
    revision: str | None = None
    shards: HubShards | None = None

    @property
    def name(self) -> str:
        """Short name for output folders: the last part of the id."""
        return self.model.removeprefix(BUILTIN).split("@")[0].rstrip("/").split("/")[-1]

    @property
    def pinned(self) -> str:
        """What a recipe calls exactly this model: org/name@commit, or the folder."""
        return self.model if self.revision is None else f"{self.model}@{self.revision}"

    def checkpoint(self) -> Checkpoint:
        """The weights, unread. Raises InputError for what is missing, truncated or not safetensors."""
        from quantkit.checkpoint import Checkpoint

        return Checkpoint.open(self.folder, self.shards)

    def files(self) -> list[Path]:
        """Every file that is not hidden, relative to the folder, in a fixed order; of the Hub, but those of `left`."""
        from quantkit.checkpoint import is_other_weights, other_files

        if self.shards is None:
            return list(other_files(self.folder))
        found = (Path(path) for path in sorted(self.shards.files.known))
        return [path for path in found if not _hidden(path) and (is_small(str(path)) or is_other_weights(path))]

    def left(self) -> dict[str, str] | None:
        """Files on the Hub that are not fetched, with the reason; None of a folder."""
        if self.shards is None:
            return None
        known, there = self.shards.files.known, {path.as_posix() for path in self.files()}
        hidden, other = "hidden: not a part of the model", "not fetched: neither config, tokenizer, code nor text"
        return {path: hidden if _hidden(Path(path)) else other for path in sorted(known) if path not in there}

    def fingerprint(self) -> str:
        """sha256 of config.json and every shard's header and size: tells models apart without reading the weights."""
        digest = hashlib.sha256((self.folder / CONFIG).read_bytes())
        for name, size, header in self.checkpoint().headers():
            digest.update(f"{name} {size} ".encode() + header)
        return digest.hexdigest()

    def stamp(self) -> dict[str, str]:
        """Size and time of config.json and every shard: tells whether a file was written to since."""
        found = {}
        for file in [self.folder / CONFIG, *sorted(p for p in self.folder.glob("*.safetensors") if p.is_file())]:
            stat = file.stat()
            time = datetime.fromtimestamp(stat.st_mtime_ns // 10**9, timezone.utc)
            found[file.name] = f"{stat.st_size} bytes of {time:%Y-%m-%d %H:%M:%S}.{stat.st_mtime_ns % 10**9:09d}"
        return found

    def close(self) -> None:
        """Ends what is being fetched; deletes fetched shards where that was asked for."""
        if self.shards is not None:
            self.shards.close()


def resolve(model: str, *, delete_shards: bool = False, progress: Progress | None = None) -> Source:
    """Finds a model: `builtin:NAME`, a folder, a Hub id, or a Hub id with `@revision`.

    A Hub model's revision is settled to a commit, and its small files go to the Hub cache; weights are fetched as they
    are read, pickles never.

    delete_shards  of a Hub model: what was fetched is deleted when it is no longer needed
    Raises InputError when there is no such model, MissingError when the Hub cannot be reached.
    """
    if model.startswith(BUILTIN):
        folder = ASSETS / model.removeprefix(BUILTIN)
        if not os.path.isfile(folder / CONFIG) or folder.parent != ASSETS:
            known = ", ".join(sorted(BUILTIN + p.parent.name for p in ASSETS.glob("*/config.json")))
            raise InputError(f"no built-in model is named {model!r}; known: {known}")
        return Source(model, folder)
    folder = _expanded(model)
    if os.path.isdir(folder):  # unlike Path.is_dir, False for a name that is too long to be one
        if not (folder / CONFIG).is_file():
            raise InputError(f"{folder}: no config.json, so it is not a model folder")
        return Source(model, folder)
    name, _, revision = model.partition("@")
    if os.path.exists(folder) or not REPO_ID.fullmatch(name) or name.startswith("."):
        raise InputError(
            f"model {model!r} is neither a folder on this machine nor a Hub id (org/name or org/name@revision)"
        )
    progress = progress or Silent()
    files = open_files(name, revision or None, progress)
    _check(name, files.known)
    return Source(name, files.folder, files.commit, HubShards(files, progress, delete=delete_shards))


def _expanded(model: str) -> Path:
    try:
        return Path(model).expanduser()
    except (RuntimeError, ValueError) as e:  # ~name of nobody, a NUL in it
        raise InputError(f"model {model!r}: {e}") from None


def is_small(path: str) -> bool:
    """Whether a file of a repository is fetched together with its config."""
    return any(fnmatchcase(path, pattern) for pattern in SMALL)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def open_files(name: str, revision: str | None, progress: Progress) -> HubFiles:
    """A repository of the Hub at the commit that `revision` is now, its small files in the cache; offline, the cache's.

    revision  a branch, tag or commit; None: main
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return _cached(name, revision)
    calls = Calls(get_token(), progress, reading=True)
    commit, known = _listed(name, revision, calls)
    small = [path for path in sorted(known) if is_small(path) and not _hidden(Path(path))]
    if CONFIG not in known:
        raise InputError(f"{name} on the Hub has no config.json, so it is not a transformers model")
    folder = _folder(name, revision or constants.DEFAULT_REVISION, commit, calls)
    files = HubFiles(name, commit, folder, known, calls)
    if known[CONFIG].fault(folder / CONFIG) is not None:
        (folder / CONFIG).unlink()  # fetched again, and looked at
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(files.fetch, small))
    return files


def _listed(name: str, revision: str | None, calls: Calls) -> tuple[str, dict[str, Known]]:
    """The commit that a revision is now, and what the Hub says of each of its files."""
    from huggingface_hub import HfApi, RepoFile
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def ask() -> str:
        try:
            return str(HfApi().model_info(name, revision=revision).sha)
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
        except HfHubHTTPError:
            raise
        except (HTTPError, OSError) as e:
            why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
            raise MissingError(
                f"{name}: no such folder, and the Hub could not be asked ({why}); HF_HUB_OFFLINE=1 takes what is in "
                "the cache"
            ) from None

    commit = calls(f"look up {name}", ask)
    tree = calls(f"list {name}", lambda: list(HfApi().list_repo_tree(name, recursive=True, revision=commit)))
    files = [entry for entry in tree if isinstance(entry, RepoFile)]
    for path in (Path(entry.path) for entry in files):
        if path.is_absolute() or ".." in path.parts:
            raise InputError(f"{name}: holds a file called {str(path)!r}, which is no path inside it")
    return commit, {f.path: Known(f.size, f.lfs.sha256 if f.lfs else None, f.blob_id) for f in files}


def _folder(name: str, revision: str, commit: str, calls: Calls) -> Path:
    """The commit's folder in the cache, with its config.json."""
    from huggingface_hub import hf_hub_download

    what = f"fetch {CONFIG} of {name}"
    # By the branch's name first: the cache then knows its commit, for when the Hub cannot be asked.
    found = Path(calls(what, hf_hub_download, name, CONFIG, revision=revision)).parent
    return found if found.name == commit else Path(calls(what, hf_hub_download, name, CONFIG, revision=commit)).parent


def _cached(name: str, revision: str | None) -> HubFiles:
    """What the cache has of a revision: its files, and those that its index names."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    wanted = revision or constants.DEFAULT_REVISION
    try:
        found = try_to_load_from_cache(name, CONFIG, revision=wanted)
    except (HFValidationError, ValueError, OSError) as e:  # a NUL in the revision, or more than a path holds
        raise InputError(f"model {name!r}, revision {wanted!r}, is not a Hub id: {e}") from None
    if not isinstance(found, str):
        raise MissingError(
            f"{name}: offline mode is on (HF_HUB_OFFLINE), and config.json of {wanted} is not in the cache "
            f"{constants.HF_HUB_CACHE}; go online once, or name a folder that holds the model"
        )
    folder = Path(found).parent
    known = {path.relative_to(folder).as_posix(): Known() for path in folder.rglob("*") if path.is_file()}
    index = folder / constants.SAFETENSORS_INDEX_FILE
    if index.is_file():
        named = read_json(index).get("weight_map")
        known = {**{str(x): Known() for x in (named.values() if isinstance(named, dict) else ())}, **known}
    elif not any(path.endswith(".safetensors") for path in known):
        known[constants.SAFETENSORS_SINGLE_FILE] = Known()
    return HubFiles(name, folder.name, folder, known)


def _check(name: str, known: Mapping[str, Known]) -> None:
    """Raises InputError for a repository without safetensors."""
    if not any(path.endswith(".safetensors") and "/" not in path for path in known):
        pickles = [path for path in sorted(known) if path.endswith((".bin", ".pt", ".pth"))]
        why = (
            f"its weights are pickles ({', '.join(pickles[:2])}), which are refused" if pickles else "it has no weights"
        )
        raise InputError(f"{name} on the Hub has no safetensors: {why}")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError with the file and the place of the fault."""
    try:
        text = file.read_text("utf-8")
        content = json.loads(text)
        if "\\u" in text:
            json.dumps(content, ensure_ascii=False).encode()  # half of a surrogate pair is in no file and on no screen
    except (ValueError, OSError) as e:
        raise InputError(f"{file}: not readable as JSON ({e})") from None
    except RecursionError:
        raise InputError(f"{file}: not readable as JSON (nested too deeply)") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds a {type(content).__name__} where an object is expected")
    return content
