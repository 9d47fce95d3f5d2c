"""The weight-only product on a GPU: bfloat16, the assembly, every configuration against float64, graphs, same bits.

What is compared with: `layout.decode` in float64 on the CPU from the packed tensors, which tests/test_layout_kernels.py
ties to the formats.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packed_weights import CASES, packed
from weight_only import FLOATS, activations, limit, made_of, there, worst

from quantkit_kernels import choice as choices
from quantkit_kernels import layout, wxa16
from quantkit_kernels.choice import Choice, Problem
from quantkit_kernels.layout import Packed

pytestmark = pytest.mark.gpu

TOKENS = [1, 7, 8, 9, 16, 33, 64, 129, 257]


def run(p: Packed, x: torch.Tensor, one: Choice, **kw: Any) -> tuple[torch.Tensor, Choice]:
    """float32 sums in a buffer that was NaN; the counters are zero again."""
    problem = Problem(p.kind, p.scale_dtype, p.n, p.k, p.group, x.shape[0], wxa16.FLOATS[x.dtype])
    fitted = choices.fitted(one, problem, choices.gpu_of(x.device))
    counters = torch.zeros(4096, dtype=torch.int32, device="cuda")
    out = torch.full((x.shape[0], p.n), float("nan"), device="cuda")
    y = wxa16.run_with(fitted, x, p, counters=counters, out=out, **kw)
    assert not counters.any()
    return y, fitted


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decoded_weights_to_the_last_bit(case: tuple[str, str, int], dtype: torch.dtype) -> None:
    """The assembly, its plain twin, and torch: one weight, over so many random words that all codes meet all scales."""
    n, k = 512, 2048
    p = packed(*case, n, k, seed=3)
    wanted = layout.decode(p, dtype)
    for assembly in (True, False):
        out = torch.full((n, k), float("nan"), dtype=dtype, device="cuda")
        wxa16.decode_rows(there(p), 0, out, assembly=assembly)
        found = out.cpu()
        if wxa16.constants(p, dtype, "before", True)["HOW"] == "split" or p.global_scale is not None:
            unit = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-9
            assert torch.allclose(found.double(), wanted.double(), rtol=unit, atol=2.0**-24)
            apart = float((found != wanted).double().mean())
            assert apart < (0.5 if p.global_scale is not None else 2e-2), apart
        else:
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["int2", "int3", "int4", "int8", "mxfp4", "fp8_e4m3"])
def test_every_half_word(kind: str, dtype: torch.dtype) -> None:
    """All 65536 values of both halves of a word, without a scale and with one: products with unit vectors are exact.

    Subnormal numbers must count in fma on pairs of bfloat16: every integer code is one before it is scaled.
    """
    form = layout.get(kind)
    rows = 8192
    halves = torch.arange(1 << 16).view(-1, 16)
    words = torch.cat([halves << 16, halves])
    if form.code == "e4m3":
        for byte in range(4):
            words = torch.where((words >> (8 * byte) & 0x7F) == 0x7F, words ^ (1 << (8 * byte)), words)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    plane = torch.randint(0, 1 << 31, (rows * 8,), generator=torch.Generator().manual_seed(1)).int()
    codes = torch.cat([words.flatten(), plane]) if form.bits == 3 else words.flatten()
    codes = codes.view(1, rows, form.words)
    for group in (0, 32) if kind == "mxfp4" else (0, form.line):
        if kind == "mxfp4" and group == 0:
            continue
        name = "e8m0" if kind == "mxfp4" else wxa16.FLOATS[dtype]
        how = layout.geometry(kind, name, form.line, group)
        one = -0x2A2A2A2B if kind == "mxfp4" else 0x3F803F80 if dtype == torch.bfloat16 else 0x3C003C00
        scale = torch.full(how.shape(rows), one, dtype=torch.int32)
        p = Packed(kind, rows, form.line, group, 1, name, codes, scale, None, None)
        wanted = layout.decode(p, torch.float32)
        x = torch.eye(form.line, dtype=dtype, device="cuda")
        for block_m in (8, 16, 64):
            y, _ = run(there(p), x, Choice(block_m=block_m, block_n=64))
            assert torch.equal(y.T.cpu(), wanted), (kind, group, block_m)


@pytest.mark.parametrize(("case", "dtype"), [*((c, FLOATS[0]) for c in CASES), *((c, FLOATS[1]) for c in CASES[::4])])
def test_sums_of_every_kind_against_float64(case: tuple[str, str, int], dtype: torch.dtype) -> None:
    """Odd sizes, few and many tokens, the heuristic's choice and others, each way to apply the scale."""
    index = CASES.index(case)
    n, k = [(136, 1000), (200, 400), (72, 2048), (4104, 384)][index % 4]
    p = packed(*case, n, k, index)
    moved = there(p)
    meant = {where: made_of(p, where, dtype).cuda() for where in ("before", "group")}
    for m in TOKENS:
        x = activations(m, k, dtype, m)
        problem = Problem(*case[:2], n, k, case[2], m, wxa16.FLOATS[dtype])
        tried = [choices.choose(problem, choices.gpu_of(x.device)), Choice(block_m=16, block_n=128, split=3, unroll=2)]
        tried += [Choice(block_m=64, block_n=64, split=0, stages=3)] if m > 16 else []
        tried += [Choice(block_m=8, block_n=64, split=2, where="group", unroll=1)] if m < 20 else []
        for one in tried:
            y, fitted = run(moved, x, one)
            error = worst(y, x, meant["before" if fitted.where == "before" else "group"])
            assert error < limit(p, fitted.where, dtype), f"{fitted}: M {m}, {error:.2e}"
        y = wxa16.linear(x, moved)
        rounding = 5e-3 if dtype == torch.bfloat16 else 7e-4  # of weights and results, the worst of short rows
        assert y.dtype == dtype and worst(y, x, meant["group"]) < rounding


