"""How much the whole model suffers when a part of it is rounded: measured, without gradients, block by block.

For each group of layers that get one scheme together, two things are measured on the calibration text:

    loss         of each candidate scheme: what rounding does to the outputs of the group's linears, summed over tokens,
                 |fq(x) Qᵀ - x Wᵀ|² / |x Wᵀ|². Q is the rounded weight, fq(x) the input as the scheme has it.
                 With inputs left as they are this is tr(D H Dᵀ) / tr(W H Wᵀ), D = W - Q, H = E[x xᵀ].
    sensitivity  the KL divergence at the end of the model, in nats a token, that such an error causes: the error of
                 one candidate, the probe, is added to the outputs of this group alone, scaled to NOISE of their energy

KL is smooth and zero without an error, so it grows like the error's energy; and the errors of different groups have
nothing to do with each other, so what they cost adds up:

    KL of a choice  ~  sum over groups of  sensitivity * loss of the chosen candidate

The probe is rounded by GPTQ where the recipe's method reads second moments: how much of an error GPTQ avoids differs
between layers by a factor of three. The other candidates are rounded to nearest, and their losses scaled by the ratio
of the two for the probe. An error that is really there, on the tokens where it is, foretells more than Gaussian noise
of the same energy: over the 32 groups of the embedded model the standard deviation of log(measured / predicted KL) is
0.09, against 0.12 for such noise, and 0.33 for noise without GPTQ's share.

One pass through the blocks does it all. The dense model's hidden states go along, and for each group of the blocks
passed so far a copy of some of them that went wrong in that group and nowhere else; at the end the model's own last
norm and head turn each copy into distributions. All that is float32: bfloat16 rounds the hidden states and the logits
so coarsely that the KL between two runs that hardly differ is a tenth of what is measured here, or more in deep models.
On a GPU the products are TF32. Memory beside what quantizing takes: (groups + 1) * tokens * hidden * 4 bytes; 128
groups, 2048 tokens and a hidden size of 4096 are 4.3 GB, on the host where a quarter of the GPU's free memory does not
hold them. Work: groups / 2 forward passes of those tokens, and about what quantizing once takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, log_softmax

from quantkit import blocks, calibration, observation, solve
from quantkit.errors import InputError
from quantkit.numerics._activations import fake_quantize
from quantkit.plan import Linear, Plan, outside
from quantkit.progress import Progress
from quantkit.recipe_named import Method
from quantkit.tail import Tail
from quantkit.types import QParams, Scheme, Stats

NOISE = 0.01  # energy of the added error over that of the outputs: about what 4 bits in groups of 128 do
GPTQ = Method.model_validate("gptq")
TO_NEAREST = Method.model_validate({"rtn": {"scale_search": "diagh"}})
QUARTER = -1  # the number of a copy like that of the first subject, with a quarter of the noise
CHUNK = 512  # tokens of a sample that are run at once
HIDDEN_SHARE = 0.25  # of the GPU memory that is free: what the copies may take of it


@dataclass(frozen=True)
class Subject:
    """A group of layers of one block, and the schemes that are tried on it.

    schemes  candidates; None stays dense, and has no loss
    probe    the candidate whose error is added; one with a scheme
    """

    block: int
    layers: tuple[Linear, ...]
    schemes: tuple[Scheme | None, ...]
    probe: int


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

    exact   the plan with the method by which the probe is rounded; cheap: that for the other candidates
    wide    batches that statistics come from; None where those of `narrow` will do
    narrow  batches of which copies are made; ids: their tokens
    copies  by number of subject, from its own block on: hidden states, one tensor a batch
    rest    what blocks return beside hidden states; None when they return no tuple
    """

    plan: Plan
    exact: Plan
    cheap: Plan
    device: torch.device
    wide: list[blocks.Batch] | None
    narrow: list[blocks.Batch]
    ids: list[torch.Tensor]
    keep: Callable[[torch.Tensor], torch.Tensor]
    copies: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    rest: tuple[Any, ...] | None = None


def methods(method: Method) -> tuple[Method, Method]:
    """By which method the probe is rounded, and the other candidates, for a recipe with this one."""
    if method.module.needs(method.options) <= {"energy"}:
        return method, method
    return GPTQ, TO_NEAREST


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
    rows    for the statistics that GPTQ needs
    tokens  how many of the rows, and how many tokens at the start of each, are taken through the model once a group
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
        ghost.load(names, device, _dtype(plan, device))
        inside = {i: subject for i, subject in enumerate(subjects) if subject.block == block.index}
        found |= _block(run, block, inside, progress)
        ghost.unload(names)
    progress.item(len(plan.structure.blocks) + 1, "head")
    totals = _finish(run)
    for i, measured in found.items():
        measured.kl = totals[i]
    progress.end()
    quarter = 4 * totals[QUARTER] / totals[0] if totals.get(0) and QUARTER in totals else 1.0
    return [found[i] for i in range(len(subjects))], quarter


