"""Every layout of compressed-tensors against the library: its bytes are read and written alike, its decoder agrees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st
from library_layers import (
    inputs,
    library_compress,
    library_decompress,
    library_scheme,
    quantized,
    random_weight,
    same_bytes,
)

from quantkit import numerics
from quantkit.checkpoint import NAMES
from quantkit.errors import InputError
from quantkit.formats import compressed_tensors as ct
from quantkit.presets import PRESETS
from quantkit.types import QParams, QuantizedTensor, Scheme, TensorScheme, TensorSpec

INT8_STATIC = TensorScheme("int8", "tensor")
INT8_STATIC_ASYM = TensorScheme("int8", "tensor", symmetric=False)
INT8_TOKEN_ASYM = TensorScheme("int8", "token", symmetric=False, dynamic=True)
FP8_TOKEN = TensorScheme("fp8_e4m3", "token", dynamic=True)
BLOCK = TensorScheme("fp8_e4m3", "block", block_shape=(128, 128))

# name -> scheme, shape (N, K), the layout it must get
CASES: dict[str, tuple[Scheme, tuple[int, int], str]] = {
    "W8A8": (PRESETS["W8A8"], (33, 70), "int-quantized"),
    "W8A8 static": (Scheme(TensorScheme("int8", "channel"), INT8_STATIC), (5, 7), "int-quantized"),
    "W8A8 static, all per tensor": (Scheme(TensorScheme("int8", "tensor"), INT8_STATIC), (5, 7), "int-quantized"),
    "W8A8 static asymmetric input": (Scheme(TensorScheme("int8"), INT8_STATIC_ASYM), (33, 70), "int-quantized"),
    "W8A8 dynamic asymmetric input": (Scheme(TensorScheme("int8"), INT8_TOKEN_ASYM), (33, 70), "int-quantized"),
    "W8A8 asymmetric": (Scheme(TensorScheme("int8", symmetric=False), INT8_STATIC), (33, 70), "int-quantized"),
    "W8A8 tensor asymmetric": (
        Scheme(TensorScheme("int8", "tensor", symmetric=False), INT8_STATIC),
        (33, 70),
        "int-quantized",
    ),
    "W4A8": (PRESETS["W4A8"], (33, 256), "int-quantized"),
    "W4A8 asymmetric": (
        Scheme(TensorScheme("int4", "group", 32, symmetric=False), INT8_TOKEN_ASYM),
        (33, 96),
        "int-quantized",
    ),
    "W4AFP8": (PRESETS["W4AFP8"], (33, 256), "pack-quantized"),
    "W3A8": (PRESETS["W3A8"], (33, 256), "pack-quantized"),
    "W4A4": (PRESETS["W4A4"], (33, 256), "pack-quantized"),
    "FP8": (PRESETS["FP8"], (33, 70), "float-quantized"),
    "FP8_DYNAMIC": (PRESETS["FP8_DYNAMIC"], (33, 70), "float-quantized"),
    "FP8_BLOCK": (PRESETS["FP8_BLOCK"], (256, 384), "float-quantized"),
    "FP8_BLOCK ragged rows": (PRESETS["FP8_BLOCK"], (200, 256), "float-quantized"),
    "FP8 block weight only, ragged both ways": (Scheme(BLOCK), (320, 200), "naive-quantized"),
    "FP8 block smaller than a tile": (Scheme(BLOCK), (3, 5), "naive-quantized"),
    "FP8 tensor weight only": (Scheme(TensorScheme("fp8_e4m3", "tensor")), (33, 70), "naive-quantized"),
    "FP8 channel weight only": (Scheme(TensorScheme("fp8_e4m3")), (33, 70), "naive-quantized"),
    "FP8 group": (Scheme(TensorScheme("fp8_e4m3", "group", 64), FP8_TOKEN), (9, 128), "float-quantized"),
    "NVFP4A16": (PRESETS["NVFP4A16"], (33, 48), "nvfp4-pack-quantized"),
    "NVFP4": (PRESETS["NVFP4"], (33, 48), "nvfp4-pack-quantized"),
    "MXFP4A16": (PRESETS["MXFP4A16"], (33, 96), "mxfp4-pack-quantized"),
    "MXFP4": (PRESETS["MXFP4"], (33, 32), "mxfp4-pack-quantized"),
    "MXFP4XFP8": (PRESETS["MXFP4XFP8"], (33, 128), "mxfp4-pack-quantized"),
    "MXFP6A16": (PRESETS["MXFP6A16"], (33, 96), "mxfp6-pack-quantized"),
    "MXFP6A8": (PRESETS["MXFP6A8"], (1, 32), "mxfp6-pack-quantized"),
    "MXFP8A16": (PRESETS["MXFP8A16"], (33, 96), "mxfp8-quantized"),
    "MXFP8": (PRESETS["MXFP8"], (33, 96), "mxfp8-quantized"),
}


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


@pytest.mark.parametrize("name", CASES)
def test_what_the_library_writes_is_read_and_written_alike(name: str) -> None:
    scheme, shape, layout = CASES[name]
    library = library_scheme(scheme)
    assert library.format == layout
    theirs = library_compress(random_weight(shape), library)
    q = ct.unpack(theirs, scheme)
    assert (q.shape, q.scheme) == (shape, scheme.weights)
    decoded = numerics.dequantize(q)
    assert torch.equal(decoded.bfloat16(), library_decompress(theirs, library).bfloat16())
    ours = ct.pack(q, scheme.activations, ct.unpack_input(theirs, scheme.activations))
    assert ours.keys() == theirs.keys()
    assert all(same_bytes(ours[key], theirs[key]) and ours[key].is_contiguous() for key in theirs)
    assert ct.tensors(shape, scheme, "BF16") == specs_of(ours)
    if layout != "pack-quantized":
        assert ct.shape(specs_of(ours), scheme) == shape


@pytest.mark.parametrize("name", CASES)
def test_what_quantkit_writes_the_library_decompresses_to_the_same_weight(name: str) -> None:
    scheme, shape, _ = CASES[name]
    q = quantized(random_weight(shape, 1), scheme.weights)
    tensors = ct.pack(q, scheme.activations, inputs(scheme))
    assert specs_of(tensors) == ct.tensors(shape, scheme, "BF16")
    theirs = library_decompress(dict(tensors), library_scheme(scheme))
    assert torch.equal(theirs.bfloat16(), numerics.dequantize(q).bfloat16())
    read, given = ct.unpack_input(tensors, scheme.activations), inputs(scheme)
    assert (read is None) == (given is None)
    if read is not None and given is not None and scheme.activations is not None:
        dynamic = scheme.activations.dynamic
        assert read.scale_NG.numel() == 0 if dynamic else same_bytes(read.scale_NG, given.scale_NG)
        assert same_bytes(read.zero_NG, given.zero_NG) and same_bytes(read.global_scale, given.global_scale)


def test_every_format_of_the_library_is_held() -> None:
    from compressed_tensors.config import CompressionFormat

    legacy = {"dense", "mixed-precision", "sparse-bitmask", "sparse-24-bitmask", "marlin-24"}
    assert {f.value for f in CompressionFormat} - legacy == set(ct.LAYOUTS)
    assert {layout for _, _, layout in CASES.values()} == set(ct.LAYOUTS)


# round trips, whatever the codes -------------------------------------------------------------------------------------


@st.composite
def layers(draw: st.DrawFn) -> tuple[Scheme, QuantizedTensor]:
    """A layer with random codes under random scales, of any shape that its number format has."""
    number = draw(
        st.sampled_from([f"int{b}" for b in range(2, 9)] + ["fp8_e4m3", "mxfp8_e4m3", "mxfp6_e2m3", "mxfp4", "nvfp4"])
    )
    integer, fixed = number.startswith("int"), {"nvfp4": 16, "fp8_e4m3": 0}.get(number, 32)
    n, groups = draw(st.integers(1, 70)), draw(st.integers(1, 6))
    if integer or number == "fp8_e4m3":
        strategy: Any = draw(st.sampled_from(["tensor", "channel", "group"] + ([] if integer else ["block"])))
        size = draw(st.sampled_from([1, 3, 8, 24, 32, 50])) if strategy == "group" else None
        k = groups * size if size else draw(st.integers(1, 150))
        symmetric = not integer or draw(st.booleans())
        weights = TensorScheme(number, strategy, size, symmetric, block_shape=(16, 32) if strategy == "block" else None)
    else:
        k, weights = groups * fixed, TensorScheme(number, "group", fixed)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def integers(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int16).to(dtype)

    half = 1 << (int(number[3:]) - 1) if integer else 0
    if integer:
        codes = integers(-half, half - 1, (n, k), torch.int8)
    elif number in ("fp8_e4m3", "mxfp8_e4m3"):
        codes = integers(0, 255, (n, k), torch.uint8)
        codes = torch.where((codes & 127) == 127, 126, codes).view(torch.float8_e4m3fn)  # no NaN
    else:
        codes = integers(0, 63 if number == "mxfp6_e2m3" else 15, (n, k), torch.uint8)
    rows = {"tensor": 1, "block": -(-n // 16)}.get(weights.strategy, n)
    columns = numerics.groups(weights, k)
    if number.startswith("mx"):
        scale = integers(1, 254, (rows, columns), torch.uint8)
    elif number == "nvfp4":
        scale = integers(1, 126, (rows, columns), torch.uint8).view(torch.float8_e4m3fn)
    else:
        scale = torch.rand(rows, columns, generator=generator).add(1e-3).bfloat16()
    zero = None if weights.symmetric else integers(-half, half - 1, (rows, columns), torch.int8)
    qparams = QParams(scale, zero, torch.tensor([draw(st.floats(0.5, 1e6, width=32))]) if number == "nvfp4" else None)
    choices: list[TensorScheme | None] = [None, TensorScheme("int8", "token", dynamic=True), FP8_TOKEN]
    return Scheme(weights, draw(st.sampled_from(choices))), QuantizedTensor(codes, qparams, weights)


@settings(deadline=None, max_examples=150)
@examples(layers())
def test_round_trips_are_exact_and_the_library_agrees(layer: tuple[Scheme, QuantizedTensor]) -> None:
    scheme, q = layer
    tensors = ct.pack(q, scheme.activations)
    assert specs_of(tensors) == ct.tensors(q.shape, scheme, "BF16")
    back = ct.unpack(tensors, scheme)
    assert back.scheme == q.scheme
    assert same_bytes(back.codes_NK, q.codes_NK)
    assert same_bytes(back.qparams.scale_NG, q.qparams.scale_NG)
    assert same_bytes(back.qparams.zero_NG, q.qparams.zero_NG)
    assert same_bytes(back.qparams.global_scale, q.qparams.global_scale)
    theirs = library_decompress(dict(tensors), library_scheme(scheme))
    assert torch.equal(theirs.bfloat16(), numerics.dequantize(q).bfloat16())
    read = ct.read_config(ct.config({"a": scheme}))
    again = read.unpack("a", tensors)
    assert same_bytes(again.codes_NK, q.codes_NK) and again.scheme == scheme.weights


# what is chosen, and what is refused ---------------------------------------------------------------------------------


def test_w4afp8_is_packed_because_vllms_kernel_takes_nothing_else() -> None:
    """The library itself infers int-quantized: a byte a weight, and no kernel. It is still read."""
    from compressed_tensors.compressors.format import infer_module_format

    scheme, library = PRESETS["W4AFP8"], library_scheme(PRESETS["W4AFP8"])
    assert infer_module_format(torch.nn.Linear, library).value == "int-quantized"
    assert library.format == ct.config({"a": scheme})["format"] == "pack-quantized"
    bytewise = library_scheme(scheme, format="int-quantized")
    theirs = library_compress(random_weight((5, 256)), bytewise)
    assert theirs["weight"].dtype == torch.int8
    assert torch.equal(numerics.dequantize(ct.unpack(theirs, scheme)).bfloat16(), library_decompress(theirs, bytewise))


@pytest.mark.parametrize("number", ["int8", "fp8_e4m3"])
def test_naive_quantized_is_read_whatever_it_holds(number: str) -> None:
    """Checkpoints of 2024 have it for static FP8 too."""
    scheme = Scheme(TensorScheme(number, "tensor"), TensorScheme(number, "tensor") if number == "fp8_e4m3" else None)
    library = library_scheme(scheme, format="naive-quantized")
    theirs = library_compress(random_weight((5, 7)), library)
    config = ct.config({"a": scheme})
    config["config_groups"]["group_0"]["format"] = "naive-quantized"
    q = ct.read_config({**config, "quantization_status": "frozen"}).unpack("a", theirs)
    assert torch.equal(numerics.dequantize(q).bfloat16(), library_decompress(theirs, library))


@pytest.mark.parametrize("name", CASES)
def test_scales_of_a_whole_tensor_are_never_0d_and_symmetric_means_no_zero_points(name: str) -> None:
    scheme, shape, _ = CASES[name]
    tensors = ct.pack(quantized(random_weight(shape), scheme.weights), scheme.activations, inputs(scheme))
    assert all(t.ndim > 0 for t in tensors.values())
    whole = [key for key in tensors if "scale" in key and ("input" in key or "global" in key)]
    whole += ["weight_scale"] if scheme.weights.strategy == "tensor" else []
    assert all(tensors[key].shape == (1,) for key in whole)
    assert ("weight_zero_point" in tensors) == (not scheme.weights.symmetric)
    asymmetric_static = scheme.calibrates_input and scheme.activations is not None and not scheme.activations.symmetric
    assert ("input_zero_point" in tensors) == asymmetric_static


def test_0d_scales_of_other_tools_are_read() -> None:
    scheme = PRESETS["FP8"]
    tensors = ct.pack(quantized(random_weight((5, 7)), scheme.weights), scheme.activations, inputs(scheme))
    flat = {key: t.reshape(()) if t.numel() == 1 else t for key, t in tensors.items()}
    assert {key for key in flat if flat[key].ndim == 0} == {"weight_scale", "input_scale"}
    assert same_bytes(ct.unpack(flat, scheme).qparams.scale_NG, tensors["weight_scale"].reshape(1, 1))
    read = ct.unpack_input(flat, scheme.activations)
    assert read is not None and read.scale_NG.shape == (1, 1)


def test_a_packed_tensor_from_the_middle_of_a_file_is_read() -> None:
    """Bytes need not lie where an int32 may."""
    scheme = PRESETS["MXFP6A16"]
    q = quantized(random_weight((3, 32)), scheme.weights)
    tensors = ct.pack(q)
    packed = tensors["weight_packed"]
    tensors["weight_packed"] = torch.cat([torch.zeros(1, dtype=torch.uint8), packed.flatten()])[1:].view(packed.shape)
    assert same_bytes(ct.unpack(tensors, scheme).codes_NK, q.codes_NK)


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        (Scheme(TensorScheme("fp8_e5m2")), "fp8_e5m2 weights per channel cannot be written"),
        (Scheme(TensorScheme("mxfp8_e5m2", "group", 32)), "mxfp8_e5m2 weights per group of 32 cannot be written"),
        (Scheme(TensorScheme("mxfp6_e3m2", "group", 32)), "mxfp6_e3m2"),
        (Scheme(TensorScheme("mxint8", "group", 32)), "mxint8"),
        (Scheme(TensorScheme("mxfp4", "group", 16)), "mxfp4 weights per group of 16"),
        (Scheme(TensorScheme("nvfp4", "channel")), "nvfp4 weights per channel"),
        (Scheme(TensorScheme("int4", "block", block_shape=(8, 8))), "int4 weights per block"),
        (Scheme(TensorScheme("fp8_e4m3", symmetric=False)), "fp8_e4m3 weights per channel, asymmetric"),
        (Scheme(TensorScheme("int8"), TensorScheme("int8", "token")), "static int8 activations per token"),
        (Scheme(TensorScheme("int8"), TensorScheme("fp8_e5m2", "token", dynamic=True)), "dynamic fp8_e5m2 activations"),
        (Scheme(TensorScheme("int8"), TensorScheme("nvfp4", "group", 16)), "static nvfp4 activations"),
        (Scheme(TensorScheme("int8", dynamic=True)), "int8 weights per channel"),
        (Scheme(TensorScheme("int9")), "int9"),
    ],
)
def test_what_the_library_has_no_words_for_is_refused(scheme: Scheme, says: str) -> None:
    with pytest.raises(InputError, match=says):
        ct.tensors((128, 128), scheme, "BF16")
    with pytest.raises(InputError, match=says):
        ct.config({"a": scheme})
    with pytest.raises(InputError, match="cannot be read"):
        ct.unpack({}, scheme)


@pytest.mark.parametrize(
    ("preset", "shape", "says"),
    [
        ("FP8_BLOCK", (128, 192), "fp8_e4m3 activations: group_size 128 does not divide in_features 192"),
        ("NVFP4A16", (4, 40), "group_size 16 does not divide in_features 40"),
        ("MXFP8", (4, 48), "group_size 32 does not divide in_features 48"),
        ("MXFP4XFP8", (4, 96), "fp8_e4m3 activations: group_size 128 does not divide in_features 96"),
    ],
)
def test_groups_that_do_not_divide_the_inputs_are_refused(preset: str, shape: tuple[int, int], says: str) -> None:
    """FP8_BLOCK with such a width loads in transformers, and its forward raises: better not written at all."""
    with pytest.raises(InputError, match=says):
        ct.tensors(shape, PRESETS[preset], "BF16")


@pytest.mark.parametrize(
    ("preset", "name", "value", "says"),
    [
        ("FP8_DYNAMIC", "weight", None, "weight, of two dimensions, is missing"),
        ("FP8_DYNAMIC", "weight_scale", None, "weight_scale is missing; a weight .8, 256. of fp8_e4m3 per channel"),
        ("FP8_DYNAMIC", "weight", torch.zeros(8, 256, dtype=torch.int8), "weight is torch.int8"),
        ("FP8_BLOCK", "weight_scale", torch.ones(2, 2), r"weight_scale is torch.float32 \(2, 2\); .*\(1, 2\)"),
        ("W8A8", "weight_scale", torch.ones(8), r"needs float \(8, 1\)"),
        ("W8A8", "weight_scale", torch.ones(8, 1, dtype=torch.float8_e4m3fn), "weight_scale is torch.float8"),
        ("NVFP4A16", "weight_packed", None, "weight_packed, of two dimensions, is missing"),
        ("NVFP4A16", "weight_global_scale", None, "weight_global_scale is missing"),
        ("NVFP4A16", "weight_scale", torch.ones(8, 16), "needs F8_E4M3"),
        ("MXFP4A16", "weight_scale", torch.zeros(8, 16, dtype=torch.uint8), r"\(8, 16\); .* needs U8 \(8, 8\)"),
    ],
)
def test_unpack_refuses(preset: str, name: str, value: torch.Tensor | None, says: str) -> None:
    scheme = PRESETS[preset]
    tensors = ct.pack(quantized(random_weight((8, 256)), scheme.weights), scheme.activations)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    with pytest.raises(InputError, match=says):
        ct.unpack(tensors, scheme)


def test_pack_refuses_codes_and_scales_that_do_not_fit() -> None:
    w4a8 = PRESETS["W4A8"]
    q = quantized(random_weight((4, 128)), w4a8.weights)
    wide = QuantizedTensor(torch.full((4, 128), 8, dtype=torch.int8), q.qparams, w4a8.weights)
    with pytest.raises(InputError, match="int4: codes go from 8 to 8; it has -8 to 7"):
        ct.pack(wide, w4a8.activations)
    mx = PRESETS["MXFP4A16"].weights
    q = quantized(random_weight((4, 128)), mx)
    with pytest.raises(InputError, match="mxfp4: codes go from 16 to 16"):
        ct.pack(QuantizedTensor(torch.full((4, 128), 16, dtype=torch.uint8), q.qparams, mx))
    nv = PRESETS["NVFP4A16"].weights
    q = quantized(random_weight((4, 128)), nv)
    with pytest.raises(InputError, match="nvfp4: the global scale is missing"):
        ct.pack(QuantizedTensor(q.codes_NK, QParams(q.qparams.scale_NG), nv))
    fp8 = PRESETS["FP8_DYNAMIC"]
    q = quantized(random_weight((4, 128)), fp8.weights)
    with pytest.raises(InputError, match=r"codes are torch\.float32, not torch\.float8_e4m3fn"):
        ct.pack(QuantizedTensor(q.codes_NK.float(), q.qparams, fp8.weights), fp8.activations)


@pytest.mark.parametrize("preset", ["FP8", "NVFP4"])
def test_a_calibrated_scale_must_be_given(preset: str) -> None:
    scheme = PRESETS[preset]
    q = quantized(random_weight((4, 128)), scheme.weights)
    with pytest.raises(InputError, match=f"{scheme.weights.number} activations per .* need a calibrated input scale"):
        ct.pack(q, scheme.activations)
    with pytest.raises(InputError, match="one number is needed"):
        ct.pack(q, scheme.activations, QParams(torch.ones(1, 2), None, None))
    with pytest.raises(InputError, match=r"input_(global_)?scale is missing"):
        ct.unpack_input({}, scheme.activations)


# the KV cache --------------------------------------------------------------------------------------------------------

KV_TENSOR, KV_HEAD = TensorScheme("fp8_e4m3", "tensor"), TensorScheme("fp8_e4m3", "head")


@pytest.mark.parametrize(("scheme", "shape"), [(KV_TENSOR, (1,)), (KV_HEAD, (4, 1, 1))])
def test_scales_of_a_kv_cache(scheme: TensorScheme, shape: tuple[int, ...]) -> None:
    k, v = (torch.rand(shape).flatten().bfloat16() for _ in "kv")
    tensors = ct.pack_kv(k, v, scheme)
    assert specs_of(tensors) == ct.kv_tensors(scheme, 4, "BF16")
    assert {t.shape for t in tensors.values()} == {shape}
    for back, given in zip(ct.unpack_kv(tensors, scheme), (k, v), strict=True):
        assert same_bytes(back, given.reshape(shape))


@pytest.mark.parametrize(
    "names", [("k_proj.output_scale", "v_proj.output_scale"), ("k_proj.k_scale", "v_proj.v_scale")]
)
def test_older_names_of_the_scales_of_a_kv_cache(names: tuple[str, str]) -> None:
    tensors = {name: torch.tensor(0.5) for name in names}
    assert ct.unpack_kv(tensors, KV_TENSOR) == (torch.tensor([0.5]), torch.tensor([0.5]))


def test_a_kv_cache_that_engines_do_not_read_is_refused() -> None:
    with pytest.raises(InputError, match="KV cache of int8 per tensor"):
        ct.kv_tensors(TensorScheme("int8", "tensor"), 4, "BF16")
    with pytest.raises(InputError, match="KV cache of fp8_e4m3 per token"):
        ct.config({"a": PRESETS["W4A16"]}, kv_cache=TensorScheme("fp8_e4m3", "token", dynamic=True))
    with pytest.raises(InputError, match="v_scale: 1 scales for a KV cache per head"):
        ct.pack_kv(torch.ones(4), torch.ones(1), KV_HEAD)
    with pytest.raises(InputError, match="k_scale: 4 scales for a KV cache per tensor"):
        ct.pack_kv(torch.ones(4), torch.ones(4), KV_TENSOR)
    with pytest.raises(InputError, match="v_scale is missing"):
        ct.unpack_kv({"k_scale": torch.ones(1)}, KV_TENSOR)
