"""Which scales can be folded: the pairs that are found, the numeric proof of each, and what must not be found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch.overrides import TorchFunctionMode

from quantkit import blocks, links, skeleton
from quantkit.checkpoint import Checkpoint
from quantkit.links import Link
from quantkit.transforms import _fold

DENSE = ("llama", "llama-tied", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3")
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("CohereConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "stablelm": ("StableLmConfig", {"use_qkv_bias": True}),
    "multi-query": ("LlamaConfig", {"num_key_value_heads": 1}),
    "no-groups": ("LlamaConfig", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
}


class Double(TorchFunctionMode):
    """Where model code asks for float32, it gets float64: norms, rotary tables, softmax."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            return args[0].double()
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def opened(folder: Path, kind: str) -> tuple[Any, blocks.Structure]:
    """A random model in float64, its experts taken apart, and its structure."""
    if kind in OTHERS:
        name, own = OTHERS[kind]
        tiny.ARCHITECTURES[kind] = (name, own)
        try:
            tiny.save(folder, kind)
        finally:
            del tiny.ARCHITECTURES[kind]
    else:
        tiny.save(folder, kind)
    ghost = skeleton.build(folder, Checkpoint.open(folder))
    structure = blocks.find(ghost)
    ghost.load(list(ghost.to_disk), "cpu", torch.float64)
    ghost.tie()
    return ghost.model, structure


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(4, 4096, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), Double():
        out: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return out


