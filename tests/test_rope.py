"""Rotary embedding in one launch: the bits of transformers' function, in every layout and size."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from poison import poisoned
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from triton_tools import CAPABILITIES, SHARED, compile_kernel, interpreted, mutant, resources, sass

from quantkit_kernels import rope

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 4, 1, 1, 16), (2, 9, 3, 5, 64), (3, 2, 2, 7, 96), (1, 1, 1, 3, 2)]  # B, Hq, Hk, L, D


def inputs(shape: tuple[int, ...], dtype: torch.dtype, rows: int = 0) -> tuple[torch.Tensor, ...]:
    """q and k as parts of a joined projection, cos and sin as a model has them. rows: of cos; 0: those of q."""
    b, q_heads, k_heads, length, dim = shape
    g = torch.Generator().manual_seed(0)
    joined = torch.randn(b, length, (q_heads + 2 * k_heads) * dim, generator=g).to(dtype)
    q, k, _ = joined.split([q_heads * dim, k_heads * dim, k_heads * dim], -1)
    angles = torch.rand(rows or b, length, dim // 2, generator=g) * 100
    cos, sin = (f(torch.cat([angles, angles], -1)).to(dtype) for f in (torch.cos, torch.sin))
    q, k = (t.view(b, length, -1, dim).transpose(1, 2) for t in (q, k))
    return q, k, cos, sin


def same(found: Any, wanted: Any) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_and_operator_give_transformers_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for rows in (0, 1):
        given = inputs(shape, dtype, rows)
        wanted = apply_rotary_pos_emb(*given)
        assert same(rope.rope(*given), wanted)
        with interpreted("_rope") as modules, poisoned():
            assert same(modules["_rope"].rope(*given, hardware=False), wanted)
    q, k = rope.rope(*given)
    assert q.transpose(1, 2).is_contiguous() and k.transpose(1, 2).is_contiguous()


def test_values_that_are_not_finite_stay_in_their_head() -> None:
    given = inputs((2, 3, 2, 4, 16), torch.float32)
    q, k, cos, sin = (t.clone() for t in given)
    q[1, 2, 3, 5] = float("nan")
    with interpreted("_rope") as modules:
        found = modules["_rope"].rope(q, k, cos, sin, hardware=False)
    assert found[0].isnan().nonzero().tolist() == [[1, 2, 3, 5], [1, 2, 3, 13]] and not found[1].isnan().any()


MUTANTS = {
    "the sign of the first half": ("rounded(-high * sin_low", "rounded(high * sin_low"),
    "one sin for both halves": ("low * sin_high", "low * sin_low"),
    "a product that is not rounded": ("rounded(high * cos_high, DTYPE, HARDWARE)", "high * cos_high"),
    "heads of k counted on": ("head - of_q * HEADS", "head"),
    "positions of another row": ("token // length, token % length", "token // length, token // length"),
    "the same cos for all rows": ("cos[0] * every", "cos[0] * 0"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_found(name: str, tmp_path: Path) -> None:
    with interpreted("_rope") as modules, poisoned(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = Path(modules["_rope"].__file__).read_text()
        old, new = MUTANTS[name]
        assert text.count(old) == 1
        broken = mutant(modules["_rope"], old, new, tmp_path)
        q, k, cos, sin = inputs((2, 9, 3, 5, 64), torch.float16)
        sin[..., :32] *= 0.5  # halves that differ, which the function allows
        cos[1] += 0.25
        assert same(modules["_rope"].rope(q, k, cos, sin, hardware=False), apply_rotary_pos_emb(q, k, cos, sin))
        assert not same(broken.rope(q, k, cos, sin, hardware=False), apply_rotary_pos_emb(q, k, cos, sin))


def test_the_operator_s_contract_and_what_it_refuses() -> None:
    q, k, cos, sin = inputs((2, 4, 2, 3, 16), torch.float32)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(rope.rope, (q, k, cos, sin), test_utils=checks)
    assert rope.fits(q, k, cos, sin) and not rope.fits(q.half(), k, cos, sin)
    for given, says in (
        ((q[0], k, cos, sin), r"q is torch.float32 \(4, 3, 16\)"),
        ((q[..., :15], k, cos, sin), "D even"),
        ((q, k[:1], cos, sin), r"k is torch.float32 \(1, 2, 3, 16\)"),
        ((q, k, cos.half(), sin), r"cos is torch.float16 \(2, 3, 16\)"),
        ((q, k, cos, sin[:1]), "sin is"),
    ):
        with pytest.raises(ValueError, match=says):
            rope.rope(*given)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_machine_code(capability: int, tmp_path: Path) -> None:
    """Nothing is spilled, nothing goes through shared memory, 16 bytes a load and a store."""
    from quantkit_kernels import _rope

    constants = {"DIM": 128, "HALF": 64, "HEADS": 8, "DTYPE": "bfloat16", "HARDWARE": True}
    types = dict.fromkeys((name for name in _rope.rotate.arg_names if name.endswith("_ptr")), "*bf16")
    made = compile_kernel(_rope.rotate, constants, capability, types, num_warps=4)
    registers, stack = resources(made, tmp_path)
    text = sass(made, tmp_path)
    assert stack == 0 and registers <= 128 and made.metadata.shared <= min(1024, SHARED[capability])
    assert "LDL" not in text and "STG" in text
