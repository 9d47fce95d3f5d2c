"""y = x Wᵀ + b for a mixture of experts: rows of x lie by expert, and each expert has a weight of its own.

    x             (M, K), rows of expert 0 first, then those of expert 1, ...; bfloat16 or float16 for the kernels,
                  other floats take the reference, which reads the offsets on the host
    offsets       (E,) int32, the end of each expert's rows, ascending, at most M; as torch._grouped_mm has them. An
                  expert may have no rows. Rows from offsets[-1] on belong to nobody: y is zero there
    codes, scale, zero, global_scale   as layout.pack lays one expert out, with E in front: (E, L, N', W) and
                  (E, S, N') int32, (E, S, N') int32 or None, (E,) float32 or None
    bias          (E, N) float or None
    kind, scale_dtype, n, k, group     of every expert, as layout.Packed has it
    y             (M, N), dtype of x

    x_q, x_scale  (M, K) int8 or float8_e4m3fn, (M, 1) float: `grouped_w8a8`, otherwise as w8a8.py
    weight, weight_scale   (E, N, K) like x_q, row-major; (E, N, 1) float
    out_dtype     float32, float16 or bfloat16

`grouped_wxa16` and `grouped_w8a8` are the operators `quantkit::grouped_wxa16` and `quantkit::grouped_w8a8`. On a GPU
each is one launch (two where sums are split), whose grid and tile follow from shapes alone: the offsets are read on the
GPU, so that there is no waiting for it, and a CUDA graph is good for other offsets too. Elsewhere the reference. The
same input gives the same bits. No gradients.

`sort_by_expert` makes the order of the rows and the offsets from a router's choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from quantkit_kernels import layout, w8a8
from quantkit_kernels._grouped_choice import choose, choose_8
from quantkit_kernels._w8a8_choice import device_of
from quantkit_kernels.choice import Problem, gpu_of
from quantkit_kernels.layout import Packed
from quantkit_kernels.wxa16 import FLOATS

MaybeTensor = torch.Tensor | None


def grouped_linear(x: torch.Tensor, offsets: torch.Tensor, packed: Packed, bias: MaybeTensor = None) -> torch.Tensor:
    """`grouped_wxa16` of a Packed whose tensors have a first dimension of experts."""
    p = packed
    return grouped_wxa16(
        x, offsets, p.codes, p.scale, p.zero, p.global_scale, bias, p.kind, p.scale_dtype, p.n, p.k, p.group
    )


def stack(experts: Sequence[Packed]) -> Packed:
    """Weights of one kind and shape, as one Packed with a first dimension of experts.

    Raises ValueError where they differ.
    """
    first = experts[0]
    for e, one in enumerate(experts):
        if one[:6] != first[:6]:
            raise ValueError(f"expert {e} is {one[:6]}, expert 0 {first[:6]}")
    zeros = [one.zero for one in experts if one.zero is not None]
    wholes = [one.global_scale for one in experts if one.global_scale is not None]
    return first._replace(
        codes=torch.stack([one.codes for one in experts]),
        scale=torch.stack([one.scale for one in experts]),
        zero=torch.stack(zeros) if zeros else None,
        global_scale=torch.cat(wholes) if wholes else None,
    )


def unstack(packed: Packed) -> list[Packed]:
    """The experts of a stacked Packed, each a view."""
    p = packed
    return [
        p._replace(
            codes=p.codes[e],
            scale=p.scale[e],
            zero=None if p.zero is None else p.zero[e],
            global_scale=None if p.global_scale is None else p.global_scale[e : e + 1],
        )
        for e in range(p.codes.shape[0])
    ]


def sort_by_expert(top_k_index: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots of a router's choice by expert, and where each expert's end.

    top_k_index   (T, k) integers, the experts of each token, none negative. From `experts` on: nobody, and last
    Gives order (T k,) int64: the slot, token k + choice, of each row, in the order of tokens for one expert; and
    offsets (experts,) int32. Nothing is read on the host. Rows are x[order // k]; their results go back by
    torch.empty_like(y).index_copy(0, order, y).view(T, k, N), to be summed over k in one order.
    """
    ordered, order = top_k_index.reshape(-1).sort(stable=True)
    numbers = torch.arange(experts, dtype=ordered.dtype, device=ordered.device)
    return order, torch.searchsorted(ordered, numbers, right=True, out_int32=True)


# Weights in few bits -------------------------------------------------------------------------------------------------


