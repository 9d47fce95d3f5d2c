"""How fast a model of Llama-3-8B's dimensions generates, packed and in bf16: random weights, nothing is downloaded.

    python eval/speed_generate.py --out speed.jsonl [--only 'w4a16/generate/*' 'bf16/*'] [--layers 32] [--budget 520]
    python eval/speed_generate.py --only '*/eager/*' --profile      # and where an eager token's time on the CPU goes
    python eval/speed_generate.py --list
    python eval/speed_generate.py --read speed.jsonl

A line of JSON is written after every case; one that fails says why, one that would begin after `--budget` seconds is
left out. Cases are named variant/group/what, and `--only` takes patterns of such names:

    load                       seconds to load, bytes of the weights
    generate/bN/LOOP           128 prompt + 128 new tokens, batch N; LOOP as in quantkit.runtime.timing.LOOPS
    eager/bN                   the same by transformers without compilation, fewer tokens
    prefill/N                  one prompt of N tokens
    long/CACHE                 tokens after `--context` ones that are in a cache of that number; their keys and values
                               are random, and lie there without a prompt having been read

Packed models are written to a folder, all blocks from one random one, and loaded from there as any checkpoint; bf16 is
made in memory. What compiles (the loops quantkit-compiled and transformers-static) takes most of the time, about a
minute a case at 32 layers: `--layers 8` is for trying the script out, and `--only` for several calls, which add their
lines to one file.
"""

from __future__ import annotations

import argparse
import cProfile
import fnmatch
import gc
import json
import pstats
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from quantkit import api, formats, numerics, presets
from quantkit.checkpoint import DTYPES
from quantkit.runtime import attention, timing
from quantkit.runtime.generate import generate, make_cache
from quantkit.types import Scheme

VARIANTS: dict[str, str | None] = {
    "bf16": None,
    "w4a16": "W4A16",
    "fp8": "FP8_DYNAMIC",
    "mxfp4": "MXFP4A16",
    "nvfp4": "NVFP4A16",
}
CACHES = ("bf16", "fp8", "int8", "int4")
LONG_NEW = 32
OURS = ("quantkit", "quantkit-compiled")
COMPARED = ("bf16", "w4a16")  # variants that transformers' compiled loop runs too


@dataclass(frozen=True)
class Case:
    """One measurement. loop: of generate and eager; number: of a long context's cache."""

    variant: str
    group: str
    what: str
    batch: int = 1
    loop: str = ""
    number: str = ""

    @property
    def name(self) -> str:
        return "/".join(part for part in (self.variant, self.group, self.what) if part)


def cases(args: argparse.Namespace) -> list[Case]:
    """All cases, variant by variant, the most wanted first."""
    found = []
    for variant in VARIANTS:
        found.append(Case(variant, "load", ""))
        for loop in (*args.loops, "transformers-static"):
            if loop in args.loops or variant in COMPARED:
                found += [Case(variant, "generate", f"b{b}/{loop}", b, loop) for b in args.batches]
        found.append(Case(variant, "prefill", str(args.prefill)))
        found += [Case(variant, "eager", f"b{b}", b, "transformers") for b in args.eager]
        if variant == "w4a16":
            found += [Case(variant, "long", number, args.long_batch, number=number) for number in CACHES]
    return [case for case in found if not args.only or any(fnmatch.fnmatch(case.name, p) for p in args.only)]


def config_of(args: argparse.Namespace) -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // args.head_dim,
        num_key_value_heads=max(1, args.hidden // args.head_dim // 4),
        head_dim=args.head_dim,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )


