"""y = x Wᵀ + b with W as packed codes of 2 to 8 bits and x in bfloat16 or float16.

    x_MK          (..., K) bfloat16 or float16; any leading dimensions. Others run the reference
    codes, scale, zero, global_scale   as layout.pack lays them out: int32, int32, int32 or None; (1,) or, one a row,
                  (N,) float32, or None
    bias          (N,) float or None
    order         (K,) integer or None: x[..., order] is what the codes' columns belong to (layout.act_order)
    counters      (tiles,) int32 zeros or None: one a tile of the output, where a sum is split. They are zero again
                  afterwards, so a layer may keep them; two calls that run at once must not share them
    kind, scale_dtype, n, k, group   what is packed, as layout.Packed has it
    y_MN          (..., N), dtype of x

W is (q - zero) * scale rounded once to the dtype of x: what layout.decode gives. Sums are float32. Where the scale is
applied after a sum (Choice.where), W is not even rounded.

`wxa16_linear` is the torch operator `quantkit::wxa16_linear`. On a GPU: for few tokens and for some hundreds one kernel
that decodes in registers, for many the weight decoded slab by slab and multiplied by cuBLAS; choice.py says which.
Elsewhere the reference. The same input gives the same bits, also where sums are split.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F

from quantkit_kernels import layout
from quantkit_kernels._launch import direct
from quantkit_kernels._unpacking import FLOATS, constants, global_mode
from quantkit_kernels._wxa16_launch import Gemm, Hopper, prepared
from quantkit_kernels.choice import Choice, Problem, choose, gpu_of
from quantkit_kernels.layout import Packed

MaybeTensor = torch.Tensor | None
FARTHEST = 1 << 23  # tokens that are farther apart are copied: within a tile, offsets have 32 bits
Ready = tuple[Choice, Gemm | Hopper | None, tuple[int, int, int, bool, int]]


def linear(
    x: torch.Tensor,
    packed: Packed,
    bias: MaybeTensor = None,
    order: MaybeTensor = None,
    counters: MaybeTensor = None,
) -> torch.Tensor:
    """`wxa16_linear` of a Packed; where nothing traces or differentiates, without the dispatcher, which costs time."""
    p = packed
    if direct(x, bias):
        return _run(x, p, bias, order, counters)
    return wxa16_linear(
        x, p.codes, p.scale, p.zero, p.global_scale, bias, order, counters, p.kind, p.scale_dtype, p.n, p.k, p.group
    )


def make_counters(n: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Counters that a layer of `n` rows may keep. Too few, or none: a call makes its own, which costs a kernel."""
    return torch.zeros(max(64, -(-n // 16)), dtype=torch.int32, device=device)


def _check(x: torch.Tensor, packed: Packed, bias: MaybeTensor, order: MaybeTensor, counters: MaybeTensor) -> None:
    """Shapes and dtypes, before they can be read wrongly. Raises ValueError with the measured ones."""
    p = packed
    form, how = layout.get(p.kind), layout.geometry(p.kind, p.scale_dtype, p.k, p.group)
    high = layout.padded_rows(p.n)
    rows = p.n if p.global_scale is not None and p.global_scale.numel() == p.n else 1
    if x.dim() == 0 or x.shape[-1] != p.k or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; expected float (..., {p.k})")
    wanted: list[tuple[str, MaybeTensor, torch.dtype, tuple[int, ...], bool]] = [
        ("codes", p.codes, torch.int32, (layout.lines(p.kind, p.k), high, form.words), True),
        ("scale", p.scale, torch.int32, how.shape(p.n), True),
        ("zero", p.zero, torch.int32, how.shape(p.n), layout.zero_mode(p.kind, p.scale_dtype) == 2),
        ("global_scale", p.global_scale, torch.float32, (rows,), p.kind == "nvfp4"),
    ]
    for name, t, dtype, shape, needed in wanted:
        if (t is not None) != needed:
            raise ValueError(f"{name} is {'given' if t is not None else 'missing'} for {p.kind} with {p.scale_dtype}")
        if t is not None and (t.dtype != dtype or tuple(t.shape) != shape or not t.is_contiguous()):
            raise ValueError(f"{name} is {t.dtype} {tuple(t.shape)}; {p.kind} ({p.n}, {p.k}) has {dtype} {shape}")
    if bias is not None and tuple(bias.shape) != (p.n,):
        raise ValueError(f"bias is {tuple(bias.shape)}; expected ({p.n},)")
    if order is not None and (tuple(order.shape) != (p.k,) or order.is_floating_point()):
        raise ValueError(f"order is {order.dtype} {tuple(order.shape)}; expected integers ({p.k},)")
    if counters is not None and (counters.dtype != torch.int32 or counters.dim() != 1):
        raise ValueError(f"counters are {counters.dtype} {tuple(counters.shape)}; expected int32 (tiles,)")


def wxa16_linear_reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: MaybeTensor,
    global_scale: MaybeTensor,
    bias: MaybeTensor,
    order: MaybeTensor,
    counters: MaybeTensor,
    kind: str,
    scale_dtype: str,
    n: int,
    k: int,
    group: int,
) -> torch.Tensor:
    """Decodes the whole weight, then a dense linear. Any device and float dtype.

    Raises ValueError when the tensors do not belong together.
    """
    packed = Packed(kind, n, k, group, 1, scale_dtype, codes, scale, zero, global_scale)
    _check(x, packed, bias, order, counters)
    weight = layout.decode(packed, x.dtype)
    # contiguous: torch's product on a CPU reads beyond the columns of a strided bfloat16 x, and NaN there would count
    x = x.contiguous() if order is None else x.index_select(-1, order)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


@torch.library.custom_op("quantkit::wxa16_linear", mutates_args=())
def wxa16_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    order: torch.Tensor | None,
    counters: torch.Tensor | None,
    kind: str,
    scale_dtype: str,
    n: int,
    k: int,
    group: int,
) -> torch.Tensor:
    """The operator: see the module's docstring. Gradients reach x and bias; the weight is fixed."""
    return wxa16_linear_reference(
        x, codes, scale, zero, global_scale, bias, order, counters, kind, scale_dtype, n, k, group
    )


@wxa16_linear.register_fake
def _fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: MaybeTensor,
    global_scale: MaybeTensor,
    bias: MaybeTensor,
    order: MaybeTensor,
    counters: MaybeTensor,
    kind: str,
    scale_dtype: str,
    n: int,
    k: int,
    group: int,
) -> torch.Tensor:
    packed = Packed(kind, n, k, group, 1, scale_dtype, codes, scale, zero, global_scale)
    _check(x, packed, bias, order, counters)
    return x.new_empty(*x.shape[:-1], n)


