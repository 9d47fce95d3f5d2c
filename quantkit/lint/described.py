"""A quantized checkpoint as the rules see it: its config, its layers with their schemes, its tensors' shapes."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import nn

from quantkit import formats, hub, packed, skeleton
from quantkit.apart import together
from quantkit.checkpoint import INDEX, Checkpoint, read_index
from quantkit.errors import InputError
from quantkit.types import Scheme, TensorSpec

# Layers that engines make one of, in the order of their rows.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_FLOATS = ("F32", "F16", "BF16")
_PACKED = ("weight_packed", "weight_scale", "weight_scale_inv", "qweight", "scales")


@dataclass(frozen=True)
class Problem:
    """A Finding without its rule and engine."""

    level: Literal["error", "warning"]
    where: str
    what: str
    fix: str


Rule = Callable[["Described"], Iterator[Problem]]


@dataclass(frozen=True)
class Layer:
    """A linear layer, expert or router.

    shape    (N, K); None when headers do not say it
    packed   whether its tensors are those of a quantized layer; `scheme` is what the config says of such a layer
    layout   compressed-tensors' format of the layer's group, "pack-quantized"; elsewhere the name of the format
    tensors  name after the layer's own -> dtype and shape
    """

    name: str
    shape: tuple[int, int] | None
    packed: bool
    scheme: Scheme | None
    layout: str
    tensors: Mapping[str, TensorSpec] = field(default_factory=dict)

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def expert(self) -> bool:
        """One of a mixture: ...experts.7.up_proj."""
        return re.search(r"\.experts\.\d+\.", self.name) is not None


@dataclass(frozen=True)
class Described:
    """A checkpoint on disk, or one that a plan will write.

    config        config.json; `quantization` is the part about quantization, wherever it lies
    layers        every linear layer, expert and router, by name on disk
    format        name of quantkit's format; "gpt-oss" has no layers here, its experts are stacked
    unread        why quantkit cannot tell schemes from the config; every `scheme` is None then
    says_packed   whether the config makes a layer quantized
    values        the numbers that were read: scales of one number, and what else a rule may need; empty in a plan
    files         names in the folder; index: tensor -> shard of the index file, None without one
    shards        shard -> names of its tensors; empty in a plan
    missing       tensors of the model that are in no shard; left_over: those that the model has no place for
    modules       names of all modules
    """

    config: Mapping[str, Any]
    quantization: Mapping[str, Any]
    format: str
    layers: Mapping[str, Layer]
    specs: Mapping[str, TensorSpec]
    tied: bool = False
    tp: int = 1
    unread: str | None = None
    says_packed: Callable[[str], bool] = lambda name: True
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    files: frozenset[str] = frozenset()
    index: Mapping[str, str] | None = None
    shards: Mapping[str, frozenset[str]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()
    modules: frozenset[str] = frozenset()
    no_model: str | None = None

    @property
    def quantized(self) -> list[Layer]:
        """Packed layers whose scheme is known."""
        return [x for x in self.layers.values() if x.packed and x.scheme is not None]

    @property
    def text(self) -> Mapping[str, Any]:
        """The part of config.json about the language model."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, Mapping) else self.config

    def fused(self) -> Iterator[tuple[Layer, ...]]:
        """Layers that engines make one of: q, k and v; gate and up, also of each expert."""
        for name, layer in self.layers.items():
            owner, _, leaf = name.rpartition(".")
            for group in FUSED:
                if leaf == group[0]:
                    found = [self.layers.get(f"{owner}.{part}") for part in group]
                    if len(together := tuple(x for x in found if x is not None)) > 1:
                        assert layer in together
                        yield together


def many(names: Iterable[str]) -> str:
    """ "a and 3 more"."""
    first, *rest = names
    return first if not rest else f"{first} and {len(rest)} more"


def gather(found: Iterable[tuple[Layer, str]]) -> Iterator[tuple[str, str]]:
    """(layer, what is wrong) -> (layers of which the same is wrong, what)."""
    alike: dict[str, list[str]] = defaultdict(list)
    for layer, what in found:
        alike[what].append(layer.name)
    for what, names in alike.items():
        yield many(names), what


# From a folder -------------------------------------------------------------------------------------------------------


