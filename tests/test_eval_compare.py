"""Windows of held-out text, the comparison of two models on them, and one generated sentence."""

from __future__ import annotations

import copy
import json
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from quantkit.calibration import load_texts
from quantkit.errors import GateError, InputError
from quantkit.hub import ASSETS
from quantkit_eval import compare as compare_module
from quantkit_eval.compare import compare, perplexity
from quantkit_eval.generate import continuation, first_sentence
from quantkit_eval.windows import heldout_windows

VOCABULARY = 61


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).float().eval()


@pytest.fixture(scope="module")
def damaged(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model with noise on one linear."""
    other = copy.deepcopy(model)
    weight = other.model.layers[1].mlp.down_proj.weight
    weight.data += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return other


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (7, 20), generator=torch.Generator().manual_seed(2))


class Letters:
    """A tokenizer of one token a letter: a=0, b=1, ..."""

    def __init__(self, eos_token_id: int | None = 26) -> None:
        self.eos_token_id = eos_token_id

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) - ord("a") for c in text]}


def close(value: Any) -> Any:
    """Float32 against float64."""
    return pytest.approx(value, rel=1e-4, abs=1e-6)


def letters(eos_token_id: int | None = 26) -> Any:
    return Letters(eos_token_id)


def test_windows_are_shuffled_documents_with_eos_cut_into_rows():
    texts = ["aaa", "bb", "c", "dddd", "e"]
    order = list(texts)
    random.Random(5).shuffle(order)
    stream = [i for text in order for i in [*(ord(c) - ord("a") for c in text), 26]]
    assert len(stream) == 16
    found = heldout_windows(texts, letters(), length=5, seed=5)
    assert found.dtype == torch.int64
    assert found.tolist() == [stream[0:5], stream[5:10], stream[10:15]]
    assert heldout_windows(texts, letters(), length=5, seed=5, count=2).tolist() == [stream[0:5], stream[5:10]]
    assert texts == ["aaa", "bb", "c", "dddd", "e"]


def test_fewer_windows_than_asked_are_reported():
    said: list[str] = []
    assert heldout_windows(["abcdefghi"], letters(), length=5, count=3, warn=said.append).shape == (2, 5)
    assert said == ["the validation text has 2 windows of 5 tokens, 3 were asked for; using 2"]
    with pytest.warns(UserWarning, match="2 windows of 5 tokens"):
        heldout_windows(["abcdefghi"], letters(), length=5, count=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: heldout_windows(["ab"], letters(), length=5), "3 tokens in 1 documents, less than one window of 5"),
        (lambda: heldout_windows([], letters(), length=5), "0 tokens in 0 documents"),
        (lambda: heldout_windows(["abc"], letters(None), length=2), "no EOS token"),
        (lambda: heldout_windows(["abc"], letters(), length=1), "at least 2"),
        (lambda: heldout_windows(["abc"], letters(), length=2, count=0), "at least 1"),
    ],
)
def test_windows_refuse(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_against_brute_force_in_float64(model, damaged, windows):
    found = compare(model, damaged, windows)
    p_model, q_model = copy.deepcopy(model).double(), copy.deepcopy(damaged).double()
    kl, nll_p, nll_q, same = [], [], [], []
    with torch.no_grad():
        for row in windows:
            p = torch.softmax(p_model(row[None]).logits[0], -1)
            q = torch.softmax(q_model(row[None]).logits[0], -1)
            kl.append(
                [sum(float(a) * math.log(a / b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
            )
            nll_p.append([-math.log(p[i, row[i + 1]]) for i in range(len(row) - 1)])
            nll_q.append([-math.log(q[i, row[i + 1]]) for i in range(len(row) - 1)])
            same += (p.argmax(-1) == q.argmax(-1)).tolist()
    kl_WL, nll_p_WL, nll_q_WL = (torch.tensor(x, dtype=torch.float64) for x in (kl, nll_p, nll_q))
    by_window = kl_WL.mean(1)
    assert (found.windows, found.tokens) == (7, 140)
    assert found.kl == close(kl_WL.mean().item())
    assert found.kl_by_window == close(by_window.tolist())
    assert found.kl_stderr == close((by_window.std() / math.sqrt(7)).item())
    assert found.kl_max == close(kl_WL.max().item())
    assert found.kl_p99 == close(sorted(kl_WL.flatten().tolist())[138])  # rank ceil(.99 * 140) = 139
    assert found.perplexity_original == close(math.exp(nll_p_WL.mean()))
    assert found.perplexity == close(math.exp(nll_q_WL.mean()))
    assert found.perplexity_ratio == close(math.exp(nll_q_WL.mean() - nll_p_WL.mean()))
    assert found.nll_by_window_original == close(nll_p_WL.mean(1).tolist())
    assert found.nll_by_window == close(nll_q_WL.mean(1).tolist())
    assert found.top1_agreement == pytest.approx(sum(same) / 140)
    assert perplexity(damaged, windows) == pytest.approx(found.perplexity, rel=1e-9)


def test_a_model_does_not_differ_from_itself(model, windows):
    found = compare(model, copy.deepcopy(model), windows)
    assert (found.kl, found.kl_max, found.top1_agreement, found.perplexity_ratio) == (0, 0, 1, 1)
    assert found.kl_stderr == 0
    assert compare(model, model, windows[:1]).kl_stderr is None


def test_more_damage_is_more_divergence(model, windows):
    divergence = []
    for noise in (0.01, 0.1, 1.0):
        other = copy.deepcopy(model)
        weight = other.model.layers[0].self_attn.v_proj.weight
        weight.data += noise * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
        divergence.append(compare(model, other, windows).kl)
    assert 0 < divergence[0] < divergence[1] < divergence[2]


@pytest.mark.parametrize(("batch_size", "chunk_bytes"), [(1, None), (3, 1), (7, VOCABULARY * 4 * 13)])
def test_neither_batches_nor_chunks_change_the_result(model, damaged, windows, monkeypatch, batch_size, chunk_bytes):
    expected = compare(model, damaged, windows)
    if chunk_bytes:
        monkeypatch.setattr(compare_module, "CHUNK_BYTES", chunk_bytes)
    found = compare(model, damaged, windows, batch_size=batch_size)
    for name, value in expected.to_dict(by_window=True).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-5), name
    assert perplexity(damaged, windows, batch_size=batch_size) == pytest.approx(expected.perplexity, rel=1e-5)


def test_a_big_vocabulary_gets_small_batches():
    assert compare_module._batch_size(512, 4096) == 4
    assert compare_module._batch_size(512, 128_256) == 2
    assert compare_module._batch_size(8192, 256_000) == 1


def test_bfloat16_models_are_judged_in_float32(model, windows):
    half = copy.deepcopy(model).bfloat16()
    found = compare(half, copy.deepcopy(half), windows)
    assert (found.kl, found.top1_agreement) == (0, 1)
    assert 0 < compare(model, half, windows).kl < 0.05


def test_training_mode_is_put_back_and_no_gradient_is_left(model, windows):
    other = copy.deepcopy(model)
    other.config.attention_dropout = 0.5
    other.train()
    for layer in other.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert compare(model, other, windows).kl == 0
    assert other.training
    assert all(p.grad is None for p in other.parameters())


def test_progress_counts_windows(model, damaged, windows):
    steps: list[tuple[int, int]] = []
    compare(model, damaged, windows, batch_size=3, on_progress=lambda k, n: steps.append((k, n)))
    assert steps == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_name_the_model(model, windows, value):
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[5, 3] = value
    with pytest.raises(GateError, match=r"quantized model's logits are NaN or Inf at window 0, position 0.*float32"):
        compare(model, broken, windows)
    with pytest.raises(InputError, match="original model's logits are NaN or Inf"):
        compare(broken, model, windows)
    with pytest.raises(InputError, match="NaN or Inf"):
        perplexity(broken, windows)


def test_large_finite_logits_are_not_accused(windows):
    """Their sum overflows float32, they do not."""

    class Huge(torch.nn.Module):
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCABULARY))

        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(VOCABULARY, 1)

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.embedding

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=torch.full((*input_ids.shape, VOCABULARY), 3e38))

    found = compare(Huge(), Huge(), windows)
    assert found.kl == 0
    assert found.perplexity == pytest.approx(VOCABULARY, rel=1e-5)


def test_a_ruined_model_has_infinite_perplexity(model, windows):
    ruined = copy.deepcopy(model)
    ruined.lm_head.weight.data *= 1e6
    assert compare(model, ruined, windows).perplexity == math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[0], "int64 \\(W, L\\)"),
        (lambda w: w.int(), "int64 \\(W, L\\)"),
        (lambda w: w[:0], "at least one window"),
        (lambda w: w[:, :1], "two tokens"),
        (lambda w: w + VOCABULARY, "outside the original model's vocabulary of 61"),
        (lambda w: w - VOCABULARY, "outside the original model's vocabulary"),
        (lambda w: w.repeat(1, 2), "40 tokens are longer than the original model's 32 positions"),
    ],
)
def test_windows_that_do_not_fit_are_refused(model, windows, change, message):
    with pytest.raises(InputError, match=message):
        compare(model, model, change(windows))


def test_another_vocabulary_is_refused(model, windows):
    other = copy.deepcopy(model)
    other.resize_token_embeddings(VOCABULARY + 8)
    with pytest.raises(InputError, match="different vocabularies: original 61, quantized 69"):
        compare(model, other, windows)


def test_to_dict_is_plain_json(model, damaged, windows):
    found = compare(model, damaged, windows)
    short, long = found.to_dict(), found.to_dict(by_window=True)
    assert json.loads(json.dumps(short)) == short
    assert json.loads(json.dumps(long)) == long
    assert set(long) - set(short) == {"kl_by_window", "top1_by_window", "nll_by_window", "nll_by_window_original"}
    assert len(long["kl_by_window"]) == 7


@pytest.fixture(scope="module")
def pydocs() -> tuple[Any, Any]:
    folder = ASSETS / "pydocs-llama-7m"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def test_embedded_model_on_its_heldout_text(pydocs):
    """The first 4 of the 120 windows whose perplexity is 9.2067; a coarser weight must show."""
    model, tokenizer = pydocs
    windows = heldout_windows(load_texts("builtin:pydocs-heldout"), tokenizer, count=4)
    other = copy.deepcopy(model)
    for layer in other.model.layers:
        weight = layer.mlp.down_proj.weight
        step = weight.abs().amax(1, keepdim=True) / 7.5
        weight.data = (weight.data / step).round() * step
    found = compare(model, other, windows)
    assert found.perplexity_original == pytest.approx(12.874, rel=1e-3)
    assert 0.005 < found.kl < 0.1
    assert 0.8 < found.top1_agreement < 1
    assert 1 < found.perplexity_ratio < 1.1


def test_continuation_is_one_greedy_sentence(pydocs):
    model, tokenizer = pydocs
    prompt = "The list method append() adds"
    text = continuation(model, tokenizer, prompt, 32)
    assert text == continuation(model, tokenizer, prompt, 32)
    assert text and "\n" not in text and not text.startswith(prompt)
    first = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        likeliest = tokenizer.decode(model(first).logits[0, -1].argmax()).strip()
    assert text.startswith(likeliest)


def test_continuation_ignores_sampling_settings(pydocs):
    model, tokenizer = pydocs
    sampling = copy.deepcopy(model)
    sampling.generation_config.do_sample = True
    sampling.generation_config.temperature = 2.0
    sampling.generation_config.top_k = 50
    prompt = "The module os provides"
    assert continuation(sampling, tokenizer, prompt, 16) == continuation(model, tokenizer, prompt, 16)
    with pytest.raises(InputError, match="empty"):
        continuation(model, tokenizer, "", 4)


@pytest.mark.parametrize(
    ("text", "ended", "sentence"),
    [
        (" the first. And more", False, "the first."),
        ("a list (e.g. of\n  ints) is sorted. Next", False, "a list (e.g. of ints) is sorted."),
        ("use os.path here! Then", False, "use os.path here!"),
        ('he said "no." Then', False, 'he said "no."'),
        ("no stop in this tex", False, "no stop in this..."),
        ("no stop but the end", True, "no stop but the end"),
        ("word", False, "word..."),
        ("  ", False, ""),
    ],
)
def test_first_sentence(text, ended, sentence):
    assert first_sentence(text, ended=ended) == sentence
