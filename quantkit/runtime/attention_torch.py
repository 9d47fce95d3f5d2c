"""Attention as torch computes it, for what quantkit's kernels do not do: see attention.py, which says why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from quantkit.errors import InputError


@dataclass(frozen=True)
class Asked:
    """What a layer asks for, but for its tensors and its mask."""

    scale: float
    causal: bool
    window: int | None
    soft_cap: float | None
    sinks: torch.Tensor | None
    dropout: float
    others: dict[str, Any]


def by_torch(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dense: torch.Tensor | None,
    keys: tuple[torch.Tensor | None, torch.Tensor | None, int | torch.Tensor],
    asked: Asked,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """By torch's attention, or with the matrix of scores. keys: starts, ends, position of the first key."""
    starts, ends, offset = keys
    if dense is not None:
        if isinstance(offset, int) and offset:
            dense = dense[..., offset:]
        if dense.shape[-1] != key.shape[2]:
            raise InputError(
                f"the mask is for {dense.shape[-1]} keys, and there are {key.shape[2]}; pass a 2-D attention_mask, or "
                "a KVCache without max_cache_len"
            )
    elif starts is not None or ends is not None or asked.window is not None:
        dense = _visible(query, key, asked, starts, ends)
    elif asked.causal and query.shape[2] not in (1, key.shape[2]):
        dense = _visible(query, key, asked, None, None)
    weights = bool(asked.others.get("output_attentions"))
    if weights or asked.soft_cap is not None or asked.sinks is not None:
        if dense is None and asked.causal:
            dense = _visible(query, key, asked, None, None)
        return _with_scores(query, key, value, dense, asked, weights)
    bias = asked.others.get("position_bias")
    rest = {} if bias is None else {"position_bias": bias}
    causal = asked.causal and dense is None
    out, _ = sdpa_attention_forward(
        module, query, key, value, dense, dropout=asked.dropout, scaling=asked.scale, is_causal=causal, **rest
    )
    return out, None


def _visible(
    query: torch.Tensor, key: torch.Tensor, asked: Asked, starts: torch.Tensor | None, ends: torch.Tensor | None
) -> torch.Tensor:
    """Which keys a query sees, bool (B or 1, 1, L, Lk); a query that sees none sees all, so that nothing is NaN."""
    n = torch.arange(key.shape[2], device=query.device)
    end = key.shape[2] if ends is None else ends[:, None, None, None]
    position = end - query.shape[2] + torch.arange(query.shape[2], device=query.device)[:, None]
    seen = (n < end) & (n >= (0 if starts is None else starts[:, None, None, None]))
    if asked.causal:
        seen = seen & (n <= position)
    if asked.window is not None:
        seen = seen & (n > position - asked.window) & (n < position + asked.window)
    seen = seen.expand(-1, -1, query.shape[2], -1) if seen.dim() == 4 else seen.expand(query.shape[2], -1)[None, None]
    return seen | ~seen.any(-1, keepdim=True)


def _with_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dense: torch.Tensor | None,
    asked: Asked,
    weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax in float32 of the whole matrix of scores."""
    ratio = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, ratio), repeat_kv(value, ratio)
    s = torch.matmul(query, key.transpose(2, 3)).float() * asked.scale
    if asked.soft_cap is not None:
        s = asked.soft_cap * torch.tanh(s / asked.soft_cap)
    if dense is not None:
        s = s.masked_fill(~dense, torch.finfo(s.dtype).min) if dense.dtype == torch.bool else s + dense
    if asked.sinks is not None:
        s = torch.cat([s, asked.sinks.float()[None, :, None, None].expand(*s.shape[:3], 1)], -1)
    p = torch.softmax(s, -1)[..., : key.shape[2]].to(query.dtype)
    p = torch.nn.functional.dropout(p, asked.dropout)
    return torch.matmul(p, value).transpose(1, 2).contiguous(), p if weights else None
