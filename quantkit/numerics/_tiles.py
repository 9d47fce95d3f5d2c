"""Cuts a weight into the tiles that share one scale, so that a number format only sees rows: one row, one scale.

tensor   the whole weight          channel, token   a row of it
group    group_size columns        block            block_shape; at a ragged edge the tile is filled up with zeros,
         of a row                                   which changes neither its maximum nor its error
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from quantkit import numerics
from quantkit.errors import InputError
from quantkit.types import QParams, TensorScheme

# Elements of w judged at once: what stays in a CPU's cache is judged several times faster; a GPU wants many at a time.
SEARCH_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 25}

LOOK_ELEMENTS = 1 << 25  # where they are looked at once, for their extremes

# tiles (R, size) float32, each element's importance (R, size) or None -> scales (R, 1)
Pick = Callable[[torch.Tensor, torch.Tensor | None], QParams]


def pick_scales(
    w_NK: torch.Tensor, scheme: TensorScheme, importance_K: torch.Tensor | None, pick: Pick, *, search: str
) -> QParams:
    """Calls `pick` for all tiles, some at a time, and lays out what it finds: scales (N, G) as QParams has them.

    importance_K  (K,) float, the weight of each column's squared error; None counts all alike
    Raises InputError when the weight holds NaN or Inf, or a scale does not fit its dtype.
    """
    n, k = w_NK.shape
    height, width = tile_shape(scheme, n, k)
    down, across = -(-n // height), -(-k // width)
    elements = LOOK_ELEMENTS if search == "absmax" else SEARCH_ELEMENTS.get(w_NK.device.type, 1 << 20)
    rows = height * max(1, elements // (k * height))
    importance = None if importance_K is None else _cut(importance_K.float().expand(height, k), height, width)
    parts = []
    for start in range(0, n, rows):
        tiles = _cut(w_NK[start : start + rows].float(), height, width)
        if not numerics.finite(tiles):
            raise InputError(_not_finite(w_NK))
        weight = None if importance is None else importance.repeat(tiles.shape[0] // across, 1)
        parts.append(pick(tiles, weight))
    scale = torch.cat([p.scale_NG for p in parts]).reshape(down, across)
    _check_scale(scale, scheme)
    zeros = [p.zero_NG for p in parts if p.zero_NG is not None]
    return QParams(scale, torch.cat(zeros).reshape(down, across) if zeros else None)


def check_finite(w_NK: torch.Tensor, qparams: QParams, scheme: TensorScheme) -> QParams:
    """The scales as they are. Raises InputError when the weight holds NaN or Inf, or a scale overflows its dtype."""
    if not numerics.finite(w_NK):
        raise InputError(_not_finite(w_NK))
    _check_scale(qparams.scale_NG, scheme)
    return qparams


def _check_scale(scale: torch.Tensor, scheme: TensorScheme) -> None:
    if scale.is_floating_point() and not numerics.finite(scale.float()):
        raise InputError(f"{scheme.number}: a scale overflows {scale.dtype}; store the scales in bfloat16 or float32")


def tile_shape(scheme: TensorScheme, n: int, k: int) -> tuple[int, int]:
    """Rows and columns that share one scale. Raises InputError when the group size does not divide `k`."""
    if scheme.strategy == "tensor":
        return n, k
    if scheme.strategy == "block":
        assert scheme.block_shape is not None
        return scheme.block_shape
    return 1, k // numerics.groups(scheme, k)


def divide(x: torch.Tensor, by: float) -> torch.Tensor:
    """x / by, rounded once. By a Python number, torch multiplies with 1 / by on a GPU, which is off by a last bit."""
    return x / x.new_full((), by)


def least_error(trials: Iterable[torch.Tensor], error: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Of several scales (R, 1) for each row, the one with the least error (R, 1); of equals, the earliest."""
    remaining = iter(trials)
    best = next(remaining)
    least = error(best)
    for trial in remaining:
        found = error(trial)
        best = torch.where(found < least, trial, best)
        least = torch.minimum(found, least)
    return best


def squared_error(decoded: torch.Tensor, w: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """Sum over each row of importance * (decoded - w)² -> (R, 1). Overwrites `decoded`: this is the loop that costs."""
    error = decoded.sub_(w).square_()
    if importance is not None:
        error.mul_(importance)
    return error.sum(1, keepdim=True)


def _cut(w: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(N, K) -> tiles (ceil(N / height) * ceil(K / width), height * width), row by row of tiles.

    Contiguous, because sums come out in another order when it is not.
    """
    n, k = w.shape
    if height == 1 and not k % width:
        return w.reshape(-1, width).contiguous()
    if n % height or k % width:
        w = torch.nn.functional.pad(w, (0, -k % width, 0, -n % height))
    n, k = w.shape
    return w.reshape(n // height, height, k // width, width).transpose(1, 2).reshape(-1, height * width).contiguous()


def _not_finite(w: torch.Tensor) -> str:
    bad = (~torch.isfinite(w)).nonzero()
    row, column = bad[0].tolist()
    return f"{len(bad)} of {w.numel()} values are NaN or Inf, the first at row {row}, column {column}"
