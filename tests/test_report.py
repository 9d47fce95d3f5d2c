"""results.json and report.html: one source for each figure, nothing from a network, nothing that a text can break."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NoReturn

import pytest
import tiny
import torch

import quantkit
from quantkit import advice, html_report, output, pipeline, plots
from quantkit.errors import GateError, InputError
from quantkit.profile import Profile
from quantkit.progress import Silent
from quantkit.recipe import Recipe

CHECK: dict[str, Any] = {
    "perplexity": {"data": "builtin:pydocs-heldout", "windows": 6, "length": 32},
    "generation": {"prompts": 5, "tokens": 8},
    "prompt": "To sort a list",
    "gates": {},
}
HOSTILE = """</pre><script>alert(1)</script><img src=x onerror=alert(2)> "'&amp; {{ 7 * 7 }} $\\frac{1}{2}$ ]]>-->"""


class Page(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data

    def is_harmless(self) -> bool:
        """No script, no frame, no image, no handler; references only to what is in the page."""
        wild = {"script", "iframe", "object", "embed", "img", "link", "base", "form", "foreignobject"} & {*self.tags}
        handlers = [name for name, _ in self.attributes if name.startswith("on")]
        outside = [
            v for n, v in self.attributes if n in ("href", "src", "xlink:href") and not (v or "").startswith("#")
        ]
        return not wild and not handlers and not outside


def refuse(name: str) -> NoReturn:
    raise AssertionError(f"{name} is not JSON")


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / output.RESULTS).read_text(), parse_constant=refuse)
    return content


def recipe(model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "scheme": {"preset": "W4A16", "group_size": 32},
        "method": "rtn",
        "calibration": {"data": "builtin:pydocs", "samples": 8, "length": 64},
        "export": {"engines": ["transformers"]},
        "validate": CHECK,
        **changes,
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("report") / "model")


@pytest.fixture(scope="module")
def out(model: Path) -> Path:
    return quantkit.quantize(recipe(model), out=model.parent / "out", report=True).out


def test_results_are_the_summary_and_what_it_leaves_out(out: Path) -> None:
    found, summary = read(out), json.loads((out / output.SUMMARY).read_text())
    assert {key: found[key] for key in summary} == summary, "one source"
    measured = found["by_window"]
    assert len(measured["kl_by_window"]) == 6
    assert sum(measured["kl_by_window"]) / 6 == pytest.approx(found["validation"]["comparison"]["kl"])
    assert len(found["texts"]) == 4 and all(text["prompt"] and text["original"] for text in found["texts"])
    sizes = found["by_block"]
    assert [*sizes] == ["0", "1", ""]
    for key in ("source_bytes", "output_bytes"):
        assert sum(block[key] for block in sizes.values()) == found["size"][key]
    assert found["seconds"]["quantize"]["stream"] > 0 and found["seconds"]["validate"]["windows"] > 0
    assert found["machine"]["device"] == "CPU" and found["try_next"] is None


def test_what_is_the_same_every_time_has_no_times(model: Path, out: Path) -> None:
    """quantkit.json of a run with a report is that of one without."""
    plain = quantkit.quantize(recipe(model), out=model.parent / "plain").out
    assert (plain / output.SUMMARY).read_bytes() == (out / output.SUMMARY).read_bytes()
    assert {p.name for p in out.iterdir()} - {p.name for p in plain.iterdir()} == {output.RESULTS, output.REPORT}


def test_the_page_says_what_was_measured_and_needs_nothing(out: Path) -> None:
    text = (out / output.REPORT).read_text()
    page = Page(text)
    assert page.is_harmless() and page.tags.count("svg") == 3
    assert "http://" not in text and "https://" not in text and "2026" not in text
    found = read(out)
    comparison = found["validation"]["comparison"]
    said = [f"{comparison['perplexity']:.3f}", f"{comparison['top1_agreement']:.1%}", f"{comparison['kl_p99']:.4f}"]
    said += ["validated", "self_attn.q_proj", "lm_head", "is in no block", "To sort a list"]
    for part in [*said, "windows", "relative squared error", "transformers", "group_size: 32"]:
        assert part in page.text, part
    for x in found["texts"]:
        assert " ".join(x["prompt"].split()) in " ".join(page.text.split())
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_the_same_figures_give_the_same_page(out: Path) -> None:
    found = read(out)
    assert html_report.page(found, "out") == html_report.page(copy.deepcopy(found), "out")
    assert plots.errors({"q": {0: 0.1, 1: 0.2}}) == plots.errors({"q": {0: 0.1, 1: 0.2}})


