"""A packed model split over two ranks computes what the whole computes, or says why it cannot be split."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import packed_models
import pytest
import tiny
import torch
from test_format_gptq import field_case, field_writer
from test_runtime_experts import SCHEMES, SIZES
from test_runtime_experts import pack as pack_experts
from test_runtime_writers import GPTQ, held_of, weight_of

import quantkit
from quantkit.errors import InputError
from quantkit.presets import PRESETS
from quantkit.types import Scheme, TensorScheme

ASYMMETRIC = TensorScheme("int8", "token", symmetric=False, dynamic=True)
RANK = """
import os, sys
import torch
import quantkit
from transformers import AutoModelForCausalLM

ids = torch.arange(3, 19)[None]
for folder in sys.argv[1:]:
    split = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
    with torch.no_grad():
        ours = split(ids).logits
    grad = torch.randn(1, 4, split.config.hidden_size, generator=torch.Generator().manual_seed(0), requires_grad=True)
    split(inputs_embeds=grad).logits.square().mean().backward()
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = whole(ids).logits
    one, both = (sum(p.nbytes for n, p in m.named_parameters() if n.endswith("codes")) for m in (split, whole))
    error = float((ours - theirs).norm() / theirs.norm())
    found = grad.grad.clone()
    grad.grad = None
    whole(inputs_embeds=grad).logits.square().mean().backward()
    slope = float((found - grad.grad).norm() / grad.grad.norm())
    if os.environ["RANK"] == "0":
        print("RESULT", error, slope, one / both)
try:
    split.save_pretrained(sys.argv[1] + "-saved")
except Exception as error:
    if os.environ["RANK"] == "0":
        print("SAVING", error)
"""


@pytest.mark.slow
def test_two_ranks_compute_what_one_computes(tmp_path: Path) -> None:
    sizes = {**packed_models.DIMS, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    sizes["num_key_value_heads"] = 8
    folders = {"W4A16": ("compressed-tensors", PRESETS["W4A16"]), "fp8": ("fp8-block", PRESETS["FP8_BLOCK"])}
    folders["nvfp4"] = ("modelopt", PRESETS["NVFP4"])
    for name in ("FP8_DYNAMIC", "W8A8", "W4AFP8"):  # scales of whole tokens
        folders[name] = ("compressed-tensors", PRESETS[name])
    folders["asymmetric"] = ("compressed-tensors", Scheme(TensorScheme("int8"), ASYMMETRIC))
    for name, (form, scheme) in folders.items():
        packed_models.save(tmp_path / name, form, scheme, model=sizes)
    mixture = {**SIZES, "moe_intermediate_size": 256, "num_key_value_heads": 4}
    pack_experts(tiny.save(tmp_path / "mixture", "qwen3-moe", **mixture, num_experts=4), *SCHEMES["W4A16"])
    pack_experts(tiny.save(tmp_path / "fp8-mixture", "qwen3-moe", **mixture, num_experts=4), *SCHEMES["FP8_DYNAMIC"])
    (tmp_path / "rank.py").write_text(RANK)
    paths = {str(Path(m.__file__ or "").parents[1]) for m in (quantkit, sys.modules["quantkit_kernels"])}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sorted(paths)), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "rank.py")]
    done = subprocess.run(
        [*run, *(str(tmp_path / x) for x in (*folders, "mixture", "fp8-mixture"))],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    results = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(results) == 9, done.stderr[-2000:]
    for error, slope, part in results:
        assert float(error) < 1e-5 and float(slope) < 1e-4 and float(part) == 0.5
    (saving,) = [line for line in done.stdout.splitlines() if line.startswith("SAVING")]
    assert "split over several ranks" in saving


def test_parts_are_those_of_the_whole() -> None:
    q, z, scale, g_idx, weight = field_case(4, False, False)
    tensors = {**field_writer(q, z, scale, g_idx, 4, "v2")}
    held = held_of({**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"}, tensors, (32, 128))
    part = held.split(1, 1, 2)
    assert part.shape == (32, 64)
    assert torch.equal(weight_of(part, part.pack(tensors)), weight[:, 64:])
    with pytest.raises(InputError, match=r"32 rows cannot be split .* each would have 16, .* multiple of 32"):
        held.split(0, 0, 2)
    with pytest.raises(InputError, match="128 columns cannot be split over 3 ranks"):
        held.split(1, 0, 3)
    with pytest.raises(InputError, match=r"128 columns cannot be split over 8 ranks: .* no multiple of 32"):
        held.split(1, 0, 8)
    q, z, scale, g_idx, _ = field_case(4, True, True)
    ordered = held_of({**GPTQ, "sym": True}, field_writer(q, z, scale, g_idx, 4, "v1"), (32, 128))
    with pytest.raises(InputError, match="not in groups side by side"):
        ordered.split(1, 0, 2)
