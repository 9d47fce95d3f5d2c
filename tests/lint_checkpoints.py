"""Checkpoints for the tests of the engines' rules: clean ones that quantkit writes, and copies to break."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit import lint

ALL = {"vllm", "sglang", "tensorrt-llm", "transformers"}
MODEL = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "num_hidden_layers": 1}
LAYER = "model.layers.0"
Tensors = dict[str, torch.Tensor]


class Checkpoints:
    """Outputs of quantkit, each made once and copied for who wants to break it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def model(self, **changes: Any) -> Path:
        folder = self.folder / ("model" + "".join(f"-{k}-{v}" for k, v in sorted(changes.items())))
        return folder if folder.exists() else tiny.save(folder, **{**MODEL, **changes})

    def settings(self, scheme: object = "W4A16", model: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        return {
            "model": str(self.model(**(model or {}))),
            "scheme": scheme,
            "method": "rtn",
            "calibration": {"samples": 4, "length": 32, "batch_size": 2},
            "validate": "none",
            "export": {"engines": []},
            **changes,
        }

    def clean(self, scheme: object = "W4A16", **changes: Any) -> Path:
        name = "".join(c for c in f"{scheme}{changes}" if c.isalnum())
        if not (self.folder / name).exists():
            quantkit.quantize(self.settings(scheme, **changes), out=self.folder / name, device="cpu")
        return self.folder / name

    def copy(
        self,
        folder: Path,
        *,
        config: Callable[[dict[str, Any]], Any] | None = None,
        quantization: Callable[[dict[str, Any]], Any] | None = None,
        tensors: Callable[[Tensors], Any] | None = None,
    ) -> Path:
        """A copy of a checkpoint, with changes to its config.json, its quantization_config or its tensors."""
        self.count += 1
        place = self.folder / f"copy-{self.count}"
        shutil.copytree(folder, place)
        content = json.loads((place / "config.json").read_text())
        if config is not None:
            config(content)
        if quantization is not None:
            quantization(content["quantization_config"])
        (place / "config.json").write_text(json.dumps(content))
        if tensors is not None:
            found = load_file(place / "model.safetensors")
            tensors(found)
            save_file({k: t.contiguous() for k, t in found.items()}, place / "model.safetensors", {"format": "pt"})
        return place


def says(folder: Path, rule: str, level: str = "error", tp: int = 1) -> set[str]:
    """The engines for which a rule says something, at a level."""
    return {f.engine for f in lint.folder(folder, tp=tp) if (f.rule, f.level) == (rule, level)}


def errors(folder: Path, tp: int = 1) -> dict[str, set[str]]:
    """engine -> rules that say error."""
    found: dict[str, set[str]] = {}
    for f in lint.folder(folder, tp=tp):
        if f.level == lint.ERROR:
            found.setdefault(f.engine, set()).add(f.rule)
    return found


def group(quantization: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = quantization["config_groups"]["group_0"]
    return found