def test_no_value_can_break_the_page(out: Path) -> None:
    """Names of models, layers and tasks, texts, notes, messages, recipes and versions: all hostile at once."""

    def spoilt(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoilt(each) for key, each in value.items()}
        if isinstance(value, list):
            return [spoilt(each) for each in value]
        return HOSTILE if isinstance(value, str) else value

    found = read(out)
    kept = {key: found[key] for key in ("recipe", "status", "seconds", "by_block", "by_window")}
    found = {**spoilt(found), **kept, "run_warnings": [HOSTILE], "try_next": None}
    interval = {"value": 0.9, "low": 0.8, "high": 1.0}
    task = {"name": HOSTILE, "metric": HOSTILE, "shots": 0, "items": 9, "original": 0.5, "quantized": 0.4}
    found["validation"]["tasks"] = {HOSTILE: {**task, "recovery": interval, "lost": 1, "won": 0, "p": 1.0}}
    found["layers"][0]["name"] = f"model.layers.0.{HOSTILE}"
    found["try_next"] = {"file": HOSTILE, "changes": [HOSTILE], "output_bytes": 9}
    page = Page(html_report.page(found, HOSTILE))
    assert page.is_harmless() and page.tags.count("svg") == 4
    assert page.text.count("<script>alert(1)</script>") > 20 and "{{ 7 * 7 }}" in page.text


