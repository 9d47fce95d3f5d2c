"""Which gate catches which fault: broken copies of good outputs, each measured with the default gates.

    python eval/faults.py --log build/faults.jsonl [--moe FOLDER_OF_docs-moe-27m] [--seeds 20] [--only PATTERN]

A fault is planted in a written checkpoint (tensors or config.json), as a bug in a packer, a loader or a fold would;
then `quantkit validate` runs as a user would run it. A fault in generation_config.json leaves every logit as it is, so
no figure of the text can move: those outputs are validated with a task too, and a gate for it. `--seeds` adds good
W8A16 outputs, each calibrated on other rows and measured on other windows, none of which may fail. Lines of the log
are not done again.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import accuracy
import quantkit
from accuracy_table import row
from quantkit import output
from quantkit.errors import QuantkitError
from quantkit.recipe import Recipe

LLAMA, WEIGHTS = "builtin:pydocs-llama-7m", "model.safetensors"
COMPLETION = ("pydocs_completion",)
RECOVERED = 0.9  # of each task's score: the gate of an output that is validated with tasks
UNDERSCORES = [66, 340]  # "_" and "__" in the embedded model's vocabulary
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Fault:
    """name, the scheme of the output that it is planted in, and what it does to tensors and config, in place.

    generation  what generation_config.json says besides
    tasks       that the output is validated with
    files       what it does to other files of the folder
    """

    name: str
    scheme: str
    plant: Callable[[Tensors, dict[str, Any]], None]
    moe: bool = False
    generation: dict[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    files: Callable[[Path], None] | None = None

    @property
    def key(self) -> str:
        """What a line of the log goes by."""
        return json.dumps([self.name, self.scheme, self.moe, *self.tasks])


def _nothing(_: Tensors, __: dict[str, Any]) -> None:
    pass


def _scales_of_the_group_before(t: Tensors, _: dict[str, Any]) -> None:
    name = "model.layers.3.mlp.down_proj.weight_scale"
    t[name] = t[name].roll(1, dims=1).contiguous()


def _zero_points_lost(t: Tensors, _: dict[str, Any]) -> None:
    for name in [n for n in t if n.endswith("layers.3.mlp.up_proj.weight_zero_point")]:
        t[name] = torch.full_like(t[name], 0x88888888 - 2**32)  # every nibble 8: the middle of the codes


def _nan_in_one_scale(t: Tensors, _: dict[str, Any]) -> None:
    t["model.layers.2.self_attn.o_proj.weight_scale"][5, 0] = float("nan")


def _rows_of_two_heads_swapped(t: Tensors, _: dict[str, Any]) -> None:
    for leaf in ("weight_packed", "weight_scale"):
        name = f"model.layers.4.self_attn.q_proj.{leaf}"
        half = len(t[name]) // 2
        t[name] = torch.cat([t[name][half:], t[name][:half]])


def _a_quantized_layer_ignored(_: Tensors, config: dict[str, Any]) -> None:
    config["quantization_config"]["ignore"].append("model.layers.1.mlp.gate_proj")


def _rare_tokens_swapped(t: Tensors, _: dict[str, Any]) -> None:
    """A quarter of the vocabulary, the rare end of it, answers for its neighbour: most text never shows it."""
    weight = t["model.embed_tokens.weight"]  # lm_head is the same
    rare = slice(len(weight) * 3 // 4, None)
    weight[rare] = weight[rare].roll(1, dims=0)


def _experts_swapped(t: Tensors, _: dict[str, Any]) -> None:
    names = [n for n in t if ".layers.3." in n and ".experts.0." in n]
    for name in names:
        other = name.replace(".experts.0.", ".experts.1.")
        t[name], t[other] = t[other], t[name]


def _router_left_out_of_a_fold(t: Tensors, _: dict[str, Any]) -> None:
    """The norm before the experts times s, the experts' scales divided by it a row's worth: the router sees s."""
    (norm,) = [n for n in t if ".layers.3." in n and n.endswith("post_attention_layernorm.weight")]
    (router,) = [n for n in t if ".layers.3." in n and n.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight"))]
    generator = torch.Generator().manual_seed(0)
    s = torch.exp(0.7 * torch.randn(len(t[norm]), generator=generator)).to(t[norm].dtype)
    t[router] = (t[router].float() * s.float()).to(t[router].dtype)


def _a_bos(folder: Path) -> None:
    """Every text begins with <|endoftext|>, as tokenizers of Llama do and this one does not."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = [{"Sequence": {"id": x, "type_id": 0}} for x in "AB"]
    known = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    template = {"type": "TemplateProcessing", "single": [bos, text[0]], "pair": [bos, *text], "special_tokens": known}
    file.write_text(json.dumps({**content, "post_processor": template}), "utf-8")


