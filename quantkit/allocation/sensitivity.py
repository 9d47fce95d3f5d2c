"""How much the whole model suffers when a part of it is rounded: measured, without gradients, block by block.

What the rounding of a group of layers costs is predicted from two figures, both measured on the calibration text:

    loss         of each candidate scheme: what rounding does to the outputs of the group's linears (losses.py)
    sensitivity  the KL divergence at the end of the model, in nats a token, that such an error causes: the error of
                 one candidate, the probe, is added to the outputs of this group alone, scaled to NOISE of their energy

KL is smooth and zero without an error, so it grows like the error's energy; and the errors of different groups have
nothing to do with each other, so what they cost adds up:

    KL of a choice  ~  sum over groups of  sensitivity * loss of the chosen candidate

An error that is really there, on the tokens where it is, foretells more than Gaussian noise of its energy: over the 32
groups of the embedded model the standard deviation of log(measured / predicted KL), one group at a time by GPTQ at 4
bits, is 0.10; with noise in its place 0.13, and 0.28 where GPTQ's share in the losses is left out.

One pass through the blocks does it all. The dense model's hidden states go along, and for each group of the blocks
passed so far a copy of some of them that went wrong in that group and nowhere else; at the end the model's own last
norm and head turn each copy into distributions. All that is float32: bfloat16 rounds the hidden states and the logits
so coarsely that the KL between two runs that hardly differ is a tenth of what is measured here, or more in deep models.
On a GPU the products are TF32. Memory beside what quantizing takes: (groups + 1) * tokens * hidden * 4 bytes; 128
groups, 2048 tokens and a hidden size of 4096 are 4.3 GB, on the host where `calibration.hidden` says so or a quarter of
the GPU's free memory does not hold them. Work: groups / 2 forward passes of those tokens, and about what quantizing the
model once takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import log_softmax

from quantkit import blocks, calibration, observation, summation
from quantkit.allocation.losses import Methods, Rounded, Subject, losses
from quantkit.allocation.tail import Tail
from quantkit.errors import InputError
from quantkit.hidden import chosen
from quantkit.plan import Plan, outside
from quantkit.progress import Progress
from quantkit.types import Stats

NOISE = 0.01  # energy of the added error over that of the outputs: about what 4 bits in groups of 128 do
QUARTER = -1  # the number of a copy like that of the first subject, with a quarter of the noise


@dataclass
class Measured:
    """What was found out of one group.

    losses  of each candidate, relative to the energy of the outputs
    kl      nats a token, under an error of the relative energy `noise`
    """

    losses: list[float]
    noise: float
    kl: float = 0.0

    @property
    def sensitivity(self) -> float:
        """Nats a token, for an error as large as the outputs, if it went on like that: good for small errors alone."""
        return self.kl / self.noise if self.noise else 0.0

    def predicted(self, candidate: int) -> float:
        """KL divergence, nats a token, of giving this group alone a candidate."""
        return self.sensitivity * self.losses[candidate]


@dataclass
class _Pass:
    """The pass through the blocks.

    by      the plans by which schemes are tried
    wide    batches that statistics come from; None where those of `narrow` will do
    narrow  batches of which copies are made; ids: their tokens
    copies  by number of subject, from its own block on: hidden states, one tensor a batch
    rest    what blocks return beside hidden states; None when they return no tuple
    """

    plan: Plan
    by: Methods
    device: torch.device
    wide: list[blocks.Batch] | None
    narrow: list[blocks.Batch]
    ids: list[torch.Tensor]
    keep: Callable[[torch.Tensor], torch.Tensor]
    copies: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    rest: tuple[Any, ...] | None = None


@torch.no_grad()
def measure(
    plan: Plan,
    subjects: Sequence[Subject],
    rows: calibration.Rows,
    tokens: tuple[int, int],
    *,
    device: torch.device,
    progress: Progress,
) -> tuple[list[Measured], float]:
    """Losses and sensitivity of each subject; and whether the noise was of a good size.

    plan    of the model, with any schemes: it names method, format and dtypes. A rotation takes part; scales that other
            transforms fold do not.
    rows    the last of them to measure on, those before for the statistics that GPTQ needs: on the tokens that GPTQ has
            fitted its errors are too small
    tokens  how many rows to measure on, and how many tokens at the start of each
    device  where blocks are computed
    The second figure is the sensitivity of the first subject under a quarter of the noise, over that under all of it:
    above 1 where the noise drowns in rounding, below where the model is beyond small errors.
    Raises InputError naming the layers, for NaN, Inf, or outputs that are zero on all tokens.
    """
    ghost = plan.skeleton
    run = _begin(plan, rows, tokens, len(subjects), device)
    found: dict[int, Measured] = {}
    progress.begin(len(plan.structure.blocks) + 1, "measure")
    for block in plan.structure.blocks:
        progress.item(block.index + 1, block.name)
        names = ghost.parameters(block.name + ".")
        ghost.checkpoint.expect(plan.reading, block.index + 1)
        ghost.load(names, device, _dtype(plan, device))
        inside = {i: subject for i, subject in enumerate(subjects) if subject.block == block.index}
        found |= _block(run, block, inside, progress)
        ghost.unload(names)
    progress.item(len(plan.structure.blocks) + 1, "head")
    totals = _finish(run)
    for i, measured in found.items():
        measured.kl = totals[i]
        if not math.isfinite(measured.kl):
            raise InputError(f"{subjects[i].names}: an error of a hundredth makes the model compute NaN or Inf")
    progress.end()
    quarter = 4 * totals[QUARTER] / totals[0] if totals.get(0) and QUARTER in totals else 1.0
    return [found[i] for i in range(len(subjects))], quarter


def _dtype(plan: Plan, device: torch.device) -> torch.dtype:
    """What statistics are observed in, as in the run itself."""
    return torch.float32 if device.type == "cpu" else plan.skeleton.dtype


def _begin(plan: Plan, rows: calibration.Rows, tokens: tuple[int, int], groups: int, device: torch.device) -> _Pass:
    """Takes the rows up to the first block."""
    ghost, count, length = plan.skeleton, *tokens
    by = Methods.of(plan)

    def keep(x: torch.Tensor) -> torch.Tensor:
        return x.cpu() if on_host else x

    def begin(ids: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype) -> list[blocks.Batch]:
        size = plan.recipe.calibration.batch_size
        pairs = [(i.to(device), m.to(device)) for i, m in zip(ids.split(size), mask.split(size), strict=True)]
        with _loaded(plan, device, dtype):
            return blocks.begin(ghost, plan.structure, pairs, keep)

    taken, mask = rows.ids_RL[-count:, :length], rows.mask_RL[-count:, :length]
    others = slice(len(rows.ids_RL) - count) if len(rows.ids_RL) > count else slice(None)
    hidden = int(ghost.model.config.get_text_config().hidden_size)
    needed = hidden * 4 * ((groups + 1) * taken.numel() + rows.ids_RL.numel())
    on_host = device.type == "cuda" and chosen(needed, plan.recipe.calibration.hidden, device) != "device"
    wide = None if by.one else begin(rows.ids_RL[others], rows.mask_RL[others], _dtype(plan, device))
    ids = [part.to(device) for part in taken.split(plan.recipe.calibration.batch_size)]
    return _Pass(plan, by, device, wide, begin(taken, mask, torch.float32), ids, keep)


@contextmanager
def _loaded(plan: Plan, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """What is in no block is there meanwhile: embeddings, last norm, head."""
    ghost = plan.skeleton
    names = outside(ghost, plan.structure)
    ghost.load(names, device, dtype)
    ghost.tie()
    for buffer in ghost.model.buffers():
        if not buffer.is_meta:  # those that are stored come and go with their block
            buffer.data = buffer.data.to(device)
    yield
    ghost.unload(names)


def _block(run: _Pass, block: blocks.Block, subjects: Mapping[int, Subject], progress: Progress) -> dict[int, Measured]:
    """Takes all hidden states through a loaded block, and begins a copy for each subject in it."""
    ghost = run.plan.skeleton
    module = ghost.model.get_submodule(block.name)
    progress.doing("observe")
    stats = _observe(run, block, subjects.values())
    for batch in run.wide or ():
        batch.hidden = run.keep(blocks.run(module, batch, block.index))
    for name in ghost.parameters(block.name + "."):
        if ghost.get(name).is_floating_point():
            ghost.put(name, ghost.get(name).float())
    samples = _sample(run, block, subjects.values())
    progress.doing("run on")
    with _tf32(run.device):
        for hidden in run.copies.values():
            for k, batch in enumerate(run.narrow):
                hidden[k] = run.keep(blocks.run(module, batch, block.index, hidden=hidden[k]))
    found: dict[int, Measured] = {}
    for i, subject in subjects.items():
        progress.doing(f"group {len(found) + 1}/{len(subjects)}")
        lost, errors = losses(run.by, block, subject, stats or samples, samples)
        found[i] = Measured(lost, NOISE if lost[subject.probe] > 0 else 0.0)
        scale = (found[i].noise / lost[subject.probe]) ** 0.5 if found[i].noise else 0.0
        for number, share in ((i, 1.0), (QUARTER, 0.5))[: 2 if i == 0 else 1]:
            with _disturbed(ghost.model, errors, scale * share), _tf32(run.device):
                run.copies[number] = [run.keep(blocks.run(module, batch, block.index)) for batch in run.narrow]
    handle = module.register_forward_hook(lambda _, __, out: _note(run, out))
    with _tf32(run.device):
        for batch in run.narrow:
            batch.hidden = run.keep(blocks.run(module, batch, block.index))
    handle.remove()
    return found


@contextmanager
def _tf32(device: torch.device) -> Iterator[None]:
    """Products of float32 matrices on a GPU's tensor cores meanwhile, with inputs of 11 significant bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _note(run: _Pass, out: Any) -> None:
    run.rest = out[1:] if isinstance(out, tuple) else None


