"""Attention on a GPU: bfloat16, descriptors, assembly, graphs; against float64, the CPU's bytes, torch, and itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from quantkit_kernels import _attention_launch, attention, decode_attention, kv_append, kv_layout

pytestmark = pytest.mark.gpu


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that is handed out is NaN, so that what a kernel does not write shows."""
    empty = torch.empty

    def poisoned(*shape: Any, **kw: Any) -> torch.Tensor:
        made = empty(*shape, **kw)
        return made.fill_(math.nan) if made.is_floating_point() else made

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        yield


def ints(*x: int) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.int32, device="cuda")


def agree(found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor], limit: float) -> None:
    """All of it to `limit`, no row much worse, no element far off, the same rows empty, the lse to 1e-3."""
    out, lse = found[0].double(), found[1].double()
    exact, logs = wanted[0].double(), wanted[1].double()
    assert torch.equal(lse == -math.inf, logs == -math.inf) and bool(torch.isfinite(out).all())
    error = (out - exact).norm() / exact.norm().clamp(min=1e-9)
    assert error < limit, float(error)
    rows = (out - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-3)
    assert rows.max() < 4 * limit, float(rows.max())
    size = exact.square().mean(-1, keepdim=True).sqrt()
    assert bool(((out - exact).abs() <= 2e-2 * size + 2**-7 * exact.abs() + 1e-6).all())
    assert float((lse - logs).nan_to_num(0.0).abs().max()) < 1e-3


# Prefill


def inputs(
    b: int, heads: int, groups: int, len_q: int, len_k: int, d: int, dtype: torch.dtype, order: str = "bhld"
) -> list[torch.Tensor]:
    """q, k and v (B, H, L, D), tokens of different sizes; "blhd": a token's heads side by side in memory."""
    g = torch.Generator().manual_seed(len_q + 7 * len_k + d)
    made = []
    for h, n in ((heads, len_q), (groups, len_k), (groups, len_k)):
        x = torch.randn(b, h, n, d, generator=g) * (1 + torch.arange(n) % 5)[:, None] / 2
        x = x.to("cuda", dtype)
        made.append(x if order == "bhld" else x.transpose(1, 2).contiguous().transpose(1, 2))
    return made


def problem(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kw: Any) -> Any:
    given: dict[str, Any] = {"scale": q.shape[-1] ** -0.5, "causal": True, "out_dtype": torch.float32, "with_lse": True}
    others: dict[str, Any] = dict.fromkeys(("window", "soft_cap", "sinks", "cu_q", "cu_k", "starts", "lengths"))
    return _attention_launch.Problem(q, k, v, **others | {"max_len_q": 0} | given | kw)


def exact(p: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return attention.attention_reference(
        p.q.double(), p.k.double(), p.v.double(), p.scale, p.causal, p.window, p.soft_cap, p.sinks, p.cu_q, p.cu_k,
        p.max_len_q, p.starts, p.lengths, torch.float64, True,
    )  # fmt: skip


def ways(d: int) -> list[str]:
    """Those that this GPU and width have."""
    hopper = torch.cuda.get_device_capability()[0] == 9
    return ["pointers", "descriptors", "flight"] if hopper and d in (64, 128) else ["pointers"]


FEATURES: dict[str, dict[str, Any]] = {
    "causal": {},
    "all": {"causal": False},
    "window": {"window": 150},
    "both sides": {"causal": False, "window": 100},
    "cap": {"soft_cap": 1.5},
    "everything": {"window": 300, "soft_cap": 3.0, "sinks": True, "starts": (5, 133), "lengths": (700, 351)},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.usefixtures("poison")
def test_prefill_features(name: str, dtype: torch.dtype) -> None:
    more = dict(FEATURES[name])
    if "sinks" in more:
        more["sinks"] = torch.tensor([0.3, -2.0, 5.0, 0.0], device="cuda")
    more |= {key: ints(*more[key]) for key in ("starts", "lengths") if key in more}
    limit = 3e-3 if dtype == torch.bfloat16 else 5e-4
    for d in (64, 128) if dtype == torch.bfloat16 else (128,):
        p = problem(*inputs(2, 4, 2, 520, 700, d, dtype, "bhld" if d == 64 else "blhd"), **more)
        wanted = exact(p)
        for way in ways(d):
            found = _attention_launch.run(p, way)
            agree(found, wanted, limit)
            again = _attention_launch.run(p, way)
            assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])


@pytest.mark.parametrize("len_k", [0, 1, 15, 16, 17, 127, 128, 129, 4095])
@pytest.mark.usefixtures("poison")
def test_prefill_lengths(len_k: int) -> None:
    for len_q in {1, 33, len_k, min(len_k + 3, 300)} - {0}:
        p = problem(*inputs(1, 2, 1, len_q, len_k, 128, torch.bfloat16))
        for way in ways(128)[::2]:
            agree(_attention_launch.run(p, way), exact(p), 3e-3)


