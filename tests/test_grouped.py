"""Products of experts: their meaning, the operators on a CPU, the kernels interpreted and as machine code.

The interpreter's bfloat16 is wrong, so the kernels run in float16 here, by the plain twin of their assembly;
tests/gpu/test_grouped_cuda.py has the rest.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_weights import CASES, exact, packed, weight
from poison import poisoned
from test_wxa16_machine import code_of, opcodes
from test_wxa16_machine import constants as dense_constants
from triton_tools import CAPABILITIES, SHARED, compile_kernel, interpreted, mutant, resources

from quantkit_kernels import grouped, layout
from quantkit_kernels._grouped_choice import active_experts, choose, choose_8, tile_bound
from quantkit_kernels.choice import Gpu, Problem, shared_bytes

FP8 = torch.float8_e4m3fn
SPREADS = {  # rows of each expert, then rows that are nobody's
    "uneven": ([3, 1, 9, 2], 0),
    "empty ones": ([0, 5, 0, 0, 11, 0], 0),
    "one has all": ([0, 19, 0], 0),
    "nobody's": ([4, 0, 3], 6),
    "nobody has any": ([0, 0], 5),
    "one expert": ([7], 1),
}


def offsets_of(rows: list[int]) -> torch.Tensor:
    return torch.tensor(list(itertools.accumulate(rows)), dtype=torch.int32)


def activations(m: int, k: int, seed: int = 0) -> torch.Tensor:
    """Rows of a wider tensor: what lies beyond them is NaN, and must not be read."""
    wide = torch.full((m, k + 24), float("nan"), dtype=torch.float16)
    wide[:, :k] = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    return wide[:, :k]


def stacked(case: tuple[str, str, int], experts: int, n: int, k: int) -> layout.Packed:
    return grouped.stack([packed(*case, n, k, seed) for seed in range(experts)])


def wanted(x: torch.Tensor, offsets: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """Each row times its expert's weight, in float64; zeros for rows that are nobody's."""
    y = torch.zeros(x.shape[0], weights[0].shape[0], dtype=torch.float64)
    first = 0
    for last, w in zip(offsets.tolist(), weights):
        y[first:last] = x[first:last].double() @ w.double().T
        first = last
    return y


def worst(y: torch.Tensor, right: torch.Tensor) -> float:
    """The largest relative error of a row; NaN counts as infinite, and so does anything but zeros for zeros."""
    each = (y.double() - right).norm(dim=1) / right.norm(dim=1).clamp(min=1e-30)
    return float(torch.nan_to_num(each, nan=float("inf")).max()) if len(y) else 0.0


# What it means -------------------------------------------------------------------------------------------------------


def test_rows_are_sorted_by_expert() -> None:
    index = torch.tensor([[2, 0], [0, 2], [3, 5], [2, 3]])  # 5 is no expert's; 1 has no rows
    order, offsets = grouped.sort_by_expert(index, 5)
    assert order.tolist() == [1, 2, 0, 3, 6, 4, 7, 5] and order.dtype == torch.int64
    assert offsets.tolist() == [2, 2, 5, 7, 7] and offsets.dtype == torch.int32
    g = torch.Generator().manual_seed(0)
    index = torch.randint(0, 7, (50, 3), generator=g)
    for made in (index, index.int()):
        order, offsets = grouped.sort_by_expert(made, 7)
        assert torch.equal(order, torch.argsort(index.flatten(), stable=True))
        assert offsets.tolist() == torch.bincount(index.flatten(), minlength=7).cumsum(0).tolist()
    order, offsets = grouped.sort_by_expert(index[:0], 7)
    assert order.shape == (0,) and offsets.tolist() == [0] * 7
    compiled = torch.compile(grouped.sort_by_expert, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(index, 7), grouped.sort_by_expert(index, 7)))


def test_experts_are_stacked_and_taken_apart() -> None:
    for case in (CASES[0], CASES[8], CASES[19]):
        each = [packed(*case, 24, 272, seed) for seed in range(3)]
        for one, same in zip(each, grouped.unstack(grouped.stack(each)), strict=True):
            assert torch.equal(layout.decode(one, torch.float64), layout.decode(same, torch.float64))
    with pytest.raises(ValueError, match=r"expert 1 is \('int4', 32, 272"):
        grouped.stack([packed(*CASES[0], 24, 272), packed(*CASES[0], 32, 272)])


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_operator_on_a_cpu(dtype: torch.dtype, spread: str) -> None:
    rows, rest = SPREADS[spread]
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    offsets, x = offsets_of(rows), activations(sum(rows) + rest, 272).to(dtype)
    for case in (CASES[0], CASES[8], CASES[19]):
        experts = [weight(*case, 40, 272, seed) for seed in range(len(rows))]
        y = grouped.grouped_linear(x, offsets, stacked(case, len(rows), 40, 272))
        assert y.dtype == dtype and not y[sum(rows) :].any()
        assert worst(y, wanted(x, offsets, [exact(w, case[0], case[2]) for w in experts])) < limit
    bias = torch.randn(len(rows), 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    shifted = grouped.grouped_linear(x, offsets, stacked(case, len(rows), 40, 272), bias)
    for e, (first, last) in enumerate(zip([0, *offsets.tolist()], offsets.tolist())):
        assert torch.allclose(shifted[first:last], y[first:last] + bias[e], rtol=2e-2, atol=2e-2)
    assert not shifted[sum(rows) :].any()


def test_what_lies_beyond_the_columns_is_not_read_on_a_cpu() -> None:
    """torch's product of so many rows in bfloat16 would: NaN times nothing is NaN."""
    x, p = activations(40, 272).bfloat16(), stacked(CASES[0], 2, 136, 272)
    wide = torch.full((40, 300), float("nan"), dtype=torch.bfloat16)
    wide[:, :272] = x
    assert torch.isfinite(grouped.grouped_linear(wide[:, :272], offsets_of([40, 0]), p)).all()


