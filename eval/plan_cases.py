"""What `quantkit plan` says beside what then happens: size, memory and time of six runs, each in a process of its own.

    python eval/plan_cases.py --out build/plan-cases                  # on an idle machine: times are compared
    python eval/plan_cases.py --out build/plan-cases --device cuda
    python eval/plan_cases.py --out build/plan-cases --moe DIR        # a mixture of experts as one of them
    python eval/plan_cases.py --out build/plan-cases --cpu-time       # where others compute too: one thread's CPU time

Sizes are to agree exactly, memory within 15 %, time within 30 %.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import memory
import random_model

EMBEDDED = "builtin:pydocs-llama-7m"
FAST = {"rtn": {"scale_search": "absmax"}}
# name, the model (or layers, hidden, inner of a random one), what the recipe says
CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("embedded, W4A16 GPTQ", EMBEDDED, {"scheme": "W4A16", "calibration": {"samples": 128, "length": 512}}),
    ("8 x 1024, W4A16 GPTQ", (8, 1024, 4096), {"scheme": "W4A16", "calibration": {"samples": 32, "length": 512}}),
    ("3 x 2048, W8A8 GPTQ", (3, 2048, 6144), {"scheme": "W8A8", "calibration": {"samples": 16, "length": 512}}),
    ("24 x 2048, W8A16 RTN absmax", (24, 2048, 6144), {"scheme": "W8A16", "method": FAST}),
    ("24 x 1024, FP8_DYNAMIC RTN", (24, 1024, 4096), {"scheme": "FP8_DYNAMIC", "method": "rtn"}),
    ("experts, W4A16 GPTQ", "moe", {"scheme": "W4A16", "calibration": {"samples": 64, "length": 512}}),
]


def predicted(recipe: dict[str, Any], device: str, folder: Path, cpu_time: bool) -> dict[str, float]:
    """What a plan says, in this process: bytes and seconds, of one thread's work where `cpu_time`."""
    import torch

    from quantkit import estimate, rehearsal

    if cpu_time:
        torch.set_num_threads(1)
        rehearsal.time.perf_counter = time.process_time
    from quantkit import plan as planning
    from quantkit.recipe import Recipe

    plan = planning.make(Recipe.from_any(recipe))
    where = torch.device(device)
    peaks = estimate.memory(plan, where)
    folder.mkdir(parents=True, exist_ok=True)
    seconds = rehearsal.rehearse(plan, where, folder)
    return {"output": plan.output_bytes, "peak": peaks.host, "gpu": peaks.gpu, "seconds": seconds.total}


def in_process(recipe: dict[str, Any], device: str, folder: Path, cpu_time: bool) -> dict[str, float]:
    """`predicted`, in a process of its own."""
    command = [sys.executable, __file__, "--predict", json.dumps(recipe), "--device", device, "--out", str(folder)]
    command += ["--cpu-time"] * cpu_time
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{recipe}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(out: Path, device: str, moe: str | None, only: str, cpu_time: bool) -> None:
    """Prints a row for each case, both figures of each quantity and how far the plan is off."""
    seconds = "CPU seconds" if cpu_time else "seconds"
    print(f"| run | output bytes | peak MiB, plan / run | GPU MiB, plan / run | {seconds}, plan / run |")
    print("|---|---|---|---|---|")
    for name, model, recipe in CASES:
        if only not in name or (model == "moe" and moe is None):
            continue
        with tempfile.TemporaryDirectory(dir=out) as work:
            where = str(Path(work) / "model")
            if isinstance(model, tuple):
                random_model.write(Path(where), *model)
            else:
                where = str(moe) if model == "moe" else model
            full = {"model": where, "validate": "none", **recipe}
            told = in_process(full, device, Path(work) / "plan", cpu_time)
            done = memory.measured(full, Path(work) / "quantized", device, threads=1 if cpu_time else None)
            done["seconds"] = done["cpu_seconds" if cpu_time else "seconds"]
            size = sum(p.stat().st_size for p in (Path(work) / "quantized").glob("*.safetensors"))
            off = [f"{told[k] / done[k] - 1:+.0%}" if done[k] else "" for k in ("peak", "gpu", "seconds")]
            cells = [
                f"{told['output']:,.0f}, the files with their headers {size:,}",
                f"{told['peak'] / 2**20:,.0f} / {done['peak'] / 2**20:,.0f} ({off[0]})",
                f"{told['gpu'] / 2**20:,.0f} / {done['gpu'] / 2**20:,.0f} ({off[1]})" if done["gpu"] else "",
                f"{told['seconds']:.1f} / {done['seconds']:.1f} ({off[2]})",
            ]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--moe", help="a folder with a mixture of experts")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--cpu-time", action="store_true", help="compare the CPU time of one thread, not the clock's")
    parser.add_argument("--predict", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.predict:
        print(json.dumps(predicted(json.loads(args.predict), args.device, args.out, args.cpu_time)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    compare(args.out, args.device, args.moe, args.only, args.cpu_time)


if __name__ == "__main__":
    main()
