"""ModelOpt: NVIDIA's dialect, read by TensorRT-LLM, vLLM and SGLang. transformers does not read it.

    quant_algo      tensors of a weight (N, K)
    FP8             weight float8_e4m3fn (N, K); weight_scale, input_scale float32 0-d
                                                                        w = weight * weight_scale
    NVFP4           weight uint8 (N, K / 2), two codes a byte, the even column in the low nibble;
                    weight_scale float8_e4m3fn (N, K / 16); weight_scale_2, input_scale float32 0-d
                                                                        w = value * weight_scale * weight_scale_2
    W4A16_NVFP4     the same without input_scale; TensorRT-LLM and vLLM
    W4A16_AWQ       weight uint8 (N / 2, K): rows 2 r and 2 r + 1 in the nibbles of a byte, two's complement, the even
                    one low; weight_scale float32 (N, K / g); pre_quant_scale float32 (K,) of ones. TensorRT-LLM alone

compressed-tensors' global scales divide, ModelOpt's weight_scale_2 and input_scale multiply: one is the other's
reciprocal. Codes and group scales are the same bytes in both. A reciprocal is rounded to float32: what is written here
reads back and is written again to the same bytes, and another tool's weight_scale_2 comes back off by at most one in
the last place, 17 times in 100.

pre_quant_scale multiplies the input of a layer, where AWQ's scaling is not folded into the layer before. Ours always
is; it is written because TensorRT-LLM's loader asks for it in every linear that it does not fuse. One that is not all
ones is read into the scales, a scale for each column.

0-d is what ModelOpt writes; (1,) is read as well. The config is in two places: hf_quant_config.json, and
`quantization_config` of config.json in a flat shape. Both name modelopt as the producer: SGLang knows the dialect by
that. Source: ModelOpt's export code and TensorRT-LLM's loader, by formulas (tests/test_format_modelopt.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from quantkit import numerics
from quantkit.errors import InputError
from quantkit.formats._shared import (
    FLOAT,
    Override,
    ReadConfig,
    Unsupported,
    by_column,
    check,
    dense,
    fits,
    integer,
    one_scheme,
    pack_pairs,
    reading,
    scalar,
    strings,
    unpack_pairs,
)
from quantkit.types import QParams, QuantizedTensor, Scheme, TensorScheme, TensorSpec

QUANT_METHOD = "modelopt"
MARKER = "weight_scale"
SCALE_DTYPE = "F32"
CONFIG_FILE = "hf_quant_config.json"
PRODUCER = {"name": "modelopt", "version": "0.47.0"}  # the dialect, and the version of it that is described above
GROUP_SIZES = (64, 128)  # TensorRT-LLM's int4 kernels

FP8 = TensorScheme("fp8_e4m3", "tensor")
NVFP4 = TensorScheme("nvfp4", "group", 16)
INT4 = TensorScheme("int4", "group", 128)
ALGOS = {
    "FP8": Scheme(FP8, FP8),
    "NVFP4": Scheme(NVFP4, replace(NVFP4, dynamic=True)),
    "W4A16_NVFP4": Scheme(NVFP4),
    "W4A16_AWQ": Scheme(INT4),
}


def _algo(scheme: Scheme) -> str:
    """The quant_algo of a scheme. Raises InputError when there is none."""
    w = scheme.weights
    plain = (
        Scheme(replace(w, group_size=128), scheme.activations)
        if w.number == "int4" and w.strategy == "group"
        else scheme
    )
    for name, held in ALGOS.items():
        if held == plain:
            if name == "W4A16_AWQ" and w.group_size not in GROUP_SIZES:
                known = " and ".join(map(str, GROUP_SIZES))
                raise InputError(
                    f"modelopt: group_size {w.group_size} of int4 cannot be written; its reader has {known}"
                )
            return name
    a = scheme.activations
    what = f"{w.number} weights per {w.strategy}, {'symmetric' if w.symmetric else 'asymmetric'}"
    what += f", with {'dynamic' if a.dynamic else 'static'} {a.number} activations per {a.strategy}" if a else " alone"
    raise InputError(f"modelopt: {what} cannot be written; held: {', '.join(ALGOS)}")


def tensors(shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
    """Every tensor that a linear layer (N, K) has on disk, bias apart. `dtype`, the model's, plays no part.

    Raises InputError for a scheme that is not held, or a shape that it does not divide.
    """
    algo, (n, k) = _algo(scheme), shape
    groups = numerics.groups(scheme.weights, k)
    number = TensorSpec("F32", ())
    if algo == "FP8":
        return {"weight": TensorSpec("F8_E4M3", shape), "weight_scale": number, "input_scale": number}
    if algo == "W4A16_AWQ":
        if n % 2:
            raise InputError(
                f"modelopt: out_features {n} is odd, and two rows of int4 share a byte; leave the layer dense"
            )
        return {
            "weight": TensorSpec("U8", (n // 2, k)),
            "weight_scale": TensorSpec("F32", (n, groups)),
            "pre_quant_scale": TensorSpec("F32", (k,)),
        }
    specs = {
        "weight": TensorSpec("U8", (n, k // 2)),
        "weight_scale": TensorSpec("F8_E4M3", (n, groups)),
        "weight_scale_2": number,
    }
    return specs if algo == "W4A16_NVFP4" else {**specs, "input_scale": number}


def pack(
    q: QuantizedTensor, activations: TensorScheme | None = None, inputs: QParams | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a quantized weight, contiguous, as `tensors` lists them.

    activations  the scheme of the layer's input: it takes part in the choice of the algorithm
    inputs       the calibrated scale of the input: `scale_NG` (1, 1) for FP8; `global_scale` (1,), which divides, for
                 NVFP4
    Raises InputError for what `tensors` refuses, or an input scale that is missing.
    """
    scheme = Scheme(q.scheme, activations)
    tensors(q.shape, scheme, "BF16")
    algo, scale = _algo(scheme), q.qparams.scale_NG
    packed: dict[str, torch.Tensor]
    if algo == "FP8":
        weight_scale = fits("modelopt", "weight_scale", scale, torch.float32).reshape(())
        packed = {"weight": q.codes_NK, "weight_scale": weight_scale}
    elif algo == "W4A16_AWQ":
        nibbles = (q.codes_NK.to(torch.int16) & 15).to(torch.uint8)
        if not torch.equal((nibbles.to(torch.int8) ^ 8) - 8, q.codes_NK):
            raise InputError("modelopt: int4 codes are outside -8 to 7")
        packed = {
            "weight": pack_pairs("modelopt", nibbles.t()).t(),
            "weight_scale": fits("modelopt", "weight_scale", scale, torch.float32),
            "pre_quant_scale": torch.ones(q.shape[1], dtype=torch.float32, device=scale.device),
        }
    else:
        if q.qparams.global_scale is None:
            raise InputError("modelopt: nvfp4 weights need a global scale")
        divisor = scalar("modelopt", "global_scale", q.qparams.global_scale)
        packed = {"weight": pack_pairs("modelopt", q.codes_NK), "weight_scale": scale}
        packed["weight_scale_2"] = _reciprocal("weight_scale_2", divisor)
    if activations is not None:
        packed["input_scale"] = _input_scale(activations, inputs)
    return {name: t.contiguous() for name, t in packed.items()}


