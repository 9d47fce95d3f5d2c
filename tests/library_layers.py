"""One layer as the compressed-tensors library makes it: from a weight and a scheme to the tensors on disk."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from quantkit import numerics
from quantkit.formats import compressed_tensors as ct
from quantkit.types import QParams, QuantizedTensor, Scheme, TensorScheme

INPUT_SCALE, INPUT_GLOBAL_SCALE = 0.0625, 321.5


def library_scheme(scheme: Scheme, **changes: Any) -> QuantizationScheme:
    """The library's object, read from the config that quantkit writes."""
    group = ct.config({"a": scheme})["config_groups"]["group_0"]
    return QuantizationScheme.model_validate({**group, **changes})


def library_qparams(w: torch.Tensor, args: QuantizationArgs) -> dict[str, torch.Tensor]:
    """weight_scale, and what else belongs to it, from minima and maxima, before compression. `w` is (N, K)."""
    found = {}
    if args.strategy == "tensor_group":
        found["weight_global_scale"] = generate_gparam(w.min(), w.max())
    if args.strategy == "tensor":
        rows = w.reshape(1, -1)
    elif args.strategy == "channel":
        rows = w[:, None]
    elif args.strategy == "block":
        assert args.block_structure is not None
        n, k = args.block_structure
        padded = torch.nn.functional.pad(w, (0, -w.shape[1] % k, 0, -w.shape[0] % n))
        rows = padded.unflatten(0, (-1, n)).unflatten(2, (-1, k)).transpose(1, 2).flatten(2)
    else:
        rows = w.unflatten(1, (-1, args.group_size))
    scale, zero = calculate_qparams(rows.amin(-1), rows.amax(-1), args, found.get("weight_global_scale"))
    found["weight_scale"] = scale.to(w.dtype)
    if not args.symmetric:
        found["weight_zero_point"] = zero.to(torch.int8)
    return found


def library_inputs(args: QuantizationArgs | None) -> dict[str, torch.Tensor]:
    """The calibrated tensors of a layer's input, with made-up values."""
    if args is None or args.dynamic is True:
        return {}
    if args.dynamic == "local":
        return {"input_global_scale": torch.tensor([INPUT_GLOBAL_SCALE])}
    found = {"input_scale": torch.tensor([INPUT_SCALE], dtype=torch.bfloat16)}
    zero = {} if args.symmetric else {"input_zero_point": torch.tensor([-3], dtype=torch.int8)}
    return {**found, **zero}


def library_compress(w: torch.Tensor, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    """The layer's tensors as the library's own compressor makes them from a float weight (N, K)."""
    assert scheme.weights is not None
    state = {"weight": w, **library_qparams(w, scheme.weights), **library_inputs(scheme.input_activations)}
    compressed: dict[str, torch.Tensor] = compressor(scheme).compress(state, scheme)
    return compressed


def library_decompress(tensors: dict[str, torch.Tensor], scheme: QuantizationScheme) -> torch.Tensor:
    """The weight that the library reads from the tensors of a layer."""
    weight: torch.Tensor = compressor(scheme).decompress(tensors, scheme)["weight"]
    return weight


def compressor(scheme: QuantizationScheme) -> Any:
    return BaseCompressor.get_value_from_registry(scheme.format)


def random_weight(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """A weight in bfloat16 whose rows differ in size, off centre."""
    generator = torch.Generator().manual_seed(seed)
    return ((torch.randn(shape, generator=generator) + 0.3) * torch.rand(shape[0], 1, generator=generator)).bfloat16()


def quantized(w: torch.Tensor, scheme: TensorScheme) -> QuantizedTensor:
    """A weight quantized by quantkit."""
    return numerics.quantize(w, numerics.get(scheme.number).qparams(w, scheme, scale_dtype=torch.bfloat16), scheme)


def inputs(scheme: Scheme) -> QParams | None:
    """The values of `library_inputs` as quantkit holds them."""
    a = scheme.activations
    if a is None or not scheme.calibrates_input:
        return None
    zero = None if a.symmetric else torch.tensor([[-3]], dtype=torch.int8)
    scale = torch.full((1, 1), INPUT_SCALE, dtype=torch.bfloat16)
    return QParams(scale, zero, torch.tensor([INPUT_GLOBAL_SCALE]) if a.number == "nvfp4" else None)


def same_bytes(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """The same dtype, shape and bytes; torch.equal knows no float8."""
    if a is None or b is None:
        return a is b
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))
