"""The shape of the project: which module may import which, what a wheel holds, and what no file may hold."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration

ROOT = Path(__file__).resolve().parents[1]

# Imports go down this table, or stay in their row; never up. A new module gets a place here.
LAYERS = (
    ("quantkit_kernels",),
    ("quantkit.types", "quantkit.errors"),
    (
        "quantkit.presets",
        "quantkit.numerics",
        "quantkit.formats",
        "quantkit.stats",
        "quantkit.checkpoint",
        "quantkit.journal",
        "quantkit.shards",
        "quantkit.patterns",
        "quantkit.progress",
        "quantkit.profile",
        "quantkit.heartbeat",
        "quantkit.background",
        "quantkit.heap",
        "quantkit.summation",
        "quantkit.ranks",
        "quantkit.joining",
        "quantkit.hub",
        "quantkit.hub_calls",
        "quantkit.hub_files",
        "quantkit.hub_shards",
        "quantkit.hub_commit",
        "quantkit.hub_ahead",
        "quantkit.strict_yaml",
    ),
    (
        "quantkit.algorithms",
        "quantkit.transforms",
        "quantkit.skeleton",
        "quantkit.experts",
        "quantkit.apart",
        "quantkit.blocks",
        "quantkit.channels",
        "quantkit.links",
        "quantkit.kv_cache",
        "quantkit.observation",
        "quantkit.calibration",
        "quantkit.packed",
        "quantkit.lint",
    ),
    ("quantkit.recipe",),
    (
        "quantkit.linears",
        "quantkit.plan",
        "quantkit.pinning",
        "quantkit.hardware",
        "quantkit.room",
        "quantkit.passes",
        "quantkit.estimate",
        "quantkit.rehearsal",
        "quantkit.output",
        "quantkit.summary",
        "quantkit.hidden",
        "quantkit.resuming",
        "quantkit.integrity",
        "quantkit.folding",
        "quantkit.solve",
        "quantkit.shares",
        "quantkit.tuning",
        "quantkit.calibration_rows",
        "quantkit.writing",
        "quantkit.pipeline",
        "quantkit.streaming",
        "quantkit.fitting",
        "quantkit.inventory",
        "quantkit.allocation",
        "quantkit.repair",
        "quantkit.convert",
        "quantkit.stacking",
        "quantkit.loading",
        "quantkit.runtime",
        "quantkit.inspection",
    ),
    ("quantkit_eval",),
    (
        "quantkit.validation",
        "quantkit.running",
        "quantkit.comparison",
        "quantkit.results",
        "quantkit.tokenization",
        "quantkit.advice",
        "quantkit.plots",
        "quantkit.html_report",
        "quantkit.api",
        "quantkit.report",
        "quantkit.doctor",
        "quantkit.card",
        "quantkit.card_parts",
        "quantkit.hub_push",
        "quantkit.job",
        "quantkit.reproducing",
    ),
    (
        "quantkit.cli",
        "quantkit.cli_running",
        "quantkit.cli_validation",
        "quantkit.cli_hub",
        "quantkit.cli_options",
        "quantkit.__main__",
        "quantkit",
    ),
)
# What the kernels may import besides the standard library: they are of use without the rest.
KERNEL_IMPORTS = {"quantkit_kernels", "torch", "triton"}

# Folder of each import package. Those beside them (kernels/bench.py, eval/peers) are scripts.
PACKAGES = {
    "quantkit": ROOT / "quantkit",
    "quantkit_kernels": ROOT / "kernels" / "quantkit_kernels",
    "quantkit_eval": ROOT / "eval" / "quantkit_eval",
}
TOP_FOLDERS = {"quantkit", "recipes", "kernels", "eval", "tests", ".ci"}
HEAVY = ("torch", "transformers", "triton", "numpy", "accelerate", "safetensors", "huggingface_hub", "pydantic")

MACHINE_PATH = re.compile(r"(?<![\w.~:/-])/(?:work|root|home|tmp|Users)/\w+")
NOTE_TO_SELF = re.compile(
    r"\b(?:T[O]DO|FIX[M]E|X[X]X)\b|\b(?:the|our) (?:brief|lead|issue) (?:says?|asks?|wants?)\b", re.I
)
DOCUMENT = re.compile(r"(?<![\w/.-])(?:[\w-]+/)*([\w-]+\.md)\b")


def files() -> list[Path]:
    """The project's files, relative to its root: what git has or would add; without git, what is not hidden."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists():
        output = subprocess.run(listed, capture_output=True, check=True).stdout
        names = [Path(os.fsdecode(name)) for name in output.split(b"\0") if name]
    else:
        skipped = {"build", "dist", "out", "__pycache__"}
        paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        names = [
            path
            for path in paths
            if not any((p.startswith(".") and p != ".ci") or p in skipped for p in path.parts[:-1])
            and ".egg-info" not in str(path)
        ]
    return sorted(name for name in names if (ROOT / name).is_file())


