"""The commands that prove: validate, compare. cli.py adds them to the others."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from quantkit.cli_options import DeleteShards, Device, DeviceOption
from quantkit.errors import GateError, InputError

if TYPE_CHECKING:
    from quantkit.api import Validation


def add(app: typer.Typer, guarded: Callable[[Any], Any]) -> None:
    """Adds the commands. guarded: turns what a command raises into a sentence and an exit code."""
    for command in (validate, compare):
        app.command()(guarded(command))


class Sides(str, Enum):
    """What `--side-by-side` takes. Left out, it is as the recipe says."""

    recipe, auto, yes, no = "recipe", "auto", "yes", "no"

    @property
    def given(self) -> bool | Literal["auto"] | None:
        return "auto" if self is Sides.auto else None if self is Sides.recipe else self is Sides.yes


def validate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What quantize wrote.", show_default=False)],
    against: Annotated[str | None, typer.Option("--against", help="The original, when it has moved.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Held-out texts: builtin:NAME or a file.")] = None,
    windows: Annotated[int | None, typer.Option("--windows", min=1, help="Windows of tokens to compare on.")] = None,
    length: Annotated[int | None, typer.Option("--length", min=2, help="Tokens a window.")] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="NAMES", help="Tasks of lm-eval, by commas: pydocs_cloze,gsm8k.")
    ] = None,
    tasks_folder: Annotated[
        str | None, typer.Option("--tasks-folder", metavar="FOLDER", help="With task YAMLs of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first items of each task.")] = None,
    gate: Annotated[
        list[str] | None, typer.Option("--gate", metavar="NAME=VALUE", help="A limit: kl=0.05. Replaces the recipe's.")
    ] = None,
    side_by_side: Annotated[
        Sides, typer.Option("--side-by-side", help="Both models in memory at once; auto: where they fit.")
    ] = Sides.recipe,
    report_to: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FOLDER", help="For results.json and report.html; DIR itself when it is ours."
        ),
    ] = None,
    device: DeviceOption = Device.auto,
    delete_shards: DeleteShards = False,
) -> None:
    """Measure a quantized checkpoint against its original, and check its gates."""
    gates = _gates(gate) if gate else None
    if tasks is None and (tasks_folder is not None or limit is not None):
        raise InputError("--tasks-folder and --limit are of tasks; name some with --tasks")
    from transformers.utils import logging

    from quantkit import api, html_report, report
    from quantkit.progress import Progress

    logging.disable_progress_bar()
    place = report_to or html_report.place_of(folder)
    with Progress.for_terminal() as progress:
        validation = api.validate(
            folder,
            against=against,
            data=data,
            windows=windows,
            length=length,
            tasks=None if tasks is None else {"names": tasks.split(","), "folder": tasks_folder, "limit": limit},
            gates=gates,
            side_by_side=side_by_side.given,
            device=device.value,
            delete_shards=delete_shards,
            report=place,
            progress=progress,
        )
    report.print_result({"validation": validation.to_dict()}, str(folder), place)
    check_gates(validation, folder)


def _gates(items: list[str]) -> dict[str, Any]:
    """["kl=0.05", "recovery.gsm8k=0.97"] -> as a recipe's gates are, checked as those are."""
    from pydantic import ValidationError

    from quantkit.recipe.errors import hint
    from quantkit.recipe.gates import AVERAGE, Gates

    found: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            raise InputError(f"--gate {item}: expected name=value, such as kl=0.05")
        top, _, task = name.partition(".")
        if top not in Gates.model_fields or (task and top != "recovery"):
            raise InputError(f"--gate {item}: unknown gate {name}; {hint(name, [*Gates.model_fields])}")
        try:
            limit = float(text)
            if top == "recovery":
                found.setdefault(top, {})[task or AVERAGE] = limit
            else:
                found[top] = limit
            Gates.model_validate(found)
        except ValidationError as error:
            raise InputError(f"--gate {item}: {error.errors()[0]['msg']}") from None
        except ValueError:
            raise InputError(f"--gate {item}: expected a number, got {text!r}") from None
    return found


def check_gates(validation: Validation | None, folder: Path) -> None:
    """Raises GateError for an output that missed its gates; the message names the recipe to try next."""
    if validation is None or all(gate.passed for gate in validation.gates):
        return
    from quantkit.output import TRY_NEXT

    file = folder / TRY_NEXT
    advice = f" A recipe to try next: quantkit quantize {file} --out {folder}-next" if file.is_file() else ""
    raise GateError(validation.message + advice)


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Validated outputs.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", help="For report.html, results.json, compare.md and compare.svg.")
    ] = None,
) -> None:
    """Set several validated outputs side by side: size, accuracy, and what passed."""
    from quantkit import comparison, report

    found = comparison.read(folders)
    section = comparison.report(found)
    report.print_section(section)
    if out is not None:
        comparison.write(found, out)
