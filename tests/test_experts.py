"""Mixtures of experts: taken apart they compute the same, their statistics are shrunk, their outputs load."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from compressed_tensors.quantization import QuantizationScheme
from library_layers import library_decompress
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

import quantkit
from quantkit import blocks, convert, experts, inspection, lint, loading, numerics, observation, skeleton
from quantkit import plan as planning
from quantkit.algorithms import gptq, rtn
from quantkit.apart import take_apart
from quantkit.checkpoint import Checkpoint
from quantkit.errors import InputError
from quantkit.experts import Experts, coverage, routers, shrink
from quantkit.progress import Silent
from quantkit.recipe import Recipe
from quantkit.stats import Observer
from quantkit.types import Notes, Stats, TensorScheme

torch.set_num_threads(1)

IDS = torch.randint(4, 4096, (2, 24), generator=torch.Generator().manual_seed(0))
INT4 = {"weights": {"number": "int4", "strategy": "group", "group_size": 16}}
TRAINED = Path(__file__).resolve().parents[2] / "shared" / "models" / "docs-moe-27m"


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def open_model(folder: Path) -> tuple[skeleton.Skeleton, blocks.Structure]:
    ghost = skeleton.build(folder, Checkpoint.open(folder))
    return ghost, blocks.find(ghost)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"model": str(folder), "scheme": INT4, "method": "rtn", "validate": "none", **changes}


# Taking apart --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.MIXTURES)
def test_a_mixture_taken_apart_computes_what_transformers_does(kind: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / kind, kind)
    ghost, structure = open_model(folder)
    assert all(p.is_meta for p in ghost.model.parameters()) and structure.warnings == () and ghost.unknown == []
    assert sorted(ghost.to_disk.values()) == sorted(ghost.checkpoint.specs)
    assert all(isinstance(ghost.model.get_submodule(n), nn.Linear) for b in structure.blocks for n in b.linears)
    ghost.load(ghost.to_disk, "cpu", torch.float64)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    assert (logits(ghost.model) - logits(stock)).abs().max() < 1e-9
    mixtures = {name: m for name, m in ghost.model.named_modules() if isinstance(m, Experts)}
    assert mixtures.keys() == {name for name, m in stock.named_modules() if experts.is_fused(m)}
    x = randn(40, 64)
    for name, mixture in mixtures.items():
        index = randn(40, mixture.num_experts).topk(2).indices
        weights = randn(40, 2, seed=1).float()  # routers hand over float32
        with torch.no_grad():
            expected = stock.get_submodule(name)(x, index, weights)
            assert (mixture(x, index, weights) - expected).abs().max() < 1e-6


def test_names_order_and_shared_inputs(tmp_path: Path) -> None:
    ghost, structure = open_model(tiny.save(tmp_path / "m", "mixtral"))
    below = "model.layers.1.mlp.experts."
    groups = [g for g in structure.blocks[1].groups if g[0].startswith(below)]
    assert groups == [g for e in range(6) for g in ((f"{below}{e}.w1", f"{below}{e}.w3"), (f"{below}{e}.w2",))]
    disk = ghost.to_disk[f"{below}3.w1.weight"]
    assert disk == "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    mixture = ghost.model.get_submodule(below[:-1])
    assert (mixture.ups, mixture.down, mixture.width) == (("w1", "w3"), "w2", 64)
    assert mixture.number("4.w3") == 4 and mixture.reads_hidden("4.w3") and not mixture.reads_hidden("4.w2")
    _, structure = open_model(tiny.save(tmp_path / "d", "deepseek"))
    leaves = [[n.removeprefix("model.layers.1.") for n in g] for g in structure.blocks[1].groups]
    assert leaves[0] == ["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"]
    assert ["mlp.experts.7.gate_proj", "mlp.experts.7.up_proj"] in leaves
    assert ["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"] in leaves


def test_experts_without_a_gate() -> None:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    config: dict[str, Any] = {
        "n_routed_experts": 4,
        "hidden_size": 16,
        "moe_intermediate_size": 24,
        "moe_latent_size": None,
    }
    config |= {"mlp_hidden_act": "relu2", "_experts_implementation": "eager"}
    fused = NemotronHExperts(SimpleNamespace(**config)).double()
    with torch.no_grad():
        for i, p in enumerate((fused.up_proj, fused.down_proj)):
            p.copy_(randn(*p.shape, seed=i))
    x, index, weights = randn(10, 16), randn(10, 4).topk(2).indices, randn(10, 2, seed=1)
    up, down, expected = fused.up_proj, fused.down_proj, fused(x, index, weights)
    apart = Experts(fused, ("up_proj",), "down_proj")
    for e in range(4):
        apart.get_submodule(f"{e}.up_proj").weight = nn.Parameter(up[e])
        apart.get_submodule(f"{e}.down_proj").weight = nn.Parameter(down[e])
    assert torch.allclose(apart(x, index, weights), expected, atol=1e-12)
    assert apart.reads_hidden("0.up_proj") and not list(fused.parameters())


def test_an_observer_learns_which_tokens_reach_an_expert(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m", "qwen3-moe")
    ghost, structure = open_model(folder)
    ghost.load(ghost.to_disk, "cpu", torch.float32)
    name = "model.layers.0.mlp.experts"
    mixture = ghost.model.get_submodule(name)
    seen: dict[str, list[tuple[torch.Tensor, Any]]] = {}
    linears = [n for n in structure.blocks[0].linears if n.startswith(name)]

    def see(linear: str, x: torch.Tensor) -> None:
        below = linear.removeprefix(name + ".")
        seen.setdefault(below, []).append((x, mixture.routed(mixture.number(below)) if below[0].isdigit() else None))

    with torch.no_grad(), blocks.watched(ghost.model, [name, *linears], see):
        ghost.model(IDS)
    ((hidden, _),) = seen.pop(name)
    assert hidden.shape == (48, 64)
    reached = {}
    for below, ((x, tokens),) in seen.items():
        reached[mixture.number(below)] = tokens
        if mixture.reads_hidden(below):
            assert torch.equal(x, hidden[tokens])
        else:
            assert torch.allclose(x, mixture.intermediate(mixture.number(below), hidden[tokens]), atol=1e-6)
    assert sum(len(tokens) for tokens in reached.values()) == 48 * 2  # two experts a token
    assert all(bool((tokens.diff() > 0).all()) for tokens in reached.values())
    for e in set(range(6)) - reached.keys():
        assert not len(mixture.routed(e))
    with blocks.watched(ghost.model, linears, lambda linear, x: pytest.fail(linear)):
        mixture.intermediate(0, hidden)


def test_an_expert_without_tokens_is_not_run(tmp_path: Path) -> None:
    ghost, _ = open_model(tiny.save(tmp_path / "m", "qwen3-moe"))
    ghost.load(ghost.to_disk, "cpu", torch.float64)
    mixture = ghost.model.get_submodule("model.layers.0.mlp.experts")
    seen: list[str] = []
    with blocks.watched(mixture, [f"{e}.up_proj" for e in range(6)], lambda name, _: seen.append(name)):
        out = mixture(randn(5, 64), torch.full((5, 1), 4), torch.ones(5, 1).double())
    assert seen == ["4.up_proj"] and [len(mixture.routed(e)) for e in range(6)] == [0, 0, 0, 0, 5, 0]
    with torch.no_grad():
        down = mixture.get_submodule("4.down_proj")
        assert torch.allclose(out, down(mixture.intermediate(4, randn(5, 64))), atol=1e-12)


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_checkpoints_that_do_not_fit_or_are_fused_are_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "few", "mixtral")
    change_config(folder, num_local_experts=5)
    with pytest.raises(InputError, match=r"experts\.5\.w\d\.weight' is one of expert 5, but config.json makes 5 exp"):
        open_model(folder)
    folder = tiny.save(tmp_path / "holes", "mixtral")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.block_sparse_moe.experts.3.w2.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 tensors of the model are in no shard, 'model.layers.0.mlp.experts.3.w2"):
        open_model(folder)
    tiny.save(tmp_path / "whole", "qwen3-moe")
    ghost, _ = open_model(tmp_path / "whole")
    lost = [key for key in ghost.checkpoint.specs if "layers.1" not in key or "down_proj" not in key]
    model = skeleton.empty(AutoConfig.from_pretrained(tmp_path / "whole"), tmp_path)
    with pytest.raises(InputError, match=r"layers.1.mlp.experts: no tensor on disk holds the down_proj"):
        take_apart(model, {key: ghost.checkpoint.specs[key] for key in lost})


@pytest.mark.parametrize(
    ("attribute", "value", "says"),
    [
        ("is_transposed", True, "transposed"),
        ("has_bias", True, "bias"),
        ("is_concatenated", False, "interleaved"),
        ("sinks", nn.Parameter(torch.zeros(3)), "with 'sinks' beside"),
        ("has_gate", None, "code of their own"),
    ],
)
def test_experts_that_compute_otherwise_are_refused(attribute: str, value: Any, says: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m", "qwen3-moe")
    model = skeleton.empty(AutoConfig.from_pretrained(folder), folder)
    fused = model.model.layers[1].mlp.experts
    delattr(fused, attribute) if value is None else setattr(fused, attribute, value)
    with pytest.raises(InputError, match=f"layers.1.*{says}.*Qwen3MoeExperts"):
        take_apart(model, Checkpoint.open(folder).specs)


def test_routers_are_found_by_structure(tmp_path: Path) -> None:
    def found(kind: str) -> set[str]:
        return routers(open_model(tiny.save(tmp_path / kind, kind))[0].model)

    assert found("llama") == set()
    assert found("mixtral") == {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
    assert found("deepseek") == {"model.layers.1.mlp.gate"}
    gates = {f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in ("gate", "shared_expert_gate")}
    assert found("qwen2-moe") == gates

    def mlp() -> nn.Module:
        return nn.ModuleDict({"up": nn.Linear(8, 4), "down": nn.Linear(4, 8)})

    # code of a repository: a list of experts, a linear that chooses; the shared expert is as wide as there are experts
    mixture = nn.ModuleDict({"experts": nn.ModuleList(mlp() for _ in range(4)), "shared": mlp()})
    mixture["router"] = nn.ModuleDict({"classifier": nn.Linear(8, 4)})
    mixture["latent"] = nn.Linear(8, 6)
    model = nn.ModuleDict({"layers": nn.ModuleList([mixture]), "head": nn.Linear(8, 32)})
    assert routers(model) == {"layers.0.router.classifier"}


# Statistics ----------------------------------------------------------------------------------------------------------


def stats(x: torch.Tensor) -> Any:
    observer = Observer(frozenset({"gram", "energy", "absmax", "absmean"}), x.shape[1], "cpu")
    observer.update(x)
    return observer.result()


def test_shrinking_counts_all_tokens_like_k_tokens_a_channel() -> None:
    """Against the mean over the routed tokens and k d more, which lie like all tokens do and have the routed size."""
    d, k = 8, 2.0
    own, everyone = randn(24, d).float() * 3, randn(64, d, seed=1).float() * torch.arange(1, d + 1)
    a, b = stats(own), stats(everyone)
    found: Any = shrink(a, b, k)
    c = own.square().mean() / everyone.square().mean()
    pooled = (own.T @ own + k * d * c * (everyone.T @ everyone) / 64) / (24 + k * d)
    assert torch.allclose(found.gram_KK, pooled, rtol=1e-5)
    assert torch.allclose(found.energy_K, pooled.diagonal(), rtol=1e-5)
    assert torch.allclose(found.gram_KK.trace(), a.gram_KK.trace(), rtol=1e-5)
    assert found.tokens == 24 and torch.equal(found.absmax_K, a.absmax_K)
    drift = randn(d, d, seed=2).float()
    found = shrink(Stats(24, gram_KK=a.gram_KK, drift_KK=drift), b, k)
    assert torch.allclose(found.drift_KK, drift * 24 / (24 + k * d)) and found.absmean_K is None
    found = shrink(a, b, 0.0)
    assert torch.equal(found.gram_KK, a.gram_KK)
    found = shrink(stats(torch.zeros(24, d)), b)  # tokens reached it, and all were zero
    assert bool(found.gram_KK.isfinite().all())
    found = shrink(a, stats(torch.zeros(5, d)))
    assert torch.allclose(found.gram_KK, a.gram_KK * 24 / (24 + d))


def test_an_expert_that_no_token_reached_has_the_statistics_of_all() -> None:
    everyone, notes = stats(randn(64, 8).float()), Notes()
    found: Any = shrink(Observer(frozenset({"gram", "absmax"}), 8, "cpu").result(), everyone, notes=notes)
    assert torch.equal(found.gram_KK, everyone.gram_KK) and torch.equal(found.absmax_K, everyone.absmax_K)
    assert found.tokens == 0 and len(notes.lines) == 1 and "no calibration token" in notes.lines[0]


def test_shrinking_beats_the_routed_tokens_alone_at_every_number_of_them() -> None:
    """Sixteen clusters of tokens; four in five of an expert's come from its own. GPTQ's error on fresh tokens of it."""
    d, clusters, rows = 128, 16, 32
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, d + 1) ** -0.35
    spread = [(torch.randn(d, d, generator=generator) * spectrum).T for _ in range(clusters)]
    centre = torch.randn(clusters, d, generator=generator) * 0.3

    def draw(count: int, routed: bool) -> Any:
        of = torch.randint(0, clusters, (count,), generator=generator)
        of = torch.where(torch.rand(count, generator=generator) < 0.8, 0, of) if routed else of
        parts = [torch.randn(int((of == c).sum()), d, generator=generator) @ spread[c] for c in range(clusters)]
        return stats(torch.cat([centre[c] + part for c, part in enumerate(parts)]))

    everyone, fresh = draw(8192, False), draw(8192, True).gram_KK
    w = torch.randn(rows, d, generator=generator)
    scheme = TensorScheme("int4", "group", 32)

    def error(algorithm: Any, of: Stats | None) -> float:
        q = algorithm.quantize(w, scheme, of, options=algorithm.Options(), scale_dtype=torch.float32, notes=Notes())
        lost = w - numerics.dequantize(q)
        return float(((lost @ fresh) * lost).sum() / ((w @ fresh) * w).sum())

    nearest = error(rtn, None)
    for tokens in (32, 128, 512, 2048):
        routed = draw(tokens, True)
        alone, drawn = error(gptq, routed), error(gptq, shrink(routed, everyone))
        assert drawn < alone * 1.01 and drawn < nearest * 0.95
        assert (alone > nearest) == (tokens <= d)  # fewer tokens than channels: worse than rounding to nearest


def test_coverage_of_experts() -> None:
    found = coverage([0, 100, 31, 33], 8)
    assert found == {"experts": 4, "min": 0, "median": 32.0, "max": 100, "few": 2}


# From a recipe to an output ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3-moe", "mixtral", "deepseek"])
def test_a_quantized_mixture_is_what_the_library_and_transformers_read(kind: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", kind)
    result = quantkit.quantize(recipe(folder), out=tmp_path / "out", device="cpu")
    written, source = load_file(result.out / "model.safetensors"), load_file(folder / "model.safetensors")
    config = json.loads((result.out / "config.json").read_text())["quantization_config"]
    dense = {x["name"]: x["reason"] for x in result.summary["not_quantized"]}
    gates = {n.removesuffix(".weight") for n in source if n.endswith(".gate.weight")}
    assert gates and dense == {**dict.fromkeys(gates, "is a router"), "lm_head": "is in no block"}
    assert sorted(config["ignore"]) == sorted(dense)
    assert not [f for f in lint.folder(result.out, ["vllm", "transformers"]) if f.level == lint.ERROR]

    scheme = QuantizationScheme.model_validate({**config["config_groups"]["group_0"], "format": config["format"]})
    layers = {n.removesuffix(".weight_packed") for n in written if n.endswith(".weight_packed")}
    assert layers == {n.removesuffix(".weight") for n in source if n.endswith("weight") and "norm" not in n} - {
        *dense,
        "model.embed_tokens",
    }
    for layer in layers:  # the library's decompressor takes the place of ours
        own = {leaf: written[f"{layer}.{leaf}"] for leaf in ("weight_packed", "weight_scale", "weight_shape")}
        error = (library_decompress(own, scheme) - source[f"{layer}.weight"]).float().norm()
        assert error < 0.15 * source[f"{layer}.weight"].float().norm()
        source[f"{layer}.weight"] = library_decompress(own, scheme).to(torch.bfloat16)

    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not torch.allclose(logits(original), reference := logits(with_weights(folder, source, tmp_path)), atol=1e-3)
    (tmp_path / "dense").mkdir()
    assert convert.dense_copy(result.out, tmp_path / "dense") == ()
    copied = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert torch.equal(logits(copied), reference)


def with_weights(folder: Path, tensors: dict[str, torch.Tensor], place: Path) -> Any:
    """The stock model with these tensors by their names on disk, its experts put in by hand."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            memory = name.replace("block_sparse_moe", "mlp")
            owner, _, rest = memory.partition(".experts.")
            if not rest:
                if memory in parameters:
                    parameters[memory].copy_(tensor)
                continue
            e, leaf, _ = rest.split(".")
            n = tensor.shape[0]
            place_of = {"w1": (0, n), "gate_proj": (0, n), "w3": (n, 2 * n), "up_proj": (n, 2 * n)}
            if leaf in place_of:
                first, last = place_of[leaf]
                parameters[f"{owner}.experts.gate_up_proj"][int(e), first:last].copy_(tensor)
            else:
                parameters[f"{owner}.experts.down_proj"][int(e)].copy_(tensor)
    return model


