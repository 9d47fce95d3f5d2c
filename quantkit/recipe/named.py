"""A choice with options of its own in a recipe: `gptq`, or `{gptq: {act_order: static}}`.

What there is to choose from is found by listing a folder: quantkit/algorithms for `method`, quantkit/transforms for
`transforms`. The options are the pydantic model `Options` of the chosen file; nothing about them is said here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

from pydantic import BaseModel, GetJsonSchemaHandler, SerializeAsAny, create_model, model_serializer, model_validator
from pydantic_core import CoreSchema

from quantkit.recipe.errors import problem, shown
from quantkit.recipe.scheme import Part


class Named(Part):
    """One file of a folder by its name, and its options."""

    KIND: ClassVar[str]
    DESCRIPTION: ClassVar[str]

    name: str
    options: SerializeAsAny[BaseModel]

    @classmethod
    def registry(cls) -> ModuleType:
        """The package with `names()` and `get(name)`."""
        raise NotImplementedError

    @property
    def module(self) -> ModuleType:
        """The file that was chosen."""
        found: ModuleType = self.registry().get(self.name)
        return found

    @model_validator(mode="before")
    @classmethod
    def _spread(cls, value: Any) -> Any:
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = {value: {}}
        if not isinstance(value, Mapping) or len(value) != 1:
            given = ", ".join(map(str, value)) if isinstance(value, Mapping) and value else shown(value)
            raise problem(
                "expected one {kind}, by name or as a mapping of its options; got {given}", kind=cls.KIND, given=given
            )
        ((name, given),) = value.items()
        registry = cls.registry()
        if name not in registry.names():
            known = ", ".join(registry.names())
            raise problem("unknown {kind} {name}; known: {known}", kind=cls.KIND, name=name, known=known)
        # A model with one field of that name, so that pydantic reports its errors under method.NAME.
        fields: dict[str, Any] = {name: (registry.get(name).Options, ...)}
        one = create_model(cls.__name__, **fields)
        checked = one.model_validate({name: {} if given is None else given}, strict=True)
        return {"name": name, "options": getattr(checked, name)}

    @model_serializer
    def _as_given(self) -> dict[str, Any]:
        return {self.name: self.options.model_dump(mode="json")}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        registry = cls.registry()
        known = {name: handler(registry.get(name).Options.__pydantic_core_schema__) for name in registry.names()}
        one = {"type": "object", "properties": known, "additionalProperties": False}
        return {
            "title": cls.__name__,
            "description": cls.DESCRIPTION,
            "anyOf": [{"type": "string", "enum": [*known]}, {**one, "minProperties": 1, "maxProperties": 1}],
        }


class Method(Named):
    """`gptq`, or `{gptq: {act_order: static}}`."""

    KIND = "method"
    DESCRIPTION = "Which code each weight gets."

    @classmethod
    def registry(cls) -> ModuleType:
        from quantkit import algorithms  # imports torch

        return algorithms


class Transform(Named):
    """`awq`, or `{awq: {grid: 20}}`."""

    KIND = "transform"
    DESCRIPTION = "A rewrite of the weights before they are rounded, which leaves the model's function as it is."

    @classmethod
    def registry(cls) -> ModuleType:
        from quantkit import transforms

        return transforms
