"""report.html: what results.json says, as one page for a person. It opens anywhere, asks nothing of a network, runs no
script, and is right in the light and in the dark, on a telephone and on a wide screen.

The template is assets/report.html.jinja. Every value is escaped by it; only the plots, which quantkit draws, are not.
Without matplotlib the page has no plots, and says what to install.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from quantkit import card_parts, hub, output, plots, results
from quantkit.errors import InputError
from quantkit.recipe import Recipe
from quantkit.report import size

TEMPLATE = "report.html.jinja"
NOT_QUANTIZED = 12  # names a reason; the rest is counted


def place_of(folder: Path) -> Path:
    """Where the report on a checkpoint goes: beside the weights of ours, else into a folder in the current one."""
    return folder if (folder / output.SUMMARY).is_file() else Path(f"{folder.resolve().name}-report")


def write(place: Path, found: Mapping[str, Any], name: str, warn: Callable[[str], None]) -> None:
    """Writes results.json and report.html into a folder, which is made when missing.

    found  as results.collect gives it
    name   of the output
    warn   gets a sentence when the page has no plots
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{place}: is a file, or lies in one; choose another folder for the report") from None
    if not plots.available():
        warn(f"report.html has no plots: they need matplotlib ({plots.INSTALL})")
    output.write_text(place / output.RESULTS, json.dumps(results.plain(found), indent=1, ensure_ascii=False) + "\n")
    output.write_text(place / output.REPORT, page(found, name))


def page(found: Mapping[str, Any], name: str) -> str:
    """The page of one output."""
    validation = found.get("validation") or {}
    comparison = validation.get("comparison") or {}
    limits = {gate["name"]: gate["limit"] for gate in validation.get("gates") or ()}
    layers = found.get("layers") or ()
    by_window = (found.get("by_window") or {}).get("kl_by_window") or ()
    recovered = _recovered(validation, limits)
    accuracy = card_parts.accuracy(validation)
    values = {
        "title": name,
        "made": _made(found),
        "status": found.get("status", results.UNVALIDATED),
        "message": validation.get("message") or "",
        "try_next": found.get("try_next"),
        "tiles": _tiles(found, accuracy),
        "accuracy": [(row[:-1], *_outcome(row[-1])) for row in accuracy],
        "measured_on": card_parts.measured_on(validation),
        "details": _details(comparison),
        "kl_bounds": validation.get("kl_bounds"),
        "tasks": [_task(task) for task in (validation.get("tasks") or {}).values()],
        "arguments": _arguments(validation.get("task_arguments")),
        "samples": validation.get("samples") or {},
        "texts": [_text(text) for text in found.get("texts") or ()],
        "kinds": _kinds(layers),
        "worst": card_parts.worst(layers),
        "by_block": found.get("by_block") or {},
        "seconds": [_seconds(stage, parts) for stage, parts in (found.get("seconds") or {}).items()],
        "machine": _machine(found.get("machine") or {}),
        "dense": _dense(found.get("not_quantized") or ()),
        "warnings": _warnings(found, validation, layers),
        "recipe": yaml.safe_dump(found["recipe"], sort_keys=False, allow_unicode=True) if found.get("recipe") else "",
        "calibration": [[x.replace("`", "") for x in row] for row in card_parts.calibration(found.get("data"))],
        "versions": sorted((found.get("versions") or {}).items()),
        "source": found.get("source") or {},
        "install": None if plots.available() else plots.INSTALL,
    }
    drawn: dict[str, str] = {}
    if plots.available():
        if len(by_window) > 1 and all(map(math.isfinite, by_window)):
            drawn["windows"] = plots.windows(by_window, limits.get("kl"))
        if recovered and all(math.isfinite(x[key]) for _, x, _ in recovered for key in ("low", "high")):
            drawn["recovery"] = plots.recovery(recovered)
        if errors := _errors(layers):
            drawn["errors"] = plots.errors(errors)
        if values["by_block"]:
            drawn["blocks"] = plots.blocks(values["by_block"])
    return render(TEMPLATE, **values, plots=drawn)


