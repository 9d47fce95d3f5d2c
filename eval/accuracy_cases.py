"""What eval/accuracy.py compares: one case a line of quantkit, each with the nearest that the peer has.

A `Job` is one way to quantize one model by one tool; several cases may share a job, which then runs once. What a job is
asked lies in its `settings`: for quantkit a part of a recipe, for the peer options of eval/peers/llmcompressor_run.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS, PEER = "quantkit", "llm-compressor"
PYDOCS, OUTLIERS, MOE = "pydocs-llama-7m", "pydocs-llama-7m with outliers", "docs-moe-27m"
MINMAX, MSE, IMATRIX, NVFP4_SEARCH = "memoryless_minmax", "memoryless_mse", "imatrix_mse", "nvfp4_expanded_mse"
OBSERVERS = {MINMAX: "", MSE: "scale search", IMATRIX: "scale search by E[x²]", NVFP4_SEARCH: "wide scale search"}


@dataclass(frozen=True)
class Job:
    """One tool, one model, one way. `uses_data`: its output depends on the calibration rows."""

    model: str
    tool: str
    settings: dict[str, Any]
    label: str
    uses_data: bool


@dataclass(frozen=True)
class Case:
    """A line of quantkit and what it stands beside."""

    name: str
    ours: Job
    peers: tuple[Job, ...] = field(default=())


@dataclass(frozen=True)
class Setting:
    """What all runs of a log have in common; `folders` says where the models are."""

    calibration: Path
    heldout: Path
    samples: int
    length: int
    windows: int
    folders: dict[str, Path]
    peer_python: str | None = None
    threads: int = 1
    device: str = "cpu"

    def key(self, job: Job, order: int) -> str:
        """A run's name in the log: what decides its figures, without places on this machine."""
        texts = f"{self.calibration.name} {self.samples}x{self.length}"
        windows = f"{self.heldout.name} {self.windows}x{self.length}"
        return json.dumps([job.model, job.tool, job.settings, order, texts, windows], sort_keys=True)


def ours(model: str, scheme: Any, how: str, *transforms: dict[str, Any], label: str = "", **calibration: Any) -> Job:
    """quantkit. `how`: the name of a method, or "effort" and one of its words; `calibration`: keys of that section."""
    key, _, value = how.rpartition(" ")
    settings: dict[str, Any] = {"scheme": scheme, key or "method": value}
    if transforms:
        settings["transforms"] = list(transforms)
    if calibration:
        settings["calibration"] = calibration
    parts = [name + "".join(f" {k} {v}" for k, v in t[name].items()) for t in transforms for name in t]
    parts += [f"{k.replace('_', ' ')} {v}" for k, v in calibration.items()]
    uses_data = how not in ("rtn", "effort fast") or bool(transforms)
    return Job(model, OURS, settings, f"{label or scheme}: {' + '.join([*parts, how])}", uses_data)


def peer(model: str, scheme: str, method: str, transform: str = "none", observer: str = MINMAX, **options: Any) -> Job:
    """llm-compressor."""
    settings = {"scheme": scheme, "method": method, "transform": transform, "observer": observer, **options}
    parts = [] if transform == "none" else [" ".join([transform, *(f"{k} {v}" for k, v in options.items())])]
    label = f"{scheme}: {' + '.join([*parts, method])}"
    search = OBSERVERS[observer]
    uses_data = method == "gptq" or transform != "none" or observer == IMATRIX
    return Job(model, PEER, settings, f"{label}, {search}" if search else label, uses_data)


def _searched(model: str, scheme: str, method: str, *observers: str) -> tuple[Job, ...]:
    """The peer with each way to choose its scales."""
    return tuple(peer(model, scheme, method, observer=x) for x in observers)


