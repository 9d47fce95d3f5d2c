"""What is observed of a linear's input while calibration tokens run through the model. Padding never counts."""

from __future__ import annotations

import torch

from quantkit.numerics._activations import Magnitudes
from quantkit.types import Stats


class Observer:
    """Accumulates the statistics that an algorithm NEEDS over one linear input of K channels.

    needs  any of "gram" (mean of x xᵀ, float32), "absmax" (largest |x| a channel) and "magnitudes" (how often each |x|)
    """

    def __init__(self, needs: frozenset[str], k: int, device: torch.device | str) -> None:
        unknown = needs - {"gram", "absmax", "magnitudes"}
        if unknown:
            raise ValueError(f"no statistic is named {sorted(unknown)}")
        self.tokens = 0
        self._sum = torch.zeros(k, k, dtype=torch.float32, device=device) if "gram" in needs else None
        self._absmax = torch.zeros(k, dtype=torch.float32, device=device) if "absmax" in needs else None
        self._magnitudes = Magnitudes(device) if "magnitudes" in needs else None

    def update(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Adds x (..., K); `mask` (...) bool keeps only the tokens where it is True.

        Raises InputError when magnitudes are counted and x holds NaN or Inf.
        """
        x = x.reshape(-1, x.shape[-1])
        if mask is not None:
            x = x[mask.reshape(-1)]
        self.tokens += x.shape[0]
        if not x.shape[0]:
            return
        x = x.float()
        if self._sum is not None:
            self._sum.addmm_(x.T, x)
        if self._absmax is not None:
            torch.maximum(self._absmax, x.abs().amax(0), out=self._absmax)
        if self._magnitudes is not None:
            self._magnitudes.update(x)

    def result(self) -> Stats:
        """The statistics so far. Means are over the tokens that counted."""
        gram = None if self._sum is None else self._sum / max(self.tokens, 1)
        return Stats(self.tokens, gram, self._absmax, None if self._magnitudes is None else self._magnitudes.counts)
