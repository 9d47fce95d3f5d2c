"""The tables of a model card, each from quantkit.json or from the file of `quantkit bench --save`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import hub, lint, output, packed
from quantkit.errors import InputError, QuantkitError
from quantkit.recipe import Recipe
from quantkit.report import size

WORST = 5  # layers that the card names
ONLY_WARNS = "only warns"
_SENSE = {"max": "≤", "min": "≥"}
_IN_BLOCK = re.compile(r".*?\.(\d+)\.(.+)")
_RATES = {"tokens_per_second": "tokens a second", "decode_tokens_per_second": "after the first token"}
_STOCK = """{needs}from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repo}"{trust})"""


@dataclass(frozen=True)
class Engine:
    """How a user loads a checkpoint in it. command: {repo}, {trust} and {needs} stand for what differs."""

    name: str
    language: str
    command: str
    trust: str

    def code(self, repo: str, method: str, remote_code: bool) -> str:
        needs = "# pip install compressed-tensors\n" if method == "compressed-tensors" else ""
        return self.command.format(repo=repo, needs=needs, trust=self.trust if remote_code else "")


# As quantkit/lint/engines has them.
ENGINES = {
    "transformers": Engine("transformers without quantkit", "python", _STOCK, ", trust_remote_code=True"),
    "vllm": Engine("vLLM", "sh", "vllm serve {repo}{trust}", " --trust-remote-code"),
    "sglang": Engine(
        "SGLang", "sh", "python -m sglang.launch_server --model-path {repo}{trust}", " --trust-remote-code"
    ),
    "tensorrt-llm": Engine("TensorRT-LLM", "sh", "trtllm-serve {repo}{trust}", " --trust_remote_code"),
}


def format_of(summary: Mapping[str, Any]) -> str:
    """The checkpoint format of an output: what it was converted to, or what its recipe says."""
    converted = summary.get("converted_from") or {}
    return str(converted.get("to") or Recipe.from_any(summary["recipe"]).export.format)


def done(summary: Mapping[str, Any], recipe: Recipe) -> list[list[str]]:
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
    schemes = Counter(x["scheme"] for x in layers)
    if len(schemes) > 1:
        rows.append(["schemes of these layers", "; ".join(f"{n} x {name}" for name, n in schemes.most_common())])
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


def engines(folder: Path, repo: str, remote_code: bool) -> list[dict[str, Any]]:
    """Name, code and notes of each engine whose rules the checkpoint keeps."""
    try:
        found = lint.folder(folder, list(ENGINES))
    except QuantkitError:
        return []  # nothing that could be checked
    kept = [x for x in ENGINES if not any(f.engine == x and f.level == lint.ERROR for f in found)]
    method = (packed.find_config(folder, hub.read_json(folder / "config.json")) or {}).get("quant_method")
    return [
        {
            "name": ENGINES[x].name,
            "language": ENGINES[x].language,
            "code": ENGINES[x].code(repo, str(method), remote_code),
            "notes": list(dict.fromkeys(f"{f.what}; {f.fix}" for f in found if f.engine == x)),
        }
        for x in kept
    ]


def calibration(data: Mapping[str, Any] | None) -> list[list[str]]:
    """What was read for calibration, a row each: what, and how much."""
    if not data or not data.get("rows"):
        return []
    source = data.get("source") or {}
    place = [str(source[key]) for key in ("data", "subset", "split") if source.get(key)]
    if source.get("revision"):
        place.append(f"at commit `{source['revision']}`")
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


def accuracy(validation: Mapping[str, Any]) -> list[list[str]]:
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
        if sure := validation.get("kl_bounds"):
            bounds = f"{sure['at_least']:.4f} to {sure['at_most']:.4f}"
            rows.append(["KL divergence, for certain", "0", bounds, "", ""])
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
    level = f", {ONLY_WARNS}" if gate.get("level") == "warn" else ""
    return f"{_SENSE.get(str(gate.get('sense')), '')} {gate['limit']:g}: {gate['outcome']}{level}".strip()


