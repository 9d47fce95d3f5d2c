"""The model card: every figure is the run's, nothing is said that was not measured, and cells stay in their tables."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import packed_models
import pytest
import yaml

from quantkit import card, presets
from quantkit.card import Base, render

RECIPE = {
    "model": "org/base@abc",
    "scheme": "W4A16",
    "method": "gptq",
    "calibration": {"data": "org/texts", "samples": 128, "length": 512},
    "validate": {"perplexity": {"data": "builtin:pydocs-heldout", "windows": 40, "length": 512}},
}
INTERVAL = {"value": 0.971, "low": 0.951, "high": 0.991, "stderr": 0.01, "samples": 50, "confidence": 0.95}
LAYER = {"scheme": "int4, group 128, symmetric", "shape": [256, 512], "error_of": "output", "tokens": 65_536}
SUMMARY: dict[str, Any] = {
    "quantkit": "0.1.0",
    "status": "validated",
    "source": {"model": "org/base@abc", "revision": "0123456789abcdef", "fingerprint": "f"},
    "recipe": RECIPE,
    "data": {
        "sha256": "5ha",
        "source": {"kind": "hub", "data": "org/texts", "split": "train", "revision": "fedcba"},
        "documents_read": 411,
        "documents_kept": 397,
        "document_tokens": {"min": 17, "median": 1533, "max": 9001},
        "rows": 128,
        "length": 512,
        "tokens": 65_536,
        "padding_share": 0.123,
    },
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "layers": [
        {"name": f"layers.{i}", **LAYER, "bits_per_weight": 4.125 + i / 4, "relative_error": 0.0042 + i / 1000}
        for i in range(4)
    ],
    "not_quantized": [{"name": "lm_head", "reason": "is in no block"}],
    "size": {"source_bytes": 14_700_000, "output_bytes": 5_100_000},
    "validation": {
        "status": "validated",
        "message": "",
        "data": "builtin:pydocs-heldout",
        "comparison": {
            "tokens": 20_480,
            "windows": 40,
            "perplexity_original": 9.207,
            "perplexity": 9.551,
            "perplexity_ratio": 1.0374,
            "kl": 0.0412,
            "kl_stderr": 0.0013,
            "top1_agreement": 0.887,
        },
        "flips": {"rate": {**INTERVAL, "value": 0.111, "low": 0.101, "high": 0.121}, "floor": 0.02},
        "tasks": {
            "gsm8k": {
                "name": "gsm8k",
                "metric": "exact_match",
                "original": 0.512,
                "quantized": 0.497,
                "recovery": INTERVAL,
            }
        },
        "gates": [
            {"name": "kl", "limit": 0.06, "value": 0.0412, "low": 0.0391, "high": 0.0433, "outcome": "pass"}
            | {"sense": "max", "level": "fail", "passed": True}
        ],
        "notes": [],
    },
}
BASE = Base("org/base", "org/base", "0123456789abcdef", False, {"license": "mit", "language": ["en"]}, "")
# In quantkit.json, but told elsewhere or in another form.
UNTOLD = {
    ("validation", "gates", 0, "value"),
    *(("layers", i, "tokens") for i in range(4)),
    *(("layers", i, "shape", d) for i in range(4) for d in range(2)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files for the engines' rules to look at."""
    folder = tmp_path_factory.mktemp("card") / "out"
    packed_models.save(folder, "compressed-tensors", presets.PRESETS["W4A16"])
    return folder


def made(folder: Path, summary: dict[str, Any] = SUMMARY, base: Base = BASE) -> str:
    return render(folder, summary, base, repo="alice/base-W4A16")


