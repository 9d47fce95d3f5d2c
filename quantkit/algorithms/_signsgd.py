"""A weight on its way through SignSGD: which code each element gets, and how far each scale reaches.

    codes   = nearest code of (w + V · step)          V in [-.5, .5], so each weight ends on one side or the other
    scale   = s · α,  as it is stored                 α in [.5, 1.5], one for each scale; asymmetric scales have two,
                                                      α for the upper and β for the lower end of what they span

`step` is the distance between two neighbouring values of the grid at w. What the network sees is always what the codes
stand for under the stored scale; gradients pass both roundings as if they were not there (straight-through):

    V            sign(G),  G the gradient of the loss to the decoded weight
    α            where the code saturates, its value grows with the scale; elsewhere only its rounding error does
    p  <-  p - rate · sign(gradient)                  SignSGD of AutoRound, arXiv 2309.05516, without momentum

Scales of few bits (E4M3, powers of two) and of FP8, whose error hardly depends on them, stay as they are.
"""

from __future__ import annotations

import torch

from quantkit import numerics
from quantkit.numerics import fp8, mx, nvfp4
from quantkit.numerics import int as integer
from quantkit.numerics._minifloat import E2M1, Minifloat
from quantkit.types import QParams, QuantizedTensor, TensorScheme

LEAST, MOST = 0.5, 1.5  # of a scale's factor
INSIDE = 0.49  # of a step: how far from its code a weight that starts at another than the nearest one is taken to be


class Rounding:
    """The parameters of one weight (N, K), and one step of them: `descend`.

    start      codes and scales before the first step
    quantized  what the parameters stand for now; before the first step, exactly the start
    w          float32 (N, K), where V is 0: the weight itself, or the point nearest to it that has the start's code
    """

    def __init__(self, w_NK: torch.Tensor, start: QuantizedTensor) -> None:
        self.start = self.quantized = start
        self.w = _origin(w_NK, start)
        self.offset = torch.zeros_like(self.w)
        scale = start.qparams.scale_NG
        self.tunes_scale = start.scheme.number in integer.NUMBERS
        self.upper = torch.ones_like(scale, dtype=torch.float32) if self.tunes_scale else None
        zero = start.qparams.zero_NG
        self.lower = None if zero is None or self.upper is None else torch.ones_like(self.upper)

    def descend(self, gradient_NK: torch.Tensor, rate: float) -> None:
        """One step against the gradient of the loss to the decoded weight (N, K), any float dtype."""
        if self.upper is not None:
            self._scales(gradient_NK, self.upper, rate)
        self.offset.sub_(torch.sign(gradient_NK), alpha=rate).clamp_(-0.5, 0.5)
        qparams = self._qparams()
        point = self.w + self.offset * grid_step(self.w, qparams, self.start.scheme)
        self.quantized = numerics.quantize(point, qparams, self.start.scheme)

    def _scales(self, gradient: torch.Tensor, upper: torch.Tensor, rate: float) -> None:
        """α and β by the gradient at the current codes."""
        q = self.quantized
        decoded = numerics.dequantize(q)
        step = grid_step(self.w, q.qparams, q.scheme)
        beyond = self.w + self.offset * step - decoded  # more than half a step: the code has saturated
        if self.lower is None:
            felt = torch.where(beyond.abs() > step / 2, decoded, decoded - self.w)
            upper.sub_(torch.sign(self._per_scale(felt.mul_(gradient))), alpha=rate).clamp_(LEAST, MOST)
            return
        low, high = integer.limits(q.scheme)
        above, below = beyond > step / 2, beyond < -step / 2
        inside = ((decoded - self.w) / (step * (high - low))).masked_fill_(above | below, 0)
        up = self._per_scale((inside + above.float()).mul_(gradient))
        down = self._per_scale((inside - below.float()).mul_(gradient))
        upper.sub_(torch.sign(up), alpha=rate).clamp_(LEAST, MOST)
        self.lower.sub_(torch.sign(down), alpha=rate).clamp_(LEAST, MOST)

    def _per_scale(self, x_NK: torch.Tensor) -> torch.Tensor:
        """Sums over the weights of each scale, (N, K) -> the shape of the scales."""
        rows, groups = self.start.qparams.scale_NG.shape
        x = x_NK.reshape(x_NK.shape[0], groups, -1).sum(2)
        return x if rows == x.shape[0] else x.sum(0, keepdim=True)

    def _qparams(self) -> QParams:
        """Scales and zero points as they would be stored; those of the start while every factor is 1."""
        q = self.start.qparams
        if self.upper is None:
            return q
        if self.lower is None or q.zero_NG is None:
            return QParams(_stored(q.scale_NG.float() * self.upper, q.scale_NG))
        low, high = integer.limits(self.start.scheme)
        reach = (q.zero_NG.float() - low) * self.lower  # in codes of the start: how far below zero the span begins
        factor = (reach + (high - q.zero_NG.float()) * self.upper) / (high - low)
        scale = _stored(q.scale_NG.float() * factor, q.scale_NG)
        zero = (low + reach * q.scale_NG.float() / scale.float()).round().clamp(low, high)
        return QParams(scale, zero.to(torch.int8))


def _stored(scale: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """In the dtype in which scales are stored; the old one where that has no such number but 0."""
    rounded = scale.to(like.dtype)
    return torch.where(rounded == 0, like, rounded)


def _origin(w_NK: torch.Tensor, start: QuantizedTensor) -> torch.Tensor:
    """The weight, moved into the start's cell where that has another code than the nearest."""
    decoded = numerics.dequantize(start)

    def lands(x: torch.Tensor) -> torch.Tensor:
        return numerics.dequantize(numerics.quantize(x, start.qparams, start.scheme)) == decoded

    w = w_NK.float()
    reach = INSIDE * grid_step(decoded, start.qparams, start.scheme)
    near = torch.minimum(torch.maximum(w, decoded - reach), decoded + reach)
    return torch.where(lands(w), w, torch.where(lands(near), near, decoded))


def grid_step(x_NK: torch.Tensor, qparams: QParams, scheme: TensorScheme) -> torch.Tensor:
    """Distance between the two values of the grid around each x: float32 (N, K), all above 0."""
    scale = numerics.expand(qparams, scheme, x_NK.shape).scale_NG.abs()
    form = _form(scheme.number)
    if form is None:
        return scale
    exponent = torch.frexp((x_NK / scale).abs().clamp(2.0**form.emin, form.max)).exponent - 1
    return torch.ldexp(scale, exponent - form.mantissa)


def _form(number: str) -> Minifloat | None:
    """The floats that a number format rounds to, before its scale; None for integers."""
    if number in fp8.FORMATS:
        return fp8.FORMATS[number][0]
    if number in mx.ELEMENTS:
        return mx.ELEMENTS[number].form
    return E2M1 if number in nvfp4.NUMBERS else None
