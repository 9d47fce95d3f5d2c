"""quantkit: quantize a model, prove that it still works, and run it packed.

`import quantkit` is light: neither torch nor transformers is imported. It does make transformers, when that is
imported, load compressed-tensors checkpoints through `quantkit.runtime`.
"""

from __future__ import annotations

import importlib
from typing import Any

from quantkit.runtime.plugin import install

__version__ = "0.1.0"

_LAZY = {
    "quantize": "quantkit.api",
    "validate": "quantkit.api",
    "reproduce": "quantkit.reproducing",
    "load": "quantkit.api",
    "push": "quantkit.hub_push",
    "run": "quantkit.job",
    "generate": "quantkit.runtime.generate",
    "KVCache": "quantkit.runtime.kv_cache",
    "Recipe": "quantkit.recipe",
}

__all__ = ["KVCache", "Recipe", "generate", "load", "push", "quantize", "reproduce", "run", "validate"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


install()
