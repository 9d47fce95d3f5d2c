"""The Gluon kernel for many tokens on Hopper, as machine code: what makes it fast must be seen in it, without a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_weights import CASES
from triton_tools import SHARED, compile_kernel, resources, sass

from quantkit_kernels import _unpacking, choice, layout, wxa16
from quantkit_kernels.choice import Choice, Gpu, Problem

H200 = Gpu()
LAYOUT = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)"


def compiled(case: tuple[str, str, int], one: Choice, dtype: torch.dtype = torch.bfloat16, dividing: int = 0) -> Any:
    from quantkit_kernels import _wxa16_hopper, _wxa16_launch

    kind, scale, group = case
    found = _unpacking.constants_of(
        kind, scale, group, wxa16.FLOATS[dtype], "before" if group else "end", True, dividing
    )
    constants = {name: found[name] for name in _wxa16_launch.USED}
    constants |= {"WHERE": "before" if group else "end", "BM": one.block_m, "BN": one.block_n, "STAGES": one.stages}
    constants |= {"GROUP_M": one.group_m, "WARPS": one.warps, "BIAS": True, "COPIED": True}
    name = wxa16.FLOATS[dtype]
    types = {
        "x_desc": f"tensordesc<{name}[{one.block_m}, 128],{LAYOUT}>",
        "y_desc": f"tensordesc<{name}[{min(64, one.block_m)}, {one.block_n}],{LAYOUT}>",
        "w_ptr": "*i32",
        "s_ptr": "*i32",
        "count_ptr": "*i32",
        "y_ptr": f"*{name}",
        "bias_ptr": f"*{name}",
    }
    return compile_kernel(_wxa16_hopper.gemm_hopper, constants, 90, types, num_warps=one.warps)


@pytest.mark.parametrize(
    ("case", "one", "dividing"),
    [
        (("int4", "bf16", 128), choice.hopper_tile(256, 128, 8), 0),
        (("int4z", "bf16", 32), choice.hopper_tile(128, 128, 8), 0),
        (("nvfp4", "e4m3", 16), choice.hopper_tile(64, 128, 8, 2), 1),
        (("nvfp4", "e4m3", 16), choice.hopper_tile(64, 128, 8, 2), 2),
        (("mxfp4", "e8m0", 32), choice.hopper_tile(128, 64, 4, 2), 0),
    ],
    ids=str,
)
def test_the_machine_decodes_while_it_multiplies(
    case: tuple[str, str, int], one: Choice, dividing: int, tmp_path: Path
) -> None:
    made = compiled(case, one, dividing=dividing)
    registers, stack = resources(made, tmp_path)
    assert stack == 0 and registers * 32 * one.warps <= 65_536
    problem = Problem(*case[:2], 4096, 4096, case[2], one.block_m)
    assert made.metadata.shared <= choice.shared_bytes(one, problem, one.stages, H200) <= SHARED[90]
    each = choice.resident(one, problem, H200) // H200.sms
    assert registers * 32 * one.warps * each <= 65_536  # as many run at once as the shares are cut for
    text = sass(made, tmp_path)
    loop = text[text.index("HGMMA") : text.rindex("HGMMA")]
    assert "LDS" not in loop and "STS" not in loop and "LDL" not in text  # a weight visits no other memory
    assert "LDG.E.128" in text and "UTMALDG" in text
    pairs = 64 * one.block_n // (32 * one.warps) // 2  # of weights of a lane in half a line
    waits = re.findall(r"DEPBAR\.LE gsb0, (0x[01])", text)
    if one.block_m >= 256:
        # A product of half a line is started before the one before it is waited for: the waits of the loop leave one
        # under way, and what lies between them, all of the decoding, is done meanwhile.
        assert waits == ["0x1", "0x1", "0x0"] and len(re.findall(r"HFMA2|HMUL2", loop)) >= pairs
    else:  # between the start of a product and the wait for it lies decoding: of at least every other half of a line
        windows = re.findall(r"WARPGROUP\.ARRIVE(.*?)WARPGROUP\.DEPBAR", text, re.S)
        assert set(waits) == {"0x0"} and sum(len(re.findall(r"HFMA2|HMUL2", w)) for w in windows) >= pairs
    assert not wrong_registers(text)
    assert wrong_registers(re.sub(r"gsb0, 0x[01]", "gsb0, 0x3", text))  # it does find what is written too early


def wrong_registers(text: str) -> list[str]:
    """Instructions of the loop that write a register from which, or into which, a product under way works."""
    code = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P[T0-9]+ )?([A-Z][A-Za-z0-9_.]*)(.*?);", text)
    place = {at: i for i, (at, _, _) in enumerate(code)}
    loops = []
    for end, (_, name, rest) in enumerate(code):
        begin = place[f"{int(found[1], 16):04x}"] if name == "BRA" and (found := re.search(r"0x(\w+)", rest)) else end
        if begin < end and any(name.startswith("HGMMA") for _, name, _ in code[begin:end]):
            loops.append(code[begin : end + 1])
    wrong: list[str] = []
    under_way: list[set[int]] = [set()]  # registers of each group of products, the last one not complete yet
    for _, name, rest in min(loops, key=len) * 2:
        if name.startswith("HGMMA"):
            sums, weight = (int(r) for r in re.findall(r"\bR(\d+)\b", rest)[:2])
            under_way[-1] |= {*range(sums, sums + int(name.split("x")[1]) // 2), *range(weight, weight + 4)}
            if "gsb0" in rest:
                under_way.append(set())
        elif "DEPBAR" in name and "gsb0" in rest:
            under_way = under_way[max(0, len(under_way) - 1 - int(re.findall(r"0x(\d)", rest)[0])) :]
        elif (written := re.match(r"\s*R(\d+)", rest)) and not name.startswith(("ST", "BAR")):
            size = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
            if set().union(*under_way) & set(range(int(written[1]), int(written[1]) + size)):
                wrong.append(name + rest)
    return wrong


def test_what_it_takes() -> None:
    taken = [
        case
        for case in CASES
        if choice.hopper_fits(Problem(*case[:2], 136, 2176 if case[2] != 384 else 384, case[2], 64), H200)
    ]
    assert ("int4", "bf16", 128) in taken and ("nvfp4", "e4m3", 16) in taken and ("int4", "bf16", 0) in taken
    assert all(layout.get(kind).bits == 4 for kind, _, _ in taken)
    assert ("int4", "fp16", 64) not in taken  # such a scale is no bfloat16: two products a weight
    plain = Problem("int4", "bf16", 4096, 4096, 128, 256)
    assert choice.choose(plain, H200).path == "hopper"
    for other in (plain._replace(m=16), plain._replace(k=4160), plain._replace(n=4100), plain._replace(kind="int8")):
        assert not choice.hopper_fits(other, H200)
        assert choice.fitted(choice.hopper_tile(128, 128, 8), other, H200).path != "hopper"
    assert not choice.hopper_fits(plain, Gpu("NVIDIA B200", 100, 148))
    assert choice.hopper_fits(plain._replace(dtype="fp16", scale_dtype="fp16"), H200)
    assert not choice.hopper_fits(plain._replace(kind="mxfp4", scale_dtype="e8m0", group=32, dtype="fp16"), H200)
