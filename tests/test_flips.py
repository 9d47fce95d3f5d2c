"""Next-token flips: none against itself, all against another, and counted where the original went."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quantkit.errors import InputError
from quantkit_eval.flips import flips, generated


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=3,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    return torch.randint(4, 61, (6, 8), generator=torch.Generator().manual_seed(1))


def test_a_model_does_not_flip_against_itself(model: Any, prompts: torch.Tensor) -> None:
    found = flips(model, copy.deepcopy(model), prompts, 12)
    assert found.rate.value == 0 and found.floor == 0 and (found.prompts, found.tokens) == (6, 12)
    assert found.to_dict()["rate"]["samples"] == 6


def test_flips_are_where_the_likeliest_token_is_another(model: Any, prompts: torch.Tensor) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.add_(0.2 * torch.randn(61, 32, generator=torch.Generator().manual_seed(2)))
    found = flips(model, other, prompts, 12)
    text = generated(model, prompts, 12)
    assert torch.equal(text[:, :8], prompts) and text.shape == (6, 20)
    count = 0
    with torch.no_grad():
        for row in text:
            for i in range(8, 20):
                count += int(other(row[None, :i]).logits[0, -1].argmax() != row[i])
    assert 0 < found.rate.value < 1 and found.rate.value == pytest.approx(count / 72)


def test_it_writes_on_after_the_end_of_a_text(model: Any, prompts: torch.Tensor) -> None:
    stopper = copy.deepcopy(model)
    with torch.no_grad():
        stopper.lm_head.weight.zero_()
        stopper.lm_head.weight[3] = stopper.model.norm.weight  # EOS is likely everywhere
    assert generated(stopper, prompts, 12).shape == (6, 20)


def test_what_does_not_fit_the_positions_is_refused(model: Any, prompts: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"prompts of 8 tokens and 60 generated ones are more than the model's 64"):
        flips(model, model, prompts, 60)
