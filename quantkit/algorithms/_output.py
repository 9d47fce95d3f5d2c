"""Scales by the error of the outputs: for each group of a row, over the second moments of the inputs in that group.

A weight rounded to nearest is off by d; the output by x·d, squared in the mean d H dᵀ with H = E[x xᵀ]. Weighting
squared errors by diag(H) leaves out that inputs of a group move together, which decides whether errors cancel.
AutoAWQ's clipping has the same aim, on tokens: shrink what the scale spans as long as the error of the output falls.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from quantkit import numerics
from quantkit.algorithms import _weights
from quantkit.types import QParams, TensorScheme

SPANS = tuple(1 - step / 40 for step in range(21))  # of the largest weight of a group: 1 to 0.5
ELEMENTS = {"cuda": 1 << 26}  # of a weight, judged at once


def qparams(w_NK: torch.Tensor, gram_KK: torch.Tensor, scheme: TensorScheme, *, scale_dtype: torch.dtype) -> QParams:
    """Scales of a weight (N, K) float32: of least squared error, plain or weighted, or of a narrower span, by group.

    gram_KK  the mean of x xᵀ
    Where a scale spans several rows, or there is one of the whole tensor beside it, as weighted by diag(H).
    Raises InputError when the statistics hold NaN or Inf, and for what the number format refuses.
    """
    number, importance = numerics.get(scheme.number), _weights.importance(gram_KK.diagonal())
    weighted: QParams = number.qparams(w_NK, scheme, scale_dtype=scale_dtype, search="mse", importance_K=importance)
    if scheme.strategy not in ("group", "channel") or weighted.global_scale is not None:
        return weighted
    rows = max(1, ELEMENTS.get(w_NK.device.type, 1 << 22) // w_NK.shape[1])
    parts = [_rows(w, gram_KK, scheme, scale_dtype, importance) for w in w_NK.split(rows)]
    zeros = [part.zero_NG for part in parts if part.zero_NG is not None]
    return QParams(torch.cat([part.scale_NG for part in parts]), torch.cat(zeros) if zeros else None)


def _rows(
    w: torch.Tensor, gram_KK: torch.Tensor, scheme: TensorScheme, scale_dtype: torch.dtype, importance: torch.Tensor
) -> QParams:
    """`qparams` of some rows."""
    n, k = w.shape
    groups = numerics.groups(scheme, k)
    size = k // groups
    gram = torch.stack([gram_KK[i : i + size, i : i + size] for i in range(0, k, size)]).float()
    tiles = w.view(n, groups, size)
    low, high = tiles.amin(2, keepdim=True).clamp(max=0), tiles.amax(2, keepdim=True).clamp(min=0)
    if scheme.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    number = numerics.get(scheme.number)
    best, least = None, torch.empty(0)
    for span in (None, "weighted", *SPANS):
        if isinstance(span, float):
            narrowed = torch.maximum(torch.minimum(tiles, high * span), low * span).view(n, k)
            found = number.qparams(narrowed, scheme, scale_dtype=scale_dtype, search="absmax")
        else:
            weights = importance if span else None
            found = number.qparams(w, scheme, scale_dtype=scale_dtype, search="mse", importance_K=weights)
        missed = (numerics.dequantize(numerics.quantize(w, found, scheme)) - w).view(n, groups, size).transpose(0, 1)
        error = (torch.bmm(missed, gram) * missed).sum(2).T
        if best is None:
            best, least = found, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        zero = None if best.zero_NG is None else torch.where(better, found.zero_NG, best.zero_NG)
        best = replace(best, scale_NG=torch.where(better, found.scale_NG, best.scale_NG), zero_NG=zero)
    assert best is not None
    return best
