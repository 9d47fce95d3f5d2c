"""Which tensors on disk are which projection of which expert, and the model that has a linear for each of them.

Two layouts, both read from transformers' own table of conversions:

    apart   a tensor an expert and projection, experts.3.gate_proj.weight, which transformers merges while loading
    fused   all experts in one: gate_up_proj (E, H, 2I) or (E, 2I, H), down_proj, their biases. A linear's weight is
            then a `Piece` of it: of expert e, transposed, every other row where gate and up alternate

Engines read compressed experts a tensor an expert and projection, so that is what is written either way. Experts that
stay dense go back to disk as they were.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from quantkit.errors import InputError
from quantkit.experts import UPS, Experts, is_fused, is_transposed, leaves
from quantkit.types import TensorSpec

# How transformers merges the tensors of experts that can be taken apart: stacked, and gate on top of up.
_MERGES = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
_ONE = re.compile(r"\.(\d+)\.(\w+)\.weight$")  # ...experts.3.gate_proj.weight
_ALONE = re.compile(r"(.+)\.(\d+)\.(\w+)\.(weight|bias)$")
_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class Piece:
    """A linear's weight (N, K) or bias (N,) as a part of a tensor on disk that holds those of all experts.

    disk    the tensor's name; expert: its place along the first dimension
    rows    (first, last, step) of the expert's outputs
    turned  the file has inputs before outputs
    spec    dtype and shape of this part
    """

    disk: str
    expert: int
    rows: tuple[int, int, int]
    turned: bool
    spec: TensorSpec

    def of(self, one: torch.Tensor) -> torch.Tensor:
        """This part of what the file has of the expert, as a tensor of its own."""
        return (one.T if self.turned else one)[slice(*self.rows)].clone(memory_format=torch.contiguous_format)

    def put(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Writes this part into the whole tensor."""
        one = whole[self.expert]
        (one.T if self.turned else one)[slice(*self.rows)] = part


@dataclass
class Apart:
    """What `take_apart` found.

    homes   tensor on disk -> name in memory: tensors of one expert's projection
    pieces  tensor on disk, of all experts -> (name in memory, name that it would have on disk alone, piece)
    """

    homes: dict[str, str] = field(default_factory=dict)
    pieces: dict[str, list[tuple[str, str, Piece]]] = field(default_factory=dict)


def take_apart(model: Any, specs: Mapping[str, TensorSpec]) -> Apart:
    """Puts `Experts` in the place of each module of a model on meta that holds several experts in a tensor.

    specs  of the tensors on disk
    Raises InputError for experts that compute in a way that linears do not, and for tensors that are missing or do not
    fit the model's number of experts or their size.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    wanted = model.state_dict()
    found = Apart()
    parts: dict[str, dict[str, dict[int, str]]] = {}  # module -> its tensor -> place in it -> name on disk
    for key, spec in specs.items():
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
        owner, _, leaf = name.rpartition(".")
        if name not in wanted or not is_fused(fused := model.get_submodule(owner)):
            continue
        converter = next((c for c in converters if pattern in c.source_patterns), None)
        one = _ONE.search(key)
        if converter is not None and one is not None:
            _check(key, int(one[1]), fused, converter)
            parts.setdefault(owner, {}).setdefault(leaf, {})[converter.source_patterns.index(str(pattern))] = one[2]
            found.homes[key] = f"{owner}.{one[1]}.{one[2]}.weight"
        elif leaf in leaves(fused):
            found.pieces[key] = list(_pieces(key, spec, owner, leaf, fused, converter))
            names = _PROJECTIONS[leaf.removesuffix("_bias")]
            parts.setdefault(owner, {})[leaf] = dict(enumerate(names))
    for owner, merged in parts.items():
        _replace(model, owner, merged)
    return found


def _replace(model: Any, owner: str, merged: Mapping[str, Mapping[int, str]]) -> None:
    fused = model.get_submodule(owner)
    for leaf in fused._parameters:
        if leaf not in merged:
            raise InputError(f"{owner}: no tensor on disk holds the {leaf} of its experts; download the model again")
    ups = next(merged[leaf] for leaf in UPS if leaf in merged)
    model.set_submodule(owner, Experts(fused, tuple(ups[i] for i in sorted(ups)), merged["down_proj"][0]))


def _check(key: str, e: int, fused: Any, converter: WeightConverter) -> None:
    """Refuses experts that are no linears without a bias, with the tensor on disk that shows them."""
    if e >= (count := fused.down_proj.shape[0]):
        raise InputError(
            f"tensor {key!r} is one of expert {e}, but config.json makes {count} experts; "
            "the weights and the config do not belong together"
        )
    why = _unlike(fused)
    if not why and (fused.has_bias or fused.is_transposed or not fused.is_concatenated):
        why = "transposed, interleaved or with a bias in memory"
    if not why and [type(op).__name__ for op in converter.operations] not in _MERGES:
        why = f"merged by {', '.join(type(op).__name__ for op in converter.operations)}"
    if why:
        raise InputError(f"tensor {key!r}: experts that are {why} ({type(fused).__name__}) are not supported")


def _unlike(fused: Any) -> str:
    """Why a module's experts are not computed as `Experts` does; "" when they are."""
    if not hasattr(fused, "has_gate") or not hasattr(fused, "_apply_gate"):
        return "" if type(fused).__name__ == "Llama4TextExperts" else "run by code of their own"
    if other := sorted(fused._parameters.keys() - {*leaves(fused)}):
        return f"with {other[0]!r} beside their projections"
    return ""


