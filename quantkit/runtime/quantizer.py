"""quantkit's quantizer for transformers: compressed-tensors checkpoints that stay packed.

transformers' own quantizer decompresses every layer to dense at the first forward, cannot load asymmetric checkpoints,
and needs the compressed-tensors package. `PackedQuantizer` swaps each packed linear for a `PackedLinear` instead. What
it cannot hold (another scheme, fused experts, `dequantize=True`) goes to transformers' own quantizer, which it
subclasses; one warning on the logger "quantkit" gives the reason.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils import quantization_config as stock
from transformers.utils.import_utils import is_compressed_tensors_available

from quantkit.errors import InputError, MissingError
from quantkit.experts import is_fused
from quantkit.formats.compressed_tensors import ReadConfig, not_packed, read_config, words
from quantkit.runtime import cache
from quantkit.runtime.linear import PackedLinear
from quantkit.types import Scheme

logger = logging.getLogger("quantkit")


class CompressedTensorsConfig(stock.CompressedTensorsConfig):
    """transformers' config of the same name, which reads the checkpoint without the compressed-tensors package.

    The name must be the same: transformers compares it with that of a config passed to `from_pretrained`. The content
    of config.json is kept as it is and written back unchanged; the library's own object is built only when asked for.
    """

    def __init__(self, **content: Any) -> None:
        self.content = content
        self.quant_method = stock.QuantizationMethod.COMPRESSED_TENSORS
        self.dequantize = bool(content.get("dequantize")) or content.get("run_compressed") is False
        self.use_optimized_inference = bool(content.get("use_optimized_inference"))
        self.through_library = False
        self._library: Any = None

    def read(self) -> ReadConfig:
        """The content in quantkit's words."""
        return read_config({"quant_method": "compressed-tensors", **self.content})

    @property
    def quantization_config(self) -> Any:
        """The library's own config object. Raises MissingError when the package is not installed."""
        if self._library is None and self.content.get("config_groups"):
            if not is_compressed_tensors_available():
                raise MissingError(
                    "this checkpoint needs the compressed-tensors package: pip install compressed-tensors"
                )
            self._library = stock.CompressedTensorsConfig(**self.content).quantization_config
        return self._library

    @property
    def is_quantized(self) -> bool:
        return bool(self.content.get("config_groups"))

    @property
    def is_quantization_compressed(self) -> bool:
        # the library changes its own object once it has decompressed
        status = getattr(self._library, "quantization_status", self.content.get("quantization_status"))
        return self.is_quantized and status == "compressed"

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json: what was read; after transformers' own path, what the library makes of it."""
        if self.through_library:
            return dict(super().to_dict())
        return copy.deepcopy(self.content)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class PackedQuantizer(CompressedTensorsHfQuantizer):
    """Swaps packed linears for `PackedLinear`; `packed` is False once transformers' own path has been taken."""

    def __init__(self, quantization_config: CompressedTensorsConfig, **kwargs: Any) -> None:
        HfQuantizer.__init__(self, quantization_config, **kwargs)
        self.read = quantization_config.read()
        self.packed, self.use_fp8_kernel = True, False
        self.cache_hooks: list[Any] = []
        if quantization_config.dequantize:
            self._fall_back("dequantize=True asks for dense weights")
        elif (reason := not_packed(self.read)) is not None:
            self._fall_back(reason)

    def _fall_back(self, reason: str) -> None:
        """From here on this is transformers' own quantizer. Raises MissingError when that lacks its package."""
        if not is_compressed_tensors_available():
            raise MissingError(
                f"quantkit does not keep this checkpoint packed ({reason}), and transformers' own loader needs the "
                "compressed-tensors package: pip install compressed-tensors"
            )
        logger.warning("quantkit: not kept packed, loading through transformers' own compressed-tensors: %s", reason)
        self.packed = False
        self.quantization_config.through_library = True
        super().__init__(self.quantization_config, pre_quantized=self.pre_quantized)
        super().validate_environment()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.packed:
            super().validate_environment(*args, **kwargs)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.packed:
            files = kwargs.get("checkpoint_files")
            swaps, reason = plan(model, self.read, files)
            owners: dict[str, dict[str, tuple[int, ...]]] = {}
            if reason is None and self.read.kv_cache is not None:
                owners, reason = caches_on_disk(model, files)
            if reason is None:
                self.cache_hooks = cache.attach(model, owners)
                for name, scheme in swaps.items():
                    model.set_submodule(name, _packed_like(name, model.get_submodule(name), scheme))
                return
            self._fall_back(reason)
        check_experts(model, self.read, kwargs.get("checkpoint_files"))
        super()._process_model_before_weight_loading(model, **kwargs)
        _follow_dtype(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> Any:
        if not self.packed:
            _experts_follow_dtype(model)
            return super()._process_model_after_weight_loading(model, **kwargs)
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                module.requires_grad_(False)  # the loader turns it on for floats, whatever the parameter was
                module.check_loaded(name)
            for leaf in cache.LEAVES if self.cache_hooks else ():
                if leaf in module._parameters:
                    module._parameters[leaf].requires_grad_(False)
        return model

    def _dequantize(self, model: nn.Module, dtype: Any = None) -> Any:
        """`model.dequantize()`: each packed layer becomes a dense one, and keys and values stay as they are."""
        if not self.packed:
            return super()._dequantize(model, dtype=dtype)
        if self.cache_hooks:
            cache.detach(model, self.cache_hooks)
        if isinstance(dtype, str):  # as config.json has it; transformers passes it on
            dtype = getattr(torch, dtype)
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                model.set_submodule(name, module.to_linear(dtype))
        return model

    def get_load_operations(self) -> dict[str, Any]:
        """Parameters have the names that tensors have on disk: nothing is converted while loading."""
        return {} if self.packed else super().get_load_operations()

    def get_weight_conversions(self) -> list[Any]:
        return [] if self.packed else super().get_weight_conversions()

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        return weight_conversions if self.packed else super().update_weight_conversions(weight_conversions, *model)

    @property
    def is_trainable(self) -> bool:
        """True: gradients pass through to the inputs, so adapters on top can be trained. The codes cannot."""
        return True if self.packed else super().is_trainable

    @property
    def is_qat_trainable(self) -> bool:
        # transformers defines it as a property in one class and as a method in the other
        stock_says = False if self.packed else super().is_qat_trainable
        return bool(stock_says() if callable(stock_says) else stock_says)


def _follow_dtype(model: nn.Module) -> None:
    """Gives weights that the library has decompressed the model's dtype.

    At the first forward it makes MX and NVFP4 weights bfloat16, whatever the model is, which in a float32 model cannot
    be multiplied. Its hook for that is there already, so this one comes after it.
    """

    def cast(module: nn.Module, args: Any) -> None:
        handle.remove()
        dtype: torch.dtype = module.dtype  # type: ignore[assignment]
        for linear in module.modules():
            if isinstance(linear, nn.Linear) and hasattr(linear, "quantization_scheme"):
                linear.weight.data = linear.weight.data.to(dtype)

    handle = model.register_forward_pre_hook(cast)


def _experts_follow_dtype(model: nn.Module) -> None:
    """Gives experts the model's dtype, and what else is too narrow for it, such as a router.

    The library decodes experts to the dtype of their scales, and transformers 5.17 leaves routers in theirs; in a
    float32 model neither can be multiplied.
    """
    dtype: torch.dtype = model.dtype  # type: ignore[assignment]
    for module in model.modules():
        for parameter in module._parameters.values() if not hasattr(module, "quantization_scheme") else ():
            if parameter is None or not parameter.is_floating_point() or parameter.dtype.itemsize == 1:
                continue
            if parameter.dtype.itemsize < dtype.itemsize or (is_fused(module) and parameter.dtype != dtype):
                parameter.data = parameter.data.to(dtype)


def check_experts(model: nn.Module, config: ReadConfig, checkpoint_files: Sequence[str] | None) -> None:
    """Refuses packed experts that transformers' own loader, which decodes and merges them, gets wrong or fails on.

    It was tried with every preset: right are symmetric integers that are packed, and FP8 a channel or a tensor. NVFP4
    loads without a word, and wrong. Raises InputError that names the first such expert.
    """
    if config.unsupported is not None or not checkpoint_files:
        return
    inputs: str | None = None
    for _, disk, _, merged in _keys_in_memory(model, checkpoint_files):
        group = config.group_for(disk.removesuffix(".weight")) if merged and disk.endswith(".weight") else None
        if group is None:
            continue
        w, a = group.scheme.weights, group.scheme.activations
        ints = group.format == "pack-quantized" and w.symmetric
        if not ints and not (group.format == "float-quantized" and w.strategy in ("channel", "tensor")):
            raise InputError(
                f"{disk.removesuffix('.weight')}: experts of {words(group.scheme)} ({group.format}) are decoded wrong "
                "by transformers' own loader, or not at all, and quantkit does not run packed experts yet; "
                "quantkit convert FOLDER --to dense, and load that"
            )
        inputs = inputs or (a.number if a is not None else None)
    if inputs is not None:
        logger.warning("quantkit: transformers runs experts dense, so their inputs are not quantized to %s", inputs)


def _packed_like(name: str, linear: nn.Module, scheme: Scheme) -> PackedLinear:
    assert isinstance(linear, nn.Linear)
    try:
        return PackedLinear.like(linear, scheme)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def plan(
    model: nn.Module, config: ReadConfig, checkpoint_files: Sequence[str] | None
) -> tuple[dict[str, Scheme], str | None]:
    """Which modules become packed, and with which scheme; or why the model cannot be held packed.

    The checkpoint decides: a linear is packed when its `weight_packed` is there, and the config says how. Without
    files (a state dict is given), the config decides alone. Targets and ignored names are the names on disk.
    """
    tied = {name for pair in getattr(model, "all_tied_weights_keys", {}).items() for name in pair}
    swaps: dict[str, Scheme] = {}
    if not checkpoint_files:
        for name, module in model.named_modules():
            if type(module) is nn.Linear and f"{name}.weight" not in tied and (scheme := config.scheme_for(name)):
                swaps[name] = scheme
        return swaps, None
    on_disk, reason = names_on_disk(model, checkpoint_files)
    for name, module in model.named_modules():
        if reason is not None or name not in on_disk:
            continue
        disk = on_disk[name]
        scheme = config.scheme_for(disk)
        if scheme is None:
            reason = f"{disk} is packed in the checkpoint, but no group of its config names it"
        elif not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            reason = f"{disk} is packed, but here it is {type(module).__name__}, which computes something else"
        elif f"{name}.weight" in tied:
            reason = f"{disk} is packed, but the model ties its weight to another; set tie_word_embeddings to false"
        else:
            swaps[name] = scheme
    if reason is None and on_disk and not swaps:
        reason = f"none of the {len(on_disk)} packed layers of the checkpoint, such as {min(on_disk)}, is in this model"
    return swaps, reason


def names_on_disk(model: nn.Module, checkpoint_files: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """Module name -> name in the checkpoint, for each module whose weight is packed there; or why it cannot be said.

    transformers renames some keys while loading (multimodal models, a head added to a base model) and merges others
    (the linears of experts into one tensor). The same rules are asked here, with the dense key that they know.
    """
    if not all(str(file).endswith(".safetensors") for file in checkpoint_files):
        return {}, "the checkpoint is not in safetensors"
    found: dict[str, str] = {}
    for key, disk, name, merged in _keys_in_memory(model, checkpoint_files):
        if disk == key:
            continue
        if merged:
            return {}, f"{key} is merged with other tensors while loading (fused experts)"
        found[name.removesuffix(".weight")] = disk.removesuffix(".weight")
    return found, None


def caches_on_disk(
    model: nn.Module, checkpoint_files: Sequence[str] | None
) -> tuple[dict[str, dict[str, tuple[int, ...]]], str | None]:
    """Attention layers with the shapes of the scales of their KV cache; or why they cannot be held, as `cache.plan`."""
    if not checkpoint_files:
        return {}, "kv_cache_scheme is set, and without files its scales are not known"
    shapes: dict[str, tuple[int, ...]] = {}
    for file in checkpoint_files:
        with safe_open(file, framework="pt") as opened:
            scales = [key for key in opened.keys() if key.endswith(cache.LEAVES)]  # noqa: SIM118
            shapes |= {key: tuple(opened.get_slice(key).get_shape()) for key in scales}
    in_memory = {disk: name for _, disk, name, merged in _keys_in_memory(model, checkpoint_files) if not merged}
    return cache.plan(in_memory, shapes)


def _keys_in_memory(model: nn.Module, checkpoint_files: Sequence[str]) -> list[tuple[str, str, str, bool]]:
    """Of each tensor: its name, the name it would have if it were dense, that one in memory, whether it is merged."""
    # imported here: while transformers is being imported, and registers us, these may be only half there
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state: Mapping[str, torch.Tensor] = model.state_dict()
    keys: list[str] = []
    for file in checkpoint_files:
        with safe_open(file, framework="pt") as opened:
            keys += opened.keys()
    found = []
    for key in sorted(keys, key=dot_natural_key):  # the loader's order: some renamings begin with the key they see
        disk = key.removesuffix("_packed") if key.endswith(".weight_packed") else key
        name, merged = rename_source_key(disk, renamings, converters, model.base_model_prefix, state)
        found.append((key, disk, name, merged is not None))
    return found
