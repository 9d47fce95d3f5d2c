"""Accuracy of quantkit beside a peer, llm-compressor: same model, same calibration rows, same windows, one table.

    python eval/accuracy.py --log build/accuracy.jsonl --table table.md --orders 3 [--peer-python peer/bin/python]
                            [--cases 'w4a16-*,w3a16-gptq'] [--moe ../shared/models/docs-moe-27m] [--jobs 2]

The cases are those of eval/accuracy_cases.py (`--list` names them). Each output is loaded from disk in float32 and
compared with the original; a mixture of experts as the weights that are decoded from it. The peer runs where the Python
of its environment is given; eval/peers/llmcompressor_run.py says how to make one.

Every run goes to the log, a line of JSON, as soon as it is done, and is not done again: a killed script loses nothing,
and a second one adds what is missing. A case that fails is told, and the others go on. `--table` renders what the log
holds.

Order 0 of the calibration documents is the file's; order k is shuffled by random.Random(k), so it calibrates on other
rows too. What uses no data runs once. Differences are paired: of the same windows, standard error over windows.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import hashlib
import json
import math
import multiprocessing
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoTokenizer

import outliers
from accuracy_cases import CASES, MOE, OURS, OUTLIERS, PEER, PYDOCS, Case, Job, Setting
from accuracy_table import report
from quantkit import api, hub
from quantkit.convert import dense_copy
from quantkit_eval.compare import compare
from quantkit_eval.windows import heldout_windows

PEER_SCRIPT = Path(__file__).parent / "peers" / "llmcompressor_run.py"
TEXTS = hub.ASSETS / "text"


# One run --------------------------------------------------------------------------------------------------------------


def documents(file: Path) -> list[str]:
    """The texts of a .jsonl file with the key `text`."""
    return [json.loads(line)["text"] for line in file.read_text("utf-8").split("\n") if line.strip()]


def ordered(texts: Sequence[str], order: int) -> list[str]:
    """The documents in order 0, the file's, or shuffled by random.Random(order)."""
    found = list(texts)
    if order:
        random.Random(order).shuffle(found)
    return found


def digests(texts: Sequence[str], tokenizer: Any, samples: int, length: int) -> tuple[str, str]:
    """SHA-256 of the calibration tokens, as the peer reports it, and with their mask, as quantkit does."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= samples * length:
            break
    tokens = torch.tensor(ids[: samples * length], dtype=torch.int64).numpy().tobytes()
    return hashlib.sha256(tokens).hexdigest(), hashlib.sha256(tokens + b"\1" * samples * length).hexdigest()


class Remembered(torch.nn.Module):
    """A model that keeps its logits of each batch: the original answers the same windows again for every run."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.known: dict[bytes, Any] = {}

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        key = input_ids.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.model(input_ids=input_ids, use_cache=use_cache)
        return self.known[key]


@functools.lru_cache(maxsize=1)
def reference(folder: Path, heldout: Path, length: int, count: int) -> tuple[Remembered, torch.Tensor]:
    """The original in float32, and the windows; kept from run to run."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = heldout_windows(documents(heldout), tokenizer, length=length, count=count)
    return Remembered(api.load(folder, dtype=torch.float32)), windows


def run(job: Job, order: int, setting: Setting) -> dict[str, Any]:
    """Quantizes, reloads from disk, compares. Returns a line of the log; raises RuntimeError or QuantkitError."""
    torch.set_num_threads(setting.threads)
    start, folder = time.monotonic(), setting.folders[job.model]
    with tempfile.TemporaryDirectory() as scratch:
        data, out = Path(scratch) / "order.jsonl", Path(scratch) / "out"
        texts = ordered(documents(setting.calibration), order)
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
        found = (
            _quantkit(job, folder, data, out, setting) if job.tool == OURS else _peer(job, folder, data, out, setting)
        )
        wanted = digests(texts, AutoTokenizer.from_pretrained(folder), setting.samples, setting.length)
        if found["tokens"] not in (None, *wanted):
            raise RuntimeError(
                f"calibrated on other tokens (SHA-256 {found['tokens'][:12]}) than the comparison is about"
            )
        seconds = time.monotonic() - start
        original, windows = reference(folder, setting.heldout, setting.length, setting.windows)
        figures = compare(original, api.load(_dense(job, out), dtype=torch.float32), windows).to_dict(by_window=True)
    return {
        "key": setting.key(job, order),
        "label": job.label,
        "hardware": hardware(setting.device),
        **found,
        "seconds": round(seconds, 1),
        "figures": figures,
    }


def hardware(device: str) -> str:
    """The name of what quantizes: the GPU's, or the processor's as Linux gives it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def _dense(job: Job, out: Path) -> Path:
    """What is loaded: the output, or the weights decoded from it where transformers does not read it packed."""
    if job.model != MOE or job.tool != OURS:
        return out
    copy = out.with_name("dense")
    copy.mkdir()
    dense_copy(out, copy)
    return copy