def measured_on(validation: Mapping[str, Any]) -> str:
    """ "20,480 tokens in 40 windows of builtin:pydocs-heldout"; "" where nothing was measured."""
    x = validation.get("comparison")
    return f"{x['tokens']:,} tokens in {x['windows']} windows of {texts(validation)}" if x else ""


def texts(validation: Mapping[str, Any]) -> str:
    """What was measured on; quantkit.json did not always say so."""
    return str(validation.get("data") or "unnamed texts")


def worst(layers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The layers with the largest relative error."""
    known = [x for x in layers if x.get("relative_error") is not None]
    worst = sorted(known, key=lambda x: -x["relative_error"])[:WORST]
    rows = []
    for x in worst:
        error = f"{x['relative_error']:.5f} of its {x.get('error_of', 'weights')}"
        rows.append([x["name"], x["scheme"], f"{x['bits_per_weight']:.3f}", error])
    return rows


def by_block(layers: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: the relative error of every layer, a row each block; experts as their mean and the largest."""
    cells: dict[tuple[int, str], list[float]] = {}
    for x in layers:
        if x.get("relative_error") is not None and (found := _IN_BLOCK.match(x["name"])):
            leaf = re.sub(r"\.\d+(?=\.|$)", "", found[2])
            cells.setdefault((int(found[1]), leaf), []).append(x["relative_error"])
    leaves = list(dict.fromkeys(leaf for _, leaf in cells))
    rows = []
    for block in sorted({block for block, _ in cells}):
        row = [str(block)]
        for leaf in leaves:
            errors = cells.get((block, leaf), [])
            most = f", at most {max(errors):.3g}" if len(errors) > 1 else ""
            row.append(f"{sum(errors) / len(errors):.3g}{most}" if errors else "")
        rows.append(row)
    return ["block", *_short(leaves)], rows


def _short(names: Sequence[str]) -> list[str]:
    """The last parts of dotted names, as few as tell them apart."""
    for count in range(1, 10):
        found = [".".join(name.split(".")[-count:]) for name in names]
        if len(set(found)) == len(found):
            break
    return found if names else []


def speed(bench: Mapping[str, Any]) -> list[list[str]]:
    """What, packed, bf16, packed / bf16: from the file of `quantkit bench --save`."""
    if not bench:
        return []
    try:
        ours, theirs = bench["packed"], bench["dense"]
        rows = [["weights in memory", size(ours["bytes"]), *_beside(ours["bytes"], theirs and theirs["bytes"], size)]]
        for i, x in enumerate(ours["speeds"]):
            other = theirs["speeds"][i] if theirs else {}
            what = f"{x['prompt']} + {x['new']} tokens, batch {x['batch']}"
            for key, label in _RATES.items():
                values = _beside(x[key], other.get(key), _figure)
                rows.append([f"{what}: {label}", _figure(x[key]), *values])
        for length, seconds in ours["prefill"].items():
            other_ms = 1000 * theirs["prefill"][length] if theirs else None
            values = _beside(1000 * seconds, other_ms, _figure)
            rows.append([f"a prompt of {length} tokens, ms", _figure(1000 * seconds), *values])
    except (KeyError, TypeError, IndexError) as e:
        raise InputError(
            f"{output.BENCH}: is not what quantkit bench --save writes ({type(e).__name__}: {e}); run it again"
        ) from None
    return rows


def speed_notes(bench: Mapping[str, Any]) -> list[str]:
    """On what it was measured, and what a reader must know."""
    if not bench:
        return []
    versions = ", ".join(f"{name} {value}" for name, value in (bench.get("versions") or {}).items())
    return [x for x in (f"Measured on {bench.get('device')}; {versions}", *bench.get("notes", ())) if x]


def _figure(value: float) -> str:
    return f"{value:.4g}"


def _beside(ours: float, theirs: float | None, text: Callable[[float], str]) -> list[str]:
    return ["", ""] if not theirs else [text(theirs), f"{ours / theirs:.2f}"]


def converted(summary: Mapping[str, Any]) -> str | None:
    """The format that the output was converted to after it was quantized, if it was."""
    found = (summary.get("converted_from") or {}).get("to")
    return None if found is None else str(found)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; what is in a cell cannot end it."""
    cells = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
