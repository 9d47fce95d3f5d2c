"""Rotation: the function stays, in float64, whatever the architecture; what cannot be rotated is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from pydantic import ValidationError
from torch import nn

from quantkit import blocks, links, numerics, skeleton
from quantkit.checkpoint import Checkpoint
from quantkit.errors import InputError
from quantkit.links import Link
from quantkit.transforms import _hadamard, rotation
from quantkit.types import TensorScheme

ROTATABLE = ["llama", "llama-tied", "qwen2", "qwen3", "mistral", "phi3", "gemma"]
MXFP4 = TensorScheme("mxfp4", "group", 32)


class Norm64(nn.Module):
    """The root mean square norm in float64; those of transformers compute in float32 whatever they are given."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach().double(), requires_grad=False)
        self.eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        self.offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.weight + self.offset)


class Source:
    """A checkpoint on disk, and what is found in it without its weights."""

    def __init__(self, folder: Path) -> None:
        self.ghost = skeleton.build(folder, Checkpoint.open(folder))
        self.structure = blocks.find(self.ghost)
        self.links, _ = links.find(self.ghost.model, self.structure)

    def plan(self, **options: Any) -> rotation.Rotation:
        return rotation.plan(self.ghost.model, self.structure, self.links, rotation.Options(**options))

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored: bfloat16."""
        return self.ghost.checkpoint.read(self.ghost.to_disk[name])

    def exact(self, name: str) -> torch.Tensor:
        return self.read(name).double()

    def models(self, plan: rotation.Rotation) -> tuple[Any, Any]:
        """The original model and the rotated one, whole and in float64."""
        model: Any = copy.deepcopy(self.ghost.model)
        for name in self.ghost.to_disk:
            put(model, name, self.exact(name))
        model.tie_weights()
        for name, module in list(model.named_modules()):
            if "RMSNorm" in type(module).__name__:
                model.set_submodule(name, Norm64(module))
        twin = copy.deepcopy(model)
        if plan.untied:
            twin.get_output_embeddings().weight = nn.Parameter(torch.empty(0), requires_grad=False)
            put(twin, plan.untied[0], plan.rewrite(plan.untied[0], self.exact(plan.untied[1]), self.exact))
        for name in self.ghost.to_disk:
            put(twin, name, plan.rewrite(name, self.exact(name), self.exact))
        return model, twin


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    made: dict[str, Source] = {}

    def get(kind: str) -> Source:
        if kind not in made:
            made[kind] = Source(tiny.save(tmp_path_factory.mktemp(kind) / "m", kind))
        return made[kind]

    return get


def put(model: Any, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def tokens(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(4, 4096, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def compare(model: Any, twin: Any, plan: rotation.Rotation) -> tuple[float, float]:
    """How far the logits are apart, and the hidden states in front of every block from the rotated ones."""
    seen: list[list[torch.Tensor]] = [[], []]
    outs = []
    for m, states in zip((model, twin), seen, strict=True):
        handles = [
            block.register_forward_pre_hook(lambda _, args, kwargs, s=states: s.append(args[0]), with_kwargs=True)
            for block in m.model.layers
        ]
        outs.append(m(tokens(), use_cache=False).logits)
        for handle in handles:
            handle.remove()
    apart = [relative(b, plan.hidden(a)) for a, b in zip(*seen, strict=True)]
    assert len(apart) == len(model.model.layers)
    # It is a rotation: hidden states are other numbers.
    assert all(relative(b, a) > 0.5 for a, b in zip(*seen, strict=True))
    return relative(outs[1], outs[0]), max(apart)


@pytest.mark.parametrize("kind", ROTATABLE)
@pytest.mark.parametrize("options", [{}, {"size": 32, "seed": 5}, {"values": False, "random_signs": False}])
def test_the_function_stays_what_it_was(source, kind, options):
    src = source(kind)
    plan = src.plan(**options)
    model, twin = src.models(plan)
    logits, hidden = compare(model, twin, plan)
    assert logits < 1e-10
    assert hidden < 1e-10


@pytest.mark.parametrize("kind", tiny.MIXTURES)
def test_mixtures_of_experts_with_routers_and_shared_experts(source, kind):
    """Routers choose in float32, so that the two models agree no better than that."""
    src = source(kind)
    plan = src.plan(size=32)
    assert any("experts.3" in name for name in plan.changes)
    model, twin = src.models(plan)
    logits, hidden = compare(model, twin, plan)
    assert logits < 2e-6
    assert hidden < 2e-6


def test_folded_norms_become_neutral(source):
    for kind, neutral in (("llama", 1.0), ("gemma", 0.0)):
        src = source(kind)
        plan = src.plan()
        for name in ("model.layers.1.input_layernorm.weight", "model.norm.weight"):
            weight = plan.rewrite(name, src.read(name), src.read)
            assert weight.dtype == torch.float32 and bool((weight == neutral).all())


def test_norms_of_queries_and_keys_stay(source):
    src = source("qwen3")
    name = "model.layers.0.self_attn.q_norm.weight"
    tensor = src.read(name)
    assert src.plan().rewrite(name, tensor, src.read) is tensor


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("llama-tied", True), ("gemma", True)])
def test_tied_embeddings_come_apart(source, kind, tied):
    src = source(kind)
    plan = src.plan()
    assert plan.untied == (("lm_head.weight", "model.embed_tokens.weight") if tied else None)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    gamma = src.exact("model.norm.weight") + (1 if kind == "gemma" else 0)
    original = src.exact(embedding if tied else head)
    wanted = plan.hidden(original * gamma)
    assert relative(plan.rewrite(head, original, src.exact), wanted) < 1e-14
    assert relative(plan.rewrite(embedding, src.exact(embedding), src.exact), plan.hidden(src.exact(embedding))) < 1e-14


def test_values_turn_in_the_rows_of_a_fused_layer_alone(source):
    src = source("phi3")
    with_values, without = src.plan(), src.plan(values=False)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    a, b = (plan.rewrite(name, src.exact(name), src.exact) for plan in (with_values, without))
    assert torch.equal(a[:96], b[:96])
    assert relative(a[96:], b[96:]) > 0.5
    # One head of 16 does not mix with the other, and the norm of a head's column stays.
    assert torch.allclose(a[96:112].norm(dim=0), b[96:112].norm(dim=0), atol=1e-12)


def test_a_gate_behind_attention_keeps_values_as_they_are(tmp_path):
    """A gate lets a scale of each channel pass, so there is a link; a rotation would break the model."""
    config = transformers.Qwen3NextConfig(
        **{**tiny.BASE, "vocab_size": 4096},
        layer_types=["full_attention"] * 2,
        mlp_only_layers=[0, 1],
        num_experts=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    src = Source(tmp_path)
    assert any(link.head_dim and link.producer.endswith("v_proj") for link in src.links)
    plan = src.plan()
    assert "values are not rotated in model.layers.0, model.layers.1" in plan.warnings[0]
    assert all(change.at is None for change in plan.changes.values())
    assert src.plan(values=False).warnings == ()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "deepseek", "qwen2-moe"])
def test_a_block_is_checked_in_float32_and_one_forgotten_matrix_is_noticed(source, kind):
    src = source(kind)
    ghost, plan = src.ghost, src.plan()
    index = len(src.structure.blocks) - 1
    block = src.structure.blocks[index]
    outside = [n for n in ghost.to_disk if not n.startswith("model.layers.")]
    ghost.load(outside, "cpu", torch.float32)
    ghost.tie()
    ids = tokens(4, 32)
    batch = blocks.begin(ghost, src.structure, [(ids, torch.ones_like(ids).bool())])[0]
    names, module = ghost.parameters(block.name + "."), ghost.model.get_submodule(block.name)
    # Loud and unlike each other, so that every expert gets tokens.
    hidden = torch.randn(batch.hidden.shape, generator=torch.Generator().manual_seed(2)) * 8

    def running(plan: rotation.Rotation | None) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(hidden: torch.Tensor) -> torch.Tensor:
            for name in names:
                tensor = src.read(name)
                ghost.put(name, (plan.rewrite(name, tensor, src.read) if plan else tensor).float())
            return blocks.run(module, replace(batch, hidden=hidden), index)

        return run

    assert plan.check(running(None), running(plan), hidden) < rotation.TOLERANCE / 10
    after = running(None)(hidden)
    for forgotten in [n for n in names if n in plan.changes]:
        rest = replace(plan, changes={n: c for n, c in plan.changes.items() if n != forgotten})
        assert plan.error(hidden, after, running(rest)(plan.hidden(hidden))) > 10 * rotation.TOLERANCE, forgotten
    ghost.unload([*names, *outside])


# What the measure of a block's error does ---------------------------------------------------------------------------


def test_the_error_of_a_block_is_relative_to_what_it_adds(source):
    plan = source("llama").plan()
    g = torch.Generator().manual_seed(0)
    before = torch.randn(200, 64, generator=g, dtype=torch.float64)
    after = before + torch.randn(200, 64, generator=g, dtype=torch.float64)
    wrong = plan.hidden(after)
    assert plan.error(before, after, wrong) < 1e-14
    size = (after[7] - before[7]).norm() + rotation.FLOOR * before[7].norm()
    wrong[7] += 0.5 * size / 8  # 64 channels
    assert plan.error(before, after, wrong) < 1e-14  # one token of 200 is spared
    assert plan.error(before[:40], after[:40], wrong[:40]) == pytest.approx(0.5, rel=1e-6)
    mask = torch.ones(40, dtype=torch.bool)
    mask[7] = False
    assert plan.error(before[:40], after[:40], wrong[:40], mask) < 1e-14
    assert plan.error(before[:0], after[:0], wrong[:0]) == 0
    wrong[3] = float("nan")
    assert plan.error(before, after, wrong) == float("inf")


def test_a_block_is_not_compared_in_sixteen_bits(source):
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="float32"):
        source("llama").plan().error(x, x, x)


# Rewriting ----------------------------------------------------------------------------------------------------------


def test_results_are_float32_and_seeds_decide_them(source):
    src = source("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    before = torch.get_rng_state()

    def up(**options: Any) -> torch.Tensor:
        return src.plan(**options).rewrite(name, src.read(name), src.read)

    first = up()
    assert first.dtype == torch.float32 and first.shape == src.read(name).shape
    assert torch.equal(first, up())
    assert not torch.equal(first, up(seed=1))
    assert not torch.equal(first, up(random_signs=False))
    assert torch.equal(up(random_signs=False), up(random_signs=False, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    exact = src.plan().rewrite(name, src.exact(name), src.exact)
    assert torch.equal(exact.float(), first)


def test_a_large_tensor_is_turned_in_parts_to_the_same_values(source):
    src = source("llama")
    plan = src.plan()
    big = torch.randn(_hadamard.LINES + 100, 64, generator=torch.Generator().manual_seed(0))
    wanted = plan.hidden(big.double())
    assert relative(plan.rewrite("model.embed_tokens.weight", big), wanted) < 1e-7
    assert relative(plan.rewrite("model.layers.0.mlp.down_proj.weight", big.T.contiguous()), wanted.T) < 1e-7


def test_a_folded_weight_without_its_norm_is_a_mistake_of_the_caller(source):
    src = source("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=r"up_proj.weight needs model.layers.0.post_attention_layernorm.weight"):
        src.plan().rewrite(name, src.read(name))


def test_hidden_states_go_there_and_back(source):
    plan = source("llama").plan(seed=3)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    assert plan.hidden(x).dtype == torch.float32
    assert relative(plan.original(plan.hidden(x)), x) < 1e-6
    assert torch.allclose(plan.hidden(x).norm(dim=-1), x.norm(dim=-1))


# Hadamard -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4, 32])
def test_hadamard_by_definition(size):
    signs = [[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]
    assert torch.equal(_hadamard.matrix(size), torch.tensor(signs, dtype=torch.float64) / size**0.5)


@pytest.mark.parametrize(("width", "size"), [(96, 1), (96, 32), (64, 64), (512, 128)])
@pytest.mark.parametrize("digit", [4, 64])
def test_turns_are_orthogonal_and_equal_the_matrix_written_out(width, size, digit, monkeypatch):
    monkeypatch.setattr(_hadamard, "DIGIT", digit)  # one to four products
    generator = torch.Generator().manual_seed(4)
    turn = _hadamard.turn(width, size, generator)
    assert bool((turn.signs.abs() == 1).all()) and 0.3 < float((turn.signs > 0).double().mean()) < 0.7
    written = torch.diag(turn.signs) @ torch.kron(torch.eye(width // size, dtype=torch.float64), _hadamard.matrix(size))
    x = torch.randn(3, width, generator=generator, dtype=torch.float64)
    assert torch.allclose(turn.forward(x), x @ written, atol=1e-12)
    assert torch.allclose(turn.back(turn.forward(x)), x, atol=1e-12)
    eye = torch.eye(width, dtype=torch.float64)[:64]
    assert torch.allclose(turn.forward(eye) @ turn.forward(eye).T, eye[:, :64], atol=1e-12)


@pytest.mark.parametrize(("width", "power"), [(64, 64), (2880, 64), (4096, 4096), (3584, 512), (7, 1)])
def test_the_largest_power_of_two(width, power):
    assert _hadamard.largest(width) == power


def test_outliers_are_spread_within_the_groups_of_mxfp4():
    """One loud column in most groups of 32: after blocks of 32, no weight sets the scale of the others."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(256, 1024, generator=g)
    w[:, torch.randint(0, 1024, (40,), generator=g)] *= 8
    turn = _hadamard.turn(1024, 32, g)

    def error(w: torch.Tensor) -> float:
        q = numerics.get("mxfp4").qparams(w, MXFP4, scale_dtype=torch.float32, search="mse")
        return relative(numerics.dequantize(numerics.quantize(w, q, MXFP4)), w) ** 2

    plain, turned = error(w), error(turn.forward(w.double()).float())
    assert plain > 0.018
    assert turned < 0.6 * plain
    normal = torch.randn(256, 1024, generator=g)  # nothing to gain
    assert error(turn.forward(normal.double()).float()) == pytest.approx(error(normal), rel=0.02)


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_norms_behind_attention_are_refused_by_name(source, kind):
    with pytest.raises(InputError) as e:
        source(kind).plan()
    assert "model.layers.0.post_attention_layernorm: normalises the output of model.layers.0.self_attn.o_proj" in str(e)
    assert "cannot be rotated, leave rotation out of transforms" in str(e)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("CohereConfig", "model.layers.0.input_layernorm: does not commute with a rotation"),
        ("StableLmConfig", "model.layers.0.input_layernorm.bias: a norm with more than a weight"),
        ("Olmo2Config", "model.layers.0.self_attn.k_proj.weight: has the width of the hidden states, 64, but is not"),
        ("DogeConfig", "model.layers.0.input_residual: its module does not hand its output to linears alone"),
    ],
)
def test_other_architectures_that_cannot_be_rotated(tmp_path, config, says):
    made = getattr(transformers, config)(**tiny.BASE)
    ghost = skeleton.Skeleton(skeleton.empty(made, tmp_path), Checkpoint(tmp_path, {}, {}), {}, [])
    structure = blocks.find(ghost)
    found, _ = links.find(ghost.model, structure)
    with pytest.raises(InputError, match=says):
        rotation.plan(ghost.model, structure, found, rotation.Options())


