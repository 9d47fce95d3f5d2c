"""What a user calls: quantize a model by a recipe, validate an output, load one. The command line calls the same.

result = quantkit.quantize("recipe.yaml", model="org/name", out="name-W4A16")
model = quantkit.load(result.out)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from quantkit import (
    advice,
    allocation,
    calibration,
    estimate,
    html_report,
    hub,
    output,
    pinning,
    repair,
    results,
    resuming,
    room,
    running,
    summation,
    validation,
)
from quantkit import plan as planning
from quantkit import summary as reading
from quantkit.errors import GateError, InputError, MissingError
from quantkit.loading import load
from quantkit.profile import Profile
from quantkit.progress import Progress, Silent
from quantkit.ranks import ALONE, Ranks
from quantkit.recipe import Recipe
from quantkit.recipe.gates import limits
from quantkit.recipe.validation import Validation as Settings
from quantkit.recipe.validation import changed
from quantkit.results import FAILED, Validation
from quantkit.running import versions
from quantkit.shards import Shards

__all__ = [
    "Result",
    "Validation",
    "default_name",
    "describe",
    "load",
    "pick_device",
    "quantize",
    "validate",
    "versions",
]


@dataclass(frozen=True)
class Result:
    """A finished output: its folder, the content of its quantkit.json, and its validation if there was one."""

    out: Path
    summary: dict[str, Any]
    validation: Validation | None


def quantize(
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
    shards: Shards | None = None,
    delete_shards: bool = False,
    report: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Result:
    """Quantizes a model, writes it, reloads it from disk and checks its gates.

    recipe     a recipe file, its content as a mapping, or a Recipe
    model      instead of the recipe's model
    out        folder to write; by default the model's name and the scheme, in the current folder
    overrides  "path.to.key=value" each, as `--set`
    device     "auto" (a GPU if there is one), "cpu" or "cuda"
    overwrite  replace the output of another recipe
    fresh      start over, where an unfinished run of the same output could go on
    profile    say at the end where the time went; on a GPU it waits for each part, which costs a little
    calibration_data  texts, or chats as lists of {"role", "content"}, in place of the recipe's calibration.data; read
                      once, and only as far as the rows need
    shards     is told of each file of weights when it is whole
    report     also write results.json and report.html beside the weights; unlike the rest they tell of times
    ranks      the processes that do it together, `with quantkit.joining.joined() as ranks:`; all of them call this.
               Rank 0 alone reads calibration_data, writes, validates, and has a validation in its result
    delete_shards     of a model on the Hub: each file of weights that was fetched is deleted when the work has gone on
                      to the next, and validation fetches them again, one after the other

    The exact commits of model and data sets on the Hub are settled first, and stand in the recipe beside the weights.

    Where an earlier run of the same recipe, source, versions and device was cut short, it goes on after the last block
    that was finished, and gives the same bytes. `progress.stop()` ends it after the block it is at.

    A gate that fails does not raise: the output is kept, marked as failed, and `result.validation.status` says so.
    Raises InputError or MissingError when it cannot be done, and Interrupted after `progress.stop()`; what was finished
    by then is kept in `.OUT.partial`. GateError when the output computes NaN or Inf, and then it is kept and marked as
    failed.
    """
    summation.fix()
    progress = progress or Silent()
    if calibration_data is not None:
        overrides = (*overrides, f"calibration.data={calibration.PYTHON}")
    settled = Recipe.from_any(recipe, overrides, model=model)
    ranks.agree("recipe", {"quantkit": versions()["quantkit"], **settled.to_dict()})
    again = settled.scheme.auto is not None or (
        settled.validation is not None and settled.validation.repair is not None
    )
    if calibration_data is not None and again:
        calibration_data = list(calibration_data)  # read more than once
    where = pick_device(device)
    if delete_shards and not ranks.alone:
        raise InputError("--delete-shards: several processes read the same shards; leave it out, or use one process")
    source = hub.resolve(settled.model, delete_shards=delete_shards, progress=progress)
    ranks.agree("model", {"fingerprint": source.fingerprint(), "commit": source.revision})
    folder = Path(out).expanduser() if out is not None else Path(default_name(source, settled))
    if not ranks.first:
        return Result(folder, running.assist(folder, where, ranks), None)
    settled = pinning.pinned(settled, source)
    timed, checks = Profile(where, exact=profile), Profile(where, exact=profile)
    output.check(folder, source.folder, None, overwrite=True)  # what is never replaced, before anything is made
    with (
        contextlib.closing(source),
        output.working(folder) as place,
        resuming.journaled(place, running.identity(settled, source, where), fresh=fresh, progress=progress) as (
            staging,
            log,
        ),
    ):
        with timed("choice of schemes"):
            settled, chosen = running.choose(settled, log, where, progress, calibration_data, source)
        with timed("plan"):
            plan = planning.make(settled, source=source)
        output.check(folder, plan.source.folder, settled.to_yaml(), overwrite=overwrite)
        room.check(plan, folder)
        progress.say(
            f"{plan.source.model}: {len(plan.quantized)} linear layers to quantize, {len(plan.dense)} left dense"
        )
        if settled.validation is not None and settled.validation.repair is not None:
            repair.check(plan, settled.validation.repair)
        run = running.Run(where, progress, timed, checks, calibration_data, chosen, shards, ranks, log)
        plan, (summary, proof, unusable) = running.repaired(plan, staging, run)
        if shards is not None:
            shards.dropped() if summary["status"] == FAILED else shards.wait()
        advised = advice.leave(staging, plan, proof.gates if proof else [], summary["layers"])
        if report:
            seconds = {"quantize": timed, "validate": checks}
            told = results.collect(summary, proof, advised, plan.source, staging, where, seconds, progress.warnings)
            html_report.write(staging, told, folder.name, progress.warn)
        for line in timed.lines() if profile else ():
            progress.say(line)
    if unusable is not None:
        raise GateError(f"{folder}: {unusable}")
    ranks.told({"summary": summary})
    return Result(folder, summary, proof)


def validate(
    folder: str | Path,
    *,
    against: str | Path | None = None,
    data: str | None = None,
    windows: int | None = None,
    length: int | None = None,
    tasks: Sequence[str] | Mapping[str, Any] | None = None,
    gates: Mapping[str, Any] | None = None,
    side_by_side: bool | Literal["auto"] | None = None,
    device: str = "auto",
    delete_shards: bool = False,
    report: str | Path | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Measures a quantized folder against its original, and marks the folder with the outcome when it is ours.

    What is not given is what the recipe beside the weights says. `against` is needed for other tools' checkpoints.
    tasks  of lm-eval, by name, or as a recipe has them: {"names": [...], "limit": 100}
    gates  as a recipe has them, in the place of the recipe's: {"kl": 0.05, "top1_agreement": {"limit": 0.9, ...}}
    side_by_side  False: original and folder one after the other; "auto": where they do not fit together
    delete_shards  of an original on the Hub: each fetched file of weights is deleted when it is in memory
    report  a folder for results.json and report.html, made when missing; None: neither is written
    Raises InputError when the folder or its original is missing or cannot be loaded, GateError when the folder's model
    computes NaN or Inf.
    """
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json, so it is not a model folder")
    ours = (folder / output.SUMMARY).is_file()
    summary = reading.read(folder) if ours else {}
    recipe = Recipe.load(folder / output.RECIPE) if (folder / output.RECIPE).is_file() else None
    if against is None and recipe is None:
        raise InputError(f"{folder}: holds no {output.RECIPE}, so name the original model with --against")
    settings = (recipe.validation if recipe is not None else None) or Settings()
    settings = changed(settings, data, windows, length, tasks, side_by_side)
    original = str(against) if against is not None else recipe.model if recipe else ""
    source = hub.resolve(original, delete_shards=delete_shards, progress=progress)
    settings = settings.model_copy(update={"perplexity": pinning.texts(settings.perplexity)})
    expected = (summary.get("source") or {}).get("fingerprint")
    if expected is not None and source.fingerprint() != expected:
        raise InputError(
            f"{source.folder}: is not the model that {folder} was made from (fingerprint {source.fingerprint()[:12]}, "
            f"expected {expected[:12]}); name the right one with --against"
        )
    judged = settings.gates.limits() if gates is None else limits(gates)
    outcome: dict[str, Any] = {}
    progress, where = progress or Silent(), pick_device(device)
    timed, proof = Profile(where), None
    try:
        proof = validation.validate(
            folder,
            source,
            settings,
            judged,
            device=where,
            progress=progress,
            layers=summary.get("layers", []),
            trust_remote_code=recipe is not None and recipe.trust_remote_code,
            profile=timed,
        )
        outcome = proof.to_dict()
    except GateError as e:
        outcome = {"status": FAILED, "message": str(e)}
        raise
    finally:
        with contextlib.closing(source):
            if outcome:
                known = summary or _known(source)
                summary = {**known, "status": outcome["status"], "validation": outcome}
                advised = None
                if ours:
                    output.write_json(folder / output.SUMMARY, summary)
                    advised = advice.again(folder, recipe, source, proof.gates if proof else [], summary)
                if report is not None:
                    seconds, warned = {"validate": timed}, progress.warnings
                    told = results.collect(summary, proof, advised, source, folder, where, seconds, warned)
                    html_report.write(Path(report).expanduser(), told, folder.resolve().name, progress.warn)
    return proof


def _known(source: hub.Source) -> dict[str, Any]:
    """Of the output of another tool, what quantkit.json says of an own one."""
    origin = {"model": source.model, "revision": source.revision, "fingerprint": source.fingerprint()}
    return {"quantkit": versions()["quantkit"], "source": origin, "versions": versions()}


def pick_device(device: str) -> torch.device:
    """ "auto", "cpu" or "cuda" -> a device. Raises MissingError when a GPU is asked for and there is none."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"unknown device {device!r}; known: auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise MissingError("no CUDA GPU that torch can use; run `quantkit doctor`, or use --device cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def describe(recipe: Recipe) -> dict[str, Any]:
    """The plan of a recipe as plain values for a person; of `scheme: {auto: ...}`, what there is to choose from."""
    return (
        estimate.describe(planning.make(recipe), rehearse=True)
        if recipe.scheme.auto is None
        else allocation.describe(recipe)
    )


def default_name(source: hub.Source, recipe: Recipe) -> str:
    """Name of the output folder when none is given: pydocs-llama-7m-W4A16."""
    return f"{source.name}-{recipe.scheme.label}"
