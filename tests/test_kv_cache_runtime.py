"""quantkit.KVCache in transformers: as a cache that only rounds, in every number, growing and static, whoever reads."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention_models as models
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, DynamicCache

import quantkit
from quantkit.errors import InputError
from quantkit.runtime import attention, kv_cache, kv_layer

TRAINED = Path(quantkit.__file__).parent / "assets" / "pydocs-llama-7m"
NUMBERS = models.NUMBERS
CHUNKS, TOTAL, CLOSE = models.CHUNKS, models.TOTAL, models.CLOSE
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "use_cache": True}


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    attention.register()
    found = {}
    for name in ("quantkit", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(TRAINED, dtype=torch.float32, attn_implementation=name)
        found[name] = model.eval()
    tokenizer = AutoTokenizer.from_pretrained(TRAINED, padding_side="left")
    texts = ["The dictionary type supports", "def main():\n    import argparse\n    parser ="]
    found["inputs"] = dict(tokenizer(texts, return_tensors="pt", padding=True))
    found["one"] = dict(tokenizer(texts[1:], return_tensors="pt"))
    return found


# The same tokens


@pytest.mark.parametrize("number", NUMBERS)
def test_generates_as_a_cache_that_only_rounds(number: str, trained: dict[str, Any]) -> None:
    """Trained weights, two prompts of different length; 16 bits are SDPA's own tokens."""
    inputs = trained["inputs"]
    wanted = trained["sdpa"].generate(**inputs, **GREEDY, past_key_values=models.Rounding(number))
    if number == "none":
        assert torch.equal(wanted, trained["sdpa"].generate(**inputs, **GREEDY))
    for reader in ("quantkit", "sdpa"):
        for name, make in models.caches(number, 64).items():
            if reader == "sdpa" and name.endswith("no config"):
                continue
            model = trained[reader]
            found = model.generate(**inputs, **GREEDY, past_key_values=make(model))
            assert torch.equal(found, wanted), (reader, name)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", models.KINDS)
def test_every_kind_of_layer_in_pieces(kind: str, padded: bool) -> None:
    """Chunks that are longer and shorter than a window, and single tokens; then with one layer, rounded."""
    ids = models.tokens(2, TOTAL)
    mask = models.padding(ids) if padded else None
    wanted = models.run(models.make(kind, "eager"), ids, mask=mask)
    for reader in ("quantkit", "eager"):
        model = models.make(kind, reader)
        for name, make in models.caches("none", TOTAL + 5).items():
            assert models.error(models.run(model, ids, make(model), CHUNKS, mask), wanted) < CLOSE, (reader, name)
    # What a second layer sees is rounded after a first whose last bits differ, so some codes differ.
    for number in NUMBERS[1:]:
        one = {"num_hidden_layers": 1}
        wanted = models.run(models.make(kind, "eager", **one), ids, models.Rounding(number), mask=mask)
        model = models.make(kind, "quantkit", **one)
        for name in ("grows", "static"):
            found = models.run(model, ids, models.caches(number, TOTAL + 5)[name](model), CHUNKS, mask)
            assert models.error(found, wanted) < CLOSE, (number, name)


