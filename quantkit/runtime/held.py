"""How a packed weight is held in memory, and by which operator it is multiplied.

    path     weights                        inputs              held as                        multiplied by
    packed   integers, FP8, MX, NVFP4       any                 layout.Packed                  wxa16_linear
    w8a8     int8, FP8: a row, a tensor     int8, FP8 alike     codes (N, K), scales (N, 1)    w8a8_linear
    block    FP8 in 128 x 128               FP8, 1 x 128        codes (N, K), scales (n, k)    fp8_block_linear
    plain    what no kernel holds           any                 codes (N, K), scales (N, G)    torch

On the paths "packed" and "plain" inputs that are quantized are rounded to what their codes stand for (rounding.py).

Everything is held in integers, floats as their bits: no cast of the model's dtype changes a scale, nothing is trained,
and what is offloaded to disk needs no dtype that numpy lacks. Codes are laid out once, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from quantkit.checkpoint import DTYPES
from quantkit.errors import InputError
from quantkit.runtime.disk import Disk
from quantkit.types import QParams, QuantizedTensor, TensorScheme
from quantkit_kernels import layout
from quantkit_kernels._words import row_words
from quantkit_kernels.fp8_block import BLOCK
from quantkit_kernels.w8a8 import LONGEST, weight_sums

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Spec = tuple[torch.dtype, tuple[int, ...]]

_FLOAT_KINDS = {
    "fp8_e4m3": "fp8_e4m3",
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
    "mxfp8_e4m3": "mxfp8",
    "mxfp6_e2m3": "mxfp8",  # every value of E2M3 is one of E4M3
}
_BLOCKS = (BLOCK, BLOCK)


@dataclass(frozen=True)
class Held:
    """One weight in memory.

    disk     what it is in a file
    kind, scale_dtype, group, rows   as layout.Packed has them; path "packed"
    order    columns of a group are brought side by side (GPTQ's act-order)
    factor   the input is multiplied by pre_quant_scale first (ModelOpt's AWQ)
    rows_held, columns_held   the part that is held, where a layer is split over several ranks; None: all
    shape    rows and columns that are held
    rounds_input   inputs are rounded before a kernel for weights alone sees them
    codes_scale_dtype   of the scales, on the paths that hold them as they are
    """

    disk: Disk
    path: str
    kind: str = ""
    scale_dtype: str = ""
    group: int = 0
    rows: int = 1
    order: bool = False
    factor: bool = False
    rows_held: tuple[int, int] | None = None
    columns_held: tuple[int, int] | None = None
    shape: tuple[int, int] = field(init=False, repr=False, compare=False)
    rounds_input: bool = field(init=False, repr=False, compare=False)
    codes_scale_dtype: torch.dtype = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """What is asked for at every product."""
        n, k = self.disk.shape
        rows, columns = self.rows_held or (0, n), self.columns_held or (0, k)
        object.__setattr__(self, "shape", (rows[1] - rows[0], columns[1] - columns[0]))
        rounds = self.activations is not None and self.path in ("packed", "plain")
        object.__setattr__(self, "rounds_input", rounds)
        object.__setattr__(self, "codes_scale_dtype", _stored_scale(self.disk))

    def split(self, dim: int, rank: int, ranks: int) -> Held:
        """The part of one rank: of the rows (0) or the columns (1). Raises InputError where it cannot be cut there."""
        w, size = self.disk.scheme.weights, self.disk.shape[dim]
        unit = self.disk.unit if dim == 0 else 1
        if dim == 1 and w.strategy in ("group", "block"):
            unit = w.group_size or (w.block_shape or (1, 1))[1]
        what = "rows" if dim == 0 else "columns"
        if dim == 1 and (self.order or self.path == "plain"):
            raise InputError(f"its columns are not in groups side by side, and cannot be split over {ranks} ranks")
        if size % (ranks * unit):
            raise InputError(
                f"its {size} {what} cannot be split over {ranks} ranks: each would have {size / ranks:g}, which is no "
                f"multiple of {unit}; use fewer ranks"
            )
        part = (rank * size // ranks, (rank + 1) * size // ranks)
        held = replace(self, rows_held=part) if dim == 0 else replace(self, columns_held=part)
        return _as_words(held) if self.path == "packed" else held

    @property
    def activations(self) -> TensorScheme | None:
        return self.disk.scheme.activations

    def specs(self) -> dict[str, Spec]:
        """The tensors that are held: name -> dtype and shape. Those that a file keeps have their names there."""
        n, k = self.shape
        found: dict[str, Spec] = {}
        if self.path == "packed":
            form, how = layout.get(self.kind), layout.geometry(self.kind, self.scale_dtype, k, self.group)
            high = layout.padded_rows(n)
            found["codes"] = (torch.int32, (layout.lines(self.kind, k), high, form.words))
            found["scale"] = (torch.int32, how.shape(n))
            if layout.zero_mode(self.kind, self.scale_dtype) == 2:
                found["zero"] = (torch.int32, how.shape(n))
        else:
            number = self.disk.scheme.weights.number
            found["codes"] = (torch.int8 if number.startswith("int") else torch.uint8, (n, k))
            found["scale"] = (INTEGERS[_stored_scale(self.disk).itemsize], self._scale_shape())
            if self.path == "plain" and not self.disk.scheme.weights.symmetric:
                found["zero"] = (torch.int8, self._scale_shape())
            if self.path == "w8a8" and self.activations is not None and not self.activations.symmetric:
                found["weight_sum"] = (torch.int32, (n,))
        if self.disk.scheme.weights.number == "nvfp4":
            found["global_scale"] = (torch.int32, (1,))
        if self.order:
            found["order"] = (torch.int32, (k,))
        for leaf, spec in self.disk.kept.items():
            found[leaf] = (bits_dtype(DTYPES[spec.dtype]), spec.shape)
        return found

    def _scale_shape(self) -> tuple[int, int]:
        (n, k), w = self.shape, self.disk.scheme.weights
        if w.strategy == "block" and w.block_shape is not None:
            return -(-n // w.block_shape[0]), -(-k // w.block_shape[1])
        rows = 1 if w.strategy == "tensor" else n
        return rows, -(-k // w.group_size) if w.strategy == "group" and w.group_size else 1

    # from a file ----------------------------------------------------------------------------------------------------

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a layer on disk -> what is held. Raises InputError for what cannot be read or held."""
        out = {leaf: bits(tensors[leaf]) for leaf in self.disk.kept}
        try:
            if self.path == "packed":
                out |= self._pack_words(tensors)
            else:
                out |= self._pack_plain(tensors)
        except ValueError as error:
            raise InputError(str(error)) from error
        return out

    def _order(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        return layout.act_order(tensors["g_idx"], self.group) if self.order else None

    def _pack_words(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        device = tensors[self.disk.rebuilt[0]].device
        order = self._order(tensors)
        out = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, (dtype, shape) in self.specs().items()
            if name in ("codes", "scale", "zero")
        }
        first, last = self.rows_held or (0, self.disk.shape[0])
        for start, stop in self.disk.pieces(first, last, device.type):
            q = self.part(tensors, start, stop)
            codes = _kernel_codes(q)
            piece = layout.pack(
                self.kind,
                codes if order is None else codes[:, order],
                q.qparams.scale_NG,
                q.qparams.zero_NG,
                group=self.group,
                rows=self.rows,
                global_scale=q.qparams.global_scale,
            )
            self._put(out, start - first, piece)
            if piece.global_scale is not None:
                out["global_scale"] = bits(piece.global_scale).clone()  # it may be one of those kept
        return out if order is None else {**out, "order": order.to(torch.int32)}

    def part(self, tensors: Mapping[str, torch.Tensor], start: int, stop: int) -> QuantizedTensor:
        """Some rows of the file, the columns that are held, one scale a group."""
        q, w = self.disk.unpack(tensors, start, stop), self.disk.scheme.weights
        k = q.shape[1]
        size = {"group": w.group_size, "block": (w.block_shape or (0, k))[1]}.get(w.strategy) or k
        first, last = self.columns_held or (0, k)

        def cut(t: torch.Tensor) -> torch.Tensor:
            # where the last group is short, `unpack` has spread the scales to one a column
            t = t[:, ::size] if w.strategy == "group" and t.shape[1] == k > 1 and size > 1 else t
            return t[:, first // size : -(-last // size)] if t.shape[1] > 1 else t

        p = q.qparams
        zero = None if p.zero_NG is None else cut(p.zero_NG)
        return QuantizedTensor(q.codes_NK[:, first:last], QParams(cut(p.scale_NG), zero, p.global_scale), w)

    def _put(self, out: dict[str, torch.Tensor], start: int, piece: layout.Packed) -> None:
        """A piece's words into their places; 3-bit codes lie in two planes, each with its rows."""
        rows = piece.codes.shape[1]
        if layout.get(self.kind).bits == 3:
            whole, part = out["codes"].flatten(1), piece.codes.flatten(1)
            high = out["codes"].shape[1]
            whole[:, start * 16 : (start + rows) * 16] = part[:, : rows * 16]
            whole[:, (high * 2 + start) * 8 : (high * 2 + start + rows) * 8] = part[:, rows * 16 :]
        else:
            out["codes"][:, start : start + rows] = piece.codes
        out["scale"][:, start : start + rows] = piece.scale
        if piece.zero is not None:
            out["zero"][:, start : start + rows] = piece.zero

    def _pack_plain(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        q = self.part(tensors, *(self.rows_held or (0, self.disk.shape[0])))
        specs, scale, zero = self.specs(), q.qparams.scale_NG, q.qparams.zero_NG
        out = {"codes": bits(q.codes_NK.contiguous()), "scale": bits(scale.contiguous())}
        if zero is not None:
            out["zero"] = zero.contiguous()
        if "weight_sum" in specs:
            out["weight_sum"] = weight_sums(q.codes_NK)
        if q.qparams.global_scale is not None:
            out["global_scale"] = bits(q.qparams.global_scale).clone()
        return out

    # back to a file -------------------------------------------------------------------------------------------------

    def unpack(self, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is held -> the tensors of the layer as they were on disk. Raises InputError for a part of a layer."""
        if self.shape != self.disk.shape:
            raise InputError(
                "this layer is split over several ranks, none of which can save it; load it without tp_plan"
            )
        pieces = self.disk.pieces() if self.path == "packed" else [(0, self.disk.shape[0])]
        inverse = None
        if self.order:
            inverse = torch.argsort(held["order"].long())
        parts = []
        for start, stop in pieces:
            q = self.codes(held, start, stop)
            if inverse is not None:
                q = replace(q, codes_NK=q.codes_NK[:, inverse])
            parts.append(self.disk.repack(q))
        kept = {leaf: held[leaf].view(DTYPES[spec.dtype]) for leaf, spec in self.disk.kept.items()}
        found = {**self.disk.joined(parts), **kept}
        return {leaf: found[leaf] for leaf in self.disk.parts}

    def codes(self, held: Mapping[str, torch.Tensor], start: int, stop: int) -> QuantizedTensor:
        """Codes and scales of some rows, columns as they are held. Only whole weights, unless the path is "packed"."""
        w = self.disk.scheme.weights
        if self.path == "packed":
            codes, scale, zero = layout.unpack(self.packed(held, start, stop), signed=True)
            if w.number == "mxfp6_e2m3":
                codes = _to_e2m3(codes)
            global_scale = held["global_scale"].view(torch.float32) if "global_scale" in held else None
            return QuantizedTensor(codes, QParams(scale, zero, global_scale), w)
        codes, zero = held["codes"], held.get("zero")
        if w.number in ("fp8_e4m3", "mxfp8_e4m3"):
            codes = codes.view(torch.float8_e4m3fn)
        global_scale = held["global_scale"].view(torch.float32) if "global_scale" in held else None
        scale = held["scale"].view(_stored_scale(self.disk))
        return QuantizedTensor(codes, QParams(scale, zero, global_scale), w)

    def packed(self, held: Mapping[str, torch.Tensor], start: int, stop: int) -> layout.Packed:
        """Some rows of it as layout.Packed; `start` is a multiple of 8."""
        codes, scale, zero = held["codes"], held["scale"], held.get("zero")
        if (start, stop) != (0, self.shape[0]):
            high = -(-stop // 8) * 8
            codes = row_words(codes, layout.get(self.kind).code, start, high)
            scale = scale[:, start:high]
            zero = None if zero is None else zero[:, start:high]
        global_scale = held["global_scale"].view(torch.float32) if "global_scale" in held else None
        (_, k), n = self.shape, stop - start
        return layout.Packed(self.kind, n, k, self.group, self.rows, self.scale_dtype, codes, scale, zero, global_scale)


def bits_dtype(dtype: torch.dtype) -> torch.dtype:
    """The integers that hold the bits of a dtype: itself, if those are integers."""
    return INTEGERS[dtype.itemsize] if dtype.is_floating_point else dtype


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view(bits_dtype(t.dtype))


def _stored_scale(disk: Disk) -> torch.dtype:
    """The dtype that scales have once they are read: `unpack` of fp8-block widens them."""
    if disk.method == "fp8":
        return torch.float32
    return DTYPES[next(disk.parts[leaf].dtype for leaf in ("weight_scale", "scales", "_scales") if leaf in disk.parts)]


def _kernel_codes(q: QuantizedTensor) -> torch.Tensor:
    if q.scheme.number != "mxfp6_e2m3":
        return q.codes_NK
    return _e2m3_in_e4m3(q.codes_NK.device)[q.codes_NK.int()].view(torch.float8_e4m3fn)


def _to_e2m3(codes_NK: torch.Tensor) -> torch.Tensor:
    """E4M3 codes that stand for values of E2M3, as codes of that."""
    table = torch.zeros(256, dtype=torch.uint8, device=codes_NK.device)
    table[_e2m3_in_e4m3(codes_NK.device).long()] = torch.arange(64, dtype=torch.uint8, device=codes_NK.device)
    return table[codes_NK.view(torch.uint8).int()]


def _e2m3_in_e4m3(device: torch.device) -> torch.Tensor:
    """The E4M3 code, uint8, of each of the 64 codes of E2M3."""
    code = torch.arange(64, device=device)
    exponent, mantissa = code >> 3 & 3, code & 7
    value = torch.where(exponent == 0, mantissa / 8, (1 + mantissa / 8) * torch.exp2(exponent.float() - 1))
    signed = torch.where(code > 31, -value, value)
    return signed.to(torch.float8_e4m3fn).view(torch.uint8)


# which path ----------------------------------------------------------------------------------------------------------


def describe(
    disk: Disk,
    g_idx: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    *,
    grouped: bool = False,
    fp8: bool = True,
) -> Held:
    """How a layer is held.

    g_idx, factor  its tensors g_idx and pre_quant_scale, where it has them
    grouped        as one of many experts, whose kernels have neither blocks nor zero points of inputs
    fp8            whether FP8 codes can be multiplied where it will lie; GPUs before capability 8.9 only decode them
    """
    size = disk.scheme.weights.group_size or disk.shape[1]
    in_order = g_idx is None or torch.equal(g_idx.long(), torch.arange(disk.shape[1], device=g_idx.device) // size)
    factored = factor is not None and bool((factor != 1).any())
    path = "w8a8" if _is_w8a8(disk) else "block" if _is_block(disk) else "packed"
    a = disk.scheme.activations
    if grouped and a is not None and (path == "block" or not a.symmetric or (a.strategy == "tensor" and a.dynamic)):
        path = "packed"
    if not fp8 and a is not None and a.number == "fp8_e4m3":
        path = "packed"
    held = Held(disk, path, order=not in_order, factor=factored)
    if path != "packed":
        return held
    if g_idx is not None and not in_order:
        try:
            layout.act_order(g_idx, size)
        except ValueError:
            return replace(held, path="plain", order=False)
    return _as_words(held)


def _is_w8a8(disk: Disk) -> bool:
    w, a = disk.scheme.weights, disk.scheme.activations
    if a is None or w.number != a.number or w.number not in ("int8", "fp8_e4m3") or not w.symmetric:
        return False
    if w.strategy not in ("tensor", "channel") or (w.number == "int8" and disk.shape[1] > LONGEST[not a.symmetric]):
        return False
    return (a.strategy == "token" and a.dynamic) or (a.strategy == "tensor" and (a.symmetric or not a.dynamic))


def _is_block(disk: Disk) -> bool:
    w, a = disk.scheme.weights, disk.scheme.activations
    if a is None or w.number != "fp8_e4m3" or (w.strategy, w.block_shape) != ("block", _BLOCKS):
        return False
    return (a.number, a.strategy, a.group_size, a.dynamic) == ("fp8_e4m3", "group", BLOCK, True)


def _as_words(held: Held) -> Held:
    """The kind of layout.Packed that holds a weight; the path "plain" when there is none.

    Integers of 5 to 7 bits are held in 8, and those whose groups are too small for their lines in the next wider kind.
    """
    w, (_, k) = held.disk.scheme.weights, held.shape
    group, rows = 0, 0 if w.strategy == "tensor" else 1
    if w.strategy == "group":
        group = w.group_size or 0
        if group >= k and w.number not in _FLOAT_KINDS:
            group = 0
    elif w.strategy == "block" and w.block_shape is not None:
        rows, group = w.block_shape
    stored = _stored_scale(held.disk)
    scale_dtype = {torch.uint8: "e8m0", torch.float8_e4m3fn: "e4m3"}.get(stored) or layout.FLOAT_SCALES.get(stored, "")
    for kind in _kinds(w):
        try:
            layout.geometry(kind, scale_dtype, k, group)
        except ValueError:
            continue
        return replace(held, kind=kind, scale_dtype=scale_dtype, group=group, rows=rows)
    return replace(held, path="plain", order=False)


def _kinds(w: TensorScheme) -> list[str]:
    """The kinds of layout.Packed that can hold the codes of a weight, the narrowest first."""
    if w.number in _FLOAT_KINDS:
        return [_FLOAT_KINDS[w.number]]
    bits = int(w.number.removeprefix("int"))
    return [f"int{b}" + ("" if w.symmetric else "z") for b in (2, 3, 4, 8) if b >= bits]
