"""A copy of a model with outlier channels that computes the same function: what SmoothQuant and AWQ are for.

    python eval/outliers.py --model builtin:pydocs-llama-7m --out build/outliers

In each norm that feeds linear layers 1 % of the channels (at least two) are made 32 or 64 times larger, and the columns
of every linear that reads them as much smaller. Large language models grow such channels by themselves (Dettmers et
al., LLM.int8(), arXiv:2208.07339): a few inputs so large that an 8-bit scale shared with them leaves the others little.

The factors are powers of two, so bfloat16 holds the new weights exactly: each product of a weight and an input, and
with it every logit, is what it was, bit for bit. The script checks that, and refuses to write a copy that computes
another function, as that of a norm with 1 + w would. Names are those of Llama, Mistral and Qwen, experts included.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantkit import hub
from quantkit.errors import InputError

WEIGHTS = "model.safetensors"
# What each norm of a block feeds: its name, and the names of its readers' weights.
READERS = {
    "input_layernorm": r"self_attn\.[qkv]_proj\.weight",
    "post_attention_layernorm": r"mlp\.(?:.*\.)?(?:gate_proj|up_proj)\.weight|mlp\.gate\.weight",
}
TOKENS, TOLERANCE = 256, 1e-4  # of the check: random tokens, and the largest difference of logits, relative


def norms(names: Sequence[str]) -> dict[str, list[str]]:
    """The weight of each norm that feeds linears -> the weights of those linears, by their names on disk."""
    found = {}
    for name in sorted(names):
        block, _, norm = name.removesuffix(".weight").rpartition(".")
        if norm in READERS:
            reader = re.compile(re.escape(block) + r"\." + f"(?:{READERS[norm]})")
            found[name] = sorted(x for x in names if reader.fullmatch(x))
    return found


def powers_of_two(low: float, high: float) -> list[int]:
    """Powers of two from `low` to `high`: [32, 64] for 30 to 100. Raises InputError when there is none."""
    found = [1 << k for k in range(64) if low <= 1 << k <= high]
    if not found:
        raise InputError(f"no power of two lies between {low} and {high}")
    return found


def inject(
    tensors: Mapping[str, torch.Tensor], *, share: float = 0.01, low: float = 30.0, high: float = 100.0, seed: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, int]]]:
    """The tensors of a checkpoint with outliers, and which: norm -> channel -> factor.

    share      of the channels of each norm, rounded up, at least two
    low, high  bounds of the factors, powers of two drawn evenly (and so evenly in their logarithm)
    Raises InputError when no norm is known by its name.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = torch.tensor(powers_of_two(low, high))
    changed, chosen = dict(tensors), {}
    for norm, readers in norms(list(tensors)).items():
        (width,) = tensors[norm].shape
        count = min(width, max(2, math.ceil(share * width)))
        channels = torch.randperm(width, generator=generator)[:count]
        s_K = torch.ones(width)
        s_K[channels] = factors[torch.randint(len(factors), (count,), generator=generator)].float()
        changed[norm] = (tensors[norm].float() * s_K).to(tensors[norm].dtype)
        for name in readers:
            changed[name] = (tensors[name].float() / s_K).to(tensors[name].dtype)
        chosen[norm] = {k: int(s_K[k]) for k in sorted(channels.tolist())}
    if not chosen:
        raise InputError(f"no norm is called {' or '.join(READERS)}: where to put outliers is not known")
    return changed, chosen


def largest_difference(before: Path, after: Path) -> float:
    """max |difference of logits| / max |logit| of two model folders, in float32, on random tokens."""
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (before, after)]
    vocabulary = models[0].get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, others = (model(input_ids=ids, use_cache=False).logits for model in models)
    return float((logits - others).abs().max() / logits.abs().max())


def write_copy(
    source: Path, out: Path, *, share: float = 0.01, low: float = 30.0, high: float = 100.0, seed: int = 0
) -> tuple[dict[str, dict[int, int]], float]:
    """Writes the copy into a new folder, options as for `inject`; returns the outliers and the difference of logits.

    Raises InputError when the source has no single file of weights, `out` exists, or the copy computes something else.
    """
    if not (source / WEIGHTS).is_file():
        raise InputError(f"{source}: holds no {WEIGHTS}; a model in several files is not supported here")
    if out.exists():
        raise InputError(f"{out}: exists; name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        staging = Path(scratch) / out.name
        staging.mkdir()
        tensors, chosen = inject(load_file(source / WEIGHTS), share=share, low=low, high=high, seed=seed)
        for file in source.iterdir():
            if file.is_file() and file.name != WEIGHTS:
                shutil.copyfile(file, staging / file.name)
        save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        difference = largest_difference(source, staging)
        if not difference <= TOLERANCE:
            raise InputError(
                f"{source}: with outliers its logits differ by {difference:.3g} of the largest, so it is not the same "
                "function; are its norms of the form 1 + w?"
            )
        staging.rename(out)
    return chosen, difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:pydocs-llama-7m", help="as in a recipe")
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    parser.add_argument("--share", type=float, default=0.01, help="of the channels of each norm; at least two")
    parser.add_argument("--low", type=float, default=30.0, help="factors are the powers of two from here")
    parser.add_argument("--high", type=float, default=100.0, help="to here")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        source = hub.resolve(args.model).folder
        chosen, difference = write_copy(
            source, args.out, share=args.share, low=args.low, high=args.high, seed=args.seed
        )
    except InputError as e:
        raise SystemExit(str(e)) from None
    for norm, channels in chosen.items():
        print(f"{norm}: {json.dumps(channels)}")
    print(f"{args.out}: largest difference of logits {difference:.3g} of the largest logit, in float32")


if __name__ == "__main__":
    main()
