"""AutoRound (arXiv 2309.05516): rounding and clipping learned by SignSGD, block by block. Minutes, for accuracy.

GPTQ and its kin minimise the error of one layer's output. Here it is the output of the whole block that counts, with
its attention, its non-linearities and its routing, and its target is what the dense model's block makes of the dense
model's inputs, while its own inputs are what the quantized blocks before it give: their errors are made up for.

    each step   one batch of rows through the block, weights as their codes say; gradient of the squared error of the
                block's output; each rounding offset and each scale's factor moves by `rate`, up or down
                (quantkit/algorithms/_signsgd.py). `rate` falls linearly to 0
    at the end  the codes and scales that were best over all batches, those of the start included: never worse than it

The error of single batches is too noisy to choose by, so at each quarter of the way all batches are run: at 200 steps
and 16 batches that costs an eighth more. It starts where `init` ends: see `Options`.

`quantize` does the same to a layer by itself, with tr(D H Dᵀ), D = W - Q, as the loss. It needs no block, and neither
batches: the gradient is 2 D H.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from quantkit import numerics, summation
from quantkit.algorithms import gptq, rtn
from quantkit.algorithms._signsgd import Rounding
from quantkit.errors import InputError
from quantkit.numerics._activations import fake_quantize
from quantkit.progress import Progress
from quantkit.types import Notes, QParams, QuantizedTensor, Stats, TensorScheme

CHECKS = 4  # times that all batches are run to see how good the parameters are


class Options(BaseModel):
    """Options of `method: autoround`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    iterations: int = Field(200, ge=1, le=100_000, description="Steps a block, of one calibration batch each.")
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=0.5,
        description="How far the first step moves each parameter; none is 1 / iterations, or 2 / iterations for 3 bits "
        "and less with at least 1000 iterations.",
    )
    init: Literal["gptq", "diagh", "mse", "absmax"] = Field(
        "gptq",
        description="Where it starts: codes and scales of gptq, or nearest codes under scales by the error weighted "
        "with diag(H), by the squared error, or by the largest weight.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of the order of the batches.")


@dataclass(frozen=True)
class Stack:
    """Linears that share an input and a scheme, solved as one weight: their rows one after another.

    modules       in the loaded block; their weights give way to quantized ones while the block is tuned
    stats         of their input; holds what `needs` names
    activations   how the engine quantizes their input; None leaves it as it is
    input_scale   one float, for a scheme of activations with a stored scale: `fake_quantize`'s static_scale
    """

    modules: tuple[nn.Linear, ...]
    scheme: TensorScheme
    stats: Stats | None
    scale_dtype: torch.dtype
    activations: TensorScheme | None = None
    input_scale: torch.Tensor | None = None


@dataclass(frozen=True)
class Data:
    """What a block is tuned on. Each takes the number of a batch, below `batches`.

    forward  the block's output (B, L, D) on the inputs that the quantized model has there, gradients not switched off
    target   the dense block's output on the dense model's inputs, same shape
    mask     (B, L) bool, False where a token is padding and does not count

    Where several processes tune one block, each calls these for its own batches only.
    here     whether a batch is one of them
    share    gradients of the batch of this number, from the process that has it, None on the others -> on all
    gather   a row of numbers for each batch here -> for each batch of all, in order
    """

    batches: int
    forward: Callable[[int], torch.Tensor]
    target: Callable[[int], torch.Tensor]
    mask: Callable[[int], torch.Tensor]
    here: Callable[[int], bool] = lambda i: True
    share: Callable[[int, list[torch.Tensor] | None], list[torch.Tensor]] = lambda i, found: found or []
    gather: Callable[[list[list[float]]], list[list[float]]] = lambda rows: rows


@dataclass(frozen=True)
class Tuned:
    """weights: one a stack. Errors: squared error of the block's output over the square of its target."""

    weights: tuple[QuantizedTensor, ...]
    error_before: float
    error: float


def needs(options: Options) -> frozenset[str]:
    """The statistics that `quantize` reads."""
    return frozenset({"gram"})


