"""Several outputs of one model side by side: `quantkit compare DIR1 DIR2 ...`.

Everything is read from the quantkit.json of each folder, so what is shown is what was measured when it was validated.
Figures that were measured on other windows, or against another original, are not comparable, and a warning says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit import output
from quantkit import summary as reading
from quantkit.errors import InputError, MissingError
from quantkit.recipe import Recipe

COLUMNS = ("output", "scheme", "method", "bytes", "perplexity", "KL divergence", "top-1", "flips", "status")


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
        "texts": recipe.validation and (recipe.validation.perplexity.data, recipe.validation.perplexity.length),
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
                f"{x['bytes']:,} ({x['bytes'] / x['source_bytes']:.0%})",
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
        "title": f"{len(ordered)} outputs, original {ordered[0]['perplexity_original']:.3f}",
        "table": {"columns": columns, "rows": rows},
        "warnings": _not_comparable(ordered),
    }


def _recovery(task: Mapping[str, Any] | None) -> str:
    return "" if task is None else f"{task['recovery']['value']:.1%}"


def _not_comparable(found: Sequence[Mapping[str, Any]]) -> list[str]:
    said = []
    if len({x["fingerprint"] for x in found}) > 1:
        said.append("the outputs were made from different originals, so their figures do not compare")
    if len({(x["texts"], x["windows"]) for x in found}) > 1:
        windows = ", ".join(f"{x['name']}: {x['windows']} of {x['texts']}" for x in found)
        said.append(f"the outputs were measured on different windows ({windows})")
    return said


def markdown(section: Mapping[str, Any]) -> str:
    """The table of `report` as Markdown."""
    rows = [section["table"]["columns"], ["---"] * len(section["table"]["columns"]), *section["table"]["rows"]]
    lines = [f"# {section['title']}", "", *(f"| {' | '.join(map(str, row))} |" for row in rows)]
    return "\n".join([*lines, *(f"\nWarning: {w}." for w in section["warnings"])]) + "\n"


def plot(found: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Size against KL divergence, a point an output. Raises MissingError without matplotlib."""
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingError("the plot needs matplotlib: pip install 'quantkit[report]'") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for x in found:
        axes.errorbar(x["bytes"] / 1e6, x["kl"], yerr=1.645 * (x["kl_stderr"] or 0), fmt="o", capsize=3)
        axes.annotate(x["name"], (x["bytes"] / 1e6, x["kl"]), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set(xlabel="size of all tensors, MB", ylabel="KL divergence from the original, nats a token", yscale="log")
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(file, metadata={"Date": None})
