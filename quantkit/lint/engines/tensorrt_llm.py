"""TensorRT-LLM, its PyTorch backend: ModelOpt's dialect, and a part of compressed-tensors."""

from __future__ import annotations

from quantkit.lint import rules_config as config
from quantkit.lint import rules_layers as layers
from quantkit.lint import rules_tensors as tensors
from quantkit.lint.described import Described, Layer, Rule
from quantkit.lint.rules_layers import Verdict, error


def held(d: Described, x: Layer) -> Verdict | None:
    """TensorRT-LLM, models/quant_config_utils.py for compressed-tensors; _torch/model_config.py for the others."""
    assert x.scheme is not None
    w, a = x.scheme.weights, x.scheme.activations
    if d.format in ("gptq", "awq"):
        return error(f"{d.format} has no branch in its config loader", "export.format modelopt, W4A16, is loaded")
    if d.format == "fp8-block" and w.block_shape != (128, 128):
        return error(f"blocks are {w.block_shape}, and must be 128 x 128", "use blocks of 128 x 128")
    if d.format != "compressed-tensors":
        return None
    pair = (w.strategy, None if a is None else a.strategy)
    if w.number == "int8" and a is not None:
        return error("int8 is taken for FP8: its parser looks at the bits, not at the type", "use FP8_DYNAMIC")
    if w.number.startswith("int"):
        what = f"{layers.words(x)} is not loaded from compressed-tensors"
        return error(what, "use FP8_DYNAMIC or NVFP4, or export.format modelopt for int4")
    if w.number == "fp8_e4m3":
        if pair == ("channel", "token") or (pair == ("block", "group") and w.block_shape == (128, 128)):
            return None
        return error(f"{layers.words(x)} is not loaded", "use FP8_DYNAMIC or FP8_BLOCK")
    if w.number == "nvfp4" and (a is None or a.number != "nvfp4"):
        return error(
            "NVFP4 weights alone are not loaded from compressed-tensors", "use NVFP4, or export.format modelopt"
        )
    if w.number.startswith("mx") and (w.number != "mxfp4" or a is not None):
        return error(f"{layers.words(x)} is not loaded from compressed-tensors", "use MXFP4A16 or FP8_DYNAMIC")
    return None


# Nothing is known of it.
SIGNED_SCALES = False

RULES: tuple[Rule, ...] = (
    layers.support(held),
    layers.fused_schemes,
    layers.fused_all_or_none,
    layers.fused_scales,
    layers.tied_head,
    layers.groups_divide,
    layers.fp8_blocks_ragged,
    tensors.scale_shapes,
    tensors.layer_tensors,
    config.schemes_readable,
    config.explicit_strategies,
    config.targets_by_name,
    config.ignore_list,
    config.ignore_names,
    config.dense_lists,
    config.kv_cache_scheme,
    config.config_keys,
    config.tokenizer_files,
    config.index_agrees,
    config.tensors_accounted,
)