def short(found: tuple[Link, ...], block: int) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Links of one block by producer, without the prefix: consumers; rows, head_dim, repeat, spacing."""
    prefix = found[0].block.rpartition(".")[0] + f".{block}."
    return {
        link.producer.removeprefix(prefix): (
            tuple(name.removeprefix(prefix) for name in link.consumers),
            (*link.rows, link.head_dim, link.repeat, link.spacing),
        )
        for link in found
        if link.block + "." == prefix
    }


@pytest.mark.parametrize("kind", [*tiny.ARCHITECTURES, *tiny.MIXTURES, *OTHERS])
def test_folds_leave_the_logits_and_one_with_a_consumer_less_does_not(kind: str, tmp_path: Path) -> None:
    model, structure = opened(tmp_path / "m", kind)
    found, warnings = links.find(model, structure)
    assert warnings == () and found and all(p.device.type == "cpu" for p in model.parameters())
    generator = torch.Generator().manual_seed(2)
    before = logits(model)
    original = {name: p.clone() for name, p in model.named_parameters()}

    def moved_by(link: Link, s: torch.Tensor) -> float:
        folded = _fold.fold(model, link, s, torch.float64)
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, original[name])}
        assert {f"{name}.weight" for name in (link.producer, *link.consumers)} <= changed
        error = float((logits(model) - before).norm() / before.norm())
        _fold.undo(folded)
        assert all(torch.equal(p, original[name]) for name, p in model.named_parameters())
        return error

    scales = {link: torch.exp(torch.randn(link.rows[1], generator=generator).double()) for link in found}
    for link, s in scales.items():
        if "experts." in link.producer and "experts.2" not in link.producer:
            continue  # of the experts, one: they are all alike
        assert moved_by(link, s) < 1e-10, link
        for left_out in link.consumers:
            if ".experts." in left_out or link.block != structure.blocks[-1].name:
                continue
            part = replace(link, consumers=tuple(name for name in link.consumers if name != left_out))
            assert moved_by(part, s) > 1e-6, f"{link.producer} without {left_out}"
    for link, s in scales.items():
        _fold.fold(model, link, s, torch.float64)
    assert (logits(model) - before).norm() < 1e-10 * before.norm()


@pytest.mark.parametrize("kind", DENSE)
def test_llama_and_its_kin(kind: str, tmp_path: Path) -> None:
    model, structure = opened(tmp_path / "m", kind)
    found, _ = links.find(model, structure)
    second_norm = "pre_feedforward_layernorm" if kind in ("gemma2", "gemma3") else "post_attention_layernorm"
    for i in (0, 1):
        assert short(found, i) == {
            "input_layernorm": (
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                (0, 64, 0, 1, 0),
            ),
            "self_attn.v_proj": (("self_attn.o_proj",), (0, 32, 16, 2, 0)),
            second_norm: (("mlp.gate_proj", "mlp.up_proj"), (0, 64, 0, 1, 0)),
            "mlp.up_proj": (("mlp.down_proj",), (0, 96, 0, 1, 0)),
        }
    # In order of use. Nothing else was found: no norm behind a layer or of queries and keys, no gate, no last norm.
    assert [link.producer.rpartition(".")[2] for link in found[:4]] == [
        "input_layernorm",
        "v_proj",
        second_norm,
        "up_proj",
    ]
    assert len(found) == 8


def test_fused_projections_are_ranges_of_rows(tmp_path: Path) -> None:
    model, structure = opened(tmp_path / "m", "phi3")
    found, _ = links.find(model, structure)
    assert short(found, 1) == {
        "input_layernorm": (("self_attn.qkv_proj",), (0, 64, 0, 1, 0)),
        "self_attn.qkv_proj": (("self_attn.o_proj",), (96, 32, 16, 2, 0)),  # 64 of q and 32 of k come first
        "post_attention_layernorm": (("mlp.gate_up_proj",), (0, 64, 0, 1, 0)),
        "mlp.gate_up_proj": (("mlp.down_proj",), (96, 96, 0, 1, 0)),
    }


def test_interleaved_heads_have_a_spacing(tmp_path: Path) -> None:
    model, structure = opened(tmp_path / "m", "gpt-neox")
    found, _ = links.find(model, structure)
    link = next(x for x in found if x.head_dim)
    assert link.rows == (32, 64) and (link.head_dim, link.repeat, link.spacing) == (16, 1, 48)
    # q, k, v of each head lie together
    assert link.row_numbers().tolist() == [32 + 48 * h + c for h in range(4) for c in range(16)]
    assert not any("dense_4h_to_h" in name for x in found for name in x.consumers)  # behind an activation function


def test_parallel_blocks_and_norms_behind_the_layers(tmp_path: Path) -> None:
    model, structure = opened(tmp_path / "cohere", "cohere")
    found, _ = links.find(model, structure)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    assert short(found, 0)["input_layernorm"][0] == names
    model, structure = opened(tmp_path / "olmo2", "olmo2")
    found, _ = links.find(model, structure)
    assert set(short(found, 0)) == {"self_attn.v_proj", "mlp.up_proj"}


@pytest.mark.parametrize("kind", ["qwen3-moe", "qwen2-moe", "mixtral", "deepseek"])
def test_experts_share_a_norm_with_their_router(kind: str, tmp_path: Path) -> None:
    model, structure = opened(tmp_path / "m", kind)
    found, _ = links.find(model, structure)
    block = short(found, 1)
    gate, up, down = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    count = 8 if kind == "deepseek" else 6
    wanted = {f"mlp.experts.{e}.{leaf}" for e in range(count) for leaf in (gate, up)} | {"mlp.gate"}
    shared = {"qwen2-moe": "mlp.shared_expert", "deepseek": "mlp.shared_experts"}.get(kind)
    if shared:
        wanted |= {f"{shared}.gate_proj", f"{shared}.up_proj"}
        assert block[f"{shared}.up_proj"][0] == (f"{shared}.down_proj",)
    if kind == "qwen2-moe":
        wanted.add("mlp.shared_expert_gate")
    consumers = block["post_attention_layernorm"][0]
    assert set(consumers) == wanted and len(consumers) == len(wanted)
    for e in range(count):
        assert block[f"mlp.experts.{e}.{up}"][0] == (f"mlp.experts.{e}.{down}",)


def test_latent_attention(tmp_path: Path) -> None:
    model, structure = opened(tmp_path / "m", "deepseek")
    found, _ = links.find(model, structure)
    block = short(found, 0)
    assert block["input_layernorm"][0] == ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
    assert block["self_attn.q_a_layernorm"][0] == ("self_attn.q_b_proj",)
    assert block["self_attn.kv_a_layernorm"][0] == ("self_attn.kv_b_proj",)
    # a head of kv_b is 16 rows of its key, then 16 of its value
    assert block["self_attn.kv_b_proj"] == (("self_attn.o_proj",), (16, 64, 16, 1, 32))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_ways_to_attend_give_the_same_links(attention: str) -> None:
    config = transformers.LlamaConfig(**tiny.BASE, attn_implementation=attention)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert model.config._attn_implementation == attention
    structure = blocks.Structure(tuple(blocks.Block(i, f"model.layers.{i}", ()) for i in (0, 1)), ())
    found, _ = links.find(model, structure)
    assert short(found, 1)["self_attn.v_proj"] == (("self_attn.o_proj",), (0, 32, 16, 2, 0))
    assert len(found) == 8
