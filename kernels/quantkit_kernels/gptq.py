"""GPTQ's column loop and the refinement of its result on a GPU: the objective is tr(D H Dᵀ), D = W - decoded.

    ldlq    codes column by column, each rounded to make up for the errors of those before it (arXiv 2210.17323, in the
            left-looking form of arXiv 2307.13304)
    refine  rounds of two steps: least-squares scales for fixed codes, and one sweep of coordinate descent on the codes

Columns are worked off in panels (1024), those in blocks (128). What the columns before a panel or a block contribute is
one matrix product (cuBLAS, TF32 unless told otherwise); inside a block one Triton kernel goes over the columns, each
program with its own rows. Nothing waits for the GPU, nothing is random or order-dependent: the same input on the same
device gives the same bytes.

Against the same steps in torch: for the same sums, codes, decoded values and corrections inside a block are equal to
the last bit. The sums differ, as those of any two ways to add: in float32 about 1 code in 10 000 differs, in TF32 a few
in 1000, and the objective by some 1e-4 of itself.

Several problems of one shape, such as the experts of a layer, can be solved at once: then every tensor has one more
dimension in front. A program is busy with its columns one after the other, so a small weight leaves a GPU mostly idle.

Memory beyond the arguments: `ldlq` the weight in the order of the columns and D, both (N, K) float32; `refine` D and
two panels.

    w_NK          (N, K) float32 on a GPU, or (B, N, K)
    codes_NK      (N, K): int8 of integers and mxint8, uint8 of mxfp4, nvfp4 and mxfp6, else float8
    scale_NG      (N, G), or (1, G) for all rows; float, finite, not 0, everything divided in. Column j belongs to
                  scale j // span
    zero_NG       like the scale, in codes; None when symmetric
    number        the name of a number format: "int4", "mxfp4", "nvfp4", "fp8_e4m3", ...
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

import torch

from quantkit_kernels._gptq_problem import Problem, Tuning, ordered, pieces, problem_of
from quantkit_kernels.scales import stored_name

REFIT_SPANS = (16, 32, 64, 128)  # widths of a group whose scales one kernel refits; others go by matrix products


def available(device: torch.device | str) -> bool:
    """Whether the kernels run there: an NVIDIA GPU, and Triton installed."""
    return torch.device(device).type == "cuda" and importlib.util.find_spec("triton") is not None


def ldlq(
    w_NK: torch.Tensor,
    scale_NG: torch.Tensor,
    zero_NG: torch.Tensor | None,
    factor_KK: torch.Tensor,
    order_K: torch.Tensor | None,
    number: str,
    *,
    span: int,
    allow_tf32: bool = True,
    tuning: Tuning | None = None,
) -> torch.Tensor:
    """Codes (N, K), in the weight's own order of columns.

    factor_KK  (K, K) float32, unit upper triangular M of H = M D Mᵀ, its columns in the order of `order_K`
    order_K    (K,) int64, the order in which columns are decided; None as stored
    Raises ValueError for shapes that do not belong together.
    """
    problem = problem_of(w_NK, None, scale_NG, zero_NG, factor_KK, number, span, tuning or Tuning())
    if order_K is not None:
        problem.w = ordered(problem, problem.w, order_K)
        problem.group = problem.group[order_K]
    w, block = problem.w, problem.tuning.block
    factor = factor_KK.contiguous().view(problem.count, w.shape[1], -1)  # Cholesky's columns lie side by side
    delta = torch.empty_like(w)
    with products(allow_tf32):
        for left, right in pieces(0, w.shape[1], problem.tuning.panel):
            target = w[:, left:right]
            if left:
                target = problem.product(delta[:, :left], factor[:, :left, left:right], target)
            spread = problem.spread(slice(left, right))
            for start, stop in pieces(left, right, block):
                sums = target[:, start - left : stop - left]
                if start > left:
                    sums = problem.product(delta[:, left:start], factor[:, left:start, start:stop], sums)
                _columns(problem, left, start, stop, spread, sums, factor, delta[:, start:stop], None)
    found = problem.codes if order_K is None else ordered(problem, problem.codes, torch.argsort(order_K, -1))
    return found.view(w_NK.shape).view(problem.number.dtype)


def refine(
    w_NK: torch.Tensor,
    codes_NK: torch.Tensor,
    scale_NG: torch.Tensor,
    zero_NG: torch.Tensor | None,
    hessian_KK: torch.Tensor,
    number: str,
    *,
    span: int,
    sweeps: int,
    refit: bool,
    allow_tf32: bool = True,
    tuning: Tuning | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Improved codes (N, K) and scales, (N, G) in the dtype of `scale_NG`; the arguments stay as they are.

    hessian_KK  (K, K) float32, symmetric, positive diagonal, dampening included; columns as in `w_NK`
    sweeps      rounds of both steps
    refit       whether scales may change: then they are (N, G) float32, float16 or bfloat16, the dtype they are stored
                in, to which candidates are rounded; a new scale keeps its sign
    Raises ValueError for shapes that do not belong together.
    """
    problem = problem_of(w_NK, codes_NK, scale_NG, zero_NG, hessian_KK, number, span, tuning or Tuning())
    if refit:
        stored_name(scale_NG.dtype)  # raises
        if scale_NG.shape[-2] != w_NK.shape[-2]:
            raise ValueError(f"scales {tuple(scale_NG.shape)} that rows share cannot be refitted row by row")
        problem.scale = problem.scale.clone(memory_format=torch.contiguous_format)
    hessian = hessian_KK.contiguous().view(problem.count, problem.w.shape[1], -1)
    delta = _residual(problem, slice(None))
    with products(allow_tf32):
        for _ in range(sweeps):
            if refit and span in REFIT_SPANS and problem.tuning.block % span == 0:
                _over_blocks(problem, hessian, delta, scale_NG.dtype)
            elif refit:
                _refit_byproducts(problem, hessian, delta, scale_NG.dtype)
            _over_blocks(problem, hessian, delta, None)
    scale = problem.scale.to(scale_NG.dtype).view(scale_NG.shape) if refit else scale_NG
    return problem.codes.view(w_NK.shape).view(problem.number.dtype), scale


