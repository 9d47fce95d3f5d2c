"""Where hidden states wait between blocks: by what is free, and in a mapped file with the same bytes in the end."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from interrupted import SMALL, Saying, content, recipe, stopped

import quantkit
from quantkit import blocks, estimate, heap, hidden
from quantkit import plan as planning
from quantkit.errors import MissingError
from quantkit.recipe import Recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("hidden") / "model", **SMALL)


def on_disk(model: Path, **more: Any) -> dict[str, Any]:
    what: dict[str, Any] = recipe(model, **more)
    return {**what, "calibration": {**what.get("calibration", {}), "hidden": "disk"}}


def test_a_mapped_file_has_no_name_and_keeps_what_is_stored(tmp_path: Path) -> None:
    x = torch.arange(24, dtype=torch.bfloat16).view(2, 3, 4)
    there = hidden.to_disk(tmp_path, x)
    assert torch.equal(there, x) and blocks.on_disk(there) and not blocks.on_disk(x)
    assert list(tmp_path.iterdir()) == []
    assert blocks.store(x + 1, there) is there and torch.equal(there, x + 1)
    assert blocks.on_disk(there[1:]), "a part of it, when batches are cut"
    assert hidden._put(x, there) is there and torch.equal(there, x)
    (copy,) = hidden.snapshot([blocks.Batch(there, torch.ones(2, 3), [])], "cpu")
    blocks.store(x * 2, there)
    assert torch.equal(copy.hidden, x)


@pytest.mark.parametrize("changes", [{}, {"method": "gptq", "transforms": ["awq"]}], ids=["plain", "awq"])
def test_a_run_from_the_disk_has_the_same_bytes(changes: Any, model: Path, tmp_path: Path) -> None:
    saying = Saying()
    quantkit.quantize(on_disk(model, **changes), out=tmp_path / "disk", device="cpu", progress=saying)
    quantkit.quantize(recipe(model, **changes), out=tmp_path / "memory", device="cpu")
    ours, theirs = (
        {name: text for name, text in content(tmp_path / out).items() if name.endswith(".safetensors")}
        for out in ("disk", "memory")
    )
    assert ours and ours == theirs
    assert any("hidden states: " in line and "in a file on the disk" in line for line in saying.said)


def test_it_goes_on_after_it_was_cut_short(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden, "LARGE", 1)  # in the background, were they in memory
    whole = content(quantkit.quantize(on_disk(model), out=tmp_path / "whole", device="cpu").out)
    stopped(on_disk(model), tmp_path / "cut", 1)
    assert content(quantkit.quantize(on_disk(model), out=tmp_path / "cut", device="cpu").out) == whole


def test_a_disk_without_room_is_said(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[[int, int, int], None] = os.posix_fallocate

    def full(handle: int, offset: int, size: int) -> None:
        if not os.readlink(f"/proc/self/fd/{handle}").endswith(" (deleted)"):
            return real(handle, offset, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MissingError, match=r"hidden states of a batch \([\d,]+ bytes\).*No space left.*hidden to host"):
        quantkit.quantize(on_disk(model), out=tmp_path / "out", device="cpu")


def test_where_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "available", lambda: 1000)
    assert [hidden.chosen(size, "auto", CPU) for size in (500, 501)] == ["host", "disk"]
    assert [hidden.chosen(10**6, wanted, CPU) for wanted in ("device", "host", "disk")] == ["host", "host", "disk"]
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (400, 400))
    assert [hidden.chosen(size, "auto", cuda) for size in (100, 101, 501)] == ["device", "host", "disk"]
    assert [hidden.chosen(10**6, wanted, cuda) for wanted in ("device", "host", "disk")] == ["device", "host", "disk"]
    monkeypatch.setattr(heap, "available", lambda: 0)  # the system does not say
    assert hidden.chosen(10**6, "auto", CPU) == "host"


def test_the_plan_says_it_and_counts_it(model: Path, tmp_path: Path) -> None:
    folders = {"memory": recipe(model), "disk": on_disk(model)}
    plans = {name: planning.make(Recipe.from_any(what)) for name, what in folders.items()}
    said = {name: dict(estimate.describe(plan, device=CPU, folder=tmp_path)["facts"]) for name, plan in plans.items()}
    assert said["memory"]["hidden states"] == "in the host's memory between blocks"
    assert said["disk"]["hidden states"] == "in a file on the disk between blocks, mapped into memory"
    assert estimate.memory(plans["disk"], CPU).host < estimate.memory(plans["memory"], CPU).host