@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_a_global_scale_for_each_row(m: int) -> None:
    """By every path: right, and where tiles are the same, the bits of a weight with that one global scale."""
    p, wholes = packed("nvfp4", "e4m3", 16, 384, 2176), torch.tensor([37.5, 1234.5, 0.75])
    x = activations(m, 2176, torch.bfloat16)
    rows = there(p._replace(global_scale=wholes.repeat_interleave(128)))
    meant = made_of(p._replace(global_scale=torch.ones(1)), "before", torch.bfloat16)
    meant /= wholes.repeat_interleave(128).double()[:, None]
    tried = [Choice(block_m=16, block_n=64, split=2), Choice(block_m=64, block_n=64, split=0, stages=3)]
    tried += [choices.hopper_tile(64, 128, 8, 2)] if m > 16 else []
    for one in [*tried, Choice(path="dequant")]:
        y, fitted = run(rows, x, one)
        bound = limit(p, "before", x.dtype) if fitted.path != "dequant" else 3e-3  # there rounded after the division
        assert worst(y, x, meant) < bound, fitted
        for i, whole in enumerate(wholes):
            alone = run(rows._replace(global_scale=whole.reshape(1).cuda()), x, one)[0]
            assert torch.equal(y[:, 128 * i : 128 * i + 128], alone[:, 128 * i : 128 * i + 128]), fitted
    assert worst(wxa16.linear(x, rows), x, meant) < 5e-3


@pytest.mark.parametrize("m", [8, 16, 64, 256])
@pytest.mark.parametrize("case", [CASES[0], CASES[19]], ids=str)
def test_what_a_tuner_tries_is_right(case: tuple[str, str, int], m: int) -> None:
    """Every third candidate and neighbour of the first: right, and the same bits a second time."""
    n, k = 520, 2176
    p = packed(*case, n, k)
    moved, x = there(p), activations(m, k, torch.bfloat16)
    gpu = choices.gpu_of(x.device)
    problem = Problem(*case[:2], n, k, case[2], m)
    tried = choices.candidates(problem, gpu)
    for one in [*tried, *choices.neighbours(tried[0], problem, gpu)][::3]:
        if one.path == "dequant":
            continue
        y, fitted = run(moved, x, one)
        assert worst(y, x, made_of(p, fitted.where, torch.bfloat16)) < limit(p, fitted.where, torch.bfloat16), fitted
        assert torch.equal(run(moved, x, one)[0], y), fitted


