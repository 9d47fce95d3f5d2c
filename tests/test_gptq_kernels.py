"""GPTQ's GPU kernels without a GPU: their logic in Triton's interpreter, their machine code by the compiler alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_tools import CAPABILITIES, SHARED, compile_kernel, interpreted, resources

from quantkit import numerics
from quantkit.errors import InputError
from quantkit.types import QParams, QuantizedTensor, TensorScheme


@pytest.fixture
def gptq() -> Iterator[Any]:
    """The module, with its kernels interpreted."""
    with interpreted("_columns", "_search", "gptq", "scales") as modules:
        yield modules["gptq"]


@pytest.fixture
def scales() -> Iterator[Any]:
    with interpreted("_columns", "_search", "gptq", "scales") as modules:
        yield modules["scales"]


def tuning(gptq: Any, **kw: int) -> Any:
    """Pieces so small that a few columns are several panels, blocks and tiles, the last ones not full."""
    return gptq.Tuning(**{"panel": 32, "block": 16, "rows": 4, "sub": 8, "unroll": 4, "refit_rows": 4} | kw)


def inputs(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (n, k) and a positive definite Hessian (k, k) whose columns matter unequally."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * k, k, generator=g) @ torch.randn(k, k, generator=g) * torch.linspace(2, 0.2, k)
    hessian = x.T @ x / (4 * k)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return torch.randn(n, k, generator=g), hessian


SCHEMES = [
    TensorScheme("int4", "group", 16, True),
    TensorScheme("int4", "group", 16, False),
    TensorScheme("int3", "channel", None, False),
    TensorScheme("int2", "group", 32, True),
    TensorScheme("int8", "tensor", None, True),
    TensorScheme("mxfp4", "group", 32, True),
    TensorScheme("nvfp4", "group", 16, True),
    TensorScheme("mxint8", "group", 32, True),
    TensorScheme("mxfp6_e2m3", "group", 32, True),
    TensorScheme("mxfp6_e3m2", "group", 32, True),
    TensorScheme("fp8_e4m3", "channel", None, True),
    TensorScheme("mxfp8_e5m2", "group", 32, True),
]


def quantized(w: torch.Tensor, scheme: TensorScheme, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    qparams = numerics.get(scheme.number).qparams(w, scheme, scale_dtype=dtype)
    return numerics.quantize(w, qparams, scheme)


def plain(q: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Scales, zero points and the columns of each, as the kernels take them."""
    fine = numerics.expand(q.qparams, q.scheme, q.codes_NK.shape)
    span = q.codes_NK.shape[1] // q.qparams.scale_NG.shape[1]
    return fine.scale_NG[:, ::span], None if fine.zero_NG is None else fine.zero_NG[:, ::span], span


def codebook(scheme: TensorScheme, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """All codes that the format may give, and the element of each, float64."""
    codes = torch.arange(256, dtype=torch.uint8)
    if scheme.number.startswith("int"):
        half = 1 << (int(scheme.number[3:]) - 1)
        codes = torch.arange(-half, half, dtype=torch.int8)
    elif scheme.number == "mxint8":
        codes = torch.arange(-127, 128, dtype=torch.int8)
    elif dtype == torch.uint8:
        codes = codes[: 16 if "fp4" in scheme.number else 64]
    codes = codes.view(dtype)
    one = QParams(torch.ones(1, len(codes)))
    elements = numerics.get(scheme.number).decode(codes[None], one, scheme)[0].double()
    kept = torch.isfinite(elements)
    return codes.view(torch.uint8)[kept].view(dtype), elements[kept]


def nearest(x: torch.Tensor, q: QuantizedTensor, j: int) -> tuple[torch.Tensor, torch.Tensor]:
    """By trying all codes, in float64: code of each x (N,) in column j, and its decoded value."""
    codes, elements = codebook(q.scheme, q.codes_NK.dtype)
    fine = numerics.expand(q.qparams, q.scheme, q.codes_NK.shape)
    values = elements[None].expand(len(x), -1)
    if fine.zero_NG is not None:
        values = values - fine.zero_NG[:, j : j + 1].double()
    values = values * fine.scale_NG[:, j : j + 1].double()
    best = (values - x[:, None]).abs().argmin(1)
    return codes.view(torch.uint8)[best].view(codes.dtype), values.gather(1, best[:, None])[:, 0]


def value_of(codes: torch.Tensor, q: QuantizedTensor) -> torch.Tensor:
    """What codes stand for: zero has two of them in most formats."""
    return numerics.dequantize(QuantizedTensor(codes, q.qparams, q.scheme))


def missed(w: torch.Tensor, q: QuantizedTensor, hessian: torch.Tensor) -> float:
    d = (w - numerics.dequantize(q)).double()
    return float(((d @ hessian.double()) * d).sum())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.number}-{s.strategy}-{s.symmetric}")