def eights(kind: torch.dtype, rows: list[int], rest: int, n: int, k: int) -> dict[str, Any]:
    """Arguments of grouped_w8a8: codes over the whole range, scales that differ by orders of magnitude."""
    g, m, experts = torch.Generator().manual_seed(n + k), sum(rows) + rest, len(rows)

    def codes(*shape: int) -> torch.Tensor:
        if kind == torch.int8:
            return torch.randint(-128, 128, shape, generator=g, dtype=torch.int8)
        return (torch.randn(*shape, generator=g) * 100).clamp(-448, 448).to(kind)

    def scales(*shape: int) -> torch.Tensor:
        return (torch.rand(*shape, 1, generator=g) + 0.1) * torch.exp2(torch.arange(shape[-1]) % 7 - 3.0)[:, None]

    return {
        "x_q": codes(m, k),
        "x_scale": scales(m),
        "offsets": offsets_of(rows),
        "weight": codes(experts, n, k),
        "weight_scale": scales(experts, n) * torch.exp2(torch.arange(experts) % 3)[:, None, None],
        "bias": torch.randn(experts, n, generator=g) * 100,
        "out_dtype": torch.float32,
    }


def wanted_8(given: dict[str, Any]) -> torch.Tensor:
    x, y, first = given["x_q"].double() * given["x_scale"].double(), [], 0
    for e, last in enumerate(given["offsets"].tolist()):
        w = given["weight"][e].double() * given["weight_scale"][e].double()
        y.append(x[first:last] @ w.T + (0 if given["bias"] is None else given["bias"][e].double()))
        first = last
    return torch.cat([*y, torch.zeros(len(x) - first, given["weight"].shape[1], dtype=torch.float64)])


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("kind", [torch.int8, FP8], ids=str)
def test_eight_bits_on_a_cpu(kind: torch.dtype, spread: str) -> None:
    for out_dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        given = eights(kind, *SPREADS[spread], 24, 72) | {"out_dtype": out_dtype}
        for y in (grouped.grouped_w8a8(**given), grouped.grouped_w8a8_reference(**given)):
            assert y.dtype == out_dtype and worst(y, wanted_8(given)) < limit
        assert worst(grouped.grouped_w8a8(**given | {"bias": None}), wanted_8(given | {"bias": None})) < limit


# The operators in torch ----------------------------------------------------------------------------------------------


def fixed(p: layout.Packed) -> tuple[Any, ...]:
    return p.codes, p.scale, p.zero, p.global_scale, None, p.kind, p.scale_dtype, p.n, p.k, p.group