def test_rules_and_routers(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "qwen2-moe")
    gate, shared = "model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"
    every = [{"match": "model.layers.*", "scheme": INT4}]
    done = quantkit.quantize(recipe(folder, rules=every), out=tmp_path / "a", device="cpu")
    assert {gate, shared} <= {x["name"] for x in done.summary["not_quantized"] if x["reason"] == "is a router"}
    named = [{"match": shared, "scheme": INT4}]
    done = quantkit.quantize(recipe(folder, rules=named), out=tmp_path / "b", device="cpu")
    assert shared in {x["name"] for x in done.summary["layers"]}
    with pytest.raises(InputError, match="is a router"):
        quantkit.quantize(recipe(folder, rules=[{"match": gate, "scheme": INT4}]), out=tmp_path / "c", device="cpu")


def test_validation_of_a_mixture_measures_it_packed(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "qwen3-moe")
    check = {"perplexity": {"data": "builtin:pydocs-heldout", "windows": 1, "length": 32}, "gates": {"kl": 1.0}}
    done = quantkit.quantize(recipe(folder, validate=check), out=tmp_path / "out", device="cpu")
    assert done.validation is not None and 0 < done.validation.comparison.kl < 0.2
    again = quantkit.validate(done.out, device="cpu")
    assert again.notes == done.validation.notes == ()
    assert again.comparison.kl == done.validation.comparison.kl
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_packed_experts_load_right(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "qwen3-moe")
    asymmetric = {**INT4, "weights": {**INT4["weights"], "symmetric": False, "group_size": 32}}
    for scheme in (INT4, "NVFP4A16", "W8A8", asymmetric):
        changes: dict[str, Any] = {"scheme": scheme, "export": {"engines": []}}
        out = quantkit.quantize(recipe(folder, **changes), out=tmp_path / "out", device="cpu", overwrite=True).out
        dense = convert.convert(out, "dense", tmp_path / "dense", overwrite=True).out
        loaded, copied = quantkit.load(out), quantkit.load(dense)
        for owner, module in copied.named_modules():
            if owner.endswith("experts"):
                packed = loaded.get_submodule(owner)
                assert torch.equal(packed.decoded("up"), module.gate_up_proj)
                assert torch.equal(packed.decoded("down"), module.down_proj)
        assert (logits(loaded) - logits(copied)).norm() < 0.05 * logits(copied).norm()


