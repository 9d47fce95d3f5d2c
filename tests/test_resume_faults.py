"""A run that meets a full disk, a damaged or changed file: one clear sentence, and nothing is lost that was done."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from interrupted import BLOCKS, CHECK, SMALL, Saying, content, recipe, stopped

import quantkit
from quantkit import output, pipeline, running
from quantkit.errors import InputError, MissingError
from quantkit.resuming import HIDDEN


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("faults") / "model", **SMALL)


def quantize(what: dict[str, Any], out: Path, **more: Any) -> Path:
    return quantkit.quantize(what, out=out, device="cpu", **more).out


# Each method, transform and scheme ------------------------------------------------------------------------------------

MATRIX: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq-static": {"scheme": {"preset": "FP8"}},
    "autoround": {"method": {"autoround": {"iterations": 3}}},
    "gptq-pre-shift": {"method": {"gptq": {"pre_shift": 0.5}}},
    "awq": {"transforms": ["awq"], "method": "rtn"},
    "smoothquant": {"transforms": ["smoothquant"], "scheme": {"preset": "W8A8"}},
    "rotation": {"transforms": ["rotation"]},
    "kv-cache": {"kv_cache": "fp8", "method": "rtn"},
    "shards": {"export": {"engines": ["transformers"], "shard_size": "20KB"}},
}


@pytest.mark.parametrize("name", MATRIX)
def test_every_method_goes_on_to_the_same_bytes(name, model, tmp_path):
    what = recipe(model, **MATRIX[name])
    whole = content(quantize(what, tmp_path / "whole"))
    stopped(what, tmp_path / "out", 2)
    progress = Saying()
    assert content(quantize(what, tmp_path / "out", progress=progress)) == whole
    assert f"continuing at block 3 of {BLOCKS}" in progress.said


def test_experts_go_on_to_the_same_bytes(tmp_path):
    folder = tiny.save(tmp_path / "model", "qwen3-moe", num_experts=3, **SMALL)
    what = recipe(folder)
    whole = content(quantize(what, tmp_path / "whole"))
    stopped(what, tmp_path / "out", 1)
    one, again = Saying(), Saying()
    assert content(quantize(what, tmp_path / "out", progress=again)) == whole
    quantize(what, tmp_path / "two", progress=one)
    assert again.warnings == one.warnings, "what was warned of before is known again"
    assert any("experts saw fewer than" in line for line in one.warnings)


# Choices that are made once -------------------------------------------------------------------------------------------


def test_the_choice_of_schemes_is_made_once(model, tmp_path, monkeypatch):
    auto = {"bits": 6.0, "candidates": [{"preset": f"W{b}A16", "group_size": 32} for b in (4, 8)], "rows": 2}
    what = recipe(model, scheme={"auto": {**auto, "length": 32}}, method="rtn")
    whole = content(quantize(what, tmp_path / "whole"))
    stopped(what, tmp_path / "out", 1)
    again = running.allocation.allocate
    monkeypatch.setattr(running.allocation, "allocate", None)
    assert content(quantize(what, tmp_path / "out")) == whole
    monkeypatch.setattr(running.allocation, "allocate", again)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "quantize", _interrupted)
        quantize(what, tmp_path / "out")
    monkeypatch.setattr(running.allocation, "allocate", None)
    assert content(quantize(what, tmp_path / "out")) == whole, "also before the first block"


def _interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_repair_goes_on_with_the_pass_that_it_was_at(model, tmp_path, monkeypatch):
    check = {**CHECK, "gates": {"kl": 1e-9}, "repair": {"size": 1.4}}
    what = recipe(model, validate=check, method="rtn")
    whole = content(quantize(what, tmp_path / "whole"))
    summary = quantkit.hub.read_json(tmp_path / "whole" / output.SUMMARY)
    passes = len(summary["repair"]["steps"])
    assert passes >= 2
    once, count = running._once, [0]

    def cut_short(*args: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return once(*args)

    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "_once", cut_short)
        quantize(what, tmp_path / "out")

    def counted(*args: Any) -> Any:
        count[0] += 1
        return once(*args)

    count[0] = 0
    monkeypatch.setattr(running, "_once", counted)
    assert content(quantize(what, tmp_path / "out")) == whole
    assert count[0] == passes - 1, "the first two passes are not made again"


# A disk without room --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "write", "fsync"])
def test_a_disk_that_fills_up_loses_nothing_that_is_finished(call, model, tmp_path):
    what, out = recipe(model), tmp_path / "out"
    whole = content(quantize(what, tmp_path / "whole"))
    real, armed = getattr(os, call), [False]
    block = pipeline._block

    def full(*args: Any) -> Any:
        if armed[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    def arming(run: Any, one: Any, batches: Any) -> None:
        block(run, one, batches)
        armed[0] = one.index == 1

    with pytest.raises((MissingError, OSError)) as caught, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, full)
        patch.setattr(pipeline, "_block", arming)
        quantize(what, out)
    assert "o space left on device" in str(caught.value)
    assert not out.exists()
    progress = Saying()
    assert content(quantize(what, out, progress=progress)) == whole
    assert f"continuing at block 2 of {BLOCKS}" in progress.said


def test_a_limit_of_the_system_on_files_is_told(model, tmp_path):
    """A real limit, met by a real process: the output does not fit in a file."""
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(model)))
    limit = f"ulimit -f 400; exec {sys.executable} -m quantkit quantize recipe.json --out out --device cpu"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(["bash", "-c", limit], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "no room for the output" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.json"]


# Files that are damaged or changed meanwhile --------------------------------------------------------------------------


def flipped(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def place_of(file: Path, tensor: str) -> int:
    """The first byte of a tensor in a safetensors file."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    begin: int = json.loads(data[8 : 8 + length])[tensor]["data_offsets"][0]
    return 8 + length + begin


