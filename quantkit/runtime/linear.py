"""A linear layer whose weight stays packed, whatever the checkpoint's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from quantkit.errors import InputError
from quantkit.runtime import laying
from quantkit.runtime.held import Held, bits
from quantkit.runtime.product import Product
from quantkit_kernels import int4_cpu, layout, wxa16


class PackedLinear(Product, nn.Linear):
    """y = x Wᵀ + b. Takes the place of `torch.nn.Linear`, and is one for who asks (PEFT puts adapters on those).

    Parameters are those of `held` (held.py), all of integers, and `bias`, in its dtype on disk. None is trained;
    gradients reach the input. `dtype` is that of the model, for who asks for `weight`.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]
    late: tuple[laying.Late, ...] = ()
    joint: Any = None  # of joint.py, where it is multiplied together with others
    place: int = 0
    cpu_group: int = 0  # columns of a scale of `cpu_scale`
    fits_words: bool = True  # until it is found that they cannot be

    def __init__(
        self,
        held: Held,
        *,
        bias: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # a Linear's own would make a dense weight
        self.dtype = dtype or torch.get_default_dtype()
        self.out_features, self.in_features = held.disk.shape
        self._hold(held, device)
        self.register_parameter("bias", None)
        if bias is not None:
            self.bias = nn.Parameter(torch.empty(self.out_features, dtype=bias, device=device))

    def _hold(self, held: Held, device: torch.device | str | None) -> None:
        """Empty parameters for what is held."""
        self.held = held
        for name, (stored, shape) in held.specs().items():
            t = torch.empty(shape, dtype=stored, device=device)
            self.register_parameter(name, nn.Parameter(t, requires_grad=False))
        if held.path == "packed":
            self.register_buffer("counters", wxa16.make_counters(held.shape[0], device), persistent=False)

    def split(self, dim: int, rank: int, ranks: int) -> None:
        """Before loading: holds one rank's part of the rows (0) or columns (1). Raises InputError if it cannot."""
        self._hold(self.held.split(dim, rank, ranks), self.codes.device)

    @classmethod
    def like(cls, linear: nn.Linear, held: Held, *, bias: torch.dtype | None = None) -> PackedLinear:
        """An empty layer of the dtype and device of a dense one. bias: dtype of one on disk, if there is one."""
        weight = linear.weight
        if bias is None and linear.bias is not None:
            bias = linear.bias.dtype
        return cls(held, bias=bias, dtype=weight.dtype, device=weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N), in the dtype of x."""
        if self.joint is not None:
            y: torch.Tensor = self.joint.output(self.place, x)
            return y
        return self.product(x)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is held, by the names of `held.specs()`."""
        if self.joint is None:
            found = super().tensors()
            return found if "cpu_scale" not in self._buffers else {**found, "codes": self._kernel_order()}
        kept = {name: t for name, t in self._parameters.items() if t is not None and name != "bias"}
        return {**self.joint.tensors(self.place), **kept}

    @property
    def _is_hf_initialized(self) -> bool:
        """Asked by transformers after loading. Otherwise it draws random numbers into `weight`, which is a copy."""
        return all(getattr(p, "_is_hf_initialized", False) for p in self._parameters.values() if p is not None)

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        """Set by transformers when it has initialized what was missing, and nothing to keep."""

    # on a CPU --------------------------------------------------------------------------------------------------------

    def _on_words(self, x: torch.Tensor) -> torch.Tensor:
        """Symmetric int4 in bfloat16 on a CPU by torch's own kernel, a thousand times faster than by decoding W.

        The codes change their order at the first product, in place; who reads or moves them gets the kernels' order.
        Meanwhile there is a buffer `cpu_scale`.
        """
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not self._trains(x):
            if "cpu_scale" not in self._buffers and self.fits_words and not torch.compiler.is_compiling():
                self._enter_cpu_order()
            if (scale := self._get("cpu_scale")) is not None:
                order = self._get("order")
                x = x if order is None else x.index_select(-1, order)
                y: torch.Tensor = int4_cpu.linear(x, self.codes, scale, self.cpu_group, self.bias)
                return y
        if "cpu_scale" in self._buffers:
            self._leave_cpu_order()
        return super()._on_words(x)

    def _trains(self, x: torch.Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad))

    def _enter_cpu_order(self) -> None:
        found = None
        size = int4_cpu.size_of(self.held.kind, *self.held.shape, self.held.group)
        if size and self.codes.device.type == "cpu" and not hasattr(self, "_hf_hook"):
            with torch.no_grad():
                found = int4_cpu.to_words(self.held.packed(super().tensors(), 0, self.held.shape[0]))
        if found is None:
            self.fits_words = False
            return
        words, scale, self.cpu_group = found
        self.register_buffer("cpu_scale", scale, persistent=False)
        self.codes.data = words.view(-1).view(torch.int32).view(self.codes.shape)

    def _kernel_order(self) -> torch.Tensor:
        """The codes as layout.py has them."""
        n, k = self.held.shape
        codes = int4_cpu.from_words(self.codes.detach().cpu(), n, k)
        scale = torch.ones(n, 1, dtype=torch.float32)
        return layout.pack("int4", codes, scale, group=0).codes.to(self.codes.device)

    def _leave_cpu_order(self) -> None:
        if "cpu_scale" in self._buffers:
            self.codes.data = self._kernel_order()
            del self.cpu_scale

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`to`, `cuda`, `half` and the like."""
        self._leave_cpu_order()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if "cpu_scale" in self._buffers:
            destination[f"{prefix}codes"] = self._kernel_order()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._leave_cpu_order()
        super()._load_from_state_dict(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_old_forward":  # accelerate is about to move its tensors by hooks
            self._leave_cpu_order()
            self.fits_words = False
        super().__setattr__(name, value)

    # loading and saving, as conversion.py asks ----------------------------------------------------------------------

    def pack(self, codes: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of the layer on disk -> its parameters. Raises InputError for what does not belong together.

        What is not looked at yet, because that would wait for a GPU, is in `late`, for `laying.check`.
        """
        for leaf, spec in self.held.disk.parts.items():
            if leaf not in tensors:
                raise InputError(f"{leaf} is missing")
            if tuple(tensors[leaf].shape) != spec.shape:
                raise InputError(f"{leaf} is {tuple(tensors[leaf].shape)}, not {spec.shape}")
        laid = laying.lay(self.held, tensors)
        if laid is not None:
            self.late = (laid[1],)
            return {**{leaf: bits(tensors[leaf]) for leaf in self.held.disk.kept}, **laid[0]}
        if "weight_shape" in tensors:
            stored, wanted = tuple(tensors["weight_shape"].tolist()), self.held.disk.shape
            if stored != wanted:
                raise InputError(laying.wrong_shape("", stored, wanted))
        return self.held.pack(tensors)

    def unpack(self, codes: str, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Its parameters -> the tensors on disk."""
        return self.held.unpack(held)

    # looking inside --------------------------------------------------------------------------------------------------

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The decoded weight (N, K) in the model's dtype: computed at each access, never stored or saved.

        What an input is multiplied with before it is rounded is part of it (ModelOpt's pre_quant_scale). For code that
        reads `linear.weight.dtype` or a weight's values. Setting its `data` (PEFT's merge) raises RuntimeError.
        """
        return self.decoded(self.dtype).as_subclass(_Decoded)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A dense copy of this layer. Raises InputError for a part of one."""
        if self.held.shape != self.held.disk.shape:
            raise InputError("a layer that is split over several ranks has no dense copy; load it without tp_plan")
        weight = self.decoded(dtype or self.dtype)
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(weight.dtype))
        return linear

    def extra_repr(self) -> str:
        w, a = self.held.disk.scheme.weights, self.held.activations
        group = w.group_size if w.strategy == "group" else w.strategy
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{w.number}, group={group}, zero_point={not w.symmetric}, inputs={a.number if a else None}, "
            f"path={self.held.path}"
        )


class _Decoded(torch.Tensor):
    """A weight that is a copy: what is written into its data would be lost."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> torch.Tensor:
        return self.detach().as_subclass(torch.Tensor)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise RuntimeError(
            "this weight is a decoded copy of packed codes, and nothing can be merged into it; call model.dequantize() "
            "first, or keep the adapter apart"
        )
