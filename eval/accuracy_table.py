"""The Markdown table of eval/accuracy.py, from its log: each line of quantkit, and what it stands beside."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from accuracy_cases import MOE, OUTLIERS, PYDOCS, Case, Job, Setting

Runs = dict[int, dict[str, Any]]  # order -> line of the log


def mean_by_window(runs: Sequence[dict[str, Any]]) -> list[float]:
    """KL of each window, the mean over the orders."""
    return [statistics.fmean(window) for window in zip(*(r["figures"]["kl_by_window"] for r in runs), strict=True)]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error over windows."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def difference(ours: Runs, peer: Runs, *, paired_orders: bool) -> str:
    """Paired difference of KL, ours minus the peer's, window by window: "-0.00812 ± 0.00031 (-13.5%)".

    paired_orders  both used data: only the orders that both have count. Else all of either, whose mean is compared.
    Returns "" where there is nothing to compare.
    """
    both = ours.keys() & peer.keys() if paired_orders else ours.keys() | peer.keys()
    mine, other = ([found for order, found in x.items() if order in both] for x in (ours, peer))
    if not mine or not other:
        return ""
    pairs = list(zip(mean_by_window(mine), mean_by_window(other), strict=True))
    mean, error = mean_and_error([a - b for a, b in pairs])
    return f"{mean:+.5f} ± {error:.5f} ({mean / statistics.fmean(b for _, b in pairs):+.1%})"


def row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def line(case: Case, job: Job, runs: Runs, beside: str) -> str:
    """One row: a job's figures, the mean over its orders, and the range over them."""
    kl, error = mean_and_error(mean_by_window([*runs.values()]))
    figures = [r["figures"] for r in runs.values()]
    each = [f["kl"] for f in figures]
    spread = f"{min(each):.5f} to {max(each):.5f}" if len(each) > 1 else ""
    bits = next((f"{r['bits']:.3f}" for r in runs.values() if r.get("bits")), "")
    perplexity, top1 = (statistics.fmean(f[name] for f in figures) for name in ("perplexity", "top1_agreement"))
    cells = [case.name, job.tool, job.label, bits, len(runs), f"{perplexity:.4f}", f"{kl:.5f} ± {error:.5f}", spread]
    return row([*cells, f"{top1:.4f}", beside])


def table(cases: Sequence[Case], log: dict[str, dict[str, Any]], setting: Setting, orders: int) -> list[str]:
    """Markdown: for each model a table, for each case quantkit's row and its peers'."""
    head = ["case", "tool", "how", "bits", "orders", "perplexity", "KL ± s.e.", "KL over orders", "top-1"]
    head.append("quantkit's KL minus this one's")
    lines: list[str] = []

    def runs(job: Job) -> Runs:
        keys = {order: setting.key(job, order) for order in range(orders)}
        return {order: log[key] for order, key in keys.items() if key in log}

    for model in (PYDOCS, OUTLIERS, MOE):
        rows = []
        original: float | None = None
        for case in cases:
            for job in (case.ours, *case.peers) if case.ours.model == model else ():
                found = runs(job)
                if not found:
                    continue
                original = found[min(found)]["figures"]["perplexity_original"]
                both = case.ours.uses_data and job.uses_data
                beside = "" if job is case.ours else difference(runs(case.ours), found, paired_orders=both)
                rows.append(line(case, job, found, beside))
        if rows:
            lines += [
                f"{model}, perplexity {original:.4f} unquantized:",
                "",
                row(head),
                row(["---"] * len(head)),
                *rows,
            ]
            lines.append("")
    return lines


def report(cases: Sequence[Case], log: dict[str, dict[str, Any]], setting: Setting, orders: int) -> str:
    """The tables with what they were measured on."""
    said = (
        f"{setting.windows} windows of {setting.length} tokens of {setting.heldout.name}; calibration "
        f"{setting.samples} rows of {setting.length} tokens of {setting.calibration.name}. KL in nats a token, mean "
        "over orders; standard errors over windows; differences are paired by window."
    )
    versions: dict[str, None] = {}
    for record in log.values():
        tool = json.loads(record["key"])[1]
        found = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        versions[f"{tool} on {record['hardware']}: {found}."] = None
    return "\n".join([said, "", *table(cases, log, setting, orders), *versions]) + "\n"
