"""The commands that run a checkpoint: bench, serve, compile. cli.py adds them to the others."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli_options import Device, DeviceOption
from quantkit.errors import InputError
from quantkit.progress import Progress

FolderArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="A quantized checkpoint on this machine.", show_default=False)
]


def add(app: typer.Typer, guarded: Callable[[Any], Any]) -> None:
    """Adds the commands. guarded: turns what a command raises into a sentence and an exit code."""
    for command in (bench, serve, compile_step):
        app.command(name=command.__name__.partition("_")[0])(guarded(command))


@contextmanager
def ending_gently(progress: Progress) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the work after the step it is at, the second at once."""

    def ask(number: int, frame: object) -> None:
        if progress.stopping:
            raise KeyboardInterrupt
        progress.stop()
        # Not through `progress`: it may be printing at this moment.
        os.write(2, b"\nending after this step; again to end at once. What is finished is kept either way\n")

    signals = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, ask) for s in signals}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _quiet() -> Any:
    """quantkit.api, with transformers' own bars off."""
    from transformers.utils import logging

    from quantkit import api

    logging.disable_progress_bar()
    return api


def bench(
    folder: FolderArgument,
    against: Annotated[
        str, typer.Option("--against", metavar="DIR", help="The dense model; auto: random weights of the same config.")
    ] = "auto",
    batch: Annotated[str, typer.Option("--batch", metavar="LIST", help="Rows at once, by commas.")] = "1,16",
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens of a prompt.")] = 128,
    new: Annotated[int, typer.Option("--new", min=2, help="Tokens to generate.")] = 128,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Runs, of which the median is told.")] = 5,
    loop: Annotated[
        str, typer.Option("--loop", help="What generates: quantkit, quantkit-compiled, transformers, ...")
    ] = ("quantkit"),
    device: DeviceOption = Device.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything that was measured as JSON.")] = False,
    save: Annotated[
        bool, typer.Option("--save", help="Keep it in DIR as quantkit-bench.json, for the model card of quantkit push.")
    ] = False,
) -> None:
    """Measure tokens a second and memory beside bf16, and tell where bf16 is the better choice."""
    try:
        batches = [int(part) for part in batch.split(",")]
    except ValueError:
        raise InputError(f"--batch {batch}: expected numbers with commas between them, such as 1,16") from None
    api = _quiet()
    from quantkit import report
    from quantkit.runtime import bench as benching

    found = benching.bench(
        folder,
        device=api.pick_device(device.value),
        against=against,
        batches=batches,
        prompt=prompt,
        new=new,
        loop=loop,
        runs=runs,
    )
    if save:
        from quantkit import output

        output.write_json(folder / output.BENCH, {**found.without_paths().to_dict(), "versions": api.versions()})
    if as_json:
        print(json.dumps({**found.to_dict(), "versions": api.versions()}, indent=1))
    else:
        report.print_section(benching.section(found, report.size))


def serve(
    folder: FolderArgument,
    host: Annotated[str, typer.Option("--host", help="Address to listen on. No password is asked for.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option("--name", help="By which clients ask for it; else the folder's.")] = None,
    continuous_batching: Annotated[
        bool, typer.Option("--continuous-batching/--no-continuous-batching", help="Requests share batches.")
    ] = True,
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds for running requests when it is told to end.")
    ] = 10.0,
    device: DeviceOption = Device.auto,
) -> None:
    """Serve a checkpoint by OpenAI's API: chat and text completions, streamed or whole.

    Attention and KV cache are transformers' own, in the model's dtype; the weights stay packed.
    """
    api = _quiet()
    from quantkit.runtime.serve import serve as serving

    serving(
        folder,
        host=host,
        port=port,
        name=name,
        device=api.pick_device(device.value),
        continuous_batching=continuous_batching,
        grace=grace,
        say=lambda line: print(line, flush=True),
    )


def compile_step(
    folder: FolderArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; else one beside torch's own caches.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows at once.")] = 1,
    slots: Annotated[int, typer.Option("--length", min=16, help="Tokens of a sequence, prompt included.")] = 2048,
    device: DeviceOption = Device.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Compile again what is there.")] = False,
) -> None:
    """Compile a decoding step ahead of time, for this GPU architecture, into a package that loads in seconds."""
    api = _quiet()
    from quantkit import report
    from quantkit.runtime import compiled

    made = compiled.compile_folder(
        folder, out, batch=batch, slots=slots, device=api.pick_device(device.value), overwrite=overwrite
    )
    report.print_section(compiled.section(made, report.size))
