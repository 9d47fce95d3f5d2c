"""Codes of 2 to 8 bits as a dense little-endian bit stream in int32 words.

    element i of a row occupies bits [i b, (i+1) b) of the row's stream; its bit j is bit j % 32 of word j // 32
    4 bits: element 0 in the lowest nibble, 8 a word.  3 bits: element 10 lies across words 0 and 1.
    A row ends with zeros up to a whole word: ceil(n b / 32) words, so the reader must be told n.

Words are never taken apart as words. A few elements fill a whole number of bytes (b = 4: 2 in 1 byte, 6: 4 in 3,
3, 5, 7: 8 in b), so both directions work on the bytes of the stream, one lane of that period at a time, and every
temporary has one byte an element. The simple way, shifting int32 words against an index table, moves eight times that.
Bytes are taken in memory order: hosts are little-endian, as safetensors files are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def packed_width(n: int, bits: int) -> int:
    """Number of int32 words in which `n` codes of `bits` bits lie."""
    return -(-n * bits // 32)


# bits -> (elements, bytes) after which the pattern of shifts repeats
_PERIODS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 5: (8, 5), 6: (4, 3), 7: (8, 7), 8: (1, 1)}


def _period(bits: int) -> tuple[int, int]:
    if bits not in _PERIODS:
        raise ValueError(f"codes of {bits} bits cannot be packed; widths are 2 to 8 bits")
    return _PERIODS[bits]


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes along the last dimension.

    codes    (..., n) of any integer dtype, values in [0, 2^bits - 1]
    returns  (..., ceil(n bits / 32)) int32, contiguous
    Raises ValueError for a code outside the range: it would spill into its neighbours.
    """
    elements, size = _period(bits)
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise ValueError(f"codes are {codes.dtype}; they must be integers")
    if codes.numel() and not (bits == 8 and codes.dtype == torch.uint8):
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >> bits:
            raise ValueError(f"codes go from {low} to {high}; {bits} bits hold 0 to {(1 << bits) - 1}")
    n = codes.shape[-1]
    if bits == 8 and n % 4 == 0:  # the stream is the codes
        return codes.to(torch.uint8, copy=True, memory_format=torch.contiguous_format).view(torch.int32)
    padded = codes.to(torch.uint8)
    if n % 32:
        padded = F.pad(padded, (0, -n % 32))
    if bits == 4:  # both codes of a byte at once: twice as fast as lane by lane
        pairs = padded.flatten().view(torch.int16)
        words = (pairs >> 4 | pairs).to(torch.uint8).view(torch.int32).view(*padded.shape[:-1], -(-n // 32) * 4)
        return words[..., : packed_width(n, bits)].contiguous()
    lanes = padded.unflatten(-1, (-1, elements))
    stream = lanes.new_zeros(*lanes.shape[:-1], size)
    for lane in range(elements):
        byte, shift = lane * bits // 8, lane * bits % 8
        stream[..., byte] |= lanes[..., lane] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= lanes[..., lane] >> (8 - shift)
    return stream.flatten(-2).view(torch.int32)[..., : packed_width(n, bits)].contiguous()


def unpack_bits(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Codes that were packed along the last dimension; the inverse of `pack_bits`.

    words    (..., ceil(n bits / 32)) int32
    returns  (..., n) uint8
    Raises ValueError when the words are not int32 or not as many as `n` codes need.
    """
    elements, size = _period(bits)
    if words.dtype != torch.int32 or words.shape[-1] != packed_width(n, bits):
        raise ValueError(
            f"{n} codes of {bits} bits lie in {packed_width(n, bits)} int32 words, "
            f"not in {words.shape[-1]} of {words.dtype}"
        )
    stream = words.unsqueeze(-1).view(torch.uint8).flatten(-2)  # copies only where words are not contiguous
    if bits == 8:
        return stream[..., :n]
    periods = -(-n // elements)
    missing = periods * size - stream.shape[-1]
    if missing > 0:
        stream = F.pad(stream, (0, missing))
    stream = stream[..., : periods * size].unflatten(-1, (periods, size))
    lanes = []
    for lane in range(elements):
        byte, shift = lane * bits // 8, lane * bits % 8
        code = stream[..., byte] >> shift
        if shift + bits > 8:
            code = code | (stream[..., byte + 1] << (8 - shift))
        lanes.append(code & ((1 << bits) - 1))
    return torch.stack(lanes, -1).flatten(-2)[..., :n]
