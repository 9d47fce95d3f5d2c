"""A checkpoint as a transformers model: packed where transformers can be made to read it so, else as a dense copy."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from quantkit import formats, hub, packed, skeleton
from quantkit.checkpoint import Checkpoint
from quantkit.convert import dense_copy
from quantkit.errors import InputError, MissingError
from quantkit.progress import Progress
from quantkit.runtime import plugin

# Methods that transformers reads not at all, or with packages that need a GPU; and those that it reads on a GPU alone.
NOT_LOADED = ("gptq", "awq", "modelopt")
NOT_ON_CPU = (*NOT_LOADED, "fp8")


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
def loadable(
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
