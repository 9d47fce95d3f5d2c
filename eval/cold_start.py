"""From a folder to the first token: as many bytes packed and in bf16, each in a fresh process, files in memory already.

    python eval/cold_start.py --out cold.json [--layers 32] [--dense-layers 8] [--runs 3] [--work FOLDER]

Random weights of Llama-3-8B's widths: 32 layers of W4A16, and 8 of bf16, have about as many bytes. A line of JSON for
each: seconds of `from_pretrained`, of the first token of 128 (in the first process kernels are compiled, in later ones
they are found on disk), and of a package: `quantkit compile`, and loading what it made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import speed_generate
from quantkit import api, presets
from quantkit.runtime import timing
from quantkit.runtime.generate import generate


def write_dense(folder: Path, args: argparse.Namespace) -> None:
    """A bf16 checkpoint, as transformers writes it."""
    config = speed_generate.config_of(speed_generate.arguments(["--layers", str(args.dense_layers)]))
    timing.random_dense(config, torch.device(args.device)).save_pretrained(folder)


def write_packed(folder: Path, args: argparse.Namespace) -> None:
    config = speed_generate.config_of(speed_generate.arguments(["--layers", str(args.layers)]))
    speed_generate.write(folder, config, presets.PRESETS["W4A16"], args.device)


def one(folder: Path, device: str, package: Path | None) -> dict[str, Any]:
    """In a process of its own: what each step takes, in seconds."""
    where = torch.device(device)
    for file in folder.glob("*.safetensors"):
        file.read_bytes()  # into the cache of files
    torch.zeros(1, device=where)
    start = time.perf_counter()
    model = api.load(folder, dtype=torch.bfloat16, device_map=where).eval()
    timing.wait(where)
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - start}
    ids = timing.prompt_ids(model, 1, 128)
    with torch.no_grad(), timing.endless(model):
        start = time.perf_counter()
        generate(model, ids, 1)
        timing.wait(where)
        found["first_token_seconds"] = time.perf_counter() - start
        if package is not None:
            from quantkit.runtime import compiled

            made = compiled.compile_step(model, package, batch=1, slots=512)
            found |= {"compile_seconds": made.compile_seconds, "package_seconds": made.load_seconds}
            start = time.perf_counter()
            generate(model, ids, 64, compile=package)
            timing.wait(where)
            found["package_64_tokens_seconds"] = time.perf_counter() - start
    return found


def several(folder: Path, args: argparse.Namespace, package: Path | None = None) -> dict[str, Any]:
    """Each run in a process of its own; the first, which compiles kernels, apart from the median of the others."""
    runs = []
    for _ in range(args.runs):
        command = [sys.executable, __file__, "--one", str(folder), "--device", args.device]
        command += [] if package is None else ["--package", str(package)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{folder}: {done.stderr.strip()[-2000:]}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    later = runs[1:] or runs
    medians = {key: statistics.median(run[key] for run in later) for key in runs[0]}
    return {"bytes": size, "first": runs[0], "later": medians, "GB/s": size / medians["load_seconds"] / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cold.json"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dense-layers", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, help="folder for the models; a temporary one by default")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--package", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(one(args.one, args.device, args.package)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        for name, make in (("bf16", write_dense), ("w4a16", write_packed)):
            if not (work / name).exists():
                make(work / name, args)
            package = work / "step" if name == "w4a16" else None
            line = {"name": name, **several(work / name, args, package), "versions": api.versions()}
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
