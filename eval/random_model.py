"""Random bfloat16 models of any size, written shard by shard: what memory, disk and time are measured on.

    python eval/random_model.py out/model --layers 32 --hidden 4096 --inner 14336 --shard-gb 5

A Llama with the embedded model's tokenizer and its 4096 tokens. Memory: one tensor.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from quantkit import hub
from quantkit.shards import ShardWriter
from quantkit.types import TensorSpec

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
HEAD = 64  # channels of an attention head


def config(layers: int, hidden: int, inner: int) -> dict[str, object]:
    """config.json of a Llama whose keys and values have a quarter of the query's heads."""
    heads = hidden // HEAD
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": HEAD,
        "vocab_size": 4096,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def tensors(layers: int, hidden: int, inner: int) -> dict[str, TensorSpec]:
    """Every tensor of the model, in the order of the layers."""
    keys = max(1, hidden // HEAD // 4) * HEAD
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (4096, hidden)}
    for i in range(layers):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    found |= {"model.norm.weight": (hidden,), "lm_head.weight": (4096, hidden)}
    return {name: TensorSpec("BF16", shape) for name, shape in found.items()}


def write(
    folder: Path, layers: int, hidden: int, inner: int, *, shard_bytes: int = 5_000_000_000, seed: int = 0
) -> int:
    """Writes the model into a new folder; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    specs = tensors(layers, hidden, inner)
    writer = ShardWriter(folder, specs, shard_bytes)
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for name, spec in specs.items():
        noise = torch.empty(spec.shape, dtype=torch.bfloat16)
        for part in noise.split(1024):
            part.copy_(torch.randn(part.shape, generator=generator) * (0.5 / hidden**0.5))
        writer.write(name, noise if noise.ndim > 1 else 1 + noise)
        total += noise.nbytes
    writer.close()
    (folder / "config.json").write_text(json.dumps(config(layers, hidden, inner), indent=2) + "\n", "utf-8")
    for name in TOKENIZER:
        shutil.copyfile(hub.resolve("builtin:pydocs-llama-7m").folder / name, folder / name)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--inner", type=int, default=1536)
    parser.add_argument("--shard-gb", type=float, default=5.0)
    args = parser.parse_args()
    size = write(args.folder, args.layers, args.hidden, args.inner, shard_bytes=int(args.shard_gb * 1e9))
    print(f"{args.folder}: {size:,} bytes of tensors")


if __name__ == "__main__":
    main()
