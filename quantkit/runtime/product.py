"""The product of an input with a packed weight: which operator, and with what.

    path     operator             with
    packed   wxa16_linear         the input, rounded before it where the scheme says so
    w8a8     w8a8_linear          the input as codes: a token, or calibrated
    block    fp8_block_linear     the input as codes: 128 columns of a token
    plain    a dense linear       the weight, decoded for every product

Gradients reach the input, and are those of the decoded weight; that the input is rounded counts as nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from quantkit import numerics
from quantkit.checkpoint import DTYPES
from quantkit.formats._shared import by_column
from quantkit.runtime.held import Held
from quantkit.runtime.rounding import in_reach, own_columns, rounded
from quantkit.types import QParams, QuantizedTensor, TensorScheme
from quantkit_kernels import activation, fp8_block, layout, w8a8, wxa16
from quantkit_kernels._launch import direct


class Product(nn.Module):
    """y = x Wᵀ + b of what `held` describes, whose tensors are parameters or buffers of this module."""

    held: Held
    codes: torch.Tensor
    scale: torch.Tensor
    counters: torch.Tensor
    bias: torch.Tensor | None
    ranks: Any = None  # the process group among which the columns of its input are split

    def _get(self, name: str) -> torch.Tensor | None:
        """One of the tensors that are held; None where there is none of that name."""
        found = self._parameters.get(name)
        return self._buffers.get(name) if found is None else found

    def _found(self) -> Mapping[str, Any]:
        """All of them by their names, at once."""
        return self._parameters if "codes" in self._parameters else self._buffers

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is held, by the names of `held.specs()`."""
        found = {name: self._get(name) for name in self.held.specs()}
        return {name: t for name, t in found.items() if t is not None}

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N), in the dtype of x."""
        if self.held.factor:
            x = x * self._factor().to(x.dtype)
        if self.held.path in ("w8a8", "block"):
            if torch.is_grad_enabled() and x.requires_grad:
                y: torch.Tensor = _StraightThrough.apply(x, self)
                return y if self.bias is None else y + self.bias.to(y.dtype)
            return self._on_codes(x, self.bias)
        if self.held.rounds_input:
            x = self._rounded(x)
        if self.held.path == "plain":
            weight = self._plain(x.dtype)
            return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        return self._on_words(x)

    def _on_words(self, x: torch.Tensor) -> torch.Tensor:
        """The path "packed", of an input that is rounded where it has to be."""
        held, found = self.held, self._found()
        whole = found.get("global_scale")
        if whole is not None:
            whole = whole.view(torch.float32)
        codes, scale, zero = found["codes"], found["scale"], found.get("zero")
        packed = layout.Packed(held.kind, *held.shape, held.group, 1, held.scale_dtype, codes, scale, zero, whole)
        return wxa16.linear(x, packed, found.get("bias"), found.get("order"), self._buffers.get("counters"))

    def _on_codes(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Inputs as codes, times the weight's."""
        a, now = self.held.activations, direct(x, bias)  # without the dispatcher, which costs time
        assert a is not None
        found = self._found()
        scale = found["scale"].view(self.held.codes_scale_dtype)
        weight = found["codes"] if a.number == "int8" else found["codes"].view(torch.float8_e4m3fn)
        if self.held.path == "block":
            x_q, x_scale = (activation.launch_per_block if now else activation.quantize_per_block)(x, "fp8_e4m3", 128)
            block = fp8_block.launch if now else fp8_block.fp8_block_linear
            return block(x_q, x_scale, weight, scale, bias, x.dtype)
        x_zero = None
        if a.strategy == "token" and a.symmetric:
            per_token = activation.launch_per_token if now else activation.quantize_per_token
            x_q, x_scale = per_token(in_reach(x, a, self.ranks), a.number)
            x_q = own_columns(x_q, x)
        elif a.strategy == "token":
            x_q, x_scale, x_zero = activation.quantize_per_token_asymmetric(in_reach(x, a, self.ranks))
            x_q = own_columns(x_q, x)
        else:
            x_scale, x_zero = self._input_scale(in_reach(x, a, self.ranks), a)
            x_q = (activation.launch_static if now else activation.quantize_static)(x, x_scale, a.number, x_zero)
        scale = scale if scale.numel() == self.held.shape[0] else scale.reshape(1)
        multiply = w8a8.launch if now else w8a8.w8a8_linear
        return multiply(x_q, x_scale, weight, scale, bias, x.dtype, x_zero, found.get("weight_sum"))

    def _input_scale(self, x: torch.Tensor, a: TensorScheme) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of a whole tensor: calibrated, or found in the tokens at hand."""
        if not a.dynamic:
            zero = None if a.symmetric else self._kept("input_zero_point").reshape(1)
            return self._kept("input_scale").float().reshape(1), zero
        reach = x.abs().amax().float().reshape(1)
        scale = reach / reach.new_full((), 127.5 if a.number == "int8" else 448.0)
        return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale), None

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        a = self.held.activations
        assert a is not None
        scale = zero = None
        if a.number == "nvfp4":
            ours = self._get("input_global_scale") is not None  # it divides; ModelOpt's multiplies
            scale = self._kept("input_global_scale") if ours else 1 / self._kept("input_scale")
        elif not a.dynamic:
            scale, zero = self._input_scale(x, a)
        return own_columns(rounded(in_reach(x, a, self.ranks), a, scale, zero), x)

    def _kept(self, name: str) -> torch.Tensor:
        """A tensor that is held as it is on disk, in its dtype there."""
        t = self._get(name)
        assert t is not None
        return t.view(DTYPES[self.held.disk.parts[name].dtype])

    def _factor(self) -> torch.Tensor:
        first, last = self.held.columns_held or (0, self.held.disk.shape[1])
        return self._kept("pre_quant_scale")[first:last]

    def _plain(self, dtype: torch.dtype) -> torch.Tensor:
        w, t = self.held.disk.scheme.weights, self.tensors()
        whole = t.get("global_scale")
        found: torch.Tensor = decode_plain(
            t["codes"],
            t["scale"].view(self.held.codes_scale_dtype),
            t.get("zero"),
            None if whole is None else whole.view(torch.float32),
            t.get("g_idx"),
            dtype,
            w.number,
            w.strategy,
            w.group_size or 0,
            list(w.block_shape or ()),
        )
        return found

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (N, K), computed in float32 and rounded once."""
        held = self.held
        if held.path == "packed":
            packed = held.packed(self.tensors(), 0, held.shape[0])
            weight = layout.decode(packed, dtype if not held.factor else torch.float32)
            if held.order:
                weight = weight[:, torch.argsort(self.tensors()["order"].long())]
        else:
            weight = self._plain(dtype if not held.factor else torch.float32)
        return (weight * self._factor().float()).to(dtype) if held.factor else weight