def test_rounding_is_that_of_the_number_format(gptq: Any, scheme: TensorScheme) -> None:
    """With no correction from column to column the loop only rounds: values, ties between them, and beyond the ends."""
    k = 32
    _, elements = codebook(
        scheme, numerics.quantize(torch.ones(1, k), QParams(torch.ones(1, k)), scheme).codes_NK.dtype
    )
    ordered = elements.unique().float()
    hard = torch.cat(
        [ordered, (ordered[1:] + ordered[:-1]) / 2, 3 * ordered, ordered * 1e-3, torch.tensor([-0.0, 1e30])]
    )
    w = torch.nn.functional.pad(hard, (0, -len(hard) % k)).view(-1, k)
    scale = torch.exp2(torch.arange(len(w)) % 5 - 2)[:, None].float()  # powers of two: ties stay ties
    zero = (torch.arange(len(w)) % 3 - 1)[:, None].float() if not scheme.symmetric else None
    fine = QParams(scale.expand(-1, k), None if zero is None else zero.expand(-1, k))
    wanted = numerics.get(scheme.number).encode(w * scale, fine, scheme)
    found = gptq.ldlq(
        w * scale,
        scale,
        zero,
        torch.eye(k),
        None,
        scheme.number,
        span=k,
        tuning=tuning(gptq, rows=64, panel=64, block=32),
    )
    given = w != 0  # the sign of a zero is lost in sums
    assert same(found[given], wanted[given])
    left = gptq.refine(
        w * scale,
        found,
        scale,
        zero,
        torch.eye(k),
        scheme.number,
        span=k,
        sweeps=1,
        refit=False,
        tuning=tuning(gptq, rows=64, panel=64, block=32),
    )
    assert torch.equal(
        numerics.get(scheme.number).decode(left[0], fine, scheme),
        numerics.get(scheme.number).decode(wanted, fine, scheme),
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.number}-{s.strategy}-{s.symmetric}")
def test_loop_and_descent_against_all_codes_in_float64(gptq: Any, scheme: TensorScheme) -> None:
    n, k = 4, 64
    w, hessian = inputs(n, k)
    q = quantized(w, scheme)
    scale, zero, span = plain(q)
    order = torch.argsort(hessian.diagonal(), descending=True)
    upper = torch.linalg.cholesky(hessian.double()[order][:, order].flip(0, 1)).flip(0, 1)
    factor = upper / upper.diagonal()
    delta, codes = torch.zeros(n, k, dtype=torch.float64), torch.empty_like(q.codes_NK)
    for i, j in enumerate(order.tolist()):
        code, value = nearest(w[:, j].double() + delta[:, :i] @ factor[:i, i], q, j)
        codes[:, j], delta[:, i] = code, w[:, j] - value
    found = gptq.ldlq(w, scale, zero, factor.float(), order, scheme.number, span=span, tuning=tuning(gptq, rows=8))
    assert torch.equal(value_of(found, q), value_of(codes, q))

    after = codes.clone()
    decoded = numerics.dequantize(QuantizedTensor(codes, q.qparams, scheme)).double()
    for j in range(k):
        gradient = (w - decoded) @ hessian[:, j].double()
        after[:, j], decoded[:, j] = nearest(decoded[:, j] + gradient / hessian[j, j].double(), q, j)
    found, unchanged = gptq.refine(
        w, codes, scale, zero, hessian, scheme.number, span=span, sweeps=1, refit=False, tuning=tuning(gptq, rows=8)
    )
    assert torch.equal(value_of(found, q), value_of(after, q)) and torch.equal(unchanged, scale)
    errors = [missed(w, QuantizedTensor(c, q.qparams, scheme), hessian) for c in (q.codes_NK, codes, after)]
    assert errors[0] > errors[1] >= errors[2]


