"""Makes transformers load compressed-tensors checkpoints through quantkit, without importing transformers.

transformers discovers no plugins: a quantizer is registered by writing into the tables of
`transformers.quantizers.auto`. Importing that module costs seconds and pulls in torch, so `install` only leaves a
finder on `sys.meta_path` that registers when someone else imports it, and then goes away. If it is already imported,
`install` registers at once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TARGET = "transformers.quantizers.auto"
QUANT_METHOD = "compressed-tensors"

logger = logging.getLogger("quantkit")


class RegisterOnImport(MetaPathFinder):
    """Finds nothing itself: lets the other finders find `TARGET`, and registers after it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        others = [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]
        spec = next((s for s in (finder.find_spec(fullname, path, target) for finder in others) if s is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Registers quantkit's quantizer with transformers, now or when transformers is imported. Safe to call twice."""
    auto = sys.modules.get(TARGET)
    if auto is not None:
        register(auto)
    elif not any(isinstance(finder, RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, RegisterOnImport())


def register(auto: ModuleType) -> None:
    """Puts quantkit's config and quantizer into the tables of `transformers.quantizers.auto`.

    A transformers whose tables or base classes differ must stay importable: then nothing is registered, its own
    loader keeps the quant_method, and a warning says so.
    """
    try:
        from quantkit.runtime import quantizer

        auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = quantizer.PackedQuantizer
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = quantizer.CompressedTensorsConfig
    except (ImportError, AttributeError) as error:
        logger.warning(
            "quantkit: could not register with this transformers (%s); 5.17 or newer is needed. "
            "Checkpoints load through its own quantizers, unpacked.",
            error,
        )
