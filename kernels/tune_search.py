"""How tune.py goes through configurations of weight-only products, and the times that it keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantkit_kernels import choice as choosing
from quantkit_kernels.choice import Choice, Gpu, Problem

RUNNING = "running"


# What to try next


def first(candidates: Sequence[Choice]) -> list[Choice]:
    """The heuristic's, which comes first, and of every other tile that which differs least from it."""
    best = candidates[0]
    nearest: dict[tuple[Any, ...], Choice] = {}
    for one in candidates:
        if tile(one) not in nearest or distance(one, best) < distance(nearest[tile(one)], best):
            nearest[tile(one)] = one
    return list(dict.fromkeys([best, *nearest.values()]))


def tile(one: Choice) -> tuple[Any, ...]:
    """What distinguishes configurations most."""
    return (one.path, one.block_m, one.block_n, one.warps, one.slab if one.path == "dequant" else 0)


def distance(a: Choice, b: Choice) -> float:
    """How much two configurations of one tile differ."""
    far = (
        abs(a.stages - b.stages)
        + abs(math.log2((a.split + 0.5) / (b.split + 0.5)))
        + abs(math.log2(a.unroll / b.unroll))
    )
    return far + (a.where != b.where) + (a.group_m != b.group_m)


def proposals(tried: dict[Choice, float], key: Problem, gpu: Gpu) -> list[Choice]:
    """What is worth timing after what was (microseconds; inf: wrong or failed); nothing when the best is surrounded.

    First one of each tile, then the other candidates of the two best tiles and what differs in one thing from the best.
    """
    candidates = choosing.candidates(key, gpu)
    if begun := [one for one in first(candidates) if one not in tried]:
        return begun
    best = sorted((one for one, us in tried.items() if math.isfinite(us)), key=lambda one: tried[one])[:2]
    tiles = [tile(one) for one in best]
    more = [one for one in candidates if tile(one) in tiles]
    for one in best[:1]:
        more += choosing.neighbours(one, key, gpu)
    return [one for one in dict.fromkeys(more) if one not in tried]


def filled(best: dict[Problem, Choice]) -> dict[Problem, Choice]:
    """Also for numbers of tokens that were not timed, but lie a little below one that was: what is best there."""
    made = dict(best)
    for asked in best:
        for m in choosing.BUCKETS:
            above = [other for other in best if other._replace(m=m) == asked._replace(m=m) and m <= other.m <= 4 * m]
            if above:
                made.setdefault(asked._replace(m=m), best[min(above, key=lambda other: other.m)])
    return made


# Times, kept


class Log:
    """Every time that was taken, a line of JSON each, after a first line that says what they are of."""

    def __init__(self, path: Path, about: dict[str, str]) -> None:
        self.path = path
        self.times: dict[Problem, dict[Choice, float]] = {}  # microseconds; inf: wrong or failed
        self.sure: dict[Problem, dict[Choice, float]] = {}  # of the fastest, taken with care
        self.why: dict[tuple[Problem, Choice], str] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and json.loads(lines[0]) == about:
            for text in lines[1:]:
                row = json.loads(text)
                us = math.inf if row["us"] is None else row["us"]
                self._keep(Problem(**row["problem"]), Choice(**row["choice"]), us, row["why"], row["sure"])
            for key, why in self.why.items():
                if why == RUNNING:
                    self.why[key] = "the process ended or hung in it"
        else:  # of another GPU or other code: all is taken again
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(about) + "\n")

    def _keep(self, key: Problem, one: Choice, us: float, why: str, sure: bool) -> None:
        (self.sure if sure else self.times).setdefault(key, {})[one] = us
        self.why[key, one] = why

    def put(self, key: Problem, one: Choice, us: float, why: str = "", *, sure: bool = False) -> None:
        self._keep(key, one, us, why, sure)
        row = {"problem": key._asdict(), "choice": asdict(one), "us": us if math.isfinite(us) else None}
        with self.path.open("a") as file:
            file.write(json.dumps(row | {"why": why, "sure": sure}) + "\n")

    def best(self) -> dict[Problem, Choice]:
        """The fastest configuration of each problem: of those that were timed with care, else of all."""
        made = {}
        for key, tried in self.times.items():
            good = {one: us for one, us in (self.sure.get(key) or tried).items() if math.isfinite(us)}
            if good:
                made[key] = min(good, key=lambda one: good[one])
        return made
