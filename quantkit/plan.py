"""What a recipe will do to a model, decided from headers alone: no weight is read.

The plan is also the first half of the work: the pipeline follows it to the byte. Everything that can be refused is
refused here, before anything is computed or written.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel
from transformers import AutoTokenizer

from quantkit import blocks, formats, hub, kv_cache, links, lint, skeleton
from quantkit.checkpoint import NAMES, nbytes
from quantkit.errors import InputError
from quantkit.experts import inside
from quantkit.formats import compressed_tensors
from quantkit.linears import Linear, decide, whole
from quantkit.lint.described import Described, Layer
from quantkit.recipe import Recipe
from quantkit.transforms import rotation
from quantkit.types import Format, Scheme, TensorScheme, TensorSpec


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first weight is read.

    linears  by name in memory
    specs    every tensor of the output, in the order of writing
    caches   attention layers whose KV cache is quantized, one a block; empty when it is not
    links    pairs of modules between which a transform of the recipe may move a scale; empty without such a transform
    rotation what a rotation of the hidden states makes of each parameter; None without one
    """

    recipe: Recipe
    source: hub.Source
    skeleton: skeleton.Skeleton
    structure: blocks.Structure
    linears: dict[str, Linear]
    specs: dict[str, TensorSpec]
    warnings: tuple[str, ...]
    caches: tuple[kv_cache.Attention, ...] = ()
    links: tuple[links.Link, ...] = ()
    rotation: rotation.Rotation | None = None

    @property
    def quantized(self) -> list[Linear]:
        return [x for x in self.linears.values() if x.scheme is not None]

    @property
    def dense(self) -> list[Linear]:
        return [x for x in self.linears.values() if x.scheme is None]

    @property
    def output_bytes(self) -> int:
        """Exact size of the output's tensors."""
        return sum(nbytes(spec) for spec in self.specs.values())

    @property
    def needs_data(self) -> bool:
        """Whether calibration tokens run through the model."""
        # A transform is checked on tokens, whatever statistics it reads.
        unasked = self.caches or self.recipe.transforms or self.carries_dense
        return bool(unasked) or any(self.needs(x) for x in self.linears.values())

    @property
    def carries_dense(self) -> bool:
        """Whether the dense model runs beside the quantized one."""
        needs = self.recipe.method.module.needs(self.recipe.method_options)
        return "drift" in needs or hasattr(self.recipe.method.module, "quantize_block")

    def needs(self, layer: Linear) -> frozenset[str]:
        """The statistics of a layer's input that are asked for: by the method, a transform, the scheme of the input."""
        found: frozenset[str] = frozenset()
        if layer.scheme is not None:
            found |= self.recipe.method.module.needs(self.options(layer))
            if layer.scheme.calibrates_input and layer.scheme.activations is not None:
                counted = not layer.scheme.activations.dynamic and self.recipe.calibration.input_scale != "absmax"
                found |= {"absmax", "magnitudes"} if counted else {"absmax"}
        if layer.module in self.folded_into:
            found = found.union(*(t.module.needs(t.options) for t in self.recipe.transforms))
        return found

    def options(self, layer: Linear) -> BaseModel:
        """The method's options for a layer: experts are not moved towards the dense model, which has other routes."""
        options = self.recipe.method_options
        if getattr(options, "pre_shift", 0) and layer.module in self.routed:
            return options.model_copy(update={"pre_shift": 0.0})
        return options

    @functools.cached_property
    def routed(self) -> frozenset[str]:
        """Linears of experts, by name in memory: they see the tokens that a router gives them."""
        mixtures = tuple(f"{name}." for name, _ in inside(self.skeleton.model, ""))
        return frozenset(name for name in self.linears if name.startswith(mixtures))

    @functools.cached_property
    def folded_into(self) -> frozenset[str]:
        """Linears, by name in memory, whose input a transform may rescale."""
        return frozenset(name for link in self.links for name in link.consumers)

    @property
    def rewrites(self) -> bool:
        """Whether tensors that stay dense are written otherwise than they were read."""
        return bool(self.recipe.transforms)

    @property
    def kv_scheme(self) -> TensorScheme | None:
        """The scheme of the KV cache; None when it stays in the model's dtype."""
        return _kv_scheme(self.recipe)

    @property
    def format(self) -> Format:
        """The module of the checkpoint format."""
        return formats.get(self.recipe.export.format)

    @functools.cached_property
    def reading(self) -> list[list[str]]:
        """Tensors of the source in the order in which they are read: those in no block, each block's, those unknown."""
        ghost = self.skeleton
        parts = [outside(ghost, self.structure), *(ghost.parameters(b.name + ".") for b in self.structure.blocks)]
        read = [[ghost.pieces[n].disk if n in ghost.pieces else ghost.source(n) for n in part] for part in parts]
        return [*(list(dict.fromkeys(part)) for part in read), ghost.unknown]

    @property
    def untied(self) -> bool:
        """Whether lm_head no longer shares the embeddings' weight."""
        return self.rotation is not None and self.rotation.untied is not None

    def config(self) -> dict[str, Any]:
        """The quantization_config of the output."""
        schemes = {x.name: x.scheme for x in self.linears.values()}
        schemes |= dict.fromkeys(self.skeleton.further)
        if self.kv_scheme is None:
            return self.format.config(schemes)
        return formats.with_kv_cache(self.format).config(schemes, self.kv_scheme)

    def files(self) -> dict[str, Any]:
        """Further files that the checkpoint format asks for: name -> JSON content."""
        return self.format.files({x.name: x.scheme for x in self.linears.values()})

    def tensors(self, layer: Linear) -> dict[str, TensorSpec]:
        """Every tensor that a quantized layer has on disk, bias apart: name after the layer's own -> dtype, shape."""
        assert layer.scheme is not None
        return self.format.tensors(layer.shape, layer.scheme, formats.scale_dtype(self.format, layer.dtype))


