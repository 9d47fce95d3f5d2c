"""GPTQ (arXiv 2210.17323) in its left-looking form, which QuIP (arXiv 2307.13304) calls LDLQ and proves equal.

It minimises the error of the layer's output, tr(D H Dᵀ) with D = W - Q and H = E[x xᵀ], greedily by column.
Factor H = M diag(d) Mᵀ with M unit upper triangular. Then tr(D H Dᵀ) = sum_i d_i |(D M)_i|², and

    for each column i:   t = W_i + sum_{j<i} (W - Q)_j M_ji        what is left to represent, errors so far included
                         Q_i = nearest code of t

Against the textbook form: the same codes with one Cholesky (K³/3) instead of factor, inverse and factor (4K³/3);
W is only read; no H⁻¹, so better conditioned. It needs scales fixed before the loop, which is what lets them be
searched: each group's scale has the least squared error with column j counted H_jj times. That search lowers the
KL divergence by an eighth at 4 bits and a third at 3 bits against scales from the absolute maximum.

Memory beyond W and H: one factor (K, K), the scales spread to (N, K), and the running difference (N, K), float32.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from quantkit import numerics
from quantkit.algorithms._refine import refine
from quantkit.errors import InputError
from quantkit.types import Notes, QParams, QuantizedTensor, Stats, TensorScheme

NEEDS: frozenset[str] = frozenset({"gram"})


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
    sweeps: int = Field(
        2, ge=0, le=100, description="Rounds of least-squares scales and coordinate descent on the codes afterwards."
    )
    block_size: int = Field(128, ge=1, description="Columns a block; changes speed, not codes.")


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
    if stats is None or stats.gram_KK is None:
        raise InputError("gptq needs calibration data: the mean of x xᵀ of this layer's inputs is missing")
    hessian = stats.gram_KK.float()
    diagonal = hessian.diagonal().clone()
    if not bool(torch.isfinite(diagonal).all()):
        raise InputError("the calibration inputs of this layer hold NaN or Inf; load the model in bfloat16 or float32")
    w = w_NK.float()
    number = numerics.get(scheme.number)
    search = "mse" if options.scale_search == "diagh" else options.scale_search
    importance = _importance(diagonal) if options.scale_search == "diagh" else None
    qparams = number.qparams(w, scheme, scale_dtype=scale_dtype, search=search, importance_K=importance)
    order = torch.argsort(diagonal, descending=True, stable=True) if options.act_order == "static" else None
    factored = _factor(hessian if order is None else hessian[order][:, order], options.dampening, notes)
    if factored is None:
        return numerics.quantize(w, qparams, scheme)
    factor, added = factored
    q = QuantizedTensor(_columns(w, qparams, scheme, factor, order, options.block_size), qparams, scheme)
    if options.sweeps:
        damped = _revived(hessian)
        damped.diagonal().add_(added)
        q = refine(w, q, damped, sweeps=options.sweeps, block_size=options.block_size)
    return q


def _importance(diagonal: torch.Tensor) -> torch.Tensor:
    """diag(H), with channels that never fired counted like the faintest one: other text may use them."""
    live = diagonal[diagonal > 0]
    return diagonal.clamp(min=float(live.min()) if live.numel() else 1.0)


def _revived(hessian: torch.Tensor) -> torch.Tensor:
    """A copy with H_jj = 1 for channels that never fired: they neither give nor take corrections."""
    copy = hessian.clone()
    diagonal = copy.diagonal()
    diagonal.copy_(torch.where(diagonal <= 0, torch.ones_like(diagonal), diagonal))
    return copy


def _factor(hessian: torch.Tensor, dampening: float, notes: Notes) -> tuple[torch.Tensor, float] | None:
    """M of H + λI = M D Mᵀ, unit upper triangular, and λ; None when H cannot be factored at all.

    A ladder, each step told in `notes`: the wanted dampening, ten times more up to 1, the same in float64.
    """
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    if bool(dead.any()):
        notes.add(
            f"{int(dead.sum())} of {len(dead)} input channels are zero on all calibration tokens; rounded to nearest"
        )
    mean = diagonal[~dead].mean() if bool((~dead).any()) else torch.ones((), device=hessian.device)
    # A product of flips turns the upper factor that is wanted into the lower one that Cholesky gives.
    damped = _revived(hessian).flip(0, 1)
    ladder = [dampening]
    while ladder[-1] < 1:
        ladder.append(min(1.0, ladder[-1] * 10))
    for dtype in (torch.float32, torch.float64):
        for step in ladder:
            trial = damped.to(dtype, copy=True)
            trial.diagonal().add_(step * mean.to(dtype))
            lower, info = torch.linalg.cholesky_ex(trial)
            if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
                if step != dampening or dtype != torch.float32:
                    notes.add(f"H was not positive definite; factored with dampening {step:g} in {dtype}")
                upper = lower.flip(0, 1)
                return (upper / upper.diagonal()).float(), step * float(mean)
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
