"""From a folder that quantkit wrote to a repository on the Hub: all of it, checked, or nothing.

    quantkit.push("out/pydocs-llama-7m-W4A16", private=True)      # to pydocs-llama-7m-W4A16 of whoever is logged in

Weights go up first, as objects that no branch names. One commit then makes the branch name them all, on top of the
commit that was read at the start, so nobody else's change is lost. The Hub's hashes of every file are compared with
those on disk, and the config is loaded back; when something differs, the branch gets its former files again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import card, card_parts, hub, hub_commit, integrity, output
from quantkit import summary as reading
from quantkit.checkpoint import other_files
from quantkit.errors import InputError, MissingError
from quantkit.hub_calls import Calls, Failure
from quantkit.hub_commit import Place
from quantkit.progress import Progress, Silent
from quantkit.recipe import Recipe
from quantkit.recipe.push import Push
from quantkit.results import VALIDATED

CARD = "README.md"
SEARCHED = 32_000_000  # bytes of a file that is searched for the token; weights are larger, or are not text


@dataclass(frozen=True)
class Pushed:
    """What is on the Hub now. commit: its id; pull_request: its address, if one was opened."""

    repo: str
    revision: str
    commit: str
    url: str
    private: bool
    files: int
    bytes: int
    pull_request: str | None = None


def push(
    folder: str | Path,
    repo: str | None = None,
    *,
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    unvalidated: bool = False,
    base_public_ok: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> Pushed:
    """Sends an output of quantkit, with a model card made from its quantkit.json, to the Hub.

    repo            name, or owner/name; made when there is none; else the original's name and the scheme's
    private         of a repository that is made; one that is public already is not pushed to unless private=False
    revision        a branch, made when there is none; else main
    create_pr       opens a pull request in place of a commit to the branch
    unvalidated     also what was not validated, or failed; the card says so
    base_public_ok  also a public push of a model whose original is gated or not for commercial use
    token           else the one of huggingface_hub's login

    Raises InputError for a folder or a repository that will not do, or what the Hub refuses; MissingError when the Hub
    cannot be reached or fails; GateError when the weights are not those that were written. The branch is then as it
    was, or the message says how it is.
    """
    progress = progress or Silent()
    place = Path(folder).expanduser()
    summary = _checked(place, unvalidated)
    login = Login.open(token, progress)
    name = login.name(repo or default_name(summary))
    base = card.base_of(place, summary, login.api)
    if not private:
        _may_be_public(base, base_public_ok)
    content = card.render(place, summary, base, repo=name).encode()
    additions = _additions(place, content, login.calls)
    total = sum(x.upload_info.size for x in additions)
    where = prepared(login, name, private=private, revision=revision, create_pr=create_pr)
    progress.say(f"{name}: {len(additions)} files, {total:,} bytes to send")
    send = login.api.preupload_lfs_files
    more: dict[str, Any] = {"free_memory": False, "revision": where.sends_to, "create_pr": create_pr}
    login.calls("send the files", send, name, additions, once=True, **more)
    commit, pull_request = hub_commit.publish(where, place, additions, f"{summary['source']['model']}, quantized")
    branch = where.branch if pull_request is None else pull_request.revision
    url = f"{login.api.endpoint}/{name}/tree/{branch}" if branch != "main" else f"{login.api.endpoint}/{name}"
    link = None if pull_request is None else pull_request.url
    return Pushed(name, branch, commit, url, where.private, len(additions), total, link)


def default_name(summary: Mapping[str, Any]) -> str:
    """Name of a repository when none is given: pydocs-llama-7m-W4A16; with the format where it is not the usual one.

    What the Hub takes no names with, as a space in a folder's name, becomes a hyphen.
    """
    recipe = Recipe.from_any(summary["recipe"])
    name = hub.Source(str(summary["source"]["model"]), Path()).name
    form = card_parts.format_of(summary)
    usual = form == Recipe.model_fields["export"].default.format
    parts = [name, recipe.scheme.label, *([] if usual else [form])]
    return re.sub(r"\.{2,}|[^A-Za-z0-9_]*[^A-Za-z0-9_.][^A-Za-z0-9_]*", "-", "-".join(parts)).strip("-.")


# Who pushes, and where to ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Login:
    """Somebody who may write to the Hub. owner: the account's name."""

    api: Any
    calls: Calls
    owner: str
    progress: Progress

    @classmethod
    def open(cls, token: str | None, progress: Progress) -> Login:
        """By a token, or by huggingface_hub's login. Raises MissingError without one, InputError when it only reads."""
        from huggingface_hub import HfApi, get_token

        token = token or get_token()
        if not token:
            raise MissingError("there is no token for the Hub; log in with one that may write: hf auth login")
        api, calls = HfApi(token=token, library_name="quantkit"), Calls(token, progress)
        who = calls("learn whose token it is", api.whoami)
        role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise InputError(f"the token of {who['name']} may only read; log in with one that may write: hf auth login")
        return cls(api, calls, str(who["name"]), progress)

    def name(self, repo: str) -> str:
        """owner/name of what may be the name alone. Raises InputError for what is no name."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        name = repo if "/" in repo else f"{self.owner}/{repo}"
        try:
            validate_repo_id(name)
        except HFValidationError as e:
            raise InputError(f"repository {repo!r} is not a name for the Hub: {e}") from None
        return name


def check(login: Login, source: hub.Source, wanted: Push, name: str) -> None:
    """What can be refused before there is an output. name: owner/name. Raises as `push`."""
    if not wanted.private:
        model = {"model": source.model, "revision": source.revision}
        _may_be_public(card.base_of(source.folder, {"source": model}, login.api), wanted.base_public_ok)
    found = login.calls(f"read {name}", _info, login.api, name, "main")
    if not isinstance(found, Exception):
        _may_go_there(name, bool(found.private), wanted.private)
        if wanted.create_pr and wanted.revision:
            branch = login.calls(f"read {name}, branch {wanted.revision}", _info, login.api, name, wanted.revision)
            _may_be_asked(name, wanted.revision, isinstance(branch, Exception))


def prepared(login: Login, repo: str, *, private: bool, revision: str | None, create_pr: bool) -> Place:
    """The repository, made when it is missing, and the commit that the push goes on from."""
    from huggingface_hub.errors import RepositoryNotFoundError

    api, calls = login.api, login.calls
    branch, fresh = revision or "main", False
    found = calls(f"read {repo}", _info, api, repo, "main")
    if isinstance(found, RepositoryNotFoundError):

        def made(failure: Failure) -> Any:
            """It may have been made although the answer was lost; then a further try meets it."""
            again = _info(api, repo, "main") if failure.status == 409 else None
            return None if isinstance(again, Exception) else again

        calls(f"make {repo}", api.create_repo, repo, private=private, recovered=made)
        login.progress.say(f"{repo}: made, {'private' if private else 'public'}")
        found = calls(f"read {repo}", api.model_info, repo, revision="main")
    _may_go_there(repo, bool(found.private), private)
    if found.private and not private:
        login.progress.warn(f"{repo} is private and stays so; change it on the Hub when you have looked at it")
    if branch != "main":
        main = found
        found = calls(f"read {repo}, branch {branch}", _info, api, repo, branch)
        fresh = isinstance(found, Exception)
        found = main if fresh else found
    if create_pr:
        _may_be_asked(repo, branch, fresh)
    return Place(api, calls, repo, bool(found.private), branch, str(found.sha), fresh, create_pr)


def _info(api: Any, repo: str, revision: str) -> Any:
    """What the Hub says of a branch; the error itself where there is no such repository or branch."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return api.model_info(repo, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError) as e:
        return e


