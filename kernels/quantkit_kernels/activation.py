"""Activations rounded to 8 bits on their way into a linear layer, alone or together with what comes before it.

    x               (..., K) float32, float16 or bfloat16; M tokens
    kind            "int8" (codes -128..127) or "fp8_e4m3" (up to 448)
    codes           (..., K) int8 or float8_e4m3fn                        x = code * scale, or (code - zero) * scale
    scale           float32. Per token (..., 1); per block (ceil(K / block), M), the tokens of a group side by side;
                    static (1,), given
    zero            int8 (..., 1), asymmetric only
    weight          (K,) float, of RMSNorm
    residual        like x; the sum x + residual is normed, and returned as well
    gate_up         (..., 2 K): the halves of silu(gate) * up
    block           columns of a group, a power of two from 16 to 1024; 0 in fused operators: per token

Per token and per block, scale = amax / 127.5 (amax / 448 for fp8_e4m3), with a zero point (max - min) / 255, in
float32, float32's epsilon where that is 0; codes are the nearest to x / scale, ties to even. These are quantkit's own
numbers, and those of compressed-tensors in float32. A token (a group) that holds NaN or Inf gets the scale NaN and
codes that mean nothing: what it is multiplied with becomes NaN, other tokens do not. A static scale saturates Inf;
NaN becomes 0 in int8 and stays NaN in fp8_e4m3.

RMSNorm and silu(gate) * up round each step to the dtype of x, as the modules of transformers do:
    norm    (x / sqrt(mean(x²) + eps)).to(dtype) * weight             silu    silu(gate).to(dtype) * up

Every operator is `quantkit::NAME` with a plain-torch NAME_reference beside it, which runs wherever no kernel does: not
on CUDA, no Triton, rows too wide for registers, a GPU before capability 8.0 (8.9 for fp8_e4m3). None has gradients.
"""

import math
from types import ModuleType

import torch
import torch.nn.functional as F

from quantkit_kernels._launch import capability

WIDEST, WIDEST_NORM = 32768, 16384  # columns that one program's registers hold
KINDS = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_STEPS = {"int8": 127.5, "fp8_e4m3": 448.0}

Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def quantize_per_token_reference(x: torch.Tensor, kind: str) -> Pair:
    """Codes and scale (..., 1)."""
    _check(x, kind)
    scale = _spanning(x.float().abs().amax(-1, keepdim=True), _STEPS[kind])
    return _encode(x.float() / scale, kind), scale


def quantize_per_token_asymmetric_reference(x: torch.Tensor) -> Triple:
    """int8 codes, scale (..., 1) and zero point (..., 1)."""
    _check(x, "int8")
    low, high = (t.float() for t in x.aminmax(dim=-1, keepdim=True))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _spanning(high - low, 255.0)
    zero = (-128 - low / scale).round().clamp(-128, 127).nan_to_num(nan=0.0)
    zero = torch.where(high > low, zero, 0)
    return _encode(x.float() / scale + zero, "int8"), scale, zero.to(torch.int8)


def quantize_per_block_reference(x: torch.Tensor, kind: str, block: int = 128) -> Pair:
    """Codes and scale (ceil(K / block), M)."""
    _check(x, kind, block)
    k = x.shape[-1]
    x_MGB = F.pad(x.reshape(-1, k).float(), (0, -k % block)).unflatten(1, (-1, block))
    scale_MG = _spanning(x_MGB.abs().amax(2), _STEPS[kind])
    codes = _encode(x_MGB / scale_MG[..., None], kind).flatten(1)[:, :k]
    return codes.reshape(x.shape).contiguous(), scale_MG.t().contiguous()


