"""The weight-only kernels as machine code: their assembly run by an emulator, and what the compiler makes of them."""

from __future__ import annotations

import collections
import itertools
import re
from pathlib import Path
from typing import Any

import ptx_emulator
import pytest
import torch
from triton_tools import CAPABILITIES, SHARED, compile_kernel, resources, sass

from quantkit_kernels import _unpack_ptx, _words, layout

LINES = {"u2": 256, "u3": 256, "u4": 128, "u8": 64, "e2m1": 128, "e4m3": 64}
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
FIELDS = {"bf16": 2, "fp16": 2, "fp32": 1, "e8m0": 4, "e4m3": 4}


def ways() -> list[tuple[str, str, str, str, int, bool]]:
    """code, dtype, scale, how, zero, two: everything that a Packed of some kind can ask for."""
    found = []
    for code, dtype in itertools.product(LINES, FLOATS):
        integer = code.startswith("u")
        for zero in (0, 1, 2) if integer else (0,):
            found.append((code, dtype, "fp32" if zero == 2 else "bf16", "raw", zero, False))
            scales = ["fp32"] if zero == 2 else ["bf16", "fp16"] if zero else ["bf16", "fp16", "fp32"]
            if not integer:
                scales = ["e8m0", "e4m3"] if code == "e2m1" else ["bf16", "fp16", "fp32", "e8m0"]
            for scale in scales:
                how = "mul" if scale in (dtype, "e8m0", "e4m3") else "split"
                found.append((code, dtype, scale, how, zero, scale == "e4m3"))
                if scale in FLOATS and not zero and code in ("u2", "u3", "u4"):
                    found.append((code, dtype, scale, how, zero, True))
    return found


