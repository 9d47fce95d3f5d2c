"""How long quantization takes on a GPU: a decoder layer of Llama-3-8B's dimensions, and how time grows with the work.

    python eval/speed_gptq.py --out speed.json [--peer-path SITE] [--budget 520]
    python eval/speed_gptq.py --read speed.json --plot speed.svg
    python eval/speed_gptq.py --model qwen3-30b-a3b --out moe.json        one layer of a mixture of 128 experts, by part

Weights are random, in bfloat16, the calibration rows are real text (128 rows of 2048 tokens). Nothing is read from a
network. The vocabulary is small: embeddings are no part of a layer. Every case is timed from where quantkit's progress
says that a block begins; what is given is the median over blocks without the first, which compiles kernels, and the
last, which is not run again. Load and save are in `total`, not in a layer's time except where they hold it up.

The peer, llm-compressor, runs in a process of its own when `--peer-path` names a folder with its packages (as
`pip install --target` fills it); its layers are timed from the end of one to the end of the next. Results are written
after every case; one that fails says why in its line, one that would begin after `--budget` seconds is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from quantkit import api, hub
from quantkit.progress import Silent

PEER_SCRIPT = Path(__file__).parent / "peers" / "llmcompressor_run.py"
TEXT = hub.ASSETS / "text" / "pydocs-calibration.jsonl"
TOKENIZER = hub.ASSETS / "pydocs-llama-7m"
VOCABULARY = 4096  # of that tokenizer
GPTQ: dict[str, Any] = {"scheme": "W4A16", "method": "gptq"}
AWQ: dict[str, Any] = {"scheme": "W4A16_ASYM", "method": "rtn", "transforms": [{"awq": {}}]}


@dataclass(frozen=True)
class Shape:
    """A model's dimensions; a mixture when it has experts, each `intermediate` wide, `active` of them a token's.

    heads  0: as many as fill the hidden size
    """

    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 4
    experts: int = 0
    head_dim: int = 128
    heads: int = 0
    active: int = 2

    @property
    def all_heads(self) -> int:
        return self.heads or self.hidden // self.head_dim

    def config(self) -> PretrainedConfig:
        heads = self.all_heads
        common: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 4),
            "head_dim": self.head_dim,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "dtype": torch.bfloat16,
        }
        if not self.experts:
            return LlamaConfig(**common, intermediate_size=self.intermediate, architectures=["LlamaForCausalLM"])
        return Qwen3MoeConfig(
            **common,
            intermediate_size=self.intermediate,
            moe_intermediate_size=self.intermediate,
            num_experts=self.experts,
            num_experts_per_tok=self.active,
            norm_topk_prob=True,
            architectures=["Qwen3MoeForCausalLM"],
        )

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name on disk and shape of every tensor; vectors are norms."""
        d, width, heads = self.head_dim, self.hidden, self.all_heads
        kv = max(1, heads // 4)
        yield "model.embed_tokens.weight", (VOCABULARY, width)
        yield "model.norm.weight", (width,)
        for i in range(self.layers):
            block = f"model.layers.{i}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"{block}.{norm}.weight", (width,)
            for name, rows in (("q", heads), ("k", kv), ("v", kv)):
                yield f"{block}.self_attn.{name}_proj.weight", (rows * d, width)
            yield f"{block}.self_attn.o_proj.weight", (width, heads * d)
            owners = [f"{block}.mlp.experts.{e}" for e in range(self.experts)] or [f"{block}.mlp"]
            for owner in owners:
                yield f"{owner}.gate_proj.weight", (self.intermediate, width)
                yield f"{owner}.up_proj.weight", (self.intermediate, width)
                yield f"{owner}.down_proj.weight", (width, self.intermediate)
            if self.experts:
                yield f"{block}.mlp.gate.weight", (self.experts, width)
                yield f"{block}.self_attn.q_norm.weight", (d,)
                yield f"{block}.self_attn.k_norm.weight", (d,)


@dataclass(frozen=True)
class Case:
    """One measurement. `recipe` is a part of a recipe, or the peer's options; `group` says what it is measured for."""

    name: str
    group: str
    shape: Shape
    recipe: dict[str, Any] = field(default_factory=lambda: dict(GPTQ))
    rows: int = 128
    length: int = 2048
    hidden: str = "auto"
    tool: str = "quantkit"
    profile: bool = False


def cases(main: Shape, rows: int, length: int, *, peer: bool) -> list[Case]:
    """All cases, the most wanted first."""
    base = Case("gptq", "methods", main, rows=rows, length=length)
    small = replace(main, layers=3)
    sweeps: dict[str, Any] = {"scheme": "W4A16", "method": {"gptq": {"sweeps": 0}}}
    found = [
        replace(base, name="warm-up", group="warm-up", shape=replace(main, layers=2), rows=8),
        base,
        replace(base, name="gptq, no sweeps", recipe=sweeps),
        replace(base, name="awq + rtn, asymmetric", recipe=AWQ),
        replace(base, name="gptq, hidden states on the host", group="hidden", hidden="host"),
        replace(base, name="gptq, hidden states on the GPU", group="hidden", hidden="device"),
        replace(base, name="gptq, where the time goes", group="profile", shape=small, profile=True),
        replace(base, name="awq, where the time goes", group="profile", shape=small, recipe=AWQ, profile=True),
    ]
    if peer:
        options = {"scheme": "W4A16", "method": "gptq"}
        found.append(Case("llm-compressor gptq", "peer", small, options, rows, length, tool="llm-compressor"))
    found.append(replace(base, name="gptq, whole model", group="whole", shape=replace(main, layers=8 * main.layers)))
    counts = (rows // 4, rows // 2, rows)
    found += [replace(base, name=f"{n} rows", group="tokens", shape=small, rows=n) for n in counts]
    found += [
        replace(base, name=f"hidden {h}", group="width", shape=replace(small, hidden=h, intermediate=h * 7 // 2))
        for h in (main.hidden // 2, main.hidden, main.hidden * 2)
    ]
    found += [
        replace(base, name=f"{n} experts", group="experts", shape=Shape(main.hidden // 2, 768, 3, n, main.head_dim))
        for n in (8, 32)
    ]
    found += [replace(base, name=f"{n} layers", group="layers", shape=replace(main, layers=n)) for n in (2, 4, 8)]
    found += [replace(base, name=f"effort {e}", recipe={"scheme": "W4A16", "effort": e}) for e in ("fast", "best")]
    if peer:
        options = {"scheme": "W4A16_ASYM", "method": "rtn", "transform": "awq"}
        found.append(Case("llm-compressor awq", "peer", small, options, rows // 4, length, tool="llm-compressor"))
    return found


MODELS = {"qwen3-30b-a3b": Shape(2048, 768, 3, experts=128, heads=32, active=8)}


def mixture(shape: Shape, rows: int, length: int) -> list[Case]:
    """A mixture's layers, once as they are and once with the time of each part."""
    base = Case("gptq", "methods", shape, rows=rows, length=length)
    return [base, replace(base, name="gptq, where the time goes", group="profile", profile=True)]


def build(shape: Shape, folder: Path, device: str) -> None:
    """Writes a model with random weights, and the tokenizer of the embedded one."""
    folder.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, size in shape.tensors():
        if len(size) == 1:
            tensors[name] = torch.ones(size, dtype=torch.bfloat16)
        else:
            drawn = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)
            tensors[name] = drawn.mul_(0.02).cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shape.config().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)


class Clock(Silent):
    """Notes when each block begins and when the last one ends, and keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    def item(self, k: int, name: str) -> None:
        super().item(k, name)
        if self._what == "block":
            self.times.append(time.monotonic())

    def _ended(self) -> None:
        if self._what == "block":
            wait()
            self.times.append(time.monotonic())


def wait() -> None:
    """Until the GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def layer_seconds(times: Sequence[float]) -> dict[str, Any]:
    """Seconds of each block from the times at which they begin and the time of the end, and those of a usual one.

    The usual one: the median without the first, which compiles, and the last, which is not run on with its new weights;
    where that leaves none, without the first.
    """
    each = [b - a for a, b in itertools.pairwise(times)]
    usual = each[1:-1] or each[1:] or each
    return {
        "layer": round(statistics.median(usual), 3) if usual else None,
        "layers": [round(seconds, 3) for seconds in each],
    }


def measure(case: Case, folder: Path, out: Path, device: str) -> dict[str, Any]:
    """Runs quantkit once."""
    recipe = {
        "model": str(folder),
        **case.recipe,
        "calibration": {"data": str(TEXT), "samples": case.rows, "length": case.length, "hidden": case.hidden},
        "validate": "none",
        "export": {"engines": ["transformers"]},
    }
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock, start = Clock(), time.monotonic()
    api.quantize(recipe, out=out, device=device, progress=clock, profile=case.profile)
    wait()
    found = {**layer_seconds(clock.times), "total": round(time.monotonic() - start, 2)}
    if clock.times:
        found["before"] = round(clock.times[0] - start, 2)
    if device == "cuda":
        found["gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return {**found, "said": clock.said, "warnings": clock.warnings}


def measure_peer(case: Case, folder: Path, out: Path, python: str, path: str) -> dict[str, Any]:
    """Runs the peer once, in a process of its own."""
    options = {**case.recipe, "model": folder, "data": TEXT, "samples": case.rows, "length": case.length, "out": out}
    command = [python, str(PEER_SCRIPT), *(f"--{key}={value}" for key, value in options.items())]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-1500:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    # From the end of a layer to the end of the next: its own calibration, and the run of the one before.
    each = found["layers"][: case.shape.layers - 1]
    return {
        "layer": round(statistics.median(each), 3) if each else None,
        "layers": each,
        "total": round(time.monotonic() - start, 2),
        "gpu_gib": found["gpu_gib"],
        "said": [found["versions"]],
    }


def run(case: Case, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the results; never raises, so that a case that fails does not cost the others."""
    line = {**asdict(case), "tokens": case.rows * case.length}
    folder, out = work / "-".join(["model", *(str(size) for size in astuple(case.shape))]), work / "out"
    try:
        if not folder.exists():
            build(case.shape, folder, args.device)
        if case.tool == "quantkit":
            line |= measure(case, folder, out, args.device)
        else:
            line |= measure_peer(case, folder, out, args.peer_python, args.peer_path)
    except (Exception, SystemExit) as e:
        line["error"] = f"{type(e).__name__}: {e}"
    shutil.rmtree(out, ignore_errors=True)
    return line


def summary(line: dict[str, Any]) -> str:
    """A result for a reader."""
    if "error" in line:
        return f"{line['name']}: {line['error']}"
    layer = "no layer timed" if line["layer"] is None else f"{line['layer']:.3f} s a layer {line['layers']}"
    memory = f", GPU {line['gpu_gib']} GiB" if line.get("gpu_gib") else ""
    return f"{line['name']}: {layer}, {line['total']} s in all{memory}"


def plot(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """Seconds a layer by tokens, width and experts, and of the whole by layers: four panels. Needs matplotlib."""
    from matplotlib.figure import Figure

    good = [line for line in lines if "error" not in line and line["layer"] is not None]
    panels: tuple[tuple[str, str, Callable[[dict[str, Any]], float], Callable[[dict[str, Any]], float]], ...] = (
        ("tokens", "calibration tokens", lambda x: x["tokens"], lambda x: x["layer"]),
        ("width", "hidden size", lambda x: x["shape"]["hidden"], lambda x: x["layer"]),
        ("experts", "experts", lambda x: x["shape"]["experts"], lambda x: x["layer"]),
        ("layers", "layers", lambda x: x["shape"]["layers"], lambda x: x["total"]),
    )
    figure = Figure(figsize=(10, 3), layout="constrained")
    for axes, (group, label, x, y) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        points = sorted((x(line), y(line)) for line in good if line["group"] == group)
        axes.plot(*zip(*points, strict=True), "o-", color="#1f77b4") if points else None
        axes.set(xlabel=label, ylabel="seconds in all" if group == "layers" else "seconds a layer")
        axes.set_ylim(0, 1.1 * max((value for _, value in points), default=1.0))
        axes.set_xticks([place for place, _ in points], [f"{place:,}" for place, _ in points], fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(file)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="results, a JSON list")
    parser.add_argument("--read", type=Path, help="results of an earlier run, to plot")
    parser.add_argument("--plot", type=Path, help="where the plot goes (.svg)")
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="methods, hidden, profile, peer, whole, tokens, ...")
    parser.add_argument("--model", choices=[*MODELS], help="layers of this model's dimensions instead of all cases")
    parser.add_argument("--experts", type=int, help="with --model: fewer experts, for a small machine")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--peer-path", help="folder of the peer's packages; without it quantkit alone")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--budget", type=float, default=520, help="seconds after which no case begins")
    parser.add_argument("--work", type=Path, help="folder for models and outputs; a temporary one by default")
    return parser.parse_args()


def work_through(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All cases within the budget; the file of results is complete after each."""
    main = Shape(args.hidden, args.intermediate, args.layers, head_dim=args.head_dim)
    if args.model:
        shape = MODELS[args.model]
        wanted = mixture(replace(shape, experts=args.experts or shape.experts), args.rows, args.length)
    else:
        wanted = cases(main, args.rows, args.length, peer=args.peer_path is not None)
    lines: list[dict[str, Any]] = []
    known: dict[str, dict[str, Any]] = {}  # several groups share a point: it is measured once
    start = time.monotonic()
    for case in wanted:
        if args.only and case.group not in (*args.only, "warm-up"):
            continue
        if time.monotonic() - start > args.budget:
            lines.append({**asdict(case), "error": f"left out: {args.budget:.0f} seconds were over"})
        else:
            point = repr(replace(case, name="", group=""))
            known[point] = known.get(point) or run(case, folder, args)
            lines.append({**known[point], "name": case.name, "group": case.group})
        print(f"[{time.monotonic() - start:5.0f} s] {summary(lines[-1])}", flush=True)
        if args.out:
            args.out.write_text(json.dumps(lines, indent=1, default=str) + "\n", "utf-8")
    return lines


def main() -> None:
    args = arguments()
    if args.read:
        lines = json.loads(args.read.read_text("utf-8"))
    else:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            lines = work_through(args, Path(folder))
    for line in lines:
        for said in line.get("said", []) if line["group"] == "profile" else []:
            print(f"{line['name']}: {said}")
    if args.plot:
        plot(lines, args.plot)


if __name__ == "__main__":
    main()
