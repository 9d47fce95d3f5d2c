"""`quantkit bench`: a packed checkpoint beside bf16 of the same config, and where bf16 is the better choice."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from quantkit.errors import InputError
from quantkit.loading import load
from quantkit.runtime import timing
from quantkit.runtime.timing import Speed

AUTO = "auto"
LONG = 4096  # tokens of the long prompt, where the model takes so many


@dataclass(frozen=True)
class Measured:
    """One model: its bytes, and its times by batch and by the tokens of a prompt."""

    name: str
    bytes: int
    embeddings: int
    speeds: tuple[Speed, ...]
    prefill: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "speeds": [speed.to_dict() for speed in self.speeds]}


@dataclass(frozen=True)
class Bench:
    """What was measured. `dense` is None when it did not fit into memory; `notes` say what a reader must know."""

    device: str
    packed: Measured
    dense: Measured | None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        dense = None if self.dense is None else self.dense.to_dict()
        return {"device": self.device, "packed": self.packed.to_dict(), "dense": dense, "notes": self.notes}

    def without_paths(self) -> Bench:
        """Under names that say nothing of this machine: for a file that others will read."""
        packed = replace(self.packed, name="packed")
        return replace(self, packed=packed, dense=None if self.dense is None else replace(self.dense, name="bf16"))


@dataclass(frozen=True)
class _Work:
    """What is measured of each model."""

    batches: tuple[int, ...]
    prompt: int
    new: int
    loop: str
    runs: int
    lengths: tuple[int, ...]


def bench(
    folder: str | Path,
    *,
    device: torch.device,
    against: str = AUTO,
    batches: Sequence[int] = (1, 16),
    prompt: int = 128,
    new: int = 128,
    loop: str = "quantkit",
    runs: int = 5,
) -> Bench:
    """Measures a checkpoint, then bf16 of the same config, one after the other, so that each has the memory.

    against  a folder with the dense model, or "auto": random weights of the same config, which take the same time
    Raises InputError for a folder that cannot be loaded, and for lengths that the model does not take.
    """
    if min(prompt, new, runs, *batches) < 1 or new < 2:
        raise InputError("--prompt, --runs and every --batch must be 1 or more, --new 2 or more")
    config = AutoConfig.from_pretrained(folder)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and prompt + new > longest:
        raise InputError(f"{folder}: takes {longest} tokens, and --prompt {prompt} with --new {new} are more")
    lengths = sorted({prompt, min(LONG, longest or LONG)})
    work = _Work(tuple(batches), prompt, new, loop, runs, tuple(lengths))
    model = load(folder, dtype=torch.bfloat16, device_map=device)
    packed = _measured(str(folder), model, work)
    del model
    _free(device)
    name = "bf16, random weights of the same config" if against == AUTO else f"bf16, {Path(against).name}"
    notes = [] if device.type == "cuda" else ["measured on a CPU: its figures say nothing about a GPU"]
    dense = None
    try:
        if against == AUTO:
            model = timing.random_dense(config, device)
        else:
            model = load(against, dtype=torch.bfloat16, device_map=device)
        dense = _measured(name, model, work)
    except torch.OutOfMemoryError:
        notes.append(f"{name}: does not fit into the memory of {device}; there is nothing to compare with")
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found = Bench(what, packed, dense, notes)
    found.notes.extend(advice(found))
    return found


def _measured(name: str, model: Any, work: _Work) -> Measured:
    size = timing.weight_bytes(model)
    speeds = tuple(
        timing.generation(model, batch, work.prompt, work.new, loop=work.loop, runs=work.runs) for batch in work.batches
    )
    reading = {length: timing.prefill(model, 1, length, runs=work.runs) for length in work.lengths}
    return Measured(name, size["all"], size["embeddings"], speeds, reading)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def advice(found: Bench) -> list[str]:
    """Where bf16 is the better choice, in words; that it is nowhere, is said too."""
    if found.dense is None:
        return []
    lines = []
    for ours, theirs in zip(found.packed.speeds, found.dense.speeds):
        if theirs.rate > ours.rate:
            lines.append(f"batch {ours.batch}: bf16 generates {theirs.rate / ours.rate:.2f} times as fast")
    for length, seconds in found.packed.prefill.items():
        dense = found.dense.prefill[length]
        if dense < seconds:
            lines.append(f"a prompt of {length} tokens: bf16 reads it {seconds / dense:.2f} times as fast")
    if not lines:
        return ["bf16 is slower in everything that was measured"]
    memory = found.dense.bytes / found.packed.bytes
    return [
        "bf16 is the better choice where memory does not matter and most of the work is of this kind:",
        *lines,
        f"it takes {memory:.2f} times the memory for its weights",
    ]


def section(found: Bench, size: Any) -> dict[str, Any]:
    """For report.print_section. size: bytes -> text."""
    models = [m for m in (found.packed, found.dense) if m is not None]
    facts = [
        ("device", found.device),
        ("measured with", timing.LOOPS[found.packed.speeds[0].loop]),
        *((m.name, f"{size(m.bytes)} of weights, {size(m.embeddings)} of them embeddings and head") for m in models),
    ]
    columns = ["", "packed", "bf16", "packed / bf16"]
    rows: list[list[str]] = []
    for i, ours in enumerate(found.packed.speeds):
        theirs = found.dense.speeds[i] if found.dense else None
        what = f"{ours.prompt} + {ours.new} tokens, batch {ours.batch}"
        rows.append(_row(f"{what}: tok/s", ours.rate, theirs.rate if theirs else None))
        rows.append(_row("  after the first token", ours.decode_rate, theirs.decode_rate if theirs else None))
    for length, seconds in found.packed.prefill.items():
        other = found.dense.prefill[length] if found.dense else None
        rows.append(_row(f"prompt of {length} tokens, ms", 1000 * seconds, None if other is None else 1000 * other))
    return {
        "title": found.packed.name,
        "facts": facts,
        "table": {"columns": columns, "rows": rows},
        "sections": [{"facts": [("", note) for note in found.notes]}] if found.notes else [],
    }


def _row(label: str, ours: float, theirs: float | None) -> list[str]:
    if theirs is None:
        return [label, f"{ours:.4g}", "", ""]
    return [label, f"{ours:.4g}", f"{theirs:.4g}", f"{ours / theirs:.2f}"]
