"""Experts in one tensor again: for a dense copy of a model whose own files have them so, such as gpt-oss.

Packed, they are a tensor an expert and projection, as engines want them; dense, transformers looks for the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch

from quantkit import skeleton
from quantkit.apart import Piece, gathered
from quantkit.checkpoint import DTYPES
from quantkit.errors import InputError
from quantkit.packed import Packed
from quantkit.types import TensorSpec

Wholes = Mapping[str, tuple[TensorSpec, Mapping[str, Piece]]]  # tensor -> what it is, and what of each name is in it
_EXPERT = re.compile(r"\.experts\.\d+\.\w+$")


def wholes(source: Packed, dtype: str) -> Wholes:
    """The tensors that hold all experts of a layer in this model's own files, and are taken apart in this folder.

    dtype  safetensors' name of what they will be
    Empty for a model that transformers does not know without code of its own: then nothing says how its files are.
    """
    apart = [name for name in source.layers if _EXPERT.search(name)]
    if not apart:
        return {}
    try:
        model = skeleton.unquantized(source.folder, source.checkpoint)
    except InputError:
        return {}
    in_memory = skeleton.namer(model)
    names = [f"{name}.{kind}" for name in apart for kind in ("weight", "bias")]
    held = {n: in_memory(n)[0] for n in names if n.endswith("weight") or n in source.checkpoint.specs}
    return gathered(model, held, dtype)


def replaced(specs: Mapping[str, TensorSpec], of: Wholes) -> dict[str, TensorSpec]:
    """The tensors of a dense output with those of single experts put together."""
    gone = {name for _, pieces in of.values() for name in pieces}
    return {**{n: s for n, s in specs.items() if n not in gone}, **{n: spec for n, (spec, _) in of.items()}}


def put_together(spec: TensorSpec, pieces: Mapping[str, Piece], read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """One of them. read: a tensor of one expert by its name. Memory: the whole, and one of its pieces."""
    found = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
    for name, piece in pieces.items():
        piece.put(found, read(name).to(found))
    return found