@pytest.mark.parametrize("number", NUMBERS)
def test_growing_and_going_round(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 16 tokens on, over rings that are gone round more than once."""
    monkeypatch.setattr(kv_layer, "FIRST", 16)
    ids, chunks = models.tokens(2, 330), [3, 20, 1, 1, 130, 1, 17, 16, 120, 1, 20]
    one = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    for kind, changes in (("gemma3", one), ("llama", {"num_hidden_layers": 1})):
        wanted = models.run(models.make(kind, "eager", **changes), ids, models.Rounding(number))
        model = models.make(kind, "quantkit", **changes)
        kept = quantkit.KVCache(number, model)
        assert models.error(models.run(model, ids, kept, chunks), wanted) < CLOSE
        layer = kept.layers[0]
        assert layer.ring == (128 if kind == "gemma3" else 0) and int(kept.get_seq_length()) == 330


def test_no_block_of_a_ring_is_written_twice_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of a GPU write a block each, and put back what they found of its other tokens."""
    written, real = [], kv_layer.kv_append

    def kept(k: torch.Tensor, *rest: Any) -> None:
        written.append((int(rest[5][0]), k.shape[2]))
        real(k, *rest)

    monkeypatch.setattr(kv_layer, "kv_append", kept)
    config = models.make("mistral", "quantkit", num_hidden_layers=1).config
    for first in range(0, 40, 3):
        for count in (1, 100, 111, 112, 113, 120, 127, 128, 129, 300):
            cache = quantkit.KVCache("int8", config)
            for n in (first, count) if first else (count,):
                cache.update(*(torch.randn(2, 2, n, 64).bfloat16() for _ in range(2)), 0)
            layer = cache.layers[0]
            start, n = written[-1]
            assert layer.ring == 128 and start + n == first + count and n == min(count, layer.held)
            blocks = [block % (layer.ring // 16) for block in range(start // 16, (start + n - 1) // 16 + 1)]
            assert len(set(blocks)) == len(blocks)


@pytest.mark.parametrize("number", ["fp8", "int4"])
def test_heads_of_128(number: str) -> None:
    changes = {"head_dim": 128, "num_hidden_layers": 1}
    ids = models.tokens(2, TOTAL)
    model = models.make("llama", "quantkit", **changes)
    for group in (None, 64, 128) if number == "int4" else (None,):
        groups = 1 if number == "fp8" or group == 128 else 2
        wanted = models.run(models.make("llama", "eager", **changes), ids, models.Rounding(number, groups))
        made = quantkit.KVCache(number, model, group_size=group)
        assert models.error(models.run(model, ids, made, CHUNKS), wanted) < CLOSE


BUGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the window is one short": lambda m: m.setattr(
        kv_layer.KVLayer, "keep", property(lambda s: 22, lambda s, v: None), False
    ),
    "a ring that is too short": lambda m: [m.setattr(kv_layer, "PAGE", 16), m.setattr(kv_layer, "SLACK", -16)][0],
    "tokens one further": lambda m: m.setattr(
        kv_layer, "kv_append", lambda *a, f=kv_layer.kv_append: f(*a[:6], a[6] + 1, *a[7:])
    ),
    "positions not moved": lambda m: m.setattr(attention, "_moved", lambda starts, offset: starts),
    "padding not masked": lambda m: m.setattr(
        attention, "_taken_apart", lambda given, f=attention._taken_apart: (None, *f(given)[1:])
    ),
    "the clock is late": lambda m: m.setattr(
        kv_layer.Clock, "tick", lambda s, layer, n, f=kv_layer.Clock.tick: (f(s, layer, n), s.after.sub_(1))
    ),
    "never rounded": lambda m: m.setattr(kv_layer.KVLayer, "_rounded", lambda s, x, which: x),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = models.tokens(2, TOTAL)
    mask = models.padding(ids, 50)
    changes = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    wanted = models.run(models.make("gemma2", "eager", **changes), ids, models.Rounding("int4"), mask=mask)
    model = models.make("gemma2", "quantkit", **changes)
    assert models.error(models.run(model, ids, quantkit.KVCache("int4", model), CHUNKS, mask), wanted) < CLOSE
    BUGS[bug](monkeypatch)
    try:
        found = models.run(model, ids, quantkit.KVCache("int4", model), CHUNKS, mask)
    except (RuntimeError, InputError, ValueError):
        return
    assert models.error(found, wanted) > 10 * CLOSE


# What transformers does with caches


def test_beams(trained: dict[str, Any]) -> None:
    given = {**trained["inputs"], **GREEDY, "num_beams": 3}
    wanted = trained["sdpa"].generate(**given)
    rounded = trained["sdpa"].generate(**given, past_key_values=models.Rounding("int4"))
    model = trained["quantkit"]
    for name in ("grows", "static"):
        if name == "grows":
            assert torch.equal(model.generate(**given, past_key_values=models.caches("none", 64)[name](model)), wanted)
        assert torch.equal(model.generate(**given, past_key_values=models.caches("int4", 64)[name](model)), rounded)


def test_assisted_generation(trained: dict[str, Any]) -> None:
    """A draft in bfloat16, and none; tokens that were not accepted are taken back."""
    model, given = trained["quantkit"], {**trained["one"], **GREEDY}
    draft = AutoModelForCausalLM.from_pretrained(TRAINED, dtype=torch.bfloat16, attn_implementation="quantkit").eval()
    wanted = trained["sdpa"].generate(**given, past_key_values=models.Rounding("fp8"))
    for more in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 5}):
        for name in ("grows", "static"):
            found = model.generate(**given, **more, past_key_values=models.caches("fp8", 96)[name](model))
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("static", [False, True])
def test_tokens_are_taken_back(static: bool) -> None:
    ids = models.tokens(2, TOTAL)
    model = models.make("gemma2", "quantkit", num_hidden_layers=2)
    wanted = models.run(models.make("gemma2", "eager", num_hidden_layers=2), ids)
    kept = quantkit.KVCache("none", model, max_cache_len=TOTAL + 60 if static else None)
    models.run(model, torch.cat([ids[:, :100], ids[:, :50]], 1), kept, [100, 10, 40])
    kept.crop(-50)
    assert int(kept.get_seq_length()) == 100
    with torch.no_grad():
        rest = model(ids[:, 100:], past_key_values=kept, position_ids=torch.arange(100, TOTAL)[None].expand(2, -1))
    assert models.error(rest.logits, wanted[:, 100:]) < CLOSE
    kept.crop(TOTAL - 20)  # as transformers 5.17 says it
    assert int(kept.get_seq_length()) == TOTAL - 20
    with pytest.raises(InputError, match="keeps 112 tokens, too few to take 100 of 130 back"):
        kept.crop(-100)
    kept.crop(-1000)
    assert int(kept.get_seq_length()) == 0 and models.error(models.run(model, ids, kept, CHUNKS), wanted) < CLOSE


