"""Bit allocation: the choice against exhaustive search, what is measured against the model itself, what is refused."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear, log_softmax
from transformers import AutoModelForCausalLM

from quantkit import algorithms, allocation, blocks, numerics
from quantkit import plan as planning
from quantkit.allocation import candidates, knapsack, sensitivity
from quantkit.allocation.knapsack import Option
from quantkit.allocation.tail import Tail
from quantkit.checkpoint import Checkpoint, nbytes
from quantkit.errors import InputError
from quantkit.numerics._activations import fake_quantize
from quantkit.progress import Silent
from quantkit.recipe import Recipe, json_schema
from quantkit.recipe.errors import known_keys
from quantkit.stats import Observer
from quantkit.types import Notes

CPU = torch.device("cpu")
SAMPLES, ROWS, LENGTH = 6, 3, 24


def g32(preset: str) -> dict[str, Any]:
    return {"preset": preset, "group_size": 32}


def recipe(model: Path | str, bits: float = 6, some: list[Any] | None = None, **changes: Any) -> Recipe:
    auto = {"bits": bits, "candidates": some or [g32("W3A16"), g32("W4A16"), g32("W8A16")], "rows": ROWS}
    return Recipe.from_any(
        {
            "model": str(model),
            "scheme": {"auto": {**auto, "length": LENGTH}},
            "calibration": {"samples": SAMPLES, "length": 48, "batch_size": 2},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("mixture") / "model", "qwen3-moe")


# The knapsack

SIZES = st.integers(0, 6) | st.integers(0, 10**12)
COSTS = st.integers(0, 3).map(float) | st.floats(0, 10) | st.floats(0, 1e-9)
GROUPS = st.lists(st.lists(st.builds(Option, SIZES, COSTS), min_size=1, max_size=4), min_size=1, max_size=5)


def totals(groups: list[list[Option]], choice: Any) -> tuple[int, float]:
    taken = [options[c] for options, c in zip(groups, choice, strict=True)]
    return sum(o.size for o in taken), sum(o.cost for o in taken)


@given(groups=GROUPS, share=st.floats(-0.05, 1.05))
@settings(max_examples=150, deadline=None)
def test_the_choice_is_that_of_exhaustive_search(groups: list[list[Option]], share: float) -> None:
    least, most = (sum(f(o.size for o in options) for options in groups) for f in (min, max))
    capacity = int(least + share * (most - least + 1))
    fitting = [
        (cost, size)
        for choice in itertools.product(*(range(len(options)) for options in groups))
        for size, cost in [totals(groups, choice)]
        if size <= capacity
    ]
    chosen = knapsack.solve(groups, capacity)
    if not fitting:
        assert chosen is None
        return
    assert chosen is not None
    size, cost = totals(groups, chosen)
    assert size <= capacity
    assert cost == pytest.approx(min(fitting)[0], rel=1e-12, abs=1e-300)
    assert knapsack.solve(groups, capacity) == chosen


def test_a_cost_so_small_that_its_price_is_zero() -> None:
    groups = [[Option(0, 0.0)], [Option(0, 5e-324), Option(2, 0.0)]]
    assert knapsack.solve(groups, 0) == [0, 0] and knapsack.solve(groups, 2) == [0, 1]


def by_table(groups: list[list[Option]], capacity: int) -> float:
    """The least cost by the textbook's table, one entry a unit of size."""
    table = [0.0] + [float("inf")] * capacity
    for options in groups:
        table = [
            min((table[s - o.size] + o.cost for o in options if o.size <= s), default=1e9) for s in range(capacity + 1)
        ]
    return min(table)


@pytest.mark.parametrize("seed", range(4))
def test_many_groups_as_a_model_has_them(seed: int) -> None:
    draw = random.Random(seed)
    groups = []
    for i in range(60):
        weights, sensitivity_ = [3, 2, 14, 7][i % 4], 10 ** draw.uniform(-4, 0)
        some = [2, 3, 4, 8] if seed % 2 else [3, 4, 5, 8]
        groups.append([Option(weights * b, sensitivity_ * 4.0**-b * draw.uniform(0.5, 2)) for b in some])
    capacity = sum(options[1].size for options in groups) + draw.randrange(200)
    chosen = knapsack.solve(groups, capacity)
    assert chosen is not None
    size, cost = totals(groups, chosen)
    assert size <= capacity
    assert cost == pytest.approx(by_table(groups, capacity), rel=1e-12)


