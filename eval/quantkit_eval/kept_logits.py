"""Two models compared one after the other: what is kept on disk of the original's logits, and what that leaves open.

Of each position, p the original's next-token distribution, q the quantized one's, S the `kept` likeliest tokens of p:

    kept      log p and ids of S; log of the rest's mass m; the rest's sum p log p; log p of the token that follows;
              the likeliest token; `draws` tokens drawn from the rest by p, with log p
    at least  sum_S p log(p/q) + m log(m/Q), Q the rest's mass in q: the KL divergence of the coarsened distributions,
              which by the data-processing inequality is never above that of the whole
    at most   for r = p/m on the rest and any b > 0, KL(r || q^-b/Z) >= 0 gives
              -sum r log q <= (sum r log r + log sum_rest q^-b) / b; the least over some b
    figure    "at least" plus m KL(r || s), s = q/Q on the rest, from the draws: the mean of s/r - 1 - log(s/r), which
              is unbiased and never negative (http://joschu.net/blog/kl-approx.html). Its error is one more part of
              the spread over windows, so that intervals and gates hold as they are

Perplexity and top-1 agreement lose nothing. Each file is deleted when it has been read; nothing is ever resumed.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import log_softmax

from quantkit.errors import InputError, MissingError
from quantkit_eval import compare
from quantkit_eval.compare import Tokens

KEPT, DRAWS = 1024, 32
TILTS = (0.5, 1.0, 2.0)  # the b of "at most"
ROW_BYTES = 8  # of a token that is kept: a float32 and an int32
SEED = 0


@dataclass(frozen=True)
class Bounds:
    """The mean KL divergence in nats, over all positions, and how sure it is whatever the text.

    at_least, at_most  certain, up to the rounding of float32
    drawn, error       the part of the figure that comes from draws, and that part's standard error
    mass               mean probability of what is not kept, in the original
    """

    at_least: float
    at_most: float
    drawn: float
    error: float
    mass: float
    kept: int
    draws: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"KL divergence between {self.at_least:.5g} and {self.at_most:.5g} for certain, from the {self.kept} "
            f"likeliest tokens and the rest's mass ({self.mass:.2g}); the figure has {self.drawn:.2g} ± "
            f"{self.error:.1g} of {self.draws} draws of the rest"
        )


@dataclass(frozen=True)
class Spread:
    """Of each position (W, L), float64 on the CPU: bounds of its KL divergence, variance of the part drawn, mass."""

    low_WL: torch.Tensor
    high_WL: torch.Tensor
    drawn_WL: torch.Tensor
    variance_WL: torch.Tensor
    mass_WL: torch.Tensor

    def plus(self, other: Spread) -> Spread:
        """Both samples of windows as one."""
        return Spread(*(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))

    def bounds(self, kept: int = KEPT, draws: int = DRAWS) -> Bounds:
        """Of all positions together."""
        error = math.sqrt(self.variance_WL.sum().item()) / self.variance_WL.numel()
        low, high, drawn, mass = (x.mean().item() for x in (self.low_WL, self.high_WL, self.drawn_WL, self.mass_WL))
        return Bounds(low, high, drawn, error, mass, kept, draws)


@dataclass
class KeptLogits:
    """Batches of windows that the original has answered and the quantized model has not, a file each in `folder`."""

    folder: Path
    kept: int = KEPT
    draws: int = DRAWS
    _written: int = field(default=0, init=False)
    _waiting: list[tuple[Path, int, torch.Tensor]] = field(default_factory=list, init=False)

    def add(
        self,
        original: torch.nn.Module,
        windows_WL: torch.Tensor,
        *,
        batch_size: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Runs the original over windows and keeps what is needed of it. Raises as `compare.measure` does.

        MissingError where the disk has no room for it.
        """
        vocabulary = compare._check(original, "original", windows_WL)
        _check_room(self.folder, windows_WL.numel() * ROW_BYTES * (min(self.kept, vocabulary) + self.draws + 8))
        size = batch_size or compare._batch_size(windows_WL.shape[1], vocabulary)
        with compare._evaluating(original):
            for start, batch in compare._batches(windows_WL, size):
                logits = compare._logits(original, "original", batch, start)
                found = self._kept(logits, batch.to(logits.device))
                del logits
                file = self.folder / f"{self._written:06d}.safetensors"
                save_file(found, file)
                self._waiting.append((file, vocabulary, batch))
                self._written += 1
                if on_progress:
                    on_progress(start + len(batch), len(windows_WL))

    def measure(
        self, quantized: torch.nn.Module, *, on_progress: Callable[[int, int], None] | None = None
    ) -> tuple[Tokens, Spread]:
        """Runs the quantized model over the windows added since the last call; their files are gone afterwards.

        Raises as `compare.measure` does.
        """
        windows = sum(len(batch) for _, _, batch in self._waiting)
        tokens, spreads, done = [], [], 0
        with compare._evaluating(quantized):
            while self._waiting:
                file, vocabulary, batch = self._waiting.pop(0)
                if compare._check(quantized, "quantized", batch) != vocabulary:
                    raise InputError(
                        f"the two models have different vocabularies: original {vocabulary}, quantized "
                        f"{compare._vocabulary(quantized)}; compare a checkpoint with the model that it was made from"
                    )
                logits = compare._logits(quantized, "quantized", batch, done)
                one = _against(load_file(file, device=str(logits.device)), logits, batch.to(logits.device))
                del logits
                tokens.append(one[0])
                spreads.append(one[1])
                file.unlink()
                done += len(batch)
                if on_progress:
                    on_progress(done, windows)
        return functools.reduce(Tokens.plus, tokens), functools.reduce(Spread.plus, spreads)

    def _kept(self, logits_BLV: torch.Tensor, ids_BL: torch.Tensor) -> dict[str, torch.Tensor]:
        generator = torch.Generator(logits_BLV.device).manual_seed(SEED + self._written)
        chunks = compare._row_chunks(logits_BLV, ids_BL.roll(-1, 1))
        parts = [self._rows(x, t, generator) for x, t in zip(*chunks, strict=True)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _rows(self, x_RV: torch.Tensor, targets_R: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        logp = log_softmax(x_RV.float(), -1)
        values, ids = logp.topk(min(self.kept, logp.shape[1]), sorted=False)
        rest = logp.scatter(1, ids, -math.inf)
        p = rest.exp()
        whole = p.sum(-1, keepdim=True) > 0
        # A row without a rest still needs something to draw from; its mass of 0 takes it out again.
        drawn = torch.multinomial(torch.where(whole, p, 1.0), self.draws, replacement=True, generator=generator)
        found = {
            "values": values,
            "ids": ids.int(),
            "drawn_values": logp.gather(1, drawn),
            "drawn_ids": drawn.int(),
            "log_mass": rest.double().logsumexp(-1),
            "entropy": torch.where(p > 0, p * logp, 0.0).sum(-1, dtype=torch.float64),
            "likeliest": x_RV.argmax(-1).int(),
            "nll": compare._nll(logp, targets_R),
        }
        return {name: value.contiguous().cpu() for name, value in found.items()}


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise MissingError(
            f"{folder.parent}: the original's logits take {size / 2**30:.1f} GiB for as long as validation lasts, "
            f"{free / 2**30:.1f} GiB are free; make room, or set fewer or shorter windows in validate.perplexity"
        )


def _against(kept: dict[str, torch.Tensor], logits_q: torch.Tensor, ids_BL: torch.Tensor) -> tuple[Tokens, Spread]:
    """Of a batch's logits (B, L, V) and what was kept of the original on it, row by row."""
    chunks, targets = compare._row_chunks(logits_q, ids_BL.roll(-1, 1))
    rows = [len(x) for x in chunks]
    parts = [dict(zip(kept, row, strict=True)) for row in zip(*(kept[n].split(rows) for n in kept), strict=True)]
    found, nll, same = [], [], []
    for x, t, part in zip(chunks, targets, parts, strict=True):
        logq = log_softmax(x.float(), -1)
        nll.append(compare._nll(logq, t))
        same.append((x.argmax(-1) == part["likeliest"]).cpu())
        found.append(_divergence(part, logq))
    low, high, drawn, variance, mass = (torch.cat(x).view(ids_BL.shape) for x in zip(*found, strict=True))
    tokens = Tokens(
        low + drawn,
        kept["nll"].cpu().view(ids_BL.shape)[:, :-1],
        torch.cat(nll).view(ids_BL.shape)[:, :-1],
        torch.cat(same).view(ids_BL.shape),
    )
    return tokens, Spread(low, high, drawn, variance, mass)


def _divergence(kept: dict[str, torch.Tensor], logq_RV: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """low, high, drawn, variance of drawn, mass: (R,) float64 on the CPU, as the module says."""
    ids, log_m = kept["ids"].long(), kept["log_mass"]
    top = (kept["values"].exp() * (kept["values"] - logq_RV.gather(1, ids))).sum(-1, dtype=torch.float64)
    drawn_q = logq_RV.gather(1, kept["drawn_ids"].long()).double()
    rest = logq_RV.scatter(1, ids, -math.inf).double()
    log_q, mass = rest.logsumexp(-1), log_m.exp()
    some = mass > 0
    low = top + torch.where(some, mass * (log_m - log_q), 0.0)
    # log(s/r) of each draw; rare draws far above 0 are a ruined model's, whose figure is no closer than its draws
    ratio = (drawn_q - log_q[:, None]) - (kept["drawn_values"].double() - log_m[:, None])
    each = torch.where(some[:, None], mass[:, None] * (ratio.expm1() - ratio), 0.0)
    r_log_r = kept["entropy"] / mass - log_m
    masked = torch.where(rest.isfinite(), rest, math.inf)
    cross = torch.stack([(r_log_r + (-b * masked).logsumexp(-1)) / b for b in TILTS]).amin(0)
    high = top + torch.where(some, kept["entropy"] + mass * cross, 0.0)
    figures = (low, torch.maximum(high, low), each.mean(1), each.var(1) / each.shape[1], mass)
    return tuple(x.cpu() for x in figures)