AWQ, SMOOTHQUANT, ROTATION = {"awq": {}}, {"smoothquant": {}}, {"rotation": {}}  # type: ignore[var-annotated]
GPTQ_W4 = _searched(PYDOCS, "W4A16", "gptq", MINMAX, MSE, IMATRIX)
GPTQ_W3 = _searched(PYDOCS, "W3A16", "gptq", MINMAX, MSE, IMATRIX)
GPTQ_NVFP4 = _searched(PYDOCS, "NVFP4A16", "gptq", MINMAX, MSE, NVFP4_SEARCH)
GPTQ_MXFP4 = _searched(PYDOCS, "MXFP4A16", "gptq", MINMAX, MSE)
RTN_W8A8 = _searched(OUTLIERS, "W8A8", "rtn", MINMAX)
SMOOTH_W8A8 = tuple(peer(OUTLIERS, "W8A8", "rtn", "smoothquant", alpha=a) for a in (0.5, 0.8))
MOE_GPTQ = _searched(MOE, "W4A16", "gptq", MINMAX, MSE)
W2_G32 = {"preset": "W2A16", "group_size": 32}


def _auto(bits: float) -> dict[str, Any]:
    return {"auto": {"bits": bits, "candidates": ["W3A16", "W4A16", "W8A16"]}}