def test_the_same_bits_every_time() -> None:
    p = there(packed("int4", "bf16", 128, 4096, 4096))
    for m in (1, 16, 48):
        x = activations(m, 4096, torch.bfloat16)
        first = wxa16.linear(x, p)
        one = choices.choose(Problem("int4", "bf16", 4096, 4096, 128, m), choices.gpu_of(x.device))
        assert one.split > 1 or one.path == "hopper"  # sums of several programs
        assert all(torch.equal(wxa16.linear(x, p), first) for _ in range(50))
        counters = torch.zeros(1024, dtype=torch.int32, device="cuda")
        assert torch.equal(wxa16.linear(x, p, counters=counters), first) and not counters.any()
    # a token's result does not depend on those beside it, in one configuration
    x = activations(16, 4096, torch.bfloat16)
    one = Choice(block_m=16, block_n=64, split=4)
    whole = wxa16.run_with(one, x, p)
    assert torch.equal(wxa16.run_with(one, x[3:4], p), whole[3:4])


def test_infinite_and_missing_numbers_stay_in_their_row() -> None:
    p = there(packed("int4", "bf16", 128, 264, 1000))
    for m in (9, 40, 300):
        x = activations(m, 1000, torch.bfloat16).clone()
        x[2, 7], x[5, 999] = float("inf"), float("nan")
        y = wxa16.linear(x, p)
        good = [i for i in range(m) if i not in (2, 5)]
        assert torch.isfinite(y[good]).all() and torch.isnan(y[5]).all() and not torch.isfinite(y[2]).any()


def test_large_and_small_numbers() -> None:
    """Scales up to the largest that is held, and small ones; activations near the ends of bfloat16."""
    codes = torch.randint(-8, 8, (64, 256), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    for power in (-60, -20, 0, 20, 32):
        scale = torch.full((64, 2), 1.5).mul(2.0**power).bfloat16()
        p = layout.pack("int4", codes, scale, group=128)
        for size in (2.0**-10, 1.0, 2.0**40):
            x = activations(8, 256, torch.bfloat16) * size
            y, _ = run(there(p), x, Choice(block_m=8, block_n=64))
            assert worst(y, x, layout.decode(p, torch.float64)) < 5e-6, (power, size)
    zeros = layout.pack("int4", codes, torch.zeros(64, 2).bfloat16(), group=128)
    y, _ = run(there(zeros), activations(8, 256, torch.bfloat16), Choice(block_m=16, block_n=64))
    assert not y.any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_shapes_strides_bias_and_order(dtype: torch.dtype) -> None:
    k, n = 1056, 200
    p = packed("int4", "fp16", 32, n, k)
    w = layout.decode(p, torch.float64).cuda()
    bias = torch.randn(n, device="cuda").to(dtype)
    order = torch.randperm(k, device="cuda")
    x = activations(24, k, dtype)
    odd = torch.randn(24 * k + 1, device="cuda").to(dtype)[1:].view(24, k)  # not aligned to 16 bytes
    across = x.t().contiguous().t()
    for one in (x, odd, across, x[:1].expand(24, k), x[::2]):
        for shaped in (one, one[None], one[:, None]):
            y = wxa16.linear(shaped, there(p), bias, order)
            wanted = shaped[..., order].double() @ w.T + bias.double()
            assert y.shape == wanted.shape
            assert torch.allclose(y.double(), wanted, rtol=1e-2, atol=2e-2 * float(wanted.std()))
    assert wxa16.linear(x[0], there(p)).shape == (n,)
    assert wxa16.linear(x[:0], there(p)).shape == (0, n)
    single = wxa16.linear(x.float(), there(p))  # the reference
    assert single.dtype == torch.float32 and worst(single, x, w) < 1e-4


def test_many_tokens() -> None:
    """By slabs and cuBLAS: every row of the weight, the last slab short."""
    for case in (CASES[0], CASES[6], CASES[15], CASES[17], CASES[19]):
        p = packed(*case, 5000, 1024)
        x = activations(1500, 1024, torch.bfloat16)
        for slab in (1024 * 2 * 512, 40_000_000):
            out = torch.full((1500, 5000), float("nan"), dtype=torch.bfloat16, device="cuda")
            y = wxa16.run_with(Choice(path="dequant", slab=slab), x, there(p), out=out)
            assert worst(y, x, layout.decode(p, torch.float64)) < 4e-3


def test_in_a_graph_compiled_and_exported() -> None:
    p = there(packed("int4", "bf16", 128, 512, 1024))
    fixed = {name: getattr(p, name) for name in ("kind", "scale_dtype", "n", "k", "group")}
    counters = torch.zeros(512, dtype=torch.int32, device="cuda")

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = wxa16.wxa16_linear(x, p.codes, p.scale, p.zero, p.global_scale, None, None, counters, **fixed)
        return torch.relu(y) + wxa16.linear(x, p)

    for m in (1, 8, 100, 2000):
        x = activations(m, 1024, torch.bfloat16, m).contiguous()
        wanted = layer(x)
        graph = torch.cuda.CUDAGraph()
        buffer = x.clone()
        with torch.cuda.graph(graph):
            y = layer(buffer)
        for seed in (5, 6):
            other = activations(m, 1024, torch.bfloat16, seed).contiguous()
            buffer.copy_(other)
            graph.replay()
            assert torch.equal(y, layer(other))
        compiled = torch.compile(layer, fullgraph=True)
        assert torch.allclose(compiled(x).float(), wanted.float(), rtol=1e-2, atol=1e-2 * float(wanted.float().std()))
    opchecked = (x, p.codes, p.scale, None, None, None, None, counters, "int4", "bf16", 512, 1024, 128)
    torch.library.opcheck(wxa16.wxa16_linear, opchecked)


def test_gradients_are_those_of_the_dense_layer() -> None:
    p = packed("int4z", "bf16", 64, 128, 256)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0)).cuda()
    x = activations(5, 256, torch.bfloat16).clone().requires_grad_()
    bias = torch.randn(128, device="cuda", dtype=torch.bfloat16).requires_grad_()
    wxa16.linear(x, there(p), bias, order).float().square().sum().backward()
    plain, b = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    w = layout.decode(p, torch.bfloat16).cuda()
    torch.nn.functional.linear(plain[:, order], w, b).float().square().sum().backward()
    for ours, theirs in ((x.grad, plain.grad), (bias.grad, b.grad)):
        assert ours is not None and theirs is not None
        assert torch.allclose(ours.float(), theirs.float(), rtol=3e-2, atol=3e-2 * float(theirs.float().std()))


