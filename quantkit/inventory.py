"""Nothing is lost: every tensor and every file of the source, and what became of it.

    quantized   is codes and scales in the output, or, of all experts of a layer, those of each
    copied      is there under its name, with its dtype and shape, and was read and written byte for byte
    rewritten   is there under its name, after a transform went through it
    apart       is there in parts: the biases of experts that lie in one tensor
    dropped     is not there, for a reason that is given

Planned from headers, and checked at the end against the headers of what was written: no weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.checkpoint import Checkpoint, is_other_weights
from quantkit.errors import InputError
from quantkit.linears import whole
from quantkit.plan import Plan

KINDS = ("quantized", "copied", "rewritten", "apart", "dropped")


@dataclass(frozen=True)
class Inventory:
    """What becomes of the source's tensors.

    kinds    tensor of the source -> one of `KINDS`
    reasons  of what is dropped
    added    tensors of the output that the source has no counterpart of: scales of a KV cache, a head that was tied
    """

    kinds: Mapping[str, str]
    reasons: Mapping[str, str] = field(default_factory=dict)
    added: tuple[str, ...] = ()

    def counts(self) -> dict[str, int]:
        """How many tensors of the source there are of each kind; those there are none of left out."""
        found = list(self.kinds.values())
        return {kind: found.count(kind) for kind in KINDS if kind in found}

    def to_dict(self) -> dict[str, Any]:
        """As quantkit.json has it: counts, and names where they say more than a count."""
        dropped = [{"name": name, "reason": reason} for name, reason in self.reasons.items()]
        return {"source": len(self.kinds), **self.counts(), "dropped": dropped, "added": list(self.added)}

    def __str__(self) -> str:
        parts = [f"{count} {kind}" for kind, count in self.counts().items()]
        return f"{len(self.kinds)}: {', '.join(parts)}" + (f"; {len(self.added)} added" if self.added else "")


def of(plan: Plan) -> Inventory:
    """What a plan will do with each tensor of the source. Raises InputError for one that it forgets."""
    ghost, checkpoint = plan.skeleton, plan.skeleton.checkpoint
    kinds: dict[str, str] = {}
    made: set[str] = set()  # tensors of the output that are accounted for
    for memory, disk in ghost.to_disk.items():
        source = ghost.pieces[memory].disk if memory in ghost.pieces else ghost.source(memory)
        layer = plan.linears.get(memory.removesuffix(".weight")) if memory.endswith(".weight") else None
        if layer is not None and layer.scheme is not None:
            kinds[source] = "quantized"
            made |= {f"{layer.name}.{leaf}" for leaf in plan.tensors(layer)}
        elif memory in ghost.pieces and whole(ghost, plan.linears, memory) is None:
            kinds[source] = "apart"
            made.add(disk)
        elif source != disk and memory not in ghost.pieces:
            pass  # a tensor of its own where it shared one: added
        else:
            kinds[source] = "rewritten" if plan.rewrites and plan.specs.get(source) else "copied"
            made.add(source)
    kinds |= dict.fromkeys(ghost.unknown, "copied")
    made |= {*ghost.unknown}
    reasons = dict.fromkeys(checkpoint.unlisted, "lies in a shard whose index does not name it")
    kinds |= dict.fromkeys(reasons, "dropped")
    lost = sorted(checkpoint.specs.keys() - kinds.keys()) or sorted(made - plan.specs.keys())
    if lost:
        raise InputError(f"tensor {lost[0]!r} and {len(lost) - 1} more would be lost; this is a fault of quantkit")
    return Inventory(kinds, reasons, tuple(name for name in plan.specs if name not in made))


def account(plan: Plan, folder: Path, files: Mapping[str, Any]) -> Inventory:
    """Compares what was written with the plan. files: as quantkit.json has them.

    Raises InputError for a tensor or a file of the source that is neither in the output nor said to be dropped, and for
    a tensor of the output that is not what was announced.
    """
    found, written, source = of(plan), Checkpoint.open(folder), plan.skeleton.checkpoint
    for name in sorted(plan.specs.keys() | written.specs.keys()):
        if plan.specs.get(name) != written.specs.get(name):
            raise InputError(f"{folder}: tensor {name!r} is {written.specs.get(name)}, not {plan.specs.get(name)}")
    for name, kind in found.kinds.items():
        if kind in ("copied", "rewritten") and written.specs.get(name) != source.specs[name]:
            raise InputError(f"{folder}: tensor {name!r} was to be {kind}, and is {written.specs.get(name)}")
    said = {*files["copied"], *(x["name"] for x in files["dropped"]), "config.json"}
    shards = {*source.where.values()}
    for relative in plan.source.files():
        at_hand = plan.source.folder / relative in shards and is_other_weights(relative)
        if str(relative) not in said and not at_hand:
            raise InputError(f"{plan.source.folder / relative}: is neither copied nor said to be dropped")
        if str(relative) in files["copied"] and not (folder / relative).is_file():
            raise InputError(f"{folder / relative}: was to be copied from the source, and is not there")
    return found
