"""compressed-tensors: the format that vLLM, SGLang, TensorRT-LLM and transformers all read.

`quantization_config` in config.json names groups of layers, each with a scheme and one of the library's formats; the
tensors of a layer depend on that format. `LAYOUTS` lists the formats that are held here; the first that holds a scheme
is the one that is written.

    pack-quantized   integers of 2 to 8 bits, activations in their own dtype
        weight_packed      int32 (N, ceil(K b / 32)), codes + 2^(b-1) as a little-endian bit stream along the row
        weight_scale       (N, G), (N, 1) or (1,) in the model's dtype
        weight_zero_point  int32 (ceil(N b / 32), G): the same packing along N; int8 (1,), not packed, beside a scale
                           (1,); absent when symmetric
        weight_shape       int64 (2,) = [N, K], because the last word of a row is padded

Readers are strict inside a group (an unknown key is an error) and lenient at the top level, so every key that is
written is one that the library writes, and `format`, `targets` and `strategy` are always explicit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantkit import numerics
from quantkit.errors import InputError
from quantkit.types import QParams, QuantizedTensor, Scheme, TensorScheme, TensorSpec
from quantkit_kernels.bits import pack_bits, packed_width, unpack_bits

QUANT_METHOD = "compressed-tensors"


@dataclass(frozen=True)
class Layout:
    """One of the library's formats: which schemes it holds, and how their tensors lie."""

    name: str
    holds: Callable[[Scheme], bool]
    tensors: Callable[[tuple[int, int], TensorScheme, str], dict[str, TensorSpec]]
    pack: Callable[[QuantizedTensor], dict[str, torch.Tensor]]
    unpack: Callable[[Mapping[str, torch.Tensor], TensorScheme], QuantizedTensor]


def layout(scheme: Scheme) -> Layout:
    """The layout in which a scheme is written. Raises InputError when none holds it."""
    for candidate in LAYOUTS:
        if candidate.holds(scheme):
            return candidate
    w, a = scheme.weights, scheme.activations
    what = f"{w.number} weights per {w.strategy}" + (f" with {a.number} activations" if a else "")
    raise InputError(f"compressed-tensors: {what} cannot be written; held: {', '.join(x.name for x in LAYOUTS)}")


