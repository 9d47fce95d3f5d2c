"""Scales in compressed-tensors that come from calibration, not from weights: those of inputs and of the KV cache.

beside a weight      input_scale         (1,) in the model's dtype, for static activations        x = code * scale
                     input_zero_point    int8 (1,), when they are asymmetric
                     input_global_scale  float32 (1,), for NVFP4: 448 * 6 / amax(X); its group scales are dynamic
below an attention   k_scale, v_scale    in the model's dtype: (1,), or one a head of keys and values (heads, 1, 1)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from quantkit.errors import InputError
from quantkit.formats._ct_layouts import TORCH_DTYPES, checked
from quantkit.types import QParams, TensorScheme, TensorSpec


def input_specs(activations: TensorScheme | None, dtype: str) -> dict[str, TensorSpec]:
    """The calibrated scales of a layer's input: name -> dtype and shape. Empty when there are none."""
    if activations is None or (activations.dynamic and activations.number != "nvfp4"):
        return {}
    if activations.number == "nvfp4":
        return {"input_global_scale": TensorSpec("F32", (1,))}
    specs = {"input_scale": TensorSpec(dtype, (1,))}
    if not activations.symmetric:
        specs["input_zero_point"] = TensorSpec("I8", (1,))
    return specs


def pack_input(activations: TensorScheme | None, inputs: QParams | None) -> dict[str, torch.Tensor]:
    """The tensors of `input_specs`, from scale (1, 1) and zero (1, 1), or from the global scale (1,) alone for NVFP4.

    Raises InputError when a scale that the scheme needs is not given.
    """
    specs = input_specs(activations, "float")
    if activations is None or not specs:
        return {}
    if inputs is None:
        raise InputError(f"{activations.number} activations per {activations.strategy} need a calibrated input scale")
    given = {
        "input_scale": inputs.scale_NG,
        "input_zero_point": inputs.zero_NG,
        "input_global_scale": inputs.global_scale,
    }
    tensors = {}
    for name, spec in specs.items():
        t = given[name]
        if t is None or t.numel() != 1:
            raise InputError(f"{name}: one number is needed, got {'none' if t is None else tuple(t.shape)}")
        tensors[name] = t.to(TORCH_DTYPES.get(spec.dtype, t.dtype)).reshape(1)
    return tensors


def unpack_input(tensors: Mapping[str, torch.Tensor], activations: TensorScheme | None) -> QParams | None:
    """The calibrated scales of a layer's input; None when there are none.

    NVFP4 has a global scale, and a `scale_NG` of shape (1, 0): the others are found at run time.
    Raises InputError for a missing tensor, or one of another dtype or shape.
    """
    specs = input_specs(activations, "float")
    if activations is None or not specs:
        return None
    found = checked("input", tensors, specs, f"{activations.number} activations per {activations.strategy}")
    if "input_global_scale" in found:
        return QParams(torch.empty(1, 0), None, found["input_global_scale"])
    zero = found.get("input_zero_point")
    return QParams(found["input_scale"].reshape(1, 1), None if zero is None else zero.reshape(1, 1))


# Where readers look for the scale of keys, below an attention layer; values likewise. The first is what is written.
_KV_NAMES = ("{0}_scale", "{0}_proj.{0}_scale", "{0}_proj.output_scale")


def is_kv(scheme: TensorScheme) -> bool:
    """Whether engines read a KV cache of this scheme: FP8 E4M3, static, one scale or one a head."""
    return (scheme.number, scheme.symmetric, scheme.dynamic) == ("fp8_e4m3", True, False) and scheme.strategy in (
        "tensor",
        "head",
    )


def kv_tensors(scheme: TensorScheme, heads: int, dtype: str) -> dict[str, TensorSpec]:
    """The scales of a KV cache, by name after their attention layer's: "k_scale" and "v_scale".

    heads  heads of keys and values (num_key_value_heads)
    Raises InputError for a scheme that engines do not read.
    """
    if not is_kv(scheme):
        raise InputError(f"a KV cache of {scheme.number} per {scheme.strategy} cannot be written; use static fp8_e4m3")
    shape = (1,) if scheme.strategy == "tensor" else (heads, 1, 1)
    return {f"{side}_scale": TensorSpec(dtype, shape) for side in "kv"}


def pack_kv(k_scale: torch.Tensor, v_scale: torch.Tensor, scheme: TensorScheme) -> dict[str, torch.Tensor]:
    """The tensors of `kv_tensors`, from one scale or one a head, in any shape; key = code * scale."""
    given = {"k_scale": k_scale, "v_scale": v_scale}
    specs = kv_tensors(scheme, k_scale.numel(), "float")
    for name, t in given.items():
        if t.numel() != k_scale.numel() or (scheme.strategy == "tensor" and t.numel() != 1):
            raise InputError(f"{name}: {t.numel()} scales for a KV cache per {scheme.strategy}")
    return {name: t.reshape(specs[name].shape).contiguous() for name, t in given.items()}


def unpack_kv(tensors: Mapping[str, torch.Tensor], scheme: TensorScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales of keys and values, (1,) or (heads, 1, 1); the inverse of `pack_kv`.

    tensors  name after the attention layer's own -> tensor; k_proj.output_scale and k_proj.k_scale are read as well
    Raises InputError for a missing tensor, or one of another dtype or shape.
    """
    found = []
    for side in "kv":
        name = next((n.format(side) for n in _KV_NAMES if n.format(side) in tensors), f"{side}_scale")
        heads = tensors[name].numel() if name in tensors else 1
        spec = kv_tensors(scheme, heads, "float")[f"{side}_scale"]
        found.append(checked("KV cache", tensors, {name: spec}, f"fp8_e4m3 per {scheme.strategy}")[name])
    return found[0], found[1]
