"""attn_implementation="quantkit" with transformers' own caches and without one: masks, features, what goes to torch."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import attention_models as models
import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask, create_sliding_window_causal_mask

from quantkit.errors import InputError
from quantkit.runtime import attention, attention_torch

CHUNKS = [60, 1, 1, 30, 16, 17, 5, 20]
TOTAL = sum(CHUNKS)
CLOSE = 3e-5


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """What the logger says; it may say it again."""
    attention._say.cache_clear()
    caplog.set_level(logging.WARNING, "quantkit")
    yield lambda: [record.getMessage() for record in caplog.records if record.name == "quantkit"]


def no_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a dense mask was made")

    monkeypatch.setattr(attention, "sdpa_mask", refuse)
    monkeypatch.setattr(attention_torch, "_visible", refuse)


# As eager


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", models.KINDS)
def test_as_eager_in_one_piece_and_in_several(
    kind: str, padded: bool, monkeypatch: pytest.MonkeyPatch, heard: Any
) -> None:
    ids = models.tokens(2, TOTAL)
    mask = models.padding(ids) if padded else None
    model = models.make(kind, "quantkit")
    wanted = models.run(models.make(kind, "eager"), ids, mask=mask)
    no_dense_mask(monkeypatch)
    assert models.error(models.run(model, ids, mask=mask), wanted) < CLOSE
    config = model.config
    for cache in (DynamicCache(), DynamicCache(config=config), StaticCache(config=config, max_cache_len=TOTAL + 9)):
        assert models.error(models.run(model, ids, cache, CHUNKS, mask), wanted) < CLOSE
    assert heard() == []


def test_generation_as_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left padding, dynamic and static caches; no dense mask for any step."""
    ids = models.tokens(2, 40)
    given = {"attention_mask": models.padding(ids), "max_new_tokens": 12, "do_sample": False, "use_cache": True}
    wanted = models.make("gemma3", "sdpa").generate(ids, **given)
    no_dense_mask(monkeypatch)
    for implementation in (None, "static"):
        found = models.make("gemma3", "quantkit").generate(ids, **given, cache_implementation=implementation)
        assert torch.equal(found, wanted)


def test_a_window_that_is_ignored_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = models.tokens(2, 80), None
    wanted = models.run(models.make("gemma2", "eager"), ids, mask=mask)
    model = models.make("gemma2", "quantkit")
    original = attention.attend

    def wide(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs | {"sliding_window": None})

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, "quantkit", wide)
    assert models.error(models.run(model, ids), wanted) > 1e-2
    for name, change in (("softcap", None), ("scaling", 0.1)):
        monkeypatch.setitem(
            attention.AttentionInterface._global_mapping,
            "quantkit",
            lambda *a, name=name, change=change, **kw: original(*a, **kw | {name: change}),
        )
        assert models.error(models.run(model, ids), wanted) > 1e-2


# Masks


def asked(kind: str, length: int, cache: Any = None, mask: torch.Tensor | None = None, **more: Any) -> Any:
    """What transformers' function for this kind of layer returns."""
    config = SimpleNamespace(_attn_implementation="quantkit", sliding_window=8, is_causal=True)
    function = {
        "causal": create_causal_mask,
        "sliding": create_sliding_window_causal_mask,
        "both ways": create_bidirectional_mask,
    }[kind]
    embeds = torch.zeros(2, length, 0)
    return function(config=config, inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, **more)


def ones(length: int, *zeros: tuple[int, int]) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    for row, column in zeros:
        mask[row, column] = 0
    return mask


@pytest.mark.parametrize("kind", ["causal", "sliding"])
def test_what_a_mask_is(kind: str) -> None:
    attention.register()
    assert asked(kind, 12) is None
    assert asked(kind, 12, mask=ones(12)) is None
    found = asked(kind, 12, mask=ones(12, (1, 0), (1, 1)))
    assert found.dtype == torch.int32 and found.shape == (2, 1, 1, 1) and found.flatten().tolist() == [0, 2]
    for holes in (ones(12, (1, 11)), ones(12, (0, 5))):  # on the right, and within
        found = asked(kind, 12, mask=holes)
        assert found.dtype == torch.bool and found.shape == (2, 1, 12, 12)
    found = asked(kind, 12, position_ids=torch.arange(12)[None] % 6)  # two sequences in a row
    assert found.dtype == torch.bool and not bool(found[0, 0, 7, 3])
    found = asked(kind, 12, or_mask_function=lambda b, h, q, k: k < 4)
    assert found.dtype == torch.bool and bool(found[0, 0, 0, 3])


def test_masks_of_a_static_cache_count_its_keys() -> None:
    attention.register()
    config = models.make("llama", "quantkit").config
    cache = StaticCache(config=config, max_cache_len=32)
    k = torch.zeros(2, 2, 10, 64)
    for layer in range(3):
        cache.update(k, k, layer)
    found = asked("causal", 1, cache)
    assert found.shape == (2, 2, 1, 1) and found[0].flatten().tolist() == [0, 11]
    found = asked("causal", 4, cache, ones(14, (1, 0)))
    assert found.shape == (2, 2, 1, 1) and found[1].flatten().tolist() == [1, 14]
    found = asked("causal", 1, cache, ones(11, (1, 0), (1, 4)))  # its values are not read: a row with holes sees none
    assert found[:, 0].flatten().tolist() == [0, attention.NOWHERE]


def test_masks_both_ways() -> None:
    attention.register()
    assert asked("both ways", 12) is None
    assert asked("both ways", 12, mask=ones(12, (1, 11))).dtype == torch.bool


