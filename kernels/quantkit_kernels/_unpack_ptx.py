"""PTX that turns a word of codes into pairs of 16-bit floats, written out for each code, dtype and way to scale.

Valid from sm_80 on: products are fma with -0.0, because mul on bfloat16 pairs needs sm_90. _unpack.py says what is
computed, and has the same in plain Triton.
"""

from __future__ import annotations

import struct

BIAS, BIAS_E4M3 = 40, 103  # bfloat16 weights are times 2^-BIAS; with scales in E4M3, times 2^-BIAS_E4M3
OFFSETS = {"u2": 2, "u3": 4, "u4": 8, "u8": 128}  # the zero point of symmetric integers
COUNTS = {"u2": 8, "u3": 8, "u4": 4, "u8": 2, "e2m1": 4, "e4m3": 2}  # pairs in a word

# Fields of a word, in the order of the pairs: how far to shift right, then the lowest bit of the field in each half.
FIELDS = {
    "u2": [(s, p) for s in (0, 8) for p in (0, 2, 4, 6)],
    "u3": [(0, 0), (0, 2), (0, 4), (6, 0), (6, 2), (6, 4), (12, 0), (12, 2)],
    "u4": [(s, p) for s in (0, 8) for p in (0, 4)],
    "u8": [(0, 0), (8, 0)],
}
WIDTHS = {"u2": 2, "u3": 2, "u4": 4, "u8": 8}
# The third bit of code i of "u3" is bit _words.PLANE_BITS[i] in its byte of the plane; shifted right by this it lies
# above the other two.
PLANE_SHIFTS = (0, 0, 0, 1, 1, 1, -2, -3)


def assembly(code: str, dtype: str, scale: str, how: str, zero: int, two: bool) -> str:
    """For one word: its pairs $0, $1, ... from five operands, of which it reads those that it needs.

    p, plane      the word of codes, the word with their third bits
    s, select     the word with the scale, and which bytes of it (_unpack.selector); or, where not `selects`, a scale as
                  a pair, and with "split" what it lacks to be exact
    z             the word whose low byte is the zero point

    dtype "bf16" or "fp16"; the rest as in _unpack.py. A kernel takes the text as a constant.
    """
    text = _Block(COUNTS[code], dtype, two)
    if how != "raw":
        text.scale = _scale(text, scale, how, zero)
    if code in FIELDS:
        _integers(text, code, how, zero)
    else:
        _floats(text, code, how, scale)
    return text.finish()


def selects(dtype: str, scale: str, how: str) -> bool:
    """Whether the text takes the scale out of its word; else the kernel has to make it a pair."""
    return how == "mul" and (scale == dtype or (dtype == "bf16" and scale in ("e8m0", "e4m3")))


def _scale(t: _Block, scale: str, how: str, zero: int) -> str:
    """The scale as a pair: both halves the same, or one for each half of the word's columns."""
    s, select = t.operand("s"), t.operand("select")
    if not selects("bf16" if t.bf16 else "fp16", scale, how):
        return s
    if scale in ("bf16", "fp16"):
        return t.op("prmt.b32", s, s, "0x3232") if zero == 1 else s if t.two else t.op("prmt.b32", s, s, select)
    if scale == "e4m3":  # times 2^-104
        return t.masked(t.op("shf.r.wrap.b32", s, s, select), 0x0FF0)
    return t.op("shr.u32", t.op("prmt.b32", s, "0", select), "1")  # the byte on top of each half, then where it belongs


class _Block:
    """Instructions, and registers that are made as they are needed; the same instruction twice is one register."""

    scale: str

    def __init__(self, outputs: int, dtype: str, two: bool) -> None:
        self.lines: list[str] = []
        self.known: dict[str, str] = {}
        self.apart: dict[str, tuple[str, str]] = {}  # registers of 16 bits with the halves of one
        self.outputs, self.bf16, self.two = outputs, dtype == "bf16", two
        self.kind = dtype.replace("fp16", "f16") + "x2"

    def operand(self, name: str) -> str:
        return f"${self.outputs + ('p', 'plane', 's', 'select', 'z').index(name)}"

    def op(self, name: str, *args: str, to: str | None = None) -> str:
        arguments = ", ".join(args)
        if to is None:
            key = f"{name} {arguments}"
            if key in self.known:
                return self.known[key]
            to = self.known[key] = f"r{len(self.known)}"
        self.lines.append(f"{name} {to}, {arguments};")
        return to

    def twice(self, value: float) -> str:
        """A register that holds a float, exact in the dtype, in both halves."""
        if self.bf16:
            half = struct.unpack("<I", struct.pack("<f", value))[0] >> 16
        else:
            half = struct.unpack("<H", struct.pack("<e", value))[0]
        return self.op("mov.b32", f"0x{half:04x}{half:04x}")

    def fma(self, a: str, b: str, c: str, to: str | None = None) -> str:
        return self.op(f"fma.rn.{self.kind}", a, b, c, to=to)

    def mul(self, a: str, b: str, to: str | None = None) -> str:
        return self.fma(a, b, self.twice(-0.0), to)

    def shifted(self, a: str, right: int) -> str:
        if right == 0:
            return a
        return self.op("shr.u32", a, str(right)) if right > 0 else self.op("shl.b32", a, str(-right))

    def masked(self, a: str, half: int) -> str:
        return self.op("and.b32", a, f"0x{half:04x}{half:04x}")

    def per_pair(self, s: str) -> list[str]:
        """The scale of each pair: `s` as it is, or its low half twice and its high half twice."""
        if not self.two:
            return [s] * self.outputs
        half = self.outputs // 2
        low, high = self.twice_each(s)
        return [low] * half + [high] * half

    def twice_each(self, s: str) -> tuple[str, str]:
        """A register with the low half of `s` twice, and one with the high half.

        By mov, which the compiler makes a part of the product that reads it; of prmt it does not.
        """
        if s not in self.apart:
            self.apart[s] = f"l{len(self.apart)}", f"h{len(self.apart)}"
            self.lines.append(f"mov.b32 {{{', '.join(self.apart[s])}}}, {s};")
        low, high = self.apart[s]
        return self.op("mov.b32", f"{{{low}, {low}}}"), self.op("mov.b32", f"{{{high}, {high}}}")

    def scaled(self, i: int, d: str, how: str) -> None:
        """Output i, value times scale: one product, or two where the scale is a sum of two floats."""
        s = self.per_pair(self.scale)[i]
        if how == "mul":
            self.mul(d, s, to=f"${i}")
        else:
            rest = self.per_pair(self.operand("select"))[i]
            self.fma(d, s, self.mul(d, rest), to=f"${i}")

    def finish(self) -> str:
        registers = ", ".join(self.known.values())
        halves = ", ".join(name for pair in self.apart.values() for name in pair)
        declared = f".reg .b32 {registers};" + (f" .reg .b16 {halves};" if halves else "")
        return f"{{ {declared} {' '.join(self.lines)} }}"


