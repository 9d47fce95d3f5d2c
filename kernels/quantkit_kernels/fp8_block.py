"""y = x Wᵀ + b in FP8 with a scale for each 128 x 128 of the weight and each 1 x 128 of a token, as DeepSeek-V3's.

    x_q             (..., K) float8_e4m3fn; any leading dimensions, none of them needs a token
    x_scale         (ceil(K / 128), M) float, M tokens: those of a group of columns lie side by side, which is how
                    `activation.quantize_per_block` makes them, and what torch's and DeepSeek's products read
    weight          (N, K) float8_e4m3fn, row-major: as it is stored
    weight_scale    (ceil(N / 128), ceil(K / 128)) float, the last row and column for what is left
    bias            (N,) float or None
    out_dtype       float32, float16 or bfloat16
    y_MN            (..., N), out_dtype

y = sum over groups of (sum over the group's k of x_q w) * x_scale * weight_scale, + bias, in float32, rounded once to
`out_dtype`. Source of the scheme: DeepSeek-V3 (arXiv 2412.19437), section 3.3.

`fp8_block_linear` is the operator `quantkit::fp8_block_linear`; on CUDA with Triton, from capability 8.9, it is a
kernel of `_fp8_block`, elsewhere plain torch. It has no gradients.
"""

import math

import torch

from quantkit_kernels.w8a8 import CHUNK, MaybeTensor, check_operands, runs

BLOCK = 128


def fp8_block_linear_reference(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: MaybeTensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Both operands as what they stand for, multiplied in float64. Any device; shapes as in the module's docstring.

    Raises ValueError when the tensors do not belong together.
    """
    return _plain(x_q, x_scale, weight, weight_scale, bias, out_dtype, torch.float64)


@torch.library.custom_op("quantkit::fp8_block_linear", mutates_args=())
def fp8_block_linear(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The operator: see the module's docstring. Where no kernel runs, in float32."""
    return _plain(x_q, x_scale, weight, weight_scale, bias, out_dtype, torch.float32)


@fp8_block_linear.register_fake
def _fake(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: MaybeTensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    _check(x_q, x_scale, weight, weight_scale, bias, out_dtype)
    return x_q.new_empty((*x_q.shape[:-1], weight.shape[0]), dtype=out_dtype)


@fp8_block_linear.register_kernel("cuda")
def launch(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: MaybeTensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    _check(x_q, x_scale, weight, weight_scale, bias, out_dtype)
    if not runs(weight):
        return _plain(x_q, x_scale, weight, weight_scale, bias, out_dtype, torch.float32)
    from quantkit_kernels import _fp8_block

    return _fp8_block.linear(x_q, x_scale, weight, weight_scale, bias, out_dtype)


def _plain(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: MaybeTensor,
    out_dtype: torch.dtype,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Sums in `dtype`, some rows of the weight at a time."""
    _check(x_q, x_scale, weight, weight_scale, bias, out_dtype)
    (n, k), rows = weight.shape, BLOCK * max(1, CHUNK // (BLOCK * weight.shape[1]))
    fine = x_scale.t().to(dtype).repeat_interleave(BLOCK, 1)[:, :k]
    x = (x_q.reshape(-1, k).to(dtype) * fine).view(x_q.shape)
    parts = []
    for start in range(0, n, rows):
        w = weight[start : start + rows].to(dtype)
        scale = weight_scale[start // BLOCK : -(-(start + len(w)) // BLOCK)].to(dtype)
        spread = scale.repeat_interleave(BLOCK, 0)[: len(w)].repeat_interleave(BLOCK, 1)[:, :k]
        parts.append(x @ (w * spread).t())
    y = torch.cat(parts, -1).float()
    return (y if bias is None else y + bias.float()).to(out_dtype)


def _check(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: MaybeTensor,
    out_dtype: torch.dtype,
) -> None:
    """Shapes and dtypes, before they can be read wrongly. Raises ValueError with the measured ones."""
    check_operands(x_q, weight, bias, out_dtype, (torch.float8_e4m3fn,))
    n, k = weight.shape
    down, across = -(-n // BLOCK), -(-k // BLOCK)
    expected = (across, math.prod(x_q.shape[:-1]))
    if tuple(x_scale.shape) != expected or not x_scale.is_floating_point():
        raise ValueError(f"x_scale is {x_scale.dtype} {tuple(x_scale.shape)}; expected float {expected}")
    if tuple(weight_scale.shape) != (down, across) or not weight_scale.is_floating_point():
        raise ValueError(
            f"weight_scale is {weight_scale.dtype} {tuple(weight_scale.shape)}; expected float {(down, across)}"
        )
