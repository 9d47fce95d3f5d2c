"""Loading by the kernels that lay codes out, here in Triton's interpreter: what `Held.pack` holds, the same errors."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import packed_models
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_runtime_experts import SIZES, gpt_oss, pack
from test_runtime_formats import saved_alike
from torch.utils._python_dispatch import TorchDispatchMode
from triton_tools import interpreted

import quantkit  # noqa: F401
from quantkit import formats
from quantkit.errors import InputError
from quantkit.presets import PRESETS
from quantkit.runtime import laying, planning
from quantkit.runtime.held import describe
from quantkit.types import Scheme, TensorScheme
from quantkit_kernels import nibbles


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Lets the kernels run on a CPU; counts what they laid out."""
    found: Counter[str] = Counter()

    def lay(kind: str, *args: Any, **how: Any) -> None:
        found[kind] += 1
        with interpreted("nibbles", "_nibbles") as modules:
            modules["nibbles"].lay(kind, *args, **how)

    monkeypatch.setattr(nibbles, "lay", lay)
    monkeypatch.setattr(nibbles, "fits", nibbles.well_formed)
    return found


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def held(folder: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in load(folder).named_parameters()}


SCHEMES = {
    "W4A16": Scheme(TensorScheme("int4", "group", 128)),
    "W4A16_ASYM": Scheme(TensorScheme("int4", "group", 32, symmetric=False)),
    "a scale a row": Scheme(TensorScheme("int4", "channel")),
    "NVFP4": PRESETS["NVFP4"],
    "MXFP4A16": PRESETS["MXFP4A16"],
}


@pytest.mark.parametrize("name", SCHEMES)
def test_linears_hold_the_same_and_save_the_same(
    name: str, tmp_path: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    packed_models.save(folder, "compressed-tensors", SCHEMES[name])
    model = load(folder)
    assert calls.total() == 7 and not any("late" in m.__dict__ for m in model.modules())
    saved_alike(model, folder, tmp_path / "again")
    found = {n: p.detach() for n, p in model.named_parameters()}
    monkeypatch.setattr(laying, "words_of", lambda *_: None)
    wanted = held(folder)
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert calls.total() == 7


@pytest.mark.parametrize("name", ["W4A16", "NVFP4", "gpt-oss"])
def test_experts_hold_the_same_and_save_the_same(
    name: str, tmp_path: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    if name == "gpt-oss":
        gpt_oss(folder)
    else:
        tiny.save(folder, "qwen3-moe", **SIZES, num_experts=4)
        pack(folder, "compressed-tensors", SCHEMES[name], uneven=True)
    model = load(folder)
    assert calls and not any("late" in m.__dict__ for m in model.modules())
    saved_alike(model, folder, tmp_path / "again")
    found = {n: p.detach() for n, p in model.named_parameters()}
    monkeypatch.setattr(laying, "words_of", lambda *_: None)
    wanted = held(folder)
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


def damaged(folder: Path, leaf: str, index: tuple[int, ...], value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = sorted(n for n in tensors if n.endswith(leaf))[1]
    tensors[name][index] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ["W4A16", "NVFP4"])
def test_damage_is_named_after_loading(name: str, tmp_path: Path, calls: Counter[str]) -> None:
    packed_models.save(tmp_path / "m", "compressed-tensors", SCHEMES[name])
    damaged(tmp_path / "m", ".weight_scale", (5, 0), float("nan"))
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.gate_proj: the scale at \[5, 0\] is NaN"):
        load(tmp_path / "m")
    assert calls


def test_damage_of_an_expert_is_named(tmp_path: Path, calls: Counter[str]) -> None:
    folder = tiny.save(tmp_path / "m", "qwen3-moe", **SIZES, num_experts=4)
    pack(folder, "compressed-tensors", SCHEMES["W4A16"])
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.experts.2.up_proj.weight_scale"][7, 0] = float("inf")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"experts: expert 2, up_proj: the scale at \[7, 0\]"):
        load(folder)


def test_another_weight_shape_is_named(tmp_path: Path, calls: Counter[str]) -> None:
    packed_models.save(tmp_path / "m", "compressed-tensors", SCHEMES["W4A16"])
    damaged(tmp_path / "m", ".weight_shape", (0,), 96)
    with pytest.raises(
        InputError, match=r"mlp\.gate_proj: weight_shape says \(96, 128\), the model's config says \(256"
    ):
        load(tmp_path / "m")


def test_what_has_another_form_goes_the_other_way(tmp_path: Path, calls: Counter[str]) -> None:
    packed_models.save(tmp_path / "m", "compressed-tensors", PRESETS["W8A16"])
    assert held(tmp_path / "m") and not calls


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do, and how often a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.waits = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        self.waits += "_local_scalar_dense" in str(function) or "nonzero" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("n", "k"), [(64, 256), (512, 4096)])
def test_a_layer_is_a_few_operations_whatever_its_size(n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel apart: no waiting, and no operation for each piece of a large layer."""
    monkeypatch.setattr(nibbles, "fits", nibbles.well_formed)
    monkeypatch.setattr(nibbles, "lay", lambda *_, **__: None)
    form = formats.get("compressed-tensors")
    scheme, shape = SCHEMES["W4A16"], (n, k)
    read = form.read_config(form.config({"x": scheme}))
    one = describe(planning.disk_of(form, read, "x", shape, scheme, form.tensors(shape, scheme, "BF16")))
    tensors = {
        "weight_packed": torch.zeros(n, k // 8, dtype=torch.int32),
        "weight_scale": torch.ones(n, k // 128, dtype=torch.bfloat16),
        "weight_shape": torch.tensor(shape),
    }
    with Operations() as seen:
        assert laying.lay(one, tensors) is not None
    assert seen.waits == 0 and seen.count <= 6
