"""Quantizes a model folder with llm-compressor, the peer that quantkit's accuracy is compared with.

Runs in a virtual environment of its own, because the peer pins older transformers and compressed-tensors:

    python -m venv peer
    peer/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    peer/bin/python eval/peers/llmcompressor_run.py --model DIR --data rows.jsonl --method gptq --scheme W4A16 --out DIR

The peer's defaults are kept: scales from the absolute maximum, GPTQ's damping 0.01 and static activation order, the
lists of layers of its transforms, every expert of a mixture calibrated with every token. `--observer memoryless_mse`
turns its scale search on. Given are only what the comparison fixes: the linears (every one but lm_head; a router is
none), the scheme, and the calibration rows: the documents of `--data` in file order, each followed by EOS, concatenated
and cut into rows of `--length` tokens, the first `--samples`.

`--dense` leaves, instead of the packed checkpoint, the weights that compressed-tensors itself decodes from it, in the
model's dtype: for a model whose packed form other versions of transformers do not read, such as a mixture of experts.
The last line printed is a JSON object: the versions that ran, the SHA-256 of the calibration tokens (int64, as they lie
in memory) or null when none were used, the seconds from the end of each layer to that of the next, and the peak of the
GPU's memory. Imports nothing of quantkit.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import LifecycleCallbacks
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

# The default of the presets, the peer's scale search, the search weighted by E[x^2], and the one made for NVFP4.
OBSERVERS = ("memoryless_minmax", "memoryless_mse", "imatrix_mse", "nvfp4_expanded_mse")
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def calibration_rows(path: Path, tokenizer: PreTrainedTokenizerBase, samples: int, length: int) -> torch.Tensor:
    """The first `samples` rows of `length` tokens, int64, without padding. Exits when the file is too short."""
    ids: list[int] = []
    for line in filter(str.strip, path.read_text(encoding="utf-8").split("\n")):
        ids += tokenizer(json.loads(line)["text"], add_special_tokens=False, verbose=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
        if len(ids) >= samples * length:
            break
    if len(ids) < samples * length:
        raise SystemExit(f"{path}: {len(ids)} tokens, {samples} rows of {length} need {samples * length}")
    return torch.tensor(ids[: samples * length], dtype=torch.int64).view(samples, length)


def allow_cpu() -> None:
    """Lets the peer's AWQ run without a GPU: it pins its cache for the copy to one, which torch refuses there."""
    if not torch.cuda.is_available():
        IntermediatesCache.pin_memory = lambda self, batch_index: None


def note_layers(times: list[float]) -> None:
    """Notes when the peer is through with each part of the model that it calibrates by itself: a layer, as a rule."""
    inner = LifecycleCallbacks.sequential_epoch_end

    def timed(*args: Any, **kwargs: Any) -> Any:
        found = inner(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.monotonic())
        return found

    LifecycleCallbacks.sequential_epoch_end = timed


def recipe(args: argparse.Namespace) -> list[Modifier]:
    """The peer's modifiers: a transform, if any, then what chooses the codes."""
    modifiers: list[Modifier] = []
    if args.transform == "awq":
        modifiers.append(AWQModifier())
    elif args.transform == "smoothquant":
        modifiers.append(SmoothQuantModifier(smoothing_strength=args.alpha))
    elif args.transform == "spinquant":
        modifiers.append(SpinQuantModifier(rotations=["R1", "R2"]))  # those that fold into the weights
    last = GPTQModifier if args.method == "gptq" else QuantizationModifier
    modifiers.append(last(targets="Linear", scheme=args.scheme, ignore=["lm_head"], weight_observer=args.observer))
    return modifiers


def load(folder: Path) -> Any:
    """The model in its own dtype; experts as the peer wants them, one linear a projection."""
    return linearize_moe(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))


def make_dense(folder: Path, dtype: torch.dtype) -> int:
    """Replaces the packed weights of a folder by what compressed-tensors decodes from them. Returns their number."""
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    found = config.pop("quantization_config")
    (group,) = found["config_groups"].values()
    scheme = QuantizationScheme.model_validate(group)
    compressor = BaseCompressor.get_value_from_registry(scheme.format or found["format"])
    tensors = load_file(folder / WEIGHTS)
    names = {key.rpartition(".")[0] for key in tensors if key.rpartition(".")[2] == "weight_scale"}
    dense = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] not in names}
    for name in names:
        own = {key.removeprefix(name + "."): t for key, t in tensors.items() if key.rpartition(".")[0] == name}
        dense[f"{name}.weight"] = compressor.decompress(own, scheme)["weight"].to(dtype).contiguous()
    save_file(dense, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--data", type=Path, required=True, help="calibration documents, .jsonl with the key text")
    parser.add_argument("--scheme", required=True, help="a preset of compressed-tensors, such as W4A16 or NVFP4A16")
    parser.add_argument("--method", choices=("rtn", "gptq"), required=True)
    transforms = ("none", "awq", "smoothquant", "spinquant")
    parser.add_argument("--transform", choices=transforms, default="none", help="before the method")
    parser.add_argument("--alpha", type=float, default=0.5, help="SmoothQuant's strength; 0.5 is the peer's default")
    parser.add_argument("--observer", choices=OBSERVERS, default=OBSERVERS[0], help="how the scales are chosen")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dense", action="store_true", help="write decoded weights")
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoint goes")
    args = parser.parse_args()

    allow_cpu()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = load(args.model)
    dtype = model.dtype
    data: dict[str, Any] = {}
    digest = None
    if args.method == "gptq" or args.transform != "none" or args.observer == "imatrix_mse":
        rows = calibration_rows(args.data, tokenizer, args.samples, args.length)
        digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
        mask = torch.ones_like(rows).tolist()
        data = {
            "dataset": Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": mask}),
            "num_calibration_samples": args.samples,
            "max_seq_length": args.length,
            "shuffle_calibration_samples": False,
        }
    times: list[float] = []
    note_layers(times)
    oneshot(model=model, tokenizer=tokenizer, recipe=recipe(args), **data)
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)
    if args.dense:
        make_dense(args.out, dtype)
    names = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    layers = [round(b - a, 3) for a, b in itertools.pairwise(times)]
    versions = {name: version(name) for name in names}
    print(json.dumps({"versions": versions, "tokens": digest, "layers": layers, "gpu_gib": peak}))


if __name__ == "__main__":
    main()
