"""Folds: exact, undone bit by bit, and checked on the model itself, with faults planted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from quantkit import blocks, links, skeleton
from quantkit.checkpoint import Checkpoint
from quantkit.errors import InputError
from quantkit.links import Link
from quantkit.transforms import _fold
from quantkit.types import Notes


def scales(n: int, seed: int = 0, size: float = 0.5) -> torch.Tensor:
    return torch.exp(size * torch.randn(n, generator=torch.Generator().manual_seed(seed)))


def bfloat16(name: str) -> torch.dtype:
    return torch.bfloat16


class Pair(nn.Module):
    """A norm and two linears behind it; the weights are numbers of bfloat16."""

    def __init__(self, norm: nn.Module, k: int = 32) -> None:
        super().__init__()
        self.norm, self.a, self.b = norm, nn.Linear(k, 6), nn.Linear(k, 5)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=generator).bfloat16())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(x)
        return torch.cat([self.a(n), self.b(n)], -1)


class Gemma(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(k))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:]) * (1 + self.weight)


NORMS: list[Callable[[int], nn.Module]] = [nn.RMSNorm, Gemma, nn.LayerNorm]
LINK = Link("", "norm", "norm", (0, 32), ("a", "b"))


@pytest.mark.parametrize("make", NORMS)
def test_rounding_a_norm_costs_nothing(make: Callable[[int], nn.Module]) -> None:
    """The norm is stored in bfloat16; the consumers take the scale that it then really has."""
    model: Any = Pair(make(32)).double()
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(2)).double()
    before, asked = model(x), scales(32)
    bias = getattr(model.norm, "bias", None)
    folded = _fold.fold(model, LINK, asked, torch.bfloat16)
    weight = model.norm.weight
    assert torch.equal(weight, weight.bfloat16().double())
    assert not torch.equal(folded.s_P, asked.double())
    # bfloat16 holds 1 + w, or w, to one part in 256; near w = -1 it is 1 + w that is held less well
    near = folded.s_P / asked
    assert (near - 1).abs().median() < 1 / 256
    assert float((model(x) - before).norm() / before.norm()) < 1e-14
    if bias is not None:
        assert torch.allclose(model.norm.bias * folded.s_P, folded.old[1][1], rtol=1e-14)


@pytest.mark.parametrize("make", NORMS)
def test_undo_gives_back_every_bit(make: Callable[[int], nn.Module]) -> None:
    model: Any = Pair(make(32))
    original = {name: p.clone() for name, p in model.named_parameters()}
    folded = _fold.fold(model, LINK, scales(32), torch.bfloat16)
    assert not torch.equal(model.a.weight, original["a.weight"])
    assert not torch.equal(model.b.weight, original["b.weight"])
    assert torch.equal(model.a.bias, original["a.bias"])
    _fold.undo(folded)
    assert all(torch.equal(p, original[name]) for name, p in model.named_parameters())


def test_channels_that_a_norm_cannot_hold() -> None:
    model: Any = Pair(nn.RMSNorm(32)).double()
    with torch.no_grad():
        model.norm.weight[:4] = torch.tensor([0.0, -2.0, 1e-38, 3e38])
    original, s = model.norm.weight.clone(), torch.ones(32)
    s[:4] = torch.tensor([3.0, 5.0, 1e5, 1e-5])
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(2)).double()
    before = model(x)
    folded = _fold.fold(model, LINK, s, torch.bfloat16)
    assert folded.s_P[0] == 3 and model.norm.weight[0] == 0  # 0 under any scale
    assert model.norm.weight[1] < 0 < folded.s_P[1]
    assert folded.s_P[2] == 1 and model.norm.weight[2] == original[2] != 0  # 1e-43 would be 0 in bfloat16
    assert folded.s_P[3] == 1 and model.norm.weight[3] == original[3]  # 3e43 is beyond it
    assert torch.allclose(model(x), before, rtol=1e-12)


def test_a_range_of_rows_and_repeated_heads() -> None:
    """qkv fused with two key heads of 4 that serve two query heads each: v's rows are 24 to 31."""
    model: Any = (
        nn.ModuleDict({"qkv": nn.Linear(8, 32), "o": nn.Linear(16, 3, bias=False)}).double().requires_grad_(False)
    )
    link = Link("", "qkv", "linear", (24, 8), ("o",), head_dim=4, repeat=2)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3)).double()

    def run() -> torch.Tensor:
        v = model["qkv"](x)[:, 24:].view(5, 2, 4).repeat_interleave(2, 1).flatten(1)
        return torch.cat([model["o"](v), model["qkv"](x)[:, :24]], 1)

    before, s = run(), scales(8).double()
    folded = _fold.fold(model, link, s, torch.bfloat16)
    assert torch.equal(folded.s_P, s)
    assert (run() - before).norm() < 1e-14 * before.norm()
    columns = folded.old[2][1] * s.view(2, 1, 4).expand(2, 2, 4).flatten()
    assert torch.equal(model["o"].weight, columns)
    assert link.channels() is not None and link.spread(s).tolist() == s[link.channels()].tolist()


