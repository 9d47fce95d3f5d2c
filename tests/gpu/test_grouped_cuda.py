"""Products of experts on a GPU: bfloat16, the assembly, distributions of rows, graphs, no waiting, the same bits.

What is compared with: `layout.decode` in float64 from the packed tensors, expert by expert.
"""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from packed_weights import CASES, packed
from poison import poisoned

from quantkit_kernels import choice as choices
from quantkit_kernels import grouped, layout, wxa16
from quantkit_kernels._grouped_choice import choose
from quantkit_kernels._w8a8_choice import Config
from quantkit_kernels.choice import Choice, Problem
from quantkit_kernels.layout import Packed

pytestmark = pytest.mark.gpu

FP8 = torch.float8_e4m3fn
FLOATS = [torch.bfloat16, torch.float16]
FP8_ERROR = 1e-3  # of a row, by sums that are short for 128 columns
SPREADS = [  # rows of each of six experts, then rows that are nobody's
    ([1, 0, 1, 1, 0, 0], 0),
    ([0, 9, 3, 0, 17, 1], 2),
    ([40, 0, 65, 7, 130, 20], 0),
    ([0, 0, 300, 0, 0, 0], 0),
    ([0, 0, 0, 0, 0, 0], 5),
]


def there(p: Packed) -> Packed:
    zero = None if p.zero is None else p.zero.cuda()
    whole = None if p.global_scale is None else p.global_scale.cuda()
    return p._replace(codes=p.codes.cuda(), scale=p.scale.cuda(), zero=zero, global_scale=whole)


def stacked(case: tuple[str, str, int], experts: int, n: int, k: int) -> Packed:
    return grouped.stack([packed(*case, n, k, seed) for seed in range(experts)])


def offsets_of(rows: list[int]) -> torch.Tensor:
    return torch.tensor(list(itertools.accumulate(rows)), dtype=torch.int32, device="cuda")