WEIGHTS = f"{output.OUTPUT}/model.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a finished tensor": (
        lambda p: flipped(p / WEIGHTS, place_of(p / WEIGHTS, "model.layers.1.mlp.down_proj.weight_packed")),
        r"model\.safetensors: model\.layers\.1\.mlp\.down_proj\.weight_packed is not what the run wrote there",
    ),
    "the header": (lambda p: flipped(p / WEIGHTS, 20), "has another header than the run gave it"),
    "truncated": (lambda p: os.truncate(p / WEIGHTS, 1000), "has 1,000 bytes instead of"),
    "missing": (lambda p: (p / WEIGHTS).unlink(), "is missing, though the run has written to it"),
    "hidden states": (lambda p: flipped(p / HIDDEN / "2" / "model.safetensors", -1), "hidden states .* cannot be read"),
    "hidden states, truncated": (
        lambda p: os.truncate(p / HIDDEN / "2" / "model.safetensors", 2000),
        "hidden states .* cannot be read",
    ),
    "hidden states, missing": (lambda p: shutil.rmtree(p / HIDDEN / "2"), "hidden states .* cannot be read"),
    "the journal": (lambda p: flipped(p / output.JOURNAL, 30), "line 1 of .* is damaged"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused_and_nothing_is_touched(what, model, tmp_path):
    damage, says = DAMAGE[what]
    partial = stopped(recipe(model), tmp_path / "out", 2)
    shutil.copytree(partial, tmp_path / "sound")
    damage(partial)
    before = content(partial)
    with pytest.raises(InputError, match=says) as caught:
        quantize(recipe(model), tmp_path / "out")
    assert "--fresh" in str(caught.value) and "\n" not in str(caught.value)
    assert content(partial) == before
    shutil.rmtree(partial)
    (tmp_path / "sound").rename(partial)
    assert quantize(recipe(model), tmp_path / "out").is_dir()


def test_the_last_record_torn_off_costs_one_block(model, tmp_path):
    what = recipe(model)
    whole = content(quantize(what, tmp_path / "whole"))
    journal = stopped(what, tmp_path / "out", 2) / output.JOURNAL
    os.truncate(journal, journal.stat().st_size - 7)
    progress = Saying()
    assert content(quantize(what, tmp_path / "out", progress=progress)) == whole
    assert f"continuing at block 2 of {BLOCKS}" in progress.said
