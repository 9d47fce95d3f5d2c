"""Accuracy of quantkit beside a peer, llm-compressor: same model, same calibration rows, same windows, one table.

    python eval/accuracy.py --orders 3 --out table.md [--peer-python peer/bin/python]

For each scheme, method and order of the calibration documents the model is quantized by quantkit and, where the Python
of a peer's environment is given (eval/peers/llmcompressor_run.py says how to make one), by the peer: with its default
scales and with its scale search. Each output is loaded from disk by `quantkit.load` in float32 and compared with the
original.

Order 0 is the file's; order k is shuffled by random.Random(k), so it calibrates on other rows too. Round-to-nearest
uses no data and runs once. Differences are paired: of the same windows, their standard error over windows.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from quantkit import api, hub
from quantkit.calibration import load_texts
from quantkit_eval.compare import Comparison, compare
from quantkit_eval.windows import heldout_windows

PEER_SCRIPT = Path(__file__).parent / "peers" / "llmcompressor_run.py"
OURS = "quantkit"
PEER_OBSERVERS = {"llm-compressor": "memoryless_minmax", "llm-compressor, scale search": "memoryless_mse"}


@dataclass(frozen=True)
class Case:
    """What is asked of every tool."""

    scheme: str
    method: str
    order: int


class Bench:
    """The fixed parts of a comparison, and a folder for the outputs."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.folder = folder
        self.model = hub.resolve(args.model).folder
        self.original = api.load(self.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        self.windows = heldout_windows(load_texts(args.heldout), tokenizer, length=args.length, count=args.windows)
        self.peer_versions: dict[str, str] = {}

    def data(self, order: int) -> Path:
        """The calibration documents in an order, as a file that both tools read."""
        file = self.folder / f"order-{order}.jsonl"
        texts = load_texts(self.args.calibration)
        if order:
            random.Random(order).shuffle(texts)
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return file

    def run(self, tool: str, case: Case) -> Comparison:
        """Quantizes, reloads from disk, compares."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            out = Path(scratch) / "out"
            if tool == OURS:
                self._quantkit(case, out)
            else:
                self._peer(PEER_OBSERVERS[tool], case, out)
            found = compare(self.original, api.load(out, dtype=torch.float32), self.windows)
        print(f"{case} {tool}: perplexity {found.perplexity:.4f} KL {found.kl:.5f}", file=sys.stderr, flush=True)
        return found

    def _quantkit(self, case: Case, out: Path) -> None:
        calibration = {"data": str(self.data(case.order)), "samples": self.args.samples, "length": self.args.length}
        recipe = {
            "model": str(self.model),
            "scheme": case.scheme,
            "method": case.method,
            "calibration": calibration,
            "validate": "none",
            "export": {"engines": ["transformers"]},
        }
        api.quantize(recipe, out=out, device="cpu")

    def _peer(self, observer: str, case: Case, out: Path) -> None:
        options = {
            "model": self.model,
            "data": self.data(case.order),
            "method": case.method,
            "scheme": case.scheme,
            "observer": observer,
            "samples": self.args.samples,
            "length": self.args.length,
            "out": out,
        }
        command = [self.args.peer_python, str(PEER_SCRIPT), *(f"--{key}={value}" for key, value in options.items())]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the peer failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
        self.peer_versions = json.loads(done.stdout.splitlines()[-1])


def mean_by_window(runs: Sequence[Comparison]) -> list[float]:
    """KL of each window, the mean over the orders."""
    return [statistics.fmean(window) for window in zip(*(run.kl_by_window for run in runs), strict=True)]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error over windows."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def difference(ours: Sequence[Comparison], peer: Sequence[Comparison]) -> str:
    """Paired difference of KL, ours minus the peer's, window by window: "-0.00812 ± 0.00031 (-13.5 %)"."""
    pairs = zip(mean_by_window(ours), mean_by_window(peer), strict=True)
    mean, error = mean_and_error([a - b for a, b in pairs])
    return f"{mean:+.5f} ± {error:.5f} ({mean / statistics.fmean(run.kl for run in peer):+.1%})"


def row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(results: dict[tuple[str, Case], Comparison], tools: Sequence[str]) -> list[str]:
    """One row a scheme, method and tool, the mean over orders; `tools` begins with quantkit."""
    head = ["scheme", "method", "tool", "orders", "perplexity", "KL ± s.e.", "top-1", "quantkit's KL minus this one's"]
    lines = [row(head), row(["---"] * len(head))]
    for scheme, method in dict.fromkeys((case.scheme, case.method) for _, case in results):
        runs = {
            tool: [c for (t, case), c in results.items() if (t, case.scheme, case.method) == (tool, scheme, method)]
            for tool in tools
        }
        for tool, mine in runs.items():
            kl, error = mean_and_error(mean_by_window(mine))
            cells = [scheme, method, tool, len(mine), f"{statistics.fmean(c.perplexity for c in mine):.4f}"]
            cells += [f"{kl:.5f} ± {error:.5f}", f"{statistics.fmean(c.top1_agreement for c in mine):.4f}"]
            lines.append(row([*cells, "" if tool == OURS else difference(runs[OURS], mine)]))
    return lines


def orders_table(results: dict[tuple[str, Case], Comparison], tools: Sequence[str]) -> list[str]:
    """Perplexity and KL of every single run that used calibration data."""
    head = ["scheme", "method", "order", *(f"{tool}: perplexity, KL" for tool in tools)]
    lines = [row(head), row(["---"] * len(head))]
    for case in dict.fromkeys(case for _, case in results if case.method != "rtn"):
        found = [results[tool, case] for tool in tools]
        lines.append(row([case.scheme, case.method, case.order, *(f"{c.perplexity:.4f}, {c.kl:.5f}" for c in found)]))
    return lines


def processor() -> str:
    """The processor's name, as Linux gives it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def report(bench: Bench, results: dict[tuple[str, Case], Comparison], tools: Sequence[str]) -> str:
    """The tables with what they were measured on."""
    args, shape = bench.args, bench.windows.shape
    original = next(iter(results.values())).perplexity_original
    ours = ", ".join(f"{name} {version}" for name, version in api.versions().items())
    lines = [
        f"{args.model}, perplexity {original:.4f} unquantized; {shape[0]} windows of {shape[1]} tokens of "
        f"{args.heldout}; calibration {args.samples} rows of {args.length} tokens of {args.calibration}; group 128. "
        "KL in nats a token; standard errors over windows; differences are paired by window.",
        "",
        *table(results, tools),
    ]
    if any(case.method != "rtn" for _, case in results):
        lines += ["", "Each order of the calibration documents:", "", *orders_table(results, tools)]
    lines += ["", f"quantkit's environment: {ours}."]
    if bench.peer_versions:
        lines.append(f"The peer's: {', '.join(f'{name} {version}' for name, version in bench.peer_versions.items())}.")
    lines.append(f"Hardware: {processor()}, {torch.get_num_threads()} threads, no GPU.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:pydocs-llama-7m", help="as in a recipe")
    parser.add_argument("--calibration", default="builtin:pydocs", help="as in a recipe")
    parser.add_argument("--heldout", default="builtin:pydocs-heldout", help="text of the windows")
    parser.add_argument("--schemes", nargs="+", default=["W4A16", "W4A16_ASYM", "W3A16"])
    parser.add_argument("--methods", nargs="+", choices=("rtn", "gptq"), default=["rtn", "gptq"])
    parser.add_argument("--orders", type=int, default=3, help="orders of the calibration documents")
    parser.add_argument("--samples", type=int, default=128, help="calibration rows")
    parser.add_argument("--length", type=int, default=512, help="tokens a row, and a window")
    parser.add_argument("--windows", type=int, default=120)
    parser.add_argument("--peer-python", help="Python of an environment with llm-compressor")
    parser.add_argument("--out", type=Path, help="where the table goes as well")
    args = parser.parse_args()

    tools = [OURS, *(PEER_OBSERVERS if args.peer_python else ())]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        results = {
            (tool, case): bench.run(tool, case)
            for scheme in args.schemes
            for method in args.methods
            for case in (Case(scheme, method, order) for order in range(args.orders if method != "rtn" else 1))
            for tool in tools
        }
        text = report(bench, results, tools)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
