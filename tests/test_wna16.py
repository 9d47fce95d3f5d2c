"""The packed linear operator, against a dense linear on the weight that numerics decodes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import quantkit_kernels.wna16 as wna16
from quantkit import numerics
from quantkit.formats import compressed_tensors
from quantkit.types import Scheme, TensorScheme
from quantkit_kernels.wna16 import wna16_decode, wna16_linear

CASES = [
    # bits, symmetric, strategy, group_size, (N, K)
    (4, True, "group", 32, (70, 96)),
    (4, False, "group", 32, (70, 96)),
    (4, False, "group", 64, (33, 64)),
    (4, False, "channel", None, (13, 50)),
    (3, False, "channel", None, (33, 51)),
    (3, True, "group", 32, (7, 64)),
    (8, False, "group", 32, (9, 64)),
    (8, True, "tensor", None, (12, 33)),
    (5, False, "tensor", None, (12, 33)),
]


def layer(case, dtype) -> tuple[dict[str, Any], torch.Tensor]:
    """Keyword arguments of the operator, and the dense weight (N, K) in `dtype`."""
    bits, symmetric, strategy, group_size, shape = case
    scheme = TensorScheme(f"int{bits}", strategy, group_size, symmetric)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(bits)) + 0.3
    qparams = numerics.get(scheme.number).qparams(w, scheme, scale_dtype=dtype)
    q = numerics.quantize(w, qparams, scheme)
    tensors = compressed_tensors.pack(q)
    arguments: dict[str, Any] = {
        "weight_packed": tensors["weight_packed"],
        "weight_scale": tensors["weight_scale"],
        "weight_zero_point": tensors.get("weight_zero_point"),
        "in_features": shape[1],
        "bits": bits,
    }
    assert set(tensors) == set(compressed_tensors.tensors(shape, Scheme(scheme), "BF16"))
    return arguments, numerics.dequantize(q).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_equals_dense(case, dtype):
    arguments, w = layer(case, dtype)
    x = torch.randn(2, 3, w.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.randn(w.shape[0], generator=torch.Generator().manual_seed(1)).to(dtype)
    y = wna16_linear(x, bias=bias, **arguments)
    assert y.dtype == dtype
    assert torch.equal(y, F.linear(x, w, bias))
    assert torch.equal(wna16_linear(x, bias=None, **arguments), F.linear(x, w))


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 0), (3, 1, 2)])
def test_any_leading_dimensions(lead):
    arguments, w = layer(CASES[1], torch.float32)
    x = torch.randn(*lead, 96, generator=torch.Generator().manual_seed(0))
    y = wna16_linear(x, bias=None, **arguments)
    assert y.shape == (*lead, 70)
    assert torch.equal(y, F.linear(x, w))


@pytest.mark.parametrize("case", CASES)
def test_decoding_in_pieces_changes_nothing(case, monkeypatch):
    arguments, w = layer(case, torch.bfloat16)
    monkeypatch.setattr(wna16, "DECODE_ELEMENTS", 5 * w.shape[1])
    assert torch.equal(wna16_decode(**arguments, dtype=torch.bfloat16), w)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[8]])
def test_operator_contract(case):
    """torch's own checks: schema, fake tensors, autograd registration, ahead-of-time dispatch."""
    arguments, w = layer(case, torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, w.shape[1], generator=generator, requires_grad=True)
    bias = torch.randn(w.shape[0], generator=generator, requires_grad=True)
    torch.library.opcheck(wna16_linear, (x,), {"bias": bias, **arguments})


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_gradients_reach_x_and_bias(lead):
    arguments, w = layer(CASES[1], torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*lead, 96, generator=generator, requires_grad=True)
    bias = torch.randn(70, generator=generator, requires_grad=True)
    grad_y = torch.randn(*lead, 70, generator=generator)
    scale = arguments["weight_scale"].clone().requires_grad_()
    wna16_linear(x, bias=bias, **{**arguments, "weight_scale": scale}).backward(grad_y)
    got = x.grad, bias.grad
    x.grad = bias.grad = None
    F.linear(x, w, bias).backward(grad_y)
    torch.testing.assert_close(got, (x.grad, bias.grad))
    assert scale.grad is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(2, 95)}, r"expected float \(..., 96\)"),
        ({"x": torch.zeros(2, 96, dtype=torch.int64)}, "x is torch.int64"),
        ({"bits": 3}, "96 codes of 3 bits need int32"),
        ({"weight_scale": torch.ones(69, 3)}, r"expected \(70, G\)"),
        ({"weight_scale": torch.ones(70, 5)}, "5 groups do not divide in_features 96"),
        ({"weight_zero_point": torch.zeros(70, 3, dtype=torch.int32)}, r"expected torch.int32 \(9, 3\)"),
        ({"bias": torch.zeros(1)}, r"bias is \(1,\); expected \(70,\)"),
    ],
)
def test_tensors_that_do_not_belong_together(change, says):
    arguments, _ = layer(CASES[1], torch.float32)
    with pytest.raises(ValueError, match=says):
        wna16_linear(**{"x": torch.zeros(2, 96), "bias": None, **arguments, **change})
