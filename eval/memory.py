"""How much memory a run takes, whatever the number of layers; and a checkpoint that is larger than memory.

    python eval/memory.py flat --out build/memory                    # 4, 16 and 64 layers, with and without calibration
    python eval/memory.py flat --out build/memory --device cuda      # the GPU's peak too; about a minute
    python eval/memory.py big --gb 40 --out build/memory             # W8A16 and FP8_DYNAMIC beside a plain copy

Every run is a process of its own. Its peak is the kernel's own figure (VmHWM: resident memory, mapped files included);
"anonymous" is the part that is no file, sampled; the GPU's is what torch had reserved. "Own" is the peak less what the
process had when the plan was made, before the first weight. The folders are removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import random_model
from quantkit.checkpoint import nbytes

LAYERS = (4, 16, 64)
RECIPES: dict[str, dict[str, Any]] = {
    "W4A16 GPTQ": {"scheme": "W4A16", "method": "gptq"},
    "W8A16 RTN": {"scheme": "W8A16", "method": {"rtn": {"scale_search": "absmax"}}},
    "W4A16 RTN": {"scheme": "W4A16", "method": {"rtn": {"scale_search": "absmax"}}},
    "MXFP4A16 RTN": {"scheme": "MXFP4A16", "method": {"rtn": {"scale_search": "absmax"}}},
    "NVFP4A16 RTN": {"scheme": "NVFP4A16", "method": {"rtn": {"scale_search": "absmax"}}},
    "W8A16 RTN mse": {"scheme": "W8A16", "method": "rtn"},
    "FP8_DYNAMIC RTN": {"scheme": "FP8_DYNAMIC", "method": {"rtn": {"scale_search": "absmax"}}},
    "FP8_DYNAMIC RTN mse": {"scheme": "FP8_DYNAMIC", "method": "rtn"},
}


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status, such as VmHWM."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def one(recipe: dict[str, Any], out: Path, device: str) -> dict[str, Any]:
    """Runs a recipe in this process: bytes and seconds."""
    import torch

    from quantkit import heap, pipeline
    from quantkit import plan as planning
    from quantkit.progress import Silent
    from quantkit.recipe import Recipe

    heap.set_up()  # as the quantkit command does
    plan = planning.make(Recipe.from_any(recipe))
    where = torch.device(device)
    if where.type == "cuda":
        torch.zeros(1, device=where)
    before, most, stop = status("VmRSS"), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            most[0] = max(most[0], status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        out.mkdir(parents=True)
        start, cpu = time.perf_counter(), time.process_time()
        pipeline.quantize(plan, out, device=where, progress=Silent())
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    finally:
        stop.set()
        watcher.join()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "before": before,
        "peak": status("VmHWM"),
        "anonymous": most[0],
        "gpu": torch.cuda.max_memory_allocated() if where.type == "cuda" else 0,
        "output": plan.output_bytes,
    }


def measured(recipe: dict[str, Any], out: Path, device: str, threads: int | None = None) -> dict[str, Any]:
    """`one`, in a process of its own, with so many threads."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "one", "--recipe", json.dumps(recipe), "--out", str(out), "--device", device]
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{recipe}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def flat(out: Path, device: str, hidden: int, inner: int) -> None:
    """Peaks for three numbers of layers, of the path with calibration and of the one without."""
    print("| method | layers | source MB | peak MiB | own MiB | anonymous MiB | GPU MiB | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    own: dict[str, list[float]] = {}
    for layers in LAYERS:
        folder = out / f"model-{layers}"
        shutil.rmtree(folder, ignore_errors=True)
        size = random_model.write(folder, layers, hidden, inner)
        for name in ("W4A16 GPTQ", "W8A16 RTN"):
            recipe = {
                "model": str(folder),
                "validate": "none",
                "calibration": {"samples": 16, "length": 256, "batch_size": 4},
                **RECIPES[name],
            }
            x = measured(recipe, out / "quantized", device)
            own.setdefault(name, []).append(x["peak"] - x["before"])
            own.setdefault(f"{name}, GPU", []).append(x["gpu"])
            cells = [x["peak"], x["peak"] - x["before"], x["anonymous"], x["gpu"]]
            row = " | ".join(f"{c / 2**20:,.0f}" for c in cells)
            print(f"| {name} | {layers} | {size / 1e6:,.0f} | {row} | {x['seconds']:.1f} |", flush=True)
        shutil.rmtree(folder)
    for name, values in own.items():
        if min(values) > 0:
            print(f"{name}: own memory, largest over smallest {max(values) / min(values):.3f}")


def big(out: Path, device: str, gigabytes: float, names: list[str]) -> None:
    """A checkpoint of Llama-3-70B's widths and as many layers as it takes, beside a copy of the same files."""
    folder, copy = out / "model", out / "copy"
    hidden, inner = 8192, 28672
    one, two = (sum(nbytes(s) for s in random_model.tensors(n, hidden, inner).values()) for n in (1, 2))
    layers = max(1, round((gigabytes * 1e9 - (2 * one - two)) / (two - one)))
    if not folder.exists():
        start = time.perf_counter()
        size = random_model.write(folder, layers, hidden, inner)
        print(f"{size / 1e9:.1f} GB in {layers} layers written in {time.perf_counter() - start:.0f} s", flush=True)
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    read, written = copied(folder, copy, size)
    print(
        f"plain copy: {read / 1e6:,.0f} MB/s, of some of the files and flushed: {written / 1e6:,.0f} MB/s", flush=True
    )
    print("| method | peak GiB | anonymous GiB | seconds | CPU s/GB | MB/s of the source | MB/s read and written |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        recipe = {"model": str(folder), "validate": "none", **RECIPES[name]}
        dropped(folder)
        x = measured(recipe, out / "quantized", device)
        rate, both = size / x["seconds"] / 1e6, (size + x["output"]) / x["seconds"] / 1e6
        peak, anonymous = x["peak"] / 2**30, x["anonymous"] / 2**30
        cells = f"{peak:.2f} | {anonymous:.2f} | {x['seconds']:.1f} | {x['cpu_seconds'] / size * 1e9:.2f}"
        print(f"| {name} | {cells} | {rate:,.0f} | {both:,.0f} |", flush=True)
        shutil.rmtree(out / "quantized")
    shutil.rmtree(folder)


def copied(folder: Path, copy: Path, size: int) -> tuple[float, float]:
    """Bytes a second of reading all shards, and of copying some of them, flushed: that reads what it writes."""
    dropped(folder)
    buffer = bytearray(1 << 24)
    start = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as source:
            while source.readinto(buffer):
                pass
    read = size / (time.perf_counter() - start)
    dropped(folder)
    done, start = 0, time.perf_counter()
    copy.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.glob("*.safetensors")):
        if done >= size / 4:
            break
        shutil.copyfile(file, copy / file.name)
        with (copy / file.name).open("rb+") as f:
            os.fsync(f.fileno())
        done += file.stat().st_size
    seconds = time.perf_counter() - start
    shutil.rmtree(copy)
    return read, done / seconds


def dropped(folder: Path) -> None:
    """Tells the system that the pages of a folder's files are not needed: the next reader reads the disk."""
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["flat", "big", "one"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--gb", type=float, default=40)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--inner", type=int, default=1536)
    parser.add_argument("--methods", default="W8A16 RTN,FP8_DYNAMIC RTN")
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "one":
        print(json.dumps(one(json.loads(args.recipe), args.out, args.device)))
    elif args.what == "flat":
        flat(args.out, args.device, args.hidden, args.inner)
    else:
        big(args.out, args.device, args.gb, args.methods.split(","))


if __name__ == "__main__":
    main()
