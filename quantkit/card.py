"""The model card of an output: front matter for the Hub, then text for whoever loads it.

Every figure comes from quantkit.json; what was not measured has no line. The template is assets/model_card.md.jinja.
Licence, languages and limits of use come from the original's own card.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantkit import hub, lint
from quantkit.errors import QuantkitError
from quantkit.hub_calls import understood
from quantkit.recipe import Recipe
from quantkit.report import size

TEMPLATE = hub.ASSETS / "model_card.md.jinja"
WORST = 5  # layers that the card names
NONCOMMERCIAL = re.compile(r"(^|[-_ ])nc([-_ ]|$)|non-?_?commercial|research[-_ ]only|research[-_ ]licen[cs]e", re.I)
TERMS = re.compile(r"licen[cs]e|limitation|intended use|out[- ]of[- ]scope|usage|acceptable use|bias|risk", re.I)
SERVE = {
    "vllm": ("vLLM", "vllm serve {repo}"),
    "sglang": ("SGLang", "python -m sglang.launch_server --model-path {repo}"),
    "tensorrt-llm": ("TensorRT-LLM", "trtllm-serve {repo}"),
}
_SENSE = {"max": "≤", "min": "≥"}
_NAMES = {"kl": "KL divergence", "perplexity_ratio": "perplexity ratio", "top1_agreement": "top-1 agreement"}


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


def format_of(summary: Mapping[str, Any]) -> str:
    """The checkpoint format of an output: what it was converted to, or what its recipe says."""
    converted = summary.get("converted_from") or {}
    return str(converted.get("to") or Recipe.from_any(summary["recipe"]).export.format)


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
        "done": _done(summary, recipe),
        "engines": _engines(folder, repo),
        "remote_code": recipe.trust_remote_code,
        "recipe": yaml.safe_dump(summary["recipe"], sort_keys=False, allow_unicode=True).strip(),
        "calibration": _calibration(summary.get("data")),
        "accuracy": _accuracy(validation),
        "measured_on": _measured_on(validation),
        "layers": _layers(summary.get("layers") or ()),
        "reproducible": ((summary.get("data") or {}).get("source") or {}).get("kind") != "python",
        "model": model if base.hub_id or model.startswith(hub.BUILTIN) else None,
        "versions": sorted((summary.get("versions") or {}).items()),
        "licence": base.front.get("license"),
        "licence_link": base.front.get("license_link"),
        "terms": base.terms,
        "table": _table,
    }
    data = _front(summary, base, recipe, validation, str(values["title"]))
    return str(ModelCard.from_template(data, template_path=str(TEMPLATE), **values)).rstrip() + "\n"


def _front(summary: Mapping[str, Any], base: Base, recipe: Recipe, validation: Mapping[str, Any], title: str) -> Any:
    from huggingface_hub import ModelCardData

    source = (summary.get("data") or {}).get("source") or {}
    kept: dict[str, Any] = {key: base.front.get(key) for key in ("license", "license_name", "license_link", "language")}
    tags = ["quantkit", recipe.scheme.label, format_of(summary)]
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
        datasets=[source["data"]] if source.get("kind") == "hub" else None,
        model_name=title,
        eval_results=results or None,
    )


def _results(validation: Mapping[str, Any]) -> list[Any]:
    """model-index: what was measured of the output, on windows and by tasks."""
    from huggingface_hub import EvalResult

    found = []
    comparison = validation.get("comparison")
    if comparison:
        texts: dict[str, Any] = _of(_texts(validation).removeprefix(hub.BUILTIN))
        for key, name in (("perplexity", "perplexity"), ("kl", "KL divergence"), ("top1_agreement", "top-1 agreement")):
            found.append(EvalResult(**texts, metric_type=key, metric_name=name, metric_value=comparison[key]))
    for task in (validation.get("tasks") or {}).values():
        found.append(EvalResult(**_of(task["name"]), metric_type=task["metric"], metric_value=task["quantized"]))
    return found


def _of(data: str) -> dict[str, Any]:
    return {"task_type": "text-generation", "dataset_type": data, "dataset_name": data}


# Parts of the text ----------------------------------------------------------------------------------------------------


def _done(summary: Mapping[str, Any], recipe: Recipe) -> list[list[str]]:
    """Lines of the table on what was done, sizes included."""
    layers, dense, sizes = summary.get("layers") or (), summary.get("not_quantized") or (), summary.get("size") or {}
    method = " + ".join([*(t.name for t in recipe.transforms), recipe.method_name])
    rows = [
        ["scheme", recipe.scheme.label],
        ["method", method],
        ["format", format_of(summary)],
        ["layers quantized", str(len(layers))],
    ]
    if layers:
        weights = [_weights(x) for x in layers]
        mean = sum(x["bits_per_weight"] * w for x, w in zip(layers, weights)) / sum(weights)
        rows.append(["bits a weight of these layers, scales included", f"{mean:.3f}"])
    reasons: dict[str, list[str]] = {}
    for x in dense:
        reasons.setdefault(x["reason"], []).append(x["name"])
    for reason, names in reasons.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        rows.append(["not quantized", f"{', '.join(names[:3])}{more}: {reason}"])
    if summary.get("kv_cache"):
        rows.append(["KV cache", str(recipe.kv_cache)])
    if sizes.get("source_bytes"):
        share = sizes["output_bytes"] / sizes["source_bytes"]
        rows.append(["size", f"{size(sizes['output_bytes'])}, {share:.1%} of {size(sizes['source_bytes'])}"])
    return rows


def _weights(layer: Mapping[str, Any]) -> int:
    count = 1
    for d in layer["shape"]:
        count *= d
    return count


def _engines(folder: Path, repo: str) -> list[tuple[str, str]]:
    """Name and command of each engine whose rules the checkpoint keeps."""
    found = []
    for engine, (name, command) in SERVE.items():
        try:
            good = not any(f.level == lint.ERROR for f in lint.folder(folder, [engine]))
        except QuantkitError:
            good = False
        if good:
            found.append((name, command.format(repo=repo)))
    return found


def _calibration(data: Mapping[str, Any] | None) -> list[list[str]]:
    if not data or not data.get("rows"):
        return []
    source = data.get("source") or {}
    place = [str(source[key]) for key in ("data", "subset", "split", "revision") if source.get(key)]
    documents = data.get("document_tokens") or {}
    rows = [
        ["texts", ", ".join(place) or str(source.get("kind", ""))],
        ["tokens", f"{data['tokens']:,} in {data['rows']:,} rows of {data['length']:,}"],
        ["documents", f"{data['documents_kept']:,} kept of {data['documents_read']:,} read"],
    ]
    if documents:
        tokens = f"{documents['min']:,} to {documents['max']:,}, median {documents['median']:,}"
        rows.append(["tokens of a document", tokens])
    if data.get("padding_share"):
        rows.append(["padding", f"{data['padding_share']:.1%}"])
    rows.append(["sha256 of the rows", f"`{data['sha256']}`"])
    return rows


def _accuracy(validation: Mapping[str, Any]) -> list[list[str]]:
    """original, quantized, bounds, gate: a row each figure."""
    gates = {g["name"]: g for g in validation.get("gates") or ()}
    rows = []
    x = validation.get("comparison")
    if x:
        rows.append(["perplexity", f"{x['perplexity_original']:.3f}", f"{x['perplexity']:.3f}", "", ""])
        ratio, kl, top = gates.get("perplexity_ratio"), gates.get("kl"), gates.get("top1_agreement")
        rows.append(["perplexity ratio", "1", f"{x['perplexity_ratio']:.4f}", _bounds(ratio, ".4f"), _limit(ratio)])
        error = "" if x.get("kl_stderr") is None else f" ± {x['kl_stderr']:.4f}"
        rows.append(["KL divergence, nats a token", "0", f"{x['kl']:.4f}{error}", _bounds(kl, ".4f"), _limit(kl)])
        rows.append(["top-1 agreement", "100%", f"{x['top1_agreement']:.1%}", _bounds(top, ".1%"), _limit(top)])
    for task in (validation.get("tasks") or {}).values():
        name, r = task["name"], task["recovery"]
        after = f"{task['quantized']:.4g} ({r['value']:.1%})"
        gate = gates.get(f"recovery.{name}")
        rows.append([f"{name}, {task['metric']}", f"{task['original']:.4g}", after, _bounds(r, ".1%"), _limit(gate)])
    if gate := gates.get("recovery"):
        rows.append(["recovery, mean", "100%", f"{gate['value']:.1%}", _bounds(gate, ".1%"), _limit(gate)])
    if flips := validation.get("flips"):
        rate, floor = flips["rate"], f"{flips['floor']:.1%}"
        gate = gates.get("flips")
        rows.append(["next-token flips", floor, f"{rate['value']:.1%}", _bounds(rate, ".1%"), _limit(gate)])
    return rows


def _bounds(found: Mapping[str, Any] | None, form: str) -> str:
    if not found or found.get("low") is None or found.get("high") is None:
        return ""
    return f"{found['low']:{form}} to {found['high']:{form}}"


def _limit(gate: Mapping[str, Any] | None) -> str:
    if gate is None:
        return ""
    return f"{_SENSE.get(str(gate.get('sense')), '')} {gate['limit']:g}: {gate['outcome']}".strip()


def _measured_on(validation: Mapping[str, Any]) -> str:
    x = validation.get("comparison")
    return f"{x['tokens']:,} tokens in {x['windows']} windows of {_texts(validation)}" if x else ""


def _texts(validation: Mapping[str, Any]) -> str:
    """What was measured on; quantkit.json did not always say so."""
    return str(validation.get("data") or "unnamed texts")


def _layers(layers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The layers with the largest relative error."""
    known = [x for x in layers if x.get("relative_error") is not None]
    worst = sorted(known, key=lambda x: -x["relative_error"])[:WORST]
    rows = []
    for x in worst:
        error = f"{x['relative_error']:.5f} of its {x.get('error_of', 'weights')}"
        rows.append([x["name"], x["scheme"], f"{x['bits_per_weight']:.3f}", error])
    return rows


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; what is in a cell cannot end it."""
    cells = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
