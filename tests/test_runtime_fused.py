"""What lies between the products of a decoder in one launch: transformers' numbers, and transformers' own otherwise."""

from __future__ import annotations

import copy
import logging
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import packed_models
import pytest
import torch
from test_runtime_formats import IDS, loaded, saved_alike
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from triton_tools import interpreted

from quantkit.presets import PRESETS
from quantkit.runtime import fused
from quantkit.runtime.joint import join
from quantkit_kernels import activation, rope

PYDOCS = Path(__file__).resolve().parents[1] / "quantkit" / "assets" / "pydocs-llama-7m"


def untraced(*tensors: torch.Tensor) -> bool:
    """`direct` but for the GPU."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """On a CPU by the kernels in the interpreter, and how often each is launched."""
    counts = {"norm": 0, "silu": 0, "rope": 0}
    with interpreted("_activation", "_rope") as modules:
        activation, rope = modules["_activation"], modules["_rope"]

        def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            counts["norm"] += 1
            y: torch.Tensor = activation.rms_norm(x, None, weight, eps, "none", hardware=False)[0]
            return y

        def silu(gate_up: torch.Tensor) -> torch.Tensor:
            counts["silu"] += 1
            y: torch.Tensor = activation.quantize(gate_up, "none", silu=True, hardware=False)[0]
            return y

        def rotated(*tensors: torch.Tensor) -> Any:
            counts["rope"] += 1
            return rope.rope(*tensors, hardware=False)

        monkeypatch.setattr(fused, "direct", untraced)
        monkeypatch.setattr(fused, "launch_rms_norm", norm)
        monkeypatch.setattr(fused, "launch_silu_mul", silu)
        monkeypatch.setattr(fused.rope, "rotated", rotated)
        yield counts


def packed_folder(folder: Path) -> Path:
    sizes = {**packed_models.DIMS, "num_hidden_layers": 2}
    packed_models.save(folder, "compressed-tensors", PRESETS["W4A16"], model=sizes)
    return folder


def packed(folder: Path, dtype: torch.dtype) -> Any:
    model = packed_models.decoding(loaded(packed_folder(folder), dtype=dtype)[0])
    join(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_real_weights_give_the_same_logits_and_tokens(dtype: torch.dtype, counted: dict[str, int]) -> None:
    """The quickstart's model, dense: its norms and rotary embeddings alone, and each of them in every step."""
    model = AutoModelForCausalLM.from_pretrained(PYDOCS, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(PYDOCS)
    given = tokenizer("The module provides", return_tensors="pt")
    with torch.no_grad():
        before, text = model(**given).logits, model.generate(**given, max_new_tokens=4, do_sample=False)
        names = list(model.state_dict())
        layers = model.config.num_hidden_layers
        assert fused.fuse(model) == {"RMSNorm": 2 * layers + 1, "silu(gate) * up": layers, "rotary embedding": layers}
        assert not fused.fuse(model) and list(model.state_dict()) == names
        after = model(**given).logits
        assert counted == {"norm": 2 * layers + 1, "silu": 0, "rope": layers}  # nothing is joined in a dense model
        assert (after - before).norm() <= {torch.float16: 2e-3, torch.float32: 1e-6}[dtype] * before.norm()
        assert torch.equal(model.generate(**given, max_new_tokens=4, do_sample=False), text)
        fused.unfuse(model)
        assert torch.equal(model(**given).logits, before)


def test_a_packed_model(tmp_path: Path, counted: dict[str, int]) -> None:
    model = packed(tmp_path / "m", torch.float16)
    with torch.no_grad():
        before = model(IDS).logits
        fused.fuse(model)
        after = model(IDS).logits
        assert counted == {"norm": 5, "silu": 2, "rope": 2}
        assert (after - before).norm() <= 2e-3 * before.norm()
        assert torch.equal(copy.deepcopy(model)(IDS).logits, after) and counted["silu"] == 4
        watched = model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: None)
        model(IDS)
        assert counted["silu"] == 5  # its output has to be there to be seen
        watched.remove()
    module = pickle.loads(pickle.dumps(model.model.norm))
    assert torch.equal(module.weight, model.model.norm.weight) and module.forward.__func__ is llama.LlamaRMSNorm.forward


def test_it_is_saved_byte_for_byte(tmp_path: Path) -> None:
    model, _ = loaded(packed_folder(tmp_path / "m"))
    join(model)
    assert fused.fuse(model)
    saved_alike(model, tmp_path / "m", tmp_path / "again")


def test_compiled_and_trained_it_is_transformers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    counts: Counter[str] = Counter()

    def counting(name: str, function: Any) -> Any:
        def launch(*given: Any) -> Any:
            counts[name] += 1
            return function(*given)

        return launch

    monkeypatch.setattr(fused, "direct", untraced)
    monkeypatch.setattr(fused.rope, "rotated", counting("rope", rope.rope_reference))
    monkeypatch.setattr(fused, "launch_rms_norm", counting("norm", activation.rms_norm_reference))
    monkeypatch.setattr(fused, "launch_silu_mul", counting("silu", activation.silu_mul_reference))
    model = packed(tmp_path / "m", torch.float32)
    with torch.no_grad():
        wanted = model(IDS, use_cache=False).logits
        fused.fuse(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            assert torch.equal(compiled(IDS, use_cache=False).logits, wanted)
    assert not counts
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    tuned(IDS, labels=IDS).loss.backward()
    assert counts == {"norm": 1}  # what comes out of the embedding has no gradient
    grads = {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}
    assert len(grads) == 28
    fused.unfuse(tuned)
    tuned.zero_grad()
    tuned(IDS, labels=IDS).loss.backward()
    for name, p in tuned.named_parameters():
        if name in grads:
            torch.testing.assert_close(p.grad, grads[name])
    with torch.no_grad():
        tuned.model.model.layers[0].mlp.forward = MethodType(fused._mlp, tuned.model.model.layers[0].mlp)
        tuned(IDS)  # its gate_proj and up_proj have adapters
    assert counts == {"norm": 1}


def test_which_modules_are_known(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import Gemma2Config, Qwen3Config

    sizes = {**packed_models.DIMS, "num_hidden_layers": 1, "head_dim": 32}
    with torch.device("meta"):
        other = gemma2.Gemma2ForCausalLM(Gemma2Config(**sizes))
        like = qwen3.Qwen3ForCausalLM(Qwen3Config(**sizes))
    with caplog.at_level(logging.INFO, logger="quantkit"):
        assert fused.fuse(other) == {"rotary embedding": 1}  # its norms add 1 to their weights, its MLPs have a GELU
        assert fused.fuse(like) == {"RMSNorm": 5, "silu(gate) * up": 1, "rotary embedding": 1}
    assert caplog.messages[1].endswith("compiled: 5 RMSNorm, 1 rotary embedding, 1 silu(gate) * up")
    assert "forward" not in vars(qwen3.Qwen3ForCausalLM(Qwen3Config(**sizes)).model.norm)


def test_a_norm_in_another_dtype_is_the_class_s_own(counted: dict[str, int]) -> None:
    norm = llama.LlamaRMSNorm(16)
    x = torch.randn(3, 16)
    with torch.no_grad():
        wanted = norm(x.half()), norm(x)
        fused.fuse(norm)
        assert torch.equal(norm(x.half()), wanted[0]) and counted["norm"] == 0  # float32, by the weight
        torch.testing.assert_close(norm(hidden_states=x), wanted[1])
    assert counted["norm"] == 1 and norm(x).requires_grad and counted["norm"] == 1