def _input_scale(activations: TensorScheme, inputs: QParams | None) -> torch.Tensor:
    """What multiplies the codes of the input, float32 0-d."""
    given = None if inputs is None else inputs.global_scale if activations.number == "nvfp4" else inputs.scale_NG
    if given is None:
        raise InputError(f"modelopt: {activations.number} activations need a calibrated input scale")
    value = scalar("modelopt", "input scale", given)
    return _reciprocal("input_scale", value) if activations.number == "nvfp4" else value.reshape(())


def _reciprocal(name: str, value: torch.Tensor) -> torch.Tensor:
    """1 / value as float32 0-d. Raises InputError where that is 0, subnormal or infinite, and so cannot come back."""
    result = 1 / value
    if not bool(torch.isfinite(result) & (result >= torch.finfo(torch.float32).tiny)):
        raise InputError(f"modelopt: {name} is 1 / {float(value):.3g}, which float32 does not have")
    return result.reshape(())


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor:
    """The codes and scales of a layer; the inverse of `pack`. `unpack_input` reads the input's scale.

    A pre_quant_scale that is not all ones gives a scale for each column, and group_size 1 in the scheme of the result.
    Raises InputError for tensors that are missing or do not fit.
    """
    w = scheme.weights
    if "weight" not in tensors or tensors["weight"].ndim != 2:
        raise InputError("modelopt: weight is missing")
    rows, columns = tensors["weight"].shape
    if w.number == "fp8_e4m3":
        check(
            "modelopt",
            tensors,
            {"weight": TensorSpec("F8_E4M3", (rows, columns)), "weight_scale": TensorSpec("F32", ())},
        )
        scale = scalar("modelopt", "weight_scale", tensors["weight_scale"])
        return QuantizedTensor(tensors["weight"], QParams(scale.reshape(1, 1)), w)
    if w.number == "int4":
        return _unpack_int4(tensors, w)
    groups = numerics.groups(w, columns * 2)
    check(
        "modelopt",
        tensors,
        {
            "weight": TensorSpec("U8", (rows, columns)),
            "weight_scale": TensorSpec("F8_E4M3", (rows, groups)),
            "weight_scale_2": TensorSpec("F32", ()),
        },
    )
    divisor = 1 / scalar("modelopt", "weight_scale_2", tensors["weight_scale_2"])
    qparams = QParams(tensors["weight_scale"], None, scalar("modelopt", "1 / weight_scale_2", divisor))
    return QuantizedTensor(unpack_pairs(tensors["weight"]), qparams, w)


