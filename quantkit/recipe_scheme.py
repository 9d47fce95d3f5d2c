"""How a recipe writes a scheme: a preset's name, a preset with another group size, or a number format spelt out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

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
from quantkit.presets import PRESETS, GroupSize
from quantkit.recipe_errors import hint, problem, shown
from quantkit.recipe_overrides import NONE
from quantkit.types import Scheme, TensorScheme


class Part(BaseModel):
    """What every section of a recipe has in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class WeightSpec(Part):
    """A weight's number format spelt out, where no preset has it."""

    number: str = Field(description="Number format: int2 to int8.")
    strategy: Literal["tensor", "channel", "group"] = Field(
        description="What shares one scale: the tensor, a row, or group_size columns of a row."
    )
    group_size: int | None = Field(default=None, ge=1, description="Columns that share a scale, with strategy group.")
    symmetric: bool = Field(default=True, description="false: each scale has a zero point.")

    @model_validator(mode="before")
    @classmethod
    def _infer_strategy(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "strategy" not in value:
            return {**value, "strategy": "channel" if value.get("group_size") is None else "group"}
        return value

    @field_validator("number")
    @classmethod
    def _known_number(cls, value: str) -> str:
        from quantkit import numerics  # imports torch, which presets do not need

        if value not in numerics.registry():
            raise problem(
                "unknown number format {value}; {hint}", value=value, hint=hint(value, [*numerics.registry()])
            )
        return value

    @model_validator(mode="after")
    def _group_size_fits(self) -> WeightSpec:
        if (self.strategy == "group") != (self.group_size is not None):
            raise problem("group_size goes with strategy group, and only with it")
        return self


class SchemeSpec(Part):
    """`W4A16`, `none`, `{preset: W4A16, group_size: 64}` or `{weights: {number: int4, group_size: 64}}`."""

    preset: str | None = Field(
        default=None,
        description="A scheme by name; none leaves layers dense.",
        json_schema_extra={"enum": [*PRESETS, NONE]},
    )
    group_size: GroupSize | None = Field(default=None, description="Instead of the preset's; channel: a scale a row.")
    weights: WeightSpec | None = Field(default=None, description="In place of a preset.")

    @model_validator(mode="before")
    @classmethod
    def _spread(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"preset": value}
        if not isinstance(value, Mapping | SchemeSpec):
            message = "expected a preset name, a mapping, or none to leave layers dense; got {got}"
            raise problem(message, got=shown(value))
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
        if (self.preset is None) == (self.weights is None):
            raise problem("give either preset or weights")
        if self.group_size is not None:
            if self.weights is not None:
                raise problem("put group_size inside weights")
            if self.preset == NONE or presets.group_size(PRESETS[self.preset or ""]) is None:
                raise problem("{preset} has no groups; leave group_size out", preset=self.preset)
        return self

    @model_serializer
    def _shortest(self) -> Any:
        if self.preset == NONE:
            return NONE
        if self.weights is not None:
            return {"weights": self.weights.model_dump(exclude_none=True)}
        return {k: v for k, v in (("preset", self.preset), ("group_size", self.group_size)) if v is not None}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        spelt_out = handler.resolve_ref_schema(handler(core))
        return {"anyOf": [{"type": "string", "enum": [*PRESETS, NONE]}, spelt_out]}

    def resolve(self) -> Scheme | None:
        """The scheme that this stands for; None for `none`."""
        if self.weights is not None:
            w = self.weights
            return Scheme(TensorScheme(w.number, w.strategy, w.group_size, w.symmetric))
        if self.preset is None or self.preset == NONE:
            return None
        scheme = PRESETS[self.preset]
        return scheme if self.group_size is None else presets.with_group_size(scheme, self.group_size)

    @property
    def label(self) -> str:
        """A name for folders: "W4A16", "W4A16-g64" when the group size is not the preset's own, "int4-g64-asym"."""
        if self.weights is not None:
            w = self.weights
            share = f"g{w.group_size}" if w.strategy == "group" else w.strategy
            return f"{w.number}-{share}" + ("" if w.symmetric else "-asym")
        if self.preset is None or self.preset == NONE:
            return "mixed"  # the rules decide
        if self.group_size == presets.group_size(PRESETS[self.preset]):
            return self.preset
        return f"{self.preset}-channel" if self.group_size == "channel" else f"{self.preset}-g{self.group_size}"