def tensors(shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
    """Every tensor that a linear layer (N, K) has on disk, bias apart: name after the layer's own -> dtype and shape.

    dtype  safetensors name of the model's dtype, which the scales have: "BF16"
    Raises InputError for a scheme that is not held, or a group size that does not divide K.
    """
    return layout(scheme).tensors(shape, scheme.weights, dtype)


def pack(q: QuantizedTensor, activations: TensorScheme | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a quantized weight, contiguous, as `tensors` lists them.

    activations  the scheme of the layer's input: it takes part in the choice of the layout
    Raises InputError for a scheme that is not held, or a code outside its range.
    """
    return layout(Scheme(q.scheme, activations)).pack(q)


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor:
    """The codes, scales and zero points of a layer; the inverse of `pack`.

    tensors  name after the layer's own -> tensor; other names are left alone
    Raises InputError for a missing tensor, or one of another dtype or shape than the scheme needs.
    """
    return layout(scheme).unpack(tensors, scheme.weights)


# pack-quantized ------------------------------------------------------------------------------------------------------


def _bits(scheme: TensorScheme) -> int:
    return int(scheme.number.removeprefix("int"))


def _holds_packed(scheme: Scheme) -> bool:
    w = scheme.weights
    return (
        scheme.activations is None
        and w.number in {f"int{b}" for b in range(2, 9)}
        and w.strategy in ("tensor", "channel", "group")
    )


def _tensors_packed(shape: tuple[int, int], scheme: TensorScheme, dtype: str) -> dict[str, TensorSpec]:
    n, k = shape
    bits, groups = _bits(scheme), numerics.groups(scheme, k)
    whole = scheme.strategy == "tensor"
    specs = {
        "weight_packed": TensorSpec("I32", (n, packed_width(k, bits))),
        "weight_scale": TensorSpec(dtype, (1,) if whole else (n, groups)),
    }
    if not scheme.symmetric:
        packed = TensorSpec("I32", (packed_width(n, bits), groups))
        specs["weight_zero_point"] = TensorSpec("I8", (1,)) if whole else packed
    specs["weight_shape"] = TensorSpec("I64", (2,))
    return specs


def _pack_packed(q: QuantizedTensor) -> dict[str, torch.Tensor]:
    bits, whole = _bits(q.scheme), q.scheme.strategy == "tensor"
    zero = q.qparams.zero_NG
    if (zero is None) != q.scheme.symmetric:
        raise InputError(
            f"{q.scheme.number}: zero points are {'absent' if zero is None else 'given'}, scheme says else"
        )
    scale = q.qparams.scale_NG
    packed = {"weight_packed": _pack(q.codes_NK, bits), "weight_scale": (scale.reshape(1) if whole else scale)}
    if zero is not None:
        packed["weight_zero_point"] = zero.to(torch.int8).reshape(1) if whole else _pack(zero.t(), bits).t()
    packed["weight_shape"] = torch.tensor(q.shape, dtype=torch.int64)
    return {name: t.contiguous() for name, t in packed.items()}


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes (R, n) -> words (R, ceil(n b / 32)): offset binary, not two's complement."""
    try:
        return pack_bits(codes.to(torch.int16) + (1 << (bits - 1)), bits)
    except ValueError as error:
        raise InputError(f"int{bits}: with the offset {1 << (bits - 1)}, {error}") from error


def _unpack(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    # uint8 wraps, so adding 256 - offset and reading the byte as signed subtracts the offset, for 8 bits too
    return (unpack_bits(words, bits, n) + (256 - (1 << (bits - 1)))).view(torch.int8)


def _unpack_packed(tensors: Mapping[str, torch.Tensor], scheme: TensorScheme) -> QuantizedTensor:
    if "weight_shape" not in tensors or tuple(tensors["weight_shape"].shape) != (2,):
        raise InputError("pack-quantized: weight_shape, the two numbers [N, K], is missing, so K is not known")
    n, k = (int(x) for x in tensors["weight_shape"])
    for name, spec in _tensors_packed((n, k), scheme, "float").items():
        if name not in tensors:
            raise InputError(f"pack-quantized: {name} is missing; {scheme.number} per {scheme.strategy} needs it")
        t = tensors[name]
        right = t.is_floating_point() if spec.dtype == "float" else t.dtype == TORCH_DTYPES[spec.dtype]
        if not right or tuple(t.shape) != spec.shape:
            raise InputError(
                f"pack-quantized: {name} is {t.dtype} {tuple(t.shape)}; a weight ({n}, {k}) of {scheme.number} "
                f"per {scheme.strategy} needs {spec.dtype} {spec.shape}"
            )
    bits, whole = _bits(scheme), scheme.strategy == "tensor"
    scale, zero = tensors["weight_scale"], tensors.get("weight_zero_point")
    if scheme.symmetric:
        zero = None
    if zero is not None:
        zero = zero.reshape(1, 1) if whole else _unpack(zero.t(), bits, n).t().contiguous()
    qparams = QParams(scale.reshape(1, 1) if whole else scale, zero)
    return QuantizedTensor(_unpack(tensors["weight_packed"], bits, k), qparams, scheme)


TORCH_DTYPES = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64}

LAYOUTS = (Layout("pack-quantized", _holds_packed, _tensors_packed, _pack_packed, _unpack_packed),)


# quantization_config -------------------------------------------------------------------------------------------------


def config(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    schemes  every linear layer's on-disk name -> its scheme, or None when it is left dense. One scheme for all becomes
             the target "Linear"; several become a group each, with exact names. Dense layers are ignored by name.
    Raises InputError when no layer is quantized, or a scheme is not held.
    """
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        if scheme is not None:
            by_scheme.setdefault(scheme, []).append(name)
    if not by_scheme:
        raise InputError(f"compressed-tensors: none of the {len(schemes)} layers is quantized, so there is no config")
    groups = {
        f"group_{i}": {
            "format": layout(scheme).name,
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"] if len(by_scheme) == 1 else sorted(names),
            "weights": _args(scheme.weights),
        }
        for i, (scheme, names) in enumerate(by_scheme.items())
    }
    formats = {layout(scheme).name for scheme in by_scheme}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": [name for name, scheme in schemes.items() if scheme is None],
        "kv_cache_scheme": None,
        "quant_method": QUANT_METHOD,
        "quantization_status": "compressed",
    }


def _args(scheme: TensorScheme) -> dict[str, Any]:
    return {
        "dynamic": False,
        "group_size": scheme.group_size if scheme.strategy == "group" else None,
        "num_bits": _bits(scheme),
        "strategy": scheme.strategy,
        "symmetric": scheme.symmetric,
        "type": "int",
    }


@dataclass(frozen=True)
class Group:
    """One entry of `config_groups`: the layers it names, and what it does with them."""

    targets: tuple[str, ...]
    scheme: Scheme


@dataclass(frozen=True)
class ReadConfig:
    """What a `quantization_config` says. `unsupported` is why quantkit cannot hold it, and then `groups` is empty."""

    groups: tuple[Group, ...] = ()
    ignore: tuple[str, ...] = ()
    unsupported: str | None = None

    def scheme_for(self, name: str, class_name: str = "Linear") -> Scheme | None:
        """The scheme of a layer, or None when it is dense.

        The library's order: an ignored layer has none; then the exact name, then `re:` patterns in lexicographic
        order (matched from the start of the name), then the class name.
        Raises InputError with the reason when the config is not supported.
        """
        if self.unsupported is not None:
            raise InputError(f"quantization_config cannot be held: {self.unsupported}")
        if class_name in self.ignore or any(_matches(target, name) for target in self.ignore):
            return None
        by_target = {target: group.scheme for group in self.groups for target in group.targets}
        for target in sorted(by_target, key=lambda t: (t.startswith("re:"), t)):
            if _matches(target, name):
                return by_target[target]
        return by_target.get(class_name)


def _matches(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


class _Unsupported(Exception):
    """Why a quantization_config cannot be held. Never leaves this file."""


def read_config(quantization_config: Mapping[str, Any]) -> ReadConfig:
    """Reads a `quantization_config`. Never raises for its content: what cannot be held is said in `unsupported`."""
    try:
        return _read(quantization_config)
    except _Unsupported as reason:
        return ReadConfig(unsupported=str(reason))


def _read(c: Mapping[str, Any]) -> ReadConfig:
    if c.get("quant_method") != QUANT_METHOD:
        raise _Unsupported(f"quant_method is {c.get('quant_method')!r}, not {QUANT_METHOD!r}")
    if c.get("quantization_status") != "compressed":
        raise _Unsupported(f"quantization_status is {c.get('quantization_status')!r}, not 'compressed'")
    for key in ("kv_cache_scheme", "transform_config", "moe_sparsity_config"):
        if c.get(key):
            raise _Unsupported(f"{key} is set")
    if (c.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _Unsupported("sparsity_config is set")
    groups = c.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _Unsupported("config_groups names no group")
    ignore = _strings("ignore", c.get("ignore") or [])
    return ReadConfig(tuple(_read_group(name, group, c.get("format")) for name, group in groups.items()), ignore)


def _strings(where: str, value: Any) -> tuple[str, ...]:
    """A list of names, class names and `re:` patterns that compile."""
    if not isinstance(value, list | tuple) or not all(isinstance(x, str) for x in value):
        raise _Unsupported(f"{where} is not a list of strings")
    for pattern in (x.removeprefix("re:") for x in value if x.startswith("re:")):
        try:
            re.compile(pattern)
        except re.error as error:
            raise _Unsupported(f"{where} has the pattern {pattern!r}, which does not compile: {error}") from error
    return tuple(value)


def _read_group(name: str, group: Any, format_of_all: Any) -> Group:
    if not isinstance(group, Mapping):
        raise _Unsupported(f"{name} is a preset's name, not a scheme")
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            raise _Unsupported(f"{name} quantizes {key.replace('_', ' ')}")
    unknown = set(group) - {"format", "targets", "weights", "input_activations", "output_activations"}
    if unknown:
        raise _Unsupported(f"{name} has the unknown key {min(unknown)!r}")
    scheme = Scheme(_read_args(f"{name}.weights", group.get("weights")))
    written = group.get("format") or format_of_all
    for candidate in LAYOUTS:
        if candidate.name == written and candidate.holds(scheme):
            return Group(_strings(f"{name}.targets", group.get("targets")), scheme)
    raise _Unsupported(f"{name} has {scheme.weights.number} weights per {scheme.weights.strategy} as {written!r}")


# Keys of the library's arguments, and the values under which they change nothing for a reader of packed integers.
_NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "dynamic": lambda v: not v,
    "actorder": lambda v: v in (None, False, "weight", "static"),  # contiguous groups; "group" needs a g_idx
    "block_structure": lambda v: v is None,
    "scale_dtype": lambda v: v in (None, "torch.bfloat16", "torch.float16", "torch.float32"),
    "zp_dtype": lambda v: v in (None, "torch.int8"),
    "observer": lambda v: True,
    "observer_kwargs": lambda v: True,
}


def _read_args(where: str, args: Any) -> TensorScheme:
    if not isinstance(args, Mapping):
        raise _Unsupported(f"{where} is not set")
    for key in args.keys() - {"num_bits", "type", "symmetric", "strategy", "group_size"}:
        if key not in _NEUTRAL or not _NEUTRAL[key](args[key]):
            raise _Unsupported(f"{where}.{key} is {args[key]!r}")
    bits, kind = args.get("num_bits", 8), args.get("type", "int")
    size, symmetric = args.get("group_size"), args.get("symmetric", True)
    if type(bits) is not int or not (size is None or type(size) is int) or type(symmetric) is not bool:
        raise _Unsupported(f"{where} has num_bits {bits!r}, group_size {size!r}, symmetric {symmetric!r}")
    strategy: Any = args.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if kind != "int" or not 2 <= bits <= 8 or strategy not in ("tensor", "channel", "group"):
        raise _Unsupported(f"{where} is {kind}{bits} per {strategy}")
    if strategy == "group" and (size is None or size < 1):
        raise _Unsupported(f"{where} has strategy 'group' with group_size {size!r}")
    return TensorScheme(f"int{bits}", strategy, size if strategy == "group" else None, symmetric)