@dataclass(frozen=True)
class Found:
    """A model, understood: what is the same for every recipe that names it."""

    source: hub.Source
    skeleton: skeleton.Skeleton
    structure: blocks.Structure


def look(recipe: Recipe, source: hub.Source | None = None) -> Found:
    """Finds the model of a recipe. Raises InputError when there is none, or it cannot be taken block by block.

    source  where the model was found already
    """
    source = source or hub.resolve(recipe.model)
    ghost = skeleton.build(source.folder, source.checkpoint(), trust_remote_code=recipe.trust_remote_code)
    return Found(source, ghost, blocks.find(ghost))


def make(recipe: Recipe, found: Found | None = None, source: hub.Source | None = None) -> Plan:
    """Finds the model and decides what happens to each of its tensors. Raises InputError for what cannot be done.

    found   the model, where it was looked at already
    source  or where it was found
    """
    found = found or look(recipe, source)
    source, ghost, structure = found.source, found.skeleton, found.structure
    caches: tuple[kv_cache.Attention, ...] = ()
    if recipe.kv_cache is not None:
        formats.with_kv_cache(formats.get(recipe.export.format))  # refuses the others
        caches = kv_cache.find(ghost, structure)
    linears, warnings = decide(recipe, ghost, structure)
    if not any(x.scheme for x in linears.values()):
        raise InputError("no layer would be quantized: every linear is left dense by a rule or by scheme: none")
    if ghost.unknown:
        names = ", ".join(ghost.unknown[:3]) + (", ..." if len(ghost.unknown) > 3 else "")
        warnings.append(
            f"{len(ghost.unknown)} tensors have no place in transformers' model and are copied as they are: {names}"
        )
    pairs, turned = _transforms(recipe, ghost, structure, warnings)
    specs = _specs(recipe, ghost, structure, linears, _kv_specs(recipe, ghost, caches))
    plan = Plan(
        recipe, source, ghost, structure, linears, specs, (*structure.warnings, *warnings), caches, pairs, turned
    )
    plan.config()  # refuses here what a format cannot say of all layers together, such as mixed schemes
    return replace(plan, warnings=(*plan.warnings, *_engine_warnings(plan)))


def _transforms(
    recipe: Recipe, ghost: skeleton.Skeleton, structure: blocks.Structure, warnings: list[str]
) -> tuple[tuple[links.Link, ...], rotation.Rotation | None]:
    """Where the recipe's transforms can fold scales, and the rotation, which `ghost` will apply as it reads."""
    if not recipe.transforms:
        return (), None
    pairs, more = links.find(ghost.model, structure)
    warnings += more
    turned: rotation.Rotation | None = None
    for t in recipe.transforms:
        if t.name == "rotation":
            assert isinstance(t.options, rotation.Options)
            turned = rotation.plan(ghost.model, structure, pairs, t.options)
            warnings += turned.warnings
            ghost.rewrite = turned.rewrite
            if turned.untied is not None:
                ghost.untie(*turned.untied)
        elif not pairs:
            raise InputError(f"{t.name}: this architecture has no place where a scale can be folded; leave it out")
    scaling = any(t.name != "rotation" for t in recipe.transforms)
    return pairs if scaling else (), turned


