"""What the formats with one scheme for the whole checkpoint share: checks of tensors, names that stay dense, configs.

Their configs say one scheme, and perhaps which modules stay dense; which layers are packed is said by the tensors that
are there. Each format's `MARKER` is the name of a tensor that packed layers have, and dense ones lack.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from quantkit import patterns
from quantkit.checkpoint import NAMES
from quantkit.errors import InputError
from quantkit.types import QParams, QuantizedTensor, Scheme, TensorScheme, TensorSpec

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LARGEST = (1 << 31) - 1  # of what configs count
FLOAT = "float"  # as the dtype of a TensorSpec: any of FLOATS


class Unsupported(Exception):
    """Why a quantization_config cannot be held. Never leaves `read_config`."""


@dataclass(frozen=True)
class Override:
    """Layers whose name matches a pattern (from its start) have another scheme, or None: they are dense."""

    pattern: str
    scheme: Scheme | None


@dataclass(frozen=True)
class ReadConfig:
    """What a `quantization_config` says. `unsupported` is why it cannot be held, and then the rest is empty.

    scheme     of every packed layer that no override names; None: only the overrides' layers are packed
    ignore     modules that stay dense: whole names, their first or last parts, `*` for anything
    reads      turns the tensors of a layer and its scheme into codes
    kv_cache   scheme of the KV cache, where the config names one
    """

    scheme: Scheme | None = None
    ignore: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    reads: Callable[[Mapping[str, torch.Tensor], Scheme], QuantizedTensor] | None = None
    kv_cache: TensorScheme | None = None
    unsupported: str | None = None

    def scheme_for(self, name: str, class_name: str = "Linear") -> Scheme | None:
        """The scheme of a layer, or None when it is dense. Raises InputError when the config is not supported.

        Engines differ in how they match `ignore` (substrings, prefixes, globs): where the tensors on disk disagree with
        this, the tensors are right.
        """
        if self.unsupported is not None:
            raise InputError(f"quantization_config cannot be held: {self.unsupported}")
        if excluded(name, self.ignore):
            return None
        for override in self.overrides:
            if patterns.matches(override.pattern, name):
                return override.scheme
        return self.scheme

    def unpack(self, name: str, tensors: Mapping[str, torch.Tensor]) -> QuantizedTensor:
        """The codes of a layer, read the way that this config asks for. Raises InputError when the layer is dense."""
        scheme = self.scheme_for(name)
        if scheme is None or self.reads is None:
            raise InputError(f"{name}: is dense by the quantization_config")
        return self.reads(tensors, scheme)


def reading(method: str, read: Callable[[Mapping[str, Any]], ReadConfig], config: Mapping[str, Any]) -> ReadConfig:
    """Calls `read`, which may raise Unsupported, for a config of the right `quant_method`. Never raises for content."""
    try:
        if config.get("quant_method") != method:
            raise Unsupported(f"quant_method is {config.get('quant_method')!r}, not {method!r}")
        return read(config)
    except Unsupported as reason:
        return ReadConfig(unsupported=str(reason))


def strings(where: str, value: Any) -> tuple[str, ...]:
    """A list of strings, or None for none."""
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(x, str) for x in value):
        raise Unsupported(f"{where} is not a list of strings")
    return tuple(value)


def integer(config: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    """The first of several spellings of an integer key."""
    for key in keys:
        if config.get(key) is not None:
            value = config[key]
            if type(value) is not int or abs(value) > LARGEST:
                raise Unsupported(f"{key} is {value!r}, not an integer of 32 bits")
            return value
    if default is None:
        raise Unsupported(f"{keys[0]} is missing")
    return default


def excluded(name: str, ignore: tuple[str, ...]) -> bool:
    """Whether a pattern is a run of whole parts of a dotted name: "mlp.gate" is none of "mlp.gate_proj"."""
    for pattern in ignore:
        # ".*" is a glob's "." and "*", or a regular expression's "anything": either way the dot may be missing
        body = re.escape(pattern).replace(r"\.\*", r"(?:\..*)?").replace(r"\*", ".*")
        if patterns.matches(rf"(?:^|\.)(?:{body})(?:\.|$)", name, anywhere=True):
            return True
    return False


def one_scheme(form: str, schemes: Mapping[str, Scheme | None], reason: str) -> Scheme:
    """The scheme of all quantized layers. Raises InputError, with the reason, when there are several, or none."""
    found = {scheme: name for name, scheme in schemes.items() if scheme is not None}
    if not found:
        raise InputError(f"{form}: none of the {len(schemes)} layers is quantized, so there is no config")
    if len(found) > 1:
        (a, first), (b, second) = list(found.items())[:2]
        raise InputError(f"{form}: {first} has {a.weights}, {second} has {b.weights}: {reason}; use compressed-tensors")
    return next(iter(found))


def dense(form: str, schemes: Mapping[str, Scheme | None]) -> list[str]:
    """Names of the layers that stay dense, sorted.

    Raises InputError for one that is a part of a quantized layer's name: vLLM and SGLang look for substrings, and would
    take that layer for dense as well.
    """
    names = sorted(name for name, scheme in schemes.items() if scheme is None)
    for name in names:
        inside = next((other for other, scheme in schemes.items() if scheme is not None and name in other), None)
        if inside is not None:
            raise InputError(
                f"{form}: {name} stays dense, and its name is a part of {inside}, which is quantized; vLLM and SGLang "
                "look for substrings and would take both for dense; quantize both or neither, or use compressed-tensors"
            )
    return names


def check(form: str, tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec]) -> None:
    """Raises InputError for a tensor that is missing, or of another dtype or shape. (1,) and () are one shape here."""
    for name, spec in specs.items():
        if name not in tensors:
            raise InputError(f"{form}: {name} is missing")
        t = tensors[name]
        right = t.dtype in FLOATS if spec.dtype == FLOAT else NAMES.get(t.dtype) == spec.dtype
        shape = () if spec.shape in ((), (1,)) and tuple(t.shape) in ((), (1,)) else tuple(t.shape)
        if not right or shape != (() if spec.shape == (1,) else spec.shape):
            raise InputError(f"{form}: {name} is {t.dtype} {tuple(t.shape)}; {spec.dtype} {spec.shape} is needed")


def fits(form: str, what: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`value` as `dtype`. Raises InputError when that changes a number: the codes were rounded under the exact ones."""
    stored = value.to(dtype)
    wrong = ~((stored.float() == value.float()) & torch.isfinite(value.float()))
    if bool(wrong.any()):
        bad = value.float()[wrong].abs()
        raise InputError(
            f"{form}: {len(bad)} of {value.numel()} {what} change as {NAMES[dtype]}, from {float(bad.min()):.3g} "
            f"to {float(bad.max()):.3g}; codes were rounded under the exact ones, so quantize with scales of that dtype"
        )
    return stored


