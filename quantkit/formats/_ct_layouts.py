"""How the codes of one weight lie on disk, for each of compressed-tensors' formats.

    format                numbers              tensors of a weight (N, K)
    pack-quantized        int2 to int8         weight_packed      int32 (N, ceil(K b / 32)), codes + 2^(b-1) as a
                                                                  little-endian bit stream along the row
                                               weight_scale
                                               weight_zero_point  int32 (ceil(N b / 32), G): the same packing along N;
                                                                  int8 (1,), not packed, beside a scale (1,)
                                               weight_shape       int64 (2,) = [N, K]: the last word of a row is padded
    int-quantized         int2 to int8         weight             int8 (N, K), a code a byte, two's complement
                                               weight_scale
                                               weight_zero_point  int8, the shape of the scale
    float-quantized       fp8_e4m3             weight             float8_e4m3fn (N, K)
                                               weight_scale
    naive-quantized       either of the last two, written for fp8_e4m3 whose activations are not quantized
    mxfp8-quantized       mxfp8_e4m3           weight             float8_e4m3fn (N, K)
                                               weight_scale       uint8 E8M0 (N, K / 32)
    mxfp6-pack-quantized  mxfp6_e2m3           weight_packed      uint8 (N, 3 K / 4), 4 codes in 3 bytes
                                               weight_scale       uint8 E8M0 (N, K / 32)
    mxfp4-pack-quantized  mxfp4                weight_packed      uint8 (N, K / 2), the even column in the low nibble
                                               weight_scale       uint8 E8M0 (N, K / 32)
    nvfp4-pack-quantized  nvfp4                weight_packed      uint8 (N, K / 2)
                                               weight_scale       float8_e4m3fn (N, K / 16), row-major, not swizzled
                                               weight_global_scale  float32 (1,)

Where nothing else is said, weight_scale has the model's dtype and the shape (N, G), (N, 1), for blocks (ceil(N / bn),
ceil(K / bk)), or (1,) for a whole tensor: never 0-d, which loaders that stack experts cannot stack. A symmetric scheme
has no zero points at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from quantkit import numerics
from quantkit.errors import InputError
from quantkit.formats._shared import from_offset_binary, offset_binary
from quantkit.types import QParams, QuantizedTensor, Scheme, TensorScheme, TensorSpec
from quantkit_kernels.bits import pack_bits, packed_width, unpack_bits

TORCH_DTYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
}
INTEGERS = tuple(f"int{b}" for b in range(2, 9))
# Bits of the codes that are held one a byte in QuantizedTensor and packed closer on disk.
_PACKED_FLOATS = {"nvfp4": 4, "mxfp4": 4, "mxfp6_e2m3": 6}
_GROUP_SIZES = {"nvfp4": 16, "mxfp4": 32, "mxfp6_e2m3": 32, "mxfp8_e4m3": 32}
_SCALE_DTYPES = {"nvfp4": "F8_E4M3", "mxfp4": "U8", "mxfp6_e2m3": "U8", "mxfp8_e4m3": "U8"}


@dataclass(frozen=True)
class Layout:
    """One of the library's formats: which weights it holds, and how their tensors lie.

    main     the tensor that holds the codes: by it, layouts of the same weight are told apart
    numbers  the weights' number formats that it holds
    codes    the tensor `main` of some rows of codes: that of a weight is those of its rows, one after another
    scales   the other tensors, of a weight (N, K)
    """

    name: str
    main: str
    numbers: tuple[str, ...]
    tensors: Callable[[tuple[int, int], TensorScheme, str], dict[str, TensorSpec]]
    codes: Callable[[torch.Tensor, TensorScheme], torch.Tensor]
    scales: Callable[[QParams, TensorScheme, tuple[int, int]], dict[str, torch.Tensor]]
    unpack: Callable[[Mapping[str, torch.Tensor], TensorScheme], QuantizedTensor]

    def pack(self, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        """All tensors of a weight. Raises InputError for a code outside its range, or scales that are missing."""
        return {self.main: self.codes(q.codes_NK, q.scheme), **self.scales(q.qparams, q.scheme, q.shape)}

    def holds(self, scheme: Scheme) -> bool:
        """Whether a layer of this scheme can lie in this layout."""
        return scheme.weights.number in self.numbers and _is_weight(scheme.weights) and is_input(scheme.activations)


def bits(scheme: TensorScheme) -> int:
    """Bits of an integer number format: 4 for "int4"."""
    return int(scheme.number.removeprefix("int"))


def _is_weight(w: TensorScheme) -> bool:
    """Whether the library has words for a weight's scheme."""
    if w.dynamic:
        return False
    if w.number in _GROUP_SIZES:
        return (w.strategy, w.group_size, w.symmetric) == ("group", _GROUP_SIZES[w.number], True)
    if w.number in INTEGERS:
        return w.strategy in ("tensor", "channel", "group")
    return w.symmetric and w.strategy in ("tensor", "channel", "group", "block")


