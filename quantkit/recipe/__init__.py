"""The recipe: everything that decides a run, as one frozen value that YAML goes into and comes out of.

    recipe = Recipe.load("recipe.yaml", ["calibration.samples=64"])
    recipe.assign(["model.layers.0.self_attn.q_proj", "lm_head"])    # -> a scheme each, by rule

Short forms are spread out when read (`scheme: W4A16` becomes `{preset: W4A16, group_size: 128}`), so `to_yaml` writes
every default explicitly and reads back as an equal recipe. Unknown keys are refused. The options of a method are the
pydantic model `Options` of its file in quantkit/algorithms; nothing about them is said here.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from quantkit import patterns, strict_yaml
from quantkit.errors import InputError
from quantkit.recipe import gates as gating
from quantkit.recipe.calibration import Calibration
from quantkit.recipe.effort import Effort, method_of
from quantkit.recipe.errors import explain, hint, problem, shown
from quantkit.recipe.named import Method, Transform
from quantkit.recipe.overrides import override
from quantkit.recipe.push import Push
from quantkit.recipe.push import in_schema as _push_in_schema
from quantkit.recipe.push import spread as _push
from quantkit.recipe.scheme import FP8_CACHE, NONE, KvCacheSpec, Part, RecipeScheme, SchemeSpec
from quantkit.recipe.validation import Validation
from quantkit.strict_yaml import KeyPath
from quantkit.types import Scheme

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?) ?([A-Za-z]+)")


class Rule(Part):
    """A scheme for the layers whose name matches. The first rule that matches a layer decides."""

    match: str = Field(min_length=1, description="A layer's name, a glob (* crosses dots), or re: and a regex.")
    scheme: SchemeSpec

    @field_validator("match")
    @classmethod
    def _valid_regex(cls, value: str) -> str:
        if value.startswith("re:"):
            try:
                patterns.compiled(value[3:])
            except patterns.PatternError as error:
                raise problem("{value} is not a valid regular expression: {why}", value=value, why=str(error)) from None
        return value

    def matches(self, name: str) -> bool:
        """Whether this rule speaks of the layer `name`. A regex must match from its start, as in compressed-tensors."""
        if self.match.startswith("re:"):
            return patterns.matches(self.match[3:], name)
        return self.match == name or fnmatch.fnmatchcase(name, self.match)


def _none_is_off(value: Any) -> Any:
    if value is None:
        raise problem("expected a mapping, or none to leave validation out; got nothing")
    return None if value is False or value == NONE else value


def _no_cache(value: Any) -> Any:
    if value is None:
        raise problem("expected fp8, a mapping of number and strategy, or none; got nothing")
    return None if value == NONE else value


def _cache_in_schema(schema: dict[str, Any]) -> None:
    """The short forms, in place of the null that pydantic sees."""
    schema["anyOf"] = [*(x for x in schema["anyOf"] if x != {"type": "null"}), {"enum": [FP8_CACHE, NONE]}]


def _off_in_schema(schema: dict[str, Any]) -> None:
    """An editor offers what `_none_is_off` takes, not the null that pydantic sees."""
    schema["anyOf"] = [*(part for part in schema["anyOf"] if part != {"type": "null"}), {"enum": [NONE, False]}]


def _engines_in_schema(schema: dict[str, Any]) -> None:
    from quantkit import lint

    schema["items"] = {"type": "string", "enum": lint.names()}


class Export(Part):
    """How the output lies on disk, and who is to read it."""

    format: str = Field(default="compressed-tensors", description="Checkpoint format: a file of quantkit/formats.")
    shard_size: str = Field(default="5GB", description="Largest file of weights, such as 500MB, 5GB or 4GiB.")
    engines: tuple[str, ...] = Field(
        default=("transformers", "vllm"),
        strict=False,
        description="Engines that must load the output: their rules are checked before the work.",
        json_schema_extra=_engines_in_schema,
    )

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        from quantkit import formats

        if value not in formats.names():
            raise problem("unknown format {value}; {hint}", value=value, hint=hint(value, formats.names()))
        return value

    @field_validator("engines")
    @classmethod
    def _known_engines(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        from quantkit import lint

        for name in value:
            if name not in lint.names():
                raise problem("unknown engine {name}; {hint}", name=name, hint=hint(name, lint.names()))
        return tuple(dict.fromkeys(value))

    @field_validator("shard_size")
    @classmethod
    def _valid_size(cls, value: str) -> str:
        if _bytes(value) < 1:
            raise problem("expected a size such as 500MB, 5GB or 4GiB, got {value}", value=repr(value))
        return value

    @property
    def shard_bytes(self) -> int:
        """`shard_size` in bytes; GB is 10^9, GiB is 2^30."""
        return _bytes(self.shard_size)


def _check_text(value: Any, where: str) -> None:
    """Raises InputError for text with half of a surrogate pair, which neither a file nor pydantic takes."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for part in value:
            _check_text(part, where)
    elif isinstance(value, str) and strict_yaml.SURROGATE.search(value):
        raise InputError(f"{where}: {value[:60]!r} holds half of a surrogate pair, which is no character")


