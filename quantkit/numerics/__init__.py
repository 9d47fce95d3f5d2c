"""Number formats: what a code means. One file a family; the file's `NUMBERS` are the names it registers."""

from __future__ import annotations

import functools
import importlib
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
    value = e8m0(scale) if scale.dtype == torch.uint8 else scale.float()
    if qparams.global_scale is not None:
        value = value / qparams.global_scale
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
    return QParams(spread(value), zero)


def column(fine: QParams, j: int) -> QParams:
    """Column `j` of expanded qparams."""
    return QParams(fine.scale_NG[:, j : j + 1], None if fine.zero_NG is None else fine.zero_NG[:, j : j + 1])
