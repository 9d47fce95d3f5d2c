"""GPTQ (arXiv 2210.17323) in its left-looking form, which QuIP (arXiv 2307.13304) calls LDLQ and proves equal.

It minimises the error of the layer's output, tr(D H Dᵀ) with D = W - Q and H = E[x xᵀ], greedily by column.
Factor H = M diag(d) Mᵀ with M unit upper triangular. Then tr(D H Dᵀ) = sum_i d_i |(D M)_i|², and

    for each column i:   t = W_i + sum_{j<i} (W - Q)_j M_ji        what is left to represent, errors so far included
                         Q_i = nearest code of t

Against the textbook form: the same codes with one Cholesky (K³/3) instead of factor, inverse and factor (4K³/3);
W is only read; no H⁻¹, so better conditioned. It needs scales fixed before the loop, which is what lets them be
searched: each group's scale has the least squared error with column j counted H_jj times. That search lowers the
KL divergence by an eighth at 4 bits and a third at 3 bits against scales from the absolute maximum.

`pre_shift` aims at the dense model instead of at W: the inputs x of this layer come from layers that are quantized
already, the dense model would have x' in their place. The weight that makes the best of x is W + W C H⁻¹ with
C = E[(x' - x) xᵀ], by least squares; a part of the way there is rounded in W's place, since all of it fits the
calibration tokens too well.

Memory beyond W and H: one factor (K, K), the scales spread to (N, K), and the running difference (N, K), float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from quantkit import numerics, summation
from quantkit.algorithms import _kernels, _weights
from quantkit.algorithms._refine import refine, refits
from quantkit.errors import InputError
from quantkit.types import Notes, QParams, QuantizedTensor, Stats, TensorScheme


class Options(BaseModel):
    """Options of `method: gptq`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    act_order: Literal["none", "static"] = Field(
        "static",
        description="Order of the columns: none as stored, static by falling diag(H). Groups stay as stored.",
    )
    dampening: float = Field(0.01, gt=0, le=1, description="Added to diag(H), as a fraction of its mean.")
    scale_search: Literal["absmax", "mse", "diagh", "ocp", "even", "rceil", "four_six"] = Field(
        "diagh",
        description="How scales are chosen before the loop: absmax, least squared error, or that weighted by diag(H). "
        "MX formats also have ocp, even and rceil, nvfp4 has four_six.",
    )
    signed_scales: bool = Field(
        False,
        description="Search negative scales too, for symmetric integers: lower error, but not every engine reads them.",
    )
    pre_shift: float = Field(
        0.0,
        ge=0,
        le=1,
        description="How far the weight is moved first towards what makes up for the layers before it: 0 not at all, "
        "1 all the way. Runs the dense model beside the quantized one. Experts of a mixture are not moved.",
    )
    sweeps: int = Field(
        2, ge=0, le=100, description="Rounds of least-squares scales and coordinate descent on the codes afterwards."
    )
    block_size: int = Field(128, ge=1, description="Columns a block; changes speed, not codes.")


def needs(options: Options) -> frozenset[str]:
    """The statistics that `quantize` reads."""
    return frozenset({"gram", "drift"} if options.pre_shift else {"gram"})


def quantize(
    w_NK: torch.Tensor,
    scheme: TensorScheme,
    stats: Stats | None,
    *,
    options: Options,
    scale_dtype: torch.dtype,
    notes: Notes,
) -> QuantizedTensor:
    """Quantizes a weight (N, K) float against its inputs' second moments.

    Rows do not influence each other, so linears that share an input may be stacked along N and split afterwards:
    they then share one factorisation. Raises InputError when the statistics are missing or not finite.
    """
    ready = _prepared(w_NK, scheme, stats, options, scale_dtype, notes)
    w, qparams = ready.w, ready.qparams
    if ready.factor is None:
        return numerics.quantize(w, qparams, scheme)
    q = QuantizedTensor(_columns(w, qparams, scheme, ready.factor, ready.order, options.block_size), qparams, scheme)
    ready.factor = None  # memory for the same matrix, damped
    if options.sweeps:
        q = refine(w, q, ready.damped(), sweeps=options.sweeps, block_size=options.block_size)
    return q


