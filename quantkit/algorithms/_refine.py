"""Improves codes and scales that are already good, with the same objective as GPTQ: tr(D H Dᵀ), D = W - Q.

GPTQ decides each column once, knowing only those before it. Two steps, repeated, use what is known afterwards; neither
can make the objective worse, and what comes out is stored and run exactly like what went in.

    scales  of a row and group, for fixed codes c:  s += c·g / (c H c),  g = D H      least squares, then rounded to
                                                                                       the stored dtype, kept if better
    codes   column by column, all others fixed:      Q_i = nearest code of Q_i + g_i / H_ii     coordinate descent
"""

from __future__ import annotations

import torch

from quantkit import numerics
from quantkit.algorithms import _kernels
from quantkit.types import QParams, QuantizedTensor


def refine(
    w_NK: torch.Tensor, q: QuantizedTensor, hessian: torch.Tensor, *, sweeps: int, block_size: int
) -> QuantizedTensor:
    """Alternates the two steps `sweeps` times.

    w_NK     (N, K) float32, what `q` stands for
    hessian  (K, K) float32, positive diagonal; the matrix that the codes were found with, damping included
    Scales change only where they are plain floats, one for a row or a group of columns; codes always may.
    """
    qparams, codes = q.qparams, q.codes_NK.clone()
    if _kernels.available(w_NK.device):
        copy = QuantizedTensor(codes, qparams, q.scheme)
        qparams = _kernels.refine(w_NK, copy, hessian, sweeps=sweeps, refit=refits(q))
        return QuantizedTensor(codes, qparams, q.scheme)
    for _ in range(sweeps):
        if refits(q):
            qparams = _scales(w_NK, QuantizedTensor(codes, qparams, q.scheme), hessian)
        _codes(w_NK, codes, QuantizedTensor(codes, qparams, q.scheme), hessian, block_size)
    return QuantizedTensor(codes, qparams, q.scheme)


def refits(q: QuantizedTensor) -> bool:
    """Whether its scales may change: plain floats, one for a row or a group of columns."""
    plain = q.qparams.scale_NG.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return plain and q.qparams.global_scale is None and q.scheme.strategy in ("channel", "group")


def _scales(w: torch.Tensor, q: QuantizedTensor, hessian: torch.Tensor) -> QParams:
    """Least-squares scales, one group of columns after the other."""
    scale = q.qparams.scale_NG.clone()
    groups = scale.shape[1]
    width = w.shape[1] // groups
    decoded = numerics.dequantize(q)
    unit = decoded / scale.float().repeat_interleave(width, 1)  # codes less their zero points
    delta = w - decoded
    for j in range(groups):
        part = slice(j * width, (j + 1) * width)
        c = unit[:, part]
        gradient = (c * (delta @ hessian[:, part])).sum(1)
        curvature = ((c @ hessian[part, part]) * c).sum(1)
        old = scale[:, j].float()
        new = torch.where(curvature > 0, old + gradient / curvature, old).to(scale.dtype)
        step = new.float() - old
        # The stored scale is what counts: kept where it lowers the objective after its rounding.
        better = (step * step * curvature - 2 * step * gradient < 0) & (new.float() * old > 0)
        step = torch.where(better, step, torch.zeros_like(step))
        scale[:, j] = torch.where(better, new, scale[:, j])
        delta[:, part] -= step[:, None] * c
    return QParams(scale, q.qparams.zero_NG)


def _codes(w: torch.Tensor, codes: torch.Tensor, q: QuantizedTensor, hessian: torch.Tensor, block_size: int) -> None:
    """One sweep of coordinate descent over all columns, written into `codes`."""
    number = numerics.get(q.scheme.number)
    fine = numerics.expand(q.qparams, q.scheme, w.shape)
    decoded = numerics.dequantize(q)
    diagonal = hessian.diagonal()
    for start in range(0, w.shape[1], block_size):
        stop = min(start + block_size, w.shape[1])
        gradient = (w - decoded) @ hessian[:, start:stop]
        for i in range(start, stop):
            one = numerics.column(fine, i)
            old = decoded[:, i : i + 1].clone()
            code = number.encode(old + gradient[:, i - start : i - start + 1] / diagonal[i], one, q.scheme)
            codes[:, i : i + 1] = code
            decoded[:, i : i + 1] = number.decode(code, one, q.scheme)
            gradient -= (decoded[:, i : i + 1] - old) * hessian[i, start:stop]
