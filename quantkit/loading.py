"""A checkpoint as a transformers model: packed where transformers can be made to read it so, else as a dense copy."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from quantkit import formats, hub, packed, skeleton
from quantkit.checkpoint import DTYPES, Checkpoint
from quantkit.convert import dense_copy
from quantkit.errors import InputError, MissingError
from quantkit.progress import Progress
from quantkit.runtime import planning, plugin


def load(path: str | Path, **kwargs: Any) -> Any:
    """A checkpoint as a transformers model, its weights still packed: a language model, or the wrapper that it lies in.

    kwargs  as for `from_pretrained` of transformers' classes: dtype, device_map, ...
    Raises InputError when the folder is no model or cannot be loaded.
    """
    plugin.install()
    try:
        own = {key: kwargs[key] for key in ("trust_remote_code", "revision", "token", "cache_dir") if key in kwargs}
        config = kwargs.get("config") or AutoConfig.from_pretrained(path, **own)
        return skeleton.auto_class(config).from_pretrained(path, **kwargs)
    except (OSError, ValueError, KeyError, ImportError) as e:
        why = (str(e).splitlines() or [type(e).__name__])[0][:300]
        advice = f"; or quantkit convert {path} --to dense, and load that" if _quantization(Path(path)) else ""
        raise InputError(f"{path}: cannot be loaded: {why}{advice}") from e


def _quantization(folder: Path) -> dict[str, Any] | None:
    """The quantization config of a folder on this machine; None when it has none, or is a Hub id."""
    if not (folder / "config.json").is_file():
        return None
    return packed.find_config(folder, hub.read_json(folder / "config.json"))


def not_held(folder: Path, *, trust: bool = False) -> str | None:
    """Why a folder on this machine cannot stay packed in transformers; None when it can, or is not quantized.

    Nothing but headers is read. What another tool's own format needs is not known here: None.
    """
    config = _quantization(folder)
    if config is None or config.get("quant_method") not in [formats.get(n).QUANT_METHOD for n in formats.names()]:
        return None
    form = formats.by_method(str(config["quant_method"]))
    read = form.read_config(config)
    if read.unsupported is not None:
        # transformers' own loader, or its error, is as good as what could be said here
        return None if form.QUANT_METHOD == "compressed-tensors" else str(read.unsupported)
    checkpoint = Checkpoint.open(folder)
    model = skeleton.unquantized(folder, checkpoint, trust_remote_code=trust)
    files = sorted({str(file) for file in checkpoint.where.values()})
    try:
        planning.plan(model, form, read, files)
        planning.caches(model, form, read, files)
    except planning.NotHeld as reason:
        return str(reason)
    return None


@contextmanager
def loadable(folder: Path, progress: Progress, *, trust: bool = False) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The folder itself where it stays packed, else a dense copy of it for as long as this lasts.

    The copy has the codes that are on disk, decoded and rounded to the model's dtype; it lies beside the folder. With
    it comes what of the quantization it lacks.
    """
    why = not_held(folder, trust=trust)
    if why is None:
        yield folder, ()
        return
    said = f"not kept packed ({why}): what is measured is a dense copy, decoded from the codes on disk"
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


def load_original(source: hub.Source, *, trust: bool = False, dtype: Any = "auto") -> Any:
    """A source's model, as `load`; one of the Hub is fetched first, all shards of it.

    Where fetched shards are deleted after use, they come one after the other and go as the weights are in memory.
    Raises what `load` raises, and MissingError when the Hub or the disk fails.
    """
    shards = source.shards
    if shards is not None and shards.delete:
        return _streamed(source, trust, dtype)
    if shards is not None:
        shards.fetch_all(sorted({file.name for file in source.checkpoint().where.values()}))
    return load(source.folder, dtype=dtype, trust_remote_code=trust)


class _Unread:
    """A tensor that transformers reads when it comes to it, as it does those of a safetensors file."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._checkpoint.read(self._name)


def _streamed(source: hub.Source, trust: bool, dtype: Any) -> Any:
    checkpoint = source.checkpoint()
    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust)
    if dtype == "auto":
        dtype = config.dtype or next(DTYPES[s.dtype] for s in checkpoint.specs.values())
    kind = type(skeleton.empty(config, source.folder, trust_remote_code=trust))
    unread = {name: _Unread(checkpoint, name) for name in checkpoint.specs}
    try:
        model = kind.from_pretrained(None, config=config, state_dict=unread, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise InputError(
            f"{source.model}: cannot be loaded: {(str(e).splitlines() or [type(e).__name__])[0][:300]}"
        ) from e
    if model.can_generate() and (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model
