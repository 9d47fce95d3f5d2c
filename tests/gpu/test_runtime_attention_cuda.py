"""attn_implementation="quantkit" and KVCache on a GPU: the CPU's numbers, no wait for the GPU, graphs, memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attention_models as models
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

import quantkit
from quantkit.runtime import attention
from quantkit_kernels import kv_layout

pytestmark = pytest.mark.gpu
TRAINED = Path(quantkit.__file__).parent / "assets" / "pydocs-llama-7m"
NUMBERS = ("none", "fp8", "int8", "int4")
CHUNKS = [60, 1, 1, 30, 16, 17, 1, 24]
TOTAL = sum(CHUNKS)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, over all logits; infinite for what is not finite."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return float((found - wanted).norm() / wanted.norm()) if bool(torch.isfinite(found).all()) else float("inf")


def on_gpu(kind: str, dtype: torch.dtype, implementation: str = "quantkit", **changes: Any) -> Any:
    return models.make(kind, implementation, **changes).to("cuda", dtype)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", models.KINDS)
def test_caches_of_transformers(kind: str, padded: bool) -> None:
    """bfloat16: no further from float32 than eager attention in bfloat16 is, or nearly."""
    ids = models.tokens(2, TOTAL)
    mask = models.padding(ids) if padded else None
    exact = models.run(models.make(kind, "eager"), ids, mask=mask)
    mask = None if mask is None else mask.cuda()
    ids = ids.cuda()
    limit = 1.5 * difference(models.run(on_gpu(kind, torch.bfloat16, "eager"), ids, mask=mask), exact) + 5e-3
    model = on_gpu(kind, torch.bfloat16)
    assert difference(models.run(model, ids, mask=mask), exact) < limit
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=TOTAL + 9)):
        assert difference(models.run(model, ids, cache, CHUNKS, mask), exact) < limit


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt-oss"])
def test_a_cache_of_every_number(kind: str, number: str) -> None:
    """One layer, bfloat16, left padding, growing and static: as float32 with a cache that only rounds."""
    one: dict[str, Any] = {"num_hidden_layers": 1}
    ids = models.tokens(2, TOTAL)
    mask = models.padding(ids)
    exact = models.run(models.make(kind, "eager", **one), ids, models.Rounding(number), mask=mask)
    plain = models.run(on_gpu(kind, torch.bfloat16, "eager", **one), ids.cuda(), mask=mask.cuda())
    full = models.run(models.make(kind, "eager", **one), ids, mask=mask)
    # Keys in bfloat16 fall on other codes now and then, each a step of the number away.
    step = {"none": 0.0, "fp8": 0.04, "int8": 0.01, "int4": 0.12}[number]
    # A router may choose another expert where two are as good.
    limit = (3.5 if kind == "gpt-oss" else 1.5) * difference(plain, full) + 5e-3 + step
    model = on_gpu(kind, torch.bfloat16, **one)
    for room in (None, TOTAL + 5):
        kept = quantkit.KVCache(number, model, max_cache_len=room)
        assert difference(models.run(model, ids.cuda(), kept, CHUNKS, mask.cuda()), exact) < limit


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("number", NUMBERS[1:])
def test_what_is_kept_has_the_bytes_of_the_cpu(number: str, width: int) -> None:
    """A cache filled in pieces, in a ring too; and what an update gives back at first is what it keeps."""
    k, v = (torch.randn(2, 2, 300, width, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2))
    config = models.make("mistral", "quantkit", num_hidden_layers=1).config
    for given in (None, config):
        stored = []
        for device in ("cpu", "cuda"):
            kept = quantkit.KVCache(number, given)
            at = 0
            for n in (200, 1, 16, 17, 1):
                first = kept.update(k[:, :, at : at + n].to(device), v[:, :, at : at + n].to(device), 0)
                if at == 0:
                    rounded = [t.clone() for t in first]
                at += n
            layer = kept.layers[0]
            if not layer.ring:
                for i in range(2):
                    held = kv_layout.dequantize(
                        layer.stored()[i], layer.stored()[2 + i], values=bool(i), dtype=torch.float32
                    )
                    assert torch.equal(held[:, :, :200].bfloat16(), rounded[i])
            stored.append([t.cpu().view(torch.uint8) for t in layer.stored() if t is not None])
        assert all(torch.equal(a, b) for a, b in zip(*stored))


@pytest.fixture(scope="module")
def trained() -> Iterator[dict[str, Any]]:
    attention.register()
    tokenizer = AutoTokenizer.from_pretrained(TRAINED, padding_side="left")
    texts = ["The dictionary type supports", "def main():\n    import argparse\n    parser ="]
    found: dict[str, Any] = {"inputs": dict(tokenizer(texts, return_tensors="pt", padding=True).to("cuda"))}
    for name in ("quantkit", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(TRAINED, dtype=torch.bfloat16, attn_implementation=name)
        found[name] = model.eval().cuda()
    yield found


@pytest.mark.parametrize("number", NUMBERS)
def test_generate_compiles_a_static_cache(number: str, trained: dict[str, Any]) -> None:
    """transformers' own loop, with CUDA graphs: the tokens of steps that are not compiled, one graph, no break."""
    torch._dynamo.reset()
    counters.clear()
    given = {**trained["inputs"], "max_new_tokens": 32, "do_sample": False, "use_cache": True}
    model = trained["quantkit"]
    wanted = model.generate(**given, past_key_values=quantkit.KVCache(number, model))
    eager = quantkit.KVCache(number, model, max_cache_len=96)
    assert same_start(model.generate(**given, past_key_values=eager, disable_compile=True), wanted)
    kept = quantkit.KVCache(number, model, max_cache_len=96)
    first = model.generate(**given, past_key_values=kept)
    assert same_start(first, wanted)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"] and not counters["recompiles"]
    skipped = counters["inductor"]["cudagraph_skips"]
    assert skipped == 0, f"{skipped} graphs were not captured"
    kept.reset()
    assert torch.equal(model.generate(**given, past_key_values=kept), first)
    assert counters["stats"]["unique_graphs"] == 1


