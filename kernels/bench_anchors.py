"""Figures of others for the table, and what our kernels should reach: W4A16, groups of 128, on one NVIDIA H200.

The anchors were measured on 2026-11-22 with torch 2.11.0+cu130 and Triton 3.6.0 by CUDA-graph replay over rotated
weights, as bench.py times; Marlin is the original CUDA kernel, in float16. Microseconds by rows of x.
"""

from __future__ import annotations

from bench_core import Goal

DEVICE = "H200"  # part of the name of the device that the anchors were measured on
SOURCE = "2026-11-22, one H200, torch 2.11.0+cu130"

Shape = tuple[int, int]  # out_features x in_features
GATE_UP, DOWN = (28672, 4096), (4096, 14336)
SHAPES: tuple[Shape, ...] = (GATE_UP, (57344, 8192), DOWN, (6144, 4096))
NAMES = {(6144, 4096): "8B qkv", (28672, 4096): "8B gate_up", (4096, 14336): "8B down", (57344, 8192): "70B gate_up"}
TOKENS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)


def _row(*values: float | None) -> dict[int, float]:
    return {m: value for m, value in zip((1, 8, 16, 32, 64, 128, 256), values) if value is not None}


CUBLAS: dict[Shape, dict[int, float]] = {
    (6144, 4096): _row(15.8, 16.0, 16.2, 16.5, 16.5, 16.9, 21.9),
    (28672, 4096): _row(57.9, 58.5, 58.8, 59.9, 64.7, 68.8, 92.9),
    (4096, 14336): _row(32.3, 32.9, 33.3, 34.2, 36.7, 38.1, 48.7),
    (57344, 8192): _row(221.5, 222.9, 224.5, 225.6, 238.1, 256.1, 328.4),
}
MARLIN: dict[Shape, dict[int, float]] = {
    (6144, 4096): _row(11.0, 11.2, 11.5, 17.6, 23.6, 26.5, 41.2),
    (28672, 4096): _row(28.7, 29.2, 29.8, 33.9, 47.5, 86.4, 168.8),
    (4096, 14336): _row(18.7, 18.5, 19.0, 28.4, 38.1, 49.5, 83.6),
    (57344, 8192): _row(95.5, 96.8, 96.8, 113.9, 163.0, 321.9, 667.2),
}
TINYGEMM: dict[Shape, dict[int, float]] = {
    (6144, 4096): _row(9.5, 24.0, 35.9, 63.8),
    (28672, 4096): _row(33.4, 78.7, 134.4, 261),
    (4096, 14336): _row(18.8, 41.3, 68.0, 134),
    (57344, 8192): _row(119.3, 298.5, 518.6, 1022),
}
GEMLITE: dict[Shape, dict[int, float]] = {
    (6144, 4096): _row(11.0, None, 23.8, None, 43.9),
    (28672, 4096): _row(38.3, None, 90.1, None, 97.4),
    (4096, 14336): _row(20.9, None, 43.8, None, 72.2),
    (57344, 8192): _row(143.9, None, 324.0, None, 371.4),
}
PEERS = {"Marlin": MARLIN, "tinygemm": TINYGEMM, "gemlite": GEMLITE}

# Microseconds for M up to 16, then 32, 64, 128, 256; then the most that time may be of cuBLAS's at 1024 and at 4096.
_TARGETS: dict[Shape, tuple[float, ...]] = {
    (28672, 4096): (20, 25, 34, 62, 95, 1.2, 1.08),
    (57344, 8192): (75, 85, 120, 230, 345, 1.2, 1.08),
    (4096, 14336): (13, 18, 28, 36, 52, 1.25, 1.1),
    (6144, 4096): (8, 10, 14, 17, 23, 1.25, 1.1),
}


def cublas(shape: Shape, m: int) -> str:
    """Name of the baseline in bfloat16."""
    return f"cublas/bf16/{shape[0]}x{shape[1]}/{m}"


def int4_goals(shape: Shape, m: int) -> tuple[Goal, ...]:
    """Of W4A16: the target of the shape, and to be no slower than cuBLAS up to 128 rows."""
    goals = []
    if shape in _TARGETS:
        bounds = _TARGETS[shape]
        place = next((i for i, most in enumerate((16, 32, 64, 128, 256, 1024, 4096)) if m <= most), None)
        if place is not None and place < 5:
            goals.append(Goal("us", bounds[place]))
        elif place is not None:
            goals.append(Goal("ratio", bounds[place], (cublas(shape, m),)))
    if m <= 128:
        goals.append(Goal("ratio", 1.0, (cublas(shape, m),)))
    return tuple(goals)
