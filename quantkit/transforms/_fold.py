"""Folding a scale per channel into a producer and its consumers, in place, with a way back and a check.

    producer    norm: weight / s, bias / s; one whose factor is 1 + w: (1 + w) / s - 1.    linear: rows of W and b / s
    consumers   columns of W * s

A norm's weight is stored in the checkpoint's dtype. It is rounded to that first, and the consumers take the scale that
it then really has, old / new: so rounding the norm costs nothing. A linear's rows hold K values each and have no such
scale; they are divided by s as given, and rounded when they are quantized or stored.

The structure says which consumers there are (quantkit/links.py), and the model itself confirms it: a block is run
before and after. Should the outputs differ, all folds are undone, tried one by one, and those that fail left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from quantkit import summation
from quantkit.errors import InputError
from quantkit.links import Link, norm_offset
from quantkit.types import Notes

# Of what a block adds to the hidden states, relative. A fold rounds each weight once more, to one part in 2^24; that
# moves a linear's output by 1e-7, a block's by up to 1e-6, and by 1e-4 where attention logits reach 1000. A router, a
# shared expert or any consumer left out moves it by 1e-3 to 1e-1 even for scales that differ by only a tenth.
TOLERANCE = 2e-4
# Where two experts are tied but for rounding, a token may go to the other one; so many of all tokens are forgiven.
TIES = 1 / 1024


@dataclass(frozen=True)
class Folded:
    """A fold that was done. s_P: the scale of each of the producer's channels as it came out, float32 or float64.

    old  the parameters that changed, and what was in them
    """

    link: Link
    s_P: torch.Tensor
    old: tuple[tuple[torch.Tensor, torch.Tensor], ...]


@torch.no_grad()
def fold(model: nn.Module, link: Link, s_P: torch.Tensor, stored: torch.dtype) -> Folded:
    """Divides the producer's channels by s and multiplies the consumers' columns by it, in place.

    model   its block must be loaded, in float32 (or float64), on any device
    s_P     (P,) float, above 0: one for each channel of the link, in its order
    stored  dtype of the producer's parameters in the checkpoint
    Raises InputError when s is not a finite number above 0 for each channel.
    """
    if s_P.shape != (link.rows[1],) or not bool((torch.isfinite(s_P) & (s_P > 0)).all()):
        raise InputError(
            f"{link.producer}: a fold needs {link.rows[1]} finite scales above 0, not {tuple(s_P.shape)} "
            f"from {float(s_P.min()) if s_P.numel() else 0:g} to {float(s_P.max()) if s_P.numel() else 0:g}"
        )
    producer = model.get_submodule(link.producer)
    own = [p for name in ("weight", "bias") if (p := getattr(producer, name, None)) is not None]
    consumers = [_weight(model, name) for name in link.consumers]
    old = tuple((p, p.clone()) for p in [*own, *consumers])
    s = s_P.to(own[0])
    rows = link.row_numbers().to(s.device)
    if link.kind == "norm":
        s = _divide_norm(producer, rows, s, stored)
    else:
        for p in own:
            p[rows] /= s if p.ndim == 1 else s[:, None]
    for weight in consumers:
        weight *= link.spread(s).to(weight)
    return Folded(link, s, old)


@torch.no_grad()
def undo(folded: Folded) -> None:
    """Puts every parameter back as it was, bit by bit."""
    for parameter, old in folded.old:
        parameter.copy_(old)


def _weight(model: nn.Module, name: str) -> torch.Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _divide_norm(norm: nn.Module, rows: torch.Tensor, s: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """Divides the channels of a norm by s, rounded as they will be stored; returns what they came to be divided by."""
    offset = norm_offset(norm)
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert offset is not None and isinstance(weight, torch.Tensor)
    before = weight[rows] + offset
    rounded = (before / s - offset).to(stored).to(weight)
    after = rounded + offset
    # A channel that is 0 stays it under any s; one that would become 0, or leave the dtype's range, is left alone.
    usable = torch.isfinite(after) & ((after != 0) | (before == 0)) & (after.sign() == before.sign())
    s = torch.where(before == 0, s, torch.where(usable, before / after, torch.ones_like(s)))
    weight[rows] = torch.where(usable, rounded, weight[rows])
    if isinstance(bias, torch.Tensor):
        bias[rows] /= s
    return s


def relative_error(before: torch.Tensor, after: torch.Tensor, hidden: torch.Tensor | None = None) -> float:
    """How far a block's output (..., K) moved: Frobenius norm, relative to what the block adds to its input `hidden`.

    Relative to the output itself, the residual stream, which passes by everything that is folded, would hide errors.
    The worst thousandth of the tokens (none of fewer than 1024) is left out: see `TIES`. NaN or Inf give infinity.
    """
    missed = (after.double() - before.double()).reshape(-1, before.shape[-1]).square().sum(1)
    added = before.double() if hidden is None else before.double() - hidden.to(before).double()
    if not bool(torch.isfinite(missed).all()) or not bool(torch.isfinite(added).all()):
        return math.inf
    kept = torch.argsort(missed, stable=True)[: len(missed) - int(len(missed) * TIES)]
    whole = summation.total(added.reshape(-1, before.shape[-1]).square().sum(1)[kept])
    off = summation.total(missed[kept])
    return math.sqrt(off / whole) if whole else (math.inf if off else 0.0)


def fold_all(
    model: nn.Module,
    scales: Mapping[Link, torch.Tensor],
    run: Callable[[], torch.Tensor],
    *,
    stored: Callable[[str], torch.dtype],
    notes: Notes,
    hidden: torch.Tensor | None = None,
) -> dict[Link, torch.Tensor]:
    """Folds all links of a block, and keeps what leaves the block's output as it was.

    scales  s (P,) of each link, as in `fold`; in the order of the links
    run     runs the loaded block on one batch of calibration tokens; gives its output (..., K), float32
    stored  the dtype of a parameter in the checkpoint, by its name in memory
    hidden  what goes into that block
    Returns the links that were folded, each with its scales as they came out: the consumers' statistics are those of
    x / spread(s). `notes` hears of each link that was not, with the error that was measured.
    """
    before = run()

    def done(link: Link) -> Folded:
        return fold(model, link, scales[link], stored(f"{link.producer}.weight"))

    folds = [done(link) for link in scales]
    error = relative_error(before, run(), hidden) if folds else 0.0
    if error <= TOLERANCE:
        return {f.link: f.s_P for f in folds}
    for f in reversed(folds):
        undo(f)
    del folds
    kept: dict[Link, torch.Tensor] = {}
    for link in scales:
        one = done(link)
        error = relative_error(before, run(), hidden)
        if error <= TOLERANCE:
            kept[link] = one.s_P
        else:
            undo(one)
            notes.add(
                f"{link.producer} -> {', '.join(link.consumers)}: folding its scales moved the block's output by "
                f"{error:.1e} of what it adds to the hidden states (tolerance {TOLERANCE:.0e}); undone, left as it was"
            )
    return kept