def test_rows_of_the_batch() -> None:
    ids = models.tokens(3, 40)
    for kind in ("llama", "gemma2"):
        model = models.make(kind, "quantkit")
        kept = quantkit.KVCache("int8", model)
        models.run(model, ids, kept)
        with torch.no_grad():
            wanted = model(ids[:, :1], past_key_values=copy.deepcopy(kept)).logits
            twice, some = copy.deepcopy(kept), copy.deepcopy(kept)
            twice.batch_repeat_interleave(2)
            found = model(ids[:, :1].repeat_interleave(2, 0), past_key_values=twice).logits
            assert models.error(found, wanted.repeat_interleave(2, 0)) < CLOSE
            some.batch_select_indices(torch.tensor([2, 0]))
            assert models.error(model(ids[[2, 0], :1], past_key_values=some).logits, wanted[[2, 0]]) < CLOSE
        assert some.batch_size == 2 and kept.batch_size == 3 and int(kept.get_seq_length()) == 40


def test_memory_taken_beforehand() -> None:
    """As transformers does before it compiles a prefill."""
    ids = models.tokens(2, TOTAL)
    model = models.make("gemma2", "quantkit")
    wanted = models.run(models.make("gemma2", "eager"), ids)
    for room in (None, TOTAL):
        kept = quantkit.KVCache("none", model, max_cache_len=room)
        kept.early_initialization(2, 2, 64, torch.float32, torch.device("cpu"))
        assert kept.is_initialized and kept.batch_size == 2 and int(kept.get_seq_length()) == 0
        assert models.error(models.run(model, ids, kept, CHUNKS), wanted) < CLOSE


@pytest.mark.parametrize("number", ["none", "int4"])
def test_reset(number: str) -> None:
    ids = models.tokens(2, TOTAL)
    model = models.make("gemma2", "quantkit")
    for name, make in models.caches(number, TOTAL + 3).items():
        kept = make(model)
        wanted = models.run(model, ids, kept, CHUNKS)
        places = [t.data_ptr() for t in (*kept.layers[0].stored(), kept.layers[0].after) if t is not None]
        kept.reset()
        assert int(kept.get_seq_length()) == 0 and kept.get_mask_sizes(7, 0) == (7, 0)
        assert torch.equal(models.run(model, ids, kept, CHUNKS), wanted), name
        if name.startswith("static"):
            assert places == [t.data_ptr() for t in (*kept.layers[0].stored(), kept.layers[0].after) if t is not None]


