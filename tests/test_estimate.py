"""What `plan` says before anything is loaded: size exactly, memory whatever the number of layers, what would fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import quantkit
from quantkit import estimate, pipeline, rehearsal
from quantkit import plan as planning
from quantkit.checkpoint import Checkpoint
from quantkit.progress import Silent
from quantkit.recipe import Recipe

CPU = torch.device("cpu")
EMBEDDED = Path(quantkit.__file__).parent / "assets" / "pydocs-llama-7m"


def made(folder: Path, scheme: Any = None, **changes: Any) -> planning.Plan:
    scheme = scheme or {"preset": "W4A16", "group_size": 32}
    calibration = {"samples": 6, "length": 64, "batch_size": 4}
    recipe = {"model": str(folder), "scheme": scheme, "calibration": calibration, "validate": "none", **changes}
    return planning.make(Recipe.from_any(recipe))


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe"])
def test_the_plan_before_anything_is_loaded(kind, tmp_path, monkeypatch):
    plan = made(tiny.save(tmp_path / "model", kind))

    def never(*_: Any) -> None:
        raise AssertionError("a tensor of the model was read")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read", never)
        told = estimate.describe(plan, device=CPU, folder=tmp_path, rehearse=True)
    facts = dict(told["facts"])
    assert facts["time"].startswith("about ") and "observe" in facts["time"]
    assert facts["loads in vllm"] == "yes" and facts["hidden states"] == "in the host's memory between blocks"
    assert not any(line.startswith("does not fit") for line in told["warnings"])
    assert all(p.is_meta for p in plan.skeleton.model.parameters()), "the rehearsal left weights behind"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    (tmp_path / "out").mkdir()
    pipeline.quantize(plan, tmp_path / "out", device=CPU, progress=Silent())
    assert f"{Checkpoint.open(tmp_path / 'out').size():,} bytes of tensors" in facts["output"]


def test_an_engine_that_would_not_load_it_is_named(tmp_path):
    plan = made(tiny.save(tmp_path / "model"), "NVFP4A16", method="rtn", export={"engines": []})
    said = dict(estimate.engines(plan))
    assert set(said.values()) != {"yes"} and all(x == "yes" or x.startswith("no: ") for x in said.values())


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_memory_does_not_grow_with_the_layers(method, tmp_path):
    few, many = (
        estimate.memory(made(tiny.save(tmp_path / str(n), num_hidden_layers=n), method=method), CPU) for n in (2, 9)
    )
    drop = ("this process",)
    assert {k: v for k, v in few.parts.items() if k not in drop} == {
        k: v for k, v in many.parts.items() if k not in drop
    }


def test_what_would_make_it_fit(tmp_path, monkeypatch):
    plan = made(tiny.save(tmp_path / "model"), calibration={"samples": 64, "length": 128, "batch_size": 64})
    assert estimate.changes(plan, CPU, tmp_path) == []
    base = estimate._resident()
    monkeypatch.setattr(estimate, "_resident", lambda: base)
    need = estimate.memory(plan, CPU).host - base
    wanted = plan.recipe.calibration
    smaller = plan.recipe.model_copy(update={"calibration": wanted.model_copy(update={"batch_size": 8})})
    enough = estimate.memory(made(tmp_path / "model", calibration=smaller.calibration.model_dump()), CPU).host - base
    assert enough < need
    room = int((base + enough) / estimate.SPARE) + 1
    monkeypatch.setattr(estimate, "available", lambda: room - base)
    (line,) = estimate.changes(plan, CPU, tmp_path)
    assert line.startswith("host memory: ") and line.endswith("it fits with --set calibration.batch_size=8")
    monkeypatch.setattr(estimate, "available", lambda: 1 << 20)
    assert "take a larger machine" in estimate.changes(plan, CPU, tmp_path)[0]


def test_a_disk_without_room(tmp_path, monkeypatch):
    plan = made(tiny.save(tmp_path / "model"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    (line,) = estimate.changes(plan, CPU, tmp_path)
    assert line.startswith("disk: ") and "1,000 are free" in line


def test_hidden_states_are_counted(tmp_path):
    folder = tiny.save(tmp_path / "model")
    plan = made(folder)
    assert rehearsal.hidden_bytes(plan, CPU) == 6 * 64 * 64 * 4
    assert estimate.memory(plan, CPU).parts["hidden states"] == 6 * 64 * 64 * 4
    assert estimate.hidden_place(plan, CPU) == "host"


def test_a_large_weight_is_reckoned_from_small_ones(tmp_path, monkeypatch):
    plan = made(tiny.save(tmp_path / "model"))

    def cost(n: int, k: int) -> float:
        return 3e-11 * n * k * k + 2e-8 * n * k + 5e-11 * k**3

    monkeypatch.setattr(rehearsal, "_one_solve", lambda plan, layer, n, k, device: cost(n, k))
    found = rehearsal._fit(plan, plan.quantized[0], CPU)
    for n, k in [(14336, 4096), (4096, 14336), (28672, 8192)]:
        predicted = sum(c * t for c, t in zip(found, rehearsal._terms(n, k), strict=True))
        assert predicted == pytest.approx(cost(n, k), rel=0.01)
    # a term that does not show is left out, never negative
    monkeypatch.setattr(rehearsal, "_one_solve", lambda plan, layer, n, k, device: 1e-8 * n * k)
    assert min(rehearsal._fit(plan, plan.quantized[0], CPU)) >= 0


def hollow(folder: Path, layers: int, hidden: int, inner: int) -> Path:
    """A Llama as eval/random_model.py writes it, of which only the headers are there."""
    heads = hidden // 64
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        head_dim=64,
        vocab_size=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / name, folder / name)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    header, end = {}, 0
    for name, t in state.items():
        header[name] = {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [end, end + 2 * t.numel()]}
        end += 2 * t.numel()
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return folder


# Peaks of torch's allocator on an H200 (eval/RESULTS.md), MiB: layers, hidden, inner, recipe.
ABSMAX = {"rtn": {"scale_search": "absmax"}}
ON_GPU = [
    ((2, 1024, 4096), {"scheme": "W4A16", "calibration": {"samples": 32, "length": 512}}, 361),
    ((2, 2048, 6144), {"scheme": "W8A8", "calibration": {"samples": 16, "length": 512}}, 894),
    ((2, 4096, 14336), {"scheme": "W4A16", "calibration": {"samples": 128, "length": 2048}}, 5825),
    ((2, 2048, 6144), {"scheme": "W8A16", "method": ABSMAX}, 313),
    ((2, 1024, 4096), {"scheme": "FP8_DYNAMIC", "method": "rtn"}, 116),
]


@pytest.mark.parametrize(("shape", "recipe", "measured"), ON_GPU, ids=lambda x: x if isinstance(x, int) else "")
def test_memory_of_a_gpu_is_that_which_was_measured(shape, recipe, measured, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate.streaming, "workers", lambda: (2, 1))
    plan = planning.make(Recipe.from_any({"model": str(hollow(tmp_path, *shape)), "validate": "none", **recipe}))
    peaks = estimate.memory(plan, torch.device("cuda"), place="device", passes=1)
    assert peaks.gpu / 2**20 == pytest.approx(measured, rel=0.15)


def test_what_starting_a_gpu_takes_is_told():
    whole = rehearsal.Seconds(1.0, 2.0, start=1.5)
    assert (
        whole.total == 4.5
        and "start 2 s" in estimate._time(whole)
        and "start" not in estimate._time(rehearsal.Seconds(1.0, 2.0))
    )
    assert rehearsal.Seconds(1.0, stream=3.0).total == 3.0


def test_experts_that_are_solved_at_once_are_counted_together(tmp_path, monkeypatch):
    plan = made(tiny.save(tmp_path / "model", "qwen3-moe", hidden_size=256, num_experts=16), None)
    sizes = []
    for there in (False, True):
        monkeypatch.setattr(estimate.solve, "available", lambda _, there=there: there)
        peaks = estimate.memory(plan, torch.device("cuda"), place="device", passes=1)
        sizes.append(peaks.parts["one block's work"])
    assert sizes[1] > 4 * sizes[0]
