"""quantkit's quantizer for transformers: checkpoints stay packed, whoever wrote them.

`PackedQuantizer` swaps each packed linear for a `PackedLinear` while the model is empty, and has transformers convert
the tensors of the file while it loads (conversion.py). It stands for every quant_method that quantkit reads. What it
cannot hold (a model that ties a packed weight, rotations at run time) goes to transformers' own quantizer of that
method, and one warning on the logger "quantkit" gives the reason; where transformers has none, or loads such a
checkpoint wrong, it is refused. `dequantize=True` loads packed as well, and then decodes: transformers' own way is
wrong or fails for several formats.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils import quantization_config as stock
from transformers.utils.import_utils import is_compressed_tensors_available

from quantkit import formats
from quantkit.errors import InputError, MissingError
from quantkit.runtime import cache, fused, joint, laying, parallel, planning
from quantkit.runtime.experts import PackedExperts
from quantkit.runtime.held import Held
from quantkit.runtime.linear import PackedLinear
from quantkit.types import Format
from quantkit_kernels.choice import gpu_of
from quantkit_kernels.gptq import available
from quantkit_kernels.w8a8 import runs

logger = logging.getLogger("quantkit")

# quant_method -> transformers' own quantizer and config, which `plugin` puts in here; None where it has none
STOCK: dict[str, tuple[type[HfQuantizer], type[stock.QuantizationConfigMixin]] | None] = {}


def keep_stock(method: str, own: Any, config: Any) -> None:
    """Remembers what transformers has for a quant_method, before it is replaced."""
    if method == "compressed-tensors" and own is not None:
        from quantkit.runtime.stock import StockCompressedTensors as own
    STOCK[method] = None if own is None or config is None else (own, config)


class HeldConfig(stock.QuantizationConfigMixin):
    """A `quantization_config` as it is in config.json, kept and written back unchanged."""

    method: str

    def __init__(self, **content: Any) -> None:
        self.content = content
        self.quant_method = next((m for m in stock.QuantizationMethod if m == self.method), self.method)
        self.dequantize = bool(content.get("dequantize")) or content.get("run_compressed") is False

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.content)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def get_loading_attributes(self) -> dict[str, Any]:
        return {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeldConfig) and self.content == other.content

    __hash__ = None  # type: ignore[assignment]
    __repr__ = stock.QuantizationConfigMixin.__repr__


def config_class(method: str) -> type[HeldConfig]:
    """The config of a quant_method. It is one of transformers' own, and has its name: transformers compares both."""
    own = STOCK.get(method)
    bases = (HeldConfig,) if own is None else (HeldConfig, own[1])
    name = "ModelOptConfig" if own is None else own[1].__name__
    found = type(name, bases, {"method": method, "__module__": __name__})
    globals()[name] = found  # where pickle looks for it
    return found


