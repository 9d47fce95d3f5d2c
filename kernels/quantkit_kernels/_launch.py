"""Starting Triton's kernels without what is found out anew at every call: eager models wait for the CPU, not the GPU.

Triton looks at every argument of a launch to find the compiled kernel that fits it, which costs more than the launch.
What decides is known here: the constants and sizes of a weight, which the caller names once, and whether pointers are
aligned. `direct` tells where torch's dispatcher has nothing to do either.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

# Compiled kernels and the constants that they are called with, as Triton itself keeps them: by kernel, GPU and key.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: Callable[[], dict[str, Any]], key: Hashable
) -> None:
    """`kernel[grid](*arguments, **options())`, remembered.

    arguments  all that are no constants, in their order
    options    gives the others, constants, and what the compiler is told, such as num_warps
    key        of what decides which kernel fits, but for the alignment of tensors: all of `options`, dtypes of tensors,
               and integers but those that the kernel does not specialize
    """
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    if any(t.data_ptr() % 16 for t in tensors):
        kernel[grid](*arguments, **options())
        return
    place = (kernel, tensors[0].device, key)
    found = _compiled.get(place)
    if found is not None:
        made, rest = found
        made[(*grid, 1, 1)[:3]](*arguments, *rest)
        return
    constants = options()
    made = kernel[grid](*arguments, **constants)
    # Triton's interpreter has no kernel to give; and where only compiling is wanted, nothing must be launched later.
    if made is not None and type(kernel).run.__module__.startswith("triton."):
        _compiled[place] = made, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])


def direct(*tensors: torch.Tensor | None) -> bool:
    """Whether an operator on these may be called as a function: on a GPU, nothing traced, nothing differentiated."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    needed = torch.is_grad_enabled()
    for t in tensors:
        if t is None:
            continue
        if not t.is_cuda or (type(t) is not torch.Tensor and type(t) is not torch.nn.Parameter):
            return False
        if needed and t.requires_grad:
            return False
    return True
