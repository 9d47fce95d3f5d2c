"""Every number format on one model: what a weight costs on disk, and what it costs in accuracy.

    python eval/formats.py --out table.md [--cases W4A16 W4A16:gptq ...]

Each scheme is quantized by a method that uses no data (round to nearest with searched scales), written, loaded back
from disk and compared with the original on the same windows. Bits a weight are those of the quantized layers' tensors
in the file, scales included. "decode" is the largest difference between the weights that quantkit decodes from the
folder and those that an independent reader decodes: the compressed-tensors library for its own formats, the numpy
readers of tests/readers.py for the others. It must be 0.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from quantkit import api, formats, numerics
from quantkit.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
PRESETS = [
    *("W8A16", "W6A16", "W4A16", "W4A16_ASYM", "W3A16", "W2A16"),
    *("W8A8", "W4A8", "W4AFP8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"),
    *("MXFP8A16", "MXFP8", "MXFP6A16", "MXFP4A16", "MXFP4", "NVFP4A16", "NVFP4"),
]
CASES = [
    *PRESETS,
    *("W4A16:gptq", "W4A16_ASYM:gptq", "W4A16_ASYM:awq", "FP8_BLOCK:fp8-block"),
    *("FP8:modelopt", "NVFP4:modelopt", "W4A16:modelopt"),
]
# Stock transformers reads no modelopt; the check before the work would refuse it.
ENGINES = {"modelopt": ["tensorrt-llm"]}


def quantization(folder: Path) -> dict[str, Any]:
    """The quantization_config of a folder."""
    config = formats.quantization_config(json.loads((folder / "config.json").read_text("utf-8")))
    assert config is not None
    return dict(config)


def layers(folder: Path) -> dict[str, tuple[Any, dict[str, torch.Tensor]]]:
    """Quantized layers of a folder: name -> (what quantkit reads, the layer's tensors as they lie in the file)."""
    config = quantization(folder)
    module = formats.by_method(config["quant_method"])
    reader = module.read_config(config)
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name in {key.rpartition(".")[0] for key in tensors}:
        own = {key.removeprefix(name + "."): t for key, t in tensors.items() if key.rpartition(".")[0] == name}
        if reader.scheme_for(name) is not None and module.MARKER in own:
            found[name] = (reader.unpack(name, own), own)
    return found


def reference(folder: Path, config: dict[str, Any]) -> Callable[[str], torch.Tensor]:
    """A function from a layer's name to its weight, float32, as an independent reader decodes it."""
    if config["quant_method"] == "compressed-tensors":
        return _library(folder, config)
    sys.path.insert(0, str(ROOT / "tests"))
    import readers

    arrays = readers.parse((folder / "model.safetensors").read_bytes())
    read = {"gptq": readers.gptq, "awq": readers.awq, "fp8": readers.fp8_block, "modelopt": readers.modelopt}
    method = config["quant_method"]
    if method == "modelopt":
        config = json.loads((folder / "hf_quant_config.json").read_text("utf-8"))

    def decode(name: str) -> torch.Tensor:
        own = {key.removeprefix(name + "."): t for key, t in arrays.items() if key.rpartition(".")[0] == name}
        return torch.from_numpy(read[method](own, config).copy()).float()

    return decode


def _library(folder: Path, config: dict[str, Any]) -> Callable[[str], torch.Tensor]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    (group,) = config["config_groups"].values()
    scheme = QuantizationScheme.model_validate(group)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    tensors = load_file(folder / "model.safetensors")

    def decode(name: str) -> torch.Tensor:
        own = {key.removeprefix(name + "."): t for key, t in tensors.items() if key.rpartition(".")[0] == name}
        weight: torch.Tensor = compressor.decompress(own, scheme)["weight"]
        return weight.float()

    return decode


def measure(preset: str, export: str, args: argparse.Namespace, folder: Path) -> list[str]:
    """One row of the table."""
    recipe = {
        "model": args.model,
        "scheme": preset,
        "method": "rtn",
        "rules": [{"match": "lm_head", "scheme": "none"}],
        "calibration": {"samples": 32, "length": 512},
        "validate": {"perplexity": {"windows": args.windows, "length": 512}},
        "export": {"format": export, "engines": ENGINES.get(export, ["transformers"])},
    }
    result = api.quantize(recipe, out=folder / f"{preset}-{export}", device="cpu", progress=Progress())
    assert result.validation is not None
    config = quantization(result.out)
    weights = bits = 0
    worst, decode = 0.0, reference(result.out, config)
    for name, (q, own) in layers(result.out).items():
        weights += q.codes_NK.numel()
        bits += 8 * sum(t.nbytes for key, t in own.items() if key != "bias")
        theirs = decode(name)
        ours = numerics.dequantize(q)
        if config["quant_method"] == "compressed-tensors":  # the library decodes into the model's dtype
            ours, theirs = ours.bfloat16().float(), theirs.bfloat16().float()
        worst = max(worst, float((ours - theirs).abs().max()))
    c = result.validation.comparison
    layout = config.get("format", config["quant_method"])
    return [
        *(preset, export if export == layout else f"{export}, {layout}"),
        *(f"{bits / weights:.3f}", f"{c.perplexity:.4f}", f"{c.kl:.5f} ± {c.kl_stderr:.5f}", f"{worst:g}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:pydocs-llama-7m", help="as in a recipe")
    parser.add_argument("--cases", nargs="+", default=CASES, help="a scheme, or scheme:format")
    parser.add_argument("--windows", type=int, default=120)
    parser.add_argument("--out", type=Path, help="where the table goes as well")
    args = parser.parse_args()
    logging.getLogger("quantkit").setLevel(logging.ERROR)
    head = ["scheme", "format", "bits a weight", "perplexity", "KL ± s.e.", "decode"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    with tempfile.TemporaryDirectory() as folder:
        for case in args.cases:
            preset, _, export = case.partition(":")
            row = measure(preset, export or "compressed-tensors", args, Path(folder))
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], flush=True)
    versions = ", ".join(f"{name} {version}" for name, version in api.versions().items())
    text = "\n".join([*lines, "", f"{args.windows} windows of 512 tokens; {versions}."]) + "\n"
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
