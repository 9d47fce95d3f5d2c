"""Cases of products of packed weights, in 2 to 8 bits, and activations in bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import bench_anchors
import bench_gate
from bench_anchors import DOWN, GATE_UP, cublas
from bench_baselines import seed_of
from bench_core import Case, Goal, Maker, Work, kernel
from bench_gate import FP32_OUT, Check, Limits, errors, product, weight_times
from bench_timing import bytes_of

TOKENS = bench_anchors.TOKENS
COUNTERS = 1 << 16  # tiles of the largest output here
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Format:
    """Weights of one table column: `kind` as quantkit_kernels.layout names it, columns of a scale (0: a row)."""

    kind: str
    group: int
    scale: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        fixed = self.kind in ("mxfp4", "mxfp8", "nvfp4")
        return self.kind if fixed else f"{self.kind}_g{self.group}" if self.group else f"{self.kind}_channel"

    @property
    def scale_name(self) -> str:
        return {torch.uint8: "e8m0", torch.float8_e4m3fn: "e4m3", torch.bfloat16: "bf16"}[self.scale]

    @property
    def rounds(self) -> bool:
        """Whether code times scale has more digits than bfloat16."""
        return self.kind not in ("mxfp4", "mxfp8", "nvfp4")

    @property
    def limits(self) -> Limits:
        """Of an output in bfloat16. NVFP4's global scale is no power of two: some paths round after it."""
        if self.kind == "fp8_e4m3" and not self.group:
            return bench_gate.BF16_OUT_ROUNDED_ROW
        rounds = self.rounds or self.kind == "nvfp4"
        return bench_gate.BF16_OUT_ROUNDED_WEIGHT if rounds else bench_gate.BF16_OUT


INT4 = Format("int4", 128)
FORMATS = {
    made.name: made
    for made in (
        INT4,
        Format("mxfp4", 32, torch.uint8),
        Format("nvfp4", 16, torch.float8_e4m3fn),
        Format("int8", 0),
        Format("fp8_e4m3", 0),
        Format("int4z", 128),
        Format("int4", 32),
        Format("int8", 128),
        Format("mxfp8", 32, torch.uint8),
        Format("int3", 128),
        Format("int2", 128),
    )
}


# Weights in few bits


@dataclass
class Weight:
    """Codes and scales as they were drawn, and the rotated packed copies."""

    packed: list[tuple[Any]]
    rows: Callable[[int, int], torch.Tensor]


def drawn(maker: Maker, form: Format, n: int, k: int) -> tuple[dict[str, torch.Tensor | None], Callable[..., Any]]:
    """Random codes and scales, which vary by row and by group, and the rows of W that they stand for in float64."""
    groups = -(-k // form.group) if form.group else 1
    generator, device = maker.generator(seed_of(form.name, n, k)), maker.device
    tens = 1.5 ** (torch.arange(n, device=device) % 4)[:, None] * 1.1 ** (torch.arange(groups, device=device) % 5)
    size = (0.75 + 0.5 * torch.rand(n, groups, generator=generator, device=device)) * tens
    zero = global_scale = None
    if form.scale == torch.uint8:
        scale = (117 + torch.log2(size * 4)).round().to(torch.uint8)
        real = torch.exp2(scale.double() - 127)
    elif form.scale == torch.float8_e4m3fn:
        scale = (size * 8).to(form.scale)
        global_scale = torch.tensor([1234.5], device=device)
        real = scale.double() / global_scale.double()
    else:
        scale = (size * (0.02 if form.kind.startswith("fp8") else 0.16 / 2 ** _bits(form.kind))).to(form.scale)
        real = scale.double()
    if form.kind in ("fp8_e4m3", "mxfp8"):
        codes = torch.randn(n, k, generator=generator, device=device).to(torch.float8_e4m3fn)
    else:
        codes = torch.randint(0, 2 ** _bits(form.kind), (n, k), generator=generator, device=device, dtype=torch.uint8)
    if form.kind.endswith("z"):
        half = 2 ** (_bits(form.kind) - 1)
        zero = torch.randint(half - 2, half + 3, (n, groups), generator=generator, device=device, dtype=torch.uint8)
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64, device=device)

    def rows(first: int, last: int) -> torch.Tensor:
        q = codes[first:last]
        if form.kind in ("mxfp4", "nvfp4"):
            value = table[q.int()]
        elif form.kind in ("fp8_e4m3", "mxfp8"):
            value = q.double()
        elif zero is not None:
            value = q.double() - _wide(zero[first:last].double(), form.group, k)
        else:
            value = q.double() - 2 ** (_bits(form.kind) - 1)
        return value.mul_(_wide(real[first:last], form.group, k))

    return {"codes_NK": codes, "scale": scale, "zero": zero, "global_scale": global_scale}, rows