def _integers(t: _Block, code: str, how: str, zero: int) -> None:
    low = OFFSETS[code]
    z = t.op("prmt.b32", t.operand("z"), "0", "0x4040") if zero else ""  # the low byte in both halves
    for i, (_, pos) in enumerate(FIELDS[code]):
        q = _integer_field(t, code, i)
        to = f"${i}" if how == "raw" else None
        if t.bf16:  # q 2^(pos-133)
            up = 2.0 ** (133 - BIAS - pos)
            if how == "mul" and not zero:
                s = t.per_pair(t.scale)[i]
                t.fma(q, t.mul(s, t.twice(up)), t.mul(s, t.twice(-low * 2.0**-BIAS)), to=f"${i}")
                continue
            if zero:  # z 2^-133 as it comes
                minus = t.mul(z, t.twice(-(2.0 ** (133 - BIAS))))
            else:
                minus = t.twice(-low * 2.0**-BIAS)
            d = t.fma(q, t.twice(up), minus, to=to)
        else:  # 1024 + q 2^pos
            q = t.op("or.b32", q, "0x64006400")
            base = 1024.0 / 2**pos
            if zero:
                minus = t.fma(t.op("or.b32", z, "0x64006400"), t.twice(-1.0), t.twice(1024.0 - base))
            else:
                minus = t.twice(-(base + low))
            d = t.fma(q, t.twice(2.0**-pos), minus, to=to)
        if how != "raw":
            t.scaled(i, d, how)


def _integer_field(t: _Block, code: str, i: int) -> str:
    """Code i of both halves at its position, the other bits zero."""
    shift, pos = FIELDS[code][i]
    p = t.operand("p")
    if code == "u8":
        return t.op("prmt.b32", p, "0", "0x4341" if shift else "0x4240")
    q = t.masked(t.shifted(p, shift), ((1 << WIDTHS[code]) - 1) << pos)
    if code == "u3":
        q = t.op("or.b32", q, t.masked(t.shifted(t.operand("plane"), PLANE_SHIFTS[i]), 4 << pos))
    return q


def _floats(t: _Block, code: str, how: str, scale: str) -> None:
    values, up = (_e4m3 if code == "e4m3" else _e2m1)(t)
    if t.bf16 and how == "mul":
        # The scale takes the power of two, both halves of it at once where they differ; E8M0 has it already.
        missing = {"e4m3": up - BIAS_E4M3 + 104, "e8m0": 0}.get(scale, up - BIAS)
        scales = t.per_pair(t.mul(t.scale, t.twice(2.0**missing)) if missing else t.scale)
        for i, value in enumerate(values):
            t.mul(value, scales[i], to=f"${i}")
        return
    power = t.twice(2.0 ** (up - BIAS if t.bf16 else up))
    for i, value in enumerate(values):
        d = t.mul(value, power, to=f"${i}" if how == "raw" else None)
        if how != "raw":
            t.scaled(i, d, how)


def _e4m3(t: _Block) -> tuple[list[str], int]:
    """The bits of each pair's codes where the dtype has them, and the power of two that is missing."""
    p, (right, half, up) = t.operand("p"), (4, 0x07F0, 120) if t.bf16 else (1, 0x3F80, 8)
    values = []
    for left in (8, 0):
        sign = t.masked(t.shifted(p, -left), 0x8000)
        values.append(t.op("lop3.b32", t.shifted(p, right - left), f"0x{half:04x}{half:04x}", sign, "0xea"))
    return values, up


def _e2m1(t: _Block) -> tuple[list[str], int]:
    """As `_e4m3`. layout.py chose the bits of the codes so that shifts and one logic instruction suffice."""
    p = t.operand("p")
    values = [t.masked(p, 0x81C0), t.masked(t.shifted(p, -6), 0x81C0)]
    values.append(t.masked(t.op("shf.r.wrap.b32", p, p, "4"), 0x81C0))
    values.append(t.op("lop3.b32", t.shifted(p, -2), t.shifted(p, 6), "0x81c081c0", "0x28"))  # (a ^ b) & mask
    if t.bf16:
        return values, 126
    signs = [t.masked(value, 0x8000) for value in values]
    return [
        t.op("lop3.b32", t.shifted(value, -3), "0x0e000e00", sign, "0xea") for value, sign in zip(values, signs)
    ], 14