def test_packed_experts_that_transformers_decodes_wrong(tmp_path: Path) -> None:
    """NVFP4: stock transformers loads other weights without a word. Over several devices its loader is asked."""
    folder = tiny.save(tmp_path / "model", "qwen3-moe")
    changes: dict[str, Any] = {"scheme": "NVFP4A16", "export": {"engines": []}}
    out = quantkit.quantize(recipe(folder, **changes), out=tmp_path / "out", device="cpu").out
    dense = quantkit.load(convert.convert(out, "dense", tmp_path / "dense").out)
    asked = CompressedTensorsConfig(dequantize=True)
    with pytest.warns(UserWarning):
        decoded = quantkit.load(out, quantization_config=asked)
    for name, p in dense.named_parameters():
        assert torch.equal(decoded.get_parameter(name), p), name
    with pytest.warns(UserWarning), pytest.raises(InputError, match=r"mlp\.experts\.\d.*experts of .*load them packed"):
        quantkit.load(out, quantization_config=asked, device_map="auto")


def test_convert_and_inspect_of_a_mixture(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "deepseek")
    info = inspection.inspect(str(folder))
    assert ["mlp.experts.*.up_proj (8)", "32 x 64", "5"] in info["table"]["rows"]
    assert ("routers", "mlp.gate") in info["facts"] and "the blocks differ" in info["warnings"][0]
    out = quantkit.quantize(recipe(folder), out=tmp_path / "out", device="cpu").out
    rows = {row[0]: row[1:] for row in inspection.inspect(str(out))["table"]["rows"]}
    assert rows["model.layers.1.mlp.experts.*.down_proj (8)"][:2] == ["64 x 32", "int4, group 16, symmetric"]
    assert rows["model.layers.1.mlp.gate"][:2] == ["8 x 64", "BF16"]
    there = convert.convert(out, "gptq", tmp_path / "gptq").out
    back = convert.convert(there, "compressed-tensors", tmp_path / "back").out
    first, last = load_file(out / "model.safetensors"), load_file(back / "model.safetensors")
    assert first.keys() == last.keys() and all(torch.equal(first[k], last[k]) for k in first)
    with loading.loadable(there, quantkit.progress.Silent()) as (place, notes):
        assert (place, notes) == (there, ())


