"""What this machine has, what it lacks, what each thing is for and how to get it. Nothing is downloaded or changed."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

# The same floors as in pyproject.toml.
REQUIRED = {
    "torch": "2.11",
    "transformers": "5.17",
    "accelerate": "1.10",
    "safetensors": "0.6",
    "datasets": "5.0",
    "huggingface-hub": "1.5",
    "jinja2": "3.1",
    "numpy": "2.0",
    "pydantic": "2.10",
    "typer": "0.16",
    "rich": "13.9",
    "pyyaml": "6.0.2",
    "regex": "2024.11",
}
PYTHON_FLOOR = "3.10"
OPTIONAL = {
    "triton": "runs packed weights on a GPU; comes with torch on Linux, not needed on a CPU",
    "compressed-tensors": "tests compare checkpoints with it; pip install compressed-tensors",
    "lm-eval": "task accuracy; pip install 'quantkit[eval]'",
    "datasets": "reads calibration data from the Hub; pip install datasets",
    "vllm": "serves the checkpoints; install it in an environment of its own: pip install vllm",
}


@dataclass(frozen=True)
class Check:
    """One line of the report. "bad": quantkit does not work without it; "absent": something useful is not here."""

    name: str
    found: str
    state: Literal["ok", "absent", "bad"] = "ok"
    advice: str = ""


def checks() -> list[Check]:
    """Every line of the report. Imports torch, and asks it for GPUs."""
    found = [_python(), *(_required(name, floor) for name, floor in REQUIRED.items())]
    found += [_optional(name, use) for name, use in OPTIONAL.items()]
    return [*found, *_gpus(), _threads(), _memory(), *_disks(), _login()]


def report(found: list[Check]) -> dict[str, Any]:
    """The checks in the form that report.print_section renders."""
    rows = [[_MARK[check.state], check.name, check.found, check.advice] for check in found]
    return {"title": "quantkit doctor", "table": {"columns": ["", "what", "found", "note"], "rows": rows}}


_MARK = {"ok": "ok", "absent": "-", "bad": "MISSING"}


def older(version: str, floor: str) -> bool:
    """Whether a version is below a floor. Only the leading numbers count: "2.13.0+cpu" is 2.13.0."""

    def numbers(text: str) -> list[int]:
        leading = re.match(r"\d+(?:\.\d+)*", text)
        parts = [int(part) for part in leading[0].split(".")] if leading else [0]
        return parts + [0] * (4 - len(parts))

    return numbers(version) < numbers(floor)


def _python() -> Check:
    version = platform.python_version()
    if older(version, PYTHON_FLOOR):
        return Check("python", version, "bad", f"needs {PYTHON_FLOOR} or newer")
    return Check("python", f"{version} ({platform.system()} {platform.machine()})")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _required(name: str, floor: str) -> Check:
    version = _version(name)
    how = f"needs {floor} or newer: pip install -U '{name}>={floor}'"
    if version is None:
        return Check(name, "not installed", "bad", how)
    return Check(name, version, "bad", how) if older(version, floor) else Check(name, version)


def _optional(name: str, use: str) -> Check:
    version = _version(name)
    return Check(name, "not installed", "absent", use) if version is None else Check(name, version)


def _gpus() -> list[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch is missing
        return [Check("GPU", "unknown", "bad", f"torch cannot be imported: {str(error).splitlines()[0]}")]
    if not torch.cuda.is_available():
        why = "torch finds no usable device" if torch.version.cuda else "this torch is built for CPU"
        return [Check("GPU", "none: runs on CPU, packed weights through torch", "absent", why)]
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        text = f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, compute capability {gpu.major}.{gpu.minor}"
        found.append(Check(f"GPU {index}", text))
    return found


def _threads() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch = sys.modules.get("torch")
    used = f", torch uses {torch.get_num_threads()}" if torch is not None else ""
    return Check("threads", f"{cores} cores{used}")


def _memory() -> Check:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # a system that does not say
        return Check("memory", "unknown", "absent")
    return Check("memory", f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of it unused")


def _disks() -> list[Check]:
    """Room where outputs go by default (here) and where downloads go."""
    places = {"disk, here": os.getcwd()}
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        pass
    else:
        places["disk, downloads"] = HF_HUB_CACHE
    found = []
    for name, place in places.items():
        while not os.path.exists(place):
            place = os.path.dirname(place)
        found.append(Check(name, f"{shutil.disk_usage(place).free / 2**30:.1f} GiB free"))
    return found


def _login() -> Check:
    """Whether there is a token; never which."""
    try:
        from huggingface_hub import get_token
    except ImportError:
        return Check("Hub login", "unknown", "absent", "huggingface-hub is not installed")
    if get_token():
        return Check("Hub login", "yes")
    return Check("Hub login", "no", "absent", "only gated or private models need it: hf auth login")
