"""Through which pairs of layers a scale per channel can be folded: found by following every channel, not by names.

A layer P (a norm, or a linear) makes channels; if all that ever happens to channel j is linear, up to the linears that
read it, then P's channel j may be divided by s_j and those linears' column j multiplied by s_j: same function.

    norm -> q, k, v     norm -> gate, up, router, shared experts     v -> o     up -> down     q_a_norm -> q_b

One run on the meta device finds them (quantkit/channels.py). A link that is missing costs accuracy, a link that is
wrong breaks the model: what is not understood gets no link.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from quantkit.blocks import Structure, dry_run
from quantkit.channels import Trace, Unseen, Use


@dataclass(frozen=True)
class Link:
    """A producer and all that reads its channels. Names are names in memory.

    rows       (start, size): the channels are `size` outputs of the producer, from `start` on; all of them but for
               fused linears such as qkv, where they are v's
    consumers  modules whose `weight` (N, K) has one column for each channel; a router is one of them
    head_dim   channels of a head, where attention lies between; else 0
    repeat     how many heads of a consumer, one after the other, read the same head of the producer; 1 without groups
    spacing    rows from one head of the producer to the next, where they are not head_dim apart; else 0
    """

    block: str
    producer: str
    kind: Literal["norm", "linear"]
    rows: tuple[int, int]
    consumers: tuple[str, ...]
    head_dim: int = 0
    repeat: int = 1
    spacing: int = 0

    def spread(self, s_P: torch.Tensor) -> torch.Tensor:
        """A value for each of the P channels -> one for each of the consumers' K columns: s[h // repeat, c]."""
        return s_P if self.repeat == 1 else s_P.view(-1, self.head_dim).repeat_interleave(self.repeat, 0).flatten()

    def channels(self) -> torch.Tensor | None:
        """The channel that each of the consumers' columns reads, int64 (K,); None when it is its own."""
        return None if self.repeat == 1 else self.spread(torch.arange(self.rows[1]))

    def row_numbers(self) -> torch.Tensor:
        """The producer's output for each channel, int64 (P,)."""
        start, size = self.rows
        if not self.spacing:
            return torch.arange(start, start + size)
        heads = torch.arange(size // self.head_dim) * self.spacing
        return (start + heads[:, None] + torch.arange(self.head_dim)).flatten()


def find(model: nn.Module, structure: Structure) -> tuple[tuple[Link, ...], tuple[str, ...]]:
    """The links inside each block, in order of use, and warnings. `model` is only read; it may be on meta.

    A link never reaches from one block into another, so the last norm, which feeds lm_head, is in none.
    """
    traces: list[Trace] = []
    tied = _tied(model)  # moving a copy to meta may untie it

    @contextmanager
    def watching(ghost: nn.Module) -> Iterator[None]:
        traces.append(Trace(ghost, [block.name for block in structure.blocks], _is_norm, tied))
        with traces[-1].hooked(), traces[-1], Unseen():
            yield

    if problem := dry_run(model, watching):
        return (), (f"which scales can be folded could not be found out ({problem}); none will be",)
    links = _links(traces[-1])
    return tuple(link for block in structure.blocks for link in links if link.block == block.name), ()


def norm_offset(norm: nn.Module) -> float | None:
    """c, for a norm whose output is (c + weight) * f(x) + bias: 0 for most, 1 for Gemma's; None when it is neither.

    Found out by running a copy with random weights, and with weights that should halve or double each channel.
    """
    parameters = dict(norm.named_parameters())
    weight = parameters.get("weight")
    if weight is None or weight.ndim != 1 or not parameters.keys() <= {"weight", "bias"}:
        return None
    if any(p.shape != weight.shape for p in parameters.values()) or any(True for _ in norm.children()):
        return None
    k = weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    x, w, b = torch.randn(3, k, generator=generator)[:, None].expand(3, 2, k).clone().unbind()
    x[1] *= 3
    s = 2.0 ** torch.randint(-1, 2, (k,), generator=generator)
    trial = copy.deepcopy(norm).to_empty(device="cpu").float()

    def run(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        for name, parameter in trial.named_parameters():
            parameter.copy_(weight if name == "weight" else bias)
        return trial(x)

    with torch.no_grad():
        try:
            plain = run(w[0], b[0])
            for offset in (0.0, 1.0):
                scaled = run((w[0] + offset) * s - offset, b[0] * s)
                if plain.shape == x.shape and torch.allclose(scaled, plain * s, rtol=1e-4, atol=1e-4):
                    return offset
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError):
            pass  # not a module that maps one tensor to another
    return None


def _is_norm(module: nn.Module) -> bool:
    return not isinstance(module, nn.Linear | nn.Embedding) and norm_offset(module) is not None


def _tied(model: nn.Module) -> set[str]:
    """Modules that share a parameter with another one."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _links(trace: Trace) -> list[Link]:
    """What can be folded, by first use."""
    consumers: dict[Use, list[str]] = {}
    lost: list[Use] = []
    for name, uses in trace.uses.items():
        only = next(iter(uses)) if len(uses) == 1 and name not in trace.exposed else None
        if only is not None:
            consumers.setdefault(only, []).append(name)
        else:  # its columns would have to be scaled in more than one way, or are needed as they are
            lost += [use for use in uses if use is not None]
    readers: dict[str, torch.Tensor] = {}
    for use in consumers:
        readers.setdefault(use.producer, torch.zeros(trace.size[use.producer]))[use.row().unique()] += 1
    lost += [use for use in consumers if bool((readers[use.producer][use.row()] > 1).any())]
    escaped = trace.escaped.clone()
    for use in lost:
        escaped[trace.first[use.producer] + use.row()] = True
    found = []
    for use, names in consumers.items():
        p, pattern = use.producer, _pattern(use.row(), use.head_dim)
        if pattern and p not in trace.exposed and not bool(escaped[trace.first[p] + use.row()].any()):
            kind: Literal["norm", "linear"] = "norm" if p in trace.norms else "linear"
            found.append(Link(trace.block_of[p], p, kind, pattern[0], tuple(names), *pattern[1:]))
    return found


def _pattern(row: torch.Tensor, head_dim: int) -> tuple[tuple[int, int], int, int, int] | None:
    """(start, size), head_dim, repeat and spacing that make these channels; None when none do."""
    start, k, d = int(row[0]), len(row), head_dim
    if not d:
        return ((start, k), 0, 1, 0) if torch.equal(row, torch.arange(start, start + k)) else None
    if k % d:
        return None
    bases = row.view(-1, d)[:, 0]
    repeat = int((bases == start).cumprod(0).sum())
    heads = len(bases) // repeat
    step = int(bases[repeat]) - start if heads > 1 else d
    link = Link("", "", "linear", (start, heads * d), (), d, repeat, step if step != d else 0)
    return (link.rows, d, repeat, link.spacing) if torch.equal(link.spread(link.row_numbers()), row) else None
