"""Rotary position embedding of queries and keys, both in one launch.

    q, k        (B, Hq, L, D) and (B, Hk, L, D), float32, float16 or bfloat16; D even
    cos, sin    (B or 1, L, D) like them
    returns     x cos + rotate_half(x) sin of both, rotate_half (a, b) = (-b, a), each step rounded to the dtype: the
                bits of `apply_rotary_pos_emb` of transformers' Llama. They lie in memory as (B, L, H, D)

`rope` is the operator `quantkit::rope`: on CUDA with Triton (capability 8.0) one kernel, elsewhere `rope_reference`. It
has no gradients.
"""

from __future__ import annotations

import functools

import torch

from quantkit_kernels._launch import capability

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def rotated(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rope` where `direct` holds and `fits` does: without the dispatcher, which costs time."""
    if capability(q.device) < (8, 0):
        return rope_reference(q, k, cos, sin)
    from quantkit_kernels import _rope

    if not q.stride(-1) == k.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1:
        q, k, cos, sin = (t.contiguous() for t in (q, k, cos, sin))
    return _rope.rope(q, k, cos, sin)


def fits(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether the shapes and dtypes are such as the module's docstring has them."""
    shapes = (q.shape, k.shape, cos.shape, sin.shape)
    return _why_not(*shapes, (q.dtype, k.dtype, cos.dtype, sin.dtype)) == ""


def rope_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch. Raises ValueError for what does not belong together."""
    _check(q, k, cos, sin)
    cos, sin = cos[:, None], sin[:, None]
    half = q.shape[-1] // 2
    found = []
    for x in (q, k):
        turned = x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin
        found.append(turned.transpose(1, 2).contiguous().transpose(1, 2))
    return found[0], found[1]


def _check(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Shapes and dtypes, before they can be read wrongly. Raises ValueError with the measured ones."""
    dtypes = (q.dtype, k.dtype, cos.dtype, sin.dtype)
    reason = _why_not.__wrapped__(*(tuple(t.shape) for t in (q, k, cos, sin)), dtypes)  # sizes may be symbols
    if reason:
        raise ValueError(reason)


@functools.lru_cache(maxsize=4096)
def _why_not(
    q: tuple[int, ...], k: tuple[int, ...], cos: tuple[int, ...], sin: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> str:
    """What is wrong with shapes and dtypes; "" if nothing."""
    dtype = dtypes[0]
    if len(q) != 4 or q[3] % 2 or q[3] == 0 or dtype not in FLOATS:
        return f"q is {dtype} {tuple(q)}; expected float32, float16 or bfloat16 (B, H, L, D), D even"
    b, _, length, dim = q
    if len(k) != 4 or dtypes[1] != dtype or (k[0], k[2], k[3]) != (b, length, dim):
        return f"k is {dtypes[1]} {tuple(k)}; expected {dtype} ({b}, H, {length}, {dim})"
    for name, shape, own in (("cos", cos, dtypes[2]), ("sin", sin, dtypes[3])):
        if own != dtype or tuple(shape) not in ((b, length, dim), (1, length, dim)) or shape != cos:
            return f"{name} is {own} {tuple(shape)}; expected {dtype} ({b} or 1, {length}, {dim})"
    return ""


@torch.library.custom_op("quantkit::rope", mutates_args=())
def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator: see the module's docstring."""
    return rope_reference(q, k, cos, sin)


@rope.register_fake
def _fake(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _check(q, k, cos, sin)
    b, q_heads, length, dim = q.shape
    found = [q.new_empty((b, length, heads, dim)).transpose(1, 2) for heads in (q_heads, k.shape[1])]
    return found[0], found[1]


@rope.register_kernel("cuda")
def _cuda(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _check(q, k, cos, sin)
    return rotated(q, k, cos, sin)
