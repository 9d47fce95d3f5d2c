"""AWQ (arXiv 2306.00978): channels whose inputs are loud get a finer grid, by scaling them up before rounding.

Candidates for the scales of a link are powers of two sizes of each channel, normalised by sqrt(max * min):

    s = x^a / w^b      x  mean |input|      w  mean over rows of |weight| / the largest weight of its group

The paper takes b = 0, AutoAWQ b = 1 - a ("duo"), both a from 0 to 1 in steps of 1/20. The candidate with the least
error of the consumers' outputs wins, s = 1 among them. Tools find that error by running layers on tokens. For linear
layers it is tr(dW H dWᵀ), dW = Q(W s) / s - W, exactly: it needs the Gram matrix H = E[x xᵀ] alone, which GPTQ collects
anyway, and no forward pass; after the fold H becomes diag(1/s) H diag(1/s), so nothing is collected twice.

`duo: both` walks in the plane of a and b: from the best of seven points to the best of its six neighbours (along a,
along b, and along a + b = const, where an outlier channel is undone) at a distance of 1/8, then 1/16, then 1/32. Over
links of a trained model, of one with outliers, and random ones its error was that of the best of both lines, with 16
evaluations on average and at most 25 instead of 42.

A producer that is quantized too, v or up, has its rows divided. Where its own scales are powers of two (MX formats)
that moves each row on its grid, and costs there what it brings behind: so the candidates are powers of two as well.

Where heads are repeated (grouped-query attention) all columns that read one channel share its scale, x and w being the
largest of them, so v -> o can be folded too.

AutoAWQ's clipping (shrink the largest weight of a group as far as the output's error falls) is no option here: it
changes the weights and not the scale per channel. It is rtn's scale search `output`, its default behind this transform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from quantkit import summation
from quantkit.errors import InputError
from quantkit.numerics._tiles import tile_shape
from quantkit.transforms import Consumer, gathered, in_octaves, quantized, rounding_error, spread, stacked
from quantkit.types import Notes, Stats

LEAST = 1e-4  # of a scale, before and after it is normalised


class Options(BaseModel):
    """Options of `transforms: [{awq: ...}]`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    grid: int = Field(20, ge=4, le=1000, description="The exponents are searched in steps of about 1 / grid.")
    duo: bool | Literal["both"] = Field(
        "both",
        description="Candidates: false x^r; true x^r / w^(1-r), of the sizes of inputs x and weights w of a channel; "
        "both x^a / w^b with a and b searched freely.",
    )
    search: Literal["absmax", "mse"] = Field(
        "mse",
        description="How the number format chooses its scales while candidates are compared: mse as methods do "
        "afterwards, absmax for a method with scale_search absmax.",
    )


def needs(options: Options) -> frozenset[str]:
    """The statistics that `scales` reads."""
    return frozenset({"gram", "absmean"})


def scales(
    consumers: Sequence[Consumer],
    stats: Stats,
    *,
    options: Options,
    notes: Notes,
    channels_K: torch.Tensor | None = None,
    octaves: bool = False,
) -> torch.Tensor | None:
    """The scale of each channel of a link, (P,) float32 above 0; None when none is better than 1 throughout.

    stats       of the consumers' common input (K channels); of all tokens where there are experts
    channels_K  the producer's channel that each input channel is, as `Link.channels` gives it; None when it is its own
    octaves     powers of two only
    Raises InputError when the statistics are missing or not finite.
    """
    if stats.gram_KK is None or stats.absmean_K is None:
        raise InputError("awq needs calibration data: the mean of x xᵀ and of |x| of this layer's inputs are missing")
    gram = stats.gram_KK.float()
    if not bool(torch.isfinite(gram.diagonal()).all()):
        raise InputError("the calibration inputs of this layer hold NaN or Inf; load the model in bfloat16 or float32")
    counted = quantized(consumers)
    x_P = gathered(stats.absmean_K.float(), channels_K)
    live = x_P > 0
    if not counted or not bool(live.any()):
        return None
    w_P = gathered(_weight_size(counted), channels_K)

    def candidate(a: float, b: float) -> torch.Tensor:
        s_P = _normalised(x_P**a / (w_P**b + LEAST), live)
        return in_octaves(s_P) if octaves else s_P

    def error(a: float, b: float) -> float:
        return rounding_error(counted, spread(candidate(a, b), channels_K), gram, options.search)

    if options.duo == "both":
        a, b = _walk(error, options.grid)
    else:
        line = [(r / options.grid, 1 - r / options.grid if options.duo else 0.0) for r in range(options.grid + 1)]
        a, b = min([(0.0, 0.0), *line], key=lambda point: error(*point))
    return None if a == b == 0 else candidate(a, b)


def _walk(error: Callable[[float, float], float], grid: int) -> tuple[float, float]:
    """The exponents (a, b) from 0 to 1 with the least error, as far as steps of 1/8, 1/16, ... find them.

    The last step is about 1 / grid: the smallest that is more than half of it.
    """
    seen: dict[tuple[float, float], float] = {}
    around = [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.25, 0.25), (0.5, 0.5), (0.25, 0.75), (0.75, 0.25)]
    step = 0.25
    while True:
        for point in around:
            if min(point) >= 0 and max(point) <= 1 and point not in seen:
                seen[point] = error(*point)
        a, b = min(seen, key=lambda point: seen[point])
        step /= 2
        if step * 2 * grid <= 1:
            return a, b
        along = [(step, 0.0), (0.0, step), (step, -step)]
        around = [(a + sign * da, b + sign * db) for da, db in along for sign in (1, -1)]


def _normalised(s_P: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Scales around 1; of channels that no token fired, 1: nothing is known of them."""
    s = s_P.clamp(min=LEAST)
    s = s / (s[live].max() * s[live].min()).sqrt()
    return torch.where(live, s.clamp(min=LEAST), torch.ones_like(s))


def _weight_size(consumers: Sequence[Consumer]) -> torch.Tensor:
    """Mean over all rows of |w| / the largest |w| that shares its scale, for each column: (K,) float32."""
    rows = 0.0
    sums: torch.Tensor | float = 0.0
    for stack in stacked(consumers):
        w = stack.weight_NK.float().abs()
        n, k = w.shape
        width = tile_shape(stack.scheme.weights, n, k)[1]
        groups = torch.nn.functional.pad(w, (0, -k % width)).view(n, -1, width)
        relative = (groups / groups.amax(2, keepdim=True).clamp(min=1e-30)).view(n, -1)[:, :k]
        sums = sums + relative.mul_(stack.share_N[:, None]).sum(0)
        rows += summation.total(stack.share_N)
    assert isinstance(sums, torch.Tensor)
    return sums / rows