def tensors_of(config: PretrainedConfig, scheme: Scheme, device: str) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Block by block, and first what is outside: a name for a file, and its tensors. Linears alike share theirs."""
    form, number = formats.get("compressed-tensors"), numerics.get(scheme.weights.number)
    scales = DTYPES[formats.scale_dtype(form, "BF16")]
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    packed: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        layer, _, leaf = name.rpartition(".")
        file = files.setdefault(next((part for part in name.split(".") if part.isdigit()), "outside"), {})
        if leaf == "weight" and name.endswith("_proj.weight"):
            shape = tuple(parameter.shape)
            if shape not in packed:
                w = torch.randn(shape, generator=generator, device=device).mul_(0.02)
                q = numerics.quantize(w, number.qparams(w, scheme.weights, scale_dtype=scales), scheme.weights)
                packed[shape] = {k: t.cpu() for k, t in form.pack(q, scheme.activations).items()}
            file |= {f"{layer}.{k}": t for k, t in packed[shape].items()}
        elif parameter.dim() == 1:
            file[name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
        else:
            file[name] = torch.randn(parameter.shape, generator=generator, device=device).mul_(0.02).bfloat16().cpu()
    yield from files.items()


def write(folder: Path, config: PretrainedConfig, scheme: Scheme, device: str) -> None:
    """A packed checkpoint with random weights, as `quantize` would have written it."""
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for part, tensors in tensors_of(config, scheme, device):
        file = f"model-{part}.safetensors"
        save_file({name: t.clone() for name, t in tensors.items()}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    layers = {name.rpartition(".")[0] for name in weight_map if name.endswith(("weight_packed", "weight_scale"))}
    schemes: dict[str, Scheme | None] = {**dict.fromkeys(sorted(layers), scheme), "lm_head": None}
    content = {**config.to_dict(), "quantization_config": formats.get("compressed-tensors").config(schemes)}
    (folder / "config.json").write_text(json.dumps(content, default=str), "utf-8")


def load(variant: str, args: argparse.Namespace, work: Path) -> tuple[Any, dict[str, Any]]:
    """A model on the device, and how long that took."""
    device, config, preset = torch.device(args.device), config_of(args), VARIANTS[variant]
    start = time.perf_counter()
    if preset is None:
        model = timing.random_dense(config, device)
        return model, {"made_seconds": time.perf_counter() - start}
    folder = work / variant
    write(folder, config, presets.PRESETS[preset], args.device)
    written = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = api.load(folder, dtype=torch.bfloat16, device_map=device).eval()
    timing.wait(device)
    found: dict[str, Any] = {"written_seconds": written, "load_seconds": time.perf_counter() - start}
    found["disk_bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if device.type == "cuda":
        found["load_peak_bytes"] = torch.cuda.max_memory_allocated()
    for file in folder.glob("*"):
        file.unlink()
    return model, found


def set_attention(model: Any, name: str) -> str:
    """Chooses the attention, and says which it is."""
    attention.register()
    if model.config._attn_implementation != name:
        model.set_attn_implementation(name)
    return str(model.config._attn_implementation)


def measure(case: Case, model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What one case gives; `load` is measured elsewhere."""
    ours = case.loop in OURS or case.group == "long"
    found: dict[str, Any] = {"attention": set_attention(model, args.attention if ours else "sdpa")}
    if case.group == "generate":
        speed = timing.generation(model, case.batch, args.prompt, args.new, loop=case.loop, runs=args.runs)
        return found | speed.to_dict()
    if case.group == "eager":
        speed = timing.generation(model, case.batch, args.eager_tokens, args.eager_tokens, loop=case.loop, runs=3)
        return found | speed.to_dict() | (profile(case, model, args) if args.profile else {})
    if case.group == "prefill":
        seconds = timing.prefill(model, 1, int(case.what), runs=args.runs)
        return found | {"seconds": seconds, "tokens_per_second": int(case.what) / seconds}
    return found | long_context(case, model, args)


