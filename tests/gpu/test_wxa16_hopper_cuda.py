"""The weight-only product that decodes beside the tensor cores (Hopper): every kind that it takes, against float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from packed_weights import CASES, packed
from weight_only import FLOATS, activations, limit, made_of, there, worst

from quantkit_kernels import choice as choices
from quantkit_kernels import layout, wxa16
from quantkit_kernels.choice import Choice, Problem
from quantkit_kernels.layout import Packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="for Hopper"
    ),
]

TILES = [(256, 128, 8, 3), (128, 128, 8, 6), (128, 256, 8, 4), (128, 64, 4, 2), (64, 128, 8, 4), (64, 64, 4, 2)]
TILES += [(32, 128, 8, 8), (32, 64, 4, 6), (64, 256, 8, 6)]
SIZES = [(136, 1024), (72, 128), (4104, 384), (520, 2176)]
GPU = choices.Gpu()


def fits(case: tuple[str, str, int], dtype: torch.dtype) -> bool:
    k = 3 * 128 if case[2] == 384 else 2176
    return choices.hopper_fits(Problem(*case[:2], 136, k, case[2], 64, wxa16.FLOATS[dtype]), GPU)


def run(p: Packed, x: torch.Tensor, one: Choice, **kw: Any) -> torch.Tensor:
    """Into a buffer that was NaN; the counters are zero again."""
    counters = torch.zeros(512, dtype=torch.int32, device="cuda")
    out = torch.full((x.shape[0], p.n), float("nan"), device="cuda", dtype=kw.pop("out_dtype", torch.float32))
    problem = Problem(p.kind, p.scale_dtype, p.n, p.k, p.group, x.shape[0], wxa16.FLOATS[x.dtype])
    fitted = choices.fitted(one, problem, choices.gpu_of(x.device))
    assert fitted.path == "hopper"
    y = wxa16.run_with(fitted, x, p, counters=counters, out=out, **kw)
    assert not counters.any()
    return y


KINDS = [(c, d) for c, d in itertools.product(CASES, FLOATS) if fits(c, d)]


@pytest.mark.parametrize(("case", "dtype"), KINDS, ids=str)
def test_sums_against_float64(case: tuple[str, str, int], dtype: torch.dtype) -> None:
    """Sums as float32, and results by the copy engine in the dtype of x; the same bits a second time."""
    for i, m in enumerate((17, 40, 64, 129, 300)):
        n, k = SIZES[(i + len(case[0])) % 4]
        if case[2] > k or (case[2] and k % case[2]):
            n, k = 136, max(case[2], 128) * 3
        p = packed(*case, n, k, i)
        x = activations(m, k, dtype, m)
        where = "end" if case[2] == 0 else "before"
        meant = made_of(p, where, dtype)
        moved = there(p)
        for tile in TILES[i::3]:
            one = Choice("hopper", tile[0], tile[1], 1, 0, tile[2], tile[3], group_m=i % 3)
            y = run(moved, x, one)
            error = worst(y, x, meant)
            assert error < limit(p, where, dtype), f"{one}: {n} x {k}, M {m}, {error:.2e}"
            whole = run(moved, x, one, out_dtype=dtype)
            assert torch.equal(whole, y.to(dtype)), one
            assert torch.equal(run(moved, x, one), y), one


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_code_and_column(tile: tuple[int, int, int, int]) -> None:
    """Products with unit vectors are the weight itself: no column, row or token in another's place."""
    for kind, scale, group in (("int4", "bf16", 128), ("mxfp4", "e8m0", 32), ("nvfp4", "e4m3", 16)):
        p = packed(kind, scale, group, 392, 512, 7)
        x = torch.eye(512, dtype=torch.bfloat16, device="cuda")
        y = run(there(p), x, Choice("hopper", tile[0], tile[1], 1, 0, tile[2], tile[3]))
        wanted = made_of(p, "before", torch.bfloat16).cuda().T
        assert torch.allclose(y.double(), wanted, rtol=1e-6, atol=0), (kind, tile)


def test_shared_tiles_bias_and_misplaced_tokens() -> None:
    """Tiles that several programs add up, and whole ones; tokens that the copy engine cannot read where they lie."""
    p = there(packed("int4", "bf16", 128, 20_488, 1024))
    w = layout.decode(p, torch.bfloat16)
    bias = torch.randn(p.n, device="cuda").bfloat16()
    for m in (64, 200):
        x = activations(m, 1024, torch.bfloat16)
        odd = torch.randn(m * 1024 + 1, device="cuda").bfloat16()[1:].view(m, 1024)
        for one in (x, odd, x.flip(0)[: m // 2]):
            for tile in TILES[:5]:
                y = run(p, one, Choice("hopper", tile[0], tile[1], 1, 0, tile[2], tile[3]), bias=bias)
                wanted = one.double() @ w.double().T + bias.double()
                assert torch.allclose(y.double(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.std()))
    x = activations(70, 1024, torch.bfloat16).clone()
    x[2, 7], x[5, 1023] = float("inf"), float("nan")
    y = run(p, x, Choice("hopper", 64, 128, 1, 0, 8, 4))
    good = [i for i in range(70) if i not in (2, 5)]
    assert torch.isfinite(y[good]).all() and torch.isnan(y[5]).all() and not torch.isfinite(y[2]).any()


def test_in_a_graph_and_by_the_operator() -> None:
    """The operator takes it where the table says so, under a CUDA graph, on two streams at once."""
    p = there(packed("int4", "bf16", 128, 4096, 4096))
    problem = Problem("int4", "bf16", 4096, 4096, 128, 256)
    x = activations(256, 4096, torch.bfloat16).contiguous()
    one = choices.fitted(choices.hopper_tile(256, 128, 8), problem, choices.gpu_of(x.device))
    wanted = wxa16.run_with(one, x, p)
    graph, buffer = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        y = wxa16.run_with(one, buffer, p)
    buffer.copy_(x)
    graph.replay()
    assert torch.equal(y, wanted)
    assert torch.allclose(wxa16.linear(x, p).float(), wanted.float(), rtol=1e-2, atol=1e-2 * float(wanted.std()))
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for stream in streams * 5:
        with torch.cuda.stream(stream):
            found.append(wxa16.run_with(one, x, p))
    torch.cuda.synchronize()
    assert all(torch.equal(y, wanted) for y in found)
