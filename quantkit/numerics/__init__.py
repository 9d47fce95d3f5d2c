"""Number formats: what a code means. One file a family; the file's `NUMBERS` are the names it registers."""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
from types import ModuleType

import torch

from quantkit.errors import InputError
from quantkit.types import QParams, QuantizedTensor, TensorScheme


@functools.cache
def registry() -> dict[str, ModuleType]:
    """Number name ("int4") -> module with qparams, encode, decode. Found by listing this folder."""
    found: dict[str, ModuleType] = {}
    for info in pkgutil.iter_modules(__path__):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"{__name__}.{info.name}")
            found.update(dict.fromkeys(module.NUMBERS, module))
    return found


def get(number: str) -> ModuleType:
    """The module of a number format. Raises InputError with the known names."""
    formats = registry()
    if number not in formats:
        raise InputError(f"unknown number format {number!r}; known: {', '.join(sorted(formats))}")
    return formats[number]


def check_search(number: str, search: str) -> None:
    """Raises InputError, with the known names, when a number format has no such way of choosing scales."""
    known = get(number).SEARCHES
    if search not in known:
        raise InputError(f"{number} has no scale search {search!r}; known: {', '.join(known)}")


def quantize(w_NK: torch.Tensor, qparams: QParams, scheme: TensorScheme) -> QuantizedTensor:
    """Rounds each weight to the nearest code under the given scales (N, K) -> QuantizedTensor."""
    return QuantizedTensor(get(scheme.number).encode(w_NK, qparams, scheme), qparams, scheme)


def dequantize(q: QuantizedTensor) -> torch.Tensor:
    """The weight that the codes stand for, float32 (N, K), before any rounding to the model's dtype."""
    return get(q.scheme.number).decode(q.codes_NK, q.qparams, q.scheme)


def finite(t: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf.

    NaN and Inf pass through a sum, which takes a sixth of the time of the extremes; those tell when it overflows.
    """
    return not t.numel() or math.isfinite(t.sum()) or all(math.isfinite(extreme) for extreme in t.aminmax())


def groups(scheme: TensorScheme, k: int) -> int:
    """Number of scales along a row of `k` columns. Raises InputError when the group size does not divide it."""
    if scheme.strategy in ("tensor", "channel", "token"):
        return 1
    if scheme.strategy == "block":
        assert scheme.block_shape is not None
        return -(-k // scheme.block_shape[1])
    assert scheme.group_size is not None
    if k % scheme.group_size:
        raise InputError(f"group_size {scheme.group_size} does not divide in_features {k}")
    return k // scheme.group_size


def e8m0(scale: torch.Tensor) -> torch.Tensor:
    """2^(scale - 127) of an MX scale, uint8 -> float32; 255 is NaN. Exact also for 0, whose value is subnormal."""
    return scale.view(torch.float8_e8m0fnu).float()


def expand(qparams: QParams, scheme: TensorScheme, shape: torch.Size | tuple[int, ...]) -> QParams:
    """The same scales, one a weight: float32 (N, K), the global scale divided in. A no-op when already so.

    A column [:, j] of the result is the QParams of that column alone, which is how column-by-column algorithms
    use encode and decode.
    """
    n, k = shape
    scale = qparams.scale_NG
    if tuple(scale.shape) == (n, k) and scale.dtype == torch.float32 and qparams.global_scale is None:
        return qparams
    rows, cols = scheme.block_shape if scheme.strategy == "block" and scheme.block_shape else (1, -1)
    if cols < 0:
        cols = k // scale.shape[1]

    def spread(t: torch.Tensor) -> torch.Tensor:
        if t.shape[0] not in (1, n):
            t = t.repeat_interleave(rows, 0)[:n]
        if t.shape[1] not in (1, k):
            t = t.repeat_interleave(cols, 1)[:, :k]
        return t.expand(n, k)

    zero = None if qparams.zero_NG is None else spread(qparams.zero_NG.float())
    return QParams(spread(_scales(qparams)), zero)


def aligned(t_NK: torch.Tensor, qparams: QParams, scheme: TensorScheme) -> tuple[torch.Tensor, QParams]:
    """Weights or codes, and their scales as float32, in shapes that broadcast: `expand` without a scale a weight.

    Where a row has groups: (N, G, K / G) and (N, G, 1). Reading a scale a weight takes longer than the arithmetic.
    """
    (n, k), scale = t_NK.shape, qparams.scale_NG
    if scheme.strategy != "group" or scale.shape[0] != n or not 1 < scale.shape[1] < k:
        return t_NK, expand(qparams, scheme, t_NK.shape)
    groups, zero = scale.shape[1], qparams.zero_NG
    grouped = QParams(_scales(qparams)[..., None], None if zero is None else zero.float()[..., None])
    return t_NK.unflatten(1, (groups, k // groups)), grouped


def _scales(qparams: QParams) -> torch.Tensor:
    """The scales as float32, the global scale divided in."""
    scale = qparams.scale_NG
    value = e8m0(scale) if scale.dtype == torch.uint8 else scale.float()
    return value if qparams.global_scale is None else value / qparams.global_scale


def column(fine: QParams, j: int) -> QParams:
    """Column `j` of expanded qparams."""
    return QParams(fine.scale_NG[:, j : j + 1], None if fine.zero_NG is None else fine.zero_NG[:, j : j + 1])
