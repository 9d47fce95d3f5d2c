"""Choice of scales on a GPU: one pass over the weight, all candidates of a group judged in registers.

The candidates and their rounding are those of quantkit's torch functions, which read the weight once for each of them.
The same scale comes out but where two candidates' errors differ by less than the last bits of a float32 sum.

    w_NK          (N, K) float32, float16 or bfloat16 on a GPU, finite; K = groups times group_size
    importance_K  (K,) float32, weight of each column's squared error; None counts all alike
"""

from __future__ import annotations

import torch

from quantkit_kernels import _numbers

SHRINK_STEP, SHRINK_COUNT, FITS = 0.02, 32, 3
WIDEST = 32768  # columns of a group, which lie in one program's registers
_TILE = 2048  # weights of one program, unless a group has more
_E4M3_REACH = 7  # codes below and above; 8 are a factor of two


def search_scales_int(
    w_NK: torch.Tensor,
    importance_K: torch.Tensor | None,
    *,
    group_size: int,
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    signed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales with the least squared error: (N, G) of `scale_dtype`, and zero points (N, G) int8 or None.

    group_size   columns that share a scale, up to 32768; K for one a row
    scale_dtype  float32, float16 or bfloat16; candidates are rounded to it before they are judged
    signed       symmetric grids only: every candidate also with a minus, for the lopsided grid's other side
    Scales that overflow their dtype come out infinite; nothing here waits for the GPU to look. Raises ValueError.
    """
    from quantkit_kernels import _search

    tiles, groups, span, constants = _layout(w_NK, importance_K, group_size)
    if not 2 <= bits <= 8:
        raise ValueError(f"integers of {bits} bits; 2 to 8 are known")
    if signed and not symmetric:
        raise ValueError("signed scales are for symmetric grids; an asymmetric one has a zero point instead")
    half = 1 << (bits - 1)
    scale = torch.empty(tiles, dtype=torch.float32, device=w_NK.device)
    zero = torch.empty_like(scale) if not symmetric else scale
    # In float64, as Python reckons, and then once rounded.
    steps = torch.arange(SHRINK_COUNT, dtype=torch.float64, device=w_NK.device)
    shrinks = (1 - SHRINK_STEP * steps).float()
    with torch.cuda.device_of(w_NK):
        _search.search_integer[_grid(tiles, constants)](
            w_NK,
            scale if importance_K is None else importance_K,
            shrinks,
            scale,
            zero,
            tiles,
            groups,
            span,
            torch.finfo(scale_dtype).eps,
            SYMMETRIC=symmetric,
            SIGNED=signed,
            STORED=stored_name(scale_dtype),
            SHRINKS=SHRINK_COUNT,
            FITS=FITS,
            LOW=float(-half),
            HIGH=float(half - 1),
            **constants,
        )
    n = w_NK.shape[0]
    return scale.to(scale_dtype).reshape(n, -1), None if symmetric else zero.to(torch.int8).reshape(n, -1)


def rounding_difference(
    w_NK: torch.Tensor,
    s_K: torch.Tensor,
    scale_NG: torch.Tensor,
    zero_NG: torch.Tensor | None,
    *,
    group_size: int,
    bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(Q(w) - w) / s, Q the nearest integers of `bits` bits under the given scales: (N, K) of `dtype`, in one pass.

    s_K       (K,) float32, not 0
    scale_NG  (N, G) float, zero_NG (N, G) int8 or None
    """
    from quantkit_kernels import _search

    tiles, groups, span, constants = _layout(w_NK, s_K, group_size)
    half = 1 << (bits - 1)
    out = torch.empty(w_NK.shape, dtype=dtype, device=w_NK.device)
    del constants["WEIGHTED"]
    with torch.cuda.device_of(w_NK):
        _search.difference[_grid(tiles, constants)](
            w_NK,
            s_K,
            scale_NG.contiguous(),
            scale_NG if zero_NG is None else zero_NG.contiguous(),
            out,
            tiles,
            groups,
            span,
            ASYMMETRIC=zero_NG is not None,
            LOW=float(-half),
            HIGH=float(half - 1),
            **constants,
        )
    return out


def search_scales_nvfp4(
    w_NK: torch.Tensor, importance_K: torch.Tensor | None, global_scale: torch.Tensor
) -> torch.Tensor:
    """Scales (N, K / 16) float8_e4m3fn under a global scale (1,) float32: the best of 15 codes around absmax's."""
    from quantkit_kernels import _search

    tiles, groups, span, constants = _layout(w_NK, importance_K, 16)
    scale = torch.empty(tiles, dtype=torch.int8, device=w_NK.device)
    with torch.cuda.device_of(w_NK):
        _search.search_nvfp4[_grid(tiles, constants)](
            w_NK,
            global_scale if importance_K is None else importance_K,
            global_scale.float(),
            scale,
            tiles,
            groups,
            span,
            REACH=_E4M3_REACH,
            **constants,
        )
    return scale.view(torch.float8_e4m3fn).reshape(w_NK.shape[0], -1)


def search_scales_mx(w_NK: torch.Tensor, importance_K: torch.Tensor | None, number: str) -> torch.Tensor:
    """E8M0 scales (N, K / 32) uint8 of an MX format: the better of the two exponents that are worth a trial."""
    from quantkit_kernels import _search

    tiles, groups, span, constants = _layout(w_NK, importance_K, 32)
    if not number.startswith("mx"):
        raise ValueError(f"{number!r} is no MX format")
    form = _numbers.get(number)
    # mxint8 as a float: one octave from 1 to 2 in steps of 1/64, and those same steps below it.
    values = {"HIGH": form.high, "BITS": form.bits, "EMIN": form.emin, "MANTISSA": form.mantissa}
    if not form.is_float:
        values = {"HIGH": form.high / form.unit, "BITS": 8, "EMIN": 0, "MANTISSA": 6}
    scale = torch.empty(tiles, dtype=torch.int8, device=w_NK.device)
    with torch.cuda.device_of(w_NK):
        _search.search_mx[_grid(tiles, constants)](
            w_NK,
            w_NK if importance_K is None else importance_K,
            scale,
            tiles,
            groups,
            span,
            EMAX=int(values["HIGH"]).bit_length() - 1,
            **values,
            **constants,
        )
    return scale.view(torch.uint8).reshape(w_NK.shape[0], -1)


def stored_name(dtype: torch.dtype) -> str:
    """The kernels' name of a dtype for scales. Raises ValueError for one that they cannot round to."""
    names = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
    if dtype not in names:
        raise ValueError(f"scales of {dtype}; float32, float16 and bfloat16 are known")
    return names[dtype]


def _layout(
    w: torch.Tensor, importance: torch.Tensor | None, group_size: int
) -> tuple[int, int, int, dict[str, int | bool]]:
    """Groups in all, groups in a row, columns in a group, and the kernel's tile."""
    n, k = w.shape
    if not 1 <= group_size <= WIDEST or k % group_size:
        raise ValueError(f"group_size {group_size} with {k} columns; it must divide them and be at most {WIDEST}")
    if not w.is_contiguous():
        raise ValueError(f"w is not contiguous: strides {w.stride()} of {tuple(w.shape)}")
    if importance is not None and (tuple(importance.shape) != (k,) or importance.dtype != torch.float32):
        raise ValueError(f"importance is {importance.dtype} {tuple(importance.shape)}; expected float32 ({k},)")
    span = 1 << (group_size - 1).bit_length()
    rows = max(1, _TILE // span)
    warps = min(16, max(4, rows * span // 512))
    constants: dict[str, int | bool] = {"WEIGHTED": importance is not None, "ROWS": rows, "SPAN": span}
    constants |= {"num_warps": warps, "enable_fp_fusion": False}
    return n * (k // group_size), k // group_size, group_size, constants


def _grid(tiles: int, constants: dict[str, int | bool]) -> tuple[int]:
    return (-(-tiles // int(constants["ROWS"])),)
