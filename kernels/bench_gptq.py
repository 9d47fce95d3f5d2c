"""Times of GPTQ's kernels on one GPU, for the four stacks of linears of a Llama-3-8B layer, after a check of them.

    python kernels/bench_gptq.py --out build/bench_gptq.json [--budget 110]

First the check: scales, codes and refined codes against the plain torch functions on the CPU, for every number format.
Then seconds of each stage and shape, then the variants among which `Tuning` chooses. A stage that fails prints its
error and the others go on; what does not fit into the budget (seconds) is named and left out.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from quantkit import numerics  # noqa: E402
from quantkit.algorithms import _refine  # noqa: E402
from quantkit.algorithms import gptq as eager  # noqa: E402
from quantkit.types import QuantizedTensor, TensorScheme  # noqa: E402
from quantkit_kernels import gptq, scales  # noqa: E402
from quantkit_kernels._gptq_problem import Tuning, problem_of  # noqa: E402

DEVICE = "cuda"
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
CHECKED = (208, 1024), (256, 4096)
SAME = (4096, 2048)
HEIGHTS = (4096, 28672)
FORMATS = [
    ("int4", "group", 128, True),
    ("int4", "group", 32, False),
    ("int3", "group", 128, True),
    ("int8", "channel", None, True),
    ("mxfp4", "group", 32, True),
    ("nvfp4", "group", 16, True),
    ("mxint8", "group", 32, True),
    ("mxfp6_e3m2", "group", 32, True),
    ("fp8_e4m3", "channel", None, True),
]
COLUMN_VARIANTS = [(32, 8, 4), (32, 8, 2), (16, 8, 1), (64, 8, 4), (32, 16, 4), (32, 16, 2), (16, 8, 4)]
REFIT_VARIANTS = [(16, 4), (8, 4), (16, 8)]


class Bench:
    """Runs stages, keeps what they find, and stops in time."""

    def __init__(self, budget: float) -> None:
        self.end = time.perf_counter() + budget
        self.found: dict[str, Any] = {}

    def stage(self, name: str, work: Callable[[], Any]) -> None:
        """Runs one stage and prints its result, its error, or that there was no time left."""
        began = time.perf_counter()
        if began > self.end:
            self.found[name] = result = "left out: no time"
        else:
            try:
                result = work()
                torch.cuda.synchronize()
            except Exception as error:
                traceback.print_exc(limit=4)
                result = f"failed: {type(error).__name__}: {str(error)[:300]}"
            self.found[name] = result
        print(f"{name:34} {result}   [{time.perf_counter() - began:.1f} s]", flush=True)


def seconds(work: Callable[[], Any], repeats: int = 2) -> float:
    """The fastest of some runs, after one that compiles."""
    work()
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def microseconds(once: Callable[[], Any], calls: int = 50) -> dict[str, float]:
    """Of one call: time on the GPU, many calls queued behind a long one, and time that Python takes to queue it."""
    once()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)  # about 10 ms, so that the calls wait in the queue
    began = time.perf_counter()
    first.record()
    for _ in range(calls):
        once()
    last.record()
    queued = time.perf_counter() - began
    torch.cuda.synchronize()
    return {"gpu": round(first.elapsed_time(last) / calls * 1e3, 1), "host": round(queued / calls * 1e6, 1)}


def problem(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (n, k) and damped Hessian (k, k): columns of very different energy that share a few directions."""
    device = DEVICE
    g = torch.Generator(device).manual_seed(n + k)
    x = torch.randn(2 * k, k, generator=g, device=device)
    x += torch.randn(2 * k, 64, generator=g, device=device) @ torch.randn(64, k, generator=g, device=device) / 8
    x *= torch.randn(k, generator=g, device=device).mul(0.7).exp()
    hessian = x.T @ x / (2 * k)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return torch.randn(n, k, generator=g, device=device) * 0.02, hessian


