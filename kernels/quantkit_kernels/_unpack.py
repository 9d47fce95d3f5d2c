"""Packed words to a tile of 16-bit floats, in registers: what every kernel on weight codes starts with.

A word (int32) holds the codes that one lane of a tensor core's operand needs, of one row; layout.py says which. Each is
turned into 2, 4 or 8 pairs, a pair being an int32 with two floats, and the pairs of a tile of words are put into the
order of its columns. Triton sees that every lane keeps what it has loaded: nothing goes from lane to lane.

How a code becomes a float costs one logic and one arithmetic instruction for two weights:
    bfloat16, integers   the 8 low bits of a bfloat16 are a number with a fixed point, 0 to 255 times 2^-133: the lowest
                         exponent has the step of the subnormal numbers. A field of a word is masked, and one fma scales
                         it and takes the zero point away: q 2^(pos-133) * s 2^(93-pos) - zero s 2^-40. The products
                         are exact, so that the weight is (q - zero) s rounded once.
    float16, integers    a field or-ed into 1024 is 1024 + q 2^pos; one fma takes the 1024 and the zero point away
    E2M1, E4M3           a code's bits put where the float has them are its value times a power of two
bfloat16 weights come out times 2^-40, which keeps s 2^93 finite up to scales of 2^33: whoever sums up multiplies by
2^40 (`with_power`). Weights below 2^-86 lose digits, and those below 2^-94 are zero. With scales in E4M3 it is 2^-103:
the bits of a code and of its scale are a float far too small, and one product can make up for no more. The smallest of
such weights is 2^-10, so that none loses a digit; sums do when they are below 2^-23.

The assembly (_unpack_ptx.py) has a twin of plain Triton operations, which runs when ASM is empty: for the interpreter,
but for its bfloat16, which needs a GPU. Equal to the last bit; with "split" the last bit differs rarely.

    p        (ROWS, 16) int32, words of one line of ROWS rows, in the order of `row_order`
    plane    (ROWS, 16) int32, the word with the third bits, "u3" only; else p again
    sw       (ROWS, 16) int32, the word with the scale; zw the word with the zero point, if ZERO is 2; else p again
    field    int32, broadcastable to (ROWS, 16): which field of sw; an even one with TWO
    CODE     "u2" "u3" "u4" "u8": unsigned integers less a zero point; "e2m1", "e4m3"
    DT       "bf16" or "fp16", what comes out
    SCALE    how sw holds scales: "bf16", "fp16" (2 in a word, or 1 above a zero point), "fp32", "e8m0", "e4m3" (4)
    HOW      "raw" without a scale; "mul" times the scale; "split" times a scale that needs two floats of DT
    ZERO     0: the zero point is half the codes' range; 1: it is the low byte of sw; 2: the low byte of zw
    TWO      whether the second half of a word's columns has the next field's scale
    COUNT    pairs in a word: columns of a line / 32;  ASM  _unpack_ptx.assembly(CODE, DT, SCALE, HOW, ZERO, TWO), or ""
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_order(r: tl.tensor, WARPS: tl.constexpr) -> tl.tensor:
    """The row of the weight, in its tile, that row r of a tile of words is: warps 8 rows apart, then the second 8.

    A load gives consecutive groups of 8 rows to the warps; an operand of a tensor core gives a warp 16 rows.
    """
    LOG: tl.constexpr = 3 if WARPS == 8 else 2 if WARPS == 4 else 1 if WARPS == 2 else 0
    return (r & 7) | ((r >> (3 + LOG) & 1) << 3) | ((r >> 3 & (WARPS - 1)) << 4) | (r >> (4 + LOG) << (4 + LOG))


@triton.jit
def spread_plane(plane: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """Words of third bits (ROWS, 8), 2 t + j / 2, to (ROWS, 16), with the byte of word 4 t + j lowest in each half."""
    wide = tl.broadcast_to(plane.reshape(ROWS, 8, 1), (ROWS, 8, 2)).reshape(ROWS, 16)
    return wide >> ((tl.arange(0, 16) & 1) * 8)[None, :]


@triton.jit
def line_scales(at: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """The word with the scale of each code word of a line: (ROWS, 16), or (ROWS, 1) where it is one word.

    at  (ROWS,) pointers to the first of the line's WIDTH words
    """
    word = tl.arange(0, 16)[None, :] & 3
    if WIDTH == 1:
        return tl.load(at)[:, None]
    else:  # two words by one load
        both_at = at.to(tl.pointer_type(tl.int64), bitcast=True)
        a, b = _halves(tl.load(both_at)[:, None])
        if WIDTH == 2:
            return tl.where(word < 2, a, b)
        else:
            c, d = _halves(tl.load(both_at + 1)[:, None])
            return tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))


@triton.jit
def _halves(both: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    return both.to(tl.int32), (both >> 32).to(tl.int32)


@triton.jit
def scale_values(
    sw: tl.tensor, field: tl.tensor, CODE: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, TWO: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Scales of both halves of the columns of each word, float32."""
    bits = sw.to(tl.uint32, bitcast=True)
    if SCALE == "fp32":
        first = bits.to(tl.float32, bitcast=True)
        second = first
    else:
        WIDTH: tl.constexpr = 16 if SCALE == "bf16" or SCALE == "fp16" else 8
        at = (field + tl.zeros_like(sw)) * WIDTH
        other = at + WIDTH
        if SCALE == "e4m3":  # scales 0, 2, 1, 3 in a word that is rotated left by 4
            bits = (bits >> 4) | (bits << 28)
            at = ((field >> 1) + (field & 1) * 2 + tl.zeros_like(sw)) * WIDTH
            other = at + 2 * WIDTH
        if ZERO == 1:
            at = tl.zeros_like(sw) + 16
        first = _scale_value(bits >> at.to(tl.uint32), CODE, SCALE)
        second = first
        if TWO:
            second = _scale_value(bits >> other.to(tl.uint32), CODE, SCALE)
    return first, second


