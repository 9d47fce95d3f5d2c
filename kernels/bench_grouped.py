"""Cases of products of a mixture of experts: the rows of tokens that a router has distributed, sorted by expert.

A call reads the weights of those experts that have rows. Its inputs rotate over copies of the weights and over routes,
until the weights that are read are more than any L2 cache holds.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import bench_gate
from bench_baselines import LIBRARY, SCALE, fp8_rows, int8_rows, seed_of
from bench_core import Case, Goal, Maker, Missing, Work, kernel
from bench_gate import Check, Limits, errors
from bench_timing import bytes_of, copies_needed
from bench_weights import FORMATS, Format, drawn, shown

TOKENS = (1, 16, 64, 256, 4096)


@dataclass(frozen=True)
class Experts:
    """The weights of a layer's experts, and how many of them a token goes to."""

    count: int
    top: int
    n: int
    k: int

    @property
    def name(self) -> str:
        return f"{self.count}x{self.n}x{self.k}_top{self.top}"


QWEN3_30B = Experts(128, 8, 768, 2048)
MIXTRAL = Experts(8, 2, 14336, 4096)
MODELS = (QWEN3_30B, MIXTRAL)


# Routes, and what a result must be


def routes(maker: Maker, experts: Experts, tokens: int, count: int) -> list[torch.Tensor]:
    """Offsets of some routes: `top` experts of each token, and some experts are liked better than others."""
    found = []
    for seed in range(count):
        scores = maker.normal(tokens, experts.count, seed=seed_of("route", tokens, seed), dtype=torch.float32)
        likes = maker.normal(1, experts.count, seed=seed_of("likes", seed), dtype=torch.float32)
        chosen = (scores + 0.5 * likes).topk(experts.top, 1)[1]
        found.append(kernel("grouped", "sort_by_expert")(chosen, experts.count)[1])
    return found


def active(offsets: torch.Tensor) -> int:
    """How many experts have rows."""
    return int(torch.count_nonzero(torch.diff(offsets, prepend=offsets.new_zeros(1))))


