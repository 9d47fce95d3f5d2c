"""quantkit.generate: the tokens of model.generate, what it keeps, what it refuses; compiled without breaks."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import packed_models
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, DynamicCache, StaticCache
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import quantkit
from quantkit import hub, presets
from quantkit.errors import InputError
from quantkit.runtime import attention, decoding
from quantkit.runtime.decoding import Decoder, FullCache
from quantkit.runtime.generate import KEPT, generate
from quantkit.runtime.kv_cache import KVCache
from quantkit.runtime.sampling import Sampling, argmax, pick, probabilities

EMBEDDED = hub.ASSETS / "pydocs-llama-7m"
KINDS = ("llama", "qwen2", "mistral", "gemma3", "qwen3-moe")


def of(kind: str, folder: Path) -> Any:
    tiny.save(folder / kind, kind)
    return AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return of("llama", tmp_path_factory.mktemp("generate"))


@pytest.fixture(autouse=True)
def forgotten(model: Any) -> Iterator[None]:
    yield
    model.__dict__.pop(KEPT, None)


@pytest.fixture(scope="module")
def trained() -> Any:
    return AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()


def ids(length: int = 9, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 4096, (batch, length), generator=torch.Generator().manual_seed(seed))


def theirs(model: Any, prompt: torch.Tensor, new: int, **options: Any) -> torch.Tensor:
    options = {"do_sample": False, "use_cache": True, "pad_token_id": 3, **options}
    found: torch.Tensor = model.generate(prompt, max_new_tokens=new, **options)
    return found


def padded(prompt: torch.Tensor, zeros: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with the first tokens of each row replaced by padding, and the mask."""
    mask = torch.ones_like(prompt)
    for row, count in enumerate(zeros):
        mask[row, :count] = 0
    return torch.where(mask.bool(), prompt, 3), mask


# The same tokens


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = of(kind, tmp_path)
    prompt = ids(11)  # longer than a sliding window of 8
    assert torch.equal(generate(model, prompt, 20, eos_token_id=[]), theirs(model, prompt, 20, eos_token_id=-1))
    prompt, mask = padded(ids(11, 3), (4, 0, 9))
    ours = generate(model, prompt, 12, attention_mask=mask, eos_token_id=[])
    assert torch.equal(ours, theirs(model, prompt, 12, attention_mask=mask, eos_token_id=-1))


