"""`quantization_config` of compressed-tensors: schemes in the library's words, written and read.

Readers are strict inside a group (an unknown key is an error) and lenient at the top level, so every key that is
written is one that the library writes, and `format`, `targets` and `strategy` are always explicit.

The library has no names for number formats: a type, a number of bits, a strategy and the dtype of the scales stand for
one. `_FLOATS` is that dictionary; an NVFP4 group is a "tensor_group", because the tensor has a global scale as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from quantkit import patterns
from quantkit.errors import InputError
from quantkit.formats._ct_calibrated import is_kv
from quantkit.formats._ct_layouts import LAYOUTS, is_input, layout, words
from quantkit.formats._shared import LARGEST
from quantkit.presets import PRESETS
from quantkit.types import QuantizedTensor, Scheme, Strategy, TensorScheme

QUANT_METHOD = "compressed-tensors"

# number -> bits, dtype of its scales (None: the model's)
_FLOATS: dict[str, tuple[int, str | None]] = {
    "fp8_e4m3": (8, None),
    "mxfp8_e4m3": (8, "torch.uint8"),
    "mxfp6_e2m3": (6, "torch.uint8"),
    "mxfp4": (4, "torch.uint8"),
    "nvfp4": (4, "torch.float8_e4m3fn"),
}
_STRATEGIES: dict[str, Strategy] = {
    "tensor": "tensor",
    "channel": "channel",
    "group": "group",
    "tensor_group": "group",
    "block": "block",
    "token": "token",
    "attn_head": "head",
}

# Writing -------------------------------------------------------------------------------------------------------------


def config(schemes: Mapping[str, Scheme | None], kv_cache: TensorScheme | None = None) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    schemes   every linear layer's on-disk name -> its scheme, or None when it is left dense. One scheme for all becomes
              the target "Linear"; several become a group each, with exact names. Dense layers are ignored by name.
    kv_cache  scheme of the KV cache, whose scales `pack_kv` lays out; None when it is not quantized
    Raises InputError when no layer is quantized, or a scheme is not held.
    """
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        if scheme is not None:
            by_scheme.setdefault(scheme, []).append(name)
    if not by_scheme:
        raise InputError(f"compressed-tensors: none of the {len(schemes)} layers is quantized, so there is no config")
    if kv_cache is not None and not is_kv(kv_cache):
        raise InputError(f"a KV cache of {kv_cache.number} per {kv_cache.strategy} cannot be written")
    groups = {
        f"group_{i}": {
            "format": layout(scheme).name,
            "input_activations": None if scheme.activations is None else _activation_args(scheme.activations),
            "output_activations": None,
            "targets": ["Linear"] if len(by_scheme) == 1 else sorted(names),
            "weights": args(scheme.weights),
        }
        for i, (scheme, names) in enumerate(by_scheme.items())
    }
    formats = {layout(scheme).name for scheme in by_scheme}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": [name for name, scheme in schemes.items() if scheme is None],
        "kv_cache_scheme": None if kv_cache is None else args(kv_cache),
        "quant_method": QUANT_METHOD,
        "quantization_status": "compressed",
    }


def args(scheme: TensorScheme) -> dict[str, Any]:
    """The library's QuantizationArgs of a weight or a KV cache, as it would write them."""
    strategies = {ours: theirs for theirs, ours in _STRATEGIES.items() if theirs != "tensor_group"}
    integer = scheme.number not in _FLOATS
    bits, scale_dtype = (int(scheme.number[3:]), None) if integer else _FLOATS[scheme.number]
    written: dict[str, Any] = {
        "dynamic": scheme.dynamic,
        "group_size": scheme.group_size if scheme.strategy == "group" else None,
        "num_bits": bits,
        "strategy": "tensor_group" if scheme.number == "nvfp4" else strategies[scheme.strategy],
        "symmetric": scheme.symmetric,
        "type": "int" if integer else "float",
    }
    if scheme.block_shape is not None and scheme.strategy == "block":
        written["block_structure"] = list(scheme.block_shape)
    if scale_dtype is not None:
        written["scale_dtype"] = scale_dtype
    return written


def _activation_args(scheme: TensorScheme) -> dict[str, Any]:
    """The same of a layer's input. `observer` is what the library names where something was calibrated."""
    written = args(scheme)
    if scheme.number == "nvfp4":
        written["dynamic"] = "local"  # the group scales are dynamic, the global one is not
    if written["dynamic"] is not True:
        written["observer"] = "static_minmax"
    return written


# Reading -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """One entry of `config_groups`: the layers it names, what it does with them, and in which layout they lie."""

    name: str
    targets: tuple[str, ...]
    scheme: Scheme
    format: str


