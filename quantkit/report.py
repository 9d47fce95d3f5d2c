"""Tables on a terminal. They go to stdout; everything they show comes from plain dicts, such as quantkit.json."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_SENSE = {"max": "≤", "min": "≥"}


def console() -> Console:
    """Where reports go. Off a terminal the width is fixed, so that logs do not depend on where they were made."""
    terminal = sys.stdout.isatty()
    return Console(file=sys.stdout, highlight=False, width=None if terminal else 120)


def size(count: float) -> str:
    """Bytes in decimal units, as file managers and the Hub show them: "14.7 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def printable(text: Any) -> Text:
    """Any text, with what would steer a terminal written as escapes and nothing read as markup."""
    return Text("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text)))


def print_section(section: Mapping[str, Any]) -> None:
    """One section of a report, generically; every key may be left out.

    title      text
    facts      [(label, value)]: one line each
    table      {"columns": [text], "rows": [[value]]}
    sections   further sections, printed after this one's table
    warnings   [text]
    """
    out = console()
    if section.get("title"):
        out.print(Text(str(section["title"]), style="bold"))
    if section.get("facts"):
        facts = Table.grid(padding=(0, 2))
        for label, value in section["facts"]:
            facts.add_row(Text(f"  {label}"), printable(value))
        out.print(facts)
    if section.get("table"):
        table = _table(section["table"]["columns"], section["table"]["rows"])
        out.print(table)
    for inner in section.get("sections", ()):
        print_section(inner)
    for warning in section.get("warnings", ()):
        out.print(Text("warning: ", style="yellow") + printable(warning), soft_wrap=True)


def print_plan(plan: Mapping[str, Any]) -> None:
    """What `quantkit plan` found, in the form of `print_section`."""
    print_section(plan)


def print_inspect(info: Mapping[str, Any]) -> None:
    """What `quantkit inspect` found, in the form of `print_section`."""
    print_section(info)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Columns of numbers stand to the right."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, name in enumerate(columns):
        values = [row[index] for row in rows]
        numeric = bool(values) and all(isinstance(value, int | float) for value in values)
        table.add_column(str(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(printable("" if value is None else value) for value in row))
    return table


def print_result(summary: Mapping[str, Any], out: str | None = None, place: Path | None = None) -> None:
    """The table at the end of `quantize` and of `validate`, from the content of quantkit.json.

    Size, perplexity, KL divergence and top-1 agreement, before and after, each beside its gate; then a sentence that
    each model generated. A part that was not measured is left out.

    out    the folder, for the last line
    place  the folder of results.json and report.html, to be named too
    """
    validation = summary.get("validation") or {}
    comparison = validation.get("comparison") or {}
    gates = {gate["name"]: gate for gate in validation.get("gates") or ()}
    rows = []
    sizes = summary.get("size") or {}
    if "output_bytes" in sizes:
        ratio = sizes["output_bytes"] / sizes["source_bytes"] if sizes.get("source_bytes") else None
        after = size(sizes["output_bytes"]) + ("" if ratio is None else f" ({ratio:.0%})")
        rows.append(["size", size(sizes["source_bytes"]) if sizes.get("source_bytes") else "", after, ""])
    if comparison:
        rows += _comparison_rows(comparison, gates, validation.get("kl_bounds"))
    for task in (validation.get("tasks") or {}).values():
        rows.append(_task_row(task, gates))
    if "recovery" in gates:
        rows.append(["recovery, mean", "100%", f"{gates['recovery']['value']:.1%}", _gate(gates["recovery"])])
    if validation.get("flips"):
        rows.append(_flip_row(validation["flips"], gates))
    out_to = console()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("", "original", "quantized", "gate"):
        table.add_column(name)
    for row in rows:
        passed = not row[3] or "passed" in str(row[3]) or "warning" in str(row[3])
        table.add_row(*map(printable, row[:3]), Text(str(row[3]), style="" if passed else "bold red"))
    if rows:
        out_to.print(table)
    if comparison.get("tokens"):
        out_to.print(f"measured on {comparison['tokens']:,} tokens in {comparison.get('windows', '?')} windows")
    samples = validation.get("samples") or {}
    if samples:
        out_to.print(Text("\nprompt     ", style="bold") + printable(samples.get("prompt", "")))
        out_to.print(Text("original   ", style="bold") + printable(samples.get("original", "")))
        out_to.print(Text("quantized  ", style="bold") + printable(samples.get("quantized", "")))
    status = validation.get("status") or summary.get("status")
    if status:
        out_to.print(Text(f"\n{status}", style="bold") + printable(f": {out}" if out else ""), soft_wrap=True)
    if place is not None:
        out_to.print(printable(f"report: {place / 'report.html'}"), soft_wrap=True)


def _comparison_rows(
    comparison: Mapping[str, Any], gates: Mapping[str, Mapping[str, Any]], bounds: Mapping[str, Any] | None
) -> list[list[str]]:
    """Perplexity, KL divergence and top-1 agreement: label, before, after, gate."""
    ratio = comparison.get("perplexity_ratio")
    perplexity = f"{comparison['perplexity']:.3f}" + ("" if ratio is None else f" (x {ratio:.4f})")
    error = comparison.get("kl_stderr")
    kl = f"{comparison['kl']:.4f}" + ("" if error is None else f" ± {error:.4f}")
    return [
        ["perplexity", f"{comparison['perplexity_original']:.3f}", perplexity, _gate(gates.get("perplexity_ratio"))],
        ["KL divergence", "0", kl, _gate(gates.get("kl"))],
        *([["  for certain", "", f"{bounds['at_least']:.4f} to {bounds['at_most']:.4f}", ""]] if bounds else []),
        ["top-1 agreement", "100%", f"{comparison['top1_agreement']:.1%}", _gate(gates.get("top1_agreement"))],
    ]


def _task_row(task: Mapping[str, Any], gates: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A task's score, and how much of it is recovered, with 95 % bounds to either side."""
    name, r = task["name"], task["recovery"]
    after = f"{task['quantized']:.4g} ({r['value']:.1%}, {r['low']:.1%} to {r['high']:.1%})"
    return [f"{name} {task['metric']}", f"{task['original']:.4g}", after, _gate(gates.get(f"recovery.{name}"))]


def _flip_row(flips: Mapping[str, Any], gates: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Next-token flips; the original's own are its floor."""
    return ["next-token flips", f"{flips['floor']:.1%}", f"{flips['rate']['value']:.1%}", _gate(gates.get("flips"))]


def _gate(gate: Mapping[str, Any] | None) -> str:
    """ "≤ 0.06 passed", or nothing when there is no such gate."""
    if gate is None:
        return ""
    sense = _SENSE.get(str(gate.get("sense")), str(gate.get("sense", "")))
    outcome = {"pass": "passed", "fail": "failed"}.get(gate["outcome"], gate["outcome"])
    if outcome != "passed" and gate.get("level") == "warn":
        outcome += " (warning)"
    elif outcome == "inconclusive":
        outcome += f", needs {gate['needed']} {gate['unit']}"
    return f"{sense} {gate['limit']:g} {outcome}".strip()