@wxa16_linear.register_kernel("cuda")
def _cuda(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: MaybeTensor,
    global_scale: MaybeTensor,
    bias: MaybeTensor,
    order: MaybeTensor,
    counters: MaybeTensor,
    kind: str,
    scale_dtype: str,
    n: int,
    k: int,
    group: int,
) -> torch.Tensor:
    packed = Packed(kind, n, k, group, 1, scale_dtype, codes, scale, zero, global_scale)
    return _run(x, packed, bias, order, counters)


def _run(x: torch.Tensor, packed: Packed, bias: MaybeTensor, order: MaybeTensor, counters: MaybeTensor) -> torch.Tensor:
    p, whole = packed, 0 if packed.global_scale is None else packed.global_scale.numel()
    ready = _ready(
        (p.kind, p.scale_dtype, p.n, p.k, p.group, x.numel() // max(p.k, 1), x.dtype, x.device),
        None if bias is None else bias.dtype,
        whole,
    )
    if ready is None:
        return wxa16_linear_reference(
            x, p.codes, p.scale, p.zero, p.global_scale, bias, order, counters, p.kind, p.scale_dtype, p.n, p.k, p.group
        )
    choice, product, sizes = ready
    measured = (x.shape[-1], p.codes.numel(), p.scale.numel(), p.zero is not None, whole)
    if measured != sizes or bias is not None or order is not None or not p.codes.is_contiguous():
        _check(x, packed, bias, order, counters)
    if product is None or order is not None or not x.is_contiguous():
        return run_with(choice, x, packed, bias, order, counters)
    y = x.new_empty((*x.shape[:-1], p.n))
    product(x, packed, bias, counters, y)
    return y


@functools.lru_cache(maxsize=4096)
def _ready(what: tuple[Any, ...], bias_dtype: torch.dtype | None, whole: int) -> Ready | None:
    """What is known before a product, None where no kernel runs: the configuration; what starts it; and what `_check`
    makes sure of, in numbers that are compared at once.

    what   kind, scale_dtype, n, k, group, tokens, and the dtype and device of x, which is contiguous
    whole  how many global scales there are
    """
    kind, scale_dtype, n, k, group, tokens, dtype, device = what
    gpu = gpu_of(device)
    if dtype not in FLOATS or gpu.capability < 80:
        return None
    high = layout.padded_rows(n)
    codes = layout.lines(kind, k) * high * layout.get(kind).words
    scales = math.prod(layout.geometry(kind, scale_dtype, k, group).shape(n))
    right = whole in (1, n) if kind == "nvfp4" else whole == 0
    sizes = (k, codes, scales, layout.zero_mode(kind, scale_dtype) == 2, whole if right else -1)
    problem = Problem(kind, scale_dtype, n, k, group, tokens, FLOATS[dtype])
    choice = choose(problem, gpu)
    product = None
    if choice.path != "dequant" and tokens and n:
        product = prepared(choice, problem, gpu, k, bias_dtype, dtype, device.type == "cuda", min(whole, 2))
    return choice, product, sizes


def run_with(
    choice: Choice,
    x: torch.Tensor,
    packed: Packed,
    bias: MaybeTensor = None,
    order: MaybeTensor = None,
    counters: MaybeTensor = None,
    *,
    out_dtype: torch.dtype | None = None,
    assembly: bool = True,
    out: MaybeTensor = None,
) -> torch.Tensor:
    """The kernels in one configuration, of shapes and dtypes that the operator has checked: for it, tuners and tests.

    out_dtype  of the result, the dtype of x if None; float32 shows sums before they are rounded
    assembly   false: the plain twin of the unpacking, which is slow
    out        (tokens, N) contiguous of that dtype, to write into
    """
    if order is not None:
        x = x.index_select(-1, order)
    flat = x.reshape(-1, packed.k)
    if packed.k > 1 and (flat.stride(1) != 1 or flat.stride(0) >= FARTHEST):
        flat = flat.contiguous()
    if out is None:
        out = torch.empty(flat.shape[0], packed.n, dtype=out_dtype or x.dtype, device=x.device)
    if flat.shape[0] and packed.n:
        assembly = assembly and x.is_cuda
        if choice.path == "dequant":
            with torch.cuda.device_of(x):
                _dequantized(choice, flat, packed, bias, out, assembly)
        else:
            p, bias_dtype = packed, None if bias is None else bias.dtype
            problem = Problem(p.kind, p.scale_dtype, p.n, p.k, p.group, flat.shape[0], FLOATS[x.dtype])
            gpu, dividing = gpu_of(x.device), global_mode(packed)
            product = prepared(choice, problem, gpu, flat.stride(0), bias_dtype, out.dtype, assembly, dividing)
            product(flat, packed, bias, counters, out)
    return out.view(*x.shape[:-1], packed.n)


def decode_rows(packed: Packed, first: int, out: torch.Tensor, *, assembly: bool = True) -> None:
    """Rows of the weight from `first` on, as many as `out` (rows, K) has, decoded on the GPU in the dtype of `out`."""
    from quantkit_kernels import _wxa16 as kernels

    rows, warps = 64, 4
    kernels.dequantize[(packed.codes.shape[0], -(-out.shape[0] // rows))](
        packed.codes,
        packed.scale,
        packed.scale if packed.zero is None else packed.zero,
        packed.scale if packed.global_scale is None else packed.global_scale,
        out,
        first,
        first + out.shape[0],
        packed.codes.shape[1],
        packed.k,
        BN=rows,
        WARPS=warps,
        num_warps=warps,
        **constants(packed, out.dtype, "before", assembly),
    )


def _dequantized(
    choice: Choice,
    x: torch.Tensor,
    packed: Packed,
    bias: MaybeTensor,
    out: torch.Tensor,
    assembly: bool,
) -> None:
    """Slabs of rows, so that a slab's decoded weight is still in the L2 cache when it is multiplied."""
    rows = max(128, choice.slab // (2 * packed.k) // 128 * 128)
    scratch = torch.empty(min(rows, packed.n), packed.k, dtype=x.dtype, device=x.device)
    for first in range(0, packed.n, rows):
        slab = scratch[: min(rows, packed.n - first)]
        decode_rows(packed, first, slab, assembly=assembly)
        part = out[:, first : first + slab.shape[0]]
        if out.dtype != x.dtype:
            part.copy_(x.float() @ slab.float().t())
        elif bias is None:
            torch.mm(x, slab.t(), out=part)
        else:
            torch.addmm(bias[first : first + slab.shape[0]].to(x.dtype), x, slab.t(), out=part)
    if out.dtype != x.dtype and bias is not None:
        out += bias


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, codes, scale, zero, global_scale, bias, order, _, *ctx.what = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(codes, scale, zero, global_scale, order)


def _backward(ctx, grad_y):  # type: ignore[no-untyped-def]
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        codes, scale, zero, global_scale, order = ctx.saved_tensors
        kind, scale_dtype, n, k, group = ctx.what
        packed = Packed(kind, n, k, group, 1, scale_dtype, codes, scale, zero, global_scale)
        grad_x = grad_y @ layout.decode(packed, grad_y.dtype)
        if order is not None:
            grad_x = torch.zeros_like(grad_x).index_copy(-1, order, grad_x)
    if ctx.needs_input_grad[5]:
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias, *[None] * 7


wxa16_linear.register_autograd(_backward, setup_context=_setup_context)