def _unpack_int4(tensors: Mapping[str, torch.Tensor], w: TensorScheme) -> QuantizedTensor:
    pairs, k = tensors["weight"].shape
    specs = {
        "weight": TensorSpec("U8", (pairs, k)),
        "weight_scale": TensorSpec(FLOAT, (pairs * 2, numerics.groups(w, k))),
    }
    factor = tensors.get("pre_quant_scale")
    if factor is not None:
        specs["pre_quant_scale"] = TensorSpec(FLOAT, (k,))
    check("modelopt", tensors, specs)
    nibbles = unpack_pairs(tensors["weight"].t()).t()
    codes = ((nibbles.to(torch.int8) ^ 8) - 8).contiguous()
    q = QuantizedTensor(codes, QParams(tensors["weight_scale"]), w)
    if factor is None or bool((factor == 1).all()):
        return q
    return by_column(q, factor_K=factor)


def unpack_input(tensors: Mapping[str, torch.Tensor], activations: TensorScheme | None) -> QParams | None:
    """The calibrated scale of a layer's input; None when there is none. The inverse of `pack`'s `inputs`.

    NVFP4 has a global scale, and a `scale_NG` of shape (1, 0): the others are found at run time.
    Raises InputError for a missing tensor, or one that is not one positive number.
    """
    if activations is None:
        return None
    if "input_scale" not in tensors:
        raise InputError(f"modelopt: input_scale is missing; {activations.number} activations need it")
    value = scalar("modelopt", "input_scale", tensors["input_scale"])
    if activations.number != "nvfp4":
        return QParams(value.reshape(1, 1))
    return QParams(torch.empty(1, 0), None, scalar("modelopt", "1 / input_scale", 1 / value))