class Words:
    """Random words of a code and what they say; in the first half of the rows every half of a word occurs."""

    def __init__(self, code: str, whole: bool) -> None:
        g = torch.Generator().manual_seed(len(code) + whole)
        self.rows, pairs = (8192 if whole else 256), _unpack_ptx.COUNTS[code]
        words = torch.randint(0, 1 << 32, (self.rows, 16), generator=g)
        if whole:
            every = torch.arange(1 << 16).view(-1, 16)
            words[: len(every)] = words[: len(every)] & 0xFFFF0000 | every
            words[len(every) :] = words[len(every) :] & 0xFFFF | every << 16
        if code == "e4m3":  # but not NaN
            for byte in range(4):
                nan = (words >> (8 * byte) & 0x7F) == 0x7F
                words = torch.where(nan, words ^ (1 << (8 * byte)), words)
        self.words = words
        planes = torch.randint(0, 1 << 32, (self.rows * 8,), generator=g)
        stored = torch.cat([words.flatten(), planes]) if code == "u3" else words.flatten()
        stored = torch.where(stored >= 1 << 31, stored - (1 << 32), stored).int()
        codes = _words.unpack_codes(stored.view(1, self.rows, -1), code, LINES[code], pairs)
        # (rows, 16 words 4 t + j, pairs, low and high)
        self.codes = codes.view(self.rows, 4, pairs, 4, 2).permute(0, 3, 1, 2, 4).reshape(self.rows, 16, pairs, 2)
        each = planes.view(self.rows // 8, 4, 8, 2).permute(0, 2, 1, 3).reshape(self.rows, 8)
        self.plane = each.repeat_interleave(2, 1) >> ((torch.arange(16) & 1) * 8)
        self.other = torch.randint(0, 1 << 32, (self.rows, 1), generator=g).expand(-1, 16)

    def values(self, code: str, zero: int) -> torch.Tensor:
        if code == "e4m3":
            return self.codes.contiguous().view(torch.float8_e4m3fn).double()
        if code == "e2m1":
            size = torch.tensor(layout.E2M1, dtype=torch.float64)[(self.codes & 7).long()]
            return torch.where(self.codes > 7, -size, size)
        minus = (self.other & 0xFF)[..., None, None] if zero else _unpack_ptx.OFFSETS[code]
        return self.codes.double() - minus


def scales(scale: str, rows: int, dtype: str, zero: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (rows, fields) in float64, and their bits."""
    g = torch.Generator().manual_seed(len(scale))
    shape = (rows, 1 if zero else FIELDS[scale])
    if scale == "e8m0":
        bits = torch.randint(60 if dtype == "bf16" else 110, 161 if dtype == "bf16" else 138, shape, generator=g)
        return torch.exp2(bits.double() - 127), bits
    if scale == "e4m3":
        codes = torch.randint(0, 127, shape, generator=g).to(torch.uint8)
        codes[:32] = torch.arange(128).clamp(max=126).view(32, 4)
        return codes.view(torch.float8_e4m3fn).double(), codes.long()
    low, high = (-30, 33) if dtype == "bf16" else (-7, 6)
    if scale == "fp16":
        low, high = -8, 12 if dtype == "bf16" else 6
    power = torch.exp2(torch.randint(low, high, shape, generator=g).double())
    stored = ((1 + torch.rand(shape, generator=g)) * power * (1 - 2 * (torch.arange(rows)[:, None] % 2))).to(
        layout.SCALE_DTYPES[scale]
    )
    integer = stored.view(torch.int32).long() if scale == "fp32" else stored.view(torch.int16).long() & 0xFFFF
    return stored.double(), integer & 0xFFFFFFFF


_SHARED_WORDS: dict[tuple[str, bool], Words] = {}


@pytest.mark.parametrize("way", ways(), ids=lambda w: "-".join(map(str, w)))
def test_the_assembly_computes_the_weight(way: tuple[str, str, str, str, int, bool]) -> None:
    """Every half word (with "raw"), every scale of E8M0 and E4M3: the value times the scale, rounded once, to the bit.

    With "split" the rounding may be one unit in the last place off, and rarely is.
    """
    from quantkit_kernels._unpack import selector

    code, dtype, scale, how, zero, two = way
    w = _SHARED_WORDS.setdefault((code, how == "raw"), Words(code, how == "raw"))
    pairs, shape = _unpack_ptx.COUNTS[code], (w.rows, 16)
    s = select = torch.zeros(shape, dtype=torch.int64)
    exact, holder = w.values(code, zero), w.other
    if how != "raw":
        value, bits = scales(scale, w.rows, dtype, zero)
        field = (torch.arange(16) & 3) * (2 if two else 1) % value.shape[1]
        halves = torch.stack([value[:, field], value[:, (field + two) % value.shape[1]]], -1)
        exact = exact * halves[..., [0] * (pairs // 2) + [1] * (pairs - pairs // 2)][..., None]
        kind = {("e2m1", "e8m0"): "mxfp4", ("e4m3", "e8m0"): "mxfp8", ("e2m1", "e4m3"): "nvfp4"}.get((code, scale), "")
        packed = _words.pack_scales(bits.int(), 1, 1, FIELDS[scale], kind)
        word = packed.flatten().long() & 0xFFFFFFFF
        if zero == 1:
            word = word << 16 | w.other[:, 0] & 0xFF
            holder = word[:, None].expand(shape)
        if _unpack_ptx.selects(dtype, scale, how):
            s = word[:, None].expand(shape)
            select = selector.fn(field, scale, two).expand(shape)
        else:
            high = ptx_emulator.rounded(halves, FLOATS[dtype])
            rest = ptx_emulator.rounded(halves - ptx_emulator.value(high, FLOATS[dtype]), FLOATS[dtype])
            s, select = (t[..., 0] | t[..., 1] << 16 for t in (high, rest))
    text = _unpack_ptx.assembly(code, dtype, scale, how, zero, two)
    found = ptx_emulator.run(text, pairs, w.words, w.plane, s, select, holder)
    got = torch.stack([torch.stack([f & 0xFFFF, f >> 16], -1) for f in found], 2)
    bias = _unpack_ptx.BIAS_E4M3 if scale == "e4m3" else _unpack_ptx.BIAS
    wanted = ptx_emulator.rounded(exact * (2.0**-bias if dtype == "bf16" else 1.0), FLOATS[dtype])
    a, b = (ptx_emulator.value(t, FLOATS[dtype]) for t in (got, wanted))
    if how == "split":
        unit = b.abs() * 2.0**-7 if dtype == "bf16" else (b.abs() * 2.0**-10).clamp(min=2.0**-24)
        assert bool(((a - b).abs() <= unit).all()) and float((a != b).double().mean()) < 1e-2
    else:
        assert torch.equal(a, b)


def test_the_emulator_itself() -> None:
    """Against torch's own roundings, which are of other code."""
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x *= torch.exp2(torch.randint(-145, 100, (5000,), generator=torch.Generator().manual_seed(1)).double())
    single = x.float()  # exact in float64; torch rounds it to bfloat16 once
    assert torch.equal(
        ptx_emulator.rounded(single.double(), torch.bfloat16), single.bfloat16().view(torch.int16).long() & 0xFFFF
    )
    small = (single * 2.0**60).clamp(-60000, 60000)
    assert torch.equal(
        ptx_emulator.rounded(small.double(), torch.float16), small.half().view(torch.int16).long() & 0xFFFF
    )
    a = torch.tensor([0x33221100])
    assert ptx_emulator.prmt(a, torch.tensor([0x77665544]), torch.tensor([0x0743])).tolist() == [0x00774433]
    b, c, d = (torch.tensor([value]) for value in (0xF0, 0xCC, 0xAA))
    assert ptx_emulator.lop3(b, c, d, torch.tensor(0xEA)).tolist() == [0xEA]


def constants(
    kind: str,
    scale_dtype: str,
    group: int,
    block_m: int,
    block_n: int,
    unroll: int,
    warps: int,
    capability: int,
    **kw: Any,
) -> dict[str, Any]:
    """Of `gemm`, as wxa16._gemm would choose them for bfloat16 and even sizes."""
    from quantkit_kernels.choice import Gpu, mma_sync
    from quantkit_kernels.wxa16 import constants as common

    where = kw.pop("where", "end" if group == 0 else "before")
    one = torch.zeros(1) if kind == "nvfp4" else None
    empty = torch.empty(0)
    packed = layout.Packed(kind, 4096, 4096, group, 1, scale_dtype, empty, empty, None, one)
    return common(packed, torch.bfloat16, where, True) | {
        "WHERE": where,
        "BM": block_m,
        "BN": block_n,
        "UNROLL": unroll,
        "SPLIT": 1,
        "GROUP_M": 0,
        "WARPS": warps,
        "EVEN": True,
        "BIAS": True,
        "MMA_SYNC": mma_sync(block_m, warps, Gpu("", capability)),
        **kw,
    }


TYPES = dict.fromkeys(("w_ptr", "s_ptr", "z_ptr", "count_ptr"), "*i32")
TYPES |= dict.fromkeys(("x_ptr", "y_ptr", "bias_ptr", "out_ptr"), "*bf16")


def opcodes(lines: list[str]) -> collections.Counter[str]:
    """How often each instruction occurs."""
    names = (re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0] for line in lines)
    return collections.Counter(names)


def code_of(compiled: Any, folder: Path, inner: str = "") -> tuple[list[str], list[str]]:
    """All instructions, and those of the longest loop, or of the shortest that has an opcode `inner`."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass(compiled, folder), re.M)
    everything = [(int(address, 16), text) for address, text in found]
    loops = [[]]  # type: list[list[str]]
    for address, text in everything:
        jump = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            loops.append([t for a, t in everything if int(jump[1], 16) <= a <= address])
    if inner:
        return [text for _, text in everything], min((one for one in loops if opcodes(one)[inner]), key=len)
    return [text for _, text in everything], max(loops, key=len)


# kind, scales, group; tile and how it is worked off; instructions of the loop for a weight and a lane, at most
HOPPER = [
    ("int4", "bf16", 128, 8, 64, 2, 4, 4, 2.2),
    ("int4", "bf16", 128, 8, 128, 2, 4, 3, 1.95),
    ("int4", "bf16", 128, 16, 64, 1, 4, 5, 3.5),
    ("int4", "bf16", 128, 64, 128, 1, 4, 4, 3.0),
    ("int4", "bf16", 128, 256, 128, 1, 8, 3, 6.0),
    ("int4z", "bf16", 32, 8, 64, 2, 4, 4, 3.5),
    ("mxfp4", "e8m0", 32, 8, 128, 2, 4, 3, 2.5),
    ("nvfp4", "e4m3", 16, 8, 128, 2, 4, 3, 2.6),
    ("int8", "bf16", 0, 8, 64, 4, 4, 4, 2.2),
    ("fp8_e4m3", "bf16", 0, 8, 64, 4, 4, 4, 3.5),
    ("int3", "bf16", 128, 8, 64, 1, 4, 4, 3.0),
]


@pytest.mark.parametrize("case", HOPPER, ids=str)
def test_hopper(case: tuple[Any, ...], tmp_path: Path) -> None:
    """Weights go from memory to registers to the tensor core: no store to shared memory, no exchange, no plain load."""
    from quantkit_kernels import _wxa16

    kind, scale_dtype, group, block_m, block_n, unroll, warps, stages, most = case
    made = compile_kernel(
        _wxa16.gemm,
        constants(kind, scale_dtype, group, block_m, block_n, unroll, warps, 90),
        90,
        TYPES,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )
    registers, stack = resources(made, tmp_path)
    everything, loop = code_of(made, tmp_path)
    inside = opcodes(loop)
    assert stack == 0 and registers <= 255 and made.metadata.shared <= SHARED[90]
    assert not any(op in opcodes(everything) for op in ("LDL", "STL"))
    assert inside["HMMA" if block_m < 16 else "HGMMA"] > 0
    assert inside["STS"] == inside["SHFL"] == inside["LDG"] == 0 and inside["LDGSTS"] > 0
    weights = block_n * layout.get(kind).line * unroll // (32 * warps)
    assert sum(inside.values()) / weights <= most, f"{sum(inside.values()) / weights:.2f} instructions a weight"


@pytest.mark.parametrize(
    ("block_m", "block_n", "warps", "stages"), [(256, 128, 8, 3), (128, 256, 8, 4), (64, 128, 4, 3), (32, 128, 4, 4)]
)
def test_shared_out_evenly_on_hopper(block_m: int, block_n: int, warps: int, stages: int, tmp_path: Path) -> None:
    """What the loop over tiles needs is kept out of the loop over columns: no spill, no plain load or store."""
    from quantkit_kernels import _wxa16_stream

    given = constants("int4", "bf16", 128, block_m, block_n, 1, warps, 90, GROUP_M=4)
    del given["SPLIT"]
    made = compile_kernel(_wxa16_stream.gemm_stream, given, 90, TYPES, num_warps=warps, num_stages=stages)
    registers, stack = resources(made, tmp_path)
    _, loop = code_of(made, tmp_path, "HGMMA")
    assert stack <= 64 and registers <= 255 and made.metadata.shared <= SHARED[90]
    found = opcodes(loop)
    assert not any(op in found for op in ("LDL", "STL", "STS", "SHFL", "LDG", "STG")) and found["LDGSTS"] > 0


@pytest.mark.parametrize(
    ("capability", "kind", "scale_dtype", "group", "block_m", "block_n", "unroll", "warps", "stages", "opcode"),
    [
        (80, "int4", "bf16", 128, 8, 64, 2, 4, 4, "HMMA"),
        (80, "int4z", "fp16", 128, 32, 128, 1, 4, 3, "HMMA"),
        (80, "nvfp4", "e4m3", 16, 16, 64, 1, 4, 4, "HMMA"),
        (89, "int4", "bf16", 128, 16, 64, 1, 4, 4, "HMMA"),
        (89, "fp8_e4m3", "bf16", 0, 16, 64, 2, 4, 4, "HMMA"),
        (100, "int4", "bf16", 128, 8, 64, 2, 4, 3, "HMMA"),
        (100, "int4", "bf16", 128, 32, 128, 1, 4, 4, "UTCHMMA"),
        (100, "mxfp8", "e8m0", 32, 128, 128, 1, 8, 3, "UTCHMMA"),
    ],
)
def test_other_gpus(
    capability: int,
    kind: str,
    scale_dtype: str,
    group: int,
    block_m: int,
    block_n: int,
    unroll: int,
    warps: int,
    stages: int,
    opcode: str,
    tmp_path: Path,
) -> None:
    from quantkit_kernels import _wxa16

    made = compile_kernel(
        _wxa16.gemm,
        constants(kind, scale_dtype, group, block_m, block_n, unroll, warps, capability, SPLIT=2, EVEN=False),
        capability,
        TYPES,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )
    _, stack = resources(made, tmp_path)
    everything, loop = code_of(made, tmp_path)
    assert stack <= (16 if block_m == 128 else 0) and made.metadata.shared <= SHARED[capability]
    assert opcodes(everything)[opcode] > 0
    if capability < 90:
        assert opcodes(loop)["STS"] == opcodes(loop)["SHFL"] == 0
    assert "atom.global.gpu.acq_rel.add" in made.asm["ptx"]  # a partial sum is there before it is counted


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_global_scale_for_each_row(capability: int, tmp_path: Path) -> None:
    """It costs nothing in the loop: the same instructions as with one for all rows."""
    from quantkit_kernels import _wxa16

    loops = []
    for mode in (1, 2):
        given = constants("nvfp4", "e4m3", 16, 8, 64, 2, 4, capability, SPLIT=2, GLOBAL=mode)
        made = compile_kernel(_wxa16.gemm, given, capability, TYPES, num_warps=4, num_stages=3)
        assert resources(made, tmp_path)[1] == 0 and made.metadata.shared <= SHARED[capability]
        loops.append(opcodes(code_of(made, tmp_path)[1]))
    assert loops[0] == loops[1]


@pytest.mark.parametrize("capability", [80, 90])
def test_decoding_to_memory_and_early_launch(capability: int, tmp_path: Path) -> None:
    from quantkit_kernels import _wxa16

    chosen = constants("int4z", "bf16", 128, 64, 64, 1, 4, capability)
    names = _wxa16.dequantize.arg_names
    made = compile_kernel(
        _wxa16.dequantize,
        {name: value for name, value in chosen.items() if name in names},
        capability,
        TYPES,
        num_warps=4,
    )
    assert resources(made, tmp_path)[1] == 0 and "st.global.v4" in made.asm["ptx"]
