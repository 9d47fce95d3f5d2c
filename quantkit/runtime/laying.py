"""Weights of four bits, from a file to the kernels' words on a GPU: one launch each, and nothing waits for the GPU.

Fewer launches matter: while other threads copy weights to the GPU, each takes half a millisecond.

Their codes need not be taken apart (quantkit_kernels/nibbles.py); every other weight goes through `layout.pack`, some
rows at a time, which is hundreds of launches and waits a layer. What could be wrong with values is noted on the GPU,
and read once for the whole model, after loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from quantkit.errors import InputError
from quantkit.runtime.held import Held
from quantkit_kernels import nibbles

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
_ROWS_OF_WORDS = ("pack-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized")


@dataclass(frozen=True)
class Late:
    """What is not looked at yet.

    wrong   (count, checks) int32, as `nibbles.lay` has it, of weights with `groups` scales a row
    names   what to call each of them, after the module's name
    shape   weight_shape (2,) int64, and what it should be
    """

    wrong: torch.Tensor
    groups: int
    names: tuple[str, ...]
    shape: tuple[torch.Tensor, tuple[int, int]] | None = None


def lay(held: Held, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Late] | None:
    """The tensors of a linear layer on disk -> codes, scales and zero points as held; None: `Held.pack` must do it."""
    found = words_of(held, tensors)
    if found is None:
        return None
    device = found[0].device
    specs = {name: spec for name, spec in held.specs().items() if name in ("codes", "scale", "zero")}
    out = {name: torch.empty(shape, dtype=dtype, device=device) for name, (dtype, shape) in specs.items()}
    wrong = torch.empty(1, checks(held, out["codes"].shape[1]), dtype=torch.int32, device=device)
    put(held, found, (out["codes"], out["scale"], out.get("zero")), wrong[0])
    if "weight_global_scale" in tensors:
        out["global_scale"] = tensors["weight_global_scale"].view(torch.int32).reshape(1).clone()
    stored = tensors.get("weight_shape")
    return out, Late(wrong, found[1].shape[1], ("",), None if stored is None else (stored, held.disk.shape))


def words_of(held: Held, tensors: Mapping[str, torch.Tensor]) -> Words | None:
    """Words, scales and zero points of a weight as `nibbles.lay` takes them; None where it does not."""
    disk, zero = held.disk, tensors.get("weight_zero_point")
    if held.path != "packed" or held.order or held.rows != 1 or held.shape != disk.shape:
        return None
    if disk.method == "compressed-tensors" and disk.layout in _ROWS_OF_WORDS:
        codes, scale = tensors["weight_packed"], tensors["weight_scale"]
    elif disk.method == "mxfp4":
        codes, scale = tensors["_blocks"].flatten(1), tensors["_scales"]
    else:
        return None
    if disk.scheme.weights.number not in ("int4", "mxfp4", "nvfp4") or codes.shape[-1] * codes.itemsize % 4:
        return None
    if not codes.is_contiguous() or codes.data_ptr() % 4:
        return None
    words = codes.view(torch.int32)
    k, form, group = held.shape[1], held.scale_dtype, held.group
    return (
        (words, scale, zero)
        if nibbles.fits(held.kind, words, scale, zero, scale_dtype=form, k=k, group=group)
        else None
    )


def checks(held: Held, rows: int) -> int:
    """How many numbers of `wrong` a weight of so many rows, as laid out, has."""
    return nibbles.checks(rows, kind=held.kind, scale_dtype=held.scale_dtype, k=held.shape[1], group=held.group)


def put(
    held: Held,
    found: Words,
    out: Words,
    wrong: torch.Tensor,
) -> None:
    """What `words_of` found, into its place."""
    nibbles.lay(held.kind, *found, *out, wrong, scale_dtype=held.scale_dtype, k=held.shape[1], group=held.group)


def check(model: nn.Module) -> None:
    """Looks at all that is late, which waits for the GPU once or twice. Raises InputError with the layer and place."""
    late = [(name, one) for name, module in model.named_modules() for one in module.__dict__.pop("late", ())]
    shapes = [(name, *one.shape) for name, one in late if one.shape is not None]
    for (name, _, wanted), stored in zip(shapes, _read([t for _, t, _ in shapes])):
        if tuple(stored) != wanted:
            raise InputError(wrong_shape(name, tuple(stored), wanted))
    for (name, one), values in zip(late, _read([one.wrong.amin(1) for _, one in late])):
        for value, part in zip(values, one.names):
            if value != nibbles.NOWHERE:
                row, group = divmod(value, one.groups)
                raise InputError(
                    f"{name}: {part}the scale at [{row}, {group}] is NaN, infinite, above 2^33, or negative where "
                    "scales have no sign, which the kernels do not hold; the checkpoint is damaged"
                )


def wrong_shape(name: str, stored: tuple[int, ...], wanted: tuple[int, int]) -> str:
    """The sentence for a weight_shape that belongs to another layer."""
    where = f"{name}: " if name else ""
    return (
        f"{where}weight_shape says {stored}, the model's config says {wanted}; the checkpoint belongs to another "
        "config.json"
    )


def _read(tensors: list[torch.Tensor]) -> list[list[int]]:
    """Their numbers: one wait a device."""
    found: dict[int, list[int]] = {}
    for device in dict.fromkeys(t.device for t in tensors):
        there = [i for i, t in enumerate(tensors) if t.device == device]
        numbers = iter(torch.cat([tensors[i] for i in there]).tolist())
        found |= {i: [next(numbers) for _ in range(len(tensors[i]))] for i in there}
    return [found[i] for i in range(len(tensors))]