def unpack_kv(tensors: Mapping[str, torch.Tensor], scheme: TensorScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales of an FP8 KV cache, keys and values, float32 (1,). Names after the attention layer's own.

    Raises InputError for a missing tensor, or one that is not one positive number.
    """
    found = []
    for side in "kv":
        name = f"{side}_proj.{side}_scale"
        if name not in tensors:
            raise InputError(f"modelopt: {name} is missing; a KV cache of {scheme.number} needs it")
        found.append(scalar("modelopt", name, tensors[name]))
    return found[0], found[1]


def shape(specs: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int] | None:
    """Shape (N, K) of a layer from the headers of its tensors; None when it is not packed."""
    if MARKER not in specs or "weight" not in specs:
        return None
    n, k = specs["weight"].shape
    return {"int4": (n * 2, k), "nvfp4": (n, k * 2)}.get(scheme.weights.number, (n, k))


# quantization_config -------------------------------------------------------------------------------------------------

# What compressed-tensors would call each algorithm: readers of the flat shape look at `quant_algo`, others at these.
_FLOAT8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_FLOAT4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
_GROUPS: dict[str, dict[str, Any]] = {
    "FP8": {"input_activations": _FLOAT8, "weights": _FLOAT8},
    "NVFP4": {"input_activations": _FLOAT4, "weights": _FLOAT4},
    "W4A16_NVFP4": {"weights": _FLOAT4},
    "W4A16_AWQ": {"weights": {"dynamic": False, "num_bits": 4, "type": "int"}},
}


def _facts(schemes: Mapping[str, Scheme | None]) -> tuple[dict[str, Any], list[str]]:
    """What both shapes of the config say: the algorithm with its group size, and the modules that stay dense."""
    reason = "MIXED_PRECISION is not written, because TensorRT-LLM wants a third file for it"
    scheme = one_scheme("modelopt", schemes, reason)
    algo = _algo(scheme)
    facts: dict[str, Any] = {"quant_algo": algo}
    if scheme.weights.group_size is not None:
        facts["group_size"] = scheme.weights.group_size
    if algo == "W4A16_AWQ":
        facts |= {"has_zero_point": False, "pre_quant_scale": True}
    return facts, dense("modelopt", schemes)


def config(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """The `quantization_config` of config.json, in the flat shape; `files` has the other.

    schemes  every linear layer's on-disk name -> its scheme, or None when it is left dense
    Raises InputError for mixed schemes, one that is not held, or a dense name inside a quantized one.
    """
    facts, names = _facts(schemes)
    group = {key: dict(args) for key, args in _GROUPS[facts["quant_algo"]].items()}
    if facts["quant_algo"] == "W4A16_AWQ":
        group["weights"]["group_size"] = facts["group_size"]
    return {
        "config_groups": {"group_0": {**group, "targets": ["Linear"]}},
        "ignore": names,
        **facts,
        "producer": dict(PRODUCER),
        "quant_method": QUANT_METHOD,
    }


def files(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """Further files that belong beside the weights: hf_quant_config.json, which readers prefer."""
    facts, names = _facts(schemes)
    quantization = {**facts, "kv_cache_quant_algo": None, "exclude_modules": names}
    return {CONFIG_FILE: {"producer": dict(PRODUCER), "quantization": quantization}}


def read_config(quantization_config: Mapping[str, Any]) -> ReadConfig:
    """Reads a `quantization_config`, or an hf_quant_config.json. What cannot be held is said in `unsupported`."""
    c = dict(quantization_config)
    if isinstance(c.get("quantization"), Mapping):
        c = {**c["quantization"], "quant_method": QUANT_METHOD}
    return reading(QUANT_METHOD, _read, c)


def _read(c: Mapping[str, Any]) -> ReadConfig:
    ignore = strings("exclude_modules", c.get("exclude_modules") or c.get("ignore"))
    kv_cache = _read_kv(c.get("kv_cache_quant_algo") or c.get("kv_cache_scheme"))
    if str(c.get("quant_algo")).upper() != "MIXED_PRECISION":
        return ReadConfig(_read_algo(c), ignore, reads=unpack, kv_cache=kv_cache)
    layers = c.get("quantized_layers")
    if not isinstance(layers, Mapping) or not all(isinstance(x, Mapping) for x in layers.values()):
        raise Unsupported("quant_algo is MIXED_PRECISION, but quantized_layers does not say which layers have what")
    overrides = tuple(Override(f"{re.escape(name)}$", _read_algo(facts)) for name, facts in layers.items())
    return ReadConfig(None, ignore, overrides, unpack, kv_cache)


def _read_algo(c: Mapping[str, Any]) -> Scheme:
    algo = str(c.get("quant_algo")).upper()
    if algo not in ALGOS:
        raise Unsupported(f"quant_algo is {c.get('quant_algo')!r}; known: {', '.join(ALGOS)}")
    scheme = ALGOS[algo]
    size = integer({"group_size": _group_size(c)}, "group_size", default=scheme.weights.group_size or 1)
    if algo == "W4A16_AWQ":
        if c.get("has_zero_point") or size < 1:
            raise Unsupported(f"has_zero_point is {c.get('has_zero_point')!r}, group_size {size}")
        return Scheme(replace(INT4, group_size=size))
    if algo != "FP8" and size != 16:
        raise Unsupported(f"group_size of {algo} is {size}, not 16")
    return scheme


def _group_size(c: Mapping[str, Any]) -> Any:
    """At the top, or, in the flat shape that ModelOpt writes, in the group."""
    groups = c.get("config_groups")
    if c.get("group_size") is None and isinstance(groups, Mapping) and groups:
        first = next(iter(groups.values()))
        weights = first.get("weights") if isinstance(first, Mapping) else None
        return weights.get("group_size") if isinstance(weights, Mapping) else None
    return c.get("group_size")


def _read_kv(kv: Any) -> TensorScheme | None:
    """`kv_cache_quant_algo` is a name; `kv_cache_scheme` a name or a mapping."""
    if kv is None:
        return None
    if kv == "FP8" or (isinstance(kv, Mapping) and (kv.get("type"), kv.get("num_bits")) == ("float", 8)):
        return FP8
    raise Unsupported(f"the KV cache is {kv!r}, not FP8")
