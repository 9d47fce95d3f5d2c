"""GPTQ's loop and its refinement by the GPU kernels of quantkit_kernels, for every number format and strategy.

The torch functions of gptq.py and _refine.py are the reference. The kernels do the same with sums in another order, in
TF32: a few codes in a thousand differ, the objective by 1e-4 of itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantkit import numerics
from quantkit.types import QParams, QuantizedTensor, TensorScheme
from quantkit_kernels import gptq as kernels

available = kernels.available


def columns(
    w_NK: torch.Tensor, qparams: QParams, scheme: TensorScheme, factor_KK: torch.Tensor, order_K: torch.Tensor | None
) -> torch.Tensor:
    """Codes (N, K) by GPTQ's loop; as `gptq._columns`, with `factor_KK` unit upper triangular in the order given."""
    scale, zero, span = _scales(qparams, scheme, w_NK.shape)
    return kernels.ldlq(w_NK, scale, zero, factor_KK, order_K, scheme.number, span=span)


def columns_many(
    w_BNK: torch.Tensor,
    qparams: Sequence[QParams],
    scheme: TensorScheme,
    factor_BKK: torch.Tensor,
    order_BK: torch.Tensor | None,
) -> torch.Tensor:
    """`columns` of several weights of one shape at once: codes (B, N, K)."""
    scale, zero, span = _stacked(qparams, scheme, w_BNK.shape[1:])
    return kernels.ldlq(w_BNK, scale, zero, factor_BKK, order_BK, scheme.number, span=span)


def refine_many(
    w_BNK: torch.Tensor, given: Sequence[QuantizedTensor], hessian_BKK: torch.Tensor, *, sweeps: int, refit: bool
) -> list[QuantizedTensor]:
    """`refine` of several weights of one shape and scheme at once."""
    qparams, scheme = [q.qparams for q in given], given[0].scheme
    scale, zero, span = _stacked(qparams, scheme, w_BNK.shape[1:])
    if refit:
        scale = torch.stack([q.scale_NG for q in qparams])
    codes, scale = kernels.refine(
        w_BNK,
        torch.stack([q.codes_NK for q in given]),
        scale,
        zero,
        hessian_BKK,
        scheme.number,
        span=span,
        sweeps=sweeps,
        refit=refit,
    )
    kept = [QParams(scale[i], q.zero_NG) if refit else q for i, q in enumerate(qparams)]
    return [QuantizedTensor(codes[i], q, scheme) for i, q in enumerate(kept)]


def _stacked(
    qparams: Sequence[QParams], scheme: TensorScheme, shape: torch.Size
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """`_scales` of several, (B, N or 1, G)."""
    each = [_scales(q, scheme, shape) for q in qparams]
    zeros = [zero for _, zero, _ in each if zero is not None]
    return torch.stack([scale for scale, _, _ in each]), torch.stack(zeros) if zeros else None, each[0][2]


def refine(w_NK: torch.Tensor, q: QuantizedTensor, hessian_KK: torch.Tensor, *, sweeps: int, refit: bool) -> QParams:
    """As `_refine.refine`, into `q.codes_NK`; returns the scales.

    refit  whether scales may change: plain floats, one for a row or a group of columns
    """
    scale, zero, span = _scales(q.qparams, q.scheme, w_NK.shape)
    if refit:
        scale = q.qparams.scale_NG
    codes, scale = kernels.refine(
        w_NK, q.codes_NK, scale, zero, hessian_KK, q.scheme.number, span=span, sweeps=sweeps, refit=refit
    )
    q.codes_NK.copy_(codes)
    return QParams(scale, q.qparams.zero_NG) if refit else q.qparams


def _scales(qparams: QParams, scheme: TensorScheme, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Scales and zero points (N or 1, G) as plain floats, and the columns that share one."""
    n, k = shape
    scale, zero = qparams.scale_NG, qparams.zero_NG
    scale = numerics.e8m0(scale) if scale.dtype == torch.uint8 else scale.float()
    if qparams.global_scale is not None:
        scale = scale / qparams.global_scale
    if scheme.strategy == "block":
        assert scheme.block_shape is not None
        rows, span = scheme.block_shape
        return scale.repeat_interleave(rows, 0)[:n], None, span
    return scale, zero, k // scale.shape[1]
