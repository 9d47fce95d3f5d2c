"""The commands that speak with the Hub: push, run, reproduce. cli.py adds them to the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli_options import (
    DeleteShards,
    Device,
    DeviceOption,
    Fresh,
    Model,
    Out,
    Overwrite,
    RecipePath,
    Sets,
    Timed,
)
from quantkit.cli_running import ending_gently
from quantkit.errors import GateError
from quantkit.joining import joined

if TYPE_CHECKING:
    from quantkit.hub_push import Pushed


def add(app: typer.Typer, guarded: Callable[[Any], Any]) -> None:
    """Adds the commands. guarded: turns what a command raises into a sentence and an exit code."""
    for command in (run, push, reproduce):
        app.command()(guarded(command))


def run(
    recipe: RecipePath,
    model: Model = None,
    out: Out = None,
    sets: Sets = None,
    device: DeviceOption = Device.auto,
    overwrite: Overwrite = False,
    fresh: Fresh = False,
    profile: Timed = False,
    delete_shards: DeleteShards = False,
) -> None:
    """Quantize, validate and push in one go, as the recipe says; a gate that fails pushes nothing.

    Goes on and ends as quantize does.
    """
    from quantkit.recipe import Recipe

    with joined(device.value) as group:
        resolved = Recipe.load(recipe, sets or (), model=model)
        from transformers.utils import logging

        from quantkit import job, report
        from quantkit.progress import Progress, Silent

        logging.disable_progress_bar()
        with Progress.for_terminal() if group.first else Silent() as progress:
            done = job.run(
                resolved,
                out=out,
                device=device.value,
                overwrite=overwrite,
                fresh=fresh,
                profile=profile,
                delete_shards=delete_shards,
                report=True,
                progress=progress,
                ranks=group,
                during=ending_gently(progress) if group.alone else None,
            )
    if not group.first:
        return
    report.print_result(done.result.summary, str(done.result.out), done.result.out)
    if done.pushed is None:
        validation = done.result.validation
        raise GateError(f"{validation.message if validation else 'a gate failed'}; nothing was pushed")
    report.print_section(_section(done.pushed))


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What quantize wrote.", show_default=False)],
    repo: Annotated[
        str | None,
        typer.Argument(metavar="REPO", help="NAME or OWNER/NAME on the Hub; else MODEL-SCHEME.", show_default=False),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private/--public", help="Who may see a repository that is made for it.")
    ] = True,
    revision: Annotated[str | None, typer.Option("--revision", help="A branch; made when missing. Else main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request in place of a commit.")] = False,
    unvalidated: Annotated[
        bool, typer.Option("--unvalidated", help="Also what was not validated, or failed; its card says so.")
    ] = False,
    base_public_ok: Annotated[
        bool, typer.Option("--base-public-ok", help="The terms of a gated or non-commercial original allow --public.")
    ] = False,
) -> None:
    """Push a validated output to the Hub with a model card, and check what arrived."""
    from quantkit import hub_push, report
    from quantkit.progress import Progress

    with Progress.for_terminal() as progress:
        done = hub_push.push(
            folder,
            repo,
            private=private,
            revision=revision,
            create_pr=create_pr,
            unvalidated=unvalidated,
            base_public_ok=base_public_ok,
            progress=progress,
        )
    report.print_section(_section(done))


def _section(done: Pushed) -> dict[str, Any]:
    from quantkit import report

    facts = [
        ("commit", f"{done.commit} on {done.revision}"),
        ("files", f"{done.files}, {report.size(done.bytes)}; all as on disk by the Hub's hashes"),
        ("seen by", "those with access" if done.private else "everybody"),
    ]
    if done.pull_request is not None:
        facts.append(("pull request", done.pull_request))
    return {"title": done.url, "facts": facts}


def reproduce(
    place: Annotated[
        str,
        typer.Argument(metavar="REPO_OR_DIR", help="An output: a Hub id, id@revision, a folder.", show_default=False),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Keep the copy here; else it is removed.")] = None,
    device: DeviceOption = Device.auto,
    delete_shards: DeleteShards = False,
) -> None:
    """Make an output again from its own recipe and pinned sources, and tell whether the bytes are the same."""
    from transformers.utils import logging

    from quantkit import report, reproducing
    from quantkit.progress import Progress

    logging.disable_progress_bar()
    with Progress.for_terminal() as progress:
        found = reproducing.reproduce(
            place, out=out, device=device.value, delete_shards=delete_shards, progress=progress
        )
    rows = [[name, what] for name, what in found.files.items()]
    facts = [("differs", line) for line in found.surroundings] or [("versions, hardware, data", "the same")]
    report.print_section({"title": place, "facts": facts, "table": {"columns": ["file", "bytes"], "rows": rows}})
    if not found.same:
        raise GateError(found.message)
