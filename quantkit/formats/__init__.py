"""Checkpoint formats: how codes lie in a file. One file a format; `compressed_tensors.py` is `compressed-tensors`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, cast

from quantkit.errors import InputError
from quantkit.types import Format, KvFormat

# Files beside config.json in which tools put a quantization config, and the format that it is of. What we write has
# one only where the format asks for it: a copy of the source's would contradict config.json.
CONFIG_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}


def names() -> list[str]:
    """Names of the formats, sorted, found by listing this folder."""
    return list(_names())


@functools.cache
def _names() -> tuple[str, ...]:
    return tuple(sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def get(name: str) -> Format:
    """The module of a checkpoint format, such as "compressed-tensors". Raises InputError with the known names."""
    if name not in names():
        raise InputError(f"unknown checkpoint format {name!r}; known: {', '.join(names())}")
    return cast(Format, importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))


def by_method(quant_method: str) -> Format:
    """The format of a `quant_method`, as configs name it: "fp8" is fp8-block. Raises InputError with the known ones."""
    modules = [get(name) for name in names()]
    for module in modules:
        if quant_method == module.QUANT_METHOD:
            return module
    known = ", ".join(module.QUANT_METHOD for module in modules)
    raise InputError(f"checkpoints of quant_method {quant_method!r} are not known; known: {known}")


def name_of(module: Format) -> str:
    """The name of a format's module: "fp8-block"."""
    return next(name for name in names() if get(name) is module)


def scale_dtype(module: Format, dtype: str) -> str:
    """The dtype in which a format stores scales, as safetensors calls it, for a model of `dtype`: "F16" for gptq."""
    return str(getattr(module, "SCALE_DTYPE", dtype))


def with_kv_cache(module: Format) -> KvFormat:
    """The same format, if quantkit can write the scales of a KV cache to it. Raises InputError that names those."""
    if not hasattr(module, "kv_tensors"):
        known = ", ".join(name for name in names() if hasattr(get(name), "kv_tensors"))
        raise InputError(
            f"kv_cache: the scales of a KV cache are not written to {name_of(module)}; set export.format to one of "
            f"{known}, or kv_cache to none"
        )
    return cast(KvFormat, module)


def quantization_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The part of a model's config.json that says how it is quantized; None when it is not.

    Engines look in the same places: `quantization_config`, also inside `text_config` for multimodal models, and
    `compression_config`, the name that compressed-tensors began with, which may hold a `quantization_config` itself.
    """
    text = config.get("text_config")
    places = [config, text] if isinstance(text, Mapping) else [config]
    for place in places:
        for key in ("quantization_config", "compression_config"):
            found = place.get(key)
            if isinstance(found, Mapping):
                inner = found.get("quantization_config")
                found = inner if isinstance(inner, Mapping) else found
                return {"quant_method": "compressed-tensors", **found} if key == "compression_config" else dict(found)
    return None