@triton.jit
def _scale_value(bits: tl.tensor, CODE: tl.constexpr, SCALE: tl.constexpr) -> tl.tensor:
    if SCALE == "bf16":
        value = (bits << 16).to(tl.float32, bitcast=True)
    elif SCALE == "fp16":
        value = (bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    elif SCALE == "e8m0":
        value = ((bits & 0xFF) << 23).to(tl.float32, bitcast=True)
        value *= 1.2924697071141057e-26 if CODE == "e2m1" else 8.271806125530277e-25  # 2^-86, 2^-80: _words.RAISED
    else:
        value = ((bits & 0xFF) << 20).to(tl.float32, bitcast=True) * 2.028240960365167e31  # 2^104
    return value


@triton.jit
def with_power(sums: tl.tensor, DT: tl.constexpr, SCALE: tl.constexpr) -> tl.tensor:
    """Sums of weights times the power of two that those lack."""
    if DT != "bf16":
        return sums
    elif SCALE == "e4m3":
        return sums * 1.0141204801825835e31  # 2^103
    else:
        return sums * 1099511627776.0  # 2^40


@triton.jit
def pack_pair(low: tl.tensor, high: tl.tensor, FLOAT: tl.constexpr) -> tl.tensor:
    """Two float32 rounded to FLOAT, side by side in an int32."""
    a = low.to(FLOAT).to(tl.uint16, bitcast=True).to(tl.uint32)
    b = high.to(FLOAT).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (a | (b << 16)).to(tl.int32, bitcast=True)


@triton.jit
def selector(field: tl.tensor, SCALE: tl.constexpr, TWO: tl.constexpr) -> tl.tensor:
    """Where in a word with scales the assembly finds its own: for prmt a field twice, or bytes on top of both halves;
    E4M3: how far to rotate, see _words._e5m3_words, fields 0 or 2."""
    if SCALE == "e4m3":
        return field * 4
    elif SCALE == "e8m0":
        return 0x0404 + field * 0x1010 + (0x1000 if TWO else 0)
    else:
        return 0x1010 + field * 0x2222


@triton.jit
def scale_pairs(
    sw: tl.tensor,
    field: tl.tensor,
    FLOAT: tl.constexpr,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    HOW: tl.constexpr,
    ZERO: tl.constexpr,
    TWO: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The scale of both halves of a word's columns as a pair, and with "split" what it lacks to be exact."""
    first, second = scale_values(sw, field, CODE, SCALE, ZERO, TWO)
    s = pack_pair(first, second, FLOAT)
    if HOW == "split":
        first -= first.to(FLOAT).to(tl.float32)
        second -= second.to(FLOAT).to(tl.float32)
        return s, pack_pair(first, second, FLOAT)
    else:
        return s, s


@triton.jit
def _plain_pair(
    p: tl.tensor,
    plane: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    zero: tl.tensor,
    i: tl.constexpr,
    COUNT: tl.constexpr,
    CODE: tl.constexpr,
    DT: tl.constexpr,
    HOW: tl.constexpr,
    TWO: tl.constexpr,
    LESS: tl.constexpr,
) -> tl.tensor:
    """Pair i of each word in plain operations: what the assembly computes, in float32 until the rounding."""
    bits = p.to(tl.uint32, bitcast=True)
    if CODE == "e2m1":
        if i == 0:
            found = bits
        elif i == 1:
            found = bits << 6
        elif i == 2:
            found = (bits >> 4) | (bits << 28)
        else:
            found = (bits << 2) ^ (bits >> 6)
        found = found & 0x81C081C0
        low = (found << 16).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
        high = (found & 0xFFFF0000).to(tl.float32, bitcast=True) * 8.507059173023462e37
    elif CODE == "e4m3":
        low = _e4m3_value(bits >> (8 * i))
        high = _e4m3_value(bits >> (8 * i + 16))
    else:
        STEP: tl.constexpr = 8 if CODE == "u8" else 4 if CODE == "u4" else 2
        q_low = (bits >> (STEP * i)) & ((1 << STEP) - 1)
        q_high = (bits >> (STEP * i + 16)) & ((1 << STEP) - 1)
        if CODE == "u3":
            BIT: tl.constexpr = 2 + 2 * i if i < 3 else 2 * i - 3 if i < 6 else i - 6
            third = plane.to(tl.uint32, bitcast=True) >> BIT
            q_low |= (third & 1) << 2
            q_high |= (third >> 16 & 1) << 2
        low = q_low.to(tl.float32) - zero
        high = q_high.to(tl.float32) - zero
    FLOAT: tl.constexpr = tl.bfloat16 if DT == "bf16" else tl.float16
    if HOW != "raw":
        scale = first
        if TWO and i >= COUNT // 2:
            scale = second
        low *= scale
        high *= scale
    if DT == "bf16":
        low *= LESS
        high *= LESS
    return pack_pair(low, high, FLOAT)


@triton.jit
def _e4m3_value(bits: tl.tensor) -> tl.tensor:
    return (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def _plain_pairs(
    p: tl.tensor,
    plane: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    zero: tl.tensor,
    COUNT: tl.constexpr,
    CODE: tl.constexpr,
    DT: tl.constexpr,
    HOW: tl.constexpr,
    TWO: tl.constexpr,
    LESS: tl.constexpr,
) -> tl.tensor:
    a = _plain_pair(p, plane, first, second, zero, 0, COUNT, CODE, DT, HOW, TWO, LESS)
    b = _plain_pair(p, plane, first, second, zero, 1, COUNT, CODE, DT, HOW, TWO, LESS)
    out = tl.join(a, b)
    if COUNT >= 4:
        a = _plain_pair(p, plane, first, second, zero, 2, COUNT, CODE, DT, HOW, TWO, LESS)
        b = _plain_pair(p, plane, first, second, zero, 3, COUNT, CODE, DT, HOW, TWO, LESS)
        out = tl.join(out, tl.join(a, b))
    if COUNT == 8:
        a = _plain_pair(p, plane, first, second, zero, 4, COUNT, CODE, DT, HOW, TWO, LESS)
        b = _plain_pair(p, plane, first, second, zero, 5, COUNT, CODE, DT, HOW, TWO, LESS)
        c = _plain_pair(p, plane, first, second, zero, 6, COUNT, CODE, DT, HOW, TWO, LESS)
        d = _plain_pair(p, plane, first, second, zero, 7, COUNT, CODE, DT, HOW, TWO, LESS)
        out = tl.join(out, tl.join(tl.join(a, b), tl.join(c, d)))
    return out


@triton.jit
def _assembled_pairs(
    p: tl.tensor,
    plane: tl.tensor,
    s: tl.tensor,
    select: tl.tensor,
    z: tl.tensor,
    COUNT: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    if COUNT == 2:
        a, b = tl.inline_asm_elementwise(
            ASM, "=r,=r,r,r,r,r,r", [p, plane, s, select, z], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
        return tl.join(a, b)
    elif COUNT == 4:
        a, b, c, d = tl.inline_asm_elementwise(
            ASM,
            "=r,=r,=r,=r,r,r,r,r,r",
            [p, plane, s, select, z],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        return tl.join(tl.join(a, b), tl.join(c, d))
    else:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            ASM,
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r",
            [p, plane, s, select, z],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        return tl.join(tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h)))


@triton.jit
def pairs(
    p: tl.tensor,
    plane: tl.tensor,
    sw: tl.tensor,
    zw: tl.tensor,
    field: tl.tensor,
    CODE: tl.constexpr,
    DT: tl.constexpr,
    SCALE: tl.constexpr,
    HOW: tl.constexpr,
    ZERO: tl.constexpr,
    TWO: tl.constexpr,
    COUNT: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    """Pairs (ROWS, 16, 2, ...) of int32 of each word: one dimension a bit of the pair's number, the lowest first."""
    holder = zw if ZERO == 2 else sw
    if ASM != "":
        s, select = sw, p
        if HOW == "mul" and (SCALE == DT or (DT == "bf16" and (SCALE == "e8m0" or SCALE == "e4m3"))):
            select = tl.zeros_like(p) + selector(field, SCALE, TWO)
        elif HOW != "raw":
            FLOAT: tl.constexpr = tl.bfloat16 if DT == "bf16" else tl.float16
            s, select = scale_pairs(sw, field, FLOAT, CODE, SCALE, HOW, ZERO, TWO)
        return _assembled_pairs(p, plane, s, select, holder, COUNT, ASM)
    else:
        first = tl.zeros((p.shape[0], 16), tl.float32)
        second = first
        if HOW != "raw":
            first, second = scale_values(sw, field, CODE, SCALE, ZERO, TWO)
        OFFSET: tl.constexpr = 128 if CODE == "u8" else 8 if CODE == "u4" else 4 if CODE == "u3" else 2
        zero = tl.zeros((p.shape[0], 16), tl.float32) + OFFSET
        if ZERO > 0:
            zero = (holder & 0xFF).to(tl.float32)
        LESS: tl.constexpr = 9.860761315262648e-32 if SCALE == "e4m3" else 9.094947017729282e-13  # of `with_power`
        return _plain_pairs(p, plane, first, second, zero, COUNT, CODE, DT, HOW, TWO, LESS)


@triton.jit
def fragments(
    p: tl.tensor,
    plane: tl.tensor,
    sw: tl.tensor,
    zw: tl.tensor,
    field: tl.tensor,
    CODE: tl.constexpr,
    DT: tl.constexpr,
    SCALE: tl.constexpr,
    HOW: tl.constexpr,
    ZERO: tl.constexpr,
    TWO: tl.constexpr,
    COUNT: tl.constexpr,
    ASM: tl.constexpr,
    WARPS: tl.constexpr,
    MMA_SYNC: tl.constexpr,
) -> tl.tensor:
    """The tile (ROWS, columns of a line) of the weight in DT, rows and columns in their own order.

    ROWS a multiple of 16 WARPS. MMA_SYNC: whether the product will be mma.sync, which is a matter of speed only.
    Other arguments as in the module's docstring.
    """
    ROWS: tl.constexpr = p.shape[0]
    FLOAT: tl.constexpr = tl.bfloat16 if DT == "bf16" else tl.float16
    w = pairs(p, plane, sw, zw, field, CODE, DT, SCALE, HOW, ZERO, TWO, COUNT, ASM)
    if COUNT == 2:
        w = w.reshape(ROWS // (16 * WARPS), 2, WARPS, 8, 4, 4, 2).permute(0, 2, 1, 3, 5, 6, 4)
    elif COUNT == 4:
        w = w.reshape(ROWS // (16 * WARPS), 2, WARPS, 8, 4, 4, 2, 2).permute(0, 2, 1, 3, 5, 7, 6, 4)
    else:
        w = w.reshape(ROWS // (16 * WARPS), 2, WARPS, 8, 4, 4, 2, 2, 2).permute(0, 2, 1, 3, 5, 8, 7, 6, 4)
    w = w.reshape(ROWS, 16 * COUNT).to(tl.uint32, bitcast=True)
    low = (w & 0xFFFF).to(tl.uint16).to(FLOAT, bitcast=True)
    high = (w >> 16).to(tl.uint16).to(FLOAT, bitcast=True)
    tile = tl.join(low, high).reshape(ROWS, 32 * COUNT)
    if MMA_SYNC and ASM != "":
        # Does nothing, but ends Triton's search for where the tile comes from. Having seen a join there, it would give
        # mma.sync another order of columns, and every lane would have to fetch what others hold.
        if DT == "bf16":
            tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], tl.bfloat16, is_pure=False, pack=2)
        else:
            tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], tl.float16, is_pure=False, pack=2)
    return tile
