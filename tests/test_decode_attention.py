"""Attention over a quantized cache without a GPU: layouts, kernels in Triton's interpreter, machine code, operators."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ptx_emulator
import pytest
import torch
from poison import poisoned
from triton_tools import CAPABILITIES, SHARED, compile_kernel, interpreted, resources, sass

from quantkit_kernels import decode_attention, kv_append, kv_layout

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")  # of an empty sum
# number of the cache, channels of a head, channels of an int4 scale, whether fp8's scales are fixed
CACHES: list[tuple[Any, int, int | None, bool]] = [
    (torch.float32, 32, None, False),
    ("fp8", 64, None, False),
    ("fp8", 80, None, True),
    ("int8", 64, None, False),
    ("int4", 64, None, False),
    ("int4", 128, 64, False),
]
MORE_CACHES: list[tuple[Any, int, int | None, bool]] = [
    *CACHES,
    (torch.float16, 128, None, False),
    ("fp8", 128, None, False),
    ("int8", 256, None, False),
    ("int4", 128, 128, False),
    ("int4", 256, 128, False),
]


@pytest.fixture
def kernels() -> Iterator[dict[str, Any]]:
    """Modules with kernels, interpreted; the others import them when they are called. What is not written is NaN."""
    with poisoned(), interpreted("_kv_layout", "_kv_tiles", "_decode_attention") as modules:
        yield modules


def ints(*x: int) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.int32)


def spoiled(number: Any, pages: int, heads: int, length: int, d: int, group: int | None, fixed: bool) -> list[Any]:
    """A cache whose every slot is NaN, or as bad as its format allows; fixed scales differ from head to head."""
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


def append(k: torch.Tensor, v: torch.Tensor, *given: Any) -> None:
    """By plain torch."""
    kv_append.kv_append_reference(*(k, v, *given))


def tokens(b: int, heads: int, n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, H, n, D) whose sizes differ from token to token by powers of two, and from head to head."""
    g = torch.Generator().manual_seed(seed + n + d)
    size = torch.exp2(torch.arange(n) % 6 - 3.0)[:, None] * (1 + torch.arange(heads))[:, None, None]
    k, v = (torch.randn(b, heads, n, d, generator=g) * size + 0.2 for _ in range(2))
    return k / 2, v.flip(2)


