"""Results as tables in Markdown, for RESULTS.md: what was aimed at, what was measured, and whether that is enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import bench_anchors
from bench_core import Case, Goal
from bench_store import Record, Store

TITLES = {
    "ceiling": "Ceilings of the card",
    "wxa16": "Weights in few bits, activations in bfloat16",
    "marlin": "Marlin in the same run",
    "w8a8": "Eight bits by eight bits",
    "fp8_block": "FP8, blocks of 128 x 128 by 1 x 128",
    "act": "Rounding of activations",
    "moe": "Grouped products of experts",
    "prefill": "Attention, causal prefill",
    "decode": "Attention over a cache",
}
W4 = "wxa16/int4_g128/"


def number(value: float | None) -> str:
    """Three or four digits."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def verdict(goals: Sequence[Goal], record: Record, others: Mapping[str, Record]) -> str:
    """ "pass", or by how much each goal is missed."""
    said = []
    for goal in goals:
        value = goal.measured(record, others)
        if value is None:
            said.append(f"{goal}: not measured")
        elif not goal.holds(value):
            shown = f"{value:.2f}" if goal.kind in ("ratio", "floor", "bandwidth") else number(value)
            said.append(f"miss: {shown}, {goal}")
    return "; ".join(said) if said else "pass" if goals else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {one} |" for one in lines)


class Tables:
    """All tables of a store."""

    def __init__(self, store: Store, cases: Sequence[Case]) -> None:
        self.store, self.cases = store, {case.name: case for case in cases}

    def text(self) -> str:
        parts = [self.about(), self.w4()]
        for family, title in TITLES.items():
            rows = [row for case in self.cases.values() if case.family == family for row in self.row(case)]
            if rows:
                head = ["case", "us", "p10-p90", "GB/s", "TFLOP/s", "of floor", "beside, in the same run", "target", ""]
                parts.append(f"### {title}\n\n{table(head, rows)}")
        parts.append(self.wrong())
        return "\n\n".join(part for part in parts if part) + "\n"

    def about(self) -> str:
        """Where the figures come from."""
        used = {record.run for record in self.store.records() if record.status == "ok"}
        lines = []
        for run, found in self.store.runs.items():
            if run not in used:
                continue
            launch = self.launch(run)
            clocks = "; ".join(found.get("clocks", []))
            lines.append(
                f"- {found['started']}: {found['device']}, driver {found['driver']}, torch {found['torch']}, "
                f"Triton {found['triton']}, CUDA {found['cuda']}, commit {found['commit'] or 'unknown'}, "
                f"kernels {found['source']}"
                + (f"; an empty kernel in a graph takes {launch:.2f} us" if launch else "")
                + (f"; SM clock, memory clock, power, limit, temperature: {clocks}" if clocks else "")
            )
        return "\n".join(lines)

    def launch(self, run: str) -> float | None:
        """Microseconds of an empty kernel in a graph."""
        record = self.store.of_run("ceiling/empty", run)
        return record.us if record else None

    def others(self, case: Case, run: str) -> dict[str, Record]:
        found = {name: self.store.of_run(name, run) for name in case.compared}
        return {name: record for name, record in found.items() if record is not None}

    def row(self, case: Case) -> list[list[str]]:
        record = self.store.get(case.name)
        if record is None or record.times is None:
            return []
        others = self.others(case, record.run)
        beside = [
            f"{name.split('/')[0]} {number(one.us)} ({one.us / record.times.us:.2f}x)"
            for name, one in others.items()
            if one.us is not None
        ]
        target = ", ".join(dict.fromkeys(map(str, case.goals)))
        return [
            [
                case.name + (f" ({record.note})" if record.note else ""),
                f"**{number(record.us)}**",
                f"{number(record.times.p10)}-{number(record.times.p90)}",
                number(record.gbs),
                number(record.tflops) if record.operations else "",
                self.of_floor(record),
                ", ".join(beside),
                target,
                verdict(case.goals, record, others),
            ]
        ]

    def of_floor(self, record: Record) -> str:
        """Share of the floor; in parentheses of the floor and an empty kernel."""
        if record.times is None or record.floor_us <= 0:
            return ""
        launch = self.launch(record.run)
        with_launch = f" ({(record.floor_us + launch) / record.times.us:.0%})" if launch else ""
        return f"{record.of_floor:.0%}{with_launch}"

    def w4(self) -> str:
        """W4A16 in groups of 128: target, ours, and what others were measured at on the same model of GPU."""
        rows = []
        for n, k in bench_anchors.SHAPES:
            for m in bench_anchors.TOKENS:
                case = self.cases.get(f"{W4}{n}x{k}/{m}")
                record = self.store.get(case.name) if case else None
                if case is None or record is None or record.times is None:
                    continue
                same_gpu = bench_anchors.DEVICE in self.store.runs[record.run]["device"]
                others = self.others(case, record.run)
                base = others.get(bench_anchors.cublas((n, k), m))
                peers = [values[n, k].get(m) if same_gpu else None for values in bench_anchors.PEERS.values()]
                rows.append(
                    [
                        f"{n} x {k}",
                        str(m),
                        ", ".join(map(str, case.goals)) if same_gpu else "",
                        f"**{number(record.us)}**",
                        *map(number, peers),
                        number(base.us) if base else "",
                        f"{base.us / record.times.us:.2f}x" if base and base.us else "",
                        self.of_floor(record),
                        verdict(case.goals, record, others) if same_gpu else "",
                    ]
                )
        if not rows:
            return ""
        head = ["N x K", "M", "target", "ours, us", *(f"{name}, anchor" for name in bench_anchors.PEERS)]
        head += ["cuBLAS bf16, same run", "over cuBLAS", "of floor (and launch)", ""]
        note = f"Anchors: {bench_anchors.SOURCE}; microseconds by CUDA-graph replay over rotated weights, as ours."
        return f"### W4A16, groups of 128, bfloat16\n\n{table(head, rows)}\n\n{note}"

    def wrong(self) -> str:
        """Cases without a time, and why."""
        bad = [r for r in self.store.records() if r.status != "ok"]
        return "Without a time:\n\n" + "\n".join(f"- {r.name}: {r.status}: {r.why}" for r in bad) if bad else ""
