"""Four-bit codes laid out by kernels on a GPU: the words of `layout.pack`, whatever the scales and sizes."""

from __future__ import annotations

from pathlib import Path

import packed_models
import pytest
from packed_weights import weight
from poison import poisoned
from test_nibbles import BAD, FOUR, laid, same, shapes

from quantkit.errors import InputError
from quantkit_kernels import layout, nibbles

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", FOUR, ids=str)
def test_words_are_those_of_the_reference(case: tuple[str, str, int]) -> None:
    kind, _, group = case
    with poisoned():
        for seed, (n, k) in enumerate([*shapes(kind), (1024, 4096)]):
            w = weight(kind, case[1], group, n, k, seed)
            p = layout.pack(kind, w.codes, w.scale, w.zero, group=group, global_scale=w.global_scale)
            codes, scale, zero, wrong = laid(nibbles, case, w, more=8 * (seed % 2), device="cuda")
            assert same(codes, p.codes) and same(scale, p.scale) and same(zero, p.zero) and wrong == nibbles.NOWHERE


@pytest.mark.parametrize(("case", "bad", "good"), BAD, ids=[str(row[0]) for row in BAD])
def test_the_first_scale_that_cannot_be_held_is_found(
    case: tuple[str, str, int], bad: list[float], good: list[float]
) -> None:
    for value in (*bad, *good):
        w = weight(case[0], case[1], case[2], 40, 256)
        w.scale[37, 0] = w.scale[21, 1] = value
        wrong = laid(nibbles, case, w, device="cuda")[3]
        assert wrong == (21 * w.scale.shape[1] + 1 if value in bad or value != value else nibbles.NOWHERE), value


def test_loading_goes_by_kernels_and_names_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer goes through the kernels, none through `layout.pack`."""
    import transformers
    from test_runtime_laying import SCHEMES, damaged

    packed_models.save(tmp_path / "m", "compressed-tensors", SCHEMES["W4A16"])
    monkeypatch.setattr(layout, "pack", None)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map="cuda")
    damaged(tmp_path / "m", ".weight_scale", (5, 0), float("nan"))
    with pytest.raises(InputError, match=r"mlp\.gate_proj: the scale at \[5, 0\] is NaN"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map="cuda")