def activations(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of a wider tensor, NaN beyond them; on the GPU."""
    wide = torch.full((m, k + 40), float("nan"), dtype=dtype, device="cuda")
    wide[:, :k] = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return wide[:, :k]


def made_of(p: Packed, where: str, dtype: torch.dtype) -> torch.Tensor:
    """The weights (E, N, K) whose sums a kernel forms: rounded to the dtype of x where the scale comes before it."""
    found = []
    for one in grouped.unstack(p):
        if where == "before" and one.global_scale is not None:
            plain = layout.decode(one._replace(global_scale=torch.ones_like(one.global_scale)), dtype)
            found.append(plain.double() / one.global_scale.double())
        else:
            found.append(layout.decode(one, dtype if where == "before" else torch.float64).double())
    return torch.stack(found).cuda()


def wanted(x: torch.Tensor, offsets: torch.Tensor, w_ENK: torch.Tensor) -> torch.Tensor:
    y, first = torch.zeros(x.shape[0], w_ENK.shape[1], dtype=torch.float64, device="cuda"), 0
    for e, last in enumerate(offsets.tolist()):
        y[first:last] = x[first:last].double() @ w_ENK[e].double().T
        first = last
    return y


def worst(y: torch.Tensor, right: torch.Tensor) -> float:
    """The largest relative error of a row; infinite for NaN, and for anything but zeros where zeros should be."""
    each = (y.double() - right).norm(dim=1) / right.norm(dim=1).clamp(min=1e-30)
    return float(torch.nan_to_num(each, nan=float("inf")).max()) if len(y) else 0.0


def run(p: Packed, x: torch.Tensor, offsets: torch.Tensor, one: Choice, **kw: Any) -> tuple[torch.Tensor, Choice]:
    """float32 sums in a buffer that was NaN."""
    from quantkit_kernels import _grouped

    problem = Problem(p.kind, p.scale_dtype, p.n, p.k, p.group, x.shape[0], wxa16.FLOATS[x.dtype])
    fitted = choices.fitted(one, problem, choices.gpu_of(x.device))
    out = torch.full((x.shape[0], p.n), float("nan"), device="cuda")
    return _grouped.linear(fitted, x, offsets, p, out=out, **kw), fitted


def limit(p: Packed, where: str, dtype: torch.dtype) -> float:
    """Of float32 sums. A scale that is no float of the dtype of x makes a weight that may be rounded twice."""
    exact = where != "before" or p.scale_dtype in ("e8m0", "e4m3", wxa16.FLOATS[dtype])
    return 2e-5 if exact else 1e-3


KINDS = [next(case for case in CASES if case[0] == kind) for kind in layout.KINDS]
KINDS += [("int4", "fp16", 32), ("int4z", "fp32", 64), ("int8z", "fp32", 0), ("int3z", "fp32", 0)]
OTHERS = [
    Choice(block_m=16, block_n=128, split=3, unroll=2),
    Choice(block_m=8, block_n=32, warps=2, split=2, where="group"),
    Choice(block_m=64, block_n=128),
    Choice(block_m=32, block_n=64, warps=2, stages=3),
]


@pytest.mark.parametrize(("case", "dtype"), [*((c, FLOATS[0]) for c in KINDS), *((c, FLOATS[1]) for c in KINDS[::5])])
def test_sums_of_every_kind_against_float64(case: tuple[str, str, int], dtype: torch.dtype) -> None:
    """Odd sizes, distributions with empty experts, the choice of the operator and others, ways to apply the scale."""
    index = KINDS.index(case)
    n, k = [(136, 1000), (200, 400), (72, 2048), (328, 384)][index % 4]
    p = stacked(case, 6, n, k)
    moved = there(p)
    meant = {where: made_of(moved, where, dtype) for where in ("before", "group")}
    for rows, rest in SPREADS:
        m, offsets = sum(rows) + rest, offsets_of(rows)
        x = activations(m, k, dtype, m)
        y, fitted = run(moved, x, offsets, OTHERS[index % 4])
        error = worst(y, wanted(x, offsets, meant["before" if fitted.where == "before" else "group"]))
        assert error < limit(p, fitted.where, dtype), f"{fitted}: {rows}, {error:.2e}"
        if (rows, rest) in SPREADS[1:3]:  # another choice of the operator each: what is compiled anew costs seconds
            y = grouped.grouped_linear(x, offsets, moved)
            rounding = 6e-3 if dtype == torch.bfloat16 else 9e-4  # of weights and results, the worst of short rows
            assert y.dtype == dtype and worst(y, wanted(x, offsets, meant["group"])) < rounding


@pytest.mark.parametrize("case", [CASES[0], CASES[17], CASES[19]], ids=str)
def test_the_assembly_and_its_twin_agree(case: tuple[str, str, int]) -> None:
    """The decoded weights are the same to the bit (test_wxa16_cuda.py); sums may be taken in another order."""
    p, offsets = there(stacked(case, 6, 136, 512)), offsets_of([3, 0, 20, 1, 0, 9])
    x = activations(35, 512, torch.bfloat16)
    one = Choice(block_m=8, block_n=64)
    assert worst(run(p, x, offsets, one)[0], run(p, x, offsets, one, assembly=False)[0].double()) < 1e-5


def random_rows(experts: int, m: int, seed: int) -> list[int]:
    """As a router would: some experts much liked, some not at all."""
    g = torch.Generator().manual_seed(seed)
    likes = torch.randn(experts, generator=g).mul(1 + seed % 3).exp()
    return torch.bincount(torch.multinomial(likes, m, True, generator=g), minlength=experts).tolist()


@pytest.mark.parametrize("m", [8, 32, 128, 512, 2048, 8192])
def test_many_distributions_over_many_experts(m: int) -> None:
    """128 experts, every order of tiles: each row once and with its own expert's weight, against the dense kernel."""
    from quantkit_kernels import _grouped

    n, k, experts = 264, 256, 128
    p = there(stacked(CASES[0], experts, n, k))
    w = made_of(p, "before", torch.bfloat16)
    x = activations(m, k, torch.bfloat16, m)
    for seed in range(6):
        rows = random_rows(experts, m - seed % 2, seed)
        offsets = offsets_of(rows)
        for stays in (0, 1 << 30):
            with mock.patch.object(_grouped, "STAYS", stays):
                y = grouped.grouped_linear(x, offsets, p)
            assert worst(y, wanted(x, offsets, w)) < 4e-3, (seed, stays)


def test_bias_strides_and_values() -> None:
    rows = [5, 0, 12, 40, 0, 3]
    offsets, k, n = offsets_of(rows), 1056, 200
    p = stacked(("int4", "fp16", 32), 6, n, k)
    w, bias = made_of(there(p), "end", torch.bfloat16), torch.randn(6, n, device="cuda")
    x = activations(60, k, torch.bfloat16)
    odd = torch.randn(60 * k + 1, device="cuda").bfloat16()[1:].view(60, k)  # not aligned to 16 bytes
    for one in (x, odd, x.t().contiguous().t(), x[:1].expand(60, k), torch.cat([x, x])[::2]):
        for b in (bias, bias.bfloat16()):
            y = grouped.grouped_linear(one, offsets, there(p), b)
            right = wanted(one, offsets, w) + b.double().repeat_interleave(torch.tensor(rows).cuda(), 0)
            assert torch.allclose(y.double(), right, rtol=1e-2, atol=2e-2 * float(right.std()))
    assert grouped.grouped_linear(x[:0], offsets * 0, there(p)).shape == (0, n)
    single = grouped.grouped_linear(x.float(), offsets, there(p))  # the reference
    assert single.dtype == torch.float32 and worst(single, wanted(x, offsets, w)) < 1e-4
    spoilt = x.clone()
    spoilt[2, 7], spoilt[30, 999] = float("inf"), float("nan")
    y = grouped.grouped_linear(spoilt, offsets, there(p))
    good = [i for i in range(60) if i not in (2, 30)]
    assert torch.isfinite(y[good]).all() and torch.isnan(y[30]).all() and not torch.isfinite(y[2]).any()


def eights(kind: torch.dtype, rows: list[int], rest: int, n: int, k: int) -> dict[str, Any]:
    """Arguments of grouped_w8a8: codes over the whole range, scales that differ by orders of magnitude."""
    g, m, experts = torch.Generator("cuda").manual_seed(n + k), sum(rows) + rest, len(rows)

    def codes(*shape: int) -> torch.Tensor:
        if kind == torch.int8:
            return torch.randint(-128, 128, shape, generator=g, dtype=torch.int8, device="cuda")
        return (torch.randn(*shape, generator=g, device="cuda") * 100).clamp(-448, 448).to(kind)

    def scales(*shape: int) -> torch.Tensor:
        steps = torch.exp2(torch.arange(shape[-1], device="cuda") % 7 - 3.0)[:, None]
        return (torch.rand(*shape, 1, generator=g, device="cuda") + 0.1) * steps

    return {
        "x_q": codes(m, k),
        "x_scale": scales(m),
        "offsets": offsets_of(rows),
        "weight": codes(experts, n, k),
        "weight_scale": scales(experts, n),
        "bias": torch.randn(experts, n, generator=g, device="cuda") * 100,
        "out_dtype": torch.float32,
    }


EIGHT = {
    (64, 128): Config("small", 16, 64),
    (200, 1040): Config("small", 16, 64, split=3),
    (72, 1000): Config("small", 32, 64, 256, stages=3),
    (640, 4160): Config("small", 64, 64),
}


@pytest.mark.parametrize(("n", "k"), EIGHT)
@pytest.mark.parametrize("kind", [torch.int8, FP8], ids=str)
def test_eight_bits_against_the_reference(kind: torch.dtype, n: int, k: int) -> None:
    """Integers to the bit, by the operator's choice and by other tiles."""
    from quantkit_kernels import _grouped

    for rows, rest in SPREADS:
        given = eights(kind, rows, rest, n, k)
        changes: list[dict[str, Any]] = [{}, {"bias": None}, {"out_dtype": torch.bfloat16}]
        for change in changes if (n, rest) == (200, 2) else changes[:1]:
            one = given | change
            right = grouped.grouped_w8a8_reference(**one)
            with poisoned():
                found = [grouped.grouped_w8a8(**one)]
                if not change:
                    found.append(_grouped.linear_8(EIGHT[n, k], **one))
            for y in found:
                if kind == torch.int8:
                    assert torch.equal(y, right), rows
                else:
                    rounding = 4e-3 if one["out_dtype"] == torch.bfloat16 else 0.0
                    assert worst(y, right.double()) < FP8_ERROR + rounding, rows


def test_the_same_bits_every_time() -> None:
    p = there(stacked(CASES[0], 8, 1024, 4096))
    gpu = choices.gpu_of(torch.device("cuda", 0))
    for rows in ([1, 0, 0, 0, 0, 1, 0, 0], [3, 0, 5, 1, 0, 0, 7, 0], [40, 11, 0, 3, 90, 0, 0, 1]):
        offsets, m = offsets_of(rows), sum(rows)
        x = activations(m, 4096, torch.bfloat16)
        first = grouped.grouped_linear(x, offsets, p)
        assert all(torch.equal(grouped.grouped_linear(x, offsets, p), first) for _ in range(50))
        if m == 2:
            assert choose(Problem("int4", "bf16", 1024, 4096, 128, m), 8, gpu).split > 1
    given = eights(FP8, [1, 0, 2, 0, 0, 1], 0, 512, 8192)
    first = grouped.grouped_w8a8(**given)
    assert all(torch.equal(grouped.grouped_w8a8(**given), first) for _ in range(50))


def layer(x: torch.Tensor, top_k_index: torch.Tensor, p: Packed) -> torch.Tensor:
    """From a router's choice of two of six experts to the sum of their outputs."""
    order, offsets = grouped.sort_by_expert(top_k_index, 6)
    y = grouped.grouped_linear(x[order // 2], offsets, p)
    return torch.zeros(2 * x.shape[0], p.n, dtype=x.dtype, device=x.device).index_copy(0, order, y).view(-1, 2, p.n)


def routed(m: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and a choice that is another one for each seed; one expert is never chosen."""
    g = torch.Generator().manual_seed(seed)
    index = (torch.rand(m, 5, generator=g) * torch.rand(5, generator=g)).topk(2)[1] + seed % 2
    return activations(m, 512, torch.bfloat16, seed).contiguous(), index.cuda()


@pytest.mark.parametrize("m", [1, 8, 100, 700])
def test_a_graph_goes_on_with_other_routes(m: int) -> None:
    p = there(stacked(CASES[0], 6, 264, 512))
    w = made_of(p, "before", torch.bfloat16)
    x, index = routed(m, 0)
    layer(x, index, p)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x, index, p)
    for seed in range(1, 7):
        other, chosen = routed(m, seed)
        x.copy_(other)
        index.copy_(chosen)
        graph.replay()
        assert torch.equal(y, layer(other, chosen, p))
        right = torch.einsum("mk,mcnk->mcn", other.double(), w[chosen])
        assert worst(y.flatten(0, 1), right.flatten(0, 1)) < 5e-3
    given = eights(torch.int8, [m, 0, m + 3], 0, 264, 512)
    grouped.grouped_w8a8(**given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = grouped.grouped_w8a8(**given)
    for rows in ([0, 2 * m + 3, 0], [1, 1, 0], [m, m, 3]):
        given["offsets"].copy_(offsets_of(rows))
        graph.replay()
        assert torch.equal(y, grouped.grouped_w8a8_reference(**given))


def test_nothing_waits_for_the_gpu() -> None:
    p = there(stacked(CASES[0], 6, 264, 512))
    x, index = routed(20, 0)
    given = eights(FP8, [3, 0, 9], 0, 264, 512)
    layer(x, index, p)
    grouped.grouped_w8a8(**given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, index, p)
        grouped.grouped_w8a8(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_in_torch() -> None:
    p = there(stacked(CASES[0], 6, 264, 512))
    compiled = torch.compile(lambda x, index: layer(x, index, p), fullgraph=True, dynamic=True)
    for m in (2, 9, 300):
        x, index = routed(m, m)
        right = layer(x, index, p)
        assert torch.allclose(compiled(x, index).float(), right.float(), rtol=1e-2, atol=1e-2 * float(right.std()))
    x, offsets = activations(9, 512, torch.bfloat16), offsets_of([2, 0, 4, 0, 1, 1])
    fixed = (p.codes, p.scale, None, None, None, "int4", "bf16", 264, 512, 128)
    torch.library.opcheck(grouped.grouped_wxa16, (x, offsets, *fixed))
    torch.library.opcheck(grouped.grouped_w8a8, (), eights(torch.int8, [2, 0, 3], 1, 64, 128))


def test_wrong_offsets_reach_nothing_outside() -> None:
    """Ends that go down, below zero or beyond the rows: sums are wrong, memory around y stays, and no access fails."""
    from quantkit_kernels import _grouped

    p = there(stacked(CASES[0], 6, 72, 256))
    whole = torch.full((60, 72), 7.0, device="cuda")
    x = activations(20, 256, torch.bfloat16)
    for ends in ([3, 1, 90, 2, 2, 9], [-4, 2, 5, -9, 30, 1], [2**31 - 1, -(2**31) + 99] * 3, [-(2**31)] * 6):
        one = choices.fitted(Choice(block_m=8), Problem("int4", "bf16", 72, 256, 128, 20), choices.gpu_of(x.device))
        _grouped.linear(one, x, torch.tensor(ends, dtype=torch.int32).cuda(), p, out=whole[20:40])
        torch.cuda.synchronize()
        assert (whole[:20] == 7).all() and (whole[40:] == 7).all()


def test_more_than_two_to_the_31_bytes() -> None:
    """150 experts of 28672 x 4096 have 2.2e9 words; the last ones, where offsets in 32 bits would wrap."""
    n, k, experts = 28672, 4096, 150
    codes = torch.full((experts, k // 128, n, 16), -0x77777778, dtype=torch.int32, device="cuda")  # 8 everywhere: zero
    codes[-1, :, -64:] = 0x12345678
    scale = torch.full((experts, k // 256, n), 0x3F803F80, dtype=torch.int32, device="cuda")
    p = Packed("int4", n, k, 128, 1, "bf16", codes, scale, None, None)
    offsets = torch.zeros(experts, dtype=torch.int32, device="cuda")
    offsets[-2], offsets[-1] = 2, 5
    x = torch.randn(5, k, device="cuda").bfloat16()
    y = grouped.grouped_linear(x, offsets, p)
    small = p._replace(n=64, codes=codes[-1, :, -64:].contiguous(), scale=scale[-1, :, -64:].contiguous())
    right = x[2:].double() @ layout.decode(small, torch.float64).T
    assert not y[:2].any() and not y[:, :-64].any()
    assert torch.allclose(y[2:, -64:].double(), right, rtol=1e-2, atol=1e-2 * float(right.std()))
