"""A mixture of experts whose weights stay packed, computed by the grouped kernels.

path     weights                      inputs              operator
packed   integers, FP8, MX, NVFP4     any                 grouped_wxa16, inputs rounded before it
w8a8     int8, FP8: a row, a tensor   int8, FP8 alike     grouped_w8a8
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint import DTYPES
from quantkit.errors import InputError
from quantkit.runtime import laying
from quantkit.runtime.rounding import in_reach, own_columns, rounded
from quantkit.runtime.stack import Stack
from quantkit_kernels import activation, layout
from quantkit_kernels.grouped import grouped_w8a8, grouped_wxa16, sort_by_expert

SIDES = ("up", "down")
LEAVES = {"gate_up_proj": "up", "up_proj": "up", "down_proj": "down"}  # transformers' parameters


class PackedExperts(nn.Module):
    """Takes the place of transformers' module for the experts of a layer.

    fused   that module: its activation and gate are used on
    stacks  "up" (gate and up, or up alone) and "down"

    Parameters are those of both stacks, as up_codes, down_scale, ..., all of integers; and biases, where it has them:
    transformers' own where a file has those of all experts in one tensor, up_bias and down_bias where each has its own,
    gate on top of up.
    Gradients reach the hidden states and the router's weights.
    """

    fused: Any
    late: tuple[laying.Late, ...] = ()

    def __init__(self, fused: Any, stacks: Mapping[str, Stack]) -> None:
        super().__init__()
        down = fused.down_proj
        self.dtype = down.dtype
        self.num_experts = int(down.shape[0])
        self.alone = not hasattr(fused, "has_gate")  # Llama 4's, which get every token once for each expert
        self.transposed = self.alone or bool(fused.is_transposed)
        self.alternate = not self.alone and not fused.is_concatenated  # gate and up, in what transformers' gate reads
        for name in list(fused._parameters):
            parameter = fused._parameters.pop(name)
            side = LEAVES.get(name.removesuffix("_bias"))
            if name not in LEAVES and (side is None or not stacks[side].biases):
                self.register_parameter(name, parameter)  # a bias
        for name, child in fused.named_children():  # the activation, a norm after each expert
            self.add_module(name, child)
        self.rank = 0
        self.ranks: Any = None  # the process group among which they are split
        self._hold(stacks, down.device)
        # In the dictionary of plain attributes: its methods are used, but it is no part of the tree of modules.
        self.__dict__["fused"] = fused

    def _hold(self, stacks: Mapping[str, Stack], device: torch.device | str | None) -> None:
        """Empty parameters for what is held."""
        self.stacks = dict(stacks)
        for side, stack in stacks.items():
            for name, (dtype, shape) in stack.specs().items():
                t = torch.empty(shape, dtype=dtype, device=device)
                self.register_parameter(f"{side}_{name}", nn.Parameter(t, requires_grad=False))
            if stack.biases:
                t = torch.empty(
                    (stack.experts, stack.disk.shape[0] * len(stack.parts)), dtype=self.dtype, device=device
                )
                self.register_parameter(f"{side}_bias", nn.Parameter(t, requires_grad=False))

    def split(self, rank: int, ranks: int) -> None:
        """Before loading: holds one rank's part of what lies between the two projections. The sum over all ranks of
        what they compute is what the whole computes. Raises InputError if it cannot be split so.
        """
        parts = {side: stack.split(dim, rank, ranks) for (side, stack), dim in zip(self.stacks.items(), (0, 1))}
        self.rank = rank
        self._hold(parts, self.get_parameter("up_codes").device)

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states (T, H), experts of each token (T, k) and their weights (T, k) -> (T, H).

        Without the last two: rows (E T, H), those of each expert together -> the same shape.
        """
        if top_k_index is None or top_k_weights is None:
            each = hidden_states.shape[0] // self.num_experts
            ends = torch.arange(1, self.num_experts + 1, dtype=torch.int32, device=hidden_states.device) * each
            expert = torch.arange(self.num_experts, device=hidden_states.device).repeat_interleave(each)
            return self._computed(hidden_states, ends, expert)
        tokens, k = top_k_index.shape
        order, ends = sort_by_expert(top_k_index, self.num_experts)
        expert = top_k_index.reshape(-1)[order]
        y = self._computed(hidden_states[order // k], ends, expert)
        y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        # back to the order of tokens, and summed in one order: adding into the output would not be deterministic
        back = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        return y[back].view(tokens, k, -1).sum(1).to(hidden_states.dtype)

    def _computed(self, x: torch.Tensor, ends: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        """Rows by expert through both projections. expert: of each row."""
        y = self._project("up", x, ends, expert)
        if self.alone:
            gate, up = y.chunk(2, -1)
            y = up * self.fused.act_fn(gate)
        elif self.fused.has_gate:
            if self.alternate and not self.stacks["up"].together:
                y = torch.stack(y.chunk(2, -1), -1).flatten(-2)
            y = self.fused._apply_gate(y)
        else:
            y = self.fused.act_fn(y)
        y = self._project("down", y, ends, expert)
        return self.fused.post_expert_norm(y) if getattr(self.fused, "has_post_expert_norm", False) else y

    def _project(self, side: str, x: torch.Tensor, ends: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        stack = self.stacks[side]
        if stack.ordered:
            x = x.gather(1, self._of("order", side)[expert].long())
        bias = self._bias(side)
        inside = None if stack.uneven else bias
        if torch.is_grad_enabled() and x.requires_grad:
            y: torch.Tensor = _StraightThrough.apply(x, ends, expert, inside, self, side)
        else:
            y = self._product(side, x, ends, expert, inside)
        if stack.uneven:
            ratio = self._of("ratio", side).view(torch.float32)[expert]
            y = y * ratio.repeat_interleave(stack.held.shape[0], 1).to(y.dtype)
            y = y if bias is None else y + bias[expert].to(y.dtype)
        return y

    def _bias(self, side: str) -> torch.Tensor | None:
        """(E, N), this rank's part: of the second projection the first rank has it all."""
        stack, held = self.stacks[side], self.stacks[side].held
        names = [f"{side}_bias", *(f"{leaf}_bias" for leaf, of in LEAVES.items() if of == side)]
        bias = next((p for name in names if (p := self._parameters.get(name)) is not None), None)
        if bias is None or (side == "down" and self.rank):
            return None
        if held.rows_held is None:
            return bias
        parts = bias.view(len(bias), len(stack.parts), -1)
        return parts[:, :, slice(*held.rows_held)].flatten(1)

    def _product(
        self, side: str, x: torch.Tensor, ends: torch.Tensor, expert: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        stack, a = self.stacks[side], self.stacks[side].activations
        codes, scale = self._of("codes", side), self._of("scale", side)
        if stack.held.path == "w8a8":
            assert a is not None
            if a.strategy == "token":
                x_q, x_scale = activation.quantize_per_token(in_reach(x, a, self._ranks(side)), a.number)
                x_q = own_columns(x_q, x)
            else:
                x_scale = self._static(side, "input_scale")[expert].unsqueeze(-1)
                x_q = _encoded(x, x_scale, a.number)
            weight = codes if a.number == "int8" else codes.view(torch.float8_e4m3fn)
            scale = scale.view(stack.held.codes_scale_dtype)
            return grouped_w8a8(x_q, x_scale, ends, weight, scale, bias, x.dtype)
        if a is not None:
            x = self._rounded(side, x, expert)
        n, k = stack.shape
        zero, stored = self._parameters.get(f"{side}_zero"), self._parameters.get(f"{side}_global_scale")
        whole = None if stored is None else stored.view(torch.float32)
        held = stack.held
        return grouped_wxa16(x, ends, codes, scale, zero, whole, bias, held.kind, held.scale_dtype, n, k, held.group)

    def _rounded(self, side: str, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        """Inputs as their codes stand for them; a calibrated scale is each expert's own."""
        a = self.stacks[side].activations
        assert a is not None
        if a.number == "nvfp4":
            # a global scale an expert: rounding x g under the global scale 1 is rounding x under g
            if "input_global_scale" in self.stacks[side].disk.kept:
                scale = self._static(side, "input_global_scale", largest=False)
            else:
                scale = 1 / self._static(side, "input_scale")
            each = scale[expert].unsqueeze(-1)
            return (rounded(x.float() * each, a, torch.ones(1, device=x.device)) / each).to(x.dtype)
        if not a.dynamic:
            each = self._static(side, "input_scale")[expert].unsqueeze(-1)
            return (_encoded(x, each, a.number).float() * each).to(x.dtype)
        return own_columns(rounded(in_reach(x, a, self._ranks(side)), a), x)

    def _ranks(self, side: str) -> Any:
        """The process group among which the columns of a projection's input are split: those of down."""
        return self.ranks if side == "down" else None

    def _static(self, side: str, leaf: str, largest: bool = True) -> torch.Tensor:
        """A calibrated scale of each expert's input, (E,) float32. gate and up share an input: the wider one counts."""
        dtype = DTYPES[self.stacks[side].disk.kept[leaf].dtype]
        each = self._of(leaf, side).view(dtype).float().flatten(1)
        return each.amax(1) if largest else each.amin(1)

    def _of(self, name: str, side: str) -> torch.Tensor:
        return self.get_parameter(f"{side}_{name}")

    # loading and saving, as conversion.py asks ----------------------------------------------------------------------

    def pack(self, codes: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of one projection of all experts on disk -> its parameters."""
        side = codes.removesuffix("_codes")
        stack, biases = self.stacks[side], {}
        if stack.biases:
            each = [[f"{e}.{part}.bias" for part in stack.parts] for e in range(stack.experts)]
            if missing := [name for names in each for name in names if name not in tensors]:
                raise InputError(f"{missing[0]} is missing")
            bias = torch.stack([torch.cat([tensors.pop(name) for name in names]) for names in each])
            biases = {f"{side}_bias": bias.to(self.dtype)}
        late: list[laying.Late] = []
        found = stack.pack(tensors, late)
        self.late = (*self.late, *late)
        return {**{f"{side}_{name}": t for name, t in found.items()}, **biases}

    def unpack(self, codes: str, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters of one projection -> the tensors on disk."""
        side = codes.removesuffix("_codes")
        stack, own = self.stacks[side], {name.removeprefix(f"{side}_"): t for name, t in held.items()}
        found = stack.unpack({name: t for name, t in own.items() if name != "bias"})
        for e, bias in enumerate(own.get("bias", ())):
            for part, t in zip(stack.parts, bias.chunk(len(stack.parts)), strict=True):
                found[f"{e}.{part}.bias"] = t.clone()
        return found

    # looking inside --------------------------------------------------------------------------------------------------

    def decoded(self, side: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weights of "up" or "down", (E, N, K)."""
        stack = self.stacks[side]
        held = {n.removeprefix(f"{side}_"): p for n, p in self._parameters.items() if p is not None}
        own = {name: held[name] for name in stack.specs()}
        return torch.stack([stack.decode(own, e, dtype or self.dtype) for e in range(self.num_experts)])

    def to_fused(self, dtype: torch.dtype | None = None) -> Any:
        """transformers' own module again, dense."""
        fused = self.fused
        ups = "gate_up_proj" if self.alone or fused.has_gate else "up_proj"
        for name, side in ((ups, "up"), ("down_proj", "down")):
            weight = self._in_turn(side, self.decoded(side, dtype))
            weight = weight.transpose(1, 2).contiguous() if self.transposed else weight
            fused.register_parameter(name, nn.Parameter(weight))
            if self.stacks[side].biases:
                bias = self._in_turn(side, self.get_parameter(f"{side}_bias").detach())
                fused.register_parameter(f"{name}_bias", nn.Parameter(bias.to(dtype or self.dtype)))
        for name, parameter in self._parameters.items():
            if name.endswith("_proj_bias") and parameter is not None:
                fused.register_parameter(name, nn.Parameter(parameter.detach().to(dtype or self.dtype)))
        return fused

    def _in_turn(self, side: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows (E, N, ...) as transformers has them: those of gate and up alternate in some models."""
        if side == "down" or not self.alternate or self.stacks[side].together:
            return rows
        return torch.stack(rows.chunk(2, 1), 2).flatten(1, 2)

    def extra_repr(self) -> str:
        what = []
        for side, stack in self.stacks.items():
            w, a = stack.disk.scheme.weights, stack.activations
            group = w.group_size if w.strategy == "group" else w.strategy
            what.append(f"{side}: {stack.shape} {w.number}, group={group}, inputs={a.number if a else None}")
        return f"experts={self.num_experts}, {'; '.join(what)}"


def _encoded(x: torch.Tensor, scale: torch.Tensor, number: str) -> torch.Tensor:
    """Codes of x under scales that are given, one a row."""
    value = x.float() / scale
    if number == "int8":
        return value.round().clamp(-128, 127).to(torch.int8)
    return value.clamp(-448, 448).to(torch.float8_e4m3fn)


class _StraightThrough(torch.autograd.Function):
    """A grouped product, with the gradient of the decoded weights: rounding the input counts as nothing."""

    @staticmethod
    def forward(ctx, x, ends, expert, bias, experts, side):  # type: ignore[no-untyped-def]
        ctx.experts, ctx.side = experts, side
        ctx.save_for_backward(ends)
        return experts._product(side, x, ends, expert, bias)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        stack, side = ctx.experts.stacks[ctx.side], ctx.side
        p = ctx.experts._parameters
        zero, whole = p.get(f"{side}_zero"), p.get(f"{side}_global_scale")
        codes, scale = p[f"{side}_codes"], p[f"{side}_scale"]
        if stack.held.path == "w8a8":
            codes = codes if codes.dtype == torch.int8 else codes.view(torch.float8_e4m3fn)
            scale = scale.view(stack.held.codes_scale_dtype)
        whole = None if whole is None else whole.view(torch.float32)
        n, k = stack.shape
        held = stack.held
        found = grouped_grad(
            grad.contiguous(),
            *ctx.saved_tensors,
            codes,
            scale,
            zero,
            whole,
            held.kind,
            held.scale_dtype,
            n,
            k,
            held.group,
        )
        return found, None, None, None, None, None


@torch.library.custom_op("quantkit::grouped_grad", mutates_args=())
def grouped_grad(
    grad: torch.Tensor,
    ends: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    kind: str,
    scale_dtype: str,
    n: int,
    k: int,
    group: int,
) -> torch.Tensor:
    """The gradient (M, K) of a grouped product's input, from that of its output (M, N). kind "": codes as they are."""
    found, first = grad.new_zeros(grad.shape[0], k), 0
    for e, last in enumerate(ends.tolist()):
        if first < last:
            if kind:
                z, w = (None if t is None else t[e] for t in (zero, global_scale))
                whole = None if w is None else w.reshape(1)
                one = layout.Packed(kind, n, k, group, 1, scale_dtype, codes[e], scale[e], z, whole)
                weight = layout.decode(one, grad.dtype)
            else:
                weight = (codes[e].float() * scale[e].float()).to(grad.dtype)
            found[first:last] = grad[first:last] @ weight
        first = last
    return found


@grouped_grad.register_fake
def _fake(
    grad: torch.Tensor,
    ends: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    kind: str,
    scale_dtype: str,
    n: int,
    k: int,
    group: int,
) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], k)