def texts() -> Iterator[tuple[Path, str]]:
    """Text that people write: not the embedded model and its texts, but their README files."""
    for name in files():
        data = (ROOT / name).read_bytes()
        if b"\0" in data or ({"assets", "tasks"} & {*name.parts} and name.name != "README.md"):
            continue
        yield name, data.decode()


def modules() -> dict[str, Path]:
    """Every module of the three packages, dotted name -> file."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def layer(module: str) -> int | None:
    """Row of the table that a module is in, by its first two names; None when it has no place."""
    top = ".".join(module.split(".")[:2]) if module.startswith("quantkit.") else module.split(".")[0]
    rows = [row for row, names in enumerate(LAYERS) if any(fnmatch.fnmatchcase(top, name) for name in names)]
    return rows[0] if rows else None


def imports(module: str, source: str, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import, also those inside functions and under TYPE_CHECKING.

    `from quantkit import numerics` imports quantkit.numerics; `from quantkit import __version__` imports nothing.
    """
    is_package = any(name.startswith(module + ".") for name in known)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*up, base] if base else up)
            for alias in node.names:
                if f"{base}.{alias.name}" in known:
                    yield node.lineno, f"{base}.{alias.name}"
                elif (base, alias.name) != ("quantkit", "__version__"):
                    yield node.lineno, base


def forbidden(module: str, source: str, known: set[str]) -> list[str]:
    """ "line 7: imports quantkit.api, ..." for each import that goes up the table."""
    own = layer(module)
    if own is None:
        return [f"line 1: {module} has no place in LAYERS of tests/test_layout.py"]
    wrong = []
    for line, target in imports(module, source, known):
        top = target.split(".")[0]
        if own == 0 and top not in KERNEL_IMPORTS and top not in sys.stdlib_module_names:
            wrong.append(f"line {line}: imports {target}; kernels import only {', '.join(sorted(KERNEL_IMPORTS))}")
        elif top in PACKAGES:
            other = layer(target)
            if other is None or other > own:
                wrong.append(
                    f"line {line}: imports {target}, which is above {module} in LAYERS of tests/test_layout.py"
                )
    return list(dict.fromkeys(wrong))  # one line may import several names of one module


