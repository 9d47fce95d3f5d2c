"""What a user calls: quantize a model by a recipe, validate an output, load one. The command line calls the same.

result = quantkit.quantize("recipe.yaml", model="org/name", out="name-W4A16")
model = quantkit.load(result.out)
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from quantkit import allocation, calibration, hub, output, pipeline, validation
from quantkit import plan as planning
from quantkit.errors import GateError, InputError, MissingError
from quantkit.loading import load
from quantkit.profile import Profile
from quantkit.progress import Progress, Silent
from quantkit.recipe import Perplexity, Recipe
from quantkit.recipe import Validation as Settings
from quantkit.recipe.calibration import TextSource
from quantkit.recipe.gates import Limit, limits
from quantkit.validation import FAILED, UNVALIDATED, Validation

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
    profile: bool = False,
    calibration_data: Iterable[Any] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Quantizes a model, writes it, reloads it from disk and checks its gates.

    recipe     a recipe file, its content as a mapping, or a Recipe
    model      instead of the recipe's model
    out        folder to write; by default the model's name and the scheme, in the current folder
    overrides  "path.to.key=value" each, as `--set`
    device     "auto" (a GPU if there is one), "cpu" or "cuda"
    overwrite  replace the output of another recipe
    profile    say at the end where the time went; on a GPU it waits for each part, which costs a little
    calibration_data  texts, or chats as lists of {"role", "content"}, in place of the recipe's calibration.data; read
                      once, and only as far as the rows need

    A gate that fails does not raise: the output is kept, marked as failed, and `result.validation.status` says so.
    Raises InputError or MissingError when it cannot be done, and then nothing is left behind; GateError when the output
    computes NaN or Inf, and then it is kept and marked as failed.
    """
    progress = progress or Silent()
    if calibration_data is not None:
        overrides = (*overrides, f"calibration.data={calibration.PYTHON}")
    settled = Recipe.from_any(recipe, overrides, model=model)
    where = pick_device(device)
    source = hub.resolve(settled.model)
    folder = Path(out).expanduser() if out is not None else Path(default_name(source, settled))
    chosen: dict[str, Any] | None = None
    if settled.scheme.auto is not None:
        output.check(folder, source.folder, None, overwrite=True)  # what is never replaced, before anything is measured
        calibration_data = None if calibration_data is None else list(calibration_data)  # read twice
        settled, chosen = allocation.allocate(settled, device=where, progress=progress, texts=calibration_data)
    plan = planning.make(settled)
    text = settled.to_yaml()
    output.check(folder, plan.source.folder, text, overwrite=overwrite)
    progress.say(f"{plan.source.model}: {len(plan.quantized)} linear layers to quantize, {len(plan.dense)} left dense")
    timed = Profile(where, on=profile)
    with output.staged(folder) as staging:
        done = pipeline.quantize(
            plan, staging, device=where, progress=progress, profile=timed, calibration_data=calibration_data
        )
        (staging / output.RECIPE).write_text(text, "utf-8")
        summary = {**_summary(plan, done), "allocation": chosen}
        output.write_json(staging / output.SUMMARY, summary)
        proof: Validation | None = None
        unusable: GateError | None = None
        for line in timed.lines():
            progress.say(line)
        if settled.validation is not None:
            try:
                proof = validation.validate(
                    staging,
                    plan.source,
                    settled.validation,
                    settled.validation.gates.limits(),
                    device=where,
                    progress=progress,
                    layers=done["layers"],
                    trust_remote_code=settled.trust_remote_code,
                )
                outcome = proof.to_dict()
                if chosen is not None:
                    progress.say(allocation.verdict(chosen, proof.comparison.kl))
            except GateError as e:
                unusable, outcome = e, {"status": FAILED, "message": str(e)}
            summary = {**summary, "status": outcome["status"], "validation": outcome}
            output.write_json(staging / output.SUMMARY, summary)
    if unusable is not None:
        raise GateError(f"{folder}: {unusable}")
    return Result(folder, summary, proof)


