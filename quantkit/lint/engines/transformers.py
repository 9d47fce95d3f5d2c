"""transformers as it comes, without quantkit's plugin: unpacks most formats to dense weights."""

from __future__ import annotations

from quantkit.lint import rules_config as config
from quantkit.lint import rules_layers as layers
from quantkit.lint import rules_tensors as tensors
from quantkit.lint.described import Described, Layer, Rule
from quantkit.lint.rules_layers import Verdict, error, warning


def held(d: Described, x: Layer) -> Verdict | None:
    """transformers, quantizers/auto.py, quantizer_compressed_tensors.py: tried on the CPU, dense and with experts."""
    assert x.scheme is not None
    w, a = x.scheme.weights, x.scheme.activations
    if d.format == "modelopt":
        return error(
            "modelopt is unknown: scales are dropped with a warning, weights are wrong", "use compressed-tensors"
        )
    if d.format in ("gptq", "awq"):
        needs = "optimum and gptqmodel" if d.format == "gptq" else "gptqmodel"
        return warning(f"{d.format} is loaded where {needs} is installed", "use compressed-tensors to need neither")
    asymmetric = x.layout == "pack-quantized" and not w.symmetric
    if x.expert and d.format == "compressed-tensors":
        if w.number == "nvfp4":
            return error("experts of NVFP4 load without a word, and wrong", "use W4A16 or FP8_DYNAMIC for experts")
        integer = w.number == "int8" and a is not None
        if asymmetric or integer or w.strategy == "block" or w.number == "mxfp8_e4m3":
            return error(f"experts of {layers.words(x)} raise", "use symmetric W4A16 or FP8_DYNAMIC for experts")
    if asymmetric:
        return warning(
            "packed asymmetric integers do not load by default", "import quantkit before, or load with dequantize=True"
        )
    return None


# compressed-tensors decompresses by a product, and so do quantkit's own layers.
SIGNED_SCALES = True

RULES: tuple[Rule, ...] = (
    layers.support(held),
    layers.tied_head,
    layers.groups_divide,
    layers.fp8_blocks_exact,
    tensors.scale_shapes,
    tensors.weight_shape,
    layers.as_warning(tensors.zero_points),
    tensors.layer_tensors,
    tensors.gptq_zero_points,
    config.schemes_readable,
    config.strict_group_keys,
    config.strict_argument_keys,
    config.packed_status,
    config.formats_named,
    config.ignore_list,
    config.dense_lists,
    config.kv_cache_ignored,
    config.config_keys,
    config.tokenizer_files,
    config.index_agrees,
    config.tensors_accounted,
)
