"""A mixture of experts, taken apart: every projection of every expert is an ordinary linear, named as on disk.

transformers 5 keeps the experts of a layer in two tensors, gate_up_proj (E, 2I, H) and down_proj (E, H, I), which it
merges from a tensor an expert and projection while loading. What is observed, rounded and written here are linears, so
the merged module gives way to `Experts`, which computes the same from one nn.Linear each. Which tensors on disk are an
expert's gate, up and down projection is read from transformers' own table of conversions, not from their names.

An expert sees only the tokens that the router sends to it. Those may be fewer than its input has channels, and then
their statistics alone are worse than none; `shrink` draws them towards those of all tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from quantkit.errors import InputError
from quantkit.types import Notes, Stats

# How transformers merges the tensors of experts that can be taken apart: stacked, and gate on top of up.
_MERGES = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
_UPS = ("gate_up_proj", "up_proj")
_ONE = re.compile(r"\.(\d+)\.(\w+)\.weight$")  # ...experts.3.gate_proj.weight
FEW = 4  # tokens per input channel below which an expert's own statistics are thin


class Experts(nn.Module):
    """The experts of one layer: linears `3.gate_proj`, `3.up_proj`, `3.down_proj`, by their names on disk.

    fused  transformers' module, as `use_experts_implementation` makes it; its activation and gate are used on
    ups    the projections of the hidden state, in the order in which they are concatenated: gate and up, or up alone
    down   the projection back

    Computes what transformers' experts do, experts in their order and tokens in theirs. On the meta device, where
    routes have no values, every expert runs on all tokens; each gets a tensor object of its own, so that linears that
    share an input are those of one expert.
    """

    fused: Any

    def __init__(self, fused: Any, ups: tuple[str, ...], down: str) -> None:
        super().__init__()
        count, hidden, inner = fused.down_proj.shape
        self.num_experts, self.width, self.ups, self.down = int(count), int(hidden), ups, down
        like: dict[str, Any] = {"bias": False, "device": "meta", "dtype": fused.down_proj.dtype}
        for name in (*_UPS, "down_proj"):
            fused._parameters.pop(name, None)
        for name, child in fused.named_children():  # the activation, a norm after each expert
            self.add_module(name, child)
        for e in range(self.num_experts):
            linears = {name: nn.Linear(hidden, inner, **like) for name in ups}
            self.add_module(str(e), nn.ModuleDict({**linears, down: nn.Linear(inner, hidden, **like)}))
        # In the dictionary of plain attributes: its methods are used, but it is no part of the tree of modules.
        self.__dict__["fused"] = fused
        self._routed: tuple[torch.Tensor, ...] = ()

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states (T, H), experts of each token (T, k) and their weights (T, k) -> (T, H)."""
        if hidden_states.is_meta:
            return self._dry(hidden_states, top_k_weights)
        dtype = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        out = torch.zeros_like(hidden_states, dtype=dtype)
        k = top_k_index.shape[-1]
        chosen = top_k_index.reshape(-1)
        places = torch.argsort(chosen, stable=True).split(torch.bincount(chosen, minlength=self.num_experts).tolist())
        self._routed = tuple(place // k for place in places)
        for e, (place, tokens) in enumerate(zip(places[: self.num_experts], self._routed, strict=False)):
            if len(tokens):
                y = self._expert(e, hidden_states[tokens]) * top_k_weights[tokens, place % k, None]
                out.index_add_(0, tokens, y.to(dtype))
        return out.to(hidden_states.dtype)

    def _dry(self, hidden_states: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            out = out + self._expert(e, hidden_states.view_as(hidden_states))
        return (out * top_k_weights[:, :1]).to(hidden_states.dtype)

    def _expert(self, e: int, x: torch.Tensor) -> torch.Tensor:
        linears = self._linears(e)
        y: torch.Tensor = linears[self.down](self._gate(torch.cat([linears[name](x) for name in self.ups], -1)))
        if getattr(self.fused, "has_post_expert_norm", False):
            y = self.fused.post_expert_norm(y)
        return y

    def _gate(self, projected: torch.Tensor) -> torch.Tensor:
        gate = self.fused._apply_gate if self.fused.has_gate else self.fused.act_fn
        gated: torch.Tensor = gate(projected)
        return gated

    def _linears(self, e: int) -> nn.ModuleDict:
        linears = self._modules[str(e)]
        assert isinstance(linears, nn.ModuleDict)
        return linears

    def intermediate(self, e: int, x: torch.Tensor) -> torch.Tensor:
        """What the down projection of expert `e` reads for x (M, H): (M, I). Hooks on its linears are not called."""
        linears = self._linears(e)
        return self._gate(torch.cat([linears[name].forward(x) for name in self.ups], -1))

    def routed(self, e: int) -> torch.Tensor:
        """The tokens (T_e,) that reach expert `e` in the call under way, or the last one: int64, rising."""
        return self._routed[e]

    def number(self, name: str) -> int:
        """The expert that a linear belongs to, by its name below this module: "3.gate_proj" -> 3."""
        return int(name.partition(".")[0])

    def reads_hidden(self, name: str) -> bool:
        """Whether a linear, by its name below this module, reads the hidden state: gate and up do, down does not."""
        return name.rpartition(".")[2] in self.ups


# Taking apart --------------------------------------------------------------------------------------------------------


def take_apart(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Puts `Experts` in the place of each module of a model on meta whose tensors are apart on disk.

    keys  names of the tensors on disk
    Returns tensor on disk -> name in memory, of the experts' linears. Raises InputError for experts that compute in a
    way that linears do not, and for tensors that do not fit the model's number of experts.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    wanted = model.state_dict()
    homes: dict[str, str] = {}
    parts: dict[str, dict[str, dict[int, str]]] = {}  # module -> its tensor -> place in it -> name on disk
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
        owner, _, leaf = name.rpartition(".")
        one = _ONE.search(key)
        if pattern is None or one is None or name not in wanted or not is_fused(model.get_submodule(owner)):
            continue
        converter = next(c for c in converters if pattern in c.source_patterns)
        _check(key, int(one[1]), model.get_submodule(owner), converter)
        parts.setdefault(owner, {}).setdefault(leaf, {})[converter.source_patterns.index(pattern)] = one[2]
        homes[key] = f"{owner}.{one[1]}.{one[2]}.weight"
    for owner, leaves in parts.items():
        fused = model.get_submodule(owner)
        for leaf in fused._parameters:
            if leaf not in leaves:
                raise InputError(
                    f"{owner}: no tensor on disk holds the {leaf} of its experts; download the model again"
                )
        ups = next(leaves[leaf] for leaf in _UPS if leaf in leaves)
        model.set_submodule(owner, Experts(fused, tuple(ups[i] for i in sorted(ups)), leaves["down_proj"][0]))
    return homes


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts in one tensor, as transformers' experts do."""
    down = module._parameters.get("down_proj")
    return down is not None and down.ndim == 3


def _check(key: str, e: int, fused: Any, converter: WeightConverter) -> None:
    """Refuses experts that are no linears without a bias, with the tensor on disk that shows them."""
    if e >= (count := fused.down_proj.shape[0]):
        raise InputError(
            f"tensor {key!r} is one of expert {e}, but config.json makes {count} experts; "
            "the weights and the config do not belong together"
        )
    why = ""
    if not hasattr(fused, "has_gate") or not hasattr(fused, "_apply_gate"):
        why = "run by code of their own"
    elif fused.has_bias or fused.is_transposed or not fused.is_concatenated:
        why = "transposed, interleaved or with a bias in memory"
    elif other := sorted(fused._parameters.keys() - {*_UPS, "down_proj"}):
        why = f"with {other[0]!r} beside their projections"
    elif [type(op).__name__ for op in converter.operations] not in _MERGES:
        why = f"merged by {', '.join(type(op).__name__ for op in converter.operations)}"
    if why:
        raise InputError(f"tensor {key!r}: experts that are {why} ({type(fused).__name__}) are not supported")


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
    return float((t.diagonal() if t.ndim == 2 else t).double().sum())


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
