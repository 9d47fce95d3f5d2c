"""Marks: the same for the same weight, another for any fault, whatever the format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit import convert, integrity
from quantkit.errors import GateError

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("integrity")
    recipe = {
        "model": str(tiny.save(folder / "model")),
        "scheme": {"preset": "W4A16_ASYM", "group_size": 32},
        "method": "rtn",
        "validate": "none",
        "export": {"engines": ["transformers"]},
    }
    return quantkit.quantize(recipe, out=folder / "out").out


def layers(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = quantkit_json(folder)["layers"]
    return found


def quantkit_json(folder: Path) -> dict[str, Any]:
    from quantkit import hub

    return dict(hub.read_json(folder / "quantkit.json"))


def test_a_mark_is_a_sum_with_signs() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(37, 50, generator=generator)
    rows, columns = (integrity._signs(n, salt, torch.device("cpu")).double() for n, salt in ((37, 2), (50, 1)))
    assert set(rows.tolist()) == set(columns.tolist()) == {-1.0, 1.0} and abs(float(columns.sum())) < 20
    assert integrity.mark(w) == pytest.approx(float(rows @ w.double() @ columns) / float(w.norm()), abs=2e-6)
    assert integrity.mark(torch.zeros(4, 4)) == 0 and integrity.mark(3 * w) == pytest.approx(
        integrity.mark(w), abs=2e-6
    )


def test_signs_are_as_good_as_random() -> None:
    signs = integrity._signs(4096, 1, torch.device("cpu"))
    for shift in (1, 2, 16, 32, 64, 128):
        assert abs(float((signs[shift:] * signs[:-shift]).mean())) < 0.06


def test_what_was_written_is_what_was_rounded(out: Path, tmp_path: Path) -> None:
    integrity.check(out, layers(out))
    there = convert.convert(out, "gptq", tmp_path / "gptq").out
    integrity.check(there, layers(out))


def zero_lost(t: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight_zero_point"
    t[name] = torch.full_like(t[name], 0x88888888 - 2**32)


def scales_rolled(t: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale"
    t[name] = t[name].roll(1, 1).contiguous()


def one_code(t: dict[str, torch.Tensor]) -> None:
    t["model.layers.0.mlp.up_proj.weight_packed"][3, 2] ^= 1 << 9


def nan(t: dict[str, torch.Tensor]) -> None:
    t["model.layers.0.mlp.up_proj.weight_scale"][0, 0] = float("nan")


def swapped(t: dict[str, torch.Tensor]) -> None:
    for leaf in ("weight_packed", "weight_scale", "weight_zero_point"):
        one, other = (f"model.layers.0.mlp.{name}.{leaf}" for name in ("up_proj", "gate_proj"))
        t[one], t[other] = t[other], t[one]


@pytest.mark.parametrize("fault", [zero_lost, scales_rolled, one_code, nan, swapped])
def test_every_fault_leaves_a_mark(out: Path, tmp_path: Path, fault: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(out / WEIGHTS)
    fault(tensors)
    for file in out.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(GateError, match=r"not those that were rounded: .*layers\.0\.mlp\.(up|gate)_proj|read back"):
        integrity.check(tmp_path, layers(out))


def test_a_layer_that_is_gone_is_named(out: Path) -> None:
    with pytest.raises(GateError, match=r"a\.b was quantized, but is not packed"):
        integrity.check(out, [{"name": "a.b", "mark": 0.1}])
    integrity.check(out, [{"name": "a.b"}])  # an output of an earlier version
