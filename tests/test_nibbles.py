"""Four-bit codes from a file's words straight to the kernels': the bits of `layout.pack`, and the same refusals."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from packed_weights import CASES, Weight, weight
from poison import poisoned
from triton_tools import CAPABILITIES, SHARED, compile_kernel, interpreted, mutant, resources, sass

from quantkit_kernels import layout, nibbles
from quantkit_kernels.bits import pack_bits

FOUR = [case for case in CASES if case[0] in nibbles.KINDS]
SHAPES = [(24, 384), (7, 128), (33, 640), (16, 512)]  # and ragged ones where there are no zero points
Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int]


def words_of(w: Weight) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes along K and zero points along N, as compressed-tensors packs them."""
    return pack_bits(w.codes, 4), None if w.zero is None else pack_bits(w.zero.t(), 4).t()


def laid(module: Any, case: tuple[str, str, int], w: Weight, more: int = 0, device: str = "cpu") -> Found:
    """By the kernels, into some rows of a larger weight: `more` of them before and behind."""
    kind, scale_dtype, group = case
    n, k = w.codes.shape
    words, zero = words_of(w)
    words, given_scale, zero = words.to(device), w.scale.to(device), None if zero is None else zero.to(device)
    how, high = layout.geometry(kind, scale_dtype, k, group), layout.padded_rows(n)
    tall = high + 2 * more
    codes = torch.full((layout.lines(kind, k), tall, 16), -77, dtype=torch.int32, device=device)
    outs = [torch.full((how.rows, tall, *how.shape(n)[2:]), -77, dtype=torch.int32, device=device) for _ in range(2)]
    how_many = nibbles.checks(high, kind=kind, scale_dtype=scale_dtype, k=k, group=group)
    wrong = torch.full((how_many,), -5, dtype=torch.int32, device=device)  # of any content
    assert nibbles.well_formed(kind, words, given_scale, zero, scale_dtype=scale_dtype, k=k, group=group)
    rows = slice(more, more + high)
    zero_out = outs[1][:, rows] if layout.zero_mode(kind, scale_dtype) == 2 else None
    given = (kind, words, given_scale, zero, codes[:, rows], outs[0][:, rows], zero_out, wrong)
    module.lay(*given, scale_dtype=scale_dtype, k=k, group=group)
    for t in (codes, outs[0], outs[1]):
        assert bool((t[:, :more] == -77).all() and (t[:, more + high :] == -77).all())
    return codes[:, rows], outs[0][:, rows], zero_out, int(wrong.min())


def same(found: torch.Tensor | None, wanted: torch.Tensor | None) -> bool:
    return found is wanted if found is None or wanted is None else found.cpu().equal(wanted)


def shapes(kind: str) -> list[tuple[int, int]]:
    return SHAPES if kind == "int4z" else [*SHAPES, (9, 272), (1, 16), (40, 1000)]


@pytest.mark.parametrize("case", FOUR, ids=str)
def test_words_are_those_of_the_reference(case: tuple[str, str, int]) -> None:
    kind, scale_dtype, group = case
    with interpreted("nibbles", "_nibbles") as modules, poisoned():
        for seed, (n, k) in enumerate(shapes(kind)):
            w = weight(kind, scale_dtype, group, n, k, seed)
            p = layout.pack(kind, w.codes, w.scale, w.zero, group=group, global_scale=w.global_scale)
            codes, scale, zero, wrong = laid(modules["nibbles"], case, w, more=8 * (seed % 2))
            assert torch.equal(codes, p.codes) and torch.equal(scale, p.scale) and wrong == nibbles.NOWHERE
            assert same(zero, p.zero)


def test_every_scale_of_nvfp4_and_mxfp4() -> None:
    w = weight("nvfp4", "e4m3", 16, 8, 256)
    w = w._replace(scale=torch.arange(128).clamp(max=126).to(torch.uint8).view(torch.float8_e4m3fn).view(8, 16))
    x = weight("mxfp4", "e8m0", 32, 161, 32)
    x = x._replace(scale=torch.arange(161).to(torch.uint8)[:, None])
    with interpreted("nibbles", "_nibbles") as modules:
        for case, one in ((("nvfp4", "e4m3", 16), w), (("mxfp4", "e8m0", 32), x)):
            p = layout.pack(case[0], one.codes, one.scale, group=case[2], global_scale=one.global_scale)
            assert torch.equal(laid(modules["nibbles"], case, one)[1], p.scale)


BAD: list[tuple[tuple[str, str, int], list[float], list[float]]] = [
    (("int4", "bf16", 128), [float("nan"), float("-inf"), 2.0**33 * 1.01, -(2.0**34)], [2.0**33, -(2.0**33), 0.0]),
    (("int4", "fp16", 64), [float("nan"), float("inf")], [65504.0, -65504.0]),
    (("int4z", "fp32", 64), [float("nan"), float("-inf"), 2.0**33 * 1.001], [2.0**33, -(2.0**33)]),
    (("mxfp4", "e8m0", 32), [255, 161], [160, 0]),
    (("nvfp4", "e4m3", 16), [float("nan"), -1.0], [448.0, 0.0]),
]