@dataclass(frozen=True)
class ReadConfig:
    """What a `quantization_config` says. `unsupported` is why quantkit cannot read it, and then `groups` is empty."""

    groups: tuple[Group, ...] = ()
    ignore: tuple[str, ...] = ()
    kv_cache: TensorScheme | None = None
    unsupported: str | None = None

    def group_for(self, name: str, class_name: str = "Linear") -> Group | None:
        """The group of a layer, or None when it is dense.

        The library's order: an ignored layer has none; then the exact name, then `re:` patterns in lexicographic
        order (matched from the start of the name), then the class name.
        Raises InputError with the reason when the config is not supported.
        """
        if self.unsupported is not None:
            raise InputError(f"quantization_config cannot be read: {self.unsupported}")
        if class_name in self.ignore or any(_matches(target, name) for target in self.ignore):
            return None
        by_target = {target: group for group in self.groups for target in group.targets}
        for target in sorted(by_target, key=lambda t: (t.startswith("re:"), t)):
            if _matches(target, name):
                return by_target[target]
        return by_target.get(class_name)

    def scheme_for(self, name: str, class_name: str = "Linear") -> Scheme | None:
        """The scheme of a layer, or None when it is dense; otherwise as `group_for`."""
        group = self.group_for(name, class_name)
        return None if group is None else group.scheme

    def unpack(self, name: str, tensors: Mapping[str, torch.Tensor]) -> QuantizedTensor:
        """The codes of a layer, read from the layout that its group names. Raises InputError for a dense layer."""
        group = self.group_for(name)
        if group is None:
            raise InputError(f"{name}: is dense by the quantization_config")
        return LAYOUTS[group.format].unpack(tensors, group.scheme.weights)


def _matches(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return patterns.matches(target.removeprefix("re:"), name)
    return target == name


class _Unsupported(Exception):
    """Why a quantization_config cannot be read. Never leaves this file."""


def read_config(quantization_config: Mapping[str, Any]) -> ReadConfig:
    """Reads a `quantization_config`. Never raises for its content: what cannot be read is said in `unsupported`."""
    try:
        return _read(quantization_config)
    except _Unsupported as reason:
        return ReadConfig(unsupported=str(reason))


def _read(c: Mapping[str, Any]) -> ReadConfig:
    if c.get("quant_method", QUANT_METHOD) != QUANT_METHOD:
        raise _Unsupported(f"quant_method is {c.get('quant_method')!r}, not {QUANT_METHOD!r}")
    # Before 0.9 the library wrote "frozen" beside compressed tensors; which tensors there are, the format says.
    if c.get("quantization_status") not in ("compressed", "frozen"):
        raise _Unsupported(f"quantization_status is {c.get('quantization_status')!r}, not 'compressed'")
    for key in ("transform_config", "moe_sparsity_config"):
        if c.get(key):
            raise _Unsupported(f"{key} is set")
    sparsity = c.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise _Unsupported("sparsity_config is set")
    groups = c.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _Unsupported("config_groups names no group")
    kv_cache = None
    if c.get("kv_cache_scheme"):
        kv_cache = _read_args("kv_cache_scheme", c["kv_cache_scheme"])
        if not is_kv(kv_cache):
            raise _Unsupported(f"kv_cache_scheme is {_their_words(c['kv_cache_scheme'])}")
    ignore = _strings("ignore", c.get("ignore") or [])
    return ReadConfig(tuple(_read_group(str(n), g, c.get("format")) for n, g in groups.items()), ignore, kv_cache)


def _strings(where: str, value: Any) -> tuple[str, ...]:
    """A list of names, class names and `re:` patterns that compile."""
    if not isinstance(value, list | tuple) or not all(isinstance(x, str) for x in value):
        raise _Unsupported(f"{where} is not a list of strings")
    for pattern in (x.removeprefix("re:") for x in value if x.startswith("re:")):
        try:
            patterns.compiled(pattern)
        except patterns.PatternError as error:
            raise _Unsupported(f"{where} has the pattern {pattern!r}, which does not compile: {error}") from error
    return tuple(value)


def _read_group(name: str, group: Any, format_of_all: Any) -> Group:
    if not isinstance(group, Mapping):  # {"W4A16": ["Linear"]}: a preset's name and its targets
        preset = PRESETS.get(name.upper())
        if preset is None:
            raise _Unsupported(f"{name} is neither a scheme nor the name of a preset")
        return _held(Group(name, _strings(name, group), preset, str(format_of_all)))
    if group.get("output_activations") is not None:
        raise _Unsupported(f"{name} quantizes output activations")
    unknown = set(group) - {"format", "targets", "weights", "input_activations", "output_activations"}
    if unknown:
        raise _Unsupported(f"{name} has the unknown key {min(unknown)!r}")
    weights = _read_args(f"{name}.weights", group.get("weights"))
    activations = None
    if group.get("input_activations") is not None:
        activations = _read_args(f"{name}.input_activations", group["input_activations"])
        if not is_input(activations):
            what = _their_words(group["input_activations"])
            raise _Unsupported(f"{name} has input activations of {what}, dynamic {activations.dynamic}")
    written = str(group.get("format") or format_of_all)
    return _held(Group(name, _strings(f"{name}.targets", group.get("targets")), Scheme(weights, activations), written))


def _held(group: Group) -> Group:
    """The group itself, when its format can hold its scheme."""
    if group.format not in LAYOUTS or not LAYOUTS[group.format].holds(group.scheme):
        raise _Unsupported(f"{group.name} has {words(group.scheme)} as {group.format!r}")
    return group


# Keys of the library's arguments, and the values under which they change nothing for who reads codes and scales.
_NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "actorder": lambda v: v in (None, False, "weight", "static"),  # contiguous groups; "group" needs a g_idx
    "zp_dtype": lambda v: v in (None, "torch.int8", "torch.uint8", "torch.float8_e4m3fn"),
    "observer": lambda v: True,
    "observer_kwargs": lambda v: True,
}
_KNOWN = {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "block_structure", "scale_dtype"}