@pytest.mark.skipif(not TRAINED.is_dir(), reason="the trained mixture is not part of the project")
def test_a_trained_mixture(tmp_path: Path) -> None:
    ghost, structure = open_model(TRAINED)
    assert len(routers(ghost.model)) == len(structure.blocks) == 6
    ghost.load(ghost.to_disk, "cpu", torch.float32)
    ghost.tie()
    stock = AutoModelForCausalLM.from_pretrained(TRAINED, dtype=torch.float32)
    assert torch.allclose(logits(ghost.model), logits(stock), atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3-moe", "llama4-text"])
def test_every_expert_on_all_tokens(kind: str, tmp_path: Path) -> None:
    """What is observed is what each expert makes of every token; what goes on is what the router chose."""
    folder = tiny.save(tmp_path / "model", kind)
    ghost, structure = open_model(folder)
    ghost.load(ghost.to_disk, "cpu", torch.float32)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[1, 20:] = False
    block = structure.blocks[1]
    (batch,) = blocks.begin(ghost, structure, [(IDS, mask)])
    needs = dict.fromkeys(block.linears, frozenset({"gram"}))
    routed, every = (
        observation.observe(ghost.model, block, [batch], needs, prior=0.0, all_experts=flag) for flag in (False, True)
    )
    assert routed.tokens == every.tokens and set(routed.tokens.values()) != {44}
    name = next(n for n, m in ghost.model.named_modules() if isinstance(m, Experts) and n.startswith(block.name))
    mixture = ghost.model.get_submodule(name)
    assert not mixture.all_tokens
    seen: list[torch.Tensor] = []
    with torch.no_grad(), blocks.watched(ghost.model, [name], lambda _, x: seen.append(x)):
        blocks.run(ghost.model.get_submodule(block.name), batch, 1)
    x, kept = mixture.given(seen[0], mask)
    x = x[kept]
    for e in range(mixture.num_experts):
        up, down = (every.stats[f"{name}.{e}.{leaf}_proj"] for leaf in ("up", "down"))
        assert up.gram_KK is not None and down.gram_KK is not None
        assert torch.allclose(up.gram_KK, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            inner = mixture.intermediate(e, x)
        assert torch.allclose(down.gram_KK, inner.T @ inner / len(x), rtol=1e-4, atol=1e-6)
    data = {"samples": 4, "length": 32, "all_experts": True}
    done = quantkit.quantize(recipe(folder, method="gptq", calibration=data), out=tmp_path / "out", device="cpu")
    assert sum(done.summary["experts"].values()) % (4 * 32) == 0


@pytest.mark.parametrize("effort, scheme", [("default", "MXFP4A16"), ("best", INT4)])
def test_efforts_that_move_weights_towards_the_dense_model(effort: str, scheme: Any, tmp_path: Path) -> None:
    """Attention is moved; experts are not, since the dense model sends them other tokens."""
    folder = tiny.save(tmp_path / "model", "qwen3-moe")
    data = {"samples": 4, "length": 32}
    what = {**recipe(folder, scheme=scheme, calibration=data, export={"engines": ["transformers"]}), "effort": effort}
    del what["method"]
    done = quantkit.quantize(what, out=tmp_path / "out", device="cpu")
    plan = planning.make(Recipe.from_any(what))
    needs = {x.name: plan.needs(x) for x in plan.quantized}
    assert {name for name, wanted in needs.items() if "drift" in wanted} == {n for n in needs if "self_attn" in n}
    assert max(x["relative_error"] for x in done.summary["layers"]) < 0.1
    assert logits(quantkit.load(done.out, dtype=torch.float32)).isfinite().all()


def test_a_router_that_sends_everything_to_one_expert(tmp_path: Path) -> None:
    """The others are quantized all the same, with the inputs of all tokens, and the report says so."""
    folder = tiny.save(tmp_path / "model", "qwen3-moe", num_experts_per_tok=1)
    tensors = load_file(folder / "model.safetensors")
    gate = tensors["model.layers.1.mlp.gate.weight"]
    norm = tensors["model.layers.1.post_attention_layernorm.weight"]
    gate.zero_()
    norm[0] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})  # ties: the first expert gets them all
    clock = Silent()
    data = {"samples": 4, "length": 32}
    done = quantkit.quantize(
        recipe(folder, method="gptq", calibration=data), out=tmp_path / "out", device="cpu", progress=clock
    )
    counts = {n: c for n, c in done.summary["experts"].items() if "layers.1." in n}
    assert sorted(counts.values()) == [0, 0, 0, 0, 0, 128]
    starved = [n for n, c in counts.items() if not c]
    for name in starved:
        assert any(line.startswith(f"{name}: no calibration token reached") for line in clock.warnings)
        (line,) = [x for x in done.summary["layers"] if x["name"] == f"{name}.up_proj"]
        assert line["tokens"] == 0 and 0 < line["relative_error"] < 0.1
    assert any("5 of 6 experts saw fewer than" in line or "6 of 6 experts" in line for line in clock.warnings)
    assert logits(quantkit.load(done.out, dtype=torch.float32)).isfinite().all()