class _StraightThrough(torch.autograd.Function):
    """A product of codes, with the gradient of the decoded weight: rounding the input counts as nothing."""

    @staticmethod
    def forward(ctx, x, layer):  # type: ignore[no-untyped-def]
        ctx.layer = layer
        return layer._on_codes(x, None)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad @ ctx.layer._plain(grad.dtype), None


@torch.library.custom_op("quantkit::decode_plain", mutates_args=())
def decode_plain(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    dtype: torch.dtype,
    number: str,
    strategy: str,
    group_size: int,
    block_shape: list[int],
) -> torch.Tensor:
    """The weight (N, K) of codes (N, K) and scales as `QuantizedTensor` has them, in plain torch.

    g_idx  (K,) the group of each column, or None: runs of `group_size`
    """
    block = (block_shape[0], block_shape[1]) if block_shape else None
    scheme = TensorScheme(number, strategy, group_size or None, zero is None, False, block)  # type: ignore[arg-type]
    if number in ("fp8_e4m3", "mxfp8_e4m3"):
        codes = codes.view(torch.float8_e4m3fn)
    q = QuantizedTensor(codes, QParams(scale, zero, global_scale), scheme)
    if strategy == "group":
        groups = torch.arange(codes.shape[1], device=codes.device) // group_size
        q = by_column(q, group_K=groups if g_idx is None else g_idx)
    return numerics.dequantize(q).to(dtype)


@decode_plain.register_fake
def _fake(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    dtype: torch.dtype,
    number: str,
    strategy: str,
    group_size: int,
    block_shape: list[int],
) -> torch.Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)