def _bits(kind: str) -> int:
    return 4 if kind in ("mxfp4", "nvfp4") else int(kind.rstrip("z")[-1])


def _wide(t_NG: torch.Tensor, group: int, k: int) -> torch.Tensor:
    """Scales or zero points of each column."""
    return t_NG.repeat_interleave(group, 1)[:, :k] if group else t_NG


def weight(maker: Maker, form: Format, n: int, k: int) -> Weight:
    """A packed weight and its copies; the packing is the kernels' own."""

    def build() -> Weight:
        parts, rows = drawn(maker, form, n, k)
        packed = kernel("layout", "pack")(form.kind, group=form.group, **parts)
        tensors = [value for value in packed if isinstance(value, torch.Tensor)]
        names = [name for name, value in packed._asdict().items() if isinstance(value, torch.Tensor)]
        copies = [packed._replace(**dict(zip(names, one))) for one in maker.rotated(*tensors)]
        return Weight([(one,) for one in copies], rows)

    return maker.kept((form.name, n, k), build)


def weight_only(maker: Maker, form: Format, n: int, k: int, m: int, choice: Any = None) -> Work:
    """wxa16_linear, or one configuration of it, with the counters of split sums that a layer keeps."""
    linear, run_with = kernel("wxa16", "linear"), kernel("wxa16", "run_with")
    chosen = choice or chosen_for(problem(form, n, k, m), maker.device)
    if maker.narrow:
        n, choice = min(n, maker.narrow), chosen
    made = weight(maker, form, n, k)
    x = maker.normal(m, k, seed=seed_of("x", m, k))
    counters = torch.zeros(COUNTERS, dtype=torch.int32, device=maker.device)

    def run(packed: Any) -> torch.Tensor:
        if choice is None:
            return linear(x, packed, None, None, counters)
        return run_with(choice, x, packed, None, None, counters)

    def exact(packed: Any) -> torch.Tensor:
        """The sums in float32."""
        return run_with(chosen, x, packed, None, None, counters, out_dtype=torch.float32)

    def checks() -> list[Check]:
        found = weight_times(run, made.packed[0], x, made.rows, n, form.limits)
        if maker.device.type == "cuda" and chosen.path == "gemm":
            found += sums(exact(*made.packed[0]), x, made.rows, n, rounded=chosen.where == "before" and form.rounds)
        return [*found, Check("counters that are not zero again", float((counters != 0).sum()), 0.0)]

    moved = bytes_of(made.packed[0], x) + 2 * m * n
    also = (exact,) if maker.device.type == "cuda" and chosen.path == "gemm" else ()
    return Work(run, made.packed, checks, moved, 2 * m * n * k, note=shown(chosen), also=also)


def sums(
    y: torch.Tensor, x: torch.Tensor, rows: Callable[[int, int], torch.Tensor], n: int, *, rounded: bool
) -> list[Check]:
    """Sums in float32 against float64: no output's rounding hides a wrong group or a lost tile.

    rounded  the weight is rounded to the dtype of x before it is multiplied
    """
    some = bench_gate.sample_rows(x.shape[0], n * x.shape[1], x.device)

    def weight(first: int, last: int) -> torch.Tensor:
        return rows(first, last).to(x.dtype).double() if rounded else rows(first, last)

    wanted, size = product(x[some], weight, n)
    return [replace(one, name=f"float32 sums, {one.name}") for one in errors(y[some], wanted, FP32_OUT, size)]


