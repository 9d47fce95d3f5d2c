"""What the tests of weight-only products on a GPU share: inputs, the weight that is meant, how far sums may be off."""

from __future__ import annotations

import torch

from quantkit_kernels import layout, wxa16
from quantkit_kernels.layout import Packed

FLOATS = [torch.bfloat16, torch.float16]


def there(p: Packed) -> Packed:
    zero = None if p.zero is None else p.zero.cuda()
    whole = None if p.global_scale is None else p.global_scale.cuda()
    return p._replace(codes=p.codes.cuda(), scale=p.scale.cuda(), zero=zero, global_scale=whole)


def activations(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of a wider tensor, NaN beyond them; on the GPU."""
    wide = torch.full((m, k + 40), float("nan"), dtype=dtype, device="cuda")
    wide[:, :k] = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return wide[:, :k]


def worst(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> float:
    """The largest relative error of a row against x wᵀ in float64; NaN counts as infinite."""
    wanted = x.double() @ w.double().to(x.device).T
    each = (y.double() - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-30)
    return float(torch.nan_to_num(each, nan=float("inf")).max())


def made_of(p: Packed, where: str, dtype: torch.dtype) -> torch.Tensor:
    """The weight whose sums a kernel forms: rounded to the dtype of x where the scale comes before the sum."""
    if where != "before":
        return layout.decode(p, torch.float64)
    if p.global_scale is None:
        return layout.decode(p, dtype).double()
    return layout.decode(p._replace(global_scale=torch.ones(1)), dtype).double() / p.global_scale.double()


def limit(p: Packed, where: str, dtype: torch.dtype) -> float:
    """Of float32 sums. A scale that is no float of the dtype of x makes a weight that may be rounded twice."""
    exact = where != "before" or p.scale_dtype in ("e8m0", "e4m3", wxa16.FLOATS[dtype])
    return 2e-5 if exact else 1e-3
