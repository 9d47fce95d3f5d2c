"""y = x Wᵀ + b with weights and activations of 8 bits, integers or FP8, one scale a row on either side.

    x_q             (..., K) int8 or float8_e4m3fn; any leading dimensions, none of them needs a token
    x_scale         (..., 1) float, one a token, or (1,) for all; `activation` makes them
    weight          (N, K) like x_q, row-major: as compressed-tensors stores it
    weight_scale    (N, 1) float, one a row, or (1,) for all
    bias            (N,) float or None
    out_dtype       float32, float16 or bfloat16
    x_zero          int8 like x_scale, zero points of asymmetric int8 activations, or None
    weight_sum      (N,) int32, the sum of each row's codes (`weight_sums`, once a model), with x_zero only
    y_MN            (..., N), out_dtype

y = (sum over k of x_q w - x_zero * weight_sum) * x_scale * weight_scale + bias. The sum of int8 products is exact in
int32, which bounds K; what comes after it is float32 from left to right, rounded once to `out_dtype`. FP8 products are
summed in float32, at most 128 of them at a time in the tensor core's shorter format.

`w8a8_linear` is the operator `quantkit::w8a8_linear`; on CUDA with Triton (capability 8.0 for int8, 8.9 for FP8) it is
a kernel of `_w8a8` or torch's own product, on a CPU torch's products, elsewhere the reference. It has no gradients.
"""

import functools

import torch

from quantkit_kernels._launch import capability

CHUNK = 1 << 24  # elements of the weight widened at once: bounds the float64 temporary at 128 MiB
LONGEST = {False: (1 << 17) - 1, True: (1 << 16) - 1}  # K of which int32 holds any sum, without and with zero points
KINDS = (torch.int8, torch.float8_e4m3fn)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

MaybeTensor = torch.Tensor | None


def weight_sums(weight: torch.Tensor) -> torch.Tensor:
    """The sum of each row's int8 codes, int32 (N,)."""
    return weight.sum(1, dtype=torch.int32)


def w8a8_linear_reference(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: MaybeTensor,
    out_dtype: torch.dtype,
    x_zero: MaybeTensor = None,
    weight_sum: MaybeTensor = None,
) -> torch.Tensor:
    """Sums in float64, which are exact for int8. Any device; shapes as in the module's docstring.

    Raises ValueError when the tensors do not belong together.
    """
    _check(x_q, x_scale, weight, weight_scale, bias, out_dtype, x_zero, weight_sum)
    total = _sums(x_q, weight, torch.float64)
    return _finish(total, x_scale, weight_scale, bias, out_dtype, x_zero, weight_sum)


@torch.library.custom_op("quantkit::w8a8_linear", mutates_args=())
def w8a8_linear(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    x_zero: torch.Tensor | None = None,
    weight_sum: torch.Tensor | None = None,
) -> torch.Tensor:
    """The operator: see the module's docstring."""
    return w8a8_linear_reference(x_q, x_scale, weight, weight_scale, bias, out_dtype, x_zero, weight_sum)


@w8a8_linear.register_fake
def _fake(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: MaybeTensor,
    out_dtype: torch.dtype,
    x_zero: MaybeTensor = None,
    weight_sum: MaybeTensor = None,
) -> torch.Tensor:
    _check(x_q, x_scale, weight, weight_scale, bias, out_dtype, x_zero, weight_sum)
    return x_q.new_empty((*x_q.shape[:-1], weight.shape[0]), dtype=out_dtype)


@w8a8_linear.register_kernel("cpu")
def _cpu(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: MaybeTensor,
    out_dtype: torch.dtype,
    x_zero: MaybeTensor = None,
    weight_sum: MaybeTensor = None,
) -> torch.Tensor:
    _check(x_q, x_scale, weight, weight_scale, bias, out_dtype, x_zero, weight_sum)
    if weight.dtype == torch.int8:
        x_MK = x_q.reshape(-1, x_q.shape[-1])
        total = torch._int_mm(x_MK, weight.t()) if len(x_MK) else x_MK.new_empty((0, len(weight)), dtype=torch.int32)
        total = total.view(*x_q.shape[:-1], len(weight))
    else:
        total = _sums(x_q, weight, torch.float32)
    return _finish(total, x_scale, weight_scale, bias, out_dtype, x_zero, weight_sum)


@w8a8_linear.register_kernel("cuda")
def launch(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: MaybeTensor,
    out_dtype: torch.dtype,
    x_zero: MaybeTensor = None,
    weight_sum: MaybeTensor = None,
) -> torch.Tensor:
    tensors = (x_q, x_scale, weight, weight_scale, bias, x_zero, weight_sum)
    _check_alike(out_dtype, *(None if t is None else (t.shape, t.dtype) for t in tensors))
    if not runs(weight):
        return w8a8_linear_reference(x_q, x_scale, weight, weight_scale, bias, out_dtype, x_zero, weight_sum)
    from quantkit_kernels import _w8a8

    return _w8a8.linear(x_q, x_scale, weight, weight_scale, bias, out_dtype, x_zero, weight_sum)


