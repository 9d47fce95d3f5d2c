"""Rules about config.json and the files of the folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quantkit import patterns
from quantkit.lint.described import Described, Problem, many

_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_ARGS_KEYS = {
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"),
    *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
}
_ARGS = ("weights", "input_activations", "output_activations")
_CT = "compressed-tensors"


def _groups(d: Described) -> Iterator[tuple[str, Mapping[str, Any]]]:
    groups = d.quantization.get("config_groups") if d.format == _CT else None
    for name, group in (groups or {}).items() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping):
            yield f"config_groups.{name}", group


def schemes_readable(d: Described) -> Iterator[Problem]:
    """What quantkit cannot read it cannot check either. Source: quantkit.formats, `read_config`."""
    if d.unread is not None:
        yield Problem(
            "warning", "quantization_config", f"quantkit cannot read it: {d.unread}", "the layers were not checked"
        )


def strict_group_keys(d: Described) -> Iterator[Problem]:
    """compressed-tensors, quant_scheme.py: QuantizationScheme forbids unknown keys (pydantic, extra=forbid).

    transformers validates whole groups with it.
    """
    for where, group in _groups(d):
        for key in sorted(group.keys() - _GROUP_KEYS):
            yield Problem("error", f"{where}.{key}", "is a key that compressed-tensors forbids in a group", "remove it")


def strict_argument_keys(d: Described) -> Iterator[Problem]:
    """compressed-tensors, quantization/quant_args.py: QuantizationArgs forbids unknown keys (pydantic, extra=forbid).

    transformers, vLLM and SGLang validate each `weights` and `input_activations` with it.
    """
    for where, group in _groups(d):
        for part in _ARGS:
            given = group.get(part)
            for key in sorted(given.keys() - _ARGS_KEYS) if isinstance(given, Mapping) else ():
                yield Problem(
                    "error", f"{where}.{part}.{key}", "is a key that compressed-tensors forbids there", "remove it"
                )


def packed_status(d: Described) -> Iterator[Problem]:
    """transformers, quantizers/quantizer_compressed_tensors.py: packed tensors are expected when status is compressed.

    compressed-tensors infers the format of a group from its scheme when neither it nor the top level names one.
    """
    if d.format != _CT:
        return
    status = d.quantization.get("quantization_status")
    if status != "compressed":
        yield Problem(
            "error", "quantization_status", f"is {status!r}, so dense tensors are expected", "set it to 'compressed'"
        )


def formats_named(d: Described) -> Iterator[Problem]:
    """compressed-tensors, config/format.py: `mixed-precision` is a format of the top level; each group has its own.

    Where no format is named it is inferred, and int-quantized wins for any integer with quantized inputs.
    """
    top = d.quantization.get("format")
    for where, group in _groups(d):
        own = group.get("format")
        if own == "mixed-precision" or (own is None and top in (None, "mixed-precision", "dense")):
            yield Problem("error", f"{where}.format", f"is {own!r}, under {top!r}", "name the format of the group")


def no_sparsity(d: Described) -> Iterator[Problem]:
    """vLLM, compressed_tensors.py: a `sparsity_config` that is not empty raises."""
    given = d.quantization.get("sparsity_config") if d.format == _CT else None
    if given:
        yield Problem("error", "sparsity_config", "is set, and the engine raises", "leave it out")


def explicit_strategies(d: Described) -> Iterator[Problem]:
    """TensorRT-LLM, models/quant_config_utils.py: `strategy` and `group_size` are read as keys that must be there."""
    for where, group in _groups(d):
        for part in ("weights", "input_activations"):
            given = group.get(part)
            if isinstance(given, Mapping) and not given.get("strategy"):
                yield Problem("error", f"{where}.{part}.strategy", "is not set", "write the strategy")
        weights = group.get("weights")
        if isinstance(weights, Mapping) and "group_size" not in weights:
            yield Problem("error", f"{where}.weights.group_size", "is not set", "write it, null for none")


def targets_by_name(d: Described) -> Iterator[Problem]:
    """TensorRT-LLM, models/quant_config_utils.py: with several groups, a target that is a class name raises."""
    groups = list(_groups(d))
    for where, group in groups if len(groups) > 1 else ():
        targets = group.get("targets")
        for target in targets if isinstance(targets, list) else ():
            if isinstance(target, str) and not target.startswith("re:") and target not in d.layers:
                yield Problem(
                    "error",
                    f"{where}.targets",
                    f"has {target!r}, which is no layer",
                    "name layers, or use re: patterns",
                )


def one_format(d: Described) -> Iterator[Problem]:
    """SGLang, layers/quantization/compressed_tensors: the format of the top level is taken for every group."""
    found = sorted({str(g.get("format") or d.quantization.get("format")) for _, g in _groups(d)})
    if len(found) > 1 or (found and d.quantization.get("format") == "mixed-precision"):
        yield Problem(
            "warning",
            "format",
            f"groups have {' and '.join(found)}, but the engine takes {d.quantization.get('format')!r} for all; "
            "it fails, or leaves inputs as they are",
            "use schemes of one format",
        )


def ignore_list(d: Described) -> Iterator[Problem]:
    """vLLM, compressed_tensors/utils.py should_ignore_layer; ModelOpt's fix for routers, which are not nn.Linear.

    The target "Linear" takes every linear layer and router that is not ignored: a dense one is then loaded as packed.
    """
    if d.unread is not None:
        return
    exact, ignored = _ignored(d)
    dense = [x.name for x in d.layers.values() if not x.packed]
    if d.format == _CT:
        forgotten = [n for n in dense if n not in exact and not any(patterns.matches(p, n) for p in ignored)]
    else:
        forgotten = [n for n in dense if d.says_packed(n)]
    if forgotten:
        key = "ignore" if d.format == _CT else "the list of dense modules"
        yield Problem(
            "warning" if d.format in ("gptq", "awq") else "error",  # of those, engines look at the dtypes on disk too
            many(forgotten),
            f"is dense on disk, and not in {key}",
            "add the exact name",
        )
    wrong = [x.name for x in d.layers.values() if x.packed and not d.says_packed(x.name)]
    if wrong:
        yield Problem("error", many(wrong), "is quantized on disk, and dense by the config", "take it out of the list")


def _ignored(d: Described) -> tuple[set[str], list[str]]:
    ignore = d.quantization.get("ignore")
    given = [x for x in ignore if isinstance(x, str)] if isinstance(ignore, list) else []
    return {x for x in given if not x.startswith("re:")}, [x[3:] for x in given if x.startswith("re:")]


def ignore_names(d: Described) -> Iterator[Problem]:
    """vLLM, compressed_tensors/utils.py: an entry of `ignore` is a whole name or `re:`, no class or part."""
    if d.format != _CT or d.unread is not None or d.no_model is not None:
        return
    exact, _ = _ignored(d)
    if stray := sorted(x for x in exact if x not in d.layers and x not in d.modules):
        yield Problem(
            "warning", f"ignore: {many(stray)}", "is the name of no module", "write whole names, or re: patterns"
        )


def dense_lists(d: Described) -> Iterator[Problem]:
    """transformers and TensorRT-LLM read `modules_to_not_convert` of an fp8 config; `ignored_layers` is vLLM's."""
    if d.format != "fp8-block" or d.unread is not None:
        return
    theirs, vllm = (d.quantization.get(key) or [] for key in ("modules_to_not_convert", "ignored_layers"))
    if vllm and sorted(theirs) != sorted(vllm):
        yield Problem(
            "error",
            "modules_to_not_convert",
            f"has {len(theirs)} names, ignored_layers {len(vllm)}; the engine reads the first alone",
            "make both the same",
        )


