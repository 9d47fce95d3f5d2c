"""Caches of keys and values in 16, 8 or 4 bits: how they are laid out, what codes stand for. kv_append.py fills them.

    number  k_cache                    v_cache                         scales (each of keys and of values)
    16-bit  (P, H, L, D) dtype of k    (P, H, L, D)                    None
    fp8     (P, H, L, D) float8_e4m3   (P, H, L / 16, 16 D)            (1,) or (H,) float32, fixed; or (P, H, L) float32
    int8    (P, H, L, D) int8          (P, H, L / 16, 16 D)            (P, H, L) float32
    int4    (P, H, L, D / 8) int32     (P, H, L / 16, 2 D) int32       (P, H, L, G) int32, G = 1 or 2 groups of a head

P is the batch and L the longest sequence (dense), or P pages of L tokens, which `block_table` (B, pages) int32 gives to
sequences in order (paged). H key heads, D channels of a head. The last dimension is contiguous, all others are free.

A key or value is code * scale, or (code - zero) * scale; int4 codes are 0..15 and a word of their scales is the scale's
bfloat16 in the high half, the zero point's in the low one. Scales are positive and normal.

Rows of keys are as they look, but for int4's with D >= 128, whose words of 8 channels come in the order 0, 1, 8, 9, 2,
3, 10, 11, 4, ... of 16: word 4 t + w has channels 64 (w >> 1) + 16 t + 8 (w & 1) and the next seven, the first one in
the lowest bits. With D = 64 they are in order.

A block of values has 16 tokens of one head as rows of 16 int32 words, 4 t + i, t and i from 0 to 3:
    8-bit   row r, word (t, i): channel 4 r + i of tokens 4 t to 4 t + 3; byte 0 is the first token in fp8; in int8 the
            order of the tokens is 0, 2, 1, 3
    int4    row r, word (t, i): channel (D / 2) (i >> 1) + 4 r + 2 (i & 1) + c, c = 0 and 1, of the same four tokens:
            token 4 t + 2 h + b has bits 8 c + 4 h + 16 b and the next three
so that 16 bytes are what one thread of a tensor core needs of them. A token can be added to a block at any time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 16  # tokens in a block of values
SMALLEST = 2.0**-100  # of a scale, so that neither it nor its inverse leaves float32's normal numbers
HEAD_DIMS = {"none": range(16, 257, 8), "fp8": range(16, 257, 16), "int8": range(16, 257, 16), "int4": (64, 128, 256)}
MaybeTensor = torch.Tensor | None


@dataclass(frozen=True)
class Layout:
    """What the shapes and dtypes of a cache say.

    number: "none" for 16 bits, "fp8", "int8" or "int4"; scales: 0 none, 1 fixed, 2 of each token; groups: of a head.
    """

    number: str
    scales: int
    groups: int
    pages: int
    heads: int
    length: int
    head_dim: int


def layout(k_cache: torch.Tensor, v_cache: torch.Tensor, k_scale: MaybeTensor, v_scale: MaybeTensor) -> Layout:
    """Of tensors as in the module's docstring. Raises ValueError with what does not belong together."""
    names = {torch.float8_e4m3fn: "fp8", torch.int8: "int8", torch.int32: "int4"}
    number = names.get(k_cache.dtype, "none")
    if k_cache.dim() != 4 or v_cache.dim() != 4 or k_cache.dtype != v_cache.dtype:
        raise ValueError(f"caches are {named(k_cache)} and {named(v_cache)}; expected 4 dimensions and one dtype")
    if number == "none" and not k_cache.is_floating_point():
        raise ValueError(
            f"no cache is of {k_cache.dtype}; known are 16-bit floats, float8_e4m3fn, int8, int32 (4 bits)"
        )
    pages, heads, length, width = k_cache.shape
    head_dim = 8 * width if number == "int4" else width
    if number != "none" and length % BLOCK:
        raise ValueError(f"a page or a longest sequence of {length} tokens is no multiple of {BLOCK}")
    if head_dim not in HEAD_DIMS[number]:
        raise ValueError(f"heads of {head_dim} channels in a cache of {k_cache.dtype}; known are {HEAD_DIMS[number]}")
    rows, row = (length, head_dim) if number == "none" else (length // BLOCK, BLOCK * head_dim)
    expected = (pages, heads, rows, row // 8 if number == "int4" else row)
    if tuple(v_cache.shape) != expected:
        raise ValueError(f"v_cache is {named(v_cache)}; beside keys {tuple(k_cache.shape)} it must be {expected}")
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError(f"strides of caches are {k_cache.stride()} and {v_cache.stride()}; the last ones must be 1")
    scales, groups = _scales(number, k_scale, v_scale, (pages, heads, length))
    if groups == 2 and head_dim < 128:
        raise ValueError(f"two groups in heads of {head_dim} channels; the kernels hold groups of 64 channels or more")
    return Layout(number, scales, groups, pages, heads, length, head_dim)


def _scales(number: str, k_scale: MaybeTensor, v_scale: MaybeTensor, tokens: tuple[int, int, int]) -> tuple[int, int]:
    """Kind of the scales and groups of a head. Raises ValueError."""
    if k_scale is None or v_scale is None:
        if number != "none" or k_scale is not v_scale:
            raise ValueError(f"a cache of {number} needs scales of keys and of values, one of 16 bits has none")
        return 0, 1
    shape, dtype = tuple(k_scale.shape), torch.int32 if number == "int4" else torch.float32
    fixed = number == "fp8" and shape in ((1,), (tokens[1],))
    good = (
        shape in ((*tokens, 1), (*tokens, 2)) if number == "int4" else number != "none" and (fixed or shape == tokens)
    )
    last = 3 if number == "int4" else 2
    if not good or k_scale.shape != v_scale.shape or k_scale.dtype != dtype or v_scale.dtype != dtype:
        raise ValueError(f"scales of a cache of {number} {tokens} are {named(k_scale)} and {named(v_scale)}")
    if not fixed and any(t.stride(last) != 1 or (last == 3 and t.stride(2) != shape[3]) for t in (k_scale, v_scale)):
        raise ValueError(f"strides of scales are {k_scale.stride()} and {v_scale.stride()}; a token's must be adjacent")
    return (1 if fixed else 2), (shape[3] if number == "int4" else 1)


def new_cache(
    number: str | torch.dtype,
    pages: int,
    heads: int,
    length: int,
    head_dim: int,
    *,
    group: int | None = None,
    fixed: bool = False,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, MaybeTensor, MaybeTensor]:
    """Zeroed k_cache, v_cache, k_scale, v_scale: "fp8", "int8", "int4" or the dtype of a cache of 16 bits.

    group  channels of an int4 scale, the whole head or half of it; fixed: fp8 scales of a head, ones, for the caller to
           set. Raises ValueError.
    """
    dtypes = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.int32}
    dtype = number if isinstance(number, torch.dtype) else dtypes.get(number)
    groups = head_dim // group if group else 1
    if dtype is None or groups not in (1, 2) or (group and groups * group != head_dim):
        raise ValueError(f"no cache of {number} with groups of {group} of {head_dim} channels")
    k_width, v_rows, v_width = head_dim, length // BLOCK, BLOCK * head_dim
    if number == "int4":
        k_width, v_width = head_dim // 8, v_width // 8
    elif isinstance(number, torch.dtype):
        v_rows, v_width = length, head_dim
    k = torch.zeros(pages, heads, length, k_width, dtype=dtype, device=device)
    v = torch.zeros(pages, heads, v_rows, v_width, dtype=dtype, device=device)
    if isinstance(number, torch.dtype):
        scales: list[MaybeTensor] = [None, None]
    elif number == "int4":
        scales = [torch.zeros(pages, heads, length, groups, dtype=torch.int32, device=device) for _ in range(2)]
    else:
        shape = (heads,) if fixed else (pages, heads, length)
        scales = [torch.ones(shape, dtype=torch.float32, device=device) for _ in range(2)]
    layout(k, v, scales[0], scales[1])
    return k, v, scales[0], scales[1]


def quantize(
    x: torch.Tensor, number: str, *, fixed: MaybeTensor = None, groups: int = 1
) -> tuple[torch.Tensor, MaybeTensor, MaybeTensor]:
    """Codes of x (..., D), scales (..., groups) and zero points: what `kv_append.kv_append` does, in plain torch.

    fp8, int8  scale = largest magnitude / 448 or 127, or `fixed`, which must broadcast with x
    int4       scale = (high - low) / 15 in bfloat16, where the range includes 0; zero = round(-low / scale)
    A row of zeros has scale 1, one with a NaN the scale NaN. Codes saturate; float8_e4m3fn, int8 or int32.
    """
    wide = x.float().unflatten(-1, (groups, -1))
    size = wide.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(-1)
    zero = None
    if number == "int4":
        finite = wide.nan_to_num(nan=0.0, posinf=float("inf"), neginf=float("-inf"))
        low, high = finite.amin(-1).clamp(max=0), finite.amax(-1).clamp(min=0)
        scale = _divided(high - low, 15).bfloat16().float().clamp(min=SMALLEST)
    elif fixed is not None:
        codes = (x.float() / fixed.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return codes, None, None
    else:
        scale = _divided(size, 448 if number == "fp8" else 127).clamp(min=SMALLEST)
    scale = torch.where(size == 0, torch.ones_like(scale), scale)
    scale = torch.where(wide.isnan().any(-1), torch.full_like(scale, float("nan")), scale)
    part = wide / scale[..., None]
    if number == "int4":
        zero = (-low / scale).round() + 0.0  # no -0, whose bits are others
        codes = (part + zero[..., None]).nan_to_num(nan=0.0).clamp(0, 15).round().int()
    elif number == "int8":
        codes = part.nan_to_num(nan=0.0).clamp(-127, 127).round().to(torch.int8)
    else:
        codes = part.clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.flatten(-2), scale, zero


def _divided(x: torch.Tensor, by: float) -> torch.Tensor:
    """x / by, nearest also on a GPU: there torch multiplies by the inverse of a number that is no tensor."""
    return x / torch.full_like(x, by)


def _key_order(head_dim: int, device: torch.device) -> torch.Tensor:
    """Channel of each nibble of a row of int4 keys, as they lie."""
    place = torch.arange(head_dim, device=device)
    if head_dim == 64:
        return place
    slab, t, w = place - place % 128, place // 32 % 4, place // 8 % 4
    return slab + 64 * (w // 2) + 16 * t + 8 * (w % 2) + place % 8


def _value_order(head_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Where each code of a block of values, as they lie, stands in (16, D)."""
    place = torch.arange(BLOCK * head_dim, device=device)
    if dtype == torch.int32:
        row, t, i, b, c, h = place // 128, place // 32 % 4, place // 8 % 4, place // 4 % 2, place // 2 % 2, place % 2
        return (4 * t + 2 * h + b) * head_dim + head_dim // 2 * (i // 2) + 4 * row + 2 * (i % 2) + c
    row, t, i, token = place // 64, place // 16 % 4, place // 4 % 4, place % 4
    if dtype == torch.int8:
        token = token % 2 * 2 + token // 2
    return (4 * t + token) * head_dim + 4 * row + i


def pack_keys(codes: torch.Tensor) -> torch.Tensor:
    """int4 codes (..., D) 0..15 -> int32 words (..., D / 8)."""
    return _words(codes[..., _key_order(codes.shape[-1], codes.device)])


def unpack_keys(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_keys`, int32."""
    return _nibbles(words)[..., torch.argsort(_key_order(8 * words.shape[-1], words.device))]


def pack_values(codes: torch.Tensor) -> torch.Tensor:
    """Codes (..., L, D), L a multiple of 16: float8_e4m3fn or int8 -> the same (..., L / 16, 16 D); int32 -> 4 bits."""
    order = _value_order(codes.shape[-1], codes.dtype, codes.device)
    if codes.dtype == torch.int32:
        return _words(codes.unflatten(-2, (-1, BLOCK)).flatten(-2)[..., order])
    return codes.view(torch.uint8).unflatten(-2, (-1, BLOCK)).flatten(-2)[..., order].view(codes.dtype)


def unpack_values(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_values`: codes (..., L, D)."""
    blocks = _nibbles(packed) if packed.dtype == torch.int32 else packed.view(torch.uint8)
    order = torch.argsort(_value_order(blocks.shape[-1] // BLOCK, packed.dtype, packed.device))
    codes = blocks[..., order].unflatten(-1, (BLOCK, -1)).flatten(-3, -2)
    return codes if packed.dtype == torch.int32 else codes.view(packed.dtype)


def _words(nibbles: torch.Tensor) -> torch.Tensor:
    """Numbers 0..15 (..., 8 n), the first one lowest -> int32 (..., n)."""
    word = (nibbles.long().unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4, device=nibbles.device)).sum(-1)
    return torch.where(word >= 1 << 31, word - (1 << 32), word).int()


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `_words`, int32."""
    return ((words[..., None] >> torch.arange(0, 32, 4, device=words.device)) & 15).int().flatten(-2)


def dequantize(cache: torch.Tensor, scale: MaybeTensor, *, values: bool, dtype: torch.dtype) -> torch.Tensor:
    """What a cache of keys, or of values, holds: (P, H, L, D) of `dtype`, computed in it."""
    if cache.dtype == torch.int32 and scale is not None:
        codes = unpack_values(cache) if values else unpack_keys(cache)
        found = codes.to(dtype).unflatten(-1, (scale.shape[-1], -1))
        sizes = (scale & -65536).view(torch.float32).to(dtype)
        return ((found - (scale << 16).view(torch.float32).to(dtype)[..., None]) * sizes[..., None]).flatten(-2)
    found = unpack_values(cache) if values and cache.dtype in (torch.int8, torch.float8_e4m3fn) else cache
    found = found.float().to(dtype) if cache.dtype == torch.float8_e4m3fn else found.to(dtype)
    if scale is None:
        return found
    return found * (scale[:, None, None] if scale.dim() == 1 else scale[..., None]).to(dtype)


def check_sequences(batch: int, form: Layout, block_table: MaybeTensor, **numbers: MaybeTensor) -> None:
    """One int32 a sequence in each of `numbers`, and a row of pages. Raises ValueError."""
    for name, t in numbers.items():
        if t is not None and (tuple(t.shape) != (batch,) or t.dtype != torch.int32):
            raise ValueError(f"{name} is {named(t)}; expected int32 ({batch},)")
    if block_table is None:
        if form.pages != batch:
            raise ValueError(f"a cache of {form.pages} sequences for a batch of {batch}, and no block_table")
    elif block_table.dim() != 2 or block_table.shape[0] != batch or block_table.dtype != torch.int32:
        raise ValueError(f"block_table is {named(block_table)}; expected int32 ({batch}, pages)")
    elif block_table.stride(1) != 1 or form.length % BLOCK:
        raise ValueError(f"block_table of strides {block_table.stride()}, pages of {form.length} tokens")


def scale_strides(form: Layout, scale: MaybeTensor) -> tuple[int, int]:
    """From page to page and from head to head, in elements."""
    if scale is None:
        return 0, 0
    if form.scales == 1:
        return 0, scale.stride(0) if scale.shape[0] > 1 else 0
    return scale.stride(0), scale.stride(1)


def named(t: torch.Tensor) -> str:
    """Dtype and shape, for messages."""
    return f"{t.dtype} {tuple(t.shape)}"
