"""GPTQ: the layout of AutoGPTQ and GPTQModel, read by them, vLLM and SGLang (transformers needs gptqmodel for it).

    qweight   int32 (K b / 32, N)   codes 0 .. 2^b - 1 down each column, a little-endian bit stream (see bits.py)
    qzeros    int32 (G, N b / 32)   zero points z, packed along N in the same way
    scales    fp16 (G, N)                                             w[n, k] = scales[g, n] * (q[k, n] - z[g, n])
    g_idx     int32 (K,)            the group g of each column

    checkpoint_format "gptq" (v1) stores z - 1, "gptq_v2" stores z. With z = 0, v1 stores 2^b - 1, and readers disagree:
    some wrap to 0, some take 2^b, and some add 1 to a whole word, so that it carries into the next zero point.
    So symmetric weights (z = 2^(b-1), never 0) are written as v1, which everything reads, asymmetric ones as v2. An
    asymmetric v1 is read when no zero point can be 0, or GPTQModel wrote it, whose arithmetic on words is known.

Act-order permutes g_idx. It is read, as a scale for each column, and not written: nothing here permutes groups.
Mixed schemes are not written: `dynamic` rules match names, and engines that fuse q, k and v ask for "qkv_proj".
Bits and groups: those of the kernels of GPTQModel and vLLM. Scales must be exact in fp16, or they are refused.
Source: GPTQModel and AutoGPTQ, bit for bit (tests/test_format_gptq.py holds their formulas).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch

from quantkit import numerics, patterns
from quantkit.errors import InputError
from quantkit.formats._shared import (
    FLOAT,
    Override,
    ReadConfig,
    Unsupported,
    by_column,
    check,
    fits,
    from_offset_binary,
    integer,
    offset_binary,
    one_scheme,
    reading,
    strings,
)
from quantkit.types import QParams, QuantizedTensor, Scheme, TensorScheme, TensorSpec
from quantkit_kernels.bits import pack_bits, packed_width, unpack_bits

QUANT_METHOD = "gptq"
MARKER = "qweight"
SCALE_DTYPE = "F16"
BITS = (2, 3, 4, 8)
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
CONFIG_FILE = "quantize_config.json"

# "v1-words": z - 1 was subtracted from whole words, borrows and all
Zeros = Literal["v1", "v1-words", "v2"]


def _bits(scheme: TensorScheme) -> int:
    return int(scheme.number.removeprefix("int"))


def _check_scheme(scheme: Scheme) -> TensorScheme:
    w = scheme.weights
    if scheme.activations is not None:
        raise InputError(
            f"gptq: holds weights alone, not {scheme.activations.number} activations; use compressed-tensors"
        )
    if w.number not in {f"int{b}" for b in BITS}:
        raise InputError(f"gptq: {w.number} cannot be written; its readers have kernels for int2, int3, int4 and int8")
    if w.strategy not in ("channel", "group"):
        raise InputError(f"gptq: a scale per {w.strategy} cannot be written; use channel or group")
    if w.strategy == "group" and w.group_size not in GROUP_SIZES:
        known = ", ".join(map(str, GROUP_SIZES))
        raise InputError(f"gptq: group_size {w.group_size} cannot be written; its readers have {known}, and channel")
    return w


def tensors(shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
    """Every tensor that a linear layer (N, K) has on disk, bias apart. `dtype`, the model's, plays no part.

    Raises InputError for a scheme that is not held, or a shape whose codes do not fill whole words.
    """
    (n, k), w = shape, _check_scheme(scheme)
    bits, groups = _bits(w), numerics.groups(w, k)
    whole = 32 // math.gcd(32, bits)
    for name, size in (("in_features", k), ("out_features", n)):
        if size % whole:
            raise InputError(
                f"gptq: {name} {size} of {w.number} do not fill whole words; it must be a multiple of {whole}"
            )
    return {
        "qweight": TensorSpec("I32", (packed_width(k, bits), n)),
        "qzeros": TensorSpec("I32", (groups, packed_width(n, bits))),
        "scales": TensorSpec("F16", (groups, n)),
        "g_idx": TensorSpec("I32", (k,)),
    }


def pack(
    q: QuantizedTensor, activations: TensorScheme | None = None, inputs: QParams | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a quantized weight, contiguous, as `tensors` lists them; v1 when symmetric, v2 when not.

    Raises InputError for what `tensors` refuses, a code outside its range, or a scale that fp16 does not have.
    """
    tensors(q.shape, Scheme(q.scheme, activations), "F16")
    bits, k, scale = _bits(q.scheme), q.shape[1], q.qparams.scale_NG
    half, zero = 1 << (bits - 1), q.qparams.zero_NG
    if (zero is None) != q.scheme.symmetric:
        raise InputError(f"gptq: zero points are {'absent' if zero is None else 'given'}, the scheme says else")
    if zero is None:
        stored = torch.full_like(scale, half - 1, dtype=torch.int16)
    else:
        stored = zero.to(torch.int16) + half
    try:
        qweight = pack_bits(offset_binary(q.codes_NK, bits), bits).t()
        qzeros = pack_bits(stored.t(), bits)
    except ValueError as error:
        raise InputError(f"gptq: int{bits} with the offset {half}: {error}") from error
    packed = {
        "qweight": qweight,
        "qzeros": qzeros,
        "scales": fits("gptq", "scales", scale, torch.float16).t(),
        "g_idx": torch.arange(k, dtype=torch.int32, device=scale.device) // (k // scale.shape[1]),
    }
    return {name: t.contiguous() for name, t in packed.items()}


