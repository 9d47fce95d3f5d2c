"""`attn_implementation="quantkit"`: transformers' attention layers through quantkit's kernels, without dense masks.

transformers asks for a mask once a forward, and hands it with queries, keys and values to the attention function of
each layer. `mask` gives None where every key before a query counts, else one int32 tensor for the kernels:

    (B, 1, 1, 1)  the first key that counts in each row (padding on the left)
    (B, 2, 1, 1)  that, and how many of the keys there are (a static cache that is not full)

What cannot be said so (padding elsewhere, packed rows, blocks of an image that see each other, chunks) is transformers'
own dense mask. The window of a sliding layer comes with the layer's call, as for flash attention.

`attend` finds keys and values that lie packed in a `kv_cache.KVCache` by the attribute KV that the cache leaves on the
keys it returns. Up to FEW query tokens read the cache packed; more see it decoded, through the prefill kernel. What the
kernels do not do (`_why_not`) goes to torch's attention, and the logger "quantkit" says why, once.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import AttentionInterface

from quantkit.errors import InputError
from quantkit.runtime.attention_torch import Asked, by_torch
from quantkit_kernels.attention import attention
from quantkit_kernels.decode_attention import decode_attention
from quantkit_kernels.kv_layout import HEAD_DIMS

NAME = "quantkit"
FEW = 16  # query tokens up to which a cache is read as it lies
KV = "quantkit_kv"  # attribute of keys that a KVCache returns: its layer, and the position of the first of them
NOWHERE = 1 << 30  # the first key that counts in a row that must see none

logger = logging.getLogger("quantkit")


def register() -> None:
    """Makes the name known to transformers. Safe to call twice."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


# Masks


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor | None = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **others: Any,
) -> torch.Tensor | None:
    """What transformers asks for in `AttentionMaskInterface`, arguments as of its `sdpa_mask`.

    q_offset is None where a KVCache knows better than the mask how many tokens it has. Reads values of attention_mask
    only outside of compiled code, and not for one token of a static cache; a row with holes then sees nothing at all.
    """
    given: dict[str, Any] = {
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "local_size": local_size,
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip,
        "use_vmap": use_vmap,
        "device": device,
        "config": config,
    }

    def dense() -> torch.Tensor | None:
        if q_offset is None:
            raise InputError(
                "a static KVCache that has tokens takes no mask but padding on the left; leave out max_cache_len"
            )
        found: torch.Tensor | None = sdpa_mask(
            batch_size, q_length, kv_length, q_offset, allow_is_causal_skip=False, **given, **others
        )
        return found

    if mask_function is bidirectional_mask_function:
        return None if attention_mask is None and allow_is_bidirectional_skip else dense()
    sliding = local_size is not None and local_size == getattr(config, "sliding_window", None)
    sliding = sliding and local_size != getattr(config, "attention_chunk_size", None)
    # One token sees every key before it, whatever sequences and blocks are; for more, transformers' flag tells.
    causal = mask_function is causal_mask_function or sliding or (q_length == 1 and local_size is None)
    if use_vmap or not causal or not (allow_is_causal_skip or q_length == 1):
        return dense()
    end = None if q_offset is None else q_offset + q_length - kv_offset
    if isinstance(end, int) and end > kv_length:
        return dense()
    aligned = end is None or (isinstance(end, int) and end == kv_length)
    starts = None
    if attention_mask is not None:
        if isinstance(end, int):
            attention_mask = attention_mask[:, : end + kv_offset]
        starts, regular = _starts(attention_mask)
        if torch.compiler.is_compiling() or (q_length == 1 and not allow_is_causal_skip):
            starts = torch.where(regular, starts, NOWHERE)
        else:
            ends_there = attention_mask[:, -1] | (not isinstance(end, int))
            good, padded = torch.stack([(regular & ends_there).all(), starts.any()]).tolist()
            if not good:
                return dense()
            if aligned and not padded:
                return None
        starts = (starts - kv_offset).clamp(min=0).int()
    if aligned:
        return None if starts is None else starts[:, None, None, None]
    starts = torch.zeros(batch_size, dtype=torch.int32, device=device) if starts is None else starts
    ends = torch.zeros_like(starts) + end  # type: ignore[operator]
    return torch.stack([starts, ends.int()], 1)[:, :, None, None]


