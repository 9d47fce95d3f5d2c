"""Triton kernels that round activations to 8 bits, alone or behind RMSNorm or silu(gate) * up, in one pass over memory.

A program holds whole rows (or whole groups of 128) in registers: it reads each element once, reduces, and writes codes.
Two ways through the arithmetic give the same bits. HARDWARE takes a GPU's own: fused multiply-add and conversions.
Without it everything is spelt out in operations that Triton's interpreter gets right, and that any GPU has.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from quantkit_kernels._launch import Start
from quantkit_kernels._rounding import nearest, stored

_TILE = 2048  # elements of a program that could have more rows than one
_ELEMENTS = 32  # of a thread: what a program does once is half of the instructions with 16
MANY = 1024  # tokens from which RMSNorm of 2049 to 4096 columns reads them in parts
_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@triton.jit
def rounded(x: tl.tensor, DTYPE: tl.constexpr, HARDWARE: tl.constexpr) -> tl.tensor:
    """float32 rounded to what DTYPE holds, as float32. Only the hardware keeps a NaN of any pattern."""
    if DTYPE == "float32":
        value = x
    elif not HARDWARE:
        value = stored(x, DTYPE)
    elif DTYPE == "bfloat16":
        value = x.to(tl.bfloat16).to(tl.float32)
    else:
        value = x.to(tl.float16).to(tl.float32)
    return value


@triton.jit
def divided(x: tl.tensor, scale: tl.tensor, HARDWARE: tl.constexpr) -> tl.tensor:
    """x / scale for |x| <= 448 scale, so near that it gives the code of the nearest float; scale is a column beside x.

    A division of IEEE costs a dozen instructions an element. Here the inverse is taken once a row, correctly rounded:
    x * inverse is off by less than 2 last places, and the step of Newton rounds a number within 2^-46 of the quotient
    (Markstein 1990), which may miss the nearest float by one place where the quotient is so near to the middle of two.
    Beside a number halfway between two codes it never is: scale would have to end in a dozen zeros and 1.
    A remainder must not underflow: scale is 2^-60 or more.
    """
    if HARDWARE:
        # Twice the sign turned: then a zero comes out with the sign of x. Times -1 is no instruction of its own.
        inverse = tl.broadcast_to(tl.div_rn(-1.0, scale), x.shape)
        value = x * -1.0
        quotient = value * inverse
        quotient = tl.fma(tl.fma(quotient, tl.broadcast_to(scale, x.shape), value), inverse, quotient)
    else:
        quotient = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    return quotient


@triton.jit
def encoded(x: tl.tensor, FORM: tl.constexpr, SPANNED: tl.constexpr, HARDWARE: tl.constexpr) -> tl.tensor:
    """Codes (int8) of scaled values: nearest, ties to even, saturating. NaN becomes 0 in int8 and NaN in fp8_e4m3.

    SPANNED  nothing is beyond the range but by rounding, and the codes of a row with NaN mean nothing: less to do
    """
    if FORM == "int8":
        limited = tl.minimum(x if SPANNED else tl.maximum(x, -128.0), 127.0)
        # 1.5 * 2^23: adding it leaves the integer in the low bits, which are the code in two's complement.
        code = (limited + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
        if not SPANNED:
            code = tl.where(x == x, code, 0).to(tl.int8)
    elif HARDWARE:
        code = x.to(tl.float8e4nv).to(tl.int8, bitcast=True)
    else:
        code, _ = nearest(x, 0.0, True, -448.0, 448.0, 1, 8, -6, 3)
        code = tl.where(x == x, code, 127).to(tl.int8)
    return code


@triton.jit
def lifted(x: tl.tensor, scale: tl.tensor, HARDWARE: tl.constexpr) -> tl.tensor:
    """x / scale as `divided`, of any scale: a tiny one, and its x, are moved up by 2^64 first."""
    lift = tl.where(scale < 8.673617379884035e-19, 18446744073709551616.0, 1.0)  # below 2^-60
    return divided(x * lift, scale * lift, HARDWARE)


@triton.jit
def put(
    at: tl.tensor, value: tl.tensor, scale: tl.tensor, here: tl.tensor, FORM: tl.constexpr, HARDWARE: tl.constexpr
) -> None:
    """Writes the codes of value / scale, a column that spans it. A program with one scale asks once whether it is tiny.

    Each way stores by itself: a compiler that joins them takes both.
    """
    if HARDWARE and scale.numel == 1:
        tiny = tl.max(scale.reshape(1), 0) < 8.673617379884035e-19
    else:
        tiny: tl.constexpr = True  # type: ignore[no-redef]
    if tiny:
        tl.store(at, encoded(lifted(value, scale, HARDWARE), FORM, True, HARDWARE).reshape(here.shape), here)
    else:
        tl.store(at, encoded(divided(value, scale, HARDWARE), FORM, True, HARDWARE).reshape(here.shape), here)


@triton.jit
def largest(x: tl.tensor) -> tl.tensor:
    """Largest |x| along the last axis, NaN when one is NaN: as integers, because there NaN is the largest of all."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, len(x.shape) - 1).to(tl.float32, bitcast=True)


