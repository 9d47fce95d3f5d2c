"""Layers that have one input multiplied in one launch: q, k and v; gate and up. Loading does it to layers on a GPU.

The rows of their weights are put together, a group at a time, so that no more than one group is ever in memory twice.
The layers stay where they are, under their names: adapters find them, `state_dict` has their own tensors (copied when
it is called, to the CPU), and a checkpoint is saved as it was. The first of them to be called computes for all, and
the others take their part, if they are given the very same input; else each computes for itself again.

Inputs that are quantized are quantized once. A group is joined only when its layers agree in everything that a kernel
is told: the scheme, the dtypes, scales of the input. NVFP4's global scales become one a row. `separate(model)` undoes
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from quantkit.runtime.held import Held
from quantkit.runtime.linear import PackedLinear
from quantkit.runtime.product import Product
from quantkit_kernels import layout, wxa16
from quantkit_kernels._words import row_words

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
INPUTS = ("input_scale", "input_zero_point", "input_global_scale")


class Lead(Product):
    """The joined tensors, as buffers that no state dict has."""

    def __init__(self, held: Held, tensors: dict[str, torch.Tensor], bias: torch.Tensor | None) -> None:
        super().__init__()
        self.held = held
        for name, t in tensors.items():
            self.register_buffer(name, t, persistent=False)
        if held.path == "packed":
            self.register_buffer("counters", wxa16.make_counters(held.shape[0], self.codes.device), persistent=False)
        self.register_buffer("bias", bias, persistent=False)


class Joint:
    """A group. `rows` are those of each member in the joined weight."""

    def __init__(self, lead: Lead, rows: list[tuple[int, int]]) -> None:
        self.lead, self.rows = lead, rows
        self.sizes = [stop - start for start, stop in rows]
        self.x: torch.Tensor | None = None
        self.parts: tuple[torch.Tensor, ...] | None = None
        self.left = 0

    def output(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """What member `place` makes of x."""
        if self.parts is None or self.x is not x:
            self.parts, self.x, self.left = self.lead.product(x).split(self.sizes, -1), x, len(self.sizes)
        y = self.parts[place]
        self.left -= 1
        if self.left == 0:
            self.x = self.parts = None
        return y

    def tensors(self, place: int) -> dict[str, torch.Tensor]:
        """What member `place` would hold by itself: views, or copies of 3-bit words."""
        (start, stop), held = self.rows[place], self.lead.held
        found = self.lead.tensors()
        if held.path == "packed":
            found["codes"] = row_words(found["codes"], layout.get(held.kind).code, start, stop)
            if "global_scale" in found:  # the same for all rows of a member
                found["global_scale"] = found["global_scale"][start : start + 1]
            return {n: t[:, start:stop] if n in ("scale", "zero") else t for n, t in found.items()}
        unit = 128 if held.path == "block" else 1
        one = held.path == "w8a8" and held.disk.scheme.weights.strategy == "tensor"  # there it is the same for all rows
        found["scale"] = found["scale"][start // unit : start + 1 if one else -(-stop // unit)]
        return {n: t[start:stop] if n in ("codes", "weight_sum") else t for n, t in found.items()}


def join(model: nn.Module, on: str | None = None) -> int:
    """Joins what can be joined in a loaded model. Returns the number of groups.

    on  the only type of device whose layers are joined, "cuda"; None: all
    """
    count = 0
    for group in list(_groups(model)):
        if (on is None or group[0].codes.device.type == on) and _agree(group):
            _join(group)
            count += 1
    return count


def separate(model: nn.Module) -> None:
    """Every layer by itself again."""
    for module in model.modules():
        if isinstance(module, PackedLinear) and module.joint is not None:
            own = {n: t for n, t in module.joint.tensors(module.place).items() if n not in module._parameters}
            for name, t in own.items():
                module.register_parameter(name, nn.Parameter(t.contiguous(), requires_grad=False))
            module._state_dict_hooks.pop(module.__dict__.pop("hook").id)
            if module.held.path == "packed":
                counters = wxa16.make_counters(module.held.shape[0], own["codes"].device)
                module.register_buffer("counters", counters, persistent=False)
            module.joint = None
            module._modules.pop("lead", None)


def _groups(model: nn.Module) -> Iterator[list[PackedLinear]]:
    for parent in list(model.modules()):
        children = dict(parent.named_children())
        for names in GROUPS:
            found = [m for name in names if isinstance(m := children.get(name), PackedLinear)]
            if len(found) == len(names):
                yield found


def _agree(group: list[PackedLinear]) -> bool:
    """Whether one kernel can multiply by all of them at once."""
    first, multiple = group[0], {"packed": 8, "block": 128}.get(group[0].held.path, 1)
    for m in group:
        held = m.held
        if held.path not in ("packed", "w8a8", "block") or held.order or held.factor or m.joint is not None:
            return False
        if m.codes.is_meta or m.codes.device != first.codes.device or hasattr(m, "_hf_hook"):  # offloaded
            return False
        if _told(held) != _told(first.held) or held.shape[0] % multiple:
            return False
        for name in INPUTS:
            one, other = first._get(name), m._get(name)
            if (one is None) != (other is None) or (one is not None and other is not None and not one.equal(other)):
                return False
    return True


def _told(held: Held) -> tuple[Any, ...]:
    """What a kernel is told of a weight, its rows apart."""
    kept = {leaf: spec.dtype for leaf, spec in held.disk.kept.items()}
    numbers = (held.path, held.kind, held.scale_dtype, held.group, held.codes_scale_dtype, held.shape[1])
    return (*numbers, held.disk.scheme, held.disk.method, kept)


def _join(group: list[PackedLinear]) -> None:
    first, rows, stop = group[0], [], 0
    for m in group:
        rows.append((stop, stop + m.held.shape[0]))
        stop += m.held.shape[0]
    disk = replace(first.held.disk, shape=(stop, first.held.disk.shape[1]))
    held = replace(first.held, disk=disk, rows_held=None, rows=1)
    joined = {name: _cat(held, [m.tensors()[name] for m in group], name, rows) for name in first.tensors()}
    biases = [m.bias for m in group]
    bias = None
    if any(b is not None for b in biases):
        dtype = next(b.dtype for b in biases if b is not None)
        zeros = (first.codes.new_zeros(stop - start, dtype=dtype) for start, stop in rows)
        bias = torch.cat([z if b is None else b.detach().to(dtype) for b, z in zip(biases, zeros)])
    joint = Joint(Lead(held, joined, bias), rows)
    first.add_module("lead", joint.lead)  # moved with it
    for place, m in enumerate(group):
        m.joint, m.place = joint, place
        for name in ("codes", "scale", "zero", "global_scale", "weight_sum"):
            m._parameters.pop(name, None)
        m._buffers.pop("counters", None)
        m.__dict__["hook"] = m.register_state_dict_post_hook(_own_tensors)


def _cat(held: Held, tensors: list[torch.Tensor], name: str, rows: list[tuple[int, int]]) -> torch.Tensor:
    """One of the tensors of all members, put together."""
    if name == "global_scale":
        return torch.cat([t.detach().expand(stop - start) for t, (start, stop) in zip(tensors, rows)])
    if name not in ("codes", "scale", "zero", "weight_sum"):
        return tensors[0].detach().clone()
    if held.path != "packed":
        if name == "scale" and held.path == "w8a8":  # a scale for a whole tensor becomes one a row
            tensors = [t.expand(stop - start, -1) for t, (start, stop) in zip(tensors, rows)]
        return torch.cat([t.detach() for t in tensors])
    if name != "codes" or layout.get(held.kind).bits != 3:
        return torch.cat([t.detach() for t in tensors], 1)
    planes = [(t.flatten(1)[:, : t.shape[1] * 16], t.flatten(1)[:, t.shape[1] * 16 :]) for t in tensors]
    words = torch.cat([t for plane in zip(*planes) for t in plane], 1)
    return words.view(tensors[0].shape[0], -1, tensors[0].shape[2]).contiguous()


def _own_tensors(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Puts the tensors of a member of a group into a state dict."""
    assert isinstance(module, PackedLinear)
    for name, t in module.joint.tensors(module.place).items():
        if name not in module._parameters:
            state[prefix + name] = t.contiguous() if t.device.type == "cpu" else t.cpu()