def kv_cache_scheme(d: Described) -> Iterator[Problem]:
    """vLLM, compressed_tensors.py, KV cache: static float of 8 bits, symmetric, per tensor or attn_head."""
    given = d.quantization.get("kv_cache_scheme") if d.format == _CT else None
    if not isinstance(given, Mapping):
        return
    what = (given.get("type"), given.get("num_bits"), given.get("symmetric", True), bool(given.get("dynamic")))
    if what != ("float", 8, True, False) or given.get("strategy", "tensor") not in ("tensor", "attn_head"):
        yield Problem(
            "error",
            "kv_cache_scheme",
            f"is {what[0]}{what[1]} per {given.get('strategy')}, {'dynamic' if what[3] else 'static'}",
            "use static float 8, symmetric, per tensor or attn_head",
        )


def kv_cache_scales(d: Described) -> Iterator[Problem]:
    """vLLM, model_loader/weight_utils.py: a k_scale or v_scale that is not there is taken for 1."""
    if not d.quantization.get("kv_cache_scheme"):
        return
    attentions = [x.name.rpartition(".")[0] for x in d.layers.values() if x.leaf in ("k_proj", "qkv_proj")]
    lacking = [
        owner
        for owner in attentions
        if not all(
            any(
                f"{owner}.{name.format(s)}" in d.specs
                for name in ("{0}_scale", "{0}_proj.{0}_scale", "{0}_proj.output_scale")
            )
            for s in "kv"
        )
    ]
    if lacking:
        yield Problem("warning", many(lacking), "has no k_scale and v_scale; 1 is taken", "calibrate the KV cache")


