"""Products of 8-bit operands on a GPU, by every path, against the reference in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from poison import poisoned

from quantkit_kernels import activation
from quantkit_kernels._w8a8_choice import Config
from quantkit_kernels.fp8_block import fp8_block_linear, fp8_block_linear_reference
from quantkit_kernels.w8a8 import w8a8_linear, w8a8_linear_reference, weight_sums

pytestmark = pytest.mark.gpu

FP8 = torch.float8_e4m3fn
TOKENS = (1, 3, 16, 17, 33, 64, 65, 129, 257)
SHAPES = ((64, 128), (4104, 4160), (200, 136), (72, 1000), (640, 14336))
FP8_ERROR = 1e-3  # of a row, by sums that are short for 128 columns
Arguments = dict[str, Any]


def generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


def codes(rows: int, k: int, kind: torch.dtype, g: torch.Generator) -> torch.Tensor:
    if kind == torch.int8:
        return torch.randint(-128, 128, (rows, k), generator=g, dtype=torch.int8, device="cuda")
    return (torch.randn(rows, k, generator=g, device="cuda") * 100).clamp(-448, 448).to(kind)


def scales(g: torch.Generator, down: int, across: int = 1) -> torch.Tensor:
    """Beside each other unlike, over some orders of magnitude."""
    powers = torch.arange(down, device="cuda")[:, None] % 7 - 3 * torch.arange(across, device="cuda") % 5
    return (torch.rand(down, across, generator=g, device="cuda") + 0.1) * torch.exp2(powers.float())


def by_rows(kind: torch.dtype, m: int, n: int, k: int, *, bias: bool = True, **other: Any) -> Arguments:
    g = generator()
    made: Arguments = {"x_q": codes(m, k, kind, g), "x_scale": scales(g, m)}
    made |= {"weight": codes(n, k, kind, g), "weight_scale": scales(g, n)}
    made |= {"bias": torch.randn(n, generator=g, device="cuda") * 100 if bias else None, "out_dtype": torch.float32}
    return made | other


def shifted(given: Arguments) -> Arguments:
    zero = torch.randint(-128, 128, given["x_scale"].shape, generator=generator(), dtype=torch.int8, device="cuda")
    return given | {"x_zero": zero, "weight_sum": weight_sums(given["weight"])}


def by_blocks(m: int, n: int, k: int, **other: Any) -> Arguments:
    g, groups = generator(), -(-k // 128)
    made: Arguments = {"x_q": codes(m, k, FP8, g), "x_scale": scales(g, m, groups).t().contiguous()}
    made |= {"weight": codes(n, k, FP8, g), "weight_scale": scales(g, -(-n // 128), groups)}
    made |= {"bias": torch.randn(n, generator=g, device="cuda") * 100, "out_dtype": torch.float32}
    return made | other


def error(y: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest relative error of a row; infinite where anything was not written."""
    if not bool(torch.isfinite(y).all()):
        return float("inf")
    y, wanted = y.double(), wanted.double()
    return float(((y - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_integers_to_the_bit(n: int, k: int) -> None:
    for m in TOKENS:  # what is compiled anew costs seconds: each number of tokens once, the rest where it matters
        out_dtype = torch.bfloat16 if m % 4 == 1 else torch.float32
        made = [by_rows(torch.int8, m, n, k, bias=m % 2 == 0), shifted(by_rows(torch.int8, m, n, k))]
        for given in made if m in (3, 65, 257) else made[m % 4 == 1 :][:1]:
            with poisoned():
                y = w8a8_linear(**given | {"out_dtype": out_dtype})
            assert torch.equal(y, w8a8_linear_reference(**given | {"out_dtype": out_dtype}))


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_fp8_by_rows(n: int, k: int) -> None:
    for m in TOKENS:
        given = by_rows(FP8, m, n, k, bias=m % 2 == 0)
        whole = given | {"x_scale": torch.full((1,), 0.3).cuda(), "weight_scale": torch.full((1,), 0.1).cuda()}
        dtypes = ((torch.float32, 0.0), (torch.bfloat16, 3e-3), (torch.float16, 5e-4))
        for one in (given, whole) if m in (3, 65) else (given,):
            wanted = w8a8_linear_reference(**one)
            for out_dtype, rounding in dtypes if m in (17, 257) else dtypes[:1]:
                smaller = one if out_dtype != torch.float16 else one | {"weight_scale": one["weight_scale"] * 1e-6}
                reference = wanted if smaller is one else w8a8_linear_reference(**smaller)
                with poisoned():
                    y = w8a8_linear(**smaller | {"out_dtype": out_dtype})
                assert error(y, reference) < FP8_ERROR + rounding, (m, out_dtype)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_fp8_by_blocks(n: int, k: int) -> None:
    for m in TOKENS:
        given = by_blocks(m, n, k)
        wanted = fp8_block_linear_reference(**given)
        for out_dtype, rounding in ((torch.float32, 0.0), (torch.bfloat16, 3e-3))[: 1 + (m in (17, 257))]:
            with poisoned():
                y = fp8_block_linear(**given | {"out_dtype": out_dtype})
            assert error(y, wanted) < FP8_ERROR + rounding, (m, out_dtype)


SMALL = [
    Config("small", bm, 64, bk, split=split, stages=stages)
    for bm, bk, stages in ((16, 128, 5), (16, 256, 3), (32, 128, 4), (64, 128, 4))
    for split in (1, 2, 3, 8)
] + [Config("small", 128, 128, warps=8, stages=3, split=2)]
LARGE = [
    Config("large", 128, 128, warps=8, stages=3),
    Config("large", 64, 128, warps=4, stages=3),
    Config("large", 128, 128, halves=2, warps=8),
]


@pytest.mark.parametrize(
    "config", [*SMALL, *LARGE], ids=lambda c: f"{c.path}-{c.bm}x{c.bn}x{c.bk}-{c.split}-{c.halves}"
)
def test_every_tile_gives_the_same(config: Config) -> None:
    from quantkit_kernels import _fp8_block, _w8a8

    if config.halves == 2 and torch.cuda.get_device_capability() != (9, 0):
        config = replace(config, halves=1, stages=3)
    for m, n, k in ((5, 200, 2080), (150, 333, 1040)):
        given = shifted(by_rows(torch.int8, m, n, k))
        with poisoned():
            y = _w8a8.linear(**given, config=config)
        assert torch.equal(y, w8a8_linear_reference(**given))
        given = by_rows(FP8, m, n, k)
        with poisoned():
            y = _w8a8.linear(**given, config=config)
        assert error(y, w8a8_linear_reference(**given)) < FP8_ERROR
        if config.bk == 128 and (config.path == "small" or config.bn == 128):
            given = by_blocks(m, n, k)
            with poisoned():
                y = _fp8_block.linear(**given, config=config)
            assert error(y, fp8_block_linear_reference(**given)) < FP8_ERROR


def test_a_wide_integer_tile() -> None:
    from quantkit_kernels import _w8a8

    stages = 4 if torch.cuda.get_device_capability() >= (9, 0) else 2
    for bk in (64, 128):
        given = shifted(by_rows(torch.int8, 300, 700, 1040))
        y = _w8a8.linear(**given, config=Config("large", 128, 256, bk, warps=8, stages=stages))
        assert torch.equal(y, w8a8_linear_reference(**given))


def test_torch_s_own_products() -> None:
    from quantkit_kernels import _fp8_block, _w8a8

    given = shifted(by_rows(torch.int8, 33, 136, 264))
    assert torch.equal(_w8a8.linear(**given, config=Config("library")), w8a8_linear_reference(**given))
    given = by_rows(FP8, 100, 160, 4096)
    y = _w8a8.linear(**given | {"out_dtype": torch.bfloat16}, config=Config("library"))
    assert error(y, w8a8_linear_reference(**given)) < FP8_ERROR + 3e-3
    if torch.cuda.get_device_capability() == (9, 0):
        for k in (512, 384):
            given = by_blocks(128, 256, k)
            y = _fp8_block.linear(**given | {"out_dtype": torch.bfloat16}, config=Config("library"))
            assert error(y, fp8_block_linear_reference(**given)) < FP8_ERROR + 6e-3


def test_every_weight_is_read_where_it_is() -> None:
    """Tokens that are 1 in one column give that column of the weight, exactly, by either way."""
    n, k = 136, 320
    given = by_rows(FP8, 1, n, k, bias=False, x_q=torch.eye(k, device="cuda").to(FP8), x_scale=torch.ones(1).cuda())
    assert torch.equal(w8a8_linear(**given), given["weight"].t().float() * given["weight_scale"].t())
    blocks = by_blocks(1, n, k, x_q=given["x_q"], x_scale=torch.ones(3, k).cuda(), bias=None)
    spread = blocks["weight_scale"].repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    assert torch.equal(fp8_block_linear(**blocks), (blocks["weight"].float() * spread).t())


@pytest.mark.parametrize("m", [1, 16, 64, 130])
def test_the_same_bits_every_time(m: int) -> None:
    """Whichever program comes last, parts are added in their order; other work on the GPU changes who that is."""
    rows, blocks = by_rows(FP8, m, 4096, 8192), by_blocks(m, 4096, 8192)
    first = w8a8_linear(**rows), fp8_block_linear(**blocks)
    other, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for i in range(20):
        with torch.cuda.stream(other):
            for _ in range(i % 4):
                noise = (noise @ noise).tanh()
        assert torch.equal(w8a8_linear(**rows), first[0]) and torch.equal(fp8_block_linear(**blocks), first[1])


def test_a_token_is_the_same_wherever_it_stands() -> None:
    """One kernel for all rows of a tile: equal tokens give equal rows, and few agree with many."""
    for given, op in ((by_rows(FP8, 1, 512, 4096), w8a8_linear), (by_blocks(1, 512, 4096), fp8_block_linear)):
        wide = 1 if op is fp8_block_linear else 0
        one = op(**given)
        for m in (16, 64, 200):
            x_scale = given["x_scale"].expand(-1, m).contiguous() if wide else given["x_scale"].expand(m, -1)
            y = op(**given | {"x_q": given["x_q"].expand(m, -1), "x_scale": x_scale})
            assert torch.equal(y, y[:1].expand_as(y))
            assert error(y[:1], one) < FP8_ERROR


def test_poison_stays_in_its_token() -> None:
    for m in (20, 150):
        given, blocks, others = by_rows(FP8, m, 200, 640), by_blocks(m, 200, 640), torch.arange(m) != 7
        for op, one, reference in (
            (w8a8_linear, given, w8a8_linear_reference),
            (fp8_block_linear, blocks, fp8_block_linear_reference),
        ):
            wanted = reference(**one)
            one["x_q"].view(torch.uint8)[7, 300] = 0x7F
            y = op(**one)
            assert y[7].isnan().all() and error(y[others], wanted[others]) < FP8_ERROR


def test_strides_and_no_tokens() -> None:
    given = by_rows(torch.int8, 24, 128, 512)
    wanted = w8a8_linear_reference(**given)
    for left in (0, 1, 16):  # rows on 16 bytes, and not
        wide = torch.full((24, 640), 99, dtype=torch.int8, device="cuda")
        wide[:, left : left + 512] = given["x_q"]
        assert torch.equal(w8a8_linear(**given | {"x_q": wide[:, left : left + 512]}), wanted)
    across = given["weight"].t().contiguous().t()
    assert torch.equal(w8a8_linear(**given | {"weight": across}), wanted)
    cut = {"x_q": given["x_q"].view(2, 3, 4, 512), "x_scale": given["x_scale"].view(2, 3, 4, 1)}
    assert torch.equal(w8a8_linear(**given | cut), wanted.view(2, 3, 4, 128))
    assert w8a8_linear(**given | {"x_q": given["x_q"][:0], "x_scale": given["x_scale"][:0]}).shape == (0, 128)
    blocks = by_blocks(3, 128, 512)
    nothing = {"x_q": blocks["x_q"][:0], "x_scale": blocks["x_scale"][:, :0]}
    assert fp8_block_linear(**blocks | nothing).shape == (0, 128)


@pytest.mark.parametrize("m", [1, 16, 100, 500])
def test_graphs_and_compiled_functions(m: int) -> None:
    rows, integers, blocks = by_rows(FP8, 1, 512, 4096), by_rows(torch.int8, 1, 512, 4096), by_blocks(1, 512, 4096)
    x = torch.randn(m, 4096, generator=generator(), device="cuda", dtype=torch.bfloat16)

    def layer(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = []
        for given, kind in ((rows, "fp8_e4m3"), (integers, "int8")):
            x_q, x_scale = activation.quantize_per_token(x, kind)
            made.append(w8a8_linear(x_q, x_scale, given["weight"], given["weight_scale"], None, x.dtype))
        x_q, x_scale = activation.quantize_per_block(x, "fp8_e4m3")
        return *made, fp8_block_linear(x_q, x_scale, blocks["weight"], blocks["weight_scale"], None, x.dtype)

    wanted = layer(x)
    assert all(map(torch.equal, torch.compile(layer, fullgraph=True, dynamic=True)(x), wanted))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layer(x)
    for _ in range(3):  # counters of parts begin at zero each time
        for out in found:
            out.fill_(float("nan"))
        graph.replay()
        assert all(map(torch.equal, found, wanted))


def test_more_elements_than_32_bits_count() -> None:
    n, k = 70000, 32768
    weight = torch.zeros(n, k, dtype=torch.int8, device="cuda")
    given = by_rows(torch.int8, 16, 8, k, bias=False)
    weight[-8:] = given["weight"]
    many = given | {"weight": weight, "weight_scale": given["weight_scale"].repeat(n // 8, 1)}
    wanted = w8a8_linear_reference(**given)
    y = w8a8_linear(**many)
    assert torch.equal(y[:, -8:], wanted) and not y[:, :-8].any()
    del weight, many, y
    m, n, k = 40000, 60000, 64
    given = by_rows(torch.int8, m, n, k, bias=False, out_dtype=torch.bfloat16)
    y = w8a8_linear(**given)
    last = given | {"x_q": given["x_q"][-8:], "x_scale": given["x_scale"][-8:]}
    assert torch.equal(y[-8:], w8a8_linear_reference(**last))
