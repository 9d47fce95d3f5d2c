"""Makes transformers load quantized checkpoints through quantkit, without importing transformers.

transformers discovers no plugins: a quantizer is registered by writing into the tables of
`transformers.quantizers.auto`. Importing that module costs seconds and pulls in torch, so `install` only leaves a
finder on `sys.meta_path` that registers when someone else imports it, and then goes away. If it is already imported,
`install` registers at once. In the same way `attn_implementation="quantkit"` is made known after
`transformers.modeling_utils`.

Some tools say how a model is quantized in a file beside config.json (ModelOpt's hf_quant_config.json), where
transformers does not look; it would load such codes as if they were weights. So the function that asks a config for
its quantization is wrapped, and that file counts.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

TARGET = "transformers.quantizers.auto"
ATTENTION = "transformers.modeling_utils"
QUANT_METHODS = ("compressed-tensors", "gptq", "awq", "fp8", "modelopt", "mxfp4")

logger = logging.getLogger("quantkit")


class RegisterOnImport(MetaPathFinder):
    """Finds nothing itself: lets the other finders find a module, and acts after it has been executed."""

    def __init__(self, waiting: dict[str, Callable[[ModuleType], None]]) -> None:
        self.waiting = waiting  # what to do, by the module's name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        others = [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]
        spec = next((s for s in (finder.find_spec(fullname, path, target) for finder in others) if s is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            act = self.waiting.pop(fullname, None)
            if not self.waiting and self in sys.meta_path:
                sys.meta_path.remove(self)
            if act is not None:
                act(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Registers quantkit's quantizer and attention, now or when transformers is imported. Safe to call twice."""
    waiting: dict[str, Callable[[ModuleType], None]] = {}
    for target, act in ((TARGET, register), (ATTENTION, register_attention)):
        module = sys.modules.get(target)
        if module is None:
            waiting[target] = act
        else:
            act(module)
    if waiting and not any(isinstance(finder, RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, RegisterOnImport(waiting))


def register_attention(_: ModuleType) -> None:
    """Makes `attn_implementation="quantkit"` known; a transformers that has no place for it stays as it is."""
    try:
        # it registers itself at its end, which may be later: it may be what is importing transformers
        importlib.import_module("quantkit.runtime.attention")
    except (ImportError, AttributeError) as error:
        logger.warning("quantkit: no attn_implementation='quantkit' with this transformers (%s)", error)


def register(auto: ModuleType) -> None:
    """Puts quantkit's configs and quantizer into the tables of `transformers.quantizers.auto`.

    A transformers whose tables or base classes differ must stay importable: then nothing is registered, its own
    loader keeps the quant_methods, and a warning says so.
    """
    try:
        from quantkit.runtime import quantizer

        quantizers, configs = auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING
        for method in QUANT_METHODS:
            if quantizers.get(method) is quantizer.PackedQuantizer:
                continue
            quantizer.keep_stock(method, quantizers.get(method), configs.get(method))
            quantizers[method] = quantizer.PackedQuantizer
            configs[method] = quantizer.config_class(method)
        _wrap(auto)
    except (ImportError, AttributeError) as error:
        logger.warning(
            "quantkit: could not register with this transformers (%s); 5.17 or newer is needed. "
            "Checkpoints load through its own quantizers, unpacked.",
            error,
        )


def _wrap(auto: ModuleType) -> None:
    """Has `get_hf_quantizer` look beside config.json, here and where it has been imported already."""
    original = auto.get_hf_quantizer
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def get_hf_quantizer(config: Any, *args: Any, **kwargs: Any) -> Any:
        found = _beside(config)
        if found is not None:
            config.quantization_config = found
        return original(config, *args, **kwargs)

    auto.get_hf_quantizer = get_hf_quantizer  # type: ignore[attr-defined]
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None and getattr(modeling, "get_hf_quantizer", None) is original:
        modeling.get_hf_quantizer = get_hf_quantizer  # type: ignore[attr-defined]


def _beside(config: Any) -> dict[str, Any] | None:
    """The quantization config that lies beside the config.json of a local folder, when config.json has none."""
    from quantkit import formats, hub, packed

    folder = Path(str(getattr(config, "_name_or_path", "") or ""))
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if any(getattr(c, "quantization_config", None) is not None for c in (config, text)):
        return None
    if not any((folder / name).is_file() for name in formats.CONFIG_FILES) or not (folder / "config.json").is_file():
        return None
    found = packed.find_config(folder, hub.read_json(folder / "config.json"))
    return found if found is None or "quant_method" in found else None
