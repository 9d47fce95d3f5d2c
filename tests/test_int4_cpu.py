"""int4 on a CPU by torch's own product: the same numbers, the same bytes back, whoever moves or saves the layer."""

from __future__ import annotations

import copy
from pathlib import Path

import packed_models
import pytest
import torch
import transformers
from test_runtime_formats import saved_alike

from quantkit.presets import PRESETS
from quantkit.runtime.linear import PackedLinear
from quantkit.types import Scheme, TensorScheme
from quantkit_kernels import int4_cpu, layout, wxa16


def weight(n: int, k: int, group: int, dtype: torch.dtype = torch.bfloat16) -> layout.Packed:
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    scale = torch.rand(n, k // group if group else 1, generator=generator) * 0.01 + 0.001
    return layout.pack("int4", codes, scale.bfloat16().to(dtype), group=group)


@pytest.mark.parametrize("n, k, group", [(64, 128, 32), (768, 256, 64), (96, 384, 128), (80, 256, 0), (1040, 640, 128)])
@pytest.mark.parametrize("tokens", [1, 7, int4_cpu.FEW + 6])
def test_a_product_is_that_of_the_reference(n: int, k: int, group: int, tokens: int) -> None:
    packed = weight(n, k, group)
    found = int4_cpu.to_words(packed)
    assert found is not None and found[0].nbytes == packed.codes.nbytes
    x = torch.randn(1, tokens, k, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.linspace(-1, 1, n).bfloat16()
    exact = x.double() @ layout.decode(packed, torch.float64).t() + bias.double()
    ours = int4_cpu.linear(x, *found, bias)
    reference = wxa16.linear(x, packed, bias)
    assert ours.dtype == torch.bfloat16 and ours.shape == reference.shape
    assert (ours.double() - exact).norm() <= 1.5 * (reference.double() - exact).norm()
    assert torch.equal(ours, int4_cpu.linear(x, *found, bias))
    codes = int4_cpu.from_words(found[0], n, k)
    assert torch.equal(codes, layout.unpack(packed)[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_bit(threads: int) -> None:
    packed, x = weight(768, 256, 128), torch.ones(3, 256).bfloat16()
    found = int4_cpu.to_words(packed)
    assert found is not None
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = int4_cpu.linear(x, *found)
        torch.set_num_threads(threads)
        assert torch.equal(one, int4_cpu.linear(x, *found))
    finally:
        torch.set_num_threads(before)


def test_what_torch_has_no_product_for() -> None:
    assert int4_cpu.to_words(weight(64, 128, 16)) is None  # groups of 16
    assert int4_cpu.to_words(weight(72, 128, 32)) is None  # rows
    fine = weight(64, 128, 32)._replace(scale=weight(64, 128, 32).scale)
    assert int4_cpu.to_words(fine) is not None
    scale = torch.full((64, 4), 1 + 2**-10, dtype=torch.float16)  # bfloat16 does not have it
    assert int4_cpu.to_words(layout.pack("int4", torch.zeros(64, 128, dtype=torch.uint8), scale, group=32)) is None


@pytest.fixture
def loaded(tmp_path: Path) -> tuple[transformers.PreTrainedModel, Path]:
    packed_models.save(tmp_path / "m", "compressed-tensors", PRESETS["W4A16"])
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16), tmp_path


def layers(model: torch.nn.Module) -> list[PackedLinear]:
    return [m for m in model.modules() if isinstance(m, PackedLinear)]


def in_words(m: PackedLinear) -> bool:
    return "cpu_scale" in m._buffers


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(24)[None]).logits
    return found


def test_a_model_takes_it_and_is_saved_alike(loaded) -> None:
    model, place = loaded
    state = {name: t.clone() for name, t in model.state_dict().items()}
    weights = [m.weight.clone() for m in layers(model)]
    for m in layers(model):
        m.fits_words = False
    reference = logits(model)
    for m in layers(model):
        m.fits_words = True
    ours = logits(model)
    assert all(in_words(m) for m in layers(model))
    assert 0 < (ours - reference).float().norm() <= 2e-2 * reference.float().norm()
    assert torch.equal(logits(copy.deepcopy(model)), ours)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(m.weight, w) for m, w in zip(layers(model), weights))
    assert all(in_words(m) for m in layers(model))  # looking and saving change nothing
    saved_alike(model, place / "m", place / "again")
    assert torch.equal(logits(model), ours)


def test_who_moves_or_loads_a_layer_gets_the_kernels_order(loaded) -> None:
    model, _ = loaded
    state = {name: t.clone() for name, t in model.state_dict().items()}
    ours = logits(model)
    first = layers(model)[0]
    model.to("cpu")  # as .cuda() does
    assert not in_words(first) and all(torch.equal(p, state[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), ours) and in_words(first)
    model.load_state_dict(state)
    assert not in_words(first) and torch.equal(logits(model), ours)
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(first, AlignDevicesHook(execution_device="cpu"))
    logits(model)
    assert not in_words(first) and torch.equal(first.codes, state["model.layers.0.self_attn.q_proj.codes"])


def test_gradients_are_those_of_the_operator(loaded) -> None:
    model, _ = loaded
    first = layers(model)[0]
    logits(model)
    assert in_words(first)
    x = torch.randn(3, first.in_features).bfloat16().requires_grad_()
    first(x).sum().backward()
    assert x.grad is not None
    expected = first.weight.detach().float().sum(0)
    torch.testing.assert_close(x.grad[0].float(), expected, rtol=2e-2, atol=2e-2)


def test_float32_and_asymmetric_weights_are_left_to_the_reference(tmp_path: Path) -> None:
    packed_models.save(tmp_path / "m", "gptq", Scheme(TensorScheme("int4", "group", 128, symmetric=False)))
    for dtype in (torch.bfloat16, torch.float32):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype)
        logits(model)
        assert all(not in_words(m) for m in layers(model))


def test_it_compiles_whole_before_and_after_the_first_product(loaded) -> None:
    model, _ = loaded
    ids = torch.arange(24)[None]
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            found.append(compiled(ids, use_cache=False).logits)
        ours = logits(model)
    assert torch.equal(found[1], ours)
    assert (found[0] - ours).float().norm() <= 3e-2 * ours.float().norm()