def is_input(a: TensorScheme | None) -> bool:
    """Whether the library has words for the scheme of a layer's input."""
    if a is None:
        return True
    if a.number in _GROUP_SIZES:
        return (a.strategy, a.group_size, a.symmetric, a.dynamic) == ("group", _GROUP_SIZES[a.number], True, True)
    if a.number not in INTEGERS and not (a.number == "fp8_e4m3" and a.symmetric):
        return False
    return a.strategy == "tensor" or (a.strategy in ("token", "group") and a.dynamic)


# What all layouts share ----------------------------------------------------------------------------------------------


def _scale_specs(shape: tuple[int, int], scheme: TensorScheme, dtype: str) -> dict[str, TensorSpec]:
    """weight_scale, and weight_global_scale for NVFP4."""
    n, k = shape
    columns = numerics.groups(scheme, k)
    rows = n
    if scheme.strategy == "block":
        assert scheme.block_shape is not None
        rows = -(-n // scheme.block_shape[0])
    whole = scheme.strategy == "tensor"
    specs = {
        "weight_scale": TensorSpec(_SCALE_DTYPES.get(scheme.number, dtype), (1,) if whole else (rows, columns)),
    }
    if scheme.number == "nvfp4":
        specs["weight_global_scale"] = TensorSpec("F32", (1,))
    return specs


def _scales(qparams: QParams, scheme: TensorScheme, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The tensors of `_scale_specs`."""
    zero, scale = qparams.zero_NG, qparams.scale_NG
    if (zero is None) != scheme.symmetric:
        raise InputError(f"{scheme.number}: zero points are {'absent' if zero is None else 'given'}, scheme says else")
    found = {"weight_scale": scale.reshape(1) if scheme.strategy == "tensor" else scale}
    if scheme.number == "nvfp4":
        if qparams.global_scale is None:
            raise InputError("nvfp4: the global scale is missing")
        found["weight_global_scale"] = qparams.global_scale.float().reshape(1)
    return found


def checked(
    name: str, tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec], what: str
) -> dict[str, torch.Tensor]:
    """The tensors that `specs` lists. Raises InputError for one that is missing, or of another dtype or shape.

    The dtype "float" stands for any float of 16 bits or more. What should be (1,) may be 0-d: some tools write it so.
    """
    found = {}
    for key, spec in specs.items():
        if key not in tensors:
            raise InputError(f"{name}: {key} is missing; {what} needs it")
        t = tensors[key]
        if spec.shape == (1,) and t.ndim == 0:
            t = t.reshape(1)
        if spec.dtype == "float":
            right = t.is_floating_point() and t.itemsize >= 2
        else:
            right = t.dtype == TORCH_DTYPES[spec.dtype]
        if not right or tuple(t.shape) != spec.shape:
            raise InputError(f"{name}: {key} is {t.dtype} {tuple(t.shape)}; {what} needs {spec.dtype} {spec.shape}")
        found[key] = t
    return found


def _what(shape: tuple[int, int], scheme: TensorScheme) -> str:
    return f"a weight ({shape[0]}, {shape[1]}) of {scheme.number} per {scheme.strategy}"


def _qparams(found: Mapping[str, torch.Tensor], scheme: TensorScheme, zero: torch.Tensor | None) -> QParams:
    scale = found["weight_scale"]
    whole = scheme.strategy == "tensor"
    if zero is not None and whole:
        zero = zero.reshape(1, 1)
    return QParams(scale.reshape(1, 1) if whole else scale, zero, found.get("weight_global_scale"))


# pack-quantized ------------------------------------------------------------------------------------------------------


def _tensors_packed(shape: tuple[int, int], scheme: TensorScheme, dtype: str) -> dict[str, TensorSpec]:
    n, k = shape
    specs = {
        "weight_packed": TensorSpec("I32", (n, packed_width(k, bits(scheme)))),
        **_scale_specs(shape, scheme, dtype),
    }
    if not scheme.symmetric:
        packed = TensorSpec("I32", (packed_width(n, bits(scheme)), numerics.groups(scheme, k)))
        specs["weight_zero_point"] = TensorSpec("I8", (1,)) if scheme.strategy == "tensor" else packed
    specs["weight_shape"] = TensorSpec("I64", (2,))
    return specs


def _codes_packed(codes: torch.Tensor, scheme: TensorScheme) -> torch.Tensor:
    return _pack_offset(codes, bits(scheme))


def _scales_packed(qparams: QParams, scheme: TensorScheme, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    packed, zero = _scales(qparams, scheme, shape), qparams.zero_NG
    if zero is not None:
        whole = scheme.strategy == "tensor"
        zeros = zero.to(torch.int8).reshape(1) if whole else _pack_offset(zero.t(), bits(scheme)).t()
        packed["weight_zero_point"] = zeros
    packed["weight_shape"] = torch.tensor(shape, dtype=torch.int64)
    return packed


def _pack_offset(codes: torch.Tensor, b: int) -> torch.Tensor:
    """Signed codes (R, n) -> words (R, ceil(n b / 32)): offset binary, not two's complement."""
    try:
        return pack_bits(offset_binary(codes, b), b)
    except ValueError as error:
        raise InputError(f"int{b}: with the offset {1 << (b - 1)}, {error}") from error


def _unpack_offset(words: torch.Tensor, b: int, n: int) -> torch.Tensor:
    return from_offset_binary(unpack_bits(words, b, n), b)


def _unpack_packed(tensors: Mapping[str, torch.Tensor], scheme: TensorScheme) -> QuantizedTensor:
    if "weight_shape" not in tensors or tuple(tensors["weight_shape"].shape) != (2,):
        raise InputError("pack-quantized: weight_shape, the two numbers [N, K], is missing, so K is not known")
    n, k = (int(x) for x in tensors["weight_shape"])
    found = checked("pack-quantized", tensors, _tensors_packed((n, k), scheme, "float"), _what((n, k), scheme))
    zero = found.get("weight_zero_point")
    if zero is not None and scheme.strategy != "tensor":
        zero = _unpack_offset(zero.t(), bits(scheme), n).t().contiguous()
    codes = _unpack_offset(found["weight_packed"], bits(scheme), k)
    return QuantizedTensor(codes, _qparams(found, scheme, zero), scheme)


# one code a byte: int-, float-, naive-, mxfp8-quantized --------------------------------------------------------------


def _tensors_plain(shape: tuple[int, int], scheme: TensorScheme, dtype: str) -> dict[str, TensorSpec]:
    code = "I8" if scheme.number in INTEGERS else "F8_E4M3"
    specs = {"weight": TensorSpec(code, shape), **_scale_specs(shape, scheme, dtype)}
    if not scheme.symmetric:
        specs["weight_zero_point"] = TensorSpec("I8", specs["weight_scale"].shape)
    return specs


def _codes_plain(codes: torch.Tensor, scheme: TensorScheme) -> torch.Tensor:
    if scheme.number in INTEGERS and codes.numel():
        low, high, half = int(codes.min()), int(codes.max()), 1 << (bits(scheme) - 1)
        if low < -half or high >= half:
            raise InputError(f"{scheme.number}: codes go from {low} to {high}; it has {-half} to {half - 1}")
    code = torch.int8 if scheme.number in INTEGERS else torch.float8_e4m3fn
    if codes.dtype != code:
        raise InputError(f"{scheme.number}: codes are {codes.dtype}, not {code}")
    return codes


def _scales_plain(qparams: QParams, scheme: TensorScheme, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    tensors = _scales(qparams, scheme, shape)
    if qparams.zero_NG is not None:
        zero = qparams.zero_NG.to(torch.int8)
        tensors["weight_zero_point"] = zero.reshape(1) if scheme.strategy == "tensor" else zero
    return tensors


def _unpack_plain(tensors: Mapping[str, torch.Tensor], scheme: TensorScheme) -> QuantizedTensor:
    shape = _shape_of(tensors, "weight")
    name = "int-quantized" if scheme.number in INTEGERS else f"{scheme.number} as it is"
    found = checked(name, tensors, _tensors_plain(shape, scheme, "float"), _what(shape, scheme))
    return QuantizedTensor(found["weight"], _qparams(found, scheme, found.get("weight_zero_point")), scheme)


def _shape_of(tensors: Mapping[str, torch.Tensor], main: str, per_byte: float = 1) -> tuple[int, int]:
    """Shape (N, K) of the weight whose codes lie in the tensor `main`."""
    if main not in tensors or tensors[main].ndim != 2:
        raise InputError(f"{main}, of two dimensions, is missing")
    n, width = tensors[main].shape
    return n, int(width * per_byte)


# floats of 4 and 6 bits ----------------------------------------------------------------------------------------------


def _tensors_nibbles(shape: tuple[int, int], scheme: TensorScheme, dtype: str) -> dict[str, TensorSpec]:
    n, k = shape
    scales = _scale_specs(shape, scheme, dtype)  # says so when groups of 16 or 32 do not divide K
    return {"weight_packed": TensorSpec("U8", (n, k * _PACKED_FLOATS[scheme.number] // 8)), **scales}


def _codes_nibbles(codes: torch.Tensor, scheme: TensorScheme) -> torch.Tensor:
    numerics.groups(scheme, codes.shape[1])  # a row of whole groups is also a row of whole words
    try:
        return pack_bits(codes, _PACKED_FLOATS[scheme.number]).view(torch.uint8)
    except ValueError as error:
        raise InputError(f"{scheme.number}: {error}") from error


def _unpack_nibbles(tensors: Mapping[str, torch.Tensor], scheme: TensorScheme) -> QuantizedTensor:
    b = _PACKED_FLOATS[scheme.number]
    shape = _shape_of(tensors, "weight_packed", 8 / b)
    specs = _tensors_nibbles(shape, scheme, "float")
    found = checked(f"{scheme.number} packed", tensors, specs, _what(shape, scheme))
    # cloned, because bytes from the middle of a file need not lie where int32 may
    words = found["weight_packed"].clone(memory_format=torch.contiguous_format).view(torch.int32)
    return QuantizedTensor(unpack_bits(words, b, shape[1]), _qparams(found, scheme, None), scheme)


_PLAIN = (_tensors_plain, _codes_plain, _scales_plain, _unpack_plain)
_NIBBLES = (_tensors_nibbles, _codes_nibbles, _scales, _unpack_nibbles)
_PACKED = (_tensors_packed, _codes_packed, _scales_packed, _unpack_packed)
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("pack-quantized", "weight_packed", INTEGERS, *_PACKED),
        Layout("int-quantized", "weight", INTEGERS, *_PLAIN),
        Layout("float-quantized", "weight", ("fp8_e4m3",), *_PLAIN),
        Layout("naive-quantized", "weight", ("fp8_e4m3", *INTEGERS), *_PLAIN),
        Layout("nvfp4-pack-quantized", "weight_packed", ("nvfp4",), *_NIBBLES),
        Layout("mxfp4-pack-quantized", "weight_packed", ("mxfp4",), *_NIBBLES),
        Layout("mxfp6-pack-quantized", "weight_packed", ("mxfp6_e2m3",), *_NIBBLES),
        Layout("mxfp8-quantized", "weight", ("mxfp8_e4m3",), *_PLAIN),
    )
}


def layout(scheme: Scheme) -> Layout:
    """The layout in which a scheme is written. Raises InputError when none holds it.

    The library's own choice, with one difference: it writes integers with quantized activations one code a byte
    always, also at 4 bits and less. vLLM's kernels take that for int8 activations on int8 or int4 weights only; for
    FP8 activations on int4 weights (W4AFP8) and for all other widths they take packed codes.
    """
    w, a = scheme.weights, scheme.activations
    if w.number in INTEGERS:
        bytewise = a is not None and a.number == "int8" and w.number in ("int4", "int8")
        name = "int-quantized" if bytewise else "pack-quantized"
    elif w.number == "fp8_e4m3":
        name = "naive-quantized" if a is None else "float-quantized"
    else:
        name = next((x.name for x in LAYOUTS.values() if w.number in x.numbers), "")
    if name in LAYOUTS and LAYOUTS[name].holds(scheme):
        return LAYOUTS[name]
    raise InputError(
        f"compressed-tensors: {words(scheme)} cannot be written; it holds {', '.join(INTEGERS)}, fp8_e4m3, "
        f"{', '.join(_GROUP_SIZES)}"
    )


def words(scheme: Scheme) -> str:
    """A scheme in a few words, for errors."""

    def one(t: TensorScheme) -> str:
        size = f" of {t.group_size}" if t.strategy == "group" else ""
        return f"per {t.strategy}{size}" + ("" if t.symmetric else ", asymmetric")

    w, a = scheme.weights, scheme.activations
    with_input = f" with {'dynamic' if a.dynamic else 'static'} {a.number} activations {one(a)}" if a else ""
    return f"{w.number} weights {one(w)}{with_input}"
