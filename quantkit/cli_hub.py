"""The commands that speak with the Hub: push. cli.py adds them to the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer


def add(app: typer.Typer, guarded: Callable[[Any], Any]) -> None:
    """Adds the commands. guarded: turns what a command raises into a sentence and an exit code."""
    app.command()(guarded(push))


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What quantize wrote.", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="NAME or OWNER/NAME on the Hub.", show_default=False)],
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
    from quantkit import push as pushing
    from quantkit import report
    from quantkit.progress import Progress

    with Progress.for_terminal() as progress:
        done = pushing.push(
            folder,
            repo,
            private=private,
            revision=revision,
            create_pr=create_pr,
            unvalidated=unvalidated,
            base_public_ok=base_public_ok,
            progress=progress,
        )
    facts = [
        ("commit", f"{done.commit} on {done.revision}"),
        ("files", f"{done.files}, {report.size(done.bytes)}; all as on disk by the Hub's hashes"),
        ("seen by", "those with access" if done.private else "everybody"),
    ]
    if done.pull_request is not None:
        facts.append(("pull request", done.pull_request))
    report.print_section({"title": done.url, "facts": facts})
