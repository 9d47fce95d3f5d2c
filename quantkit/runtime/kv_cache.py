"""A cache of keys and values in 16, 8 or 4 bits for transformers, read by quantkit's attention as it lies in memory.

    past_key_values=quantkit.KVCache("fp8", model.config)                        grows as needed
    past_key_values=quantkit.KVCache("int4", model.config, max_cache_len=8192)   stays where it is, for CUDA graphs

What is attended to is what is kept: keys and values are rounded before anything sees them, the first time too, so that
a prompt gives the same in one piece or in several. Bytes for a token and a key head of D channels, keys and values:

    "none"          4 D            the model's dtype; "bf16" and "fp16" are it by name
    "fp8", "int8"   2 D + 8        a float32 scale for each token (fp8: none where the checkpoint has scales)
    "int4"          D + 8 groups   scale and zero point, bfloat16, for each token and group

With `attn_implementation="quantkit"` (attention.py) an `update` returns the new keys and values alone, marked with the
layer that holds all; any other attention gets all of them, decoded. Layers with a sliding window keep it and little
more, in a ring of pages, where a config says which layers those are; without a config every layer keeps every token.

Layouts are those of quantkit_kernels/kv_layout.py. How many tokens there are is one tensor for all layers of a device
(`Clock`); on a GPU no step waits for it, neither in a static cache nor in one that grows.
"""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import Cache

from quantkit.errors import InputError
from quantkit.runtime import attention
from quantkit.runtime.kv_layer import Clock, KVLayer, up
from quantkit_kernels.kv_layout import BLOCK

NUMBERS = ("fp8", "int8", "int4", "none", "bf16", "fp16")
WITHOUT_KEYS = ("linear_attention", "conv", "moe", "mlp", "dummy")  # layers that are transformers' own

logger = logging.getLogger("quantkit")