def factored(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Order by falling diagonal, and M of H = M D Mᵀ in that order, unit upper triangular."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    upper = torch.linalg.cholesky(hessian[order][:, order].flip(0, 1)).flip(0, 1)
    return order, upper / upper.diagonal()


def objective(w: torch.Tensor, q: QuantizedTensor, hessian: torch.Tensor) -> float:
    d = (w - numerics.dequantize(q)).double()
    return float(((d @ hessian.double()) * d).sum())


def differing(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of elements that differ."""
    return float((a.cpu().float() != b.cpu().float()).float().mean())


def plain(q: QuantizedTensor, k: int) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Scales and zero points as the kernels take them, on the GPU, and the columns of each."""
    span = k // q.qparams.scale_NG.shape[1]
    fine = numerics.expand(q.qparams, q.scheme, q.codes_NK.shape)
    zero = None if fine.zero_NG is None else fine.zero_NG[:, ::span].to(DEVICE)
    return fine.scale_NG[:, ::span].to(DEVICE), zero, span


def check(number: str, strategy: Any, group: int | None, symmetric: bool, n: int, k: int) -> dict[str, Any]:
    """Shares of differing codes and the objective relative to torch on the CPU, in float32 and in TF32."""
    w_gpu, h_gpu = problem(n, k)
    order_gpu, factor_gpu = factored(h_gpu)
    w, h, order, factor = (t.cpu() for t in (w_gpu, h_gpu, order_gpu, factor_gpu))
    scheme = TensorScheme(number, strategy, group, symmetric)
    importance = h.diagonal().clone()
    module = numerics.get(number)
    qparams = module.qparams(w, scheme, scale_dtype=torch.bfloat16, search="mse", importance_K=importance)
    result: dict[str, Any] = {}
    if number.startswith("int"):
        size = group or k
        scale, zero_found = scales.search_scales_int(
            w_gpu,
            importance.to(DEVICE),
            group_size=size,
            bits=int(number[3:]),
            symmetric=symmetric,
            scale_dtype=torch.bfloat16,
        )
        result["scales"] = differing(scale, qparams.scale_NG)
        if zero_found is not None and qparams.zero_NG is not None:
            result["zeros"] = differing(zero_found, qparams.zero_NG)
    elif number == "nvfp4" and qparams.global_scale is not None:
        found = scales.search_scales_nvfp4(w_gpu, importance.to(DEVICE), qparams.global_scale.to(DEVICE))
        result["scales"] = differing(found, qparams.scale_NG)
    elif number.startswith("mx"):
        result["scales"] = differing(scales.search_scales_mx(w_gpu, importance.to(DEVICE), number), qparams.scale_NG)
    wanted = QuantizedTensor(eager._columns(w, qparams, scheme, factor, order, 128), qparams, scheme)
    refined = _refine.refine(w, wanted, h, sweeps=2, block_size=128)
    base, base_refined = objective(w, wanted, h), objective(w, refined, h)
    scale, zero, span = plain(wanted, k)
    refit = refined.qparams is not wanted.qparams
    for tf32 in (False, True):
        tag = "tf32" if tf32 else "fp32"
        codes = gptq.ldlq(w_gpu, scale, zero, factor_gpu, order_gpu, number, span=span, allow_tf32=tf32)
        result[f"ldlq {tag}"] = differing(codes, wanted.codes_NK)
        result[f"ldlq {tag} objective"] = objective(w, QuantizedTensor(codes.cpu(), qparams, scheme), h) / base - 1
        start = qparams.scale_NG.to(DEVICE) if refit else scale
        better, moved = gptq.refine(
            w_gpu,
            wanted.codes_NK.to(DEVICE),
            start,
            zero,
            h_gpu,
            number,
            span=span,
            sweeps=2,
            refit=refit,
            allow_tf32=tf32,
        )
        result[f"refine {tag}"] = differing(better, refined.codes_NK)
        new = type(qparams)(moved.cpu(), qparams.zero_NG) if refit else qparams
        change = objective(w, QuantizedTensor(better.cpu(), new, scheme), h) / base_refined - 1
        result[f"refine {tag} objective"] = change
        if refit:
            result[f"refine {tag} scales"] = differing(moved, refined.qparams.scale_NG)
    return {key: float(f"{value:.2e}") for key, value in result.items()}


def same_bits(n: int, k: int) -> str:
    """Codes of every variant of the kernel are the same bits, run after run; a missing barrier shows here."""
    w, hessian = problem(n, k)
    order, factor = factored(hessian)
    scale, _ = scales.search_scales_int(w, None, group_size=128, bits=4, symmetric=True, scale_dtype=torch.float32)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for rows, sub, warps in [*COLUMN_VARIANTS[:3], COLUMN_VARIANTS[0]]:
        tuning = Tuning(rows=rows, sub=sub, warps=warps)
        codes = gptq.ldlq(w, scale, None, factor, order, "int4", span=128, tuning=tuning)
        refined, _ = gptq.refine(w, codes, scale, None, hessian, "int4", span=128, sweeps=1, refit=False, tuning=tuning)
        seen.append((codes, refined))
    wrong = [i for i, pair in enumerate(seen) if not all(torch.equal(a, b) for a, b in zip(pair, seen[0], strict=True))]
    return "equal" if not wrong else f"DIFFERENT: {wrong}"


def layer(n: int, k: int) -> dict[str, float]:
    """Seconds of each stage for one stack of linears, int4 in groups of 128, bfloat16 scales."""
    w, hessian = problem(n, k)
    order, factor = factored(hessian)
    importance = hessian.diagonal().clone()
    search = functools.partial(
        scales.search_scales_int,
        w,
        importance,
        group_size=128,
        bits=4,
        symmetric=True,
        scale_dtype=torch.bfloat16,
    )
    scale, _ = search()
    loop = functools.partial(gptq.ldlq, w, scale, None, factor, order, "int4", span=128)
    refine = functools.partial(gptq.refine, w, loop(), scale, None, hessian, "int4", span=128)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = {
        "search": seconds(search),
        "ldlq": seconds(loop),
        "refine x2": seconds(functools.partial(refine, sweeps=2, refit=True)),
    }
    times["total"] = sum(times.values())
    times["extra GiB"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    times["descent x1"] = seconds(functools.partial(refine, sweeps=1, refit=False))
    times["factor (torch)"] = seconds(functools.partial(factored, hessian), 1)
    return {key: round(value, 4) for key, value in times.items()}


def others(n: int, k: int) -> dict[str, float]:
    """Seconds of other choices at one shape: the asymmetric and signed search, float32 products, other formats."""
    w, hessian = problem(n, k)
    order, factor = factored(hessian)
    importance = hessian.diagonal().clone()
    common: dict[str, Any] = {"group_size": 128, "bits": 4, "scale_dtype": torch.bfloat16}
    scale, _ = scales.search_scales_int(w, importance, symmetric=True, **common)
    per_channel = {**common, "group_size": k, "bits": 8}
    times = {
        "search asymmetric": seconds(lambda: scales.search_scales_int(w, importance, symmetric=False, **common)),
        "search signed": seconds(
            lambda: scales.search_scales_int(w, importance, symmetric=True, signed=True, **common)
        ),
        "search int8 channel": seconds(lambda: scales.search_scales_int(w, importance, symmetric=True, **per_channel)),
        "search nvfp4": seconds(
            lambda: scales.search_scales_nvfp4(w, importance, torch.full((1,), 1e4, device=DEVICE))
        ),
        "search mxfp4": seconds(lambda: scales.search_scales_mx(w, importance, "mxfp4")),
        "ldlq float32 products": seconds(
            lambda: gptq.ldlq(w, scale, None, factor, order, "int4", span=128, allow_tf32=False)
        ),
        "ldlq fp4": seconds(lambda: gptq.ldlq(w, scale, None, factor, order, "mxfp4", span=128)),
    }
    return {key: round(value, 4) for key, value in times.items()}


def column_kernels(rows: int, sub: int, warps: int) -> dict[str, Any]:
    """Microseconds a block of 128 columns of the kernel alone, GPTQ's loop and coordinate descent."""
    tuning = Tuning(rows=rows, sub=sub, warps=warps)
    times: dict[str, Any] = {}
    for n in HEIGHTS:
        w = torch.randn(n, 128, device=DEVICE) * 0.02
        matrix = torch.randn(128, 128, device=DEVICE) * 0.05
        matrix.fill_diagonal_(1)
        scale = torch.full((n, 1), 0.01, device=DEVICE)
        p = problem_of(w, None, scale, None, matrix, "int4", 128, tuning)
        p.codes.zero_()
        spread, carry, delta = p.spread(slice(0, 128)), torch.empty_like(w), torch.empty_like(w)
        for name, out in (("ldlq", None), ("descent", delta)):
            once = functools.partial(gptq._columns, p, 0, 0, 128, spread, p.w, matrix, carry, out)
            times[f"{name} N={n}"] = microseconds(once)
    return times


def refit_kernel(rows: int, warps: int) -> dict[str, Any]:
    """Microseconds a block of 128 columns of the kernel for scales alone."""
    tuning = Tuning(refit_rows=rows, refit_warps=warps)
    times: dict[str, Any] = {}
    for n, span in ((HEIGHTS[0], 128), (HEIGHTS[1], 128), (HEIGHTS[1], 32)):
        w = torch.randn(n, 128, device=DEVICE) * 0.02
        matrix = torch.eye(128, device=DEVICE) + 0.01
        scale = torch.full((n, 128 // span), 0.01, device=DEVICE)
        p = problem_of(w, None, scale, None, matrix, "int4", span, tuning)
        p.codes.random_(-8, 8)
        gradient, delta, carry = torch.randn_like(w), torch.empty_like(w), torch.empty_like(w)
        once = functools.partial(gptq._refit, p, 0, 128, gradient, matrix, carry, delta, torch.bfloat16)
        times[f"N={n} g={span}"] = microseconds(once)
    return times


def panels(n: int, k: int) -> dict[str, str]:
    """Seconds of GPTQ's loop and of one round of descent with panels of several widths."""
    w, hessian = problem(n, k)
    order, factor = factored(hessian)
    scale, _ = scales.search_scales_int(w, None, group_size=128, bits=4, symmetric=True, scale_dtype=torch.bfloat16)
    codes = gptq.ldlq(w, scale, None, factor, order, "int4", span=128)
    times = {}
    for panel in (128, 512, 1024, 2048):
        tuning = Tuning(panel=panel)
        shared: dict[str, Any] = {"span": 128, "tuning": tuning}
        loop = seconds(functools.partial(gptq.ldlq, w, scale, None, factor, order, "int4", **shared), 1)
        descent = seconds(
            functools.partial(gptq.refine, w, codes, scale, None, hessian, "int4", sweeps=1, refit=False, **shared),
            1,
        )
        times[str(panel)] = f"{loop:.4f} {descent:.4f}"
    return times


def everything(bench: Bench) -> None:
    """All stages, what matters most first."""

    def run(name: str, work: Callable[..., Any], *arguments: Any) -> None:
        bench.stage(name, functools.partial(work, *arguments))

    small, wide = CHECKED
    for case in FORMATS[:2]:
        run(f"check {' '.join(map(str, case[:3]))}", check, *case, *small)
    run("check int4 wide", check, *FORMATS[0], *wide)
    for name, (n, k) in SHAPES.items():
        run(f"{name} {n}x{k}", layer, n, k)
    totals = [value["total"] for value in bench.found.values() if isinstance(value, dict) and "total" in value]
    bench.found["layer"] = round(sum(totals), 4)
    print(f"whole layer: {sum(totals):.4f} s ({len(totals)} of {len(SHAPES)} shapes)", flush=True)
    run("same bits", same_bits, *SAME)
    for column_variant in COLUMN_VARIANTS:
        run(f"columns rows, sub, warps {column_variant}", column_kernels, *column_variant)
    for refit_variant in REFIT_VARIANTS:
        run(f"refit rows, warps {refit_variant}", refit_kernel, *refit_variant)
    run("panels down", panels, *SHAPES["down"])
    run("panels gate_up", panels, *SHAPES["gate_up"])
    run("others gate_up", others, *SHAPES["gate_up"])
    for case in FORMATS[2:]:
        run(f"check {' '.join(map(str, case[:3]))}", check, *case, *small)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--budget", type=float, default=110, help="seconds after which no further stage begins")
    arguments = parser.parse_args()
    if not gptq.available("cuda") or not torch.cuda.is_available():
        sys.exit("bench_gptq: no CUDA device, or no Triton")
    import triton

    bench = Bench(arguments.budget)
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    bench.found["about"] = about
    print(about, flush=True)
    try:
        everything(bench)
    finally:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(bench.found, indent=1) + "\n")


if __name__ == "__main__":
    main()
