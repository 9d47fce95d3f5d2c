"""Are the weights on disk those that were rounded? Each layer leaves a mark in quantkit.json, and validation reads it.

The mark of a weight Q (N, K) is (r Q c) / |Q|, r and c fixed vectors of +1 and -1 that look random. A scale that moved,
a zero point that was lost, rows or experts that changed places, a word that was packed wrongly: all change the sum,
also where the fault is too small for any measure of the text. What is read back is decoded by the format's reader, so
the mark does not depend on the format, and a converted checkpoint keeps it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantkit import hub, numerics, packed
from quantkit.errors import GateError, InputError

TOLERANCE = 1e-5  # marks are of the order of 1; formats that store a reciprocal differ in the last place of float32


def mark(w_NK: torch.Tensor) -> float:
    """The mark of a weight (N, K), float: of the order of 1, rounded to six places; 0 for a weight of zeros."""
    found = Mark()
    found.add(w_NK)
    return found.value


class Mark:
    """The mark of a weight that comes some rows at a time. Rows are summed exactly, however many come at once."""

    def __init__(self) -> None:
        self._columns: list[float] = []  # numbers: small tensors that stay would lie between the large that do not
        self._norms: list[float] = []
        self._signs: torch.Tensor | None = None

    def add(self, w_NK: torch.Tensor) -> None:
        """The next rows, (N, K) float."""
        w = w_NK.float()
        if self._signs is None:
            self._signs = _signs(w.shape[1], 1, w.device)
        self._columns += (w * self._signs).sum(1).tolist()
        self._norms += torch.linalg.vector_norm(w, dim=1).tolist()

    @property
    def value(self) -> float:
        norm = math.sqrt(math.fsum(x * x for x in self._norms))
        signs = _signs(len(self._columns), 2, torch.device("cpu")).tolist()
        return round(math.fsum(map(operator.mul, self._columns, signs)) / norm, 6) if norm else 0.0


def _signs(count: int, salt: int, device: torch.device, start: int = 0) -> torch.Tensor:
    """+1 and -1, the same on every machine: one bit of a hash of the position (Knuth's multiplicative one, twice)."""
    x = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device) * (2_654_435_761 * salt) % 2**32
    x = ((x >> 15) ^ x) * 2_246_822_519 % 2**32
    return ((x >> 17) & 1).float() * 2 - 1


def check(folder: Path, layers: Sequence[Mapping[str, Any]]) -> None:
    """Compares every layer on disk with its mark. layers: as in quantkit.json; those without a mark, and a dense
    copy of them, are passed over.

    Raises GateError that names the layers that differ, or what cannot be read.
    """
    expected = {str(x["name"]): float(x["mark"]) for x in layers if x.get("mark") is not None}
    if not expected or packed.find_config(folder, hub.read_json(folder / "config.json")) is None:
        return  # a dense copy: nothing of it is packed
    try:
        found = packed.open_folder(folder)
        wrong = []
        for name, value in expected.items():
            if name not in found.layers:
                raise GateError(f"{folder}: {name} was quantized, but is not packed in the checkpoint")
            got = mark(numerics.dequantize(found.unpack(name)[0]))
            if not abs(got - value) <= TOLERANCE:  # NaN is wrong
                wrong.append(f"{name} ({got:.6f} instead of {value:.6f})")
    except InputError as e:
        raise GateError(f"the checkpoint cannot be read back: {e}") from None
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise GateError(
            f"the weights on disk are not those that were rounded: {', '.join(wrong[:3])}{more}; the files were "
            "changed or damaged after they were written, or written wrongly: quantize again"
        )
