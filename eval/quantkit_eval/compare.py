"""How far a quantized model is from its original, measured on the same windows.

    KL          sum_v p(v) log(p(v) / q(v)) in nats, p the original's next-token distribution, q the quantized one's;
                at every position of every window. 0 = the same; .01-.03 is a good 4-bit 8B model, smaller lose more
    perplexity  exp(mean negative log-likelihood of tokens 2 to L of each window)
    top-1       share of positions at which both models find the same token likeliest
Logarithms of the softmax are float32 (the models may be bfloat16), sums over positions float64.
The figures of each window are kept too: windows are the independent samples, tokens within one are not.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch.nn.functional import log_softmax

from quantkit.errors import GateError, InputError

LOGITS_BYTES = 1 << 29  # a batch's logits, float32, of one model: decides the batch size
CHUNK_BYTES = 1 << 26  # rows of the vocabulary judged at once, float32: about five such buffers are alive
P99 = 0.99


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured. Tuples have one figure a window, in the order of the windows; nats throughout.

    kl_p99, kl_max   99th percentile (nearest rank) and maximum over positions
    kl_stderr        standard error of `kl` over windows; None with a single window
    """

    tokens: int
    windows: int
    perplexity_original: float
    perplexity: float
    perplexity_ratio: float
    kl: float
    kl_stderr: float | None
    kl_p99: float
    kl_max: float
    top1_agreement: float
    kl_by_window: tuple[float, ...]
    top1_by_window: tuple[float, ...]
    nll_by_window_original: tuple[float, ...]
    nll_by_window: tuple[float, ...]

    def to_dict(self, *, by_window: bool = False) -> dict[str, Any]:
        """Plain numbers for JSON; with `by_window` also the lists."""
        figures = asdict(self)
        if not by_window:
            return {key: value for key, value in figures.items() if not isinstance(value, tuple)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in figures.items()}


@dataclass(frozen=True)
class Tokens:
    """What was measured at each position of windows (W, L), on the CPU.

    kl_WL      float64 nats
    nll_*      (W, L - 1) float64 nats, of tokens 2 to L
    agree_WL   bool: both models find the same token likeliest
    """

    kl_WL: torch.Tensor
    nll_original: torch.Tensor
    nll: torch.Tensor
    agree_WL: torch.Tensor

    def plus(self, other: Tokens) -> Tokens:
        """Both samples of windows, of one length, as one."""
        return Tokens(*(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))


