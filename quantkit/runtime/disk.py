"""The tensors of a packed layer as files have them, to codes and back, to the byte and some rows at a time.

`formats` reads more than it writes: act-order, ragged blocks, zero points of GPTQ's v1, scales in another dtype. What
was loaded must be saved as it was, so here is the inverse of each `unpack` for all that it reads.

Of a layer's tensors three are rebuilt from codes: that of the codes, of the scales, of the zero points; weight_shape
says nothing new. All others (scalars, g_idx) are `kept` as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from quantkit.checkpoint import DTYPES
from quantkit.formats import compressed_tensors, gptq
from quantkit.formats._shared import offset_binary, pack_pairs
from quantkit.formats.awq import _pack as awq_words
from quantkit.types import QuantizedTensor, Scheme, TensorSpec
from quantkit_kernels.bits import pack_bits

# Codes at once, which bounds what is in memory beside a layer's tensors. A GPU takes longer to be told than to work.
ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 23}

# leaf -> the dimension along which it is cut, when rows of the weight are
_ROWS = {
    **dict.fromkeys(("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_scale_inv"), 0),
    **dict.fromkeys(("qweight", "qzeros", "scales"), 1),
    **dict.fromkeys(("_blocks", "_scales"), 0),
}
_SHAPE = "weight_shape"


@dataclass(frozen=True)
class Disk:
    """How the tensors of one layer lie in a file.

    method  the quant_method; layout: of compressed-tensors, "pack-quantized"
    parts   name after the layer's own -> dtype and shape; the bias apart
    read    its tensors, or the same rows of each -> codes
    zeros   GPTQ: how zero points are stored, as `gptq.unpack` has it
    """

    method: str
    shape: tuple[int, int]
    scheme: Scheme
    parts: Mapping[str, TensorSpec]
    read: Callable[[Mapping[str, torch.Tensor]], QuantizedTensor]
    layout: str = ""
    zeros: gptq.Zeros = "v2"

    @property
    def kept(self) -> dict[str, TensorSpec]:
        """The tensors that are kept as they are."""
        return {leaf: spec for leaf, spec in self.parts.items() if leaf not in (*_ROWS, _SHAPE)}

    @property
    def rebuilt(self) -> list[str]:
        return [leaf for leaf in self.parts if leaf in _ROWS]

    @property
    def unit(self) -> int:
        """Rows that every format can be cut at: whole words of 32 codes, whole blocks."""
        return math.lcm(32, (self.scheme.weights.block_shape or (1, 1))[0])

    def pieces(self, first: int = 0, last: int | None = None, device: str = "cpu") -> Iterator[tuple[int, int]]:
        """Rows from `first`, a multiple of `unit`, to `last`, in pieces that bound what is in memory of a device."""
        last = self.shape[0] if last is None else last
        elements = ELEMENTS.get(device, ELEMENTS["cpu"])
        step = max(1, elements // max(self.shape[1], 1) // self.unit) * self.unit
        return ((start, min(last, start + step)) for start in range(first, last, step))

    def unpack(self, tensors: Mapping[str, torch.Tensor], start: int, stop: int) -> QuantizedTensor:
        """Codes and scales of some rows. Columns are in the order of the file, g_idx or not, and no factor counts."""
        cut = {leaf: t for leaf, t in tensors.items() if leaf != "pre_quant_scale"}
        for leaf in self.rebuilt:
            cut[leaf] = self._rows(leaf, tensors[leaf], start, stop)
        if _SHAPE in cut:
            cut[_SHAPE] = torch.tensor((stop - start, self.shape[1]))
        if "g_idx" in cut:
            cut["g_idx"] = torch.arange(self.shape[1], dtype=torch.int32, device=cut["g_idx"].device) // self._group
        return self.read(cut)

    @property
    def _group(self) -> int:
        return self.scheme.weights.group_size or self.shape[1]

    def _rows(self, leaf: str, t: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        n, dim, w = self.shape[0], _ROWS[leaf], self.scheme.weights
        if (start, stop) == (0, n) or t.numel() == 1:
            return t
        size = t.shape[dim]
        block = w.block_shape[0] if w.block_shape is not None and w.strategy == "block" else 1
        if leaf in ("weight_scale", "weight_scale_inv") and block > 1:
            first, last = start // block, -(-stop // block)
        elif leaf in ("weight_zero_point", "qzeros") and size != n:
            bits = int(w.number.removeprefix("int"))
            first, last = start * bits // 32, -(-stop * bits // 32)
        else:
            first, last = start * size // n, stop * size // n
        return t.narrow(dim, first, last - first)

    def repack(self, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        """The inverse of `unpack`, of the same rows: the tensors in `rebuilt`."""
        found = _REPACK[self.method](self, q)
        scale = next((leaf for leaf in ("weight_scale", "weight_scale_inv", "scales") if leaf in found), None)
        if scale is not None:
            found[scale] = found[scale].to(DTYPES[self.parts[scale].dtype])  # what it was, so this is exact
        return {leaf: found[leaf].contiguous() for leaf in self.rebuilt}

    def joined(self, pieces: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Whole tensors, in their shapes on disk, from those of all pieces in order."""
        whole = {}
        for leaf in self.rebuilt:
            parts, spec = [piece[leaf] for piece in pieces], self.parts[leaf]
            one = len(parts) == 1 or math.prod(spec.shape) == 1
            whole[leaf] = (parts[0] if one else torch.cat(parts, _ROWS[leaf])).reshape(spec.shape)
        if _SHAPE in self.parts:
            device = whole[self.rebuilt[0]].device
            whole[_SHAPE] = torch.tensor(self.shape, dtype=torch.int64, device=device)
        return whole


