"""Which modules of an empty model become packed, and which tensor on disk goes where: from headers and the config.

The checkpoint decides: a layer is packed when its tensors are there, and the config says how. Names in the config are
those on disk. transformers renames some keys while loading (multimodal models, a head added to a base model), and its
own rules are asked what becomes of them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open
from torch import nn

from quantkit import formats, packed
from quantkit.checkpoint import DTYPES, NAMES, Checkpoint, _header
from quantkit.errors import InputError
from quantkit.experts import is_fused
from quantkit.formats.gptq import Zeros
from quantkit.runtime import cache
from quantkit.runtime.conversion import Place
from quantkit.runtime.disk import Disk, of_expert
from quantkit.runtime.experts import LEAVES, SIDES
from quantkit.runtime.held import Held, describe
from quantkit.runtime.stack import Stack
from quantkit.types import Format, Scheme, TensorSpec

CODES = "codes"


class NotHeld(Exception):
    """Why a model cannot be held packed. Never leaves this folder."""


@dataclass
class Plan:
    """What becomes packed.

    linears  module -> how it is held
    experts  module that holds the experts of a layer -> "up" and "down"
    biases   module -> dtype of its bias on disk
    places   name on disk, after transformers' renamings -> where it goes
    fp8      whether FP8 codes can be multiplied where the model will lie
    """

    fp8: bool = True
    linears: dict[str, Held] = field(default_factory=dict)
    experts: dict[str, dict[str, Stack]] = field(default_factory=dict)
    biases: dict[str, torch.dtype] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)

    @property
    def back(self) -> dict[str, Place]:
        """Name in memory of everything that is held."""
        found: dict[str, Place] = {}
        for owner, held in self.linears.items():
            found |= {f"{owner}.{name}": Place(owner, CODES, name) for name in held.specs()}
        for owner, stacks in self.experts.items():
            for side, stack in stacks.items():
                names = [f"{side}_{name}" for name in (*stack.specs(), *(["bias"] if stack.biases else []))]
                found |= {f"{owner}.{name}": Place(owner, f"{side}_codes", name) for name in names}
        return found


class Name(NamedTuple):
    """What becomes of a tensor's name.

    early   while loading, before the base model's prefix is added or dropped
    dense   on disk, if it were the dense weight of its layer; itself, if it is not of a packed layer
    memory  of that one in memory
    part    its place among the kinds of tensors that are merged there (gate and up); None: it is not merged
    """

    early: str
    dense: str
    memory: str
    part: int | None


@dataclass(frozen=True)
class Files:
    """The safetensors of a checkpoint, unread, and what transformers calls their tensors."""

    checkpoint: Checkpoint
    names: Mapping[str, Name]

    @classmethod
    def open(cls, model: nn.Module, files: Sequence[str], form: Format) -> Files:
        """Raises NotHeld when they are not safetensors."""
        if not all(str(file).endswith(".safetensors") for file in files):
            raise NotHeld("the checkpoint is not in safetensors")
        specs: dict[str, TensorSpec] = {}
        where: dict[str, Path] = {}
        for file in map(Path, files):
            found = _header(file)
            specs |= found
            where |= dict.fromkeys(found, file)
        checkpoint = Checkpoint(Path(files[0]).parent, specs, where)
        return cls(checkpoint, names_in_memory(model, specs, form))

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self.checkpoint.where[name], framework="pt") as opened:
            found: torch.Tensor = opened.get_tensor(name)
        return found


def names_in_memory(model: nn.Module, specs: Mapping[str, TensorSpec], form: Format) -> dict[str, Name]:
    """`Files.names`."""
    # imported here: while transformers is being imported, and registers us, these may be only half there
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    layers = packed.groups(form, specs)
    owners = {packed.tensor_name(layer, leaf): layer for layer, parts in layers.items() for leaf in parts}
    as_it_is, as_weight = (get_model_conversion_mapping(model) for _ in range(2))  # some of them count what they see
    state: Mapping[str, torch.Tensor] = model.state_dict()

    def renamed(key: str, transforms: list[Any], whole: bool) -> tuple[str, int | None]:
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)] if whole else []
        prefix = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": state} if whole else {}
        name, pattern = rename_source_key(key, renamings, converters, **prefix)
        converter = next((c for c in converters if pattern in c.source_patterns), None)
        return name, None if converter is None else converter.source_patterns.index(str(pattern))

    found = {}
    for key in sorted(specs, key=dot_natural_key):  # the loader's order
        layer = owners.get(key)
        stacked = form.MARKER.startswith("_")  # after the parameter's name, without a dot
        dense = key if layer is None else layer if stacked else f"{layer}.weight"
        found[key] = Name(renamed(key, as_it_is, False)[0], dense, *renamed(dense, as_weight, True))
    return found


def plan(model: nn.Module, form: Format, read: Any, files: Sequence[str] | None, *, fp8: bool = True) -> Plan:
    """Decides. Without files (a state dict is given), the config decides alone.

    fp8  as `describe` has it
    Raises NotHeld with the reason when this model cannot be held packed, InputError for what does not fit together.
    """
    found = Plan(fp8)
    if not files:
        _without_files(model, form, read, found)
        return found
    opened = Files.open(model, files, form)
    modules = dict(model.named_modules())
    tied = {name for pair in getattr(model, "all_tied_weights_keys", {}).items() for name in pair}
    layers = packed.groups(form, opened.checkpoint.specs)
    absent = []
    expert_layers: dict[str, list[Expert]] = {}
    for layer, parts in layers.items():
        name = opened.names[packed.tensor_name(layer, next(iter(parts)))]
        expert = expert_of(layer, name, modules)
        module = modules.get(name.memory.removesuffix(".weight"))
        if expert is not None:
            expert_layers.setdefault(expert.owner, []).append(expert)
        elif name.part is not None:
            raise NotHeld(f"{layer} is merged with other tensors while loading")
        elif module is None:
            absent.append(layer)
        elif not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            raise NotHeld(f"{layer} is packed, but here it is {type(module).__name__}, which computes something else")
        elif name.memory in tied:
            raise NotHeld(
                f"{layer} is packed, but the model ties its weight to another; set tie_word_embeddings to false"
            )
        else:
            _add(found, opened, form, read, layer, parts, name.memory.removesuffix(".weight"), module)
    for owner, experts in expert_layers.items():
        add_experts(found, opened, form, read, layers, modules[owner], experts)
    if absent and len(absent) == len(layers):
        raise NotHeld(
            f"none of the {len(layers)} packed layers of the checkpoint, such as {min(layers)}, is in this model"
        )
    if not layers:
        raise NotHeld("the checkpoint has no packed layer")
    return found


def caches(
    model: nn.Module, form: Format, read: Any, files: Sequence[str] | None
) -> tuple[dict[str, dict[str, TensorSpec]], bool]:
    """Attention layers with the scales of their KV cache, and whether those are below k_proj and v_proj on disk.

    Raises NotHeld when there should be some and are none.
    """
    if read.kv_cache is None:
        return {}, False
    if not files:
        raise NotHeld("kv_cache_scheme is set, and without files its scales are not known")
    opened = Files.open(model, files, form)
    in_memory = {name.dense: name.memory for name in opened.names.values() if name.part is None}
    owners, reason = cache.plan(in_memory, opened.checkpoint.specs)
    if reason is not None:
        raise NotHeld(reason)
    return owners, any(key.endswith(("k_proj.k_scale", "v_proj.v_scale")) for key in opened.checkpoint.specs)


def _scheme(read: Any, layer: str) -> Scheme:
    scheme: Scheme | None = read.scheme_for(layer)
    if scheme is None:
        raise NotHeld(f"{layer} is packed in the checkpoint, but no group of its config names it")
    return scheme


def _add(
    found: Plan,
    opened: Files,
    form: Format,
    read: Any,
    layer: str,
    parts: Mapping[str, TensorSpec],
    owner: str,
    linear: nn.Linear,
) -> None:
    """One linear layer."""
    shape, scheme = (linear.out_features, linear.in_features), _scheme(read, layer)
    stored = form.shape(parts, scheme)
    if stored is not None and stored != shape:
        raise InputError(
            f"{layer} is {stored} in the checkpoint, and {shape} by the model's config; the checkpoint belongs to "
            "another config.json"
        )
    disk = disk_of(form, read, layer, shape, scheme, parts)
    found.linears[owner] = held_of(disk, layer, opened, fp8=found.fp8)
    for leaf in parts:
        key = opened.names[packed.tensor_name(layer, leaf)].early
        found.places[key] = Place(owner, CODES, leaf)
    bias = opened.checkpoint.specs.get(f"{layer}.bias")
    if bias is not None:
        found.biases[owner] = DTYPES[bias.dtype]


def disk_of(
    form: Format, read: Any, layer: str, shape: tuple[int, int], scheme: Scheme, parts: Mapping[str, TensorSpec]
) -> Disk:
    """How the tensors of a layer lie in a file."""
    layout = read.group_for(layer).format if hasattr(read, "group_for") else ""
    zeros = getattr(getattr(read, "reads", None), "keywords", {}).get("zeros", "v2")
    unpack = functools.partial(read.unpack, layer)
    return Disk(form.QUANT_METHOD, shape, scheme, dict(parts), unpack, layout, cast(Zeros, zeros))


def held_of(disk: Disk, layer: str, opened: Files, *, grouped: bool = False, fp8: bool = True) -> Held:
    """How a layer is held: reads the few tensors that it depends on. The rest as `describe`."""
    g_idx, factor = (
        opened.read(f"{layer}.{leaf}") if leaf in disk.parts else None for leaf in ("g_idx", "pre_quant_scale")
    )
    return describe(disk, g_idx, factor, grouped=grouped, fp8=fp8)


def _without_files(model: nn.Module, form: Format, read: Any, found: Plan) -> None:
    tied = {name for pair in getattr(model, "all_tied_weights_keys", {}).items() for name in pair}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or f"{name}.weight" in tied or (scheme := read.scheme_for(name)) is None:
            continue
        shape = (module.out_features, module.in_features)
        dtype = formats.scale_dtype(form, NAMES[module.weight.dtype])
        parts = form.tensors(shape, scheme, dtype)
        found.linears[name] = describe(disk_of(form, read, name, shape, scheme, parts), fp8=found.fp8)
        found.places |= {f"{name}.{leaf}": Place(name, CODES, leaf) for leaf in parts}


# Experts -------------------------------------------------------------------------------------------------------------

_ONE = re.compile(r"(.+)\.(\d+)\.(\w+)$")  # ...experts.3.gate_proj
SIDES_BIAS = {side: {f"{leaf}_bias" for leaf, of in LEAVES.items() if of == side} for side in SIDES}
_PARTS = {"gate_proj": ("up", 0), "up_proj": ("up", 1), "down_proj": ("down", 0)}


class Expert(NamedTuple):
    """A packed layer that belongs to the experts of a model's layer.

    owner  their module; side, part: as Stack has them; number: which expert, None: all in one tensor
    name   what the projection is called on disk
    """

    layer: str
    owner: str
    side: str
    part: int
    number: int | None
    name: str


def expert_of(layer: str, name: Name, modules: Mapping[str, nn.Module]) -> Expert | None:
    """What a packed layer is to the experts of a model; None when it is none of them."""
    memory = name.memory.removesuffix(".weight")
    owner, _, leaf = memory.rpartition(".")
    one = _ONE.match(layer)
    if leaf in LEAVES and owner in modules and is_fused(modules[owner]):
        if name.part is not None and one is not None:
            return Expert(layer, owner, LEAVES[leaf], name.part, int(one[2]), one[3])
        return Expert(layer, owner, LEAVES[leaf], 0, None, leaf)
    inside = _ONE.match(memory)  # not merged by transformers, which would take the module apart (Llama 4)
    if inside is None or inside[3] not in _PARTS or inside[1] not in modules or not is_fused(modules[inside[1]]):
        return None
    side, part = _PARTS[inside[3]]
    return Expert(layer, inside[1], side, part, int(inside[2]), inside[3])


def add_experts(
    found: Plan,
    opened: Files,
    form: Format,
    read: Any,
    layers: Mapping[str, Mapping[str, TensorSpec]],
    fused: Any,
    experts: list[Expert],
) -> None:
    """The experts of one layer. Raises NotHeld when they differ, or are not all there."""
    owner, count = experts[0].owner, int(fused.down_proj.shape[0])
    alone = not hasattr(fused, "has_gate")
    if alone and type(fused).__name__ != "Llama4TextExperts":
        raise NotHeld(f"{owner} is {type(fused).__name__}, whose experts are run by code of their own")
    gated = alone or fused.has_gate
    hidden, inner = fused.down_proj.shape[1:]
    if alone or fused.is_transposed:
        hidden, inner = inner, hidden
    stacks = {}
    for side in SIDES:
        own = sorted((x for x in experts if x.side == side), key=lambda x: (x.part, x.number or 0))
        together = bool(own) and own[0].number is None
        names = tuple(dict.fromkeys(x.name for x in own))
        ups = 2 if side == "up" and gated else 1
        wanted = 1 if together else ups * count
        if len(own) != wanted or len(names) != (1 if together else ups):
            raise NotHeld(f"{owner} has {len(own)} packed tensors for its {side} projection, not {wanted}")
        rows = (inner * ups if together else inner) if side == "up" else hidden
        shape = (int(rows), int(hidden if side == "up" else inner))
        stacks[side] = _stack(opened, form, read, layers, own, names, shape, count, found.fp8)
        if not together and (SIDES_BIAS[side] & fused._parameters.keys()):
            stacks[side] = replace(stacks[side], biases=True)
        for x in own:
            for leaf in layers[x.layer]:
                key = opened.names[packed.tensor_name(x.layer, leaf)].early
                place = f"{x.name}{leaf}" if together else f"{x.number}.{x.name}.{leaf}"
                found.places[key] = Place(owner, f"{side}_codes", place)
            bias = f"{x.layer}.bias"
            if stacks[side].biases and bias in opened.names:
                found.places[opened.names[bias].early] = Place(owner, f"{side}_codes", f"{x.number}.{x.name}.bias")
    found.experts[owner] = stacks


def _stack(
    opened: Files,
    form: Format,
    read: Any,
    layers: Mapping[str, Mapping[str, TensorSpec]],
    own: list[Expert],
    names: tuple[str, ...],
    shape: tuple[int, int],
    count: int,
    fp8: bool,
) -> Stack:
    """One projection. shape: of one part, or of all where a file has them in one tensor."""
    first = own[0].layer
    disk = disk_of(form, read, first, shape, _scheme(read, first), layers[first])
    together = own[0].number is None
    if together:
        disk = of_expert(disk)
    for x in own:
        if layers[x.layer] != layers[first] or _scheme(read, x.layer) != disk.scheme:
            raise NotHeld(f"{x.layer} is packed in another way than {first}")
    stored = form.shape(layers[first], disk.scheme)
    if stored is not None and stored != shape:
        raise InputError(
            f"{first} is {stored} in the checkpoint, and {shape} by the model's config; the checkpoint belongs to "
            "another config.json"
        )
    held = held_of(disk, first, opened, grouped=True, fp8=fp8)
    if held.path == "plain" or held.factor:
        raise NotHeld(f"{first}: no kernel for experts holds {disk.scheme.weights} with {', '.join(disk.parts)}")
    ordered = held.order
    if ordered:
        _check_order(opened, own, count)
    uneven = False
    if len(names) > 1 and disk.scheme.weights.number == "nvfp4":
        leaf = "weight_global_scale" if "weight_global_scale" in disk.parts else "weight_scale_2"
        scales = [float(opened.read(f"{x.layer}.{leaf}").float()) for x in own]
        uneven = scales[:count] != scales[count:]
    return Stack(held, names, count, together, ordered, uneven)


def _check_order(opened: Files, own: list[Expert], count: int) -> None:
    """gate and up of an expert must have their columns in one order."""
    orders = [opened.read(f"{x.layer}.g_idx") for x in own]
    for i, order in enumerate(orders):
        if not torch.equal(order, orders[i % count]):
            raise NotHeld(f"{own[i].layer} has its columns in another order than {own[i % count].layer} (g_idx)")
