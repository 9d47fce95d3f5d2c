"""Arguments that several commands have: one name, one help text."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Device(str, Enum):
    """Where the arithmetic runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


DeviceOption = Annotated[Device, typer.Option("--device", help="Where the arithmetic runs.")]
DeleteShards = Annotated[
    bool,
    typer.Option("--delete-shards", help="Delete each file of weights fetched from the Hub when it has been used."),
]
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.", show_default=False)]
Model = Annotated[
    str | None, typer.Option("--model", help="Instead of the recipe's model: a Hub id, a folder, or builtin:NAME.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replaces one value of the recipe: calibration.samples=64."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder to write; made when missing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output of an earlier run.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over, where an unfinished run could go on.")]
Timed = Annotated[bool, typer.Option("--profile", help="Say at the end where the time went.")]
