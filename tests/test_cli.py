"""The command line: what each command passes on and prints, and the exit code of every way to end."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import typer
from typer.testing import CliRunner, Result

from quantkit import api, convert, doctor, estimate, inspection, report
from quantkit import plan as planning
from quantkit.cli import app, main
from quantkit.cli_validation import Sides
from quantkit.errors import GateError, InputError, MissingError
from quantkit.progress import Progress
from quantkit.ranks import Ranks
from quantkit.recipe import json_schema

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
VALIDATION = {
    "status": "validated",
    "message": "",
    "comparison": {
        "tokens": 20480,
        "windows": 40,
        "perplexity_original": 9.2067,
        "perplexity": 9.5442,
        "perplexity_ratio": 1.03666,
        "kl": 0.0431,
        "kl_stderr": 0.0012,
        "kl_p99": 0.4,
        "top1_agreement": 0.8912,
    },
    "gates": [{"name": "kl", "limit": 0.06, "value": 0.0431, "outcome": "pass", "passed": True, "sense": "max"}],
    "samples": {"prompt": "To open", "original": " a file", "quantized": " a [bold]file\x1b[2J"},
}
SUMMARY = {
    "status": "validated",
    "size": {"source_bytes": 14_700_000, "output_bytes": 5_200_000},
    "validation": VALIDATION,
}


def run(*args: str) -> Result:
    return CliRunner().invoke(app, args)


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def command(*args: Any, **kwargs: Any) -> NoReturn:
        raise error

    return command


def validation(passed: bool) -> Any:
    """What the CLI reads of an api.Validation."""
    message = "" if passed else "kl is 0.0431, wanted at most 0.01; worst layers: model.layers.0.mlp.down_proj"
    gate = {**VALIDATION["gates"][0], "outcome": "pass" if passed else "fail", "passed": passed}  # type: ignore[index]
    values = {**VALIDATION, "gates": [gate]}
    return SimpleNamespace(gates=[SimpleNamespace(passed=passed)], message=message, to_dict=lambda: values)


# Bad usage


@pytest.mark.parametrize(
    "args",
    [
        ["frobnicate"],
        ["quantize"],
        ["quantize", QUICKSTART, "--device", "tpu"],
        ["quantize", QUICKSTART, "--nonsense"],
        ["validate", "x", "--windows", "0"],
        ["validate", "x", "--windows", "many"],
    ],
)
def test_bad_usage_is_2(args: list[str]) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["quantize", "no-such.yaml"], "no-such.yaml: no such recipe file"),
        (["plan", "no-such.yaml"], "no-such.yaml: no such recipe file"),
        (
            ["quantize", QUICKSTART, "--set", "calibration.sample=4"],
            "unknown key calibration.sample; did you mean samples?",
        ),
        (["plan", QUICKSTART, "--set", "scheme=W4A61"], "unknown preset W4A61; did you mean W4A16?"),
        (["validate", "x", "--limit", "3"], "--tasks-folder and --limit are of tasks; name some with --tasks"),
        (["validate", "x", "--gate", "kl"], "--gate kl: expected name=value"),
        (["validate", "x", "--gate", "KL=1"], "--gate KL=1: unknown gate KL; did you mean kl?"),
        (["validate", "x", "--gate", "kl=low"], "--gate kl=low: expected a number, got 'low'"),
        (["validate", "x", "--gate", "kl=-1"], "--gate kl=-1: Input should be greater than or equal to 0"),
        (["validate", "x", "--gate", "kl=nan"], "--gate kl=nan: Input should be a finite number"),
    ],
)
def test_bad_input_is_2_in_one_sentence(args: list[str], message: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


# How a command ends


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("config.json: missing"), 2, "config.json: missing"),
        (GateError("NaN from the quantized model"), 3, "NaN from the quantized model"),
        (MissingError("no GPU"), 4, "no GPU"),
        (KeyboardInterrupt(), 130, "interrupted before it was finished; run the same command again"),
        (
            OSError(errno.ENOSPC, "No space", "out/x"),
            4,
            "out/x: no room left on the disk; free some, or choose another",
        ),
        (OSError(errno.EROFS, "Read-only"), 4, "the file system is read-only; choose another place with --out"),
        (PermissionError(errno.EACCES, "Denied", "out"), 4, "out: no permission; choose another place"),
        (MemoryError(), 4, "out of memory; lower calibration.batch_size or calibration.length"),
        (
            ValueError("bad\nshape"),
            1,
            "this is a bug in quantkit: ValueError: bad shape; set QUANTKIT_DEBUG=1 for the traceback",
        ),
        (OSError(errno.ENOENT, "No such file", "x"), 1, "this is a bug in quantkit: FileNotFoundError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_error_has_its_exit_code_and_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    monkeypatch.setattr(api, "quantize", raising(error))
    result = run("quantize", QUICKSTART)
    assert result.exit_code == code
    assert result.stderr.startswith(f"error: {message}")
    assert len(result.stderr.splitlines()) == 1


def test_debug_adds_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_DEBUG", "1")
    monkeypatch.setattr(api, "quantize", raising(ValueError("bad shape")))
    result = run("quantize", QUICKSTART)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "error: this is a bug in quantkit: ValueError: bad shape" in result.stderr


def test_a_failed_gate_is_3_after_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = validation(passed=False)
    summary = {**SUMMARY, "status": "failed", "validation": failed.to_dict()}
    done = api.Result(Path("out"), summary, failed)
    monkeypatch.setattr(api, "quantize", lambda *args, **kwargs: done)
    monkeypatch.setattr(api, "validate", lambda *args, **kwargs: failed)
    for args in (["quantize", QUICKSTART], ["validate", "out"]):
        result = run(*args)
        assert result.exit_code == 3
        assert "≤ 0.06 failed" in result.stdout
        assert result.stderr == f"error: {failed.message}\n"


def test_interrupted_while_starting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("quantkit.cli.app", raising(KeyboardInterrupt()))
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"


# What commands pass on and print


def test_quantize_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def quantize(
        recipe: Any,
        *,
        out: Any,
        device: str,
        overwrite: bool,
        fresh: bool,
        profile: bool,
        delete_shards: bool,
        report: bool,
        progress: Progress,
        ranks: Ranks,
    ) -> api.Result:
        given = (device, overwrite, fresh, profile, delete_shards, report, ranks.size)
        calls.append((recipe.model, recipe.calibration.samples, out, *given))
        progress.say("on stderr")
        return api.Result(Path("there"), SUMMARY, validation(passed=True))

    monkeypatch.setattr(api, "quantize", quantize)
    options = [
        "--model",
        "org/name",
        "--out",
        "there",
        "--set",
        "calibration.samples=7",
        "--device",
        "cpu",
        "--overwrite",
        "--fresh",
        "--profile",
        "--delete-shards",
    ]
    result = run("quantize", QUICKSTART, *options)
    assert result.exit_code == 0, result.stderr
    assert calls == [("org/name", 7, Path("there"), "cpu", True, True, True, True, True, 1)]
    assert result.stderr == "on stderr\n"
    assert "report: there/report.html" in result.stdout


def test_the_table_shows_before_after_and_gates(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_result(SUMMARY, "there")
    lines = [re.sub(r"\s{2,}", " | ", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert "original | quantized | gate" in lines
    assert "size | 14.7 MB | 5.2 MB (35%)" in lines
    assert "perplexity | 9.207 | 9.544 (x 1.0367)" in lines
    assert "KL divergence | 0 | 0.0431 ± 0.0012 | ≤ 0.06 passed" in lines
    assert "top-1 agreement | 100% | 89.1%" in lines
    assert "measured on 20,480 tokens in 40 windows" in lines
    assert "original | a file" in lines
    assert r"quantized | a [bold]file\x1b[2J" in lines, "generated text neither is markup nor steers the terminal"
    assert "validated: there" in lines


def test_the_table_without_validation_or_with_a_single_window(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_result({"status": "unvalidated", "size": SUMMARY["size"], "validation": None})
    alone = capsys.readouterr().out
    assert "perplexity" not in alone
    assert "unvalidated" in alone
    comparison = {**VALIDATION["comparison"], "kl_stderr": None}  # type: ignore[dict-item]
    report.print_result({"validation": {**VALIDATION, "comparison": comparison, "gates": [], "samples": {}}})
    assert "±" not in capsys.readouterr().out


def test_validate_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def validate(folder: Path, *, progress: Progress, **kwargs: Any) -> Any:
        calls.append((folder, kwargs))
        return validation(passed=True)

    monkeypatch.setattr(api, "validate", validate)
    options = ["--against", "m", "--data", "d.txt", "--windows", "3", "--length", "64", "--device", "cpu"]
    options += ["--tasks", "a,b", "--tasks-folder", "mine", "--limit", "9", "--side-by-side", "no", "--report", "there"]
    options.append("--delete-shards")
    result = run("validate", "out", *options, "--gate", "kl=0.1", "--gate", "top1_agreement=1")
    assert result.exit_code == 0, result.stderr
    tasks = {"names": ["a", "b"], "folder": "mine", "limit": 9}
    given = {"against": "m", "data": "d.txt", "windows": 3, "length": 64, "device": "cpu", "tasks": tasks}
    given |= {"side_by_side": False, "report": Path("there"), "delete_shards": True}
    assert calls == [(Path("out"), {**given, "gates": {"kl": 0.1, "top1_agreement": 1.0}})]
    assert run("validate", "out").exit_code == 0
    plain = {"device": "auto", "delete_shards": False, "gates": None, "report": Path("out-report")}
    assert calls[1][1] == {**dict.fromkeys(given), **plain}


@pytest.mark.parametrize(("given", "means"), [("recipe", None), ("auto", "auto"), ("yes", True), ("no", False)])
def test_how_the_models_are_held(given: str, means: object) -> None:
    assert Sides(given).given == means


def test_bounds_of_the_divergence_are_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    bounds = {"at_least": 0.0401, "at_most": 0.0502}
    report.print_result({"validation": {**VALIDATION, "kl_bounds": bounds}})
    lines = [re.sub(r"\s{2,}", " | ", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert "for certain | 0.0401 to 0.0502" in lines


SECTION = {
    "title": "a model",
    "facts": [("blocks", 8), ("dtype", "bfloat16")],
    "table": {"columns": ["linear", "rows"], "rows": [["model.layers.[0].q_proj", 256], ["down", None]]},
    "sections": [{"title": "inner"}],
    "warnings": ["the blocks differ"],
}


def test_plan_and_inspect_render_plain_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "make", lambda recipe: recipe)
    monkeypatch.setattr(estimate, "describe", lambda plan, **_: {**SECTION, "title": plan.model})
    monkeypatch.setattr(inspection, "inspect", lambda path: {**SECTION, "title": path})
    for args in (["plan", QUICKSTART, "--model", "org/name"], ["inspect", "org/name"]):
        result = run(*args)
        assert result.exit_code == 0, result.stderr
        for text in ("org/name", "blocks  8", "model.layers.[0].q_proj", "256", "inner", "warning: the blocks differ"):
            assert text in result.stdout


def test_the_real_functions_take_what_the_commands_pass() -> None:
    import inspect

    def check(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        inspect.signature(function).bind(*args, **kwargs)

    common = {"device": "cpu", "progress": None}
    check(api.quantize, "recipe", out=None, overwrite=False, fresh=False, **common)
    check(api.validate, "out", against=None, data=None, windows=None, length=None, tasks=None, gates=None, **common)
    check(planning.make, "recipe")
    check(estimate.describe, "plan")
    check(inspection.inspect, "path")
    check(convert.convert, "dir", "gptq", "out", overwrite=False, shard_size="5GB", progress=None)


def test_schema_is_json_and_complete() -> None:
    result = run("schema")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json_schema()


@pytest.mark.parametrize("command", ["quantize", "validate", "convert", "inspect", "plan", "schema", "doctor"])
def test_every_command_has_help(command: str) -> None:
    assert command in run("--help").stdout
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


# Doctor


def test_doctor_reports_and_never_shows_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    result = run("doctor")
    assert result.exit_code == 0, result.stderr
    for word in ("python", "torch", "transformers", "triton", "vllm", "lm-eval", "GPU", "memory", "disk", "Hub login"):
        assert word in result.stdout
    assert "secret" not in result.stdout
    assert doctor.Check("Hub login", "yes") in doctor.checks()


@pytest.mark.parametrize(("version", "found"), [("2.10.3", "2.10.3"), (None, "not installed")])
def test_doctor_is_4_when_something_required_is_old_or_missing(
    monkeypatch: pytest.MonkeyPatch, version: str | None, found: str
) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: version if name == "torch" else real(name))
    result = run("doctor")
    assert result.exit_code == 4
    assert "MISSING" in result.stdout
    assert result.stderr == f"error: torch: {found}, needs 2.11 or newer: pip install -U 'torch>=2.11'\n"


@pytest.mark.parametrize(
    ("version", "floor", "expected"),
    [("2.13.0+cpu", "2.11", False), ("2.9", "2.11", True), ("2.11.0a0+git1", "2.11", False), ("6.0", "6.0.2", True)],
)
def test_versions_compare_as_numbers(version: str, floor: str, expected: bool) -> None:
    assert doctor.older(version, floor) is expected


def test_doctor_knows_the_floors_of_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)^\]", text, re.M | re.S)
    assert listed is not None
    assert dict(re.findall(r'"([\w-]+)>=([\d.]+)', listed[1])) == doctor.REQUIRED
    assert f'requires-python = ">={doctor.PYTHON_FLOOR}"' in text


# The real process


def start(*args: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "eval"))
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, cwd=ROOT, check=False)


def test_version_of_the_module() -> None:
    done = start("-m", "quantkit", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"quantkit \d+\.\d+\.\d+\n", done.stdout)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, quantkit.cli; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    assert start("-c", code).stdout == "[]\n"


def test_a_reader_that_goes_away_is_no_bug() -> None:
    assert isinstance(app, typer.Typer)
    code = "import sys, os; r, w = os.pipe(); os.close(r); os.dup2(w, 1); from quantkit.cli import main; main()"
    done = start("-c", code, "schema")
    assert (done.returncode, done.stderr) == (1, "")
