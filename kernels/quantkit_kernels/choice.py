"""Which tiles, how many stages, how often split: the configuration of a weight-only product, chosen in Python.

A table that was measured on a GPU answers first (`tables/*.json`, one file a GPU, and those in the folder that the
environment variable QUANTKIT_KERNELS_TABLES names, which win), if need be with its figures for a like weight; shapes
that it does not know, and GPUs without a table, get what `heuristic` computes. Nothing is measured here: `candidates`,
then `neighbours`, list what is worth timing, `wxa16.run_with` runs one of them, `save_table` writes what was found.

    entries of a table   "int4/bf16/g128/30x24": {"16": {"block_m": 16, ...}, ...}
                         kind / scale dtype / group / buckets of N and K, then the largest M that it is for
    bucket(v)            round(2 log2 v): shapes up to about 20% apart share one
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantkit_kernels import layout

VERSION = 1
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}
TABLES = "QUANTKIT_KERNELS_TABLES"


class Gpu(NamedTuple):
    """What a choice depends on. Without a GPU: an H200, for tests."""

    name: str = "NVIDIA H200"
    capability: int = 90
    sms: int = 132


@dataclass(frozen=True)
class Choice:
    """One configuration.

    path      "gemm": the kernel; "hopper": _wxa16_hopper.gemm_hopper, for what `hopper_fits`; "dequant": the weight
              decoded in slabs, each multiplied by cuBLAS
    block_m, block_n, unroll, split, warps, stages   tokens, rows, lines at once, programs a tile, as _wxa16.gemm;
              split 0: all tiles shared out evenly among as many programs as run at once, _wxa16_stream.gemm_stream;
              "hopper" always does that
    where     "before", "group" or "end": when the scale is applied; "group" needs groups of whole lines, "end" is for
              one scale a row, and there always taken
    group_m   token tiles that go over the rows together, 0: one after the other
    slab      "dequant": bytes of decoded weight at once
    """

    path: str = "gemm"
    block_m: int = 16
    block_n: int = 64
    unroll: int = 1
    split: int = 1
    warps: int = 4
    stages: int = 4
    where: str = "before"
    group_m: int = 0
    slab: int = 40_000_000


class Problem(NamedTuple):
    """What is multiplied: layout.Packed without its tensors, and the number of tokens."""

    kind: str
    scale_dtype: str
    n: int
    k: int
    group: int
    m: int
    dtype: str = "bf16"  # of x


@functools.lru_cache(maxsize=64)
def gpu_of(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return Gpu()
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.name, found.major * 10 + found.minor, found.multi_processor_count)


def choose(problem: Problem, gpu: Gpu) -> Choice:
    """The configuration for a problem: from a table, else by the heuristic. Always one that can run."""
    return _choose(problem._replace(m=m_bucket(problem.m)), gpu)


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, gpu: Gpu) -> Choice:
    table = load_tables().get(gpu.name, {})
    keys = [table_key(one) for one in (problem, *relatives(problem))]
    entry = next((row for key in keys if (row := table.get(key, {}).get(str(problem.m)))), None)
    found = heuristic(problem, gpu) if entry is None else Choice(**entry)
    if table_key(problem) not in table and problem.m <= 32 and not exact_scale(problem):
        found = replace(found, where="group")
    return fitted(found, problem, gpu)


def relatives(problem: Problem) -> list[Problem]:
    """Weights of as many bits, whose figures are nearer than a guess: no zero points, bf16 scales, groups of 128."""
    if not problem.group or not layout.get(problem.kind).integer:
        return []
    plain = problem._replace(kind=problem.kind.removesuffix("z"), scale_dtype="bf16")
    return [plain, plain._replace(group=128)]


def bucket(size: int) -> int:
    return round(2 * math.log2(max(size, 1)))


def m_bucket(m: int) -> int:
    """The bucket of a number of tokens: the smallest that holds it, else the largest there is."""
    return next((b for b in BUCKETS if m <= b), BUCKETS[-1])


def table_key(problem: Problem) -> str:
    p = problem
    return f"{p.kind}/{p.scale_dtype}/g{p.group}/{bucket(p.n)}x{bucket(p.k)}"


def heuristic(problem: Problem, gpu: Gpu) -> Choice:
    """A configuration from the sizes alone; figures are the starting points of kernels/LOG.md, not measurements."""
    m = problem.m
    if m < 128 or not hopper_fits(problem, gpu):
        return portable(problem, gpu)
    rounds = -(-problem.n // 128) * -(-m // 256) / gpu.sms
    found = hopper_tile(256, 128, 8) if m > 128 and rounds > 0.9 else hopper_tile(128, 128, 8)
    return replace(found, group_m=4 if m > found.block_m else 0)


def portable(problem: Problem, gpu: Gpu) -> Choice:
    """As `heuristic`, of the paths that every GPU and every kind of weight has."""
    form, m = layout.get(problem.kind), problem.m
    steps = max(1, 128 // form.line)  # lines that make 128 columns
    many = gpu.capability in (90, 100, 103)
    if m >= (768 if form.bits == 8 else 1024) // (1 if many else 4):
        return Choice(path="dequant")
    if m <= 8:
        found = Choice(block_m=8, block_n=64, unroll=2 * steps if form.line < 256 else 1, stages=4)
    elif m <= 16:
        wide = many and problem.n >= 16384  # half the instructions around the loop's own, where there are tiles enough
        found = Choice(block_m=16, block_n=128 if wide else 64, unroll=steps if wide else 256 // form.line, stages=5)
    elif m <= 32 or not many:
        found = Choice(block_m=32, block_n=128, unroll=steps, stages=4 if many else 3, group_m=4 if m > 32 else 0)
    elif m <= 64:
        found = Choice(block_m=64, block_n=128, unroll=steps, stages=4, warps=8 if form.line == 256 else 4)
    elif m <= 128 or -(-problem.n // 128) * -(-m // 256) < gpu.sms:
        found = Choice(block_m=128, block_n=128, unroll=steps, stages=4, warps=8)
    else:
        found = Choice(block_m=256, block_n=128, unroll=steps, stages=3, warps=8, group_m=4)
    found = replace(found, split=split_for(problem, found, gpu))
    if m <= 32 and not exact_scale(problem):
        found = replace(found, where="group")  # such a scale costs two products a weight, and a rounding
    if m > 16:
        return found
    # As many stages as leave room for all programs at once.
    programs = -(-problem.n // found.block_n) * found.split
    room = SHARED.get(gpu.capability, 101_376) // max(1, -(-programs // gpu.sms))
    stages = [s for s in (3, 4, 5, 6) if shared_bytes(found, problem, s - (m <= 8), gpu) <= room]
    return replace(found, stages=max(stages, default=3))


def split_for(problem: Problem, choice: Choice, gpu: Gpu) -> int:
    """Programs a tile: so many that all multiprocessors have work to the end, and enough bytes are on their way.

    A model of the time: bytes or products at the rates of an H200, by how full the last wave is and, for few tokens,
    whether there are three programs a multiprocessor; for a split, what partial sums cost. At least 512 columns each.
    """
    p, form = problem, layout.get(problem.kind)
    m_tiles = -(-p.m // choice.block_m)
    tiles, share = -(-p.n // choice.block_n) * m_tiles, gpu.sms / 132
    work = max(p.n * p.k * form.bits / 8 / 4.3e12, 2 * m_tiles * choice.block_m * p.n * p.k / 6.5e14) / share
    wanted = gpu.sms * (3 if choice.block_m <= 16 else 2 if choice.block_m <= 32 else 1)
    best, least = 1, float("inf")
    for split in range(1, 17):
        programs = tiles * split
        full = min(1.0, programs / wanted) * programs / (gpu.sms * -(-programs // gpu.sms))
        partial = 0.0 if split == 1 else 1e-6 + 8 * split * m_tiles * choice.block_m * p.n / 4e12 / share
        if work / full + partial < 0.99 * least and (split == 1 or p.k >= 512 * split):
            best, least = split, work / full + partial
    return best


def fitted(choice: Choice, problem: Problem, gpu: Gpu) -> Choice:
    """The choice, with what the problem or the GPU does not allow put right: where, split, stages, tokens."""
    form = layout.get(problem.kind)
    if choice.path == "hopper" and not hopper_fits(problem, gpu):
        choice = portable(problem, gpu)
    where = choice.where
    if problem.group == 0:
        where = "end"
    elif where == "end" or (where == "group" and problem.group % form.line):
        where = "before"
    if choice.path == "hopper":
        return replace(choice, where=where, unroll=1, split=0)
    steps = -(-layout.lines(problem.kind, problem.k) // choice.unroll)
    split = min(choice.split, steps)
    limit = SHARED.get(gpu.capability, 101_376)
    stages = choice.stages
    while shared_bytes(choice, problem, stages, gpu) > limit:
        if stages > 2:
            stages -= 1
        else:
            choice, stages = replace(choice, block_m=choice.block_m // 2), choice.stages
    return replace(choice, where=where, split=split, stages=stages)


def hopper_fits(problem: Problem, gpu: Gpu) -> bool:
    """Whether `_wxa16_hopper` has what a problem needs: more than a few tokens of 4-bit weights, in whole lines."""
    p = problem
    zero = layout.zero_mode(p.kind, p.scale_dtype)
    taken = p.scale_dtype == p.dtype or (p.dtype == "bf16" and p.scale_dtype in ("e8m0", "e4m3"))
    scaled = taken and zero < 2 if p.group else zero == 0
    whole = p.k % 128 == 0 and p.k <= 1 << 19 and p.n % 8 == 0
    return gpu.capability == 90 and layout.get(p.kind).line == 128 and p.m > 16 and whole and scaled


def hopper_tile(block_m: int, block_n: int, warps: int, each: int = 1) -> Choice:
    """A configuration of the "hopper" path with as many stages as let `each` programs share a multiprocessor."""
    stages = min(8, (SHARED[90] // each - 1536 - 4 * min(64, block_m) * block_n) // (256 * block_m))
    return Choice("hopper", block_m, block_n, 1, 0, warps, stages)


def mma_sync(block_m: int, warps: int, gpu: Gpu) -> bool:
    """Whether Triton takes mma.sync for the product: on GPUs without anything else, and for few tokens."""
    if gpu.capability in (100, 103):
        return block_m < 16
    return gpu.capability != 90 or block_m < 16 or warps % 4 != 0


def resident(choice: Choice, problem: Problem, gpu: Gpu) -> int:
    """Programs that run at once on the whole GPU; what a wrong answer costs is time."""
    shared = shared_bytes(choice, problem, choice.stages, gpu)
    sums = choice.block_m * choice.block_n // (choice.warps * 32)
    # What the compiler takes for "hopper" beside the sums, for 16, 32, 64 and 128 of them: 77, 95, 106, 127.
    beside = 64 if choice.path == "gemm" else min(96 if sums <= 32 else 112, 255 - sums)
    registers = choice.warps * 32 * min(255, beside + sums)
    each = min(SHARED.get(gpu.capability, 101_376) // shared, 65_536 // registers, 48 // choice.warps)
    return gpu.sms * max(1, each)


def exact_scale(problem: Problem) -> bool:
    """Whether every scale is a float of the dtype of x."""
    return problem.scale_dtype in ("e8m0", "e4m3", problem.dtype)


def shared_bytes(choice: Choice, problem: Problem, stages: int, gpu: Gpu) -> int:
    """An upper bound of the shared memory of `_wxa16.gemm`; the compiler does not say when it does not fit."""
    form = layout.get(problem.kind)
    if choice.path == "hopper":
        return stages * 256 * choice.block_m + 4 * min(64, choice.block_m) * choice.block_n + 512
    how = layout.geometry(problem.kind, problem.scale_dtype, problem.k, problem.group)
    line = choice.block_n * (form.words + 2 * how.width) * 4 + choice.block_m * form.line * 2
    size = max(stages * choice.unroll * line, choice.block_m * choice.block_n * 4 * 9 // 8) + 1024
    if mma_sync(choice.block_m, choice.warps, gpu) and choice.block_m >= 32:
        size += choice.block_n * form.line * 2  # warps side by side share decoded weights
    return size


def candidates(problem: Problem, gpu: Gpu) -> list[Choice]:
    """Configurations worth timing, the heuristic's first, without duplicates; `neighbours` of the best come next."""
    form, m = layout.get(problem.kind), problem.m
    base = max(1, 128 // form.line)
    tiles: list[tuple[int, int, int]] = []  # block_m, block_n, warps
    if m <= 8:
        tiles += [(8, 64, 4), (8, 128, 4), (8, 32, 2), (8, 256, 8)]
    if m <= 16:
        tiles += [(16, 64, 4), (16, 128, 4), (16, 128, 8), (16, 32, 2), (16, 64, 2)]
    elif m <= 32:
        tiles += [(32, 64, 4), (32, 128, 4), (32, 128, 8), (32, 64, 2), (16, 128, 4)]
    elif m <= 64:
        tiles += [(64, 64, 4), (64, 128, 4), (64, 128, 8), (64, 256, 8), (32, 128, 4)]
    elif m <= 128:
        tiles += [(128, 64, 4), (128, 128, 8), (128, 256, 8), (64, 128, 4), (64, 256, 8)]
    else:
        tiles += [(128, 128, 8), (128, 256, 8), (256, 128, 8), (64, 256, 8), (128, 128, 4)]
    found = [heuristic(problem, gpu)]
    if m >= 128:
        found += [Choice(path="dequant", slab=slab) for slab in (20_000_000, 40_000_000, 80_000_000, 1 << 40)]
    for block_m, block_n, warps in tiles:
        for unroll in (base, 2 * base):
            one = Choice("gemm", block_m, block_n, unroll, 1, warps, 4, group_m=4 if m > block_m else 0)
            usual = split_for(problem, one, gpu)
            found += [replace(one, split=split) for split in {usual, 2 * usual}]
            if m > 16 and unroll == base:
                found += [replace(one, split=0, stages=stages) for stages in (3, 4)]
    if hopper_fits(problem, gpu):
        found += [replace(one, group_m=4 if m > one.block_m else 0) for one in _hopper_tiles(m)]
    return list(dict.fromkeys(fitted(one, problem, gpu) for one in found))


def _hopper_tiles(m: int) -> list[Choice]:
    """Of the "hopper" path, what is worth timing for m tokens."""
    if m <= 32:
        return [hopper_tile(32, 128, 8, each) for each in (1, 2)] + [hopper_tile(32, 64, 4, each) for each in (2, 3)]
    if m <= 64:
        return [hopper_tile(64, 128, 8, each) for each in (1, 2)] + [hopper_tile(64, 64, 4, each) for each in (2, 3)]
    found = [hopper_tile(128, 128, 8), hopper_tile(128, 256, 8), hopper_tile(64, 128, 8, 2), hopper_tile(128, 64, 4, 2)]
    return found if m <= 128 else [hopper_tile(256, 128, 8), *found[:2], hopper_tile(64, 256, 8)]


def neighbours(choice: Choice, problem: Problem, gpu: Gpu) -> list[Choice]:
    """What to time next, once a choice among `candidates` has won: the same tile with one thing changed."""
    if choice.path == "dequant":
        return [replace(choice, slab=choice.slab // 2), replace(choice, slab=choice.slab * 2)]
    found = [replace(choice, stages=stages) for stages in range(2, 8)]
    if choice.path == "hopper":
        found = [replace(choice, stages=stages) for stages in (choice.stages - 1, choice.stages - 2) if stages > 1]
        found += [replace(choice, group_m=g) for g in ((0, 2, 4, 8, 16) if problem.m > choice.block_m else ())]
        return [one for one in found if one != choice]
    if choice.split:
        found += [replace(choice, split=split) for split in range(max(1, choice.split - 2), choice.split + 4)]
    found += [replace(choice, split=0)]
    found += [replace(choice, where="group"), replace(choice, unroll=2 * choice.unroll)]
    found += [replace(choice, group_m=g) for g in ((0, 2, 4, 8, 16) if problem.m > choice.block_m else ())]
    fit = dict.fromkeys(fitted(one, problem, gpu) for one in found)
    return [one for one in fit if one != choice]


@functools.lru_cache(maxsize=1)
def load_tables() -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """All tables: GPU name -> key -> M -> fields of a Choice. Raises ValueError for a file of another version."""
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    folders = [Path(__file__).parent / "tables"]
    if os.environ.get(TABLES):
        folders.append(Path(os.environ[TABLES]))
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            table = json.loads(path.read_text())
            if table.get("version") != VERSION:
                raise ValueError(f"{path} is a table of version {table.get('version')}; this is version {VERSION}")
            entries = found.setdefault(table["gpu"]["name"], {})
            for key, rows in table["entries"].items():
                entries.setdefault(key, {}).update(rows)
    return found


def save_table(path: Path, gpu: Gpu, best: Mapping[Problem, Choice], *, notes: Iterable[str] = ()) -> None:
    """Writes, or merges into the file that is there, the best choice of each problem.

    notes  what the figures came from, versions above all
    Raises ValueError when the file is of another GPU.
    """
    entries: dict[str, dict[str, dict[str, Any]]] = {}
    table = {"version": VERSION, "gpu": gpu._asdict(), "notes": list(notes)}
    if path.exists():
        old = json.loads(path.read_text())
        if old["gpu"] != table["gpu"] or old["version"] != VERSION:
            raise ValueError(f"{path} is of {old['gpu']}, version {old['version']}; this is {gpu}")
        entries = old["entries"]
    for problem, choice in best.items():
        entries.setdefault(table_key(problem), {})[str(m_bucket(problem.m))] = asdict(choice)
    ordered = {key: dict(sorted(rows.items(), key=lambda row: int(row[0]))) for key, rows in sorted(entries.items())}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table | {"entries": ordered}, indent=1) + "\n")
    load_tables.cache_clear()
    _choose.cache_clear()
