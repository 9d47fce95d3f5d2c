"""What a rotation asks of a model before it is decided: answered by running parts of it, never by names.

Of a norm, whether it commutes with a rotation: the module runs on a few random rows. Of the model, what becomes of each
linear's output, from one run on the meta device in which every operation is seen.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quantkit import blocks
from quantkit.transforms._hadamard import Turn

# Operations, by aten's names, after which each channel still is what it was. What else there is may mix channels or
# treat them differently.
_MOVES = frozenset((
    "_to_copy", "_unsafe_view", "alias", "cat", "chunk", "clone", "contiguous", "detach", "expand",
    "index_select", "permute", "repeat", "repeat_interleave", "reshape", "select", "slice", "split", "split_with_sizes",
    "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
))  # fmt: skip
# Sums over tokens: the operand in this place is summed, by weights that are the same for all of its channels.
_SUMS = {"mm": 1, "bmm": 1}
_ATTENTION = "_scaled_dot_product"  # several; values come third
_ADDS = frozenset({"add", "add_", "index_add", "index_add_"})


def vectors(model: nn.Module, width: int) -> frozenset[str]:
    """Modules that are no linears and whose `weight` is a vector of `width`: norms, as far as one can tell."""
    return frozenset(
        name
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear)
        and (weight := module._parameters.get("weight")) is not None
        and tuple(weight.shape) == (width,)
    )


def commutes(norm: nn.Module, neutral: float, turn: Turn) -> bool:
    """Whether norm(x R) = norm(x) R, tried on random rows with all weights `neutral`: not if it subtracts a mean."""
    width = len(turn.signs)
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)) + 1
    trial = copy.deepcopy(norm)
    trial._parameters["weight"] = nn.Parameter(torch.full((width,), neutral), requires_grad=False)
    with torch.no_grad():
        turned, after = trial(turn.forward(x.double()).float()), turn.forward(trial(x).double())
    return torch.allclose(turned.double(), after, rtol=1e-3, atol=1e-3)


@dataclass
class Uses:
    """What becomes of the output of linears, as long as each of its channels stays what it was: moved, scaled, summed
    over tokens.

    read_by  module -> the linear whose output it is called with
    added    linears whose output is added to something, as to the hidden states
    """

    read_by: dict[str, str] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)


def uses(model: nn.Module, linears: Iterable[str], readers: Iterable[str]) -> Uses:
    """Follows the outputs of `linears` to `readers`. Finds nothing when the model does not run on the meta device."""
    trace = _Trace(tuple(linears), tuple(readers))
    return Uses() if blocks.dry_run(model, trace.watching) else trace.uses


class _Trace(TorchDispatchMode):
    """Sees every operation. What comes from a linear is held with its name, so that no id is used twice."""

    def __init__(self, linears: tuple[str, ...], readers: tuple[str, ...]) -> None:
        super().__init__()
        self.linears, self.readers, self.uses = linears, readers, Uses()
        self.source: dict[int, tuple[str, torch.Tensor]] = {}

    @contextmanager
    def watching(self, ghost: nn.Module) -> Iterator[None]:
        self.uses, self.source = Uses(), {}
        handles = []
        for name in self.readers:

            def reads(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                if args and (source := self._of(args[0])):
                    self.uses.read_by[name] = source

            handles.append(ghost.get_submodule(name).register_forward_pre_hook(reads))
        for name in self.linears:

            def gives(_: nn.Module, args: tuple[Any, ...], out: torch.Tensor, name: str = name) -> None:
                self.source[id(out)] = (name, out)

            handles.append(ghost.get_submodule(name).register_forward_hook(gives))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _of(self, value: Any) -> str | None:
        """The linear that a tensor comes from, or the first in a list of tensors."""
        for tensor in tree_leaves(value):
            if id(tensor) in self.source:
                return self.source[id(tensor)][0]
        return None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        op = func.overloadpacket.__name__
        if op in _ADDS:
            self.uses.added |= {source for value in args if (source := self._of(value))}
        read: Any = None
        if op in _MOVES:
            read = args[0]
        elif op in _SUMS or op.startswith(_ATTENTION):
            read = args[_SUMS.get(op, 2)]
        elif op in ("mul", "mul_", "div"):
            read = _scaled(args[0], args[1])
        if read is not None and (source := self._of(read)):
            results = tree_leaves(out)[: 1 if op.startswith(_ATTENTION) else None]
            self.source |= {id(t): (source, t) for t in results if isinstance(t, torch.Tensor)}
        return out


def _scaled(a: Any, b: Any) -> torch.Tensor | None:
    """The factor of a product whose channels the other one scales alike: it is a number, or has one channel."""
    for x, factor in ((a, b), (b, a)):
        if not isinstance(factor, torch.Tensor) or not factor.ndim or factor.shape[-1] == 1:
            return x if isinstance(x, torch.Tensor) else None
    return None