def _quantkit(job: Job, folder: Path, data: Path, out: Path, setting: Setting) -> dict[str, Any]:
    rows = {"data": str(data), "samples": setting.samples, "length": setting.length}
    recipe = {
        "model": str(folder),
        **job.settings,
        "calibration": {**job.settings.get("calibration", {}), **rows},
        "validate": "none",
        "export": {"engines": ["transformers"]},
    }
    summary = api.quantize(recipe, out=out, device=setting.device).summary
    return {
        "versions": api.versions(),
        "tokens": (summary["data"] or {}).get("sha256"),
        "bits": mean_bits(summary["layers"], folder),
    }


def mean_bits(layers: Sequence[dict[str, Any]], folder: Path) -> float:
    """Bits a weight over all quantized layers, each counted by its weights."""
    with safe_open(folder / outliers.WEIGHTS, "pt") as file:
        sizes = [math.prod(file.get_slice(f"{layer['name']}.weight").get_shape()) for layer in layers]
    bits = sum(size * layer["bits_per_weight"] for size, layer in zip(sizes, layers, strict=True))
    return round(bits / sum(sizes), 4)


def _peer(job: Job, folder: Path, data: Path, out: Path, setting: Setting) -> dict[str, Any]:
    options = {**job.settings, "model": folder, "data": data, "out": out}
    options |= {"samples": setting.samples, "length": setting.length}
    command = [str(setting.peer_python), str(PEER_SCRIPT), *(f"--{key}={value}" for key, value in options.items())]
    if job.model == MOE:
        command.append("--dense")
    seen = ["CUDA_VISIBLE_DEVICES="] if setting.device == "cpu" else []
    environment = ["env", f"OMP_NUM_THREADS={setting.threads}", *seen]
    done = subprocess.run([*environment, *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the peer failed with exit code {done.returncode}:\n{done.stderr[-1500:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "bits": None}


# The log --------------------------------------------------------------------------------------------------------------


def read_log(file: Path) -> dict[str, dict[str, Any]]:
    """Run's name -> its line. A last line that was cut off when the script was killed does not count."""
    found = {}
    for line in file.read_text("utf-8").split("\n") if file.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["key"]] = record
    return found


def append(file: Path, record: dict[str, Any]) -> None:
    """One line more, on the disk when this returns; after a line that was cut off it begins a new one."""
    with file.open("a+b") as stream:
        cut = stream.tell() and (stream.seek(-1, 2), stream.read(1))[1] != b"\n"
        stream.write((b"\n" if cut else b"") + json.dumps(record).encode() + b"\n")


def planned(
    cases: Iterable[Case], orders: int, tools: Sequence[str], how: Sequence[str] = ("*",)
) -> list[tuple[Job, int]]:
    """Every run of the cases, each once, all of order 0 first; what uses no data is in order 0 alone.

    how  patterns of which a job's label matches one
    """
    jobs = [job for case in cases for job in (case.ours, *case.peers) if job.tool in tools]
    jobs = [job for job in jobs if any(fnmatch.fnmatchcase(job.label, pattern) for pattern in how)]
    runs = [(job, order) for order in range(orders) for job in jobs if job.uses_data or not order]
    return list({repr(pair): pair for pair in runs}.values())


def work(runs: Sequence[tuple[Job, int]], setting: Setting, log: Path, jobs: int) -> list[str]:
    """Runs what the log does not hold yet, `jobs` at a time. Returns a line a failure."""
    done, failed = read_log(log), []
    left = [pair for pair in runs if setting.key(*pair) not in done]
    print(f"{len(runs)} runs, {len(runs) - len(left)} in the log already", file=sys.stderr, flush=True)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, job, order, setting): (job, order) for job, order in left}
        for future in as_completed(futures):
            job, order = futures[future]
            name = f"{job.model}, {job.tool}, {job.label}, order {order}"
            try:
                record = future.result()
            except Exception as e:  # one case that cannot be done must not lose the others
                failed.append(f"{name}: {type(e).__name__}: {e}")
                print(f"failed: {failed[-1]}", file=sys.stderr, flush=True)
                continue
            append(log, record)
            figures = record["figures"]
            said = f"perplexity {figures['perplexity']:.4f} KL {figures['kl']:.5f} in {record['seconds']:.0f} s"
            print(f"{name}: {said}", file=sys.stderr, flush=True)
    return failed


