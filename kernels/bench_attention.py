"""Cases of attention: causal prefill, and one token over a cache in 16, 8 and 4 bits."""

from __future__ import annotations

import functools
from typing import Any

import torch

from bench_baselines import (
    DECODE_SIZES,
    PREFILL_LENGTHS,
    Heads,
    as_they_are,
    attention_checks,
    decode_heads,
    prefill_heads,
    sdpa_names,
)
from bench_core import Case, Goal, Maker, Work, kernel, with_changed
from bench_gate import Check, same_bytes
from bench_timing import bytes_of

NUMBERS = ("bf16", "fp8", "int8", "int4")
PAGE = 256
WAYS = ("auto", "pointers", "descriptors", "flight")


# One token over a cache


def cache(maker: Maker, number: str, heads: Heads, page: int) -> tuple[list[Any], torch.Tensor | None, Any]:
    """The cache's four tensors, filled by kv_append; the pages' table; keys and values (sequence, head) in float64.

    page  tokens of a page, in shuffled order; 0: the cache is dense
    """
    k, v = heads.keys_and_values(maker)
    pages, length = (heads.batch * heads.keys // page, page) if page else (heads.batch, heads.keys)
    table = None
    if page:
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(3))
        table = order.view(heads.batch, -1).to(torch.int32).to(maker.device)
    dtype = torch.bfloat16 if number == "bf16" else number
    tensors = list(
        kernel("kv_layout", "new_cache")(dtype, pages, heads.kv_heads, length, heads.dim, device=maker.device)
    )
    starts = torch.zeros(heads.batch, dtype=torch.int32, device=maker.device)
    kernel("kv_append", "kv_append")(k, v, *tensors, starts, table)
    if number == "bf16":
        return tensors, table, as_they_are(k, v)
    quantize = kernel("kv_layout", "quantize")

    def one(x: torch.Tensor) -> torch.Tensor:
        codes, scale, zero = quantize(x, number)
        return (codes.double() - (0 if zero is None else zero.double())) * scale.double()

    return tensors, table, lambda b, h: (one(k[b, h]), one(v[b, h]))


def decode(
    maker: Maker,
    number: str,
    heads: Heads,
    page: int = 0,
    splits: int = 0,
    sizes: tuple[int, int, int, int] | None = None,
) -> Work:
    """sizes  columns and tokens of a tile, warps and stages, instead of what the operator takes"""
    attention = kernel("decode_attention", "decode_attention")
    if sizes is not None:
        attention = with_changed("decode_attention", attention, tiling=lambda *_: sizes)
    q = heads.query(maker)
    tensors, table, head = cache(maker, number, heads, page)
    lengths = torch.full((heads.batch,), heads.keys, dtype=torch.int32, device=maker.device)
    given = [t for t in tensors if t is not None]
    sets = maker.rotated(*given)

    def run(*cached: torch.Tensor) -> torch.Tensor:
        four = cached if len(cached) == 4 else (*cached, None, None)
        return attention(q, *four, lengths, heads.dim**-0.5, table, splits=splits)[0]

    def checks() -> list[Check]:
        y = run(*sets[0])
        return [*attention_checks(y, q, head, heads), same_bytes(y, run(*sets[0]))]

    return Work(run, sets, checks, bytes_of(given, q, q), heads.operations)


# Prefill


def prefill(maker: Maker, way: str, heads: Heads) -> Work:
    """Our kernel, loading keys and values in one of its ways; "auto" is what the operator takes, perhaps SDPA."""
    attention = kernel("attention", "attention")
    q = heads.query(maker)
    k, v = heads.keys_and_values(maker)
    sets = maker.rotated(k, v)

    def run(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, heads.dim**-0.5, True, way=way)[0]

    def checks() -> list[Check]:
        y = run(*sets[0])
        return [*attention_checks(y, q, as_they_are(k, v), heads), same_bytes(y, run(*sets[0]))]

    return Work(run, sets, checks, bytes_of(q, q, k, v), heads.operations)


# All of them


def prefill_cases(ways: tuple[str, ...]) -> list[Case]:
    made = []
    for length in PREFILL_LENGTHS:
        beside = sdpa_names("prefill", str(length))
        for way in ways:
            aim: tuple[Goal, ...] = (Goal("ratio", 1.0, beside),) if way == "auto" else ()
            if way != "auto" and length == 8192:
                aim = (Goal("tflops", 450),)
            make = functools.partial(prefill, way=way, heads=prefill_heads(length))
            made.append(Case(f"prefill/{way}/{length}", make, baselines=beside, goals=aim))
    return made


def cases() -> list[Case]:
    made = prefill_cases(WAYS)
    faster = {"fp8": 1.6, "int4": 2.2}
    for batch, length in DECODE_SIZES:
        size = f"B{batch}_S{length}"
        beside = sdpa_names("decode", size)
        for number in NUMBERS:
            aim = (Goal("ratio", 1 / faster[number], beside),) if number in faster and batch == 16 else ()
            make = functools.partial(decode, number=number, heads=decode_heads(batch, length))
            made.append(Case(f"decode/{number}/{size}", make, baselines=beside, goals=aim))
        make = functools.partial(decode, number="fp8", heads=decode_heads(batch, length), page=PAGE)
        made.append(Case(f"decode/fp8_paged/{size}", make, baselines=beside))
    return made


def small() -> list[Case]:
    heads = Heads(2, 1, 96, heads=6, kv_heads=2, dim=64)
    made = [Case(f"decode/{number}/small", functools.partial(decode, number=number, heads=heads)) for number in NUMBERS]
    made.append(Case("decode/int4_paged/small", functools.partial(decode, number="int4", heads=heads, page=32)))
    for way in WAYS:
        several = Heads(2, 77, 77, heads=4, kv_heads=2, dim=64)
        made.append(Case(f"prefill/{way}/small", functools.partial(prefill, way=way, heads=several)))
    return made
