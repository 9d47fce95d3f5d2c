"""Keys and values on their way into the cache: which module puts them there, and how large they get.

transformers' attention layers end what they do to keys and values with `past_key_values.update(keys, values, layer)`.
A stand-in for the cache therefore sees them exactly as engines keep them, after norms and the rotary embedding, and
nothing else of the forward changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantkit import blocks
from quantkit.errors import InputError
from quantkit.numerics._activations import kv_absmax, kv_scale
from quantkit.skeleton import Skeleton
from quantkit.types import TensorScheme


@dataclass(frozen=True)
class Attention:
    """The attention layer of a block: its names on disk and in memory, and its heads of keys and values."""

    block: str
    name: str
    module: str
    heads: int


class Tap:
    """Takes the cache's place in a block's call: shows keys and values (B, H, L, D) to `see`, passes them on as is."""

    def __init__(self, see: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        self.see = see

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.see(key_states, value_states)
        return key_states, value_states


class Peaks:
    """The largest |k| and |v| of each head of one attention layer, float32 (H,), over all tokens but padding."""

    def __init__(self) -> None:
        self.absmax: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, keys: torch.Tensor, values: torch.Tensor, mask_BL: torch.Tensor | None = None) -> None:
        """Adds keys and values (B, H, L, D); `mask_BL` is False where a position is padding."""
        k, v = (kv_absmax(x, per_head=True, mask_BL=mask_BL) for x in (keys, values))
        self.absmax = (k, v) if self.absmax is None else (self.absmax[0].maximum(k), self.absmax[1].maximum(v))

    def scales(self, strategy: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales of keys and of values, in `dtype`, above 0: (1,) for strategy "tensor", (H,) for "head".

        Raises InputError when nothing was seen, for NaN and Inf, and for scales that do not fit the dtype.
        """
        if self.absmax is None:
            raise InputError(_UNSEEN)
        k, v = (_stored(x if strategy == "head" else x.amax().reshape(1), dtype) for x in self.absmax)
        return k, v


_UNSEEN = (
    "hands no keys and values to a cache (no call of past_key_values.update), so their scales cannot be calibrated; "
    "set kv_cache: none"
)


def _stored(absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """absmax / 448 in the model's dtype. float16 ends above the scale of a head that was never heard."""
    limits = torch.finfo(dtype)
    scale = kv_scale(absmax).to(dtype).clamp(min=limits.tiny * limits.eps)  # the smallest number above 0
    if not bool(torch.isfinite(scale.float()).all()):
        raise InputError(f"the scale of its keys or values overflows {dtype}; set kv_cache: none")
    return scale


def find(skeleton: Skeleton, structure: blocks.Structure) -> tuple[Attention, ...]:
    """The attention layer of each block, from one run on the meta device.

    Raises InputError that names a block which hands no keys and values to a cache, or does so more than once.
    """
    calls: list[tuple[str, str, int]] = []

    def watching(ghost: nn.Module) -> Any:
        calls.clear()
        return _tapped(ghost, [block.name for block in structure.blocks], calls)

    if problem := blocks.dry_run(skeleton.model, watching):
        raise InputError(f"kv_cache: which modules keep keys and values could not be found out ({problem})")
    found = []
    for block in structure.blocks:
        own = [(module, heads) for name, module, heads in calls if name == block.name]
        if not own:
            raise InputError(f"{block.name}: {_UNSEEN}")
        if len(own) > 1:
            raise InputError(f"{block.name}: calls its cache {len(own)} times, not once; set kv_cache: none")
        module, heads = own[0]
        found.append(Attention(block.name, _on_disk(skeleton, module), module, heads))
    return tuple(found)


@contextmanager
def _tapped(model: nn.Module, names: list[str], calls: list[tuple[str, str, int]]) -> Iterator[None]:
    """Notes (block, innermost module that runs, heads) for each call of the cache."""
    handles: list[Any] = []
    running: list[str] = []
    try:
        for block in names:
            tap = Tap(lambda k, _, block=block: calls.append((block, running[-1], k.shape[1])))  # type: ignore[misc]

            def swap(_: nn.Module, args: Any, kwargs: dict[str, Any], tap: Tap = tap) -> Any:
                return args, {**kwargs, "past_key_values": tap} if "past_key_values" in kwargs else kwargs

            top = model.get_submodule(block)
            handles.append(top.register_forward_pre_hook(swap, with_kwargs=True))
            for name, module in top.named_modules(prefix=block):
                enter = lambda *_, name=name: running.append(name)  # noqa: E731
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(lambda *_: running.pop() and None, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_disk(skeleton: Skeleton, module: str) -> str:
    """A module's name on disk, from that of a parameter of it."""
    for memory, disk in skeleton.to_disk.items():
        leaf = memory.removeprefix(module)
        if memory.startswith(module + ".") and disk.endswith(leaf):
            return disk.removesuffix(leaf)
    raise InputError(f"{module}: has no name on disk, so there is no place for the scales of its KV cache")


def observe(module: nn.Module, batch: blocks.Batch, block: blocks.Block, peaks: Peaks) -> torch.Tensor:
    """Runs a block as `blocks.run` does, and adds its keys and values to `peaks`.

    Raises InputError naming the block when it asks more of a cache than to take keys and values.
    """
    tap = Tap(lambda k, v: peaks.update(k, v, batch.mask))
    try:
        return blocks.run(module, batch, block.index, tap)
    except AttributeError as e:
        if e.obj is not tap:
            raise
        raise InputError(
            f"{block.name}: asks its cache for {e.name!r}, so its keys and values cannot be calibrated; "
            "set kv_cache: none"
        ) from None


def span(scheme: TensorScheme | None, scales: Mapping[str, Sequence[float]]) -> dict[str, Any] | None:
    """The smallest and the largest scale of keys and of values, for the report; None where they are not quantized."""
    if scheme is None:
        return None
    spans = {side: {"least": min(found), "largest": max(found)} for side, found in scales.items()}
    return {"number": scheme.number, "strategy": scheme.strategy, **spans}
