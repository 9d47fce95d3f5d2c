"""Rotation of the hidden states, folded into the weights: QuaRot (arXiv 2404.00456), SpinQuant (2405.16406).

A few channels of a transformer's hidden states are far louder than the others, and so are the columns of weights that
read them. They set the scale of their group and cost all others their precision. An orthogonal matrix that mixes
channels spreads the loudness evenly. The model's function stays what it was, and nothing is computed at run time:

    R1  on the hidden states   every weight that writes them is W' = R1ᵀ W (its bias b R1), the embeddings are E R1,
                               and every weight that reads them through a norm is W' = W diag(gamma) R1
    R2  on each value head     rows of v_proj R2ᵀ W, columns of o_proj W R2; a KV head and its query heads share one

R1 passes through a norm because the root mean square of x R1 is that of x, once the norm's own weight gamma is 1: gamma
moves into the weights that read the norm's output. That includes routers, shared experts, and lm_head for the last
norm, so lm_head can no longer share its weight with the embeddings. Scalars commute: multipliers of residuals and
embeddings need nothing. A norm between a layer's output and the hidden states has nothing behind it to take its gamma,
and a LayerNorm subtracts a mean that R1 does not keep: such models are refused.

R = diag(signs) (I ⊗ H_size) with H a normalised Hadamard matrix. Large sizes mix best; of MXFP4 it is reported that
mixing beyond its groups of 32 raises the error (arXiv 2511.04214).

It pays where channels are loud or activations have few bits, and costs a little where neither is so. KL divergence of
the embedded model, which has no loud channels, without and with blocks of 32: int4 weights and activations (GPTQ) 0.554
and 0.491, MXFP4 weights (GPTQ) 0.067 and 0.070; MXFP4 weights (RTN) of a copy with 1 % loud channels 0.154 and 0.103.

The plan is made on a model without weights; `Rotation.rewrite` then changes each tensor as it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from quantkit.blocks import Structure
from quantkit.errors import InputError
from quantkit.links import Link, norm_offset
from quantkit.transforms import _hadamard, _probe
from quantkit.transforms._hadamard import LINES, Turn

# The largest `Rotation.error` of a block that was rotated well. Measured on trained and on random models: rounding in
# float32 gives 1e-6, one matrix left out (a router's, one of eight experts', a norm's weight) 0.02 or more.
TOLERANCE = 1e-3
# Of so many tokens one may be off: where two experts are all but tied, rounding decides which one a token goes to.
SPARED = 50
# A block may add little to a token's hidden states; their own rounding must not count as an error of the block.
FLOOR = 0.01


class Options(BaseModel):
    """Options of `transforms: [{rotation: ...}]`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int | None = Field(
        None,
        description="Channels that are mixed with each other: a power of two that divides the hidden size. Without "
        "it, the largest one. 32 is the length of MXFP4's groups.",
    )
    values: bool = Field(True, description="Also rotate the values of each attention head, between v_proj and o_proj.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the random signs.")
    random_signs: bool = Field(True, description="Flip channels at random before they are mixed.")

    @field_validator("size")
    @classmethod
    def _power_of_two(cls, size: int | None) -> int | None:
        if size is not None and (size < 2 or size & (size - 1)):
            raise ValueError(f"{size} is not a power of two of 2 or more, and Hadamard matrices are made for those")
        return size


def needs(options: Options) -> frozenset[str]:
    """No statistics: a rotation does not look at the data."""
    return frozenset()


