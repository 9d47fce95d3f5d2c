"""Transforms: rewrites of the weights before they are rounded, which leave the model's function as it is.

One file a transform; the file's name is what a recipe lists under `transforms:`. A scaling transform (awq, smoothquant)
chooses a number s_j for each channel j of a link: the producer's channel is divided by it, column j of every consumer
multiplied. This file holds what such transforms share: a consumer, and what its rounding costs.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from quantkit import numerics, summation
from quantkit.errors import InputError
from quantkit.types import Scheme, TensorScheme
from quantkit_kernels import scales as kernels
from quantkit_kernels.gptq import available

# Weights judged at once: what fits a GPU well, and what keeps a CPU's memory small.
ELEMENTS = {"cuda": 1 << 28}


def names() -> list[str]:
    """The transforms there are, found by listing this folder."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))


def get(name: str) -> ModuleType:
    """The module of a transform: Options, needs, and scales for one that scales. Raises InputError with known names."""
    if name not in names():
        raise InputError(f"unknown transform {name!r}; known: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


@dataclass(frozen=True)
class Consumer:
    """A linear that reads the scaled channels.

    weight_NK    its weight, float32
    scheme       how it will be quantized; None when it stays dense, as routers do: it is compensated, not counted
    scale_dtype  dtype in which its scales will be stored
    share        of all tokens, how many reach it: 1, or less for an expert. Its error counts so often
    """

    name: str
    weight_NK: torch.Tensor
    scheme: Scheme | None
    scale_dtype: torch.dtype
    share: float = 1.0


@dataclass(frozen=True)
class Stack:
    """Weights of one scheme on top of each other: what is judged at once. share_N: of each row, as in Consumer."""

    weight_NK: torch.Tensor
    scheme: Scheme
    scale_dtype: torch.dtype
    share_N: torch.Tensor


def quantized(consumers: Sequence[Consumer]) -> list[Consumer]:
    """The consumers that count: those that will be rounded, and that tokens reach."""
    return [c for c in consumers if c.scheme is not None and c.share > 0]


def stacked(consumers: Sequence[Consumer]) -> Iterator[Stack]:
    """The quantized consumers, as many of one scheme together as fit. One at a time, to spare memory."""
    alike: dict[tuple[Scheme, torch.dtype], list[Consumer]] = {}
    for c in consumers:
        if c.scheme is not None:
            alike.setdefault((c.scheme, c.scale_dtype), []).append(c)
    for (scheme, dtype), members in alike.items():
        # A tile of rows must not reach from one weight into the next; those are judged alone.
        alone = scheme.weights.strategy == "block"
        limit = ELEMENTS.get(members[0].weight_NK.device.type, 1 << 24)
        batch: list[Consumer] = []
        for c in members:
            if batch and (alone or sum(b.weight_NK.numel() for b in [*batch, c]) > limit):
                yield _stack(batch, scheme, dtype)
                batch = []
            batch.append(c)
        yield _stack(batch, scheme, dtype)


def _stack(batch: Sequence[Consumer], scheme: Scheme, dtype: torch.dtype) -> Stack:
    weights = [c.weight_NK for c in batch]
    shares = [torch.full((len(c.weight_NK),), c.share, device=c.weight_NK.device) for c in batch]
    return Stack(weights[0] if len(weights) == 1 else torch.cat(weights), scheme, dtype, torch.cat(shares))


def rounding_error(consumers: Sequence[Consumer], s_K: torch.Tensor, gram_KK: torch.Tensor, search: str) -> float:
    """What rounding costs in the outputs, per token, if columns are first multiplied by s.

    sum over rows of share * dW H dWᵀ with dW = Q(W s) / s - W: the mean of |dW x|² over the tokens whose mean of x xᵀ
    is H. The form is AWQ's objective (arXiv 2306.00978) for linear layers, exactly, without the tokens.
    search  how the number format chooses its scales: "absmax" or "mse"
    """
    found = 0.0
    for stack in stacked(consumers):
        delta = _difference(stack, s_K, search)
        found += summation.total(output_error(delta, gram_KK) * stack.share_N)
    return found


def _difference(stack: Stack, s_K: torch.Tensor, search: str) -> torch.Tensor:
    """Q(W s) / s - W (N, K): float32, but bfloat16 where a kernel makes it, for integers on a GPU."""
    scheme, scaled = stack.scheme.weights, stack.weight_NK * s_K
    one_each = scheme.strategy in ("group", "channel") and scheme.number.startswith("int")
    if not one_each or scaled.dtype != torch.float32 or not available(scaled.device):
        return rounded(scaled, scheme, stack.scale_dtype, search).div_(s_K).sub_(stack.weight_NK)
    span = scaled.shape[1] // numerics.groups(scheme, scaled.shape[1])
    q = numerics.get(scheme.number).qparams(scaled, scheme, scale_dtype=stack.scale_dtype, search=search)
    return kernels.rounding_difference(
        scaled,
        s_K.float(),
        q.scale_NG,
        q.zero_NG,
        group_size=span,
        bits=int(scheme.number[3:]),
        dtype=torch.bfloat16,
    )


def rounded(w_NK: torch.Tensor, scheme: TensorScheme, scale_dtype: torch.dtype, search: str) -> torch.Tensor:
    """What the codes nearest to a weight stand for: a new float32 tensor (N, K)."""
    qparams = numerics.get(scheme.number).qparams(w_NK, scheme, scale_dtype=scale_dtype, search=search)
    return numerics.dequantize(numerics.quantize(w_NK, qparams, scheme))


def output_error(delta_NK: torch.Tensor, gram_KK: torch.Tensor) -> torch.Tensor:
    """The mean of (delta x)² over tokens with the mean H of x xᵀ, for each output: (N,) in the dtype of `delta`.

    On a GPU the product is of bfloat16 with float32 sums, twelve times as fast as float32: rounding to nearest makes
    differences of random signs, so nothing cancels, and the sum over a layer moves by less than one in a thousand.
    """
    if delta_NK.is_cuda and delta_NK.dtype != torch.float64:
        product = torch.mm(delta_NK.bfloat16(), gram_KK.bfloat16(), out_dtype=torch.float32)
    else:
        product = delta_NK @ gram_KK
    return product.mul_(delta_NK).sum(1)


def gathered(x_K: torch.Tensor, channels_K: torch.Tensor | None) -> torch.Tensor:
    """A figure of each consumer column (K,) -> of each producer channel (P,): the largest of the columns that read it.

    channels_K  the channel that each column reads, as `Link.channels` gives it; None when it is its own
    """
    if channels_K is None:
        return x_K
    channels = channels_K.to(x_K.device)
    return x_K.new_zeros(int(channels.max()) + 1).scatter_reduce_(0, channels, x_K, "amax", include_self=False)


def in_octaves(s_P: torch.Tensor) -> torch.Tensor:
    """The power of two nearest to each scale, by its logarithm."""
    return s_P.log2().round().exp2()


def spread(s_P: torch.Tensor, channels_K: torch.Tensor | None) -> torch.Tensor:
    """The scale of each producer channel (P,) -> of each consumer column (K,)."""
    return s_P if channels_K is None else s_P[channels_K.to(s_P.device)]
