"""Following channels through blocks made to mislead: what is not understood gets no link."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantkit import blocks, links


class Toy(nn.Module):
    """A model of two blocks of one kind, as `dry_run` calls it."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([kind(), kind()])

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False, attention_mask: Any = None) -> torch.Tensor:
        x: torch.Tensor = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Plain(nn.Module):
    """norm -> a, b; a -> c through a product. Subclasses change how."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(x)
        return x + self.join(self.a(n), torch.relu(self.b(n)), n)

    def join(self, a: torch.Tensor, b: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.c(a * b)
        return out


def found_in(kind: type[nn.Module], blocks_too: bool = False) -> dict[str, tuple[str, ...]]:
    """Producer -> consumers, of the first block."""
    structure = blocks.Structure(tuple(blocks.Block(i, f"layers.{i}", ()) for i in (0, 1)), ())
    found, warnings = links.find(Toy(kind), structure)
    assert warnings == ()
    own = {x.producer: x.consumers for x in found if x.block == "layers.0"}
    return {p.removeprefix("layers.0."): tuple(c.removeprefix("layers.0.") for c in cs) for p, cs in own.items()}


def test_the_plain_block() -> None:
    assert found_in(Plain) == {"norm": ("a", "b"), "a": ("c",)}


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return x * x


def test_what_is_done_to_a_channel_besides_loses_it() -> None:
    class Scripted(Plain):
        def join(self, a, b, n):
            return self.c(a * b) + scripted(n)

    class Summed(Plain):
        def join(self, a, b, n):
            return self.c(a * b) + n

    class Written(Plain):
        def join(self, a, b, n):
            n[..., 0] = 1
            return self.c(a * b)

    class Kept(Plain):
        def join(self, a, b, n):
            torch.zeros_like(n).copy_(n)
            return self.c(a * b)

    lost_by_the_norm: list[type[Plain]] = [Scripted, Summed, Written, Kept]
    for kind in lost_by_the_norm:
        assert found_in(kind) == {"a": ("c",)}, kind

    class Squared(Plain):
        def join(self, a, b, n):
            return self.c(a * a)

    class Both(Plain):
        def join(self, a, b, n):
            return self.c(a * b.clamp(max=1) + a)

    class Divided(Plain):
        def join(self, a, b, n):
            return self.c(b / a)

    lost_by_a: list[type[Plain]] = [Squared, Both, Divided]
    for kind in lost_by_a:
        assert found_in(kind) == {"norm": ("a", "b")}, kind


def test_unclear_maps_give_no_link() -> None:
    class Flipped(Plain):
        def join(self, a, b, n):
            return self.c((a * b).unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2))

    class Mixed(Plain):  # a token's channels are another token's
        def join(self, a, b, n):
            return self.c(torch.cat([a[..., :6], a[..., :6]], -1))

    class Rolled(Plain):
        def join(self, a, b, n):
            return self.c(a.roll(1, -1))

    for kind in (Flipped, Mixed, Rolled):
        assert found_in(kind) == {"norm": ("a", "b")}, kind


def test_weights_that_serve_twice_are_left_alone() -> None:
    class Twice(Plain):  # c reads a's channels, and something else another time
        def join(self, a, b, n):
            return self.c(a * b) + self.c(b)

    class Used(Plain):  # a's weight is used past a
        def join(self, a, b, n):
            return self.c(a * b) + self.a.weight.sum()

    class Biased(Plain):  # what is added to a's output is not a's bias
        def forward(self, x):
            n = self.norm(x)
            return x + self.c(nn.functional.linear(n, self.a.weight, self.b(n).mean((0, 1))) * torch.relu(self.b(n)))

    class Tied(Plain):
        def __init__(self):
            super().__init__()
            self.b.weight = self.a.weight

    assert found_in(Twice) == {"norm": ("a", "b")}
    assert found_in(Used) == {}
    assert found_in(Biased) == {}
    assert found_in(Tied) == {}


def test_casts_and_choices_of_tokens_keep_a_link() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 8))

        def forward(self, x):
            return nn.functional.linear(x.type(torch.float32), self.weight.type(torch.float32)).softmax(-1)

    class Routed(Plain):
        def __init__(self):
            super().__init__()
            self.router = Router()

        def forward(self, x):
            n = self.norm(x)
            scores = self.router(n)
            some = n.view(-1, 8)[torch.zeros(5, dtype=torch.long, device=x.device)]
            parts = torch.cat([self.a(some), self.b(some)], -1).chunk(2, -1)
            y = self.c(parts[0] * torch.relu(parts[1])) * scores.flatten()[:5, None]
            return torch.zeros_like(n).view(-1, 8).index_add(0, torch.arange(5, device=x.device), y).view_as(x)

    assert found_in(Routed) == {"norm": ("router", "a", "b"), "a": ("c",)}


def test_a_link_stays_in_its_block() -> None:
    class Through(Plain):  # the next block reads this one's norm
        def forward(self, x):
            return self.norm(self.a(x)[..., :8])

    assert found_in(Through) == {}


def test_modules_that_are_no_norms() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return torch.tanh(x * self.weight)

    class Gemma(Shifted):
        def forward(self, x):
            return x * (1 + self.weight)

    assert links.norm_offset(nn.RMSNorm(8)) == 0 and links.norm_offset(nn.LayerNorm(8)) == 0
    assert links.norm_offset(Gemma()) == 1
    assert links.norm_offset(nn.RMSNorm(8, device="meta")) == 0
    for module in (Shifted(), nn.PReLU(8), nn.RMSNorm(8, elementwise_affine=False), nn.Linear(8, 8), nn.Sequential()):
        assert links.norm_offset(module) is None


def test_a_model_that_cannot_run_on_meta_has_no_links_and_says_so() -> None:
    class Failing(Plain):
        def forward(self, x):
            raise RuntimeError("needs values\nand more")

    structure = blocks.Structure((blocks.Block(0, "layers.0", ()),), ())
    found, warnings = links.find(Toy(Failing), structure)
    assert found == () and warnings == (
        "which scales can be folded could not be found out (needs values); none will be",
    )