def _pieces(
    key: str, spec: TensorSpec, owner: str, leaf: str, fused: Any, converter: WeightConverter | None
) -> Iterator[tuple[str, str, Piece]]:
    """The linears' weights or biases in a tensor that holds those of all experts."""
    steps = [] if converter is None else [type(op).__name__ for op in converter.operations]
    if why := _unlike(fused) or (f"converted by {', '.join(steps)}" if steps not in ([], ["Transpose"]) else ""):
        raise InputError(f"tensor {key!r}: experts that are {why} ({type(fused).__name__}) are not supported")
    shape = tuple(fused._parameters[leaf].shape)
    turned = is_transposed(fused)
    if converter is not None and steps:  # as transformers does, which may leave alone what has the shape wanted
        turned ^= not (getattr(converter.operations[0], "check_dims", False) and spec.shape == shape)
    bias = leaf.endswith("_bias")
    on_disk = shape if bias or turned == is_transposed(fused) else (shape[0], shape[2], shape[1])
    if spec.shape != on_disk:
        raise InputError(
            f"tensor {key!r} holds the {leaf} of all experts and has shape {spec.shape}, but config.json makes it "
            f"{on_disk}; the weights and the config do not belong together"
        )
    count, outputs = shape[0], spec.shape[-1] if bias or turned else spec.shape[1]
    names = _PROJECTIONS[leaf.removesuffix("_bias")]
    apart = len(names) > 1 and not getattr(fused, "is_concatenated", True)
    each = outputs // len(names)
    size = (each,) if bias else (each, spec.shape[1] if turned else spec.shape[2])
    kind = "bias" if bias else "weight"
    for e in range(count):
        for i, name in enumerate(names):
            rows = (i, outputs, len(names)) if apart else (i * each, (i + 1) * each, 1)
            piece = Piece(key, e, rows, turned and not bias, TensorSpec(spec.dtype, size))
            yield f"{owner}.{e}.{name}.{kind}", f"{key.rpartition('.')[0]}.{e}.{name}.{kind}", piece


# Back together -------------------------------------------------------------------------------------------------------


def together(model: Any, name: str) -> str | None:
    """The tensor, in a model's memory, of all experts that one of a single expert's projection belongs to.

    name  in memory, as transformers' table makes it: "...experts.3.gate_proj.weight" -> "...experts.gate_up_proj"
    None where a model has no such tensor, or its table merges by itself.
    """
    found = _ALONE.match(name)
    owner = None if found is None else dict(model.named_modules()).get(found[1])
    if found is None or owner is None or not is_fused(owner):
        return None
    bias = "_bias" if found[4] == "bias" else ""
    whole = (f"{leaf}{bias}" for leaf, parts in _PROJECTIONS.items() if found[3] in parts)
    return next((f"{found[1]}.{leaf}" for leaf in whole if leaf in owner._parameters), None)


def gathered(model: Any, names: Mapping[str, str], dtype: str) -> dict[str, tuple[TensorSpec, dict[str, Piece]]]:
    """Tensors of all experts, as the files of a model have them, that are to be put together from those of each.

    model  on meta; its experts are taken apart
    names  name on disk -> in memory, of tensors of one expert's projection: weights and biases
    dtype  safetensors' name of the dtype that they get
    Returns the tensor's name on disk -> what it will be, and which of `names` it consists of.
    """
    converters = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightConverter)]
    specs: dict[str, TensorSpec] = {}
    for key, name in names.items():
        if (whole := together(model, name)) is None:
            continue
        shape = tuple(model.get_parameter(whole).shape)
        steps = [op for c in converters if any(whole.endswith(p) for p in c.source_patterns) for op in c.operations]
        if steps and not (getattr(steps[0], "check_dims", False) and shape[1] == shape[2]):
            shape = (shape[0], shape[2], shape[1])
        prefix = key.rsplit(".", 3)[0]  # without 3.gate_proj.weight
        specs[f"{prefix}.{whole.rpartition('.')[2]}"] = TensorSpec(dtype, shape)
    found = take_apart(model, specs)
    return {disk: (specs[disk], {alone: piece for _, alone, piece in own}) for disk, own in found.pieces.items()}
