"""SmoothQuant (arXiv 2211.10438): moves outliers of activations into the weights, which bear them better.

    s_j = (largest |x_j|)^alpha / (largest |w_j| over all consumers)^(1 - alpha)

x / s has fewer outliers than x, W s more than W; alpha says how much goes over. The paper takes 0.5 for OPT and 0.85
for Llama. What is best differs from layer to layer, and both sides can be reckoned up before anything is folded, per
token, in the outputs:

    weights      tr(dW H dWᵀ), dW = Q(W s) / s - W                  H = E[x xᵀ]
    activations  mean over tokens of |(Q(x / s) - x / s) (W s)ᵀ|²   on a sample of the calibration tokens

The sum is what `alpha: search` keeps small, over 0.3, 0.4, ..., 0.9, and no scaling. The two errors are independent
of each other, so their squares add up; both roundings are the scheme's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from quantkit import numerics, summation
from quantkit.errors import InputError
from quantkit.numerics._activations import fake_quantize
from quantkit.transforms import Consumer, Stack, gathered, in_octaves, quantized, rounding_error, spread, stacked
from quantkit.types import Notes, Stats, TensorScheme

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LEAST = 1e-5  # of |x|, |w| and s
TOKENS = 1024  # of the sample that are looked at


class Options(BaseModel):
    """Options of `transforms: [{smoothquant: ...}]`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = Field(
        "search",
        description="How much of the outliers moves into the weights: 0 none, 1 all; or search, for each link the "
        "value with the least error of weights and activations together.",
    )


def needs(options: Options) -> frozenset[str]:
    """The statistics that `scales` reads."""
    return frozenset({"absmax", "gram", "sample"} if options.alpha == "search" else {"absmax"})


def scales(
    consumers: Sequence[Consumer],
    stats: Stats,
    *,
    options: Options,
    notes: Notes,
    channels_K: torch.Tensor | None = None,
    octaves: bool = False,
) -> torch.Tensor | None:
    """The scale of each channel of a link, (P,) float32 above 0; None to leave the channels as they are.

    stats       of the consumers' common input (K channels); of all tokens where there are experts
    channels_K  the producer's channel that each input channel is, as `Link.channels` gives it; None when it is its own
    octaves     powers of two only
    Raises InputError when the statistics are missing or not finite.
    """
    if stats.absmax_K is None:
        raise InputError("smoothquant needs calibration data: the largest |x| of this layer's inputs are missing")
    if not bool(torch.isfinite(stats.absmax_K).all()):
        raise InputError("the calibration inputs of this layer hold NaN or Inf; load the model in bfloat16 or float32")
    counted = quantized(consumers)
    x_P = gathered(stats.absmax_K.float(), channels_K)
    if not counted or not bool((x_P > 0).any()):
        return None
    largest = torch.stack([stack.weight_NK.float().abs().amax(0) for stack in stacked(counted)]).amax(0)
    w_P = gathered(largest, channels_K)

    def candidate(alpha: float) -> torch.Tensor:
        s_P = smoothed(x_P, w_P, alpha)
        return in_octaves(s_P) if octaves else s_P

    if options.alpha != "search":
        return candidate(options.alpha)
    if stats.gram_KK is None or stats.sample_MK is None:
        raise InputError("smoothquant with alpha search needs the mean of x xᵀ and a sample of this layer's inputs")
    gram, sample = stats.gram_KK.float(), stats.sample_MK
    x_MK = sample[:: max(1, -(-len(sample) // TOKENS))].float()
    best, least = None, _error(counted, torch.ones_like(stats.absmax_K.float()), gram, x_MK, stats.absmax_K)
    for alpha in ALPHAS:
        s_P = candidate(alpha)
        found = _error(counted, spread(s_P, channels_K), gram, x_MK, stats.absmax_K)
        if found < least:
            best, least = s_P, found
    return best


def smoothed(x_P: torch.Tensor, w_P: torch.Tensor, alpha: float) -> torch.Tensor:
    """The paper's scales of the largest |x| and |w| of each channel; 1 where no token fired."""
    s = x_P.clamp(min=LEAST) ** alpha / w_P.clamp(min=LEAST) ** (1 - alpha)
    return torch.where(x_P > 0, s.clamp(min=LEAST), torch.ones_like(s))


def _error(
    consumers: Sequence[Consumer], s_K: torch.Tensor, gram_KK: torch.Tensor, x_MK: torch.Tensor, absmax_K: torch.Tensor
) -> float:
    """What rounding weights and activations costs in the outputs, per token."""
    total = rounding_error(consumers, s_K, gram_KK, "mse")
    for stack in stacked(consumers):
        if stack.scheme.activations is not None and len(x_MK):
            total += _activation_error(stack, s_K, x_MK / s_K, absmax_K / s_K)
    return total


def _activation_error(stack: Stack, s_K: torch.Tensor, x_MK: torch.Tensor, absmax_K: torch.Tensor) -> float:
    """Mean over tokens of |(Q(x) - x) (W s)ᵀ|², rows counted by their share; x and absmax are those after the fold."""
    scheme = stack.scheme.activations
    assert scheme is not None
    missed = fake_quantize(x_MK, scheme, static_scale(absmax_K, scheme, stack.scale_dtype)) - x_MK
    outputs = (missed * s_K) @ stack.weight_NK.T
    return summation.total(outputs.square().sum(0) * stack.share_N) / len(x_MK)


def static_scale(absmax_K: torch.Tensor, scheme: TensorScheme, scale_dtype: torch.dtype) -> torch.Tensor | None:
    """The scale of an input whose channels reach `absmax_K`, float32 (1,); None for a scheme that needs none stored."""
    if scheme.dynamic and scheme.number != "nvfp4":
        return None
    found = numerics.get(scheme.number).qparams(absmax_K[None], scheme, scale_dtype=scale_dtype)
    scale = found.global_scale if scheme.number == "nvfp4" else found.scale_NG
    assert isinstance(scale, torch.Tensor)
    return scale.float().reshape(1)