def validate(
    folder: str | Path,
    *,
    against: str | Path | None = None,
    data: str | None = None,
    windows: int | None = None,
    length: int | None = None,
    gates: Mapping[str, Any] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Validation:
    """Measures a quantized folder against its original, and marks the folder with the outcome when it is ours.

    What is not given is what the recipe beside the weights says. `against` is needed for other tools' checkpoints.
    gates  as a recipe has them, in the place of the recipe's: {"kl": 0.05, "top1_agreement": {"limit": 0.9, ...}}
    Raises InputError when the folder or its original is missing or cannot be loaded, GateError when the folder's model
    computes NaN or Inf.
    """
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json, so it is not a model folder")
    ours = (folder / output.SUMMARY).is_file()
    summary = hub.read_json(folder / output.SUMMARY) if ours else {}
    recipe = Recipe.load(folder / output.RECIPE) if (folder / output.RECIPE).is_file() else None
    if against is None and recipe is None:
        raise InputError(f"{folder}: holds no {output.RECIPE}, so name the original model with --against")
    settings = (recipe.validation if recipe is not None else None) or Settings()
    texts = settings.perplexity
    texts = Perplexity(
        windows=windows or texts.windows,
        length=length or texts.length,
        **({"data": data} if data else texts.model_dump(include=set(TextSource.model_fields))),
    )
    settings = settings.model_copy(update={"perplexity": texts})
    source = hub.resolve(str(against) if against is not None else recipe.model if recipe else "")
    expected = (summary.get("source") or {}).get("fingerprint")
    if expected is not None and source.fingerprint() != expected:
        raise InputError(
            f"{source.folder}: is not the model that {folder} was made from (fingerprint {source.fingerprint()[:12]}, "
            f"expected {expected[:12]}); name the right one with --against"
        )
    judged = settings.gates.limits() if gates is None else _limits(gates)
    outcome: dict[str, Any] = {}
    try:
        result = validation.validate(
            folder,
            source,
            settings,
            judged,
            device=pick_device(device),
            progress=progress or Silent(),
            layers=summary.get("layers", []),
            trust_remote_code=recipe is not None and recipe.trust_remote_code,
        )
        outcome = result.to_dict()
    except GateError as e:
        outcome = {"status": FAILED, "message": str(e)}
        raise
    finally:
        if ours and outcome:
            output.write_json(folder / output.SUMMARY, {**summary, "status": outcome["status"], "validation": outcome})
    return result


def _limits(gates: Mapping[str, Any]) -> dict[str, Limit]:
    try:
        return limits(gates)
    except ValidationError as e:
        found = e.errors()[0]
        where = ".".join(str(part) for part in found["loc"] if isinstance(part, str) and part not in ("limit", "level"))
        raise InputError(f"gate {where}: {found['msg']}; got {found['input']!r}") from None


def pick_device(device: str) -> torch.device:
    """ "auto", "cpu" or "cuda" -> a device. Raises MissingError when a GPU is asked for and there is none."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"unknown device {device!r}; known: auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise MissingError("no CUDA GPU that torch can use; run `quantkit doctor`, or use --device cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def describe(recipe: Recipe) -> dict[str, Any]:
    """The plan of a recipe as plain values for a person; of `scheme: {auto: ...}`, what there is to choose from."""
    return planning.describe(planning.make(recipe)) if recipe.scheme.auto is None else allocation.describe(recipe)


def default_name(source: hub.Source, recipe: Recipe) -> str:
    """Name of the output folder when none is given: pydocs-llama-7m-W4A16."""
    return f"{source.name}-{recipe.scheme.label}"


def _summary(plan: planning.Plan, done: dict[str, Any]) -> dict[str, Any]:
    """The content of quantkit.json. Without times: the same work gives the same file."""
    return {
        "quantkit": versions()["quantkit"],
        "status": UNVALIDATED,
        "source": {
            "model": plan.source.model,
            "revision": plan.source.revision,
            "fingerprint": plan.source.fingerprint(),
        },
        "recipe": plan.recipe.to_dict(),
        "data": done["data"],
        "kv_cache": done["kv_cache"],
        "versions": versions(),
        "layers": done["layers"],
        "folds": done["folds"],
        "experts": done["experts"],
        "not_quantized": [{"name": x.name, "reason": x.reason} for x in plan.dense],
        "copied_tensors": plan.skeleton.unknown,
        "files": done["files"],
        "size": {"source_bytes": plan.skeleton.checkpoint.size(), "output_bytes": plan.output_bytes},
        "warnings": list(plan.warnings),
        "validation": None,
    }


def versions() -> dict[str, str]:
    """Versions of what decides the bytes of an output."""
    found = {"python": platform.python_version()}
    for package in ("quantkit", "torch", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