def _dtype(plan: Plan, device: torch.device) -> torch.dtype:
    """What statistics are observed in, as in the run itself."""
    return torch.float32 if device.type == "cpu" else plan.skeleton.dtype


def _begin(plan: Plan, rows: calibration.Rows, tokens: tuple[int, int], groups: int, device: torch.device) -> _Pass:
    """Takes the rows up to the first block."""
    ghost, count, length = plan.skeleton, *tokens
    exact, cheap = (
        replace(plan, links=(), recipe=plan.recipe.model_copy(update={"method": method, "transforms": ()}))
        for method in methods(plan.recipe.method)
    )

    def keep(x: torch.Tensor) -> torch.Tensor:
        return x.cpu() if on_host else x

    def begin(ids: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype) -> list[blocks.Batch]:
        size = plan.recipe.calibration.batch_size
        pairs = [(i.to(device), m.to(device)) for i, m in zip(ids.split(size), mask.split(size), strict=True)]
        with _loaded(plan, device, dtype):
            return blocks.begin(ghost, plan.structure, pairs, keep)

    taken, mask = rows.ids_RL[:count, :length], rows.mask_RL[:count, :length]
    hidden = int(ghost.model.config.get_text_config().hidden_size)
    needed = hidden * 4 * ((groups + 1) * taken.numel() + rows.ids_RL.numel())
    on_host = device.type == "cuda" and needed > HIDDEN_SHARE * torch.cuda.mem_get_info(device)[0]
    same = exact.recipe.method == cheap.recipe.method
    wide = None if same else begin(rows.ids_RL, rows.mask_RL, _dtype(plan, device))
    ids = [part.to(device) for part in taken.split(plan.recipe.calibration.batch_size)]
    return _Pass(plan, exact, cheap, device, wide, begin(taken, mask, torch.float32), ids, keep)


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
        found[i], errors = _losses(run, block, subject, stats or samples, samples)
        for number, scale in ((i, 1.0), (QUARTER, 0.5))[: 2 if i == 0 else 1]:
            with _disturbed(ghost.model, errors, scale), _tf32(run.device):
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


def _needs(run: _Pass, subjects: Iterable[Subject]) -> dict[str, frozenset[str]]:
    """The statistics that rounding the linears of some subjects needs, by linear."""
    needs: dict[str, frozenset[str]] = {}
    for subject in subjects:
        for x in subject.layers:
            tried = [replace(x, scheme=scheme) for scheme in subject.schemes if scheme is not None]
            needs[x.module] = frozenset().union(*(plan.needs(x) for plan in (run.exact, run.cheap) for x in tried))
    return needs


def _observe(run: _Pass, block: blocks.Block, subjects: Iterable[Subject]) -> dict[str, Stats]:
    """Statistics of all rows, by linear; none where a sample will do."""
    needs = _needs(run, subjects)
    if run.wide is None or not needs:
        return {}
    prior = run.plan.recipe.calibration.expert_prior
    return observation.observe(run.plan.skeleton.model, block, run.wide, needs, prior=prior).stats


def _sample(run: _Pass, block: blocks.Block, subjects: Iterable[Subject]) -> dict[str, Stats]:
    """A sample of the inputs that are taken through the model, by linear; where it must do, with statistics."""
    needs = _needs(run, subjects)
    if not needs:
        return {}
    wanted = {name: {"sample"} | (some if run.wide is None else set()) for name, some in needs.items()}
    frozen = {name: frozenset(some) for name, some in wanted.items()}
    prior = run.plan.recipe.calibration.expert_prior
    return observation.observe(run.plan.skeleton.model, block, run.narrow, frozen, prior=prior).stats


@dataclass(frozen=True)
class _Rounded:
    """A candidate on one linear: D = Q - W (N, K), how its input is rounded, and Q where it is."""

    scheme: Scheme
    difference_NK: torch.Tensor
    weight_NK: torch.Tensor | None = None
    static_scale: torch.Tensor | None = None

    def of_weight(self, x: torch.Tensor) -> torch.Tensor:
        """x Dᵀ: what rounding the weight adds to the output."""
        return linear(x, self.difference_NK)

    def of_input(self, x: torch.Tensor) -> torch.Tensor:
        """(fq(x) - x) Qᵀ: what rounding the input adds, to the output of the rounded weight."""
        assert self.weight_NK is not None
        return linear(fake_quantize(x, self.scheme.activations, self.static_scale) - x, self.weight_NK)

    def error(self, x: torch.Tensor) -> torch.Tensor:
        """fq(x) Qᵀ - x Wᵀ in two parts, so that neither is the difference of two large numbers."""
        return self.of_weight(x) if self.weight_NK is None else self.of_weight(x) + self.of_input(x)

    def scaled(self, scale: float) -> _Rounded:
        """The same error, `scale` times as large."""
        whole = None if self.weight_NK is None else self.weight_NK * scale
        return replace(self, difference_NK=self.difference_NK * scale, weight_NK=whole)


