"""The whole job as a user does it: a Hub id, `quantkit run`, the pushed repository, and back into from_pretrained.

    python eval/hub_job.py [--moe FOLDER_OF_docs-moe-27m] [--out build/hub-job]

Against the tests' own Hub on a port of this machine, with huggingface_hub and transformers as they are: the command
runs in a process of its own that has only HF_ENDPOINT and HF_TOKEN to go by, and so does what loads the pushed id.
Prints what travelled, what the gates said and whether the pushed model computes what the folder on disk computes, in
quantkit's packed layers and in transformers without quantkit. Stops where one of these does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from hub_server import HubServer  # noqa: E402

EMBEDDED = ROOT / "quantkit" / "assets" / "pydocs-llama-7m"
RECIPE = """model: {model}
scheme: W4A16
method: gptq
calibration: {{data: builtin:pydocs, samples: 64, length: 512}}
validate:
  perplexity: {{data: builtin:pydocs-heldout, windows: 20, length: 512}}
  generation: {{prompts: 8, tokens: 16}}
  gates: {{kl: 0.15, top1_agreement: 0.78}}
export: {{shard_size: {shard}}}
push: {{stream: {stream}}}
"""
LOAD = """
import sys
if sys.argv[3] == "packed":
    import quantkit
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
models = [AutoModelForCausalLM.from_pretrained(x).eval() for x in sys.argv[1:3]]
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("The module provides functions to", return_tensors="pt").input_ids
with torch.no_grad():
    a, b = (model(ids).logits for model in models)
assert torch.equal(a, b), "the pushed model computes something else"
kinds = {type(m).__module__.split(".")[0] for m in models[0].modules() if m._parameters or m._buffers}
assert ("quantkit" in kinds) == (sys.argv[3] == "packed"), kinds
print(repr(tokenizer.decode(models[0].generate(ids, max_new_tokens=20, do_sample=False)[0])))
"""


def job(hub: HubServer, base: Path, place: Path, stream: bool) -> None:
    """Puts `base` on the Hub as org/NAME, and does the job; prints what happened."""
    model, name = f"org/{base.name}", f"{hub.user}/{base.name}-W4A16"
    commit = hub.add(model, {p.name: p.read_bytes() for p in base.iterdir() if p.is_file()})
    place.mkdir(parents=True)
    size = sum(p.stat().st_size for p in base.glob("*.safetensors"))
    text = RECIPE.format(model=model, shard=f"{max(1, size // 20_000_000)}MB", stream=str(stream).lower())
    (place / "recipe.yaml").write_text(text)
    hub.calls.clear()
    hub.sent.clear()
    out = place / "out"
    command = [sys.executable, "-m", "quantkit", "run", str(place / "recipe.yaml"), "--out", str(out)]
    printed = run(hub, place, command)
    summary = json.loads((out / "quantkit.json").read_text())
    calls = Counter(hub.calls)
    files = hub.files(name)
    assert summary["source"]["revision"] == commit and summary["status"] == "validated"
    assert all(files[p.name] == p.read_bytes() for p in out.iterdir() if p.name != "README.md")
    assert len(hub.sent) == len(set(hub.sent)) and calls["commit"] == 1
    card = files["README.md"].decode()
    assert (f"base_model: {model}\n" in card and commit in card and "license: apache-2.0" in card) or "moe" in name
    loaded = {}
    for how in ("packed", "stock"):
        loaded[how] = run(hub, place, [sys.executable, "-c", LOAD, name, str(out), how]).strip().splitlines()[-1]
    token = hub.token.encode()
    assert not any(token in p.read_bytes() for p in place.rglob("*") if p.is_file()), "the token is in a file"
    assert not any(token in content for content in files.values())
    figures = summary["validation"]["comparison"]
    peak = re.findall(r"peak ([\d.]+) GiB", printed)[-1]
    print(f"## {model} -> {name}{', shards sent ahead' if stream else ''}\n")
    print(f"- from {model}@{commit[:12]}, {size:,} bytes of weights, KL {figures['kl']:.4f}, every gate passed")
    print(f"- {len(files)} files, {len(hub.sent)} by LFS, each sent once; one commit, {hub.head(name)[:12]}")
    print(f"- calls: {', '.join(f'{call} {count}' for call, count in sorted(calls.items()))}")
    print(f"- the command took {peak} GiB of memory at its peak")
    print(f"- from_pretrained({name!r}), packed: {loaded['packed']}")
    print(f"- the same in transformers without quantkit: {loaded['stock']}")
    print(f"- sent ahead: {printed.count('sent ahead')} shards\n", flush=True)


def run(hub: HubServer, place: Path, command: list[str]) -> str:
    """A process that knows the Hub by its environment; what it printed. The token must not be in it."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(place / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "QUANTKIT_DEBUG": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert hub.token not in done.stdout + done.stderr
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stderr + done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moe", type=Path, help="folder of docs-moe-27m; without it that model is left out")
    parser.add_argument("--out", type=Path, default=Path("build/hub-job"), help="folder for what is made; replaced")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    with HubServer() as hub:
        for base in [EMBEDDED, *([args.moe] if args.moe else [])]:
            for stream in (False, True):
                hub.repos.clear()
                hub.blobs.clear()
                job(hub, base, args.out / f"{base.name}{'-ahead' if stream else ''}", stream)


if __name__ == "__main__":
    main()
