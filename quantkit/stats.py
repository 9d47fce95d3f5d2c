"""What is observed of a linear's input while calibration tokens run through the model. Padding never counts."""

from __future__ import annotations

import torch

from quantkit.numerics._activations import Magnitudes
from quantkit.types import Stats

KNOWN = frozenset({"gram", "energy", "absmax", "absmean", "magnitudes", "sample", "drift"})
SAMPLE = 4096  # tokens kept as they are
BLOCK = 2048  # columns of a Gram matrix that are summed at once; the products below its diagonal are not computed twice


class Observer:
    """Accumulates the statistics that an algorithm needs over one linear input of K channels.

    needs   names of the fields of Stats, of `KNOWN`
    stride  of the tokens seen, every how many-th is kept for "sample"
    """

    def __init__(self, needs: frozenset[str], k: int, device: torch.device | str, *, stride: int = 1) -> None:
        if unknown := needs - KNOWN:
            raise ValueError(f"no statistic is named {sorted(unknown)}")

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.needs = needs
        self.tokens = 0
        self.stride = stride
        self._gram = zeros(k, k) if "gram" in needs else None
        self._drift = zeros(k, k) if "drift" in needs else None
        self._energy = zeros(k) if "energy" in needs else None
        self._absmax = zeros(k) if "absmax" in needs else None
        self._absmean = zeros(k) if "absmean" in needs else None
        self._magnitudes = Magnitudes(device) if "magnitudes" in needs else None
        self._sample: list[torch.Tensor] | None = [] if "sample" in needs else None

    def update(self, x: torch.Tensor, mask: torch.Tensor | None = None, dense: torch.Tensor | None = None) -> None:
        """Adds x (..., K); `mask` (...) bool keeps only the tokens where it is True.

        dense  what the dense model has in the place of x, same shape; for "drift"
        Raises InputError when magnitudes are counted and x holds NaN or Inf.
        """
        x = _kept(x, mask)
        before, self.tokens = self.tokens, self.tokens + x.shape[0]
        if not x.shape[0]:
            return
        if self._sample is not None:
            kept = x[-before % self.stride :: self.stride]
            self._sample.append(kept[: SAMPLE - sum(len(s) for s in self._sample)].clone())
        if self._gram is not None:
            _add_gram(self._gram, x)
        if self._drift is not None:
            if dense is None:
                raise ValueError("drift needs what the dense model has in the place of x")
            _add_product(self._drift, _kept(dense, mask) - x, x)
        x = x.float()
        if self._energy is not None:
            self._energy += x.square().sum(0)
        if self._absmax is not None:
            torch.maximum(self._absmax, x.abs().amax(0), out=self._absmax)
        if self._absmean is not None:
            self._absmean += x.abs().sum(0)
        if self._magnitudes is not None:
            self._magnitudes.update(x)

    def result(self) -> Stats:
        """The statistics so far. Means are over the tokens that counted."""

        def mean(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t / max(self.tokens, 1)

        return Stats(
            self.tokens,
            gram_KK=mean(None if self._gram is None else _whole(self._gram)),
            absmax_K=self._absmax,
            magnitudes=None if self._magnitudes is None else self._magnitudes.counts,
            energy_K=mean(self._energy),
            absmean_K=mean(self._absmean),
            sample_MK=torch.cat(self._sample) if self._sample else None,
            drift_KK=mean(self._drift),
        )


def _kept(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(..., K) -> (M, K), only the tokens that the mask keeps."""
    x = x.reshape(-1, x.shape[-1])
    return x if mask is None or bool(mask.all()) else x[mask.reshape(-1)]


def _add_gram(total: torch.Tensor, x: torch.Tensor) -> None:
    """total += xᵀ x, of which only the upper triangle of blocks is certain to be right; `_whole` fills in the rest."""
    if not x.is_cuda or x.dtype != torch.bfloat16:
        total.addmm_(x.T.float(), x.float())
        return
    for start in range(0, x.shape[1], BLOCK):
        _add_product(total[start : start + BLOCK, start:], x[:, start : start + BLOCK], x[:, start:])


def _whole(gram: torch.Tensor) -> torch.Tensor:
    """The lower triangle of blocks from the upper one."""
    for start in range(BLOCK, gram.shape[0], BLOCK):
        gram[start : start + BLOCK, :start] = gram[:start, start : start + BLOCK].T
    return gram


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += aᵀ b, products exact and sums in float32: bfloat16 inputs need no float32 copies on a GPU."""
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        torch.addmm(total, a.T, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.T.float(), b.float())
