"""Scheme presets: one row a name, spelt and defined as compressed-tensors and llm-compressor have them.

W4A16 reads: weights of 4 bits, activations of 16, which is to say left in the model's dtype. W4A8 adds activations of
8 bits that the engine scales itself, token by token. Integers have groups of 128 columns, or a scale a row.

Two presets need calibration data for the scales of their inputs, whatever the method: FP8 (one an input) and NVFP4
(a global one; those of groups are found at run time). FP8_DYNAMIC, FP8_BLOCK and the MX formats need none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from quantkit.types import Scheme, TensorScheme

GroupSize = Literal[32, 64, 128, "channel"]
UNQUANTIZED = "UNQUANTIZED"  # the library's name for no scheme at all

INT8_TOKEN = TensorScheme("int8", "token", dynamic=True)
INT4_TOKEN = TensorScheme("int4", "token", dynamic=True)
FP8_TOKEN = TensorScheme("fp8_e4m3", "token", dynamic=True)
FP8_GROUP = TensorScheme("fp8_e4m3", "group", 128, dynamic=True)
FP8_TENSOR = TensorScheme("fp8_e4m3", "tensor")
NVFP4_WEIGHT = TensorScheme("nvfp4", "group", 16)
MXFP4_WEIGHT = TensorScheme("mxfp4", "group", 32)
MXFP6_WEIGHT = TensorScheme("mxfp6_e2m3", "group", 32)
MXFP8_WEIGHT = TensorScheme("mxfp8_e4m3", "group", 32)
MXFP8_GROUP = replace(MXFP8_WEIGHT, dynamic=True)


def _int(bits: int) -> TensorScheme:
    return TensorScheme(f"int{bits}", "group", 128)


W8A8 = Scheme(TensorScheme("int8", "channel"), INT8_TOKEN)

PRESETS: dict[str, Scheme] = {
    **{f"W{b}A16": Scheme(_int(b)) for b in range(2, 9)},
    "W4A16_ASYM": Scheme(replace(_int(4), symmetric=False)),
    **{f"W{b}A8": Scheme(_int(b), INT8_TOKEN) for b in range(2, 8)},
    **{f"W{b}A4": Scheme(_int(b), INT4_TOKEN) for b in range(2, 5)},
    "W8A8": W8A8,
    "INT8": W8A8,
    "W4AFP8": Scheme(_int(4), FP8_TOKEN),
    "FP8": Scheme(TensorScheme("fp8_e4m3", "tensor"), FP8_TENSOR),
    "FP8_DYNAMIC": Scheme(TensorScheme("fp8_e4m3", "channel"), FP8_TOKEN),
    "FP8_BLOCK": Scheme(TensorScheme("fp8_e4m3", "block", block_shape=(128, 128)), FP8_GROUP),
    "NVFP4A16": Scheme(NVFP4_WEIGHT),
    "NVFP4": Scheme(NVFP4_WEIGHT, replace(NVFP4_WEIGHT, dynamic=True)),
    "MXFP4A16": Scheme(MXFP4_WEIGHT),
    "MXFP4": Scheme(MXFP4_WEIGHT, replace(MXFP4_WEIGHT, dynamic=True)),
    "MXFP4XFP8": Scheme(MXFP4_WEIGHT, FP8_GROUP),
    "MXFP6A16": Scheme(MXFP6_WEIGHT),
    "MXFP6A8": Scheme(MXFP6_WEIGHT, MXFP8_GROUP),
    "MXFP8A16": Scheme(MXFP8_WEIGHT),
    "MXFP8": Scheme(MXFP8_WEIGHT, MXFP8_GROUP),
}


def group_size(scheme: Scheme) -> int | Literal["channel"] | None:
    """What a recipe may change about a preset: an integer's group size, or "channel". None when there is no choice."""
    weights = scheme.weights
    if not weights.number.startswith("int"):
        return None
    if weights.strategy == "channel":
        return "channel"
    return weights.group_size if weights.strategy == "group" else None


def with_group_size(scheme: Scheme, size: int | Literal["channel"]) -> Scheme:
    """The same scheme with one scale per `size` columns, or per row for "channel"."""
    if size == "channel":
        return replace(scheme, weights=replace(scheme.weights, strategy="channel", group_size=None))
    return replace(scheme, weights=replace(scheme.weights, strategy="group", group_size=size))
