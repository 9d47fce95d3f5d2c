"""`validate:` in a recipe: what is measured on the output, reloaded from disk, and what it must reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_serializer, model_validator

from quantkit.errors import InputError
from quantkit.recipe.calibration import TextSource
from quantkit.recipe.errors import problem
from quantkit.recipe.gates import AVERAGE, Gates
from quantkit.recipe.scheme import NONE, Part, SchemeSpec


class Perplexity(TextSource):
    """The held-out texts on which the output is compared with the original."""

    data: str = Field(
        default="builtin:pydocs-heldout",
        min_length=1,
        description="As in calibration; other texts. Of a larger source, the first 16 million characters.",
    )
    windows: int = Field(default=40, ge=1, le=10**6, description="Windows of tokens to compare on.")
    most: int | None = Field(
        default=None,
        ge=1,
        le=10**6,
        description="Windows to go to where fewer do not decide a gate; by default 4 times.",
    )
    length: int = Field(default=512, ge=2, le=2**20, description="Tokens a window.")


class Generation(Part):
    """The original generates greedily; counted is where the output would have gone another way."""

    prompts: int = Field(default=20, ge=0, le=10**5, description="Texts to go on from; 0 leaves this out.")
    tokens: int = Field(default=64, ge=1, le=2**16, description="Tokens generated for each.")


class Tasks(Part):
    """lm-eval's own tasks, run on both models with the same arguments."""

    names: tuple[str, ...] = Field(
        min_length=1,
        strict=False,
        description="pydocs_cloze, pydocs_completion, pydocs_perplexity, any of lm-eval's.",
    )
    folder: str | None = Field(default=None, min_length=1, description="Task YAMLs of your own.")
    limit: int | None = Field(default=None, ge=1, description="The first items of each task only.")
    num_fewshot: int | None = Field(default=None, ge=0, description="Examples before each item; as each task has it.")
    batch_size: int | None = Field(default=None, ge=1, description="Sequences at once; 4 on a CPU, 16 on a GPU.")
    max_length: int | None = Field(default=None, ge=2, description="Tokens of a sequence; the model's own limit.")
    chat_template: bool = Field(default=False, description="Put prompts into the tokenizer's chat template.")
    add_bos_token: bool | None = Field(default=None, description="Begin texts with BOS; as the tokenizer has it.")
    cache: bool = Field(default=True, description="Keep the original's results for the next recipe.")


def _no_tasks(value: Any) -> Any:
    if isinstance(value, str) and value != NONE:
        value = [value]
    if isinstance(value, list | tuple):
        return {"names": value} if value else None
    return None if value is False or value == NONE else value


def _tasks_in_schema(schema: dict[str, Any]) -> None:
    kept = [part for part in schema["anyOf"] if part != {"type": "null"}]
    schema["anyOf"] = [*kept, {"type": "array", "items": {"type": "string"}}, {"enum": [NONE, False]}]


class Repair(Part):
    """What is done about an output that misses its gates: groups of layers that lose most are kept in `scheme`."""

    size: float = Field(default=1.25, ge=1, le=100, description="Largest size, as a multiple of the first output's.")
    scheme: SchemeSpec | None = Field(
        default=None,
        description="What these layers become; by default W8A16 for integer weights alone, else none.",
    )


def _switch_in_schema(schema: dict[str, Any]) -> None:
    schema["anyOf"] = [*(part for part in schema["anyOf"] if part != {"type": "null"}), {"type": "boolean"}]


def _switch(value: Any) -> Any:
    return {} if value is True else None if value is False or value == NONE else value


class Validation(Part):
    """What is measured on the output, reloaded from disk, and what it must reach."""

    perplexity: Perplexity = Perplexity()
    generation: Generation = Generation()
    tasks: Annotated[Tasks | None, BeforeValidator(_no_tasks)] = Field(
        default=None, description="A list of names, or a mapping of options.", json_schema_extra=_tasks_in_schema
    )
    prompt: str | None = Field(default=None, description="Both models continue this text, to be shown side by side.")
    gates: Gates = Field(default=Gates(), description="Without any, wide ones by the scheme; {} for none.")
    side_by_side: bool | Literal["auto"] = Field(
        default="auto",
        description="Both models in memory at once; false: one after the other; auto: that where they do not fit.",
    )
    repair: Annotated[Repair | None, BeforeValidator(_switch)] = Field(
        default=None,
        description="true, or {size, scheme}: where gates fail, more bits for the worst layers until they pass.",
        json_schema_extra=_switch_in_schema,
    )

    @field_serializer("tasks")
    def _no_tasks_is_none(self, value: Tasks | None) -> Any:
        return NONE if value is None else value.model_dump(mode="json")

    @field_serializer("repair")
    def _off_is_false(self, value: Repair | None) -> Any:
        return False if value is None else value.model_dump(mode="json")

    @model_validator(mode="after")
    def _gates_are_measured(self) -> Validation:
        if self.gates.flips is not None and not self.generation.prompts:
            raise problem("the gate flips needs generation: generation.prompts is 0")
        if self.gates.recovery and self.tasks is None:
            raise problem("the gate recovery needs tasks: name some, such as tasks: [pydocs_cloze]")
        named = self.tasks.names if self.tasks else ()
        for task in self.gates.recovery or {}:
            if task != AVERAGE and task not in named:
                raise problem("the gate recovery.{task} needs that task among tasks", task=task)
        return self


def changed(
    settings: Validation,
    data: str | None,
    windows: int | None,
    length: int | None,
    tasks: Sequence[str] | Mapping[str, Any] | None,
    side_by_side: bool | Literal["auto"] | None,
) -> Validation:
    """A recipe's settings with what `validate` was given instead."""
    texts = settings.perplexity
    texts = Perplexity(
        windows=windows or texts.windows,
        most=texts.most if windows is None else None,
        length=length or texts.length,
        **({"data": data} if data else texts.model_dump(include=set(TextSource.model_fields))),
    )
    update: dict[str, Any] = {"perplexity": texts}
    if tasks is not None:
        update["tasks"] = _tasks(tasks)
    if side_by_side is not None:
        if side_by_side not in (True, False, "auto"):
            raise InputError(f"side_by_side: expected True, False or 'auto'; got {side_by_side!r}")
        update["side_by_side"] = side_by_side
    return settings.model_copy(update=update)


def _tasks(tasks: Sequence[str] | Mapping[str, Any]) -> Tasks:
    try:
        return Tasks.model_validate(dict(tasks) if isinstance(tasks, Mapping) else {"names": list(tasks)})
    except ValidationError as e:
        found = e.errors()[0]
        raise InputError(f"tasks: {'.'.join(map(str, found['loc']))}: {found['msg']}; got {found['input']!r}") from None