def test_without_matplotlib_the_page_has_no_plots_and_says_so(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told: list[str] = []
    html_report.write(tmp_path / "there", read(out), "out", told.append)
    page = Page((tmp_path / "there" / output.REPORT).read_text())
    assert "svg" not in page.tags and "pip install 'quantkit[report]'" in page.text and "in no block" in page.text
    assert told == ["report.html has no plots: they need matplotlib (pip install 'quantkit[report]')"]


def test_figures_that_are_no_numbers(out: Path) -> None:
    """A ruined model: infinite perplexity, NaN errors. The page is made, and results.json stays JSON."""
    found = read(out)
    found["validation"]["comparison"]["perplexity"] = float("inf")
    found["by_window"]["kl_by_window"][0] = float("nan")
    found["layers"][0]["relative_error"] = float("nan")
    place = out.parent / "ruined"
    html_report.write(place, found, "out", lambda _: None)
    assert read(place)["validation"]["comparison"]["perplexity"] == "Infinity"
    assert "inf" in Page((place / output.REPORT).read_text()).text


def test_a_place_that_is_a_file(out: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file, or lies in one"):
        html_report.write(tmp_path / "file", read(out), "out", lambda _: None)


def test_an_output_that_computes_nan_has_its_report(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = pipeline.ShardWriter.write

    def poisoned(self: Any, name: str, tensor: torch.Tensor) -> None:
        write(self, name, tensor * float("nan") if name == "model.norm.weight" else tensor)

    monkeypatch.setattr(pipeline.ShardWriter, "write", poisoned)
    calibrated = recipe(model, method="gptq")
    with pytest.raises(GateError, match="NaN or Inf"):
        quantkit.quantize(calibrated, out=tmp_path / "out", report=True)
    page = Page((tmp_path / "out" / output.REPORT).read_text())
    assert "failed" in page.text and "logits are NaN or Inf" in page.text and "Nothing was measured." in page.text
    assert not (tmp_path / "out" / output.TRY_NEXT).exists(), "no recipe helps against this"


def test_an_output_of_another_tool_gets_its_report_elsewhere(model: Path, tmp_path: Path) -> None:
    quantkit.quantize(recipe(model, export={"format": "gptq", "engines": ["transformers"]}), out=tmp_path / "gptq")
    for name in (output.SUMMARY, output.RECIPE):
        (tmp_path / "gptq" / name).unlink()
    before = {p.name: p.read_bytes() for p in (tmp_path / "gptq").iterdir()}
    options: dict[str, Any] = {"windows": 2, "length": 32, "gates": {"kl": 10}}
    assert html_report.place_of(tmp_path / "gptq") == Path("gptq-report")
    quantkit.validate(tmp_path / "gptq", against=model, report=tmp_path / "there", **options)
    assert {p.name: p.read_bytes() for p in (tmp_path / "gptq").iterdir()} == before
    found, page = read(tmp_path / "there"), Page((tmp_path / "there" / output.REPORT).read_text())
    assert found["status"] == "validated" and found["source"]["model"] == str(model)
    assert found["by_block"]["0"]["output_bytes"] < found["by_block"]["0"]["source_bytes"]
    assert page.tags.count("svg") == 2 and "≤ 10: pass" in page.text


def test_what_tells_of_a_source_is_not_copied_with_it(model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model, tmp_path / "source"))
    for name in output.OF_THE_OUTPUT:
        (source / name).write_text("{}")
    result = quantkit.quantize(recipe(source, validate="none"), out=tmp_path / "out")
    assert not any((result.out / name).exists() for name in output.OF_THE_OUTPUT)
    assert {x["name"] for x in result.summary["files"]["dropped"]} == {*output.OF_THE_OUTPUT}


def test_parts_within_parts_add_up_to_the_whole() -> None:
    timed = Profile(torch.device("cpu"))
    with timed("outer"):
        for _ in range(3):
            with timed("inner"):
                sum(range(20_000))
    assert [*timed.seconds] == ["inner", "outer"] and min(timed.seconds.values()) > 0
    assert timed.seconds["inner"] > timed.seconds["outer"]


# What to try next -----------------------------------------------------------------------------------------------------


def test_what_failed_leaves_a_recipe_that_runs_and_loses_less(model: Path, tmp_path: Path) -> None:
    check = {**CHECK, "gates": {"kl": 0.0}}
    failing = recipe(model, scheme={"preset": "W3A16", "group_size": 64}, validate=check)
    failing["rules"] = [{"match": "*.down_proj", "scheme": {"preset": "W3A16", "group_size": 32}}]
    first = quantkit.quantize(failing, out=tmp_path / "first", report=True)
    file = first.out / output.TRY_NEXT
    text = file.read_text()
    assert "#   kl is" in text and "#   gptq in the place of rtn, which observes builtin:pydocs\n" in text
    assert (
        "#   groups of 32 columns in the place of 64\n" in text
        and "#   W8A16-g32 for the layers that lost most" in text
    )
    told = read(first.out)["try_next"]
    assert f"Tensors of {told['output_bytes']:,} bytes, where the first output has" in text
    page = Page((first.out / output.REPORT).read_text())
    assert all(change in page.text for change in told["changes"])
    second = quantkit.quantize(file, out=tmp_path / "second")
    assert second.summary["size"]["output_bytes"] == told["output_bytes"]
    assert first.validation is not None and second.validation is not None
    assert second.validation.comparison.kl < 0.7 * first.validation.comparison.kl
    assert (second.out / output.TRY_NEXT).is_file(), "it missed its gate again, so there is a further one"
    assert (second.out / output.TRY_NEXT).read_text() != text
    assert quantkit.validate(second.out, gates={}).status == "validated"
    assert not (second.out / output.TRY_NEXT).exists(), "what passed needs none"
    quantkit.validate(second.out, gates={"kl": 0.0})
    assert (second.out / output.TRY_NEXT).is_file()


def test_no_advice_where_it_could_not_be_followed(model: Path) -> None:
    """Texts that a program gave cannot be read again."""
    given = Recipe.from_any(recipe(model, calibration={"data": "python:iterable"}))
    from quantkit import plan as planning

    assert advice.advise(planning.make(given), []) is None


def test_a_gate_of_nothing_is_refused_before_the_work(out: Path) -> None:
    class Listening(Silent):
        def item(self, k: int, name: str) -> None:
            raise AssertionError("measured before it was refused")

    with pytest.raises(InputError, match=r"gate 'recovery\.gsm8k': nothing of that name is measured; there are kl"):
        quantkit.validate(out, gates={"recovery": {"gsm8k": 0.9}}, progress=Listening())
