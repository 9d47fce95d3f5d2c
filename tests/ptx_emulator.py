"""The few PTX instructions of the kernels' assembly, run by torch on any machine: what the text computes, to the bit.

Words are int64 tensors that hold 0 .. 2^32 - 1. Floats are computed in float64, where products of two 16-bit floats are
exact, and rounded once; subnormal numbers count, as they do in these instructions on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

WORD = 0xFFFFFFFF


def run(text: str, outputs: int, *operands: torch.Tensor) -> list[torch.Tensor]:
    """The outputs $0, $1, ... of one block of assembly; `operands` are those after them. Words, all of one shape."""
    values: dict[str, torch.Tensor] = {f"${outputs + i}": o & WORD for i, o in enumerate(operands)}
    body = re.fullmatch(r"\{ \.reg \.b32 [\w, ]+; (?:\.reg \.b16 [\w, ]+; )?(.*) \}", text)
    assert body, text
    for line in body[1].split(";"):
        if not line.strip():
            continue
        if apart := re.fullmatch(r" ?mov\.b32 \{(\w+), (\w+)\}, (\S+)", line):
            values[apart[1]], values[apart[2]] = values[apart[3]] & 0xFFFF, values[apart[3]] >> 16
            continue
        if together := re.fullmatch(r" ?mov\.b32 (\S+), \{(\w+), (\w+)\}", line):
            values[together[1]] = values[together[3]] << 16 | values[together[2]]
            continue
        name, rest = line.split(maxsplit=1)
        to, *names = [part.strip() for part in rest.split(",")]
        found = [values[n] if n in values else torch.tensor(int(n, 0)) for n in names]
        values[to] = OPS[name](*found) & WORD
    return [values[f"${i}"] for i in range(outputs)]


def prmt(a: torch.Tensor, b: torch.Tensor, select: torch.Tensor) -> torch.Tensor:
    both = (
        b << 32 | a
    )  # bytes 0 to 3 of a, 4 to 7 of b; the top bit of b's last byte may be lost in the sign, and is not used
    assert bool(((select & 0x8888) == 0).all()), "a selector that replicates signs"
    out = torch.zeros_like(a + b + select)
    for i in range(4):
        out |= (both >> ((select >> (4 * i) & 7) * 8) & 0xFF) << (8 * i)
    return out


def lop3(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(a + b + c)
    for i in range(8):
        if int(table) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def value(half: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bits of a 16-bit float to float64."""
    return half.to(torch.int16).view(dtype).double()


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bits of float64 rounded once, to nearest, ties to even."""
    digits, lowest = (8, -133) if dtype == torch.bfloat16 else (11, -24)
    _, exponent = torch.frexp(x)
    step = torch.exp2((exponent - digits).clamp(min=lowest).double())
    near = torch.round(x / step) * step  # exact: the division is by a power of two
    return near.to(dtype).view(torch.int16).long() & 0xFFFF  # a value of the dtype already, or one that overflows


def fma(dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    def both(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        def half(shift: int) -> torch.Tensor:
            x, y, z = (value(t >> shift & 0xFFFF, dtype) for t in (a, b, c))
            return rounded(x * y + z, dtype)

        return half(16) << 16 | half(0)

    return both


OPS: dict[str, Callable[..., torch.Tensor]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n,
    "shf.r.wrap.b32": lambda a, b, n: (b << 32 | a) >> (n & 31),
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "fma.rn.bf16x2": fma(torch.bfloat16),
    "fma.rn.f16x2": fma(torch.float16),
}
