"""A mixture of experts as linears: every projection of every expert is an ordinary nn.Linear.

transformers 5 keeps the experts of a layer in two tensors, gate_up_proj (E, 2I, H) and down_proj (E, H, I), whether
they are so on disk or a tensor an expert and projection. What is observed, rounded and written here are linears, so
the merged module gives way to `Experts`, which computes the same from one nn.Linear each; apart.py puts it there.

An expert sees only the tokens that the router sends to it. Those may be fewer than its input has channels, and then
their statistics alone are worse than none; `shrink` draws them towards those of all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import nn

from quantkit import summation
from quantkit.types import Notes, Stats

FEW = 4  # tokens per input channel below which an expert's own statistics are thin


class Experts(nn.Module):
    """The experts of one layer: linears `3.gate_proj`, `3.up_proj`, `3.down_proj`, by their names on disk.

    fused  transformers' module: one that `use_experts_implementation` made, or Llama 4's, which is given every token
           once for each expert, zeros where the router did not choose it. Its activation and gate are used on
    ups    the projections of the hidden state: gate and up, or up alone
    down   the projection back

    Computes what transformers' experts do, experts in their order and tokens in theirs. On the meta device, where
    routes have no values, every expert runs on all tokens; each gets a tensor object of its own, so that linears that
    share an input are those of one expert.

    all_tokens  set while every expert is to be observed on all tokens; what comes out does not change
    """

    fused: Any

    def __init__(self, fused: Any, ups: tuple[str, ...], down: str) -> None:
        super().__init__()
        self.alone = not hasattr(fused, "has_gate")
        self.interleaved = not self.alone and not fused.is_concatenated
        count, hidden, inner = fused.down_proj.shape
        if is_transposed(fused):
            hidden, inner = inner, hidden
        self.num_experts, self.width, self.ups, self.down = int(count), int(hidden), ups, down
        like: dict[str, Any] = {
            "device": "meta",
            "dtype": fused.down_proj.dtype,
            "bias": "down_proj_bias" in leaves(fused),
        }
        for name in leaves(fused):
            fused._parameters.pop(name)
        for name, child in fused.named_children():  # the activation, a norm after each expert
            self.add_module(name, child)
        for e in range(self.num_experts):
            linears = {name: nn.Linear(hidden, inner, **like) for name in ups}
            self.add_module(str(e), nn.ModuleDict({**linears, down: nn.Linear(inner, hidden, **like)}))
        # In the dictionary of plain attributes: its methods are used, but it is no part of the tree of modules.
        self.__dict__["fused"] = fused
        self.all_tokens = False
        self._routed: tuple[torch.Tensor, ...] = ()
        self._chosen: torch.Tensor | None = None  # where each token comes once for each expert: rows that are no zeros

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states (T, H), experts of each token (T, k) and their weights (T, k) -> (T, H).

        Without the last two, rows (E T, H), those of each expert together -> the same shape.
        """
        if hidden_states.is_meta:
            return self._dry(hidden_states, top_k_weights)
        if top_k_index is None or top_k_weights is None:
            return self._each(hidden_states)
        dtype = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        out = torch.zeros_like(hidden_states, dtype=dtype)
        k = top_k_index.shape[-1]
        chosen = top_k_index.reshape(-1)
        places = torch.argsort(chosen, stable=True).split(torch.bincount(chosen, minlength=self.num_experts).tolist())
        self._routed = tuple(place // k for place in places[: self.num_experts])
        weights = top_k_weights.reshape(-1, 1)
        for e, (place, tokens) in enumerate(zip(places, self._routed, strict=False)):
            if self.all_tokens:
                y = self._expert(e, hidden_states)[tokens]
            elif len(tokens):
                y = self._expert(e, hidden_states[tokens])
            else:
                continue
            out.index_add_(0, tokens, (y * weights[place]).to(dtype))
        return out.to(hidden_states.dtype)

    def _each(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Llama 4's way: the rows that the router did not choose are zero, and so is what an expert makes of them."""
        rows = hidden_states.view(self.num_experts, -1, self.width)
        chosen = (rows != 0).any(-1)
        self._routed = tuple(which.nonzero().flatten() for which in chosen)
        self._chosen = chosen.reshape(-1)
        given = hidden_states[self._chosen]  # all that were chosen, expert after expert
        out, first = torch.zeros_like(rows), 0
        for e, tokens in enumerate(self._routed):
            last = first + len(tokens)
            if self.all_tokens:
                out[e, tokens] = self._expert(e, given)[first:last]
            elif len(tokens):
                out[e, tokens] = self._expert(e, given[first:last])
            first = last
        return out.view_as(hidden_states)

    def given(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What this module is called with and the mask of its tokens -> rows that experts read (M, H), and theirs."""
        x, mask = x.reshape(-1, self.width), mask.reshape(-1)
        if not self.alone:
            return x, mask
        chosen = (x != 0).any(-1)
        return x[chosen], mask.repeat(self.num_experts)[chosen]

    def _dry(self, hidden_states: torch.Tensor, top_k_weights: torch.Tensor | None) -> torch.Tensor:
        out = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            out = out + self._expert(e, hidden_states.view_as(hidden_states))
        return (out if top_k_weights is None else out * top_k_weights[:, :1]).to(hidden_states.dtype)

    def _expert(self, e: int, x: torch.Tensor) -> torch.Tensor:
        linears = self._linears(e)
        y: torch.Tensor = linears[self.down](self._gate([linears[name](x) for name in self.ups]))
        if getattr(self.fused, "has_post_expert_norm", False):
            y = self.fused.post_expert_norm(y)
        return y

    def _gate(self, projected: Sequence[torch.Tensor]) -> torch.Tensor:
        if self.alone:
            gate, up = projected
            return up * self.fused.act_fn(gate)
        both = torch.stack(tuple(projected), -1).flatten(-2) if self.interleaved else torch.cat(tuple(projected), -1)
        gated: torch.Tensor = (self.fused._apply_gate if self.fused.has_gate else self.fused.act_fn)(both)
        return gated

    def _linears(self, e: int) -> nn.ModuleDict:
        linears = self._modules[str(e)]
        assert isinstance(linears, nn.ModuleDict)
        return linears

    def intermediate(self, e: int, x: torch.Tensor) -> torch.Tensor:
        """What the down projection of expert `e` reads for x (M, H): (M, I). Hooks on its linears are not called."""
        linears = self._linears(e)
        return self._gate([linears[name].forward(x) for name in self.ups])

    def rows(self, e: int, mask: torch.Tensor) -> torch.Tensor:
        """The mask of all tokens -> that of the rows (M,) that expert `e` reads in the call under way."""
        if not self.all_tokens:
            return mask.reshape(-1)[self.routed(e)]
        return mask.reshape(-1) if self._chosen is None else mask.reshape(-1).repeat(self.num_experts)[self._chosen]

    def routed(self, e: int) -> torch.Tensor:
        """The tokens (T_e,) that reach expert `e` in the call under way, or the last one: int64, rising."""
        return self._routed[e]

    def number(self, name: str) -> int:
        """The expert that a linear belongs to, by its name below this module: "3.gate_proj" -> 3."""
        return int(name.partition(".")[0])

    def reads_hidden(self, name: str) -> bool:
        """Whether a linear, by its name below this module, reads the hidden state: gate and up do, down does not."""
        return name.rpartition(".")[2] in self.ups


def inside(model: nn.Module, name: str) -> list[tuple[str, Experts]]:
    """The `Experts` of a block, or of any other module of a model, by their names in the model."""
    found = model.get_submodule(name).named_modules(prefix=name)
    return [(path, module) for path, module in found if isinstance(module, Experts)]


# transformers' module for the experts of a layer ---------------------------------------------------------------------

UPS = ("gate_up_proj", "up_proj")
LEAVES = (*UPS, "down_proj", *(f"{name}_bias" for name in (*UPS, "down_proj")))


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts in one tensor, as transformers' experts do."""
    down = module._parameters.get("down_proj")
    return down is not None and down.ndim == 3


def leaves(fused: nn.Module) -> list[str]:
    """The parameters of such a module that are experts' projections and their biases."""
    return [name for name in LEAVES if fused._parameters.get(name) is not None]


def is_transposed(fused: Any) -> bool:
    """Whether its weights are (E, in, out) and not (E, out, in)."""
    return bool(getattr(fused, "is_transposed", True))  # Llama 4's module, which does not say, is


# Routers -------------------------------------------------------------------------------------------------------------


def routers(model: nn.Module) -> set[str]:
    """Names of the modules, nn.Linear or not, whose `weight` (E, H) chooses experts, or (1, H) weighs a shared one.

    Found by structure: beside E experts, the only matrix in a module, with E rows or with one. Engines keep them dense.
    """
    found: set[str] = set()
    for owner, module in model.named_modules():
        children = dict(module.named_children())
        counts = {_count(child) for child in children.values()} - {0}
        if not counts:
            continue
        for name, child in children.items():
            if _count(child):
                continue
            matrices = [(n, m) for n, m in child.named_modules() if _rows(m)]
            if len(matrices) == 1 and _rows(matrices[0][1]) in {*counts, 1}:
                found.add(".".join(part for part in (owner, name, matrices[0][0]) if part))
    return found


def _count(module: nn.Module) -> int:
    """How many experts a module is the list of: an `Experts`, or a list with linears in it; else 0."""
    if isinstance(module, Experts):
        return module.num_experts
    listed = isinstance(module, nn.ModuleList) and any(isinstance(m, nn.Linear) for m in module.modules())
    return len(module) if listed and isinstance(module, nn.ModuleList) else 0


def _rows(module: nn.Module) -> int:
    """Rows of a module's own matrix; 0 when it has none."""
    weight = module._parameters.get("weight")
    return int(weight.shape[0]) if weight is not None and weight.ndim == 2 else 0


# Statistics ----------------------------------------------------------------------------------------------------------


def shrink(routed: Stats, everyone: Stats, k: float = 1.0, *, notes: Notes | None = None) -> Stats:
    """An expert's statistics, drawn towards those that all tokens would have given it.

    H_e = (T H_routed + k d c H_all) / (T + k d): T tokens reached the expert, d is the width of its input, and the
    ratio of the traces c = tr(H_routed) / tr(H_all) gives both one size. So the statistics of all tokens count like
    k tokens a channel. With T < d the routed tokens alone make GPTQ worse than rounding to nearest; with k = 1 it was
    at least as good at every T from d/16 to 16 d. Known for covariances as shrinkage towards a target (Ledoit and Wolf
    2004, "A well-conditioned estimator for large-dimensional covariance matrices").

    gram, energy and absmean are drawn, each by its own ratio of sums; drift, which all tokens have not, goes towards
    zero by the same weight. Extremes, counts and the sample are those of the routed tokens. With T = 0 everything is
    that of all tokens, and `notes` says so; `tokens` is T always.
    """
    width = next((len(t) for t in (routed.gram_KK, routed.energy_K, routed.absmean_K) if t is not None), 0)
    if not routed.tokens:
        if notes is not None:
            notes.add("no calibration token reached this expert; its inputs are taken to be those of all tokens")
        return replace(everyone, tokens=0, drift_KK=None if everyone.drift_KK is None else everyone.drift_KK * 0)
    if k <= 0 or not width:
        return routed
    own = routed.tokens / (routed.tokens + k * width)

    def drawn(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
        if a is None or b is None:
            return a
        ratio = _total(a) / _total(b) if _total(a) > 0 and _total(b) > 0 else 1.0
        return own * a + ((1 - own) * ratio) * b

    return replace(
        routed,
        gram_KK=drawn(routed.gram_KK, everyone.gram_KK),
        energy_K=drawn(routed.energy_K, everyone.energy_K),
        absmean_K=drawn(routed.absmean_K, everyone.absmean_K),
        drift_KK=None if routed.drift_KK is None else own * routed.drift_KK,
    )


def _total(t: torch.Tensor) -> float:
    return summation.total(t.diagonal() if t.ndim == 2 else t)


def coverage(tokens: Sequence[int], width: int) -> dict[str, Any]:
    """Of the experts of one layer: how many there are, the tokens that reached them, how many got few.

    width  channels of an expert's input; fewer than 4 tokens a channel are few
    """
    return {
        "experts": len(tokens),
        "min": min(tokens),
        "median": median(tokens),
        "max": max(tokens),
        "few": sum(t < FEW * width for t in tokens),
    }


def few(model: nn.Module, tokens: Mapping[str, int]) -> list[str]:
    """What must be told of experts that saw few calibration tokens: a line a layer.

    tokens  of each expert, by its name
    """
    layers: dict[str, list[int]] = {}
    for name, count in tokens.items():
        layers.setdefault(name.rpartition(".")[0], []).append(count)
    lines = []
    for owner, counts in layers.items():
        module = model.get_submodule(owner)
        assert isinstance(module, Experts)
        found = coverage(counts, module.width)
        if found["few"]:
            lines.append(
                f"{owner}: {found['few']} of {found['experts']} experts saw fewer than {FEW} tokens an input channel "
                f"({FEW * module.width}), the least {found['min']}, the median {found['median']:g}; their statistics "
                "lean on those of all tokens: raise calibration.samples"
            )
    return lines
