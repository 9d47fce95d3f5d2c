"""Is a result right? What a case must pass before its time is taken.

Every check is one number and the most that it may be; NaN passes nothing. References are in float64, computed from the
stored codes and scales, so that only the arithmetic of the kernel is judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

CHUNK = 1 << 27  # elements of a float64 weight that are held at once: 1 GiB
FULL_PRODUCT = 1 << 37  # products that are still checked in full; above, rows of x are sampled
SAMPLED_ROWS = 256
ROW, COLUMN = 1.5, 4.0  # by how much the worst of many rows of many elements, of columns of few, may be worse
TINY = 1e-300


@dataclass(frozen=True)
class Check:
    """One measured number and its limit."""

    name: str
    value: float
    limit: float

    @property
    def ok(self) -> bool:
        return math.isfinite(self.value) and self.value <= self.limit

    def __str__(self) -> str:
        return f"{self.name} {self.value:.3g} (limit {self.limit:.3g})"


@dataclass(frozen=True)
class Limits:
    """Of `errors`: relative error of the whole and of any row, and of an element a * rms of its row + b * itself."""

    rel: float
    a: float
    b: float = 2**-8


# Limits of kernels.md's protocol. An output in bfloat16 alone is 1.66e-3 from its exact value.
BF16_OUT = Limits(2.0e-3, 1e-4)
BF16_OUT_ROUNDED_WEIGHT = Limits(2.7e-3, 1e-2)
# Codes with eight mantissas under one scale are rounded alike: by 2.2e-3 in the worst of rows, 1.5e-3 on average.
BF16_OUT_ROUNDED_ROW = Limits(2.7e-3, 1.25e-2)
FP32_OUT = Limits(2e-5, 2e-4, 2**-20)
FP8_PROMOTED = Limits(2.3e-3, 5e-3)
ATTENTION = Limits(4e-3, 1e-2)


def errors(
    y_MN: torch.Tensor, wanted_MN: torch.Tensor, limits: Limits, size_MN: torch.Tensor | None = None
) -> list[Check]:
    """The checks of a matrix against its float64 value.

    size_MN  what elements are of the order of; without it each row's rms
    """
    y, wanted = y_MN.double().flatten(0, -2), wanted_MN.double().flatten(0, -2)
    if y.shape != wanted.shape:
        raise ValueError(f"the result is {tuple(y_MN.shape)}, its reference {tuple(wanted_MN.shape)}")
    if size_MN is None:
        size_MN = wanted.square().mean(1, keepdim=True).sqrt().expand_as(wanted)
    apart = (y - wanted).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    whole = float(apart.norm() / wanted.norm().clamp_min(TINY))
    rows = apart.norm(dim=1) / wanted.norm(dim=1).clamp_min(TINY)
    element = (apart / (limits.a * size_MN + limits.b * wanted.abs()).clamp_min(TINY)).max()
    checks = [
        Check("relative", whole, limits.rel),
        Check("worst row", float(rows.max()), ROW * limits.rel),
        Check("worst element", float(element), 1.0),
    ]
    if y.shape[0] >= 16:  # a wrong row of W hides in a row of thousands, not among its own elements
        columns = apart.norm(dim=0) / size_MN.norm(dim=0).clamp_min(TINY)
        checks.append(Check("worst column", float(columns.max()), COLUMN * limits.rel))
    return checks


def same_bytes(first: torch.Tensor, second: torch.Tensor) -> Check:
    """Elements in which two runs on one input differ, as bytes; NaN equals itself."""
    a, b = first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8)
    return Check("elements that differ between two runs", float((a != b).sum()), 0.0)


def poisoned(run: Callable[..., torch.Tensor], inputs: Sequence[Any], device: torch.device) -> torch.Tensor:
    """The result of a run that finds NaN in the memory that torch's allocator is about to give out."""
    y = run(*inputs)
    size = y.numel() * y.element_size()
    del y
    if device.type == "cuda" and size:
        torch.full((size,), 0xFF, dtype=torch.uint8, device=device)  # 0xff.. is NaN in every float format used here
    return run(*inputs)


def sample_rows(rows: int, products_a_row: int, device: torch.device) -> torch.Tensor:
    """Indices of the rows to check: all, or the first, the last and random ones, when all would take too long."""
    if rows * products_a_row <= FULL_PRODUCT or rows <= SAMPLED_ROWS:
        return torch.arange(rows, device=device)
    generator = torch.Generator().manual_seed(rows)
    inner = 1 + torch.randperm(rows - 2, generator=generator)[: SAMPLED_ROWS - 2]
    ends = torch.tensor([0, rows - 1])
    return torch.cat([ends, inner]).sort().values.to(device)


def product(
    x_MK: torch.Tensor, weight: Callable[[int, int], torch.Tensor], n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x Wᵀ in float64, and the size that its elements are of the order of: |x| |w| / sqrt(K).

    weight  gives rows first to last of W in float64, a chunk at a time
    """
    x = x_MK.double()
    step = max(1, CHUNK // max(1, x.shape[1]))
    parts, norms = [], []
    for first in range(0, n, step):
        w = weight(first, min(n, first + step))
        parts.append(x @ w.T)
        norms.append(w.norm(dim=1))
    return torch.cat(parts, dim=1), x.norm(dim=1)[:, None] * torch.cat(norms) / max(1, x.shape[1]) ** 0.5


def weight_times(
    run: Callable[..., torch.Tensor],
    inputs: Sequence[Any],
    x_MK: torch.Tensor,
    weight: Callable[[int, int], torch.Tensor],
    n: int,
    limits: Limits,
) -> list[Check]:
    """The checks of y = x Wᵀ: against float64, every element written, two runs the same bytes."""
    y = poisoned(run, inputs, x_MK.device)
    rows = sample_rows(x_MK.shape[0], n * x_MK.shape[1], x_MK.device)
    wanted, size = product(x_MK[rows], weight, n)
    checks = errors(y[rows], wanted, limits, size)
    unwritten = float((~torch.isfinite(y)).sum())
    return [*checks, Check("elements that are not finite", unwritten, 0.0), same_bytes(y, run(*inputs))]