def test_a_trained_model_in_a_padded_batch(trained: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED, padding_side="left")
    texts = ["The module provides", "To open a file in Python, call", "x"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    ours = generate(trained, batch["input_ids"], 40, attention_mask=batch["attention_mask"])
    assert torch.equal(ours, theirs(trained, batch["input_ids"], 40, attention_mask=batch["attention_mask"]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_implementations(attention: str, tmp_path: Path) -> None:
    tiny.save(tmp_path, "mistral")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation=attention)
    assert torch.equal(generate(model, ids(11), 14, eos_token_id=[]), theirs(model, ids(11), 14, eos_token_id=-1))


def test_rows_end_where_they_say_so(model: Any) -> None:
    prompt = ids(5, 3)
    free = generate(model, prompt, 16, eos_token_id=[])[:, 5:]
    for eos in ([int(free[0, 4])], [int(free[0, 2]), int(free[1, 7]), int(free[2, 1])], [int(t) for t in free[:, 0]]):
        ours = generate(model, prompt, 16, eos_token_id=eos, pad_token_id=3)
        assert torch.equal(ours, theirs(model, prompt, 16, eos_token_id=eos))
    assert ours.shape[1] == 6, "all rows ended with their first token"


def test_the_host_looks_seldom_and_the_tokens_are_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: up to fifteen steps are made that nobody wants, and cut off."""
    from quantkit.runtime import generate as module

    looks = []
    all_done = Decoder.all_done
    monkeypatch.setattr(Decoder, "all_done", lambda self: looks.append(1) or all_done(self))  # type: ignore[func-returns-value]
    real = module._steps
    monkeypatch.setattr(module, "_steps", lambda decoder, tokens, every: real(decoder, tokens, 16))
    prompt = ids(5, 2)
    free = generate(model, prompt, 40, eos_token_id=[])[:, 5:]
    eos = [int(free[0, 18]), int(free[1, 9])]
    looks.clear()
    ours = generate(model, prompt, 40, eos_token_id=eos, pad_token_id=3)
    assert torch.equal(ours, theirs(model, prompt, 40, eos_token_id=eos))
    assert len(looks) == 3, "after the prompt, 16 and 32 tokens"


def test_one_token(model: Any) -> None:
    assert torch.equal(generate(model, ids(), 1), theirs(model, ids(), 1))


# Caches


def test_given_caches(model: Any) -> None:
    prompt, wanted = ids(), theirs(model, ids(), 12, eos_token_id=-1)
    static = StaticCache(model.config, max_cache_len=32)
    for cache in (static, DynamicCache(config=model.config), None):
        assert torch.equal(generate(model, prompt, 12, eos_token_id=[], past_key_values=cache), wanted)
    assert int(static.get_seq_length()) == 9 + 11
    longer = torch.cat([wanted, ids(3, seed=1)], 1)
    whole = generate(model, longer, 5, eos_token_id=[])
    assert torch.equal(generate(model, longer, 5, eos_token_id=[], past_key_values=static), whole)
    static.reset()
    assert torch.equal(generate(model, prompt, 12, eos_token_id=[], past_key_values=static), wanted)


def test_a_cache_that_does_not_fit_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match="past_key_values holds 16 tokens; 9 \\+ 8 are wanted"):
        generate(model, ids(), 8, past_key_values=StaticCache(model.config, max_cache_len=16))
    full = StaticCache(model.config, max_cache_len=64)
    generate(model, ids(), 8, past_key_values=full, eos_token_id=[])
    with pytest.raises(InputError, match="past_key_values has 16 tokens, input_ids 9"):
        generate(model, ids(), 8, past_key_values=full)
    with pytest.raises(InputError, match="past_key_values is a list"):
        generate(model, ids(), 8, past_key_values=[])


def test_a_decoder_is_kept_and_used_again(model: Any) -> None:
    def kept() -> Decoder:
        found: Decoder = model.__dict__[KEPT].decoder
        return found

    generate(model, ids(), 10)
    first = kept()
    again = generate(model, ids(20, seed=1), 17)
    assert kept() is first
    assert torch.equal(again, theirs(model, ids(20, seed=1), 17))
    generate(model, ids(20, 2), 10)
    assert kept() is not first, "another batch"
    first = kept()
    generate(model, ids(20, 2), 200, eos_token_id=0)
    assert kept() is not first, "a longer cache"
    assert torch.equal(generate(model, ids(), 4), theirs(model, ids(), 4)), "and back"


def test_what_is_kept_does_not_outlive_the_weights(tmp_path: Path) -> None:
    model = of("llama", tmp_path)
    generate(model, ids(), 8)
    first = model.__dict__[KEPT].decoder
    generate(model, ids(), 8)
    assert model.__dict__[KEPT].decoder is first
    model.to(torch.float64)  # every tensor has moved: a graph would read the old places
    assert torch.equal(generate(model, ids(), 8), theirs(model, ids(), 8))
    second = model.__dict__[KEPT].decoder
    assert second is not first
    model.model.layers[0].mlp = copy.deepcopy(model.model.layers[1].mlp)
    assert torch.equal(generate(model, ids(), 8), theirs(model, ids(), 8))
    assert model.__dict__[KEPT].decoder is not second


def test_a_copied_model_keeps_nothing(model: Any) -> None:
    wanted = generate(model, ids(), 8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.__dict__[KEPT] is None
        assert torch.equal(generate(other, ids(), 8), wanted)


def test_what_is_not_finite_does_not_stay(model: Any) -> None:
    generate(model, ids(), 8)
    cache = model.__dict__[KEPT].decoder.cache
    for layer in cache.layers:
        layer.values.fill_(torch.nan)
    assert torch.equal(generate(model, ids(4), 8), theirs(model, ids(4), 8))


# A graph, with a stand-in for CUDA's


class Replayed:
    """Stands for a captured step. The real one cannot count on the host; capture() has refused what does."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.replays = decoder, 0

    def replay(self) -> None:
        self.replays += 1
        self.decoder.step()


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit.runtime import generate as module

    def warm_up(self: Decoder) -> None:
        for _ in range(decoding.WARM_UP):
            self.step()

    monkeypatch.setattr(Decoder, "_warm_up", warm_up)
    monkeypatch.setattr(Decoder, "_captured", lambda self: Replayed(self))
    monkeypatch.setattr(module, "CAPTURING", ("cpu",))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_capture_leaves_no_trace(captured: None, kind: str, tmp_path: Path) -> None:
    model = of(kind, tmp_path)
    prompt, mask = padded(ids(11, 2), (4, 0))
    ours = generate(model, prompt, 20, attention_mask=mask, eos_token_id=[])
    assert torch.equal(ours, theirs(model, prompt, 20, attention_mask=mask, eos_token_id=-1))
    graph = model.__dict__[KEPT].decoder.graph
    assert isinstance(graph, Replayed) and graph.replays == 19
    assert torch.equal(generate(model, prompt, 5, attention_mask=mask, eos_token_id=[]), ours[:, : 11 + 5])
    assert graph.replays == 19 + 4, "used again, also for few tokens"
    sampled = [
        generate(model, prompt, 12, attention_mask=mask, do_sample=True, graph=g, generator=torch.Generator())
        for g in (None, False)
    ]
    assert torch.equal(*sampled), "the same numbers choose the same tokens"


def test_a_given_static_cache_is_captured(captured: None, model: Any) -> None:
    cache = StaticCache(model.config, max_cache_len=64)
    assert torch.equal(generate(model, ids(), 12, past_key_values=cache), theirs(model, ids(), 12))
    assert isinstance(model.__dict__[KEPT].decoder.graph, Replayed)
    assert int(cache.get_seq_length()) == 9 + 11


def test_a_cache_that_counts_on_the_host_is_not_captured(
    captured: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = of("mistral", tmp_path)
    wanted = theirs(model, ids(11), 12, eos_token_id=-1)
    with pytest.raises(InputError, match="because StaticSlidingWindowLayer counts its tokens"):
        cache = StaticCache(model.config, max_cache_len=64)
        generate(model, ids(11), 12, past_key_values=cache, graph=True)
    with caplog.at_level(logging.WARNING, "quantkit"):
        cache = StaticCache(model.config, max_cache_len=64)
        assert torch.equal(generate(model, ids(11), 12, past_key_values=cache, eos_token_id=[]), wanted)
    assert "without a CUDA graph, because StaticSlidingWindowLayer counts its tokens on the host" in caplog.text


class Counting(FullCache):
    """A cache that a graph would replay wrongly, and that does not look so."""

    calls = 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self.calls = self.calls + 1
        return super().update(*args, **kwargs)


def test_what_a_step_changes_on_the_host_is_seen(captured: None, model: Any) -> None:
    cache = Counting(model.config, 64, torch.device("cpu"))
    cache.calls = 0
    with pytest.raises(InputError, match=r"Counting counts on the host \(Counting.calls\)"):
        generate(model, ids(), 12, past_key_values=cache)


def test_a_model_that_cannot_be_captured_runs_step_by_step(
    captured: None, model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(self: Decoder) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Decoder, "_captured", fails)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with caplog.at_level(logging.WARNING, "quantkit"):
        for _ in range(2):
            assert torch.equal(generate(model, ids(), 12), theirs(model, ids(), 12))
    assert caplog.text.count("cannot be captured (operation not permitted when stream is capturing)") == 1
    model.__dict__.pop(KEPT)
    with pytest.raises(InputError, match="graph=True: LlamaForCausalLM cannot be captured"):
        generate(model, ids(), 12, graph=True)


def test_a_graph_needs_a_gpu(model: Any) -> None:
    with pytest.raises(InputError, match="graph=True: no CUDA graph can be captured, because the model is on cpu"):
        generate(model, ids(), 12, graph=True)


@pytest.mark.parametrize("number", ["none", "int8", "fp8"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_packed_caches(captured: None, number: str, kind: str, tmp_path: Path) -> None:
    """By name or given; with a graph and without; for full layers and those with a window."""
    model = of(kind, tmp_path)
    prompt, mask = padded(ids(11, 2), (4, 0))
    wanted = theirs(model, prompt, 16, attention_mask=mask, eos_token_id=-1)
    attention.register()
    model.set_attn_implementation("quantkit")
    given = KVCache(number, model.config, max_cache_len=64)
    options: list[dict[str, Any]] = [{"past_key_values": number}, {"past_key_values": number, "graph": False}]
    found = [
        generate(model, prompt, 16, attention_mask=mask, eos_token_id=[], **own)
        for own in (*options, {"past_key_values": given})
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert int(given.get_seq_length()) == 11 + 15
    assert number != "none" or torch.equal(found[0], wanted)
    assert float((found[0] == wanted).float().mean()) > 0.5


# Sampling


@pytest.mark.parametrize(("top_k", "top_p", "temperature"), [(0, 1.0, 0.7), (7, 1.0, 1.0), (0, 0.8, 1.3), (40, 0.6, 2)])
def test_tokens_are_drawn_by_the_probabilities_of_transformers(top_k: int, top_p: float, temperature: float) -> None:
    logits = torch.randn(3, 97, generator=torch.Generator().manual_seed(1)) * 2
    scores = TemperatureLogitsWarper(float(temperature))(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    wanted = scores.softmax(-1)
    sampling = Sampling(True, temperature, top_k, top_p)
    p, order = probabilities(logits, sampling)
    found = torch.zeros_like(logits).scatter(-1, torch.arange(97).expand(3, 97) if order is None else order, p)
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), wanted)
    draws = 4000
    uniform = (torch.arange(draws) + 0.5) / draws  # evenly spaced: counts are exact to one draw a token
    counts = torch.stack([pick(logits, sampling, u.expand(3)) for u in uniform])
    for row in range(3):
        frequency = torch.bincount(counts[:, row], minlength=97) / draws
        assert float((frequency - wanted[row]).abs().max()) <= 1.01 / draws
        assert int((wanted[row] == 0)[counts[:, row]].sum()) == 0


@pytest.mark.parametrize("parts", [1, 2, 8, 64])
def test_the_greatest_of_a_row_in_parts(parts: int) -> None:
    """Of equal ones the first, of numbers that are none too, as torch.argmax."""
    nan, inf = float("nan"), float("inf")
    x = torch.randint(-3, 4, (40, 192), generator=torch.Generator().manual_seed(2)).float()
    x[20:] = -inf
    for row, places in enumerate(((0,), (191,), (5, 190), (63, 64), (2, 3), (95, 96, 97), ()), 20):
        x[row, list(places)] = 4.0
    x[30, [70, 150]], x[31, [3, 5]], x[32, 9] = nan, inf, -5.0
    x[33, [10, 100]], x[33, 50] = nan, inf
    assert torch.equal(argmax(x, parts), x.argmax(-1))
    assert torch.equal(argmax(x.bfloat16(), parts), x.bfloat16().argmax(-1))


@pytest.mark.slow  # compiles C++
def test_a_choice_of_equal_logits_is_the_same_when_compiled() -> None:
    logits = torch.randint(0, 3, (3, 16_384), generator=torch.Generator().manual_seed(3)).float()
    found = torch.compile(lambda x: argmax(x, 64), fullgraph=True, dynamic=False)(logits)
    assert torch.equal(found, logits.argmax(-1))


def test_the_ends_of_the_uniform_numbers() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 5.0, -torch.inf], [-torch.inf, 1.0, 1.0, -torch.inf]])
    for u in (0.0, 1 - 2**-24, 1.0):
        found = pick(logits, Sampling(True), torch.full((2,), u))
        assert not torch.isinf(logits.gather(1, found[:, None])).any(), u


def test_the_same_seed_gives_the_same_tokens(model: Any) -> None:
    def sampled(seed: int, **options: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return generate(model, ids(), 12, do_sample=True, generator=generator, eos_token_id=[], **options)

    assert torch.equal(sampled(0), sampled(0))
    assert not torch.equal(sampled(0), sampled(1))
    assert torch.equal(sampled(0, top_k=1), theirs(model, ids(), 12, eos_token_id=-1))
    assert torch.equal(sampled(0, top_k=0, top_p=1e-9), theirs(model, ids(), 12, eos_token_id=-1))


def test_the_generation_config_is_followed(tmp_path: Path) -> None:
    model = of("llama", tmp_path)
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.5
    assert Sampling.of(model.generation_config, {}) == Sampling(True, 0.5, 50, 1.0)
    assert Sampling.of(model.generation_config, {"top_k": 0, "top_p": 0.9}) == Sampling(True, 0.5, 0, 0.9)
    assert Sampling.of(model.generation_config, {"do_sample": False}) == Sampling()
    model.generation_config.max_new_tokens = 3
    assert generate(model, ids(), eos_token_id=[]).shape == (1, 12)
    model.generation_config.repetition_penalty = 1.2
    with pytest.raises(InputError, match="generation config asks for repetition_penalty"):
        generate(model, ids(), 4)
    assert generate(model, ids(), 4, repetition_penalty=1.0, eos_token_id=[]).shape == (1, 13)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "does not do num_beams=4; model.generate does"),
        ({"stop_strings": ["x"]}, "does not do stop_strings"),
        ({"logits_processor": [1]}, "does not do logits_processor"),
        ({"inputs_embeds": torch.zeros(1, 2, 64)}, "does not do inputs_embeds"),
        ({"num_beems": 4}, "has no argument num_beems"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is 0.0"),
        ({"do_sample": True, "top_k": -1}, "top_k is -1"),
        ({"do_sample": True, "top_p": 0.0}, "top_p is 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask is \(1, 3\), input_ids \(1, 9\)"),
        ({"attention_mask": torch.tensor([[1] * 8 + [0]])}, "padding_side='left'"),
        ({"attention_mask": torch.tensor([[0, 1, 0] + [1] * 6])}, "padding_side='left'"),
    ],
)
def test_what_is_not_done_is_refused_by_name(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(model, ids(), **{"max_new_tokens": 4, **options})


def test_inputs_are_checked(model: Any) -> None:
    for wrong in (ids()[0], ids().float(), ids()[:, :0]):
        with pytest.raises(InputError, match="input_ids are"):
            generate(model, wrong, 4)
    with pytest.raises(InputError, match="hold the pad token 3"):
        generate(model, padded(ids(), (2,))[0], 4)
    assert generate(model, ids(), 4, num_beams=1, use_cache=True, min_p=None).shape[1] <= 13


def test_other_layers_than_attention_are_refused(model: Any) -> None:
    config = copy.deepcopy(model.config)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(InputError, match=r"also has a LinearAttention\w*; use model.generate"):
        FullCache(config, 64, torch.device("cpu"))
    config = copy.deepcopy(model.config)
    config.attention_chunk_size = 8
    with pytest.raises(InputError, match="in chunks"):
        FullCache(config, 64, torch.device("cpu"))


def test_it_is_in_the_package(model: Any) -> None:
    assert quantkit.generate is generate
    assert "generate" in quantkit.__all__


# torch.compile


class Backend:
    """Counts what torch.compile compiles, and runs it as it is."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return graph


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    backend, compile = Backend(), torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, **{**options, "backend": backend}))
    yield backend
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("packed")
    packed_models.save(folder, "compressed-tensors", presets.PRESETS["W4A16"])
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_packed_model(packed: Any) -> None:
    assert torch.equal(generate(packed, ids(), 12), theirs(packed, ids(), 12))


def test_a_step_is_compiled_whole_and_once(packed: Any, backend: Backend) -> None:
    wanted = theirs(packed, ids(), 12)
    assert torch.equal(generate(packed, ids(), 12, compile=True), wanted)
    assert backend.graphs == 2, "the model, and the choice of the token"
    generate(packed, ids(30, seed=1), 20, compile=True)
    generate(packed, ids(2, seed=2), 50, compile=True)
    assert backend.graphs == 2, "no other prompt or length compiles again"
    for batch in range(2, 11):  # with the first, more than the eight graphs that torch.compile keeps of one function
        assert generate(packed, ids(5, batch), 3, compile=True).shape[0] == batch
    assert backend.graphs == 20
    generate(packed, ids(5, 3), 3, compile=True, do_sample=True)
    assert backend.graphs == 21, "what is drawn is not compiled"
    packed.__dict__.pop(KEPT)


def test_transformers_compiles_a_packed_model_whole_and_once(packed: Any, backend: Backend) -> None:
    """Its own generate with a static cache, as it does by itself on a GPU: no break, no recompilation."""
    config = CompileConfig(fullgraph=True, mode=None)
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": config, "eos_token_id": -1}
    for prompt in (ids(), ids(20, seed=1), ids(3, seed=2)):
        wanted = theirs(packed, prompt, 20, eos_token_id=-1)
        assert torch.equal(theirs(packed, prompt, 20, **static), wanted)
    assert backend.graphs >= 1
    graphs = backend.graphs
    for prompt in (ids(seed=3), ids(20, seed=4)):
        theirs(packed, prompt, 20, **static)
    assert backend.graphs == graphs
    assert not torch._dynamo.utils.counters["graph_break"]
