"""The whole job in one go: quantize, validate, push. What cannot be pushed is refused before the work, not after it.

done = quantkit.run("recipe.yaml", model="org/name")       # the recipe says where to, under push
print(done.pushed.url)
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import api, hub, hub_push
from quantkit.errors import InputError, QuantkitError
from quantkit.hub_ahead import Ahead
from quantkit.progress import Progress, Silent
from quantkit.ranks import ALONE, Ranks
from quantkit.recipe import Recipe
from quantkit.recipe.push import Push
from quantkit.results import FAILED


@dataclass(frozen=True)
class Done:
    """What `run` made. pushed: None where a gate failed."""

    result: api.Result
    pushed: hub_push.Pushed | None


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    model: str | Path | None = None,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    overwrite: bool = False,
    fresh: bool = False,
    profile: bool = False,
    calibration_data: Iterable[Any] | None = None,
    delete_shards: bool = False,
    report: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    during: contextlib.AbstractContextManager[Any] | None = None,
) -> Done:
    """`quantize`, and `push` as the recipe's `push:` says. Arguments as of those two.

    during  entered while it quantizes and validates, and left before it pushes

    A gate that fails does not raise: nothing is pushed, and `pushed` is None. Where the push fails, the output is kept
    and the message says how to push it. Of several ranks, rank 0 alone pushes. Raises as `quantize` and `push`.
    """
    progress = progress or Silent()
    settled = Recipe.from_any(recipe, overrides, model=model)
    wanted = _wanted(settled)
    how: dict[str, Any] = {"device": device, "overwrite": overwrite, "profile": profile, "progress": progress}
    how |= {"out": out, "calibration_data": calibration_data, "delete_shards": delete_shards}
    how |= {"fresh": fresh, "ranks": ranks, "report": report}
    if not ranks.first:
        return Done(api.quantize(settled, **how), None)
    login = hub_push.Login.open(token, progress)
    source = hub.resolve(settled.model, progress=progress)
    if ranks.alone:  # others have not asked the Hub, and must have the same recipe
        settled = settled.model_copy(update={"model": source.pinned})
    name = login.name(wanted.repo or hub_push.default_name({"source": vars(source), "recipe": settled}))
    hub_push.check(login, source, wanted, name)
    with contextlib.ExitStack() as stack:
        stack.enter_context(during or contextlib.nullcontext())
        ahead = stack.enter_context(_ahead(login, name, wanted)) if wanted.stream else None
        result = api.quantize(settled, **how, shards=ahead)
    if result.summary["status"] == FAILED:
        progress.say(f"{name}: nothing is pushed, for {result.out} failed its gates")
        return Done(result, None)
    try:
        pushed = hub_push.push(
            result.out, name, **wanted.model_dump(exclude={"repo", "stream"}), token=token, progress=progress
        )
    except QuantkitError as e:
        raise type(e)(f"{e}. The output is whole; to push it: {again(result.out, name, wanted)}") from None
    except KeyboardInterrupt:
        progress.say(f"the output is whole; to push it: {again(result.out, name, wanted)}")
        raise
    return Done(result, pushed)


def _wanted(recipe: Recipe) -> Push:
    """Where the recipe pushes to. Raises InputError where it does not say so, or could not."""
    wanted = recipe.push
    if wanted is None:
        raise InputError(
            "the recipe does not say where to push: give it push: {repo: OWNER/NAME}, or push: true for a repository "
            "of yours named after model and scheme (--set push=true); quantkit quantize pushes nothing"
        )
    if recipe.validation is None and not wanted.unvalidated:
        raise InputError("push: the recipe has validate: none; leave that out, or set push.unvalidated")
    return wanted


def _ahead(login: hub_push.Login, name: str, wanted: Push) -> Ahead:
    where = hub_push.prepared(login, name, private=wanted.private, revision=wanted.revision, create_pr=wanted.create_pr)
    return Ahead(where, login.progress)


def again(folder: Path, repo: str, wanted: Push) -> str:
    """The command that pushes a folder as a recipe wants it."""
    flags = [
        *([] if wanted.private else ["--public"]),
        *(["--revision", wanted.revision] if wanted.revision else []),
        *(["--create-pr"] if wanted.create_pr else []),
        *(["--unvalidated"] if wanted.unvalidated else []),
        *(["--base-public-ok"] if wanted.base_public_ok else []),
    ]
    return shlex.join(["quantkit", "push", str(folder), repo, *flags])
