"""What a quantkit.KVCache holds: memory, bytes, layers of all kinds, scales of the checkpoint; and what it refuses."""

from __future__ import annotations

from typing import Any

import attention_models as models
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, Qwen3NextConfig

import quantkit
from quantkit.errors import InputError
from quantkit.runtime import cache
from quantkit.types import TensorSpec
from quantkit_kernels import kv_layout

NUMBERS, CHUNKS, TOTAL, CLOSE = models.NUMBERS, models.CHUNKS, models.TOTAL, models.CLOSE


def test_memory() -> None:
    """As the module's docstring says, for a token and a head; a ring stays as it is."""
    for number, width, wanted in (("none", 64, 512), ("fp8", 64, 136), ("int8", 64, 136), ("int4", 64, 72)):
        model = models.make("llama", "quantkit", head_dim=width)
        kept = quantkit.KVCache(number, model, max_cache_len=160)
        models.run(model, models.tokens(2, 20), kept)
        assert kept.nbytes() == wanted * 2 * 160 * 2 * 3  # rows, tokens, heads, layers; float32 has 8 D
    model = models.make("mistral", "quantkit")
    kept = quantkit.KVCache("fp8", model)
    models.run(model, models.tokens(2, 20), kept)
    before = kept.nbytes()
    models.run(model, models.tokens(2, 600)[:, 20:], kept, [500, 80])
    assert kept.nbytes() == before == 136 * 2 * 128 * 2 * 3


def test_layers_of_other_kinds() -> None:
    config = Qwen3NextConfig(num_hidden_layers=4, layer_types=["linear_attention"] * 3 + ["full_attention"])
    for room in (None, 64):
        kept = quantkit.KVCache("fp8", config, max_cache_len=room)
        assert [type(layer).__name__ for layer in kept.layers] == ["LinearAttentionLayer"] * 3 + ["KVLayer"]
        assert kept.get_seq_length() == 0
    config.layer_types, config.attention_chunk_size = ["chunked_attention"] * 4, 16
    assert [layer.window for layer in quantkit.KVCache("fp8", config).layers] == [None] * 4
    with pytest.raises(InputError, match="layer 0 attends in chunks"):
        quantkit.KVCache("fp8", config, max_cache_len=64)
    config.layer_types = ["hybrid"] * 4
    with pytest.raises(InputError, match="layer 0 is of kind 'hybrid'"):
        quantkit.KVCache("fp8", config)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"number": "fp4"}, "no number 'fp4'; known are fp8, int8, int4"),
        ({"max_cache_len": 0}, "max_cache_len is 0"),
        ({"number": "int8", "group_size": 32}, "group_size is for int4"),
    ],
)
def test_arguments_that_are_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        quantkit.KVCache(**given)


def test_keys_that_are_refused() -> None:
    def step(kept: Any, width: int = 64, value_width: int = 64, batch: int = 2) -> None:
        kept.update(torch.zeros(batch, 2, 4, width), torch.zeros(batch, 2, 4, value_width), 0)

    with pytest.raises(InputError, match="keys have 64 channels a head and values 32"):
        step(quantkit.KVCache("fp8"), 64, 32)
    with pytest.raises(InputError, match="keys have 96 channels a head and values 96; known are the same of both, 64,"):
        step(quantkit.KVCache("int4"), 96, 96)
    with pytest.raises(InputError, match=r"heads have 64 channels; use 64$"):
        step(quantkit.KVCache("int4", group_size=32))
    with pytest.raises(InputError, match=r"'bf16'\): keys are torch.float32"):
        step(quantkit.KVCache("bf16"))
    kept = quantkit.KVCache("fp8")
    step(kept)
    with pytest.raises(InputError, match="a batch of 3 for a KVCache of 2"):
        step(kept, batch=3)