def from_packed(packed: Mapping[str, torch.Tensor], shape: tuple[int, int], scheme: Scheme) -> dict[str, torch.Tensor]:
    """What `pack` gives, from the tensors of compressed-tensors' pack-quantized: the same words, transposed.

    Both store q + 2^(b-1) as a bit stream along in_features, and zero points along out_features. No code is unpacked,
    which is what makes this several times faster than through codes. packed: weight_packed (N, K b / 32),
    weight_scale (N, G) and weight_zero_point (N b / 32, G) or none. Raises InputError like `pack`.
    """
    specs = tensors(shape, scheme, "F16")
    (_, k), w, scale = shape, scheme.weights, packed["weight_scale"]
    bits = _bits(w)
    if w.symmetric:
        stored = torch.full((scale.shape[1], shape[0]), (1 << (bits - 1)) - 1, dtype=torch.uint8, device=scale.device)
        qzeros = pack_bits(stored, bits)
    else:
        qzeros = packed["weight_zero_point"].t()
    found = {
        "qweight": packed["weight_packed"].t(),
        "qzeros": qzeros,
        "scales": fits("gptq", "scales", scale, torch.float16).t(),
        "g_idx": torch.arange(k, dtype=torch.int32, device=scale.device) // (k // scale.shape[1]),
    }
    check("gptq", found, specs)
    return {name: t.contiguous() for name, t in found.items()}


