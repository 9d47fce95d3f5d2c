"""The recipe: what it accepts, what it refuses and how it says so, and that it survives a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit import algorithms, lint, strict_yaml
from quantkit.errors import InputError
from quantkit.presets import PRESETS
from quantkit.recipe import Recipe, json_schema
from quantkit.recipe.errors import known_keys
from quantkit.recipe.gates import Gates
from quantkit.types import Scheme, TensorScheme

RECIPES = Path(__file__).parent.parent / "recipes"
SHORT = "model: m\nscheme: W4A16\n"
W4 = Scheme(TensorScheme("int4", "group", 128))
W8 = Scheme(TensorScheme("int8", "group", 128))


def refused(text: str, *overrides: str) -> list[str]:
    """The problems of a recipe, one a line."""
    with pytest.raises(InputError) as caught:
        Recipe.parse(text, "recipe.yaml", overrides)
    return [line.strip() for line in str(caught.value).splitlines()]


# What is accepted


def test_short_recipe_gets_every_default() -> None:
    recipe = Recipe.parse(SHORT)
    assert recipe.scheme.resolve() == W4
    assert recipe.method_name == "gptq"
    assert recipe.method_options == algorithms.get("gptq").Options()
    assert (recipe.calibration.samples, recipe.calibration.length, recipe.calibration.packing) == (128, 2048, "concat")
    assert recipe.validation is not None
    assert {name: limit.limit for name, limit in recipe.validation.gates.limits().items()} == {
        "kl": 0.15,
        "perplexity_ratio": 1.15,
        "top1_agreement": 0.78,
    }
    assert recipe.export.shard_bytes == 5 * 10**9
    assert recipe.export.engines == ("transformers", "vllm")


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("W4A16_ASYM", TensorScheme("int4", "group", 128, symmetric=False)),
        ("{preset: W3A16, group_size: 32}", TensorScheme("int3", "group", 32)),
        ("{preset: W8A16, group_size: channel}", TensorScheme("int8", "channel")),
        ("{weights: {number: int4, group_size: 48}}", TensorScheme("int4", "group", 48)),
        ("{weights: {number: int5}}", TensorScheme("int5", "channel")),
        ("{weights: {number: int8, strategy: tensor, symmetric: false}}", TensorScheme("int8", "tensor", None, False)),
    ],
)
def test_forms_of_a_scheme(text: str, weights: TensorScheme) -> None:
    recipe = Recipe.parse(f"model: m\nscheme: {text}\n")
    assert recipe.scheme.resolve() == Scheme(weights)
    assert Recipe.parse(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("W4A16", "W4A16"),
        ("{preset: W4A16, group_size: 64}", "W4A16-g64"),
        ("{preset: W8A16, group_size: channel}", "W8A16-channel"),
        ("{weights: {number: int4, group_size: 16, symmetric: false}}", "int4-g16-asym"),
        ("{weights: {number: int5}}", "int5-channel"),
        ("none", "mixed"),
    ],
)
def test_labels_of_schemes(text: str, label: str) -> None:
    rules = "rules: [{match: a, scheme: W4A16}]\n"
    assert Recipe.parse(f"model: m\nscheme: {text}\n{rules}").scheme.label == label


def test_forms_of_a_method() -> None:
    gptq = algorithms.get("gptq").Options
    for text, expected in [
        ("gptq", gptq()),
        ("{gptq: }", gptq()),
        ("{gptq: {act_order: none, dampening: 1e-3}}", gptq(act_order="none", dampening=0.001)),
    ]:
        assert Recipe.parse(f"{SHORT}method: {text}\n").method_options == expected
    assert Recipe.parse(f"{SHORT}method: rtn\n").method_name == "rtn"


@pytest.mark.parametrize("off", ["none", "false"])
def test_validation_can_be_left_out(off: str) -> None:
    recipe = Recipe.parse(f"{SHORT}validate: {off}\n")
    assert recipe.validation is None
    assert Recipe.parse(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("none", None),
        ("fp8", TensorScheme("fp8_e4m3", "tensor")),
        ("{strategy: head}", TensorScheme("fp8_e4m3", "head")),
        ("{number: fp8_e4m3, strategy: tensor}", TensorScheme("fp8_e4m3", "tensor")),
    ],
)
def test_forms_of_a_kv_cache(text: str, scheme: TensorScheme | None) -> None:
    recipe = Recipe.parse(f"{SHORT}kv_cache: {text}\n")
    assert (None if recipe.kv_cache is None else recipe.kv_cache.resolve()) == scheme
    assert Recipe.parse(recipe.to_yaml()) == recipe
    written = recipe.to_dict()["kv_cache"]
    assert written == ("none" if scheme is None else {"number": "fp8_e4m3", "strategy": scheme.strategy})
    assert {"enum": ["fp8", "none"]} in json_schema()["properties"]["kv_cache"]["anyOf"]


@pytest.mark.parametrize(("size", "count"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("200kb", 200_000)])
def test_shard_size(size: str, count: int) -> None:
    assert Recipe.parse(f"{SHORT}export: {{shard_size: {size}}}\n").export.shard_bytes == count


def test_engines() -> None:
    for text, expected in (("[]", ()), ("[vllm, tensorrt-llm, vllm]", ("vllm", "tensorrt-llm"))):
        recipe = Recipe.parse(f"{SHORT}export: {{engines: {text}}}\n")
        assert recipe.export.engines == expected
        assert Recipe.parse(recipe.to_yaml()) == recipe


# Round trip


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_read_and_round_trip(path: Path) -> None:
    recipe = Recipe.load(path)
    again = Recipe.parse(recipe.to_yaml())
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    assert Recipe.from_any(recipe.to_dict()) == Recipe.from_any(recipe) == Recipe.from_any(str(path)) == recipe


def test_resolved_yaml_says_every_default_in_a_fixed_order() -> None:
    text = Recipe.parse("scheme: W4A16\nmethod: rtn\nmodel: m\n").to_yaml()
    top = [line.partition(":")[0] for line in text.splitlines() if not line.startswith((" ", "-"))]
    assert top == [
        "model",
        "trust_remote_code",
        "scheme",
        "rules",
        "kv_cache",
        "transforms",
        "method",
        "calibration",
        "validate",
        "export",
    ]
    for line in (
        "preset: W4A16",
        "group_size: 128",
        "scale_search: auto",
        "length: 2048",
        "input_scale: absmax",
        "kv_cache: none",
        "kl: 0.15",
        "recovery: null",
        "shard_size: 5GB",
    ):
        assert line in text


@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"])),
    model=st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
    | st.sampled_from(["1e5", "no", "0x1", "~", "1_0"]),
    kl=st.floats(0, allow_nan=False, allow_infinity=False),
)
def test_any_text_and_number_survives_the_round_trip(prompt: str, model: str, kl: float) -> None:
    recipe = Recipe.from_any({"model": model, "scheme": "W4A16", "validate": {"prompt": prompt, "gates": {"kl": kl}}})
    assert Recipe.parse(recipe.to_yaml()) == recipe


# What is refused, each on its line


def test_every_problem_is_listed_once_in_the_order_of_the_file() -> None:
    method = "method:\n  gptq:\n    act_ordr: none\n    dampening: lots\n"
    found = refused(f"modle: a\nscheme: W4A17\n{method}calibration: {{samples: many}}\n")
    assert found == [
        "6 problems in recipe.yaml:",
        "recipe.yaml: model is missing; name one here or with --model",
        "recipe.yaml:1: unknown key modle; did you mean model?",
        "recipe.yaml:2: scheme.preset: unknown preset W4A17; did you mean W4A16?",
        "recipe.yaml:5: unknown key method.gptq.act_ordr; did you mean act_order?",
        "recipe.yaml:6: method.gptq.dampening: expected a number, got 'lots'",
        "recipe.yaml:7: calibration.samples: expected a whole number, got 'many'",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pruning: [{wanda: {}}]", "unknown key pruning; known: model, trust_remote_code, scheme, rules,"),
        ("calibration: {smaples: 3}", "unknown key calibration.smaples; did you mean samples?"),
        ("validate: {perplexity: {window: 3}}", "unknown key validate.perplexity.window; did you mean windows?"),
        ("validate: {gates: {KL: 3}}", "unknown key validate.gates.KL; did you mean kl?"),
        ("validate:", "validate: expected a mapping, or none to leave validation out; got nothing"),
        (
            "validate: {gates: {kl: -1}}",
            "validate.gates.kl.limit: expected a number greater than or equal to 0, got -1",
        ),
        ("validate: {gates: {kl: .nan}}", "validate.gates.kl.limit: expected a finite number, got nan"),
        ("validate: {gates: {top1_agreement: 85}}", "expected a number less than or equal to 1, got 85"),
        ("calibration: {samples: 0}", "calibration.samples: expected a number greater than or equal to 1, got 0"),
        ("calibration: {samples: true}", "calibration.samples: expected a whole number, got true"),
        ("calibration: {samples: 1.5}", "calibration.samples: expected a whole number, got 1.5"),
        ("calibration: {data: }", "calibration.data: expected text, got nothing"),
        ("calibration: {data: ''}", "calibration.data: expected text, got ''"),
        ("calibration: {packing: tight}", "calibration.packing: expected 'concat' or 'document', got 'tight'"),
        ("export: {engines: [vlm]}", "export.engines: unknown engine vlm; did you mean vllm?"),
        ("export: {engines: [tgi]}", "unknown engine tgi; known: sglang, tensorrt-llm, transformers, vllm"),
        ("export: {engines: vllm}", "export.engines: expected a list, got 'vllm'"),
        ("calibration: {input_scale: best}", "input_scale: expected 'absmax', 'percentile' or 'mse', got 'best'"),
        ("kv_cache: fp4", "kv_cache: expected fp8, a mapping of number and strategy, or none; got 'fp4'"),
        ("kv_cache: ", "kv_cache: expected fp8, a mapping of number and strategy, or none; got nothing"),
        ("kv_cache: false", "kv_cache: expected fp8, a mapping of number and strategy, or none; got false"),
        ("kv_cache: {number: int8}", "kv_cache.number: expected 'fp8_e4m3', got 'int8'"),
        ("kv_cache: {strategy: token}", "kv_cache.strategy: expected 'tensor' or 'head', got 'token'"),
        ("kv_cache: {stratgy: head}", "unknown key kv_cache.stratgy; did you mean strategy?"),
        ("calibration: 5", "calibration: expected a mapping of keys to values, got 5"),
        ("rules: {match: a}", "rules: expected a list, got a mapping of match"),
        ("rules: [{match: a}]", "rules.0.scheme is missing"),
        ("rules: [{match: a, scheme: }]", "rules.0.scheme: expected a preset name, a mapping, or none to leave layers"),
        ("rules: [{match: 're:(', scheme: none}]", "rules.0.match: re:( is not a valid regular expression: missing )"),
        ("rules: [{match: a, scheme: {preset: W4A16, group_size: 48}}]", "expected 32, 64, 128 or 'channel', got 48"),
        ("rules: [{match: a, scheme: {preset: [W4A16]}}]", "rules.0.scheme.preset: expected text, got ['W4A16']"),
        ("rules: [{match: a, scheme: {group_size: 64}}]", "rules.0.scheme: give either preset or weights"),
        ("rules: [{match: a, scheme: {preset: none, group_size: 64}}]", "none has no groups; leave group_size out"),
        ("rules: [{match: a, scheme: {weights: {number: int4}, group_size: 64}}]", "put group_size inside weights"),
        ("rules: [{match: a, scheme: {weights: {number: int9}}}]", "unknown number format int9; did you mean int8?"),
        (
            "rules: [{match: a, scheme: {weights: {number: int4, strategy: group}}}]",
            "group_size goes with strategy group",
        ),
        ("method: awq2", "method: unknown method awq2; known: "),
        (
            "method: {gptq: {}, rtn: {}}",
            "method: expected one method, by name or as a mapping of its options; got gptq,",
        ),
        ("method: []", "method: expected one method, by name or as a mapping of its options; got []"),
        ("method: {rtn: {scale_search: best}}", "method.rtn.scale_search: expected 'auto'"),
        ("method: {rtn: {scale_serach: mse}}", "unknown key method.rtn.scale_serach; did you mean scale_search?"),
        ("method: {gptq: {dampening: '0.1'}}", "method.gptq.dampening: expected a number, got '0.1'"),
        ("export: {format: compressed-tensor}", "unknown format compressed-tensor; did you mean compressed-tensors?"),
        ("export: {shard_size: 5XB}", "export.shard_size: expected a size such as 500MB, 5GB or 4GiB, got '5XB'"),
        ("export: {shard_size: 0.1B}", "expected a size such as 500MB, 5GB or 4GiB, got '0.1B'"),
    ],
)
def test_refused_with_line_and_advice(line: str, expected: str) -> None:
    (found,) = refused(f"{SHORT}# a comment\n{line}\n")
    assert found.startswith("recipe.yaml:4: ")
    assert expected in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "recipe.yaml: the recipe is empty"),
        ("# nothing\n", "recipe.yaml: the recipe is empty"),
        ("- a\n", "recipe.yaml: expected a mapping such as"),
        ("model: m\nscheme: none\n", "recipe.yaml: nothing would be quantized"),
        ("model: m\nscheme: W4A16\nmodel: n\n", "recipe.yaml:3: model is given twice, first on line 1"),
        ("a:\n  b: 1\n  b: 2\n", "recipe.yaml:3: a.b is given twice, first on line 2"),
        ("model: [\n", "recipe.yaml:2:1: not valid YAML"),
        ("model: m\n\tscheme: x\n", "recipe.yaml:2:1: not valid YAML"),
        (
            "model: m\nscheme: !!python/object:os.system x\n",
            "recipe.yaml:2: the tag tag:yaml.org,2002:python/object:os.system is not",
        ),
        ("model: &a m\nscheme: *a\n", "recipe.yaml:1: anchors and aliases are not supported"),
        ("a: 1\n---\nb: 2\n", "recipe.yaml:2:1: not valid YAML: but found another document"),
        ("model: 2024-13-45\n", "recipe.yaml: not valid YAML: month must be in 1..12"),
        ("model: m\nscheme: \x00\n", "recipe.yaml:2: the character U+0000 is not allowed"),
        ("model: m\nmethod: {1: x}\n", "recipe.yaml:2: '1' cannot be a key: YAML does not read it as text"),
        ("model: m\non: x\n", "recipe.yaml:2: 'on' cannot be a key"),
        ("model: m\n<<: {scheme: W4A16}\n", "recipe.yaml:2: '<<' cannot be a key"),
        ("model: m\n? [a]\n: b\n", "recipe.yaml:2: a list or mapping cannot be a key"),
        ("[" * 5000 + "]" * 5000, "recipe.yaml:1: nested too deeply"),
    ],
)
def test_text_that_is_no_recipe(text: str, expected: str) -> None:
    assert refused(text)[0].startswith(expected)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"model: \xff\n")
    for path, expected in [
        (tmp_path / "no.yaml", "no such recipe file"),
        (tmp_path, "cannot be read"),
        (binary, "byte 7"),
    ]:
        with pytest.raises(InputError, match=expected):
            Recipe.load(path)


def test_preset_without_groups_refuses_a_group_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "WHOLE", Scheme(TensorScheme("int8", "tensor")))
    assert Recipe.parse("model: m\nscheme: WHOLE\n").to_dict()["scheme"] == {"preset": "WHOLE"}
    (found,) = refused("model: m\nscheme: {preset: WHOLE, group_size: 64}\n")
    assert found == "recipe.yaml:2: scheme: WHOLE has no groups; leave group_size out"


# Overrides


@pytest.mark.parametrize(
    ("overrides", "path", "value"),
    [
        (["calibration.samples=64"], ("calibration", "samples"), 64),
        (["scheme=W8A16"], ("scheme", "preset"), "W8A16"),
        (["scheme.group_size=64"], ("scheme", "group_size"), 64),
        (["method.gptq.act_order=none"], ("method", "gptq", "act_order"), "none"),
        (["method=rtn", "method.rtn.scale_search=absmax"], ("method", "rtn", "scale_search"), "absmax"),
        (["kv_cache=fp8"], ("kv_cache", "strategy"), "tensor"),
        (["kv_cache=fp8", "kv_cache.strategy=head"], ("kv_cache", "strategy"), "head"),
        (["validate=none"], ("validate",), "none"),
        (["validate=none", "validate.prompt=a b"], ("validate", "prompt"), "a b"),
        (["rules.0.scheme=W8A16"], ("rules", 0, "scheme", "preset"), "W8A16"),
        (["rules.0.scheme.preset=W8A16"], ("rules", 0, "scheme", "preset"), "W8A16"),
        (["model=a=b"], ("model",), "a=b"),
        (["validate.gates={kl: 1e-1}"], ("validate", "gates", "kl"), 0.1),
    ],
)
def test_overrides(overrides: list[str], path: tuple[str | int, ...], value: Any) -> None:
    text = (
        "model: m\nscheme: W4A16\nmethod: gptq\nrules:\n- {match: lm_head, scheme: none}\ncalibration: {samples: 3}\n"
    )
    found: Any = Recipe.parse(text, "recipe.yaml", overrides).to_dict()
    for step in path:
        found = found[step]
    assert found == value


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("calibration.sample=64", "unknown key calibration.sample; did you mean samples?"),
        ("calibraton.samples=64", "unknown key calibraton; did you mean calibration?"),
        ("calibration.samples=many", "calibration.samples: expected a whole number, got 'many'"),
        ("calibration={length: no}", "calibration.length: expected a whole number, got false"),
        ("method.gtpq.act_order=none", "method: expected one method"),
        ("rules.7.scheme=none", "rules is a list of 1, so rules.7 is not in it"),
        ("model.name=x", "model: expected text, got a mapping of name"),
        ("calibration.samples", "expected path.to.key=value"),
        ("calibration..samples=1", "expected path.to.key=value"),
        ("=1", "expected path.to.key=value"),
        ("model={: ", "not valid YAML"),
    ],
)
def test_bad_overrides_name_themselves(override: str, expected: str) -> None:
    text = f"{SHORT}method: rtn\nrules:\n- {{match: a, scheme: none}}\ncalibration: {{samples: 3, length: 9}}\n"
    (found,) = refused(text, override)
    assert found.startswith(f"--set {override}:")
    assert expected in found


def test_overrides_leave_the_input_alone() -> None:
    given = {"model": "m", "scheme": "W4A16", "calibration": {"samples": 3}}
    assert Recipe.from_any(given, ["calibration.samples=4"], model="n").calibration.samples == 4
    assert given == {"model": "m", "scheme": "W4A16", "calibration": {"samples": 3}}


def test_model_from_the_caller_fills_in_and_replaces() -> None:
    assert Recipe.parse("scheme: W4A16\n", model="a: b").model == "a: b"
    assert Recipe.parse(SHORT, model=Path("x/y")).model == "x/y"
    with pytest.raises(InputError, match="--model : model: expected text, got ''"):
        Recipe.parse(SHORT, model="")


# Rules

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.10.mlp.down_proj", "lm_head"]


def assigned(rules: str, scheme: str = "W4A16") -> tuple[list[Scheme | None], list[str]]:
    chosen, silent = Recipe.parse(f"model: m\nscheme: {scheme}\nrules: {rules}\n").assign(NAMES)
    assert list(chosen) == NAMES
    return list(chosen.values()), [rule.match for rule in silent]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("[]", [W4, W4, W4, None]),
        ("[{match: lm_head, scheme: W8A16}]", [W4, W4, W4, W8]),
        ("[{match: model.layers.0.mlp.down_proj, scheme: none}]", [W4, None, W4, None]),
        ("[{match: '*.down_proj', scheme: W8A16}]", [W4, W8, W8, None]),
        ("[{match: 'model.layers.?.*', scheme: W8A16}]", [W8, W8, W4, None]),
        ("[{match: 're:model.layers.0[.]', scheme: W8A16}]", [W8, W8, W4, None]),
        ("[{match: 're:.*down_proj$', scheme: none}, {match: '*', scheme: W8A16}]", [W8, None, None, W8]),
        ("[{match: '*', scheme: W8A16}, {match: lm_head, scheme: none}]", [W8, W8, W8, W8]),
    ],
)
def test_first_matching_rule_decides(rules: str, expected: list[Scheme | None]) -> None:
    assert assigned(rules) == (expected, [])


def test_rules_alone_may_choose_what_is_quantized() -> None:
    assert assigned("[{match: '*.down_proj', scheme: W8A16}]", scheme="none") == ([None, W8, W8, None], [])


def test_rules_that_match_nothing_are_given_back() -> None:
    rules = "[{match: down_proj, scheme: none}, {match: 're:layers', scheme: none}, {match: '*.10.*', scheme: none}]"
    assert assigned(rules) == ([W4, W4, None, None], ["down_proj", "re:layers"])


@pytest.mark.parametrize(
    ("scheme", "kl"),
    [
        ("W8A16", 0.01),
        ("W8A8", 0.04),
        ("FP8_DYNAMIC", 0.04),
        ("W6A16", 0.06),
        ("W4A16", 0.15),
        ("W4AFP8", 0.15),
        ("NVFP4A16", 0.15),
        ("MXFP4", 0.4),
        ("W3A16", 0.6),
        ("W2A16", 1.2),
        ("{auto: {bits: 4.5, candidates: [W3A16, W8A16]}}", 0.6),
        ("W8A16\nrules: [{match: '*.up_proj', scheme: W4A16}]", 0.15),
    ],
)
def test_a_recipe_without_gates_has_those_of_its_coarsest_scheme(scheme: str, kl: float) -> None:
    text = f"model: m\nscheme: {scheme}\nexport: {{engines: [transformers]}}\n"
    for recipe in (Recipe.parse(text), Recipe.parse(Recipe.parse(text).to_yaml())):
        assert recipe.validation is not None and recipe.validation.gates.limits()["kl"].limit == kl
    none = Recipe.parse(text, "r", ["validate.gates={}"])
    assert none.validation is not None and none.validation.gates.limits() == {}


def test_forms_of_a_gate() -> None:
    gates = Gates.model_validate({"kl": {"limit": 0.1, "level": "warn"}, "recovery": {"average": 0.99, "gsm8k": 0.95}})
    assert {name: (limit.limit, limit.level) for name, limit in gates.limits().items()} == {
        "kl": (0.1, "warn"),
        "recovery": (0.99, "fail"),
        "recovery.gsm8k": (0.95, "fail"),
    }
    assert Gates.model_validate(gates.model_dump(mode="json")) == gates
    assert Gates.model_validate({"recovery": 0.98}).limits()["recovery"].limit == 0.98
    with pytest.raises(InputError, match="the gate flips needs generation"):
        Recipe.parse("model: m\nscheme: W4A16\nvalidate: {generation: {prompts: 0}, gates: {flips: 0.1}}\n")


# Where it goes


@pytest.mark.parametrize(
    ("text", "repo", "private"),
    [
        ("org/name", "org/name", True),
        ("true", None, True),
        ("{repo: name, private: false}", "name", False),
        ("{}", None, True),
    ],
)
def test_forms_of_push(text: str, repo: str | None, private: bool) -> None:
    recipe = Recipe.parse(f"{SHORT}push: {text}\n")
    assert recipe.push is not None and (recipe.push.repo, recipe.push.private) == (repo, private)
    assert Recipe.from_any(recipe) == recipe, "a recipe that is handed on still pushes"
    plain = Recipe.parse(SHORT)
    assert recipe.to_yaml() == plain.to_yaml() and Recipe.parse(recipe.to_yaml()) == plain, "one that is kept does not"
    assert Recipe.parse(f"{SHORT}push: {text}\n", overrides=["push.repo=other"]).push.private == private  # type: ignore[union-attr]
    assert Recipe.parse(f"{SHORT}push: {text}\n", overrides=["push=none"]) == plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "push: expected a repository, a mapping, true, or none; got nothing"),
        ("3", "push: expected a mapping of keys to values, got 3"),
        ("a/b/c", "push.repo: a/b/c is no name for the Hub: NAME or OWNER/NAME of letters, digits, -, _ and ."),
        ("{repos: a}", "unknown key push.repos; did you mean repo?"),
        ("{private: 1}", "push.private: expected true or false, got 1"),
        ("{revision: ''}", "push.revision: expected text, got ''"),
    ],
)
def test_bad_push(text: str, message: str) -> None:
    assert refused(f"{SHORT}push: {text}\n") == [f"recipe.yaml:3: {message}"]


def test_a_token_in_a_recipe_is_refused_and_not_repeated() -> None:
    (line,) = refused(f"{SHORT}push: {{repo: a, token: hf_Secret}}\n")
    assert "unknown key push.token" in line and "hf_Secret" not in line


# The schema


def test_schema_offers_the_engines() -> None:
    assert json_schema()["$defs"]["Export"]["properties"]["engines"]["items"]["enum"] == lint.names()


def test_schema_knows_every_key_of_a_resolved_recipe() -> None:
    schema = json_schema()
    assert schema["required"] == ["model", "scheme"]
    assert schema["additionalProperties"] is False

    def check(value: Any, path: tuple[str | int, ...]) -> None:
        for key, inner in value.items() if isinstance(value, dict) else ():
            assert key in known_keys(schema, path), f"{path} has no {key}"
            check(inner, (*path, key))

    check({"push": Recipe.parse(f"{SHORT}push: true\n").push.model_dump()}, ())  # type: ignore[union-attr]
    for path in RECIPES.glob("*.yaml"):
        check(Recipe.load(path).to_dict(), ())
        check(strict_yaml.parse(path.read_text(), path.name).data, ())


@pytest.mark.parametrize("name", algorithms.names())
def test_options_of_every_method_are_in_the_schema_and_refuse_what_they_do_not_know(name: str) -> None:
    options = algorithms.get(name).Options
    assert known_keys(json_schema(), ("method", name)) == list(options.model_fields)
    assert options.model_config["extra"] == "forbid"
    assert options.model_config["frozen"]
    recipe = Recipe.parse(f"{SHORT}method: {name}\n")
    assert Recipe.parse(recipe.to_yaml()) == recipe
    assert all(field.description for field in options.model_fields.values()), "editors show the descriptions"
