"""Tiny random models with every kind of attention, a cache that only rounds, and forwards in several pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from transformers import DynamicCache

import quantkit
from quantkit.runtime import attention
from quantkit_kernels import kv_layout

WINDOW = 24
NUMBERS = ("none", "fp8", "int8", "int4")
CHUNKS = [60, 1, 1, 30, 16, 17, 1, 24]  # longer and shorter than a window, and single tokens
TOTAL = sum(CHUNKS)
CLOSE = 3e-5
BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 1024,
    "head_dim": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 3,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),  # every layer slides
    "gemma2": (
        "Gemma2Config",  # every other layer slides; scores are capped
        {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    ),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": WINDOW}),
    "gpt-oss": (
        "GptOssConfig",  # sinks
        {
            "sliding_window": WINDOW,
            "num_local_experts": 2,  # all of them: a choice would turn last bits into other tokens
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}


def make(kind: str, implementation: str, **changes: Any) -> Any:
    """A float32 model on the CPU, the same for every implementation; scores of attention are far from equal."""
    attention.register()
    name, own = KINDS[kind]
    config = getattr(transformers, name)(**{**BASE, **own, **changes})
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=implementation
    )
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            size, shift = (0.3, 0.0) if p.dim() > 1 else (0.5, 0.5)
            p.copy_(torch.randn(p.shape, generator=g) * size + shift)
    return model.eval()


def caches(number: str, room: int, **more: Any) -> dict[str, Callable[[Any], quantkit.KVCache]]:
    """Growing and static, with the model's config and without."""
    return {
        "grows": lambda m: quantkit.KVCache(number, m, **more),
        "grows, no config": lambda m: quantkit.KVCache(number, **more),
        "static": lambda m: quantkit.KVCache(number, m.config, max_cache_len=room, **more),
        "static, no config": lambda m: quantkit.KVCache(number, max_cache_len=room, **more),
    }


class Rounding(DynamicCache):
    """Keeps every token of every layer in full width, but rounded as a KVCache of this number rounds."""

    def __init__(self, number: str, groups: int = 1) -> None:
        super().__init__()
        self.number, self.groups = number, groups

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        rounded = [self.rounded(x) for x in (key_states, value_states)]
        return super().update(*rounded, layer_idx, *args, **kwargs)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        if self.number == "none":
            return x
        codes, scale, zero = kv_layout.quantize(x, self.number, groups=self.groups)
        assert scale is not None
        wide = codes.double().unflatten(-1, (self.groups, -1))
        wide = wide if zero is None else wide - zero[..., None].double()
        return (wide * scale[..., None].double()).flatten(-2).to(x.dtype)


def tokens(batch: int = 2, length: int = 150) -> torch.Tensor:
    return torch.randint(4, 128, (batch, length), generator=torch.Generator().manual_seed(3))


def padding(ids: torch.Tensor, left: int = 7) -> torch.Tensor:
    """A mask whose last row begins with padding."""
    mask = torch.ones_like(ids)
    mask[-1, :left] = 0
    return mask


@torch.no_grad()
def run(
    model: Any,
    ids: torch.Tensor,
    cache: Any = None,
    chunks: Sequence[int] | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits (B, L, V), in pieces of so many tokens; zeros where there is padding."""
    positions = torch.arange(ids.shape[1]).expand(ids.shape) if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    positions, at, found = positions.to(ids.device), 0, []
    for n in chunks or [ids.shape[1]]:
        seen = None if mask is None else mask[:, : at + n]
        here = slice(at, at + n)
        out = model(
            ids[:, here],
            attention_mask=seen,
            position_ids=positions[:, here],
            past_key_values=cache,
            use_cache=cache is not None,
        )
        found.append(out.logits)
        at += n
    logits = torch.cat(found, 1)
    return logits if mask is None else logits * mask[:, : logits.shape[1], None].to(logits)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference beside the largest number; infinite for what is not finite."""
    if found.shape != wanted.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    found, wanted = found.detach(), wanted.detach()
    return float((found - wanted).abs().max() / wanted.abs().max())
