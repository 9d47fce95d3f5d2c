"""Starting Triton's kernels without what is found out anew at every call: eager models wait for the CPU, not the GPU.

Triton looks at every argument of a launch to find the compiled kernel that fits it, which costs more than the launch.
What decides is known here: whoever makes a `Start` names the dtypes of its tensors, all integers and all constants by
making one for each; whether pointers are aligned is seen at every call. `direct` tells where torch's dispatcher has
nothing to do either.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch


class Start:
    """`kernel[grid](*before, *tensors, *numbers, **constants)`, for tensors of always the same dtypes.

    numbers    integers and floats, which the compiler may look at
    constants  and what the compiler is told, such as num_warps
    before     at a call: descriptors of tensors, always alike but for their addresses
    The first call on a GPU goes through Triton, later ones straight to what it compiled.
    """

    __slots__ = ("constants", "grid", "kernel", "made", "numbers")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[float, ...], constants: Mapping[str, Any]
    ) -> None:
        self.kernel, self.numbers, self.constants = kernel, numbers, constants
        self.grid = (*grid, 1, 1)[:3]
        self.made: dict[int, tuple[Any, ...]] = {}  # by the GPU's number

    def __call__(self, *tensors: torch.Tensor, before: tuple[Any, ...] = ()) -> None:
        index = tensors[0].get_device()
        if index >= 0 and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                self(*tensors, before=before)
            return
        made = self.made.get(index)
        if made is not None:
            pointers = [t.data_ptr() for t in tensors]
            bits = 0
            for pointer in pointers:
                bits |= pointer
            launch, function, metadata, stream, hooks, rest = made
            if not bits % 16 and not _watched(hooks):
                launch(*self.grid, stream(index), function, metadata, None, None, None, *before, *pointers, *rest)
                return
        compiled = self.kernel[self.grid](*before, *tensors, *self.numbers, **self.constants)
        # Triton's interpreter has no kernel to give; and where only compiling is wanted, nothing is launched later.
        if compiled is None or not type(self.kernel).run.__module__.startswith("triton."):
            return
        if all(t.data_ptr() % 16 == 0 for t in tensors):
            self.made[index] = self._remembered(compiled, len(before) + len(tensors))

    def _remembered(self, compiled: Any, given: int) -> tuple[Any, ...]:
        """What Triton itself hands to a compiled kernel, the constants among the arguments included."""
        from triton import knobs
        from triton.runtime import driver

        names = self.kernel.arg_names[given + len(self.numbers) :]
        rest = (*self.numbers, *(self.constants[name] for name in names))
        stream = driver.active.get_current_stream
        return compiled.run, compiled.function, compiled.packed_metadata, stream, knobs.runtime, rest


def _watched(hooks: Any) -> bool:
    """Whether a profiler wants to hear of launches."""
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    return bool(getattr(enter, "calls", enter)) or bool(getattr(leave, "calls", leave))


def direct(*tensors: torch.Tensor | None) -> bool:
    """Whether an operator on these may be called as a function: on one GPU, nothing traced, nothing differentiated."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._is_tracing():
        return False
    needed, place = torch.is_grad_enabled(), None
    for t in tensors:
        if t is None:
            continue
        if not t.is_cuda or (type(t) is not torch.Tensor and type(t) is not torch.nn.Parameter):
            return False
        if needed and t.requires_grad:
            return False
        if place is not None and t.get_device() != place:
            return False
        place = t.get_device()
    return True


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU, if Triton is installed; else (0, 0)."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return 0, 0
    return torch.cuda.get_device_capability(device)