@pytest.mark.parametrize(
    ("number", "size", "symmetric", "dtype"),
    [
        ("int4", 16, True, torch.bfloat16),
        ("int4", 16, False, torch.float16),
        ("int3", None, True, torch.float32),
        ("fp8_e4m3", 32, True, torch.bfloat16),
    ],
)
def test_scales_are_least_squares_group_after_group(
    gptq: Any, number: str, size: int | None, symmetric: bool, dtype: torch.dtype
) -> None:
    n, k = 5, 48 if size != 32 else 64
    w, hessian = inputs(n, k)
    scheme = TensorScheme(number, "group" if size else "channel", size, symmetric)
    q = quantized(w, scheme, dtype)
    _, zero, span = plain(q)
    scale = q.qparams.scale_NG.clone()
    scale[1] *= 1.5  # far from the best
    if symmetric and number.startswith("int"):
        scale[2] *= -1  # a scale keeps its sign
    fine = scale.double().repeat_interleave(span, 1)
    elements = q.codes_NK.double() - (0 if zero is None else zero.double().repeat_interleave(span, 1))
    delta, wanted = w.double() - elements * fine, scale.clone()
    for j in range(k // span):
        part = slice(j * span, (j + 1) * span)
        c = elements[:, part]
        slope, bend = ((delta @ hessian.double()[:, part]) * c).sum(1), ((c @ hessian.double()[part, part]) * c).sum(1)
        old = scale[:, j].double()
        new = (old + slope / bend).to(dtype)
        better = ((new - old) ** 2 * bend < 2 * (new - old) * slope) & (new * old > 0)
        wanted[:, j] = torch.where(better, new, scale[:, j])
        delta[:, part] -= (wanted[:, j].double() - old)[:, None] * c
    h = hessian.clone()
    kept = torch.equal(wanted, scale)
    block = tuning(gptq, block=32)
    moved = [
        gptq.refine(w, q.codes_NK, scale, zero, h, number, span=span, sweeps=1, refit=True, tuning=t)[1]
        for t in (block, tuning(gptq, block=16))
    ]
    assert not kept and moved[0].dtype == dtype
    for found in moved:
        close = (found.double() / wanted.double() - 1).abs() < (1e-5 if dtype == torch.float32 else 1e-9)
        assert close.double().mean() > 0.9  # rounding to few digits may fall on either side
        assert torch.allclose(found.double(), wanted.double(), rtol=0.008)


def test_rounds_alternate_and_leave_the_arguments_alone(gptq: Any) -> None:
    w, hessian = inputs(5, 48)
    scheme = TensorScheme("int3", "group", 16, True)
    q = quantized(w, scheme, torch.bfloat16)
    codes, scale = q.codes_NK.clone(), q.qparams.scale_NG.clone()
    errors = [missed(w, q, hessian)]
    for sweeps in (1, 2):
        new, moved = gptq.refine(
            w, codes, scale, None, hessian, "int3", span=16, sweeps=sweeps, refit=True, tuning=tuning(gptq)
        )
        errors.append(missed(w, QuantizedTensor(new, QParams(moved), scheme), hessian))
    assert errors[0] > errors[1] > errors[2]
    assert torch.equal(codes, q.codes_NK) and torch.equal(scale, q.qparams.scale_NG)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("bits", "size", "symmetric", "search", "dtype"),
    [
        (4, 32, True, "mse", torch.bfloat16),
        (4, 24, False, "mse", torch.float16),
        (2, 48, True, "signed", torch.float32),
        (8, 96, True, "mse", torch.bfloat16),
    ],
)
def test_integer_scales_are_those_of_torch(
    scales: Any, bits: int, size: int, symmetric: bool, search: str, dtype: torch.dtype, weighted: bool
) -> None:
    w = torch.randn(7, 96, generator=torch.Generator().manual_seed(bits)) * torch.logspace(-3, 3, 7)[:, None]
    w[2, :size] = 0
    w[3, :size] = 0.7
    importance = torch.rand(96, generator=torch.Generator().manual_seed(1)) if weighted else None
    scheme = TensorScheme(f"int{bits}", "group", size, symmetric)
    wanted = numerics.get(scheme.number).qparams(w, scheme, scale_dtype=dtype, search=search, importance_K=importance)
    scale, zero = scales.search_scales_int(
        w, importance, group_size=size, bits=bits, symmetric=symmetric, scale_dtype=dtype, signed=search == "signed"
    )
    # A float32 scale shows the last bits of the sums that it was fitted with; others are rounded.
    assert scale.dtype == dtype
    assert torch.allclose(scale.double(), wanted.scale_NG.double(), rtol=1e-5 if dtype == torch.float32 else 0, atol=0)
    assert (zero is None) if wanted.zero_NG is None else same(zero, wanted.zero_NG)
    if search == "signed":
        assert bool((scale < 0).any()) and bool((scale > 0).any())