def test_imports_go_one_way() -> None:
    found = modules()
    assert {"quantkit.types", "quantkit.pipeline", "quantkit_eval", "quantkit_kernels"} <= found.keys()
    wrong = [
        f"{path.relative_to(ROOT)} {problem}"
        for module, path in found.items()
        for problem in forbidden(module, path.read_text(), set(found))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("quantkit.types", "import quantkit.api", "line 1: imports quantkit.api"),
        ("quantkit.pipeline", "def f():\n    from quantkit import cli", "line 2: imports quantkit.cli"),
        ("quantkit.pipeline", "from quantkit import quantize", "line 1: imports quantkit,"),
        ("quantkit.pipeline", "from . import api", "line 1: imports quantkit.api"),
        ("quantkit.runtime.linear", "from ..api import load", "line 1: imports quantkit.api"),
        ("quantkit.runtime", "from .linear import x\nfrom ..cli import main", "line 2: imports quantkit.cli"),
        ("quantkit_kernels.wxa16", "import numpy", "line 1: imports numpy; kernels import only"),
        ("quantkit_kernels.wxa16", "from quantkit import types", "line 1: imports quantkit.types; kernels"),
        ("quantkit.novel", "", "has no place in LAYERS"),
        ("quantkit.cli", "import torch\nfrom quantkit import __version__, api", None),
        ("quantkit_eval.compare", "from quantkit.runtime import linear", None),
        ("quantkit_kernels.wxa16", "import math, torch, triton.language\nfrom . import bits", None),
    ],
)
def test_the_rule_itself(module: str, source: str, problem: str | None) -> None:
    known = {"quantkit", "quantkit.api", "quantkit.cli", "quantkit.types", "quantkit.pipeline", "quantkit.runtime"}
    known |= {"quantkit.runtime.linear", "quantkit_kernels", "quantkit_kernels.bits", "quantkit_eval"}
    wrong = forbidden(module, source, known)
    if problem is None:
        assert wrong == []
    else:
        assert len(wrong) == 1 and problem in wrong[0]


def test_no_top_level_package_shadows_a_dependency() -> None:
    """`import kernels` is Hugging Face's package, which transformers uses; ours must never answer in its place."""
    for folder in ("kernels", "eval", "recipes", "tests"):
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py would make {folder} importable"
    assert not (ROOT / "tests" / "kernels").exists(), "tests/kernels would shadow the package kernels under pytest"


def test_import_is_light() -> None:
    code = f"import sys, quantkit; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_wheel_holds_every_package_and_data_file() -> None:
    """An editable install finds what a wheel leaves out, so the settings are compared with the folders."""
    settings = read_configuration(ROOT / "pyproject.toml")["tool"]["setuptools"]
    folders = {path.parent for path in modules().values()}
    for folder in folders:
        assert (folder / "__init__.py").exists(), f"{folder.relative_to(ROOT)} has modules, but no __init__.py"
    found = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert set(settings["packages"]) == found | {"quantkit.recipes"}

    places = PACKAGES | {"quantkit.recipes": ROOT / "recipes"}
    shipped = {
        path
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in places[package].glob(pattern)
        if path.is_file()
    }
    data = {
        ROOT / name
        for name in files()
        if name.suffix != ".py" and any(p in (ROOT / name).parents for p in places.values())
    }
    assert data - shipped == set()
    assert {ROOT / "quantkit" / "py.typed", ROOT / "recipes" / "quickstart.yaml"} <= shipped


def test_only_the_known_folders() -> None:
    folders = {name.parts[0] for name in files() if len(name.parts) > 1}
    assert folders <= TOP_FOLDERS, (
        f"new top-level folder: {sorted(folders - TOP_FOLDERS)}; list what is generated in .gitignore"
    )


def test_text_files_end_with_one_newline() -> None:
    wrong = [str(name) for name, text in texts() if text and (not text.endswith("\n") or text.endswith("\n\n"))]
    assert wrong == []


def test_no_file_names_one_machine_or_unfinished_work() -> None:
    wrong = [
        f"{name}:{number}: {found.group()}"
        for name, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        for found in [MACHINE_PATH.search(line) or NOTE_TO_SELF.search(line)]
        if found
    ]
    assert not wrong, "\n".join(wrong)


def test_documents_that_are_named_exist() -> None:
    """In Markdown, where a name is a promise; in code it may be what a command writes."""
    names = {name.name for name in files()}
    wrong = [
        f"{name}:{number}: {found.group()}"
        for name, text in texts()
        if name.suffix == ".md"
        for number, line in enumerate(text.splitlines(), 1)
        for found in DOCUMENT.finditer(line)
        if found.group(1) not in names
    ]
    assert not wrong, "\n".join(wrong)