def _bytes(size: str) -> int:
    """Bytes of "5GB"; 0 when it is not a size."""
    found = _SIZE.fullmatch(size.strip())
    return int(float(found[1]) * _UNITS.get(found[2].upper(), 0)) if found else 0


class Recipe(Part):
    """A quantkit recipe: which model, which scheme, by which method, checked how, written how."""

    model: str = Field(min_length=1, description="A Hub id, a Hub id@revision, a folder, or builtin:NAME.")
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")
    scheme: RecipeScheme
    rules: tuple[Rule, ...] = Field(default=(), strict=False, description="Exceptions to scheme; first match wins.")
    kv_cache: Annotated[KvCacheSpec | None, BeforeValidator(_no_cache)] = Field(
        default=None,
        description="Keys and values as engines keep them: none leaves them in the model's dtype.",
        json_schema_extra=_cache_in_schema,
    )
    transforms: tuple[Transform, ...] = Field(
        default=(),
        strict=False,
        description="Rewrites of the weights before they are rounded, in this order; they keep the model's function.",
    )
    method: Method = Field(default_factory=lambda: Method.model_validate("gptq"))
    effort: Effort | None = Field(
        default=None,
        exclude=True,
        description="In place of method: fast reads no data, default is gptq, best is gptq with all that lowers its "
        "error at several times the cost. Without either, default.",
    )
    calibration: Calibration = Calibration()
    validation: Annotated[Validation | None, BeforeValidator(_none_is_off)] = Field(
        default=Validation(), alias="validate", json_schema_extra=_off_in_schema
    )
    export: Export = Export()
    push: Annotated[Push | None, BeforeValidator(_push)] = Field(
        default=None,
        exclude=True,
        description="Where quantkit run sends the output when it has passed: a repository, or a mapping of options. It "
        "is not kept in the output.",
        json_schema_extra=_push_in_schema,
    )

    @model_validator(mode="after")
    def _quantizes_something(self) -> Recipe:
        if not any(spec.schemes() for spec in (self.scheme, *(rule.scheme for rule in self.rules))):
            raise problem("nothing would be quantized: scheme and every rule are none")
        return self

    @model_validator(mode="after")
    def _one_method(self) -> Recipe:
        if self.effort is not None and "method" in self.model_fields_set:
            raise problem("give either method or effort: effort {effort} stands for a method", effort=self.effort)
        names = [t.name for t in self.transforms]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise problem("transform {name} is given twice", name=twice[0])
        return self

    @field_serializer("validation")
    def _off_is_none(self, value: Validation | None) -> Any:
        return NONE if value is None else value.model_dump(mode="json")

    @field_serializer("kv_cache")
    def _no_cache_is_none(self, value: KvCacheSpec | None) -> Any:
        return NONE if value is None else value.model_dump(mode="json")

    @property
    def method_name(self) -> str:
        """Name of the algorithm: `quantkit.algorithms.get` finds it."""
        return self.method.name

    @property
    def method_options(self) -> BaseModel:
        """The algorithm's own `Options`."""
        return self.method.options

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = (), *, model: str | Path | None = None) -> Recipe:
        """Reads a recipe file. Raises InputError that lists every problem with its line.

        overrides   "path.to.key=value" each, the value as YAML: "calibration.samples=64", "rules.0.scheme=none"
        model       takes the place of the recipe's `model`
        """
        try:
            text = Path(path).read_bytes().decode("utf-8-sig")
        except FileNotFoundError:
            raise InputError(f"{path}: no such recipe file") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read as a recipe: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not a text file: byte {error.start} is not UTF-8") from None
        except ValueError:  # a NUL in it
            raise InputError(f"{str(path)!r} cannot be the name of a recipe file") from None
        return cls.parse(text, str(path), overrides, model=model)

    @classmethod
    def parse(
        cls, text: str, where: str = "recipe", overrides: Sequence[str] = (), *, model: str | Path | None = None
    ) -> Recipe:
        """Reads a recipe from YAML text; `where` names it in errors. Otherwise as `load`."""
        document = strict_yaml.parse(text, where)
        return cls._build(document.data, where, document.lines, overrides, model)

    @classmethod
    def from_any(
        cls,
        source: str | Path | Mapping[str, Any] | Recipe,
        overrides: Sequence[str] = (),
        *,
        model: str | Path | None = None,
    ) -> Recipe:
        """A recipe from a path, a mapping as YAML would give it, or a recipe. Otherwise as `load`."""
        if isinstance(source, str | Path):
            return cls.load(source, overrides, model=model)
        if isinstance(source, Recipe):
            push = source.push.model_dump() if source.push is not None else NONE
            source = {**source.to_dict(), "push": push}
        return cls._build(source, "recipe", {}, overrides, model)

    @classmethod
    def _build(
        cls, data: Any, where: str, lines: dict[KeyPath, int], overrides: Sequence[str], model: str | Path | None
    ) -> Recipe:
        if data is None:
            raise InputError(f"{where}: the recipe is empty; it needs at least model and scheme")
        if not isinstance(data, Mapping):
            raise InputError(f"{where}: expected a mapping such as `scheme: W4A16`, got {shown(data)}")
        tree = copy.deepcopy(dict(data))
        _check_text(tree, where)
        lines = dict(lines)
        sets: dict[KeyPath, str] = {}
        for item in overrides:
            override(tree, item, lines, sets)
        if model is not None:
            tree["model"], sets[("model",)] = str(model), f"--model {model}"
        try:
            recipe = cls.model_validate(tree)
            return recipe._settled()
        except ValidationError as error:
            raise explain(error, _schema(), where, lines, sets) from None

    def _settled(self) -> Recipe:
        """With what the schemes decide, where the recipe does not say it: the method of an effort, and gates."""
        specs = (self.scheme, *(rule.scheme for rule in self.rules))
        schemes = [scheme for spec in specs for scheme in spec.schemes()]
        changes: dict[str, Any] = {"effort": None}
        if "method" not in self.model_fields_set:
            changes["method"] = method_of(self.effort or "default", schemes, self.export.engines)
        if self.validation is not None and "gates" not in self.validation.model_fields_set:
            changes["validation"] = self.validation.model_copy(update={"gates": gating.default(schemes)})
        return self.model_copy(update=changes)

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain values, without push: every default explicit, keys in this class's order."""
        return self.model_dump(mode="json", by_alias=True)

    def to_yaml(self) -> str:
        """The resolved recipe as YAML; `parse` reads it back as an equal recipe, but for push."""
        return strict_yaml.dump(self.to_dict())

    def assign(self, names: Sequence[str]) -> tuple[dict[str, Scheme | None], list[Rule]]:
        """Decides the scheme of each layer.

        names   module names on disk, such as "model.layers.0.self_attn.q_proj"
        Returns a scheme a name (None: left dense) and the rules that matched no name. A layer called lm_head is left
        dense unless a rule matches it.
        """
        chosen: dict[str, Scheme | None] = {}
        silent = list(self.rules)
        for name in names:
            matching = [rule for rule in self.rules if rule.matches(name)]
            silent = [rule for rule in silent if rule not in matching]
            if matching:
                chosen[name] = matching[0].scheme.resolve()
            else:
                chosen[name] = None if name.rpartition(".")[2] == "lm_head" else self.scheme.resolve()
        return chosen, silent


@functools.cache
def _schema() -> dict[str, Any]:
    """The same to read in, made once: each time takes as long as reading a recipe."""
    return json_schema()


def json_schema() -> dict[str, Any]:
    """JSON schema (2020-12) of a recipe, the options of every method included; for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema(by_alias=True)}