def render(template: str, **values: Any) -> str:
    """A template of the assets with these values, escaped; `plots` has SVG by name, which is not."""
    import jinja2
    from markupsafe import Markup

    values["plots"] = {key: Markup(svg) for key, svg in values["plots"].items()}
    folder = jinja2.FileSystemLoader(hub.ASSETS)
    env = jinja2.Environment(
        autoescape=True, loader=folder, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters["size"] = size
    colours = {"light": plots.colours(plots.LIGHT), "dark": plots.colours(plots.DARK)}
    return env.get_template(template).render(**values, **{key: Markup(value) for key, value in colours.items()})


# Parts ----------------------------------------------------------------------------------------------------------------


def _made(found: Mapping[str, Any]) -> str:
    """ "W4A16 by gptq, from builtin:pydocs-llama-7m"."""
    source = str((found.get("source") or {}).get("model", ""))
    if not found.get("recipe"):
        return f"beside {source}"
    recipe = Recipe.from_any(found["recipe"])
    method = " + ".join([*(t.name for t in recipe.transforms), recipe.method_name])
    chosen = (found.get("allocation") or {}).get("auto")
    scheme = f"{chosen['bits']:g} bits, chosen by layer," if chosen else recipe.scheme.label
    return f"{scheme} by {method}, from {source}"


def _tiles(found: Mapping[str, Any], accuracy: Sequence[Sequence[str]]) -> list[tuple[str, str, str, str, str]]:
    """What to see first: label, figure, what it is beside, the gate and its class."""
    tiles = []
    sizes = found.get("size") or {}
    if sizes.get("source_bytes"):
        share = f"{sizes['output_bytes'] / sizes['source_bytes']:.0%} of {size(sizes['source_bytes'])}"
        tiles.append(("size", size(sizes["output_bytes"]), share, "", ""))
    perplexity = next((f"{row[1]} to {row[2]}" for row in accuracy if row[0] == "perplexity"), "")
    first = {"perplexity ratio": perplexity, "KL divergence, nats a token": "", "top-1 agreement": ""}
    for label, _, figure, _, gate in accuracy:
        if label in first:
            main, _, error = figure.partition(" ± ")
            tiles.append((label, main, f"± {error}" if error else first[label], *_outcome(gate)))
    return tiles


def _outcome(gate: str) -> tuple[str, str]:
    """A gate's cell, and the class that colours it."""
    kinds = {"pass": "good", "fail": "bad", "inconclusive": "warn"}
    outcome = gate.partition(": ")[2].partition(",")[0]
    missed_but_told = outcome != "pass" and card_parts.ONLY_WARNS in gate
    return gate, "warn" if missed_but_told else kinds.get(outcome, "")


def _details(comparison: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not comparison:
        return []
    return [
        ("KL, 99th percentile of tokens", f"{comparison['kl_p99']:.4f}"),
        ("KL, largest of a token", f"{comparison['kl_max']:.4f}"),
    ]


def _recovered(validation: Mapping[str, Any], limits: Mapping[str, float]) -> list[tuple[str, Any, float | None]]:
    tasks = validation.get("tasks") or {}
    return [(name, task["recovery"], limits.get(f"recovery.{name}")) for name, task in tasks.items()]


def _task(task: Mapping[str, Any]) -> list[str]:
    r = task["recovery"]
    known = task.get("lost") is not None
    return [
        task["name"],
        str(task["shots"]),
        f"{task['items']:,}",
        f"{r['value']:.1%} ({r['low']:.1%} to {r['high']:.1%})",
        f"{task['lost']} / {task['won']}" if known else "",
        f"{task['p']:.3f}" if known else "",
        "" if task.get("changed") is None else f"{task['changed']:.1%}",
        "" if task.get("smallest_loss") is None else f"{task['smallest_loss']:.1%}",
    ]


def _arguments(found: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{k} {v}" for k, v in (found or {}).items() if v is not None and not isinstance(v, Mapping))


def _text(text: Mapping[str, str]) -> dict[str, str]:
    """The output's text in two parts: as far as it is the original's, and the rest."""
    a, b = text["original"], text["quantized"]
    end = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return {**text, "same": a[:end], "other": b[end:], "theirs": a[end:]}


def _place(name: str) -> tuple[int, str]:
    """Block and kind of a layer: "model.layers.3.mlp.experts.7.up_proj" -> 3, "mlp.experts.*.up_proj"."""
    found = re.search(r"(?:^|\.)(\d+)\.(.+)", name)
    return (int(found[1]), re.sub(r"\b\d+\b", "*", found[2])) if found else (0, name)


def _errors(layers: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Mean relative error of the layers of a kind in a block."""
    found: dict[str, dict[int, list[float]]] = {}
    for x in layers:
        if x.get("relative_error") is not None:
            block, kind = _place(x["name"])
            found.setdefault(kind, {}).setdefault(block, []).append(x["relative_error"])
    means = {kind: {b: sum(v) / len(v) for b, v in blocks.items()} for kind, blocks in found.items()}
    drawable = any(error > 0 and math.isfinite(error) for blocks in means.values() for error in blocks.values())
    return means if drawable else {}


def _kinds(layers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row a kind of linear: layers, scheme, bits a weight, megabytes, error on average and at worst."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for x in layers:
        kinds.setdefault(_place(x["name"])[1], []).append(x)
    rows = []
    for kind, alike in kinds.items():
        weights = [math.prod(x["shape"]) for x in alike]
        total = sum(w * x["bits_per_weight"] for w, x in zip(weights, alike))
        errors = [x["relative_error"] for x in alike if x.get("relative_error") is not None]
        worst = max(alike, key=lambda x: x.get("relative_error") or 0.0)
        rows.append(
            [
                kind,
                str(len(alike)),
                "; ".join(dict.fromkeys(x["scheme"] for x in alike)),
                f"{total / sum(weights):.3f}",
                size(total / 8),
                f"{sum(errors) / len(errors):.5f}" if errors else "",
                f"{worst['relative_error']:.5f} in block {_place(worst['name'])[0]}" if errors else "",
            ]
        )
    return rows


def _seconds(stage: str, parts: Mapping[str, float]) -> dict[str, Any]:
    """A stage with its parts, the longest first, and their share of the longest, for a bar."""
    ordered = sorted(((name, s) for name, s in parts.items() if s >= 0.005), key=lambda item: -item[1])
    longest = max(parts.values(), default=0.0)
    rows = [(name, f"{s:.2f}", f"{100 * s / longest:.1f}" if longest else "0") for name, s in ordered]
    return {"stage": stage, "total": f"{sum(parts.values()):.1f}", "parts": rows}


def _machine(found: Mapping[str, Any]) -> str:
    if not found:
        return ""
    words = [str(found["device"]), str(found["system"]), f"{found['threads']} of {found['cores']} cores"]
    if found.get("peak_memory_bytes"):
        words.append(f"at most {size(found['peak_memory_bytes'])} of memory")
    if found.get("peak_gpu_bytes"):
        words.append(f"{size(found['peak_gpu_bytes'])} on the GPU")
    return ", ".join(words)


def _dense(found: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """(names, reason) of what was not quantized; of many, the first names and their number."""
    reasons: dict[str, list[str]] = {}
    for x in found:
        reasons.setdefault(x["reason"], []).append(x["name"])
    more = {why: len(names) - NOT_QUANTIZED for why, names in reasons.items()}
    shown = {why: ", ".join(names[:NOT_QUANTIZED]) for why, names in reasons.items()}
    return [(f"{names} and {more[why]} more" if more[why] > 0 else names, why) for why, names in shown.items()]


def _warnings(
    found: Mapping[str, Any], validation: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]
) -> list[str]:
    of_layers = [f"{x['name']}: {note}" for x in layers for note in x.get("notes") or ()]
    every = [*(found.get("warnings") or ()), *(found.get("run_warnings") or ()), *of_layers]
    return list(dict.fromkeys([*every, *(validation.get("notes") or ())]))
