"""Weights packed for the kernels: back to the same bits, every code where the layout says, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from packed_weights import CASES, exact, identical, packed, weight

from quantkit import numerics
from quantkit.types import TensorScheme
from quantkit_kernels import _words, layout

SHAPES = [(24, 384), (7, 130), (1, 16), (9, 257), (16, 512)]


@pytest.mark.parametrize(("kind", "scale_dtype", "group"), CASES)
def test_goes_back_to_the_same_bits(kind: str, scale_dtype: str, group: int) -> None:
    for seed, (n, k) in enumerate(SHAPES):
        w = weight(kind, scale_dtype, group, n, k, seed)
        p = layout.pack(kind, w.codes, w.scale, w.zero, group=group, global_scale=w.global_scale)
        codes, scale, zero = layout.unpack(p)
        assert identical(codes, w.codes) and identical(scale, w.scale)
        assert (zero is None) if w.zero is None else (zero is not None and identical(zero, w.zero))
        assert (p.global_scale is None) == (w.global_scale is None)
        assert p.codes.dtype == p.scale.dtype == torch.int32 and p.codes.is_contiguous() and p.scale.is_contiguous()


@pytest.mark.parametrize(("kind", "scale_dtype", "group"), CASES)
def test_decoded_values_are_those_of_the_formats(kind: str, scale_dtype: str, group: int) -> None:
    for n, k in ((9, 257), (16, 512)):
        w = weight(kind, scale_dtype, group, n, k)
        p = layout.pack(kind, w.codes, w.scale, w.zero, group=group, global_scale=w.global_scale)
        wanted = exact(w, kind, group)
        assert torch.equal(layout.decode(p, torch.float64), wanted)
        single = layout.decode(p, torch.float32)
        assert torch.allclose(single.double(), wanted, rtol=2e-7, atol=0)
        assert torch.equal(layout.decode(p, torch.bfloat16), single.bfloat16())


@pytest.mark.parametrize("number", ["int2", "int3", "int4", "int8", "fp8_e4m3", "mxfp4", "mxfp8_e4m3", "nvfp4"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_decoded_values_are_those_of_quantkit(number: str, symmetric: bool) -> None:
    if not symmetric and not number.startswith("int"):
        symmetric = True
    size = {"nvfp4": 16, "mxfp4": 32, "mxfp8_e4m3": 32}.get(number, 64)
    scheme = TensorScheme(number, "group", size, symmetric)
    w = torch.randn(12, 256, generator=torch.Generator().manual_seed(1))
    q = numerics.quantize(w, numerics.get(number).qparams(w, scheme, scale_dtype=torch.bfloat16), scheme)
    kind = number.removesuffix("_e4m3") if number.startswith("mx") else number + ("" if symmetric else "z")
    p = layout.pack(
        kind,
        q.codes_NK,
        q.qparams.scale_NG,
        q.qparams.zero_NG,
        group=size,
        global_scale=q.qparams.global_scale,
    )
    assert torch.allclose(layout.decode(p, torch.float32), numerics.dequantize(q), rtol=3e-7, atol=0)
    codes, scale, zero = layout.unpack(p, signed=True)
    assert identical(codes, q.codes_NK) and identical(scale, q.qparams.scale_NG)
    if symmetric:
        assert zero is None and q.qparams.zero_NG is None
    else:
        assert zero is not None and q.qparams.zero_NG is not None and torch.equal(zero, q.qparams.zero_NG)


def place(kind: str, column: int) -> tuple[int, int, int]:
    """Word, half and pair of one column of a line, by trying all."""
    pairs = layout.get(kind).pairs
    for t in range(4):
        for j in range(4):
            for i in range(pairs):
                for v in range(2):
                    if 8 * pairs * j + 8 * i + 2 * t + v == column:
                        return 4 * t + j, v, i
    raise AssertionError(column)


@pytest.mark.parametrize("kind", ["int2", "int3", "int4", "int8", "mxfp4", "fp8_e4m3"])
def test_every_column_lies_where_the_layout_says(kind: str) -> None:
    """One code at a time: exactly its bits change, in the word that the documentation names."""
    form, n = layout.get(kind), 16
    fill = torch.zeros(n, 1, dtype=torch.uint8)
    for column in range(form.line):
        row = (column * 7) % n
        codes = torch.zeros(n, form.line, dtype=torch.uint8)
        codes[row, column] = (1 << form.bits) - 1
        words = _words.pack_codes(codes, form.code, form.line, form.pairs, fill)[0]
        word, half, pair = place(kind, column)
        flat = words.reshape(-1)
        wanted = torch.zeros_like(flat)
        if form.code == "u3":
            wanted[row * 16 + word] = wrap(3 << (16 * half + 2 * pair))
            t, j = word // 4, word % 4
            bit = 16 * half + 8 * (j % 2) + _words.PLANE_BITS[pair]
            wanted[n * 16 + row // 8 * 64 + t * 16 + row % 8 * 2 + j // 2] = wrap(1 << bit)
        elif form.code == "e2m1":
            assert flat.nonzero().flatten().tolist() == [row * 16 + word]
            assert e2m1(int(flat[row * 16 + word]), half, pair) == 15
            assert all(
                e2m1(int(flat[row * 16 + word]), h, i) == 0 for h in (0, 1) for i in range(4) if (h, i) != (half, pair)
            )
            continue
        else:
            wanted[row * 16 + word] = wrap(((1 << form.bits) - 1) << (16 * half + form.bits * pair))
        assert torch.equal(flat, wanted), column


def wrap(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def e2m1(word: int, half: int, pair: int) -> int:
    """A code, by the shifts that the kernels use, in Python's integers."""
    p = word & 0xFFFFFFFF
    view = (p, p << 6, p >> 4 | p << 28, p << 2 ^ p >> 6)[pair] >> (16 * half)
    return (view >> 15 & 1) << 3 | view >> 6 & 7