def quantize(
    w_NK: torch.Tensor,
    scheme: TensorScheme,
    stats: Stats | None,
    *,
    options: Options,
    scale_dtype: torch.dtype,
    notes: Notes,
) -> QuantizedTensor:
    """Quantizes a weight (N, K) float by itself, against its inputs' second moments.

    No row ends worse than it starts. Raises InputError when the statistics are missing or not finite.
    """
    if stats is None or stats.gram_KK is None:
        raise InputError("autoround needs calibration data: the mean of x xᵀ of this layer's inputs is missing")
    w, hessian = w_NK.float(), stats.gram_KK.float()
    best = _start(w, scheme, stats, options, scale_dtype, notes)
    rounding = Rounding(w, best)
    # Rows with scales of their own, or scales that stay, do not know of each other: each keeps its best.
    alone = not rounding.tunes_scale or best.qparams.scale_NG.shape[0] == w.shape[0]
    least: torch.Tensor | None = None
    for rate in [*_rates(options, scheme), 0.0]:
        q = rounding.quantized
        delta = numerics.dequantize(q) - w
        gradient = delta @ hessian
        error = (gradient * delta).sum(1, keepdim=True)
        if not alone:
            error = error.sum(0, keepdim=True)
        if least is None:
            least = error
        else:
            best = _where(error < least, q, best)
            least = torch.minimum(error, least)
        if rate:
            rounding.descend(gradient, rate)
    return best


def _where(better: torch.Tensor, a: QuantizedTensor, b: QuantizedTensor) -> QuantizedTensor:
    """The rows of `a` where `better` (N, 1), or (1, 1) for all, and those of `b` elsewhere."""

    def choose(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if x is y:
            return x
        # torch.where knows no float8
        raw = (x.view(torch.uint8), y.view(torch.uint8)) if x.dtype.itemsize == 1 else (x, y)
        return torch.where(better, *raw).view(x.dtype)

    zero = (
        None if a.qparams.zero_NG is None or b.qparams.zero_NG is None else choose(a.qparams.zero_NG, b.qparams.zero_NG)
    )
    scale = choose(a.qparams.scale_NG, b.qparams.scale_NG)
    return QuantizedTensor(choose(a.codes_NK, b.codes_NK), QParams(scale, zero, a.qparams.global_scale), a.scheme)


def quantize_block(stacks: Sequence[Stack], data: Data, *, options: Options, notes: Notes, progress: Progress) -> Tuned:
    """Quantizes the linears of a block together, so that the block's output is as near to the dense one as possible.

    The modules are as before when this returns or raises, their weights the same objects. Several blocks may be tuned
    as one: their linears are then all in `stacks`, and `data.forward` runs them all.
    Raises InputError when statistics are missing, or the block's output holds NaN or Inf.
    """
    with torch.no_grad():
        weights = [torch.cat([m.weight for m in s.modules]).float() for s in stacks]
        roundings = [
            Rounding(w, _start(w, s.scheme, s.stats, options, s.scale_dtype, notes)) for w, s in zip(weights, stacks)
        ]
    del weights
    with _swapped(stacks) as parameters, _quantized_inputs(stacks):
        for group, rounding in zip(parameters, roundings):
            _put(group, rounding.quantized)
        return _tune(roundings, parameters, data, options, notes, progress)


def _tune(
    roundings: list[Rounding],
    parameters: list[list[nn.Parameter]],
    data: Data,
    options: Options,
    notes: Notes,
    progress: Progress,
) -> Tuned:
    """The loop over steps; keeps the best of CHECKS + 1 looks at all batches."""
    flat = [p for group in parameters for p in group]
    rates = [list(_rates(options, r.start.scheme)) for r in roundings]
    best = [r.quantized for r in roundings]
    before = least = _error(data)
    order = _order(data.batches, options.seed)
    for step in range(options.iterations):
        progress.doing(f"tune {step + 1}/{options.iterations}")
        i = next(order)
        found = iter(data.share(i, _gradients(data, i, flat) if data.here(i) else None))
        for group, rounding, rate in zip(parameters, roundings, rates):
            rounding.descend(torch.cat([next(found) for _ in group]), rate[step])
            _put(group, rounding.quantized)
        if (step + 1) * CHECKS // options.iterations > step * CHECKS // options.iterations:
            error = _error(data)
            if error < least:
                least, best = error, [r.quantized for r in roundings]
    if not least < before:
        notes.add("no step lowered the error of the block's output; it stays as it started")
    return Tuned(tuple(best), before, least)


def _gradients(data: Data, i: int, weights: list[nn.Parameter]) -> list[torch.Tensor]:
    """Of half the squared error of batch `i`, to each weight."""
    with torch.enable_grad():
        out = data.forward(i)
    missed = _missed(out, data, i)
    found = torch.autograd.grad(out, weights, missed.to(out.dtype), allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found)]


