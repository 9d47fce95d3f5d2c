"""Normalised Hadamard matrices, and turning channels by blocks of them.

H_b is the (b, b) matrix of +1/√b and -1/√b with orthogonal rows that Sylvester's rule builds for powers of two:
H_2n = [[H_n, H_n], [H_n, -H_n]] / √2. It is symmetric and its own inverse. Each output is a sum over all b inputs with
equal weights, so that one loud channel is spread evenly over b of them. Signs in front, diag(s) H, keep it orthogonal
and let no input line up with a row of H by accident.

Because H_ab = H_a ⊗ H_b, a product with H_4096 is two products with H_64, each over one digit of the channel's number:
32 times fewer multiplications than with the matrix written out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DIGIT = 64  # the largest factor that is multiplied as a matrix
LINES = 4096  # rows or columns turned at a time: what bounds the memory of float64 copies of a large weight


def matrix(size: int) -> torch.Tensor:
    """H of `size`, a power of two: (size, size) float64."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / size**0.5


def largest(width: int) -> int:
    """The largest power of two that divides `width`."""
    return width & -width


@dataclass(frozen=True, eq=False)
class Turn:
    """The orthogonal matrix R = diag(signs) (I ⊗ H_size) over n channels; `size` divides n.

    signs  (n,) float64, each +1 or -1
    size   channels a block, a power of two; 1 leaves all but the signs
    """

    signs: torch.Tensor
    size: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x R: (..., n) float64 -> same shape."""
        return _multiply(x * self.signs.to(x.device), self.size)

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """x Rᵀ, which undoes `forward`: (..., n) float64 -> same shape."""
        return _multiply(x, self.size) * self.signs.to(x.device)


def turn(width: int, size: int, generator: torch.Generator | None) -> Turn:
    """A Turn of `width` channels by blocks of `size`; signs drawn from `generator`, or all +1 without one."""
    if generator is None:
        return Turn(torch.ones(width, dtype=torch.float64), size)
    return Turn(torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1, size)


def _multiply(x: torch.Tensor, size: int) -> torch.Tensor:
    """x (I ⊗ H_size) over the last axis.

    The number of a channel in its block is read as digits. Each step multiplies the last digit and moves it to the
    front, so that after all digits had their turn the order is the one it started with.
    """
    y = x.reshape(-1, size)
    left = size
    while left > 1:
        digit = min(left, DIGIT)
        h = matrix(digit).to(y.device)
        y = (y.reshape(-1, size // digit, digit) @ h).transpose(1, 2).reshape(-1, size)
        left //= digit
    return y.reshape(x.shape)
