"""A model understood by its structure: its repeated blocks, the linears in them, and which linears share one input.

Nothing here goes by a list of architectures. The blocks are the longest list of alike modules that hold linears; the
order of the linears and which of them read the same tensor (q/k/v, gate/up) come from one run on the meta device, which
costs no memory; what each block is called with comes from a run of the model's own forward with stand-ins for blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantkit.errors import InputError
from quantkit.skeleton import Skeleton


@dataclass(frozen=True)
class Block:
    """One of the repeated modules. `groups`: names in memory of its linears, those that read one tensor together."""

    index: int
    name: str
    groups: tuple[tuple[str, ...], ...]

    @property
    def linears(self) -> list[str]:
        return [name for group in self.groups for name in group]


@dataclass(frozen=True)
class Structure:
    """What was found in a model. `outside`: linears that are in no block, such as lm_head.

    idle  prefixes of modules that hold linears of which text uses none: a vision tower
    """

    blocks: tuple[Block, ...]
    outside: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()


def find(skeleton: Skeleton) -> Structure:
    """Finds blocks, linears and shared inputs. Raises InputError when there is no list of blocks with linears in it."""
    model = skeleton.model
    listed = _block_list(model)
    if listed is None:
        raise InputError(
            f"{type(model).__name__}: no list of repeated blocks with nn.Linear layers was found, "
            "so this architecture cannot be quantized block by block"
        )
    path, blocks = listed
    prefixes = [f"{path}.{i}." for i in range(len(blocks))]
    fused = [n for n, p in model.named_parameters() if p.ndim > 2 and n.startswith(tuple(prefixes))]
    # A convolution over a few tokens, before linear attention, stays as it is.
    if fused := [n for n in fused if not isinstance(model.get_submodule(n.rpartition(".")[0]), nn.Conv1d)]:
        raise InputError(
            f"{fused[0]}: has more than two dimensions, and is no tensor of experts that can be taken apart; "
            "such blocks are not supported by this version"
        )
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    order, used, warnings = _shared_inputs(model, linears)
    found = []
    for i, prefix in enumerate(prefixes):
        groups = [tuple(name for name in group if name.startswith(prefix)) for group in order]
        found.append(Block(i, prefix[:-1], tuple(group for group in groups if group)))
    outside = tuple(name for name in linears if not name.startswith(tuple(prefixes)))
    idle = () if warnings else tuple(_idle(model, used | {n for n in linears if n.startswith(tuple(prefixes))}))
    return Structure(tuple(found), outside, warnings, idle)


def _idle(module: nn.Module, used: set[str], prefix: str = "") -> Iterator[str]:
    """The largest modules, as prefixes of names, that hold linears of which none is used."""
    for name, child in module.named_children():
        inside = [n for n, m in child.named_modules(prefix=prefix + name) if isinstance(m, nn.Linear)]
        if inside and used.isdisjoint(inside):
            yield f"{prefix}{name}."
        elif inside:
            yield from _idle(child, used, f"{prefix}{name}.")


def _block_list(model: Any) -> tuple[str, nn.ModuleList] | None:
    """The list of alike modules that holds the most weights of linears; first, one in the text model, of its length."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    decoder = {id(m) for m in model.get_decoder().modules()} if hasattr(model, "get_decoder") else set()
    best: tuple[tuple[bool, bool, int], str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        weights = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
        rank = (id(module) in decoder, len(module) == depth, weights)
        if weights and (best is None or rank > best[0]):
            best = (rank, name, module)
    return None if best is None else (best[1], best[2])


def dry_run(model: nn.Module, watching: Callable[[nn.Module], AbstractContextManager[None]]) -> str:
    """Runs a copy of the model on the meta device: no weight, no memory. Returns why it could not, or "".

    watching  called with the copy before each attempt, of which there may be two; its context holds during that one
    """
    ghost = copy.deepcopy(model).to("meta")
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    # A ready 4-D mask keeps transformers from reading values, which a meta tensor does not have; some older
    # architectures take no such mask but need none either.
    mask = torch.zeros(1, 1, 8, 8, dtype=next(ghost.parameters()).dtype, device="meta")
    problem = ""
    for extra in ({"attention_mask": mask}, {}):
        with watching(ghost), torch.no_grad():
            try:
                ghost(input_ids=ids, use_cache=False, **extra)
                return ""
            except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as e:
                problem = (str(e).splitlines() or [type(e).__name__])[0]
    return problem


def _shared_inputs(model: nn.Module, linears: list[str]) -> tuple[list[list[str]], set[str], tuple[str, ...]]:
    """Linears by first use, those called with the very same tensor together; those that text uses at all; warnings."""
    seen: list[tuple[str, torch.Tensor]] = []  # holds the tensors, so that no id is used twice

    def watching(ghost: nn.Module) -> AbstractContextManager[None]:
        seen.clear()
        return watched(ghost, linears, lambda name, x: seen.append((name, x)))

    if problem := dry_run(model, watching):
        warning = f"which linears share an input could not be found out ({problem}); each is treated alone"
        return [[name] for name in linears], set(linears), (warning,)
    groups: dict[int, list[str]] = {}
    used: set[str] = set()
    for name, x in seen:
        if name not in used:
            groups.setdefault(id(x), []).append(name)
            used.add(name)
    return [*groups.values(), *([name] for name in linears if name not in used)], used, ()


@contextmanager
def watched(model: nn.Module, names: list[str], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Calls `see(name, input)` whenever one of the named modules runs."""
    handles = []
    try:
        for name in names:

            def hook(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                see(name, args[0])

            handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Stop(Exception):
    """Ends the forward after the last block: what comes after it is not needed."""


class _StandIn(nn.Module):
    """Takes a block's place: notes what it is called with and passes the hidden states on."""

    def __init__(self, block: nn.Module, last: bool) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)
        self.last = last
        self.call: tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        # Model code reads attributes of its blocks, such as attention_type.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.call = (hidden_states, args, kwargs)
        if self.last:
            raise _Stop
        return hidden_states


@dataclass
class Batch:
    """One batch on its way through the blocks: hidden states now, and what each block is called with besides.

    hidden  (B, L, hidden) of the quantized model, on the device or, to spare its memory, on the host
    dense   the same of the dense model, where it is carried along; onward: what the dense block makes of it
    """

    hidden: torch.Tensor
    mask: torch.Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    dense: torch.Tensor | None = None
    onward: torch.Tensor | None = None


@torch.no_grad()
def begin(
    skeleton: Skeleton,
    structure: Structure,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    keep: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> list[Batch]:
    """Runs everything before the blocks on each batch of (ids_BL, mask_BL), on the device where the embeddings are.

    keep  what is done with the hidden states of a batch: where they wait
    The other arguments of every block (rotary tables, attention masks) are noted per block, since they may differ from
    one to the next; equal tensors of different batches are kept once.
    """
    model = skeleton.model
    path = structure.blocks[0].name.rpartition(".")[0]
    owner, _, leaf = path.rpartition(".")
    parent, blocks = model.get_submodule(owner), model.get_submodule(path)
    last = len(structure.blocks) - 1
    out: list[Batch] = []
    kept: list[torch.Tensor] = []
    for ids, mask in batches:
        stand_ins = [_StandIn(block, i == last) for i, block in enumerate(blocks)]
        setattr(parent, leaf, nn.ModuleList(stand_ins))
        try:
            model(input_ids=ids, use_cache=False)
        except _Stop:
            pass
        finally:
            setattr(parent, leaf, blocks)
        same: dict[int, torch.Tensor] = {}
        calls = []
        for i, stand_in in enumerate(stand_ins):
            if stand_in.call is None:
                raise InputError(
                    f"{structure.blocks[i].name} was not run by the model's forward; it cannot be calibrated"
                )
            _, args, kwargs = stand_in.call
            calls.append((_keep(args, kept, same), _keep(kwargs, kept, same)))
        assert stand_ins[0].call is not None
        out.append(Batch(keep(stand_ins[0].call[0]), mask, calls))
    return out


def _keep(value: Any, kept: list[torch.Tensor], same: dict[int, torch.Tensor]) -> Any:
    """The same structure, each tensor replaced by an equal one that is held already, if there is one."""
    if isinstance(value, torch.Tensor):
        if id(value) not in same:
            like = [t for t in kept if t.shape == value.shape and t.dtype == value.dtype]
            match = next((t for t in like if torch.equal(t, value)), None)
            if match is None:
                kept.append(value)
                match = value
            same[id(value)] = match
        return same[id(value)]
    if isinstance(value, tuple | list):
        return type(value)(_keep(v, kept, same) for v in value)
    if isinstance(value, dict):
        return {k: _keep(v, kept, same) for k, v in value.items()}
    return value


def run(
    module: nn.Module, batch: Batch, index: int, cache: Any = None, hidden: torch.Tensor | None = None
) -> torch.Tensor:
    """The hidden states of a batch after block `index`, whose module must be loaded; where the module is.

    cache   takes the place of `past_key_values`, where the model hands such an argument to its blocks
    hidden  takes the place of the batch's hidden states
    """
    args, kwargs = batch.calls[index]
    x = (batch.hidden if hidden is None else hidden).to(next(module.parameters()), non_blocking=True)
    if cache is not None and "past_key_values" in kwargs:
        kwargs = {**kwargs, "past_key_values": cache}
    out = module(x, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def first_row(batch: Batch, index: int) -> Batch:
    """A batch of the first row alone, for block `index` only."""
    rows = batch.hidden.shape[0]
    calls = [*batch.calls[:index], _rows_of(batch.calls[index], slice(1), rows)]
    return Batch(batch.hidden[:1], batch.mask[:1], calls)


def cut(batch: Batch, rows: int) -> list[Batch]:
    """A batch in parts of at most so many rows: views, nothing is copied."""
    count = batch.hidden.shape[0]
    if count <= rows:
        return [batch]
    parts = [slice(start, start + rows) for start in range(0, count, rows)]
    fields = (batch.hidden, batch.mask, batch.calls, batch.dense, batch.onward)
    return [Batch(*_rows_of(fields, part, count)) for part in parts]


def _rows_of(value: Any, part: slice, count: int) -> Any:
    """Those rows of every tensor that has one for each of the `count` rows of a batch, in whatever holds them."""
    if isinstance(value, torch.Tensor):
        return value[part] if value.ndim > 1 and value.shape[0] == count else value
    if isinstance(value, tuple | list):
        return type(value)(_rows_of(v, part, count) for v in value)
    return {k: _rows_of(v, part, count) for k, v in value.items()} if isinstance(value, dict) else value


def on_disk(x: torch.Tensor) -> bool:
    """Whether it is a file that is mapped into memory."""
    return x.device.type == "cpu" and x.untyped_storage().filename is not None


def store(x: torch.Tensor, place: torch.Tensor | None) -> torch.Tensor:
    """Keeps hidden states where they are kept: in `place` when that is elsewhere, else as they are."""
    if place is None or (place.device == x.device and not on_disk(place)):
        return x
    return place.copy_(x, non_blocking=True)