def from_folder(path: Path, tp: int = 1) -> Described:
    """Describes a checkpoint on disk. Raises InputError when it is not one, or is not quantized in a known way."""
    if not (path / "config.json").is_file():
        raise InputError(
            f"{path}: {'no config.json, so it is not a model folder' if path.is_dir() else 'no such folder'}"
        )
    config = hub.read_json(path / "config.json")
    checkpoint = Checkpoint.open(path)
    quantization = packed.find_config(path, config)
    if quantization is None:
        raise InputError(f"{path}: is not quantized: it has no quantization_config, so there is nothing to check")
    module = formats.by_method(str(quantization.get("quant_method")))
    form = formats.name_of(module)
    read = module.read_config(quantization)
    by_layer: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    for name, spec in checkpoint.specs.items():
        owner, _, leaf = name.rpartition(".")
        by_layer[owner][leaf] = spec
    is_packed = {owner for owner, own in by_layer.items() if _is_packed(own)}
    model, no_model = _model(path, checkpoint)
    place = _Place(model, checkpoint, is_packed)
    says_packed = _says_packed(read)
    layers = {}
    for name in sorted(is_packed | (place.linears if model is not None else _matrices(checkpoint)), key=packed.natural):
        own = by_layer.get(name, {})
        scheme, layout = _scheme(read, form, name) if name in is_packed else (None, "")
        shape = _shape(module, own, scheme, checkpoint, name)
        layers[name] = Layer(name, shape, name in is_packed, scheme, layout, own)
    values = _values(checkpoint, _to_read(checkpoint, form, quantization))
    return Described(
        config,
        quantization,
        form,
        layers,
        checkpoint.specs,
        _tied(model, config),
        tp,
        read.unsupported,
        says_packed,
        values,
        frozenset(p.name for p in path.iterdir() if p.is_file()),
        _index(path),
        _shards(checkpoint),
        tuple(place.missing),
        tuple(place.left_over),
        place.modules | {name.rpartition(".")[0] for name in checkpoint.specs},
        no_model,
    )


def _is_packed(own: Mapping[str, TensorSpec]) -> bool:
    if any(name in own for name in _PACKED):
        return True
    weight = own.get("weight")
    return weight is not None and len(weight.shape) == 2 and weight.dtype not in _FLOATS


def _matrices(checkpoint: Checkpoint) -> set[str]:
    """Dense layers by their looks, for a model that transformers does not know."""
    return {
        name.removesuffix(".weight")
        for name, spec in checkpoint.specs.items()
        if name.endswith(".weight") and len(spec.shape) == 2 and "embed" not in name and "norm" not in name
    }


def _says_packed(read: Any) -> Callable[[str], bool]:
    if read.unsupported:
        return lambda name: True
    return lambda name: read.scheme_for(name) is not None


def _scheme(read: Any, form: str, name: str) -> tuple[Scheme | None, str]:
    """Scheme and layout of a packed layer; one that the config calls dense has the scheme of a neighbour, or none."""
    if read.unsupported:
        return None, form
    if form != "compressed-tensors":
        return read.scheme_for(name), form
    group = read.group_for(name)
    return (None, form) if group is None else (group.scheme, group.format)


def _shape(
    module: Any, own: Mapping[str, TensorSpec], scheme: Scheme | None, checkpoint: Checkpoint, name: str
) -> tuple[int, int] | None:
    if scheme is None:
        weight = own.get("weight")
        return (weight.shape[0], weight.shape[1]) if weight is not None and len(weight.shape) == 2 else None
    try:
        return packed.shape_of(module, checkpoint, name, own, scheme)
    except ValueError:  # a tensor with another number of dimensions, which other rules speak of
        return None


def _tied(model: Any, config: Mapping[str, Any]) -> bool:
    if model is not None:
        return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return bool(config.get("tie_word_embeddings"))


def _to_read(checkpoint: Checkpoint, form: str, quantization: Mapping[str, Any]) -> list[str]:
    """Scales of one number; zero points of GPTQ where v1 cannot say all of them."""
    zeros = form == "gptq" and quantization.get("sym") is False
    zeros = zeros and str(quantization.get("checkpoint_format") or quantization.get("format")) != "gptq_v2"
    return [
        name
        for name, spec in checkpoint.specs.items()
        if (math.prod(spec.shape) == 1 and "scale" in name) or (zeros and name.endswith(".qzeros"))
    ]


