"""From the weights of linears that share an input to their codes, and what the report says of each.

Layers of one input, scheme and dtype are solved as one stacked weight: one factorisation, and scales of the whole
tensor that they share, as engines that fuse them want it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantkit import formats, integrity, numerics
from quantkit.checkpoint import DTYPES, bits_per_weight
from quantkit.errors import InputError
from quantkit.linears import Linear
from quantkit.numerics._activations import Magnitudes
from quantkit.plan import Plan, short
from quantkit.types import Notes, QParams, QuantizedTensor, Stats, TensorScheme
from quantkit_kernels.gptq import available, products

AT_ONCE = 2 << 30  # bytes that are spent on solving several layers at once


@dataclass(frozen=True)
class Solved:
    """A layer's weight as codes, the stored scales of its input if it has any, and its line in the report."""

    layer: Linear
    tensor: QuantizedTensor
    inputs: QParams | None
    report: dict[str, Any]

    def decoded(self) -> torch.Tensor:
        """The weight that the codes stand for, (N, K) float32. Made anew: held, it would be four times the codes."""
        return numerics.dequantize(self.tensor)


def by_scheme(group: Sequence[Linear]) -> list[list[Linear]]:
    """Layers that can be solved together: those with one scheme and one dtype.

    A tile of rows must not reach from one layer into the next; layers whose rows are no multiple of it are alone.
    """
    alike: dict[tuple[Any, str], list[Linear]] = {}
    for layer in group:
        alike.setdefault((layer.scheme, layer.dtype), []).append(layer)
    found: list[list[Linear]] = []
    for layers in alike.values():
        tile = _tile(layers[0].scheme.weights) if layers[0].scheme else 1
        straddles = any(x.shape[0] % tile for x in layers[:-1])
        found += [[x] for x in layers] if straddles else [layers]
    return found


def solve(plan: Plan, layers: Sequence[Linear], weights: Sequence[torch.Tensor], stats: Stats | None) -> list[Solved]:
    """Rounds weights (N, K) float of layers of one scheme, that read one input, each weight once.

    Raises InputError naming the layers.
    """
    recipe, scheme = plan.recipe, layers[0].scheme
    assert scheme is not None
    notes = Notes()
    try:
        q = recipe.method.module.quantize(
            torch.cat([w.float() for w in weights]),
            scheme.weights,
            stats,
            options=plan.options(layers[0]),
            scale_dtype=scale_dtype(plan, layers[0]),
            notes=notes,
        )
    except InputError as e:
        raise InputError(f"{', '.join(x.name for x in layers)}: {e}") from None
    parts = split(q, [x.shape[0] for x in layers])
    return [
        finish(plan, layer, weight, part, stats, notes)
        for layer, weight, part in zip(layers, weights, parts, strict=True)
    ]


@dataclass
class Task:
    """What `solve` takes: layers of one scheme that read one input, their weights and that input's statistics."""

    layers: Sequence[Linear]
    weights: Sequence[torch.Tensor]
    stats: Stats | None


def size(layers: Sequence[Linear]) -> int:
    """Bytes that it takes to solve layers of one input: matrices of the size of H, and of the weight."""
    n, k = sum(x.shape[0] for x in layers), layers[0].shape[1]
    return 4 * (5 * k * k + 8 * n * k)


