"""One word for how much is done: which method it stands for, and when signed scales go with it."""

from __future__ import annotations

from typing import Any

import pytest

from quantkit import lint
from quantkit.errors import InputError
from quantkit.plan import make
from quantkit.recipe import Recipe

BASE: dict[str, Any] = {"model": "builtin:pydocs-llama-7m", "scheme": "W4A16"}


def method(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = Recipe.from_any({**BASE, **changes}).to_dict()["method"]
    return found


def test_each_word_stands_for_a_method() -> None:
    assert method(effort="default") == method() == method(method="gptq")
    assert method(effort="fast") == method(method="rtn")
    assert method(effort="default", scheme="MXFP4A16")["gptq"]["pre_shift"] == 0.25
    assert method(scheme="MXFP4A16") == method(effort="default", scheme="MXFP4A16")
    best = method(effort="best")["gptq"]
    assert best["pre_shift"] == 0.5 and best["sweeps"] > method()["gptq"]["sweeps"] and best["signed_scales"]


@pytest.mark.parametrize(
    ("changes", "signed"),
    [
        ({"export": {"engines": ["transformers", "vllm"]}}, True),
        ({"export": {"engines": ["transformers", "sglang"]}}, False),
        ({"export": {"engines": ["tensorrt-llm"]}}, False),
        ({"scheme": {"weights": {"number": "int4"}, "activations": {"number": "int8"}}}, False),
        ({"scheme": "W4A16", "rules": [{"match": "*.0.*", "scheme": "W8A8"}]}, False),
        ({"scheme": "NVFP4A16"}, True),
    ],
)
def test_signed_scales_only_where_every_engine_reads_them(changes: dict[str, Any], signed: bool) -> None:
    assert method(effort="best", **changes)["gptq"]["signed_scales"] is signed


def test_the_resolved_recipe_names_the_method_and_reads_back() -> None:
    recipe = Recipe.from_any({**BASE, "effort": "best"})
    assert "effort" not in recipe.to_dict() and Recipe.parse(recipe.to_yaml()) == recipe


def test_effort_and_method_do_not_go_together() -> None:
    with pytest.raises(InputError, match="give either method or effort"):
        method(effort="best", method="gptq")
    with pytest.raises(InputError, match="effort"):
        method(effort="most")


def test_signed_scales_are_refused_for_an_engine_that_may_not_read_them() -> None:
    recipe = {**BASE, "method": {"gptq": {"signed_scales": True}}, "export": {"engines": ["transformers", "sglang"]}}
    with pytest.raises(InputError, match="of sglang it is not known that it reads signed scales"):
        make(Recipe.from_any(recipe))


def test_every_engine_says_whether_it_reads_signed_scales() -> None:
    assert all(isinstance(lint.get(name).SIGNED_SCALES, bool) for name in lint.names())
