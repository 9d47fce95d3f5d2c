"""One commit of all files to a branch of the Hub, looked at afterwards, and taken back when it is not what was sent."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import hub
from quantkit.errors import InputError, MissingError, QuantkitError
from quantkit.hub_calls import Calls, Failure

WEIGHTS = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True)
class Place:
    """Where a push goes. parent: the commit that it is made on; fresh: the branch is ours to make."""

    api: Any
    calls: Calls
    repo: str
    private: bool
    branch: str
    parent: str
    fresh: bool
    pull_request: bool

    @property
    def sends_to(self) -> str:
        """The branch that uploads are asked for on: there must be one."""
        return "main" if self.fresh else self.branch


@dataclass(frozen=True)
class PullRequest:
    revision: str
    url: str


def publish(where: Place, folder: Path, additions: list[Any], message: str) -> tuple[str, PullRequest | None]:
    """Makes the commit and looks at what the Hub has; puts the branch back when that is not what was sent."""
    before = _tree(where, where.parent)
    kept = {} if where.fresh or where.pull_request else _kept(where, before, additions)
    try:
        if where.fresh:
            what, make = f"make branch {where.branch}", where.api.create_branch
            where.calls(what, make, where.repo, branch=where.branch, revision=where.parent, exist_ok=True)
    except QuantkitError as e:
        raise _with_state(e, _unmade(where)) from None
    try:
        commit, pull_request = _commit(where, additions, before, message)
    except QuantkitError as e:
        raise _with_state(e, _unmade(where)) from None
    try:
        wrong = _differences(_tree(where, commit), additions)
        if wrong:
            raise MissingError(f"{where.repo}: the Hub's hash of {wrong[0]} is not that of the file; push again")
        _load_back(where, commit, folder)
    except QuantkitError as e:
        if pull_request is not None:
            state = f"branch {where.branch} is as it was; close {pull_request.url}"
        else:
            state = _unmade(where, commit) if where.fresh else _restored(where, commit, before, kept, additions)
        raise _with_state(e, state) from None
    return commit, pull_request


def _with_state(error: QuantkitError, state: str) -> QuantkitError:
    return type(error)(f"{error}; {state}")


def _tree(where: Place, commit: str) -> dict[str, Any]:
    """path -> what the Hub says of the file."""

    def read() -> list[Any]:
        return list(where.api.list_repo_tree(where.repo, recursive=True, revision=commit))

    return {x.path: x for x in where.calls(f"list the files of {where.repo}", read) if hasattr(x, "blob_id")}


def _commit(where: Place, additions: list[Any], before: dict[str, Any], message: str) -> tuple[str, PullRequest | None]:
    """One commit of all files, without weights of an earlier push that are in none of them."""
    from huggingface_hub import CommitOperationDelete

    ours = {x.path_in_repo for x in additions}
    stale = [path for path in before if path.endswith(WEIGHTS) and path not in ours]

    def make() -> tuple[str, PullRequest | None]:
        done = where.api.create_commit(
            where.repo,
            [*additions, *(CommitOperationDelete(path) for path in stale)],
            commit_message=message,
            revision=where.branch,
            parent_commit=where.parent,
            create_pr=where.pull_request,
        )
        opened = PullRequest(str(done.pr_revision), str(done.pr_url)) if done.pr_url else None
        return str(done.oid), opened

    def went_through(failure: Failure) -> tuple[str, None] | None:
        """The commit may have been made although its answer was lost: then the branch has just our files."""
        lost = failure.status is None or failure.status == 412 or failure.status >= 500
        if where.pull_request or not lost:
            return None
        try:
            asked = f"read branch {where.branch}"
            head = where.calls(asked, where.api.model_info, where.repo, revision=where.branch, once=True).sha
            same = head != where.parent and not _differences(_tree(where, head), additions)
        except QuantkitError:
            return None
        return (head, None) if same else None

    return where.calls(f"commit to {where.repo}", make, recovered=went_through)


def _differences(tree: dict[str, Any], additions: list[Any]) -> list[str]:
    """Paths that the Hub does not have, or has with another content."""
    return [x.path_in_repo for x in additions if not _same(tree.get(x.path_in_repo), x)]


def _same(entry: Any, addition: Any) -> bool:
    if entry is None or entry.size != addition.upload_info.size:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == addition.upload_info.sha256.hex())
    digest = hashlib.sha1(b"blob %d\0" % entry.size)  # as git names a file
    with addition.as_file() as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return bool(entry.blob_id == digest.hexdigest())


def _load_back(where: Place, commit: str, folder: Path) -> None:
    """Reads the config from the Hub, as whoever loads the model will."""
    with tempfile.TemporaryDirectory() as place:
        file = where.calls(
            f"read config.json of {where.repo} back",
            where.api.hf_hub_download,
            where.repo,
            "config.json",
            revision=commit,
            local_dir=place,
        )
        if Path(file).read_bytes() != (folder / "config.json").read_bytes():
            raise MissingError(f"{where.repo}: config.json came back with another content; push again")
        content = hub.read_json(Path(file))
        if "auto_map" not in content:  # else it takes the model's own code to read it, which is not run here
            from transformers import AutoConfig

            try:
                AutoConfig.from_pretrained(place)
            except Exception as e:
                raise InputError(f"{where.repo}: transformers does not load its config ({type(e).__name__})") from None


def _unmade(where: Place, *commits: str) -> str:
    """Removes a branch that was made for a push that failed; says how the repository is then. commits: of the push."""
    from huggingface_hub.errors import RevisionNotFoundError

    if not where.fresh:
        return f"branch {where.branch} of {where.repo} is as it was"

    def remove() -> bool:
        try:
            head = where.api.model_info(where.repo, revision=where.branch).sha
        except RevisionNotFoundError:
            return True
        if head in (where.parent, *commits):
            where.api.delete_branch(where.repo, branch=where.branch)
            return True
        return False

    try:
        gone = where.calls(f"remove branch {where.branch}", remove)
    except QuantkitError:
        return f"branch {where.branch} was made and could not be removed; remove it on the Hub"
    if not gone:
        return f"branch {where.branch} has commits of somebody else and is left as it is"
    return f"there is no branch {where.branch}, as before"


def _kept(where: Place, before: dict[str, Any], additions: list[Any]) -> dict[str, bytes]:
    """Small files that the commit replaces or removes: to put them back then takes no download."""
    ours = {x.path_in_repo: x for x in additions}
    found = {}
    with tempfile.TemporaryDirectory() as place:
        for path, entry in before.items():
            goes = not _same(entry, ours[path]) if path in ours else path.endswith(WEIGHTS)
            if goes and entry.lfs is None:
                what, get = f"read {path} of {where.repo}", where.api.hf_hub_download
                file = where.calls(what, get, where.repo, path, revision=where.parent, local_dir=place)
                found[path] = Path(file).read_bytes()
    return found


def _restored(where: Place, commit: str, before: dict[str, Any], kept: dict[str, bytes], additions: list[Any]) -> str:
    """Gives the branch the files that it had, in a further commit; says how the repository is then."""
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    ours = {x.path_in_repo for x in additions}
    large = [p for p, entry in before.items() if entry.lfs is not None and (p in ours or p.endswith(WEIGHTS))]

    def back() -> Any:
        operations = [
            *(CommitOperationDelete(path) for path in sorted(ours - before.keys())),
            *(CommitOperationAdd(path, content) for path, content in kept.items()),
            *(CommitOperationCopy(path, path, src_revision=where.parent) for path in large),
        ]
        return where.api.create_commit(
            where.repo,
            operations,
            commit_message="The files before a push that failed",
            revision=where.branch,
            parent_commit=commit,
        )

    try:
        where.calls("put the branch back", back)
    except QuantkitError:
        return (
            f"branch {where.branch} is at commit {commit}, which was not checked, and could not be put back; "
            f"it was at {where.parent}"
        )
    return f"branch {where.branch} has the files of before again"