class KVCache(Cache):
    """See the module's docstring.

    number         of NUMBERS
    config         the model's, or the model: which layers have a sliding window, and whether quantkit's attention
                   reads. Without it every layer keeps all tokens, and the first step tells who reads
    max_cache_len  tokens of a sequence, prompt included, for which memory is taken at once (a multiple of 16 of them),
                   at addresses that stay; None: as many as come
    group_size     channels of an int4 scale, a head's or, from 128 on, half of them; None: as few as can be

    Raises InputError.
    """

    def __init__(
        self,
        number: str = "fp8",
        config: Any = None,
        *,
        max_cache_len: int | None = None,
        group_size: int | None = None,
    ) -> None:
        if number not in NUMBERS:
            raise InputError(f"KVCache: no number {number!r}; known are {', '.join(NUMBERS)}")
        if max_cache_len is not None and max_cache_len < 1:
            raise InputError(f"KVCache: max_cache_len is {max_cache_len}; it must be 1 or more, or None to grow")
        if group_size is not None and number != "int4":
            raise InputError(f"KVCache: group_size is for int4, not for {number}")
        attention.register()
        self.number, self.group_size, self.limit = number, group_size, max_cache_len
        self.room = None if max_cache_len is None else up(max_cache_len, BLOCK)
        self.clocks: dict[torch.device, Clock] = {}
        config = getattr(config, "config", config)
        self.config = config.get_text_config(decoder=True) if config is not None else None
        super().__init__(layers=[] if config is None else self._of(self.config))

    def _of(self, config: Any) -> list[Any]:
        """A layer for each of the model's."""
        kinds, given = cache_utils.get_layer_types_and_kwargs(config)
        static = self.limit is not None
        others = cache_utils.STATIC_LAYER_TYPE_MAPPING if static else cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
        layers: list[Any] = []
        for i, kind in enumerate(kinds):
            own: dict[str, Any] = given[i] if isinstance(given, list) else given
            if kind == "chunked_attention" and static:
                raise InputError(
                    f"KVCache: layer {i} attends in chunks, with a mask of its own; leave out max_cache_len"
                )
            if kind in ("full_attention", "chunked_attention"):
                layers.append(KVLayer(self, None))
            elif kind == "sliding_attention":
                window = own["sliding_window"]
                layers.append(KVLayer(self, None if self.room is not None and window >= self.room else window))
            elif kind in WITHOUT_KEYS and kind in others:
                layers.append(others[kind](**{"max_cache_len": self.limit} if static else {}, **own))
            else:
                raise InputError(f"KVCache: layer {i} is of kind {kind!r}, which keeps more than keys and values")
        return layers

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        """A copy with its own memory; the config stays the model's, which says who reads."""
        made = type(self).__new__(type(self))
        memo[id(self)], memo[id(self.config)] = made, self.config
        made.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return made

    def read_packed(self) -> bool:
        """Whether quantkit's attention reads, as far as is known."""
        return self.config is not None and self.config._attn_implementation == attention.NAME

    def say_decoded(self) -> None:
        if not torch.compiler.is_compiling() and self.config is not None:
            _say_decoded(str(self.config._attn_implementation))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As of KVLayer, for a layer that is made when it is first seen."""
        while len(self.layers) <= layer_idx:
            self.layers.append(KVLayer(self, None))
        found: tuple[torch.Tensor, torch.Tensor] = self.layers[layer_idx].update(
            key_states, value_states, *args, **kwargs
        )
        return found

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """The position of the next token; None where only the cache knows it, and quantkit's mask need not."""
        if all(clock.empty for clock in self.clocks.values()):
            return 0
        return None if self.limit is not None and self.read_packed() else self.get_seq_length(layer_idx)

    @property
    def max_cache_len(self) -> int | None:
        """As given."""
        return self.limit

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.limit or -1

    @property
    def is_compileable(self) -> bool:
        """Whether transformers may compile a step: rings must be read by quantkit's attention for that."""
        rings = any(isinstance(layer, KVLayer) and layer.window is not None for layer in self.layers)
        every = all(getattr(layer, "is_compileable", False) for layer in self.layers)
        return self.limit is not None and every and (self.read_packed() or not rings)

    def nbytes(self) -> int:
        """Bytes of keys, values and scales."""
        own = [layer for layer in self.layers if isinstance(layer, KVLayer) and layer.is_initialized]
        return sum(t.nbytes for layer in own for t in layer.stored() if t is not None)

    def reset(self) -> None:
        """Empty again: at the same addresses if static, else without memory."""
        for layer in self.layers:
            if not isinstance(layer, KVLayer):
                layer.reset()
            elif self.limit is None:
                layer.forget()
        for clock in self.clocks.values():
            clock.set(0)
        if self.limit is None:
            self.clocks.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last -tokens_to_remove tokens back; a positive number is how many to keep (transformers 5.17)."""
        for layer in self.layers:
            if not isinstance(layer, KVLayer):
                layer.crop(tokens_to_remove)
        for clock in self.clocks.values():
            count = clock.tokens()
            keep = min(count, tokens_to_remove) if tokens_to_remove > 0 else max(0, count + tokens_to_remove)
            if keep == count:
                continue
            for layer in clock.layers:
                needed = min(keep, (layer.window or 1) - 1)
                if layer.ring and needed and max(count, clock.highest) > keep - needed + layer.held:
                    raise InputError(
                        f"a sliding layer of this KVCache keeps {layer.held} tokens, too few to take {count - keep} "
                        f"of {count} back; make it without a config, which keeps all"
                    )
            clock.set(keep)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: each sequence takes the place of another."""
        self._select(beam_idx, "reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence so many times."""
        self._select(
            torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats), "batch_repeat_interleave", repeats
        )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only these sequences."""
        every = torch.arange(max(self.batch_size, 0), device=indices.device)
        self._select(every[indices], "batch_select_indices", indices)

    def _select(self, rows: torch.Tensor, name: str, argument: Any) -> None:
        static = self.limit is not None
        if static and self.clocks and rows.numel() != self.batch_size:
            raise InputError(f"{name}: the batch of a KVCache with max_cache_len does not change")
        for layer in self.layers:
            if isinstance(layer, KVLayer):
                layer.select(rows, in_place=static)
            else:
                getattr(layer, name)(argument)
        for clock in self.clocks.values():
            clock.resize(rows.numel())


@functools.cache
def _say_decoded(implementation: str) -> None:
    logger.warning(
        "quantkit: attn_implementation=%r reads a KVCache decoded anew in every step; with attn_implementation="
        "'quantkit' it is read packed",
        implementation,
    )