@dataclass(frozen=True, eq=False)
class Change:
    """What becomes of one parameter, in this order.

    neutral  it is a norm's weight that moved elsewhere: all its values become this one
    gamma    norm's weight, by name, that its columns are multiplied by, and what is added to it first (1 for 1 + w)
    columns  applied to each row: W R
    rows     applied to each column: Rᵀ W, or b R for a bias
    at       the rows that `rows` is applied to, int64; None for all
    """

    neutral: float | None = None
    gamma: tuple[str, float] | None = None
    columns: Turn | None = None
    rows: Turn | None = None
    at: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Rotation:
    """A rotation that was decided; names are those in memory.

    stream    R1
    changes   parameter -> what becomes of it; all others stay
    untied    lm_head's weight and the embedding that it was tied to, which must become two tensors; else None
    warnings  what could not be done as asked
    """

    stream: Turn
    changes: dict[str, Change]
    untied: tuple[str, str] | None = None
    warnings: tuple[str, ...] = ()

    def rewrite(
        self, name: str, tensor: torch.Tensor, read: Callable[[str], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The rotated value of a parameter, on the device of `tensor`.

        tensor  its original value, any float dtype; for an untied lm_head that of the embedding
        read    gives the original value of another parameter: of the norm whose weight moves into this one
        Computed in float64. Returns float32, or float64 for float64; a parameter that does not change as it is.
        """
        change = self.changes.get(name)
        if change is None:
            return tensor
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        if change.neutral is not None:
            return torch.full_like(tensor, change.neutral, dtype=dtype)
        gamma = None
        if change.gamma is not None:
            if read is None:
                raise ValueError(f"{name} needs {change.gamma[0]}, but there is nothing to read it with")
            gamma = read(change.gamma[0]).to(tensor.device).double() + change.gamma[1]
        out = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
        for place in _parts(tensor.shape, change):
            part = tensor[place].double()
            part = part if gamma is None else part * gamma
            part = part if change.columns is None else change.columns.forward(part)
            if change.rows is not None:
                at = slice(None) if change.at is None else change.at.to(part.device)
                turned = change.rows.forward(part[at].movedim(0, -1)).movedim(-1, 0)
                part = part.index_copy(0, at, turned) if isinstance(at, torch.Tensor) else turned
            out[place] = part
        return out

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., hidden) of the original model as the rotated one has them: x R1, in the dtype of x."""
        return self.stream.forward(x.double()).to(x.dtype)

    def original(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., hidden) of the rotated model as the original one has them: x R1ᵀ, undoing `hidden`."""
        return self.stream.back(x.double()).to(x.dtype)

    def error(
        self, before: torch.Tensor, after: torch.Tensor, rotated: torch.Tensor, mask: torch.Tensor | None = None
    ) -> float:
        """How far a rotated block is from the original one, relative to what the block does to a token.

        before   (..., hidden) float32, what the original block read; the rotated one read `hidden(before)`
        after    what the original block returned
        rotated  what the rotated block returned
        mask     (...) bool, tokens that count; padding may hold anything
        Returns the largest error of a token, one token in `SPARED` left out; compare it with `TOLERANCE`. Infinite when
        there is NaN. Raises ValueError for 16-bit tensors: rounding would hide a small mistake in them.
        """
        if not before.dtype == after.dtype == rotated.dtype or before.dtype not in (torch.float32, torch.float64):
            raise ValueError("a rotated block is compared in float32 or float64")
        wrong = (rotated.double() - self.stream.forward(after.double())).norm(dim=-1)
        change = (after.double() - before.double()).norm(dim=-1)
        errors = (wrong / (change + FLOOR * before.double().norm(dim=-1)).clamp_min(1e-30)).flatten()
        if mask is not None:
            errors = errors[mask.flatten()]
        if not len(errors):
            return 0.0
        if bool(errors.isnan().any()):
            return float("inf")
        return float(errors.sort().values[len(errors) - 1 - len(errors) // SPARED])

    def check(
        self,
        plain: Callable[[torch.Tensor], torch.Tensor],
        rotated: Callable[[torch.Tensor], torch.Tensor],
        hidden: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> float:
        """`error` of a block given as two functions of hidden states; the original one is called first."""
        return self.error(hidden, plain(hidden), rotated(self.hidden(hidden)), mask)


def _parts(shape: torch.Size, change: Change) -> list[tuple[slice, ...]]:
    """Pieces of a parameter that can be changed one after the other, for the sake of memory: rows, or columns."""
    if change.rows is None:
        return [(slice(i, i + LINES),) for i in range(0, shape[0], LINES)]
    if len(shape) == 2 and change.columns is None and change.gamma is None:
        return [(slice(None), slice(i, i + LINES)) for i in range(0, shape[1], LINES)]
    return [()]


def plan(model: Any, structure: Structure, links: Sequence[Link], options: Options) -> Rotation:
    """Decides the rotation of a model on the meta device.

    Raises InputError, naming the module, for an architecture in which the hidden states cannot be rotated, and for a
    size that does not divide theirs.
    """
    embedding = model.get_input_embeddings()
    width = int(embedding.weight.shape[1])
    size = options.size or _hadamard.largest(width)
    if width % size:
        raise InputError(
            f"rotation: size {size} does not divide the hidden size {width}; "
            f"the largest that does is {_hadamard.largest(width)}"
        )
    generator = torch.Generator().manual_seed(options.seed) if options.random_signs else None
    stream = _hadamard.turn(width, size, generator)
    if not links:
        raise InputError("rotation: what reads the output of which norm could not be found out in this architecture")
    planner = _Planner(model, structure, links, stream)
    planner.read_and_write()
    untied = planner.ends()
    warnings = planner.values(options.size, generator) if options.values else ()
    return Rotation(stream, planner.changes, untied, warnings)


class _Planner:
    """Finds out what becomes of each parameter, and refuses what it does not understand."""

    def __init__(self, model: Any, structure: Structure, links: Sequence[Link], stream: Turn) -> None:
        self.model, self.structure, self.links, self.stream = model, structure, links, stream
        self.width = len(stream.signs)
        self.changes: dict[str, Change] = {}
        self.norms = _probe.vectors(model, self.width)
        linears = [name for block in structure.blocks for name in block.linears]
        self.uses = _probe.uses(model, linears, {*self.norms, *linears})

    def _refuse(self, name: str, why: str) -> InputError:
        kind = type(self.model).__name__
        return InputError(f"{name}: {why}; {kind} cannot be rotated, leave rotation out of transforms")

    def read_and_write(self) -> None:
        """What the blocks do to the hidden states: norms, what reads them, what writes them."""
        behind: set[str] = set()
        for link in self.links:
            # A norm of what a linear returned, of a query's latent for instance, is not one of the hidden states.
            if link.kind == "norm" and link.producer in self.norms and link.producer not in self.uses.read_by:
                self._norm(link.producer, link.consumers)
            elif link.kind == "norm":
                behind.update(link.consumers)
        for block in self.structure.blocks:
            for name in block.linears:
                reads = f"{name}.weight" in self.changes or (name in behind and name not in self.uses.added)
                if not reads and self.model.get_submodule(name).weight.shape[0] == self.width:
                    self._writer(name)
            self._account(block.name, behind)

    def _norm(self, norm: str, consumers: Sequence[str]) -> None:
        """A norm of the hidden states: its gamma moves into its consumers, which read rotated hidden states."""
        module = self.model.get_submodule(norm)
        if extra := [leaf for leaf, _ in module.named_parameters() if leaf != "weight"]:
            raise self._refuse(f"{norm}.{extra[0]}", "a norm with more than a weight does not commute with a rotation")
        offset = norm_offset(module)
        if offset is None or not _probe.commutes(module, 1 - offset, self.stream):
            raise self._refuse(norm, "does not commute with a rotation as a root mean square norm does")
        self.changes[f"{norm}.weight"] = Change(neutral=1 - offset)
        for name in consumers:
            weight = getattr(self.model.get_submodule(name), "weight", None)
            if weight is None or weight.ndim != 2 or weight.shape[1] != self.width:
                raise self._refuse(name, f"reads the output of {norm} but is no linear of {self.width} inputs")
            self.changes[f"{name}.weight"] = Change(gamma=(f"{norm}.weight", offset), columns=self.stream)

    def _writer(self, name: str) -> None:
        for leaf in self._leaves(name):
            self.changes[leaf] = Change(rows=self.stream)

    def _leaves(self, linear: str) -> list[str]:
        """Its weight, and its bias if it has one."""
        return [f"{linear}.{leaf}" for leaf, _ in self.model.get_submodule(linear).named_parameters()]

    def _account(self, block: str, behind: set[str]) -> None:
        """Refuses a block in which something as wide as the hidden states is not understood."""
        for leaf, parameter in self.model.get_submodule(block).named_parameters():
            name = f"{block}.{leaf}"
            module = name.rpartition(".")[0]
            if name in self.changes or self.width not in parameter.shape:
                continue
            if module in behind or f"{module}.weight" in self.changes:
                continue  # reads a norm that is not one of the hidden states; a bias of what reads them
            source = self.uses.read_by.get(module)
            if source is not None and self._reads(source):
                continue  # a norm of queries or keys that happen to be as wide
            if source is not None:
                raise self._refuse(module, f"normalises the output of {source} before it joins the hidden states")
            if parameter.ndim == 1:
                raise self._refuse(
                    name, "its module does not hand its output to linears alone, which could take its weight"
                )
            raise self._refuse(
                name,
                f"has the width of the hidden states, {self.width}, but is not the weight of a linear that reads them "
                "through a norm, or of one that writes them",
            )

    def _reads(self, linear: str) -> bool:
        return f"{linear}.weight" in self.changes and self.changes[f"{linear}.weight"].gamma is not None

    def ends(self) -> tuple[str, str] | None:
        """Embeddings, last norm and head. Returns the head and the embedding when they were tied."""
        model, names = self.model, {id(m): name for name, m in self.model.named_modules()}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head is None or tuple(head.weight.shape)[1:] != (self.width,):
            raise self._refuse("lm_head", f"there is no head that reads hidden states of width {self.width}")
        embedding_name, head_name = f"{names[id(embedding)]}.weight", f"{names[id(head)]}.weight"
        known = {embedding_name, head_name, f"{names[id(head)]}.bias"}
        prefixes = tuple(f"{block.name}." for block in self.structure.blocks)
        rest = [n for n, _ in model.named_parameters() if not n.startswith(prefixes) and n not in known]
        norms = [n for n in rest if n.removesuffix(".weight") in self.norms]
        if other := [n for n in rest if n not in norms]:
            raise self._refuse(other[0], "is outside the blocks and neither embedding, last norm nor head")
        if len(norms) != 1:
            raise self._refuse(norms[0] if norms else head_name, f"there are {len(norms)} norms outside the blocks")
        self._norm(norms[0].removesuffix(".weight"), [names[id(head)]])
        self.changes[embedding_name] = Change(columns=self.stream)
        tied = head_name in (getattr(model, "all_tied_weights_keys", None) or {}) or head.weight is embedding.weight
        return (head_name, embedding_name) if tied else None

    def values(self, size: int | None, generator: torch.Generator | None) -> tuple[str, ...]:
        """R2: rows of v_proj and columns of o_proj. Returns a warning when there are blocks without."""
        done: set[str] = set()
        for link in self.links:
            # A gate between attention and o_proj lets a scale of each channel pass, but no rotation.
            direct = all(self.uses.read_by.get(name) == link.producer for name in link.consumers)
            old = self.changes.get(f"{link.producer}.weight", Change())
            if not link.head_dim or not direct or old.rows is not None:
                continue
            head = _hadamard.largest(link.head_dim)
            turn = _hadamard.turn(link.rows[1], min(head, size or head), generator)
            for name in self._leaves(link.producer):
                self.changes[name] = replace(self.changes.get(name, Change()), rows=turn, at=link.row_numbers())
            for name in link.consumers:
                weight = f"{name}.weight"
                repeated = Turn(link.spread(turn.signs), turn.size)
                self.changes[weight] = replace(self.changes.get(weight, Change()), columns=repeated)
            done.add(link.block)
        left = [block.name for block in self.structure.blocks if block.name not in done]
        if not left:
            return ()
        return (
            f"rotation: values are not rotated in {', '.join(left[:3])}{', ...' if len(left) > 3 else ''}: "
            "no linear there hands its values to another one through attention alone",
        )
