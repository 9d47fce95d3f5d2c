"""Rules about the layers: what they share, how they are cut, what their tensors look like."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from quantkit.formats import compressed_tensors as ct
from quantkit.lint.described import Described, Layer, Problem, Rule, gather, many

_CT = "compressed-tensors"
# How tensor parallel cuts a layer: these along in_features, those along out_features, all others not at all.
ROW = {"o_proj", "down_proj", "w2", "out_proj", "dense", "fc2"}
COLUMN = {"q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1"}


class Verdict(NamedTuple):
    """Why an engine does not load a layer, or only sometimes, and what to do."""

    level: Literal["error", "warning"]
    what: str
    fix: str


def error(what: str, fix: str) -> Verdict:
    return Verdict("error", what, fix)


def warning(what: str, fix: str) -> Verdict:
    return Verdict("warning", what, fix)


def words(layer: Layer) -> str:
    """A layer's scheme in a few words."""
    return ct.words(layer.scheme) if layer.scheme else "dense"


def support(held: Callable[[Described, Layer], Verdict | None]) -> Rule:
    """The rule that an engine loads every layer, from what it says of one; None is for yes."""

    def supported(d: Described) -> Iterator[Problem]:
        found: dict[Verdict, list[str]] = {}
        for x in d.quantized:
            if (verdict := held(d, x)) is not None:
                found.setdefault(verdict, []).append(x.name)
        for verdict, names in found.items():
            yield Problem(verdict.level, many(names), verdict.what, verdict.fix)

    supported.__doc__ = held.__doc__
    return supported


def as_warning(rule: Rule) -> Rule:
    """The same rule where an engine only suffers from what others refuse."""

    @functools.wraps(rule)
    def milder(d: Described) -> Iterator[Problem]:
        for p in rule(d):
            yield Problem("warning", p.where, p.what, p.fix)

    return milder


def _bits(layer: Layer) -> int:
    number = layer.scheme.weights.number if layer.scheme else ""
    return int(number[3:]) if number.startswith("int") else 0


def _packs_rows(layer: Layer) -> bool:
    """Whether zero points are packed along out_features; gptq and awq have them also when they are all the same."""
    asymmetric = layer.scheme is not None and not layer.scheme.weights.symmetric
    return layer.layout in ("gptq", "awq") or (layer.layout == "pack-quantized" and asymmetric)


def _cut(d: Described, layer: Layer) -> tuple[int, int]:
    """(in how many parts out_features are cut, in how many in_features). A head of keys is copied, not cut."""
    if layer.leaf in ROW:
        return 1, d.tp
    if layer.leaf not in COLUMN:
        return 1, 1
    heads = d.text.get("num_key_value_heads")
    copied = layer.leaf in ("k_proj", "v_proj") and isinstance(heads, int)
    return (min(d.tp, heads) if copied and heads else d.tp), 1


# Layers that engines make one of -------------------------------------------------------------------------------------


def fused_schemes(d: Described) -> Iterator[Problem]:
    """vLLM, compressed_tensors.py get_scheme: the parts of qkv_proj and of gate_up_proj must match one scheme.

    SGLang and TensorRT-LLM fuse the same layers.
    """
    found = []
    for group in d.fused():
        schemes = {(x.scheme, x.layout) for x in group if x.packed}
        if len(schemes) > 1:
            what = ", ".join(f"{x.leaf} {ct.words(x.scheme) if x.scheme else 'dense'}" for x in group)
            found.append((group[0], f"is fused with others of another scheme: {what}"))
    for where, what in gather(found):
        yield Problem("error", where, what, "give them one scheme by a rule")


def fused_all_or_none(d: Described) -> Iterator[Problem]:
    """vLLM, compressed_tensors/utils.py should_ignore_layer: of a fused layer all parts are ignored, or none."""
    found = []
    for group in d.fused():
        dense = [x.leaf for x in group if not x.packed]
        if dense and len(dense) < len(group):
            packed = [x.leaf for x in group if x.packed]
            found.append(
                (group[0], f"{', '.join(dense)} stays dense, but {', '.join(packed)} does not; they are fused")
            )
    for where, what in gather(found):
        yield Problem("error", where, what, "quantize all of them or none")