def described(plan: Plan) -> Described:
    """What will be written, as the engines' rules see it."""
    source = plan.skeleton.model.config
    layers = {}
    for x in plan.linears.values():
        own, layout = {}, ""
        if x.scheme is not None:
            own, layout = plan.tensors(x), plan.recipe.export.format
            layout = compressed_tensors.layout(x.scheme).name if layout == "compressed-tensors" else layout
        layers[x.name] = Layer(x.name, x.shape, x.scheme is not None, x.scheme, layout, own)
    return Described(
        hub.read_json(plan.source.folder / "config.json"),
        plan.config(),
        plan.recipe.export.format,
        layers,
        plan.specs,
        tied=bool(getattr(source.get_text_config(), "tie_word_embeddings", False)) and not plan.untied,
        files=frozenset(path.name for path in plan.source.files() if len(path.parts) == 1),
        says_packed=lambda name: layers[name].packed,
        modules=frozenset(name for name, _ in plan.skeleton.model.named_modules()),
    )


def _engine_warnings(plan: Plan) -> list[str]:
    """What the engines of the recipe will have to say. Raises InputError when one would not load the output."""
    found = lint.check(described(plan), plan.recipe.export.engines)
    errors = [str(f) for f in found if f.level == lint.ERROR]
    if errors:
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise InputError(
            f"the engines of export.engines would not load this output, or compute something else: "
            f"{'; '.join(errors[:3])}{more}; or leave the engine out of export.engines"
        )
    return [str(f) for f in found]


def tokenizer(source: hub.Source, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder. Raises InputError when there is none that works."""
    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, ImportError) as e:
        line = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise InputError(f"{source.folder}: its tokenizer cannot be loaded ({line})") from None


def _specs(
    recipe: Recipe,
    ghost: skeleton.Skeleton,
    structure: blocks.Structure,
    linears: dict[str, Linear],
    caches: dict[str, dict[str, TensorSpec]],
) -> dict[str, TensorSpec]:
    """Every tensor of the output: those outside the blocks first, then block by block.

    caches  scales of the KV cache, by block
    """
    pack = formats.get(recipe.export.format)
    specs: dict[str, TensorSpec] = {}

    def add(memory: str) -> None:
        layer = linears.get(memory.removesuffix(".weight")) if memory.endswith(".weight") else None
        if layer is not None and layer.scheme is not None:
            dtype = formats.scale_dtype(pack, layer.dtype)
            for suffix, spec in pack.tensors(layer.shape, layer.scheme, dtype).items():
                specs[f"{layer.name}.{suffix}"] = spec
        elif (together := whole(ghost, linears, memory)) is not None:
            specs[together] = ghost.checkpoint.specs[together]
        else:
            specs[ghost.to_disk[memory]] = skeleton.spec_of(ghost, memory)

    for memory in outside(ghost, structure):
        add(memory)
    for block in structure.blocks:
        for memory in ghost.parameters(block.name + "."):
            add(memory)
        specs |= caches.get(block.name, {})
    for name in ghost.unknown:
        specs[name] = ghost.checkpoint.specs[name]
    return specs


def _kv_scheme(recipe: Recipe) -> TensorScheme | None:
    return None if recipe.kv_cache is None else recipe.kv_cache.resolve()


def _kv_specs(
    recipe: Recipe, ghost: skeleton.Skeleton, caches: tuple[kv_cache.Attention, ...]
) -> dict[str, dict[str, TensorSpec]]:
    """The scales of the KV cache, by block. Raises InputError when the model has tensors of these names already."""
    scheme = _kv_scheme(recipe)
    if scheme is None:
        return {}
    form = formats.with_kv_cache(formats.get(recipe.export.format))
    found = {}
    for x in caches:
        specs = form.kv_tensors(scheme, x.heads, NAMES[ghost.dtype])
        found[x.block] = {f"{x.name}.{leaf}": spec for leaf, spec in specs.items()}
        if taken := sorted(found[x.block].keys() & ghost.checkpoint.specs.keys()):
            raise InputError(f"{taken[0]}: is in the model already, so its KV cache has scales; set kv_cache: none")
    return found


def outside(ghost: skeleton.Skeleton, structure: blocks.Structure) -> list[str]:
    """Parameters, by name in memory, that are in no block: embeddings, last norm, head."""
    prefixes = tuple(block.name + "." for block in structure.blocks)
    return [name for name in ghost.to_disk if not name.startswith(prefixes)]


def short(scheme: Scheme | None) -> str:
    """A scheme in a few words: "int4, group 128, symmetric"."""
    if scheme is None:
        return "dense"
    w = scheme.weights
    share = f"group {w.group_size}" if w.strategy == "group" else w.strategy
    text = f"{w.number}, {share}, {'symmetric' if w.symmetric else 'asymmetric'}"
    return text if scheme.activations is None else f"{text}; {scheme.activations.number} activations"
