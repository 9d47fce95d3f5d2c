"""Several outputs of one model side by side: `quantkit compare DIR1 DIR2 ...`.

Everything is read from the quantkit.json of each folder, so what is shown is what was measured when it was validated.
Figures that were measured on other windows, or against another original, are not comparable, and a warning says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit import html_report, output, plots, results
from quantkit import summary as reading
from quantkit.errors import InputError
from quantkit.recipe import Recipe
from quantkit.report import size

COLUMNS = ("output", "scheme", "method", "size", "perplexity", "KL", "top-1", "flips", "status")


def read(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """What `report` and `plot` show of each folder. Raises InputError for one that is not ours or was not measured."""
    return [_read(Path(folder).expanduser()) for folder in folders]


def _read(folder: Path) -> dict[str, Any]:
    if not (folder / output.SUMMARY).is_file():
        raise InputError(f"{folder}: holds no {output.SUMMARY}; compare outputs of quantkit quantize")
    summary = reading.read(folder)
    validation = summary.get("validation") or {}
    measured = validation.get("comparison")
    if not measured:
        raise InputError(f"{folder}: was not measured; run quantkit validate {folder}")
    if not summary.get("recipe") or not summary.get("source") or not (summary.get("size") or {}).get("source_bytes"):
        raise InputError(f"{folder}: its {output.SUMMARY} does not say from what it was made; it is of another tool")
    recipe = Recipe.from_any(summary["recipe"])
    chosen = (summary.get("allocation") or {}).get("auto")
    return {
        "folder": folder,
        "name": folder.name,
        "scheme": f"auto {chosen['bits']:g}" if chosen else recipe.scheme.label,
        "method": " + ".join([*(t.name for t in recipe.transforms), recipe.method_name]),
        "bytes": summary["size"].get("output_bytes", 0),
        "source_bytes": summary["size"]["source_bytes"],
        "fingerprint": summary["source"].get("fingerprint"),
        "texts": validation.get("data") or "unnamed texts",
        "flips": (validation.get("flips") or {}).get("rate", {}).get("value"),
        "tasks": validation.get("tasks") or {},
        "status": summary.get("status", ""),
        **measured,
    }


def report(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A table in the form of `report.print_section`, the least KL divergence first."""
    ordered = sorted(found, key=lambda x: x["kl"])
    tasks = list(dict.fromkeys(task for x in ordered for task in x["tasks"]))
    rows = []
    for x in ordered:
        error = "" if x["kl_stderr"] is None else f" ± {x['kl_stderr']:.4f}"
        rows.append(
            [
                x["name"],
                x["scheme"],
                x["method"],
                f"{size(x['bytes'])} ({x['bytes'] / x['source_bytes']:.0%})",
                f"{x['perplexity']:.3f} (x {x['perplexity_ratio']:.4f})",
                f"{x['kl']:.4f}{error}",
                f"{x['top1_agreement']:.1%}",
                "" if x["flips"] is None else f"{x['flips']:.1%}",
                *(_recovery(x["tasks"].get(task)) for task in tasks),
                x["status"],
            ]
        )
    columns = [*COLUMNS[:-1], *tasks, COLUMNS[-1]]
    return {
        "title": f"{len(ordered)} outputs; the original's perplexity is {ordered[0]['perplexity_original']:.3f}",
        "table": {"columns": columns, "rows": rows},
        "warnings": _not_comparable(ordered),
    }


def _recovery(task: Mapping[str, Any] | None) -> str:
    return "" if task is None else f"{task['recovery']['value']:.1%}"


def _not_comparable(found: Sequence[Mapping[str, Any]]) -> list[str]:
    said = []
    if len({x["fingerprint"] for x in found}) > 1:
        said.append("the outputs were made from different originals, so their figures do not compare")
    if len({(x["texts"], x["windows"], x["tokens"]) for x in found}) > 1:
        windows = ", ".join(
            f"{x['name']}: {x['windows']} of {x['tokens'] // x['windows']} tokens, {x['texts']}" for x in found
        )
        said.append(f"the outputs were measured on different windows ({windows})")
    return said


def markdown(section: Mapping[str, Any]) -> str:
    """The table of `report` as Markdown."""
    rows = [section["table"]["columns"], ["---"] * len(section["table"]["columns"]), *section["table"]["rows"]]
    lines = [f"# {section['title']}", "", *(f"| {' | '.join(map(str, row))} |" for row in rows)]
    return "\n".join([*lines, *(f"\nWarning: {w}." for w in section["warnings"])]) + "\n"


def write(found: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Writes report.html, results.json, compare.md and compare.svg. Raises MissingError without matplotlib."""
    section, drawn = report(found), plots.size_against_kl(found)
    out.mkdir(parents=True, exist_ok=True)
    content = {"results": results.FORMAT, "outputs": [{**x, "folder": str(x["folder"])} for x in found]}
    text = json.dumps(results.plain({**content, "warnings": section["warnings"]}), indent=1, ensure_ascii=False)
    output.write_text(out / output.RESULTS, text + "\n")
    output.write_text(
        out / output.REPORT, html_report.render("compare.html.jinja", section=section, plots={"all": drawn})
    )
    output.write_text(out / "compare.svg", plots.standalone(drawn))
    output.write_text(out / "compare.md", markdown(section) + "\n![size against KL](compare.svg)\n")
