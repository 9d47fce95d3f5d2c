"""Rules about the tensors of a layer: which there are, of which dtypes and shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantkit import formats
from quantkit.errors import InputError
from quantkit.formats import compressed_tensors as ct
from quantkit.lint.described import Described, Layer, Problem, gather, many
from quantkit.types import TensorSpec
from quantkit_kernels.bits import unpack_bits

_CT = "compressed-tensors"
_FLOATS = ("F32", "F16", "BF16")
_SCALARS = ("weight_scale", "input_scale", "weight_global_scale", "input_global_scale", "k_scale", "v_scale")


def scale_shapes(d: Described) -> Iterator[Problem]:
    """transformers, core_model_loading.py: experts' scales that are 0-d cannot be stacked; (1,) can."""
    if d.format != _CT:
        return
    flat = [n for n, spec in d.specs.items() if spec.shape == () and n.rpartition(".")[2] in _SCALARS]
    if experts := [n for n in flat if ".experts." in n]:
        yield Problem("error", many(experts), "is 0-d, and an expert's: it cannot be stacked", "write it as (1,)")
    if plain := [n for n in flat if ".experts." not in n]:
        yield Problem("warning", many(plain), "is 0-d; compressed-tensors writes (1,)", "write it as (1,)")


def weight_shape(d: Described) -> Iterator[Problem]:
    """vLLM, compressed_tensors_wNa16.py: weight_shape, int64 (2,), is a parameter that must be loaded."""
    lacking = [
        x.name
        for x in d.layers.values()
        if d.format == _CT
        and x.tensors.get("weight_packed", TensorSpec("", ())).dtype == "I32"
        and x.tensors.get("weight_shape") != TensorSpec("I64", (2,))
    ]
    if lacking:
        yield Problem("error", many(lacking), "has no weight_shape, int64 (2,)", "write [out_features, in_features]")


def zero_points(d: Described) -> Iterator[Problem]:
    """vLLM, compressed_tensors_wNa16.py: a symmetric scheme has no parameter for zero points; loading them fails."""
    stray = [
        f"{x.name}.{name}"
        for x in d.quantized
        if d.format == _CT and x.scheme
        for name, scheme in (("weight_zero_point", x.scheme.weights), ("input_zero_point", x.scheme.activations))
        if name in x.tensors and (scheme is None or scheme.symmetric)
    ]
    if stray:
        yield Problem("error", many(stray), "is there, but the scheme is symmetric", "remove it")


def layer_tensors(d: Described) -> Iterator[Problem]:
    """The tensors of a scheme, their dtypes and shapes, as the format has them. Source: quantkit.formats."""
    found = []
    for x in d.quantized:
        try:
            wanted = _wanted(d, x)
        except InputError:  # a shape that the format is not written for: the rules about groups and blocks
            continue
        for name, spec in wanted.items():
            have = x.tensors.get(name)
            if name == "weight_shape":
                continue
            if have is None:
                found.append((x, f"{name} is missing"))
            elif not _alike(have, spec):
                found.append((x, f"{name} is {have.dtype} {have.shape}, expected {spec.dtype} {spec.shape}"))
    for where, what in gather(found):
        yield Problem("error", where, what, "write the layer again")


def _wanted(d: Described, layer: Layer) -> dict[str, TensorSpec]:
    assert layer.scheme is not None
    if layer.shape is None:
        return {}
    if d.format != _CT:
        wanted = formats.get(d.format).tensors(layer.shape, layer.scheme, "BF16")
        return {name: spec for name, spec in wanted.items() if name != "pre_quant_scale"}
    inputs = {n: s for n, s in ct.tensors(layer.shape, layer.scheme, "BF16").items() if n.startswith("input_")}
    return {**ct.LAYOUTS[layer.layout].tensors(layer.shape, layer.scheme.weights, "BF16"), **inputs}


def _alike(have: TensorSpec, wanted: TensorSpec) -> bool:
    scalar = {(), (1,)}  # which of the two is a rule of its own
    shapes = have.shape == wanted.shape or {have.shape, wanted.shape} <= scalar
    return shapes and (have.dtype == wanted.dtype or {have.dtype, wanted.dtype} <= set(_FLOATS))


def w4afp8_packed(d: Described) -> Iterator[Problem]:
    """vLLM, compressed_tensors.py: W4A8Fp8 wants pack-quantized; the library's own choice for it is int-quantized."""
    wrong = [
        x.name
        for x in d.quantized
        if x.layout == "int-quantized"
        and x.scheme
        and x.scheme.activations
        and x.scheme.activations.number == "fp8_e4m3"
    ]
    if wrong:
        yield Problem(
            "error",
            many(wrong),
            "is int-quantized, with fp8 activations: no kernel takes it",
            "write it pack-quantized",
        )


def gptq_zero_points(d: Described) -> Iterator[Problem]:
    """GPTQModel, AutoGPTQ: v1 stores z - 1, so 0 becomes the largest code, which some carry into the next."""
    version = str(d.quantization.get("checkpoint_format") or d.quantization.get("format") or "gptq")
    if d.format != "gptq" or version != "gptq" or d.unread is not None or d.quantization.get("sym", True):
        return
    wrapped = [
        name.removesuffix(".qzeros")
        for name, words in d.values.items()
        if name.endswith(".qzeros") and _wraps(words, int(d.quantization.get("bits", 4)))
    ]
    if wrapped:
        yield Problem(
            "error",
            many(wrapped),
            "has zero points of 0, which checkpoint_format gptq (v1) cannot say",
            "save as gptq_v2",
        )
    else:
        yield Problem(
            "warning", "checkpoint_format", "is gptq (v1) for asymmetric weights; readers differ", "save as gptq_v2"
        )


def _wraps(words: torch.Tensor, bits: int) -> bool:
    return bool((unpack_bits(words, bits, words.shape[1] * 32 // bits) == (1 << bits) - 1).any())
