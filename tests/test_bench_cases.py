"""The benchmark's cases, its tables and its command line, without a GPU: small cases run on the CPU."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts of kernels/ import each other by their plain names."""
    monkeypatch.syspath_prepend(KERNELS)


def script(name: str) -> Any:
    return importlib.import_module(name)


# Cases


def test_every_target_has_its_case() -> None:
    cases = {case.name: case for case in script("bench_cases").all_cases()}
    assert len(cases) == len(script("bench_cases").all_cases()), "two cases have one name"
    missing = {name for case in cases.values() for name in case.compared} - set(cases)
    assert not missing, f"compared with, but no cases: {sorted(missing)}"
    anchors = script("bench_anchors")
    for (n, k), bounds in {
        (28672, 4096): {1: 20, 8: 20, 16: 20, 32: 25, 64: 34, 128: 62, 256: 95},
        (57344, 8192): {1: 75, 16: 75, 32: 85, 64: 120, 128: 230, 256: 345},
        (4096, 14336): {16: 13, 32: 18, 64: 28, 128: 36, 256: 52},
        (6144, 4096): {16: 8, 32: 10, 64: 14, 128: 17, 256: 23},
    }.items():
        for m, us in bounds.items():
            goals = cases[f"wxa16/int4_g128/{n}x{k}/{m}"].goals
            assert [goal.bound for goal in goals if goal.kind == "us"] == [us]
            slower = [goal for goal in goals if goal.kind == "ratio"]
            assert bool(slower) == (m <= 128) and all(goal.versus == (anchors.cublas((n, k), m),) for goal in slower)
    ratios = {
        (n, k, m): next(g.bound for g in cases[f"wxa16/int4_g128/{n}x{k}/{m}"].goals)
        for n, k in anchors.SHAPES
        for m in (1024, 4096)
    }
    assert ratios[28672, 4096, 1024] == 1.2 and ratios[6144, 4096, 1024] == 1.25 and ratios[4096, 14336, 4096] == 1.1


def test_the_anchors_floors_agree_with_ours() -> None:
    """4-bit codes with a word of scale and zero point for 128 columns: the floors beside the anchors."""
    timing = script("bench_timing")
    top = timing.ceilings(f"NVIDIA {script('bench_anchors').DEVICE}")
    for (n, k), floor in {(6144, 4096): 3.1, (28672, 4096): 14.5, (4096, 14336): 7.3, (57344, 8192): 58.1}.items():
        assert timing.floor_us(int(n * k * 0.53125) + 2 * k + 2 * n, 2 * n * k, 16, top) == pytest.approx(
            floor, abs=0.06
        )


def small() -> list[Any]:
    sys.path.insert(0, str(KERNELS))
    try:
        return script("bench_cases").small_cases()
    finally:
        sys.path.remove(str(KERNELS))


@pytest.mark.parametrize("case", small(), ids=lambda case: case.name)
def test_small_cases_hold_for_the_plain_functions(case: Any) -> None:
    core = script("bench_core")
    maker = core.Maker(CPU, rotate=0)
    work = case.make(maker)
    wrong = [str(check) for check in work.checks() if not check.ok]
    assert not wrong
    assert work.moved > 0 and len(work.sets) == 1


