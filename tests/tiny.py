"""Tiny random models of the architectures that quantkit knows, written to disk by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quantkit.hub import resolve

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 128,
    "head_dim": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 3,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "phi3": ("Phi3Config", {}),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 8}),
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def save(folder: Path, kind: str = "llama", *, seed: int = 0, shard: str = "5GB", **changes: Any) -> Path:
    """Writes a random bfloat16 model of an architecture, with the embedded model's tokenizer."""
    import transformers

    name, own = ARCHITECTURES[kind]
    config = getattr(transformers, name)(**{**BASE, **own, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.08
            parameter.copy_(noise if parameter.ndim > 1 else 1 + noise)
    model.save_pretrained(folder, max_shard_size=shard)
    for file in TOKENIZER_FILES:
        content = (resolve("builtin:pydocs-llama-7m").folder / file).read_bytes()
        (folder / file).write_bytes(content)
    return folder
