"""The original Marlin kernel (int4 in groups of 128, float16) as a case of the benchmark, where its source is at hand.

    python kernels/bench.py --marlin FOLDER ...

FOLDER holds `marlin_cuda_kernel.cu` of Marlin (Apache-2.0, github.com/IST-DASLab/marlin; the source distribution of
auto-gptq 0.7.1 on PyPI has it too, in autogptq_extension/marlin). It is compiled with nvcc and ninja into build/marlin;
the binding is the one below, and codes are packed here, from Marlin's description of its layout:

    B       (K / 16, 2 N) int32: tiles of 16 x 16, in each 64 of N the order in which mma.m16n8k16's fragments lie in
            the registers of 32 threads; the eight nibbles of a word are elements 0 2 4 6 1 3 5 7 of that order
    s       (K / 128, N) float16, in each 64 columns transposed as 8 x 8
    W       (code - 8) * scale
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench_baselines import seed_of
from bench_core import Case, Maker, Missing, Work
from bench_gate import Check, Limits, weight_times
from bench_timing import bytes_of

GROUP = 128
MAX_PAR = 16
LIMITS = Limits(4e-3, 2e-2, 2**-6)  # it sums parts in float16
BUILD = Path(__file__).resolve().parents[1] / "build" / "marlin"
SOURCE = "marlin_cuda_kernel.cu"

BINDING = """
#include <ATen/cuda/CUDAContext.h>
#include <torch/extension.h>

int marlin_cuda(const void*, const void*, void*, void*, int, int, int, void*, int, int, cudaStream_t, int, int, int,
                int);

void mul(torch::Tensor a, torch::Tensor b, torch::Tensor c, torch::Tensor s, torch::Tensor locks, int64_t max_par) {
  int error = marlin_cuda(a.data_ptr(), b.data_ptr(), c.data_ptr(), s.data_ptr(), a.size(0), c.size(1), a.size(1),
                          locks.data_ptr(), a.size(1) / s.size(0), a.get_device(),
                          at::cuda::getCurrentCUDAStream(a.get_device()), -1, -1, -1, max_par);
  TORCH_CHECK(error == 0, "Marlin has no kernel for this shape: error ", error);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("mul", &mul); }
"""


def build(folder: Path) -> Any:
    """Marlin as a module with `mul`. Raises Missing without its source; ninja builds only what changed."""
    source = folder / SOURCE
    if not source.exists():
        raise Missing(f"{source} does not exist: it is a file of Marlin")
    from torch.utils import cpp_extension

    BUILD.mkdir(parents=True, exist_ok=True)
    texts = {"binding.cpp": BINDING, SOURCE: source.read_text(), "marlin_cuda_kernel.cuh": "#pragma once\n"}
    for name, text in texts.items():
        path = BUILD / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    sources = [str(BUILD / "binding.cpp"), str(BUILD / SOURCE)]
    return cpp_extension.load("marlin_cuda", sources, build_directory=str(BUILD), extra_cuda_cflags=["-O3"])


def order() -> torch.Tensor:
    """Which of the 16 x 64 elements of a tile, row times 64 plus column, is the i-th nibble: (1024,).

    Thread t holds of the 16 x 8 piece with columns 8 b..8 b + 7 the elements (row, t // 4) of rows 2 (t % 4), that plus
    1, plus 8, plus 9. A word has the pieces 2 c and 2 c + 1 of one thread, c = 0..3 one after another.
    """
    thread = torch.arange(32).view(32, 1, 1, 1)
    block = torch.arange(4).view(1, 4, 1, 1)
    piece = torch.arange(2).view(1, 1, 2, 1)
    rows = 2 * (thread % 4) + torch.tensor([0, 1, 8, 9]).view(1, 1, 1, 4)
    columns = 16 * block + 8 * piece + thread // 4
    places = (rows * 64 + columns).reshape(-1, 8)
    return places[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)


def pack(codes_NK: torch.Tensor, scale_NG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """B and s of codes 0..15 and scales; N a multiple of 64, K of 16."""
    n, k = codes_NK.shape
    tiles = codes_NK.to(torch.int32).t().reshape(k // 16, 16, n // 64, 64).permute(0, 2, 1, 3)
    nibbles = tiles.reshape(k // 16, n // 64, 1024)[..., order().to(codes_NK.device)].reshape(k // 16, -1, 8)
    words = torch.zeros(nibbles.shape[:2], dtype=torch.int32, device=codes_NK.device)
    for i in range(8):
        words |= nibbles[..., i] << 4 * i
    scale = scale_NG.t().reshape(-1, n // 64, 8, 8).transpose(2, 3).reshape(-1, n)
    return words, scale.to(torch.float16).contiguous()


def _work(maker: Maker, folder: Path, n: int, k: int, m: int) -> Work:
    marlin = build(folder)
    x = maker.normal(m, k, seed=seed_of("x", m, k), dtype=torch.float16)

    def made() -> tuple[Any, ...]:
        codes = torch.randint(0, 16, (n, k), generator=maker.generator(3), device=maker.device, dtype=torch.uint8)
        scale = (maker.normal(n, k // GROUP, seed=4).abs() * 0.01 + 0.002).to(torch.float16)
        return maker.rotated(*pack(codes, scale)), codes, scale

    sets, codes, scale = maker.kept(("marlin", n, k), made)
    locks = torch.zeros(n // 128 * MAX_PAR, dtype=torch.int32, device=maker.device)

    def run(b: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        y = torch.empty(m, n, dtype=torch.float16, device=maker.device)
        marlin.mul(x, b, y, s, locks, MAX_PAR)
        return y

    def weight(first: int, last: int) -> torch.Tensor:
        return (codes[first:last].double() - 8) * scale[first:last].double().repeat_interleave(GROUP, 1)

    def checks() -> list[Check]:
        return weight_times(run, sets[0], x, weight, n, LIMITS)

    return Work(run, sets, checks, bytes_of(sets[0], x) + 2 * m * n, 2 * m * n * k)


def name(n: int, k: int, m: int) -> str:
    return f"marlin/int4_g128/{n}x{k}/{m}"


def cases(folder: Path, sizes: list[tuple[int, int, int]]) -> list[Case]:
    """Products of sizes (N, K, M)."""

    def one(n: int, k: int, m: int) -> Case:
        return Case(name(n, k, m), lambda maker: _work(maker, folder, n, k, m), ours=False)

    return [one(*size) for size in sizes]