def _compressed_tensors(disk: Disk, q: QuantizedTensor) -> dict[str, torch.Tensor]:
    return compressed_tensors.LAYOUTS[disk.layout].pack(q)


def _gptq(disk: Disk, q: QuantizedTensor) -> dict[str, torch.Tensor]:
    bits = int(q.scheme.number.removeprefix("int"))
    half, scale = 1 << (bits - 1), q.qparams.scale_NG
    zero = torch.zeros_like(scale, dtype=torch.int8) if q.qparams.zero_NG is None else q.qparams.zero_NG
    value = zero.t().to(torch.int16) + half
    if disk.zeros == "v1-words" and 32 % bits == 0:  # borrows and all
        ones = sum(1 << shift for shift in range(0, 32, bits))
        qzeros = (pack_bits(value, bits).to(torch.int64) - ones).to(torch.int32)
    else:
        qzeros = pack_bits(value if disk.zeros == "v2" else value - 1, bits)
    return {"qweight": pack_bits(offset_binary(q.codes_NK, bits), bits).t(), "qzeros": qzeros, "scales": scale.t()}


def _awq(disk: Disk, q: QuantizedTensor) -> dict[str, torch.Tensor]:
    scale = q.qparams.scale_NG
    zero = torch.zeros_like(scale, dtype=torch.int8) if q.qparams.zero_NG is None else q.qparams.zero_NG
    return {"qweight": awq_words(q.codes_NK.t()), "qzeros": awq_words(zero.t()), "scales": scale.t()}


def _fp8_block(disk: Disk, q: QuantizedTensor) -> dict[str, torch.Tensor]:
    return {"weight": q.codes_NK, "weight_scale_inv": q.qparams.scale_NG}


def _modelopt(disk: Disk, q: QuantizedTensor) -> dict[str, torch.Tensor]:
    codes = q.codes_NK
    if q.scheme.number == "int4":
        codes = pack_pairs("modelopt", (codes.to(torch.int16) & 15).to(torch.uint8).t()).t()
    elif q.scheme.number == "nvfp4":
        codes = pack_pairs("modelopt", codes)
    return {"weight": codes, "weight_scale": q.qparams.scale_NG}


def _gpt_oss(disk: Disk, q: QuantizedTensor) -> dict[str, torch.Tensor]:
    return {"_blocks": pack_pairs("gpt-oss", q.codes_NK).unflatten(1, (-1, 16)), "_scales": q.qparams.scale_NG}


_REPACK: dict[str, Callable[[Disk, QuantizedTensor], dict[str, torch.Tensor]]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8_block,
    "modelopt": _modelopt,
    "mxfp4": _gpt_oss,
}


def of_expert(disk: Disk) -> Disk:
    """The same of one expert, where a file has those of all in one tensor: without the first dimension."""
    parts = {leaf: TensorSpec(spec.dtype, spec.shape[1:]) for leaf, spec in disk.parts.items()}
    return replace(disk, parts=parts)
