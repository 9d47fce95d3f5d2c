"""Several processes write what one writes, bit by bit; and when one of them ends, so do the others, with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from interrupted import content, untimed

import quantkit
from quantkit import joining, observation, pipeline, ranks, stats
from quantkit.errors import InputError, MissingError
from quantkit.heartbeat import Heartbeat

# Rows of 64 tokens in batches of 2: as many batches as there are ranks, or some more.
CALIBRATION = {"data": "builtin:pydocs", "samples": 9, "length": 64, "batch_size": 2}
W4 = {"preset": "W4A16", "group_size": 32}

# What a rank does: every recipe of a file, one after the other. The strip of a Gram matrix is made small, so that the
# matrices of tiny models have several.
WORKER = """
import json, sys
from quantkit import api, joining, stats
stats.BLOCK = 48
with joining.joined("cpu") as group:
    for name, recipe in json.load(open(sys.argv[1])).items():
        api.quantize(recipe, out=f"{sys.argv[2]}/{name}", device="cpu", ranks=group)
sys.stdout.write(f"rank {group.rank} is done\\n")  # as one piece: others write into the same pipe
"""


def environment() -> dict[str, str]:
    path = os.pathsep.join(p for p in sys.path if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def torchrun(count: int, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), *command]
    return subprocess.run(run, capture_output=True, text=True, env=environment(), cwd=cwd, timeout=300)


def recipe(model: Path, **changes: Any) -> dict[str, Any]:
    return {"model": str(model), "scheme": W4, "calibration": CALIBRATION, "validate": "none", **changes}


def compare(tmp_path: Path, count: int, recipes: Mapping[str, dict[str, Any]]) -> None:
    """Runs every recipe in one process, here, and in `count`; compares every byte of every file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "BLOCK", 48)
        for name, one in recipes.items():
            quantkit.quantize(one, out=tmp_path / "one" / name, device="cpu")
    (tmp_path / "recipes.json").write_text(json.dumps(recipes))
    (tmp_path / "worker.py").write_text(WORKER)
    done = torchrun(count, "worker.py", "recipes.json", "many", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(x for x in done.stdout.splitlines() if x) == [f"rank {r} is done" for r in range(count)]
    for name in recipes:
        one, many = content(tmp_path / "one" / name), content(tmp_path / "many" / name)
        assert one.keys() == many.keys(), name
        assert [file for file in one if one[file] != many[file]] == [], name
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == sorted(recipes)  # nothing is left beside them


def test_two_ranks_write_what_one_process_writes(tmp_path: Path) -> None:
    llama = tiny.save(tmp_path / "llama")
    mixture = tiny.save(tmp_path / "mixture", "qwen3-moe")
    compare(
        tmp_path,
        2,
        {
            "gptq": recipe(llama),
            "experts": recipe(mixture),
            "awq": recipe(llama, method="rtn", transforms=["awq"]),
            "rtn": recipe(llama, method="rtn"),
            "autoround": recipe(llama, method={"autoround": {"iterations": 6}}),
        },
    )


@pytest.mark.slow
def test_four_ranks_write_what_one_process_writes(tmp_path: Path) -> None:
    llama, mixture = tiny.save(tmp_path / "llama"), tiny.save(tmp_path / "mixture", "qwen3-moe")
    texts = [{"text": " ".join(f"word{i}" for i in range(5 + 3 * k))} for k in range(9)]
    (tmp_path / "short.jsonl").write_text("\n".join(map(json.dumps, texts)))
    padded = {**CALIBRATION, "data": str(tmp_path / "short.jsonl"), "packing": "document", "min_tokens": 4}
    compare(
        tmp_path,
        4,
        {
            "gptq": recipe(llama),
            "padded": recipe(llama, calibration=padded),
            "experts": recipe(mixture),
            "experts-awq": recipe(mixture, transforms=["awq"]),
            "shared-experts": recipe(tiny.save(tmp_path / "deepseek", "deepseek")),
            "drift": recipe(llama, method={"gptq": {"pre_shift": 0.5}}),
            "static-inputs": recipe(
                llama, scheme="FP8", kv_cache="fp8", calibration={**CALIBRATION, "input_scale": "mse"}
            ),
            "smoothquant": recipe(llama, scheme="W8A8", transforms=["smoothquant"]),
            "rotation": recipe(llama, transforms=["rotation", "awq"]),
            "autoround": recipe(llama, method={"autoround": {"iterations": 6}}),
            "rules": recipe(
                llama,
                rules=[{"match": "*.k_proj", "scheme": {"preset": "W8A16", "group_size": 32}}],
                export={"engines": ["transformers"]},
            ),
            "validated": recipe(
                llama,
                validate={
                    "perplexity": {"windows": 2, "length": 32},
                    "generation": {"prompts": 2, "tokens": 4},
                    "gates": {"kl": 0.0},
                    "repair": {"size": 2.0},
                },
            ),
        },
    )


# One that ends, ends all ---------------------------------------------------------------------------------------------

# The command line, with one rank that does something else at the second block.
FAULTY = """
import os, signal, sys
from quantkit import pipeline
block = pipeline._block
def faulty(run, one, batches):
    if one.index == int(os.environ["BLOCK"]) and run.ranks.rank == int(os.environ["FAULTY"]):
        {fault}
    block(run, one, batches)
pipeline._block = faulty
from quantkit.cli import main
main()
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


def ended(
    tmp_path: Path, fault: str, faulty: int = 1, count: int = 2, block: int = 1, out: str = "out", **model: Any
) -> tuple[str, str]:
    """What a run says of which one rank fails at a block, and the launcher's summary of who ended how."""
    if not (tmp_path / "model").exists():
        tiny.save(tmp_path / "model", **model)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(tmp_path / "model")))
    (tmp_path / "faulty.py").write_text(FAULTY.format(fault=fault))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAULTY", str(faulty))
        patch.setenv("BLOCK", str(block))
        done = torchrun(count, "faulty.py", "quantize", "recipe.json", f"--out={out}", "--device=cpu", cwd=tmp_path)
    assert done.returncode != 0
    assert not (tmp_path / out).exists()
    said, _, summary = done.stderr.partition("Root Cause")
    assert "Traceback" not in said.partition("ChildFailedError")[0].replace(
        "Traceback (most recent call last):\n", "", 1
    )
    return said, summary


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error:")]