def problem(form: Format, n: int, k: int, m: int) -> Any:
    """What choice.py chooses for."""
    return kernel("choice", "Problem")(form.kind, form.scale_name, n, k, form.group, m)


def chosen_for(problem: Any, device: torch.device) -> Any:
    """The configuration that the operator takes."""
    return kernel("choice", "choose")(problem, kernel("choice", "gpu_of")(device))


def shown(choice: Any) -> str:
    """A configuration in a few characters: "8x64 u2 s4 w4 p3 before"."""
    if choice.path == "dequant":
        return f"dequant {choice.slab / 1e6:.0f} MB"
    if choice.path == "hopper":
        tile = f"hopper {choice.block_m}x{choice.block_n} w{choice.warps} s{choice.stages}"
        return tile + (f" g{choice.group_m}" if choice.group_m else "")
    parts = f"{choice.block_m}x{choice.block_n} u{choice.unroll} k{choice.split} w{choice.warps} s{choice.stages}"
    return f"{parts} {choice.where}" + (f" g{choice.group_m}" if choice.group_m else "")


# All of them


def goals(form: Format, n: int, k: int, m: int) -> tuple[Goal, ...]:
    """What a weight-only product should reach."""
    base = cublas((n, k), m)
    if form == INT4:
        return bench_anchors.int4_goals((n, k), m)
    if form.kind in ("mxfp4", "nvfp4"):
        return (Goal("ratio", 1.25, (_name(INT4, n, k, m),)),)
    if form.name in ("int8_channel", "fp8_e4m3_channel") and m <= 32:
        return (Goal("floor", 0.8), Goal("ratio", 1.0, (base,)))
    return (Goal("ratio", 1.0, (base,)),) if m <= 128 else ()


def _name(form: Format, n: int, k: int, m: int) -> str:
    return f"wxa16/{form.name}/{n}x{k}/{m}"


def _weight_only(form: Format, shape: tuple[int, int], m: int, marlin: bool = False) -> Case:
    n, k = shape
    beside = (f"marlin/int4_g128/{n}x{k}/{m}",) if marlin and form == INT4 and m <= 256 else ()
    return Case(
        _name(form, n, k, m),
        functools.partial(weight_only, form=form, n=n, k=k, m=m),
        baselines=(cublas(shape, m), *beside),
        goals=goals(form, n, k, m),
    )


OTHER_TOKENS = (1, 16, 32, 64, 256, 1024)


def cases(marlin: bool = False) -> list[Case]:
    """int4 on every shape first, then what is compared with it."""
    made = [_weight_only(INT4, shape, m, marlin) for shape in bench_anchors.SHAPES for m in TOKENS]
    for name in ("mxfp4", "nvfp4", "int8_channel", "fp8_e4m3_channel"):
        made += [_weight_only(FORMATS[name], shape, m) for shape in (GATE_UP, DOWN) for m in OTHER_TOKENS]
    return made


def more_cases() -> list[Case]:
    """Formats that no target names."""
    rest = ("int4z_g128", "int4_g32", "int8_g128", "mxfp8", "int3_g128", "int2_g128")
    return [_weight_only(FORMATS[name], GATE_UP, m) for name in rest for m in (1, 16, 64)]


def marlin_sizes() -> list[tuple[int, int, int]]:
    return [(*shape, m) for shape in bench_anchors.SHAPES for m in TOKENS if m <= 256]


def small() -> list[Case]:
    """Every format at odd sizes."""
    return [
        Case(_name(form, n, k, m), functools.partial(weight_only, form=form, n=n, k=k, m=m))
        for form in FORMATS.values()
        for n, k, m in ((72, 384, 3), (136, 512, 33), (64, 256, 130))
    ]