@triton.jit
def spanning(reach: tl.tensor, STEPS: tl.constexpr) -> tl.tensor:
    """reach / STEPS, the scale of values up to `reach`; where that is 0, float32's epsilon; NaN for NaN and Inf."""
    scale = tl.div_rn(reach, STEPS)
    scale = tl.where(scale == 0, 1.1920928955078125e-07, scale)
    return tl.where(reach < float("inf"), scale, float("nan"))


@triton.jit
def loaded(
    x_ptr: tl.tensor,
    at: tl.tensor,
    here: tl.tensor,
    k: tl.tensor,
    SILU: tl.constexpr,
    DTYPE: tl.constexpr,
    HARDWARE: tl.constexpr,
) -> tl.tensor:
    """x, or silu(gate) * up of the two halves of a row, each step rounded to the dtype as torch's are; float32."""
    value = tl.load(x_ptr + at, here, 0.0).to(tl.float32)
    if SILU:
        up = tl.load(x_ptr + at + k, here, 0.0).to(tl.float32)
        value = rounded(value / (1.0 + tl.exp(-value)), DTYPE, HARDWARE)
        value = rounded(value * up, DTYPE, HARDWARE)
    return value


@triton.jit
def rows(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    m: tl.tensor,
    k: tl.tensor,
    groups: tl.tensor,
    x_stride: tl.tensor,
    SILU: tl.constexpr,
    FORM: tl.constexpr,
    MODE: tl.constexpr,
    DTYPE: tl.constexpr,
    HARDWARE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """ROWS tokens by one group of WIDTH columns, which is all of them when there is one group.

    FORM   "int8", "fp8_e4m3", or "none": then the values themselves are written
    MODE   "symmetric", "asymmetric": scale (groups, m) and zero point (m,) are found and written; "static": they are
           read, one each; "shifted": static with a zero point
    """
    group = tl.program_id(0) % groups
    row = (tl.program_id(0) // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = group * WIDTH + tl.arange(0, WIDTH)
    here = (row < m)[:, None] & (column < k)[None, :]
    value = loaded(x_ptr, row[:, None] * x_stride + column[None, :], here, k, SILU, DTYPE, HARDWARE)
    out_at = out_ptr + row[:, None] * k + tl.max_contiguous(column, 8)[None, :]
    if FORM == "none":
        tl.store(out_at, value.to(out_ptr.dtype.element_ty), here)
    else:
        if MODE == "symmetric":
            scale = spanning(largest(value), 127.5 if FORM == "int8" else 448.0)
            put(out_at, value, scale[:, None], here, FORM, HARDWARE)
            tl.store(scale_ptr + group.to(tl.int64) * m + row, scale, row < m)
        elif MODE == "asymmetric":
            low = tl.minimum(tl.min(value, 1), 0.0)
            high = tl.maximum(tl.max(value, 1), 0.0)
            # Whether all are finite is asked of the magnitudes: minimum and maximum pass over a NaN.
            reach = tl.where(largest(value) < float("inf"), high - low, float("nan"))
            scale = spanning(reach, 255.0)
            zero = tl.minimum(tl.maximum(-128.0 - tl.div_rn(low, scale), -128.0), 127.0)
            zero = tl.where((reach > 0) & (reach < float("inf")), (zero + 12582912.0) - 12582912.0, 0.0)
            code = encoded(lifted(value, scale[:, None], HARDWARE) + zero[:, None], FORM, False, HARDWARE)
            tl.store(out_at, code, here)
            tl.store(scale_ptr + row, scale, row < m)
            tl.store(zero_ptr + row, zero.to(tl.int8), row < m)
        else:
            scale = tl.load(scale_ptr).to(tl.float32)
            quotient = tl.div_rn(value, tl.broadcast_to(scale, value.shape))
            if MODE == "shifted":
                quotient = quotient + tl.load(zero_ptr).to(tl.float32)
            if FORM != "int8":  # NaN must stay
                quotient = tl.where(quotient > 448.0, 448.0, tl.where(quotient < -448.0, -448.0, quotient))
            tl.store(out_at, encoded(quotient, FORM, False, HARDWARE), here)


@triton.jit
def norm(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    total_ptr: tl.tensor,
    m: tl.tensor,
    k: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    RESIDUAL: tl.constexpr,
    FORM: tl.constexpr,
    DTYPE: tl.constexpr,
    HARDWARE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """RMSNorm of ROWS whole tokens, of x or of x + residual, which is written too; codes with a scale for each GROUP.

    FORM   "int8", "fp8_e4m3", or "none": then the normed values themselves are written
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    here = (row < m)[:, None] & (column < k)[None, :]
    value = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], here, 0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, column < k, 0.0).to(tl.float32)
    out_at = row[:, None] * k + tl.max_contiguous(column, 8)[None, :]
    if RESIDUAL:
        value += tl.load(residual_ptr + row[:, None] * residual_stride + column[None, :], here, 0.0).to(tl.float32)
        value = rounded(value, DTYPE, HARDWARE)
        tl.store(total_ptr + out_at, value.to(total_ptr.dtype.element_ty), here)
    mean = tl.div_rn(tl.sum(value * value, 1), tl.zeros((ROWS,), tl.float32) + k)
    factor = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    value = rounded(value * factor[:, None], DTYPE, HARDWARE)
    value = rounded(value * weight[None, :], DTYPE, HARDWARE)
    if FORM == "none":
        tl.store(out_ptr + out_at, value.to(out_ptr.dtype.element_ty), here)
    else:
        GROUPS: tl.constexpr = WIDTH // GROUP
        value = value.reshape(ROWS, GROUPS, GROUP)
        scale = spanning(largest(value), 127.5 if FORM == "int8" else 448.0)
        put(out_ptr + out_at, value, scale[:, :, None], here, FORM, HARDWARE)
        group = tl.arange(0, GROUPS)
        exists = (row < m)[:, None] & (group * GROUP < k)[None, :]
        tl.store(scale_ptr + group[None, :].to(tl.int64) * m + row[:, None], scale, exists)


def quantize(
    x: torch.Tensor,
    form: str,
    *,
    block: int = 0,
    silu: bool = False,
    mode: str = "symmetric",
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    hardware: bool = True,
) -> tuple[torch.Tensor, ...]:
    """Codes (..., K), then what `mode` finds: scale (..., 1) or (G, M), zero point (..., 1). As `activation` has them.

    form   "int8", "fp8_e4m3", or "none": silu(gate) * up alone, in the dtype of x
    block  columns of a group, a power of two; 0 for whole rows
    """
    x_MK, m, stride = _rows(x)
    k = x.shape[-1] // (2 if silu else 1)
    shape = (*x.shape[:-1], k)
    out = torch.empty(shape, dtype=x.dtype if form == "none" else torch.int8, device=x.device)
    found = form != "none" and mode in ("symmetric", "asymmetric")
    if found:
        scale = torch.empty((-(-k // block), m) if block else (*shape[:-1], 1), device=x.device)
        zero = torch.empty_like(scale, dtype=torch.int8) if mode == "asymmetric" else None
    if m:
        start = _start_rows(
            m, k, stride, block, silu, form, mode, x.dtype, None if scale is None else scale.dtype, hardware
        )
        start(x_MK, out, out if scale is None else scale, out if zero is None else zero)
    codes = out.view(torch.float8_e4m3fn) if form == "fp8_e4m3" else out
    return (codes, *(t for t in (scale, zero) if found and t is not None))


@functools.lru_cache(maxsize=4096)
def _start_rows(
    m: int,
    k: int,
    stride: int,
    block: int,
    silu: bool,
    form: str,
    mode: str,
    dtype: torch.dtype,
    scale_dtype: torch.dtype | None,
    hardware: bool,
) -> Start:
    """For `quantize`; the dtypes are of x and of a scale that is given."""
    width = block or triton.next_power_of_2(k)
    if form == "none" or mode not in ("symmetric", "asymmetric"):
        width = min(width, _TILE)
    tile, warps = _tile(m, width)
    groups = -(-k // width)
    constants = {"SILU": silu, "FORM": form, "MODE": mode, "DTYPE": _NAMES[dtype], "HARDWARE": hardware}
    constants |= {"ROWS": tile, "WIDTH": width, "num_warps": warps, "enable_fp_fusion": False}
    return Start(rows, (-(-m // tile) * groups,), (m, k, groups, stride), constants)


def rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    form: str,
    *,
    block: int = 0,
    hardware: bool = True,
) -> tuple[torch.Tensor, ...]:
    """Normed values, or codes and scale (..., 1) or (G, M); then x + residual if there is one."""
    (x_MK, m, stride), k = _rows(x), x.shape[-1]
    residual_MK, _, residual_stride = (x_MK, m, stride) if residual is None else _rows(residual)
    out = torch.empty(x.shape, dtype=x.dtype if form == "none" else torch.int8, device=x.device)
    scale = out
    if form != "none":
        scale = torch.empty((-(-k // block), m) if block else (*x.shape[:-1], 1), device=x.device)
    total = out if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if m:
        what = (m, k, stride, residual_stride, eps, block, residual is not None, form)
        start = _start_norm(what, x.dtype, weight.dtype, hardware)
        start(x_MK, residual_MK, weight.contiguous(), out, scale, total)
    codes = out.view(torch.float8_e4m3fn) if form == "fp8_e4m3" else out
    return (codes, *(() if form == "none" else (scale,)), *(() if residual is None else (total,)))


@functools.lru_cache(maxsize=4096)
def _start_norm(
    what: tuple[int, int, int, int, float, int, bool, str],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    hardware: bool,
) -> Start:
    """For `rms_norm`."""
    m, k, stride, residual_stride, eps, block, residual, form = what
    width = max(block, triton.next_power_of_2(k))
    part = 2048 if k > 8192 else 1024
    padded = k > 4096 and -(-k // part) * part < width
    # 4096 columns need no padding, but many tokens are faster in parts; with a residual memory is the limit either way.
    narrow = 2048 < k <= 4096 and m >= MANY and form != "none" and not residual
    if not block and (padded or narrow):
        from quantkit_kernels._norm import norm_parts

        constants = {"RESIDUAL": residual, "FORM": form, "DTYPE": _NAMES[dtype], "HARDWARE": hardware, "PART": part}
        constants |= {"PARTS": -(-k // part), "EVEN": k % part == 0, "num_warps": part // 256}
        constants |= {"enable_fp_fusion": False}
        return Start(norm_parts, (m,), (m, k, stride, residual_stride, eps), constants)
    tile, warps = _tile(m, width)
    constants = {"RESIDUAL": residual, "FORM": form, "DTYPE": _NAMES[dtype], "HARDWARE": hardware, "ROWS": tile}
    constants |= {"WIDTH": width, "GROUP": block or width, "num_warps": warps, "enable_fp_fusion": False}
    return Start(norm, (-(-m // tile),), (m, k, stride, residual_stride, eps), constants)


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """(..., K) as rows whose columns lie side by side; how many, and how far apart they are."""
    k = x.shape[-1]
    if x.is_contiguous():
        return x, x.numel() // k, k
    x_MK = x.reshape(-1, k)
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    return x_MK, x_MK.shape[0], x_MK.stride(0)


def _tile(m: int, width: int) -> tuple[int, int]:
    """Rows of a program, and its warps."""
    tile = max(1, min(_TILE // width, triton.next_power_of_2(max(m, 1))))
    return tile, min(32, max(1, tile * width // (32 * _ELEMENTS)))