def kv_cache_names(d: Described) -> Iterator[Problem]:
    """SGLang, layers/quantization/compressed_tensors: only the name k_proj.output_scale was seen to be read."""
    if d.quantization.get("kv_cache_scheme") and any(name.endswith(".k_scale") for name in d.specs):
        yield Problem(
            "warning",
            "kv_cache_scheme",
            "the engine may not find k_scale and v_scale",
            "compare its output with and without",
        )


def kv_cache_ignored(d: Described) -> Iterator[Problem]:
    """transformers, quantizer_compressed_tensors.py: scales are kept, the cache stays in the model's dtype."""
    if d.quantization.get("kv_cache_scheme"):
        yield Problem(
            "warning", "kv_cache_scheme", "the KV cache stays in the model's dtype", "expect no smaller cache there"
        )


def config_keys(d: Described) -> Iterator[Problem]:
    """vLLM, config/model.py: `architectures` and `model_type` of config.json choose the model."""
    for key in ("architectures", "model_type"):
        if not d.config.get(key):
            yield Problem("error", f"config.json: {key}", "is missing", "copy it from the original model")


def tokenizer_files(d: Described) -> Iterator[Problem]:
    """Engines load the tokenizer from the same folder: tokenizer.json or .model, and tokenizer_config.json."""
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & d.files:
        yield Problem("warning", "tokenizer.json", "is not in the folder", "copy the original's tokenizer files")
    elif "tokenizer_config.json" not in d.files:
        yield Problem("warning", "tokenizer_config.json", "is not in the folder", "copy it from the original model")


def index_agrees(d: Described) -> Iterator[Problem]:
    """vLLM, model_loader/weight_utils.py: with an index, files and tensors that it does not name are not read."""
    if d.index is None:
        return
    named = set(d.index.values())
    if stray := sorted(f for f in d.files if f.endswith(".safetensors") and f not in named):
        yield Problem(
            "error", many(stray), "is not in the index, so it is not read", "remove it, or make the index anew"
        )
    lost = sorted(name for names in d.shards.values() for name in names if name not in d.index)
    if lost:
        yield Problem("error", many(lost), "is in a shard, but not in the index", "make the index anew")


def tensors_accounted(d: Described) -> Iterator[Problem]:
    """transformers, modeling_utils.py: what is missing is made up at random; engines refuse tensors without a place."""
    if d.no_model is not None:
        yield Problem("warning", "config.json", d.no_model, "tensors were not compared with the model's")
    if d.missing:
        yield Problem("error", many(d.missing), "is in no shard", "write the folder again from the original")
    if d.left_over:
        yield Problem(
            "warning",
            many(d.left_over),
            "has no place in the model of config.json",
            "remove it, if it is no extra head",
        )
