"""A linear layer whose weight stays packed."""

from __future__ import annotations

import torch
from torch import nn

from quantkit.errors import InputError
from quantkit.formats import compressed_tensors
from quantkit.types import Scheme
from quantkit_kernels.wna16 import wna16_decode, wna16_linear


class PackedLinear(nn.Module):
    """y = x Wᵀ + b, W of pack-quantized compressed-tensors. Takes the place of `torch.nn.Linear`.

    Parameters have the names, shapes and dtypes that the tensors have on disk (formats/compressed_tensors.py), so
    loading and saving convert nothing; the scales have `dtype`. None of them is trained; gradients reach the input.

    Raises InputError for a scheme that is not held, or a group size that does not divide in_features.
    """

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    weight_zero_point: nn.Parameter | None
    weight_shape: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.bits = int(scheme.weights.number.removeprefix("int"))
        self.weight_zero_point = None
        dtype = dtype or torch.get_default_dtype()
        for name, spec in compressed_tensors.tensors((out_features, in_features), scheme, "float").items():
            t = torch.empty(spec.shape, dtype=compressed_tensors.TORCH_DTYPES.get(spec.dtype, dtype), device=device)
            setattr(self, name, nn.Parameter(t, requires_grad=False))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)

    @classmethod
    def like(cls, linear: nn.Linear, scheme: Scheme) -> PackedLinear:
        """An empty layer of the shape, dtype and device of a dense one."""
        return cls(
            linear.in_features,
            linear.out_features,
            scheme,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N), in the dtype of x."""
        return wna16_linear(
            x,
            weight_packed=self.weight_packed,
            weight_scale=self.weight_scale,
            weight_zero_point=self.weight_zero_point,
            bias=self.bias,
            in_features=self.in_features,
            bits=self.bits,
        )

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight (N, K) in the scales' dtype: computed at each access, never stored or saved.

        For code that reads `linear.weight.dtype` or a weight's values. Writing into it changes nothing.
        """
        return wna16_decode(
            self.weight_packed,
            self.weight_scale,
            self.weight_zero_point,
            self.in_features,
            self.bits,
            self.weight_scale.dtype,
        )

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A dense copy of this layer."""
        weight = self.weight.to(dtype or self.weight_scale.dtype)
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(weight.dtype))
        return linear

    def check_loaded(self, name: str) -> None:
        """After loading: the stored shape must be this layer's. Raises InputError that names the layer."""
        if self.weight_shape.device.type == "meta":
            return  # offloaded: transformers has compared the shapes of the packed tensors
        stored = tuple(int(x) for x in self.weight_shape)
        if stored != (self.out_features, self.in_features):
            raise InputError(
                f"{name}.weight_shape says {stored}, the model's config says {(self.out_features, self.in_features)}; "
                "the checkpoint belongs to another config.json"
            )

    def extra_repr(self) -> str:
        w = self.scheme.weights
        group = w.group_size if w.strategy == "group" else w.strategy
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group={group}, zero_point={not w.symmetric}"
        )
