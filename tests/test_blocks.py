"""The structure of nine architectures is found without a list of them, and block by block equals the whole model."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from quantkit import blocks, skeleton
from quantkit.checkpoint import Checkpoint
from quantkit.errors import InputError


def open_model(folder):
    ghost = skeleton.build(folder, Checkpoint.open(folder))
    return ghost, blocks.find(ghost)


def last_norm(model):
    return model.model.norm


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_blocks_run_alone_equal_the_whole_model(kind, tmp_path):
    folder = tiny.save(tmp_path / kind, kind, shard="60KB")
    ghost, structure = open_model(folder)
    assert all(p.is_meta for p in ghost.model.parameters())
    assert [b.name for b in structure.blocks] == ["model.layers.0", "model.layers.1"]
    assert structure.warnings == () and structure.outside == ("lm_head",)
    leaves = [[n.removeprefix("model.layers.0.") for n in group] for group in structure.blocks[0].groups]
    if kind == "phi3":
        assert leaves == [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]]
    else:
        qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
        assert leaves == [qkv, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]

    ids = torch.randint(4, 4096, (3, 24), generator=torch.Generator().manual_seed(1))
    ghost.load([n for n in ghost.to_disk if not n.startswith("model.layers.")], "cpu", torch.float32)
    ghost.tie()
    whole = torch.ones_like(ids).bool()
    # a last, smaller batch, as there is one when the rows do not divide
    batches = blocks.begin(ghost, structure, [(ids[:2], whole[:2]), (ids[2:], whole[2:])])
    for block in structure.blocks:
        names = ghost.parameters(block.name + ".")
        ghost.load(names, "cpu", torch.float32)
        for batch in batches:
            batch.hidden = blocks.run(ghost.model.get_submodule(block.name), batch, block.index)
        ghost.unload(names)
        assert all(ghost.model.get_parameter(n).is_meta for n in names if "inv_freq" not in n)
    hidden = last_norm(ghost.model)(torch.cat([b.hidden for b in batches]))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(hidden, reference.model(ids, use_cache=False).last_hidden_state, atol=1e-5)


def test_equal_arguments_are_kept_once(tmp_path):
    ghost, structure = open_model(tiny.save(tmp_path / "m", num_hidden_layers=4))
    ghost.load([n for n in ghost.to_disk if not n.startswith("model.layers.")], "cpu", torch.float32)
    ids = torch.zeros(6, 16, dtype=torch.long)
    batches = blocks.begin(ghost, structure, [(part, part == 0) for part in ids.split(2)])
    tables = {id(call[1]["position_embeddings"][0]) for batch in batches for call in batch.calls}
    assert len(batches) == 3 and len(tables) == 1


def test_a_model_without_linear_blocks_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="GPT2LMHeadModel: no list of repeated blocks"):
        open_model(tmp_path)


def test_a_tensor_of_more_than_two_dimensions_is_refused_by_name(tmp_path):
    from transformers import JetMoeConfig, JetMoeForCausalLM

    small = {k: v for k, v in tiny.BASE.items() if k not in ("vocab_size", "head_dim")}
    JetMoeForCausalLM(JetMoeConfig(**small, vocab_size=64, kv_channels=16)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model.layers.0.mlp.input_linear.weight: has more than two dimensions"):
        open_model(tmp_path)


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "no-such-model"}, "does not know this architecture"),
        (
            {"model_type": "novel", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}},
            "trust_remote_code",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "already quantized"),
        ({"intermediate_size": 128}, r"has shape \(64, 96\), but config.json makes it \(64, 128\)"),
        ({"num_hidden_layers": 3}, "9 tensors of the model are in no shard"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, changes, says):
    folder = tiny.save(tmp_path / "m")
    change_config(folder, **changes)
    with pytest.raises(InputError, match=says):
        open_model(folder)


def test_tensors_without_a_place_are_told(tmp_path):
    folder = tiny.save(tmp_path / "m")
    change_config(folder, num_hidden_layers=1)
    ghost, structure = open_model(folder)
    assert len(structure.blocks) == 1
    assert len(ghost.unknown) == 9 and all(n.startswith("model.layers.1.") for n in ghost.unknown)
