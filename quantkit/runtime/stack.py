"""The weights of all experts of a layer, packed in tensors of three dimensions: from a file and back.

transformers merges a tensor an expert and projection into one tensor of all while loading; here the merged tensors
are operands of the grouped kernels. Rows of gate and up lie on top of each other, or alternate where a file has them
so (gpt-oss).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from quantkit.checkpoint import DTYPES
from quantkit.errors import InputError
from quantkit.runtime import laying
from quantkit.runtime.disk import Disk
from quantkit.runtime.held import Held, Spec, _kernel_codes, _to_e2m3, bits, bits_dtype
from quantkit.types import QParams, QuantizedTensor, TensorScheme
from quantkit_kernels import layout, nibbles

_LAID = ("codes", "scale", "zero")


@dataclass(frozen=True)
class Stack:
    """One projection of all experts, or two with one input on top of each other.

    held      how one of them is held; its shape is that of one part
    parts     what each part is called on disk: ("gate_proj", "up_proj"); one name, where a file has them in one
    together  a file has all experts in one tensor
    ordered   columns of a group are brought side by side (GPTQ's act-order)
    uneven    parts have global scales that differ (NVFP4)
    biases    a file has a bias for each expert and part
    """

    held: Held
    parts: tuple[str, ...]
    experts: int
    together: bool = False
    ordered: bool = False
    uneven: bool = False
    biases: bool = False

    @property
    def disk(self) -> Disk:
        return self.held.disk

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of all parts, and columns."""
        n, k = self.held.shape
        return n * len(self.parts), k

    def split(self, dim: int, rank: int, ranks: int) -> Stack:
        """The part of one rank: of the rows (0) of each part, or of the columns (1). Raises InputError if it cannot."""
        return replace(self, held=self.held.split(dim, rank, ranks))

    @property
    def activations(self) -> TensorScheme | None:
        return self.held.activations

    def specs(self) -> dict[str, Spec]:
        """The tensors that are held: name -> dtype and shape."""
        (n, k), e = self.shape, self.experts
        found: dict[str, Spec] = {}
        if self.held.path == "w8a8":
            number = self.disk.scheme.weights.number
            found["codes"] = (torch.int8 if number == "int8" else torch.uint8, (e, n, k))
            found["scale"] = (bits_dtype(self.held.codes_scale_dtype), (e, n, 1))
        else:
            kind, scale_dtype = self.held.kind, self.held.scale_dtype
            form, how = layout.get(kind), layout.geometry(kind, scale_dtype, k, self.held.group)
            high = layout.padded_rows(n)
            found["codes"] = (torch.int32, (e, layout.lines(kind, k), high, form.words))
            found["scale"] = (torch.int32, (e, *how.shape(n)))
            if layout.zero_mode(kind, scale_dtype) == 2:
                found["zero"] = (torch.int32, (e, *how.shape(n)))
            if kind == "nvfp4":
                found["global_scale"] = (torch.int32, (e,))
        if self.ordered:
            found["order"] = (torch.int32, (e, k))
        if self.uneven:
            found["ratio"] = (torch.int32, (e, len(self.parts)))
        for leaf, spec in self.disk.kept.items():
            found[leaf] = (bits_dtype(DTYPES[spec.dtype]), (e, len(self.parts), *spec.shape))
        return found

    # from a file ----------------------------------------------------------------------------------------------------

    def name(self, e: int, part: int, leaf: str) -> str:
        """A tensor of an expert on disk, after the name of the experts' module."""
        return f"{self.parts[part]}{leaf}" if self.together else f"{e}.{self.parts[part]}.{leaf}"

    def pack(self, tensors: dict[str, torch.Tensor], late: list[laying.Late] | None = None) -> dict[str, torch.Tensor]:
        """The tensors of all experts on disk -> what is held; takes them out of `tensors` as it goes.

        late  gets what is not looked at yet, because that would wait for a GPU; None: all is looked at
        Raises InputError for what does not fit.
        """
        specs, device = self.specs(), next(iter(tensors.values())).device
        out = {name: torch.empty(shape, dtype=dtype, device=device) for name, (dtype, shape) in specs.items()}
        wrong = None
        for e in range(self.experts):
            own = [self._tensors(tensors, e, part) for part in range(len(self.parts))]
            found = None if late is None else self._words(own)
            if late is not None and found is not None and wrong is None:
                names = tuple(f"expert {i}, {part}: " for i in range(self.experts) for part in self.parts)
                count = laying.checks(self.held, out["codes"].shape[2] // len(own))
                wrong = torch.full((len(names), count), nibbles.NOWHERE, dtype=torch.int32, device=device)
                late.append(laying.Late(wrong, found[0][1].shape[1], names))
            try:
                if found is not None and wrong is not None:
                    self._lay(out, e, own, found, wrong)
                else:
                    self._put(out, e, own)
            except ValueError as error:
                raise InputError(f"expert {e}: {error}") from error
            except InputError as error:
                raise InputError(f"expert {e}: {error}") from None
        return out

    def _tensors(self, tensors: dict[str, torch.Tensor], e: int, part: int) -> dict[str, torch.Tensor]:
        found = {}
        for leaf, spec in self.disk.parts.items():
            name = self.name(e, part, leaf)
            if name not in tensors:
                raise InputError(f"{name} is missing")
            found[leaf] = tensors[name][e] if self.together else tensors.pop(name)
            if tuple(found[leaf].shape) != spec.shape:
                raise InputError(f"{name} is {tuple(found[leaf].shape)}, not {spec.shape}")
        return found

    def _words(self, own: list[dict[str, torch.Tensor]]) -> list[laying.Words] | None:
        """What `laying.words_of` finds of each part of an expert; None where kernels cannot place them."""
        if self.ordered or (len(own) > 1 and self.held.shape[0] % 8):
            return None
        found = [words for part in own if (words := laying.words_of(self.held, part)) is not None]
        return found if len(found) == len(own) else None

    def _lay(
        self,
        out: dict[str, torch.Tensor],
        e: int,
        own: list[dict[str, torch.Tensor]],
        found: list[laying.Words],
        wrong: torch.Tensor,
    ) -> None:
        """One expert into its place, by kernels; `wrong` has a row for each part of each expert."""
        for leaf in self.disk.kept:
            out[leaf][e] = torch.stack([bits(tensors[leaf]) for tensors in own])
        step = out["codes"].shape[2] // len(own)
        for part, words in enumerate(found):
            place = {name: out[name][e][:, part * step : (part + 1) * step] for name in _LAID if name in out}
            at = e * len(own) + part
            laying.put(self.held, words, (place["codes"], place["scale"], place.get("zero")), wrong[at])
        self._put_wholes(out, e, [tensors.get("weight_global_scale") for tensors in own])

    def _put(self, out: dict[str, torch.Tensor], e: int, own: list[dict[str, torch.Tensor]]) -> None:
        """One expert into its place."""
        rows = self.held.rows_held or (0, self.disk.shape[0])
        parts = [self.held.part(tensors, *rows) for tensors in own]
        codes = torch.cat([_kernel_codes(q) for q in parts])
        scale = torch.cat([self._a_row(q.qparams.scale_NG) for q in parts])
        zeros = [self._a_row(q.qparams.zero_NG) for q in parts if q.qparams.zero_NG is not None]
        for leaf in self.disk.kept:
            out[leaf][e] = torch.stack([bits(tensors[leaf]) for tensors in own])
        if self.held.path == "w8a8":
            out["codes"][e], out["scale"][e] = bits(codes), bits(scale)
            return
        if self.ordered:
            order = layout.act_order(own[0]["g_idx"], self.held.group)
            out["order"][e], codes = order.to(torch.int32), codes[:, order]
        wholes = [q.qparams.global_scale for q in parts]
        packed = layout.pack(
            self.held.kind,
            codes,
            scale,
            torch.cat(zeros) if zeros else None,
            group=self.held.group,
            global_scale=wholes[0],
        )
        out["codes"][e], out["scale"][e] = packed.codes, packed.scale
        if packed.zero is not None:
            out["zero"][e] = packed.zero
        self._put_wholes(out, e, wholes)

    def _put_wholes(self, out: dict[str, torch.Tensor], e: int, wholes: list[torch.Tensor | None]) -> None:
        """The global scale of one expert, of NVFP4, and what those of its parts are to the first."""
        if wholes[0] is not None:
            out["global_scale"][e] = bits(wholes[0].float()).reshape(())
            if self.uneven:
                ratio = [wholes[0].float().reshape(()) / w.float().reshape(()) for w in wholes if w is not None]
                out["ratio"][e] = bits(torch.stack(ratio))

    def _a_row(self, t_RG: torch.Tensor | None) -> torch.Tensor:
        """Scales or zero points of one part, one a row: (n, G)."""
        assert t_RG is not None
        n, w = self.held.shape[0], self.disk.scheme.weights
        if w.strategy == "block" and w.block_shape is not None:
            return t_RG.repeat_interleave(w.block_shape[0], 0)[:n]
        return t_RG.expand(n, -1)

    # back to a file -------------------------------------------------------------------------------------------------

    def unpack(self, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is held -> the tensors of all experts, as they were on disk. Raises InputError for a part of them."""
        if self.held.shape != self.disk.shape:
            raise InputError(
                "its experts are split over several ranks, none of which can save them; load without tp_plan"
            )
        found: dict[str, torch.Tensor] = {}
        for e in range(self.experts):
            for part, q in enumerate(self._codes(held, e)):
                tensors = self.disk.joined([self.disk.repack(q)])
                for leaf, spec in self.disk.kept.items():
                    tensors[leaf] = held[leaf][e, part].clone().view(DTYPES[spec.dtype])
                for leaf in self.disk.parts:
                    name = self.name(e, part, leaf)
                    if self.together:
                        whole = found.setdefault(name, tensors[leaf].new_empty(self.experts, *tensors[leaf].shape))
                        whole[e] = tensors[leaf]
                    else:
                        found[name] = tensors[leaf]
        return found

    def _codes(self, held: Mapping[str, torch.Tensor], e: int) -> list[QuantizedTensor]:
        """Codes and scales of one expert's parts, in the order of columns on disk, scales as they are there."""
        n, w = self.disk.shape[0], self.disk.scheme.weights
        zero = None
        if self.held.path == "w8a8":
            codes = held["codes"][e]
            codes = codes if w.number == "int8" else codes.view(torch.float8_e4m3fn)
            scale = held["scale"][e].view(self.held.codes_scale_dtype)
        else:
            codes, scale, zero = layout.unpack(self.packed(held, e), signed=True)
            codes = _to_e2m3(codes) if w.number == "mxfp6_e2m3" else codes
        if self.ordered:
            codes = codes[:, torch.argsort(held["order"][e].long())]
        step = {"tensor": n, "block": (w.block_shape or (1, 1))[0]}.get(w.strategy, 1)
        whole = torch.ones(1) if w.number == "nvfp4" else None  # kept as it is, so any does
        return [
            QuantizedTensor(
                codes[i * n : (i + 1) * n],
                QParams(
                    scale[i * n : (i + 1) * n : step], None if zero is None else zero[i * n : (i + 1) * n : step], whole
                ),
                w,
            )
            for i in range(len(self.parts))
        ]

    def packed(self, held: Mapping[str, torch.Tensor], e: int) -> layout.Packed:
        """One expert, its parts on top of each other."""
        zero, whole = held.get("zero"), held.get("global_scale")
        n, k = self.shape
        return layout.Packed(
            self.held.kind,
            n,
            k,
            self.held.group,
            1,
            self.held.scale_dtype,
            held["codes"][e],
            held["scale"][e],
            None if zero is None else zero[e],
            None if whole is None else whole[e : e + 1].view(torch.float32),
        )

    def decode(self, held: Mapping[str, torch.Tensor], e: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight of one expert (N, K)."""
        if self.held.path == "w8a8":
            (q,) = self._one(held, e)
            weight = q.codes_NK.float() * q.qparams.scale_NG.float()
        else:
            weight = layout.decode(self.packed(held, e), torch.float32 if self.uneven else dtype)
        if self.uneven:
            each = self.held.shape[0]
            weight = weight * held["ratio"][e].view(torch.float32).repeat_interleave(each)[:, None]
        if self.ordered:
            weight = weight[:, torch.argsort(held["order"][e].long())]
        return weight.to(dtype)

    def _one(self, held: Mapping[str, torch.Tensor], e: int) -> list[QuantizedTensor]:
        codes = held["codes"][e]
        codes = codes if codes.dtype == torch.int8 else codes.view(torch.float8_e4m3fn)
        scale = held["scale"][e].view(self.held.codes_scale_dtype)
        return [QuantizedTensor(codes, QParams(scale), self.disk.scheme.weights)]