def fused_scales(d: Described) -> Iterator[Problem]:
    """vLLM, compressed_tensors_w4a4_nvfp4.py, _w8a8_fp8.py: of several scales of whole tensors the largest is taken.

    Weights per tensor are then rounded a second time; NVFP4 weights are simply off.
    """
    found = []
    for group in d.fused():
        for scale in ("weight_global_scale", "input_global_scale", "weight_scale", "input_scale", "weight_scale_2"):
            if scale == "weight_scale" and any(
                x.scheme is None or x.scheme.weights.strategy != "tensor" for x in group
            ):
                continue
            values = [d.values.get(f"{x.name}.{scale}") for x in group]
            numbers = [float(v.float()) for v in values if v is not None and v.numel() == 1]
            if len(set(numbers)) > 1:
                found.append((group[0], scale, f"{min(numbers):.4g} to {max(numbers):.4g}"))
    for scale in sorted({scale for _, scale, _ in found}):
        alike = [(layer, span) for layer, name, span in found if name == scale]
        yield Problem(
            "warning",
            many([layer.name for layer, _ in alike]),
            f"{scale} differs from those of the layers that it is fused with: {alike[0][1]}",
            "quantize them with one scale",
        )


def experts_alike(d: Described) -> Iterator[Problem]:
    """vLLM, compressed_tensors_moe.py: the scheme of expert 0 is taken for all experts of a layer."""
    mixtures: dict[str, list[Layer]] = {}
    for x in d.layers.values():
        if x.expert:
            mixtures.setdefault(x.name.partition(".experts.")[0], []).append(x)
    for owner, experts in mixtures.items():
        if len({(x.packed, x.scheme, x.layout) for x in experts}) > 1:
            packed = sum(x.packed for x in experts)
            yield Problem(
                "error",
                f"{owner}.experts",
                f"{packed} of {len(experts)} layers are quantized, not all by one scheme",
                "give all experts of a layer one scheme",
            )


def experts_of_gpt_oss(d: Described) -> Iterator[Problem]:
    """vLLM, gpt_oss.py load_weights: experts in one tensor; a tensor each is what its pull request 29315 reads."""
    apart = [x for x in d.quantized if x.expert and d.config.get("model_type") == "gpt_oss"]
    if apart:
        what = "is one expert's: gpt-oss' loader reads those of all experts in one tensor, in many versions only so"
        yield Problem("warning", many([x.name for x in apart]), what, "try the version that you deploy first")


def tied_head(d: Described) -> Iterator[Problem]:
    """Engines take the embedding for a tied head (tie_weights; vLLM's models): packed tensors have no place."""
    for x in d.layers.values():
        if x.packed and x.leaf == "lm_head" and d.tied:
            yield Problem("error", x.name, "is quantized, but tied to the embedding", "leave lm_head dense")


# Groups, blocks and tensor parallel ----------------------------------------------------------------------------------


def groups_divide(d: Described) -> Iterator[Problem]:
    """vLLM, compressed_tensors_wNa16.py: the group size divides input_size_per_partition; MoE, and SGLang, likewise.

    Zero points are packed along out_features, so their parts must be whole words too.
    """
    found = []
    for x in d.quantized:
        if x.shape is None or x.scheme is None:
            continue
        (rows, columns), (n, k) = _cut(d, x), x.shape
        split = f" over {d.tp} GPUs" if d.tp > 1 else ""
        size = x.scheme.weights.group_size or 1
        if k % columns or k // columns % size:
            found.append((x, f"in_features {k}{split} is not divided by groups of {size}"))
        if n % rows:
            found.append((x, f"out_features {n} is not divided{split}"))
        elif rows > 1 and _packs_rows(x) and n // rows * _bits(x) % 32:
            found.append((x, f"zero points of {n // rows} rows of {_bits(x)} bits do not fill whole words{split}"))
        packs = x.layout in ("pack-quantized", "gptq")
        if columns > 1 and packs and k % columns == 0 and k // columns * _bits(x) % 32:
            found.append((x, f"{k // columns} columns of {_bits(x)} bits do not fill whole words{split}"))
    for where, what in gather(found):
        yield Problem("error", where, what, "use another group size or --tp, or leave the layer dense")


