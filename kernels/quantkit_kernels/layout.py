"""Weights as the kernels want them: codes in the order of a tensor core's operands, scales as whole words.

A file's codes and scales are packed once, when a model is loaded, and go back to the same bits. One packing of a kind
serves every number of tokens, every tile and every GPU.

    codes   (L, N', 16) int32. N' is N rounded up to 8. A line is 64 bytes of a row: 256 columns of 2-bit codes, 128 of
            4-bit, 64 of 8-bit; L = ceil(K / line). Word 4 t + j of a line has P pairs of codes (P = 8, 4, 2), and pair
            i the columns 8 P j + 8 i + 2 t and the next one, the first in the word's low half. So lane t of four has in
            16 bytes what a tensor core's operand wants from it: columns 2t, 2t+1, 2t+8 and 2t+9 of every 16.
            Integers: unsigned, code i of a half at bit b i. 3 bits: (L, N', 24), N' 16 words of the low two bits, then
            N' 8 words of the third: (N'/8, 4 t, 8 rows, 2), word j/2 for the words j, bits as _words.PLANE_BITS.
            E2M1: _words._e2m1_words.  FP8: a byte as it is, code i of a half at bit 8 i.
    scale   (S, N') int32, F scales of a row in a word, the first lowest, so that a word spans group F columns. Where a
            line needs several words of a row, they lie side by side: (S, N', 2) or (S, N', 4).
            float32: F = 1.  bfloat16, float16: F = 2 symmetric, and with zero points F = 1: the scale above, the zero
            point in the low byte.  E8M0: F = 4, raised by _words.RAISED.  E4M3: F = 4, as _words._e5m3_words has it.
            One scale a row: (1, N').
    zero    beside float32 scales: like the scale, the zero point in the low byte; else None

Columns beyond K have codes of the value zero, rows beyond N scales of zero.

    kind        w =
    int2 int3 int4 int8          (q - 2^(b-1)) scale       q unsigned, 0 .. 2^b - 1
    int2z int3z int4z int8z      (q - zero) scale          zero 0 .. 255
    fp8_e4m3                     value scale
    mxfp4 mxfp8                  value 2^(scale - 127)     groups of 32; mxfp8 is E4M3
    nvfp4                        value scale / global      groups of 16; one global scale, or one a row
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantkit_kernels._words import ELEMENTS, pack_codes, pack_scales, row_words, unpack_codes, unpack_scales

LARGEST_SCALE = 2.0**33  # beyond, bfloat16 products in the kernels overflow
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

FLOAT_SCALES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SCALE_DTYPES = {name: dtype for dtype, name in FLOAT_SCALES.items()} | {
    "e8m0": torch.uint8,
    "e4m3": torch.float8_e4m3fn,
}


class Kind(NamedTuple):
    """code: of _unpack.py; line: columns in 16 words; pairs: of codes in a word; zero: has zero points."""

    code: str
    bits: int
    line: int
    pairs: int
    zero: bool = False

    @property
    def words(self) -> int:
        """Words of a row in a line."""
        return 24 if self.bits == 3 else 16

    @property
    def integer(self) -> bool:
        return self.code.startswith("u")


KINDS = {
    "int2": Kind("u2", 2, 256, 8),
    "int3": Kind("u3", 3, 256, 8),
    "int4": Kind("u4", 4, 128, 4),
    "int8": Kind("u8", 8, 64, 2),
    "int2z": Kind("u2", 2, 256, 8, True),
    "int3z": Kind("u3", 3, 256, 8, True),
    "int4z": Kind("u4", 4, 128, 4, True),
    "int8z": Kind("u8", 8, 64, 2, True),
    "fp8_e4m3": Kind("e4m3", 8, 64, 2),
    "mxfp4": Kind("e2m1", 4, 128, 4),
    "mxfp8": Kind("e4m3", 8, 64, 2),
    "nvfp4": Kind("e2m1", 4, 128, 4),
}
_FIXED = {"mxfp4": (32, "e8m0"), "mxfp8": (32, "e8m0"), "nvfp4": (16, "e4m3")}  # group, scale


class Geometry(NamedTuple):
    """How scales lie: fields in a word; words of a row in a line, 1 where a word spans lines.

    span    columns of the `width` words; 0 when there is one scale a row
    rows    S, the first dimension of `scale`
    """

    fields: int
    width: int
    span: int
    rows: int

    def shape(self, n: int) -> tuple[int, ...]:
        """Of `scale`, for n rows of the weight."""
        high = padded_rows(n)
        return (self.rows, high) if self.width == 1 else (self.rows, high, self.width)


class Packed(NamedTuple):
    """A weight (n, k) for the kernels. group: columns of a scale, 0 for all; rows: rows of a scale, 0 for all."""

    kind: str
    n: int
    k: int
    group: int
    rows: int
    scale_dtype: str  # "bf16", "fp16", "fp32", "e8m0", "e4m3"
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    global_scale: torch.Tensor | None  # (1,) or (n,) float32, "nvfp4" only


def get(kind: str) -> Kind:
    """The description of a kind. Raises ValueError for a name that is none."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}; there are {', '.join(KINDS)}")
    return KINDS[kind]


