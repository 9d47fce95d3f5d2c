"""What a model does after its last block: the last norm and the head, and whatever an architecture does beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantkit import blocks
from quantkit.skeleton import Skeleton


class Tail:
    """The model's own forward with its blocks left out, between `with` and its end.

    rest  what blocks return beside hidden states, when they return a tuple; else None
    What is outside the blocks must be loaded.
    """

    def __init__(self, skeleton: Skeleton, structure: blocks.Structure, rest: tuple[Any, ...] | None = None) -> None:
        self.model, self.rest = skeleton.model, rest
        path = structure.blocks[0].name.rpartition(".")[0]
        owner, _, self.leaf = path.rpartition(".")
        self.parent, self.blocks = self.model.get_submodule(owner), self.model.get_submodule(path)

    def __enter__(self) -> Tail:
        self.stand_ins = [_Given(block, False) for block in self.blocks]
        setattr(self.parent, self.leaf, nn.ModuleList(self.stand_ins))
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self.parent, self.leaf, self.blocks)

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) and hidden states after the last block (B, L, hidden) -> logits (B, L, vocabulary)."""
        for stand_in in self.stand_ins:
            stand_in.given = hidden if self.rest is None else (hidden, *self.rest)
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


class _Given(blocks._StandIn):
    """Takes a block's place: whatever comes in, what is given goes out."""

    given: Any = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.given