@pytest.mark.parametrize(("case", "bad", "good"), BAD, ids=[str(row[0]) for row in BAD])
def test_the_first_scale_that_cannot_be_held_is_found(
    case: tuple[str, str, int], bad: list[float], good: list[float]
) -> None:
    kind, scale_dtype, group = case
    with interpreted("nibbles", "_nibbles") as modules:
        for value in (*bad, *good):
            w = weight(kind, scale_dtype, group, 40, 256)
            for row, column in ((37, 0), (21, 1)):
                w.scale[row, column] = value
            wrong = laid(modules["nibbles"], case, w)[3]
            if value in good:
                assert wrong == nibbles.NOWHERE, value
                continue
            assert divmod(wrong, w.scale.shape[1]) == (21, 1), value
            with pytest.raises(ValueError, match=r"\[21, 1\]"):
                layout.pack(kind, w.codes, w.scale, w.zero, group=group, global_scale=w.global_scale)


INT, ZEROS, MX, NV = ("int4", "fp16", 64), ("int4z", "fp16", 128), ("mxfp4", "e8m0", 32), ("nvfp4", "e4m3", 16)
MUTANTS = {
    "words of another t": (INT, "place // 4 * 8", "place % 4 * 8"),
    "a nibble too high": (INT, "b0 << 4 | c0 << 8", "b0 << 8 | c0 << 4"),
    "the other half's sign": (NV, "_half(a0, b0, c0, d0, c1)", "_half(a0, b0, c0, d0, c0)"),
    "columns beyond K as they come": (INT, "FILL)\n    d = ", "0)\n    d = "),
    "rows beyond N as they come": (INT, "tl.where(there, low | top << 16, 0)", "low | top << 16"),
    "zero points of another row": (ZEROS, "row % 8 * 4", "row % 4 * 4"),
    "scales of no group raised": (MX, "tl.where(here, bits + RAISED, 0)", "bits + RAISED"),
    "subnormal scales as they are": (NV, "code * 112", "code * 128"),
    "signs count": (INT, "bits & ~SIGN", "bits"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_found(name: str, tmp_path: Path) -> None:
    import sys

    with interpreted("nibbles", "_nibbles") as modules, poisoned(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = Path(modules["_nibbles"].__file__).read_text()
        case, old, new = MUTANTS[name]
        assert text.count(old) == 1
        broken = mutant(modules["_nibbles"], old, new, tmp_path)
        with mock.patch.object(sys.modules["quantkit_kernels"], "_nibbles", broken):
            assert differs(modules["nibbles"], case, 33, 640) or differs(modules["nibbles"], case, 9, 272)


def differs(module: Any, case: tuple[str, str, int], n: int, k: int) -> bool:
    kind, scale_dtype, group = case
    w = weight(kind, scale_dtype, group, n, k)
    if scale_dtype == "e4m3":
        w.scale.view(torch.uint8)[0, 0] = 1
    p = layout.pack(kind, w.codes, w.scale, w.zero, group=group, global_scale=w.global_scale)
    codes, scale, zero, wrong = laid(module, case, w)
    alike = same(codes, p.codes) and same(scale, p.scale) and same(zero, p.zero)
    return not alike or wrong != nibbles.NOWHERE


def test_what_does_not_fit_is_left_to_the_reference() -> None:
    w = weight("int4", "bf16", 128, 16, 256)
    words, _ = words_of(w)
    how: dict[str, Any] = {"scale_dtype": "bf16", "k": 256, "group": 128}
    assert nibbles.well_formed("int4", words, w.scale, None, **how)
    assert not nibbles.fits("int4", words, w.scale, None, **how)  # it lies on the CPU
    for given in (
        ("int4", words.long(), w.scale, None),
        ("int4", words[:, :-1], w.scale, None),
        ("int4", words.t().contiguous().t(), w.scale, None),
        ("int4", words, w.scale.half(), None),
        ("int4", words, w.scale[:, :1], None),
        ("int4", words, w.scale, words[:2, :2]),
        ("int4z", words, w.scale, None),
    ):
        assert not nibbles.well_formed(*given, **how)
    assert not nibbles.well_formed("int4", words, w.scale, None, scale_dtype="bf16", k=252, group=128)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_machine_code(capability: int, tmp_path: Path) -> None:
    """Nothing is spilled; codes are read and written 16 bytes at a time or through the cache, not shared memory."""
    from quantkit_kernels import _nibbles

    types = dict.fromkeys(("src_ptr", "out_ptr", "zero_ptr", "scale_out_ptr", "zero_out_ptr", "wrong_ptr"), "*i32")
    e2m1, int4 = {"FILL": 0, "E2M1": True}, {"FILL": -0x77777778, "E2M1": False}
    e4m3 = {"FIELDS": 4, "WIDTH": 2, "MASK": 0xFF, "LARGEST": 0x7E, "SIGN": 0, "RAISED": 0, "E4M3": True, "ZERO": 0}
    bf16 = {"FIELDS": 2, "WIDTH": 1, "MASK": 0xFFFF, "LARGEST": 160 << 7, "SIGN": 1 << 15, "RAISED": 0, "E4M3": False}
    for constants, scale in (
        ({**e2m1, **e4m3}, "*u8"),
        ({**int4, **bf16, "ZERO": 0}, "*i16"),
        ({**int4, **bf16, "FIELDS": 1, "ZERO": 1}, "*i16"),
    ):
        constants |= {"ROWS": 32, "WORDS": 16}
        made = compile_kernel(_nibbles.lay, constants, capability, {**types, "scale_ptr": scale}, num_warps=4)
        registers, stack = resources(made, tmp_path)
        assert stack == 0 and registers <= 128 and made.metadata.shared <= min(4096, SHARED[capability])
        assert "LDL" not in sass(made, tmp_path)
