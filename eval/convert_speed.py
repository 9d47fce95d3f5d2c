"""How fast `quantkit convert` is beside a copy of the same folder: both read and write every byte of the weights.

    python eval/convert_speed.py --gb 4 --out build/convert-speed

Writes a checkpoint of random codes (compressed-tensors, 4 bits, groups of 128) of the given size, then times `cp -r`,
the conversion to gptq and `quantkit lint`, and reports MB of the source a second. Both end when the bytes are on the
disk, not when the system has promised to write them. The source is in the page cache for both, if it fits there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import torch

from quantkit import formats, lint
from quantkit.convert import convert
from quantkit.errors import InputError
from quantkit.presets import PRESETS
from quantkit.shards import ShardWriter
from quantkit.types import QParams, QuantizedTensor, Scheme, TensorSpec

SCHEME = PRESETS["W4A16"]
# The shapes of one block of a model of 8 billion weights, (N, K).
BLOCK = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def random_layer(shape: tuple[int, int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The tensors of a layer with random codes and scales."""
    n, k = shape
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    scale = (torch.rand(n, k // 128, generator=generator) * 0.01 + 0.001).bfloat16()
    return formats.get("compressed-tensors").pack(QuantizedTensor(codes, QParams(scale), SCHEME.weights))


def write_checkpoint(folder: Path, size: int) -> int:
    """A folder of at least `size` bytes of packed layers; returns how many bytes. Blocks have the same content."""
    form = formats.get("compressed-tensors")
    specs: dict[str, TensorSpec] = {}
    per_block = sum(n * k for n, k in BLOCK.values()) * 17 // 32
    blocks = max(1, -(-size // per_block))
    schemes: dict[str, Scheme | None] = {}
    for i in range(blocks):
        for name, shape in BLOCK.items():
            layer = f"model.layers.{i}.{name}"
            schemes[layer] = SCHEME
            specs |= {f"{layer}.{leaf}": spec for leaf, spec in form.tensors(shape, SCHEME, "BF16").items()}
    writer = ShardWriter(folder, specs, 5_000_000_000)
    for name, shape in BLOCK.items():
        packed = random_layer(shape, torch.Generator().manual_seed(0))
        for i in range(blocks):
            for leaf, tensor in packed.items():
                writer.write(f"model.layers.{i}.{name}.{leaf}", tensor)
    writer.close()
    config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": form.config(schemes)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder_size(folder)


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, required=True, help="size of the source, in GB (10^9 bytes)")
    parser.add_argument("--out", type=Path, required=True, help="folder to work in; what is made there is removed")
    parser.add_argument("--to", default="gptq", help="format to convert to, or dense")
    args = parser.parse_args()
    source, copied, converted = (args.out / name for name in ("source", "copied", "converted"))
    if args.out.exists():
        raise SystemExit(f"{args.out}: exists; name a folder that does not")
    source.mkdir(parents=True)
    try:
        size = write_checkpoint(source, int(args.gb * 1e9))
        start = time.perf_counter()
        subprocess.run(["cp", "-r", str(source), str(copied)], check=True)
        os.sync()
        copy_seconds = time.perf_counter() - start
        shutil.rmtree(copied)
        start = time.perf_counter()
        convert(source, args.to, converted)
        os.sync()
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        findings = lint.folder(source, ["vllm"])
        lint_seconds = time.perf_counter() - start
        written = folder_size(converted)
    except InputError as e:
        raise SystemExit(str(e)) from None
    finally:
        shutil.rmtree(args.out)
    print(f"source             {size / 1e6:,.0f} MB, written by {args.to}: {written / 1e6:,.0f} MB")
    print(f"cp -r              {copy_seconds:7.1f} s  {size / 1e6 / copy_seconds:8,.0f} MB/s")
    print(f"quantkit convert   {seconds:7.1f} s  {size / 1e6 / seconds:8,.0f} MB/s")
    print(f"quantkit lint      {lint_seconds:7.1f} s  reads headers only; {len(findings)} findings")


if __name__ == "__main__":
    main()