def _read_args(where: str, given: Any) -> TensorScheme:
    """One of the library's QuantizationArgs, with its defaults. What it means is checked by who asked."""
    if not isinstance(given, Mapping):
        raise _Unsupported(f"{where} is not set")
    for key in given.keys() - _KNOWN:
        if key not in _NEUTRAL or not _NEUTRAL[key](given[key]):
            raise _Unsupported(f"{where}.{key} is {given[key]!r}")
    bits, size, symmetric = given.get("num_bits", 8), given.get("group_size"), given.get("symmetric", True)
    if type(bits) is not int or not (size is None or type(size) is int) or type(symmetric) is not bool:
        raise _Unsupported(f"{where} has num_bits {bits!r}, group_size {size!r}, symmetric {symmetric!r}")
    theirs = _strategy(given)
    if theirs not in _STRATEGIES:
        raise _Unsupported(f"{where} is {_their_words(given)}")
    strategy = _STRATEGIES[theirs]
    if strategy == "group" and (size is None or not 1 <= size <= LARGEST):
        raise _Unsupported(f"{where} has strategy {theirs!r} with group_size {size!r}")
    dynamic = given.get("dynamic", False)
    if dynamic not in (True, False, None) and (dynamic, theirs) != ("local", "tensor_group"):
        raise _Unsupported(f"{where}.dynamic is {dynamic!r}")
    if theirs == "tensor_group" and dynamic is True:
        raise _Unsupported(f"{where} has a tensor_group without a global scale (dynamic is True)")
    return TensorScheme(
        _number(where, given, theirs),
        strategy,
        size if strategy == "group" else None,
        symmetric,
        bool(dynamic),
        _block(where, given) if strategy == "block" else None,
    )


def _strategy(given: Mapping[str, Any]) -> str:
    """Named, or as the library infers it."""
    size = given.get("group_size")
    return str(given.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")).lower()


def _their_words(given: Mapping[str, Any]) -> str:
    """A scheme in the library's own words, for messages: "float8 per channel"."""
    return f"{given.get('type', 'int')}{given.get('num_bits', 8)} per {_strategy(given)}"


def _number(where: str, given: Mapping[str, Any], strategy: str) -> str:
    """Name of the number format that type, bits, groups and the dtype of the scales stand for."""
    kind, bits, scales = str(given.get("type", "int")).lower(), given.get("num_bits", 8), given.get("scale_dtype")
    ordinary = scales in (None, "torch.bfloat16", "torch.float16", "torch.float32")
    number = ""
    if kind == "int" and 2 <= bits <= 8 and ordinary:
        number = f"int{bits}"
    elif kind == "float" and strategy == "tensor_group" and bits == 4 and scales in (None, "torch.float8_e4m3fn"):
        number = "nvfp4"
    elif kind == "float" and given.get("group_size") == 32 and bits in (4, 6) and scales in (None, "torch.uint8"):
        number = {4: "mxfp4", 6: "mxfp6_e2m3"}[bits]
    elif kind == "float" and bits == 8:
        number = "mxfp8_e4m3" if scales == "torch.uint8" else "fp8_e4m3" if ordinary else ""
    if not number:
        raise _Unsupported(f"{where} is {_their_words(given)}, scale_dtype {scales!r}")
    return number


def _block(where: str, given: Mapping[str, Any]) -> tuple[int, int]:
    """[128, 128], or "128x128" as older versions have it."""
    value = given.get("block_structure")
    if isinstance(value, str) and re.fullmatch(r"\d{1,6}x\d{1,6}", value):
        value = [int(x) for x in value.split("x")]
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or any(type(x) is not int or not 1 <= x <= LARGEST for x in value)
    ):
        raise _Unsupported(f"{where}.block_structure is {value!r}")
    return cast(tuple[int, int], tuple(value))
