"""`quantkit compile`: a decoding step compiled ahead of time by AOTInductor, for one model, batch and GPU architecture.

    DIR/step.pt2    the code, without weights: those are the loaded model's own, in place
    DIR/step.json   what it was made for; `load` refuses a package that was made for something else

A package spares what torch.compile does in a process before its first token (tracing, and compiling or looking up every
kernel). The cache is part of its inputs, so that prompts are read by the model as ever. It calls quantkit's kernels as
torch operators, and therefore runs in a process that has imported quantkit; `quantkit.generate(compile=DIR)` does.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit.errors import InputError, MissingError
from quantkit.loading import load as load_model
from quantkit.runtime.decoding import Decoder, FullCache

CODE, FACTS = "step.pt2", "step.json"
CACHE = "QUANTKIT_CACHE"  # environment: where packages go; ~/.cache/quantkit without it
VERSION = 1
# Where g++ finds no libstdc++.so beside itself it links the static one, and a package with a C++ library of its own
# ends the process that loads it (std::regex takes the other's locale). Named first, the shared one has all there is.
OPTIONS = {"aot_inductor.package_constants_in_so": False, "aot_inductor.custom_op_libs": [":libstdc++.so.6"]}


@dataclass(frozen=True)
class Facts:
    """What a package was made for.

    tensors  a hash of the names, dtypes and shapes of all parameters and buffers
    """

    version: int
    torch: str
    machine: str
    model: str
    attention: str
    dtype: str
    tensors: str
    batch: int
    slots: int

    @property
    def folder(self) -> str:
        """A name that tells packages of one model apart."""
        return f"{self.machine}-b{self.batch}-l{self.slots}-{self.tensors[:12]}-torch{self.torch}".replace("/", "_")


@dataclass(frozen=True)
class Made:
    """A package on disk, and how long it took to make (0: it was there) and to load."""

    folder: Path
    facts: Facts
    compile_seconds: float
    load_seconds: float

    @property
    def bytes(self) -> int:
        return (self.folder / CODE).stat().st_size


class Step(nn.Module):
    """One token of each row: logits float32 (B, V). Keys and values are written in place, `length` is only read."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        token: torch.Tensor,
        position: torch.Tensor,
        mask: torch.Tensor,
        length: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> torch.Tensor:
        """token, position (B, 1); mask (B, slots) int64; length (1,); keys, values (B, H, slots, D) of each layer."""
        logits: torch.Tensor = self.model(
            input_ids=token,
            attention_mask=mask,
            position_ids=position,
            past_key_values=FullCache.over(length, keys, values),
            use_cache=True,
            return_dict=True,
        ).logits
        return logits[:, -1].float()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is not an input, by the name that the exported program has for it."""
        parameters = dict(self.named_parameters(remove_duplicate=False))
        return {**parameters, **dict(self.named_buffers(remove_duplicate=False))}


@torch.no_grad()
def _settle(model: Any) -> None:
    """One token, so that what layers do at their first product is done: on a CPU codes take another order."""
    model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.get_input_embeddings().weight.device))


def facts_of(model: Any, batch: int, slots: int) -> Facts:
    """What a package for this model as it is must have been made for."""
    device = model.get_input_embeddings().weight.device
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        machine = f"sm_{major}{minor}"
    else:
        machine = f"cpu-{platform.machine()}-{torch.backends.cpu.get_cpu_capability().replace(' ', '')}"
    described = [(name, str(t.dtype), tuple(t.shape)) for name, t in sorted(Step(model).tensors().items())]
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps([described, config], default=str, sort_keys=True).encode())
    attention = str(model.config._attn_implementation)
    name, dtype = type(model).__name__, str(model.dtype)
    return Facts(VERSION, torch.__version__, machine, name, attention, dtype, digest.hexdigest(), batch, slots)


def default_folder(facts: Facts) -> Path:
    """Where a package goes when nobody says."""
    root = os.environ.get(CACHE) or Path.home() / ".cache" / "quantkit"
    return Path(root) / "compiled" / facts.folder


def compile_folder(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    batch: int = 1,
    slots: int = 2048,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
) -> Made:
    """Loads a checkpoint and compiles its step; one that is there and fits is kept. Raises as `compile_step`."""
    model = load_model(folder, dtype="auto", device_map=torch.device(device)).eval()
    return compile_step(model, out, batch=batch, slots=slots, overwrite=overwrite)


@torch.no_grad()
def compile_step(
    model: Any, out: str | Path | None = None, *, batch: int = 1, slots: int = 2048, overwrite: bool = False
) -> Made:
    """Compiles the step of a model in memory into a folder, and loads it once to see that it can be.

    Raises InputError for a folder that holds something else or a model that cannot be exported, MissingError where no
    compiler is found.
    """
    _settle(model)
    facts = facts_of(model, batch, slots)
    folder = Path(out) if out is not None else default_folder(facts)
    there = _facts_in(folder)
    if there is None and folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: holds something else; choose another --out")
    seconds = 0.0
    if there != facts or overwrite:
        if there is not None and not overwrite:
            raise InputError(f"{folder}: {_difference(there, facts)}; --overwrite replaces it")
        start = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FACTS).unlink(missing_ok=True)
        _compile(model, batch, slots, folder / CODE)
        (folder / FACTS).write_text(json.dumps(asdict(facts), indent=1) + "\n", "utf-8")
        seconds = time.perf_counter() - start
    start = time.perf_counter()
    load(model, folder)
    return Made(folder, facts, seconds, time.perf_counter() - start)


def _compile(model: Any, batch: int, slots: int, file: Path) -> None:
    device = model.get_input_embeddings().weight.device
    if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
        raise MissingError("a C++ compiler is needed to package a compiled step: install g++, or set CXX")
    token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    cache = FullCache(model.config, slots, device)
    model(input_ids=token, past_key_values=cache, use_cache=True)  # keys and values take their shapes
    cache.advance(1)
    mask = torch.ones(batch, slots, dtype=torch.int64, device=device)
    keys, values = [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
    try:
        program = torch.export.export(
            Step(model), (token, token.clone(), mask, cache.fill.length, keys, values), strict=False
        )
    except Exception as e:
        raise InputError(f"{type(model).__name__} cannot be exported: {_first_line(e)}") from e
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=OPTIONS)
    except Exception as e:
        raise MissingError(f"the step could not be compiled: {type(e).__name__}: {_first_line(e)}") from e


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _facts_in(folder: Path) -> Facts | None:
    """None where there is no package, or one that cannot be read."""
    try:
        return Facts(**json.loads((folder / FACTS).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _difference(there: Facts, wanted: Facts) -> str:
    names = {
        "version": "the version of packages",
        "torch": "torch",
        "machine": "the machine",
        "model": "the model's class",
        "attention": "the attention",
        "dtype": "the dtype",
        "tensors": "the model's config, or its tensors",
        "batch": "the batch",
        "slots": "the length",
    }
    for name, words in names.items():
        old, new = getattr(there, name), getattr(wanted, name)
        if old != new:
            return f"the package was made for another state of {words}: {str(old)[:40]}, here it is {str(new)[:40]}"
    return "the package fits"


@dataclass(frozen=True)
class Package:
    """A loaded package, with the model's tensors in it."""

    folder: Path
    run: Callable[..., torch.Tensor]
    batch: int
    slots: int

    def check_fits(self, batch: int, needed: int, cache: Any) -> None:
        """Raises InputError for a call of `generate` that it was not made for."""
        if cache is not None:
            raise InputError(f"compile={self.folder}: the package has a cache of its own; leave out past_key_values")
        if batch != self.batch:
            raise InputError(f"compile={self.folder}: the package is for a batch of {self.batch}, this is {batch}")
        if needed > self.slots:
            raise InputError(
                f"compile={self.folder}: the package is for {self.slots} tokens; {needed} are needed (three to spare)"
            )

    def bind(self, decoder: Decoder) -> Callable[[], torch.Tensor]:
        """The forward of a decoder's step."""
        cache = decoder.cache

        def forward() -> torch.Tensor:
            keys, values = [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
            return self.run(decoder.token, decoder.position, decoder.mask, cache.fill.length, keys, values)

        return forward


def load(model: Any, folder: str | Path) -> Package:
    """A package for a model in memory, whose tensors it uses in place. Raises InputError where it does not fit."""
    path = Path(folder)
    there = _facts_in(path)
    if there is None or not (path / CODE).is_file():
        raise InputError(f"{path}: holds no package; quantkit compile makes one")
    _settle(model)
    wanted = facts_of(model, there.batch, there.slots)
    if there != wanted:
        raise InputError(f"{path}: {_difference(there, wanted)}; quantkit compile makes another")
    try:
        runner = torch._inductor.aoti_load_package(str(path / CODE), run_single_threaded=True)
        tensors = Step(model).tensors()
        known = {name: tensors[name] for name in runner.get_constant_fqns()}
        runner.load_constants(known, check_full_update=True, user_managed=True)
    except (RuntimeError, KeyError) as e:
        raise InputError(
            f"{path}: the package cannot be loaded ({_first_line(e)}); quantkit compile makes another"
        ) from e

    def run(*inputs: Any) -> torch.Tensor:
        found: torch.Tensor = runner(*inputs)
        return found

    return Package(path, run, there.batch, there.slots)


def section(made: Made, size: Callable[[float], str]) -> dict[str, Any]:
    """For report.print_section. size: bytes -> text."""
    f = made.facts
    compiled = f"{made.compile_seconds:.1f} s" if made.compile_seconds else "it was there already"
    facts = [
        ("made for", f"{f.model}, {f.dtype.removeprefix('torch.')}, batch {f.batch}, {f.slots} tokens, on {f.machine}"),
        ("size", f"{size(made.bytes)}, without weights"),
        ("compiled in", compiled),
        ("loaded in", f"{made.load_seconds:.2f} s"),
        ("to use it", f"quantkit.generate(model, input_ids, ..., compile={str(made.folder)!r})"),
    ]
    return {"title": str(made.folder), "facts": facts}
