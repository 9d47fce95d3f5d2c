"""AWQ (arXiv 2306.00978): channels whose inputs are loud get a finer grid, by scaling them up before rounding.

Candidates for the scales of a link, r from 0 to 1 in steps of 1 / grid:

    s = x^r                 x  mean |input| of the channel
    s = x^r / w^(1-r)       w  mean over rows of |weight| / largest of its group ("duo")
    s = 1                   always among them

normalised by sqrt(max * min). The one with the least error of the consumers' outputs wins. AutoAWQ and others find that
error by running the layers on tokens. For linear layers it is tr(dW H dWᵀ), dW = Q(W s) / s - W, exactly: it needs the
Gram matrix H = E[x xᵀ] alone, which GPTQ collects anyway, and no forward pass; after the fold H becomes
diag(1/s) H diag(1/s), so nothing is collected twice.

Not every r is tried: the error falls and rises once over r but for small ripples, so every fourth is, then the
neighbours of the best at half that distance, and again. Where heads are repeated (grouped-query attention) all columns
that read one channel share its scale, so v -> o can be folded too.

AutoAWQ's clipping (shrink the largest weight of a group as far as the output's error falls) is no option here: it
changes the weights and not the scale per channel, and the methods' own scale search (`mse`, `diagh`) is that search,
for every group, symmetric or not, on a finer grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from quantkit.errors import InputError
from quantkit.numerics._tiles import tile_shape
from quantkit.transforms import Consumer, Stack, gathered, rounding_error, spread, stacked
from quantkit.types import Notes, Stats

LEAST = 1e-4  # of a scale, before and after it is normalised


class Options(BaseModel):
    """Options of `transforms: [{awq: ...}]`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    grid: int = Field(20, ge=1, le=1000, description="Steps of the exponent r between 0 and 1.")
    duo: bool | Literal["both"] = Field(
        "both", description="Whether candidates also divide by the size of the weights: true, false, or both kinds."
    )
    search: Literal["absmax", "mse"] = Field(
        "absmax",
        description="How the number format chooses its scales while candidates are compared: absmax is fast, mse is "
        "nearer to what methods do afterwards.",
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
) -> torch.Tensor | None:
    """The scale of each channel of a link, (P,) float32 above 0; None when none is better than 1 throughout.

    stats       of the consumers' common input (K channels); of all tokens where there are experts
    channels_K  the producer's channel that each input channel is, as `Link.channels` gives it; None when it is its own
    Raises InputError when the statistics are missing or not finite.
    """
    if stats.gram_KK is None or stats.absmean_K is None:
        raise InputError("awq needs calibration data: the mean of x xᵀ and of |x| of this layer's inputs are missing")
    gram = stats.gram_KK.float()
    if not bool(torch.isfinite(gram.diagonal()).all()):
        raise InputError("the calibration inputs of this layer hold NaN or Inf; load the model in bfloat16 or float32")
    stacks = list(stacked(consumers))
    x_P = gathered(stats.absmean_K.float(), channels_K)
    live = x_P > 0
    if not stacks or not bool(live.any()):
        return None
    w_P = gathered(_weight_size(stacks), channels_K)

    def error(s_P: torch.Tensor) -> float:
        return float(rounding_error(stacks, spread(s_P, channels_K), gram, options.search))

    best, least = None, error(torch.ones_like(x_P))
    for duo in {True: (True,), False: (False,), "both": (False, True)}[options.duo]:

        def candidate(step: int, duo: bool = duo) -> torch.Tensor:
            r = step / options.grid
            s = x_P**r / (w_P ** (1 - r) + LEAST) if duo else x_P**r
            return _normalised(s, live)

        step, found = _coarse_to_fine(lambda step: error(candidate(step)), options.grid)
        if found < least:
            best, least = candidate(step), found
    return best


def _normalised(s_P: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Scales around 1; of channels that no token fired, 1: nothing is known of them."""
    s = s_P.clamp(min=LEAST)
    s = s / (s[live].max() * s[live].min()).sqrt()
    return torch.where(live, s.clamp(min=LEAST), torch.ones_like(s))


def _weight_size(stacks: Sequence[Stack]) -> torch.Tensor:
    """Mean over all rows of |w| / the largest |w| that shares its scale, for each column: (K,) float32."""
    total = torch.zeros((), dtype=torch.float64)
    sums: torch.Tensor | float = 0.0
    for stack in stacks:
        w = stack.weight_NK.float().abs()
        n, k = w.shape
        width = tile_shape(stack.scheme.weights, n, k)[1]
        groups = torch.nn.functional.pad(w, (0, -k % width)).view(n, -1, width)
        relative = (groups / groups.amax(2, keepdim=True).clamp(min=1e-30)).view(n, -1)[:, :k]
        sums = sums + stack.share_N @ relative
        total += float(stack.share_N.sum())
    assert isinstance(sums, torch.Tensor)
    return sums / float(total)


def _coarse_to_fine(error: Callable[[int], float], grid: int) -> tuple[int, float]:
    """The step in 0..grid with the least error, as far as halving the distance around the best one finds it."""
    seen: dict[int, float] = {}
    distance = max(1, 1 << (grid // 5).bit_length() - 1) if grid >= 5 else 1
    around = list(range(0, grid + 1, distance))
    while True:
        for step in around:
            if 0 <= step <= grid and step not in seen:
                seen[step] = error(step)
        best = min(seen, key=lambda step: (seen[step], step))
        if distance == 1:
            return best, seen[best]
        distance //= 2
        around = [best - distance, best + distance]
