"""Cases of products of 8-bit weights and 8-bit activations: a scale a row of both, and FP8 in blocks."""

from __future__ import annotations

import functools
from typing import Any

import torch

import bench_gate
from bench_anchors import DOWN, GATE_UP, Shape, cublas
from bench_baselines import fp8_rows, int8_rows, matrix_name, seed_of
from bench_core import Case, Goal, Maker, Work, kernel
from bench_gate import Check, weight_times
from bench_timing import bytes_of

TOKENS = (1, 16, 64, 512, 1024, 4096)
BLOCK_SHAPES = ((7168, 16384), (4096, 7168))
BLOCK_TOKENS = (64, 128, 4096)

ROW_MAKERS = {"fp8": fp8_rows, "int8": int8_rows}


def rounded_product(maker: Maker, kind: str, n: int, k: int, m: int, config: Any = None) -> Work:
    """w8a8_linear, or one configuration of it: one scale a row of both."""
    linear = kernel("w8a8", "w8a8_linear")
    if config is not None:
        linear = functools.partial(kernel("_w8a8", "linear"), config=config)
    rows = ROW_MAKERS[kind]
    x, scale_x = rows(maker.normal(m, k, seed=seed_of("x", m, k)) * 1.5 ** maker.normal(m, 1, seed=5))

    def build() -> list[tuple[torch.Tensor, ...]]:
        return maker.rotated(*rows(maker.normal(n, k, seed=seed_of("w", n, k)) * 1.5 ** maker.normal(n, 1, seed=6)))

    sets = maker.kept((f"w8a8 {kind}", n, k), build)
    codes, scale = sets[0]

    def run(w_NK: torch.Tensor, scale_N1: torch.Tensor) -> torch.Tensor:
        return linear(x, scale_x, w_NK, scale_N1, None, torch.bfloat16)

    def checks() -> list[Check]:
        exact = x.double() * scale_x.double()
        limits = bench_gate.BF16_OUT if kind == "int8" else bench_gate.FP8_PROMOTED
        return weight_times(run, sets[0], exact, lambda a, b: codes[a:b].double() * scale[a:b].double(), n, limits)

    return Work(run, sets, checks, bytes_of(sets[0], x, scale_x) + 2 * m * n, 2 * m * n * k, rate_bits=8)


def block_product(maker: Maker, n: int, k: int, m: int, config: Any = None) -> Work:
    """fp8_block_linear, one configuration of it, or torch's own: scales of 128 x 128 and of 1 x 128."""
    linear = kernel("fp8_block", "fp8_block_linear")
    if config == "library":
        linear = kernel("_fp8_block", "library")
    elif config is not None:
        linear = functools.partial(kernel("_fp8_block", "linear"), config=config)
    quantize = kernel("activation", "quantize_per_block_reference")
    x, scale_x = quantize(maker.normal(m, k, seed=seed_of("x", m, k)), "fp8_e4m3", 128)
    down, across = -(-n // 128), -(-k // 128)

    def build() -> list[tuple[torch.Tensor, ...]]:
        codes = maker.normal(n, k, seed=seed_of("w", n, k), dtype=torch.float32) * 100
        codes = codes.clamp_(-448, 448).to(torch.float8_e4m3fn)
        size = torch.rand(down, across, generator=maker.generator(8), device=maker.device)
        steps = 1.5 ** (torch.arange(down, device=maker.device) % 4)[:, None]
        return maker.rotated(codes, (0.5 + size) * steps * 1e-3)

    sets = maker.kept(("fp8_block", n, k), build)
    codes, scale = sets[0]

    def run(w_NK: torch.Tensor, scale_w: torch.Tensor) -> torch.Tensor:
        return linear(x, scale_x, w_NK, scale_w, None, torch.bfloat16)

    def rows(first: int, last: int) -> torch.Tensor:
        wide = scale.double().repeat_interleave(128, 0)[first:last].repeat_interleave(128, 1)[:, :k]
        return codes[first:last].double().mul_(wide)

    def checks() -> list[Check]:
        exact = x.double() * scale_x.double().t().repeat_interleave(128, 1)[:, :k]
        return weight_times(run, sets[0], exact, rows, n, bench_gate.FP8_PROMOTED)

    return Work(run, sets, checks, bytes_of(sets[0], x, scale_x) + 2 * m * n, 2 * m * n * k, rate_bits=8)


def _rounded(kind: str, shape: Shape, m: int) -> Case:
    n, k = shape
    library = matrix_name("scaled_mm/fp8_row" if kind == "fp8" else "int_mm/int8", n, k, m)
    goals: tuple[Goal, ...] = ()
    if kind == "fp8" and m >= 512:
        goals = (Goal("ratio", 1 / 0.9, (library,)),)
    elif kind == "fp8" and m <= 64:
        goals = (Goal("ratio", 1.0, (library,)),)
    beside = (library,) if kind == "fp8" or m > 16 else ()  # _int_mm takes no fewer
    make = functools.partial(rounded_product, kind=kind, n=n, k=k, m=m)
    return Case(f"w8a8/{kind}/{n}x{k}/{m}", make, baselines=(*beside, cublas(shape, m)), goals=goals)


def _block(shape: Shape, m: int) -> Case:
    n, k = shape
    goals = (Goal("tflops", 1000),) if (shape, m) == (BLOCK_SHAPES[0], 4096) else ()
    make = functools.partial(block_product, n=n, k=k, m=m)
    beside = (matrix_name("scaled_mm/fp8_row", n, k, m), matrix_name("scaled_mm/fp8_block", n, k, m))
    return Case(f"fp8_block/e4m3/{n}x{k}/{m}", make, baselines=beside, goals=goals)


def cases() -> list[Case]:
    made = [_rounded(kind, shape, m) for kind in ROW_MAKERS for shape in (GATE_UP, DOWN) for m in TOKENS]
    return made + [_block(shape, m) for shape in BLOCK_SHAPES for m in BLOCK_TOKENS]


def baselines() -> list[Case]:
    """torch's own product with scales of blocks."""
    return [
        Case(
            matrix_name("scaled_mm/fp8_block", n, k, m),
            functools.partial(block_product, n=n, k=k, m=m, config="library"),
            ours=False,
        )
        for n, k in BLOCK_SHAPES
        for m in BLOCK_TOKENS
    ]


def small() -> list[Case]:
    """Every product at odd sizes."""
    made = []
    for n, k, m in ((72, 144, 3), (136, 512, 33), (144, 272, 130)):
        for kind in ROW_MAKERS:
            make = functools.partial(rounded_product, kind=kind, n=n, k=k, m=m)
            made.append(Case(f"w8a8/{kind}/{n}x{k}/{m}", make))
        made.append(Case(f"fp8_block/e4m3/{n}x{k}/{m}", functools.partial(block_product, n=n, k=k, m=m)))
    return made
