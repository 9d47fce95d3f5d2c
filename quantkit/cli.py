"""The command line. Each command reads its arguments, calls one function, prints what it gives back.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done; 2 bad usage, recipe or input; 3 a gate
failed; 4 something is missing on this machine; 130 interrupted; 1 a bug in quantkit. Heavy imports are inside the
commands, so that help comes at once.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from quantkit import __version__, cli_hub, cli_running, cli_validation
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
from quantkit.cli_validation import check_gates
from quantkit.errors import InputError, MissingError, QuantkitError
from quantkit.joining import is_launched, joined, leave

Command = TypeVar("Command", bound=Callable[..., None])

_MACHINE = {
    errno.ENOSPC: "no room left on the disk; free some, or choose another place with --out",
    errno.EDQUOT: "the disk quota is used up; free some room, or choose another place with --out",
    errno.EFBIG: "a file would be larger than the file system or ulimit -f allows; raise the limit, or choose --out",
    errno.EROFS: "the file system is read-only; choose another place with --out",
    errno.EACCES: "no permission; choose another place, or change its owner",
    errno.EPERM: "not permitted; choose another place, or change its owner",
    errno.EMFILE: "too many open files; raise the limit with ulimit -n",
    errno.ENOMEM: "out of memory",
    errno.EIO: "the disk reports an error",
}

app = typer.Typer(
    name="quantkit",
    help="Quantize Hugging Face models to checkpoints that engines load, with proof that they still work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _fail(code: int, message: str) -> NoReturn:
    if os.environ.get("QUANTKIT_DEBUG") == "1":
        traceback.print_exc()
    rank = os.environ.get("RANK", "0") if is_launched() else "0"
    print(f"error: rank {rank}: {message}" if rank != "0" and code != 130 else f"error: {message}", file=sys.stderr)
    if is_launched():
        leave(code)
    raise typer.Exit(code)


def _guarded(command: Command) -> Command:
    """Turns what a command raises into one sentence on stderr and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except QuantkitError as error:
            _fail(error.exit_code, str(error))
        except KeyboardInterrupt:
            _fail(130, "interrupted before it was finished; run the same command again")
        except BrokenPipeError:  # the reader of our output went away, as in `quantkit schema | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except typer.Exit:
            raise
        except SystemExit as error:  # another of several ranks has said why
            leave(int(error.code or 0))
        except Exception as error:
            code, message = _unplanned(error)
            _fail(code, message)

    return run  # type: ignore[return-value]


def _unplanned(error: Exception) -> tuple[int, str]:
    """Exit code and sentence for an error that quantkit did not raise itself."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in _MACHINE:
        place = f"{error.filename}: " if error.filename is not None else ""
        return MissingError.exit_code, place + _MACHINE[error.errno]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        advice = "lower calibration.batch_size or calibration.length"
        return MissingError.exit_code, f"out of memory; {advice}" + (f" ({text})" if text else "")
    hint = "set QUANTKIT_DEBUG=1 for the traceback"
    return 1, f"this is a bug in quantkit: {type(error).__name__}: {text}; {hint}"


def _api() -> ModuleType:
    """quantkit.api, with transformers' own bars off: they would cross ours, and say less."""
    from transformers.utils import logging

    from quantkit import api, heap

    heap.set_up()

    logging.disable_progress_bar()
    return api