def test_of_equal_costs_the_smallest_is_taken() -> None:
    same = [Option(5, 1.0), Option(3, 1.0), Option(4, 0.5), Option(9, 0.5)]
    assert knapsack.solve([same, same], 100) == [2, 2]
    assert knapsack.solve([same, same], 7) in ([1, 2], [2, 1])
    assert knapsack.solve([], 0) == []
    assert knapsack.solve([[Option(1, 0.0)]], 0) is None


# What there is to choose


def test_groups_are_what_shares_an_input_and_all_experts_of_a_layer(llama: Path, mixture: Path) -> None:
    found = candidates.outline(recipe(llama))
    leaves = [[x.name.removeprefix(f"model.layers.{g.block}.") for x in g.layers] for g in found.groups]
    attention = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
    assert leaves == [*attention, ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]] * 2
    groups = candidates.outline(recipe(mixture, some=[g32("W4A16"), g32("W8A16")])).groups
    assert [(g.block, len(g.layers)) for g in groups] == [(0, 3), (0, 1), (0, 18), (1, 3), (1, 1), (1, 18)]
    assert groups[2].name == "model.layers.0.mlp.experts.*: gate_proj, up_proj, down_proj"


def test_layers_that_engines_fuse_by_name_are_together_when_inputs_tell_nothing(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [g.name for g in candidates.outline(recipe(llama)).groups]
    alone = lambda model, linears: ([[name] for name in linears], set(linears), ("not found out",))  # noqa: E731
    monkeypatch.setattr(blocks, "_shared_inputs", alone)
    assert sorted(g.name for g in candidates.outline(recipe(llama)).groups) == sorted(wanted)


@pytest.mark.parametrize("spec", [g32("W3A16"), g32("W4A16_ASYM"), "W8A16-channel", "FP8_DYNAMIC", "none"])
def test_sizes_are_bytes_on_disk(llama: Path, spec: Any) -> None:
    spec = {"preset": "W8A16", "group_size": "channel"} if spec == "W8A16-channel" else spec
    found = candidates.outline(recipe(llama, some=[spec, g32("W4A16")], bits=16))
    plans = [planning.make(found.settled([c] * len(found.groups))) if c or spec != "none" else None for c in (0, 1)]
    for c, plan in enumerate(plans):
        specs = plan.specs if plan else Checkpoint.open(llama).specs
        for group in found.groups:
            own = [s for name, s in specs.items() if name.rpartition(".")[0] in {x.name for x in group.layers}]
            assert group.sizes[c] == sum(map(nbytes, own))


def test_the_budget_is_exact_to_the_byte(llama: Path) -> None:
    found = candidates.outline(recipe(llama, 5.1))
    weights = sum(x.shape[0] * x.shape[1] for x in found.plan.quantized)
    assert found.capacity == weights * 51 // 80
    with pytest.raises(InputError, match=r"scheme\.auto\.bits: 3 bits a weight cannot be reached") as caught:
        candidates.outline(recipe(llama, 3))
    reach = float(str(caught.value).split("takes ")[1].split(":")[0])
    least = candidates.outline(recipe(llama, reach))
    chosen = allocation.choose(least, [None] * len(least.groups))
    assert least.names[0] == "W3A16-g32" and chosen == [0] * len(least.groups)
    with pytest.raises(InputError, match="cannot be reached"):
        candidates.outline(recipe(llama, round(reach - 1e-4, 4)))


def test_layers_of_a_rule_take_no_part_and_the_rule_stays_first(llama: Path) -> None:
    rules = [{"match": "*.down_proj", "scheme": g32("W8A16")}, {"match": "model.layers.0.*", "scheme": "none"}]
    found = candidates.outline(recipe(llama, rules=rules))
    assert [g.name.partition(": ")[2] for g in found.groups] == [
        "q_proj, k_proj, v_proj",
        "o_proj",
        "gate_proj, up_proj",
    ]
    assert {g.block for g in found.groups} == {1}
    settled = found.settled([0, 2, 2])
    assert settled.rules[:2] == found.recipe.rules and settled.scheme.name == "W8A16-g32"
    assert [(r.match, r.scheme.name) for r in settled.rules[2:]] == [
        (r"re:model\.layers\.1\.self_attn\.(q_proj|k_proj|v_proj)$", "W3A16-g32")
    ]
    with pytest.raises(InputError, match="rules decide on every layer"):
        candidates.outline(recipe(llama, rules=[{"match": "model.layers.*", "scheme": g32("W8A16")}]))


def test_an_engine_refuses_a_candidate_for_some_layers(mixture: Path) -> None:
    found = candidates.outline(recipe(mixture))
    assert [g.allowed for g in found.groups] == [[0, 1, 2], [0, 1, 2], [1, 2]] * 2
    (warning,) = found.warnings
    assert warning.startswith(
        "candidate W3A16-g32 is left out for 2 groups, such as model.layers.0.mlp.experts.*: gate"
    )
    assert "experts of int3 have no kernel" in warning
    everywhere = recipe(mixture, export={"engines": ["transformers"]})
    assert all(g.allowed == [0, 1, 2] for g in candidates.outline(everywhere).groups)


def test_a_candidate_that_does_not_divide_is_left_out_where_it_does_not(llama: Path) -> None:
    sixty_four = {"preset": "W4A16", "group_size": 64}
    found = candidates.outline(recipe(llama, some=[sixty_four, g32("W8A16"), "none"], bits=9))
    assert [g.allowed for g in found.groups] == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [1, 2]] * 2
    assert "W4A16-g64 is left out for 2 groups" in found.warnings[0] and "does not divide" in found.warnings[0]