@pytest.mark.parametrize("number", ["nvfp4", "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxint8", "mxfp8_e4m3", "mxfp8_e5m2"])
def test_float_scales_are_those_of_torch(scales: Any, number: str) -> None:
    w = torch.randn(9, 64, generator=torch.Generator().manual_seed(5)) * torch.logspace(-4, 4, 9)[:, None]
    w[2, :32] = 0
    importance = torch.rand(64, generator=torch.Generator().manual_seed(1))
    scheme = TensorScheme(number, "group", 16 if number == "nvfp4" else 32, True)
    wanted = numerics.get(number).qparams(w, scheme, scale_dtype=torch.float32, search="mse", importance_K=importance)
    if number == "nvfp4":
        found = scales.search_scales_nvfp4(w, importance, wanted.global_scale)
    else:
        found = scales.search_scales_mx(w, importance, number)
    assert same(found, wanted.scale_NG)


def test_what_does_not_fit_is_refused(gptq: Any, scales: Any) -> None:
    w, hessian = torch.ones(4, 32), torch.eye(32)
    good: dict[str, Any] = {"span": 16}
    ones = torch.ones(4, 2)
    with pytest.raises(ValueError, match="no kernel for number format 'int9'"):
        gptq.ldlq(w, ones, None, hessian, None, "int9", **good)
    with pytest.raises(ValueError, match=r"the matrix torch.float32 \(16, 16\)"):
        gptq.ldlq(w, ones, None, hessian[:16, :16], None, "int4", **good)
    with pytest.raises(ValueError, match=r"scales are \(4, 2\); 32 columns, 8 a scale, need \(4 or 1, 4\)"):
        gptq.ldlq(w, ones, None, hessian, None, "int4", span=8)
    with pytest.raises(ValueError, match="zero points are"):
        gptq.ldlq(w, ones, ones[:, :1], hessian, None, "int4", **good)
    with pytest.raises(ValueError, match=r"codes are torch\.uint8"):
        gptq.refine(
            w, torch.zeros(4, 32, dtype=torch.uint8), ones, None, hessian, "int4", sweeps=1, refit=False, **good
        )
    codes = torch.zeros(4, 32, dtype=torch.int8)
    with pytest.raises(ValueError, match="that rows share cannot be refitted"):
        gptq.refine(w, codes, ones[:1], None, hessian, "int4", sweeps=1, refit=True, **good)
    with pytest.raises(ValueError, match=r"scales of torch\.float64"):
        gptq.refine(w, codes, ones.double(), None, hessian, "int4", sweeps=1, refit=True, **good)
    common: dict[str, Any] = {"group_size": 16, "bits": 4, "symmetric": True, "scale_dtype": torch.float32}
    for wrong, said in (
        ({"group_size": 24}, "group_size 24 with 32 columns"),
        ({"bits": 9}, "integers of 9 bits"),
        ({"symmetric": False, "signed": True}, "signed scales are for symmetric"),
        ({"scale_dtype": torch.float64}, "scales of torch.float64"),
    ):
        with pytest.raises(ValueError, match=said):
            scales.search_scales_int(w, None, **common | wrong)
    with pytest.raises(ValueError, match=r"importance is torch\.float64"):
        scales.search_scales_int(w, torch.ones(32).double(), **common)
    with pytest.raises(ValueError, match="not contiguous"):
        scales.search_scales_int(w.T, None, **common | {"group_size": 4})
    with pytest.raises(ValueError, match="'nvfp4' is no MX format"):
        scales.search_scales_mx(w, None, "nvfp4")