def test_all_words_of_e2m1_are_some_codes() -> None:
    """No two words say the same: packing what a word is read as gives the word."""
    words = torch.randint(-(1 << 31), 1 << 31, (1, 4096, 16), generator=torch.Generator().manual_seed(2)).int()
    codes = _words.unpack_codes(words, "e2m1", 128, 4)
    fill = torch.zeros(4096, 1, dtype=torch.uint8)
    assert torch.equal(_words.pack_codes(codes, "e2m1", 128, 4, fill), words)


@pytest.mark.parametrize(("kind", "scale_dtype", "group"), CASES)
def test_what_is_added_counts_nothing(kind: str, scale_dtype: str, group: int) -> None:
    p = packed(kind, scale_dtype, group, 11, 300)
    form = layout.get(kind)
    high = p.codes.shape[1]
    assert high == 16
    whole = p._replace(n=high, k=p.codes.shape[0] * form.line)
    if group == 0 or -(-300 // group) == layout.geometry(kind, scale_dtype, whole.k, group).rows:
        whole = whole._replace(group=group)
    decoded = layout.decode(whole, torch.float64)
    assert not decoded[11:].any() and not decoded[:, 300:].any()
    assert torch.equal(decoded[:11, :300], layout.decode(p, torch.float64))


def test_memory() -> None:
    """Bytes a weight of large ones: what the bits and the scales say, and nothing beyond."""
    wanted = {
        ("int4", "bf16", 128): 0.5 + 2 / 128,
        ("int4z", "bf16", 128): 0.5 + 4 / 128,
        ("int3", "bf16", 128): 0.375 + 2 / 128,
        ("int2", "bf16", 128): 0.25 + 2 / 128,
        ("int8", "bf16", 0): 1 + 4 / 4096,
        ("mxfp4", "e8m0", 32): 0.5 + 1 / 32,
        ("nvfp4", "e4m3", 16): 0.5 + 1 / 16,
        ("mxfp8", "e8m0", 32): 1 + 1 / 32,
    }
    for (kind, scale_dtype, group), bytes_each in wanted.items():
        p = packed(kind, scale_dtype, group, 8, 4096)
        assert 4 * (p.codes.numel() + p.scale.numel()) == bytes_each * 8 * 4096, kind


def test_scales_of_tensors_and_blocks() -> None:
    codes = torch.randint(-8, 8, (20, 256), generator=torch.Generator().manual_seed(3)).to(torch.int8)
    for shape in ((), (1,), (1, 1)):
        p = layout.pack("int4", codes, torch.full(shape, 0.25), group=0, rows=0)
        assert torch.equal(layout.decode(p, torch.float64), codes.double() * 0.25)
        assert layout.unpack(p)[1].shape == (1, 1)
    block = torch.rand(2, 2, generator=torch.Generator().manual_seed(4))
    p = layout.pack("fp8_e4m3", codes.to(torch.float8_e4m3fn), block, group=128, rows=16)
    wanted = codes.double() * block.double().repeat_interleave(16, 0)[:20].repeat_interleave(128, 1)
    assert torch.equal(layout.decode(p, torch.float64), wanted) and identical(layout.unpack(p)[1], block)


def test_order_of_columns_for_g_idx() -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    g_idx = torch.empty(64, dtype=torch.int32)
    g_idx[order] = (torch.arange(64) // 16).int()
    found = layout.act_order(g_idx, 16)
    assert torch.equal(g_idx[found], (torch.arange(64) // 16).int())
    with pytest.raises(ValueError, match="does not have 32 columns in each group"):
        layout.act_order(g_idx, 32)


def test_what_cannot_be_held_is_refused() -> None:
    w = weight("int4", "bf16", 128, 8, 256)
    ones = torch.ones(8, 2)
    fp8 = torch.zeros(8, 256, dtype=torch.uint8)
    fp8[3, 17] = 0xFF
    e8m0 = torch.full((8, 8), 127, dtype=torch.uint8)
    e4m3 = torch.ones(8, 16).to(torch.float8_e4m3fn)
    negative = (-torch.ones(8, 16)).to(torch.float8_e4m3fn)

    def bad(t: torch.Tensor, value: float) -> torch.Tensor:
        out = t.clone()
        out[2, 1] = value
        return out

    nines = torch.full((8, 256), 9, dtype=torch.uint8)
    zero = torch.zeros(8, 2, dtype=torch.int16)
    one = torch.ones(1)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (("int5", w.codes, ones), {}, "kind 'int5'; there are int2"),
        (("int2", nines, ones), {}, r"codes outside 0 .. 3: 2048, the first at \[0, 0\]: 9"),
        (("int4", w.codes.int(), ones), {}, "codes are torch.int32; int4 has uint8 or int8"),
        (("int4", w.codes[0], ones), {}, r"codes are \(256,\)"),
        (("int4", w.codes, ones[:7]), {}, r"scales are \(7, 2\); expected \(8, 2\)"),
        (("int4", w.codes, ones.double()), {}, "scales are torch.float64; int4 has bf16, fp16 or fp32"),
        (("int4", w.codes, bad(ones, float("nan"))), {}, r"scales that are NaN or infinite: 1, the first at \[2, 1\]"),
        (("int4", w.codes, bad(ones, 1e11)), {}, r"scales above 2\^33.*\[2, 1\]: 9\d+\.0"),
        (("int4", w.codes, ones, zero), {}, "int4 with zero points: True"),
        (("int4z", w.codes, ones), {}, "int4z with zero points: False"),
        (("int4z", w.codes, ones, bad(zero, 256)), {}, r"zero points outside 0 .. 255: 1, the first at \[2, 1\]: 256"),
        (("int4", w.codes, torch.ones(8, 6)), {"group": 48}, "groups of 48; kernels hold powers of two"),
        (("int4", w.codes, torch.ones(8, 16)), {"group": 16}, "groups of 16 with fp32 scales of int4; .* 32 at least"),
        (("fp8_e4m3", fp8.view(torch.float8_e4m3fn), ones), {}, r"codes that are NaN: 1, the first at \[3, 17\]: 255"),
        (("fp8_e4m3", w.codes.float(), ones), {}, "codes are torch.float32; fp8_e4m3 has float8_e4m3fn"),
        (("mxfp4", w.codes, bad(e8m0, 255)), {"group": 32}, r"scales that are NaN \(E8M0 255\): 1, .* \[2, 1\]"),
        (("mxfp4", w.codes, bad(e8m0, 161)), {"group": 32}, r"scales above 2\^33"),
        (("mxfp4", w.codes, e8m0[:, :2]), {"group": 128}, "mxfp4 has e8m0 scales of 32; not e8m0 of 128"),
        (("mxfp4", w.codes, e8m0.float()), {"group": 32}, "scales are torch.float32; mxfp4 has e8m0"),
        (("nvfp4", w.codes, e4m3), {"group": 16}, "nvfp4 with zero points: False, with a global scale: False"),
        (("nvfp4", w.codes, negative), {"group": 16, "global_scale": one}, "scales that are negative or NaN: 128"),
    ]
    for arguments, extra, message in cases:
        with pytest.raises(ValueError, match=message):
            layout.pack(*arguments, **{"group": 128} | extra)
    p = layout.pack("int4z", w.codes, ones, bad(zero, 255), group=128)
    with pytest.raises(ValueError, match=r"zero points that int8 does not hold: 1, the first at \[2, 1\]: 247"):
        layout.unpack(p, signed=True)


def test_pieces_of_rows_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large weights are worked off in pieces; so are small ones with a small limit, to the same bits."""
    cases = [("int3", "fp16", 128), ("mxfp4", "e8m0", 32), ("int8z", "fp16", 64)]
    whole = [packed(*case, 43, 300) for case in cases]
    values = [layout.decode(p, torch.float32) for p in whole]
    for module in (_words, layout):
        monkeypatch.setattr(module, "ELEMENTS", 8 * 300)
    for case, p, value in zip(cases, whole, values):
        again = packed(*case, 43, 300)
        assert torch.equal(again.codes, p.codes) and torch.equal(layout.decode(p, torch.float32), value)
        assert torch.equal(layout.unpack(p)[0].view(torch.uint8), weight(*case, 43, 300).codes.view(torch.uint8))


def test_a_machine_without_triton_packs() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from quantkit_kernels import layout, wxa16\n"
        "p = layout.pack('int4', torch.zeros(8, 128, dtype=torch.int8), torch.ones(8, 1), group=128)\n"
        "print(float(wxa16.linear(torch.ones(1, 128), p).sum()), 'quantkit_kernels._wxa16' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0.0", "False"]