def profile(case: Case, model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Prints the functions of `args.eager_tokens` tokens by their own time; counts operators and kernels of a token.

    Operators are those that torch's dispatcher sees, views among them; a kernel is a launch, a copy or a fill.
    """
    ids, device = timing.prompt_ids(model, case.batch, args.eager_tokens), torch.device(args.device)
    cpu, cuda = torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA
    recorded, seen = {}, cProfile.Profile()
    with timing.endless(model):
        for new in (1, 2):  # what two tokens have more than one is the second one's
            activities = [cpu, cuda] if device.type == "cuda" else [cpu]
            with torch.profiler.profile(activities=activities, acc_events=True) as recorder:
                timing.tokens_of(model, ids, new, case.loop)
                timing.wait(device)
            recorded[new] = recorder.key_averages()
        seen.enable()
        timing.tokens_of(model, ids, args.eager_tokens, case.loop)
        timing.wait(device)
        seen.disable()
    print(f"{case.name}: {args.eager_tokens} tokens, the prompt included")
    pstats.Stats(seen).sort_stats("tottime").print_stats(25)

    def count(new: int, on_gpu: bool) -> int:
        gpu = torch.autograd.DeviceType.CUDA
        return sum(e.count for e in recorded[new] if (e.device_type == gpu) == on_gpu and (on_gpu or "::" in e.key))

    return {"operators": count(2, False) - count(1, False), "kernels": count(2, True) - count(1, True)}


@torch.no_grad()
def long_context(case: Case, model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second after `--context` ones that are in the cache already."""
    config, device, batch = model.config, torch.device(args.device), case.batch
    slots = -(-(args.context + (args.runs + 2) * (LONG_NEW + 4)) // 256) * 256
    cache = make_cache(model, None if case.number == "bf16" else case.number, batch, slots, device)
    shape = (batch, config.num_key_value_heads, args.context, config.head_dim)
    generator = torch.Generator(device).manual_seed(0)
    for i in range(config.num_hidden_layers):
        k = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        cache.update(k, k, i)
    del k
    if hasattr(cache, "advance"):
        cache.advance(args.context)
    timing.wait(device)

    def tokens(new: int) -> None:
        generate(model, timing.prompt_ids(model, batch, int(cache.get_seq_length()) + 1), new, past_key_values=cache)

    with timing.endless(model):
        start = time.perf_counter()
        tokens(LONG_NEW)  # captures the graph
        compiled = time.perf_counter() - start
        seconds, runs = timing.median_seconds(lambda: tokens(LONG_NEW), device, args.runs)
        first, _ = timing.median_seconds(lambda: tokens(1), device, 2)
    model.__dict__.pop("_quantkit_decoder", None)
    rate = batch * (LONG_NEW - 1) / max(seconds - first, 1e-9)
    return {"context": args.context, "decode_tokens_per_second": rate, "runs": runs, "compiled": compiled}


def work_through(args: argparse.Namespace, work: Path) -> None:
    """All wanted cases within the budget, a line each."""
    start, wanted = time.monotonic(), cases(args)
    versions = api.versions() | ({"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {})
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def note(case: Case, found: dict[str, Any]) -> None:
        line = {"name": case.name, **vars(case), "layers": args.layers, **found, "versions": versions}
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")
        print(f"[{time.monotonic() - start:5.0f} s] {summary(line)}", flush=True)

    for variant in VARIANTS:
        own, model = [case for case in wanted if case.variant == variant], None
        for case in own:
            if time.monotonic() - start > args.budget:
                note(case, {"error": f"left out: {args.budget:.0f} seconds were over"})
                continue
            try:
                if model is None:
                    model, found = load(variant, args, work)
                    note(Case(variant, "load", ""), found | {"weights": timing.weight_bytes(model)})
                if case.group != "load":
                    note(case, measure(case, model, args))
            except Exception as e:
                note(case, {"error": f"{type(e).__name__}: {e}"})
                if model is None:
                    break
        del model
        gc.collect()
        if args.device == "cuda":
            torch._dynamo.reset()
            torch.cuda.empty_cache()


def summary(line: dict[str, Any]) -> str:
    """A result for a reader."""
    if "error" in line:
        return f"{line['name']}: {line['error']}"
    if line["group"] == "load":
        seconds = ", ".join(f"{key} {value:.1f}" for key, value in line.items() if key.endswith("_seconds"))
        return f"{line['name']}: {line['weights']['all'] / 2**30:.2f} GiB, {seconds}"
    parts = [f"{line[key]:.1f} {text}" for key, text in _RATES.items() if key in line]
    extra = f", first run {line['compiled']:.1f} s" if "compiled" in line else ""
    extra += f", {line['operators']} operators and {line['kernels']} kernels a token" if "kernels" in line else ""
    return f"{line['name']} ({line['attention']}): {', '.join(parts)}{extra}"


_RATES = {"tokens_per_second": "tok/s", "decode_tokens_per_second": "tok/s after the first"}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: every rate, and how many times that of bf16 in the same case; of generate, bf16 by transformers."""
    good = {line["name"]: line for line in lines if "error" not in line}
    rows = ["| case | tok/s | against bf16 | note |", "|---|---|---|---|"]
    for name, line in good.items():
        if line["group"] == "load":
            dense = good.get("bf16/load")
            ratio = f"{line['weights']['all'] / dense['weights']['all']:.3f}x bytes" if dense else ""
            rows.append(f"| {name} | | {ratio} | {line['weights']['all'] / 2**30:.2f} GiB |")
            continue
        key = "decode_tokens_per_second" if line["group"] == "long" else "tokens_per_second"
        what = {
            "generate": f"bf16/generate/b{line['batch']}/transformers-static",
            "long": f"{line['variant']}/long/bf16",
        }.get(line["group"], "bf16" + name[name.index("/") :])
        base = good.get(what)
        ratio = f"{line[key] / base[key]:.2f}x" if base else ""
        rows.append(f"| {name} | {line[key]:.1f} | {ratio} | {line['attention']} |")
    rows += [f"| {line['name']} | | | {line['error']} |" for line in lines if "error" in line]
    return "\n".join(rows)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("speed_generate.jsonl"), help="lines are added to this file")
    parser.add_argument("--read", type=Path, help="results of earlier runs: print their table")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="names of cases, as 'w4a16/generate/*'")
    parser.add_argument("--loops", nargs="*", choices=list(timing.LOOPS), default=list(OURS), help="that generate")
    parser.add_argument("--attention", default="quantkit", help="of quantkit's loops; transformers' have sdpa")
    for name, default in (
        ("layers", 32),
        ("hidden", 4096),
        ("intermediate", 14336),
        ("head-dim", 128),
        ("vocabulary", 128_256),
        ("prompt", 128),
        ("new", 128),
        ("prefill", 4096),
        ("eager-tokens", 16),
        ("context", 65_536),
        ("long-batch", 4),
        ("runs", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--eager", type=int, nargs="+", default=[1, 16, 64, 256], help="batches without compilation")
    parser.add_argument("--profile", action="store_true", help="print where eager cases spend the CPU's time")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, default=520, help="seconds after which no case begins")
    parser.add_argument("--work", type=Path, help="folder for packed models; a temporary one by default")
    return parser.parse_args(given)


def main() -> None:
    args = arguments()
    if args.list:
        print("\n".join(case.name for case in cases(args)))
    elif args.read:
        print(table([json.loads(line) for line in args.read.read_text("utf-8").splitlines()]))
    else:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            work_through(args, Path(folder))


if __name__ == "__main__":
    main()
