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
from quantkit.errors import InputError

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
        {
            "name": f"model.layers.{i}.mlp.up_proj",
            **LAYER,
            "bits_per_weight": 4.125 + i / 4,
            "relative_error": 0.0042 + i / 1000,
        }
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
SPEED = {"prompt": 128, "new": 64, "tokens_per_second": 430.0, "decode_tokens_per_second": 500.0}
BENCH: dict[str, Any] = {
    "device": "NVIDIA H200",
    "packed": {
        "bytes": 5_000_000,
        "speeds": [{**SPEED, "batch": 1}, {**SPEED, "batch": 16, "tokens_per_second": 5791.0}],
        "prefill": {"128": 0.0123, "2048": 0.123},
    },
    "dense": {
        "bytes": 15_000_000,
        "speeds": [{**SPEED, "tokens_per_second": 146.0}, {**SPEED, "tokens_per_second": 6200.0}],
        "prefill": {"128": 0.0111, "2048": 0.111},
    },
    "notes": ["batch 16: bf16 generates 1.07 times as fast"],
    "versions": {"torch": "2.13.0"},
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


def changed(of: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    copied = copy.deepcopy(of)
    place: Any = copied
    for key in path[:-1]:
        place = place[key]
    old = place[path[-1]]
    place[path[-1]] = f"{old}x" if isinstance(old, str) else old * 1.5 if isinstance(old, float) else old * 2 + 1
    return copied


def test_every_figure_is_the_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card.parts, "engines", lambda *_: [])  # the same each time, and the slow part
    before = made(folder)
    paths = [path for path in figures(SUMMARY) if path not in UNTOLD and path != ("source", "revision")]
    assert len(paths) > 35
    same = [path for path in paths if made(folder, changed(SUMMARY, path)) == before]
    assert same == []


def test_every_figure_of_speed_is_the_benchs(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(card.parts, "engines", lambda *_: [])
    assert "## Speed" not in made(tmp_path)

    def benched(found: dict[str, Any]) -> str:
        (tmp_path / "quantkit-bench.json").write_text(json.dumps(found))
        return made(tmp_path)

    before = benched(BENCH)
    assert "| 128 + 64 tokens, batch 1: tokens a second | 430 | 146 | 2.95 |" in before
    assert "| a prompt of 2048 tokens, ms | 123 | 111 | 1.11 |" in before
    assert "- Measured on NVIDIA H200; torch 2.13.0" in before and f"- {BENCH['notes'][0]}" in before
    told_with_packed = {("dense", "speeds", i, key) for i in range(2) for key in ("prompt", "new")}
    paths = [path for path in figures(BENCH) if path not in told_with_packed]
    assert len(paths) > 15
    assert [path for path in paths if benched(changed(BENCH, path)) == before] == []
    assert "| 128 + 64 tokens, batch 1: tokens a second | 430 |  |  |" in benched({**BENCH, "dense": None})
    with pytest.raises(InputError, match=r"quantkit-bench\.json: is not what quantkit bench --save writes"):
        benched({"packed": {}})


def test_the_error_of_every_layer_by_block(folder: Path) -> None:
    rows = {f"model.layers.{i}.mlp.up_proj": 0.01 + i / 100 for i in range(2)}
    rows |= {f"model.layers.1.mlp.experts.{e}.up_proj": 0.1 + e / 10 for e in range(3)}
    layers = [{**SUMMARY["layers"][0], "name": name, "relative_error": x} for name, x in rows.items()]
    columns, found = card.parts.by_block(layers)
    assert columns == ["block", "mlp.up_proj", "experts.up_proj"]
    assert found == [["0", "0.01", ""], ["1", "0.02", "0.2, at most 0.3"]]
    assert "| 1 | 0.02 | 0.2, at most 0.3 |" in made(folder, {**SUMMARY, "layers": layers})
    mixed = [*layers, {**layers[0], "name": "lm_head", "scheme": "int8, channel, symmetric"}]
    text = made(folder, {**SUMMARY, "layers": mixed})
    assert "| schemes of these layers | 5 x int4, group 128, symmetric; 1 x int8, channel, symmetric |" in text
    assert card.parts.by_block([]) == (["block"], [])


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


def test_engines_only_where_their_rules_are_kept(folder: Path, tmp_path: Path) -> None:
    text = made(folder)
    assert "vllm serve alice/base-W4A16" in text and "trtllm-serve" not in text
    assert "In transformers without quantkit" in text and "# pip install compressed-tensors" in text
    assert "vllm serve" not in made(folder.parent), "there is nothing that could be checked"
    trusted = {**SUMMARY, "recipe": {**RECIPE, "trust_remote_code": True}}
    assert "vllm serve alice/base-W4A16 --trust-remote-code\n" in made(folder, trusted)
    packed_models.save(tmp_path / "gptq", "gptq", presets.PRESETS["W4A16"])
    text = made(tmp_path / "gptq")
    assert "Note: gptq is loaded where optimum and gptqmodel is installed" in text and "pip install" not in text
    packed_models.save(tmp_path / "modelopt", "modelopt", presets.PRESETS["NVFP4A16"])
    assert "In transformers without quantkit" not in made(tmp_path / "modelopt"), "which loads it, and wrong"


def test_a_converted_output_is_reproduced_in_two_steps(folder: Path) -> None:
    text = made(folder, {**SUMMARY, "converted_from": {"format": "compressed-tensors", "to": "gptq"}})
    assert "quantkit reproduce" not in text and "quantkit reproduce alice/base-W4A16\n" in made(folder)
    assert "| format | gptq |" in text and "\n- gptq\n" in text
    assert "--out quantized\nquantkit convert quantized --to gptq --out base-W4A16\n```" in text


def test_datasets_of_the_original_are_carried_over(folder: Path) -> None:
    base = Base("org/base", "org/base", "1", False, {"datasets": ["org/corpus", "org/texts"]}, "")
    assert yaml.safe_load(made(folder, base=base).split("---\n")[1])["datasets"] == ["org/corpus", "org/texts"]


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
