"""Loading onto a GPU: no more memory than what is kept, the same bytes back, the same logits as on the CPU."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.types import Scheme, TensorScheme

pytestmark = pytest.mark.gpu

# Of a layer of Llama-3-8B, with few layers and a small vocabulary: about a gigabyte of codes.
SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
}


def random_checkpoint(folder: Path, form: str, scheme: Scheme) -> int:
    """A llama of random codes, written layer by layer; bytes of its tensors."""
    import transformers
    from packed_models import inputs_of
    from safetensors.torch import save_file

    from quantkit import formats, numerics
    from quantkit.checkpoint import DTYPES

    config = transformers.LlamaConfig(**SIZES, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    module, schemes = formats.get(form), {}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tensors: dict[str, torch.Tensor] = {}
    stored = DTYPES[formats.scale_dtype(module, "BF16")]
    for name, p in model.named_parameters():
        layer = name.removesuffix(".weight")
        if "_proj." not in name:
            tensors[name] = (torch.randn(p.shape) * 0.02 if p.ndim > 1 else torch.ones(p.shape)).bfloat16()
            continue
        w = torch.randn(p.shape, device="cuda") * 0.02
        number = numerics.get(scheme.weights.number)
        q = numerics.quantize(w, number.qparams(w, scheme.weights, scale_dtype=stored), scheme.weights)
        packed = module.pack(q, scheme.activations, inputs_of(scheme))
        tensors |= {f"{layer}.{leaf}": t.cpu() for leaf, t in packed.items()}
        schemes[layer] = scheme
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    written = {**config.to_dict(), "quantization_config": module.config({**schemes, "lm_head": None})}
    (folder / "config.json").write_text(json.dumps(written))
    return sum(t.nbytes for t in tensors.values())


CASES: dict[str, tuple[str, Scheme]] = {
    "W4A16": ("compressed-tensors", Scheme(TensorScheme("int4", "group", 128))),
    "gptq": ("gptq", Scheme(TensorScheme("int4", "group", 128, symmetric=False))),
    "FP8": ("compressed-tensors", Scheme(TensorScheme("fp8_e4m3"), TensorScheme("fp8_e4m3", "token", dynamic=True))),
    "NVFP4": ("compressed-tensors", Scheme(TensorScheme("nvfp4", "group", 16))),
}


@pytest.mark.parametrize("name", CASES)
def test_loading_takes_little_more_than_what_is_kept(name: str, tmp_path: Path) -> None:
    import transformers
    from safetensors.torch import load_file

    random_checkpoint(tmp_path / "m", *CASES[name])
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map="cuda")
    torch.cuda.synchronize()
    peak, kept = torch.cuda.max_memory_allocated() - before, model.get_memory_footprint()
    print(f"{name}: kept {kept / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB, {peak / kept:.3f}x")
    assert peak <= kept + 320 * 2**20  # of a model of 8 billion weights in 4 bits that is 1.06 times
    model.save_pretrained(tmp_path / "again")
    old, new = load_file(tmp_path / "m" / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[k].reshape(-1).view(torch.uint8), new[k].reshape(-1).view(torch.uint8)) for k in old)


def tiny_checkpoint(folder: Path, name: str) -> Path:
    import packed_models

    sizes: dict[str, Any] = {**packed_models.DIMS, "hidden_size": 256, "intermediate_size": 512}
    packed_models.save(folder, *CASES[name], model={**sizes, "num_attention_heads": 8, "num_key_value_heads": 8})
    return folder


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_cpu(name: str, tmp_path: Path) -> None:
    import transformers

    folder = tiny_checkpoint(tmp_path / "m", name)
    ids = torch.arange(3, 40)[None]
    found = []
    for device in ("cpu", "cuda"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=device, dtype=torch.bfloat16)
        with torch.no_grad():
            found.append(model(ids.to(device)).logits.float().cpu())
    # A code of an input that is another one on the other device is a step of 1/16 in FP8.
    assert (found[0] - found[1]).norm() < (0.06 if "FP8" in name or name == "fp8" else 0.03) * found[0].norm()


def test_what_is_moved_later_computes_the_same(tmp_path: Path) -> None:
    import transformers

    folder = tiny_checkpoint(tmp_path / "m", "W4A16")
    ids = torch.arange(3, 40, device="cuda")[None]
    there = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cuda")
    moved = transformers.AutoModelForCausalLM.from_pretrained(folder).to("cuda")
    with torch.no_grad():
        first, second, third = there(ids).logits, moved(ids).logits, there(ids).logits
    assert torch.equal(first, second) and torch.equal(first, third)
    assert all(not buffer.any() for n, buffer in there.named_buffers() if n.endswith("counters"))


@pytest.mark.parametrize("name", ["W4A16", "FP8"])
def test_experts_compute_what_they_compute_on_the_cpu(name: str, tmp_path: Path) -> None:
    import tiny
    import transformers
    from test_runtime_experts import SIZES, pack

    folder = tiny.save(tmp_path / "m", "qwen3-moe", **SIZES, num_experts=4)
    pack(folder, *CASES[name])
    ids = torch.arange(3, 40)[None]
    found = []
    for device in ("cpu", "cuda"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=device, dtype=torch.bfloat16)
        with torch.no_grad():
            found.append(model(ids.to(device)).logits.float().cpu())
    assert (found[0] - found[1]).norm() < 0.03 * found[0].norm()