def unpack(tensors: Mapping[str, torch.Tensor], scheme: Scheme, *, zeros: Zeros | None = None) -> QuantizedTensor:
    """The codes, scales and zero points of a layer; the inverse of `pack`.

    zeros  how zero points are stored, which the config says (`read_config(...).unpack` knows it). None: as `pack` does,
           where a symmetric layer may be v1 or v2, which its one value tells apart
    A permuted g_idx gives a scale for each column, and group_size 1 in the scheme of the result.
    Raises InputError for tensors that are missing or do not fit, zero points that contradict the scheme, and those of
    v1 whose meaning is not certain.
    """
    w, bits = scheme.weights, _bits(scheme.weights)
    if "qweight" not in tensors or tensors["qweight"].ndim != 2 or not tensors["qweight"].numel():
        raise InputError("gptq: qweight (K b / 32, N) is missing")
    words, n = tensors["qweight"].shape
    k = words * 32 // bits
    groups = tensors["scales"].shape[0] if "scales" in tensors and tensors["scales"].ndim else 0
    check(
        "gptq",
        tensors,
        {
            "qweight": TensorSpec("I32", (packed_width(k, bits), n)),
            "qzeros": TensorSpec("I32", (groups, packed_width(n, bits))),
            "scales": TensorSpec(FLOAT, (groups, n)),
            "g_idx": TensorSpec("I32", (k,)),
        },
    )
    half = 1 << (bits - 1)
    zero = _zeros(tensors["qzeros"], bits, n, zeros or ("v2" if not w.symmetric else None))
    if w.symmetric:
        if bool((zero != half).any()):
            raise InputError(f"gptq: the config says symmetric, but zero points are not all {half}: sym is wrong in it")
        signed_zero = None
    else:
        signed_zero = (zero - half).to(torch.int8).t().contiguous()
    codes = from_offset_binary(unpack_bits(tensors["qweight"].t(), bits, k), bits)
    q = QuantizedTensor(codes, QParams(tensors["scales"].t().contiguous(), signed_zero), w)
    g_idx = tensors["g_idx"].long()
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise InputError(
            f"gptq: g_idx goes from {int(g_idx.min())} to {int(g_idx.max())}, but there are {groups} groups"
        )
    size = k if w.strategy == "channel" else w.group_size or k
    if torch.equal(g_idx, torch.arange(k, device=g_idx.device) // size) and groups * size == k:
        return q
    return by_column(q, group_K=g_idx)


def _zeros(words: torch.Tensor, bits: int, n: int, kind: Zeros | None) -> torch.Tensor:
    """Zero points 0 .. 2^b - 1 as int16 (G, N). `kind` None: one constant, of v1 or of v2."""
    top = (1 << bits) - 1
    stored = unpack_bits(words, bits, n).to(torch.int16)
    if kind == "v2":
        return stored
    if kind is None:
        return stored if stored.numel() and int(stored[0, 0]) == (top + 1) // 2 else (stored + 1) & top
    if not bool((stored == top).any()):
        return stored + 1  # nothing carries: all readers agree
    if kind == "v1-words" and 32 % bits == 0:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        return unpack_bits((words.to(torch.int64) + ones).to(torch.int32), bits, n).to(torch.int16)
    raise InputError(
        f"gptq: {int((stored == top).sum())} of {stored.numel()} zero points are stored as {top}, which in "
        f"checkpoint_format 'gptq' (v1) some readers take for 0, some for {top + 1}, and some carry into the next; "
        "save it as gptq_v2 with the tool that made it"
    )


def shape(specs: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int] | None:
    """Shape (N, K) of a layer from the headers of its tensors; None when it is not packed."""
    if MARKER not in specs:
        return None
    words, n = specs[MARKER].shape
    return n, words * 32 // _bits(scheme.weights)


# quantization_config -------------------------------------------------------------------------------------------------


def config(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """The `quantization_config` of config.json; `files` puts the same into quantize_config.json.

    schemes  every linear layer's on-disk name -> its scheme, or None when it is left dense. Dense layers other than
             lm_head become `dynamic` rules that skip them (GPTQModel, SGLang); vLLM sees it from the tensors.
    Raises InputError for mixed schemes, or one that is not held.
    """
    scheme = one_scheme("gptq", schemes, "`dynamic` rules go by names, which engines that fuse q, k and v do not have")
    w = _check_scheme(scheme)
    version = "gptq" if w.symmetric else "gptq_v2"
    dense = sorted(name for name, left in schemes.items() if left is None and name != "lm_head")
    skipped: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in dense}
    return {
        "quant_method": QUANT_METHOD,
        "bits": _bits(w),
        "group_size": w.group_size if w.strategy == "group" else -1,
        "desc_act": False,
        "sym": w.symmetric,
        "lm_head": schemes.get("lm_head") is not None,
        "checkpoint_format": version,
        "format": version,
        "pack_dtype": "int32",
        **({"dynamic": skipped} if skipped else {}),
    }


def files(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """Further files that belong beside the weights: name -> JSON content."""
    return {CONFIG_FILE: config(schemes)}


def read_config(quantization_config: Mapping[str, Any]) -> ReadConfig:
    """Reads a `quantization_config`, or a quantize_config.json. What cannot be held is said in `unsupported`."""
    c = dict(quantization_config)
    if c.get("quant_method") is None and ("bits" in c or "wbits" in c or "w_bit" in c):
        c["quant_method"] = QUANT_METHOD  # AutoGPTQ's own file does not name itself
    return reading(QUANT_METHOD, _read, c)


def _read(c: Mapping[str, Any]) -> ReadConfig:
    version = str(c.get("checkpoint_format") or c.get("format") or "gptq").lower()
    if version not in ("gptq", "gptq_v2") or c.get("is_marlin_format"):
        raise Unsupported(
            f"checkpoint_format is {'marlin' if c.get('is_marlin_format') else version!r}, not gptq or gptq_v2"
        )
    if str(c.get("pack_dtype", "int32")).removeprefix("torch.") != "int32":
        raise Unsupported(f"pack_dtype is {c['pack_dtype']!r}, not int32")
    scheme = _read_scheme(c, {})
    overrides = []
    if not isinstance(c.get("dynamic") or {}, Mapping):
        raise Unsupported("dynamic is not a mapping of patterns")
    for pattern, changes in (c.get("dynamic") or {}).items():
        body = pattern[2:] if pattern[:2] in ("-:", "+:") else pattern
        try:
            patterns.compiled(body)
        except patterns.PatternError as error:
            raise Unsupported(f"dynamic has the pattern {body!r}, which does not compile: {error}") from error
        overrides.append(Override(body, None if pattern.startswith("-:") else _read_scheme(c, changes)))
    overrides += _inside(c.get("modules_in_block_to_quantize"), scheme)
    zeros: Zeros = "v2" if version == "gptq_v2" else "v1-words" if _by_gptqmodel(c) else "v1"
    ignore = () if c.get("lm_head") else ("lm_head",)
    return ReadConfig(None if _listed(c) else scheme, ignore, tuple(overrides), functools.partial(unpack, zeros=zeros))


def _listed(c: Mapping[str, Any]) -> bool:
    return bool(c.get("modules_in_block_to_quantize"))


def _inside(groups: Any, scheme: Scheme) -> list[Override]:
    """optimum's list of lists of names inside a block: nothing else is packed."""
    listed = groups if isinstance(groups, list | tuple) else [groups] if groups else []
    names = [name for group in listed for name in (group if isinstance(group, list | tuple) else [group])]
    return [
        Override(rf"(?:.*\.)?{re.escape(name)}$", scheme) for name in strings("modules_in_block_to_quantize", names)
    ]


def _read_scheme(c: Mapping[str, Any], changes: Any) -> Scheme:
    if not isinstance(changes or {}, Mapping):
        raise Unsupported(f"dynamic has a rule that is {changes!r}, not a mapping")
    both = {**c, **(changes or {})}
    bits = integer(both, "bits", "wbits", "w_bit")
    if bits not in BITS:
        raise Unsupported(f"bits is {bits}; 2, 3, 4 and 8 are known")
    size = integer(both, "group_size", "q_group_size", default=-1)
    symmetric = both.get("sym", not both.get("zero_point", False))
    if type(symmetric) is not bool or size == 0 or size < -1:
        raise Unsupported(f"sym is {symmetric!r}, group_size {size}")
    if size == -1:
        return Scheme(TensorScheme(f"int{bits}", "channel", None, symmetric))
    return Scheme(TensorScheme(f"int{bits}", "group", size, symmetric))


def _by_gptqmodel(c: Mapping[str, Any]) -> bool:
    """Whether GPTQModel 0.9 or newer wrote the checkpoint: it makes v1 from v2 by arithmetic on whole words."""
    meta = c.get("meta")
    made = meta.get("quantizer") if isinstance(meta, Mapping) else None
    for producer in made if isinstance(made, list | tuple) else [made]:
        found = re.match(r"gptqmodel:(\d{1,6})\.(\d{1,6})", str(producer))
        if found and (int(found[1]), int(found[2])) >= (0, 9):
            return True
    return False
