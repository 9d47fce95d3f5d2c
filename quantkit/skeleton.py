"""A model without its weights: built on the meta device from config.json, filled and emptied part by part.

The names on disk and the names in memory differ for some architectures; transformers' own renaming table maps them,
and everything that goes back to disk keeps its name from disk. Experts are taken apart (apart.py): in memory they are
linears, whether a file has a tensor for each or one for all.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from quantkit import hub
from quantkit.apart import Piece, take_apart
from quantkit.checkpoint import DTYPES, Checkpoint
from quantkit.errors import InputError
from quantkit.types import TensorSpec

MOST = 16  # weights a byte of the shards: a weight takes two bits or more, and experts may be shared
_COUNTS = re.compile(r"(?:num|n)_(?:\w+_)?(?:layers?|experts)|(?:en|de)coder_layers")

# a parameter's name in memory, its tensor from disk, and a function that reads another -> the tensor to use
Rewrite = Callable[[str, torch.Tensor, Callable[[str], torch.Tensor]], torch.Tensor]


@dataclass
class Skeleton:
    """A model on the meta device next to the checkpoint that can fill it.

    model     the transformers model; parameters on meta unless loaded, buffers (rotary tables) real
    to_disk   parameter name in memory -> tensor name on disk
    unknown   tensors on disk that the model has no place for (extra heads, stored buffers): copied as they are
    rewrite   what a parameter becomes as it is read, where a transform asks for it
    shared    parameters that are to have a tensor of their own: name in memory -> the tensor on disk that they start as
    pieces    parameters that are a part of a tensor on disk: name in memory -> which; `to_disk` has the name that they
              get on disk when they are quantized
    """

    model: Any
    checkpoint: Checkpoint
    to_disk: dict[str, str]
    unknown: list[str]
    rewrite: Rewrite | None = None
    shared: dict[str, str] = field(default_factory=dict)
    pieces: dict[str, Piece] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the checkpoint is stored in."""
        count: dict[str, int] = {}
        for spec in self.checkpoint.specs.values():
            count[spec.dtype] = count.get(spec.dtype, 0) + 1
        floats = {name: n for name, n in count.items() if DTYPES[name].is_floating_point}
        return DTYPES[max(floats, key=lambda n: floats[n])] if floats else torch.float32

    @property
    def further(self) -> list[str]:
        """Layers on disk that the model has no place for, such as those that predict several tokens ahead (MTP)."""
        specs = self.checkpoint.specs
        return [n.removesuffix(".weight") for n in self.unknown if n.endswith(".weight") and len(specs[n].shape) == 2]

    def parameters(self, prefix: str) -> list[str]:
        """Names in memory of the parameters and stored buffers under a prefix."""
        return [name for name in self.to_disk if name.startswith(prefix)]

    def load(self, names: Iterable[str], device: torch.device | str, dtype: torch.dtype) -> None:
        """Fills parameters from disk, floating-point ones cast to `dtype`. Raises InputError for NaN or Inf."""
        for name in names:
            tensor = self.read(name, device)
            self.put(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """One parameter or buffer from disk, as the model is to have it. Raises InputError for NaN or Inf."""
        tensor = self.original(name, device)
        return tensor if self.rewrite is None else self.rewrite(name, tensor, self.original)

    def rows(self, name: str, count: int, device: torch.device | str = "cpu") -> Iterator[torch.Tensor]:
        """`read`, `count` rows at a time, each in memory only until the next where the file has them so."""
        if self.rewrite is not None or name in self.pieces:
            yield from self.read(name, device).split(count)
        else:
            yield from self.checkpoint.rows(self.source(name), count, device)

    def original(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """One parameter or buffer as it is on disk. Raises InputError for NaN or Inf."""
        if (piece := self.pieces.get(name)) is not None:
            return piece.of(self.checkpoint.read_finite(piece.disk, device, piece.expert))
        return self.checkpoint.read_finite(self.source(name), device)

    def whole(self, disk: str) -> torch.Tensor:
        """A tensor that holds several parameters, put together from those as they are now, in its dtype on disk."""
        spec = self.checkpoint.specs[disk]
        found = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
        for name, piece in self.pieces.items():
            if piece.disk == disk:
                piece.put(found, self.get(name).to(found))
        return found

    def source(self, name: str) -> str:
        """The tensor on disk that a parameter is read from."""
        return self.shared.get(name, self.to_disk[name])

    def untie(self, name: str, other: str) -> None:
        """Gives the parameter `name` a tensor of its own in the output, where it shared that of `other`."""
        self.shared[name] = self.to_disk[other]
        self.to_disk[name] = name

    def get(self, name: str) -> torch.Tensor:
        """One parameter or stored buffer as it is now."""
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        found: torch.Tensor = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
        return found

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
            self.put(name, torch.empty_like(self.get(name), device="meta"))

    def tie(self) -> None:
        """Lets tied parameters (lm_head and embeddings) share what was loaded."""
        if not self.shared:
            self.model.tie_weights()


def build(folder: Path, checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Skeleton:
    """Builds the model of a folder on meta and maps its parameters to the checkpoint's tensors.

    Raises InputError for an architecture that transformers does not know, for code in the repository that was not
    allowed, for tensors that are missing or of another shape, and for what cannot be quantized block by block yet.
    """
    config = _config(folder, checkpoint, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        method = dict(config.quantization_config).get("quant_method", "an unknown method")
        raise InputError(f"{folder}: is already quantized ({method}); start from the original model")
    _check_weights(config, folder, checkpoint, trust_remote_code)
    return _map(empty(config, folder, trust_remote_code=trust_remote_code), checkpoint)


def auto_class(config: Any) -> Any:
    """The class of transformers that makes a config's model: a wrapper, if a language model lies inside one."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    named = (getattr(config, "architectures", None) or [""])[0]
    wraps = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if wraps and named != getattr(causal, "__name__", None) else AutoModelForCausalLM


def empty(config: Any, folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers model of a config, on meta. Raises InputError, naming `folder`, when there is none."""
    kind = getattr(config, "model_type", "?")
    try:
        with init_empty_weights(include_buffers=False):
            model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
        model.eval()
        model.requires_grad_(False)
        model.tie_weights()
    except Exception as e:  # an architecture's code raises whatever it likes for a config that it was not made for
        raise InputError(f"{folder}: transformers cannot build a language model of type {kind!r}: {_line(e)}") from None
    return model


def _config(folder: Path, checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    _check_counts(folder, checkpoint)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as e:  # as above
        raise InputError(f"{folder / 'config.json'}: {_config_problem(e)}") from None


def _config_problem(e: Exception) -> str:
    if "trust_remote_code" in str(e) or "execute the" in str(e):
        return (
            "this model needs code from its repository, which is not run unless you allow it; "
            "read that code, then set `trust_remote_code: true` in the recipe"
        )
    if isinstance(e, ValueError | KeyError | OSError | ImportError):
        return f"transformers does not know this architecture ({_line(e)})"
    return f"transformers cannot read it ({_line(e)})"


def _line(e: Exception) -> str:
    return " ".join(str(e).split())[:300] or type(e).__name__


def _check_counts(folder: Path, checkpoint: Checkpoint) -> None:
    """Refuses a config.json that asks for more layers or experts than there are tensors: a number that is wrong.

    transformers makes a module of each, and lists of them before that, which no machine ends with.
    """
    most = max(512, len(checkpoint.specs))

    def look(content: Any) -> None:
        for key, value in content.items() if isinstance(content, dict) else ():
            if isinstance(value, int) and value > most and _COUNTS.fullmatch(key):
                raise InputError(
                    f"{folder / 'config.json'}: {key} is {value:.3g}, but the shards hold {len(checkpoint.specs)} "
                    "tensors; the weights and the config do not belong together"
                    if value < 1 << 1000
                    else f"{folder / 'config.json'}: {key} has {value.bit_length()} bits, which counts nothing"
                )
            look(value)

    look(hub.read_json(folder / "config.json"))


def _check_weights(config: Any, folder: Path, checkpoint: Checkpoint, trust_remote_code: bool) -> None:
    """Refuses a config that makes a model many times larger than its shards, before memory is asked for it."""
    try:
        with torch.device("meta"):
            config = copy.deepcopy(config)
            model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except Exception:
        return  # not to be made, or not on meta: what is wrong shows when it is made
    weights = sum(p.numel() for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    size = checkpoint.size()
    if max(weights, buffers) > max(MOST * size, 1 << 24):
        raise InputError(
            f"{folder / 'config.json'}: makes a model of {weights:,} weights, and tables of {buffers:,} bytes, but the "
            f"shards have {size:,} bytes; the weights and the config do not belong together"
        )


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


def unquantized(folder: Path, checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The empty model of a quantized folder, as if its weights were dense.

    Raises InputError for an architecture that transformers does not know.
    """
    config = _config(folder, checkpoint, trust_remote_code)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    _check_weights(config, folder, checkpoint, trust_remote_code)
    return empty(config, folder, trust_remote_code=trust_remote_code)


def _map(model: Any, checkpoint: Checkpoint) -> Skeleton:
    in_memory = namer(model)
    experts = take_apart(model, checkpoint.specs)
    wanted = model.state_dict()
    to_disk: dict[str, str] = {}
    pieces: dict[str, Piece] = {}
    unknown: list[str] = []
    for key in checkpoint.specs:
        if key in experts.pieces:
            to_disk |= {name: alone for name, alone, _ in experts.pieces[key]}
            pieces |= {name: piece for name, _, piece in experts.pieces[key]}
            continue
        name, merged = (experts.homes[key], False) if key in experts.homes else in_memory(key)
        if name not in wanted:
            unknown.append(key)
            continue
        if merged:
            raise InputError(
                f"tensor {key!r} is merged with others into {name!r} by transformers, and only experts are taken "
                "apart; this architecture is not supported by this version"
            )
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
    return Skeleton(model, checkpoint, to_disk, unknown, pieces=pieces)


def spec_of(skeleton: Skeleton, name: str) -> TensorSpec:
    """Shape and dtype on disk of a parameter, by its name in memory."""
    piece = skeleton.pieces.get(name)
    return skeleton.checkpoint.specs[skeleton.source(name)] if piece is None else piece.spec
