"""A model without its weights: built on the meta device from config.json, filled and emptied part by part.

The names on disk and the names in memory differ for some architectures; transformers' own renaming table maps them,
and everything that goes back to disk keeps its name from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from quantkit.checkpoint import DTYPES, Checkpoint
from quantkit.errors import InputError
from quantkit.types import TensorSpec


@dataclass
class Skeleton:
    """A model on the meta device next to the checkpoint that can fill it.

    model     the transformers model; parameters on meta unless loaded, buffers (rotary tables) real
    to_disk   parameter name in memory -> tensor name on disk
    unknown   tensors on disk that the model has no place for (extra heads, stored buffers): copied as they are
    """

    model: Any
    checkpoint: Checkpoint
    to_disk: dict[str, str]
    unknown: list[str]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the checkpoint is stored in."""
        count: dict[str, int] = {}
        for spec in self.checkpoint.specs.values():
            count[spec.dtype] = count.get(spec.dtype, 0) + 1
        floats = {name: n for name, n in count.items() if DTYPES[name].is_floating_point}
        return DTYPES[max(floats, key=lambda n: floats[n])] if floats else torch.float32

    def parameters(self, prefix: str) -> list[str]:
        """Names in memory of the parameters and stored buffers under a prefix."""
        return [name for name in self.to_disk if name.startswith(prefix)]

    def load(self, names: Iterable[str], device: torch.device | str, dtype: torch.dtype) -> None:
        """Fills parameters from disk, floating-point ones cast to `dtype`. Raises InputError for NaN or Inf."""
        for name in names:
            tensor = self.checkpoint.read_finite(self.to_disk[name])
            tensor = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
            self.put(name, tensor)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Sets one parameter or buffer to `tensor`, without copying."""
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor

    def unload(self, names: Iterable[str]) -> None:
        """Back to meta: frees the memory."""
        for name in names:
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            tensor = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
            self.put(name, torch.empty_like(tensor, device="meta"))

    def tie(self) -> None:
        """Lets tied parameters (lm_head and embeddings) share what was loaded."""
        self.model.tie_weights()


def build(folder: Path, checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Skeleton:
    """Builds the model of a folder on meta and maps its parameters to the checkpoint's tensors.

    Raises InputError for an architecture that transformers does not know, for code in the repository that was not
    allowed, for tensors that are missing or of another shape, and for what cannot be quantized block by block yet.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, TypeError, ImportError) as e:
        raise InputError(f"{folder / 'config.json'}: {_config_problem(str(e))}") from None
    if getattr(config, "quantization_config", None) is not None:
        method = dict(config.quantization_config).get("quant_method", "an unknown method")
        raise InputError(f"{folder}: is already quantized ({method}); start from the original model")
    return _map(empty(config, folder, trust_remote_code=trust_remote_code), checkpoint)


def empty(config: Any, folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers model of a config, on meta. Raises InputError, naming `folder`, when there is none."""
    kind = getattr(config, "model_type", "?")
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, AttributeError, TypeError, ImportError) as e:
        raise InputError(
            f"{folder}: transformers cannot build a causal language model of type {kind!r}: {_line(e)}"
        ) from None
    model.eval()
    model.requires_grad_(False)
    model.tie_weights()
    return model


def _config_problem(message: str) -> str:
    if "trust_remote_code" in message or "execute the" in message:
        return (
            "this model needs code from its repository, which is not run unless you allow it; "
            "read that code, then set `trust_remote_code: true` in the recipe"
        )
    return f"transformers does not know this architecture ({(message.splitlines() or ['no reason given'])[0][:300]})"


def _line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:300]


def namer(model: Any) -> Callable[[str], tuple[str, bool]]:
    """A function from a tensor's name on disk to its name in memory, and whether others are merged with it there."""
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    wanted = model.state_dict()

    def in_memory(key: str) -> tuple[str, bool]:
        name, merged = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
        return name, merged is not None

    return in_memory


def _map(model: Any, checkpoint: Checkpoint) -> Skeleton:
    in_memory = namer(model)
    wanted = model.state_dict()
    to_disk: dict[str, str] = {}
    unknown: list[str] = []
    for key in checkpoint.specs:
        name, merged = in_memory(key)
        if merged and name in wanted:
            raise InputError(
                f"tensor {key!r} is merged with others into {name!r} by transformers (fused experts); "
                "mixtures of experts are not supported by this version"
            )
        if name not in wanted:
            unknown.append(key)
            continue
        have, want = checkpoint.specs[key].shape, tuple(wanted[name].shape)
        if have != want:
            raise InputError(
                f"{checkpoint.where[key]}: tensor {key!r} has shape {have}, but config.json makes it {want}; "
                "the weights and the config do not belong together"
            )
        to_disk[name] = key
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = sorted(name for name in wanted if name not in to_disk and name not in tied)
    if missing:
        raise InputError(
            f"{checkpoint.folder}: {len(missing)} tensors of the model are in no shard, {missing[0]!r} among them; "
            "the download is incomplete or the weights belong to another model"
        )
    return Skeleton(model, checkpoint, to_disk, unknown)


def spec_of(skeleton: Skeleton, name: str) -> TensorSpec:
    """Shape and dtype on disk of a parameter, by its name in memory."""
    return skeleton.checkpoint.specs[skeleton.to_disk[name]]