def scalar(form: str, name: str, t: torch.Tensor) -> torch.Tensor:
    """One positive finite number, 0-d or (1,), as float32 (1,). Raises InputError for anything else."""
    value = t.float().reshape(-1)
    if value.numel() != 1 or not bool(torch.isfinite(value) & (value > 0)):
        raise InputError(f"{form}: {name} is one positive number, not {value[:4].tolist()} of shape {tuple(t.shape)}")
    return value


def by_column(
    q: QuantizedTensor, *, group_K: torch.Tensor | None = None, factor_K: torch.Tensor | None = None
) -> QuantizedTensor:
    """The same weight with a scale for each column: what groups that are not runs of columns, or a factor, come to.

    group_K   (K,) the group of each column (GPTQ's g_idx); None: runs of K / G columns
    factor_K  (K,) multiplies each column of the decoded weight (ModelOpt's pre_quant_scale)
    Returns `q` with a scale (N, K) and group_size 1, which says that formats with wider groups cannot hold it.
    """
    scale, zero = q.qparams.scale_NG, q.qparams.zero_NG
    if group_K is None:
        group_K = torch.arange(q.shape[1], device=scale.device) // (q.shape[1] // scale.shape[1])
    group_K = group_K.long()
    scale = scale[:, group_K]
    if factor_K is not None:
        scale = scale.float() * factor_K.float()
    qparams = QParams(scale.contiguous(), None if zero is None else zero[:, group_K].contiguous())
    return QuantizedTensor(q.codes_NK, qparams, replace(q.scheme, strategy="group", group_size=1))


def offset_binary(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed int8 codes as uint8, 2^(bits-1) added. One outside the range wraps to 2^bits or more, never into it."""
    if codes.dtype != torch.int8:
        raise InputError(f"int{bits}: codes are {codes.dtype}, not int8")
    return codes.view(torch.uint8) + (1 << (bits - 1))


def from_offset_binary(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `offset_binary`: uint8 wraps, so adding 256 - offset and reading it as signed subtracts."""
    return (codes + (256 - (1 << (bits - 1)))).view(torch.int8)


def pack_pairs(form: str, codes: torch.Tensor) -> torch.Tensor:
    """Codes 0..15, two a byte, the even one in the low nibble: uint8 (..., n) -> (..., n / 2).

    Raises InputError for a code outside the range: it would spill into its neighbour.
    """
    if codes.dtype != torch.uint8 or (codes.numel() and int(codes.max()) > 15):
        raise InputError(f"{form}: codes are {codes.dtype} up to {codes.max().item()}; uint8 0 to 15 is needed")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_pairs(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_pairs`: uint8 (..., n / 2) -> (..., n)."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
