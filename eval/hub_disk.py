"""Disk and memory at their highest while a model of the Hub in many shards is quantized, shards kept or deleted.

    python eval/hub_disk.py FOLDER [FOLDER ...] [--shards 16] [--out build/hub-disk]

Each model is put on the tests' own Hub on a port of this machine, in about as many shards as are asked for, and
`quantkit quantize` fetches it in a process of its own, by the unmodified huggingface_hub. The cache is looked at a
hundred times a second; what is being fetched counts. Prints a table, with what `quantkit plan` said before. Stops where
the weights that come out differ, or the token is in what was printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from hub_server import HubServer  # noqa: E402

from quantkit.checkpoint import Checkpoint  # noqa: E402
from quantkit.shards import ShardWriter  # noqa: E402

RECIPE = {
    "scheme": "W4A16",
    "calibration": {"samples": 8, "length": 128},
    "validate": {"perplexity": {"windows": 4, "length": 128}, "generation": {"prompts": 0}, "gates": {}},
}


@dataclass
class Measured:
    """Bytes: of weights in the cache at once and at the end, of weights sent, of memory at its highest."""

    cache: int = 0
    left: int = 0
    served: int = 0
    memory: int = 0


def resharded(folder: Path, shards: int) -> dict[str, bytes]:
    """The files of a model whose weights lie in about `shards` files, in the order of its blocks."""
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and ".safetensors" not in p.name}
    checkpoint = Checkpoint.open(folder)

    def place(name: str) -> tuple[int, list[int], str]:
        numbers = [int(n) for n in re.findall(r"\d+", name)]
        return (0 if "embed" in name else 1 if numbers else 2, numbers, name)

    names = sorted(checkpoint.specs, key=place)
    with tempfile.TemporaryDirectory() as scratch:
        size = checkpoint.size() // shards
        writer = ShardWriter(Path(scratch), {name: checkpoint.specs[name] for name in names}, size)
        for name in names:
            writer.write(name, checkpoint.read(name))
        writer.close()
        return files | {p.name: p.read_bytes() for p in Path(scratch).iterdir()}


def run(hub: HubServer, place: Path, *arguments: str) -> tuple[str, Measured]:
    """quantkit in a process that knows the Hub by its environment, watched; what it printed."""
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "0"}
    environment = {**os.environ, **settings, "HF_HUB_DISABLE_XET": "1"}
    hub.served.clear()
    found, log = Measured(), place / "log"
    with log.open("w") as out:
        command = [sys.executable, "-m", "quantkit", *arguments]
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, cwd=place)
        while process.poll() is None:
            found.left = weights(place)
            found.cache = max(found.cache, found.left)
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                found.memory = max(found.memory, int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) * 1024)
            except (OSError, IndexError):
                pass
            time.sleep(0.01)
    found.left = weights(place)
    found.served = sum(n for name, n in hub.served.items() if name.endswith(".safetensors"))
    text = log.read_text()
    assert hub.token not in text, "the token was printed"
    if process.returncode:
        raise SystemExit(text)
    return text, found


def weights(place: Path) -> int:
    """Bytes of weights in the cache: large contents, also those that are on their way."""
    total = 0
    for blob in (place / "hf").glob("hub/*/blobs/*"):
        try:
            if len(blob.name.split(".")[0]) == 64:  # a sha256: LFS
                total += blob.stat().st_size
        except FileNotFoundError:
            pass
    return total


def model(hub: HubServer, folder: Path, shards: int, out: Path) -> list[str]:
    """Rows of the table for one model."""
    name = f"org/{folder.name}"
    files = resharded(folder, shards)
    hub.add(name, files)
    sizes = [len(content) for path, content in files.items() if path.endswith(".safetensors")]
    rows: list[str] = []
    expected: dict[str, bytes] | None = None
    for flags in ([], ["--delete-shards"]):
        place = out / f"{folder.name}-{len(rows)}"
        place.mkdir(parents=True)
        (place / "recipe.json").write_text(json.dumps({**RECIPE, "model": name}))
        planned, looked = sum(sizes), "-"
        if flags:
            text, watched = run(hub, place, "plan", "recipe.json")
            with_output = re.findall(r"--delete-shards\s+([\d,]+) bytes", text)[0]
            output = re.findall(r"output\s+([\d,]+) bytes", text)[0]
            planned, looked = (int(with_output.replace(",", "")) - int(output.replace(",", ""))), f"{watched.served:,}"
        _, found = run(hub, place, "quantize", "recipe.json", "--out", "out", *flags)
        made = {p.name: p.read_bytes() for p in (place / "out").glob("*.safetensors")}
        assert made == (expected := expected or made), "other bytes came out"
        rows.append(
            f"| {folder.name}, {len(sizes)} shards, {sum(sizes):,} | {'deleted' if flags else 'kept'} | {looked} "
            f"| {found.served:,} | {planned:,} | {found.cache:,} | {found.left:,} | {found.memory / 2**20:,.0f} MiB |"
        )
        print(rows[-1], file=sys.stderr, flush=True)
        shutil.rmtree(place)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("build/hub-disk"), help="folder for what is made; replaced")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    print(
        "| model, bytes of weights | shards | sent for plan | sent for the run | planned in the cache "
        "| most in the cache | left | memory |\n|---|---|---|---|---|---|---|---|"
    )
    for folder in args.folders:
        with HubServer() as hub:
            print("\n".join(model(hub, folder, args.shards, args.out.resolve())), flush=True)


if __name__ == "__main__":
    main()
