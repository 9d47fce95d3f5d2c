"""The same bytes with another number of threads."""

from __future__ import annotations

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
    for fixed, cuda, more in (
        (True, False, {}),
        (False, False, {}),
        (False, True, {}),
        (True, False, {"transforms": ["awq"]}),  # sums over whole tensors
    ):
        what = Recipe.from_any({**plain, **more})
        monkeypatch.setattr(summation, "fixed", lambda fixed=fixed: fixed)
        if cuda:
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
        found = running.identity(what, source, torch.device("cuda" if cuda else "cpu"))
        assert found["threads"] == (None if (fixed and not more) or cuda else torch.get_num_threads())