@pytest.mark.parametrize("wrong", [[1.0] * 31, [0.0] + [1.0] * 31, [math.nan] + [1.0] * 31, [math.inf] + [1.0] * 31])
def test_scales_of_no_use_are_refused(wrong: list[float]) -> None:
    model: Any = Pair(nn.RMSNorm(32))
    original = model.a.weight.clone()
    with pytest.raises(InputError, match="norm: a fold needs 32 finite scales above 0"):
        _fold.fold(model, LINK, torch.tensor(wrong), torch.bfloat16)
    assert torch.equal(model.a.weight, original)


# The check ------------------------------------------------------------------------------------------------------------


def block_of(folder: Path, kind: str) -> tuple[Any, tuple[Link, ...], Callable[[], torch.Tensor], torch.Tensor]:
    """The last block of a tiny model, loaded in float32: model, its links, a run on random tokens, and their input."""
    ghost = skeleton.build(tiny.save(folder, kind), Checkpoint.open(folder))
    structure = blocks.find(ghost)
    found, _ = links.find(ghost.model, structure)
    ghost.load(list(ghost.to_disk), "cpu", torch.float32)
    ghost.tie()
    ids = torch.randint(4, 4096, (4, 32), generator=torch.Generator().manual_seed(4))
    batch = blocks.begin(ghost, structure, [(ids, torch.ones_like(ids).bool())])[0]
    last = structure.blocks[-1]
    module = ghost.model.get_submodule(last.name)
    own = tuple(link for link in found if link.block == last.name)
    return ghost.model, own, lambda: blocks.run(module, batch, last.index), batch.hidden


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3", "qwen2", "qwen2-moe", "deepseek"])
def test_right_folds_pass_by_far(kind: str, tmp_path: Path) -> None:
    model, own, run, hidden = block_of(tmp_path / "m", kind)
    before, notes = run(), Notes()
    asked = {link: scales(link.rows[1], i, 2.0) for i, link in enumerate(own)}  # from 1/400 to 400
    done = _fold.fold_all(model, asked, run, stored=bfloat16, notes=notes, hidden=hidden)
    assert list(done) == list(own) and notes.lines == []
    assert _fold.relative_error(before, run(), hidden) < _fold.TOLERANCE / 30
    assert all(s.shape == asked[link].shape and bool((s > 0).all()) for link, s in done.items())


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("qwen2-moe", "mlp.gate"),
        ("qwen2-moe", "mlp.shared_expert_gate"),
        ("qwen2-moe", "mlp.shared_expert.up_proj"),
        ("qwen2-moe", "mlp.experts.1.gate_proj"),
        ("deepseek", "mlp.gate"),
        ("deepseek", "self_attn.q_b_proj"),
        ("llama", "self_attn.k_proj"),
        ("llama", "self_attn.o_proj"),
        ("phi3", "mlp.down_proj"),
        ("gemma2", "mlp.gate_proj"),
    ],
)
def test_a_consumer_left_out_is_noticed_undone_and_told(kind: str, left_out: str, tmp_path: Path) -> None:
    """Also with scales that differ by a tenth only."""
    model, own, run, hidden = block_of(tmp_path / "m", kind)
    original = {name: p.clone() for name, p in model.named_parameters()}
    faulty = next(link for link in own if any(name.endswith(left_out) for name in link.consumers))
    rest = tuple(name for name in faulty.consumers if not name.endswith(left_out))
    planted = replace(faulty, consumers=rest)
    wanted = {planted if x is faulty else x: scales(x.rows[1], i, 0.1) for i, x in enumerate(own)}
    before, notes = run(), Notes()
    done = _fold.fold_all(model, wanted, run, stored=bfloat16, notes=notes, hidden=hidden)
    assert list(done) == [link for link in wanted if link is not planted]
    assert len(notes.lines) == 1
    assert notes.lines[0].startswith(f"{faulty.producer} -> {', '.join(rest)}: folding its scales moved the block's ")
    assert "(tolerance 2e-04); undone, left as it was" in notes.lines[0]
    assert _fold.relative_error(before, run(), hidden) < _fold.TOLERANCE / 30
    kept = {name for link in done for name in (link.producer, *link.consumers)}
    untouched = [name for name in original if name.rpartition(".")[0] not in kept]
    assert planted.kind == "linear" or f"{planted.producer}.weight" in untouched
    for name in untouched:
        assert torch.equal(model.get_parameter(name), original[name]), name


