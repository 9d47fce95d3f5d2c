"""What a validation found, and results.json: everything that was measured, in one file that a program can read.

quantkit.json   what the output is, and the figures that it is judged by; the same work gives the same file
results.json    the same keys, and beside them every window, item and generated text, the seconds, and the machine

The second is made of the first whenever an output is validated and never read back, so no figure has two sources.
Numbers that JSON does not have are the texts "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.advice import Advice
from quantkit.checkpoint import Checkpoint, nbytes
from quantkit.errors import InputError
from quantkit.hub import Source
from quantkit.profile import Profile
from quantkit_eval.compare import Comparison
from quantkit_eval.flips import Flips
from quantkit_eval.gate import GateResult
from quantkit_eval.kept_logits import Bounds
from quantkit_eval.task_comparison import TaskComparison
from quantkit_eval.task_results import TaskResults

VALIDATED, FAILED, UNVALIDATED = "validated", "failed", "unvalidated"
FORMAT = 1


@dataclass(frozen=True)
class Text:
    """How both models go on after the same held-out text, greedily, to the end of text or as far as was asked."""

    prompt: str
    original: str
    quantized: str


@dataclass(frozen=True)
class Validation:
    """An output measured against its original. `status`: "validated" when no gate stands in the way, else "failed".

    notes      what was measured in the output's stead, and what of its quantization was not; empty when it was loaded
    kl_bounds  how sure the KL divergence is where the models were measured one after the other; None side by side
    data       the texts that the windows are of
    texts      a few that both models wrote
    by_item    what lm-eval found on original and output; None without tasks
    """

    comparison: Comparison
    gates: list[GateResult]
    samples: dict[str, str]
    message: str
    notes: tuple[str, ...] = ()
    flips: Flips | None = None
    tasks: tuple[TaskComparison, ...] = ()
    task_arguments: dict[str, Any] | None = None
    kl_bounds: Bounds | None = None
    data: str = ""
    texts: tuple[Text, ...] = ()
    by_item: tuple[TaskResults, TaskResults] | None = None

    @property
    def status(self) -> str:
        return VALIDATED if all(g.passed for g in self.gates) else FAILED

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as quantkit.json has them."""
        return {
            "status": self.status,
            "message": self.message,
            "data": self.data,
            "comparison": self.comparison.to_dict(),
            "side_by_side": self.kl_bounds is None,
            "kl_bounds": None if self.kl_bounds is None else self.kl_bounds.to_dict(),
            "flips": None if self.flips is None else self.flips.to_dict(),
            "tasks": {task.name: task.to_dict() for task in self.tasks},
            "task_arguments": self.task_arguments,
            "gates": [g.to_dict() for g in self.gates],
            "samples": self.samples,
            "notes": list(self.notes),
        }

    def details(self) -> dict[str, Any]:
        """What quantkit.json leaves out, as results.json has it: every window, item and text."""
        lists = self.comparison.to_dict(by_window=True)
        both = self.by_item or ()
        return {
            "by_window": {name: value for name, value in lists.items() if isinstance(value, list)},
            "by_item": {name: found.to_dict() for name, found in zip(("original", "quantized"), both)},
            "texts": [asdict(text) for text in self.texts],
        }


def collect(
    summary: Mapping[str, Any],
    proof: Validation | None,
    advised: Advice | None,
    source: Source,
    folder: Path,
    device: torch.device,
    timed: Mapping[str, Profile],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """The content of results.json.

    summary  of quantkit.json, or of a checkpoint that is not ours what is known of it
    proof    None where nothing could be measured
    advised  what to try next
    source, folder  original and output, for the sizes in their headers
    timed    by stage: "quantize", "validate"; the stages of the command that writes this
    warnings those of the command, beside the ones in `summary`
    """
    size, by_block = sizes(source, folder)
    return {
        "results": FORMAT,
        "size": size,
        **summary,
        "by_block": by_block,
        **({} if proof is None else proof.details()),
        "try_next": None if advised is None else advised.to_dict(),
        "seconds": {stage: dict(profile.seconds) for stage, profile in timed.items() if profile.seconds},
        "machine": _machine(device),
        "run_warnings": list(dict.fromkeys(warnings)),
    }


def sizes(source: Source, folder: Path) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Bytes of tensors of original and output, in all, and by the number of their block; "" for what is in none.

    weights  of the original, for bits a weight. Both are empty where one of them is not safetensors.
    """
    try:
        found = {"source_bytes": source.checkpoint(), "output_bytes": Checkpoint.open(folder)}
    except InputError:
        return {}, {}
    blocks: dict[str, dict[str, int]] = {}
    for key, checkpoint in found.items():
        for name, spec in checkpoint.specs.items():
            number = next((part for part in name.split(".") if part.isdigit()), "")
            counts = blocks.setdefault(number, {"weights": 0, "source_bytes": 0, "output_bytes": 0})
            counts[key] += nbytes(spec)
            if key == "source_bytes":
                counts["weights"] += math.prod(spec.shape)
    ordered = {number: blocks[number] for number in sorted(blocks, key=lambda x: (x == "", int(x or 0)))}
    return {key: checkpoint.size() for key, checkpoint in found.items()}, ordered


def plain(value: Any) -> Any:
    """The value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _machine(device: torch.device) -> dict[str, Any]:
    """Where it ran, and the most memory that this process has had so far."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": _peak_memory(),
    }
    if device.type == "cuda":
        found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


def _peak_memory() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