def _start(
    w: torch.Tensor,
    scheme: TensorScheme,
    stats: Stats | None,
    options: Options,
    scale_dtype: torch.dtype,
    notes: Notes,
) -> QuantizedTensor:
    if options.init == "gptq":
        return gptq.quantize(w, scheme, stats, options=gptq.Options(), scale_dtype=scale_dtype, notes=notes)
    nearest = rtn.Options(scale_search=options.init)
    return rtn.quantize(w, scheme, stats, options=nearest, scale_dtype=scale_dtype, notes=notes)


def _rates(options: Options, scheme: TensorScheme) -> Iterator[float]:
    """How far parameters move at each step: falls linearly from the learning rate to 0."""
    steps = options.iterations
    first = options.learning_rate
    if first is None:
        first = (2 if scheme.number in ("int2", "int3") and steps >= 1000 else 1) / steps
    return (min(first, 0.5) * (1 - i / steps) for i in range(steps))


def _order(batches: int, seed: int) -> Iterator[int]:
    """Batch after batch without end, each epoch shuffled anew."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(batches, generator=generator).tolist()


def _missed(out: torch.Tensor, data: Data, i: int) -> torch.Tensor:
    """What the output of batch `i` has too much, float32 (B, L, D), 0 at padding: the gradient of half its square."""
    missed = out.detach().float() - data.target(i)
    return missed.masked_fill_(~data.mask(i)[..., None], 0)


@torch.no_grad()
def _error(data: Data) -> float:
    """Squared error of the block's output over all batches, over the square of its target."""
    parts = []
    for i in filter(data.here, range(data.batches)):
        whole = data.target(i).float().masked_fill(~data.mask(i)[..., None], 0)
        missed = _missed(data.forward(i), data, i)
        parts.append([summation.total(missed.square_()), summation.total(whole.square_())])
    rows = data.gather(parts)
    error, whole = torch.tensor(rows, dtype=torch.float64).sum(0).tolist()
    if not (math.isfinite(error) and math.isfinite(whole)):
        raise InputError("the block's output holds NaN or Inf; load the model in bfloat16 or float32")
    return float(error / whole) if whole else 0.0


def _put(group: list[nn.Parameter], q: QuantizedTensor) -> None:
    """Writes what the codes stand for into the weights that the block runs with."""
    with torch.no_grad():
        for parameter, part in zip(group, numerics.dequantize(q).split([p.shape[0] for p in group])):
            parameter.copy_(part)


@contextmanager
def _swapped(stacks: Sequence[Stack]) -> Iterator[list[list[nn.Parameter]]]:
    """Gives every linear a weight of its own that has a gradient; puts the old one back afterwards."""
    before = [(m, m.weight) for s in stacks for m in s.modules]
    parameters = [[nn.Parameter(m.weight.detach().clone()) for m in s.modules] for s in stacks]
    try:
        for (m, _), parameter in zip(before, itertools.chain(*parameters)):
            m.weight = parameter
        yield parameters
    finally:
        for m, weight in before:
            m.weight = weight


@contextmanager
def _quantized_inputs(stacks: Sequence[Stack]) -> Iterator[None]:
    """Rounds the linears' inputs as the engine will."""
    handles = []
    try:
        for stack in stacks:
            if stack.activations is None:
                continue

            def hook(_: nn.Module, args: tuple[Any, ...], stack: Stack = stack) -> tuple[Any, ...]:
                return (_Through.apply(args[0], stack), *args[1:])

            handles += [m.register_forward_pre_hook(hook) for m in stack.modules]
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Through(torch.autograd.Function):
    """Rounds activations; the gradient passes as if it did not."""

    @staticmethod
    def forward(_: Any, x: torch.Tensor, stack: Stack) -> torch.Tensor:
        return fake_quantize(x, stack.activations, stack.input_scale)

    @staticmethod
    def backward(_: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None
