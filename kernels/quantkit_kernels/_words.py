"""Codes and scales to the words of layout.py and back, in plain torch: which bit of which word holds what."""

from __future__ import annotations

import torch
import torch.nn.functional as F

PLANE_BITS = (2, 4, 6, 3, 5, 7, 0, 1)  # where the third bit of 3-bit code i lies in its byte of the plane


ELEMENTS = 1 << 24  # codes at once: bounds the temporaries
# Added to E8M0 scales, which are 160 at most: the power of two that the bits of a code lack, where a float has them, to
# be the weight times 2^-40. So a scale's bits are a bfloat16 with which a code's bits need one product.
RAISED = {"mxfp4": 86, "mxfp8": 80}


def pack_codes(codes_NK: torch.Tensor, code: str, line: int, pairs: int, fill_N1: torch.Tensor) -> torch.Tensor:
    """uint8 codes (N, K) to words (L, N', 16), of 3 bits (L, N', 24).

    code     "u2" "u3" "u4" "u8" "e2m1" "e4m3"
    fill_N1  (N, 1) uint8, the code of columns beyond K; those of rows beyond N are 0
    """
    n, k = codes_NK.shape
    high, each = -(-n // 8) * 8, 24 if code == "u3" else 16
    words = torch.empty(-(-k // line), high * each, dtype=torch.int32, device=codes_NK.device)
    step = max(8, ELEMENTS // max(k, 1) // 8 * 8)
    for start in range(0, n, step):
        stop = min(n, start + step)
        part = _pack_rows(codes_NK[start:stop], code, line, pairs, fill_N1[start:stop])
        rows = part.shape[1] // each
        words[:, start * 16 : (start + rows) * 16] = part[:, : rows * 16]
        if code == "u3":
            words[:, high * 16 + start * 8 : high * 16 + (start + rows) * 8] = part[:, rows * 16 :]
    return words.view(-1, high, each)


def row_words(words: torch.Tensor, code: str, start: int, stop: int) -> torch.Tensor:
    """The words of some rows; both numbers are multiples of 8."""
    if code != "u3":
        return words[:, start:stop]
    count, high = words.shape[:2]
    flat = words.reshape(count, -1)
    two, third = flat[:, start * 16 : stop * 16], flat[:, high * 16 + start * 8 : high * 16 + stop * 8]
    return torch.cat([two, third], 1).view(count, stop - start, 24)


def _pack_rows(codes_NK: torch.Tensor, code: str, line: int, pairs: int, fill_N1: torch.Tensor) -> torch.Tensor:
    """As `pack_codes`, a line's words side by side."""
    n, k = codes_NK.shape
    count, high = -(-k // line), -(-n // 8) * 8
    padded = fill_N1.expand(n, count * line).clone()
    padded[:, :k] = codes_NK
    # columns 8 pairs j + 8 i + 2 t + v of a line
    c = F.pad(padded, (0, 0, 0, high - n)).view(high, count, 4, pairs, 4, 2).permute(1, 0, 4, 2, 3, 5)
    halves = [[c[..., i, v].int() for i in range(pairs)] for v in (0, 1)]  # (L, N', t, j) each
    if code == "e2m1":
        words = _e2m1_words(halves[0], halves[1])
    else:
        step = {"u2": 2, "u3": 2, "u4": 4, "u8": 8, "e4m3": 8}[code]
        words = torch.zeros_like(halves[0][0])
        for v in (0, 1):
            for i in range(pairs):
                words |= (halves[v][i] & 3 if code == "u3" else halves[v][i]) << (16 * v + step * i)
    words = words.reshape(count, -1)
    if code != "u3":
        return words
    plane = torch.zeros_like(halves[0][0])
    for v in (0, 1):
        for i in range(pairs):
            plane |= (halves[v][i] >> 2) << (16 * v + PLANE_BITS[i])
    two = plane.view(count, high // 8, 8, 4, 2, 2)  # rows of 8, t, j / 2, j % 2
    third = (two[..., 0] | two[..., 1] << 8).permute(0, 1, 3, 2, 4)
    return torch.cat([words, third.reshape(count, -1)], 1)


def unpack_codes(words: torch.Tensor, code: str, line: int, pairs: int) -> torch.Tensor:
    """The inverse: uint8 (N', L line), padding included."""
    count, high = words.shape[:2]
    flat = words.reshape(count, -1)
    if code in _BYTES:
        return _unpack_bytes(flat, _BYTES[code], count, high, line)
    two = flat[:, : high * 16].view(count, high, 4, 4)
    found = []  # i, v
    if code == "e2m1":
        views = (two, two << 6, _shift(two, 4) | two << 28, two << 2 ^ _shift(two, 6))
        found = [[_e2m1_code(_shift(view, 16 * v)) for v in (0, 1)] for view in views]
    else:
        found = [[two >> (16 * v + 2 * i) & 3 for v in (0, 1)] for i in range(pairs)]
    if code == "u3":
        plane = flat[:, high * 16 :].view(count, high // 8, 4, 8, 2).permute(0, 1, 3, 2, 4).reshape(count, high, 4, 2)
        third = torch.stack([plane, plane >> 8], -1).flatten(-2)
        for i in range(pairs):
            for v in (0, 1):
                found[i][v] = found[i][v] | (third >> (16 * v + PLANE_BITS[i]) & 1) << 2
    c = torch.stack([torch.stack([f.to(torch.uint8) for f in pair], -1) for pair in found], -2)  # L, N', t, j, i, v
    return c.permute(1, 0, 3, 4, 2, 5).reshape(high, count * line)


def pack_scales(bits_NG: torch.Tensor, rows: int, width: int, fields: int, kind: str = "") -> torch.Tensor:
    """Bits of scales, int32 (N, G), to words (rows, N', width): `fields` scales in each, the first lowest.

    kind  of the weight: those of "nvfp4" become what `_e5m3_words` says, and RAISED is added to those that it names
    """
    bits_NG = bits_NG + RAISED.get(kind, 0)
    n, groups = bits_NG.shape
    padded = F.pad(bits_NG, (0, rows * width * fields - groups, 0, -(-n // 8) * 8 - n))
    each = padded.view(-1, rows, width, fields)
    words = torch.zeros_like(each[..., 0])
    for f in range(fields):
        words |= each[..., f] << (32 // fields * f)
    words = words.transpose(0, 1).contiguous()
    return _e5m3_words(words) if kind == "nvfp4" else words


def unpack_scales(words: torch.Tensor, fields: int, kind: str = "") -> torch.Tensor:
    """The inverse: int32 (N', all groups), padding included."""
    words, size = _e4m3_words(words) if kind == "nvfp4" else words, 32 // fields
    each = [words >> (size * f) & ((1 << size) - 1) if fields > 1 else words for f in range(fields)]
    return torch.stack(each, -1).transpose(0, 1).flatten(1) - RAISED.get(kind, 0)


def _e5m3_words(words: torch.Tensor) -> torch.Tensor:
    """Words of four E4M3 scales, none negative or NaN, to what the kernels read: E5M3, and two in their places at once.

    E5M3 has five bits of exponent, three of mantissa, no sign: the same values without subnormal numbers. It is bits 11
    to 4 of the scale's bfloat16, times 2^-104. Scales 0 and 1 lie there in the lower and the upper half of the word,
    scales 2 and 3 so in the word rotated right by 8.
    """
    found = []
    for f in range(4):
        byte = (words >> (8 * f) & 0xFF).to(torch.uint8)
        small = byte.view(torch.float8_e4m3fn).float() * 2.0**-104
        found.append(small.to(torch.bfloat16).view(torch.int16).int() >> 4 & 0xFF)
    rotated = found[0] | found[2] << 8 | found[1] << 16 | found[3] << 24
    return rotated << 4 | _shift(rotated, 28)


def _e4m3_words(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `_e5m3_words`."""
    straight = _shift(words, 4) | words << 28
    found = torch.zeros_like(words)
    for f, place in enumerate((0, 2, 1, 3)):
        value = (_shift(straight, 8 * place) & 0xFF).to(torch.int16) << 4
        scale = (value.view(torch.bfloat16).float() * 2.0**104).to(torch.float8_e4m3fn)
        found |= scale.view(torch.uint8).int() << (8 * f)
    return found


_BYTES = {"u2": 4, "u4": 2, "u8": 1, "e4m3": 1}  # codes in a byte, where they lie in bytes one after the other


def _unpack_bytes(flat: torch.Tensor, each: int, count: int, high: int, line: int) -> torch.Tensor:
    """Such codes, several times faster than word by word: every temporary has one byte a code."""
    stored = flat.contiguous().view(torch.uint8).view(count, high, 4, 4, 2, 2)  # L, N', t, j, v, byte of a half
    width = 8 // each
    codes = [stored if each == 1 else stored >> (width * q) & ((1 << width) - 1) for q in range(each)]
    c = torch.stack(codes, -1)  # column 8 pairs j + 8 (each byte + q) + 2 t + v
    return c.permute(1, 0, 3, 5, 6, 2, 4).reshape(high, count * line)


def _shift(words: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift right of int32."""
    return words if by == 0 else words >> by & ((1 << (32 - by)) - 1)


def _e2m1_words(low: list[torch.Tensor], high: list[torch.Tensor]) -> torch.Tensor:
    """Words with four codes in each half, so that both codes of a pair appear at bits 15 and 8 to 6 of their halves
    (sign, exponent and mantissa of a bfloat16) of one of these, under a mask:

        p    p << 6    p rotated right by 4    p << 2 ^ p >> 6

    Of every half the codes 0 and 1 take bits 15, 8 to 6, 9 and 2 to 0; code 2 bits 12 to 10, its sign is bit 3 of the
    other half. What the last one needs is in bits 14 and 13, 5 and 4, where others are taken away from it.
    """
    halves = []
    for codes, other in ((low, high), (high, low)):
        sign, rest = [c >> 3 for c in codes], [c & 7 for c in codes]
        half = sign[0] << 15 | rest[0] << 6 | sign[1] << 9 | rest[1] | rest[2] << 10 | other[2] >> 3 << 3
        halves.append(half | (rest[3] & 1 ^ half >> 12 & 1) << 4 | (rest[3] >> 2 ^ half >> 6 & 1) << 14)
    bottom, top = halves
    bit = high[3] >> 3  # 13 of the upper half
    top = top | bit << 13 | (high[3] >> 1 & 1 ^ bit) << 5
    bit = low[3] >> 3 ^ top >> 5 & 1  # 13 of the lower half
    bottom = bottom | bit << 13 | (low[3] >> 1 & 1 ^ bit) << 5
    return top << 16 | bottom


def _e2m1_code(half: torch.Tensor) -> torch.Tensor:
    return (half >> 15 & 1) << 3 | half >> 6 & 7
