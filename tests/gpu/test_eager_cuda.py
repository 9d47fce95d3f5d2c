"""Eager models on a GPU: kernels started straight give what others give, and a model what transformers' gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from poison import poisoned
from test_rope import inputs
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from quantkit_kernels import activation, rope

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 32, 8, 1, 128), (3, 9, 3, 50, 64), (2, 5, 1, 7, 80)], ids=str)
def test_rotary_embedding_has_transformers_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for rows in (0, 1):
        given = [t.cuda() for t in inputs(shape, dtype, rows)]
        wanted = apply_rotary_pos_emb(*given)
        with poisoned():
            for _ in range(2):  # by Triton, then straight
                found = rope.rotated(*given)
                assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_started_straight_it_reads_what_is_given_now() -> None:
    """Other addresses, misaligned ones, another stream, a weight that is replaced."""
    weight = torch.rand(256, device="cuda").bfloat16()
    rows = torch.randn(9, 264, device="cuda").bfloat16()
    for x in (rows[:, :256], rows[:, 1:257], rows[:, :256].contiguous(), rows.view(-1)[3 : 3 + 512].view(2, 256)):
        for other in (weight, weight.flip(0), torch.rand(257, device="cuda").bfloat16()[1:]):
            for _ in range(2):
                found = activation.launch_rms_norm(x, other, 1e-5)
                wanted = activation.rms_norm_reference(x.cpu(), other.cpu(), 1e-5)
                torch.testing.assert_close(found.cpu(), wanted, rtol=2**-7, atol=0)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        found = activation.launch_rms_norm(rows[:, :256], weight, 1e-5)
    side.synchronize()
    assert torch.equal(found, activation.launch_rms_norm(rows[:, :256], weight, 1e-5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import packed_models

    from quantkit.presets import PRESETS

    path = tmp_path_factory.mktemp("eager") / "m"
    sizes = {**packed_models.DIMS, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    packed_models.save(path, "compressed-tensors", PRESETS["W4A16"], model=sizes)
    return path


def load(folder: Path) -> Any:
    import packed_models
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cuda", dtype=torch.bfloat16)
    return packed_models.decoding(model)


@contextmanager
def launches() -> Iterator[list[int]]:
    """How many kernels start on the GPU."""
    counted: list[int] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        yield counted
        torch.cuda.synchronize()
    counted.append(sum(e.count for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA))


@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_a_model_computes_the_same_with_far_fewer_launches(folder: Path, tokens: int) -> None:
    from quantkit.runtime import fused

    model = load(folder)
    ids = torch.randint(1, 100, (2, tokens), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        for _ in range(2):
            found = model(ids).logits
        with launches() as few:
            model(ids)
        fused.unfuse(model)
        wanted = model(ids).logits
        with launches() as many:
            model(ids)
    assert (found.float() - wanted.float()).norm() <= 0.02 * wanted.float().norm()
    print(f"{tokens} tokens: {few[0]} launches, {many[0]} without")
    assert few[0] <= many[0] - 2 * 20


def test_captured_and_compiled_it_gives_the_same(folder: Path) -> None:
    import quantkit

    model = load(folder)
    ids = torch.arange(4, 21, device="cuda")[None]  # 3 is the pad token
    assert torch.equal(quantkit.generate(model, ids, 8), quantkit.generate(model, ids, 8, graph=False))
    assert model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0).shape == (1, 25)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        found, wanted = compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits
    assert (found.float() - wanted.float()).norm() <= 0.02 * wanted.float().norm()
