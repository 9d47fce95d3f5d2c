"""How a recipe writes a scheme: a preset's name, a preset with another group size, or a number format spelt out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema

from quantkit import presets
from quantkit.presets import PRESETS, UNQUANTIZED, GroupSize
from quantkit.recipe.errors import hint, problem, shown
from quantkit.recipe.overrides import NONE
from quantkit.types import Scheme, TensorScheme

AUTO_FORM = "{auto: {bits: 4.25, candidates: [W3A16, W4A16, W8A16]}}"
FP8_CACHE = "fp8"  # short for KvCacheSpec's defaults


class Part(BaseModel):
    """What every section of a recipe has in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _fixed_group(number: Any) -> int | None:
    """Columns that share a scale in a number format that leaves no choice."""
    if not isinstance(number, str):
        return None
    return 16 if number == "nvfp4" else 32 if number.startswith("mx") else None


class NumberSpec(Part):
    """What the number format of a weight and that of an input have in common."""

    number: str = Field(description="Number format: int2 to int8, fp8_e4m3, mxfp4, mxfp6_e2m3, mxfp8_e4m3, nvfp4.")
    group_size: int | None = Field(default=None, ge=1, description="Columns that share a scale, with strategy group.")
    symmetric: bool = Field(default=True, description="false: each scale has a zero point.")

    @field_validator("number")
    @classmethod
    def _known_number(cls, value: str) -> str:
        from quantkit import numerics  # imports torch, which presets do not need

        if value not in numerics.registry():
            raise problem(
                "unknown number format {value}; {hint}", value=value, hint=hint(value, [*numerics.registry()])
            )
        return value

    def _check_groups(self, strategy: str) -> None:
        fixed = _fixed_group(self.number)
        if fixed is not None and (strategy, self.group_size) != ("group", fixed):
            raise problem("{number} has a scale for {size} columns, no more, no less", number=self.number, size=fixed)
        if (strategy == "group") != (self.group_size is not None):
            raise problem("group_size goes with strategy group, and only with it")
        if not self.symmetric and not self.number.startswith("int"):
            raise problem("{number} has no zero points; leave symmetric out", number=self.number)


def _inferred(given: Mapping[str, Any], otherwise: str) -> dict[str, Any]:
    """What was given, with the group size that the number format fixes; strategy: groups if any, else `otherwise`."""
    value = dict(given)
    if value.get("group_size") is None and (size := _fixed_group(value.get("number"))) is not None:
        value["group_size"] = size
    value.setdefault("strategy", otherwise if value.get("group_size") is None else "group")
    return value