def figures(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all numbers, and of what identifies data and models."""
    if isinstance(value, dict):
        for key in value:
            if key not in ("recipe", "stderr", "samples", "confidence"):
                yield from figures(value[key], (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from figures(item, (*path, index))
    elif (isinstance(value, (int, float)) and not isinstance(value, bool)) or path[-1] in ("sha256", "revision"):
        yield path


def changed(path: tuple[Any, ...]) -> dict[str, Any]:
    summary = copy.deepcopy(SUMMARY)
    place: Any = summary
    for key in path[:-1]:
        place = place[key]
    old = place[path[-1]]
    place[path[-1]] = f"{old}x" if isinstance(old, str) else old * 1.5 if isinstance(old, float) else old * 2 + 1
    return summary


def test_every_figure_is_the_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "_engines", lambda *_: [])  # the same each time, and the slow part
    before = made(folder)
    paths = [path for path in figures(SUMMARY) if path not in UNTOLD and path != ("source", "revision")]
    assert len(paths) > 35
    same = [path for path in paths if made(folder, changed(path)) == before]
    assert same == []


def test_the_texts_are_those_that_were_measured_on(folder: Path) -> None:
    """Not the recipe's: `validate --data` may have taken others."""
    other = copy.deepcopy(SUMMARY)
    other["validation"]["data"] = "org/texts"
    text = made(folder, other)
    assert "40 windows of org/texts" in text and "type: org/texts" in text and "pydocs-heldout" in made(folder)
    del other["validation"]["data"]
    assert "40 windows of unnamed texts" in made(folder, other)


def test_front_matter(folder: Path) -> None:
    text = made(folder)
    front = yaml.safe_load(text.split("---\n")[1])
    index = front.pop("model-index")
    assert front == {
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "license": "mit",
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["quantkit", "W4A16", "compressed-tensors"],
        "datasets": ["org/texts"],
    }
    values = {(m["type"], m["value"]) for result in index[0]["results"] for m in result["metrics"]}
    assert values == {("perplexity", 9.551), ("kl", 0.0412), ("top1_agreement", 0.887), ("exact_match", 0.497)}
    assert "quantkit quantize quantkit-recipe.yaml --model org/base@0123456789abcdef --out base-W4A16" in text


def test_engines_only_where_their_rules_are_kept(folder: Path) -> None:
    text = made(folder)
    assert "vllm serve alice/base-W4A16" in text and "trtllm-serve" not in text
    assert "vllm serve" not in made(folder.parent), "there is nothing that could be checked"


def test_what_was_not_measured_has_no_line(folder: Path) -> None:
    summary = {**SUMMARY, "status": "unvalidated", "validation": None, "data": None}
    text = made(folder, summary)
    assert "It was not measured." in text and "No data was used." in text and "model-index" not in text
    assert "perplexity |" not in text and "datasets" not in text.split("---\n")[1]
    python = {**SUMMARY, "data": {**SUMMARY["data"], "source": {"kind": "python", "data": "python"}}}
    assert "the recipe alone does not give the same again" in made(folder, python)


def test_terms_of_the_original_are_carried_over(tmp_path: Path, folder: Path) -> None:
    text = "# Base\n\n## Training\nA secret.\n\n## Intended use and limitations\nNot for medicine.\n"
    (tmp_path / "README.md").write_text(f"---\nlicense: other\nlicense_link: LICENSE.txt\n---\n{text}")
    summary = {**SUMMARY, "source": {**SUMMARY["source"], "model": str(tmp_path / "base"), "revision": None}}
    base = card.base_of(tmp_path, summary, None)
    assert base.objection() is None and base.hub_id is None and base.name == "base"
    text = made(folder, summary, base)
    assert "Not for medicine." in text and "A secret." not in text and "other (LICENSE.txt)" in text
    assert "base_model" not in text and "--model FOLDER_OF_THE_ORIGINAL" in text
    assert "names no licence" in made(folder, summary, Base("b", None, None, False, {}, ""))


@pytest.mark.parametrize(
    ("licence", "refused"),
    [
        *((name, True) for name in ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "other fair-noncommercial-research")),
        *((name, False) for name in ("mit", "apache-2.0", "llama3.1", "cc-by-sa-4.0", "ncsa")),
    ],
)
def test_which_licences_object(licence: str, refused: bool) -> None:
    name, _, more = licence.partition(" ")
    base = Base("b", "org/b", "1", False, {"license": name, "license_name": more or None}, "")
    assert (base.objection() is not None) == refused


def test_cells_cannot_leave_their_table(folder: Path) -> None:
    summary = json.loads(json.dumps(SUMMARY))
    summary["not_quantized"] = [{"name": "a|b", "reason": "two\nlines | more"}]
    summary["layers"][0]["name"] = "x\n\n# Heading"
    text = made(folder, summary)
    assert r"| not quantized | a\|b: two lines \| more |" in text and "\n# Heading" not in text