def test_a_rank_that_is_killed_ends_all_with_a_sentence(tmp_path: Path) -> None:
    said, summary = ended(tmp_path, KILLED)
    (line,) = errors(said)
    assert "a rank ended without a word" in line and "the same command goes on" in line
    assert "exitcode  : -9" in summary and "rank      : 1" in summary


@pytest.mark.slow
def test_a_rank_that_fails_says_why_and_the_others_end_with_its_code(tmp_path: Path) -> None:
    said, summary = ended(tmp_path, "raise pipeline.InputError('the layer is bad')")
    assert errors(said) == ["error: rank 1: the layer is bad"]
    assert "exitcode  : 2" in summary  # of whichever rank torchrun saw first: the others end at once, with the same
    said, summary = ended(tmp_path, "raise OSError(28, 'No space left on device')", faulty=0, count=4)
    assert errors(said) == ["error: no room left on the disk; free some, or choose another place with --out"]
    assert "exitcode  : 4" in summary


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """Three ranks are cut short, two go on and are cut short too, one ends it; the bytes are those of one alone."""
    ended(tmp_path, KILLED, count=3, num_hidden_layers=4)
    assert json.loads((tmp_path / ".out.partial" / "journal").read_text().splitlines()[-1][9:])["index"] == 0
    said, _ = ended(tmp_path, KILLED, faulty=0, block=2, num_hidden_layers=4)
    assert "continuing at block 2 of 4" in said
    command = [sys.executable, "-m", "quantkit", "quantize", "recipe.json", "--out", "out", "--device=cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "continuing at block 3 of 4" in done.stderr, done.stderr[-2000:]
    ended(tmp_path, KILLED, faulty=0, block=1, out="again", num_hidden_layers=4)
    done = torchrun(4, "-m", "quantkit", "quantize", "recipe.json", "--out=again", "--device=cpu", cwd=tmp_path)
    assert done.returncode == 0 and "continuing at block 2 of 4" in done.stderr, done.stderr[-2000:]
    quantkit.quantize(tmp_path / "recipe.json", out=tmp_path / "one", device="cpu")
    assert untimed(tmp_path / "out") == untimed(tmp_path / "again") == untimed(tmp_path / "one")


@pytest.mark.slow
def test_ranks_must_be_given_the_same(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    for rank, method in enumerate(("gptq", "rtn")):
        (tmp_path / f"{rank}.json").write_text(json.dumps(recipe(folder, method=method)))
    command = f"{sys.executable} -m quantkit quantize $RANK.json --device=cpu --out out"
    (tmp_path / "start.sh").write_text(command)
    done = torchrun(2, "--no-python", "sh", "start.sh", cwd=tmp_path)
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    said = errors(done.stderr)
    assert said and all("have not the same recipe: method is" in line for line in said)


@pytest.mark.slow
def test_a_mistake_that_all_make_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(tmp_path / "absent")))
    done = torchrun(2, "-m", "quantkit", "quantize", "recipe.json", "--out", "out", cwd=tmp_path)
    (line,) = errors(done.stderr)
    assert "neither a folder on this machine nor a Hub id" in line
    model = tiny.save(tmp_path / "model")
    few = {**CALIBRATION, "batch_size": 8, "samples": 8}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(model, calibration=few)))
    done = torchrun(2, "-m", "quantkit", "quantize", "recipe.json", "--out", "out", cwd=tmp_path)
    (line,) = errors(done.stderr)
    assert "8 calibration rows are 1 batches of up to 8, too few for 2 ranks; start no more than 1" in line