def test_a_fault_alone_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model, own, run, hidden = block_of(tmp_path / "m", "qwen3-moe")
    original = {name: p.clone() for name, p in model.named_parameters()}
    link = next(x for x in own if x.producer.endswith("post_attention_layernorm"))
    planted = replace(link, consumers=tuple(name for name in link.consumers if not name.endswith("mlp.gate")))
    notes = Notes()
    wanted = {planted: scales(64, 0, 0.1)}
    assert _fold.fold_all(model, wanted, run, stored=bfloat16, notes=notes, hidden=hidden) == {}
    assert len(notes.lines) == 1 and planted.producer in notes.lines[0]
    assert all(torch.equal(p, original[name]) for name, p in model.named_parameters())
    assert _fold.fold_all(model, {}, run, stored=bfloat16, notes=notes, hidden=hidden) == {}


def test_the_error_is_that_of_what_the_block_adds() -> None:
    generator = torch.Generator().manual_seed(5)
    hidden, added = (torch.randn(2, 700, 16, generator=generator) for _ in range(2))
    hidden *= 1000
    before = hidden + added
    after = before + 0.01 * torch.randn(before.shape, generator=generator)
    assert _fold.relative_error(before, after, hidden) == pytest.approx(0.01, rel=0.05)
    assert _fold.relative_error(before, after) == pytest.approx(1e-5, rel=0.05)
    assert _fold.relative_error(before, before, hidden) == 0
    # one token of 1400 went to another expert; two did
    after = before.clone()
    after[0, 3] += 5
    assert _fold.relative_error(before, after, hidden) == 0
    after[1, 8] += 5
    assert _fold.relative_error(before, after, hidden) > _fold.TOLERANCE
    # of few tokens none is forgiven
    assert _fold.relative_error(before[:, :300], after[:, :300], hidden[:, :300]) > _fold.TOLERANCE
    after[0, 0, 0] = math.nan
    assert _fold.relative_error(before, after, hidden) == math.inf
    assert _fold.relative_error(hidden, hidden, hidden) == 0
    assert _fold.relative_error(hidden, before, hidden) == math.inf
