"""SGLang: its compressed-tensors code descends from vLLM's; one format for all groups, fewer schemes."""

from __future__ import annotations

from quantkit.lint import rules_config as config
from quantkit.lint import rules_layers as layers
from quantkit.lint import rules_tensors as tensors
from quantkit.lint.described import Described, Layer, Rule
from quantkit.lint.rules_layers import Verdict, error, warning


def held(d: Described, x: Layer) -> Verdict | None:
    """SGLang, layers/quantization/compressed_tensors/compressed_tensors.py; modelopt_quant.py; gptq.py."""
    assert x.scheme is not None
    w, a = x.scheme.weights, x.scheme.activations
    if d.format == "modelopt" and (w.number == "int4" or a is None):
        return error(f"ModelOpt is loaded with FP8 or NVFP4, not as {layers.words(x)}", "use compressed-tensors")
    if d.format == "gptq" and x.expert and not (w.symmetric and w.number in ("int4", "int8")):
        return error("experts of GPTQ are loaded by Marlin alone: symmetric, 4 or 8 bits", "use W4A16")
    if x.layout == "pack-quantized":
        if a is not None or w.strategy == "tensor" or w.number not in ("int4", "int8"):
            return error(f"{layers.words(x)} has no kernel; int4 and int8 weights alone have", "use W4A16 or W8A16")
        if not w.symmetric:
            return warning("asymmetric integers need a recent version", "use W4A16 for earlier ones")
    elif x.layout in ("int-quantized", "naive-quantized") and w.number.startswith("int"):
        if (w.number, a.number if a else None) != ("int8", "int8") or w.strategy == "group":
            return error(f"{layers.words(x)} has no kernel", "use W8A8")
        if x.expert:
            return error("experts of int8 with int8 inputs raise on a GPU", "use FP8_DYNAMIC or W4A16")
    elif x.layout == "naive-quantized" and w.strategy != "tensor":
        return warning(f"FP8 weights alone per {w.strategy} were seen to raise in one version", "use FP8_DYNAMIC")
    elif x.layout == "nvfp4-pack-quantized" and a is None:
        return error("NVFP4 weights alone are not loaded", "use NVFP4, which quantizes inputs too")
    elif x.layout.startswith(("mxfp", "nvfp4")) and not (w.number == "nvfp4" and a and a.number == "nvfp4"):
        return error(f"{x.layout} has no branch in its dispatch", "use NVFP4 or FP8_DYNAMIC")
    elif x.layout == "float-quantized" and (w.strategy == "group" or (a and a.number != "fp8_e4m3")):
        return error(f"{layers.words(x)} has no kernel", "use FP8_DYNAMIC or FP8_BLOCK")
    return None


# Nothing is known of it.
SIGNED_SCALES = False

RULES: tuple[Rule, ...] = (
    layers.support(held),
    layers.fused_schemes,
    layers.fused_all_or_none,
    layers.fused_scales,
    layers.experts_alike,
    layers.tied_head,
    layers.groups_divide,
    layers.marlin_shapes,
    layers.fp8_blocks_ragged,
    tensors.scale_shapes,
    tensors.weight_shape,
    tensors.zero_points,
    tensors.layer_tensors,
    tensors.gptq_zero_points,
    config.schemes_readable,
    layers.as_warning(config.strict_group_keys),
    config.strict_argument_keys,
    config.formats_named,
    config.one_format,
    config.ignore_list,
    config.ignore_names,
    config.kv_cache_scheme,
    config.kv_cache_names,
    config.config_keys,
    config.tokenizer_files,
    config.index_agrees,
    config.tensors_accounted,
)