@pytest.mark.parametrize(("heads", "groups", "d"), [(1, 1, 80), (3, 1, 96), (8, 1, 256), (4, 4, 128), (6, 2, 40)])
@pytest.mark.usefixtures("poison")
def test_prefill_heads_and_widths(heads: int, groups: int, d: int) -> None:
    cases: list[dict[str, Any]] = [{}, {"soft_cap": 20.0, "window": 64}]
    for more in cases:
        p = problem(*inputs(1, heads, groups, 300, 337, d, torch.bfloat16), **more)
        agree(_attention_launch.run(p, "auto"), exact(p), 3e-3)


@pytest.mark.usefixtures("poison")
def test_prefill_packed() -> None:
    cu_q, cu_k = ints(0, 170, 170, 171, 400, 405), ints(0, 170, 200, 530, 860, 860)
    q, k, v = (t[0].transpose(0, 1) for t in inputs(1, 4, 2, 405, 860, 128, torch.bfloat16))
    cases: list[dict[str, Any]] = [{}, {"window": 90, "soft_cap": 4.0}]
    for more in cases:
        p = problem(q, k, v, cu_q=cu_q, cu_k=cu_k, max_len_q=229, **more)
        for way in ways(128):
            agree(_attention_launch.run(p, way), exact(p), 3e-3)


@pytest.mark.usefixtures("poison")
def test_prefill_strides_and_unused_keys() -> None:
    """Keys and values are slices of tensors full of NaN; NaN beyond the lengths; a row that is not aligned."""
    q, k, v = inputs(2, 4, 2, 300, 300, 128, torch.bfloat16)
    wide = torch.full((2, 400, 2, 3, 128), math.nan, dtype=torch.bfloat16, device="cuda")
    wide[:, 10:310, :, 0], wide[:, 10:310, :, 1] = k.transpose(1, 2), v.transpose(1, 2)
    keys = [wide[:, 10:310, :, i].transpose(1, 2) for i in (0, 1)]
    wanted = exact(problem(q, k, v))
    for way in ways(128):
        agree(_attention_launch.run(problem(q, *keys), way), wanted, 3e-3)
        more = {"starts": ints(0, 17), "lengths": ints(300, 257)}
        spoiled = [t.clone() for t in (k, v)]
        for t in spoiled:
            t[1, :, :17], t[1, :, 257:] = math.nan, math.nan
        p = problem(q, *spoiled, **more)
        agree(_attention_launch.run(p, way), exact(p), 3e-3)
    shifted = torch.zeros(k.numel() + 1, dtype=torch.bfloat16, device="cuda")[1:].view_as(k).copy_(k)
    agree(_attention_launch.run(problem(q, shifted, v), "auto"), wanted, 3e-3)


def test_torch_attention_is_the_same() -> None:
    q, k, v = inputs(2, 8, 2, 1500, 1500, 128, torch.bfloat16)
    wanted = exact(problem(q, k, v))[0]
    for way in ("sdpa", "auto", *ways(128)):
        out, lse = attention.attention(q, k, v, 128**-0.5, True, way=way)
        assert lse.numel() == 0 and (out.double() - wanted).norm() / wanted.norm() < 4e-3
        assert out.stride() == torch.ops.quantkit.attention(q, k, v, 128**-0.5, True)[0].stride()


# Decode

CACHES: list[tuple[Any, int, int | None, bool]] = [
    (torch.bfloat16, 128, None, False),
    (torch.float16, 96, None, False),
    (torch.bfloat16, 256, None, False),
    ("fp8", 128, None, False),
    ("fp8", 128, None, True),
    ("fp8", 80, None, False),
    ("int8", 128, None, False),
    ("int8", 256, None, False),
    ("int4", 128, 128, False),
    ("int4", 128, 64, False),
    ("int4", 64, None, False),
    ("int4", 256, 128, False),
]


