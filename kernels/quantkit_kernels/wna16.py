"""y = x Wᵀ + b with W held as packed integer codes of 2 to 8 bits and activations in their own dtype.

    x_MK            (..., K) float; any leading dimensions, none of them needs a token
    weight_packed   (N, ceil(K b / 32)) int32, a row's codes as one bit stream (bits.py), stored as q + 2^(b-1)
    weight_scale    (N, G) float, G scales along a row; (N, 1) per channel; (1,) for the whole tensor
    weight_zero_point  None when symmetric; (ceil(N b / 32), G) int32, packed like the codes but along N; or, beside a
                    scale (1,), one int8 on the signed axis
    bias            (N,) float or None
    y_MN            (..., N), dtype of x

W = (q - zero) * scale in float32, rounded once to the dtype of x. The stored codes and zero points share the offset
2^(b-1), so it cancels; when symmetric the zero is the offset itself.

`wna16_linear` is the torch operator `quantkit::wna16_linear`; what runs is the kernel registered for the device, and
without one `wna16_linear_reference`, which is also what every kernel is compared with.
"""

import torch
import torch.nn.functional as F

from quantkit_kernels.bits import packed_width, unpack_bits

DECODE_ELEMENTS = 1 << 24  # weights decoded at once: bounds the float32 temporary at 64 MiB

MaybeTensor = torch.Tensor | None


def _check(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: MaybeTensor,
    bias: MaybeTensor,
    in_features: int,
    bits: int,
) -> None:
    """Shapes and dtypes, before they can be read wrongly. Raises ValueError with the measured ones."""
    n = weight_packed.shape[0]
    if x.dim() == 0 or x.shape[-1] != in_features or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; expected float (..., {in_features})")
    if tuple(weight_packed.shape) != (n, packed_width(in_features, bits)) or weight_packed.dtype != torch.int32:
        raise ValueError(
            f"weight_packed is {weight_packed.dtype} {tuple(weight_packed.shape)}; "
            f"{in_features} codes of {bits} bits need int32 (N, {packed_width(in_features, bits)})"
        )
    whole = weight_scale.dim() == 1
    if (tuple(weight_scale.shape) != (1,)) if whole else (weight_scale.shape[0] != n):
        raise ValueError(
            f"weight_scale is {tuple(weight_scale.shape)}; expected ({n}, G), or (1,) for the whole tensor"
        )
    groups = 1 if whole else weight_scale.shape[1]
    if in_features % groups:
        raise ValueError(f"{groups} groups do not divide in_features {in_features}")
    if weight_zero_point is not None:
        expected = ((1,), torch.int8) if whole else ((packed_width(n, bits), groups), torch.int32)
        if (tuple(weight_zero_point.shape), weight_zero_point.dtype) != expected:
            raise ValueError(
                f"weight_zero_point is {weight_zero_point.dtype} {tuple(weight_zero_point.shape)}; "
                f"expected {expected[1]} {expected[0]}"
            )
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias is {tuple(bias.shape)}; expected ({n},)")


def wna16_decode(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: MaybeTensor,
    in_features: int,
    bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight that the codes stand for, (N, in_features) of `dtype`. Shapes as in the module's docstring."""
    n, offset = weight_packed.shape[0], 1 << (bits - 1)
    scale = weight_scale.float().reshape(-1, 1 if weight_scale.dim() == 1 else weight_scale.shape[1])
    if weight_zero_point is None:
        zero = torch.full_like(scale, offset)
    elif weight_zero_point.dtype == torch.int8:
        zero = weight_zero_point.float().reshape(1, 1) + offset
    else:
        zero = unpack_bits(weight_zero_point.t(), bits, n).t().float()
    scale, zero = scale.expand(n, -1)[..., None], zero.expand(n, -1)[..., None]

    def rows(start: int, stop: int) -> torch.Tensor:
        codes = unpack_bits(weight_packed[start:stop], bits, in_features)
        w = codes.float().unflatten(1, (scale.shape[1], -1))
        return w.sub_(zero[start:stop]).mul_(scale[start:stop]).flatten(1).to(dtype)

    step = max(1, DECODE_ELEMENTS // max(in_features, 1))
    if n <= step:
        return rows(0, n)
    w_NK = torch.empty(n, in_features, dtype=dtype, device=weight_packed.device)
    for start in range(0, n, step):
        w_NK[start : start + step] = rows(start, start + step)
    return w_NK


def wna16_linear_reference(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: MaybeTensor,
    bias: MaybeTensor,
    in_features: int,
    bits: int,
) -> torch.Tensor:
    """Decodes the whole weight, then a dense linear. Any device; shapes as in the module's docstring.

    Raises ValueError when the tensors do not belong together.
    """
    _check(x, weight_packed, weight_scale, weight_zero_point, bias, in_features, bits)
    weight = wna16_decode(weight_packed, weight_scale, weight_zero_point, in_features, bits, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


@torch.library.custom_op("quantkit::wna16_linear", mutates_args=())
def wna16_linear(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int,
    bits: int,
) -> torch.Tensor:
    """The operator: see the module's docstring. Gradients reach x and bias; codes, scales and zero points are fixed."""
    return wna16_linear_reference(x, weight_packed, weight_scale, weight_zero_point, bias, in_features, bits)


@wna16_linear.register_fake
def _fake(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: MaybeTensor,
    bias: MaybeTensor,
    in_features: int,
    bits: int,
) -> torch.Tensor:
    _check(x, weight_packed, weight_scale, weight_zero_point, bias, in_features, bits)
    return x.new_empty(*x.shape[:-1], weight_packed.shape[0])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, weight_packed, weight_scale, weight_zero_point, _, ctx.in_features, ctx.bits = inputs
    ctx.save_for_backward(weight_packed, weight_scale, weight_zero_point)


def _backward(ctx, grad_y):  # type: ignore[no-untyped-def]
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        packed, scale, zero = ctx.saved_tensors
        grad_x = grad_y @ wna16_decode(packed, scale, zero, ctx.in_features, ctx.bits, grad_y.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0)
    return grad_x, None, None, None, grad_bias, None, None


wna16_linear.register_autograd(_backward, setup_context=_setup_context)
