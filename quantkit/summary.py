"""quantkit.json as it is read back: checked, so that a damaged one is a sentence and not a traceback.

`api` and `convert` write it; inspect, validate, compare, convert and push read it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantkit import hub
from quantkit.errors import InputError
from quantkit.output import SUMMARY

Count = Annotated[int, Field(ge=0, lt=2**63)]
Some = Annotated[int, Field(ge=1, lt=2**63)]
Plain = dict[str, Any]


class _Part(BaseModel):
    """What is used of a mapping; other keys are left alone, and those without a default must be there."""

    model_config = ConfigDict(strict=True)


class _Source(_Part):
    model: str | None = None
    revision: str | None = None
    fingerprint: str | None = None


class _Layer(_Part):
    name: str
    relative_error: float | None = None
    mark: float | None = None
    bits_per_weight: float | None = None


class _Sizes(_Part):
    source_bytes: Count = 0
    output_bytes: Count = 0


class _Files(_Part):
    weights: list[str] = []


class _Auto(_Part):
    bits: float


class _Allocation(_Part):
    auto: _Auto | None = None


class _Figure(_Part):
    value: float


class _Rate(_Part):
    rate: _Figure


class _Task(_Part):
    recovery: _Figure


class _Comparison(_Part):
    kl: float
    kl_stderr: float | None
    perplexity: float
    perplexity_original: float
    perplexity_ratio: float
    top1_agreement: float
    windows: Some
    tokens: Count


class _Validation(_Part):
    status: str = ""
    message: str = ""
    comparison: _Comparison | None = None
    flips: _Rate | None = None
    tasks: dict[str, _Task] | None = None
    gates: list[Plain] = []


class _Dense(_Part):
    name: str
    reason: str


class _Summary(_Part):
    status: str = ""
    source: _Source | None = None
    recipe: Plain | None = None
    data: Plain | None = None
    versions: dict[str, str] | None = None
    layers: list[_Layer] = []
    not_quantized: list[_Dense] | None = None
    files: _Files = _Files()
    size: _Sizes = _Sizes()
    allocation: _Allocation | None = None
    validation: _Validation | None = None


def read(folder: Path) -> Plain:
    """The content of a folder's quantkit.json. Raises InputError that names the first key that cannot be what it is."""
    file = folder / SUMMARY
    content = hub.read_json(file)
    try:
        _Summary.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{file}: {where}: {first['msg'][:200]}; the file is damaged, or another tool's") from None
    return content