def _may_go_there(repo: str, there_private: bool, private: bool) -> None:
    if private and not there_private:
        raise InputError(
            f"{repo} is public already; push there with --public (push.private: false), or choose another name"
        )


def _may_be_asked(repo: str, branch: str, missing: bool) -> None:
    if missing:
        raise InputError(f"{repo} has no branch {branch} for a pull request to go to")


# Before anything is sent ----------------------------------------------------------------------------------------------


def _checked(folder: Path, unvalidated: bool) -> dict[str, Any]:
    """The folder's quantkit.json, if the folder may be pushed."""
    if not (folder / output.SUMMARY).is_file():
        raise InputError(f"{folder}: holds no {output.SUMMARY}; push what quantkit quantize or convert wrote")
    summary = reading.read(folder)
    status = summary.get("status")
    if status != VALIDATED and not unvalidated:
        advice = "quantize with other settings" if status == "failed" else f"run quantkit validate {folder}"
        raise InputError(f"{folder}: its status is {status}; {advice}, or push it with --unvalidated: its card says so")
    if not summary.get("source") or not summary.get("recipe"):
        raise InputError(
            f"{folder}: its {output.SUMMARY} does not say which model and recipe it was made from, so there is nothing "
            "to write a card of; quantize the original with quantkit"
        )
    missing = [x for x in ("config.json", *summary.get("files", {}).get("weights", ())) if not (folder / x).is_file()]
    if missing:
        raise InputError(f"{folder}: {missing[0]} is missing, so it is not whole; quantize again")
    integrity.check(folder, summary.get("layers", []))
    return summary


def _may_be_public(base: card.Base, told: bool) -> None:
    """Raises InputError for an original whose owner set terms that a public copy could break."""
    reason = base.objection()
    if reason is not None and not told:
        raise InputError(
            f"{base.name} {reason}, so its quantized copy is not made public; push it private, or with "
            "--base-public-ok (push.base_public_ok) when its terms allow it"
        )


def _additions(folder: Path, content: bytes, calls: Calls) -> list[Any]:
    """Every file of the folder that is not hidden; the card in the place of the original's."""
    from huggingface_hub import CommitOperationAdd

    found = [CommitOperationAdd(CARD, content)]
    for relative in other_files(folder):
        path = folder / relative
        if path.stat().st_size < SEARCHED and calls.holds_token(path.read_bytes()):
            raise InputError(f"{path}: holds the token that you log in with; remove it, and get a new one")
        if str(relative) != CARD:
            found.append(CommitOperationAdd(relative.as_posix(), path))
    return found