def quantize_static_reference(
    x: torch.Tensor, scale: torch.Tensor, kind: str, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """Codes under one given scale."""
    _check(x, kind, scale=scale, zero=zero)
    quotient = x.float() / scale.float().reshape(())
    return _encode(quotient if zero is None else quotient + zero.float().reshape(()), kind)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension."""
    _check(x, weight=weight)
    value = x.contiguous().float()
    mean = value.square().sum(-1, keepdim=True) / value.new_full((), x.shape[-1])
    factor = 1 / torch.sqrt((mean + eps).double()).float()  # torch's float32 root is off by a last bit on some CPUs
    return ((value * factor).to(x.dtype).float() * weight.float()).to(x.dtype)


def add_rms_norm_reference(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Pair:
    """RMSNorm of x + residual, and x + residual."""
    _check(x, residual=residual, weight=weight)
    total = (x + residual).contiguous()
    return rms_norm_reference(total, weight, eps), total


def rms_norm_quantize_reference(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: str, block: int = 0) -> Pair:
    """RMSNorm, then codes and scale."""
    return _quantize_reference(rms_norm_reference(x, weight, eps), kind, block)


def add_rms_norm_quantize_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: str, block: int = 0
) -> Triple:
    """RMSNorm of x + residual, then codes and scale; and x + residual."""
    normed, total = add_rms_norm_reference(x, residual, weight, eps)
    return (*_quantize_reference(normed, kind, block), total)


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    _check(gate_up, halves=True)
    gate, up = gate_up.chunk(2, -1)
    return (F.silu(gate) * up).contiguous()


def silu_mul_quantize_reference(gate_up: torch.Tensor, kind: str, block: int = 0) -> Pair:
    """silu(gate) * up, then codes and scale."""
    return _quantize_reference(silu_mul_reference(gate_up), kind, block)


def _quantize_reference(x: torch.Tensor, kind: str, block: int) -> Pair:
    return quantize_per_block_reference(x, kind, block) if block else quantize_per_token_reference(x, kind)


def _spanning(reach: torch.Tensor, steps: float) -> torch.Tensor:
    """The scale of values up to `reach`. Divides by a tensor: with a number, torch may multiply by its inverse."""
    scale = reach / reach.new_full((), steps)
    scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
    return torch.where(torch.isfinite(reach), scale, torch.nan).contiguous()


def _encode(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "int8":
        return x.round().clamp(-128, 127).nan_to_num(nan=0.0).to(torch.int8).contiguous()
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).contiguous()


def _check(
    x: torch.Tensor,
    kind: str = "int8",
    block: int | None = None,
    *,
    halves: bool = False,
    weight: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
) -> None:
    """Shapes and dtypes, before they can be read wrongly. Raises ValueError with the measured ones."""
    if x.dim() == 0 or x.shape[-1] == 0 or x.dtype not in FLOATS:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; expected float32, float16 or bfloat16 (..., K)")
    if halves and x.shape[-1] % 2:
        raise ValueError(f"gate_up has {x.shape[-1]} columns, which are no two halves")
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    if block is not None and (block & (block - 1) or not 16 <= block <= 1024):
        raise ValueError(f"block is {block}; expected a power of two from 16 to 1024")
    if weight is not None and tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(f"weight is {tuple(weight.shape)}; expected ({x.shape[-1]},)")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual is {residual.dtype} {tuple(residual.shape)}; x is {x.dtype} {tuple(x.shape)}")
    if scale is not None and (scale.numel() != 1 or not scale.is_floating_point()):
        raise ValueError(f"scale is {scale.dtype} {tuple(scale.shape)}; expected one float")
    if zero is not None and (zero.numel() != 1 or zero.dtype != torch.int8 or kind != "int8"):
        raise ValueError(f"zero is {zero.dtype} {tuple(zero.shape)} of {kind}; expected one int8, of int8 codes")


def _kernels(x: torch.Tensor, kind: str | None, width: int, widest: int) -> ModuleType | None:
    """The module of the kernels where they can run: else the reference does."""
    if width > widest or capability(x.device) < ((8, 9) if kind == "fp8_e4m3" else (8, 0)):
        return None
    from quantkit_kernels import _activation

    return _activation


def _empty(x: torch.Tensor, kind: str, block: int = 0, k: int | None = None) -> Pair:
    """Codes and scale for x, or for as many tokens of K columns, not filled in."""
    k = x.shape[-1] if k is None else k
    lead = x.shape[:-1]
    codes = x.new_empty((*lead, k), dtype=KINDS[kind])
    return codes, x.new_empty((-(-k // block), math.prod(lead)) if block else (*lead, 1), dtype=torch.float32)


@torch.library.custom_op("quantkit::quantize_per_token", mutates_args=())
def quantize_per_token(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale (..., 1)."""
    return quantize_per_token_reference(x, kind)


@quantize_per_token.register_fake
def _(x: torch.Tensor, kind: str) -> Pair:
    _check(x, kind)
    return _empty(x, kind)


@quantize_per_token.register_kernel("cuda")
def launch_per_token(x: torch.Tensor, kind: str) -> Pair:
    _check(x, kind)
    if (kernels := _kernels(x, kind, x.shape[-1], WIDEST)) is None:
        return quantize_per_token_reference(x, kind)
    return kernels.quantize(x, kind)


@torch.library.custom_op("quantkit::quantize_per_token_asymmetric", mutates_args=())
def quantize_per_token_asymmetric(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int8 codes, scale (..., 1) and zero point (..., 1)."""
    return quantize_per_token_asymmetric_reference(x)


@quantize_per_token_asymmetric.register_fake
def _(x: torch.Tensor) -> Triple:
    _check(x)
    return (*_empty(x, "int8"), x.new_empty((*x.shape[:-1], 1), dtype=torch.int8))


@quantize_per_token_asymmetric.register_kernel("cuda")
def launch_per_token_asymmetric(x: torch.Tensor) -> Triple:
    _check(x)
    if (kernels := _kernels(x, None, x.shape[-1], WIDEST)) is None:
        return quantize_per_token_asymmetric_reference(x)
    return kernels.quantize(x, "int8", mode="asymmetric")


@torch.library.custom_op("quantkit::quantize_per_block", mutates_args=())
def quantize_per_block(x: torch.Tensor, kind: str, block: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale (ceil(K / block), M)."""
    return quantize_per_block_reference(x, kind, block)


@quantize_per_block.register_fake
def _(x: torch.Tensor, kind: str, block: int = 128) -> Pair:
    _check(x, kind, block)
    return _empty(x, kind, block)


@quantize_per_block.register_kernel("cuda")
def launch_per_block(x: torch.Tensor, kind: str, block: int = 128) -> Pair:
    _check(x, kind, block)
    if (kernels := _kernels(x, kind, block, WIDEST)) is None:
        return quantize_per_block_reference(x, kind, block)
    return kernels.quantize(x, kind, block=block)


@torch.library.custom_op("quantkit::quantize_static", mutates_args=())
def quantize_static(x: torch.Tensor, scale: torch.Tensor, kind: str, zero: torch.Tensor | None = None) -> torch.Tensor:
    """Codes under one given scale."""
    return quantize_static_reference(x, scale, kind, zero)


@quantize_static.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, kind: str, zero: torch.Tensor | None = None) -> torch.Tensor:
    _check(x, kind, scale=scale, zero=zero)
    return _empty(x, kind)[0]


@quantize_static.register_kernel("cuda")
def launch_static(x: torch.Tensor, scale: torch.Tensor, kind: str, zero: torch.Tensor | None = None) -> torch.Tensor:
    _check(x, kind, scale=scale, zero=zero)
    if (kernels := _kernels(x, kind, 1, WIDEST)) is None:
        return quantize_static_reference(x, scale, kind, zero)
    return kernels.quantize(x, kind, mode="static" if zero is None else "shifted", scale=scale, zero=zero)[0]


@torch.library.custom_op("quantkit::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension."""
    return rms_norm_reference(x, weight, eps)


@rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    _check(x, weight=weight)
    return x.new_empty(x.shape)


@rms_norm.register_kernel("cuda")
def launch_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    _check(x, weight=weight)
    if (kernels := _kernels(x, None, x.shape[-1], WIDEST_NORM)) is None:
        return rms_norm_reference(x, weight, eps)
    return kernels.rms_norm(x, None, weight, eps, "none")[0]


@torch.library.custom_op("quantkit::add_rms_norm", mutates_args=())
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x + residual, and x + residual."""
    return add_rms_norm_reference(x, residual, weight, eps)


@add_rms_norm.register_fake
def _(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Pair:
    _check(x, residual=residual, weight=weight)
    return x.new_empty(x.shape), x.new_empty(x.shape)


@add_rms_norm.register_kernel("cuda")
def _(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Pair:
    _check(x, residual=residual, weight=weight)
    if (kernels := _kernels(x, None, x.shape[-1], WIDEST_NORM)) is None:
        return add_rms_norm_reference(x, residual, weight, eps)
    return kernels.rms_norm(x, residual, weight, eps, "none")


@torch.library.custom_op("quantkit::rms_norm_quantize", mutates_args=())
def rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor, eps: float, kind: str, block: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm, then codes and scale."""
    return rms_norm_quantize_reference(x, weight, eps, kind, block)


@rms_norm_quantize.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: str, block: int = 0) -> Pair:
    _check(x, kind, block or None, weight=weight)
    return _empty(x, kind, block)


@rms_norm_quantize.register_kernel("cuda")
def _(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: str, block: int = 0) -> Pair:
    _check(x, kind, block or None, weight=weight)
    if (kernels := _kernels(x, kind, x.shape[-1], WIDEST_NORM)) is None:
        return rms_norm_quantize_reference(x, weight, eps, kind, block)
    return kernels.rms_norm(x, None, weight, eps, kind, block=block)


@torch.library.custom_op("quantkit::add_rms_norm_quantize", mutates_args=())
def add_rms_norm_quantize(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: str, block: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm of x + residual, then codes and scale; and x + residual."""
    return add_rms_norm_quantize_reference(x, residual, weight, eps, kind, block)


@add_rms_norm_quantize.register_fake
def _(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: str, block: int = 0) -> Triple:
    _check(x, kind, block or None, residual=residual, weight=weight)
    return (*_empty(x, kind, block), x.new_empty(x.shape))


@add_rms_norm_quantize.register_kernel("cuda")
def _(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: str, block: int = 0) -> Triple:
    _check(x, kind, block or None, residual=residual, weight=weight)
    if (kernels := _kernels(x, kind, x.shape[-1], WIDEST_NORM)) is None:
        return add_rms_norm_quantize_reference(x, residual, weight, eps, kind, block)
    return kernels.rms_norm(x, residual, weight, eps, kind, block=block)


@torch.library.custom_op("quantkit::silu_mul", mutates_args=())
def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return silu_mul_reference(gate_up)


@silu_mul.register_fake
def _(gate_up: torch.Tensor) -> torch.Tensor:
    _check(gate_up, halves=True)
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@silu_mul.register_kernel("cuda")
def launch_silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    _check(gate_up, halves=True)
    if (kernels := _kernels(gate_up, None, 1, WIDEST)) is None:
        return silu_mul_reference(gate_up)
    return kernels.quantize(gate_up, "none", silu=True)[0]


@torch.library.custom_op("quantkit::silu_mul_quantize", mutates_args=())
def silu_mul_quantize(gate_up: torch.Tensor, kind: str, block: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up, then codes and scale."""
    return silu_mul_quantize_reference(gate_up, kind, block)


@silu_mul_quantize.register_fake
def _(gate_up: torch.Tensor, kind: str, block: int = 0) -> Pair:
    _check(gate_up, kind, block or None, halves=True)
    return _empty(gate_up, kind, block, gate_up.shape[-1] // 2)


@silu_mul_quantize.register_kernel("cuda")
def _(gate_up: torch.Tensor, kind: str, block: int = 0) -> Pair:
    _check(gate_up, kind, block or None, halves=True)
    if (kernels := _kernels(gate_up, kind, block or gate_up.shape[-1] // 2, WIDEST)) is None:
        return silu_mul_quantize_reference(gate_up, kind, block)
    return kernels.quantize(gate_up, kind, silu=True, block=block)