def test_layers_take_turns() -> None:
    k = torch.zeros(2, 2, 4, 64)
    kept = quantkit.KVCache("fp8")
    for layer in (0, 1, 2):
        kept.update(k, k, layer)
    assert [layer.get_seq_length() for layer in kept.layers] == [4, 4, 4]
    kept.update(k, k, 0)
    assert [layer.get_seq_length() for layer in kept.layers] == [8, 4, 4]
    with pytest.raises(InputError, match="did not run through all layers"):
        kept.update(k, k, 0)
    kept.update(k, k, 2)
    with pytest.raises(InputError, match="updated twice"):
        kept.update(k, k, 2)
    kept.reset()
    kept.update(k, k, 0)
    assert kept.get_seq_length() == 4


# Scales of the checkpoint


@pytest.mark.parametrize("each_head", [False, True])
def test_scales_of_the_checkpoint(each_head: bool) -> None:
    ids, shape = models.tokens(2, TOTAL), (2, 1, 1) if each_head else (1,)
    found = {}
    for name in ("quantkit", "eager"):
        model = models.make("gemma2", name, num_hidden_layers=1, layer_types=["sliding_attention"])
        handles = cache.attach(
            model, {"model.layers.0.self_attn": dict.fromkeys(cache.LEAVES, TensorSpec("F32", shape))}
        )
        own = model.model.layers[0].self_attn
        with torch.no_grad():
            own.k_scale.copy_(torch.tensor([0.01, 0.003])[: own.k_scale.numel()].view(shape))
            own.v_scale.copy_(torch.tensor([0.004, 0.02])[: own.v_scale.numel()].view(shape))
        found[name] = model
    wanted = models.run(found["eager"], ids, DynamicCache())
    other = models.run(found["eager"], ids, quantkit.KVCache("int8", found["eager"]), CHUNKS)
    model = found["quantkit"]
    for name, make in models.caches("fp8", TOTAL).items():
        kept = make(model)
        assert models.error(models.run(model, ids, kept, CHUNKS), wanted) < CLOSE, name
        layer = kept.layers[0]
        assert layer.k_scale.shape == (2,) and layer.k_cache.dtype == torch.float8_e4m3fn
        assert layer.k_scale.tolist() == pytest.approx([0.01, 0.003] if each_head else [0.01, 0.01])
    cache.detach(model, handles)
    # Only once is rounded: int8 in its own way, as without those scales.
    assert models.error(models.run(model, ids, quantkit.KVCache("int8", model), CHUNKS), other) < CLOSE
    assert models.error(other, wanted) > 1e-3


def test_scales_of_the_checkpoint_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()
    model = models.make("llama", "quantkit", num_hidden_layers=2)
    owners = {f"model.layers.{i}.self_attn": dict.fromkeys(cache.LEAVES, TensorSpec("F32", (1,))) for i in range(2)}
    cache.attach(model, owners)
    for layer in model.model.layers:
        layer.self_attn.k_scale.data.fill_(0.01)
        layer.self_attn.v_scale.data.fill_(0.02)
    ids = models.tokens(2, 60)
    kept, other = (quantkit.KVCache("fp8", model, max_cache_len=64) for _ in range(2))
    models.run(model, ids[:, :20], kept)
    models.run(model, ids[:, :20], other)
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for at in range(20, 30):
            given = {"input_ids": ids[:, at : at + 1], "position_ids": torch.full((2, 1), at)}
            found, wanted = step(**given, past_key_values=kept).logits, model(**given, past_key_values=other).logits
            assert models.error(found, wanted) < CLOSE
    assert counters["stats"]["unique_graphs"] == 1


def test_what_is_kept_is_what_the_kernels_decode() -> None:
    """The bytes of a cache, decoded by kv_layout, are the rounded keys."""
    k, v = (torch.randn(2, 2, 37, 64, generator=torch.Generator().manual_seed(i)) for i in range(2))
    for number in NUMBERS[1:]:
        kept = quantkit.KVCache(number)
        found = kept.update(k, v, 0)
        layer, rounding = kept.layers[0], models.Rounding(number)
        for i, x in enumerate((k, v)):
            exact = rounding.rounded(x)
            assert torch.equal(found[i], exact)
            stored = kv_layout.dequantize(layer.stored()[i], layer.stored()[2 + i], values=bool(i), dtype=torch.float32)
            assert torch.equal(stored[:, :, :37], exact) and not bool(stored[:, :, 37:].any())
