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
# Mixtures of experts; the first block of deepseek is dense, and each of its others has a shared expert.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("Qwen3MoeConfig", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 32}),
    "deepseek": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "head_dim": 16,
        },
    ),
}
# Their experts lie in one tensor on disk, or they have more than attention and experts.
STRUCTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "llama4-text": (
        "Llama4TextConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 80,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 64,
        },
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_hidden_layers": 4,
        },
    ),
}
# Language models in a wrapper with a vision tower: the wrapper's config, the text model's, the tower's.
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_TOWER |= {"image_size": 28, "patch_size": 14}
_VISUAL = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
_MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
WRAPPED: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama4": (
        "Llama4Config",
        {},
        STRUCTURES["llama4-text"][1],
        {**_TOWER, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
    "gemma3-vision": ("Gemma3Config", {"mm_tokens_per_image": 4}, {"sliding_window": 8}, _TOWER),
    "qwen2.5-vl": ("Qwen2_5_VLConfig", {}, {"rope_scaling": _MROPE}, {**_VISUAL, "fullatt_block_indexes": [1]}),
    "qwen3-vl": ("Qwen3VLConfig", {}, {"rope_scaling": _MROPE}, {**_VISUAL, "deepstack_visual_indexes": [0]}),
    "qwen3-vl-moe": (
        "Qwen3VLMoeConfig",
        {},
        {**MIXTURES["qwen3-moe"][1], "rope_scaling": _MROPE},
        {**_VISUAL, "deepstack_visual_indexes": [0]},
    ),
    "mistral3": ("Mistral3Config", {}, {"model_type": "mistral"}, {"model_type": "pixtral", **_TOWER}),
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def save(folder: Path, kind: str = "llama", *, seed: int = 0, shard: str = "5GB", **changes: Any) -> Path:
    """Writes a random bfloat16 model of an architecture, with the embedded model's tokenizer."""
    import transformers

    if kind in WRAPPED:
        name, own, text, vision = WRAPPED[kind]
        text = {**BASE, **text, **changes}
        config = getattr(transformers, name)(**own, text_config=text, vision_config=vision)
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    else:
        name, own = {**ARCHITECTURES, **MIXTURES, **STRUCTURES}[kind]
        config = getattr(transformers, name)(**{**BASE, **own, **changes})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.08
            parameter.copy_(noise if parameter.ndim > 1 else 1 + noise)
        stored = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in stored:  # what a router adds to the scores of experts
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.08)
    model.save_pretrained(folder, max_shard_size=shard)
    for file in TOKENIZER_FILES:
        content = (resolve("builtin:pydocs-llama-7m").folder / file).read_bytes()
        (folder / file).write_bytes(content)
    return folder