def grouped_wxa16_reference(
    x: torch.Tensor,
    offsets: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: MaybeTensor,
    global_scale: MaybeTensor,
    bias: MaybeTensor,
    kind: str,
    scale_dtype: str,
    n: int,
    k: int,
    group: int,
) -> torch.Tensor:
    """Decodes the weight of each expert that has rows, then a dense linear. Any device and float dtype.

    Raises ValueError when the tensors do not belong together.
    """
    packed = Packed(kind, n, k, group, 1, scale_dtype, codes, scale, zero, global_scale)
    _check(x, offsets, packed, bias)
    x = x.contiguous()  # in bfloat16 a CPU's product may also read what lies beyond the columns of a wider tensor
    y, experts = x.new_zeros(x.shape[0], n), unstack(packed)
    for e, first, last in _spans(offsets, x.shape[0]):
        b = None if bias is None else bias[e].to(x.dtype)
        y[first:last] = F.linear(x[first:last], layout.decode(experts[e], x.dtype), b)
    return y


def _spans(offsets: torch.Tensor, m: int) -> Iterator[tuple[int, int, int]]:
    """Experts that have rows, with the first and the end of them. Raises ValueError for offsets that go down or on."""
    ends = offsets.tolist()
    for e, (first, last) in enumerate(zip([0, *ends], ends)):
        if not first <= last <= m:
            raise ValueError(
                f"offsets of expert {e} are {first} to {last} of {m} rows; they ascend from 0 to {m} at most"
            )
        if first < last:
            yield e, first, last


@torch.library.custom_op("quantkit::grouped_wxa16", mutates_args=())
def grouped_wxa16(
    x: torch.Tensor,
    offsets: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: str,
    scale_dtype: str,
    n: int,
    k: int,
    group: int,
) -> torch.Tensor:
    """The operator: see the module's docstring."""
    return grouped_wxa16_reference(
        x, offsets, codes, scale, zero, global_scale, bias, kind, scale_dtype, n, k, group
    )  # fmt: skip


@grouped_wxa16.register_fake
def _fake(
    x: torch.Tensor,
    offsets: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: MaybeTensor,
    global_scale: MaybeTensor,
    bias: MaybeTensor,
    kind: str,
    scale_dtype: str,
    n: int,
    k: int,
    group: int,
) -> torch.Tensor:
    _check(x, offsets, Packed(kind, n, k, group, 1, scale_dtype, codes, scale, zero, global_scale), bias)
    return x.new_empty(x.shape[0], n)


@grouped_wxa16.register_kernel("cuda")
def _cuda(
    x: torch.Tensor,
    offsets: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: MaybeTensor,
    global_scale: MaybeTensor,
    bias: MaybeTensor,
    kind: str,
    scale_dtype: str,
    n: int,
    k: int,
    group: int,
) -> torch.Tensor:
    gpu = gpu_of(x.device)
    if x.dtype not in FLOATS or gpu.capability < 80:
        return grouped_wxa16_reference(
            x, offsets, codes, scale, zero, global_scale, bias, kind, scale_dtype, n, k, group
        )  # fmt: skip
    packed = Packed(kind, n, k, group, 1, scale_dtype, codes, scale, zero, global_scale)
    _check(x, offsets, packed, bias)
    problem = Problem(kind, scale_dtype, n, k, group, x.shape[0], FLOATS[x.dtype])
    from quantkit_kernels import _grouped

    with torch.cuda.device_of(x):
        return _grouped.linear(choose(problem, offsets.shape[0], gpu), x, offsets, packed, bias)


def _check(x: torch.Tensor, offsets: torch.Tensor, packed: Packed, bias: MaybeTensor) -> None:
    """Shapes and dtypes, before they can be read wrongly. Raises ValueError with the measured ones."""
    p, experts = packed, _check_rows("x", x, offsets, packed.k)
    form, how = layout.get(p.kind), layout.geometry(p.kind, p.scale_dtype, p.k, p.group)
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; expected float (M, {p.k})")
    high = layout.padded_rows(p.n)
    scales = (experts, *how.shape(p.n))
    wanted: list[tuple[str, MaybeTensor, torch.dtype, tuple[int, ...], bool]] = [
        ("codes", p.codes, torch.int32, (experts, layout.lines(p.kind, p.k), high, form.words), True),
        ("scale", p.scale, torch.int32, scales, True),
        ("zero", p.zero, torch.int32, scales, layout.zero_mode(p.kind, p.scale_dtype) == 2),
        ("global_scale", p.global_scale, torch.float32, (experts,), p.kind == "nvfp4"),
    ]
    for name, t, dtype, shape, needed in wanted:
        if (t is not None) != needed:
            raise ValueError(f"{name} is {'given' if t is not None else 'missing'} for {p.kind} with {p.scale_dtype}")
        if t is not None and (t.dtype != dtype or tuple(t.shape) != shape or not t.is_contiguous()):
            raise ValueError(
                f"{name} is {t.dtype} {tuple(t.shape)}; {experts} times {p.kind} ({p.n}, {p.k}) has {dtype} {shape}"
            )
    _check_bias(bias, (experts, p.n))


