"""Quantizes a model folder with llm-compressor, the peer that quantkit's accuracy is compared with.

Runs in a virtual environment of its own, because the peer pins older transformers and compressed-tensors:

    python -m venv peer
    peer/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    peer/bin/python eval/peers/llmcompressor_run.py --model DIR --data rows.jsonl --method gptq --scheme W4A16 --out DIR

The peer's defaults are kept (scales from the absolute maximum, GPTQ's damping 0.01 and static activation order), but
`--observer memoryless_mse` turns its scale search on. Given are only what the comparison fixes: the linears (every one
but lm_head), the scheme, and the calibration rows: the documents of `--data` in file order, each followed by EOS,
concatenated and cut into rows of `--length` tokens, the first `--samples`.
The last line printed is a JSON object with the versions that ran. Imports nothing of quantkit.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

SCHEMES = ("W4A16", "W4A16_ASYM", "W3A16", "W8A16")  # the peer's presets: integers, group 128
OBSERVERS = ("memoryless_minmax", "memoryless_mse")  # the default of the presets; the peer's scale search


def calibration_rows(path: Path, tokenizer: PreTrainedTokenizerBase, samples: int, length: int) -> Dataset:
    """The first `samples` rows of `length` tokens, without padding. Exits when the file is too short."""
    ids: list[int] = []
    for line in filter(str.strip, path.read_text(encoding="utf-8").split("\n")):
        ids += tokenizer(json.loads(line)["text"], add_special_tokens=False, verbose=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
        if len(ids) >= samples * length:
            break
    if len(ids) < samples * length:
        raise SystemExit(f"{path}: {len(ids)} tokens, {samples} rows of {length} need {samples * length}")
    rows = [ids[i * length : (i + 1) * length] for i in range(samples)]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * length] * samples})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--data", type=Path, required=True, help="calibration documents, .jsonl with the key text")
    parser.add_argument("--method", choices=("rtn", "gptq"), required=True)
    parser.add_argument("--scheme", choices=SCHEMES, required=True)
    parser.add_argument("--observer", choices=OBSERVERS, default=OBSERVERS[0], help="how the scales are chosen")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True, help="where the compressed checkpoint goes")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    modifier = GPTQModifier if args.method == "gptq" else QuantizationModifier
    recipe = modifier(targets="Linear", scheme=args.scheme, ignore=["lm_head"], weight_observer=args.observer)
    if args.method == "gptq":
        oneshot(
            model=model,
            tokenizer=tokenizer,
            recipe=recipe,
            dataset=calibration_rows(args.data, tokenizer, args.samples, args.length),
            num_calibration_samples=args.samples,
            max_seq_length=args.length,
            shuffle_calibration_samples=False,
        )
    else:
        oneshot(model=model, tokenizer=tokenizer, recipe=recipe)
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)
    names = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    print(json.dumps({name: version(name) for name in names}))


if __name__ == "__main__":
    main()
