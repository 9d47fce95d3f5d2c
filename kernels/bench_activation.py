"""Cases of rounding activations to 8 bits, alone and behind RMSNorm or silu(gate) * up, against copy bandwidth."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bench_baselines import seed_of
from bench_core import Case, Goal, Maker, Work, kernel, with_changed
from bench_gate import Check, same_bytes
from bench_timing import bytes_of

SIZES = ((16384, 4096), (4096, 14336))  # tokens x width
SMALL = (16, 4096)
BLOCK = 128
EPS = 1e-5
COPY = Goal("bandwidth", 0.8, ("ceiling/copy",))
STEPS = {"int8": 127.5, "fp8_e4m3": 448.0}


def _token(op: Callable[..., Any], kind: str) -> Callable[..., Any]:
    return lambda x: op(x, kind)


def _block(op: Callable[..., Any], kind: str) -> Callable[..., Any]:
    return lambda x: op(x, kind, BLOCK)


def _norm(op: Callable[..., Any], kind: str) -> Callable[..., Any]:
    return lambda x, weight: op(x, weight, EPS, kind)


def _add_norm(op: Callable[..., Any], kind: str) -> Callable[..., Any]:
    return lambda x, residual, weight: op(x, residual, weight, EPS, kind)


# case: operator, its call, how many inputs are like x, whether there is a weight, columns of x by those of the codes
OPERATORS: dict[str, tuple[str, Callable[..., Any], int, bool, int]] = {
    "per_token": ("quantize_per_token", _token, 1, False, 1),
    "per_block": ("quantize_per_block", _block, 1, False, 1),
    "rms_norm": ("rms_norm_quantize", _norm, 1, True, 1),
    "add_rms_norm": ("add_rms_norm_quantize", _add_norm, 2, True, 1),
    "silu_mul": ("silu_mul_quantize", _token, 1, False, 2),
}


def inputs(maker: Maker, count: int, weight: bool, wide: int, m: int, k: int) -> list[torch.Tensor]:
    """Tokens of very different size, some with outliers; a row of zeros."""
    made = []
    for i in range(count):
        x = maker.normal(m, k * wide, seed=seed_of(m, k, i)) * 2.0 ** maker.normal(m, 1, seed=7 + i)
        x[:, :: 1 + k // 8] *= 30
        x[m // 2] = 0
        made.append(x)
    return [*made, *([1 + 0.1 * maker.normal(k, seed=9)] if weight else [])]


def _work(maker: Maker, what: str, kind: str, m: int, k: int, sizes: tuple[int, int] | None = None) -> Work:
    """sizes  elements of a program and of a thread, instead of what the operator takes"""
    name, call, count, weight, wide = OPERATORS[what]
    op, reference = kernel("activation", name), kernel("activation", f"{name}_reference")
    if sizes is not None:
        op = with_changed("_activation", op, _TILE=sizes[0], _ELEMENTS=sizes[1])
    given = inputs(maker, count, weight, wide, m, k)
    run, wanted = call(op, kind), call(reference, kind)
    results = run(*given)

    def checks() -> list[Check]:
        return against(run(*given), wanted(*given), kind) + [same_bytes(a, b) for a, b in zip(results, run(*given))]

    return Work(run, maker.rotated(*given), checks, bytes_of(given, list(results)))


def against(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...], kind: str) -> list[Check]:
    """Codes, scale and what else is returned, against the plain-torch function.

    The two may sum a norm in another order: a code may then be the other neighbour of a tie.
    """
    codes, other = found[0].float(), wanted[0].float()
    step = 1.0 if kind == "int8" else 0.125  # of e4m3, neighbours differ by an eighth of themselves at the most
    limit = step if kind == "int8" else step * other.abs().clamp_min(2**-6) * 1.01
    apart = (codes - other).abs()
    scale = (found[1] - wanted[1]).abs() / wanted[1].abs()
    checks = [
        Check("share of codes that differ", float((apart > 0).float().mean()), 1e-3),
        Check("codes that are no neighbours", float((~(apart <= limit)).sum()), 0.0),
        Check("scale, relative", float(scale.nan_to_num(nan=float("inf")).max()), 1e-2),
        Check("scale, share that differs", float((scale > 1e-6).float().mean()), 1e-2),
    ]
    for extra, expected in zip(found[2:], wanted[2:]):
        checks.append(Check("the sum, elements that differ", float((extra != expected).sum()), 0.0))
    return checks


def cases() -> list[Case]:
    made = []
    for m, k in (*SIZES, SMALL):
        for what in OPERATORS:
            for kind in STEPS:
                goals = (COPY,) if (m, k) != SMALL else ()
                make = functools.partial(_work, what=what, kind=kind, m=m, k=k)
                made.append(Case(f"act/{what}_{kind}/{k}/{m}", make, goals=goals))
    return made


def small() -> list[Case]:
    """Every operator and kind at odd sizes."""
    return [
        Case(f"act/{what}_{kind}/{k}/{m}", functools.partial(_work, what=what, kind=kind, m=m, k=k))
        for what in OPERATORS
        for kind in STEPS
        for m, k in ((3, 4104), (33, 200))
    ]
