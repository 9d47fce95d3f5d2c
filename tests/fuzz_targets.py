"""What is damaged, and who reads it: each target damages a folder or a text, and calls quantkit as a user would."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import packed_models
import tiny
from fuzz_mutations import PATHS, Mutator
from test_runtime_experts import gpt_oss

from quantkit import comparison, formats, hub, inspection, lint, output, packed, skeleton, strict_yaml
from quantkit import convert as converting
from quantkit import plan as planning
from quantkit.checkpoint import INDEX, SINGLE, Checkpoint
from quantkit.errors import QuantkitError
from quantkit.presets import PRESETS
from quantkit.recipe import Recipe
from quantkit.runtime import planning as holding
from quantkit.runtime import plugin
from quantkit.types import Scheme, TensorScheme

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SMALL: dict[str, Any] = {**packed_models.DIMS, "vocab_size": 64}
CANARY = b"canary: no reader of a model folder may see this"
ASYMMETRIC = Scheme(TensorScheme("int4", "group", 128, symmetric=False))
PACKED: dict[str, tuple[str, Scheme]] = {
    "ct-w4": ("compressed-tensors", PRESETS["W4A16"]),
    "ct-w8a8": ("compressed-tensors", PRESETS["W8A8"]),
    "ct-channel": ("compressed-tensors", Scheme(TensorScheme("int4", "channel"))),
    "ct-nvfp4": ("compressed-tensors", PRESETS["NVFP4"]),
    "ct-fp8": ("compressed-tensors", PRESETS["FP8_DYNAMIC"]),
    "gptq": ("gptq", PRESETS["W4A16"]),
    "gptq-asymmetric": ("gptq", ASYMMETRIC),
    "awq": ("awq", ASYMMETRIC),
    "fp8-block": ("fp8-block", PRESETS["FP8_BLOCK"]),
    "modelopt-nvfp4": ("modelopt", Scheme(TensorScheme("nvfp4", "group", 16))),
    "modelopt-awq": ("modelopt", PRESETS["W4A16"]),
}


@dataclass
class Bed:
    """A folder to break, and what it held before. `changed` writes files and puts them back."""

    folder: Path
    files: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Bed:
        return cls(folder, {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()})

    def json(self, name: str) -> Any:
        return json.loads(self.files[name])

    @contextmanager
    def changed(self, files: dict[str, bytes]) -> Iterator[Path]:
        try:
            for name, data in files.items():
                (self.folder / name).write_bytes(data)
            yield self.folder
        finally:
            for name in files:
                if name in self.files:
                    (self.folder / name).write_bytes(self.files[name])
                else:
                    (self.folder / name).unlink(missing_ok=True)


class Beds:
    """The folders, made once. root/outside holds what nothing may read or write."""

    def __init__(self, root: Path) -> None:
        self.root, self.outside, self.elsewhere = root, root / "outside", root / "elsewhere"
        self.outside.mkdir(parents=True)
        self.elsewhere.mkdir()
        (self.outside / "canary.txt").write_bytes(CANARY)
        self.dense = self._made("dense", lambda f: tiny.save(f, "llama", **SMALL))
        self.dense_gpt2 = self._made("qwen2", lambda f: tiny.save(f, "qwen2", **SMALL))
        self.sharded = self._made(
            "sharded", lambda f: packed_models.save(f, *PACKED["ct-w4"], model=SMALL, shard="50KB")
        )
        self.packed = {
            name: self._made(name, functools.partial(_packed, form=form, scheme=scheme))
            for name, (form, scheme) in PACKED.items()
        }
        self.packed["gpt-oss"] = self._made("gpt-oss", gpt_oss)
        for place in (self.outside, self.elsewhere):
            shutil.copyfile(self.dense.folder / SINGLE, place / "canary.safetensors")

    def _made(self, name: str, make: Callable[[Path], Any]) -> Bed:
        folder = self.root / "beds" / name
        make(folder)
        for file in tiny.TOKENIZER_FILES:  # large, and read by nobody here
            (folder / file).unlink(missing_ok=True)
        return Bed.of(folder)


def _packed(folder: Path, form: str, scheme: Scheme) -> None:
    packed_models.save(folder, form, scheme, model=SMALL)


def _some(m: Mutator, beds: Beds) -> Bed:
    return m.random.choice(list(beds.packed.values()))


def _broken(m: Mutator, bed: Bed) -> dict[str, bytes]:
    """One file of a packed folder, or two, damaged."""
    files: dict[str, bytes] = {}
    for _ in range(m.random.choice((1, 1, 1, 2))):
        name = m.random.choice([n for n in bed.files if n.endswith((".json", ".safetensors"))] + ["config.json"] * 3)
        if name.endswith(".safetensors"):
            files[name] = m.safetensors(bed.files[name])
        elif name == "config.json" and m.random.random() < 0.7:
            content = bed.json(name)
            content["quantization_config"] = m.tree(content["quantization_config"])
            files[name] = json.dumps(content).encode()
        else:
            files[name] = m.json(bed.json(name))
    if m.random.random() < 0.1:
        name = m.random.choice([*formats.CONFIG_FILES])
        files[name] = m.json(m.random.choice(list(_configs())))
    return files


@functools.cache
def _configs() -> tuple[dict[str, Any], ...]:
    """A quantization_config of each format, and what else tools write."""
    found = [formats.get(form).config({"a.b": scheme, "lm_head": None}) for form, scheme in PACKED.values()]
    modelopt = formats.get("modelopt").files({"a.b": PRESETS["W4A16"], "lm_head": None})["hf_quant_config.json"]
    layers = {"a.b": {"quant_algo": "FP8"}, "a.c": {"quant_algo": "NVFP4", "group_size": 16}}
    mixed = {
        "quantization": {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8", "quantized_layers": layers}
    }
    dynamic = {"+:.*a": {"bits": 8, "group_size": 32}, "-:.*b": {}}
    meta = {"quantizer": ["gptqmodel:1.9.0"]}
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "dynamic": dynamic, "meta": meta}
    optimum = {**gptq, "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]], "desc_act": True}
    kv = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    groups = {"quantization_status": "compressed", "config_groups": {"W4A16": ["Linear"]}, "format": "pack-quantized"}
    old = {"quant_method": "compressed-tensors", **groups, "kv_cache_scheme": kv, "ignore": ["re:.*head"]}
    return (*found, modelopt, mixed, gptq, optimum, old, {"quant_method": "mxfp4", "modules_to_not_convert": ["a"]})


# The targets ---------------------------------------------------------------------------------------------------------


def header(m: Mutator, beds: Beds) -> None:
    """A safetensors file: opened, every tensor read, fingerprinted."""
    bed = m.random.choice((beds.dense, _some(m, beds)))
    with bed.changed({SINGLE: m.safetensors(bed.files[SINGLE])}) as folder:
        hub.Source("x", folder).fingerprint()
        checkpoint = Checkpoint.open(folder)
        checkpoint.size()
        for name in checkpoint.specs:
            with suppress(QuantkitError):
                checkpoint.read_finite(name)


def index(m: Mutator, beds: Beds) -> None:
    """The index of a checkpoint in shards."""
    bed = beds.sharded
    content = bed.json(INDEX)
    if m.random.random() < 0.3:
        tensor = m.random.choice(list(content["weight_map"]))
        content["weight_map"][tensor] = m.random.choice(PATHS)
        data = json.dumps(content).encode("utf-8", "surrogatepass")
    else:
        data = m.json(content)
    with bed.changed({INDEX: data}) as folder:
        checkpoint = Checkpoint.open(folder)
        for name in list(checkpoint.specs)[:3]:
            checkpoint.read(name)
        assert all(file.parent == folder for file in checkpoint.where.values())


def quantization(m: Mutator, beds: Beds) -> None:
    """A quantization_config, as each reader takes it: what it says of layers, in bounded time."""
    content = m.tree(m.random.choice(_configs()))
    if not isinstance(content, dict):
        return
    found = formats.quantization_config({"quantization_config": content})
    if found is None:
        return
    method = str(found.get("quant_method", m.random.choice(("gptq", "modelopt"))))
    read = formats.by_method(method).read_config(found)
    for name in (
        "model.layers.0.self_attn.q_proj",
        "model.layers.11.mlp.experts.3.down_proj",
        "lm_head",
        "",
        "x" * 300,
    ):
        read.scheme_for(name)


def open_packed(m: Mutator, beds: Beds) -> None:
    """A packed folder: opened, each layer unpacked, a conversion planned."""
    bed = _some(m, beds)
    with bed.changed(_broken(m, bed)) as folder:
        found = packed.open_folder(folder)
        for name in found.layers:
            with suppress(QuantkitError):
                found.unpack(name)
        converting.make(folder, m.random.choice(("dense", *formats.names())))


def convert(m: Mutator, beds: Beds) -> None:
    """A conversion from end to end: what is left is a whole folder, or nothing."""
    bed, out = _some(m, beds), beds.root / "out"
    with bed.changed(_broken(m, bed)) as folder:
        try:
            converting.convert(folder, m.random.choice(("dense", "gptq", "compressed-tensors")), out, overwrite=True)
            Checkpoint.open(out)
        finally:
            left = [p for p in beds.root.iterdir() if p.name not in ("outside", "elsewhere", "beds", "out", "links")]
            shutil.rmtree(out, ignore_errors=True)
            assert not left, f"left behind: {left}"


def inspect(m: Mutator, beds: Beds) -> None:
    """`quantkit inspect`, of dense and packed folders, with a damaged quantkit.json at times."""
    bed = m.random.choice((beds.dense, beds.dense_gpt2, _some(m, beds), _some(m, beds)))
    files = (
        {"config.json": m.json(bed.json("config.json"))} if "quantization_config" not in bed.json("config.json") else {}
    )
    files = files or _broken(m, bed)
    if m.random.random() < 0.3:
        files = {output.SUMMARY: m.json(_summary())}
    with bed.changed(files) as folder:
        from quantkit import report

        found = inspection.inspect(str(folder))
        report.print_inspect(found)


def linted(m: Mutator, beds: Beds) -> None:
    """`quantkit lint`, for every engine."""
    bed = m.random.choice((beds.sharded, _some(m, beds)))
    with bed.changed(_broken(m, bed)) as folder:
        found = lint.folder(folder, tp=m.random.choice((1, 2, 3)))
        lint.section(folder, found, lint.names())


def config(m: Mutator, beds: Beds) -> None:
    """config.json of a model to quantize: resolved, built without weights, planned."""
    bed = m.random.choice((beds.dense, beds.dense_gpt2))
    with bed.changed({"config.json": m.json(bed.json("config.json"))}) as folder:
        hub.resolve(str(folder))
        recipe = {"model": str(folder), "scheme": "W4A16", "method": "rtn", "validate": "none"}
        planning.make(Recipe.from_any(recipe))


def held(m: Mutator, beds: Beds) -> None:
    """What the transformers plugin decides while a model is loaded: from its config and headers."""
    bed = _some(m, beds)
    with bed.changed(_broken(m, bed)) as folder:
        plugin._beside(_Config(str(folder)))
        content = packed.find_config(folder, hub.read_json(folder / "config.json"))
        if content is None:
            return
        form = formats.by_method(str(content.get("quant_method")))
        read = form.read_config(content)
        if read.unsupported is not None:
            return
        checkpoint = Checkpoint.open(folder)
        model = skeleton.unquantized(folder, checkpoint)
        files = sorted({str(file) for file in checkpoint.where.values()})
        try:
            found = holding.plan(model, form, read, files)
            holding.caches(model, form, read, files)
        except holding.NotHeld:
            return
        for name, one in list(found.linears.items())[:2]:
            one.specs()
            layer = name
            parts = packed.groups(form, checkpoint.specs)[layer]
            one.pack({leaf: checkpoint.read(packed.tensor_name(layer, leaf)) for leaf in parts})


class _Config:
    def __init__(self, folder: str) -> None:
        self._name_or_path = folder


def recipe(m: Mutator, beds: Beds) -> None:
    """A recipe in YAML: read, written, read again, asked about layers."""
    text = m.random.choice(_recipes())
    if m.random.random() < 0.5:
        found = Recipe.parse(strict_yaml.dump(m.tree(strict_yaml.parse(text, "x").data)))
    else:
        found = Recipe.parse(m.blob(text.encode()).decode("utf-8", "replace"), overrides=_sets(m))
    again = Recipe.parse(found.to_yaml())
    assert again == found
    if found.scheme.auto is None:
        found.assign(["model.layers.0.self_attn.q_proj", "lm_head", "x" * 200])


def _sets(m: Mutator) -> list[str]:
    keys = (
        "scheme",
        "rules.0.match",
        "export.shard_size",
        "validate.gates.kl",
        "calibration.samples",
        "a.b.c",
        "rules.0",
    )
    return [f"{m.random.choice(keys)}={m.value()}"] if m.random.random() < 0.3 else []


def mapping(m: Mutator, beds: Beds) -> None:
    """A recipe from Python."""
    found = Recipe.from_any(m.tree(strict_yaml.parse(m.random.choice(_recipes()), "x").data))
    if found.scheme.auto is None:
        found.assign(["model.layers.0.self_attn.q_proj", "lm_head"])


@functools.cache
def _recipes() -> tuple[str, ...]:
    own = (
        "model: builtin:pydocs-llama-7m\n"
        "scheme: {weights: {number: int4, group_size: 64}, activations: {number: int8}}\n"
        'rules: [{match: "re:.*a$", scheme: none}, {match: "*b", scheme: {preset: W4A16, group_size: 32}}]\n'
        "kv_cache: {strategy: head}\nexport: {shard_size: 4GiB, engines: [vllm]}\n"
        "validate: {gates: {kl: {limit: 0.1, level: 0.9}}, repair: {size: 1.1}}\n"
        "transforms: [{awq: {}}, smoothquant]\n",
        "model: x\nscheme: {auto: {bits: 4.25, candidates: [W3A16, W4A16, none]}}\neffort: best\n",
    )
    return (*own, *(p.read_text("utf-8") for p in sorted(RECIPES.glob("*.yaml"))))


YAML = (
    *("!!timestamp x", "!!int ''", "!!int x", "!!float ''", "!!bool maybe", "!!binary x", "!!python/name:os.system x"),
    *("a: &x 1\nb: *x", "<<: {a: 1}", "? [a]\n: b", "0x" + "f" * 6000, "1" + ":59" * 3000, "9" * 5000, "2024-13-40"),
    *(
        "[" * 300,
        "[" * 30000,
        "{a: " * 20000,
        "- " * 20000,
        "a:\n" * 3,
        "\0",
        "\ud800",
        "a: |\n  x\n y",
        "%YAML 9.9\n---\n",
    ),
    *(
        "--- a\n--- b",
        "!a b",
        "! x",
        "!!set {a}",
        "!!omap [a: 1]",
        "!!pairs [a: 1]",
        "!<tag:yaml.org,2002:null> x",
        "=",
        "...",
    ),
)


def yaml(m: Mutator, beds: Beds) -> None:
    """YAML that is hardly a recipe."""
    text = m.random.choice(YAML)
    if m.random.random() < 0.8:
        key = m.random.choice(("", "model: ", "a: ", "- ", "scheme: {weights: "))
        text = key + text + m.random.choice(("", "\n", " # x", "}", "\nb: 1"))
    if m.random.random() < 0.5:
        text = m.blob(text.encode("utf-8", "surrogatepass"), 2).decode("utf-8", "replace")
    Recipe.parse(text)


def strings(m: Mutator, beds: Beds) -> None:
    """What a recipe or a command calls a model."""
    r = m.random
    name = r.choice((*PATHS, "org/name@main", "builtin:pydocs-llama-7m", "org/name", str(beds.dense.folder)))
    if r.random() < 0.8:
        name = m.blob(name.encode("utf-8", "surrogatepass"), 2).decode("utf-8", "replace")
    hub.resolve(name)


def links(m: Mutator, beds: Beds) -> None:
    """A folder with links, pipes and odd names: what is copied comes from inside."""
    r, folder, out = m.random, beds.root / "links" / "model", beds.root / "links" / "out"
    for place in (folder, out):
        place.mkdir(parents=True)
    try:
        (folder / "config.json").write_bytes(beds.dense.files["config.json"])
        (folder / SINGLE).write_bytes(beds.dense.files[SINGLE])
        for _ in range(r.randint(1, 3)):
            name = r.choice(
                ("LICENSE", "tokenizer.json", "a.safetensors", "quant_config.json", "sub", INDEX, "chat.jinja")
            )
            target = beds.outside / r.choice(("canary.txt", ".", "nothing", ".."))
            if name.endswith((".safetensors", ".index.json")):  # weights may be links
                target = beds.elsewhere / r.choice(("canary.safetensors", "nothing"))
            (folder / name).unlink(missing_ok=True)
            match r.randrange(4):
                case 0:
                    os.mkfifo(folder / name)
                case 1:
                    (folder / name).symlink_to(name)
                case 2:
                    (folder / name).symlink_to(os.path.relpath(target, folder))
                case _:
                    (folder / name).symlink_to(target)
        checkpoint = Checkpoint.open(folder)
        hub.Source("x", folder).fingerprint()
        output.copy_files(folder, out, set(checkpoint.where.values()))
    finally:
        copies = [p for p in out.rglob("*") if p.is_file() and CANARY in p.read_bytes()]
        shutil.rmtree(beds.root / "links")
        assert not copies, f"copied from outside: {copies}"


def summary(m: Mutator, beds: Beds) -> None:
    """quantkit.json, which inspect, compare and convert read."""
    bed = beds.packed["ct-w4"]
    with bed.changed({output.SUMMARY: m.json(_summary())}) as folder:
        with suppress(QuantkitError):
            comparison.report(comparison.read([folder]))
        plan = converting.make(folder, "gptq")
        converting._summary(plan, converting._history(plan), {})


@functools.cache
def _summary() -> dict[str, Any]:
    settings = {"model": "builtin:pydocs-llama-7m", "scheme": "W4A16", "method": "rtn"}
    measured: dict[str, Any] = dict.fromkeys(("kl", "kl_stderr", "perplexity", "top1_agreement"), 1.0)
    measured |= {"perplexity_original": 1.0, "perplexity_ratio": 1.0, "windows": 4, "tokens": 1024}
    layer = {"name": "model.layers.0.self_attn.q_proj", "relative_error": 0.1, "bits_per_weight": 4.1, "mark": 0.5}
    return {
        "status": "passed",
        "source": {"model": "x", "revision": None, "fingerprint": "0" * 64},
        "recipe": Recipe.from_any(settings).to_dict(),
        "layers": [layer],
        "size": {"source_bytes": 2, "output_bytes": 1},
        "files": {"weights": ["model.safetensors"], "copied": []},
        "allocation": {"auto": {"bits": 4.25}},
        "validation": {"status": "passed", "comparison": measured, "flips": {"rate": {"value": 0.1}}, "tasks": {}},
    }


# name -> (target, its share of the cases, of 199): the fast ones have more
TARGETS: dict[str, tuple[Callable[[Mutator, Beds], None], int]] = {
    "header": (header, 60),
    "index": (index, 40),
    "quantization": (quantization, 44),
    "yaml": (yaml, 8),
    "strings": (strings, 16),
    "recipe": (recipe, 6),
    "mapping": (mapping, 6),
    "summary": (summary, 4),
    "open_packed": (open_packed, 6),
    "links": (links, 4),
    "inspect": (inspect, 1),
    "lint": (linted, 1),
    "config": (config, 1),
    "held": (held, 1),
    "convert": (convert, 1),
}
