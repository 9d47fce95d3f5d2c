"""`push:` in a recipe: where `quantkit run` sends an output that passed its gates.

It decides nothing of the output, so no file of the output holds it: the recipe beside the weights never pushes.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from quantkit.recipe.errors import problem
from quantkit.recipe.scheme import NONE, Part


class Push(Part):
    """Where an output goes on the Hub, and who may see it. No token: that is huggingface_hub's login."""

    repo: str | None = Field(
        default=None, min_length=1, description="NAME or OWNER/NAME; else the model's name and the scheme's, as yours."
    )
    private: bool = Field(default=True, description="Who may see a repository that is made for it; false: everybody.")
    revision: str | None = Field(default=None, min_length=1, description="A branch, made when missing; else main.")
    create_pr: bool = Field(default=False, description="Open a pull request in place of a commit to the branch.")
    stream: bool = Field(
        default=False,
        description="Send finished shards while the next block is quantized. No branch names them before the gates "
        "have passed; the repository is made at the start.",
    )
    unvalidated: bool = Field(
        default=False, description="Also with validate: none; the card says so. What fails its gates is never pushed."
    )
    base_public_ok: bool = Field(
        default=False, description="The terms of a gated or non-commercial original allow private: false."
    )

    @field_validator("repo")
    @classmethod
    def _name_for_the_hub(cls, value: str | None) -> str | None:
        if value is not None:
            from huggingface_hub.errors import HFValidationError
            from huggingface_hub.utils import validate_repo_id

            try:
                validate_repo_id(value)
            except HFValidationError:
                raise problem(
                    "{value} is no name for the Hub: NAME or OWNER/NAME of letters, digits, -, _ and .", value=value
                ) from None
        return value


def spread(value: Any) -> Any:
    """`push: org/name`, `push: true` and `push: none` as what they stand for."""
    if value is None:
        raise problem("expected a repository, a mapping, true, or none; got nothing")
    if value is True:
        return {}
    if value is False or value == NONE:
        return None
    return {"repo": value} if isinstance(value, str) else value


def in_schema(schema: dict[str, Any]) -> None:
    """The short forms, in place of the null that pydantic sees."""
    kept = [part for part in schema["anyOf"] if part != {"type": "null"}]
    schema["anyOf"] = [*kept, {"type": "string", "minLength": 1}, {"type": "boolean"}]