@pytest.mark.parametrize("number", ["fp8", "int8", "int4"])
def test_assembly_and_integers_give_the_same_bits(number: str) -> None:
    """All values of a lane, in both lanes."""
    from quantkit_kernels import _kv_layout

    lanes = torch.arange(1 << 16, dtype=torch.int64)
    words = torch.cat([lanes | lanes.flip(0) << 16, lanes << 16 | (lanes * 40503 & 0xFFFF)])
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int().cuda()
    found = []
    for assembly in (True, False):
        out = torch.empty(len(words), 8 if number == "int4" else 4, dtype=torch.float16, device="cuda")
        _kv_layout.decoded[(len(words) // 256,)](words, out, FORMAT=number, ASM=assembly, N=256)
        found.append(out)
    assert torch.equal(found[0].isnan(), found[1].isnan())
    bits = [t.nan_to_num(0.0).view(torch.int16) for t in found]
    assert torch.equal(*bits)
    if number == "fp8":
        bytes_of = words.view(torch.uint8).view(-1, 4)[:, [0, 2, 1, 3]]  # (b, hi)
        wanted = bytes_of.contiguous().view(torch.float8_e4m3fn).to(torch.float16)
        assert torch.equal(found[0].nan_to_num(0.0), wanted.nan_to_num(0.0))


def spoiled(cache: tuple[Any, int, int | None, bool], pages: int, heads: int, length: int) -> list[Any]:
    """A cache on the CPU whose every slot is NaN, or as bad as its format allows."""
    number, d, group, fixed = cache
    made = list(kv_layout.new_cache(number, pages, heads, length, d, group=group, fixed=fixed))
    for i, t in enumerate(made):
        if t is None:
            continue
        if fixed and i > 1:
            t.copy_(torch.arange(heads) * 0.25 + 0.5 + i)
        elif t.is_floating_point() and t.dtype != torch.float8_e4m3fn:
            t.fill_(math.nan)
        else:
            t.view(torch.uint8).fill_(0x7F)
    return made


def tokens(b: int, heads: int, n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(n + d)
    size = torch.exp2(torch.arange(n) % 6 - 3.0)[:, None] * (1 + torch.arange(heads))[:, None, None]
    k, v = (torch.randn(b, heads, n, d, generator=g) * size + 0.2 for _ in range(2))
    return (k / 4).bfloat16(), v.flip(2).bfloat16()


def filled(
    cache: tuple[Any, int, int | None, bool], lengths: torch.Tensor, heads: int, page: int = 0
) -> tuple[list[Any], torch.Tensor | None]:
    """A spoiled cache on the GPU with `lengths` tokens of each sequence, written on the CPU."""
    longest = -(-max(int(lengths.max()), 1) // 64) * 64
    count = -(-longest // page) if page else 1
    pages = len(lengths) * count
    made = spoiled(cache, pages, heads, page or longest)
    table = None
    if page:
        table = torch.randperm(pages, generator=torch.Generator().manual_seed(5)).view(len(lengths), count).int()
    k, v = tokens(len(lengths), heads, longest, cache[1])
    given: Any = (k, v, *made, torch.zeros_like(lengths, device="cpu"), table, lengths.cpu())
    kv_append.kv_append_reference(*given)
    return [None if t is None else t.cuda() for t in made], None if table is None else table.cuda()


def exact_decode(q: torch.Tensor, cache: list[Any], *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    wide = [t.double() if t is not None and i < 2 and t.dtype in (torch.bfloat16, torch.float16) else t
            for i, t in enumerate(cache)]  # fmt: skip
    given: Any = (q.double(), *wide, *args)
    return decode_attention.decode_attention_reference(*given)


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.usefixtures("poison")
def test_decode(cache: tuple[Any, int, int | None, bool]) -> None:
    """Dense and in pages small and large; lengths that may matter; more ranges than tiles; the same bytes again."""
    lengths = ints(0, 1, 15, 16, 17, 127, 128, 129, 1000)
    dtype = cache[0] if isinstance(cache[0], torch.dtype) else torch.bfloat16
    for page, ratio, length_q in ((0, 4, 1), (16, 3, 1), (64, 8, 2), (96, 1, 1)):
        made, table = filled(cache, lengths, 2, page)
        q = torch.randn(len(lengths), 2 * ratio, length_q, cache[1], device="cuda", dtype=dtype)
        args = (lengths, cache[1] ** -0.5, table)
        wanted = exact_decode(q, made, *args)
        for splits in (0, 40):
            given: Any = (q, *made, *args)
            found = decode_attention.decode_attention(*given, out_dtype=torch.float32, splits=splits)
            agree(found, wanted, 3e-3)
            again = decode_attention.decode_attention(*given, out_dtype=torch.float32, splits=splits)
            assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])


@pytest.mark.parametrize("cache", [CACHES[0], CACHES[3], CACHES[9]], ids=str)
@pytest.mark.usefixtures("poison")
def test_decode_features(cache: tuple[Any, int, int | None, bool]) -> None:
    lengths = ints(60, 2, 770)
    sinks = torch.tensor([0.5, -3.0, 9.0, 0.0, 1.0, 2.0], device="cuda")
    made, table = filled(cache, lengths, 2, 64)
    for length_q, starts, sink, window, cap in (
        (4, ints(30, 0, 77), sinks, 50, 4.0),
        (16, None, None, None, None),
        (1, None, sinks, 300, None),
    ):
        q = torch.randn(3, 6, length_q, cache[1], device="cuda", dtype=torch.bfloat16)
        args = (lengths, 0.1, table, starts, sink, window, cap)
        given: Any = (q, *made, *args)
        found = decode_attention.decode_attention(*given, out_dtype=torch.float32)
        agree(found, exact_decode(q, made, *args), 3e-3)


@pytest.mark.parametrize("page", [0, 48])
@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_append_writes_the_bytes_of_the_cpu(cache: tuple[Any, int, int | None, bool], page: int) -> None:
    b, heads, length = 3, 2, 96
    made = spoiled(cache, b * length // (page or length), heads, page or length)
    there = [None if t is None else t.cuda() for t in made]
    table = torch.randperm(b * length // page).view(b, -1).int() if page else None
    k, v = tokens(b, heads, 21, cache[1])
    k[0, 1, 3], v[2, 0, 7] = 0, 0
    rest = (torch.tensor([0, 5, 80]).int(), table, torch.tensor([21, 13, 21]).int())
    given: Any = (k, v, *made, *rest)
    kv_append.kv_append_reference(*given)
    given = (k.cuda(), v.cuda(), *there, *(None if t is None else t.cuda() for t in rest))
    kv_append.kv_append(*given)
    for wanted, found in zip(made, there):
        if wanted is not None and found is not None:
            assert torch.equal(wanted.view(torch.uint8), found.cpu().view(torch.uint8))


def test_a_captured_step_follows_the_lengths() -> None:
    """Append and attend in a CUDA graph, replayed as the sequences grow, and compiled; nothing waits for the GPU."""
    cache, lengths = CACHES[6], ints(100, 37)
    made, table = filled(cache, ints(160, 160), 2, 32)
    k, v = (t[:, :, :1].cuda().clone() for t in tokens(2, 2, 2, 128))
    q = torch.randn(2, 8, 1, 128, device="cuda", dtype=torch.bfloat16)

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor, *four: Any) -> torch.Tensor:
        given: Any = (k, v, *four, at, table)
        kv_append.kv_append(*given)
        given = (q, *four, at + 1, 0.1, table)
        return decode_attention.decode_attention(*given)[0]

    other = [t.clone() for t in made]
    for four in (other, made):
        step(q, k, v, lengths, *four)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(q, k, v, lengths, *made)
    compiled: Any = torch.compile(step, fullgraph=True)
    for _ in range(3):
        lengths += 1
        k.mul_(1.5)
        graph.replay()
        wanted = step(q, k, v, lengths, *other)
        assert torch.equal(out, wanted) and torch.equal(compiled(q, k, v, lengths, *other), wanted)


def test_operators_under_opcheck() -> None:
    test: Any = torch.library.opcheck
    q, k, v = inputs(1, 4, 2, 40, 40, 64, torch.bfloat16)
    test(attention.attention, (q, k, v, 0.1, True), {"window": 9, "with_lse": True})
    lengths = ints(20, 7)
    made, _ = filled(CACHES[10], lengths, 2)
    query = torch.randn(2, 4, 1, 64, device="cuda", dtype=torch.bfloat16)
    test(decode_attention.decode_attention, (query, *made, lengths, 0.1))


def test_a_long_cache_beyond_32_bits() -> None:
    """An int8 cache whose last sequence begins beyond 2^31 bytes."""
    heads, length = 8, 66_000
    shape = (34, heads, length, 128)
    if torch.cuda.get_device_properties(0).total_memory < 3 * math.prod(shape):
        pytest.fail("a GPU with 7 GB or more is needed")
    k = torch.zeros(shape, dtype=torch.int8, device="cuda")
    v = torch.zeros(34, heads, length // 16, 16 * 128, dtype=torch.int8, device="cuda")
    scales = [torch.ones(shape[:3], device="cuda") for _ in range(2)]
    new_k, new_v = (t.cuda() for t in tokens(34, heads, 40, 128))
    starts, lengths = torch.full((34,), length - 40, dtype=torch.int32, device="cuda"), ints(*[length] * 34)
    kv_append.kv_append(new_k, new_v, k, v, *scales, starts)
    q = torch.randn(34, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    found = decode_attention.decode_attention(q, k, v, *scales, lengths, 0.1, window=40, out_dtype=torch.float32)
    # The same tokens in a short cache: their codes are the same, their places are not.
    short: Any = kv_layout.new_cache("int8", 34, heads, 48, 128, device="cuda")
    kv_append.kv_append(new_k, new_v, *short, torch.zeros_like(starts))
    wanted = decode_attention.decode_attention(q, *short, ints(*[40] * 34), 0.1, out_dtype=torch.float32)
    agree(found, wanted, 1e-3)