def _over_blocks(p: Problem, hessian: torch.Tensor, delta: torch.Tensor, refit: torch.dtype | None) -> None:
    """One pass over all columns, `delta` kept up to date: new scales with `refit`, else new codes."""
    k = p.w.shape[1]
    for left, right in pieces(0, k, p.tuning.panel):
        panel = p.product(delta, hessian[:, :, left:right])
        changed = torch.empty_like(panel)  # what this pass has added to delta in this panel
        spread = p.spread(slice(left, right)) if refit is None else None
        for start, stop in pieces(left, right, p.tuning.block):
            here = slice(start - left, stop - left)
            gradient = panel[:, here]
            if start > left:
                gradient = p.product(changed[:, : start - left], hessian[:, left:start, start:stop], gradient)
            if spread is not None:
                _columns(p, left, start, stop, spread, gradient, hessian, changed[:, here], delta[:, start:stop])
            elif refit is not None:
                _refit(p, start, stop, gradient, hessian, changed[:, here], delta[:, start:stop], refit)


def _columns(
    p: Problem,
    left: int,
    start: int,
    stop: int,
    spread: tuple[torch.Tensor, torch.Tensor],
    sums: torch.Tensor,
    matrix: torch.Tensor,
    carry: torch.Tensor,
    delta: torch.Tensor | None,
) -> None:
    """The kernel over columns [start, stop): GPTQ's loop without `delta`, coordinate descent with it.

    `spread` is of the panel, whose columns begin at `left`.
    """
    from quantkit_kernels import _columns as kernels

    n, tuning = p.rows, p.tuning
    w, codes, corner = p.w[:, start:stop], p.codes[:, start:stop], matrix[:, start:stop, start:stop]
    scale, zero = (t[:, start - left : stop - left] for t in spread)
    with torch.cuda.device_of(w):
        kernels.columns[(-(-n // tuning.rows), p.count)](
            sums,
            corner,
            w,
            scale,
            zero,
            codes,
            carry,
            carry if delta is None else delta,
            n,
            stop - start,
            sums.stride(0),
            corner.stride(1),
            corner.stride(0),
            w.stride(0),
            scale.stride(0),
            zero.stride(0),
            codes.stride(0),
            carry.stride(0),
            0 if delta is None else delta.stride(0),
            DESCENT=delta is not None,
            ASYMMETRIC=p.zero is not None,
            ROWS=tuning.rows,
            SUB=tuning.sub,
            UNROLL=min(tuning.unroll, tuning.sub),
            num_warps=tuning.warps,
            num_stages=1,
            enable_fp_fusion=False,
            **p.number.constants(),
        )


def _refit(
    p: Problem,
    start: int,
    stop: int,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    carry: torch.Tensor,
    delta: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    """The kernel for the scales of columns [start, stop)."""
    from quantkit_kernels import _columns as kernels

    n, t = p.rows, p.tuning
    w, codes, corner = p.w[:, start:stop], p.codes[:, start:stop], hessian[:, start:stop, start:stop]
    with torch.cuda.device_of(w):
        kernels.refit[(-(-n // t.refit_rows), p.count)](
            gradient,
            corner,
            w,
            codes,
            p.scale,
            p.scale if p.zero is None else p.zero,
            delta,
            carry,
            n,
            stop - start,
            start // p.span,
            gradient.stride(0),
            corner.stride(1),
            corner.stride(0),
            w.stride(0),
            codes.stride(0),
            p.scale.stride(0),
            0 if p.zero is None else p.zero.stride(0),
            delta.stride(0),
            carry.stride(0),
            ASYMMETRIC=p.zero is not None,
            STORED=stored_name(dtype),
            ROWS=t.refit_rows,
            WIDTH=t.block,
            SPAN=p.span,
            UNROLL=t.unroll,
            num_warps=t.refit_warps,
            num_stages=1,
            enable_fp_fusion=False,
            **p.number.constants(),
        )


def _refit_byproducts(p: Problem, hessian: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> None:
    """Scales of groups of any width, a row's only one for instance: two matrix products a group."""
    k = p.w.shape[1]
    for j, (start, stop) in enumerate(pieces(0, k, p.span)):
        part = slice(start, stop)
        c = _residual(p, part, elements=True)
        slope = (c * p.product(delta, hessian[:, :, part])).sum(1)
        curvature = (p.product(c, hessian[:, part, part]) * c).sum(1)
        old = p.scale[:, j]
        new = torch.where(curvature > 0, old + slope / curvature, old).to(dtype).float()
        step = new - old
        better = (step * step * curvature - 2 * step * slope < 0) & (new != 0) & ((new > 0) == (old > 0))
        p.scale[:, j] = torch.where(better, new, old)
        delta[:, part] -= torch.where(better, step, torch.zeros_like(step))[:, None] * c


def _residual(p: Problem, part: slice, elements: bool = False) -> torch.Tensor:
    """w - decoded of some columns; with `elements` the codes less their zero points, before their scale."""
    from quantkit_kernels import _columns as kernels

    first, last, _ = part.indices(p.w.shape[1])
    n = p.w.shape[0]
    out = torch.empty(n, last - first, dtype=torch.float32, device=p.w.device)
    rows, width = 8, 256
    for left, right in pieces(first, last, p.tuning.panel):
        w, codes, here = p.w[:, left:right], p.codes[:, left:right], out[:, left - first : right - first]
        scale, zero = p.spread(slice(left, right))
        with torch.cuda.device_of(w):
            kernels.residual[(-(-n // rows), -(-(right - left) // width))](
                w,
                codes,
                scale,
                zero,
                here,
                n,
                right - left,
                w.stride(0),
                codes.stride(0),
                scale.stride(0),
                zero.stride(0),
                here.stride(0),
                ELEMENTS=elements,
                ASYMMETRIC=p.zero is not None,
                ROWS=rows,
                WIDTH=width,
                num_warps=4,
                enable_fp_fusion=False,
                **p.number.constants(),
            )
    return out


@contextlib.contextmanager
def products(allow_tf32: bool) -> Iterator[None]:
    """float32 matrix products in TF32 or in float32 within; afterwards torch's settings are what they were.

    torch has two ways to say this, and reading one after the other was used can raise. `allow_tf32 = ...` sets both.
    """
    matmul = torch.backends.cuda.matmul
    new = matmul.fp32_precision
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:  # only the new way was used, and says the opposite of the old one
        old = "highest" if new == "tf32" else "high"
    matmul.allow_tf32 = allow_tf32
    try:
        yield
    finally:
        matmul.allow_tf32 = old != "highest"
        if old == "medium":
            torch.set_float32_matmul_precision(old)
        matmul.fp32_precision = new