def _starts(mask_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First True of each row, int64 (B,), and whether the row has some and no False between its first and last."""
    wide = mask_BL.long()
    first = wide.argmax(-1)
    last = mask_BL.shape[-1] - 1 - wide.flip(-1).argmax(-1)
    return first, wide.sum(-1) == last - first + 1


# Attention


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What transformers asks for in `AttentionInterface`: out (B, L, Hq, D), and weights (B, Hq, L, Lk) or None.

    query (B, Hq, L, D); key and value (B, H, Lk, D), or the new ones alone where a KVCache holds the others.
    """
    if others.get("cache") is not None:
        raise InputError("attn_implementation='quantkit' has no continuous batching; load the model with 'sdpa' for it")
    marks: tuple[Any, Any] = getattr(key, KV, (None, 0))
    layer, offset = marks
    if layer is not None:
        layer.meet(module)
    starts, ends, dense = _taken_apart(attention_mask)
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    causal = causal or starts is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    asked = Asked(scale, causal, sliding_window, softcap, s_aux, dropout if module.training else 0.0, others)
    reason = _why_not(query, key, value, dense, offset is None and layer.coded, asked)
    few = query.shape[2] <= FEW and causal and reason is None
    features = (s_aux, sliding_window, softcap)
    if offset is None:
        if few:
            out, _ = decode_attention(query, *layer.stored(), layer.after, scale, layer.table, starts, *features)
            return out.transpose(1, 2), None
        key, value, offset, ends = layer.decoded(query.shape[2])
        reason = reason or _why_not(query, key, value, dense, False, asked)
    starts = _moved(starts, offset)
    if reason is not None:
        if not torch.compiler.is_compiling():
            _say(reason)
        return by_torch(module, query, key, value, dense, (starts, ends, offset), asked)
    if few and query.shape[2] < key.shape[2] and query.shape[-1] in HEAD_DIMS["none"]:
        lengths = ends if ends is not None else _full(query, key.shape[2])
        keys = (key.contiguous(), value.contiguous(), None, None)
        out, _ = decode_attention(query, *keys, lengths, scale, None, starts, *features)
    else:
        out, _ = attention(
            query, key, value, scale, causal, sliding_window, softcap, s_aux, key_starts=starts, key_lengths=ends
        )
    return out.transpose(1, 2), None


def _full(query: torch.Tensor, length: int) -> torch.Tensor:
    return torch.full((query.shape[0],), length, dtype=torch.int32, device=query.device)


def _taken_apart(
    given: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Starts and ends, int32 (B,), or a dense mask, from what `mask` or the user made."""
    if given is None:
        return None, None, None
    if given.dtype != torch.int32:
        return None, None, given
    if given.dim() != 4 or given.shape[1] > 2 or given.shape[2:] != (1, 1):
        raise InputError(f"attention_mask is {given.dtype} {tuple(given.shape)}; expected bool or float (B, 1, L, Lk)")
    return given[:, 0, 0, 0].contiguous(), given[:, 1, 0, 0].contiguous() if given.shape[1] == 2 else None, None


def _moved(starts: torch.Tensor | None, offset: int | torch.Tensor) -> torch.Tensor | None:
    """The first key that counts among keys of which the first is at position `offset`, which may be negative."""
    if isinstance(offset, int) and (offset == 0 or starts is None):
        return starts
    return (-offset if starts is None else starts - offset).clamp(min=0)  # type: ignore[union-attr]


def _why_not(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dense: torch.Tensor | None,
    packed: bool,
    asked: Asked,
) -> str | None:
    """Why the kernels cannot do what is asked for; None when they can."""
    tensors = (query, key, value) if asked.sinks is None else (query, key, value, asked.sinks)
    width = query.shape[-1]
    if asked.others.get("output_attentions"):
        return "attention weights are asked for"
    if asked.others.get("position_bias") is not None:
        return "there is a bias of positions"
    if asked.dropout:
        return "there is dropout in training"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "gradients are asked for (use torch.no_grad() to compute without)"
    if dense is not None:
        return "the mask is more than causal with padding on the left"
    if key.shape[-1] != width or value.shape[-1] != width or width % 8 or not 8 <= width <= 256:
        return f"keys have {key.shape[-1]} channels and values {value.shape[-1]}; known are multiples of 8 up to 256"
    if not packed and (key.dtype != query.dtype or value.dtype != query.dtype):
        return f"queries are {query.dtype}, keys {key.dtype} and values {value.dtype}"
    if not packed and query.device.type == "cuda" and query.dtype not in (torch.float16, torch.bfloat16):
        return f"queries are {query.dtype}, and on a GPU the kernels compute in 16 bits"
    return None


@functools.cache
def _say(reason: str) -> None:
    logger.warning("quantkit attention: torch's attention computes instead of the kernels, because %s", reason)


register()