def test_a_packed_weight_that_is_not_what_was_drawn_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of two neighbouring columns swapped, scales of the group before: the case is red."""
    weights, core = script("bench_weights"), script("bench_core")
    found = weights.kernel

    def run(spoil: Any) -> bool:
        def kernel(module: str, name: str) -> Any:
            real = found(module, name)
            return real if name != "pack" else lambda kind, **parts: real(kind, **spoil(parts))

        monkeypatch.setattr(weights, "kernel", kernel)
        work = weights.weight_only(core.Maker(CPU, rotate=0), weights.INT4, 64, 512, 20)
        return all(check.ok for check in work.checks())

    def swapped(parts: dict[str, Any]) -> dict[str, Any]:
        order = torch.arange(512)
        order[[36, 37]] = order[[37, 36]]
        return parts | {"codes_NK": parts["codes_NK"][:, order]}

    assert run(lambda parts: parts)
    assert not run(swapped)
    assert not run(lambda parts: parts | {"scale": parts["scale"].roll(1, 1)})


def test_marlin_is_packed_in_tiles() -> None:
    """Every element of a tile of 16 x 64 has its place, and a thread's word has its rows of one column."""
    marlin = script("compare_marlin")
    order = marlin.order()
    assert sorted(order.tolist()) == list(range(1024))
    # Word 0 is of thread 0: rows 0, 1, 8, 9 of the columns 0 and 8; even places first, as its nibbles are read.
    assert [divmod(i, 64) for i in order[:8].tolist()] == [
        (0, 0),
        (8, 0),
        (0, 8),
        (8, 8),
        (1, 0),
        (9, 0),
        (1, 8),
        (9, 8),
    ]
    codes = torch.randint(0, 16, (128, 256), generator=torch.Generator().manual_seed(1))
    words, scale = marlin.pack(codes, torch.arange(256.0).reshape(128, 2) / 256)
    assert words.shape == (16, 256) and words.dtype == torch.int32
    assert [int(words[0, 0] >> 4 * i & 15) for i in range(8)] == codes.t()[
        torch.tensor([0, 8, 0, 8, 1, 9, 1, 9]), torch.tensor([0, 0, 8, 8, 0, 0, 8, 8])
    ].tolist()
    assert (scale[1, :4] * 256).tolist() == [1.0, 17.0, 33.0, 49.0]


# Tables


def filled(tmp_path: Path, device: str = "NVIDIA H200") -> tuple[Any, list[Any]]:
    """A store with W4A16 at one size beside cuBLAS, and one wrong case."""
    store_module, timing = script("bench_store"), script("bench_timing")
    cases = script("bench_cases").all_cases()
    names = list(timing.Environment.__dataclass_fields__)
    store = store_module.Store(tmp_path / "bench.json")
    run = store.begin(timing.Environment(**{name: name for name in names} | {"device": device}))

    def put(name: str, us: float, moved: int = 0, floor: float = 0.0) -> None:
        times = timing.Times(us, us * 0.99, us * 1.01, 20, 20)
        store.put(store_module.Record(name, run, "ok", times=times, moved=moved, floor_us=floor, operations=10**9))

    put("wxa16/int4_g128/28672x4096/16", 19.5, 62_000_000, 14.6)
    put("cublas/bf16/28672x4096/16", 58.5)
    put("wxa16/int4_g128/6144x4096/16", 9.0, 13_000_000, 3.1)
    put("cublas/bf16/6144x4096/16", 8.1)
    put("ceiling/empty", 1.9)
    store.put(store_module.Record("act/silu_mul_int8/14336/4096", run, "red", "relative 0.1 (limit 0.002)"))
    return store, cases


def test_the_table_says_what_is_reached(tmp_path: Path) -> None:
    store, cases = filled(tmp_path)
    text = script("bench_table").Tables(store, cases).text()
    good = next(line for line in text.splitlines() if line.startswith("| 28672 x 4096 | 16"))
    assert [part.strip() for part in good.strip("|").split("|")] == [
        "28672 x 4096",
        "16",
        "<= 20 us, <= 1 x cublas",
        "**19.5**",
        "29.8",
        "134.4",
        "90.1",
        "58.5",
        "3.00x",
        "75% (85%)",
        "pass",
    ]
    bad = next(line for line in text.splitlines() if line.startswith("| 6144 x 4096 | 16"))
    assert "miss: 9.00, <= 8 us; miss: 1.11, <= 1 x cublas" in bad
    assert "act/silu_mul_int8/14336/4096: red: relative 0.1" in text
    assert "an empty kernel in a graph takes 1.90 us" in text


def test_anchors_of_another_gpu_are_left_out(tmp_path: Path) -> None:
    store, cases = filled(tmp_path, "NVIDIA A100")
    text = script("bench_table").Tables(store, cases).text()
    assert "29.8" not in text and "19.5" in text


