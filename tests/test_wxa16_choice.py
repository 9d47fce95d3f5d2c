"""Which configuration a weight-only product gets: always one that can run, from a table where there is one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from packed_weights import CASES

from quantkit_kernels import choice, layout
from quantkit_kernels.choice import BUCKETS, Choice, Gpu, Problem

GPUS = [
    Gpu(),
    Gpu("NVIDIA A100-SXM4-80GB", 80, 108),
    Gpu("NVIDIA GeForce RTX 4090", 89, 128),
    Gpu("NVIDIA B200", 100, 148),
]
SHAPES = [(6144, 4096), (4096, 14336), (57344, 8192), (1024, 64), (7, 16)]


@pytest.fixture(autouse=True)
def no_tables_left() -> Iterator[None]:
    """Tables are read once: each test reads its own."""
    choice.load_tables.cache_clear()
    choice._choose.cache_clear()
    yield
    choice.load_tables.cache_clear()
    choice._choose.cache_clear()


def can_run(found: Choice, problem: Problem, gpu: Gpu) -> None:
    line = layout.get(problem.kind).line
    if found.path == "dequant":
        assert found.slab > 0
        return
    assert found.block_m in (8, 16, 32, 64, 128, 256) and found.block_n % (16 * found.warps) == 0
    assert 0 <= found.split <= -(-layout.lines(problem.kind, problem.k) // found.unroll)
    assert choice.shared_bytes(found, problem, found.stages, gpu) <= choice.SHARED[gpu.capability] and found.stages >= 1
    assert found.where in ("before", "group", "end") and (found.where == "end") == (problem.group == 0)
    assert found.where != "group" or problem.group % line == 0


@pytest.mark.parametrize("gpu", GPUS, ids=lambda g: g.name)
def test_every_choice_can_run(gpu: Gpu) -> None:
    for case in CASES:
        for n, k in SHAPES:
            for m in (1, 8, 9, 33, 100, 300, 5000):
                problem = Problem(*case[:2], n, k, case[2], m)
                can_run(choice.choose(problem, gpu), problem, gpu)


def test_candidates_can_run_and_begin_with_the_heuristic() -> None:
    gpu = Gpu()
    for case in (CASES[0], CASES[5], CASES[14], CASES[19]):
        for m in (1, 16, 32, 64, 128, 512):
            problem = Problem(*case[:2], 28672, 4096, case[2], m)
            found = choice.candidates(problem, gpu)
            assert found[0] == choice.fitted(choice.heuristic(problem, gpu), problem, gpu)
            assert 5 <= len(found) == len(set(found)) <= 50
            for one in found:
                can_run(one, problem, gpu)
            near = choice.neighbours(found[0], problem, gpu)
            assert found[0] not in near and 2 <= len(near) <= 20
            for one in near:
                can_run(one, problem, gpu)


def test_programs_fill_the_gpu() -> None:
    """Few tokens, by the heuristic: about three programs a multiprocessor where sums are long enough to be split so."""
    gpu = Gpu()
    for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (57344, 8192)):
        for m in (1, 16):
            problem = Problem("int4", "bf16", n, k, 128, m)
            found = choice.heuristic(problem, gpu)
            programs = -(-n // found.block_n) * found.split
            assert programs >= 2.9 * gpu.sms and k / found.split >= 512
            assert programs / (gpu.sms * -(-programs // gpu.sms)) >= 0.84
    for m in (512, 4096):  # what it can decode beside the products is not decoded to memory
        assert choice.choose(Problem("int4", "bf16", 57344, 8192, 128, m), gpu).path == "hopper"
    assert choice.choose(Problem("int8", "bf16", 28672, 4096, 128, 4096), gpu).path == "dequant"
    assert choice.choose(Problem("int4", "bf16", 28672, 4096, 128, 4096), GPUS[1]).path == "dequant"


def test_a_table_is_written_merged_and_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, path = Gpu("GPU of tests", 90, 100), tmp_path / "tests.json"
    small, large = Problem("int4", "bf16", 6144, 4096, 128, 1), Problem("int4", "bf16", 6144, 4096, 128, 64)
    fast = Choice(block_m=8, block_n=128, split=3, stages=6)
    choice.save_table(path, gpu, {small: fast}, notes=["triton 3.6"])
    choice.save_table(path, gpu, {large: Choice(path="dequant")})
    monkeypatch.setenv(choice.TABLES, str(tmp_path))
    choice.load_tables.cache_clear()
    assert choice.choose(small, gpu) == fast
    near = small._replace(n=6656, k=4224)  # in the same buckets
    assert choice.choose(near, gpu) == fast
    assert choice.choose(large, gpu).path == "dequant"
    assert choice.choose(small._replace(kind="int4z", group=64), gpu) == choice.fitted(
        fast, small._replace(group=64), gpu
    )
    assert choice.choose(small._replace(scale_dtype="fp16"), gpu) == dataclasses.replace(fast, where="group")
    assert choice.choose(small._replace(kind="int8"), gpu) != fast and choice.choose(small, Gpu("another")) != fast
    assert choice.choose(small._replace(m=2), gpu) == choice.fitted(
        choice.heuristic(small._replace(m=2), gpu), small._replace(m=2), gpu
    )
    table = json.loads(path.read_text())
    assert table["gpu"]["name"] == gpu.name and len(table["entries"]["int4/bf16/g128/25x24"]) == 2
    with pytest.raises(ValueError, match=r"is of .*GPU of tests"):
        choice.save_table(path, Gpu(), {small: fast})
    path.write_text(json.dumps(table | {"version": 0}))
    choice.load_tables.cache_clear()
    with pytest.raises(ValueError, match="is a table of version 0; this is version 1"):
        choice.choose(small._replace(m=3), gpu)


def test_an_entry_that_does_not_fit_is_put_right() -> None:
    gpu = Gpu()
    problem = Problem("int4", "bf16", 64, 256, 128, 300)
    wide = Choice(block_m=256, block_n=256, warps=8, stages=6, split=40, unroll=1, where="end")
    found = choice.fitted(wide, problem, gpu)
    assert found.split == 2 and found.where == "before" and found.block_m == 128
    can_run(found, problem, gpu)
    assert choice.fitted(Choice(where="group"), problem._replace(group=0), gpu).where == "end"
    assert choice.fitted(Choice(where="group"), problem._replace(group=64), gpu).where == "before"


def test_buckets() -> None:
    assert [choice.m_bucket(m) for m in (1, 3, 16, 17, 4096, 9999)] == [1, 4, 16, 32, 4096, 4096]
    assert list(BUCKETS) == sorted(BUCKETS)
    assert {choice.bucket(v) for v in (28672, 29000, 28000)} == {30}