def _values(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Reads small tensors, opening each shard once."""
    by_shard: dict[Path, list[str]] = defaultdict(list)
    for name in names:
        by_shard[checkpoint.where[name]].append(name)
    values = {}
    for file, inside in by_shard.items():
        with safe_open(file, framework="pt") as shard:
            values.update({name: shard.get_tensor(name) for name in inside})
    return values


def _index(path: Path) -> Mapping[str, str] | None:
    return read_index(path) if (path / INDEX).is_file() else None


def _shards(checkpoint: Checkpoint) -> dict[str, frozenset[str]]:
    """What each file holds, also what the index does not name."""
    found = {}
    for file in sorted(set(checkpoint.where.values())):
        with safe_open(file, framework="pt") as shard:
            found[file.name] = frozenset(shard.keys())
    return found


# The model that config.json describes --------------------------------------------------------------------------------


def _model(path: Path, checkpoint: Checkpoint) -> tuple[Any, str | None]:
    """The model on meta, as if it were not quantized; or why it cannot be made. Code of the repository is not run."""
    try:
        return skeleton.unquantized(path, checkpoint), None
    except InputError as e:
        return None, str(e).removeprefix(f"{path}: ").removeprefix(f"{path / 'config.json'}: ")[:200]


class _Place:
    """Compares the tensors on disk with a model's: each packed layer stands for the weight that it replaces."""

    def __init__(self, model: Any, checkpoint: Checkpoint, packed: set[str]) -> None:
        self.missing: list[str] = []
        self.left_over: list[str] = []
        self.linears: set[str] = set()
        self.modules: frozenset[str] = frozenset()
        if model is None:
            return
        in_memory, wanted = skeleton.namer(model), model.state_dict()
        memory_linears = _linears(model)
        self.modules = frozenset(name for name, _ in model.named_modules())
        found: set[str] = set()
        experts: dict[str, int] = defaultdict(int)
        for key in _dense_names(checkpoint.specs, packed):
            name, merged = in_memory(key)
            if name not in wanted and (whole := together(model, name)) is not None:
                name, merged = whole, True
            if name not in wanted:
                self.left_over.append(key)
                continue
            found.add(name)
            if merged and re.search(r"\.experts\.\d+\.", key):
                experts[name] += 1
            owner = name.removesuffix(".weight")
            if key.endswith(".weight") and (merged or owner in memory_linears):
                self.linears.add(key.removesuffix(".weight"))
                memory_linears.discard(owner)
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        self.missing = sorted(name for name in wanted if name not in found and name not in tied)
        for name, count in experts.items():  # stacked in memory: of each expert there are as many
            if count % wanted[name].shape[0]:
                self.missing.append(f"{name} of some experts")
        self.linears |= {name for name in memory_linears if f"{name}.weight" in tied}


def _linears(model: Any) -> set[str]:
    """Linear layers by name in memory, and the routers beside experts, which are not nn.Linear."""
    found = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if "experts" in children:
            for child, beside in children.items():
                weight = getattr(beside, "weight", None)
                if isinstance(weight, torch.Tensor) and weight.ndim == 2 and not isinstance(beside, nn.Embedding):
                    found.add(f"{name}.{child}" if name else child)
    return found


_OF_PACKED = {
    *("weight_packed", "weight_scale", "weight_scale_2", "weight_scale_inv", "weight_zero_point", "weight_shape"),
    *("weight_global_scale", "weight_g_idx", "qweight", "qzeros", "scales", "g_idx", "weight", "pre_quant_scale"),
    *("input_scale", "input_zero_point", "input_global_scale"),
}


def _dense_names(specs: Mapping[str, TensorSpec], packed: set[str]) -> Iterator[str]:
    """The names that the tensors would have in the model before it was quantized."""
    for owner in packed:
        yield f"{owner}.weight"
    for name in specs:
        owner, _, leaf = name.rpartition(".")
        if owner in packed and leaf in _OF_PACKED:
            continue
        if leaf in ("k_scale", "v_scale", "q_scale", "output_scale", "kv_scale"):
            continue
        if leaf.endswith("_scales") and f"{owner}.{leaf.removesuffix('_scales')}_blocks" in specs:
            continue
        yield name.removesuffix("_blocks")