def runs(weight: torch.Tensor) -> bool:
    """Whether kernels multiply by codes of this dtype where they lie: before capability 8.9 a GPU has no FP8."""
    return capability(weight.device) >= ((8, 0) if weight.dtype == torch.int8 else (8, 9))


def _sums(x_q: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x_q weightᵀ in a wider dtype, some rows of the weight at a time."""
    x, rows = x_q.to(dtype), max(1, CHUNK // weight.shape[1])
    return torch.cat([x @ w.to(dtype).t() for w in weight.split(rows)], -1)


def _finish(
    total: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: MaybeTensor,
    out_dtype: torch.dtype,
    x_zero: MaybeTensor,
    weight_sum: MaybeTensor,
) -> torch.Tensor:
    """From sums of codes to y."""
    if x_zero is not None and weight_sum is not None:
        total = total - x_zero.to(total.dtype) * weight_sum
    y = total.float() * x_scale.float() * weight_scale.float().reshape(-1)
    return (y if bias is None else y + bias.float()).to(out_dtype)


def _check(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: MaybeTensor,
    out_dtype: torch.dtype,
    x_zero: MaybeTensor,
    weight_sum: MaybeTensor,
) -> None:
    """Shapes and dtypes, before they can be read wrongly. Raises ValueError with the measured ones."""
    check_operands(x_q, weight, bias, out_dtype, KINDS)
    n, k = weight.shape
    token = ((*x_q.shape[:-1], 1), (1,))
    if tuple(x_scale.shape) not in token or not x_scale.is_floating_point():
        raise ValueError(f"x_scale is {x_scale.dtype} {tuple(x_scale.shape)}; expected float {token[0]} or (1,)")
    if tuple(weight_scale.shape) not in ((n, 1), (1,)) or not weight_scale.is_floating_point():
        raise ValueError(f"weight_scale is {weight_scale.dtype} {tuple(weight_scale.shape)}; expected ({n}, 1) or (1,)")
    if (x_zero is None) != (weight_sum is None):
        raise ValueError("x_zero and weight_sum come together, or neither")
    if weight.dtype == torch.int8 and k > LONGEST[x_zero is not None]:
        raise ValueError(f"K is {k}; int32 holds any sum of {LONGEST[x_zero is not None]} products")
    if x_zero is None or weight_sum is None:
        return
    if x_zero.shape != x_scale.shape or x_zero.dtype != torch.int8 or weight.dtype != torch.int8:
        raise ValueError(
            f"x_zero is {x_zero.dtype} {tuple(x_zero.shape)} of {weight.dtype}; "
            f"expected int8 {tuple(x_scale.shape)} of int8"
        )
    if tuple(weight_sum.shape) != (n,) or weight_sum.dtype != torch.int32:
        raise ValueError(f"weight_sum is {weight_sum.dtype} {tuple(weight_sum.shape)}; expected int32 ({n},)")


@functools.lru_cache(maxsize=4096)
def _check_alike(out_dtype: torch.dtype, *tensors: tuple[torch.Size, torch.dtype] | None) -> None:
    """`_check` of tensors with these shapes and dtypes, of which the last two are x_zero and weight_sum."""
    x_q, x_scale, weight, weight_scale, *others = (
        None if t is None else torch.empty(t[0], dtype=t[1], device="meta") for t in tensors
    )
    assert x_q is not None and x_scale is not None and weight is not None and weight_scale is not None
    bias, x_zero, weight_sum = others
    _check(x_q, x_scale, weight, weight_scale, bias, out_dtype, x_zero, weight_sum)


def check_operands(
    x_q: torch.Tensor, weight: torch.Tensor, bias: MaybeTensor, out_dtype: torch.dtype, kinds: tuple[torch.dtype, ...]
) -> None:
    """What holds whatever the scales. Raises ValueError."""
    if weight.dim() != 2 or weight.shape[1] == 0 or weight.dtype not in kinds:
        names = " or ".join(str(kind).removeprefix("torch.") for kind in kinds)
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}; expected {names} (N, K)")
    if x_q.dim() == 0 or x_q.shape[-1] != weight.shape[1] or x_q.dtype != weight.dtype:
        raise ValueError(f"x_q is {x_q.dtype} {tuple(x_q.shape)}; expected {weight.dtype} (..., {weight.shape[1]})")
    if bias is not None and (tuple(bias.shape) != (weight.shape[0],) or not bias.is_floating_point()):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}; expected float ({weight.shape[0]},)")
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype is {out_dtype}; expected float32, float16 or bfloat16")