def padded_rows(n: int) -> int:
    return -(-n // 8) * 8


def lines(kind: str, k: int) -> int:
    return -(-k // get(kind).line)


def geometry(kind: str, scale_dtype: str, k: int, group: int) -> Geometry:
    """Where scales lie. Raises ValueError for what is not held: groups of 48, float16 scales of mxfp4, ..."""
    form = get(kind)
    if kind in _FIXED:
        if (group, scale_dtype) != _FIXED[kind]:
            raise ValueError(f"{kind} has {_FIXED[kind][1]} scales of {_FIXED[kind][0]}; not {scale_dtype} of {group}")
    elif scale_dtype not in FLOAT_SCALES.values():
        raise ValueError(f"{kind} has scales of bf16, fp16 or fp32, not {scale_dtype!r}")
    if group == 0:
        return Geometry(1, 1, 0, 1)
    if group < 16 or (group & (group - 1) and group % form.line):
        raise ValueError(f"groups of {group}; kernels hold powers of two from 16 on, and multiples of {form.line}")
    fields = {"e8m0": 4, "e4m3": 4, "fp32": 1}.get(scale_dtype, 1 if form.zero else 2)
    if group & (group - 1):
        fields = 1
    span = group * fields
    if span < form.line:
        width = form.line // span
        if width > 4:
            least = form.line // (4 * fields)
            raise ValueError(f"groups of {group} with {scale_dtype} scales of {kind}; kernels hold {least} at least")
        return Geometry(fields, width, form.line, lines(kind, k))
    return Geometry(fields, 1, span, -(-k // span))


def zero_mode(kind: str, scale_dtype: str) -> int:
    """Where zero points lie: 0 nowhere, 1 beside the scale in its word, 2 in words of their own."""
    return 0 if not get(kind).zero else 2 if scale_dtype == "fp32" else 1


def act_order(g_idx_K: torch.Tensor, group: int) -> torch.Tensor:
    """The order of columns that puts the members of a group side by side, for GPTQ's g_idx. (K,) int64.

    Pack codes[:, order], and give the order to the kernels, which take x[..., order].
    Raises ValueError when a group has not `group` members.
    """
    order = torch.argsort(g_idx_K.long(), stable=True)
    expected = torch.arange(len(order), device=order.device) // group
    if not torch.equal(g_idx_K.long()[order], expected):
        raise ValueError(f"g_idx does not have {group} columns in each group")
    return order


def pack(
    kind: str,
    codes_NK: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    *,
    group: int,
    rows: int = 1,
    global_scale: torch.Tensor | None = None,
) -> Packed:
    """Lays a weight out for the kernels.

    codes_NK      integers: uint8 from 0, or int8 with zero at 0 (as zero points then too); fp8_e4m3, mxfp8:
                  float8_e4m3fn; mxfp4, nvfp4: uint8 0 .. 15
    scale         (ceil(N / rows), ceil(K / group)), or any shape of one element; dtype is kept
    zero          like the scale, integers; only for the kinds with z
    group, rows   columns and rows of a scale; 0 for all
    global_scale  nvfp4 only: one, or one a row
    Raises ValueError for what does not belong together, and with the place for what cannot be held: codes beyond the
    width, NaN, scales above 2^33, zero points outside 0 .. 255.
    """
    form = get(kind)
    if codes_NK.dim() != 2:
        raise ValueError(f"codes are {tuple(codes_NK.shape)}; expected (N, K)")
    n, k = codes_NK.shape
    signed = codes_NK.dtype == torch.int8
    codes = _checked_codes(kind, codes_NK)
    scale_dtype = {"e8m0": "e8m0", "e4m3": "e4m3"}.get(_FIXED.get(kind, (0, ""))[1], FLOAT_SCALES.get(scale.dtype, ""))
    if scale.dtype != SCALE_DTYPES.get(scale_dtype):
        raise ValueError(f"scales are {scale.dtype}; {kind} has {_FIXED.get(kind, (0, 'bf16, fp16 or fp32'))[1]}")
    shape = (1 if rows == 0 else -(-n // rows), 1 if group == 0 else -(-k // group))
    how = geometry(kind, scale_dtype, k, group)
    scale_RG = _shaped(scale, shape, "scales")
    _check_scales(scale_RG, scale_dtype)
    if (zero is not None) != form.zero or (global_scale is not None) != (kind == "nvfp4"):
        given = zero is not None, global_scale is not None
        raise ValueError(f"{kind} with zero points: {given[0]}, with a global scale: {given[1]}")
    zero_RG = None
    if zero is not None:
        zero_RG = _shaped(zero, shape, "zero points").int() + (1 << (form.bits - 1) if signed else 0)
        _refuse((zero_RG < 0) | (zero_RG > 255), "zero points outside 0 .. 255", zero_RG)
    if global_scale is not None:
        if global_scale.numel() not in (1, n):
            raise ValueError(f"{global_scale.numel()} global scales; expected 1, or {n}, one a row")
        global_scale = global_scale.float().reshape(-1)
    fill = None if zero_RG is None else _per_row(zero_RG, n, rows)
    mode = zero_mode(kind, scale_dtype)
    bits = _bits(_per_row(scale_RG, n, rows))
    if mode == 1 and fill is not None:
        bits = bits << 16 | fill
    zeros = _pack_words(kind, fill, how) if mode == 2 and fill is not None else None
    words = pack_codes(codes, form.code, form.line, form.pairs, _filling(form, n, fill, codes.device))
    scales = _pack_words(kind, bits, how)
    return Packed(kind, n, k, group, rows, scale_dtype, words, scales, zeros, global_scale)


def unpack(packed: Packed, *, signed: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes (N, K), scales (ceil(N / rows), ceil(K / group)) and zero points (uint8), as they were packed, to the bit.

    signed  integers: codes and zero points as int8 with zero at 0
    Raises ValueError when `signed` is asked of zero points that int8 does not hold.
    """
    form = get(packed.kind)
    codes = torch.empty(packed.n, packed.k, dtype=torch.uint8, device=packed.codes.device)
    for start, stop in _row_pieces(packed):
        words = row_words(packed.codes, form.code, start, -(-stop // 8) * 8)
        codes[start:stop] = unpack_codes(words, form.code, form.line, form.pairs)[: stop - start, : packed.k]
    how = geometry(packed.kind, packed.scale_dtype, packed.k, packed.group)
    mode = zero_mode(packed.kind, packed.scale_dtype)
    bits = _unpack_words(packed.scale, packed, how)
    zero = None
    if mode == 1:
        bits, zero = bits >> 16, bits & 0xFF
    elif mode == 2 and packed.zero is not None:
        zero = _unpack_words(packed.zero, packed, how)
    dtype = SCALE_DTYPES[packed.scale_dtype]
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    scale = bits.to(integer).view(dtype)
    if packed.kind in ("fp8_e4m3", "mxfp8"):
        codes = codes.view(torch.float8_e4m3fn)
    elif signed and form.integer:
        half = 1 << (form.bits - 1)
        codes = (codes.int() - half).to(torch.int8)
        if zero is not None:
            _refuse((zero - half < -128) | (zero - half > 127), "zero points that int8 does not hold", zero - half)
            return codes, scale, (zero - half).to(torch.int8)
    return codes, scale, None if zero is None else zero.to(torch.uint8)


def decode(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The weight (N, K): computed in float32, or in float64 if that is the dtype, and rounded once."""
    form = get(packed.kind)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    w_NK = torch.empty(packed.n, packed.k, dtype=dtype, device=packed.codes.device)
    scale_NG, zero_NG = _decoded_scales(packed, wide)
    size = packed.group or max(packed.k, 1)

    def spread(t_NG: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """One a column; without a copy where groups are whole, for which `value` is viewed as they are."""
        part = t_NG[start:stop]
        return part[:, :, None] if packed.k % size == 0 else part.repeat_interleave(size, 1)[:, : packed.k, None]

    values = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=wide, device=w_NK.device)
    # on a CPU, what stays in its cache is decoded several times faster
    for start, stop in _row_pieces(packed, 1 << 17 if w_NK.device.type == "cpu" else ELEMENTS):
        words = row_words(packed.codes, form.code, start, -(-stop // 8) * 8)
        codes = unpack_codes(words, form.code, form.line, form.pairs)[: stop - start, : packed.k]
        by_group = (stop - start, -1, size if packed.k % size == 0 else 1)
        if form.integer:
            value = codes.to(wide).view(by_group)
            value -= 1 << (form.bits - 1) if zero_NG is None else spread(zero_NG, start, stop)
        elif form.code == "e4m3":
            value = codes.view(torch.float8_e4m3fn).to(wide).view(by_group)
        else:
            value = values[codes.int()].view(by_group)
        value *= spread(scale_NG, start, stop)
        if packed.global_scale is not None:
            whole = packed.global_scale.to(wide)
            value = value / (whole if len(whole) == 1 else whole[start:stop, None, None])
        w_NK[start:stop] = value.view(stop - start, packed.k)
    return w_NK


def _row_pieces(packed: Packed, elements: int = ELEMENTS) -> list[tuple[int, int]]:
    """Rows in pieces that begin at multiples of 8 and have few enough codes."""
    step = max(8, elements // max(packed.k, 1) // 8 * 8)
    return [(start, min(packed.n, start + step)) for start in range(0, packed.n, step)]


def _decoded_scales(packed: Packed, wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points of each row and group, as floats."""
    how = geometry(packed.kind, packed.scale_dtype, packed.k, packed.group)
    each = packed._replace(rows=1)
    bits = _unpack_words(packed.scale, each, how)
    zero = None
    mode = zero_mode(packed.kind, packed.scale_dtype)
    if mode == 1:
        bits, zero = bits >> 16, (bits & 0xFF).to(wide)
    elif mode == 2 and packed.zero is not None:
        zero = _unpack_words(packed.zero, each, how).to(wide)
    if packed.scale_dtype == "e8m0":
        return torch.exp2(bits.to(wide) - 127), zero
    dtype = SCALE_DTYPES[packed.scale_dtype]
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    return bits.to(integer).view(dtype).to(wide), zero


def _filling(form: Kind, n: int, zero_NG: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """(N, 1) uint8: a code of the value zero for the columns beyond K."""
    if zero_NG is not None:
        return zero_NG[:, -1:].clamp(max=(1 << form.bits) - 1).to(torch.uint8)
    return torch.full((n, 1), 1 << (form.bits - 1) if form.integer else 0, dtype=torch.uint8, device=device)


def _checked_codes(kind: str, codes_NK: torch.Tensor) -> torch.Tensor:
    """Codes as uint8 from 0 on. Raises ValueError for another dtype, a code out of range, NaN."""
    form = get(kind)
    if form.code == "e4m3":
        if codes_NK.dtype not in (torch.float8_e4m3fn, torch.uint8):
            raise ValueError(f"codes are {codes_NK.dtype}; {kind} has float8_e4m3fn")
        codes = codes_NK.view(torch.uint8)
        _refuse((codes & 0x7F) == 0x7F, "codes that are NaN", codes)
        return codes
    if codes_NK.dtype not in (torch.uint8, *((torch.int8,) if form.integer else ())):
        raise ValueError(f"codes are {codes_NK.dtype}; {kind} has uint8" + (" or int8" if form.integer else ""))
    low, high = 0, (1 << form.bits) - 1
    if codes_NK.dtype == torch.int8:
        low, high = -(1 << (form.bits - 1)), (1 << (form.bits - 1)) - 1
    if form.bits < 8:
        _refuse((codes_NK < low) | (codes_NK > high), f"codes outside {low} .. {high}", codes_NK)
    return codes_NK if low == 0 else (codes_NK.view(torch.uint8) + (1 << (form.bits - 1))) & ((1 << form.bits) - 1)


def _check_scales(scale: torch.Tensor, scale_dtype: str) -> None:
    if scale_dtype == "e8m0":
        _refuse(scale == 255, "scales that are NaN (E8M0 255)", scale)
        _refuse(scale > 127 + 33, "scales above 2^33, which the kernels do not hold", scale)
    elif scale_dtype == "e4m3":
        _refuse(scale.view(torch.uint8) > 0x7E, "scales that are negative or NaN", scale)
    else:
        _refuse(~torch.isfinite(scale), "scales that are NaN or infinite", scale)
        _refuse(scale.float().abs() > LARGEST_SCALE, "scales above 2^33, which the kernels do not hold", scale)


def _refuse(wrong: torch.Tensor, what: str, values: torch.Tensor) -> None:
    """Raises ValueError that names the first place where `wrong` is set."""
    if bool(wrong.any()):
        row, column = (int(i) for i in torch.nonzero(wrong)[0])
        value = values[row, column]
        shown = value.float().item() if value.is_floating_point() else value.item()
        raise ValueError(f"{what}: {int(wrong.sum())}, the first at [{row}, {column}]: {shown}")


def _shaped(t: torch.Tensor, shape: tuple[int, int], what: str) -> torch.Tensor:
    if t.numel() == 1 and shape == (1, 1):
        return t.reshape(1, 1)
    if tuple(t.shape) != shape:
        raise ValueError(f"{what} are {tuple(t.shape)}; expected {shape}")
    return t


def _per_row(t_RG: torch.Tensor, n: int, rows: int) -> torch.Tensor:
    return t_RG.expand(n, -1) if rows == 0 else t_RG.repeat_interleave(rows, 0)[:n] if rows > 1 else t_RG


def _bits(scale: torch.Tensor) -> torch.Tensor:
    """The bits of scales, int32."""
    scale = scale.contiguous()
    if scale.dtype.itemsize == 4:
        return scale.view(torch.int32)
    if scale.dtype.itemsize == 2:
        return scale.view(torch.int16).int() & 0xFFFF
    return scale.view(torch.uint8).int()


def _pack_words(kind: str, bits_NG: torch.Tensor, how: Geometry) -> torch.Tensor:
    return pack_scales(bits_NG, how.rows, how.width, how.fields, kind).view(how.shape(bits_NG.shape[0]))


def _unpack_words(words: torch.Tensor, packed: Packed, how: Geometry) -> torch.Tensor:
    """The bits of the scales (R, G), int32, as `_bits` gives them."""
    bits = unpack_scales(words, how.fields, packed.kind)
    groups = 1 if packed.group == 0 else -(-packed.k // packed.group)
    step = packed.rows or max(packed.n, 1)
    return bits[: packed.n : step, :groups].clone(memory_format=torch.contiguous_format)
