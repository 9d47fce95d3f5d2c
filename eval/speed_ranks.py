"""How much faster several GPUs quantize than one: decoder layers of Llama-3-8B's dimensions, by GPTQ.

    python eval/speed_ranks.py --ranks 1 2 [--layers 6] [--out ranks.json]

Starts itself under torchrun, on the same random weights and the same calibration rows (128 of 2048 tokens, real text):
once for each number of ranks without a journal, which measures the arithmetic and what the ranks send each other, and
once with it, as `quantkit quantize` runs, where the disk takes each block's hidden states. A layer's time is that
between the beginnings of two blocks on rank 0: the median over layers but the first, which compiles, and the last. All
runs must write the same bytes: no speed-up is printed otherwise. `--device cpu` tries it out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from quantkit import api, pipeline
from quantkit import plan as planning
from quantkit.joining import joined
from quantkit.profile import Profile
from quantkit.progress import Silent
from quantkit.recipe import Recipe
from speed_gptq import GPTQ, TEXT, Clock, Shape, build, layer_seconds, wait


def work(args: argparse.Namespace) -> None:
    """What each rank does. Rank 0 writes the times."""
    recipe = {
        "model": str(args.work / "model"),
        **GPTQ,
        "calibration": {"data": str(TEXT), "samples": args.rows, "length": args.length, "batch_size": args.batch_size},
        "validate": "none",
        "export": {"engines": ["transformers"]},
    }
    clock = Clock()
    with joined(args.device) as ranks:
        progress = clock if ranks.first else Silent()
        out = args.work / name(ranks.size, args.journal)
        if args.journal == "on":
            api.quantize(recipe, out=out, device=args.device, profile=args.profile, progress=progress, ranks=ranks)
        else:
            place = api.pick_device(args.device)
            if ranks.first:
                out.mkdir()
            timed = Profile(place, exact=args.profile)
            plan = planning.make(Recipe.from_any(recipe))
            pipeline.quantize(plan, out, device=place, progress=progress, profile=timed, ranks=ranks)
            clock.said += timed.lines() if args.profile else []
        wait()
        peaks = ranks.everyone(torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None)
        if ranks.first:
            line = {"ranks": ranks.size, "journal": args.journal, **layer_seconds(clock.times)}
            (args.work / f"{out.name}.json").write_text(json.dumps({**line, "gpu_gib": peaks, "said": clock.said}))


def name(count: int, journal: str) -> str:
    return f"out-{count}-{journal}"


def start(count: int, journal: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs `work` in so many processes; what rank 0 measured. Raises RuntimeError with what they said."""
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": path}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), __file__]
    options = {"rows": args.rows, "length": args.length, "batch-size": args.batch_size, "device": args.device}
    command += ["--work", str(args.work), "--journal", journal, *(f"--{key}={value}" for key, value in options.items())]
    command += ["--profile"] * args.profile
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=args.limit)
    if done.returncode:
        raise RuntimeError(f"{count} ranks: exit code {done.returncode}: {done.stderr[-3000:]}")
    out = args.work / name(count, journal)
    line: dict[str, Any] = json.loads((args.work / f"{out.name}.json").read_text("utf-8"))
    digest = hashlib.sha256()
    for file in sorted(out.glob("*.safetensors")):
        digest.update(file.read_bytes())
    shutil.rmtree(out)
    return {**line, "sha256": digest.hexdigest()}


def report(lines: list[dict[str, Any]]) -> str:
    """The results for a reader."""
    said = []
    for line in lines:
        memory = (
            "" if line["gpu_gib"][0] is None else f", GPU peak {', '.join(f'{x:.2f}' for x in line['gpu_gib'])} GiB"
        )
        said.append(
            f"{line['ranks']} ranks, journal {line['journal']}: {line['layer']:.3f} s a layer {line['layers']}{memory}"
        )
        said += [f"  {x}" for x in line["said"] if line.get("profile") and "%" in x]
    for line in lines:
        first = next(x for x in lines if x["journal"] == line["journal"])
        what = f"{line['ranks']} ranks, journal {line['journal']}"
        if line["sha256"] != lines[0]["sha256"]:
            said.append(f"{what}: other bytes than {lines[0]['ranks']} ranks wrote, so no speed-up is given")
        elif line is not first:
            said.append(f"{what}: the same bytes, {first['layer'] / line['layer']:.2f} times as fast")
    return "\n".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--journal", choices=("off", "on", "both"), default="both")
    parser.add_argument("--profile", action="store_true", help="where the time of rank 0 goes; costs a little")
    parser.add_argument("--limit", type=float, default=300, help="seconds a run may take")
    parser.add_argument("--out", type=Path, help="results, a JSON list")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "RANK" in os.environ:
        work(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.work = Path(folder)
        build(
            Shape(args.hidden, args.intermediate, args.layers, head_dim=args.head_dim), args.work / "model", args.device
        )
        if args.device == "cuda":
            torch.cuda.empty_cache()
        journals = ("off", "on") if args.journal == "both" else (args.journal,)
        lines = [{**start(count, x, args), "profile": args.profile} for x in journals for count in args.ranks]
    print(report(lines), flush=True)
    if args.out:
        args.out.write_text(json.dumps(lines, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