def compare(
    original: torch.nn.Module,
    quantized: torch.nn.Module,
    windows_WL: torch.Tensor,
    *,
    batch_size: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """The distance between two models on the windows; see `measure`."""
    return summary(measure(original, quantized, windows_WL, batch_size=batch_size, on_progress=on_progress))


def measure(
    original: torch.nn.Module,
    quantized: torch.nn.Module,
    windows_WL: torch.Tensor,
    *,
    batch_size: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tokens:
    """Runs both models over the windows, batch by batch, and measures the distance between them at each token.

    original, quantized   causal language models of transformers with one vocabulary, on any device or devices
    windows_WL            int64 (W, L) token ids, without padding
    batch_size            windows at once; None chooses 1 to 4 by the size of the vocabulary
    on_progress           called with (windows done, windows) after each batch
    Raises InputError for windows that do not fit the models, or NaN or Inf from the original;
    GateError for NaN or Inf from the quantized model.
    """
    vocabulary = _check(original, "original", windows_WL)
    if _check(quantized, "quantized", windows_WL) != vocabulary:
        raise InputError(
            f"the two models have different vocabularies: original {vocabulary}, quantized {_vocabulary(quantized)}; "
            "compare a checkpoint with the model that it was made from"
        )
    size = batch_size or _batch_size(windows_WL.shape[1], vocabulary)
    done = []
    with _evaluating(original), _evaluating(quantized):
        for start, batch in _batches(windows_WL, size):
            logits_p = _logits(original, "original", batch, start)
            logits_q = _logits(quantized, "quantized", batch, start).to(logits_p.device)
            done.append(_measure(logits_p, logits_q, batch.to(logits_p.device)))
            del logits_p, logits_q
            if on_progress:
                on_progress(start + len(batch), len(windows_WL))
    return functools.reduce(Tokens.plus, done)


def perplexity(
    model: torch.nn.Module,
    windows_WL: torch.Tensor,
    *,
    batch_size: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> float:
    """Perplexity of one model on windows (W, L). Raises InputError as `compare` does, also for NaN or Inf logits."""
    size = batch_size or _batch_size(windows_WL.shape[-1], _check(model, "original", windows_WL))
    nll = []
    with _evaluating(model):
        for start, batch in _batches(windows_WL, size):
            logits = _logits(model, "original", batch, start)
            targets = batch.to(logits.device)
            rows = zip(*_row_chunks(logits[:, :-1], targets[:, 1:]), strict=True)
            nll.append(torch.cat([_nll(log_softmax(x.float(), -1), t) for x, t in rows]).view(len(batch), -1))
            if on_progress:
                on_progress(start + len(batch), len(windows_WL))
    return _exp(torch.cat(nll).mean().item())


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _check(model: Any, which: str, windows_WL: torch.Tensor) -> int:
    """Refuses windows that the model cannot run. Returns the size of its vocabulary."""
    if windows_WL.ndim != 2 or windows_WL.dtype != torch.int64 or windows_WL.shape[0] < 1 or windows_WL.shape[1] < 2:
        raise InputError(
            f"windows must be int64 (W, L) with at least one window of two tokens; got {windows_WL.dtype} "
            f"{tuple(windows_WL.shape)}"
        )
    vocabulary = _vocabulary(model)
    largest = int(windows_WL.max())
    if largest >= vocabulary or int(windows_WL.min()) < 0:
        raise InputError(
            f"token id {largest} is outside the {which} model's vocabulary of {vocabulary}; wrong tokenizer?"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and windows_WL.shape[1] > positions:
        raise InputError(
            f"windows of {windows_WL.shape[1]} tokens are longer than the {which} model's {positions} positions; "
            "set a smaller length"
        )
    return vocabulary


def _batch_size(length: int, vocabulary: int) -> int:
    return max(1, min(4, LOGITS_BYTES // (length * vocabulary * 4)))


def working_bytes(length: int, vocabulary: int) -> int:
    """What comparing takes beside the models: both batches of logits, and the rows that are judged."""
    return 2 * _batch_size(length, vocabulary) * length * vocabulary * 4 + 5 * CHUNK_BYTES


def _batches(windows_WL: torch.Tensor, size: int) -> Iterator[tuple[int, torch.Tensor]]:
    for start in range(0, len(windows_WL), size):
        yield start, windows_WL[start : start + size]


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off, no gradients; the model is as it was afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _logits(model: Any, which: str, batch_BL: torch.Tensor, start: int) -> torch.Tensor:
    """The model's logits (B, L, V) in its own dtype, all finite. `start` is the first window's number, for messages."""
    device = model.get_input_embeddings().weight.device
    logits = model(input_ids=batch_BL.to(device), use_cache=False).logits
    finite = torch.isfinite(logits.sum(-1, dtype=torch.float32))
    if not finite.all():
        # A sum of finite numbers may overflow: look again, row by row, before the model is accused.
        bad = [row for row in (~finite).nonzero().tolist() if not torch.isfinite(logits[row[0], row[1]]).all()]
        if bad:
            message = (
                f"the {which} model's logits are NaN or Inf at window {start + bad[0][0]}, position {bad[0][1]}; "
                f"its dtype is {str(logits.dtype).removeprefix('torch.')}"
            )
            if which == "quantized":
                raise GateError(f"{message}. Look for NaN or Inf in its scales, or load it in bfloat16 or float32")
            raise InputError(f"{message}. The original itself is broken, or overflows: load it in bfloat16 or float32")
    return logits


def _row_chunks(logits_BLV: torch.Tensor, *others_BL: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Tensors over (B, L) as lists of runs of positions, few enough that their float32 vocabulary fits CHUNK_BYTES."""
    rows = max(1, CHUNK_BYTES // (logits_BLV.shape[-1] * 4))
    return [logits_BLV.flatten(0, 1).split(rows), *(other.flatten().split(rows) for other in others_BL)]


def _nll(logp_RV: torch.Tensor, targets_R: torch.Tensor) -> torch.Tensor:
    return -logp_RV.gather(1, targets_R[:, None])[:, 0].double().cpu()


def _measure(logits_p: torch.Tensor, logits_q: torch.Tensor, ids_BL: torch.Tensor) -> Tokens:
    """Of the logits (B, L, V) of both models."""
    targets = ids_BL.roll(-1, 1)  # the last position has no next token: its column of NLL is cut off below
    kl, nll_p, nll_q, same = [], [], [], []
    chunks_p, chunks_t = _row_chunks(logits_p, targets)
    (chunks_q,) = _row_chunks(logits_q)
    for p, q, t in zip(chunks_p, chunks_q, chunks_t, strict=True):
        same.append((p.argmax(-1) == q.argmax(-1)).cpu())
        logp, logq = log_softmax(p.float(), -1), log_softmax(q.float(), -1)
        nll_p.append(_nll(logp, t))
        nll_q.append(_nll(logq, t))
        kl.append(logp.exp().mul_(logp.sub_(logq)).sum(-1, dtype=torch.float64).cpu())
    shape = ids_BL.shape
    return Tokens(
        torch.cat(kl).view(shape),
        torch.cat(nll_p).view(shape)[:, :-1],
        torch.cat(nll_q).view(shape)[:, :-1],
        torch.cat(same).view(shape),
    )


def summary(tokens: Tokens) -> Comparison:
    """The figures of all windows together."""
    kl_WL, nll_p, nll_q = tokens.kl_WL, tokens.nll_original, tokens.nll
    top1 = tokens.agree_WL.double().mean(1)
    kl_by_window = kl_WL.mean(1).tolist()
    count = len(kl_by_window)
    mean_p, mean_q = nll_p.mean().item(), nll_q.mean().item()
    rank = math.ceil(P99 * kl_WL.numel())
    return Comparison(
        tokens=kl_WL.numel(),
        windows=count,
        perplexity_original=_exp(mean_p),
        perplexity=_exp(mean_q),
        perplexity_ratio=_exp(mean_q - mean_p),
        kl=kl_WL.mean().item(),
        kl_stderr=statistics.stdev(kl_by_window) / math.sqrt(count) if count > 1 else None,
        kl_p99=kl_WL.flatten().kthvalue(rank).values.item(),
        kl_max=kl_WL.max().item(),
        top1_agreement=top1.mean().item(),
        kl_by_window=tuple(kl_by_window),
        top1_by_window=tuple(top1.tolist()),
        nll_by_window_original=tuple(nll_p.mean(1).tolist()),
        nll_by_window=tuple(nll_q.mean(1).tolist()),
    )


def _exp(x: float) -> float:
    """exp that gives infinity where the float ends: a ruined model's perplexity is a figure too."""
    return math.exp(x) if x < 709 else math.inf
