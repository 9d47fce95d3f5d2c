"""On what a run computes: what beside versions may decide the last bit of an output."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def describe(device: torch.device) -> dict[str, str]:
    """The device's name, and what of it decides in which order sums are taken."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    return {"device": _processor(), "instructions": torch.backends.cpu.get_cpu_capability()}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