class WeightSpec(NumberSpec):
    """A weight's number format spelt out, where no preset has it."""

    strategy: Literal["tensor", "channel", "group", "block"] = Field(
        description="What shares one scale: the tensor, a row, group_size columns of a row, or a tile of block_shape."
    )
    block_shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(
        default=None, strict=False, description="Rows and columns of a tile that share a scale, with strategy block."
    )

    @model_validator(mode="before")
    @classmethod
    def _infer(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return _inferred(value, "channel" if value.get("block_shape") is None else "block")

    @model_validator(mode="after")
    def _fits(self) -> WeightSpec:
        self._check_groups(self.strategy)
        if (self.strategy == "block") != (self.block_shape is not None):
            raise problem("block_shape goes with strategy block, and only with it")
        return self

    def resolve(self) -> TensorScheme:
        """The scheme that this stands for."""
        return TensorScheme(self.number, self.strategy, self.group_size, self.symmetric, block_shape=self.block_shape)


class ActivationSpec(NumberSpec):
    """The number format of a layer's input spelt out."""

    strategy: Literal["tensor", "token", "group"] = Field(
        description="What shares one scale: the tensor, a token, or group_size columns of a token."
    )
    dynamic: bool = Field(description="true: the engine finds the scales as it runs; false: they are calibrated.")

    @model_validator(mode="before")
    @classmethod
    def _infer(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        value = _inferred(value, "tensor" if value.get("dynamic") is False else "token")
        return {"dynamic": value["strategy"] != "tensor", **value}

    @model_validator(mode="after")
    def _fits(self) -> ActivationSpec:
        self._check_groups(self.strategy)
        if not self.dynamic and self.strategy != "tensor":
            raise problem("only a scale of the whole tensor can be calibrated; use strategy tensor, or dynamic: true")
        return self

    def resolve(self) -> TensorScheme:
        """The scheme that this stands for."""
        return TensorScheme(self.number, self.strategy, self.group_size, self.symmetric, self.dynamic)


class KvCacheSpec(Part):
    """`fp8`, or `{number: fp8_e4m3, strategy: head}`: keys and values as engines keep them, scales calibrated."""

    number: Literal["fp8_e4m3"] = Field(default="fp8_e4m3", description="Number format of keys and values.")
    strategy: Literal["tensor", "head"] = Field(
        default="tensor", description="What shares one scale: all keys (values) of a layer, or those of a head."
    )

    @model_validator(mode="before")
    @classmethod
    def _spread(cls, value: Any) -> Any:
        if value == FP8_CACHE:
            return {}
        if not isinstance(value, Mapping | KvCacheSpec):
            raise problem("expected fp8, a mapping of number and strategy, or none; got {got}", got=shown(value))
        return value

    def resolve(self) -> TensorScheme:
        """The scheme that this stands for."""
        return TensorScheme(self.number, self.strategy)


class SchemeSpec(Part):
    """`W4A16`, `none`, `{preset: W4A16, group_size: 64}`, `{weights: {number: int8}, activations: {number: int8}}`."""

    preset: str | None = Field(
        default=None,
        description="A scheme by name; none leaves layers dense.",
        json_schema_extra={"enum": [*PRESETS, NONE]},
    )
    group_size: GroupSize | None = Field(default=None, description="Instead of the preset's; channel: a scale a row.")
    weights: WeightSpec | None = Field(default=None, description="In place of a preset.")
    activations: ActivationSpec | None = Field(
        default=None, description="Number format of the inputs, beside weights; left out, they stay as they are."
    )

    @model_validator(mode="before")
    @classmethod
    def _spread(cls, value: Any) -> Any:
        if value == "auto" or (isinstance(value, Mapping) and "auto" in value):
            if "auto" not in cls.model_fields:
                raise problem("auto is for the recipe's own scheme alone; name one scheme here")
            if value == "auto":
                raise problem("auto needs a budget and candidates: {form}", form=AUTO_FORM)
        if isinstance(value, str):
            value = {"preset": value}
        if not isinstance(value, Mapping | SchemeSpec):
            message = "expected a preset name, a mapping, or none to leave layers dense; got {got}"
            raise problem(message, got=shown(value))
        if isinstance(value, Mapping) and value.get("preset") == UNQUANTIZED:
            value = {**value, "preset": NONE}
        if isinstance(value, Mapping) and value.get("group_size") is None:
            preset = value.get("preset")
            if isinstance(preset, str) and preset in PRESETS:
                return {**value, "group_size": presets.group_size(PRESETS[preset])}
        return value

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, value: str | None) -> str | None:
        if value is not None and value not in PRESETS and value != NONE:
            raise problem("unknown preset {value}; {hint}", value=value, hint=hint(value, [*PRESETS, NONE]))
        return value

    @model_validator(mode="after")
    def _one_form(self) -> SchemeSpec:
        self._check_form()
        return self

    def _check_form(self) -> None:
        if (self.preset is None) == (self.weights is None):
            raise problem("give either preset or weights")
        if self.activations is not None and self.weights is None:
            raise problem("activations go with weights; a preset says itself what becomes of them")
        if self.group_size is not None:
            if self.weights is not None:
                raise problem("put group_size inside weights")
            scheme = None if self.preset == NONE else PRESETS[self.preset or ""]
            if scheme is None or presets.group_size(scheme) is None:
                why = "no groups" if scheme is None or scheme.weights.strategy != "group" else "no other groups"
                raise problem("{preset} has {why}; leave group_size out", preset=self.preset, why=why)

    @model_serializer
    def _shortest(self) -> Any:
        return self._written()

    def _written(self) -> Any:
        if self.preset == NONE:
            return NONE
        if self.weights is not None:
            parts = {"weights": self.weights, "activations": self.activations}
            return {k: v.model_dump(mode="json", exclude_none=True) for k, v in parts.items() if v is not None}
        return {k: v for k, v in (("preset", self.preset), ("group_size", self.group_size)) if v is not None}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        spelt_out = handler.resolve_ref_schema(handler(core))
        return {"anyOf": [{"type": "string", "enum": [*PRESETS, NONE]}, spelt_out]}

    def resolve(self) -> Scheme | None:
        """The scheme that this stands for; None for `none`."""
        if self.weights is not None:
            return Scheme(self.weights.resolve(), None if self.activations is None else self.activations.resolve())
        if self.preset is None or self.preset == NONE:
            return None
        scheme = PRESETS[self.preset]
        return scheme if self.group_size is None else presets.with_group_size(scheme, self.group_size)

    def schemes(self) -> list[Scheme]:
        """The schemes that a layer may get by this: one, or for `none` no scheme at all."""
        scheme = self.resolve()
        return [] if scheme is None else [scheme]

    @property
    def name(self) -> str:
        """The label, but "none" for none: what a report calls a candidate."""
        return NONE if self.resolve() is None else self.label

    @property
    def label(self) -> str:
        """A name for folders: "W4A16", "W4A16-g64" when the group size is not the preset's own, "int4-g64-asym"."""
        if self.weights is not None:
            a = self.activations
            names = [_short(self.weights)] if a is None else [_short(self.weights), _short(a)]
            return "-".join([*names, *(["static"] if a is not None and not a.dynamic else [])])
        if self.preset is None or self.preset == NONE:
            return "mixed"  # the rules decide
        if self.group_size == presets.group_size(PRESETS[self.preset]):
            return self.preset
        return f"{self.preset}-channel" if self.group_size == "channel" else f"{self.preset}-g{self.group_size}"


class AutoScheme(Part):
    """`{bits: 4.25, candidates: [W3A16, W4A16, W8A16]}`: each layer gets the candidate that the whole model needs most.

    What is measured, and how the choice is made, is in quantkit/allocation.py. Layers that a rule matches, and layers
    in no block, take no part and do not count in `bits`.
    """

    bits: float = Field(
        gt=0, le=32, description="Budget: bits a weight on disk, scales included, over the layers that take part."
    )
    candidates: tuple[SchemeSpec, ...] = Field(
        strict=False,
        description="Schemes to choose from; none leaves a layer dense.",
        json_schema_extra={"minItems": 2},
    )
    rows: int = Field(default=8, ge=1, le=10**4, description="Rows of calibration text to measure on.")
    length: int = Field(default=256, ge=2, le=2**20, description="Tokens a row to measure on.")

    @field_validator("candidates")
    @classmethod
    def _distinct(cls, value: tuple[SchemeSpec, ...]) -> tuple[SchemeSpec, ...]:
        schemes = [spec.resolve() for spec in value]
        if len(schemes) < 2:
            raise problem("there is nothing to choose from; give two candidates or more, or one scheme without auto")
        twice = [spec for spec, scheme in zip(value, schemes, strict=True) if schemes.count(scheme) > 1]
        if twice:
            raise problem("{name} is among the candidates twice", name=twice[0].name)
        return value


class RecipeScheme(SchemeSpec):
    """What a recipe's `scheme` may be: one scheme, or `{auto: ...}`, the best mix of several within a budget."""

    auto: AutoScheme | None = Field(
        default=None, description="In place of a preset: each layer gets one of several candidates, within a budget."
    )

    def _check_form(self) -> None:
        if self.auto is None:
            super()._check_form()
        elif (self.preset, self.group_size, self.weights, self.activations) != (None, None, None, None):
            raise problem("auto stands alone; what layers may become are its candidates")

    def _written(self) -> Any:
        return super()._written() if self.auto is None else {"auto": self.auto.model_dump(mode="json")}

    def resolve(self) -> Scheme | None:
        """The scheme that this stands for; None for `none`. With `auto` there is none yet: `quantkit.allocation`."""
        if self.auto is not None:
            raise ValueError("scheme auto stands for no scheme before quantkit.allocation has chosen")
        return super().resolve()

    def schemes(self) -> list[Scheme]:
        """The schemes that a layer may get by this."""
        if self.auto is None:
            return super().schemes()
        return [scheme for spec in self.auto.candidates for scheme in spec.schemes()]

    @property
    def label(self) -> str:
        """A name for folders, as of one scheme; "auto4.25" for a budget of 4.25 bits."""
        return super().label if self.auto is None else f"auto{self.auto.bits:g}"


def _short(part: WeightSpec | ActivationSpec) -> str:
    """ "int4-g64-asym"; the group size of a format that leaves no choice is not said."""
    share = f"g{part.group_size}" if part.strategy == "group" else part.strategy
    words = [part.number] if _fixed_group(part.number) else [part.number, share]
    return "-".join([*words, *([] if part.symmetric else ["asym"])])