def together(plan: Plan, stacks: Mapping[int, Sequence[Linear]], device: torch.device) -> list[list[int]]:
    """Which stacks are solved at once, by their places: those of one shape and scheme, where the method can on a GPU.

    How many does not depend on what memory is free: the bytes of an output must not.
    """
    kinds: dict[Any, list[int]] = {}
    many = hasattr(plan.recipe.method.module, "quantize_many") and available(device)
    for i, layers in stacks.items():
        shapes = tuple(x.shape for x in layers)
        alone = not many or bool(getattr(plan.options(layers[0]), "pre_shift", 0))
        kinds.setdefault(i if alone else (shapes, layers[0].scheme, layers[0].dtype), []).append(i)
    found = []
    for places in kinds.values():
        most = max(1, AT_ONCE // size(stacks[places[0]]))
        found += [places[start : start + most] for start in range(0, len(places), most)]
    return sorted(found)


def solve_many(plan: Plan, tasks: Sequence[Task]) -> list[list[Solved]]:
    """`solve` of tasks of one shape and scheme, at once. Raises InputError naming the layers."""
    if len(tasks) == 1:
        return [solve(plan, tasks[0].layers, tasks[0].weights, tasks[0].stats)]
    first = tasks[0].layers[0]
    assert first.scheme is not None
    notes = [Notes() for _ in tasks]
    try:
        codes = plan.recipe.method.module.quantize_many(
            [torch.cat([w.float() for w in task.weights]) for task in tasks],
            first.scheme.weights,
            [task.stats for task in tasks],
            options=plan.options(first),
            scale_dtype=scale_dtype(plan, first),
            notes=notes,
        )
    except InputError as e:
        raise InputError(f"{first.name} to {tasks[-1].layers[-1].name}: {e}") from None
    found = []
    for task, q, told in zip(tasks, codes, notes, strict=True):
        parts = split(q, [x.shape[0] for x in task.layers])
        each = zip(task.layers, task.weights, parts, strict=True)
        found.append([finish(plan, layer, weight, part, task.stats, told) for layer, weight, part in each])
    return found


def finish(
    plan: Plan, layer: Linear, weight: torch.Tensor, q: QuantizedTensor, stats: Stats | None, notes: Notes
) -> Solved:
    """What goes with a layer's codes: its input's scales, the weight that they stand for, the report.

    weight  (N, K) float, what was rounded
    """
    assert layer.scheme is not None
    decoded = numerics.dequantize(q)
    gram = None if stats is None else stats.gram_KK
    if gram is None:
        tally = Tally()
        tally.add(weight, decoded)
        error, mark = tally.error, tally.mark
    else:
        error, mark = _output_error(weight.float(), decoded, gram), integrity.mark(decoded)
    found = report(
        plan,
        layer,
        error,
        mark,
        notes,
        tokens=stats.tokens if stats else 0,
        of="output" if gram is not None else "weight",
    )
    return Solved(layer, q, input_scales(plan, layer, stats), found)


class Tally:
    """Error and mark of a weight that comes some rows at a time, the same however many come at once."""

    def __init__(self) -> None:
        self._mark = integrity.Mark()
        self._error: list[float] = []
        self._whole: list[float] = []

    def add(self, weight: torch.Tensor, decoded: torch.Tensor) -> None:
        """The next rows (N, K) float, as they were and, float32, as their codes have them. Overwrites `decoded`."""
        w = weight.float()
        self._mark.add(decoded)
        self._error += torch.linalg.vector_norm(decoded.sub_(w), dim=1).tolist()
        self._whole += torch.linalg.vector_norm(w, dim=1).tolist()

    @property
    def error(self) -> float:
        """|W - Q|² / |W|²"""
        error, whole = (math.fsum(x * x for x in norms) for norms in (self._error, self._whole))
        return error / whole if whole else 0.0

    @property
    def mark(self) -> float:
        return self._mark.value


def _output_error(w: torch.Tensor, decoded: torch.Tensor, gram: torch.Tensor) -> float:
    """The layer's squared output error over its squared output: tr(D H Dᵀ) / tr(W H Wᵀ), D = W - Q."""
    d = w - decoded
    # Three digits are wanted: on a GPU, products of TF32 give them in an eighth of the time.
    with products(allow_tf32=True):
        error, whole = (math.fsum(((x @ gram) * x).sum(1).tolist()) for x in (d, w))
    return error / whole if whole else 0.0


def scale_dtype(plan: Plan, layer: Linear) -> torch.dtype:
    """The dtype in which a layer's scales are stored."""
    return DTYPES[formats.scale_dtype(plan.format, layer.dtype)]


def _tile(scheme: TensorScheme) -> int:
    """Rows of a weight that share their scales."""
    return scheme.block_shape[0] if scheme.strategy == "block" and scheme.block_shape else 1


def input_scales(plan: Plan, layer: Linear, stats: Stats | None) -> QParams | None:
    """The scales of a layer's input that are stored; None for a scheme without them. Raises InputError.

    A static scale is found by the recipe's rule, by the names of `Magnitudes.scale`; "absmax" is exact.
    """
    scheme, rule, dtype = layer.scheme, plan.recipe.calibration.input_scale, scale_dtype(plan, layer)
    if scheme is None or not scheme.calibrates_input or scheme.activations is None:
        return None
    if stats is None or stats.absmax_K is None or not float(stats.absmax_K.max()) > 0:
        raise InputError(
            f"{layer.name}: no calibration token gave this layer an input, so its input scale cannot be found; "
            "use more calibration data, or a scheme with dynamic activations"
        )
    number = numerics.get(scheme.activations.number)
    found: QParams = number.qparams(stats.absmax_K[None], scheme.activations, scale_dtype=dtype)
    if rule == "absmax" or scheme.activations.dynamic or stats.magnitudes is None:
        return found
    scale = Magnitudes(counts=stats.magnitudes).scale(scheme.activations, rule).to(dtype)
    return QParams(torch.where(scale == 0, torch.finfo(dtype).eps, scale).reshape(1, 1))


def split(q: QuantizedTensor, rows: list[int]) -> Iterator[QuantizedTensor]:
    """Takes a stacked weight apart again, by rows. Scales of a whole tensor go to every part."""
    whole, tile = q.scheme.strategy == "tensor", _tile(q.scheme)
    for start, count in zip(torch.tensor([0, *rows]).cumsum(0).tolist(), rows, strict=False):

        def cut(t: torch.Tensor | None, start: int = start, count: int = count) -> torch.Tensor | None:
            return t if t is None or whole else t[start // tile : -(-(start + count) // tile)].contiguous()

        scale = cut(q.qparams.scale_NG)
        assert scale is not None
        qparams = QParams(scale, cut(q.qparams.zero_NG), q.qparams.global_scale)
        yield QuantizedTensor(q.codes_NK[start : start + count].contiguous(), qparams, q.scheme)


def report(
    plan: Plan, layer: Linear, error: float, mark: float, notes: Notes, *, tokens: int = 0, of: str = "weight"
) -> dict[str, Any]:
    """A layer's line in the report.

    error  how far it is from what it was, squared and relative: `of` its output, or of its weight where the second
           moments of its inputs are not known
    tokens how many rows of inputs were observed
    """
    bits = bits_per_weight(plan.tensors(layer), layer.shape[0] * layer.shape[1])
    return {
        "name": layer.name,
        "scheme": short(layer.scheme),
        "shape": list(layer.shape),
        "bits_per_weight": round(bits, 4),
        "relative_error": error,
        "error_of": of,
        "mark": mark,
        "tokens": tokens,
        "notes": list(dict.fromkeys(notes.lines)),
    }
