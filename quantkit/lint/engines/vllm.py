"""vLLM: reads almost everything; fuses q/k/v and gate/up; matches names exactly."""

from __future__ import annotations

from quantkit.lint import rules_config as config
from quantkit.lint import rules_layers as layers
from quantkit.lint import rules_tensors as tensors
from quantkit.lint.described import Described, Layer, Rule
from quantkit.lint.rules_layers import Verdict, error, warning


def held(d: Described, x: Layer) -> Verdict | None:
    """vLLM, compressed_tensors.py: the order in which schemes are chosen; modelopt.py QUANT_ALGOS."""
    assert x.scheme is not None
    w, a = x.scheme.weights, x.scheme.activations
    inputs = None if a is None else a.number
    if d.format == "modelopt" and w.number == "int4":
        return error("ModelOpt's W4A16_AWQ is not loaded", "use compressed-tensors W4A16, which is")
    if x.layout == "pack-quantized":
        return _integers(x)
    if x.layout == "mxfp6-pack-quantized":
        return error("mxfp6-pack-quantized has no branch in its dispatch", "use MXFP4, MXFP8 or NVFP4")
    if x.layout in ("int-quantized", "naive-quantized") and w.number.startswith("int"):
        if a is None:
            return error("integers that are not packed have no kernel", "write them pack-quantized")
        if inputs == "fp8_e4m3":
            return None  # w4afp8_packed speaks of it
        if w.number == "int4" and inputs == "int8":
            return warning("int4 weights with int8 inputs have a kernel on ARM processors alone", "use W8A8 or W4AFP8")
        if (w.number, inputs) != ("int8", "int8") or w.strategy == "group":
            return error(f"{layers.words(x)} has no kernel", "use W8A8")
    elif w.number == "fp8_e4m3" and x.layout in ("float-quantized", "naive-quantized"):
        if w.strategy == "group" or inputs not in (None, "fp8_e4m3"):
            return error(f"{layers.words(x)} has no kernel", "use FP8_DYNAMIC or FP8_BLOCK")
        if a is not None and w.strategy == "block" and not a.dynamic:
            return error("blocks with static inputs have no kernel", "use FP8_BLOCK")
    elif inputs not in (None, w.number) and x.layout in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        return warning(
            f"the kernel is chosen by the {w.number} weights; inputs may not become {inputs}", "use MXFP4 or NVFP4"
        )
    return None


def _integers(x: Layer) -> Verdict | None:
    assert x.scheme is not None
    w, a = x.scheme.weights, x.scheme.activations
    if w.strategy not in ("group", "channel"):
        return error("packed integers with one scale for the tensor have no kernel", "use group or channel")
    if a is not None and a.number == "fp8_e4m3":
        if (w.number, w.strategy, w.symmetric, a.strategy) != ("int4", "group", True, "token"):
            return error(f"{layers.words(x)} has no kernel", "use W4AFP8")
        return warning("int4 weights with FP8 inputs have a kernel for Hopper GPUs (sm90) alone", "use W4A16 elsewhere")
    if w.number in ("int4", "int8"):
        return None
    if not w.symmetric:
        return error(f"asymmetric {w.number} has no kernel; int4 and int8 have", "make it symmetric, or use W4A16_ASYM")
    if x.expert:
        return error(f"experts of {w.number} have no kernel; int4 and int8 have", "use W4A16 or W8A16")
    return warning(
        f"{w.number} needs a version of 2026; earlier ones have int4 and int8", "use W4A16 or W8A16 for others"
    )


# Marlin multiplies by the scale as it is; its W4A8 path takes scales as unsigned (vllm issue 48905).
SIGNED_SCALES = True

RULES: tuple[Rule, ...] = (
    layers.support(held),
    tensors.w4afp8_packed,
    layers.fused_schemes,
    layers.fused_all_or_none,
    layers.fused_scales,
    layers.experts_alike,
    layers.experts_of_gpt_oss,
    layers.tied_head,
    layers.groups_divide,
    layers.marlin_shapes,
    layers.fp8_blocks_of_rows,
    tensors.scale_shapes,
    tensors.weight_shape,
    tensors.zero_points,
    tensors.layer_tensors,
    tensors.gptq_zero_points,
    config.schemes_readable,
    layers.as_warning(config.strict_group_keys),
    config.strict_argument_keys,
    config.formats_named,
    config.no_sparsity,
    config.ignore_list,
    config.ignore_names,
    config.kv_cache_scheme,
    config.kv_cache_scales,
    config.config_keys,
    config.tokenizer_files,
    config.index_agrees,
    config.tensors_accounted,
)