def test_a_run_that_made_its_batches_smaller_is_not_for_several() -> None:
    """Batches are numbered as they are dealt; those that one GPU had to cut are numbered otherwise."""
    run: Any = SimpleNamespace(ranks=ranks.Ranks(0, 2), finished=SimpleNamespace(report=SimpleNamespace(memory=[1])))
    with pytest.raises(InputError, match="one process must go on with it; --fresh"):
        pipeline._same_batches(run)


# Without others ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is '2', but RANK, MASTER_ADDR, MASTER_PORT is not set; start with torchrun"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE='two'.*not whole numbers"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 and WORLD_SIZE 2; ranks go from 0"),
    ],
)
def test_a_launcher_that_is_none(variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in joining.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if "RANK" in variables:
        variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", **variables}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=says), joining.joined("cpu"):
        pass


def test_ranks_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    settings = {"WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(joining, "JOIN", datetime.timedelta(milliseconds=300))
    with pytest.raises(MissingError, match="of 3 ranks, 1, 2 did not come to localhost"), joining.joined("cpu"):
        pass
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(MissingError, match="rank 1 does not reach the launcher's store"), joining.joined("cpu"):
        pass


def test_alone_every_exchange_is_nothing() -> None:
    alone, x = ranks.ALONE, torch.arange(3.0)
    assert alone.everyone({"a": 1}) == [{"a": 1}] and alone.told([2]) == [2] and alone.share("abc") == ["a", "b", "c"]
    alone.largest([x])
    assert alone.spread({1: [x], 0: []}, "cpu") == [[], [x]]
    parcels = [ranks.Parcel(1, [0], [x]), ranks.Parcel(0, [0], [])]
    assert [(n, source) for n, source, _ in alone.deliver(parcels, "cpu")] == [(0, 0), (1, 0)]
    with joining.joined() as found:
        assert found is alone


def test_work_goes_to_the_rank_that_has_least() -> None:
    assert ranks.assign([5, 3, 3, 1], 2) == [0, 1, 1, 0]
    assert ranks.assign([1, 1], 4) == [0, 1] and ranks.assign([], 2) == []
    assert ranks.assign([5, 3, 2], 2, busy=4) == [1, 0, 1]


def test_strips_of_a_large_gram_matrix_even_the_work_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-3-8B's inputs on two ranks: the down projection's matrix alone is three quarters of the work."""
    widths = {"qkv": 4096, "o": 4096, "gate, up": 4096, "down": 14336}
    where = {"qkv": 0, "o": 0, "gate, up": 0, "down": 1}
    found = observation._divided(dict.fromkeys(widths, frozenset({"gram"})), widths, where, 2)
    load = [0, 0]
    for key, parts in found.items():
        assert where[key] in parts
        assert sorted(s for strips in parts.values() for s in strips) == list(stats.strips_of(widths[key]))
        for rank, strips in parts.items():
            load[rank] += sum((widths[key] - s) * min(stats.BLOCK, widths[key] - s) for s in strips)
    assert max(load) < 0.55 * sum(load)
    alone = observation._divided(dict.fromkeys(widths, frozenset({"gram"})), widths, dict.fromkeys(widths, 0), 1)
    assert all(list(parts) == [0] for parts in alone.values())


def test_a_reason_is_told_once_and_found_by_the_others() -> None:
    from torch.distributed import HashStore

    store = HashStore()
    one, two = Heartbeat(store, 0, 2), Heartbeat(store, 1, 2)
    assert one.report(2, "it is broken") and not two.report(2, "it is broken")
    with pytest.raises(SystemExit) as caught:
        two.lost("connection closed")
    assert caught.value.code == 2


def test_a_rank_that_is_silent_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import HashStore

    clock = [0.0]
    monkeypatch.setattr("quantkit.heartbeat.time.monotonic", lambda: clock[0])
    store = HashStore()
    watch = Heartbeat(store, 0, 2)
    for at, beat, silent in [
        (50, None, False),
        (55, "1", False),
        (110, "1", False),
        (116, "1", True),
        (120, "2", False),
    ]:
        clock[0] = at
        if beat is not None:
            store.set("beat/1", beat)
        assert watch._is_silent(1) is silent, at