def same_start(found: torch.Tensor, wanted: torch.Tensor, tokens: int = 12) -> bool:
    """In bfloat16 the order of a sum may decide between two tokens; from there on nothing compares."""
    n = min(found.shape[1], wanted.shape[1])
    differ = (found[:, :n] != wanted[:, :n]).any(0).nonzero()
    return not differ.numel() or int(differ[0]) >= found.shape[1] - 32 + tokens


@pytest.mark.parametrize("number", NUMBERS)
def test_a_step_waits_for_nothing_and_is_captured(number: str) -> None:
    """Growing and static caches; a graph of a static step gives what the step itself gives."""
    for kind in ("llama", "gemma2"):
        model = on_gpu(kind, torch.bfloat16)
        ids = models.tokens(2, 60).cuda()
        mask = models.padding(ids, 5)
        caches = [quantkit.KVCache(number, model, max_cache_len=room) for room in (None, 64, 64)]
        for kept in caches:
            models.run(model, ids[:, :40], kept, mask=mask[:, :40])
        token, position = ids[:, 40:41].clone(), torch.full((2, 1), 40, device="cuda")

        def step(kept: Any, model: Any = model, token: Any = token, position: Any = position) -> torch.Tensor:
            with torch.no_grad():
                found: torch.Tensor = model(token, position_ids=position, past_key_values=kept).logits
            return found

        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for kept in caches[:2]:
                step(kept)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step(caches[2])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = step(caches[2])
        for at in range(41, 50):  # a capture writes nothing: both caches have 41 tokens
            token.copy_(ids[:, at : at + 1])
            position.fill_(at)
            graph.replay()
            assert difference(made, step(caches[1])) < 1e-2, (kind, at)
        assert int(caches[1].get_seq_length()) == int(caches[2].get_seq_length()) == 50


