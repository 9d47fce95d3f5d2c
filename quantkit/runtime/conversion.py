"""Tensors of a file to what a model holds, while transformers loads, and back while it saves.

transformers gathers what `WeightConverter`s ask for, converts it as soon as it is read, and puts it on its device;
`device_map` and offloading included. `Packing` is one converter for all packed modules of a model. It goes by their
names, in a dictionary, not by patterns: only a packed layer's `weight` is its own. `Unpacking` is its reverse.

A packed module has a `held` with `pack` and `unpack`; its parameter `codes` stands for all of them while names are
matched. Errors are raised as they are: transformers would log them and load random weights in their place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

from quantkit.errors import InputError


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs. On the way in, of a tensor on disk; on the way out, of one in memory.

    owner  name of the packed module
    codes  its parameter that stands for all that is converted together
    leaf   the tensor's name after the owner's, on disk or in memory
    """

    owner: str
    codes: str
    leaf: str


class _Marked(ConversionOps):
    """Does nothing. transformers leaves the dtype of a tensor alone when an operation has an `hf_quantizer`."""

    def __init__(self, quantizer: Any) -> None:
        self.hf_quantizer = quantizer

    def __deepcopy__(self, memo: Any) -> _Marked:
        return self

    def convert(self, input_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        return self


class _ByName(WeightConverter):
    """A converter whose copies share what never changes; transformers makes a copy for every tensor.

    places  name of a tensor that is to be converted -> where it belongs
    """

    __slots__ = ("back", "places")

    def __init__(self, places: Mapping[str, Place], back: Mapping[str, Place], quantizer: Any) -> None:
        super().__init__(source_patterns=["codes"], target_patterns=["codes"], operations=[_Marked(quantizer)])
        self._share("source_patterns", list(dict.fromkeys(place.leaf for place in places.values())))
        self._share("places", places)
        self._share("back", back)

    def _share(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __deepcopy__(self, memo: Any) -> Any:
        twin = type(self).__new__(type(self))
        for kind in type(self).__mro__:
            for name in getattr(kind, "__slots__", ()):
                if hasattr(self, name):
                    twin._share(name, getattr(self, name))
        twin._share("collected_tensors", defaultdict(list))
        twin._share("layer_targets", defaultdict(set))
        return twin

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        place = self.places.get(source_key)
        if place is None:
            return source_key, None
        self._share("_was_used", True)
        return f"{place.owner}.{place.codes}", place.leaf

    def _gathered(self) -> dict[str, torch.Tensor]:
        return {leaf: found[0] for leaf, found in self.materialize_tensors().items() if found}


class Packing(_ByName):
    """Disk to memory.

    places  name on disk, after transformers' renamings but before it adds or drops the base model's prefix
    back    name in memory of everything that is held
    """

    __slots__ = ()

    @torch.no_grad()
    def convert(self, layer_name: str, model: Any = None, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        owner, _, codes = layer_name.rpartition(".")
        try:
            held = model.get_submodule(owner).pack(codes, self._gathered())
        except InputError as error:
            raise InputError(f"{owner}: {error}") from error
        return {f"{owner}.{name}": t for name, t in held.items()}

    def reverse_transform(self) -> Unpacking:
        return Unpacking(self.back, {}, self.operations[0].hf_quantizer)


class Unpacking(_ByName):
    """Memory to disk: the tensors of each packed module, as they were."""

    __slots__ = ()

    @torch.no_grad()
    def convert(self, layer_name: str, model: Any = None, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        # 5.17 has renamed the owner by now, 5.23 will rename what is returned
        renamed, _, codes = layer_name.rpartition(".")
        key = next(key for keys in self.layer_targets.values() for key in keys)
        tensors = model.get_submodule(self.places[key].owner).unpack(codes, self._gathered())
        return {f"{renamed}.{leaf}": t for leaf, t in tensors.items()}
