"""The KL divergence where original and output are measured one after the other, beside the exact one.

    python eval/one_after_other.py --log build/one-after-other.jsonl [--windows 40] [--length 512]

pydocs-llama-7m rounded to nearest under three schemes, reloaded from disk. From the k likeliest tokens of the original
and draws from its rest come a figure with the error of its draws, and bounds that hold for certain; the exact one is
measured with both models in memory. Lines of the log are not done again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import accuracy
import quantkit
from accuracy_table import row
from quantkit import calibration, hub
from quantkit import plan as planning
from quantkit.loading import load
from quantkit_eval.compare import measure, summary
from quantkit_eval.kept_logits import DRAWS, KeptLogits
from quantkit_eval.windows import heldout_windows

MODEL = "builtin:pydocs-llama-7m"
SCHEMES = ("W8A16", "W4A16", "W3A16")
KEPT = (64, 1024)
COLUMNS = ("scheme", "k", "rest's mass", "exact KL", "figure ± error of the draws", "at least", "at most", "disk")


def windows(count: int, length: int) -> torch.Tensor:
    """The held-out windows that validation takes."""
    texts = list(calibration.load_texts("builtin:pydocs-heldout"))
    return heldout_windows(texts, planning.tokenizer(hub.resolve(MODEL)), length=length, count=count)


def measured(scheme: str, windows_WL: torch.Tensor, scratch: Path) -> list[dict[str, Any]]:
    """A line for each number of kept tokens. perplexity, top1: whether they are those of the exact comparison."""
    recipe = {"model": MODEL, "scheme": scheme, "method": "rtn", "validate": "none"}
    out = quantkit.quantize({**recipe, "export": {"engines": ["transformers"]}}, out=scratch / scheme).out
    original, quantized = (load(x, dtype=torch.float32) for x in (hub.resolve(MODEL).folder, out))
    exact = summary(measure(original, quantized, windows_WL))
    lines = []
    for kept in KEPT:
        folder = scratch / f"{scheme}-{kept}"
        folder.mkdir()
        logits = KeptLogits(folder, kept)
        logits.add(original, windows_WL)
        size = sum(file.stat().st_size for file in folder.iterdir())
        tokens, spread = logits.measure(quantized)
        found, bounds = summary(tokens), spread.bounds(kept, DRAWS)
        same = found.perplexity == exact.perplexity and found.top1_agreement == exact.top1_agreement
        figures = {"exact": exact.kl, "kl": found.kl, **bounds.to_dict(), "disk": size, "same": same}
        lines.append({"key": json.dumps([scheme, kept, *windows_WL.shape]), "scheme": scheme, **figures})
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown, with a sentence on what does not depend on what was kept."""
    rows = [row(COLUMNS), row(["---"] * len(COLUMNS))]
    for x in lines:
        figure = f"{x['kl']:.6f} ± {x['error']:.1e}"
        bounds = (f"{x['at_least']:.6f}", f"{x['at_most']:.4g}")
        disk = f"{x['disk'] / 1e6:.0f} MB"
        rows.append(row([x["scheme"], str(x["kept"]), f"{x['mass']:.4f}", f"{x['exact']:.6f}", figure, *bounds, disk]))
    same = sum(x["same"] for x in lines)
    return "\n".join([*rows, "", f"Perplexity and top-1 are equal to the last bit in {same} of {len(lines)} rows."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True, help="lines of JSON, one a scheme and k")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--length", type=int, default=512, help="tokens a window")
    args = parser.parse_args()
    args.log.parent.mkdir(parents=True, exist_ok=True)
    done = accuracy.read_log(args.log)
    keys = {scheme: [json.dumps([scheme, k, args.windows, args.length]) for k in KEPT] for scheme in SCHEMES}
    with tempfile.TemporaryDirectory() as folder:
        for scheme in SCHEMES:
            if all(key in done for key in keys[scheme]):
                continue
            for line in measured(scheme, windows(args.windows, args.length), Path(folder)):
                accuracy.append(args.log, line)
                done[line["key"]] = line
    print(table([done[key] for scheme in SCHEMES for key in keys[scheme]]))


if __name__ == "__main__":
    main()