def filled(
    cache: tuple[Any, int, int | None, bool], lengths: torch.Tensor, heads: int, page: int = 0, room: int = 0
) -> tuple[list[Any], torch.Tensor | None]:
    """A spoiled cache with `lengths` tokens of each sequence, and its table where pages have `page` tokens."""
    number, d, group, fixed = cache
    longest = -(-max(int(lengths.max()), 1, room) // 16) * 16
    count = -(-longest // page) if page else 1
    pages = len(lengths) * count
    made = spoiled(number, pages, heads, page or longest, d, group, fixed)
    table = None
    if page:
        table = torch.randperm(pages, generator=torch.Generator().manual_seed(5)).view(len(lengths), count).int()
    k, v = tokens(len(lengths), heads, longest, d)
    append(k, v, *made, torch.zeros_like(lengths), table, lengths)
    return made, table


def difference(found: tuple[torch.Tensor, torch.Tensor], q: torch.Tensor, cache: list[Any], *args: Any) -> float:
    """The worst row's relative error against float64, or the lse's; infinite where only one of them has a number."""
    exact = [t.double() if t is not None and t.dtype in (torch.float32, torch.float16) and i < 2 else t
             for i, t in enumerate(cache)]  # fmt: skip
    out, lse = decode_attention.decode_attention_reference(q.double(), *exact, *args)
    if not torch.equal(found[1] == -math.inf, lse == -math.inf) or not torch.isfinite(found[0]).all():
        return math.inf
    rows = (found[0].double() - out).norm(dim=-1) / out.norm(dim=-1).clamp(min=1e-3)
    logs = ((found[1] - lse) / (1 + lse.abs())).nan_to_num(0.0).abs()
    return max(float(rows.max()), float(logs.max()))


def limit(cache: tuple[Any, int, int | None, bool]) -> float:
    """Queries and probabilities are rounded to fp16 where keys and values are codes."""
    return 5e-6 if cache[0] == torch.float32 else 3e-3


# Layouts


def test_places_are_those_of_the_docstring() -> None:
    g = torch.Generator().manual_seed(0)
    for d in (64, 128, 256):
        codes = torch.randint(0, 16, (2, 3, 48, d), generator=g, dtype=torch.int32)
        assert torch.equal(kv_layout.unpack_keys(kv_layout.pack_keys(codes)), codes)
        packed = kv_layout.pack_values(codes)
        assert packed.shape == (2, 3, 3, 2 * d) and torch.equal(kv_layout.unpack_values(packed), codes)
        words = packed[1, 2, 1].reshape(d // 8, 4, 4)
        for r, t, i, c, h, b in (
            (0, 0, 0, 0, 0, 0),
            (3, 2, 1, 1, 0, 1),
            (d // 8 - 1, 3, 3, 1, 1, 1),
            (1, 1, 2, 0, 1, 0),
        ):
            token, channel = 16 + 4 * t + 2 * h + b, d // 2 * (i >> 1) + 4 * r + 2 * (i & 1) + c
            assert int(words[r, t, i]) >> (8 * c + 4 * h + 16 * b) & 15 == int(codes[1, 2, token, channel])
        row, order = kv_layout.pack_keys(codes)[1, 2, 7], [0, 1, 8, 9, 2, 3, 10, 11, 4] if d > 64 else list(range(8))
        for word, chunk in enumerate(order):
            nibbles = [int(row[word]) >> (4 * i) & 15 for i in range(8)]
            assert nibbles == codes[1, 2, 7, 8 * chunk : 8 * chunk + 8].tolist()
    for d in (64, 80, 128):
        codes8 = torch.randint(-128, 128, (2, 3, 48, d), generator=g, dtype=torch.int8)
        for one, order in ((codes8, [0, 2, 1, 3]), (codes8.view(torch.float8_e4m3fn), [0, 1, 2, 3])):
            packed = kv_layout.pack_values(one)
            assert packed.dtype == one.dtype
            assert torch.equal(kv_layout.unpack_values(packed).view(torch.int8), codes8)
            places = packed[1, 2, 1].view(torch.int8).reshape(d // 4, 4, 4, 4)
            for r, t, i, j in ((0, 0, 0, 1), (3, 2, 1, 2), (5, 3, 3, 3)):
                assert int(places[r, t, i, order[j]]) == int(codes8[1, 2, 16 + 4 * t + j, 4 * r + i])


@pytest.mark.parametrize(("number", "groups"), [("int8", 1), ("fp8", 1), ("int4", 1), ("int4", 2)])
def test_codes_are_the_nearest(number: str, groups: int) -> None:
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 50)[:, None]
    x[3], x[4, :64], x[5] = 0, 0, x[5].abs()
    codes, scale, zero = kv_layout.quantize(x, number, groups=groups)
    assert scale is not None and bool((scale[3] == 1).all()) and bool((scale > 0).all())
    shift = 0 if zero is None else zero[..., None]
    decoded = ((codes.float().unflatten(-1, (groups, -1)) - shift) * scale[..., None]).flatten(-2)
    size = x.unflatten(-1, (groups, -1)).abs().amax(-1, keepdim=True).expand(-1, groups, 128 // groups).flatten(-2)
    step = {"int8": 1 / 127, "fp8": 2**-3, "int4": 2.1 * 2 / 15}[number]  # int4: the ends are cut
    assert bool(((decoded - x).abs() <= size * step * 0.502 + 1e-30).all())
    assert torch.equal(decoded[3], x[3])
    bad = x.clone()
    bad[7, 9] = math.nan
    assert bool(kv_layout.quantize(bad, number, groups=groups)[1][7, 0].isnan())  # type: ignore[index]


@pytest.mark.parametrize(
    ("cache", "page"),
    [(cache, 0) for cache in MORE_CACHES] + [(cache, 48) for cache in CACHES[1:]] + [(CACHES[4], 16)],
    ids=str,
)
def test_new_tokens_are_written_where_they_belong(
    kernels: dict[str, Any], cache: tuple[Any, int, int | None, bool], page: int
) -> None:
    """By the kernel as by plain torch, to the byte, all around them left as it was; what does not fit is left out."""
    number, d, group, fixed = cache
    b, heads, length = 3, 2, 96
    cached = spoiled(number, b * length // (page or length), heads, page or length, d, group, fixed)
    for t in cached[:2]:
        t.view(torch.uint8).copy_(torch.arange(t.view(torch.uint8).numel()).view_as(t.view(torch.uint8)) % 251)
    other = [None if t is None else t.clone() for t in cached]
    table = torch.randperm(b * length // page).view(b, -1).int() if page else None
    k, v = tokens(b, heads, 21, d)
    k[0, 1, 3], v[2, 0, 7] = 0, 0
    turned = k.half().transpose(1, 2).contiguous().transpose(1, 2)
    args = (ints(0, 5, 30), table, ints(21, 13, 21))
    append(turned, v.half(), *cached, *args)
    kv_append.append_kernel(turned, v.half(), *other, *args)
    for wanted, found in zip(cached, other):
        if wanted is not None and found is not None:
            assert torch.equal(wanted.view(torch.uint8), found.view(torch.uint8))
    kv_append.append_kernel(k[:, :, :0], v[:, :, :0], *other, *args)


def test_a_token_with_a_nan_gives_nan_and_no_other(kernels: dict[str, Any]) -> None:
    lengths = ints(20, 20)
    for cache in CACHES[1:]:
        made, _ = filled(cache, lengths, 1)
        k, v = tokens(2, 1, 1, cache[1], 3)
        v[1, 0, 0, 5] = math.nan
        kv_append.append_kernel(k, v, *made, lengths - 1, None, None)
        q = torch.randn(2, 1, 2, cache[1], generator=torch.Generator().manual_seed(0))
        out = decode_attention.decode_kernel(q, *made, lengths, 0.1)[0]
        assert bool(torch.isfinite(out[0]).all())
        assert bool(out[1, 0, 1, 5 if cache[3] else 0].isnan())


# Kernels


@pytest.mark.parametrize(("cache", "page"), [(cache, p) for cache in CACHES for p in (0, 16)], ids=str)
def test_lengths_against_float64(kernels: dict[str, Any], cache: tuple[Any, int, int | None, bool], page: int) -> None:
    """Every length that may matter in one batch; slots that are not used hold NaN; three ranges, some of them empty."""
    lengths = ints(0, 1, 15, 16, 17, 127, 128, 129) if not page else ints(0, 47, 129, 300)
    made, table = filled(cache, lengths, 1, page)
    q = torch.randn(len(lengths), 3, 1, cache[1], generator=torch.Generator().manual_seed(2))
    args = (lengths, cache[1] ** -0.5, table)
    found = decode_attention.decode_kernel(q, *made, *args, out_dtype=torch.float32, splits=3)
    assert difference(found, q, made, *args) < limit(cache)
    assert torch.equal(found[0][0], torch.zeros_like(found[0][0])) and bool((found[1][0] == -math.inf).all())


FEATURES: dict[str, dict[str, Any]] = {
    "queries": {"len_q": 5},
    "window": {"len_q": 3, "window": 21},
    "cap": {"soft_cap": 2.0},
    "left padding": {"starts": ints(30, 0, 77)},
    "sinks": {"sinks": torch.tensor([0.5, -3.0, 9.0, 0.0, 1.0, 2.0])},
    "everything": {
        "len_q": 4,
        "window": 50,
        "soft_cap": 4.0,
        "starts": ints(30, 0, 77),
        "sinks": torch.tensor([0.5, -3.0, 9.0, 0.0, 1.0, 2.0]),
    },
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_against_float64(kernels: dict[str, Any], name: str) -> None:
    lengths, more = ints(60, 2, 77), dict(FEATURES[name])
    length_q = more.pop("len_q", 1)
    for cache in CACHES[::2] if name == "everything" else (CACHES[len(name) % 2], CACHES[2 + len(name) % 4]):
        made, table = filled(cache, lengths, 2, 32)
        q = torch.randn(3, 6, length_q, cache[1], generator=torch.Generator().manual_seed(3))
        args = (lengths, 0.3, table, *(more.get(key) for key in ("starts", "sinks", "window", "soft_cap")))
        found = decode_attention.decode_kernel(q, *made, *args, torch.float32, 2)
        assert difference(found, q, made, *args) < limit(cache)


@pytest.mark.parametrize(("ratio", "length_q"), [(1, 1), (3, 1), (4, 2), (8, 3), (1, 16)])
def test_grouped_heads(kernels: dict[str, Any], ratio: int, length_q: int) -> None:
    for cache in (CACHES[0], CACHES[1 + ratio % 5]):
        lengths = ints(40, 17)
        made, _ = filled(cache, lengths, 2)
        q = torch.randn(2, 2 * ratio, length_q, cache[1], generator=torch.Generator().manual_seed(4))
        found = decode_attention.decode_kernel(q, *made, lengths, 0.2, out_dtype=torch.float32)
        assert difference(found, q, made, lengths, 0.2) < limit(cache)


def test_every_width_of_a_head(kernels: dict[str, Any]) -> None:
    for cache in MORE_CACHES[len(CACHES) :]:
        lengths = ints(70)
        made, _ = filled(cache, lengths, 1)
        q = torch.randn(1, 9, 1, cache[1], generator=torch.Generator().manual_seed(6)).half()
        found = decode_attention.decode_kernel(q, *made, lengths, 0.1, out_dtype=torch.float32)
        assert difference(found, q, made, lengths, 0.1) < limit(cache)


@pytest.mark.parametrize("number", ["int8", "fp8", "int4"])
def test_every_code_is_decoded_exactly(kernels: dict[str, Any], number: str) -> None:
    """A sequence of one token returns its value; its lse is a sum of whole numbers, which are exact as well."""
    codes = torch.arange(256).view(4, 1, 1, 64)
    values = codes.to(torch.int8).float() if number == "int8" else (codes % 16).float()
    if number == "fp8":
        values = (codes.to(torch.uint8).view(torch.float8_e4m3fn).float()).nan_to_num(0.0)
    kind = {"int8": torch.int8, "int4": torch.int32}.get(number, torch.float8_e4m3fn)
    cached = [torch.zeros_like(t) for t in kv_layout.new_cache(number, 4, 1, 16, 64) if t is not None]
    one = torch.tensor([1.0])
    for t in cached[2:]:
        t.fill_(one.view(torch.int32).item() if number == "int4" else 1.0)
    for place in (0, 13):  # of the token in its block
        rows = torch.zeros(4, 1, 16, 64)
        rows[:, :, place] = values[:, :, 0]
        cached[0].copy_(kv_layout.pack_keys(rows.int()) if number == "int4" else rows.to(kind))
        cached[1].view(torch.uint8).copy_(kv_layout.pack_values(rows.to(kind)).view(torch.uint8))
        starts, lengths = torch.full((4,), place, dtype=torch.int32), torch.full((4,), place + 1, dtype=torch.int32)
        q = (torch.arange(4 * 64).view(4, 1, 1, 64) * 7 % 16 + 1).float()
        out, lse = decode_attention.decode_kernel(q, *cached, lengths, 2.0**-9, None, starts)
        assert torch.equal(out, values)
        assert torch.allclose(lse[:, :, 0], (q * values).sum(-1)[:, :, 0] * 2.0**-9, rtol=3e-7, atol=0)


def test_scales_of_any_size(kernels: dict[str, Any]) -> None:
    """Values whose scales differ by 2^60 from token to token: fp16 holds neither, the sum is right all the same."""
    for number in ("int8", "int4"):
        cache = (number, 64, None, False)
        lengths = ints(50)
        made, _ = filled(cache, lengths, 1)
        k, v = tokens(1, 1, 50, 64)
        v *= torch.exp2(torch.arange(50) % 5 * 15.0 - 45)[:, None]
        append(k, v, *made, ints(0), None, None)
        q = torch.randn(1, 4, 1, 64, generator=torch.Generator().manual_seed(7)) * 2.0**40
        found = decode_attention.decode_kernel(q, *made, lengths, 2.0**-42, out_dtype=torch.float32)
        assert difference(found, q, made, lengths, 2.0**-42) < 2e-3


def test_strides_and_ranges(kernels: dict[str, Any]) -> None:
    """Caches with tokens before heads, a query that shares memory; more ranges than tiles; the same bytes again."""
    module = decode_attention
    for cache in (CACHES[0], CACHES[4]):
        lengths = ints(100, 33)
        made, _ = filled(cache, lengths, 2)
        turned = [t.transpose(1, 2).contiguous().transpose(1, 2) if t is not None and i < 2 else t
                  for i, t in enumerate(made)]  # fmt: skip
        q = torch.randn(2, 1, 2, cache[1], generator=torch.Generator().manual_seed(8)).expand(2, 4, 2, cache[1])
        first = module.decode_kernel(q, *made, lengths, 0.2, out_dtype=torch.float32, splits=5)
        again = module.decode_kernel(q, *turned, lengths, 0.2, out_dtype=torch.float32, splits=5)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert difference(first, q, made, lengths, 0.2) < limit(cache)
        whole = module.decode_kernel(q, *made, lengths, 0.2, out_dtype=torch.float32, splits=1)
        assert torch.allclose(first[0], whole[0], rtol=2e-3, atol=1e-3)


def identity(x: Any, *args: Any) -> Any:
    return x


def shortened(low: Any, length: Any, width: Any) -> Any:
    first, last = RIGHT["_own_range"](low, length, width)
    return first, last - width * (last > first + 32)


def wide(n: Any, low: Any, length: Any) -> Any:
    return RIGHT["within"](n, low, length + 1)


def no_zero(at: Any, here: Any) -> Any:
    scale, zero = RIGHT["scale_and_zero"](at, here)
    return scale, zero * 0


def late(s: Any, n: Any, position: Any, *args: Any) -> Any:
    return RIGHT["_visible"](s, n, position - 1, *args)


RIGHT: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("module", "name", "bug", "cache"),
    [
        ("_decode_attention", "key_token", identity, CACHES[3]),
        ("_decode_attention", "value_channel", identity, CACHES[3]),
        ("_kv_tiles", "key_channel", identity, CACHES[4]),
        ("_decode_attention", "_own_range", shortened, CACHES[0]),
        ("_kv_tiles", "within", wide, CACHES[0]),
        ("_decode_attention", "scale_and_zero", no_zero, CACHES[5]),
        ("_decode_attention", "_visible", late, CACHES[1]),
    ],
)
def test_planted_bugs_are_seen(
    kernels: dict[str, Any], module: str, name: str, bug: Any, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = ints(129, 33)
    made, _ = filled(cache, lengths, 1)
    q = torch.randn(2, 2, 2, cache[1], generator=torch.Generator().manual_seed(9))

    def check() -> float:
        found = decode_attention.decode_kernel(q, *made, lengths, 0.2, out_dtype=torch.float32, splits=2)
        return difference(found, q, made, lengths, 0.2)

    assert check() < limit(cache)
    RIGHT[name] = getattr(kernels[module], name)
    monkeypatch.setattr(kernels[module], name, bug)
    assert check() > 1e-2


# Assembly, which neither the interpreter nor a compiler runs


def halves(words: torch.Tensor) -> torch.Tensor:
    """Words to the two fp16 in each, the low one first, as float64."""
    parts = torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF], -1)
    return torch.where(parts > 32767, parts - 65536, parts).to(torch.int16).view(torch.float16).double()


def test_assembly_decodes_every_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit_kernels import _kv_layout

    one = torch.tensor(0x3C003C00)
    add = ptx_emulator.fma(torch.float16)
    monkeypatch.setitem(ptx_emulator.OPS, "add.f16x2", lambda a, b: add(a, one, b))
    words = torch.arange(256) | torch.arange(256).flip(0) << 8 | (torch.arange(256) * 77 % 256) << 16
    words |= (torch.arange(256) * 13 + 5) % 256 << 24
    constants = {name: torch.tensor(getattr(_kv_layout, name).value) for name in ("MINUS_1152", "MINUS_1024")}
    assert halves(constants["MINUS_1152"]).tolist() == [-1152, -1152]
    assert halves(constants["MINUS_1024"]).tolist() == [-1024, -1024]
    codes = torch.stack([words >> 8 * i & 255 for i in range(4)], -1).to(torch.uint8)
    a, b = ptx_emulator.run(_kv_layout.INT8_ASM.value, 2, words, constants["MINUS_1152"].expand_as(words))
    wanted = codes.view(torch.int8).double()
    assert torch.equal(halves(a), wanted[:, [0, 2]]) and torch.equal(halves(b), wanted[:, [1, 3]])
    nibbles = torch.stack([words >> 4 * i & 15 for i in range(8)], -1).double()
    for i, one in enumerate(
        ptx_emulator.run(_kv_layout.INT4_ASM.value, 4, words, constants["MINUS_1024"].expand_as(words))
    ):
        assert torch.equal(halves(one), nibbles[:, [i, i + 4]])
    low_and_high = r"mov\.b32 \{l, h\}, \$2; cvt\.rn\.f16x2\.e4m3x2 \$0, l; cvt\.rn\.f16x2\.e4m3x2 \$1, h;"
    assert re.search(low_and_high, _kv_layout.FP8_ASM.value)


# Operators


def test_operators() -> None:
    test: Any = torch.library.opcheck
    lengths = ints(20, 7)
    for cache in (CACHES[0], CACHES[5]):
        made, table = filled(cache, lengths, 2, 16)
        q = torch.randn(2, 4, 2, cache[1])
        test(decode_attention.decode_attention, (q, *made, lengths, 0.2, table), {"window": 9, "sinks": torch.zeros(4)})
        k, v = tokens(2, 2, 3, cache[1])
        test(kv_append.kv_append, (k, v, *made, lengths, table))

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *cached: Any) -> torch.Tensor:
        *four, at = cached
        kv_append.kv_append(k, v, *four, at)
        return decode_attention.decode_attention(q, *four, at + 1, 0.2)[0]

    made, _ = filled(CACHES[3], lengths, 2, room=32)
    k, v = tokens(2, 2, 1, 64, 5)
    q = torch.randn(2, 4, 1, 64)
    other = [t.clone() for t in made]
    compiled: Any = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, *made, lengths), step(q, k, v, *other, lengths))
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(made, other))
    none = decode_attention.decode_attention(q[:, :, :0], *made, lengths, 0.2)
    assert none[0].shape == (2, 4, 0, 64) and none[1].shape == (2, 4, 0)


def test_steps_of_one_token_are_a_prefill() -> None:
    """Token after token as all at once: attention is that of the whole sequence, as the other operator has it."""
    from quantkit_kernels.attention import attention

    q, (k, v) = torch.randn(1, 4, 20, 64), tokens(1, 2, 20, 64)
    made = kv_layout.new_cache(torch.float32, 1, 2, 32, 64)
    steps = []
    for i in range(20):
        part = slice(i, i + 1)
        kv_append.kv_append(k[:, :, part], v[:, :, part], *made, ints(i))
        steps.append(decode_attention.decode_attention(q[:, :, part], *made, ints(i + 1), 0.2, window=7)[0])
    assert torch.allclose(torch.cat(steps, 2), attention(q, k, v, 0.2, True, 7)[0], atol=1e-5)
    last = decode_attention.decode_attention(q[:, :, 12:], *made, ints(20), 0.2, window=7)[0]
    assert torch.allclose(torch.cat(steps, 2)[:, :, 12:], last, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    cache: Any = kv_layout.new_cache("int8", 2, 2, 32, 64)
    k, v, ks, vs = cache
    q, lengths = torch.zeros(2, 4, 1, 64), ints(3, 4)
    for args, said in (
        ((q, k, v[:, :, :1], ks, vs, lengths), "beside keys"),
        ((q, k, v, None, None, lengths), "a cache of int8 needs scales"),
        ((q, k, v, ks[:, :1], vs, lengths), "scales of a cache of int8"),
        ((q, k[:, :, :24], v, ks, vs, lengths), "no multiple of 16"),
        ((q[:, :3], k, v, ks, vs, lengths), "the cache has 2 heads of 64 channels"),
        ((q, k, v, ks, vs, lengths.long()), "lengths is"),
        ((q, k[:1], v[:1], ks[:1], vs[:1], lengths), "no block_table"),
        ((q, k.double(), v, ks, vs, lengths), "one dtype"),
    ):
        with pytest.raises(ValueError, match=said):
            decode_attention.decode_attention(*args, 0.1)
    with pytest.raises(ValueError, match="window 0"):
        decode_attention.decode_attention(q, k, v, ks, vs, lengths, 0.1, window=0)
    with pytest.raises(ValueError, match="sinks are"):
        decode_attention.decode_attention(q, k, v, ks, vs, lengths, 0.1, sinks=torch.zeros(2))
    with pytest.raises(ValueError, match="block_table is"):
        decode_attention.decode_attention(q, k, v, ks, vs, lengths, 0.1, torch.zeros(2, 1))
    with pytest.raises(ValueError, match="new keys are"):
        kv_append.kv_append(q, q, k, v, ks, vs, lengths)
    for number, d, group, said in (
        ("int9", 64, None, "no cache of int9"),
        ("int4", 96, None, "heads of 96 channels"),
        ("int4", 128, 32, "groups of 32 of 128"),
    ):
        with pytest.raises(ValueError, match=said):
            kv_layout.new_cache(number, 1, 1, 32, d, group=group)


def test_a_machine_without_triton_imports_and_computes() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from quantkit_kernels import decode_attention, kv_append, kv_layout\n"
        "c = kv_layout.new_cache('int4', 1, 1, 16, 64); x = torch.randn(1, 1, 3, 64)\n"
        "kv_append.kv_append(x, x, *c, torch.zeros(1, dtype=torch.int32))\n"
        "n = torch.full((1,), 3, dtype=torch.int32)\n"
        "print(tuple(decode_attention.decode_attention(x, *c, n, 0.1)[0].shape))\n"
        "print('quantkit_kernels._decode_attention' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["(1, 1, 3, 64)", "False"]


def test_ranges_fill_a_gpu_and_are_not_tiny() -> None:
    assert decode_attention.ranges(128, 128, 132) == 4  # 16 sequences of 8192 tokens, 8 key heads, an H200
    assert decode_attention.ranges(8, 128, 132) == 32
    assert decode_attention.ranges(4096, 128, 132) == 1 and decode_attention.ranges(1, 1, 132) == 1


# Machine code


def compiled(kernels: Any, number: str, capability: int, columns: int, **constants: Any) -> tuple[Any, dict[str, Any]]:
    d = constants.pop("D", 128)
    bm, bn, warps, stages = decode_attention.tiling(number, d, columns)
    given = {"FORMAT": number, "SCALES": 0 if number == "none" else 2, "GROUPS": 1, "PAGE": 0, "RATIO": 4, "D": d}
    given |= dict.fromkeys(("WINDOW", "CAP", "START"), False) | {"ASM": capability >= 89, "BM": bm, "BN": bn}
    given |= {"BD": decode_attention.head_width(d), "NW": warps} | constants
    cached, scale = "*bf16" if number == "none" else "*i32", "*i32" if number == "int4" else "*fp32"
    types = {"q_ptr": "*bf16", "k_ptr": cached, "v_ptr": cached, "k_scale_ptr": scale, "v_scale_ptr": scale}
    types |= dict.fromkeys(("table_ptr", "length_ptr", "start_ptr"), "*i32") | {"scale": "fp32", "cap": "fp32"}
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return compile_kernel(kernels.decode, given, capability, types, **options), given


def main_loop(code: str) -> list[str]:
    """Instructions, less their operands, of the longest loop with a matrix product."""
    lines = [(int(a, 16), b) for a, b in re.findall(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;", code, re.M)]
    bodies = []
    for at, line in lines:
        target = re.search(r"BRA.*0x([0-9a-f]+)$", line)
        if target and int(target[1], 16) < at:
            body = [re.sub(r"^@!?U?P\w+\s+", "", text) for a, text in lines if int(target[1], 16) <= a <= at]
            if any("MMA." in text for text in body):
                bodies.append([text.split()[0] for text in body])
    return max(bodies, key=len)


# Instructions for each element of keys and values, of all kinds, in the loop: what a change should not raise unseen.
BUDGET = {"none": 4.5, "fp8": 3.0, "int4": 3.8}


@pytest.mark.parametrize(
    ("capability", "number"),
    [(90, "none"), (90, "fp8"), (90, "int4"), (80, "int8"), (89, "fp8"), (100, "int4")],
)
def test_machine_code(capability: int, number: str, tmp_path: Path) -> None:
    """Tensor cores, loads of 16 bytes that run ahead, codes that never go back to shared memory, nothing spilled."""
    from quantkit_kernels import _decode_attention

    made, given = compiled(_decode_attention, number, capability, 4)
    code = sass(made, tmp_path)
    loop = main_loop(code)
    assert capability in CAPABILITIES and made.metadata.shared <= SHARED[capability]
    assert resources(made, tmp_path)[1] <= 16 and "LDL" not in loop and "STL" not in loop
    assert any(op.startswith("HMMA.16816.F32") for op in loop)
    assert loop.count("LDGSTS.E.BYPASS.128") == 2 * given["BN"] * 128 * {"none": 16, "int4": 4}.get(number, 8) // (
        128 * 32 * given["NW"]
    )
    stores = sum(op.startswith(("STS", "STSM")) for op in loop)
    assert stores <= (7 if capability < 90 else 4)  # probabilities and two exchanges between warps
    assert not any(op.startswith(("SHFL.IDX", "SHFL.UP")) for op in loop)
    elements = 2 * given["BN"] * 128 / (32 * given["NW"])
    if capability == 90:
        assert len(loop) / elements < BUDGET[number], len(loop) / elements
    if number == "fp8" and capability >= 89:
        assert sum(op.startswith("F2FP.F16.E4M3.UNPACK_B") for op in loop) == elements / 2


@pytest.mark.parametrize(
    ("number", "constants", "columns"),
    [
        ("fp8", {"SCALES": 1, "PAGE": 16, "WINDOW": True, "START": True}, 16),
        ("int4", {"GROUPS": 2, "PAGE": 64, "CAP": True}, 4),
    ],
)
def test_machine_code_with_features(number: str, constants: dict[str, Any], columns: int, tmp_path: Path) -> None:
    from quantkit_kernels import _decode_attention

    made, _ = compiled(_decode_attention, number, 90, columns, **constants)
    loop = main_loop(sass(made, tmp_path))
    assert made.metadata.shared <= SHARED[90] and resources(made, tmp_path)[1] <= 32
    assert "LDL" not in loop and "LDGSTS.E.BYPASS.128" in loop


def test_machine_code_of_the_small_kernels(tmp_path: Path) -> None:
    from quantkit_kernels import _decode_attention, _kv_layout

    made = compile_kernel(
        _decode_attention.combine, {"SINKS": True, "D": 128, "BD": 128, "BS": 16}, 80, {"out_ptr": "*bf16"}
    )
    assert resources(made, tmp_path)[1] == 0
    constants = {"FORMAT": "int4", "SCALES": 2, "GROUPS": 2, "PAGE": 64, "COUNTS": True, "D": 128, "BD": 128}
    names = ("k_cache_ptr", "v_cache_ptr", "k_scale_ptr", "v_scale_ptr", "table_ptr", "start_ptr", "count_ptr")
    types = dict.fromkeys(names, "*i32") | {"k_ptr": "*bf16", "v_ptr": "*bf16"}
    made = compile_kernel(_kv_layout.append, constants, 80, types)
    assert resources(made, tmp_path)[1] == 0 and made.metadata.shared <= SHARED[80]
