"""One run, from a recipe to a measured output: the choice of schemes, the passes that repair takes, what is written.

What is finished is in the journal: the choice once it is made, each pass of repair, and within a pass each block.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from quantkit import allocation, hardware, hub, output, pipeline, repair, summation, validation
from quantkit import plan as planning
from quantkit.errors import GateError
from quantkit.journal import Journal
from quantkit.profile import Profile
from quantkit.progress import Progress, Silent
from quantkit.ranks import Ranks
from quantkit.recipe import Recipe
from quantkit.results import FAILED, UNVALIDATED, Validation
from quantkit.shards import Shards
from quantkit_eval import gate


def identity(recipe: Recipe, source: hub.Source, device: torch.device) -> dict[str, Any]:
    """What decides the bytes of an output, but for the calibration data, which the run notes itself."""
    # A folder has no revision: the times of its files tell whether they were changed.
    model = {"revision": source.revision} if source.revision else {"files": source.stamp()}
    cuda = device.type == "cuda"
    return {
        "recipe": recipe.to_dict(),
        "source": {"model": source.model, "fingerprint": source.fingerprint(), **model},
        "versions": versions(),
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU with {torch.backends.cpu.get_cpu_capability()}",
        "threads": None if cuda or summation.fixed() else torch.get_num_threads(),
    }


def choose(
    recipe: Recipe, log: Journal, device: torch.device, progress: Progress, texts: Any, source: hub.Source
) -> tuple[Recipe, dict[str, Any] | None]:
    """The recipe with `scheme: {auto: ...}` settled, and the report of the choice, which is made once a run."""
    if recipe.scheme.auto is None:
        return recipe, None
    found = log.last("allocation")
    if found is not None:
        progress.say(allocation.said(found["report"]))
        return Recipe.from_any(found["recipe"]), found["report"]
    settled, report = allocation.allocate(recipe, device=device, progress=progress, texts=texts, source=source)
    log.append("allocation", recipe=settled.to_dict(), report=report)
    return settled, report


@dataclass(frozen=True)
class Run:
    """What one call of `quantize` works with. allocation: the report of a choice of schemes, if there was one.

    profile, checks  take the seconds of the work, and of validation
    log  what is finished
    """

    device: torch.device
    progress: Progress
    profile: Profile
    checks: Profile
    texts: Any
    allocation: dict[str, Any] | None
    shards: Shards | None
    ranks: Ranks
    log: Journal


def assist(folder: Path, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """What ranks but the first do: their part of each quantization that rank 0 begins, until it is done.

    Returns the content of quantkit.json.
    """
    while "summary" not in (message := ranks.told()):
        plan = planning.make(Recipe.parse(message["recipe"]))
        pipeline.quantize(plan, folder, device=device, progress=Silent(), ranks=ranks)
    found: dict[str, Any] = message["summary"]
    return found


Outcome = tuple[dict[str, Any], Validation | None, GateError | None]


def repaired(plan: planning.Plan, staging: Path, run: Run) -> tuple[planning.Plan, Outcome]:
    """`_once`, and again with more bits for the worst layers, where gates fail and the recipe asks for repair.

    Returns the plan that was followed last, and what came of it.
    """
    settings = plan.recipe.validation.repair if plan.recipe.validation is not None else None
    before = run.log.last("pass") or {"layers": [], "steps": []}
    layers, steps = before["layers"], before["steps"]
    step: repair.Step | None = None
    if layers and settings is not None:
        for _ in range(len(steps) + 1):  # to the step that an earlier run was at
            step = repair.next_step(plan, settings, layers, step)
    while True:
        summary, proof, unusable = _once(step.plan if step else plan, staging, run)
        layers = layers or summary["layers"]
        if step is not None:
            steps = [*steps, _step(step, summary, proof)]
        if settings is None or proof is None or not any(g.outcome == "fail" and not g.passed for g in proof.gates):
            break
        following = repair.next_step(plan, settings, layers, step)
        if following is None:
            run.progress.say("repair: no more layers can be kept in higher precision within validate.repair.size")
            break
        step = following
        names = ", ".join(step.groups[:3]) + (f" and {len(step.groups) - 3} more" if len(step.groups) > 3 else "")
        failed = "; ".join(gate.said(g) for g in proof.gates if not g.passed)
        run.progress.say(f"repair: {failed}. Again, with {step.scheme} for {names}")
        if run.shards is not None:
            run.shards.dropped()
        run.log.append("pass", layers=layers, steps=steps)
    if steps:
        summary = {**summary, "repair": {"first_bytes": plan.output_bytes, "steps": steps}}
        output.write_json(staging / output.SUMMARY, summary)
    return step.plan if step else plan, (summary, proof, unusable)


def _step(step: repair.Step, summary: dict[str, Any], proof: Validation | None) -> dict[str, Any]:
    """A step of repair, as quantkit.json has it."""
    return {
        "scheme": step.scheme,
        "groups": list(step.groups),
        "output_bytes": step.plan.output_bytes,
        "kl": None if proof is None else proof.comparison.kl,
        "status": summary["status"],
    }


def _once(plan: planning.Plan, staging: Path, run: Run) -> Outcome:
    """Quantizes, from where the journal says, and measures it: quantkit.json, the proof, or why it is unusable."""
    run.ranks.told({"recipe": plan.recipe.to_yaml()})
    done = pipeline.quantize(
        plan,
        staging,
        device=run.device,
        progress=run.progress,
        profile=run.profile,
        calibration_data=run.texts,
        shards=run.shards,
        ranks=run.ranks,
        journal=run.log,
    )
    (staging / output.RECIPE).write_text(plan.recipe.to_yaml(), "utf-8")
    summary = {**_summary(plan, done), "hardware": hardware.describe(run.device), "allocation": run.allocation}
    output.write_json(staging / output.SUMMARY, summary)
    settings = plan.recipe.validation
    if settings is None:
        return summary, None, None
    proof: Validation | None = None
    unusable: GateError | None = None
    try:
        proof = validation.validate(
            staging,
            plan.source,
            settings,
            settings.gates.limits(),
            device=run.device,
            progress=run.progress,
            layers=done["layers"],
            trust_remote_code=plan.recipe.trust_remote_code,
            profile=run.checks,
        )
        outcome = proof.to_dict()
        if run.allocation is not None:
            run.progress.say(allocation.verdict(run.allocation, proof.comparison.kl))
    except GateError as e:
        unusable, outcome = e, {"status": FAILED, "message": str(e)}
    summary = {**summary, "status": outcome["status"], "validation": outcome}
    output.write_json(staging / output.SUMMARY, summary)
    return summary, proof, unusable


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
        "memory": done["memory"],
        "not_quantized": [{"name": x.name, "reason": x.reason} for x in plan.dense],
        "copied_tensors": plan.skeleton.unknown,
        "files": done["files"],
        "tensors": done["tensors"],
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