# The command ----------------------------------------------------------------------------------------------------------


def selected(patterns: str) -> list[Case]:
    """The cases whose name matches one of the comma-separated patterns. Exits when a pattern matches none."""
    wanted = patterns.split(",")
    for pattern in wanted:
        if not any(fnmatch.fnmatchcase(case.name, pattern) for case in CASES):
            raise SystemExit(f"no case is called {pattern!r}; --list names them")
    return [case for case in CASES if any(fnmatch.fnmatchcase(case.name, p) for p in wanted)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, help="lines of JSON, one a run; what it holds is not run again")
    parser.add_argument("--table", type=Path, help="where the Markdown goes")
    parser.add_argument("--cases", default="*", help="names or patterns, separated by commas")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    parser.add_argument("--tools", nargs="+", choices=(OURS, PEER), default=[OURS, PEER])
    parser.add_argument("--how", nargs="+", default=["*"], help="run only what --list calls so: patterns")
    parser.add_argument("--no-run", action="store_true", help="only render the table")
    parser.add_argument("--orders", type=int, default=1, help="orders of the calibration documents")
    parser.add_argument("--moe", type=Path, help="folder of docs-moe-27m; without it its cases are left out")
    parser.add_argument("--peer-python", help="Python of an environment with llm-compressor; without it quantkit alone")
    parser.add_argument("--calibration", type=Path, default=TEXTS / "pydocs-calibration.jsonl")
    parser.add_argument("--heldout", type=Path, default=TEXTS / "pydocs-heldout.jsonl", help="text of the windows")
    parser.add_argument("--samples", type=int, default=128, help="calibration rows")
    parser.add_argument("--length", type=int, default=512, help="tokens a row, and a window")
    parser.add_argument("--windows", type=int, default=120)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where both tools quantize")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    cases = selected(args.cases)
    if args.list:
        for case in cases:
            print(f"{case.name}: {case.ours.label} | {' | '.join(job.label for job in case.peers)}")
        return
    if args.log is None:
        raise SystemExit("--log is needed: the file that runs are written to, or read from")
    cases = [case for case in cases if case.ours.model != MOE or args.moe is not None or args.no_run]
    fixed = (args.calibration, args.heldout, args.samples, args.length, args.windows)
    setting = Setting(*fixed, {}, args.peer_python, args.threads, args.device)
    failed: list[str] = []
    if not args.no_run:
        tools = [tool for tool in args.tools if tool == OURS or args.peer_python]
        args.log.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            clean, changed = hub.resolve(f"builtin:{PYDOCS}").folder, Path(scratch) / "outliers"
            outliers.write_copy(clean, changed)
            setting = replace(setting, folders={PYDOCS: clean, OUTLIERS: changed, MOE: args.moe})
            failed = work(planned(cases, args.orders, tools, args.how), setting, args.log, args.jobs)
    text = report(cases, read_log(args.log), setting, args.orders)
    print(text)
    if args.table:
        args.table.write_text(text, "utf-8")
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} runs failed:", *failed]))


if __name__ == "__main__":
    main()
