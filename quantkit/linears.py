"""Each linear layer of a model: its names, its shape, and what a recipe makes of it.

A layer that a number format, the checkpoint format or an engine could not take is refused here, by its name.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit import blocks, experts, formats, lint, numerics, packed, skeleton
from quantkit.errors import InputError
from quantkit.recipe import Recipe
from quantkit.types import Scheme


@dataclass(frozen=True)
class Linear:
    """One linear layer: its names on disk and in memory, its shape (N, K), and what becomes of it."""

    name: str
    module: str
    shape: tuple[int, int]
    dtype: str
    scheme: Scheme | None
    reason: str = ""


def decide(
    recipe: Recipe, ghost: skeleton.Skeleton, structure: blocks.Structure
) -> tuple[dict[str, Linear], list[str]]:
    """Every linear of a model, by name in memory, and warnings. Raises InputError for what cannot be done."""
    linear = [*(name for block in structure.blocks for name in block.linears), *structure.outside]
    routers = experts.routers(ghost.model)
    bare = sorted(routers - set(linear), key=packed.natural)  # routers that are no nn.Linear
    on_disk = {m: ghost.to_disk.get(f"{m}.weight", f"{m}.weight").removesuffix(".weight") for m in (*linear, *bare)}
    schemes, silent = recipe.assign(list(on_disk.values()))
    linears: dict[str, Linear] = {}
    for module, name in on_disk.items():
        weight = ghost.model.get_submodule(module).weight
        shape = (int(weight.shape[0]), int(weight.shape[1]))
        scheme, reason = schemes[name], "left dense by a rule or by scheme: none"
        if module in structure.outside:
            if scheme is not None and any(rule.matches(name) for rule in recipe.rules):
                raise InputError(f"{name}: is in no block, and only layers in blocks can be quantized by this version")
            idle = f"{module}.".startswith(structure.idle)
            scheme, reason = None, "no text goes through it" if idle else "is in no block"
        if module in routers:
            named = any(rule.match == name for rule in recipe.rules)
            if module in bare and named and scheme is not None:
                raise InputError(f"{name}: is a router that is no linear layer in transformers, so it must stay dense")
            if module in bare or not named:
                scheme, reason = None, "is a router"
        known = f"{module}.weight" in ghost.to_disk
        dtype = skeleton.spec_of(ghost, f"{module}.weight").dtype if known else "BF16"
        if scheme is not None:
            _check(name, shape, dtype, scheme, recipe)
        linears[module] = Linear(name, module, shape, dtype, scheme, "" if scheme else reason)
    _check_wholes(ghost, linears)
    return linears, [f"rule {rule.match!r} matches no linear layer of this model" for rule in silent]


def _check_wholes(ghost: skeleton.Skeleton, linears: dict[str, Linear]) -> None:
    """Refuses to quantize some of the experts that a file has in one tensor, and not the others."""
    packed_of: dict[str, dict[bool, str]] = {}
    for memory, piece in ghost.pieces.items():
        layer = linears[memory.rpartition(".")[0]]
        packed_of.setdefault(piece.disk.rpartition(".")[0], {})[layer.scheme is not None] = layer.name
    for owner, found in packed_of.items():
        if len(found) > 1:
            raise InputError(
                f"{owner}: its experts lie together on disk, and {found[True]} is to be quantized but {found[False]} "
                "is not; give all projections of all its experts a scheme, or none"
            )


def whole(ghost: skeleton.Skeleton, linears: dict[str, Linear], memory: str) -> str | None:
    """The tensor on disk in which a parameter stays with others; None where it has, or gets, one of its own."""
    piece = ghost.pieces.get(memory)
    return piece.disk if piece is not None and linears[memory.rpartition(".")[0]].scheme is None else None


def _check(name: str, shape: tuple[int, int], dtype: str, scheme: Scheme, recipe: Recipe) -> None:
    """Refuses what number format or checkpoint format cannot hold, naming the layer."""
    if dtype not in ("F32", "F16", "BF16"):
        raise InputError(f"{name}: its weight is stored as {dtype}; only F32, F16 and BF16 can be quantized")
    try:
        search = getattr(recipe.method_options, "scale_search", None)
        if search not in (None, "auto", "diagh", "output"):  # which are mse, weighted, or of a narrower absmax
            numerics.check_search(scheme.weights.number, search)
        numerics.groups(scheme.weights, shape[1])
        if scheme.activations is not None:
            numerics.get(scheme.activations.number)
            if scheme.calibrates_input and not scheme.activations.symmetric:
                raise InputError(
                    "static activations with zero points cannot be calibrated; make them symmetric or dynamic"
                )
        signed = getattr(recipe.method_options, "signed_scales", False)
        if signed and (deaf := lint.unsigned([scheme], recipe.export.engines)):
            raise InputError(f"of {', '.join(deaf)} it is not known that it reads signed scales; set it to false")
        form = formats.get(recipe.export.format)
        form.tensors(shape, scheme, formats.scale_dtype(form, dtype))
    except InputError as e:
        raise InputError(
            f"{name} {shape[0]}x{shape[1]}: {e}; choose another scheme or group size, or leave it dense with a rule"
        ) from None