def test_a_mask_may_be_compiled() -> None:
    attention.register()
    config = models.make("mistral", "quantkit").config
    embeds = torch.zeros(2, 12, 0)

    def of(mask: torch.Tensor) -> Any:
        return create_sliding_window_causal_mask(
            config=config, inputs_embeds=embeds, attention_mask=mask, past_key_values=None
        )

    made = torch.compile(of, fullgraph=True, backend="eager")
    assert made(ones(12, (1, 0))).flatten().tolist() == [0, 1]
    assert made(ones(12, (1, 5))).flatten().tolist() == [0, attention.NOWHERE]


# What torch computes


def test_padding_elsewhere_goes_to_torch(heard: Any) -> None:
    ids = models.tokens(2, 40)
    mask = models.padding(ids).flip(1)
    mask[0, 20] = 0
    for kind in ("llama", "gemma2", "gpt-oss"):
        wanted = models.run(models.make(kind, "eager"), ids, mask=mask)
        assert models.error(models.run(models.make(kind, "quantkit"), ids, mask=mask), wanted) < CLOSE
    assert len(heard()) == 1 and "the mask is more than causal" in heard()[0]


def test_attention_weights(heard: Any) -> None:
    ids = models.tokens(2, 40)
    for kind in ("llama", "gemma2", "gpt-oss"):
        found, wanted = (
            models.make(kind, name)(ids, output_attentions=True, use_cache=False) for name in ("quantkit", "eager")
        )
        assert models.error(found.logits, wanted.logits) < CLOSE
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found.attentions, wanted.attentions))
    assert len(heard()) == 1 and "weights are asked for" in heard()[0]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt-oss"])
def test_gradients(kind: str, heard: Any) -> None:
    ids = models.tokens(2, 40)
    grads = []
    for name in ("quantkit", "eager"):
        model = models.make(kind, name)
        model(ids, attention_mask=models.padding(ids), use_cache=False).logits[:, 7:].square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    assert all(models.error(a, b) < 1e-4 for a, b in zip(*grads) if float(b.abs().max()) > 1e-6)
    assert len(heard()) == 1 and "gradients are asked for" in heard()[0]


def module(**more: Any) -> Any:
    made = torch.nn.Module()
    for name, value in {"is_causal": True, "num_key_value_groups": 2, "training": False, **more}.items():
        setattr(made, name, value)
    return made


def heads(length: int, width: int, value_width: int | None = None, dtype: torch.dtype = torch.float32) -> list[Any]:
    g = torch.Generator().manual_seed(length)
    sizes = ((4, length, width), (2, length, width), (2, length, value_width or width))
    return [torch.randn(2, *size, generator=g).to(dtype) for size in sizes]


def plain(q: Any, k: Any, v: Any, seen: torch.Tensor | None) -> torch.Tensor:
    """By definition, float64."""
    k, v = (t.double().repeat_interleave(2, 1) for t in (k, v))
    s = q.double() @ k.mT / q.shape[-1] ** 0.5
    return ((s if seen is None else s.masked_fill(~seen, float("-inf"))).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize(("width", "value_width"), [(12, None), (264, None), (48, 32)])
def test_heads_that_no_kernel_takes(width: int, value_width: int | None, heard: Any) -> None:
    q, k, v = heads(20, width, value_width)
    out, _ = attention.attend(module(), q, k, v, None)
    assert models.error(out, plain(q, k, v, torch.ones(20, 20, dtype=torch.bool).tril()).float()) < CLOSE
    assert len(heard()) == 1 and f"keys have {width} channels" in heard()[0]


def test_attention_both_ways_and_what_a_call_says() -> None:
    q, k, v = heads(20, 64)
    both, tril = plain(q, k, v, None).float(), plain(q, k, v, torch.ones(20, 20, dtype=torch.bool).tril()).float()
    assert models.error(attention.attend(module(is_causal=False), q, k, v, None)[0], both) < CLOSE
    assert models.error(attention.attend(module(), q, k, v, None, is_causal=False)[0], both) < CLOSE
    assert models.error(attention.attend(module(), q, k, v, None)[0], tril) < CLOSE
    last, _ = attention.attend(module(), q[:, :, -3:], k, v, None)  # the queries are the last tokens
    assert models.error(last, tril[:, -3:]) < CLOSE


def test_dropout_only_in_training(heard: Any) -> None:
    q, k, v = heads(20, 64)
    a, _ = attention.attend(module(), q, k, v, None, dropout=0.5)
    assert models.error(a, plain(q, k, v, torch.ones(20, 20, dtype=torch.bool).tril()).float()) < CLOSE
    b, _ = attention.attend(module(training=True), q, k, v, None, dropout=0.5)
    assert models.error(b, a) > 1e-2 and len(heard()) == 1 and "dropout" in heard()[0]


def test_what_is_refused() -> None:
    q, k, v = heads(20, 64)
    with pytest.raises(InputError, match="no continuous batching"):
        attention.attend(module(), q, k, v, None, cache=object())
    with pytest.raises(InputError, match=r"attention_mask is torch.int32 \(2, 1, 20, 20\)"):
        attention.attend(module(), q, k, v, torch.ones(2, 1, 20, 20, dtype=torch.int32))
    with pytest.raises(InputError, match="the mask is for 19 keys, and there are 20"):
        attention.attend(module(), q, k, v, torch.ones(2, 1, 20, 19, dtype=torch.bool))


def test_importing_quantkit_is_enough() -> None:
    """Before transformers; after it is what the other tests do."""
    code = (
        "import sys, quantkit; assert 'torch' not in sys.modules\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions\n"
        "from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks\n"
        "print('quantkit' in functions, 'quantkit' in masks)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"] and not done.stderr


def test_registering_twice_is_safe() -> None:
    attention.register()
    attention.register()
    model = models.make("llama", "eager")
    model.set_attn_implementation("quantkit")
    assert model.config._attn_implementation == "quantkit"