def _a_template_twice(folder: Path) -> None:
    """The whole chat, as a message of a chat."""
    file = folder / "chat_template.jinja"
    once = file.read_text("utf-8")
    file.write_text("<|im_start|>user\n" + once + "<|im_end|>\n<|im_start|>assistant\n", "utf-8")


FAULTS = (
    Fault("none", "W8A16", _nothing),
    Fault("none", "W4A16", _nothing),
    Fault("none", "W4A16_ASYM", _nothing),
    Fault("scales of one layer off by one group", "W8A16", _scales_of_the_group_before),
    Fault("scales of one layer off by one group", "W4A16", _scales_of_the_group_before),
    Fault("zero points of one layer lost", "W4A16_ASYM", _zero_points_lost),
    Fault("NaN in one scale", "W8A16", _nan_in_one_scale),
    Fault("halves of one q_proj swapped", "W8A16", _rows_of_two_heads_swapped),
    Fault("config ignores a quantized layer", "W8A16", _a_quantized_layer_ignored),
    Fault("rare tokens swapped", "W8A16", _rare_tokens_swapped),
    Fault("a BOS that the original does not add", "W8A16", _nothing, files=_a_bos),
    Fault("a chat template applied twice", "W8A16", _nothing, files=_a_template_twice),
    Fault("none", "W8A16", _nothing, tasks=COMPLETION),
    Fault(
        "generation config: a penalty on repetition",
        "W8A16",
        _nothing,
        generation={"repetition_penalty": 1.3},
        tasks=COMPLETION,
    ),
    Fault(
        "generation config: a wrong end of text",
        "W8A16",
        _nothing,
        generation={"eos_token_id": [0, *UNDERSCORES]},
        tasks=COMPLETION,
    ),
    Fault("none", "W8A16", _nothing, moe=True),
    Fault("two experts of one layer swapped", "W8A16", _experts_swapped, moe=True),
    Fault("a fold that left the router out", "W8A16", _router_left_out_of_a_fold, moe=True),
)


def made(scheme: str, model: str, out: Path, **changes: Any) -> Path:
    """A good output with the default gates in its recipe."""
    recipe = {"model": model, "scheme": scheme, "method": "rtn", "export": {"engines": ["transformers"]}, **changes}
    return quantkit.quantize(recipe, out=out).out


def broken(good: Path, fault: Fault, into: Path) -> Path:
    """A copy with the fault."""
    shutil.copytree(good, into)
    tensors, config = load_file(good / WEIGHTS), json.loads((good / "config.json").read_text())
    fault.plant(tensors, config)
    save_file({name: t.contiguous() for name, t in tensors.items()}, into / WEIGHTS, metadata={"format": "pt"})
    (into / "config.json").write_text(json.dumps(config))
    generation = json.loads((good / "generation_config.json").read_text())
    (into / "generation_config.json").write_text(json.dumps({**generation, **fault.generation}))
    if fault.files is not None:
        fault.files(into)
    return into


def gates(folder: Path) -> dict[str, Any]:
    """The default gates of an output, and one for each task."""
    validation = Recipe.load(folder / output.RECIPE).validation
    assert validation is not None
    return {**validation.gates.model_dump(exclude_none=True), "recovery": RECOVERED}


