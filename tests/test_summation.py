"""The same bytes with another number of threads."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from interrupted import BLOCKS, content, recipe, stopped

import quantkit
from quantkit import running, summation
from quantkit.algorithms import gptq
from quantkit.errors import InputError
from quantkit.recipe import Recipe
from quantkit.types import Notes

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": BLOCKS}
THREADS = (1, 2, 4)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def each(work: Callable[[], Any]) -> list[Any]:
    """What comes out with each number of threads."""
    found = []
    for count in THREADS:
        torch.set_num_threads(count)
        found.append(work())
        assert torch.get_num_threads() == count
    return found


def test_a_hessian_is_factored_the_same():
    x = torch.randn(700, 512, generator=torch.Generator().manual_seed(0))
    first, *others = each(lambda: gptq._factor(x.T @ x / len(x), None, 0.01, Notes()))
    assert first is not None
    assert all(torch.equal(first[0], factor) and first[1] == added for factor, added in others)


def test_products_are_the_same_where_it_is_said():
    """Of a shape that MKL otherwise cuts along K."""
    noise = torch.Generator().manual_seed(0)
    x, w = torch.randn(128, 2048, generator=noise), torch.randn(256, 2048, generator=noise)
    first, *others = each(lambda: x @ w.T)
    assert not summation.fixed() or all(torch.equal(first, y) for y in others)


PROBE = """
import torch
from quantkit import summation
if {first}:
    torch.ones(9, 9) @ torch.ones(9, 9)
summation.fix()
print(summation.fixed())
"""


@pytest.mark.parametrize(
    ("setting", "first", "expected"),
    [(None, False, True), (None, True, False), ("AUTO", False, False)],
    ids=["asked", "too late", "the environment says no"],
)
def test_what_mkl_was_told(setting, first, expected):
    env = {k: v for k, v in os.environ.items() if k != "MKL_CBWR"} | ({"MKL_CBWR": setting} if setting else {})
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(first=first)], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(expected and torch.backends.mkl.is_available())


@pytest.mark.parametrize("shape", [(), (7,), (5000,), (1, 300_000), (70_000, 3), (3, 3, 4096)])
def test_a_total_is_the_same_and_right(shape: tuple[int, ...]):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.4
    first, *others = each(lambda: summation.total(x))
    assert first == pytest.approx(math.fsum(x.flatten().tolist()), rel=1e-12)
    assert others == [first] * len(others)


def test_why_a_total_is_not_just_a_sum():
    x = torch.randn(3000, 3000, generator=torch.Generator().manual_seed(0))
    assert len(set(each(lambda: float(x.sum())))) > 1


MORE: dict[str, dict[str, Any]] = {
    "awq": {"transforms": [{"awq": {"search": "absmax"}}], "method": {"rtn": {"scale_search": "absmax"}}},
    "smoothquant": {"transforms": ["smoothquant"], "scheme": "W8A8"},
    "rotation": {"transforms": ["rotation"]},
    "autoround": {"method": {"autoround": {"iterations": 4}}},
    "choice of schemes": {"scheme": {"auto": {"bits": 5, "candidates": ["W4A16", "W8A16"]}}},
}


@pytest.mark.parametrize(
    "more",
    [pytest.param(more, id=name, marks=[] if name == "awq" else pytest.mark.slow) for name, more in MORE.items()],
)
def test_every_method_gives_the_same_bytes(tmp_path: Path, more: dict[str, Any]):
    what = recipe(
        tiny.save(tmp_path / "model", **{**WIDE, "intermediate_size": 384, "head_dim": 32, "num_hidden_layers": 2}),
        **more,
    )
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(content(quantkit.quantize(what, out=tmp_path / str(threads), device="cpu").out))
    one, other = found
    assert one.keys() == other.keys()
    assert not summation.fixed() or [name for name in one if one[name] != other[name]] == []


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_to_the_same_bytes(tmp_path: Path):
    what = recipe(tiny.save(tmp_path / "model", **WIDE))
    torch.set_num_threads(1)
    whole = content(quantkit.quantize(what, out=tmp_path / "whole", device="cpu").out)
    torch.set_num_threads(2)
    stopped(what, tmp_path / "out", 1)
    torch.set_num_threads(1)
    if summation.fixed():
        assert content(quantkit.quantize(what, out=tmp_path / "out", device="cpu").out) == whole
    else:
        with pytest.raises(InputError, match="threads is 1, was 2"):
            quantkit.quantize(what, out=tmp_path / "out", device="cpu")


def test_the_number_of_threads_counts_where_sums_depend_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = recipe(tiny.save(tmp_path / "model", **WIDE))
    source = quantkit.hub.resolve(plain["model"])
    what = Recipe.from_any(plain)
    for fixed, cuda in ((True, False), (False, False), (False, True)):
        monkeypatch.setattr(summation, "fixed", lambda fixed=fixed: fixed)
        if cuda:
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
        found = running.identity(what, source, torch.device("cuda" if cuda else "cpu"))
        assert found["threads"] == (None if fixed or cuda else torch.get_num_threads())