def test_beams_and_assistance(trained: dict[str, Any]) -> None:
    model = trained["quantkit"]
    given = {**trained["inputs"], "max_new_tokens": 32, "do_sample": False, "use_cache": True}
    grown = model.generate(**given, num_beams=3, past_key_values=quantkit.KVCache("fp8", model))
    static = quantkit.KVCache("fp8", model, max_cache_len=96)
    assert same_start(model.generate(**given, num_beams=3, past_key_values=static, disable_compile=True), grown, 8)
    one = {name: t[1:] for name, t in given.items() if isinstance(t, torch.Tensor)}
    one = {**given, **one}
    wanted = model.generate(**one, past_key_values=quantkit.KVCache("fp8", model))
    found = model.generate(**one, past_key_values=quantkit.KVCache("fp8", model), assistant_model=trained["sdpa"])
    assert same_start(found, wanted)


def test_float32_reads_codes_and_leaves_the_rest_to_torch() -> None:
    ids = models.tokens(2, TOTAL)
    one: dict[str, Any] = {"num_hidden_layers": 1}
    for number in ("none", "int8"):
        wanted = models.run(models.make("gemma3", "eager", **one), ids, models.Rounding(number))
        model = on_gpu("gemma3", torch.float32, **one)
        found = models.run(model, ids.cuda(), quantkit.KVCache(number, model), CHUNKS)
        assert difference(found, wanted) < 5e-3


@pytest.mark.parametrize("number", NUMBERS)
def test_a_long_context(number: str) -> None:
    """9000 tokens, heads of 128, four queries a key head: the step over packed keys agrees with float64."""
    changes: dict[str, Any] = {
        "num_hidden_layers": 1,
        "head_dim": 128,
        "num_attention_heads": 8,
        "max_position_embeddings": 16384,
    }
    model = on_gpu("llama", torch.bfloat16, **changes)
    ids = models.tokens(2, 9001).cuda()
    kept = quantkit.KVCache(number, model, max_cache_len=9216)
    models.run(model, ids[:, :9000], kept)
    layer = kept.layers[0]
    own = model.model.layers[0].self_attn
    caught: dict[str, torch.Tensor] = {}
    original = attention.AttentionInterface._global_mapping["quantkit"]

    def catch(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        caught.update(q=args[1].detach().clone(), out=found[0].detach().clone())
        return found

    attention.AttentionInterface._global_mapping["quantkit"] = catch
    try:
        with torch.no_grad():
            model(ids[:, 9000:], past_key_values=kept)
    finally:
        attention.AttentionInterface._global_mapping["quantkit"] = original
    layer.dtype = torch.float32  # the kernel does not round what it decodes
    k, v, _, _ = layer.decoded(1)
    k, v = (t.double().repeat_interleave(4, 1) for t in (k, v))
    assert k.shape[2] == 9001
    wanted = ((caught["q"].double() @ k.mT * own.scaling).softmax(-1) @ v).transpose(1, 2)
    assert difference(caught["out"], wanted) < 6e-3


def test_memory_is_what_was_asked_for() -> None:
    """Allocated bytes of a long static cache, and no dense copy of it in a step."""
    changes: dict[str, Any] = {"num_hidden_layers": 2, "head_dim": 128, "max_position_embeddings": 70000}
    model = on_gpu("llama", torch.bfloat16, **changes)
    ids = models.tokens(1, 40).cuda()
    for number, bytes_a_token in (("none", 512), ("fp8", 264), ("int8", 264), ("int4", 144)):
        before = torch.cuda.memory_allocated()
        kept = quantkit.KVCache(number, model, max_cache_len=65536)
        models.run(model, ids[:, :30], kept)
        assert kept.nbytes() == bytes_a_token * 65536 * 2 * 2
        assert torch.cuda.memory_allocated() - before < 1.02 * kept.nbytes() + (1 << 20)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        models.run(model, ids[:, 30:], kept, [1] * 10)
        assert torch.cuda.max_memory_allocated() - held < kept.nbytes() // 10
        del kept