def judged(folder: Path, tasks: Sequence[str] = (), *, limit: int | None = None, **measured: Any) -> dict[str, Any]:
    """What `quantkit validate` says of a folder. limit: items of each task; measured: as api.validate takes it."""
    if tasks:
        measured |= {"tasks": {"names": list(tasks), "limit": limit}, "gates": gates(folder)}
    try:
        found = quantkit.validate(folder, **measured)
    except QuantkitError as e:
        return {"caught": True, "by": type(e).__name__, "kl": None, "ratio": None, "said": str(e)[:200]}
    return _said(found)


def _said(found: Any) -> dict[str, Any]:
    """A line of the log from a validation."""
    missed = [f"{g.name} ({g.outcome})" for g in found.gates if not g.passed]
    return {
        "caught": bool(missed),
        "by": ", ".join(missed),
        "kl": found.comparison.kl,
        "ratio": found.comparison.perplexity_ratio,
        "recovery": [task.recovery.value for task in found.tasks],
        "said": "",
    }


def seeded(seed: int, scratch: Path) -> dict[str, Any]:
    """A good W8A16 output by GPTQ of its own calibration rows, on its own windows."""
    texts = []
    for part in ("calibration", "heldout"):
        documents = accuracy.documents(accuracy.TEXTS / f"pydocs-{part}.jsonl")
        random.Random(seed).shuffle(documents)
        file = scratch / f"{part}-{seed}.jsonl"
        kept = documents if part == "calibration" else documents[: len(documents) * 2 // 3]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in kept))
        texts.append(str(file))
    recipe = {
        "model": LLAMA,
        "scheme": "W8A16",
        "method": "gptq",
        "calibration": {"data": texts[0], "samples": 16, "length": 512},
        "validate": {"perplexity": {"data": texts[1]}, "generation": {"prompts": 0}},
        "export": {"engines": ["transformers"]},
    }
    result = quantkit.quantize(recipe, out=scratch / f"seed-{seed}")
    assert result.validation is not None
    return _said(result.validation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True, help="lines of JSON, one a fault")
    parser.add_argument("--moe", type=Path, help="folder of docs-moe-27m; without it its faults are left out")
    parser.add_argument("--seeds", type=int, default=0, help="good outputs to look for false alarms in")
    parser.add_argument("--only", default="*", help="a pattern of faults' names")
    args = parser.parse_args()
    args.log.parent.mkdir(parents=True, exist_ok=True)
    done = accuracy.read_log(args.log)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for i, fault in enumerate(FAULTS):
            if (fault.moe and args.moe is None) or not fnmatch.fnmatchcase(fault.name, args.only):
                continue
            key = fault.key
            if key not in done:
                model = str(args.moe) if fault.moe else LLAMA
                good = scratch / f"{fault.scheme}-{fault.moe}"
                if not good.exists():
                    made(fault.scheme, model, good)
                done[key] = {"key": key, **judged(broken(good, fault, scratch / f"fault-{i}"), fault.tasks)}
                accuracy.append(args.log, done[key])
            where = ", ".join([fault.scheme, *(["experts"] if fault.moe else []), *fault.tasks])
            rows.append({"name": fault.name, "where": where, **done[key]})
        for seed in range(args.seeds):
            key = json.dumps(["seed", seed])
            if key not in done:
                done[key] = {"key": key, **seeded(seed, scratch)}
                accuracy.append(args.log, done[key])
            rows.append({"name": f"none, seed {seed}", "where": "W8A16", **done[key]})
    print(row(["fault", "output", "caught", "by", "KL", "perplexity ratio", "task"]), row(["---"] * 7), sep="\n")
    for r in rows:
        figures = ["", ""] if r["kl"] is None else [f"{r['kl']:.4f}", f"{r['ratio']:.4f}"]
        figures.append(", ".join(f"{x:.1%}" for x in r.get("recovery") or ()))
        print(row([r["name"], r["where"], "yes" if r["caught"] else "no", r["by"] or r["said"], *figures]))


if __name__ == "__main__":
    main()