class PackedQuantizer(HfQuantizer):
    """Keeps a checkpoint packed. What it cannot hold makes it transformers' own quantizer, class and all."""

    requires_calibration = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        pre_quantized = kwargs.get("pre_quantized", True)
        if not pre_quantized or not isinstance(quantization_config, HeldConfig):
            self._become_stock(quantization_config, pre_quantized)  # transformers quantizes a dense model
            return
        super().__init__(quantization_config, **kwargs)
        self.read = self.form.read_config({"quant_method": quantization_config.method, **quantization_config.content})
        self.plan = planning.Plan()
        self.cache_hooks: list[Any] = []
        self.scales_below = False  # of the KV cache: below k_proj and v_proj on disk, as ModelOpt has them
        self.dtype: torch.dtype | None = None
        if self.read.unsupported is not None:
            self._fall_back(self.read.unsupported)

    @property
    def form(self) -> Format:
        """The checkpoint's format. Not kept: a model is copied with its quantizer, and modules are not."""
        return formats.by_method(self.quantization_config.method)

    def _become_stock(self, config: Any, pre_quantized: bool) -> None:
        method = str(getattr(config.quant_method, "value", config.quant_method))
        found = STOCK.get(method)
        if found is None:
            raise InputError(f"transformers does not quantize to {method}; quantkit quantize does")
        own = found[0](config, pre_quantized=pre_quantized)
        self.__dict__ = {**own.__dict__, "content": getattr(self, "content", {})}
        self.__class__ = type(own)

    def _fall_back(self, reason: str, device_map: Any = None) -> None:
        """From here on this is transformers' own quantizer.

        Raises InputError when there is none, MissingError when that lacks its package.
        """
        held: HeldConfig = self.quantization_config
        found = STOCK.get(held.method)
        if found is None:
            raise InputError(
                f"quantkit does not keep this {held.method} checkpoint packed ({reason}), and transformers does not "
                "read it; quantkit convert FOLDER --to dense, and load that"
            )
        if held.method == "compressed-tensors" and not is_compressed_tensors_available():
            raise MissingError(
                f"quantkit does not keep this checkpoint packed ({reason}), and transformers' own loader needs the "
                "compressed-tensors package: pip install compressed-tensors"
            )
        logger.warning("quantkit: not kept packed, loading through transformers' own %s: %s", held.method, reason)
        config = found[1].from_dict(held.to_dict())
        if held.dequantize:
            config.dequantize = True
        self.content = held.content
        own: HfQuantizer = self
        try:
            self._become_stock(config, True)
            own.validate_environment(device_map=device_map)
        except ImportError as error:
            raise MissingError(
                f"quantkit does not keep this {held.method} checkpoint packed ({reason}), and transformers' own loader "
                f"lacks a package: {error}; or quantkit convert FOLDER --to dense, and load that"
            ) from None

    # while loading ---------------------------------------------------------------------------------------------------

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def _convert_model_for_quantization(self, model: nn.Module) -> None:
        """transformers takes Llama 4's experts apart here; packed ones stay together."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files")
        try:
            if self.quantization_config.dequantize and not _one_device(kwargs.get("device_map")):
                raise planning.NotHeld("dequantize=True, on more than one device")
            self.plan = planning.plan(model, self.form, self.read, files, fp8=_multiplies_fp8(kwargs.get("device_map")))
            owners, self.scales_below = planning.caches(model, self.form, self.read, files)
        except planning.NotHeld as reason:
            self._fall_back(str(reason), kwargs.get("device_map"))
            own: HfQuantizer = self
            own._convert_model_for_quantization(model)
            own._process_model_before_weight_loading(model, **kwargs)
            return
        self.cache_hooks = cache.attach(model, owners)
        for name, held in self.plan.linears.items():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, PackedLinear.like(linear, held, bias=self.plan.biases.get(name)))
        for name, stacks in self.plan.experts.items():
            model.set_submodule(name, PackedExperts(model.get_submodule(name), stacks))
        parallel.plan(model)

    def get_weight_conversions(self) -> list[Any]:
        from transformers.core_model_loading import WeightRenaming

        from quantkit.runtime.conversion import Packing

        sides = "kv" if self.scales_below else ""
        below = [WeightRenaming(rf"\.{side}_proj\.{side}_scale", f".{side}_scale") for side in sides]
        return [*below, Packing(self.plan.places, self.plan.back, self)]

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Ours first: of converters, the first that matches a name has it."""
        return [*self.get_weight_conversions(), *weight_conversions]

    def get_load_operations(self) -> dict[str, Any]:
        return {}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> Any:
        laying.check(model)
        for module in model.modules():
            if isinstance(module, PackedLinear | PackedExperts):
                module.requires_grad_(False)  # the loader turns it on for floats, whatever the parameter was
                for buffer in module._buffers.values():
                    if buffer is not None and not buffer.is_meta:
                        buffer.zero_()  # transformers fills what is not in a checkpoint with whatever there was
                continue
            for leaf, parameter in module._parameters.items():
                if parameter is None or not parameter.is_floating_point() or parameter.dtype.itemsize == 1:
                    continue
                if leaf in cache.LEAVES and self.cache_hooks:
                    parameter.requires_grad_(False)
                elif self.dtype is not None and parameter.dtype.itemsize < self.dtype.itemsize:
                    parameter.data = parameter.data.to(self.dtype)  # 5.17 leaves renamed tensors in theirs
        if self.quantization_config.dequantize:  # whoever asks for it gets what the codes stand for
            return self._dequantize(model, self.dtype)
        say_paths(model)
        on_gpu = any(codes.device.type == "cuda" for _, codes, _ in _weights(model))
        joint.join(model, on="cuda")
        if on_gpu:
            fused.fuse(model)
        return model

    def _dequantize(self, model: nn.Module, dtype: Any = None) -> Any:
        """`model.dequantize()`: each packed layer becomes a dense one, and keys and values stay as they are."""
        if self.cache_hooks:
            cache.detach(model, self.cache_hooks)
        fused.unfuse(model)
        if isinstance(dtype, str):  # as config.json has it; transformers passes it on
            dtype = getattr(torch, dtype)
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                model.set_submodule(name, module.to_linear(dtype))
            elif isinstance(module, PackedExperts):
                model.set_submodule(name, module.to_fused(dtype))
        conversions: list[Any] = getattr(model, "_weight_conversions", None) or []
        left = [c for c in conversions if not hasattr(c, "places")]
        # None: as if the model had been made, not loaded
        model._weight_conversions = None if self.plan.experts else left  # type: ignore[assignment]
        return model

    # what may be done with it -----------------------------------------------------------------------------------------

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """True: gradients pass through to the inputs, so adapters on top can be trained. The codes cannot."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _one_device(device_map: Any) -> bool:
    """Whether a device_map, as it was given, is one device."""
    if isinstance(device_map, dict):
        return len(set(device_map.values())) == 1 and "disk" not in device_map.values()
    return device_map is None or str(device_map) not in ("auto", "balanced", "balanced_low_0", "sequential")


def _multiplies_fp8(device_map: Any) -> bool:
    """Whether where a model goes, FP8 codes are multiplied: not if a GPU of this machine, to which it goes, cannot."""
    given = {str(d) for d in device_map.values()} if isinstance(device_map, dict) else {str(device_map)}
    if given <= {"None", "cpu", "disk", "meta"} or not torch.cuda.is_available():
        return True
    return min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())) >= (8, 9)


def say_paths(model: nn.Module) -> None:
    """Says, a line each, which layers run without a fast kernel, and whose inputs are rounded apart."""
    slow: Counter[tuple[str, str]] = Counter()
    plain: Counter[str] = Counter()
    apart: Counter[str] = Counter()
    for held, codes, count in _weights(model):
        w = held.disk.scheme.weights
        if held.path == "plain":
            plain[f"{w.number} {w.strategy} {w.group_size or ''}".strip()] += count
        elif codes.device.type == "cuda" and not _is_fast(held, codes):
            slow[(w.number, torch.cuda.get_device_name(codes.device))] += count
        elif codes.device.type == "cpu":
            slow[(w.number, "the CPU")] += count
        if held.rounds_input and held.activations is not None:
            apart[f"{held.activations.number} before {w.number} weights"] += count
    for (number, where), count in slow.items():
        level = logging.INFO if where == "the CPU" else logging.WARNING
        logger.log(level, "quantkit: %d packed layers of %s run in plain torch on %s", count, number, where)
    for what, count in plain.items():
        logger.warning("quantkit: no kernel holds %d layers of %s; they are decoded for every product", count, what)
    for what, count in apart.items():
        logger.warning(
            "quantkit: inputs of %d layers are rounded to %s, which are multiplied by a kernel for weights alone",
            count,
            what,
        )


def _weights(model: nn.Module) -> Iterator[tuple[Held, torch.Tensor, int]]:
    """How each packed weight is held, its codes, and how many layers it stands for."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            yield module.held, module.codes, 1
        elif isinstance(module, PackedExperts):
            for side, stack in module.stacks.items():
                yield stack.held, module.get_parameter(f"{side}_codes"), stack.experts * len(stack.parts)


def _is_fast(held: Held, codes: torch.Tensor) -> bool:
    """Whether kernels multiply by these codes on their GPU."""
    if held.path == "packed":
        return gpu_of(codes.device).capability >= 80 and available(codes.device)
    a = held.activations
    return runs(codes if a is None or a.number == "int8" else codes.view(torch.float8_e4m3fn))