def _round(
    run: _Pass, plan: Plan, block: blocks.Block, subject: Subject, scheme: Scheme, stats: Mapping[str, Stats]
) -> dict[str, _Rounded]:
    """A candidate on every linear of the group, by the method of `plan`."""
    found: dict[str, _Rounded] = {}
    for group in block.groups:
        for layers in solve.by_scheme([replace(x, scheme=scheme) for x in subject.layers if x.module in group]):
            weights = [run.plan.skeleton.get(f"{x.module}.weight").float() for x in layers]
            for done, w in zip(solve.solve(plan, layers, weights, stats[layers[0].module]), weights, strict=True):
                q = done.decoded_NK if scheme.activations is not None else None
                found[done.layer.module] = _Rounded(scheme, done.decoded_NK - w, q, _static(done.inputs))
    return found


def _static(inputs: QParams | None) -> torch.Tensor | None:
    """The calibrated scale of an input, as `fake_quantize` takes it."""
    if inputs is None:
        return None
    return inputs.scale_NG if inputs.global_scale is None else inputs.global_scale


def _losses(
    run: _Pass, block: blocks.Block, subject: Subject, stats: Mapping[str, Stats], samples: Mapping[str, Stats]
) -> tuple[Measured, dict[str, _Rounded]]:
    """The loss of each candidate, and the error to add to each linear."""
    whole = sum(
        _energy(
            samples[x.module], functools.partial(linear, weight=run.plan.skeleton.get(f"{x.module}.weight").float())
        )
        for x in subject.layers
    )
    if not whole > 0:
        names = ", ".join(x.name for x in subject.layers[:4])
        raise InputError(f"{names}: the outputs are zero on all calibration tokens; give these layers a rule")

    def tried(plan: Plan, scheme: Scheme) -> tuple[dict[str, _Rounded], float, float]:
        rounded = _round(run, plan, block, subject, scheme, stats)
        in_weight = sum(_energy(samples[name], r.of_weight) for name, r in rounded.items())
        in_input = sum(_energy(samples[name], r.of_input) for name, r in rounded.items() if r.weight_NK is not None)
        return rounded, in_weight / whole, in_input / whole

    scheme = subject.schemes[subject.probe]
    assert scheme is not None
    probe, in_weight, in_input = tried(run.exact, scheme)
    avoided = 1.0  # the share of its error to nearest that is left
    if run.wide is not None and (to_nearest := tried(run.cheap, scheme)[1]) > 0:
        avoided = in_weight / to_nearest
    losses = [0.0] * len(subject.schemes)
    losses[subject.probe] = in_weight + in_input
    for c, other in enumerate(subject.schemes):
        if other is not None and c != subject.probe:
            _, of_weight, of_input = tried(run.cheap, other)
            losses[c] = avoided * of_weight + of_input
    if not in_weight + in_input > 0:  # the probe holds these weights exactly
        return Measured(losses, 0.0), {}
    scale = (NOISE / (in_weight + in_input)) ** 0.5
    return Measured(losses, NOISE), {name: rounded.scaled(scale) for name, rounded in probe.items()}


def _energy(sample: Stats, of: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Sum over all tokens of |of(x)|², from a sample of them; 0 for an expert that no token reached."""
    if sample.sample_MK is None or not sample.tokens:
        return 0.0
    parts = sample.sample_MK.split(CHUNK)
    total = sum(float(of(x.float()).square().sum(dtype=torch.float64)) for x in parts)
    return total * sample.tokens / len(sample.sample_MK)


@contextmanager
def _disturbed(model: nn.Module, errors: Mapping[str, _Rounded], scale: float) -> Iterator[None]:
    """Each of the named linears adds `scale` times its error to its output."""
    with ExitStack() as stack:
        for name, rounded in errors.items():

            def hook(_: nn.Module, args: tuple[Any, ...], out: torch.Tensor, by: _Rounded = rounded) -> torch.Tensor:
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
                    totals[i] += float((dense.exp() * (dense - other)).sum(dtype=torch.float64))
    return {i: max(0.0, total / max(1, tokens)) for i, total in totals.items()}