def marlin_shapes(d: Described) -> Iterator[Problem]:
    """vLLM, marlin_utils.py: Marlin needs N % 64, K % 128, groups of -1, 32, 64 or 128; SGLang uses it as well."""
    found = []
    for x in d.quantized:
        if x.layout not in ("pack-quantized", "gptq", "awq") or x.shape is None or x.scheme is None:
            continue
        if x.scheme.activations is not None or _bits(x) not in (4, 8):
            continue
        rows, columns = _cut(d, x)
        n, k = x.shape[0] // rows, x.shape[1] // columns
        if n % 64 or k % 128 or x.scheme.weights.group_size not in (None, 32, 64, 128):
            found.append((x, f"{n} x {k} in groups of {x.scheme.weights.group_size or k} does not fit Marlin"))
    for where, what in gather(found):
        yield Problem("warning", where, what, "another kernel may take it, or none; N % 64 and K % 128 fit")


def _blocks(d: Described) -> Iterator[tuple[Layer, tuple[int, int], tuple[int, int]]]:
    for x in d.quantized:
        if x.scheme and x.shape and x.scheme.weights.block_shape and x.scheme.weights.number == "fp8_e4m3":
            yield x, x.shape, x.scheme.weights.block_shape


def fp8_blocks_of_rows(d: Described) -> Iterator[Problem]:
    """vLLM, fp8_utils.py validate_fp8_block_shape: parts of a fused or split layer are whole blocks, but for the last.

    Of a layer that is split over GPUs, all of them are.
    """
    ends = {group[-1].name for group in d.fused()}
    inside = {x.name for group in d.fused() for x in group}
    found, ragged = [], []
    for x, (n, k), (bn, bk) in _blocks(d):
        rows, columns = _cut(d, x)
        parts = _parts(d, x)
        split = f" over {d.tp} GPUs" if d.tp > 1 else ""
        checked = parts if rows > 1 or (x.name in inside and x.name not in ends) else parts[:-1]
        bad = [part for part in checked if part % rows or part // rows % bn]
        if bad:
            found.append(
                (x, f"out_features {bad[0]}{split} is not a multiple of {bn}, and the layer is fused or split")
            )
        elif columns > 1 and (k % columns or k // columns % bk):
            found.append((x, f"in_features {k}{split} is not a multiple of {bk}"))
        elif n % bn or k % bk:
            ragged.append((x, f"{n} x {k} ends in a part of a block of {bn} x {bk}"))
    for where, what in gather(found):
        yield Problem("error", where, what, "use FP8_DYNAMIC for it, or leave the fused layers dense")
    for where, what in gather(ragged):
        yield Problem("warning", where, what, "not every kernel takes it; use FP8_DYNAMIC to be sure")


def _parts(d: Described, layer: Layer) -> list[int]:
    """Rows of what an engine sees as parts of one layer, for those that are one on disk already."""
    assert layer.shape is not None
    n = layer.shape[0]
    if layer.leaf == "gate_up_proj":
        return [n // 2, n // 2]
    heads, keys = d.text.get("num_attention_heads"), d.text.get("num_key_value_heads")
    if layer.leaf == "qkv_proj" and isinstance(heads, int) and isinstance(keys, int):
        head = n // (heads + 2 * keys)
        return [heads * head, keys * head, keys * head]
    return [n]


def fp8_blocks_ragged(d: Described) -> Iterator[Problem]:
    """SGLang and TensorRT-LLM: blocks are 128 x 128, and their kernels are made for whole ones."""
    found = [
        (x, f"{n} x {k} ends in a part of a block of {bn} x {bk}")
        for x, (n, k), (bn, bk) in _blocks(d)
        if n // _cut(d, x)[0] % bn or k // _cut(d, x)[1] % bk
    ]
    for where, what in gather(found):
        yield Problem("warning", where, what, "use FP8_DYNAMIC for it, or leave it dense")


def fp8_blocks_exact(d: Described) -> Iterator[Problem]:
    """transformers, integrations/finegrained_fp8.py Fp8Dequantize: the block is rows // scale rows, wrong when ragged.

    compressed-tensors, forward.py: inputs in groups of 128 must divide in_features; ragged rows are right there.
    """
    found = [
        (x, f"{n} x {k} is not a multiple of the block {bn} x {bk}: it loads wrong, or raises")
        for x, (n, k), (bn, bk) in _blocks(d)
        if k % bk or (d.format != _CT and n % bn)
    ]
    for where, what in gather(found):
        yield Problem("error", where, what, "use FP8_DYNAMIC for it, or leave it dense")
