"""What an observer adds up, against the same from all tokens at once in float64; and what a fold makes of it."""

from __future__ import annotations

import pytest
import torch

from quantkit import stats
from quantkit.stats import Observer


def tokens(count: int = 300, k: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, k, generator=g) @ torch.randn(k, k, generator=g)
    return x, x + 0.1 * torch.randn(count, k, generator=g)


def observed(x: torch.Tensor, dense: torch.Tensor, mask: torch.Tensor, needs: frozenset[str]) -> stats.Stats:
    observer = Observer(needs, x.shape[1], "cpu", stride=7)
    for a, b, m in zip(x.split(50), dense.split(50), mask.split(50), strict=True):
        observer.update(a.view(5, 10, -1), m.view(5, 10), b.view(5, 10, -1))
    return observer.result()


def test_every_statistic_is_that_of_the_tokens_that_count() -> None:
    x, dense = tokens()
    mask = torch.rand(300, generator=torch.Generator().manual_seed(1)) < 0.6
    found = observed(x, dense, mask, stats.KNOWN)
    kept, other = x[mask].double(), dense[mask].double()
    assert found.tokens == len(kept)
    assert found.gram_KK is not None and torch.allclose(found.gram_KK.double(), kept.T @ kept / len(kept), rtol=1e-4)
    drift = (other - kept).T @ kept / len(kept)
    assert found.drift_KK is not None and torch.allclose(found.drift_KK.double(), drift, atol=1e-4)
    assert found.energy_K is not None and torch.allclose(found.energy_K.double(), kept.square().mean(0), rtol=1e-4)
    assert found.absmean_K is not None and torch.allclose(found.absmean_K.double(), kept.abs().mean(0), rtol=1e-4)
    assert found.absmax_K is not None and torch.equal(found.absmax_K.double(), kept.abs().amax(0))
    assert found.sample_MK is not None and torch.equal(found.sample_MK.double(), kept[::7])
    assert found.magnitudes is not None and int(found.magnitudes.sum()) == kept.numel()


def test_what_nobody_asked_for_is_not_there() -> None:
    x, dense = tokens()
    found = observed(x, dense, torch.ones(300, dtype=torch.bool), frozenset({"energy"}))
    assert [name for name, value in vars(found).items() if value is not None] == ["tokens", "energy_K"]
    with pytest.raises(ValueError, match="no statistic is named"):
        Observer(frozenset({"median"}), 4, "cpu")
    with pytest.raises(ValueError, match="drift needs"):
        Observer(frozenset({"drift"}), 24, "cpu").update(x)


def test_a_fold_makes_of_them_what_the_folded_tokens_have() -> None:
    x, dense = tokens()
    s = torch.rand(24, generator=torch.Generator().manual_seed(2)) + 0.5
    every = torch.ones(300, dtype=torch.bool)
    needs = stats.KNOWN - {"magnitudes"}
    reckoned, direct = observed(x, dense, every, needs).divided(s), observed(x / s, dense / s, every, needs)
    for name in ("gram_KK", "drift_KK", "energy_K", "absmean_K", "absmax_K", "sample_MK"):
        assert torch.allclose(getattr(reckoned, name), getattr(direct, name), rtol=1e-4, atol=1e-4), name
    with pytest.raises(ValueError, match="cannot be rescaled"):
        observed(x, dense, every, frozenset({"magnitudes"})).divided(s)


def test_the_sample_stops_growing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "SAMPLE", 10)
    x, dense = tokens()
    found = observed(x, dense, torch.ones(300, dtype=torch.bool), frozenset({"sample"}))
    assert found.sample_MK is not None and torch.equal(found.sample_MK, x[::7][:10])


def test_a_gram_matrix_by_strips_is_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "BLOCK", 4)
    x = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    found, apart = (stats.Observer(frozenset({"gram"}), 10, "cpu", strips=strips) for strips in (None, [8, 0]))
    other = stats.Observer(frozenset({"gram"}), 10, "cpu", strips=[4])
    for observer in (found, apart, other):
        observer.update(x)
    assert [tuple(strip.shape) for strip in found.gram.values()] == [(4, 10), (4, 6), (2, 2)]
    gram = found.result().gram_KK
    assert gram is not None and torch.allclose(gram, x.T @ x / 50, atol=1e-5) and torch.equal(gram, gram.T)
    apart.gram |= other.gram
    again = apart.result().gram_KK
    assert again is not None and torch.equal(again, gram)
