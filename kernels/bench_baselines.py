"""What our kernels are compared with, as cases: the card's ceilings, and the libraries that come with torch.

    ceiling/...        copy, read, an empty kernel, square matrix products
    cublas/bf16        torch.mm
    tinygemm/int4_g128 torch._weight_int4pack_mm
    scaled_mm/fp8_row  torch._scaled_mm, a scale a row of each operand; the activations are quantized beforehand
    int_mm/int8        torch._int_mm, which gives int32 and applies no scales
    sdpa_flash, sdpa_cudnn  scaled_dot_product_attention by one backend, prefill and decode over a cache in bfloat16

They pass a check too, a looser one: it shows that the arguments were meant as they were given.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench_core import Case, Maker, Work
from bench_gate import ATTENTION, Check, Limits, errors, weight_times
from bench_timing import bytes_of

LIBRARY = Limits(8e-3, 5e-2, 2**-6)
LIBRARY_FP8 = Limits(1.5e-2, 1e-1, 2**-6)  # its accumulator may hold 14 bits
SCALE = 0.02
GIB = 1 << 30


def seed_of(*parts: Any) -> int:
    """A number for a case's inputs; the same in every process."""
    return sum((i + 1) * ord(c) for i, c in enumerate("/".join(map(str, parts)))) % (1 << 31)


# Ceilings


