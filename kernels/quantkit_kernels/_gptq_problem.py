"""What GPTQ's kernels work on: one or several weights of one shape, their rows on top of each other, checked.

Names and shapes are those of gptq.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit_kernels import _numbers


@dataclass(frozen=True)
class Tuning:
    """panel, block: columns a large product, a kernel; rows, sub: rows of a program, columns in its registers."""

    panel: int = 1024
    block: int = 128
    rows: int = 32
    sub: int = 16
    warps: int = 4
    refit_rows: int = 16
    refit_warps: int = 4
    unroll: int = 8


@dataclass
class Problem:
    """What the steps share, on one device, with strides that the kernels take. Rows of all problems lie together."""

    count: int  # of problems
    w: torch.Tensor  # (B N, K)
    codes: torch.Tensor  # int8, whatever they stand for
    scale: torch.Tensor  # (N, G) float32
    zero: torch.Tensor | None
    span: int
    number: _numbers.Number
    tuning: Tuning
    group: torch.Tensor  # (K,) int64, the scale of each column; (B, K) where problems have orders of their own

    @property
    def rows(self) -> int:
        """Rows of one problem."""
        return self.w.shape[0] // self.count

    def spread(self, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of each of some columns, side by side; without zero points the scale twice."""
        scale = self._spread(self.scale, columns)
        return scale, scale if self.zero is None else self._spread(self.zero, columns)

    def _spread(self, t: torch.Tensor, columns: slice) -> torch.Tensor:
        if self.group.ndim == 1:
            return t.index_select(1, self.group[columns])
        return self.by_problem(t).gather(2, self.group[:, None, columns].expand(-1, self.rows, -1)).flatten(0, 1)

    def by_problem(self, t: torch.Tensor) -> torch.Tensor:
        """Rows of all problems -> (B, N, ...), without copying."""
        return t.unflatten(0, (self.count, self.rows))

    def product(self, a: torch.Tensor, b_BKL: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        """a b of each problem, plus `base`."""
        if self.count == 1:
            return a @ b_BKL[0] if base is None else torch.addmm(base, a, b_BKL[0])
        a = self.by_problem(a)
        found = a @ b_BKL if base is None else torch.baddbmm(self.by_problem(base), a, b_BKL)
        return found.flatten(0, 1)


def pieces(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """[start, stop) in pieces of `size`, the last one shorter."""
    return [(left, min(left + size, stop)) for left in range(start, stop, size)]


def ordered(p: Problem, t: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The columns of each problem's rows in its order: (K,), or (B, K)."""
    if order.ndim == 1:
        return t.index_select(1, order)
    return p.by_problem(t).gather(2, order[:, None].expand(-1, p.rows, -1)).flatten(0, 1)


def _rows(t: torch.Tensor, n: int) -> torch.Tensor:
    """One row of scales a row of the weight, float32, each row's side by side; rows that share them share memory.

    Those of several problems, (B, N or 1, G), on top of each other.
    """
    t = t.float().contiguous()
    return t.expand(n, -1) if t.ndim == 2 else t.expand(-1, n, -1).reshape(-1, t.shape[-1])


def problem_of(
    w: torch.Tensor,
    codes: torch.Tensor | None,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    matrix: torch.Tensor,
    number: str,
    span: int,
    tuning: Tuning,
) -> Problem:
    """Checks shapes and dtypes before they can be read wrongly. Raises ValueError with the measured ones."""
    (n, k), front = w.shape[-2:], tuple(w.shape[:-2])
    if w.dtype != torch.float32 or matrix.dtype != torch.float32 or tuple(matrix.shape) != (*front, k, k):
        raise ValueError(
            f"w is {w.dtype} {tuple(w.shape)}, the matrix {matrix.dtype} {tuple(matrix.shape)}; "
            f"expected float32 (N, K) and (K, K)"
        )
    if span < 1 or tuple(scale.shape) not in (
        (*front, n, -(-k // span)),
        (*front, 1, -(-k // span)),
    ):
        raise ValueError(
            f"scales are {tuple(scale.shape)}; {k} columns, {span} a scale, need ({n} or 1, {-(-k // max(span, 1))})"
        )
    if zero is not None and zero.shape != scale.shape:
        raise ValueError(f"zero points are {tuple(zero.shape)}, scales {tuple(scale.shape)}")
    form = _numbers.get(number)
    if codes is None:
        work = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    elif codes.dtype != form.dtype or codes.shape != w.shape:
        raise ValueError(f"codes are {codes.dtype} {tuple(codes.shape)}; {number} has {form.dtype} {tuple(w.shape)}")
    else:
        work = codes.contiguous().view(torch.int8).clone()
    fine = _rows(scale, n)
    group = torch.arange(k, device=w.device) // span
    shift = None if zero is None else _rows(zero, n)
    count, flat = (front or (1,))[0], w.contiguous().view(-1, k)
    return Problem(count, flat, work.view(-1, k), fine, shift, span, form, tuning, group)
