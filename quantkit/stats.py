"""What is observed of a linear's input while calibration tokens run through the model. Padding never counts."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from quantkit.numerics._activations import Magnitudes
from quantkit.types import Stats

KNOWN = frozenset({"gram", "energy", "absmax", "absmean", "magnitudes", "sample", "drift"})
SAMPLE = 4096  # tokens kept as they are
BLOCK = 2048  # rows of a strip of a Gram matrix, which is summed from its diagonal on: the rest is known by symmetry


class Observer:
    """Accumulates the statistics that an algorithm needs over one linear input of K channels.

    needs   names of the fields of Stats, of `KNOWN`
    stride  of the tokens seen, every how many-th is kept for "sample"
    strips  the strips of the Gram matrix that are summed here, by their first row; by default all, which `result` needs
    """

    def __init__(
        self,
        needs: frozenset[str],
        k: int,
        device: torch.device | str,
        *,
        stride: int = 1,
        strips: Iterable[int] | None = None,
    ) -> None:
        if unknown := needs - KNOWN:
            raise ValueError(f"no statistic is named {sorted(unknown)}")

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.needs = needs
        self.tokens, self.channels = 0, k
        self.stride = stride
        starts = () if "gram" not in needs else strips_of(k) if strips is None else strips
        self.gram = {start: zeros(min(BLOCK, k - start), k - start) for start in starts}
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
        x = counted(x, mask)
        before, self.tokens = self.tokens, self.tokens + x.shape[0]
        if not x.shape[0]:
            return
        if self._sample is not None:
            kept = x[-before % self.stride :: self.stride]
            self._sample.append(kept[: SAMPLE - sum(len(s) for s in self._sample)].clone())
        for start, strip in self.gram.items():
            _add_product(strip, x[:, start : start + BLOCK], x[:, start:])
        if self._drift is not None:
            if dense is None:
                raise ValueError("drift needs what the dense model has in the place of x")
            _add_product(self._drift, counted(dense, mask) - x, x)
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
            gram_KK=self._whole().div_(max(self.tokens, 1)) if "gram" in self.needs else None,
            absmax_K=self._absmax,
            magnitudes=None if self._magnitudes is None else self._magnitudes.counts,
            energy_K=mean(self._energy),
            absmean_K=mean(self._absmean),
            sample_MK=torch.cat(self._sample) if self._sample else None,
            drift_KK=mean(self._drift),
        )

    def _whole(self) -> torch.Tensor:
        """The sum of x xᵀ (K, K), from its strips."""
        whole = torch.empty(self.channels, self.channels, device=self.gram[0].device)
        for start, strip in self.gram.items():
            stop = start + strip.shape[0]
            whole[start:stop, start:] = strip
            whole[stop:, start:stop] = strip[:, strip.shape[0] :].T
        return whole


def strips_of(k: int) -> range:
    """The first rows of the strips of a Gram matrix (K, K)."""
    return range(0, k, BLOCK)


def counted(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(..., K) -> (M, K), only the tokens that the mask keeps."""
    x = x.reshape(-1, x.shape[-1])
    return x if mask is None or bool(mask.all()) else x[mask.reshape(-1)]


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += aᵀ b, products exact and sums in float32: bfloat16 inputs need no float32 copies on a GPU."""
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        torch.addmm(total, a.T, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.T.float(), b.float())
