"""Words of 4-bit codes to the operand of wgmma, in Gluon: what _unpack.py does, with every register in its place.

A lane loads the 4 words of a line (128 columns) of a row, and those of the row 8 below: all that it needs of both.
Words 0 and 1 are the first 64 columns, words 2 and 3 the others. The assembly is that of _unpack_ptx.py.

    W, A   layouts: of words, and of the weight as wgmma's operand;  other constants as in _unpack.py
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon


@gluon.constexpr_function
def words_layout(rows: int, warps: int) -> gl.DistributedLinearLayout:
    """Words (rows, 16) as the operand of wgmma wants them: a lane has 4 words of a row, and of the row 8 below."""
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    of_warps = [[16 << i, 0] for i in range((warps - 1).bit_length())]
    more = [[16 * warps << i, 0] for i in range((rows // (16 * warps) - 1).bit_length())]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0], *more], lanes, of_warps, [], [rows, 16])


@gluon.jit
def scales(
    s_ptr: gl.tensor,
    row: gl.tensor,
    line: gl.tensor,
    n_padded: gl.tensor,
    SPAN: gl.constexpr,
    WIDTH: gl.constexpr,
    HOW: gl.constexpr,
    W: gl.constexpr,
) -> gl.tensor:
    """The word with the scale of each code word of a line, (BN, 16)."""
    word = gl.arange(0, 16, layout=gl.SliceLayout(0, W))[None, :] & 3
    if HOW == "raw":
        return row[:, None] * 0 + word * 0
    else:
        at = s_ptr + (line.to(gl.uint32) * 128 // SPAN * WIDTH).to(gl.int64) * n_padded + row * WIDTH
        if WIDTH == 1:
            return gl.load(at)[:, None] + word * 0
        else:  # two words by one load
            both_at = at.cast(gl.pointer_type(gl.int64), bitcast=True)
            first = gl.load(both_at)[:, None]
            a, b = first.to(gl.int32), (first >> 32).to(gl.int32)
            if WIDTH == 2:
                return gl.where(word < 2, a, b)
            else:
                second = gl.load(both_at + 1)[:, None]
                c, d = second.to(gl.int32), (second >> 32).to(gl.int32)
                return gl.where(word < 2, gl.where(word == 0, a, b), gl.where(word == 2, c, d))


@gluon.jit
def select(
    row: gl.tensor, line: gl.tensor, GROUP: gl.constexpr, FIELDS: gl.constexpr, SCALE: gl.constexpr, W: gl.constexpr
) -> gl.tensor:
    """Where in its word of scales each code word of a line finds its own, (BN, 16), as `_unpack.selector`."""
    word = gl.arange(0, 16, layout=gl.SliceLayout(0, W))[None, :] & 3
    if FIELDS == 1:
        field = word * 0
    elif GROUP >= 128:
        field = word * 0 + ((line // (GROUP // 128)) & (FIELDS - 1))
    else:
        field = ((line * (128 // GROUP)) & (FIELDS - 1)) + (word * 32 // GROUP) % FIELDS
    if SCALE == "e4m3":
        return row[:, None] * 0 + field * 4
    elif SCALE == "e8m0":
        return row[:, None] * 0 + (0x0404 + field * 0x1010)
    else:
        return row[:, None] * 0 + (0x1010 + field * 0x2222)


@gluon.jit
def halves(t: gl.tensor) -> tuple[gl.tensor, gl.tensor]:
    """What belongs to the words (BN, 16) of a line: for its first and for its second 64 columns, (BN, 4, 2) each."""
    return gl.split(t.reshape(t.shape[0], 4, 2, 2).permute(0, 1, 3, 2))


@gluon.jit
def decoded(
    p: gl.tensor, s: gl.tensor, select: gl.tensor, DT: gl.constexpr, ASM: gl.constexpr, A: gl.constexpr
) -> gl.tensor:
    """Words (BN, 4, 2) to the weight (BN, 64), in the registers from which wgmma reads."""
    FLOAT: gl.constexpr = gl.bfloat16 if DT == "bf16" else gl.float16
    a, b, c, d = gl.inline_asm_elementwise(
        ASM,
        "=r,=r,=r,=r,r,r,r,r,r",
        [p, p, s, select, s],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    w = gl.join(gl.join(a, b), gl.join(c, d))  # row, t, j, low bit of the pair's number, high bit
    w = w.permute(0, 2, 4, 3, 1).reshape(p.shape[0], 32).to(gl.uint32, bitcast=True)
    low = (w & 0xFFFF).to(gl.uint16).to(FLOAT, bitcast=True)
    high = (w >> 16).to(gl.uint16).to(FLOAT, bitcast=True)
    return gl.convert_layout(gl.join(low, high).reshape(p.shape[0], 64), A)