def test_settings_of_torch_are_put_back() -> None:
    """In a process of its own: the settings are the process's."""
    code = """
import torch
from quantkit_kernels.gptq import products
matmul = torch.backends.cuda.matmul
def read(get):
    try:
        return get()
    except RuntimeError as error:
        return str(error)[:40]
def state():
    return [read(lambda: matmul.fp32_precision), read(lambda: matmul.allow_tf32),
            read(torch.get_float32_matmul_precision), read(lambda: torch.backends.mkldnn.matmul.fp32_precision)]
def clear():
    torch.set_float32_matmul_precision("highest")
    matmul.fp32_precision = "none"
settings = {
    "none": lambda: None,
    "old on": lambda: setattr(matmul, "allow_tf32", True),
    "old off": lambda: setattr(matmul, "allow_tf32", False),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "new tf32": lambda: setattr(matmul, "fp32_precision", "tf32"),
    "new ieee": lambda: setattr(matmul, "fp32_precision", "ieee"),
}
for name, set_it in settings.items():
    for wanted in (True, False):
        clear()
        set_it()
        first = state()
        try:
            with products(wanted):
                assert matmul.allow_tf32 is wanted, (name, state())
                raise KeyError
        except KeyError:
            pass
        assert state() == first, (name, wanted, first, state())
print("restored", len(settings))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["restored", "6"], done.stderr


def test_a_machine_without_triton_imports_the_modules() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from quantkit_kernels import gptq, scales\n"
        "print(gptq.available('cpu'), 'quantkit_kernels._columns' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("kernel", ["loop", "descent", "refit", "search", "search row", "difference"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_machine_code(capability: int, kernel: str, tmp_path: Path) -> None:
    """Compiles within what a GPU has: almost nothing spilled, shared memory that fits, IEEE division, nothing fused."""
    from quantkit_kernels import _columns, _numbers, _search
    from quantkit_kernels.gptq import Tuning

    default, int4 = Tuning(), _numbers.get("int4").constants()
    if kernel in ("loop", "descent"):
        shape = {"ROWS": default.rows, "SUB": default.sub, "UNROLL": min(default.sub, default.unroll)}
        constants = {"DESCENT": kernel == "descent", "ASYMMETRIC": True, **shape, **int4}
        made = compile_kernel(
            _columns.columns,
            constants,
            capability,
            {"code_ptr": "*i8"},
            num_warps=default.warps,
            num_stages=1,
        )
    elif kernel == "refit":
        shape = {"ROWS": default.refit_rows, "WIDTH": default.block, "SPAN": 128, "UNROLL": default.unroll}
        constants = {"ASYMMETRIC": True, "STORED": "bfloat16", **shape, **int4}
        made = compile_kernel(
            _columns.refit,
            constants,
            capability,
            {"code_ptr": "*i8"},
            num_warps=default.refit_warps,
            num_stages=1,
        )
    elif kernel == "difference":
        constants = {"ASYMMETRIC": True, "ROWS": 16, "SPAN": 128, "LOW": -8.0, "HIGH": 7.0}
        types = {"scale_ptr": "*bf16", "zero_ptr": "*i8", "out_ptr": "*bf16"}
        made = compile_kernel(_search.difference, constants, capability, types, num_warps=4)
    else:
        span = 128 if kernel == "search" else 16384
        constants = {
            "SYMMETRIC": False,
            "SIGNED": False,
            "WEIGHTED": True,
            "STORED": "bfloat16",
            "LOW": -8.0,
            "HIGH": 7.0,
        }
        constants |= {"SHRINKS": 32, "FITS": 3, "ROWS": max(1, 2048 // span), "SPAN": span}
        warps = 4 if span == 128 else 16
        made = compile_kernel(_search.search_integer, constants, capability, {"tiny": "fp32"}, num_warps=warps)
    assert made.metadata.shared <= SHARED[capability]
    assert "div.rn.f32" in made.asm["ptx"] and "div.full" not in made.asm["ptx"] and "div.approx" not in made.asm["ptx"]
    if kernel != "refit":  # which takes fused steps where torch takes a matrix product
        assert "fma.rn" not in made.asm["ptx"]
    if kernel in ("loop", "descent"):
        assert made.asm["ptx"].count("bar") <= 2  # one, after a tile: no exchange through shared memory inside
    registers, stack = resources(made, tmp_path)
    assert stack <= 16, f"{stack} bytes of registers spilled"  # a pointer, kept aside to run more programs
    assert registers <= 255


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_difference_of_a_scaled_weight_is_that_of_torch(scales: Any, symmetric: bool) -> None:
    g = torch.Generator().manual_seed(5)
    w, s = torch.randn(7, 48, generator=g), torch.rand(48, generator=g) + 0.5
    scheme = TensorScheme("int3", "group", 24, symmetric)
    q = numerics.get("int3").qparams(w, scheme, scale_dtype=torch.bfloat16)
    found = scales.rounding_difference(w, s, q.scale_NG, q.zero_NG, group_size=24, bits=3, dtype=torch.float32)
    rounded = numerics.dequantize(numerics.quantize(w, q, scheme))
    assert torch.allclose(found, (rounded - w) / s, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "scheme",
    [
        TensorScheme("int4", "group", 16, False),
        pytest.param(TensorScheme("int4", "group", 16, True), marks=pytest.mark.slow),
        pytest.param(TensorScheme("int3", "channel", None, True), marks=pytest.mark.slow),
        pytest.param(TensorScheme("mxfp4", "group", 32, True), marks=pytest.mark.slow),
        pytest.param(TensorScheme("fp8_e4m3", "tensor", None, True), marks=pytest.mark.slow),
    ],
    ids=lambda s: f"{s.number}-{s.strategy}-{s.symmetric}",
)
def test_several_problems_at_once_are_each_what_they_are_alone(gptq: Any, scheme: TensorScheme) -> None:
    """Each with its own Hessian and its own order of columns; rows that fill no tile."""
    n, k, count = 3, 32, 2
    each = [inputs(n, k, seed=i) for i in range(count)]
    each = [(w * (i + 1), hessian.roll((i, i), (0, 1))) for i, (w, hessian) in enumerate(each)]
    orders = [torch.argsort(h.diagonal(), descending=True) for _, h in each]
    assert not torch.equal(orders[0], orders[1])
    factors = []
    for (_, hessian), order in zip(each, orders):
        upper = torch.linalg.cholesky(hessian[order][:, order].flip(0, 1)).flip(0, 1)
        factors.append(upper / upper.diagonal())
    given = [quantized(w, scheme) for w, _ in each]
    parts = [plain(q) for q in given]
    span, refit = parts[0][2], scheme.strategy in ("group", "channel") and scheme.number.startswith("int")
    stack = {"w": torch.stack([w for w, _ in each]), "hessian": torch.stack([h for _, h in each])}
    scale = torch.stack([part[0] for part in parts])
    zeros = [part[1] for part in parts if part[1] is not None]
    shifts = torch.stack(zeros) if zeros else None
    t = tuning(gptq)
    stacked = torch.stack(orders)
    choices: list[torch.Tensor | None] = [None, stacked] if scheme.symmetric else [stacked]
    for chosen in choices:
        found = gptq.ldlq(stack["w"], scale, shifts, torch.stack(factors), chosen, scheme.number, span=span, tuning=t)
        better, moved = gptq.refine(
            stack["w"],
            found,
            scale,
            shifts,
            stack["hessian"],
            scheme.number,
            span=span,
            sweeps=1,
            refit=refit,
            tuning=t,
        )
        for i, (w, hessian) in enumerate(each):
            one = None if chosen is None else orders[i]
            shift = shifts[i] if shifts is not None else None
            alone = gptq.ldlq(w, scale[i], shift, factors[i], one, scheme.number, span=span, tuning=t)
            assert alone.dtype == found.dtype and (value_of(alone, given[i]) != value_of(found[i], given[i])).sum() <= 3
            again, scales = gptq.refine(
                w, found[i], scale[i], shift, hessian, scheme.number, span=span, sweeps=1, refit=refit, tuning=t
            )
            assert (value_of(again, given[i]) != value_of(better[i], given[i])).sum() <= 3
            assert torch.allclose(scales, moved[i], rtol=1e-4)


def test_many_weights_are_each_quantized_as_they_are_alone(gptq: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among them one whose Hessian cannot be factored, and one with inputs that never fired."""
    from quantkit.algorithms import _kernels
    from quantkit.algorithms import gptq as method
    from quantkit.types import Notes, Stats

    monkeypatch.setattr(_kernels, "kernels", gptq)
    monkeypatch.setattr(_kernels, "available", lambda device: True)
    each = [inputs(3, 32, seed=i) for i in range(3)]
    grams = [hessian for _, hessian in each]
    grams[1] = torch.eye(32) + 5 * (torch.ones(32, 32) - torch.eye(32)) * (torch.arange(32) % 2 * 2.0 - 1)
    grams[1] = (grams[1] + grams[1].T) / 2 + 9 * torch.eye(32).roll(1, 0) + 9 * torch.eye(32).roll(1, 1)
    grams[2][4], grams[2][:, 4] = 0, 0
    stats = [Stats(100, gram_KK=gram) for gram in grams]
    for scheme in (TensorScheme("int4", "group", 16, False), TensorScheme("mxfp4", "group", 32)):
        for order in ("static", "none") if scheme.symmetric else ("static",):
            options = method.Options(act_order=order, sweeps=1)
            common: dict[str, Any] = {"options": options, "scale_dtype": torch.bfloat16}
            told = [Notes() for _ in each]
            found = method.quantize_many([w for w, _ in each], scheme, stats, notes=told, **common)
            for i, (w, _) in enumerate(each):
                notes = Notes()
                alone = method.quantize(w, scheme, stats[i], notes=notes, **common)
                assert notes.lines == told[i].lines
                errors = [missed(w, q, grams[i]) for q in (alone, found[i])]
                assert abs(errors[0] - errors[1]) <= 1e-3 * abs(errors[0])
            assert ["could not be factored" in " ".join(x.lines) for x in told] == [False, True, False]
            assert "1 of 32 input channels" in told[2].lines[0]
    with pytest.raises(InputError, match="number 1 of 2: gptq needs calibration data"):
        method.quantize_many([w for w, _ in each[:2]], scheme, [stats[0], None], notes=told, **common)
