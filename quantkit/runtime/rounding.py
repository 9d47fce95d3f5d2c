"""Inputs rounded to what their codes stand for, where a kernel for weights alone multiplies them.

The numbers are those of numerics/_activations.py, which a test compares, but without its look at the values: nothing
waits for the GPU, so that a CUDA graph can hold it. What it refuses is not refused here: a token with NaN or Inf
becomes NaN, and a last group that is short is a group.

`round_activations` is the operator `quantkit::round_activations`. Its gradient passes straight through.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from quantkit import numerics
from quantkit.numerics import mx, nvfp4
from quantkit.numerics._minifloat import E4M3
from quantkit.numerics._tiles import divide
from quantkit.numerics.fp8 import cast
from quantkit.numerics.int import _candidate
from quantkit.types import QParams, TensorScheme


@torch.library.custom_op("quantkit::round_activations", mutates_args=())
def round_activations(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    number: str,
    strategy: str,
    group_size: int,
    symmetric: bool,
    dynamic: bool,
) -> torch.Tensor:
    """(..., K) float -> the same shape and dtype.

    scale, zero  one float and one integer, of a static scheme; NVFP4: the global scale, 448 * 6 / amax
    number, strategy, group_size, symmetric, dynamic   as `TensorScheme` has them; 0 for no group size
    """
    if x.numel() == 0:
        return x.clone()
    k = x.shape[-1]
    rows = x.reshape(1, -1) if strategy == "tensor" else x.reshape(-1, k)
    if strategy == "group":
        rows = F.pad(rows, (0, -k % group_size)).reshape(-1, group_size)
    scheme = TensorScheme(number, "channel", None, symmetric, dynamic)
    found = _rounded(rows.float(), scale, zero, scheme)
    if strategy == "group":
        found = found.reshape(x.numel() // k, -1)[:, :k]
    return found.to(x.dtype).reshape(x.shape).contiguous()


def _rounded(
    x_RB: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None, scheme: TensorScheme
) -> torch.Tensor:
    """Each row under a scale of its own, or all under the one that is given."""
    number = numerics.get(scheme.number)
    amax = x_RB.abs().amax(1, keepdim=True)
    if scheme.number == "nvfp4":
        assert scale is not None
        whole = scale.float().reshape(1)
        local = cast(divide(amax, 6.0) * whole, E4M3, torch.float8_e4m3fn).float()
        local = torch.where(local == 0, nvfp4.ZERO_GROUP, local)
        qparams = QParams(local.to(torch.float8_e4m3fn), None, whole)
    elif scale is not None:
        offset = None if zero is None else zero.reshape(1, 1)
        qparams = QParams(scale.float().reshape(1, 1), offset)
        scheme = replace(scheme, strategy="tensor")
    elif scheme.number in mx.ELEMENTS:
        qparams = QParams(mx._scale(amax, mx.ELEMENTS[scheme.number], "even"))
    elif scheme.number == "fp8_e4m3":
        spanning = divide(amax, E4M3.max)
        qparams = QParams(torch.where(spanning == 0, torch.finfo(torch.float32).eps, spanning))
    else:
        low, high = x_RB.amin(1, keepdim=True).clamp(max=0), x_RB.amax(1, keepdim=True).clamp(min=0)
        qparams = _candidate(low, high, 1.0, scheme, torch.float32)
    found: torch.Tensor = number.decode(number.encode(x_RB, qparams, scheme), qparams, scheme)
    return torch.where(torch.isfinite(amax), found, torch.nan)


@round_activations.register_fake
def _fake(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    number: str,
    strategy: str,
    group_size: int,
    symmetric: bool,
    dynamic: bool,
) -> torch.Tensor:
    return x.new_empty(x.shape)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return grad, *[None] * 7


round_activations.register_autograd(_backward)


def rounded(
    x: torch.Tensor, a: TensorScheme, scale: torch.Tensor | None = None, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """`round_activations` of a scheme."""
    found: torch.Tensor = round_activations(
        x, scale, zero, a.number, a.strategy, a.group_size or 0, a.symmetric, a.dynamic
    )
    return found


def in_reach(x: torch.Tensor, a: TensorScheme, ranks: Any) -> torch.Tensor:
    """x, with two columns more where ranks have its other columns: the least and the largest value of each token.

    ranks  the process group among which the columns are split, or None
    A scale that is found in a token must be that of the whole token, or ranks compute something else than one does.
    """
    if ranks is None or not a.dynamic or a.strategy not in ("token", "tensor"):
        return x
    ends = torch.stack((-x.detach().amin(-1), x.detach().amax(-1)), -1)
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX, ranks)
    return torch.cat((x, -ends[..., :1], ends[..., 1:]), -1)


def own_columns(found: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Without the columns that `in_reach` added."""
    return found if found.shape[-1] == x.shape[-1] else found[..., : x.shape[-1]].contiguous()