def test_a_store_is_read_as_it_was_written(tmp_path: Path) -> None:
    store, cases = filled(tmp_path)
    again = script("bench_store").Store(store.path)
    assert script("bench_table").Tables(again, cases).text() == script("bench_table").Tables(store, cases).text()


# The command line


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(KERNELS / "bench.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "("], "no regular expression"),
        (["--only", "int5"], "matches none of"),
        (["--replays", "3"], "--replays is 3"),
        (["--budget", "0"], "--budget is 0"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--render", "--out", "absent.json"], "absent.json, which is not there"),
        (["--marlin", "absent"], "absent is no folder"),
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script("bench").main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_list_and_render_need_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("bench").main(["--list", "--only", "int4_g128/28672x4096/(1|16)$", "--only", "ceiling/copy"]) == 0
    assert capsys.readouterr().out.split() == [
        "ceiling/copy",
        "wxa16/int4_g128/28672x4096/1",
        "wxa16/int4_g128/28672x4096/16",
        "tinygemm/int4_g128/28672x4096/1",
        "tinygemm/int4_g128/28672x4096/16",
    ]
    store, _ = filled(tmp_path)
    target = tmp_path / "deep" / "results.md"
    assert script("bench").main(["--render", "--out", str(store.path), "--table", str(target)]) == 0
    assert "### W4A16, groups of 128" in target.read_text()


def test_without_a_gpu_it_says_so() -> None:
    done = bench("--only", "ceiling")
    assert done.returncode == 4 and "no CUDA device" in done.stderr and not done.stdout


# Watching over the process that measures


def child(tmp_path: Path, body: str) -> tuple[list[str], Path]:
    """A process that goes on where it stopped: `done` is what it has done, and `step` writes it."""
    beat = tmp_path / "beat"
    head = f"import os, sys, time, pathlib\nbeat = pathlib.Path({str(beat)!r})\n"
    head += "done = beat.read_text() if beat.exists() else ''\n"
    head += "def step(text):\n    time.sleep(0.01)\n"
    head += "    beat.write_text(beat.read_text() + text if beat.exists() else text)\n"
    return [sys.executable, "-c", head + body], beat


@pytest.mark.parametrize(
    ("body", "good", "steps"),
    [
        ("step('a')", True, "a"),
        ("step('a'); sys.exit(10)", False, "a"),
        ("step('a'); os.abort() if len(done) < 2 else None", False, "aaa"),  # dies twice, then comes to its end
        ("step('a'); time.sleep(60 if not done else 0)", False, "aa"),  # hangs once
        ("sys.exit(7)", False, ""),  # does nothing: not begun again
    ],
)
def test_the_others_go_on_after_a_process_dies_or_hangs(tmp_path: Path, body: str, good: bool, steps: str) -> None:
    command, beat = child(tmp_path, body)
    assert script("bench").supervise(command, beat, end=time.monotonic() + 60, case_limit=3) is good
    assert (beat.read_text() if beat.exists() else "") == steps


def test_the_check_of_small_cases_names_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    core, gate = script("bench_core"), script("bench_gate")

    def case(name: str, value: float) -> Any:
        return core.Case(name, lambda maker: core.Work(lambda: None, [()], lambda: [gate.Check("off", value, 1.0)], 0))

    def missing(maker: Any) -> Any:
        raise core.Missing("none here")

    def broken(maker: Any) -> Any:
        raise RuntimeError("of no use")

    assert script("bench").check_small([case("a", 0.5), core.Case("c", missing)], CPU)
    assert not script("bench").check_small([case("a", 0.5), case("b", 2.0)], CPU)
    assert not script("bench").check_small([core.Case("d", broken), case("e", 0.5)], CPU)
    found = re.findall(r"^\w+ \w", capsys.readouterr().out, re.M)
    assert found == ["ok a", "skipped c", "ok a", "wrong b", "wrong d", "ok e"]
