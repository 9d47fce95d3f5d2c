"""What a user calls: quantize a model by a recipe, validate an output, load one. The command line calls the same.

result = quantkit.quantize("recipe.yaml", model="org/name", out="name-W4A16")
model = quantkit.load(result.out)
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from quantkit import allocation, calibration, formats, hub, output, packed, pipeline, skeleton
from quantkit import plan as planning
from quantkit.checkpoint import Checkpoint
from quantkit.convert import dense_copy
from quantkit.errors import GateError, InputError, MissingError
from quantkit.profile import Profile
from quantkit.progress import Progress, Silent
from quantkit.recipe import Perplexity, Recipe
from quantkit.recipe import Validation as Settings
from quantkit.recipe.calibration import TextSource
from quantkit.runtime import plugin
from quantkit_eval import gate
from quantkit_eval.compare import Comparison, compare
from quantkit_eval.generate import continuation
from quantkit_eval.windows import heldout_windows

VALIDATED, FAILED, UNVALIDATED = "validated", "failed", "unvalidated"
SAMPLE_TOKENS = 48
# Methods that transformers reads not at all, or with packages that need a GPU; and those that it reads on a GPU alone.
NOT_LOADED = ("gptq", "awq", "modelopt")
NOT_ON_CPU = (*NOT_LOADED, "fp8")


@dataclass(frozen=True)
class Validation:
    """An output measured against its original. `status`: "validated" when every gate passed, else "failed".

    notes  what was measured in the output's stead, and what of its quantization was not; empty when it was loaded
    """

    comparison: Comparison
    gates: list[gate.GateResult]
    samples: dict[str, str]
    message: str
    notes: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        return VALIDATED if all(g.passed for g in self.gates) else FAILED

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as quantkit.json has them."""
        return {
            "status": self.status,
            "message": self.message,
            "comparison": self.comparison.to_dict(),
            "gates": [asdict(g) for g in self.gates],
            "samples": self.samples,
            "notes": list(self.notes),
        }


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
        validation: Validation | None = None
        unusable: GateError | None = None
        for line in timed.lines():
            progress.say(line)
        if settled.validation is not None:
            try:
                validation = _validate(
                    staging, plan.source, settled.validation, where, progress, done["layers"], settled
                )
                outcome = validation.to_dict()
                if chosen is not None:
                    progress.say(allocation.verdict(chosen, validation.comparison.kl))
            except GateError as e:
                unusable, outcome = e, {"status": FAILED, "message": str(e)}
            summary = {**summary, "status": outcome["status"], "validation": outcome}
            output.write_json(staging / output.SUMMARY, summary)
    if unusable is not None:
        raise GateError(f"{folder}: {unusable}")
    return Result(folder, summary, validation)