def test_operator_contracts() -> None:
    offsets, x = offsets_of([2, 0, 3]), activations(6, 384).float()
    for case in (CASES[0], CASES[8], CASES[19]):
        torch.library.opcheck(grouped.grouped_wxa16, (x, offsets, *fixed(stacked(case, 3, 24, 384))))
    torch.library.opcheck(grouped.grouped_w8a8, (), eights(torch.int8, [2, 0, 3], 1, 24, 40))
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # the other cannot do FP8
    torch.library.opcheck(grouped.grouped_w8a8, (), eights(FP8, [2, 0, 3], 1, 24, 40), test_utils=checks)


def test_it_compiles_and_exports_with_any_number_of_tokens() -> None:
    """Router's choice to outputs in one graph: nothing of the distribution is a constant of it."""
    p = stacked(CASES[0], 4, 24, 384)

    class Experts(torch.nn.Module):
        def forward(self, x: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
            order, offsets = grouped.sort_by_expert(top_k_index, 4)
            y = grouped.grouped_linear(x[order // 2], offsets, p)
            return torch.zeros(2 * x.shape[0], 24, dtype=x.dtype).index_copy(0, order, y).view(-1, 2, 24)

    def choice(m: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return activations(m, 384, seed).float(), torch.rand(m, 4, generator=torch.Generator().manual_seed(m)).topk(2)[
            1
        ]

    module = Experts()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    batch = {0: torch.export.Dim("tokens", min=2, max=64)}
    exported = torch.export.export(module, choice(5, 0), dynamic_shapes={"x": batch, "top_k_index": batch})
    assert "quantkit.grouped_wxa16" in str(exported.graph)
    for m in (2, 5, 9):
        x, top_k_index = choice(m, m)
        y = module(x, top_k_index)
        assert torch.equal(compiled(x, top_k_index), y) and torch.equal(exported.module()(x, top_k_index), y)
        each = [layout.decode(one, torch.float32) for one in grouped.unstack(p)]
        for t, c in itertools.product(range(m), range(2)):
            assert torch.allclose(y[t, c], x[t] @ each[int(top_k_index[t, c])].T, rtol=1e-4, atol=1e-4)


def test_no_rows_and_shapes_on_a_gpu_that_is_not_there() -> None:
    p, offsets = stacked(CASES[0], 2, 24, 384), offsets_of([0, 0])
    assert grouped.grouped_linear(activations(0, 384), offsets, p).shape == (0, 24)
    assert grouped.grouped_w8a8(**eights(torch.int8, [0, 0], 0, 24, 40)).shape == (0, 24)
    with torch._subclasses.FakeTensorMode(), torch.device("cuda"):
        words = [torch.empty(t.shape, dtype=torch.int32) for t in (offsets, p.codes, p.scale)]
        moved = p._replace(codes=words[1], scale=words[2])
        y = grouped.grouped_linear(torch.empty(5, 384, dtype=torch.bfloat16), words[0], moved)
        assert (y.shape, y.dtype, y.device.type) == ((5, 24), torch.bfloat16, "cuda")


def test_what_does_not_belong_together_is_refused() -> None:
    p, x, offsets = stacked(CASES[0], 2, 24, 384), activations(5, 384).float(), offsets_of([2, 3])
    z, nv = stacked(("int4z", "fp32", 128), 2, 24, 384), stacked(("nvfp4", "e4m3", 16), 2, 24, 384)
    wrong: list[tuple[layout.Packed, dict[str, Any], str]] = [
        (p._replace(kind="int9"), {}, "kind 'int9'"),
        (p._replace(codes=p.codes[:1]), {}, r"codes is torch.int32 \(1, 3, 24, 16\); 2 times int4 \(24, 384\) has"),
        (p._replace(scale=p.scale[0]), {}, r"scale is torch.int32 \(2, 24\)"),
        (z._replace(zero=None), {}, "zero is missing for int4z with fp32"),
        (nv._replace(global_scale=torch.ones(1)), {}, r"global_scale is torch.float32 \(1,\)"),
        (p, {"bias": torch.zeros(24)}, r"bias is torch.float32 \(24,\); expected float \(2, 24\)"),
        (p, {"offsets": offsets.long()}, r"offsets are torch.int64 \(2,\); expected int32 \(experts,\)"),
        (p, {"offsets": offsets[:0]}, r"offsets are torch.int32 \(0,\)"),
        (p, {"x": x[None]}, r"x is torch.float32 \(1, 5, 384\); expected \(M, 384\)"),
        (p, {"x": x[:, 1:]}, r"x is torch.float32 \(5, 383\); expected \(M, 384\)"),
        (p, {"x": x.long()}, r"x is torch.int64 \(5, 384\); expected float"),
    ]
    for bad, change, says in wrong:
        given: dict[str, Any] = {"x": x, "offsets": offsets, "packed": bad} | change
        with pytest.raises(ValueError, match=says):
            grouped.grouped_linear(**given)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=says):
            grouped.grouped_linear(**given)
    for ends in ([3, 2], [2, 6], [-1, 5]):
        with pytest.raises(ValueError, match=r"offsets of expert . are .* of 5 rows; they ascend from 0"):
            grouped.grouped_linear(x, torch.tensor(ends, dtype=torch.int32), p)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x_q": torch.zeros(5, 39, dtype=torch.int8)}, r"x_q is torch.int8 \(5, 39\); expected \(M, 40\)"),
        ({"x_q": torch.zeros(5, 40).to(FP8)}, "x_q is torch.float8_e4m3fn; the weight is torch.int8"),
        ({"x_scale": torch.ones(5)}, r"x_scale is torch.float32 \(5,\); expected float \(5, 1\)"),
        ({"offsets": torch.zeros(3, dtype=torch.int32)}, r"offsets are \(3,\) of 2 experts"),
        ({"weight": torch.zeros(2, 24, 40)}, r"expected int8 or float8_e4m3fn \(E, N, K\)"),
        ({"weight_scale": torch.ones(2, 24)}, r"weight_scale is torch.float32 \(2, 24\); expected float \(2, 24, 1\)"),
        ({"bias": torch.zeros(2, 23)}, r"expected float \(2, 24\)"),
        ({"out_dtype": torch.int32}, "out_dtype is torch.int32"),
    ],
)
def test_eight_bits_that_do_not_belong_together(change: dict[str, Any], says: str) -> None:
    given = eights(torch.int8, [2, 3], 0, 24, 40) | change
    with pytest.raises(ValueError, match=says):
        grouped.grouped_w8a8(**given)
    with pytest.raises(ValueError, match=says), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        grouped.grouped_w8a8(**given)


def test_a_machine_without_triton_imports_the_module() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from quantkit_kernels import grouped\n"
        "codes, scale, ends = torch.ones(2, 1, 16, dtype=torch.int8), torch.ones(2, 1, 1), torch.tensor([1, 2]).int()\n"
        "y = grouped.grouped_w8a8(codes[:, 0], scale[:, 0], ends, codes, scale, None, torch.float32)\n"
        "print(y.tolist(), 'quantkit_kernels._grouped' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[16.0], [16.0]] False"


# The kernels, interpreted --------------------------------------------------------------------------------------------

MODULES = ("layout", "choice", "wxa16", "_unpack", "_wxa16", "_w8a8_choice", "_w8a8", "_grouped_choice", "_grouped")


@pytest.fixture
def modules() -> Iterator[dict[str, Any]]:
    with interpreted(*MODULES) as found:
        yield found


def run(modules: dict[str, Any], how: dict[str, Any], x: torch.Tensor, offsets: torch.Tensor, p: Any, **kw: Any) -> Any:
    """float32 sums of one configuration, into memory that held NaN; and when the scale was applied."""
    problem = modules["choice"].Problem(p.kind, p.scale_dtype, p.n, p.k, p.group, x.shape[0], "fp16")
    made = modules["choice"].Choice(**{"block_m": 8, "block_n": 32, "warps": 2} | how)
    choice = modules["choice"].fitted(made, problem, modules["choice"].Gpu())
    with poisoned():
        return modules["_grouped"].linear(choice, x, offsets, p, out_dtype=torch.float32, **kw), choice.where


def decoded(p: layout.Packed, where: str) -> list[torch.Tensor]:
    """The weights whose sums are formed: rounded to float16, but where the scale comes after the sum."""
    found = []
    for one in grouped.unstack(p):
        if where == "before" and one.global_scale is not None:
            whole, plain = one.global_scale.double(), one._replace(global_scale=torch.ones(1))
            found.append(layout.decode(plain, torch.float16).double() / whole)
        else:
            found.append(layout.decode(one, torch.float16 if where == "before" else torch.float64))
    return found


KINDS = [next(case for case in CASES if case[0] == kind) for kind in layout.KINDS]
KINDS += [("int4z", "fp32", 64), ("int3z", "fp32", 0)]


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_sums_of_every_kind(modules: dict[str, Any], case: tuple[str, str, int]) -> None:
    """Odd sizes, the second of two experts, more rows than a tile has: sums to 2e-6 of those in float64."""
    index = KINDS.index(case)
    n, k = (40, 144) if index % 4 == 1 else (24, 300)
    offsets, x, p = offsets_of([0, 9]), activations(9, k, index), stacked(case, 2, n, k)
    y, where = run(modules, {"split": 1 + index % 2, "unroll": 1 + index // 2 % 2}, x, offsets, p)
    assert worst(y, wanted(x, offsets, decoded(p, where))) < 2e-6


@pytest.mark.parametrize(("spread", "group_m"), [*((s, 2) for s in SPREADS), ("uneven", 0), ("nobody's", 0)])
def test_every_distribution(
    modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch, spread: str, group_m: int
) -> None:
    """In either order of the tiles, with a bias, and with a split."""
    monkeypatch.setattr(modules["_grouped"], "STAYS", (1 << 23) * (group_m == 0))
    monkeypatch.setattr(modules["_grouped"], "GROUP_M", group_m)
    rows, rest = SPREADS[spread]
    offsets, x, p = offsets_of(rows), activations(sum(rows) + rest, 128), stacked(CASES[0], len(rows), 72, 128)
    bias = torch.randn(len(rows), 72, generator=torch.Generator().manual_seed(1))
    y, where = run(modules, {"split": 1 + group_m // 2}, x, offsets, p, bias=bias)
    right = wanted(x, offsets, decoded(p, where))
    for e, (first, last) in enumerate(zip([0, *offsets.tolist()], offsets.tolist())):
        right[first:last] += bias[e].double()
    assert worst(y, right) < 2e-6


@pytest.mark.parametrize(("block_m", "block_n", "warps"), [(16, 64, 4), (32, 128, 4), (64, 128, 8), (16, 16, 1)])
def test_tiles(modules: dict[str, Any], block_m: int, block_n: int, warps: int) -> None:
    """Parts of large tiles are added in a loop, those of small ones at once."""
    rows = [block_m + 3, 0, 1]
    offsets, x, p = offsets_of(rows), activations(sum(rows), 144), stacked(("int4z", "fp16", 32), 3, block_n + 8, 144)
    y, where = run(modules, {"block_m": block_m, "block_n": block_n, "warps": warps, "split": 2}, x, offsets, p)
    assert worst(y, wanted(x, offsets, decoded(p, where))) < 2e-6


def test_strides_and_no_rows(modules: dict[str, Any]) -> None:
    offsets, x, p = offsets_of([3, 2]), activations(5, 136), stacked(CASES[0], 2, 24, 136)
    right = wanted(x, offsets, decoded(p, "group"))
    for one in (x.contiguous(), x.t().contiguous().t(), torch.cat([x, x])[:5]):
        y, _ = run(modules, {"where": "group"}, one, offsets, p)
        assert worst(y, right) < 2e-6
    assert run(modules, {}, x[:0], offsets * 0, p)[0].shape == (0, 24)


def test_wrong_offsets_reach_nothing_outside(modules: dict[str, Any]) -> None:
    """What a GPU cannot refuse, ends that go down, below zero or beyond the rows: around x and y all stays as it is."""
    p = stacked(CASES[0], 3, 24, 128)
    buffer = torch.full((25, 128), float("inf"), dtype=torch.float16)  # would make every sum it gets into infinite
    buffer[10:15] = activations(5, 128)
    whole = torch.full((25, 24), 7.0)
    for ends in ([3, 1, 9], [-4, 2, 5], [2**31 - 1, -(2**31) + 9, 4], [5, -1, 4]):
        offsets = torch.tensor(ends, dtype=torch.int32)
        problem = modules["choice"].Problem("int4", "bf16", 24, 128, 128, 5, "fp16")
        choice = modules["choice"].fitted(
            modules["choice"].Choice(block_m=8, block_n=32, warps=2), problem, modules["choice"].Gpu()
        )
        modules["_grouped"].linear(choice, buffer[10:15], offsets, p, out=whole[10:15])
        assert torch.isfinite(whole).all() and (whole[:10] == 7).all() and (whole[15:] == 7).all()


EIGHT: list[tuple[torch.dtype, tuple[int, int, int, int], str, tuple[int, int]]] = [
    # tile and parts, rows of the experts, N and K
    (torch.int8, (16, 32, 64, 1), "uneven", (40, 130)),
    (torch.int8, (16, 32, 64, 3), "nobody's", (33, 330)),
    (torch.int8, (32, 16, 32, 1), "empty ones", (24, 64)),
    (torch.int8, (16, 16, 32, 4), "one has all", (24, 64)),  # parts with nothing to do
    (FP8, (16, 32, 128, 2), "one has all", (40, 400)),
    (FP8, (16, 32, 256, 1), "nobody has any", (40, 400)),
    (FP8, (32, 32, 64, 1), "one expert", (40, 64)),
]


def outcome_8(module: Any, case: Any, group_m: int = 0) -> float:
    """The error of a product of 8-bit codes; integers must be the reference's to the bit."""
    kind, (bm, bn, bk, split), spread, (n, k) = case
    given = eights(kind, *SPREADS[spread], n, k)
    config = module.Config("small", bm, bn, bk, split=split)
    module.STAYS, module.GROUP_M = ((1 << 23), 8) if group_m == 0 else (0, group_m)
    with poisoned():
        y = module.linear_8(config, **given)
    if kind == torch.int8:
        return 0.0 if torch.equal(y, grouped.grouped_w8a8_reference(**given)) else float("inf")
    return worst(y, wanted_8(given))


@pytest.mark.parametrize("case", EIGHT, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")
def test_eight_bits_are_the_reference_s(modules: dict[str, Any], case: Any) -> None:
    assert outcome_8(modules["_grouped"], case, EIGHT.index(case) % 2 * 2) < 1e-6


# A text of the kernels for another, and what must show it: the kernel with a split, the one whose tiles are grouped, or
# that of 8 bits.
BUGS: list[tuple[str, str, str]] = [
    ("before <= slot", "before < slot", "split"),
    ("(e > 0) & (e < experts), 0)", "(e < 0) & (e < experts), 0)", "split"),
    ("slot - key // (2 * EXPERTS)\n", "slot * 0\n", "split"),
    ("experts) - 1, expert > 0", "experts) - 1, expert > 1", "split"),
    ("exists = token[:, None] < last", "exists = token[:, None] < last - 1", "split"),
    ("w_ptr += one * n_lines * n_padded", "w_ptr += one * (n_lines - 1) * n_padded", "grouped"),
    ("    s_ptr += one * s_rows * n_padded", "    s_ptr += 0 * one", "grouped"),
    ("bias_ptr + one * n, row", "bias_ptr, row", "grouped"),
    ("at + tl.program_id(2) * SIZE", "at", "split"),
    ("== SPLIT - 1", "== 0", "split"),
    ("in tl.static_range(1, SPLIT)", "in tl.static_range(2, SPLIT)", "split"),
    ("        zeros(", "        0 and zeros(", "split"),
    ("across, down = _place(inside, high", "across, down = _place(inside, high * 0 + 1", "grouped"),
    ("w_ptr + one * n * k", "w_ptr + one * k", "eight"),
    ("w_scale_ptr + one * n", "w_scale_ptr", "eight"),
    ("inside < k - start", "inside < k - start - 1", "eight"),
]


def error_of(modules: dict[str, Any], way: str) -> float:
    """The error of the kernels in one of the ways in which planted bugs show."""
    if way == "eight":
        return outcome_8(modules["_grouped"], EIGHT[0])
    rows, n, split = [10, 3, 0, 1], 40 if way == "grouped" else 24, 1 + (way == "split")
    modules["_grouped"].STAYS, modules["_grouped"].GROUP_M = (1 << 23) * (way == "split"), 2
    offsets, x, p = offsets_of(rows), activations(15, 144), stacked(("int4", "fp16", 32), 4, n, 144)
    bias = torch.arange(4 * n).view(4, n) * 10.0
    y, where = run(modules, {"split": split}, x, offsets, p, bias=bias)
    right = wanted(x, offsets, decoded(p, where))
    right[:14] += bias.repeat_interleave(torch.tensor(rows), 0).double()
    return worst(y, right)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # a bug may read what nobody wrote
@pytest.mark.parametrize("bug", [None, *range(len(BUGS))])
def test_planted_bugs_are_found(modules: dict[str, Any], tmp_path: Path, bug: int | None) -> None:
    """The comparison fails for each of them, and holds for the kernels as they are."""
    old, new, way = BUGS[bug] if bug is not None else ("", "", "")
    broken = mutant(modules["_grouped"], old, new, tmp_path)
    found = [error_of(modules | {"_grouped": broken}, one) for one in (way,) if one]
    found = found or [error_of(modules | {"_grouped": broken}, one) for one in ("split", "grouped", "eight")]
    assert (max(found) < 2e-6) if bug is None else (max(found) > 1e-3)


# Grids, choices and machine code -------------------------------------------------------------------------------------


def test_the_grid_holds_every_distribution_and_is_no_larger() -> None:
    r = random.Random(0)
    for _ in range(3000):
        experts, m, block_m = r.randint(1, 6), r.randint(0, 30), r.choice([1, 2, 4, 8])
        cuts = [0, *sorted(r.randint(0, m) for _ in range(experts)), m]
        assert sum(-(-(b - a) // block_m) for a, b in itertools.pairwise(cuts)) <= tile_bound(m, experts, block_m)
    for experts, m, block_m in itertools.product((1, 2, 3), range(1, 9), (2, 4)):
        spreads = (c for c in itertools.product(range(m + 1), repeat=experts + 1) if sum(c) == m)
        most = max(sum(-(-rows // block_m) for rows in spread) for spread in spreads)
        assert most == tile_bound(m, experts, block_m)


GPUS = {80: Gpu("", 80, 108), 89: Gpu("", 89, 128), 90: Gpu(), 100: Gpu("", 100, 148)}
MODELS = [(128, 8, 768, 2048), (128, 8, 2048, 768), (8, 2, 28672, 4096), (8, 2, 4096, 14336), (3, 1, 40, 272)]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_choice_fits_the_gpu(capability: int) -> None:
    gpu = GPUS[capability]
    for (experts, top, n, k), (kind, scale_dtype, group) in itertools.product(MODELS, KINDS):
        for tokens in (1, 4, 16, 64, 300, 1024, 8192):
            m = tokens * top
            one = Problem(kind, scale_dtype, n, k, group, m)
            choice = choose(one, experts, gpu)
            assert choice.path == "gemm" and choice.block_n == 16 * choice.warps * (
                choice.block_n // (16 * choice.warps)
            )
            assert shared_bytes(choice, one, choice.stages, gpu) <= SHARED[capability]
            assert choice.split == 1 or m <= 64 * experts
            eight = choose_8(m, n, k, experts, True, divmod(capability, 10), gpu.sms)
            assert eight.path == "small" and eight.stages * eight.bk * (eight.bm + eight.bn) <= SHARED[capability]


def test_few_rows_keep_all_multiprocessors_busy() -> None:
    """One token of models as they are: work for most of an H200, in tiles of eight rows."""
    for experts, top, n, k in MODELS[:4]:
        choice = choose(Problem("int4", "bf16", n, k, 128, top), experts, Gpu())
        assert choice.block_m == 8
        assert active_experts(top, experts) * -(-n // choice.block_n) * choice.split >= 96
    assert choose(Problem("int4", "bf16", 28672, 4096, 128, 8192), 8, Gpu()).block_m == 256


TYPES = dict.fromkeys(("w_ptr", "s_ptr", "z_ptr", "count_ptr", "offsets_ptr"), "*i32")
TYPES |= dict.fromkeys(("x_ptr", "y_ptr", "bias_ptr"), "*bf16")


def compiled(case: tuple[str, str, int], tile: tuple[int, ...], capability: int, **kw: Any) -> Any:
    """`wxa16` as it is launched for 128 experts, bfloat16 and even sizes. tile: rows, across, lines, warps, stages."""
    from quantkit_kernels import _grouped

    block_m, block_n, unroll, warps, stages = tile
    constants = dense_constants(*case, block_m, block_n, unroll, warps, capability, EXPERTS=128, **kw)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return compile_kernel(_grouped.wxa16, constants, capability, TYPES, **options)


@pytest.mark.parametrize(
    ("case", "tile", "most"),
    [
        (("int4", "bf16", 128), (8, 64, 2, 4, 4), 2.2),
        (("int4", "bf16", 128), (8, 32, 2, 2, 6), 2.4),
        (("int4", "bf16", 128), (128, 128, 1, 8, 4), 4.6),
        (("nvfp4", "e4m3", 16), (8, 64, 2, 4, 4), 3.8),
    ],
    ids=str,
)
def test_hopper(case: tuple[str, str, int], tile: tuple[int, ...], most: float, tmp_path: Path) -> None:
    """The loop is that of the dense kernel: weights go from memory to registers to the tensor core, nothing else."""
    made = compiled(case, tile, 90, GROUP_M=8 if tile[0] > 64 else 0)
    registers, stack = resources(made, tmp_path)
    _, loop = code_of(made, tmp_path)
    inside = opcodes(loop)
    assert stack == 0 and registers <= 255 and made.metadata.shared <= SHARED[90]
    assert inside["HMMA" if tile[0] < 16 else "HGMMA"] > 0
    assert inside["STS"] == inside["SHFL"] == inside["LDG"] == 0 and inside["LDGSTS"] > 0
    weights = tile[1] * layout.get(case[0]).line * tile[2] // (32 * tile[3])
    assert sum(inside.values()) / weights <= most, f"{sum(inside.values()) / weights:.2f} instructions a weight"


@pytest.mark.parametrize(
    ("capability", "case", "tile", "opcode"),
    [
        (80, ("int4", "bf16", 128), (8, 64, 2, 4, 4), "HMMA"),
        (89, ("mxfp4", "e8m0", 32), (8, 32, 2, 2, 4), "HMMA"),
        (100, ("int4", "bf16", 128), (128, 128, 1, 8, 3), "UTCHMMA"),
    ],
    ids=str,
)
def test_other_gpus(
    capability: int, case: tuple[str, str, int], tile: tuple[int, ...], opcode: str, tmp_path: Path
) -> None:
    made = compiled(case, tile, capability, SPLIT=2, EVEN=False)
    everything, loop = code_of(made, tmp_path)
    assert resources(made, tmp_path)[1] == 0 and made.metadata.shared <= SHARED[capability]
    assert opcodes(everything)[opcode] > 0
    assert capability >= 90 or opcodes(loop)["STS"] == opcodes(loop)["SHFL"] == 0
    assert "atom.global.gpu.acq_rel.add" in made.asm["ptx"]  # a partial sum is there before it is counted


@pytest.mark.parametrize(
    ("capability", "fp8", "rows", "opcode"),
    [
        (80, False, 1, "IMMA"),
        (89, True, 64, "QMMA"),
        (90, True, 100, "QGMMA"),
        (100, True, 100, "UTCQMMA"),
    ],
)
def test_machine_code_of_eight_bits(capability: int, fp8: bool, rows: int, opcode: str, tmp_path: Path) -> None:
    from quantkit_kernels import _grouped

    config = choose_8(rows * 8, 4096, 4096, 8, fp8, divmod(capability, 10), GPUS[capability].sms)
    code, total = ("*fp8e4nv", "*fp32") if fp8 else ("*i8", "*i32")
    types = {"x_ptr": code, "w_ptr": code, "y_ptr": "*bf16", "bias_ptr": "*bf16", "offsets_ptr": "*i32"}
    types |= {"part_ptr": total, "count_ptr": "*i32"}
    constants = {"BM": config.bm, "BN": config.bn, "BK": config.bk, "SPLIT": config.split, "GROUP_M": 0, "EXPERTS": 8}
    constants |= {"BIAS": True, "EVEN": True, "PROMOTE": capability < 100}
    options = {"num_warps": config.warps, "num_stages": config.stages}
    made = compile_kernel(_grouped.w8a8, constants, capability, types, **options)
    found, _ = code_of(made, tmp_path)
    assert opcodes(found)[opcode] > 0 and made.metadata.shared <= SHARED[capability]
    assert resources(made, tmp_path)[1] == 0 and not any(op in opcodes(found) for op in ("LDL", "STL"))
    loads = [text for text in found if "LDGSTS" in text]
    assert loads and all(".128" in text and "BYPASS" in text for text in loads)