def test_who_reads_may_change(trained: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Between steps, and in a copy that was made before; who reads in another way is told once."""
    kv_cache._say_decoded.cache_clear()
    caplog.set_level(logging.WARNING, "quantkit")
    ids = models.tokens(2, TOTAL)
    wanted = models.run(models.make("gemma3", "eager"), ids)
    for name, make in models.caches("none", TOTAL + 3).items():
        model = models.make("gemma3", "quantkit")
        kept, at, found = make(model), 0, []
        for i, n in enumerate(CHUNKS):
            model.set_attn_implementation(["quantkit", "eager", "eager", "quantkit"][i % 4])
            kept = copy.deepcopy(kept)
            positions = torch.arange(at, at + n)[None].expand(2, -1)
            with torch.no_grad():
                found.append(model(ids[:, at : at + n], past_key_values=kept, position_ids=positions).logits)
            at += n
        assert models.error(torch.cat(found, 1), wanted) < CLOSE, name
    said = [r.getMessage() for r in caplog.records if "decoded anew" in r.getMessage()]
    assert len(said) == 1 and "attn_implementation='eager'" in said[0]


def test_padding_elsewhere_and_weights() -> None:
    """What goes to torch's attention sees the same keys."""
    ids = models.tokens(2, TOTAL)
    mask = torch.ones_like(ids)
    mask[1, 40:44] = 0
    for kind in ("llama", "gemma2"):
        wanted = models.run(models.make(kind, "eager"), ids, DynamicCache(), CHUNKS, mask)
        model = models.make(kind, "quantkit")
        assert models.error(models.run(model, ids, quantkit.KVCache("none", model), CHUNKS, mask), wanted) < CLOSE
        kept = quantkit.KVCache("none", model, max_cache_len=TOTAL)
        models.run(model, ids[:, :60], kept)
        with torch.no_grad():
            out = model(ids[:, 60:61], past_key_values=kept, output_attentions=True)
        assert all(torch.allclose(w.sum(-1), torch.ones(2, 4, 1), atol=1e-5) for w in out.attentions)
        with pytest.raises(InputError, match="leave out max_cache_len"), torch.no_grad():
            model(ids[:, 61:64], past_key_values=kept, attention_mask=mask[:, :64])


# Compiled


@pytest.mark.parametrize(
    ("kind", "number"), [("llama", "none"), ("llama", "fp8"), ("gemma2", "int8"), ("gemma2", "int4")]
)
def test_a_step_is_one_graph_and_stays_one(kind: str, number: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    ids = models.tokens(2, 60)
    model = models.make(kind, "quantkit", num_hidden_layers=2)
    kept = quantkit.KVCache(number, model, max_cache_len=64)
    other = quantkit.KVCache(number, model, max_cache_len=64)
    models.run(model, ids[:, :20], kept)
    models.run(model, ids[:, :20], other)
    assert kept.is_compileable
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for at in range(20, 50):
            given = {"input_ids": ids[:, at : at + 1], "position_ids": torch.full((2, 1), at)}
            found, wanted = step(**given, past_key_values=kept).logits, model(**given, past_key_values=other).logits
            assert models.error(found, wanted) < CLOSE
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"] and not counters["recompiles"]


def test_generate_compiles_it() -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    ids = models.tokens(2, 20)
    given = {"attention_mask": models.padding(ids), **GREEDY, "eos_token_id": 127}
    model = models.make("gemma3", "quantkit", num_hidden_layers=2)
    wanted = model.generate(ids, **given, past_key_values=quantkit.KVCache("fp8", model))
    kept = quantkit.KVCache("fp8", model, max_cache_len=64)
    assert torch.equal(model.generate(ids, **given, past_key_values=kept, compile_config=compiled), wanted)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"] and not counters["recompiles"]
    kept.reset()
    assert torch.equal(model.generate(ids, **given, past_key_values=kept, compile_config=compiled), wanted)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_full_cache_says_so_in_a_compiled_step_too() -> None:
    torch._dynamo.reset()
    model = models.make("llama", "quantkit", num_hidden_layers=1)
    ids = models.tokens(1, 40)
    with pytest.raises(InputError, match="33 tokens for a KVCache of 32"):
        models.run(model, ids[:, :33], quantkit.KVCache("fp8", model, max_cache_len=30))
    kept = quantkit.KVCache("fp8", model, max_cache_len=32)
    models.run(model, ids[:, :31], kept)
    with torch.no_grad():
        step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        step(ids[:, :1], past_key_values=kept)
        with pytest.raises(RuntimeError, match="a KVCache of 32 tokens is full"):
            step(ids[:, :1], past_key_values=kept)
        with pytest.raises(InputError, match="a KVCache of 32 tokens is full"):
            model(ids[:, :1], past_key_values=kept)