def _observe(run: _Pass, block: blocks.Block, subjects: Iterable[Subject]) -> dict[str, Stats]:
    """Statistics of all rows, by linear; none where a sample will do."""
    needs = {x.module: run.by.needs(subject) for subject in subjects for x in subject.layers}
    if run.wide is None or not needs:
        return {}
    prior = run.plan.recipe.calibration.expert_prior
    return observation.observe(run.plan.skeleton.model, block, run.wide, needs, prior=prior).stats


def _sample(run: _Pass, block: blocks.Block, subjects: Iterable[Subject]) -> dict[str, Stats]:
    """A sample of the inputs that are taken through the model, by linear; where it must do, with statistics."""
    sample: frozenset[str] = frozenset({"sample"})
    needs = {
        x.module: sample if run.wide is not None else sample | run.by.needs(subject)
        for subject in subjects
        for x in subject.layers
    }
    if not needs:
        return {}
    prior = run.plan.recipe.calibration.expert_prior
    return observation.observe(run.plan.skeleton.model, block, run.narrow, needs, prior=prior).stats


@contextmanager
def _disturbed(model: nn.Module, errors: Mapping[str, Rounded], scale: float) -> Iterator[None]:
    """Each of the named linears adds `scale` times its error to its output."""
    with ExitStack() as stack:
        for name, rounded in errors.items():

            def hook(_: nn.Module, args: tuple[Any, ...], out: torch.Tensor, by: Rounded = rounded) -> torch.Tensor:
                return out + scale * by.error(args[0])

            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield


def _finish(run: _Pass) -> dict[int, float]:
    """KL divergence of each copy from the dense model, in nats a token, over the tokens that count."""
    totals, tokens = dict.fromkeys(run.copies, 0.0), 0
    plan = run.plan
    with (
        _loaded(plan, run.device, torch.float32),
        Tail(plan.skeleton, plan.structure, run.rest) as tail,
        _tf32(run.device),
    ):

        def distribution(ids: torch.Tensor, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return log_softmax(tail(ids, hidden.to(run.device))[0, mask], -1)

        for k, batch in enumerate(run.narrow):
            for row in range(len(batch.mask)):  # logits of one row at a time: they are the largest tensor of all
                mask, part = batch.mask[row], slice(row, row + 1)
                tokens += int(mask.sum())
                dense = distribution(run.ids[k][part], batch.hidden[part], mask)
                if not bool(torch.isfinite(dense).all()):
                    raise InputError("the model's logits are NaN or Inf on the calibration text; load it in bfloat16")
                for i, hidden in run.copies.items():
                    other = distribution(run.ids[k][part], hidden[k][part], mask)
                    totals[i] += summation.total(dense.exp() * (dense - other))
    return {i: max(0.0, total / max(1, tokens)) for i, total in totals.items()}
