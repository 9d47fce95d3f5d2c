"""Scheme presets: one row a name, spelt and defined as compressed-tensors and llm-compressor have them.

W4A16 reads: weights of 4 bits, activations of 16 (left in the model's dtype). Groups of 128 columns share a scale.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from quantkit.types import Scheme, TensorScheme

GroupSize = Literal[32, 64, 128, "channel"]

PRESETS: dict[str, Scheme] = {
    "W2A16": Scheme(TensorScheme("int2", "group", 128)),
    "W3A16": Scheme(TensorScheme("int3", "group", 128)),
    "W4A16": Scheme(TensorScheme("int4", "group", 128)),
    "W4A16_ASYM": Scheme(TensorScheme("int4", "group", 128, symmetric=False)),
    "W8A16": Scheme(TensorScheme("int8", "group", 128)),
}


def group_size(scheme: Scheme) -> int | Literal["channel"] | None:
    """What a recipe may change about a preset: its group size, or "channel". None when the preset has no groups."""
    weights = scheme.weights
    if weights.strategy == "channel":
        return "channel"
    return weights.group_size if weights.strategy == "group" else None


def with_group_size(scheme: Scheme, size: int | Literal["channel"]) -> Scheme:
    """The same scheme with one scale per `size` columns, or per row for "channel"."""
    if size == "channel":
        return replace(scheme, weights=replace(scheme.weights, strategy="channel", group_size=None))
    return replace(scheme, weights=replace(scheme.weights, strategy="group", group_size=size))
