"""Attention layers that round keys and values to the FP8 of the checkpoint's KV cache, with the scales it has for them.

In transformers' own caches what is kept stays in the model's dtype and takes no less room, but its values are those
that an engine with such a cache computes with: the same that compressed-tensors' own hooks do, without that package.
A `kv_cache.KVCache("fp8")` keeps FP8, with these scales; one of int8 or int4 rounds in its own way, and only once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint import DTYPES
from quantkit.numerics import fp8
from quantkit.types import TensorSpec

NUMBER = "fp8_e4m3"
LEAVES = ("k_scale", "v_scale")


class RoundedCache:
    """A cache, or none, behind an attention layer's `past_key_values`: what goes in is rounded first."""

    def __init__(self, attention: nn.Module, cache: Any) -> None:
        self.attention, self.cache = attention, cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        number = getattr(self.cache, "number", None)  # of a quantkit.KVCache
        if number == "fp8":
            kwargs["scales"] = self.attention.k_scale, self.attention.v_scale
        if number in ("fp8", "int8", "int4"):
            kept: tuple[torch.Tensor, torch.Tensor] = self.cache.update(key_states, value_states, *args, **kwargs)
            return kept
        k, v = rounded(key_states, self.attention.k_scale), rounded(value_states, self.attention.v_scale)
        if self.cache is None:
            return k, v
        found: tuple[torch.Tensor, torch.Tensor] = self.cache.update(k, v, *args, **kwargs)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)


def rounded(x_BHLD: torch.Tensor, scale: Any) -> torch.Tensor:
    """Keys or values (B, H, L, D) as their codes stand for them, same dtype. scale: (1,), or (H, 1, 1) a head."""
    codes = fp8.cast(x_BHLD.float() / scale.float(), *fp8.FORMATS[NUMBER])
    return (codes.float() * scale.float()).to(x_BHLD.dtype)


def plan(
    in_memory: Mapping[str, str], specs: Mapping[str, TensorSpec]
) -> tuple[dict[str, dict[str, TensorSpec]], str | None]:
    """Attention layers, by name in memory, with their two scales as they are on disk; or why they cannot be held.

    in_memory  each tensor's name on disk -> its parameter's name in memory
    specs      each tensor on disk
    """
    below = re.compile(r"(?:\.([kv])_proj)?\.(?:[kv]_scale)$")
    owners = sorted({below.sub("", key) for key in specs if key.endswith(LEAVES) and below.search(key)})
    found: dict[str, dict[str, TensorSpec]] = {}
    for owner in owners:
        names = {leaf: (f"{owner}.{leaf}", f"{owner}.{leaf[0]}_proj.{leaf}") for leaf in LEAVES}
        own = {leaf: specs[name] for leaf, two in names.items() for name in two if name in specs}
        others = ((key[len(owner) :], name) for key, name in in_memory.items() if key.startswith(owner + "."))
        module = next((name.removesuffix(leaf) for leaf, name in others if _below(leaf, name)), None)
        fits = all(math.prod(spec.shape) == 1 or spec.shape[1:] == (1, 1) for spec in own.values())
        if module is None or len(own) != len(LEAVES) or not fits:
            return {}, f"the KV cache has no scales of keys and values that an attention layer could hold at {owner}"
        found[module] = own
    return found, None if found else "the KV cache is quantized, but the checkpoint has no k_scale and v_scale"


def _below(leaf: str, name: str) -> bool:
    """Whether a parameter of the layer tells its name in memory: a weight whose path below the layer is the same."""
    return name.endswith(leaf) and not leaf.endswith(LEAVES)


def attach(model: nn.Module, owners: Mapping[str, Mapping[str, TensorSpec]]) -> list[Any]:
    """Gives attention layers empty parameters for their scales, and a hook that rounds. Returns the hooks' handles."""
    handles = []
    for owner, leaves in owners.items():
        module = model.get_submodule(owner)
        device = next(module.parameters()).device
        for leaf, spec in leaves.items():
            empty = torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device=device)
            module.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))
        handles.append(module.register_forward_pre_hook(_round, with_kwargs=True))
    return handles


def detach(model: nn.Module, handles: list[Any]) -> None:
    """Takes away what `attach` gave."""
    for handle in handles:
        handle.remove()
    handles.clear()
    for module in model.modules():
        for leaf in LEAVES:
            module._parameters.pop(leaf, None)


def _round(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "past_key_values": RoundedCache(module, kwargs.get("past_key_values"))}