def _check_rows(name: str, x: torch.Tensor, offsets: torch.Tensor, k: int) -> int:
    """Of rows and offsets; the number of experts."""
    if x.dim() != 2 or x.shape[1] != k:
        raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}; expected (M, {k})")
    if offsets.dim() != 1 or offsets.dtype != torch.int32 or offsets.shape[0] == 0 or not offsets.is_contiguous():
        raise ValueError(f"offsets are {offsets.dtype} {tuple(offsets.shape)}; expected int32 (experts,)")
    return offsets.shape[0]


def _check_bias(bias: MaybeTensor, shape: tuple[int, int]) -> None:
    if bias is not None and (tuple(bias.shape) != shape or not bias.is_floating_point() or not bias.is_contiguous()):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}; expected float {shape}")


# Eight bits by eight bits --------------------------------------------------------------------------------------------


def grouped_w8a8_reference(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: MaybeTensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`w8a8_linear_reference` of each expert that has rows. Any device.

    Raises ValueError when the tensors do not belong together.
    """
    _check_8(x_q, x_scale, offsets, weight, weight_scale, bias, out_dtype)
    y = torch.zeros(x_q.shape[0], weight.shape[1], dtype=out_dtype, device=x_q.device)
    for e, first, last in _spans(offsets, x_q.shape[0]):
        x, b = (x_q[first:last], x_scale[first:last]), None if bias is None else bias[e]
        y[first:last] = w8a8.w8a8_linear_reference(*x, weight[e], weight_scale[e], b, out_dtype)
    return y


@torch.library.custom_op("quantkit::grouped_w8a8", mutates_args=())
def grouped_w8a8(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The operator: see the module's docstring."""
    return grouped_w8a8_reference(x_q, x_scale, offsets, weight, weight_scale, bias, out_dtype)


@grouped_w8a8.register_fake
def _fake_8(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: MaybeTensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    _check_8(x_q, x_scale, offsets, weight, weight_scale, bias, out_dtype)
    return x_q.new_empty((x_q.shape[0], weight.shape[1]), dtype=out_dtype)


@grouped_w8a8.register_kernel("cpu")
def _cpu_8(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: MaybeTensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    _check_8(x_q, x_scale, offsets, weight, weight_scale, bias, out_dtype)
    y = torch.zeros(x_q.shape[0], weight.shape[1], dtype=out_dtype)
    for e, first, last in _spans(offsets, x_q.shape[0]):
        x, b = (x_q[first:last], x_scale[first:last]), None if bias is None else bias[e]
        y[first:last] = w8a8.w8a8_linear(*x, weight[e], weight_scale[e], b, out_dtype)
    return y


@grouped_w8a8.register_kernel("cuda")
def _cuda_8(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: MaybeTensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    if not w8a8.runs(weight):
        return grouped_w8a8_reference(x_q, x_scale, offsets, weight, weight_scale, bias, out_dtype)
    _check_8(x_q, x_scale, offsets, weight, weight_scale, bias, out_dtype)
    from quantkit_kernels import _grouped

    experts, n, k = weight.shape
    capability, processors = device_of(x_q.device)
    config = choose_8(x_q.shape[0], n, k, experts, weight.dtype != torch.int8, capability, processors)
    with torch.cuda.device_of(x_q):
        return _grouped.linear_8(config, x_q, x_scale, offsets, weight, weight_scale, bias, out_dtype)


def _check_8(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: MaybeTensor,
    out_dtype: torch.dtype,
) -> None:
    """Shapes and dtypes, before they can be read wrongly. Raises ValueError with the measured ones."""
    if weight.dim() != 3 or weight.dtype not in w8a8.KINDS or not weight.is_contiguous() or weight.shape[2] == 0:
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}; expected int8 or float8_e4m3fn (E, N, K)")
    experts, n, k = weight.shape
    if _check_rows("x_q", x_q, offsets, k) != experts:
        raise ValueError(f"offsets are {tuple(offsets.shape)} of {experts} experts")
    if x_q.dtype != weight.dtype:
        raise ValueError(f"x_q is {x_q.dtype}; the weight is {weight.dtype}")
    for name, t, shape in (
        ("x_scale", x_scale, (x_q.shape[0], 1)),
        ("weight_scale", weight_scale, (experts, n, 1)),
    ):
        if tuple(t.shape) != shape or not t.is_floating_point():
            raise ValueError(f"{name} is {t.dtype} {tuple(t.shape)}; expected float {shape}")
    _check_bias(bias, (experts, n))
    if out_dtype not in w8a8.FLOATS:
        raise ValueError(f"out_dtype is {out_dtype}; expected float32, float16 or bfloat16")
    if weight.dtype == torch.int8 and k > w8a8.LONGEST[False]:
        raise ValueError(f"K is {k}; int32 holds any sum of {w8a8.LONGEST[False]} products")
