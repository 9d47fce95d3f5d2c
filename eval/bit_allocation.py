"""What `scheme: {auto: ...}` is worth: its choice beside others of the same budget, each quantized, reloaded, measured.

    python eval/bit_allocation.py --log build/allocation.jsonl [--bits 3.5 4.25] [--threads 2]

Beside the choice that quantkit makes stand those that somebody might make by hand. All start from the smallest
candidate for every group of layers and take the next larger one while the budget lasts:

    ends    groups of the outermost blocks first, the first block before the last
    down    the layers that write to the residual stream first (down_proj, then o_proj), then the others
    random  in the order of random.Random(seed), three seeds

Every run goes to the log, a line of JSON, as in eval/accuracy.py, and is not done again.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import accuracy
from accuracy_cases import OURS, PYDOCS, Job, Setting
from accuracy_table import row
from quantkit import hub
from quantkit.allocation import candidates
from quantkit.recipe import Recipe

NAMES = ["W3A16", "W4A16", "W8A16"]
SEEDS = (1, 2, 3)


def filled(found: candidates.Outline, order: Sequence[int]) -> list[int]:
    """The smallest candidate for all groups, then the next larger one, group after group, as far as the budget goes."""
    chosen = [0] * len(found.groups)
    for candidate in range(1, len(NAMES)):
        for i in order:
            larger = [*chosen]
            larger[i] = candidate
            if found.size(larger) <= found.capacity:
                chosen = larger
    return chosen


def orders(found: candidates.Outline) -> dict[str, list[int]]:
    """In which order groups get more bits, by the name of the rule."""
    every = range(len(found.groups))
    last = max(group.block for group in found.groups)
    writes = {"down_proj": 0, "o_proj": 1}
    rules = {
        "ends": sorted(every, key=lambda i: (min(found.groups[i].block, last - found.groups[i].block), i)),
        "down": sorted(every, key=lambda i: (writes.get(found.groups[i].layers[0].name.rpartition(".")[2], 2), i)),
    }
    return rules | {f"random {seed}": random.Random(seed).sample(every, len(every)) for seed in SEEDS}


def jobs(bits: float) -> list[Job]:
    """quantkit's choice, and the others as recipes with rules."""
    auto = {"auto": {"bits": bits, "candidates": NAMES}}
    base = {"model": f"builtin:{PYDOCS}", "method": "gptq"}
    found = candidates.outline(Recipe.from_any({**base, "scheme": auto}))
    done = [Job(PYDOCS, OURS, {"scheme": auto, "method": "gptq"}, f"auto {bits:g}", True)]
    for name, order in orders(found).items():
        written = found.settled(filled(found, order)).to_dict()
        settings = {"scheme": written["scheme"], "rules": written["rules"], "method": "gptq"}
        done.append(Job(PYDOCS, OURS, settings, f"{name} {bits:g}", True))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True, help="lines of JSON, one a run")
    parser.add_argument("--bits", type=float, nargs="+", default=[3.5, 4.25])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    texts = (accuracy.TEXTS / "pydocs-calibration.jsonl", accuracy.TEXTS / "pydocs-heldout.jsonl")
    folders = {PYDOCS: hub.resolve(f"builtin:{PYDOCS}").folder}
    setting = Setting(*texts, 128, 512, 120, folders, threads=args.threads)
    uniform = [Job(PYDOCS, OURS, {"scheme": name, "method": "gptq"}, f"{name} for all", True) for name in NAMES]
    wanted = [*uniform, *(job for bits in args.bits for job in jobs(bits))]
    args.log.parent.mkdir(parents=True, exist_ok=True)
    failed = accuracy.work([(job, 0) for job in wanted], setting, args.log, 1)
    log = accuracy.read_log(args.log)
    print(row(["choice", "bits a weight", "perplexity", "KL ± s.e."]), row(["---"] * 4), sep="\n")
    for job in wanted:
        if found := log.get(setting.key(job, 0)):
            figures = found["figures"]
            kl = f"{figures['kl']:.5f} ± {figures['kl_stderr']:.5f}"
            print(row([job.label, f"{found['bits']:.4f}", f"{figures['perplexity']:.4f}", kl]))
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