@pytest.mark.parametrize(
    ("some", "changes", "expected"),
    [
        (
            [g32("W4A16"), g32("W8A16")],
            {"format": "gptq"},
            "W8A16-g32 is left out: beside W4A16-g32: .*use compressed-tensors",
        ),
        ([g32("W4A16"), g32("W3A16")], {"engines": ["sglang"]}, "W3A16-g32 is left out: .*has no kernel"),
        (["W4A16", "W8A16"], {}, "no candidate will do for every layer. W4A16: .*does not divide"),
    ],
)
def test_nothing_left_to_choose_is_an_error_that_says_why(
    llama: Path, some: list[Any], changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        candidates.outline(recipe(llama, some=some, export={"engines": [], **changes}))


@pytest.mark.parametrize("kind", ["llama", "mixture"])
def test_the_settled_recipe_gives_each_layer_what_was_chosen(kind: str, request: pytest.FixtureRequest) -> None:
    found = candidates.outline(recipe(request.getfixturevalue(kind), some=[g32("W4A16"), g32("W8A16"), "none"]))
    draw = random.Random(0)
    for _ in range(5):
        chosen = [draw.randrange(3) for _ in found.groups]
        settled = found.settled(chosen)
        assert Recipe.parse(settled.to_yaml()) == settled
        assert settled.scheme.name == found.names[max(range(3), key=lambda c: (chosen.count(c), -c))]
        plan = planning.make(settled)
        wanted = {
            x.name: found.auto.candidates[c].resolve()
            for g, c in zip(found.groups, chosen, strict=True)
            for x in g.layers
        }
        assert {x.name: x.scheme for x in plan.linears.values() if x.name in wanted} == wanted
        assert all(x.scheme is None for x in plan.linears.values() if x.name not in wanted)
        assert sum(nbytes(s) for s in plan.specs.values()) - found.size(chosen) == (
            sum(nbytes(s) for s in found.plan.specs.values()) - found.size([0] * len(chosen))
        )


def test_numbers_that_are_no_blocks_get_a_rule_a_layer(llama: Path) -> None:
    found = candidates.outline(recipe(llama))
    staged = []
    for group in found.groups[:4]:  # one stage, whose layers differ by the second number alone
        for block in (0, 1):
            layers = tuple(
                replace(x, name=x.name.replace("layers.0", f"stages.0.layers.{block}")) for x in group.layers
            )
            staged.append(replace(group, layers=layers))
    found = replace(found, groups=tuple(staged))
    settled = found.settled([0, 1, 0, 0, 0, 0, 2, 0])
    schemes, silent = settled.assign([x.name for g in staged for x in g.layers])
    assert not silent
    assert [rule.match for rule in settled.rules] == [x.name for g in (staged[1], staged[6]) for x in g.layers]
    assert {n for n, s in schemes.items() if s != found.auto.candidates[0].resolve()} == {
        r.match for r in settled.rules
    }


# What is measured


class Direct:
    """The model whole, in float32, and what its linears read of the calibration rows."""

    def __init__(self, settled: Recipe, found: candidates.Outline) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(settled.model, dtype=torch.float32).eval()
        self.rows = rows = allocation._rows(found, None)
        assert tuple(rows.ids_RL.shape) == (SAMPLES + ROWS, 48)
        self.ids = rows.ids_RL[SAMPLES:, :LENGTH]
        self.wide = {x.module: self.inputs(x.module, rows.ids_RL[:SAMPLES]) for x in found.plan.quantized}
        self.narrow = {x.module: self.inputs(x.module, self.ids) for x in found.plan.quantized}
        self.dense = self.logits()

    @torch.no_grad()
    def inputs(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hook = self.model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        self.model(ids)
        hook.remove()
        return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        return log_softmax(self.model(self.ids).logits.double(), -1)

    def decoded(self, names: list[str], scheme: Any, method: str, **options: Any) -> list[torch.Tensor]:
        module = algorithms.get(method)
        observer = Observer(frozenset({"gram", "energy"}), self.wide[names[0]].shape[1], "cpu")
        observer.update(self.wide[names[0]])
        weights = [self.model.get_submodule(name).weight for name in names]
        q = module.quantize(
            torch.cat([w.detach() for w in weights]),
            scheme.weights,
            observer.result(),
            options=module.Options(**options),
            scale_dtype=torch.bfloat16,
            notes=Notes(),
        )
        return list(numerics.dequantize(q).split([len(w) for w in weights]))

    def loss(self, names: list[str], decoded: list[torch.Tensor]) -> float:
        """tr(D H Dᵀ) / tr(W H Wᵀ) in float64."""
        above = below = 0.0
        for name, q in zip(names, decoded, strict=True):
            x = self.narrow[name].double()
            h, w = x.T @ x, self.model.get_submodule(name).weight.detach().double()
            d = w - q.double()
            above, below = above + float(((d @ h) * d).sum()), below + float(((w @ h) * w).sum())
        return above / below

    @torch.no_grad()
    def kl(self, names: list[str], decoded: list[torch.Tensor], scale: float) -> float:
        """Of the model whose weights are W + scale (Q - W)."""
        before = [self.model.get_submodule(name).weight.clone() for name in names]
        for name, w, q in zip(names, before, decoded, strict=True):
            self.model.get_submodule(name).weight.copy_(w + scale * (q - w))
        other = self.logits()
        for name, w in zip(names, before, strict=True):
            self.model.get_submodule(name).weight.copy_(w)
        return float((self.dense.exp() * (self.dense - other)).sum(-1).mean())


@pytest.fixture(scope="module")
def measured(llama: Path) -> tuple[candidates.Outline, list[Any], Direct]:
    settled = recipe(llama)
    found = candidates.outline(settled)
    direct = Direct(settled, found)
    return found, allocation._measure(found, direct.rows, CPU, Silent())[0], direct


def test_losses_and_sensitivities_are_those_of_the_whole_model(measured: Any) -> None:
    found, results, direct = measured
    schemes = [spec.resolve() for spec in found.auto.candidates]
    for group, m in zip(found.groups, results, strict=True):
        names = [x.module for x in group.layers]
        probe = direct.decoded(names, schemes[1], "gptq")
        losses = [direct.loss(names, direct.decoded(names, s, "rtn", scale_search="diagh")) for s in schemes]
        exact = direct.loss(names, probe)
        assert m.losses == pytest.approx([exact * loss / losses[1] for loss in losses], rel=1e-3)
        assert m.kl == pytest.approx(direct.kl(names, probe, (0.01 / exact) ** 0.5), rel=2e-3)
        assert m.predicted(0) == pytest.approx(m.kl / 0.01 * m.losses[0])


def test_statistics_in_bfloat16_as_on_a_gpu(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, results, direct = measured
    monkeypatch.setattr(sensitivity, "_dtype", lambda plan, device: torch.bfloat16)
    coarse, quarter = allocation._measure(found, direct.rows, CPU, Silent())
    assert quarter == pytest.approx(1, abs=0.05)
    for m, other in zip(results, coarse, strict=True):
        assert other is not None
        assert other.losses == pytest.approx(m.losses, rel=0.1)
        assert other.kl == pytest.approx(m.kl, rel=0.5)  # GPTQ found other codes, and there are 72 tokens


def test_kl_grows_like_the_energy_and_adds_up_over_groups(measured: Any) -> None:
    """What the prediction rests on, for 4-bit errors of all layers at once."""
    found, results, direct = measured
    scheme = found.auto.candidates[1].resolve()
    names = [[x.module for x in group.layers] for group in found.groups]
    every = [direct.decoded(some, scheme, "gptq") for some in names]
    for some, q, m in zip(names, every, results, strict=True):
        assert direct.kl(some, q, 1.0) == pytest.approx(m.predicted(1), rel=0.2)
    together = direct.kl([n for some in names for n in some], [w for q in every for w in q], 1.0)
    assert together == pytest.approx(sum(m.predicted(1) for m in results), rel=0.35)


def test_rounding_of_inputs_counts(llama: Path) -> None:
    some = [{"weights": {"number": "int8"}}, "W8A8", "FP8"]
    found = candidates.outline(recipe(llama, some=some, bits=9, export={"engines": []}))
    direct = Direct(found.recipe, found)
    results = allocation._measure(found, direct.rows, CPU, Silent())[0]
    scheme = found.auto.candidates[1].resolve()
    assert scheme is not None
    for group, m in zip(found.groups, results, strict=True):
        assert m is not None and m.losses[1] > 1.5 * m.losses[0] and m.kl > 0 and m.losses[2] > 0
        names = [x.module for x in group.layers]
        above = below = 0.0
        for name, q in zip(names, direct.decoded(names, scheme, "gptq"), strict=True):
            x, w = direct.narrow[name], direct.model.get_submodule(name).weight.detach()
            y = linear(x, w)
            above += float((linear(fake_quantize(x, scheme.activations), q) - y).square().sum())
            below += float(y.square().sum())
        # The errors of weight and input are added up as if they had nothing to do with each other.
        assert m.losses[1] == pytest.approx(above / below, rel=0.05)


def test_rtn_reads_no_more_rows_than_are_measured_on(llama: Path) -> None:
    found = candidates.outline(recipe(llama, method="rtn"))
    rows = allocation._rows(found, None)
    assert tuple(rows.ids_RL.shape) == (ROWS, LENGTH)
    m = allocation._measure(found, rows, CPU, Silent())[0][0]
    assert m is not None and m.losses[0] > m.losses[1] > m.losses[2] > 0 and m.kl > 0


def test_a_text_too_short_to_keep_rows_apart_is_measured_on_as_a_whole(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    found = candidates.outline(recipe(llama, calibration={"data": str(file), "samples": 6, "length": 48}))
    rows = allocation._rows(found, None)
    assert len(rows.ids_RL) <= ROWS
    results, _ = allocation._measure(found, rows, CPU, Silent())
    assert all(m is not None and m.kl > 0 for m in results)


@pytest.mark.parametrize("kind", ["gemma2", "phi3", "deepseek"])
def test_the_tail_gives_the_logits_of_the_model(tmp_path: Path, kind: str) -> None:
    folder = tiny.save(tmp_path / "model", kind)
    model = planning.look(recipe(folder))
    ghost, structure = model.skeleton, model.structure
    ids = torch.arange(40).reshape(2, 20)
    ghost.load(planning.outside(ghost, structure), CPU, torch.float32)
    ghost.tie()
    (batch,) = blocks.begin(ghost, structure, [(ids, torch.ones_like(ids, dtype=torch.bool))])
    for block in structure.blocks:
        ghost.load(ghost.parameters(block.name + "."), CPU, torch.float32)
        batch.hidden = blocks.run(ghost.model.get_submodule(block.name), batch, block.index)
    with torch.no_grad():
        wanted = ghost.model(ids).logits
    with Tail(ghost, structure) as tail:
        assert torch.equal(tail(ids, batch.hidden), wanted)
    with torch.no_grad():
        assert torch.equal(ghost.model(ids).logits, wanted), "the blocks are back in their place"


def test_outputs_of_zero_are_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    model.save_pretrained(folder)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj: the outputs are zero on all calibration tokens"):
        allocation.allocate(recipe(folder), device=CPU, progress=Silent())


# The whole


@pytest.mark.parametrize("kind", ["llama", "mixture"])
def test_allocate(kind: str, request: pytest.FixtureRequest) -> None:
    given = recipe(request.getfixturevalue(kind), 5.5)
    progress = Silent()
    settled, report = allocation.allocate(given, device=CPU, progress=progress)
    again, same = allocation.allocate(given, device=CPU, progress=Silent())
    assert (settled, report) == (again, same)
    assert report["bits"] <= report["budget_bits"] == 5.5
    assert settled.scheme.auto is None
    found = candidates.outline(given)
    assert list(found.warnings) == progress.warnings
    names = [group["chosen"] for group in report["groups"]]
    chosen = [found.names.index(name) for name in names]
    assert found.settled(chosen) == settled and round(found.bits(found.size(chosen)), 4) == report["bits"]
    costs = [{n: c["predicted_kl"] for n, c in group["candidates"].items()} for group in report["groups"]]
    assert report["predicted_kl"] == pytest.approx(sum(cost[name] for cost, name in zip(costs, names, strict=True)))
    fitting = [
        sum(cost[found.names[c]] for cost, c in zip(costs, choice, strict=True))
        for choice in itertools.product(*(group.allowed for group in found.groups))
        if found.size(choice) <= found.capacity
    ]
    assert report["predicted_kl"] == pytest.approx(min(fitting), rel=1e-12)
    assert [u["candidate"] for u in report["uniform"]] == (
        ["W4A16-g32"] if kind == "mixture" else ["W3A16-g32", "W4A16-g32"]
    )
    assert all(u["predicted_kl"] >= report["predicted_kl"] and u["bits"] <= 5.5 for u in report["uniform"])
    assert allocation.said(report).startswith(f"allocation: {report['bits']:g} of 5.5 bits a weight; ")
    assert allocation.verdict(report, 0.25).startswith("allocation: KL 0.2500 measured, ")


def test_the_plan_reads_no_weight(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setattr(Checkpoint, "read", read)
    monkeypatch.setattr(Checkpoint, "read_finite", read)
    shown = allocation.describe(recipe(llama))
    facts = dict(shown["facts"])
    found = candidates.outline(recipe(llama))
    smallest, budget = (planning.make(found.settled([c] * 8)).output_bytes for c in (0, 1))
    least, most = (
        int(part.replace(",", "")) for part in facts["output"].removesuffix(" bytes of tensors").split(" to ")
    )
    assert least == smallest and budget < most == budget + found.capacity - found.size([1] * 8)
    assert "W3A16-g32, W4A16-g32, W8A16-g32" in facts["scheme"] and "8 groups" in facts["scheme"]
    assert [row[1] for row in shown["table"]["rows"]] == ["2"] * 4
    assert shown["table"]["columns"][2:] == ["W3A16-g32 bits", "W4A16-g32 bits", "W8A16-g32 bits"]
    with pytest.raises(InputError, match="is not auto"):
        allocation.describe(Recipe.from_any({"model": str(llama), "scheme": "W4A16"}))


# The recipe

AUTO = "{bits: 4.25, candidates: [W3A16, W4A16, {preset: W4A16, group_size: 64}, none]}"


def test_forms_of_auto() -> None:
    given = Recipe.parse(f"model: m\nscheme: {{auto: {AUTO}}}\n")
    auto = given.scheme.auto
    assert auto is not None and (auto.bits, auto.rows, auto.length) == (4.25, 8, 256)
    assert [spec.name for spec in auto.candidates] == ["W3A16", "W4A16", "W4A16-g64", "none"]
    assert given.scheme.label == "auto4.25" and len(given.scheme.schemes()) == 3
    assert Recipe.parse(given.to_yaml()) == given
    best = Recipe.parse(f"model: m\nscheme: {{auto: {AUTO}}}\neffort: best\n", "r", ["scheme.auto.bits=5"])
    assert best.scheme.auto is not None and best.scheme.auto.bits == 5 and best.method_name == "gptq"
    with pytest.raises(ValueError, match="has chosen"):
        given.scheme.resolve()


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("{auto: {bits: 0, candidates: [W3A16, W4A16]}}", "scheme.auto.bits: expected a number greater than 0, got 0"),
        ("{auto: {candidates: [W3A16, W4A16]}}", "scheme.auto.bits is missing"),
        ("{auto: {bits: 4, candidates: [W3A16]}}", "scheme.auto.candidates: there is nothing to choose from; give two"),
        ("{auto: {bits: 4, candidates: [W3A16, {preset: W3A16}]}}", "scheme.auto.candidates: W3A16 is among the"),
        (
            "{auto: {bits: 4, candidates: [W3A17, W4A16]}}",
            "candidates.0.preset: unknown preset W3A17; did you mean W3A16",
        ),
        ("{auto: {bits: 4, candidates: W4A16}}", "scheme.auto.candidates: expected a list, got 'W4A16'"),
        ("{auto: {bits: 4, candidates: [W3A16, W4A16], row: 3}}", "unknown key scheme.auto.row; did you mean rows?"),
        (
            "{auto: {bits: 4, candidates: [none, {auto: {}}]}}",
            "candidates.1: auto is for the recipe's own scheme alone",
        ),
        ("{preset: W4A16, auto: {bits: 4, candidates: [W3A16, W4A16]}}", "scheme: auto stands alone"),
        ("auto", "scheme: auto needs a budget and candidates: {auto: {bits: 4.25, candidates: [W3A16, W4A16, W8A16]}}"),
        ("{auto: 4}", "scheme.auto: expected a mapping of keys to values, got 4"),
        ("W4A16\nrules: [{match: a, scheme: auto}]", "rules.0.scheme: auto is for the recipe's own scheme alone"),
    ],
)
def test_refused_with_advice(scheme: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        Recipe.parse(f"model: m\nscheme: {scheme}\n", "r.yaml")
    assert expected in str(caught.value)


def test_schema_offers_auto_for_the_scheme_and_not_for_rules() -> None:
    schema = json_schema()
    assert "auto" in known_keys(schema, ("scheme",)) and "auto" not in known_keys(schema, ("rules", 0, "scheme"))
    assert known_keys(schema, ("scheme", "auto")) == ["bits", "candidates", "rows", "length"]
    assert "preset" in known_keys(schema, ("scheme", "auto", "candidates", 0))
    assert schema["$defs"]["AutoScheme"]["properties"]["candidates"]["minItems"] == 2


def test_the_embedded_model_gains_from_a_mix() -> None:
    """What is predicted, and on the embedded model: a mix beats one scheme for all at no more bits."""
    given = recipe("builtin:pydocs-llama-7m", 4.5, ["W3A16", "W4A16", "W8A16"], method="rtn")
    _, report = allocation.allocate(given, device=CPU, progress=Silent())
    uniform = {u["candidate"]: u["predicted_kl"] for u in report["uniform"]}
    assert list(uniform) == ["W3A16", "W4A16"] and report["predicted_kl"] < 0.8 * uniform["W4A16"]
