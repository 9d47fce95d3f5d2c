"""A model's files on the Hub at one commit: what there is, parts of a file by range requests, whole files checked.

Whole files go to the cache of huggingface_hub, by its own client: redirects, Xet, login, a download that goes on where
its connection was cut. What arrived is compared with the Hub's hashes, and what differs is removed: no later run, nor
another program that reads the cache, takes it for the file.
"""

from __future__ import annotations

import errno
import hashlib
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import InputError, MissingError
from quantkit.hub_calls import Calls

LONGEST_HEADER = 100_000_000  # bytes; safetensors itself refuses longer ones


@dataclass(frozen=True)
class Known:
    """What the Hub says of a file: its size, and the sha256 of its content, or the id that git gives it. None: not."""

    size: int | None = None
    sha256: str | None = None
    blob: str | None = None

    @classmethod
    def of(cls, file: Path) -> Known:
        """What a file on this machine is."""
        return cls(file.stat().st_size, _digest(file, hashlib.sha256()))

    def fault(self, file: Path) -> str | None:
        """What is wrong with a file that should be this one."""
        size = file.stat().st_size
        if self.size is not None and size != self.size:
            return f"{size:,} bytes, not {self.size:,}"
        if self.sha256 is not None:
            found, wanted = _digest(file, hashlib.sha256()), self.sha256
        elif self.blob is not None:
            found, wanted = _digest(file, hashlib.sha1(b"blob %d\0" % size)), self.blob
        else:
            return None
        return None if found == wanted else f"its hash is {found[:12]}, not {wanted[:12]}"


class HubFiles:
    """The files of one model at one commit.

    name    org/name
    folder  of the commit in the cache
    known   every file of the commit, by path; offline, those in the cache
    calls   None offline
    """

    def __init__(
        self, name: str, commit: str, folder: Path, known: Mapping[str, Known], calls: Calls | None = None
    ) -> None:
        self.name, self.commit, self.folder, self.known = name, commit, folder, known
        self._calls = calls

    @property
    def online(self) -> bool:
        return self._calls is not None

    def here(self, path: str) -> Path | None:
        """The file, when it is in the cache in its full size."""
        file, size = self.folder / path, self.known[path].size
        return file if file.is_file() and size in (None, file.stat().st_size) else None

    def part(self, path: str, begin: int, end: int) -> bytes:
        """Bytes of a file, `end` not included; of one that is not in the cache, by a range request."""
        file = self.here(path)
        if file is not None:
            with file.open("rb") as f:
                f.seek(begin)
                return f.read(end - begin)
        content = self._asked(f"read the header of {path} of {self.name}", lambda: self._range(path, begin, end))
        if len(content) != end - begin:
            raise MissingError(
                f"{self.name}: of {path} the Hub sent {len(content):,} bytes where {end - begin:,} were asked for; "
                "it, or a proxy before it, does not keep to ranges"
            )
        return content

    def header(self, path: str) -> bytes:
        """The header of a safetensors file, its 8 bytes of length included. Raises InputError when it has none."""
        size = self.known[path].size
        first = self.part(path, 0, 8) if size is None or size >= 8 else b""
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > LONGEST_HEADER or (size is not None and 8 + length > size):
            raise InputError(f"{self.name}: {path} at {self.commit[:12]} is not a safetensors file ({size} bytes)")
        return first + self.part(path, 8, 8 + length)

    def fetch(self, path: str, stop: threading.Event | None = None) -> Path:
        """The whole file, from the cache, or into it.

        stop  ends the download when it is set
        Raises MissingError when the Hub cannot give it now, or the disk has no room; InputError when the Hub refuses.
        """
        if (file := self.here(path)) is not None:
            return file
        fault = None
        for _ in range(2):
            file = self._asked(f"fetch {path} of {self.name}", lambda: self._download(path, stop or threading.Event()))
            fault = self.known[path].fault(file)
            if fault is None:
                return file
            blob = file.resolve()
            file.unlink()
            blob.unlink(missing_ok=True)
        raise MissingError(
            f"{self.name}: {path} came damaged twice ({fault}) and was removed; try again later, or another network"
        )

    def delete(self, paths: Collection[str]) -> None:
        """Removes files of this commit from the cache, and their contents where no other commit has them."""
        from huggingface_hub import scan_cache_dir

        gone = {self.folder / path for path in paths}
        found = scan_cache_dir(self.folder.parents[2])
        there = (f for repo in found.repos for revision in repo.revisions for f in revision.files)
        found.delete_files(*(f for f in there if f.file_path in gone)).execute()

    def _asked(self, what: str, call: Callable[[], Any]) -> Any:
        if self._calls is None:
            missing = [path for path in sorted(self.known) if self.here(path) is None]
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise MissingError(
                f"{self.name}: offline mode is on (HF_HUB_OFFLINE), and these files of {self.commit[:12]} are not in "
                f"the cache: {', '.join(missing[:3])}{more}; go online once, or name a folder that holds the model"
            )
        return self._calls(what, call)

    def _range(self, path: str, begin: int, end: int) -> bytes:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        url = hf_hub_url(self.name, path, revision=self.commit)
        with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            if response.status_code == 200:  # the whole file is on its way: it may be gigabytes
                return b""
            response.read()
            hf_raise_for_status(response)
            return bytes(response.content)

    def _download(self, path: str, stop: threading.Event) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            again = (self.folder / path).exists()  # in another size than it should have
            return Path(
                hf_hub_download(
                    self.name, path, revision=self.commit, force_download=again, tqdm_class=_stoppable(stop)
                )
            )
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                size = self.known[path].size or 0
                raise MissingError(
                    f"no room for {path} of {self.name} ({size:,} bytes) in the cache {self.folder}; free some, "
                    "set HF_HUB_CACHE to a larger disk, or use --delete-shards"
                ) from None
            if "Consistency check failed" in str(e):  # the client's words for a size that is not the announced one
                raise MissingError(f"{self.name}: {path}: {' '.join(str(e).split())[:200]}") from None
            raise


def _digest(file: Path, digest: Any) -> str:
    with file.open("rb") as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return str(digest.hexdigest())


def _stoppable(stop: threading.Event) -> Any:
    """A progress bar of the client's, by which a download can be ended: nothing else of it is called meanwhile."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise MissingError("the download was given up: the run has ended")
            return super().update(n)

    return Bar
