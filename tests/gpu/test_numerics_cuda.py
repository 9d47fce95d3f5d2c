"""Number formats on a GPU: the same scales, codes and values as on a CPU, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from quantkit import algorithms, numerics
from quantkit.errors import InputError
from quantkit.numerics._activations import Magnitudes, fake_quantize
from quantkit.types import Notes, QParams, QuantizedTensor, Stats, TensorScheme

pytestmark = pytest.mark.gpu

STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "tensor"},
    {"strategy": "channel"},
    {"strategy": "group", "group_size": 16},
    {"strategy": "group", "group_size": 32},
    {"strategy": "block", "block_shape": (128, 128)},
]


def weight() -> torch.Tensor:
    """Rows from the smallest floats to large ones, a group of zeros."""
    w = torch.randn(150, 160, generator=torch.Generator().manual_seed(0)) * torch.logspace(-42, 20, 150)[:, None]
    w[70:] = torch.randn(80, 160, generator=torch.Generator().manual_seed(1))
    w[80, 32:64] = 0
    return w


def accepted(number: str, symmetric: bool, strategy: dict[str, Any]) -> TensorScheme | None:
    scheme = TensorScheme(number, symmetric=symmetric, **strategy)
    try:
        numerics.get(number).qparams(weight(), scheme, scale_dtype=torch.float32)
    except InputError:
        return None
    return scheme


SCHEMES = [s for x in itertools.product(numerics.registry(), (True, False), STRATEGIES) if (s := accepted(*x))]


def on_gpu(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.cuda()


def back(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.cpu()


def same(cpu: torch.Tensor | None, gpu: torch.Tensor | None) -> bool:
    if cpu is None or gpu is None:
        return cpu is gpu
    back = gpu.cpu()
    return (cpu.dtype, cpu.shape) == (back.dtype, back.shape) and torch.equal(
        cpu.contiguous().flatten().view(torch.uint8), back.contiguous().flatten().view(torch.uint8)
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_same_bits_as_on_a_cpu(scheme: TensorScheme) -> None:
    module = numerics.get(scheme.number)
    for search, dtype in itertools.product(module.SEARCHES, (torch.bfloat16, torch.float32)):
        w = weight()
        searched = search in ("mse", "four_six", "signed")
        if searched:
            w = w[70:]  # the squares of the smallest floats are zero: there, all scales are as good
        cpu = module.qparams(w, scheme, scale_dtype=dtype, search=search)
        gpu = module.qparams(w.cuda(), scheme, scale_dtype=dtype, search=search)
        if searched:  # sums in another order may choose another scale where two are as good, or its negative
            errors = [
                (module.decode(module.encode(w, q, scheme), q, scheme) - w).double().square().sum()
                for q in (cpu, QParams(gpu.scale_NG.cpu(), back(gpu.zero_NG), back(gpu.global_scale)))
            ]
            assert abs(float(errors[1] / errors[0]) - 1) < 2e-3
        else:
            assert same(cpu.scale_NG, gpu.scale_NG) and same(cpu.zero_NG, gpu.zero_NG)
        assert same(cpu.global_scale, gpu.global_scale)
        here = QParams(cpu.scale_NG.cuda(), on_gpu(cpu.zero_NG), on_gpu(cpu.global_scale))
        codes = module.encode(w, cpu, scheme)
        assert same(codes, module.encode(w.cuda(), here, scheme))
        assert same(module.decode(codes, cpu, scheme), module.decode(codes.cuda(), here, scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gptq_runs_there_and_misses_no_more_than_rounding(scheme: TensorScheme) -> None:
    g = torch.Generator().manual_seed(8)
    x = torch.randn(600, 160, generator=g) @ (torch.randn(160, 160, generator=g) * torch.linspace(1, 0.1, 160))
    w, gram = weight()[70:].cuda(), (x.T @ x / 600).cuda()

    def missed(q: QuantizedTensor) -> float:
        d = (w - numerics.dequantize(q)).double()
        return float(((d @ gram.double()) * d).sum())

    errors = []
    for method in ("gptq", "rtn"):
        module = algorithms.get(method)
        options = module.Options(scale_search="absmax")
        q = module.quantize(w, scheme, Stats(600, gram), options=options, scale_dtype=torch.bfloat16, notes=Notes())
        errors.append(missed(q))
    assert errors[0] <= errors[1]


def test_activations_and_their_calibration() -> None:
    x = torch.randn(4, 9, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    for scheme in (
        TensorScheme("int8", "token", dynamic=True),
        TensorScheme("fp8_e4m3", "group", 128, dynamic=True),
        TensorScheme("mxfp4", "group", 32, dynamic=True),
    ):
        assert same(fake_quantize(x, scheme), fake_quantize(x.cuda(), scheme))
    cpu, gpu = Magnitudes(), Magnitudes("cuda")
    cpu.update(x)
    gpu.update(x.cuda())
    assert same(cpu.counts, gpu.counts)
    for rule in ("absmax", "percentile", "mse"):
        static = TensorScheme("fp8_e4m3", "tensor")
        assert same(cpu.scale(static, rule), gpu.scale(static, rule))
        assert same(
            fake_quantize(x, static, cpu.scale(static, rule)), fake_quantize(x.cuda(), static, gpu.scale(static, rule))
        )
