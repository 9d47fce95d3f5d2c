"""Says how two quantized folders differ, tensor by tensor: python differing.py FOLDER FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def main(first: Path, second: Path) -> None:
    for file in sorted(first.glob("*.safetensors")):
        a, b = load_file(file), load_file(second / file.name)
        print(f"{file.name}: {len(a)} tensors, names {'the same' if a.keys() == b.keys() else 'differ'}")
        for name in sorted(a.keys() & b.keys()):
            x, y = (t[name].reshape(-1).view(torch.uint8) for t in (a, b))
            if not torch.equal(x, y):
                where = (x != y).nonzero().reshape(-1)
                print(f"  {name} {tuple(a[name].shape)}: {len(where)} of {len(x)} bytes, first {where[:8].tolist()}")
    layers = [json.loads((folder / "quantkit.json").read_text())["layers"] for folder in (first, second)]
    for x, y in zip(*layers, strict=True):
        if x != y:
            print(f"  {x['name']}: {x} / {y}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