def quantize_many(
    weights: Sequence[torch.Tensor],
    scheme: TensorScheme,
    stats: Sequence[Stats | None],
    *,
    options: Options,
    scale_dtype: torch.dtype,
    notes: Sequence[Notes],
) -> list[QuantizedTensor]:
    """`quantize` of several weights of one shape, each with its own statistics and notes: the experts of a layer.

    On a GPU at once, which takes the time of one as long as they are small; the memory of one for each.
    Raises InputError as `quantize`, with the number of the weight in front.
    """
    ready = []
    for i, (w, own, told) in enumerate(zip(weights, stats, notes, strict=True)):
        try:
            ready.append(_prepared(w, scheme, own, options, scale_dtype, told))
        except InputError as e:
            raise InputError(f"number {i} of {len(weights)}: {e}") from None
    whole = [x for x in ready if x.factor is not None]
    if whole:
        w = torch.stack([x.w for x in whole])
        factors = torch.stack([x.factor for x in whole if x.factor is not None])
        orders = [x.order for x in whole if x.order is not None]
        codes = _kernels.columns_many(
            w, [x.qparams for x in whole], scheme, factors, torch.stack(orders) if orders else None
        )
        for x in whole:
            x.factor = None
        del factors
        found = [QuantizedTensor(codes[i], x.qparams, scheme) for i, x in enumerate(whole)]
        if options.sweeps:
            damped = torch.stack([x.damped() for x in whole])
            found = _kernels.refine_many(w, found, damped, sweeps=options.sweeps, refit=refits(found[0]))
    done = iter(found if whole else ())
    return [next(done) if x in whole else numerics.quantize(x.w, x.qparams, scheme) for x in ready]


@dataclass(eq=False)
class _Ready:
    """All that the loop over columns needs. factor: unit upper triangular, None when H cannot be factored."""

    w: torch.Tensor
    hessian: torch.Tensor
    order: torch.Tensor | None
    factor: torch.Tensor | None
    added: float
    qparams: QParams

    def damped(self) -> torch.Tensor:
        """H as it was factored, columns as stored."""
        damped = _revived(self.hessian)
        damped.diagonal().add_(self.added)
        return damped


def _prepared(
    w_NK: torch.Tensor,
    scheme: TensorScheme,
    stats: Stats | None,
    options: Options,
    scale_dtype: torch.dtype,
    notes: Notes,
) -> _Ready:
    """The order of the columns, the factor of H and the scales."""
    if stats is None or stats.gram_KK is None:
        raise InputError("gptq needs calibration data: the mean of x xᵀ of this layer's inputs is missing")
    hessian = stats.gram_KK.float()
    diagonal = hessian.diagonal().clone()
    importance = _weights.importance(diagonal)
    order = torch.argsort(diagonal, descending=True, stable=True) if options.act_order == "static" else None
    factored = _factor(hessian, order, options.dampening, notes)
    w = w_NK.float()
    if options.pre_shift and factored is not None:
        w = _shifted(w, stats, factored[0], order, options.pre_shift)
    qparams = _scales(w, scheme, importance, options, scale_dtype)
    if factored is None:
        return _Ready(w, hessian, order, None, 0.0, qparams)
    upper, added = factored
    return _Ready(w, hessian, order, upper.div_(upper.diagonal().clone()), added, qparams)


def _scales(
    w: torch.Tensor, scheme: TensorScheme, importance: torch.Tensor, options: Options, dtype: torch.dtype
) -> QParams:
    """The scales that the columns' loop will use."""
    weighted = options.scale_search == "diagh"
    search: str = "mse" if weighted else options.scale_search
    if options.signed_scales and scheme.symmetric and scheme.number.startswith("int"):
        if search != "mse":
            raise InputError(f"signed_scales are searched: scale_search is mse or diagh, not {search}")
        search = "signed"
    found: QParams = numerics.get(scheme.number).qparams(
        w, scheme, scale_dtype=dtype, search=search, importance_K=importance if weighted else None
    )
    return found


