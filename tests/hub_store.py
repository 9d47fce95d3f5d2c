"""What a Hub of the tests keeps in memory: repositories, commits, files; and the faults that it is told to have."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Fault:
    """What goes wrong with a call, `times` times, after it went well `after` times.

    status    answered with, with `headers`
    drop      bytes of what is sent that are read before the connection is cut
    cut       bytes of the answer that are sent before the connection is cut
    lost      the call does its work, and the connection is cut in place of the answer
    corrupt   what is stored or told is not what was sent: a byte of the file, or its hash in a tree
    """

    call: str
    status: int = 0
    times: int = 1
    after: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    code: str | None = None
    drop: int | None = None
    cut: int | None = None
    lost: bool = False
    corrupt: bool = False


@dataclass(frozen=True)
class File:
    """A file of a commit: the content's address and whether it is there by LFS."""

    oid: str
    lfs: bool


@dataclass
class Repo:
    """commits: sha -> its files; branches: name -> sha, also those of pull requests."""

    private: bool
    gated: str | bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)


class Store:
    """Repositories of models, by name, and what goes wrong when they are asked for."""

    def __init__(self, *, large: int = 10_000_000, multipart: int | None = None) -> None:
        self.large, self.multipart = large, multipart
        self.user, self.token = "alice", "hf_SecretOfTheTests0123456789abcdef"
        self.role = "write"  # of the token
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.calls: list[str] = []
        self.served: Counter[str] = Counter()  # bytes of each file, by its path, that went out
        self.accepted: set[str] = set()  # gated repositories whose terms the user has accepted
        self.elsewhere: str | None = None  # a host that LFS content is fetched from, by a redirect
        self.sent: list[str] = []  # LFS objects whose content came in whole
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    def fault(self, call: str, **how: Any) -> Fault:
        self.faults.append(Fault(call, **how))
        return self.faults[-1]

    def add(self, name: str, files: Mapping[str, bytes], *, private: bool = False, gated: str | bool = False) -> str:
        """A repository with one commit; returns it."""
        self.repos[name] = Repo(private, gated)
        stored = {path: self.store(content, path.endswith(".safetensors")) for path, content in files.items()}
        return self.commit(name, "main", stored, set(), "first")

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        found = self.find(name, revision)
        return {path: self.blobs[file.oid] for path, file in found.items()}

    def head(self, name: str, branch: str = "main") -> str:
        return self.repos[name].branches[branch]

    def find(self, name: str, revision: str) -> dict[str, File]:
        repo = self.repos[name]
        return repo.commits[repo.branches.get(revision, revision)]

    def store(self, content: bytes, lfs: bool) -> File:
        oid = hashlib.sha256(content).hexdigest() if lfs else git_blob(content)
        self.blobs[oid] = content
        return File(oid, lfs)

    def commit(self, name: str, branch: str, changed: Mapping[str, File], gone: set[str], message: str) -> str:
        repo = self.repos[name]
        parent = repo.branches.get(branch)
        files = {**(repo.commits[parent] if parent else {}), **changed}
        files = {path: file for path, file in files.items() if path not in gone}
        sha = hashlib.sha1(repr((parent, len(repo.commits), sorted(files), message)).encode()).hexdigest()
        repo.commits[sha], repo.branches[branch] = files, sha
        return sha


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
