"""Follows the channels of norms and linears through one run of a model: where each goes, and what is done to it.

Each tensor that is, channel by channel, linear in the output of a producer carries a twin of its own shape: at every
place, the number of the channel that stands there. What moves values around (view, transpose, chunk, the repeated heads
of grouped-query attention) is done to the twin as well, so the map from a linear's columns to a producer's channels is
read off, never guessed. Products with other tensors keep it, attention keeps that of its values. Whatever else is done
to a channel (an activation function, the residual sum, a rotary embedding, an operation not known here) is an escape.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

# By torch's name of the function. SAME: every value stays in its place.
SAME = frozenset((
    "alias", "bfloat16", "clone", "contiguous", "detach", "double", "dropout", "float", "half", "neg", "negative", "to",
    "type", "type_as",
))  # fmt: skip
# Values move, or are repeated; done to the twin too. "__get__" is x.T, x.mT and the like.
MOVES = frozenset((
    "__get__", "__getitem__", "chunk", "expand", "expand_as", "flatten", "index_select", "movedim", "narrow", "permute",
    "repeat", "repeat_interleave", "reshape", "reshape_as", "select", "split", "split_with_sizes", "squeeze",
    "swapaxes", "t", "tile", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as",
))  # fmt: skip
# Only the shape and the dtype are read.
LIKE = frozenset(
    ("empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like", "zeros_like")
)
# One factor may be linear in a producer; of div, the first.
PRODUCTS = frozenset(("mul", "multiply", "div", "divide", "true_divide"))


@dataclass(frozen=True)
class Label:
    """A tensor is linear in producers. `twin`: its shape, which channel stands at each place, int32; -1 for none."""

    twin: torch.Tensor
    head_dim: int = 0

    def places(self) -> torch.Tensor:
        """The twin without the axes along which it was only expanded, mostly those of the tokens."""
        twin = self.twin
        for axis, stride in enumerate(twin.stride()):
            twin = twin.narrow(axis, 0, 1) if stride == 0 else twin
        return twin

    def row(self) -> torch.Tensor | None:
        """The channels along the last axis, where they are the same everywhere else; otherwise None."""
        k = self.twin.shape[-1]
        rows = self.places().expand(*self.places().shape[:-1], k).reshape(-1, k)
        return rows[0] if bool((rows == rows[0]).all()) else None


@dataclass(frozen=True)
class Use:
    """A linear's columns read these channels of a producer, one each. `head_dim`: through attention's values."""

    producer: str
    channels: bytes  # int32 (K,): hashed once
    head_dim: int

    def row(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(self.channels), dtype=torch.int32).long()


class Unseen(TorchDispatchMode):
    """Calls again what comes to torch past its Python functions, as compiled scripts do: so `Trace` sees it too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Trace(TorchFunctionMode):
    """Sees each call of a torch function while the model runs, and follows the channels.

    The channels of all producers are numbered through: those of producer P are `first[P]` to `first[P] + size[P] - 1`.
    tied  modules that share a parameter with another one
    """

    def __init__(
        self, ghost: nn.Module, blocks: Sequence[str], is_norm: Callable[[nn.Module], bool], tied: set[str]
    ) -> None:
        super().__init__()
        modules = dict(ghost.named_modules())
        self.block_of = {n: b for b in blocks for n, _ in ghost.get_submodule(b).named_modules(prefix=b)}
        self.linears = {n for n in self.block_of if isinstance(modules[n], nn.Linear)}
        self.norms = {n: modules[n] for n in self.block_of if n not in self.linears and is_norm(modules[n])}
        self.size = {n: len(modules[n].weight) for n in self.block_of if n in self.linears or n in self.norms}
        self.names, self.starts = list(self.size), list(accumulate(self.size.values(), initial=0))
        self.first = dict(zip(self.names, self.starts, strict=False))
        self.escaped = torch.zeros(self.starts[-1], dtype=torch.bool)
        self.uses: dict[str, set[Use | None]] = {}  # of each linear, all that was ever read by it
        self.labels = WeakTensorKeyDictionary()
        self.parameters = WeakTensorKeyDictionary()  # -> module, "weight" or "bias"
        self.exposed = set(tied)  # modules with a parameter that is used in another way than by themselves
        self.running: str | None = None  # the norm that is
        for name, parameter in ghost.named_parameters(remove_duplicate=False):
            owner, _, leaf = name.rpartition(".")
            self.parameters[parameter] = (owner, leaf)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """While it lasts, outputs of norms are labelled."""
        handles = []
        for name, module in self.norms.items():

            def before(_: nn.Module, args: Any, name: str = name) -> None:
                self.running = name

            def after(_: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
                self.running = None
                alone = len(args) == 1 and not kwargs and isinstance(out, torch.Tensor)
                if alone and out.shape == args[0].shape and out.shape[-1] == self.size[name]:
                    self._produced(name, out)

            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given, made = list(_tensors((args, kwargs))), list(_tensors(out))
        name = getattr(func, "__name__", "")
        if func is nn.functional.linear:
            self._linear(out, *args, **kwargs)
            return out
        for t in given:
            self._parameter(t, name, made)
        # Reading a shape, a dtype or a device makes no tensor. Writing into one gives None.
        if any(t in self.labels for t in given) and (made or (out is None and name != "__get__")):
            followed = self._follow(func, name, args, kwargs, made)
            if followed is None:
                self._escape(*given)
            for t, label in followed or ():
                self.labels[t] = label
        return out

    def _of(self, t: Any) -> Label | None:
        found: Label | None = self.labels.get(t) if isinstance(t, torch.Tensor) else None
        return found

    def _produced(self, producer: str, out: torch.Tensor) -> None:
        """`out` (..., N) is the producer's output."""
        first = self.first[producer]
        numbers = torch.arange(first, first + out.shape[-1], dtype=torch.int32)
        self.labels[out] = Label(numbers.expand(out.shape))

    def _escape(self, *tensors: Any) -> None:
        """What stands in these tensors is used in a way that no scale survives."""
        for t in tensors:
            if (label := self._of(t)) is not None:
                places = label.places().flatten()
                self.escaped[places[places >= 0].long()] = True

    def _parameter(self, t: torch.Tensor, name: str, made: list[torch.Tensor]) -> None:
        """Notes a use of a parameter that is not its own module's. A cast of a weight stands for it."""
        owner = self.parameters.get(t)
        if owner is None or owner[0] == self.running or not made:
            return
        if name in SAME:
            self.parameters[made[0]] = owner
        else:
            self.exposed.add(owner[0])

    def _linear(self, out: torch.Tensor, input: Any, weight: Any, bias: Any = None) -> None:
        """x Wᵀ + b: the owner of W consumes x's channels and, when it is an nn.Linear, produces its own."""
        owner, leaf = self.parameters.get(weight, ("", ""))
        if bias is not None and self.parameters.get(bias) != (owner, "bias"):
            self.exposed |= {owner, self.parameters.get(bias, (owner, ""))[0]}
        self._escape(weight, bias)
        use = self._use(owner, input) if leaf == "weight" else None
        if use is None:
            self._escape(input)
        if leaf == "weight":
            self.uses.setdefault(owner, set()).add(use)
            if owner in self.linears:
                self._produced(owner, out)

    def _use(self, consumer: str, x: Any) -> Use | None:
        """What the columns of a linear read; None when it is not one channel each, of one producer in its block."""
        label = self._of(x)
        row = None if label is None else label.row()
        if label is None or row is None:
            return None
        producer = self.names[bisect_right(self.starts, max(int(row[0]), 0)) - 1]
        row = row - self.first[producer]
        if self.block_of.get(consumer) != self.block_of[producer] or int(row.min()) < 0:
            return None
        if int(row.max()) >= self.size[producer]:
            return None
        return Use(producer, row.numpy().tobytes(), label.head_dim)

    def _follow(
        self, func: Any, name: str, args: Any, kwargs: Any, made: list[torch.Tensor]
    ) -> list[tuple[torch.Tensor, Label]] | None:
        """Labels of what a call made of labelled tensors; None when it is no operation that keeps them."""
        first = self._of(args[0]) if args else None
        if name in SAME and first is not None and made[0].shape == first.twin.shape:
            return [(made[0], first)]
        if name in LIKE:
            return []
        if name in MOVES and first is not None:
            return _moved(func, name, first, args, kwargs, made)
        if name == "cat" and isinstance(args[0], tuple | list):
            axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            return _joined([(t, self._of(t)) for t in args[0]], axis, made[0])
        if name in PRODUCTS and len(args) == 2 and not kwargs:  # no out=, no rounding_mode=
            found = [label for a in args if (label := self._of(a)) is not None]
            if len(found) == 1 and (found[0] is first or name.startswith("mul")):
                return [(made[0], replace(found[0], twin=found[0].twin.expand(made[0].shape)))]
        if name in ("matmul", "bmm") and len(args) == 2 and first is None:
            value = self._of(args[1])
            return None if value is None else _attended(value, made[0])
        if name == "scaled_dot_product_attention" and len(args) >= 3:
            value = self._of(args[2])
            self._escape(*_tensors((args[:2], args[3:], kwargs)))
            return [] if value is None else _attended(value, made[0])
        return None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _moved(
    func: Any, name: str, label: Label, args: Any, kwargs: Any, made: list[torch.Tensor]
) -> list[tuple[torch.Tensor, Label]] | None:
    """The same movement of the twin."""
    chosen = [t for t in _tensors((args[1:], kwargs)) if not t.is_floating_point()]
    if chosen:  # which tokens are taken is not known here; where all tokens have the same channels it need not be
        row = label.row()
        axis = args[1] if len(args) > 1 else kwargs.get("dim")
        over_tokens = name == "index_select" and axis not in (-1, label.twin.ndim - 1)
        over_tokens |= name == "__getitem__" and isinstance(args[1], torch.Tensor) and label.twin.ndim > 1
        if row is None or not over_tokens or chosen[0].dtype == torch.bool or made[0].shape[-1] != len(row):
            return None
        return [(made[0], replace(label, twin=row.expand(made[0].shape)))]
    try:
        twins = list(_tensors(func(label.twin, *args[1:], **kwargs)))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    if [t.shape for t in twins] != [t.shape for t in made] or any(t.dtype != torch.int32 for t in twins):
        return None
    return [(t, replace(label, twin=twin)) for t, twin in zip(made, twins, strict=True)]


def _joined(
    parts: list[tuple[torch.Tensor, Label | None]], axis: int, out: torch.Tensor
) -> list[tuple[torch.Tensor, Label]] | None:
    """Side by side along an axis: each keeps its channels."""
    none = torch.full((1,) * out.ndim, -1, dtype=torch.int32)
    twins = [none.expand(t.shape) if label is None else label.twin for t, label in parts]
    if any(t.ndim != out.ndim for t in twins):
        return None
    for other in set(range(out.ndim)) - {axis % out.ndim}:
        if all(t.stride(other) == 0 for t in twins):
            twins = [t.narrow(other, 0, 1) for t in twins]
    heads = {label.head_dim for _, label in parts if label is not None}
    return [(out, Label(torch.cat(twins, axis).expand(out.shape), heads.pop() if len(heads) == 1 else 0))]


def _attended(value: Label, out: torch.Tensor) -> list[tuple[torch.Tensor, Label]] | None:
    """out[.., h, i, c] = sum_j a_ij v[.., h, j, c]: the channels of v, if they are the same for every token j."""
    twin = value.twin
    if twin.ndim < 2 or out.ndim != twin.ndim or not bool((twin == twin[..., :1, :]).all()):
        return None
    twin = twin[..., :1, :]
    if out.ndim >= 3 and out.shape[-3] != twin.shape[-3]:  # each head of v serves several of q
        if out.shape[-3] % twin.shape[-3]:
            return None
        twin = twin.repeat_interleave(out.shape[-3] // twin.shape[-3], -3)
    if twin.shape[-1] != out.shape[-1]:
        return None
    return [(out, replace(value, twin=twin.expand(out.shape), head_dim=twin.shape[-1]))]
