"""Every case of the benchmark, what matters most first: a run that is out of time has done that."""

from __future__ import annotations

from pathlib import Path

import torch

import bench_activation
import bench_anchors
import bench_attention
import bench_baselines
import bench_grouped
import bench_rounded
import bench_weights
import compare_marlin
from bench_core import Case, Maker
from bench_timing import Ceilings, Timer, Times


def all_cases(marlin: Path | None = None) -> list[Case]:
    """Ceilings, ours, and the baselines that they name. `marlin`: a folder with its source, see compare_marlin.py."""
    ours = [
        *bench_weights.cases(marlin is not None),
        *bench_attention.cases(),
        *bench_rounded.cases(),
        *bench_activation.cases(),
        *bench_weights.more_cases(),
        *bench_grouped.cases(),
    ]
    beside_ours = (*bench_rounded.baselines(), *bench_baselines.attention_cases(), *bench_grouped.baselines())
    others = {case.name: case for case in beside_ours}
    if marlin is not None:
        others |= {case.name: case for case in compare_marlin.cases(marlin, bench_weights.marlin_sizes())}
    top = bench_baselines.ceilings()
    named = dict.fromkeys(name for case in ours for name in case.compared)
    named |= dict.fromkeys(f"tinygemm/int4_g128/{n}x{k}/{m}" for n, k in bench_anchors.SHAPES for m in (1, 16))
    known = {case.name for case in (*top, *ours)}
    beside = [others.get(name) or bench_baselines.matrix_case(name) for name in named if name not in known]
    return [*top, *ours, *(case for case in beside if case is not None)]


def small_cases() -> list[Case]:
    """One of each kind of kernel, at odd sizes: to be checked, not timed."""
    products = [*bench_weights.small(), *bench_rounded.small(), *bench_grouped.small()]
    return [*products, *bench_activation.small(), *bench_attention.small()]


def measured_ceilings(maker: Maker, timer: Timer) -> Ceilings:
    """Of a GPU that is not known: by a copy and by a product in bfloat16; 8 bits are taken to be twice as fast."""

    def timed(name: str) -> tuple[float, Times]:
        case = next(case for case in bench_baselines.ceilings() if case.name == name)
        work = case.make(maker)
        times = timer(work.run, work.sets, 20)
        maker.forget()
        return float(work.moved if name == "ceiling/copy" else work.operations), times

    moved, copy = timed("ceiling/copy")
    operations, square = timed("ceiling/bf16")
    torch.cuda.empty_cache()
    rate = operations / square.us * 1e6
    return Ceilings(moved / copy.us * 1e6, rate, 2 * rate)
