"""The model card of an output: front matter for the Hub, then text for whoever loads it.

Every figure comes from quantkit.json and from quantkit-bench.json; what was not measured has no line. The template is
assets/model_card.md.jinja, its tables are made in card_parts.py. Licence, languages and limits of use come from the
original's own card.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantkit import card_parts as parts
from quantkit import hub, output
from quantkit.hub_calls import understood
from quantkit.recipe import Recipe

TEMPLATE = hub.ASSETS / "model_card.md.jinja"
NONCOMMERCIAL = re.compile(r"(^|[-_ ])nc([-_ ]|$)|non-?_?commercial|research[-_ ]only|research[-_ ]licen[cs]e", re.I)
TERMS = re.compile(r"licen[cs]e|limitation|intended use|out[- ]of[- ]scope|usage|acceptable use|bias|risk", re.I)


@dataclass(frozen=True)
class Base:
    """The original, by its own card.

    hub_id  None for a folder or a built-in model
    gated   None when the Hub could not be asked
    front   the front matter of its card
    terms   what its card says under headings about licence and limits, as Markdown
    """

    name: str
    hub_id: str | None
    revision: str | None
    gated: bool | None
    front: Mapping[str, Any]
    terms: str

    def objection(self) -> str | None:
        """Why a copy should not simply be public: "is gated". None when nothing says so."""
        if self.hub_id is not None and self.gated is None:
            return "could not be looked up on the Hub, so its terms are not known"
        if self.gated:
            return "is gated"
        licence = " ".join(str(self.front.get(key) or "") for key in ("license", "license_name"))
        if NONCOMMERCIAL.search(licence):
            return f"is not for commercial use (licence {licence.strip()})"
        return None


def base_of(folder: Path, summary: Mapping[str, Any], api: Any) -> Base:
    """The original of an output. api: of huggingface_hub, asked when the original is on the Hub."""
    model, revision = str(summary["source"]["model"]), summary["source"]["revision"]
    name, _, _ = model.partition("@")
    front, text = _card_of(folder / "README.md")
    hub_id = name if revision is not None else None
    gated: bool | None = False
    if hub_id is not None:
        try:
            info = api.model_info(hub_id, revision=revision)
            gated = bool(info.gated)
            front = {**front, **(info.card_data.to_dict() if info.card_data is not None else {})}
        except Exception as e:
            if understood(e) is None:
                raise
            gated = None
    short = name.removeprefix(hub.BUILTIN).rstrip("/")
    return Base(hub_id or short.split("/")[-1], hub_id, revision, gated, front, _terms(text))


def _card_of(file: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of the card that the output has from its original; empty when there is none."""
    from huggingface_hub import ModelCard

    if not file.is_file():
        return {}, ""
    try:
        card = ModelCard(file.read_text("utf-8"), ignore_metadata_errors=True)
    except Exception:  # not YAML, or not UTF-8: a card is for people, and need not be either
        return {}, ""
    return card.data.to_dict(), card.text


def _terms(text: str) -> str:
    """The sections of a card whose heading is about licence or limits, one heading level for all."""
    found, keep = [], False
    for line in text.splitlines():
        heading = re.match(r"#{1,6}\s+(.*)", line)
        if heading:
            keep = bool(TERMS.search(heading[1]))
            line = f"### {heading[1]}"
        if keep:
            found.append(line)
    return "\n".join(found).strip()


def render(folder: Path, summary: Mapping[str, Any], base: Base, *, repo: str) -> str:
    """The card as it goes to the Hub. repo: owner/name."""
    from huggingface_hub import ModelCard

    recipe = Recipe.from_any(summary["recipe"])
    validation = summary.get("validation") or {}
    bench = hub.read_json(folder / output.BENCH) if (folder / output.BENCH).is_file() else {}
    model = f"{base.hub_id}@{base.revision}" if base.hub_id else str(summary["source"]["model"])
    values = {
        "title": repo.split("/")[-1],
        "repo": repo,
        "base_name": base.name,
        "base_id": base.hub_id,
        "base_revision": base.revision,
        "status": summary["status"],
        "message": validation.get("message") or "",
        "notes": validation.get("notes") or [],
        "done": parts.done(summary, recipe),
        "engines": parts.engines(folder, repo, recipe.trust_remote_code),
        "remote_code": recipe.trust_remote_code,
        "recipe": yaml.safe_dump(summary["recipe"], sort_keys=False, allow_unicode=True).strip(),
        "calibration": parts.calibration(summary.get("data")),
        "accuracy": parts.accuracy(validation),
        "measured_on": parts.measured_on(validation),
        "layers": parts.worst(summary.get("layers") or ()),
        "by_block": parts.by_block(summary.get("layers") or ()),
        "speed": parts.speed(bench),
        "speed_notes": parts.speed_notes(bench),
        "converted": parts.converted(summary),
        "reproducible": ((summary.get("data") or {}).get("source") or {}).get("kind") != "python",
        "model": model if base.hub_id or model.startswith(hub.BUILTIN) else None,
        "versions": sorted((summary.get("versions") or {}).items()),
        "licence": base.front.get("license"),
        "licence_link": base.front.get("license_link"),
        "terms": base.terms,
        "table": parts.table,
    }
    data = _front(summary, base, recipe, validation, str(values["title"]))
    return str(ModelCard.from_template(data, template_path=str(TEMPLATE), **values)).rstrip() + "\n"


def _front(summary: Mapping[str, Any], base: Base, recipe: Recipe, validation: Mapping[str, Any], title: str) -> Any:
    from huggingface_hub import ModelCardData

    source = (summary.get("data") or {}).get("source") or {}
    kept: dict[str, Any] = {key: base.front.get(key) for key in ("license", "license_name", "license_link", "language")}
    tags = ["quantkit", recipe.scheme.label, parts.format_of(summary)]
    if summary["status"] != "validated":
        tags.append(str(summary["status"]))
    results = _results(validation)
    related: dict[str, Any] = {"base_model": base.hub_id, "base_model_relation": "quantized"} if base.hub_id else {}
    return ModelCardData(
        **kept,
        **related,
        pipeline_tag=base.front.get("pipeline_tag") or "text-generation",
        library_name="transformers",
        tags=tags,
        datasets=_datasets(base, source) or None,
        model_name=title,
        eval_results=results or None,
    )


def _datasets(base: Base, source: Mapping[str, Any]) -> list[str]:
    """What the original was made with, by its card, and what the output was calibrated on."""
    named = base.front.get("datasets") or []
    mine = [str(source["data"])] if source.get("kind") == "hub" else []
    return list(dict.fromkeys([*([named] if isinstance(named, str) else map(str, named)), *mine]))


def _results(validation: Mapping[str, Any]) -> list[Any]:
    """model-index: what was measured of the output, on windows and by tasks."""
    from huggingface_hub import EvalResult

    found = []
    comparison = validation.get("comparison")
    if comparison:
        texts: dict[str, Any] = _of(parts.texts(validation).removeprefix(hub.BUILTIN))
        for key, name in (("perplexity", "perplexity"), ("kl", "KL divergence"), ("top1_agreement", "top-1 agreement")):
            found.append(EvalResult(**texts, metric_type=key, metric_name=name, metric_value=comparison[key]))
    for task in (validation.get("tasks") or {}).values():
        found.append(EvalResult(**_of(task["name"]), metric_type=task["metric"], metric_value=task["quantized"]))
    return found


def _of(data: str) -> dict[str, Any]:
    return {"task_type": "text-generation", "dataset_type": data, "dataset_name": data}