def rotated(
    maker: Maker, copies: Sequence[Any], experts: Experts, tokens: int
) -> tuple[list[tuple[Any, torch.Tensor]], int]:
    """Copies of the weights with routes, and the bytes of weights that a call reads on the average."""
    each = bytes_of(copies[0]) / experts.count
    needed = copies_needed(int(each * active(routes(maker, experts, tokens, 1)[0])), maker.rotate)
    made = routes(maker, experts, tokens, -(-needed // len(copies)))
    sets = [(copy, offsets) for offsets in made for copy in copies]
    return sets, round(each * sum(map(active, made)) / len(made))


def grouped_checks(
    run: Callable[..., torch.Tensor],
    inputs: tuple[Any, torch.Tensor],
    x: torch.Tensor,
    rows: Callable[[int, int], torch.Tensor],
    experts: Experts,
    limits: Limits,
) -> list[Check]:
    """Against float64, expert by expert; every element written, two runs the same bytes.

    rows  of all experts' weights, one below the other
    """
    y, n = bench_gate.poisoned(run, inputs, x.device), experts.n
    some = bench_gate.sample_rows(x.shape[0], n * x.shape[1], x.device)
    ends, wanted, sizes = [0, *inputs[1].tolist()], [], []
    for e, (first, last) in enumerate(itertools.pairwise(ends)):
        mine = some[(some >= first) & (some < last)]
        if len(mine):
            weight = functools.partial(lambda a, b, e: rows(e * n + a, e * n + b), e=e)
            found, size = bench_gate.product(x[mine], weight, n)
            wanted.append(found)
            sizes.append(size)
    checks = errors(y[some], torch.cat(wanted), limits, torch.cat(sizes))
    unwritten = float((~torch.isfinite(y)).sum())
    return [
        *checks,
        Check("elements that are not finite", unwritten, 0.0),
        bench_gate.same_bytes(y, run(*inputs)),
    ]


# Ours


def weight_only(maker: Maker, form: Format, experts: Experts, tokens: int) -> Work:
    """grouped_linear."""
    linear, m = kernel("grouped", "grouped_linear"), tokens * experts.top
    problem = kernel("choice", "Problem")(form.kind, form.scale_name, experts.n, experts.k, form.group, m)
    gpu = kernel("choice", "gpu_of")(maker.device)
    choice = kernel("_grouped_choice", "choose")(problem, experts.count, gpu)
    if maker.narrow:
        experts = Experts(experts.count, experts.top, min(experts.n, maker.narrow), experts.k)
        run_with = kernel("_grouped", "linear")
        linear = functools.partial(lambda x, offsets, packed: run_with(choice, x, offsets, packed))
    n, k = experts.n, experts.k

    def build() -> tuple[list[Any], Callable[[int, int], torch.Tensor]]:
        parts, rows = drawn(maker, form, experts.count * n, k)
        whole = parts.pop("global_scale")
        pack, each = kernel("layout", "pack"), []
        for e in range(experts.count):
            mine = {name: None if t is None else t[e * n : (e + 1) * n] for name, t in parts.items()}
            each.append(pack(form.kind, group=form.group, global_scale=whole, **mine))
        packed = kernel("grouped", "stack")(each)
        tensors = {name: value for name, value in packed._asdict().items() if isinstance(value, torch.Tensor)}
        return [packed._replace(**dict(zip(tensors, one))) for one in maker.rotated(*tensors.values())], rows

    copies, rows = maker.kept(("moe", form.name, experts), build)
    x = maker.normal(m, k, seed=seed_of("x", m, k))
    sets, moved = rotated(maker, copies, experts, tokens)

    def run(packed: Any, offsets: torch.Tensor) -> torch.Tensor:
        return linear(x, offsets, packed)

    def checks() -> list[Check]:
        return grouped_checks(run, sets[0], x, rows, experts, form.limits)

    return Work(run, sets, checks, moved + bytes_of(x) + 2 * m * n, 2 * m * n * k, note=shown(choice))


def rounded_product(maker: Maker, kind: str, experts: Experts, tokens: int) -> Work:
    """grouped_w8a8: one scale a row of both."""
    linear, by_rows = kernel("grouped", "grouped_w8a8"), {"fp8": fp8_rows, "int8": int8_rows}[kind]
    count, n, k, m = experts.count, experts.n, experts.k, tokens * experts.top
    x, scale_x = by_rows(maker.normal(m, k, seed=seed_of("x", m, k)) * 1.5 ** maker.normal(m, 1, seed=5))

    def build() -> list[tuple[torch.Tensor, ...]]:
        spread = 1.5 ** maker.normal(count * n, 1, seed=6)
        codes, scale = by_rows(maker.normal(count * n, k, seed=seed_of("w", count * n, k)) * spread)
        return maker.rotated(codes.view(count, n, k), scale.view(count, n, 1))

    copies = maker.kept((f"moe {kind}", experts), build)
    codes, scale = copies[0][0].view(count * n, k), copies[0][1].view(count * n, 1)
    sets, moved = rotated(maker, copies, experts, tokens)

    def run(weight: tuple[torch.Tensor, torch.Tensor], offsets: torch.Tensor) -> torch.Tensor:
        return linear(x, scale_x, offsets, *weight, None, torch.bfloat16)

    def checks() -> list[Check]:
        exact = x.double() * scale_x.double()
        limits = bench_gate.BF16_OUT if kind == "int8" else bench_gate.FP8_PROMOTED
        return grouped_checks(
            run, sets[0], exact, lambda a, b: codes[a:b].double() * scale[a:b].double(), experts, limits
        )

    return Work(run, sets, checks, moved + bytes_of(x, scale_x) + 2 * m * n, 2 * m * n * k, rate_bits=8)


# What they are compared with


def dense_experts(maker: Maker, way: str, experts: Experts, tokens: int) -> Work:
    """Weights in bfloat16: "grouped_mm" is torch._grouped_mm; "loop" a product for each expert that has rows, which the
    host has to know."""
    if way == "grouped_mm" and not hasattr(torch, "_grouped_mm"):
        raise Missing("this torch has no _grouped_mm")
    count, n, k, m = experts.count, experts.n, experts.k, tokens * experts.top

    def build() -> list[torch.Tensor]:
        made = maker.normal(count, n, k, seed=seed_of("w", count, n, k)) * SCALE
        return [one[0] for one in maker.rotated(made)]

    copies = maker.kept(("moe bf16", experts), build)
    x = maker.normal(m, k, seed=seed_of("x", m, k))
    sets, moved = rotated(maker, copies, experts, tokens)
    spans = {id(offsets): list(itertools.pairwise([0, *offsets.tolist()])) for _, offsets in sets}

    def grouped(w_ENK: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(x, w_ENK.transpose(1, 2), offs=offsets)

    def loop(w_ENK: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        y = torch.empty(m, n, dtype=x.dtype, device=x.device)
        for e, (first, last) in enumerate(spans[id(offsets)]):
            if first < last:
                torch.mm(x[first:last], w_ENK[e].t(), out=y[first:last])
        return y

    run = grouped if way == "grouped_mm" else loop
    flat = copies[0].view(count * n, k)

    def checks() -> list[Check]:
        return grouped_checks(run, sets[0], x, lambda a, b: flat[a:b].double(), experts, LIBRARY)

    return Work(run, sets, checks, moved + bytes_of(x) + 2 * m * n, 2 * m * n * k)


# All of them


def dense_names(experts: Experts, tokens: int) -> tuple[str, str]:
    """The baselines of a case."""
    return f"grouped_mm/bf16/{experts.name}/{tokens}", f"expert_loop/bf16/{experts.name}/{tokens}"


def _case(kind: str, make: Callable[..., Work], experts: Experts, tokens: int) -> Case:
    beside = dense_names(experts, tokens)
    goals = (Goal("ratio", 1.0, beside),) if tokens <= 256 else ()
    return Case(f"moe/{kind}/{experts.name}/{tokens}", make, baselines=beside, goals=goals)


def cases() -> list[Case]:
    made = []
    for name, all_tokens in (("int4_g128", TOKENS), ("mxfp4", (1, 16, 256))):
        for experts, tokens in itertools.product(MODELS, all_tokens):
            make = functools.partial(weight_only, form=FORMATS[name], experts=experts, tokens=tokens)
            made.append(_case(name, make, experts, tokens))
    for experts, tokens in itertools.product(MODELS, (1, 64, 4096)):
        make = functools.partial(rounded_product, kind="fp8", experts=experts, tokens=tokens)
        made.append(_case("fp8", make, experts, tokens))
    return made


def baselines() -> list[Case]:
    found = []
    for experts, tokens in itertools.product(MODELS, TOKENS):
        for way, name in zip(("grouped_mm", "loop"), dense_names(experts, tokens)):
            make = functools.partial(dense_experts, way=way, experts=experts, tokens=tokens)
            found.append(Case(name, make, ours=False))
    return found


def small() -> list[Case]:
    """Every kind of weight at odd sizes."""
    experts, made = Experts(5, 2, 72, 384), []
    for form, tokens in zip(FORMATS.values(), itertools.cycle((1, 9, 70))):
        make = functools.partial(weight_only, form=form, experts=experts, tokens=tokens)
        made.append(Case(f"moe/{form.name}/{experts.name}/{tokens}", make))
    for kind, tokens in itertools.product(("int8", "fp8"), (1, 70)):
        make = functools.partial(rounded_product, kind=kind, experts=experts, tokens=tokens)
        made.append(Case(f"moe/{kind}/{experts.name}/{tokens}", make))
    return made