def validate(
    folder: str | Path,
    *,
    against: str | Path | None = None,
    data: str | None = None,
    windows: int | None = None,
    length: int | None = None,
    gates: Mapping[str, float] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Validation:
    """Measures a quantized folder against its original, and marks the folder with the outcome when it is ours.

    What is not given is what the recipe beside the weights says. `against` is needed for other tools' checkpoints.
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
    layers, outcome = summary.get("layers", []), {}
    try:
        result = _validate(folder, source, settings, pick_device(device), progress or Silent(), layers, recipe, gates)
        outcome = result.to_dict()
    except GateError as e:
        outcome = {"status": FAILED, "message": str(e)}
        raise
    finally:
        if ours and outcome:
            output.write_json(folder / output.SUMMARY, {**summary, "status": outcome["status"], "validation": outcome})
    return result


def load(path: str | Path, **kwargs: Any) -> Any:
    """A checkpoint as a transformers model, its weights still packed.

    kwargs  as for `AutoModelForCausalLM.from_pretrained`: dtype, device_map, ...
    Raises InputError when the folder is no model or cannot be loaded.
    """
    plugin.install()
    method = _quant_method(Path(path))
    if method == "modelopt":  # transformers skips a method that it does not know, and leaves the weights random
        raise InputError(
            f"{path}: transformers does not read modelopt; quantkit convert {path} --to dense, and load that"
        )
    try:
        return AutoModelForCausalLM.from_pretrained(path, **kwargs)
    except (OSError, ValueError, KeyError, ImportError) as e:
        why = (str(e).splitlines() or [type(e).__name__])[0][:300]
        advice = f"; or quantkit convert {path} --to dense, and load that" if method in NOT_LOADED else ""
        raise InputError(f"{path}: cannot be loaded: {why}{advice}") from e


def _quant_method(folder: Path) -> str | None:
    """The quant_method of a folder on this machine; None when it has none, or is a Hub id."""
    if not (folder / "config.json").is_file():
        return None
    found = packed.find_config(folder, hub.read_json(folder / "config.json"))
    return None if found is None else str(found.get("quant_method"))


def _has_packed_experts(folder: Path, method: str, trust: bool) -> bool:
    """Whether a folder packs experts each by itself, which transformers merges while loading."""
    if method not in (formats.get(name).QUANT_METHOD for name in formats.names()):
        return False  # another tool's own; transformers reads it or says why not
    layers = packed.groups(formats.by_method(method), Checkpoint.open(folder).specs)
    return skeleton.merges(folder, layers, trust_remote_code=trust)


@contextmanager
def _loadable(
    folder: Path, device: torch.device, progress: Progress, *, trust: bool = False
) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The folder itself where transformers reads its format, else a dense copy of it for as long as this lasts.

    The copy has the codes that are on disk, decoded and rounded to the model's dtype; it lies beside the folder. With
    it comes what of the quantization it lacks.
    """
    method = _quant_method(folder)
    if method in (NOT_ON_CPU if device.type == "cpu" else NOT_LOADED):
        why = f"transformers does not read {method} here"
    elif method is not None and _has_packed_experts(folder, method, trust):
        why = "transformers decodes packed experts only of some formats"
    else:
        yield folder, ()
        return
    said = f"{why}: what is measured is a dense copy, decoded from the codes on disk"
    progress.say(said)
    try:
        place = tempfile.TemporaryDirectory(prefix=f".{folder.name}.dense-", dir=folder.resolve().parent)
    except OSError as e:
        raise MissingError(f"{folder.resolve().parent}: no dense copy can be made here ({e.strerror})") from None
    with place as copy:
        missing = dense_copy(folder, Path(copy))
        for line in missing:
            progress.warn(line)
        yield Path(copy), (said, *missing)


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


def _validate(
    folder: Path,
    source: hub.Source,
    settings: Settings,
    device: torch.device,
    progress: Progress,
    layers: list[dict[str, Any]],
    recipe: Recipe | None,
    gates: Mapping[str, float] | None = None,
) -> Validation:
    """Loads both models from disk, as a user would, and compares them."""
    wanted = settings.perplexity
    trust = recipe is not None and recipe.trust_remote_code
    tokenizer = planning.tokenizer(source, trust_remote_code=trust)
    texts = calibration.load_texts(**wanted.model_dump(include=set(TextSource.model_fields)), tokenizer=tokenizer)
    windows = heldout_windows(texts, tokenizer, length=wanted.length, count=wanted.windows, warn=progress.warn)
    dtype = torch.float32 if device.type == "cpu" else "auto"
    progress.say(f"validation: {windows.shape[0]} windows of {windows.shape[1]} tokens from {wanted.data}")
    original = load(source.folder, dtype=dtype, trust_remote_code=trust).to(device)
    with _loadable(folder, device, progress, trust=trust) as (place, notes):
        quantized = load(place, dtype=dtype, trust_remote_code=trust).to(device)
    progress.begin(windows.shape[0], "window")
    comparison = compare(original, quantized, windows, on_progress=lambda done, _: progress.item(done, "compared"))
    progress.end()
    limits = {k: v for k, v in settings.gates.model_dump().items() if v is not None} if gates is None else gates
    results = gate.check(comparison, limits)
    samples = {}
    if settings.prompt:
        samples = {
            "prompt": settings.prompt,
            "original": continuation(original, tokenizer, settings.prompt, SAMPLE_TOKENS),
            "quantized": continuation(quantized, tokenizer, settings.prompt, SAMPLE_TOKENS),
        }
    message = gate.failure_message(results, gate.worst_layers(layers))
    return Validation(comparison, results, samples, message, notes)
