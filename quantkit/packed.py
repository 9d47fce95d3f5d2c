"""A quantized checkpoint seen layer by layer, from headers and config: which layers are packed, and how."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import formats, hub
from quantkit.checkpoint import Checkpoint
from quantkit.errors import InputError
from quantkit.types import Format, QuantizedTensor, Scheme, TensorSpec

# Tensors beside the packed ones of a layer that are no part of its weight: its bias, the scales of a KV cache.
KV_SCALES = ("q_scale", "k_scale", "v_scale", "output_scale")
BESIDE = ("bias", "_bias", *KV_SCALES)
_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# One of these keys is in every config that tools put beside config.json.
_SIGNS = {"quant_method", "quantization", "bits", "wbits", "w_bit"}


@dataclass(frozen=True)
class Layer:
    """A packed linear layer (N, K). `parts` are its tensors, by name after the layer's own."""

    name: str
    shape: tuple[int, int]
    scheme: Scheme
    parts: dict[str, TensorSpec]


@dataclass(frozen=True)
class Packed:
    """A quantized checkpoint, unread.

    config  config.json
    form    the module of its format; `read` is what its `read_config` gave
    layers  the packed layers, by name
    """

    folder: Path
    checkpoint: Checkpoint
    config: dict[str, Any]
    form: Format
    read: Any
    layers: dict[str, Layer]

    @property
    def format(self) -> str:
        """The name of the format: "fp8-block"."""
        return formats.name_of(self.form)

    def unpack(self, name: str) -> tuple[QuantizedTensor, Any]:
        """Codes and scales of one layer, and the calibrated scales of its input, or None. Reads this layer alone.

        Raises InputError that names the layer, for tensors that do not fit.
        """
        layer = self.layers[name]
        tensors = {leaf: self.checkpoint.read(tensor_name(name, leaf)) for leaf in layer.parts}
        unpack_input = getattr(self.form, "unpack_input", None)
        try:
            inputs = None if unpack_input is None else unpack_input(tensors, layer.scheme.activations)
            return self.read.unpack(name, tensors), inputs
        except InputError as e:
            raise InputError(f"{self.checkpoint.folder}: {name}: {e}") from None


def open_folder(folder: Path) -> Packed:
    """Reads config and headers. Raises InputError for a folder that is no quantized model, or that cannot be read."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json, so it is not a model folder")
    config = hub.read_json(folder / "config.json")
    quantization = find_config(folder, config)
    if quantization is None:
        raise InputError(f"{folder}: is not quantized: neither config.json nor another file has a quantization_config")
    form = formats.by_method(str(quantization.get("quant_method")))
    read = form.read_config(quantization)
    if read.unsupported is not None:
        raise InputError(f"{folder}: its quantization_config cannot be read: {read.unsupported}")
    checkpoint = Checkpoint.open(folder)
    layers = {}
    found = groups(form, checkpoint.specs)
    for name, parts in sorted(found.items(), key=lambda item: natural(item[0])):
        scheme = read.scheme_for(name)
        if scheme is None:
            raise InputError(f"{folder}: {name} is packed, but by the quantization_config it is dense")
        shape = shape_of(form, checkpoint, name, parts, scheme)
        if shape is None:
            raise InputError(f"{folder}: {name}: its tensors {', '.join(parts)} do not say what shape its weight has")
        layers[name] = Layer(name, shape, scheme, parts)
    if not layers:
        raise InputError(f"{folder}: holds no packed layer, though its config says {quantization['quant_method']}")
    return Packed(folder, checkpoint, config, form, read, layers)


def find_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization config of a model folder, wherever tools put it; None when it is not quantized."""
    found = formats.quantization_config(config)
    if found is not None:
        return found
    for name, form in formats.CONFIG_FILES.items():
        content = hub.read_json(folder / name) if (folder / name).is_file() else {}
        if not content.keys().isdisjoint(_SIGNS):
            return {"quant_method": formats.get(form).QUANT_METHOD, **content}
    return None


def groups(form: Format, specs: Mapping[str, TensorSpec]) -> dict[str, dict[str, TensorSpec]]:
    """The tensors of each packed layer: layer -> name after the layer's own -> dtype and shape."""
    separator = "_" if form.MARKER.startswith("_") else "."
    found: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in specs.items():
        layer, _, leaf = name.rpartition(separator)
        leaf = "_" + leaf if separator == "_" else leaf
        if leaf not in BESIDE:
            found.setdefault(layer, {})[leaf] = spec
    return {layer: parts for layer, parts in found.items() if form.MARKER in parts}


def tensor_name(layer: str, leaf: str) -> str:
    """The whole name of one of a layer's tensors."""
    return layer + leaf if leaf.startswith("_") else f"{layer}.{leaf}"


def shape_of(
    form: Format, checkpoint: Checkpoint, name: str, parts: Mapping[str, TensorSpec], scheme: Scheme
) -> tuple[int, int] | None:
    """Shape (N, K) of a packed layer; None when it is nowhere. Reads weight_shape where headers do not tell."""
    if "weight_shape" in parts and parts["weight_shape"].shape == (2,):
        n, k = checkpoint.read_small(f"{name}.weight_shape").tolist()
        return int(n), int(k)
    return form.shape(parts, scheme)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Key that sorts names of layers by their numbers: layers.2 before layers.10."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")]


def model_dtype(source: Packed) -> str:
    """Safetensors' name of the model's dtype, from config.json or, without it there, from the dense tensors."""
    text = source.config.get("text_config")
    for place in (source.config, text if isinstance(text, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            name = str(place.get(key)).removeprefix("torch.")
            if name in _FLOATS:
                return _FLOATS[name]
    parts = {tensor_name(x.name, leaf) for x in source.layers.values() for leaf in x.parts}
    found = [s.dtype for n, s in source.checkpoint.specs.items() if n not in parts and s.dtype in _FLOATS.values()]
    if not found:
        raise InputError(f"{source.folder / 'config.json'}: has no dtype, and no dense tensor tells the model's")
    return max(sorted(set(found)), key=found.count)


def dense_linears(source: Packed) -> list[str]:
    """Linear layers that are not packed: matrices on disk but embeddings, the head, and what the source's config names.

    A head that shares the embedding's weight has no tensor, and must still be said to be dense.
    """
    found = {"lm_head"}
    for name, spec in source.checkpoint.specs.items():
        layer, _, leaf = name.rpartition(".")
        own = layer.rpartition(".")[2]
        if leaf == "weight" and len(spec.shape) == 2 and "embed" not in own and own not in ("wte", "wpe"):
            found.add(layer)
    for pattern in source.read.ignore:
        plain = re.fullmatch(r"[\w.]+", pattern) is not None
        if plain and not any(pattern in name for name in (*found, *source.layers)):
            found.add(pattern)
    return sorted(found - source.layers.keys(), key=natural)