def _copy(maker: Maker) -> Work:
    source = maker.normal(GIB // 4, seed=1, dtype=torch.float32)
    target = torch.empty_like(source)

    def run(a: torch.Tensor, b: torch.Tensor) -> None:
        torch.abs(a, out=b)  # a kernel: in a graph, copy_ is left to the driver, whose copy is slower by a third

    return Work(run, [(source, target)], list, 2 * GIB)


def _read(maker: Maker) -> Work:
    return Work(torch.sum, [(maker.normal(GIB // 4, seed=1, dtype=torch.float32),)], list, GIB)


def _empty(maker: Maker) -> Work:
    return Work(torch.cuda._sleep, [(0,)], list, 0, note="torch's kernel that waits, for 0 clocks")


# Matrix products


def _cublas(maker: Maker, n: int, k: int, m: int) -> Work:
    x = maker.normal(m, k, seed=seed_of("x", m, k))
    sets = maker.kept(("bf16", n, k), lambda: maker.rotated(maker.normal(n, k, seed=seed_of("w", n, k)) * SCALE))
    w = sets[0][0]

    def run(w_NK: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, w_NK.t())

    def checks() -> list[Check]:
        return weight_times(run, (w,), x, lambda a, b: w[a:b].double(), n, LIBRARY)

    return Work(run, sets, checks, bytes_of(w, x) + 2 * m * n, 2 * m * n * k)


def _tinygemm(maker: Maker, n: int, k: int, m: int, group: int = 128) -> Work:
    x = maker.normal(m, k, seed=seed_of("x", m, k))

    def build() -> tuple[list[tuple[torch.Tensor, ...]], torch.Tensor, torch.Tensor]:
        codes = torch.randint(0, 16, (n, k), generator=maker.generator(3), device=maker.device, dtype=torch.int32)
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        packed = torch._convert_weight_to_int4pack(pairs, 8)
        scale = maker.normal(k // group, n, seed=4).abs() * 0.01 + 0.002
        both = torch.stack([scale, torch.zeros_like(scale)], dim=2).contiguous()  # value = (q - 8) * scale + zero
        return maker.rotated(packed, both), codes.to(torch.uint8), scale

    sets, codes, scale = maker.kept(("tinygemm", n, k, group), build)

    def run(packed: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
        return torch._weight_int4pack_mm(x, packed, group, both)

    def weight(first: int, last: int) -> torch.Tensor:
        wide = scale[:, first:last].double().t().repeat_interleave(group, 1)
        return (codes[first:last].double() - 8) * wide

    def checks() -> list[Check]:
        return weight_times(run, sets[0], x, weight, n, LIBRARY)

    return Work(run, sets, checks, bytes_of(sets[0], x) + 2 * m * n, 2 * m * n * k)


def fp8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes e4m3 and scales (rows, 1) of a matrix."""
    scale = x.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 448
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 and scales (rows, 1) of a matrix."""
    scale = x.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (x.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


def _scaled_mm(maker: Maker, n: int, k: int, m: int, fast: bool = False) -> Work:
    x, scale_x = fp8_rows(maker.normal(m, k, seed=seed_of("x", m, k)))

    def build() -> list[tuple[torch.Tensor, ...]]:
        return maker.rotated(*fp8_rows(maker.normal(n, k, seed=seed_of("w", n, k)) * SCALE))

    sets = maker.kept(("fp8_row", n, k), build)
    codes, scale = sets[0]

    def run(w_NK: torch.Tensor, scale_N1: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(
            x, w_NK.t(), scale_a=scale_x, scale_b=scale_N1.t(), out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    def checks() -> list[Check]:
        exact = x.double() * scale_x.double()
        return weight_times(run, sets[0], exact, lambda a, b: codes[a:b].double() * scale[a:b].double(), n, LIBRARY_FP8)

    return Work(run, sets, checks, bytes_of(sets[0], x, scale_x) + 2 * m * n, 2 * m * n * k, rate_bits=8)


def _int_mm(maker: Maker, n: int, k: int, m: int) -> Work:
    x, _ = int8_rows(maker.normal(m, k, seed=seed_of("x", m, k)))

    def build() -> list[tuple[torch.Tensor, ...]]:
        return maker.rotated(int8_rows(maker.normal(n, k, seed=seed_of("w", n, k)))[0])

    sets = maker.kept(("int8_row", n, k), build)
    codes = sets[0][0]

    def run(w_NK: torch.Tensor) -> torch.Tensor:
        return torch._int_mm(x, w_NK.t())

    def checks() -> list[Check]:
        return weight_times(run, sets[0], x.double(), lambda a, b: codes[a:b].double(), n, Limits(0.0, 0.0))[:1]

    return Work(run, sets, checks, bytes_of(codes, x) + 4 * m * n, 2 * m * n * k, rate_bits=8)


# Attention


@dataclass(frozen=True)
class Heads:
    """Sizes of one attention: `queries` is 1 for decode."""

    batch: int
    queries: int
    keys: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    @property
    def causal(self) -> bool:
        return self.queries > 1

    @property
    def operations(self) -> int:
        whole = 4 * self.batch * self.heads * self.queries * self.keys * self.dim
        return whole // 2 if self.causal else whole

    def query(self, maker: Maker) -> torch.Tensor:
        """(batch, heads, queries, dim)."""
        return self._drawn(maker, self.heads, self.queries, "q")

    def keys_and_values(self, maker: Maker) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, kv_heads, keys, dim) twice; a head's scale is its own, and keys have large channels."""
        k, v = (self._drawn(maker, self.kv_heads, self.keys, name) for name in ("k", "v"))
        steps = torch.arange(self.kv_heads, device=maker.device).view(1, -1, 1, 1)
        k[..., ::37] *= 4
        return (k * 1.1**steps).to(torch.bfloat16), (v * 1.5**steps).to(torch.bfloat16)

    def _drawn(self, maker: Maker, heads: int, length: int, name: str) -> torch.Tensor:
        """In prefill a token's heads lie side by side, as linear layers give them; a cache has a head's tokens so."""
        seed = seed_of(name, self)
        if self.causal:
            return maker.normal(self.batch, length, heads, self.dim, seed=seed).transpose(1, 2)
        return maker.normal(self.batch, heads, length, self.dim, seed=seed)


def attention_checks(
    y: torch.Tensor,
    q: torch.Tensor,
    head: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]],
    heads: Heads,
    limits: Limits = ATTENTION,
) -> list[Check]:
    """Some heads and some queries of (batch, heads, queries, dim) against float64; all that is written is finite.

    head  keys and values (keys, dim) of a sequence and one of its key heads, in float64
    """
    group = heads.heads // heads.kv_heads
    checks = [Check("elements that are not finite", float((~torch.isfinite(y)).sum()), 0.0)]
    places = {(0, 0), (heads.batch - 1, heads.heads - 1), (heads.batch // 2, heads.heads // 3)}
    if not heads.causal:
        places |= {(heads.batch // 3, h) for h in range(heads.heads)}
    rows = torch.arange(heads.queries, device=y.device)
    if heads.queries > 512:
        generator = torch.Generator().manual_seed(5)
        inner = torch.randperm(heads.queries, generator=generator)[:510].to(y.device)
        rows = torch.cat([rows[:1], rows[-1:], inner]).unique()
    found, wanted = [], []
    for b, h in sorted(places):
        keys, values = head(b, h // group)
        scores = q[b, h, rows].double() @ keys.T * heads.dim**-0.5
        if heads.causal:
            last = rows[:, None] + heads.keys - heads.queries
            scores.masked_fill_(torch.arange(heads.keys, device=y.device) > last, float("-inf"))
        wanted.append(scores.softmax(1) @ values)
        found.append(y[b, h, rows])
    return checks + errors(torch.cat(found), torch.cat(wanted), limits)


def as_they_are(k: torch.Tensor, v: torch.Tensor) -> Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """`head` of attention_checks, for keys and values (batch, kv_heads, keys, dim)."""
    return lambda b, h: (k[b, h].double(), v[b, h].double())


def _sdpa(maker: Maker, backend: str, heads: Heads) -> Work:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    which = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[backend]
    q = heads.query(maker)
    k, v = heads.keys_and_values(maker)
    sets = maker.rotated(k, v)

    def run(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(which):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=heads.causal, enable_gqa=heads.heads != heads.kv_heads
            )

    def checks() -> list[Check]:
        return attention_checks(run(*sets[0]), q, as_they_are(k, v), heads, Limits(8e-3, 5e-2))

    return Work(run, sets, checks, bytes_of(q, q, k, v), heads.operations)


def prefill_heads(length: int) -> Heads:
    """32768 tokens of Llama-3-8B's heads, in sequences of one length: four of 8192."""
    return Heads(max(1, 32768 // length), length, length)


def decode_heads(batch: int, length: int) -> Heads:
    return Heads(batch, 1, length)


def sdpa_names(what: str, size: str) -> tuple[str, str]:
    """Baselines of an attention case: "prefill" or "decode", and its size."""
    return f"sdpa_flash/{what}/{size}", f"sdpa_cudnn/{what}/{size}"


# All of them

MATRIX: dict[str, Callable[..., Work]] = {
    "cublas/bf16": _cublas,
    "tinygemm/int4_g128": _tinygemm,
    "scaled_mm/fp8_row": _scaled_mm,
    "int_mm/int8": _int_mm,
}
SQUARE = 8192
SQUARES: dict[str, Callable[..., Work]] = {
    "bf16": _cublas,
    "fp8_row": _scaled_mm,
    "fp8_row_fast": functools.partial(_scaled_mm, fast=True),
    "int8": _int_mm,
}
PREFILL_LENGTHS = (8192, 1024, 4096, 16384, 2048)
DECODE_SIZES = ((16, 8192), (1, 8192))


def matrix_name(kind: str, n: int, k: int, m: int) -> str:
    """Name of a product with `kind` of MATRIX."""
    return f"{kind}/{n}x{k}/{m}"


def matrix_case(name: str) -> Case | None:
    """The product of a name: "cublas/bf16/28672x4096/16"; None for another kind of name."""
    found = re.fullmatch(r"(\w+/\w+)/(\d+)x(\d+)/(\d+)", name)
    if not found or found[1] not in MATRIX:
        return None
    kind, (n, k, m) = found[1], map(int, found.groups()[1:])
    return Case(name, functools.partial(MATRIX[kind], n=n, k=k, m=m), ours=False)


def ceilings() -> list[Case]:
    cases = [
        Case("ceiling/copy", _copy, ours=False),
        Case("ceiling/read", _read, ours=False),
        Case("ceiling/empty", _empty, ours=False),
    ]
    for kind, make in SQUARES.items():
        cases.append(Case(f"ceiling/{kind}", functools.partial(make, n=SQUARE, k=SQUARE, m=SQUARE), ours=False))
    return cases


def attention_cases() -> list[Case]:
    """SDPA by backend."""
    cases = []
    for backend in ("flash", "cudnn"):
        for length in PREFILL_LENGTHS:
            make = functools.partial(_sdpa, backend=backend, heads=prefill_heads(length))
            cases.append(Case(f"sdpa_{backend}/prefill/{length}", make, ours=False))
        for batch, length in DECODE_SIZES:
            make = functools.partial(_sdpa, backend=backend, heads=decode_heads(batch, length))
            cases.append(Case(f"sdpa_{backend}/decode/B{batch}_S{length}", make, ours=False))
    return cases