CASES: tuple[Case, ...] = (
    Case("w4a16-rtn", ours(PYDOCS, "W4A16", "rtn"), _searched(PYDOCS, "W4A16", "rtn", MINMAX, MSE)),
    Case("w4a16-gptq", ours(PYDOCS, "W4A16", "effort default"), GPTQ_W4),
    Case("w4a16-fast", ours(PYDOCS, "W4A16", "effort fast"), _searched(PYDOCS, "W4A16", "rtn", MSE)),
    Case("w4a16-best", ours(PYDOCS, "W4A16", "effort best"), GPTQ_W4),
    Case("w4a16-awq-rtn", ours(PYDOCS, "W4A16", "rtn", AWQ), (peer(PYDOCS, "W4A16", "rtn", "awq"),)),
    Case("w4a16-awq-gptq", ours(PYDOCS, "W4A16", "gptq", AWQ), (peer(PYDOCS, "W4A16", "gptq", "awq"), GPTQ_W4[1])),
    Case("w4a16-autoround", ours(PYDOCS, "W4A16", "autoround"), GPTQ_W4[:2]),
    Case(
        "w4a16-rotation-gptq",
        ours(PYDOCS, "W4A16", "gptq", ROTATION),
        (peer(PYDOCS, "W4A16", "gptq", "spinquant"), GPTQ_W4[1]),
    ),
    Case("w4a16asym-rtn", ours(PYDOCS, "W4A16_ASYM", "rtn"), _searched(PYDOCS, "W4A16_ASYM", "rtn", MINMAX, MSE)),
    Case("w4a16asym-gptq", ours(PYDOCS, "W4A16_ASYM", "gptq"), _searched(PYDOCS, "W4A16_ASYM", "gptq", MINMAX, MSE)),
    Case("w4a16asym-awq-rtn", ours(PYDOCS, "W4A16_ASYM", "rtn", AWQ), (peer(PYDOCS, "W4A16_ASYM", "rtn", "awq"),)),
    Case("w3a16-rtn", ours(PYDOCS, "W3A16", "rtn"), _searched(PYDOCS, "W3A16", "rtn", MINMAX, MSE)),
    Case("w3a16-gptq", ours(PYDOCS, "W3A16", "effort default"), GPTQ_W3),
    Case("w3a16-best", ours(PYDOCS, "W3A16", "effort best"), GPTQ_W3),
    Case("w3a16-autoround", ours(PYDOCS, "W3A16", "autoround"), GPTQ_W3[:2]),
    Case(
        "nvfp4a16-rtn", ours(PYDOCS, "NVFP4A16", "rtn"), _searched(PYDOCS, "NVFP4A16", "rtn", MINMAX, MSE, NVFP4_SEARCH)
    ),
    Case("nvfp4a16-gptq", ours(PYDOCS, "NVFP4A16", "effort default"), GPTQ_NVFP4),
    Case("nvfp4a16-best", ours(PYDOCS, "NVFP4A16", "effort best"), GPTQ_NVFP4),
    Case("mxfp4a16-rtn", ours(PYDOCS, "MXFP4A16", "rtn"), _searched(PYDOCS, "MXFP4A16", "rtn", MINMAX, MSE)),
    Case("mxfp4a16-gptq", ours(PYDOCS, "MXFP4A16", "effort default"), GPTQ_MXFP4),
    Case("mxfp4a16-plain-gptq", ours(PYDOCS, "MXFP4A16", "gptq"), GPTQ_MXFP4[:1]),
    Case("mxfp4a16-best", ours(PYDOCS, "MXFP4A16", "effort best"), GPTQ_MXFP4),
    Case("mxfp4a16-rotation-gptq", ours(PYDOCS, "MXFP4A16", "gptq", {"rotation": {"size": 32}}), GPTQ_MXFP4),
    Case("w8a8-clean-rtn", ours(PYDOCS, "W8A8", "rtn"), _searched(PYDOCS, "W8A8", "rtn", MINMAX)),
    Case("w8a8-rtn", ours(OUTLIERS, "W8A8", "rtn"), RTN_W8A8),
    Case("w8a8-smoothquant-rtn", ours(OUTLIERS, "W8A8", "rtn", SMOOTHQUANT), SMOOTH_W8A8),
    Case(
        "w8a8-smoothquant-gptq",
        ours(OUTLIERS, "W8A8", "gptq", SMOOTHQUANT),
        (peer(OUTLIERS, "W8A8", "gptq", "smoothquant", alpha=0.8),),
    ),
    Case("w8a8-awq-rtn", ours(OUTLIERS, "W8A8", "rtn", AWQ), (peer(OUTLIERS, "W8A8", "rtn", "awq"),)),
    Case("fp8-rtn", ours(OUTLIERS, "FP8_DYNAMIC", "rtn"), _searched(OUTLIERS, "FP8_DYNAMIC", "rtn", MINMAX)),
    Case(
        "fp8-smoothquant-rtn",
        ours(OUTLIERS, "FP8_DYNAMIC", "rtn", SMOOTHQUANT),
        (peer(OUTLIERS, "FP8_DYNAMIC", "rtn", "smoothquant", alpha=0.8),),
    ),
    Case("w2g32-gptq", ours(PYDOCS, W2_G32, "gptq", label="W2A16 g32")),
    Case("w2g32-autoround", ours(PYDOCS, W2_G32, "autoround", label="W2A16 g32")),
    Case("auto-4.25", ours(PYDOCS, _auto(4.25), "gptq", label="auto, 4.25 bits")),
    Case("auto-3.5", ours(PYDOCS, _auto(3.5), "gptq", label="auto, 3.5 bits")),
    Case("moe-rtn", ours(MOE, "W4A16", "rtn"), _searched(MOE, "W4A16", "rtn", MINMAX, MSE)),
    Case("moe-gptq", ours(MOE, "W4A16", "gptq"), MOE_GPTQ),
    Case("moe-gptq-routed", ours(MOE, "W4A16", "gptq", expert_prior=0.0), MOE_GPTQ[:1]),
    Case("moe-awq-rtn", ours(MOE, "W4A16", "rtn", AWQ), (peer(MOE, "W4A16", "rtn", "awq"),)),
    Case("moe-awq-gptq", ours(MOE, "W4A16", "gptq", AWQ)),
    Case("moe-mxfp4-rtn", ours(MOE, "MXFP4A16", "rtn")),
    Case("moe-mxfp4-gptq", ours(MOE, "MXFP4A16", "gptq")),
    Case("moe-mxfp4-awq-rtn", ours(MOE, "MXFP4A16", "rtn", AWQ)),
    Case("moe-mxfp4-awq-gptq", ours(MOE, "MXFP4A16", "gptq", AWQ)),
)
