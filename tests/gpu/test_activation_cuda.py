"""Rounding of activations on a GPU: the bits of the plain-torch functions on the CPU, whichever way the kernel goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from poison import poisoned

from quantkit_kernels import activation as act

pytestmark = pytest.mark.gpu

KINDS = ("int8", "fp8_e4m3")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def inputs(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """On the CPU: tokens over the whole range of the dtype, one of zeros, outliers."""
    low, high = (-4, 3) if dtype == torch.float16 else (-36, 30)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    x *= torch.logspace(low, high, m, dtype=torch.float64).float()[:, None]
    x[:, k // 3] *= 10
    if m > 1:
        x[1] = 0
    return x.to(dtype)


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All finite values of a 16-bit float, twice: neighbours side by side, and mixed."""
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    values = bits.view(dtype)
    values = values[torch.isfinite(values)]
    values = values[: len(values) // 64 * 64]
    mixed = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    return torch.cat([values.float().sort().values.to(dtype).view(64, -1), mixed.view(64, -1)])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bytes; a NaN is a NaN."""
    a, b = a.cpu(), b.cpu()
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_floating_point() and a.element_size() > 1:
        return torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def agree(found: Any, wanted: Any) -> bool:
    found, wanted = (t if isinstance(t, tuple) else (t,) for t in (found, wanted))
    return len(found) == len(wanted) and all(map(same, found, wanted))


@pytest.mark.parametrize("hardware", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value(dtype: torch.dtype, hardware: bool) -> None:
    """Fused steps and conversions against IEEE division and rounding spelt out, and both against the CPU."""
    from quantkit_kernels import _activation

    x = every_value(dtype)
    for kind in KINDS:
        found = _activation.quantize(x.cuda(), kind, hardware=hardware)
        assert agree(found, act.quantize_per_token_reference(x, kind))
        found = _activation.quantize(x.cuda(), kind, block=16, hardware=hardware)
        assert agree(found, act.quantize_per_block_reference(x, kind, 16))
        for scale in (0.0371, 1.0, 2.0**-130, 3e30):
            given = torch.tensor([scale])
            found = _activation.quantize(x.cuda(), kind, mode="static", scale=given.cuda(), hardware=hardware)
            assert agree(found, act.quantize_static_reference(x, given, kind))
    found = _activation.quantize(x.cuda(), "int8", mode="asymmetric", hardware=hardware)
    assert agree(found, act.quantize_per_token_asymmetric_reference(x))


@pytest.mark.parametrize("hardware", [True, False])
def test_divisions_on_the_edge(hardware: bool) -> None:
    """Elements that are a last bit away from where their code changes."""
    from quantkit_kernels import _activation

    g = torch.Generator().manual_seed(0)
    scale = torch.exp2(torch.rand(512, generator=g) * 240 - 130)[:, None]
    for kind, largest in (("int8", 127.5), ("fp8_e4m3", 448.0)):
        steps = torch.randint(-126, 127, (512, 256), generator=g) + 0.5
        x = (steps * scale).float()
        x = (x.view(torch.int32) + torch.randint(-1, 2, x.shape, generator=g).int()).view(torch.float32)
        x[:, 0] = (largest * scale)[:, 0]
        found = _activation.quantize(x.cuda(), kind, hardware=hardware)
        assert agree(found, act.quantize_per_token_reference(x, kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 7, 16, 130, 1000, 4096, 4104, 14336, 16384, 32768, 40000])
def test_any_width(k: int, dtype: torch.dtype) -> None:
    for m in (1, 3, 33):
        x = inputs(m, k, dtype)
        with poisoned():
            for kind in KINDS:
                assert agree(act.quantize_per_token(x.cuda(), kind), act.quantize_per_token_reference(x, kind))
                assert agree(act.quantize_per_block(x.cuda(), kind), act.quantize_per_block_reference(x, kind))
            found = act.quantize_per_token_asymmetric(x.cuda())
            assert agree(found, act.quantize_per_token_asymmetric_reference(x))
            given = torch.tensor([0.5]), "int8", torch.tensor([5], dtype=torch.int8)
            found = act.quantize_static(x.cuda(), given[0].cuda(), "int8", given[2].cuda())
            assert agree(found, act.quantize_static_reference(x, *given))


def close(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> bool:
    """Codes and scale, but for sums in another order: few codes differ, by one step; the scale by a rounding."""
    a, b = (t.cpu().view(torch.int8).int() for t in (found[0], wanted[0]))
    few = (a - b).abs().max() <= 1 and (a != b).sum() <= max(2, a.numel() // 500)
    return bool(few) and torch.allclose(found[1].cpu(), wanted[1].cpu(), rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [16, 200, 4096, 4104, 16384, 20000])
def test_behind_a_norm(k: int, dtype: torch.dtype) -> None:
    for m in (1, 5, 33):
        x, residual = inputs(m, k, dtype).clamp(-1e4, 1e4), inputs(m, k, dtype, 1).flip(0).clamp(-1e4, 1e4)
        weight = (torch.rand(k, generator=torch.Generator().manual_seed(2)) + 0.5).to(dtype)
        last = {torch.float32: 3e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
        least = 2e-7 if dtype == torch.float16 else 1e-30  # of float16's subnormals
        gpu = x.cuda(), residual.cuda(), weight.cuda()
        with poisoned():
            normed, total = act.add_rms_norm(*gpu, 1e-5)
            assert same(total, x + residual)
            wanted = act.rms_norm_reference(x + residual, weight, 1e-5)
            torch.testing.assert_close(normed.cpu(), wanted, rtol=last, atol=least)
            torch.testing.assert_close(act.rms_norm(total, gpu[2], 1e-5), normed, rtol=last, atol=least)
            for kind in KINDS:
                for block in (0, 128):
                    found = act.add_rms_norm_quantize(*gpu, 1e-5, kind, block)
                    two_steps = act._quantize_reference(normed.cpu(), kind, block)
                    assert same(found[2], total) and close(found, two_steps)
                    assert close(act.rms_norm_quantize(total, gpu[2], 1e-5, kind, block), two_steps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [7, 200, 4096, 14336, 28672, 40000])
def test_behind_silu(k: int, dtype: torch.dtype) -> None:
    for m in (1, 5, 33):
        both = (torch.randn(m, 2 * k, generator=torch.Generator().manual_seed(m)) * 4).to(dtype)
        last = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
        with poisoned():
            acted = act.silu_mul(both.cuda())
            torch.testing.assert_close(acted.cpu(), act.silu_mul_reference(both), rtol=last, atol=2e-7)
            for kind in KINDS:
                for block in (0, 128):
                    found = act.silu_mul_quantize(both.cuda(), kind, block)
                    if k <= act.WIDEST or block:  # the same kernel, but for its end
                        assert agree(found, act._quantize_reference(acted.cpu(), kind, block))
                    else:
                        assert close(found, act.silu_mul_quantize_reference(both, kind, block))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_stays_in_its_token(dtype: torch.dtype, bad: float) -> None:
    x = inputs(9, 1000, dtype).clamp(-1e4, 1e4)
    clean = x.clone()
    x[4, 700] = bad
    others = torch.arange(9) != 4
    weight = torch.ones(1000, dtype=dtype)
    for kind in KINDS:
        for found, wanted in (
            (act.quantize_per_token(x.cuda(), kind), act.quantize_per_token(clean.cuda(), kind)),
            (act.rms_norm_quantize(x.cuda(), weight.cuda(), 1e-5, kind),) * 2,
        ):
            assert found[1].cpu()[4].isnan().all() and found[1].cpu()[others].isfinite().all()
            assert same(found[0].cpu()[others], wanted[0].cpu()[others])
    found = act.quantize_per_token_asymmetric(x.cuda())
    assert agree(found, act.quantize_per_token_asymmetric_reference(x))
    scale = act.quantize_per_block(x.cuda(), "int8")[1].cpu()
    assert scale.isnan().nonzero().tolist() == [[5, 4]]
    static = act.quantize_static(x.cuda(), torch.ones(1).cuda(), "int8")
    assert same(static, act.quantize_static_reference(x, torch.ones(1), "int8"))
    codes = act.quantize_static(x.cuda(), torch.ones(1).cuda(), "fp8_e4m3").cpu().float()
    assert codes[4, 700].isnan() if bad != bad else codes[4, 700].abs() == 448


def test_strides_shapes_and_no_tokens() -> None:
    x = inputs(12, 4200, torch.bfloat16)
    views: tuple[Any, ...] = (
        lambda t: t[:, 8:4104],
        lambda t: t[:, 1:4097],
        lambda t: t.t().contiguous().t(),
        lambda t: t.view(3, 4, 4200),
        lambda t: t[0],
        lambda t: t[:, None].expand(12, 2, 4200),
    )
    for view in views:
        odd, gpu = view(x), view(x.cuda())
        assert agree(act.quantize_per_token(gpu, "int8"), act.quantize_per_token_reference(odd, "int8"))
        assert agree(act.quantize_per_block(gpu, "fp8_e4m3"), act.quantize_per_block_reference(odd, "fp8_e4m3"))
    nothing = act.quantize_per_block(x[:0].cuda(), "int8")
    assert nothing[0].shape == (0, 4200) and nothing[1].shape == (33, 0)


def test_graphs_compiled_functions_and_repetition() -> None:
    x, weight = inputs(64, 4096, torch.bfloat16).clamp(-1e4, 1e4).cuda(), torch.ones(4096, dtype=torch.bfloat16).cuda()

    def layer(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        codes, scale, total = act.add_rms_norm_quantize(x, x, weight, 1e-5, "fp8_e4m3", 128)
        return codes, scale, total, *act.silu_mul_quantize(total, "int8")

    wanted = layer(x)
    for _ in range(10):
        assert agree(layer(x), wanted)
    assert agree(torch.compile(layer, fullgraph=True)(x), wanted)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layer(x)
    for out in found:
        out.view(torch.int8).fill_(7)
    graph.replay()
    assert agree(found, wanted)


def test_more_elements_than_32_bits_count() -> None:
    m, k = 70000, 32768
    x = torch.zeros(m, k, dtype=torch.bfloat16, device="cuda")
    tail = inputs(8, k, torch.bfloat16)
    x[-8:] = tail.cuda()
    codes, scale = act.quantize_per_token(x, "int8")
    assert agree((codes[-8:], scale[-8:]), act.quantize_per_token_reference(tail, "int8"))
    del codes
    codes, scale = act.quantize_per_block(x, "int8")
    assert agree((codes[-8:], scale[:, -8:].contiguous()), act.quantize_per_block_reference(tail, "int8"))