def _shifted(
    w: torch.Tensor, stats: Stats, upper: torch.Tensor, order: torch.Tensor | None, share: float
) -> torch.Tensor:
    """W + share * W C (H + λI)⁻¹, with H + λI = U Uᵀ for columns in `order`."""
    if stats.drift_KK is None:
        raise InputError("pre_shift needs what the dense model has in the place of this layer's inputs")
    wanted = w @ stats.drift_KK.float()
    wanted = wanted if order is None else wanted[:, order]
    half = torch.linalg.solve_triangular(upper.T, wanted, upper=False, left=False)
    shift = torch.linalg.solve_triangular(upper, half, upper=True, left=False)
    if order is not None:
        natural = torch.empty_like(shift)
        natural[:, order] = shift
        shift = natural
    return w + share * shift


def _revived(hessian: torch.Tensor) -> torch.Tensor:
    """A copy with H_jj = 1 for channels that never fired: they neither give nor take corrections."""
    copy = hessian.clone()
    diagonal = copy.diagonal()
    diagonal.copy_(torch.where(diagonal <= 0, torch.ones_like(diagonal), diagonal))
    return copy


def _factor(
    hessian: torch.Tensor, order: torch.Tensor | None, dampening: float, notes: Notes
) -> tuple[torch.Tensor, float] | None:
    """U of H + λI = U Uᵀ for columns in `order`, upper triangular, and λ; None when H cannot be factored at all.

    A ladder, each step told in `notes`: the wanted dampening, ten times more up to 1, the same in float64. Two matrices
    of H's size are held beside H.
    """
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    if bool(dead.any()):
        notes.add(
            f"{int(dead.sum())} of {len(dead)} input channels are zero on all calibration tokens; rounded to nearest"
        )
    alive = diagonal[~dead]
    mean = summation.total(alive) / len(alive) if len(alive) else 1.0
    # The order turned around turns the upper factor that is wanted into the lower one that Cholesky gives.
    order = torch.arange(len(diagonal), device=diagonal.device) if order is None else order
    damped = hessian[order.flip(0)][:, order.flip(0)]
    undamped = torch.where(damped.diagonal() <= 0, 1.0, damped.diagonal())
    ladder = [dampening]
    while ladder[-1] < 1:
        ladder.append(min(1.0, ladder[-1] * 10))
    for dtype in (torch.float32, torch.float64):
        damped = damped.to(dtype)
        for step in ladder:
            damped.diagonal().copy_(undamped.to(dtype) + step * mean)
            with summation.one_thread():
                lower, info = torch.linalg.cholesky_ex(damped)
            if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
                if step != dampening or dtype != torch.float32:
                    notes.add(f"H was not positive definite; factored with dampening {step:g} in {dtype}")
                del damped
                return lower.flip(0, 1).float(), step * mean
    notes.add("H could not be factored at any dampening; rounded to nearest with searched scales")
    return None


def _columns(
    w: torch.Tensor,
    qparams: QParams,
    scheme: TensorScheme,
    factor: torch.Tensor,
    order: torch.Tensor | None,
    block_size: int,
) -> torch.Tensor:
    """The loop over columns -> codes (N, K), columns as in `w`."""
    if _kernels.available(w.device):
        return _kernels.columns(w, qparams, scheme, factor, order)
    number = numerics.get(scheme.number)
    fine = numerics.expand(qparams, scheme, w.shape)
    if order is not None:
        w = w[:, order]
        fine = QParams(fine.scale_NG[:, order], None if fine.zero_NG is None else fine.zero_NG[:, order])
    k = w.shape[1]
    delta = torch.zeros_like(w)
    codes: list[torch.Tensor] = []
    for start in range(0, k, block_size):
        stop = min(start + block_size, k)
        target = w[:, start:stop] + delta[:, :start] @ factor[:start, start:stop]
        for i in range(start, stop):
            column = numerics.column(fine, i)
            code = number.encode(target[:, i - start : i - start + 1], column, scheme)
            codes.append(code)
            delta[:, i : i + 1] = w[:, i : i + 1] - number.decode(code, column, scheme)
            target[:, i - start + 1 :] += delta[:, i : i + 1] * factor[i, i + 1 : stop]
    found = torch.cat(codes, 1)
    if order is None:
        return found
    natural = torch.empty_like(found)
    natural[:, order] = found
    return natural