def test_more_than_two_to_the_31_bytes() -> None:
    """57344 x 90112 of 4 bits are 2.6e9 bytes; the last rows and columns, where offsets in 32 bits would wrap."""
    n, k = 57344, 90112
    lines = k // 128
    codes = torch.full((lines, n, 16), -0x77777778, dtype=torch.int32, device="cuda")  # 8 everywhere: zero
    codes[-1, -64:] = 0x12345678
    scale = torch.full((k // 256, n), 0x3F803F80, dtype=torch.int32, device="cuda")
    p = Packed("int4", n, k, 128, 1, "bf16", codes, scale, None, None)
    small = p._replace(n=64, k=128, codes=codes[-1:, -64:].contiguous(), scale=scale[-1:, -64:].contiguous())
    x = torch.randn(3, k, device="cuda").bfloat16()
    y = wxa16.linear(x, p)
    wanted = x[:, -128:].double() @ layout.decode(small, torch.float64).T
    assert not y[:, :-64].any() and torch.allclose(y[:, -64:].double(), wanted, rtol=1e-2, atol=0.05)


def test_another_stream_and_the_largest_product() -> None:
    """Calls at once on two streams, each with its own counters; M N beyond 2^31 elements."""
    p = there(packed("int4", "bf16", 128, 1024, 4096))
    x = activations(8, 4096, torch.bfloat16)
    wanted = wxa16.linear(x, p)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(wxa16.linear(x, p))
    torch.cuda.synchronize()
    assert all(torch.equal(y, wanted) for y in found)
    tall = torch.zeros(1 << 22, 128, dtype=torch.bfloat16, device="cuda")
    tall[-1] = 1
    narrow = packed("int4", "bf16", 128, 520, 128)
    y = wxa16.run_with(Choice(block_m=128, block_n=128, warps=8, stages=3), tall, there(narrow))
    wanted = layout.decode(narrow, torch.float64).sum(1).cuda()
    assert torch.allclose(y[-1].double(), wanted, rtol=1e-2, atol=0.1) and not y[-3:-1].any()