def test_parameters_outside_the_blocks_must_be_understood(source):
    src = source("llama")
    model = copy.deepcopy(src.ghost.model)
    model.model.more = nn.Linear(64, 64, device="meta")
    with pytest.raises(InputError, match=r"model\.more\.weight: is outside the blocks and neither embedding"):
        rotation.plan(model, src.structure, src.links, rotation.Options())
    del model.model.more
    model.model.second = copy.deepcopy(model.model.norm)
    with pytest.raises(InputError, match="there are 2 norms outside the blocks"):
        rotation.plan(model, src.structure, src.links, rotation.Options())


def test_what_a_norm_feeds_must_be_known_and_linear(source):
    src = source("llama")
    with pytest.raises(InputError, match="what reads the output of which norm could not be found out"):
        rotation.plan(src.ghost.model, src.structure, (), rotation.Options())
    some = tuple(link for link in src.links if link.producer != "model.layers.1.post_attention_layernorm")
    with pytest.raises(InputError, match=r"model\.layers\.1\.\S+: "):
        rotation.plan(src.ghost.model, src.structure, some, rotation.Options())
    odd = Link("model.layers.0", "model.layers.0.input_layernorm", "norm", (0, 64), ("model.layers.0.mlp.down_proj",))
    with pytest.raises(InputError, match=r"down_proj: reads the output of \S+ but is no linear of 64 inputs"):
        rotation.plan(src.ghost.model, src.structure, (odd,), rotation.Options())


@pytest.mark.parametrize("size", [0, 1, 3, 48, -32])
def test_sizes_that_are_no_power_of_two(size):
    with pytest.raises(ValidationError, match=f"{size} is not a power of two"):
        rotation.Options(size=size)


def test_a_size_must_divide_the_hidden_states(source):
    with pytest.raises(InputError, match="size 128 does not divide the hidden size 64; the largest that does is 64"):
        source("llama").plan(size=128)
    with pytest.raises(ValidationError, match="Extra inputs"):
        rotation.Options.model_validate({"sizes": 32})
    assert rotation.needs(rotation.Options()) == frozenset()