def _version(wanted: bool) -> None:
    if wanted:
        print(f"quantkit {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
@_guarded
def quantize(
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
    """Quantize a model by a recipe, write it, reload it from disk and validate it.

    On several GPUs: torchrun --nproc-per-node N -m quantkit quantize RECIPE.
    The same command goes on where it was cut short. Ctrl-C ends it after the block it is at, twice at once.
    """
    from quantkit.recipe import Recipe

    with joined(device.value) as group:
        # Read before the rest is imported, so that a mistake in it is told at once.
        resolved = Recipe.load(recipe, sets or (), model=model)
        from quantkit import report
        from quantkit.progress import Progress, Silent

        api = _api()
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(Progress.for_terminal() if group.first else Silent())
            if group.alone:
                stack.enter_context(cli_running.ending_gently(progress))
            if resolved.push is not None:
                progress.say("the recipe's push is for quantkit run; quantize pushes nothing")
            result = api.quantize(
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
            )
    if group.first:
        report.print_result(result.summary, str(result.out), result.out)
        check_gates(result.validation, result.out)


@app.command()
@_guarded
def inspect(
    path: Annotated[
        str, typer.Argument(metavar="MODEL_OR_DIR", help="A Hub id, a folder, or builtin:NAME.", show_default=False)
    ],
) -> None:
    """Show what a model or a quantized checkpoint is made of."""
    from quantkit import inspection, report

    report.print_inspect(inspection.inspect(path))


@app.command()
@_guarded
def convert(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized checkpoint.", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="A checkpoint format, such as gptq, or dense.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; made when missing.", show_default=False)],
    overwrite: Overwrite = False,
    shard_size: Annotated[str, typer.Option("--shard-size", help="Largest file of weights.")] = "5GB",
) -> None:
    """Write a quantized checkpoint in another format, without rounding its weights again."""
    from quantkit import convert as converting
    from quantkit import report
    from quantkit.progress import Progress

    with Progress.for_terminal() as progress:
        done = converting.convert(folder, to, out, overwrite=overwrite, shard_size=shard_size, progress=progress)
    sizes = f"{report.size(done.source_bytes)} to {report.size(done.output_bytes)}"
    facts = [
        ("layers", f"{done.layers}, from {done.source_format} to {done.to}"),
        ("size", sizes),
        ("status", "unvalidated; quantkit validate measures it"),
    ]
    report.print_section({"title": str(done.out), "facts": facts})


@app.command()
@_guarded
def lint(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized checkpoint.", show_default=False)],
    engine: Annotated[
        list[str] | None,
        typer.Option("--engine", metavar="NAME", help="transformers, vllm, sglang or tensorrt-llm; again for more."),
    ] = None,
    tp: Annotated[int, typer.Option("--tp", min=1, help="GPUs that each layer is split over.")] = 1,
) -> None:
    """Check a quantized checkpoint against the engines' rules."""
    from quantkit import lint as linting
    from quantkit import report
    from quantkit.recipe.errors import hint

    for name in engine or ():
        if name not in linting.names():
            raise InputError(f"--engine {name}: unknown engine {name}; {hint(name, linting.names())}")
    found = linting.folder(folder, engine or None, tp=tp)
    errors = [finding for finding in found if finding.level == linting.ERROR]
    report.print_section(linting.section(folder, found, engine or linting.names()))
    if errors:
        engines = ", ".join(dict.fromkeys(finding.engine for finding in errors))
        raise InputError(f"{folder}: {len(errors)} error{'s' if len(errors) > 1 else ''}, for {engines}")


cli_validation.add(app, _guarded)
cli_running.add(app, _guarded)
cli_hub.add(app, _guarded)


@app.command()
@_guarded
def plan(recipe: RecipePath, model: Model = None, sets: Sets = None) -> None:
    """Tell memory, time and disk of a run before anything is loaded."""
    from quantkit.recipe import Recipe

    resolved = Recipe.load(recipe, sets or (), model=model)
    from quantkit import report

    report.print_plan(_api().describe(resolved))


@app.command()
@_guarded
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from quantkit.recipe import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
@_guarded
def doctor() -> None:
    """Show versions, GPU, memory and disk, what is missing and how to get it."""
    from quantkit import doctor as doctoring
    from quantkit import report

    found = doctoring.checks()
    report.print_section(doctoring.report(found))
    bad = [check for check in found if check.state == "bad"]
    if bad:
        raise MissingError("; ".join(f"{check.name}: {check.found}, {check.advice}" for check in bad))


def main() -> None:
    """Entry point of the `quantkit` command."""
    try:
        app()
    except KeyboardInterrupt:  # before or after a command, as while modules are imported
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
