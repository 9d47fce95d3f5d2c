"""Products of 8-bit operands: their meaning, the operator, and the kernels in the interpreter and as machine code."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from poison import poisoned
from triton_tools import CAPABILITIES, SHARED, compile_kernel, interpreted, mutant, resources, sass

from quantkit import numerics
from quantkit.numerics._activations import fake_quantize
from quantkit.types import TensorScheme
from quantkit_kernels import activation
from quantkit_kernels._w8a8_choice import Config, choose, choose_block, tiles
from quantkit_kernels.w8a8 import w8a8_linear, w8a8_linear_reference, weight_sums

FP8 = torch.float8_e4m3fn
Arguments = dict[str, Any]


def arguments(
    kind: torch.dtype,
    m: int,
    n: int,
    k: int,
    *,
    shared: bool = False,
    bias: bool = True,
    shifted: bool = False,
    out_dtype: torch.dtype = torch.float32,
) -> Arguments:
    """Codes over the whole range, and scales that differ from row to row by orders of magnitude."""
    g = torch.Generator().manual_seed(m + n + k)

    def codes(rows: int) -> torch.Tensor:
        if kind == torch.int8:
            return torch.randint(-128, 128, (rows, k), generator=g, dtype=torch.int8)
        return (torch.randn(rows, k, generator=g) * 100).clamp(-448, 448).to(kind)

    def scales(rows: int) -> torch.Tensor:
        if shared:
            return torch.rand(1, generator=g) + 0.1
        return (torch.rand(rows, generator=g) + 0.1)[:, None] * torch.exp2(torch.arange(rows) % 7 - 3)[:, None]

    made: Arguments = {"x_q": codes(m), "x_scale": scales(m), "weight": codes(n), "weight_scale": scales(n)}
    made |= {"bias": torch.randn(n, generator=g) * 100 if bias else None, "out_dtype": out_dtype}
    made |= {"x_zero": None, "weight_sum": None}
    if shifted:
        zero = torch.randint(-128, 128, made["x_scale"].shape, generator=g, dtype=torch.int8)
        made |= {"x_zero": zero, "weight_sum": weight_sums(made["weight"])}
    return made


def error(y: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest relative error of a row; infinite where anything was not written."""
    if not bool(torch.isfinite(y).all()):
        return float("inf")
    y, wanted = y.double().reshape(-1, y.shape[-1]), wanted.double().reshape(-1, y.shape[-1])
    return float(((y - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


# What it means -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("number", ["int8", "int8-asymmetric", "fp8_e4m3"])
def test_it_is_the_product_of_what_the_codes_stand_for(number: str, strategy: Any) -> None:
    symmetric, number = not number.endswith("asymmetric"), number.split("-")[0]
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(24, 40, generator=g), torch.randn(2, 3, 40, generator=g)
    scheme = TensorScheme(number, strategy)
    q = numerics.quantize(w, numerics.get(number).qparams(w, scheme, scale_dtype=torch.float32), scheme)
    if symmetric:
        x_q, x_scale = activation.quantize_per_token(x, number)
        zero = None
    else:
        x_q, x_scale, zero = activation.quantize_per_token_asymmetric(x)
    scale = q.qparams.scale_NG if strategy == "channel" else q.qparams.scale_NG.reshape(1)
    total = None if zero is None else weight_sums(q.codes_NK)
    y = w8a8_linear_reference(x_q, x_scale, q.codes_NK, scale, None, torch.float32, zero, total)
    seen = fake_quantize(x, TensorScheme(number, "token", symmetric=symmetric, dynamic=True))
    assert error(y, seen.double() @ numerics.dequantize(q).double().T) < 1e-6


# The operator --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", [torch.int8, FP8])
def test_on_a_cpu_it_is_the_reference(kind: torch.dtype, shared: bool, out_dtype: torch.dtype) -> None:
    given = arguments(kind, 5, 33, 70, shared=shared, shifted=kind == torch.int8, out_dtype=out_dtype)
    y, wanted = w8a8_linear(**given), w8a8_linear_reference(**given)
    assert y.dtype == out_dtype
    if kind == torch.int8:
        assert torch.equal(y, wanted)
    else:
        torch.testing.assert_close(y, wanted)


def test_the_reference_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(FP8, 5, 33, 70)
    whole = w8a8_linear_reference(**given)
    monkeypatch.setattr("quantkit_kernels.w8a8.CHUNK", 200)
    assert torch.equal(w8a8_linear_reference(**given), whole)


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 0), (3, 1, 2)])
@pytest.mark.parametrize("kind", [torch.int8, FP8])
def test_any_leading_dimensions(kind: torch.dtype, lead: tuple[int, ...]) -> None:
    m = torch.Size(lead).numel()
    given = arguments(kind, m, 24, 40)
    flat = w8a8_linear_reference(**given)
    given["x_q"], given["x_scale"] = given["x_q"].view(*lead, 40), given["x_scale"].view(*lead, 1)
    for y in (w8a8_linear(**given), w8a8_linear_reference(**given)):
        assert y.shape == (*lead, 24)
        torch.testing.assert_close(y.reshape(m, 24), flat)


@pytest.mark.parametrize("kind", [torch.int8, FP8])
def test_operator_contract(kind: torch.dtype) -> None:
    """torch's own checks: schema, fake tensors, ahead-of-time dispatch; the first of them cannot compute in FP8."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    given = arguments(kind, 4, 24, 40, shifted=kind == torch.int8)
    torch.library.opcheck(w8a8_linear, (), given, test_utils=checks if kind == torch.int8 else checks[1:])


def test_shapes_on_a_gpu_that_is_not_there() -> None:
    with torch._subclasses.FakeTensorMode():
        codes, weight = (torch.empty(rows, 40, dtype=torch.int8, device="cuda") for rows in (4, 24))
        x_scale, scale = (torch.empty(rows, 1, device="cuda") for rows in (4, 24))
        y = w8a8_linear(codes, x_scale, weight, scale, None, torch.bfloat16)
        assert (y.shape, y.dtype, y.device.type) == ((4, 24), torch.bfloat16, "cuda")


def test_it_compiles_and_exports_with_any_number_of_tokens() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            given = arguments(torch.int8, 1, 24, 40)
            self.weight = torch.nn.Parameter(given["weight"], requires_grad=False)
            self.scale = torch.nn.Parameter(given["weight_scale"], requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x_q, x_scale = activation.quantize_per_token(x, "int8")
            return w8a8_linear(x_q, x_scale, self.weight, self.scale, None, x.dtype)

    layer, x = Layer(), torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2, max=512)},))
    assert "quantkit.w8a8_linear" in str(exported.graph)
    for tokens in (2, 5):
        assert torch.equal(compiled(x[:tokens]), layer(x[:tokens]))
        assert torch.equal(exported.module()(x[:tokens]), layer(x[:tokens]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x_q": torch.zeros(2, 39, dtype=torch.int8)}, r"expected torch.int8 \(..., 40\)"),
        ({"x_q": torch.zeros(2, 40).to(FP8)}, "x_q is torch.float8_e4m3fn"),
        ({"x_scale": torch.ones(3, 1)}, r"expected float \(2, 1\) or \(1,\)"),
        ({"x_scale": torch.ones(2, 1, dtype=torch.int32)}, "x_scale is torch.int32"),
        ({"weight": torch.zeros(24, 40)}, r"expected int8 or float8_e4m3fn \(N, K\)"),
        ({"weight_scale": torch.ones(24)}, r"weight_scale is torch.float32 \(24,\); expected \(24, 1\) or \(1,\)"),
        ({"bias": torch.zeros(23)}, r"expected float \(24,\)"),
        ({"out_dtype": torch.int32}, "out_dtype is torch.int32"),
        ({"weight_sum": None}, "come together"),
        ({"x_zero": torch.zeros(2, 1)}, "x_zero is torch.float32"),
        ({"weight_sum": torch.zeros(24)}, r"expected int32 \(24,\)"),
        ({"x_q": torch.zeros(2, 1 << 16, dtype=torch.int8), "weight": torch.zeros(24, 1 << 16, dtype=torch.int8)}, "K"),
    ],
)
def test_tensors_that_do_not_belong_together(change: Arguments, says: str) -> None:
    given = arguments(torch.int8, 2, 24, 40, shifted=True) | change
    with pytest.raises(ValueError, match=says):
        w8a8_linear(**given)
    with pytest.raises(ValueError, match=says), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        w8a8_linear(**given)


def test_a_machine_without_triton_imports_the_module() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from quantkit_kernels import fp8_block, w8a8\n"
        "one = torch.ones(1, 16, dtype=torch.int8), torch.ones(1)\n"
        "print(w8a8.w8a8_linear(*one, *one, None, torch.float32).item(), 'quantkit_kernels._w8a8' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["16.0", "False"]


# The kernels, interpreted --------------------------------------------------------------------------------------------

SMALL, LARGE = Config("small", 16, 32, 64), Config("large", 32, 32, 64)
CASES: list[tuple[torch.dtype, Config, tuple[int, int, int], Arguments]] = [
    (torch.int8, SMALL, (1, 32, 64), {}),
    (torch.int8, SMALL, (3, 40, 130), {"shifted": True}),
    (torch.int8, Config("small", 16, 32, 64, split=3), (17, 40, 330), {"shifted": True, "bias": False}),
    (torch.int8, Config("small", 16, 32, 32, split=4), (2, 33, 64), {"shared": True}),  # parts with nothing to do
    (torch.int8, LARGE, (33, 40, 130), {"shifted": True}),
    (torch.int8, Config("large", 16, 16, 32, halves=2), (150, 72, 40), {"shared": True, "shifted": True}),
    (torch.int8, Config("library"), (33, 300, 136), {"shifted": True}),  # torch's sums, and a kernel that scales them
    (FP8, Config("small", 16, 32, 128, split=2), (5, 40, 400), {}),
    (FP8, Config("small", 32, 32, 256), (5, 40, 400), {"shared": True}),
    (FP8, Config("large", 16, 16, 64, halves=2), (33, 72, 150), {}),
    (FP8, Config("large", 16, 16, 64), (150, 40, 64), {"bias": False}),
]


@pytest.fixture
def kernels() -> Iterator[Any]:
    with interpreted("_w8a8") as modules:
        yield modules["_w8a8"]


def outcomes(module: Any, cases: list[Any]) -> Iterator[float]:
    """Errors of the kernels over the cases."""
    for kind, config, shape, how in cases:
        given = arguments(kind, *shape, **how)
        wanted = w8a8_linear_reference(**given)
        own = Config(**vars(config))
        with poisoned():
            y = module.linear(**given, config=own)
        yield 0.0 if torch.equal(y, wanted) else error(y, wanted)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1].path}{c[1].split}{c[1].halves}-{c[2]}")
def test_kernels_give_the_reference(kernels: Any, case: Any) -> None:
    """Integers to the bit; FP8 to the rounding of float32 sums."""
    assert next(outcomes(kernels, [case])) <= (0 if case[0] == torch.int8 else 1e-6)


def test_rows_that_lie_apart_and_no_rows(kernels: Any) -> None:
    given = arguments(torch.int8, 4, 24, 40)
    wanted = w8a8_linear_reference(**given)
    wide = torch.full((4, 100), 99, dtype=torch.int8)
    wide[:, 3:43] = given["x_q"]
    across = given["x_q"].t().contiguous().t()
    for x in (wide[:, 3:43], across):
        assert torch.equal(kernels.linear(**given | {"x_q": x}, config=SMALL), wanted)
    assert torch.equal(kernels.linear(**given | {"x_q": given["x_q"].view(2, 2, 40)}), wanted.view(2, 2, 24))
    nothing = given | {"x_q": given["x_q"][:0], "x_scale": given["x_scale"][:0]}
    assert kernels.linear(**nothing).shape == (0, 24)


def test_every_weight_is_read_where_it_is(kernels: Any) -> None:
    """Tokens that are 1 in one column give that column of the weight."""
    given = arguments(torch.int8, 1, 40, 130, bias=False)
    given |= {"x_q": torch.eye(130, dtype=torch.int8), "x_scale": torch.ones(1)}
    y = kernels.linear(**given, config=Config("small", 64, 32, 64, split=2))
    assert torch.equal(y, given["weight"].t().float() * given["weight_scale"].t())


def test_integers_do_not_overflow_and_their_sums_are_exact(kernels: Any) -> None:
    given = arguments(torch.int8, 1, 16, 4096, bias=False)
    given["x_q"].fill_(-128)
    given["weight"].fill_(-128)[:, 0] = 1
    exact = 4095 * 128 * 128 - 128
    given |= {"x_scale": torch.ones(1), "weight_scale": torch.full((1,), 2.0**-20)}
    y = kernels.linear(**given, config=Config("small", 16, 16, 128, split=2))
    assert torch.equal(y, torch.full((1, 16), exact * 2.0**-20, dtype=torch.float64).float())


def test_poison_stays_in_its_token(kernels: Any) -> None:
    given = arguments(FP8, 20, 40, 130)
    wanted = w8a8_linear_reference(**given)
    given["x_scale"][7] = float("nan")
    for config in (SMALL, LARGE):
        y = kernels.linear(**given, config=config)
        assert y[7].isnan().all()
        assert error(y[torch.arange(20) != 7], wanted[torch.arange(20) != 7]) < 1e-6


MUTANTS = {
    "the last column is left out": ("(inside < k - start)", "(inside < k - start - 1)"),
    "parts begin where they should end": ("first = part * steps * BK", "first = (part + 1) * steps * BK"),
    "a part is lost": ("for _ in range(1, SPLIT)", "for _ in range(2, SPLIT)"),
    "the first program speaks for all": ("== SPLIT - 1", "== 0"),
    "two parts in one place": ("at + part * step", "at + part // 2 * step"),
    "a zero point of the wrong sign": ("acc -= zero", "acc += zero"),
    "the first token's scale for all": ("x_scale_ptr + row * x_scale_stride", "x_scale_ptr + row * 0"),
    "the first row's scale for all": ("w_scale_ptr + column * w_scale_stride", "w_scale_ptr + column * 0"),
    "bias of the row": ("bias_ptr + column, column < n", "bias_ptr + 0 * column, column < n"),
    "the second half is the first": ("(column + half * BN)", "(column)"),
    "tiles out of order": ("first + inside % height", "first + inside // height"),
    "the second half's sums from the first": (
        "other_acc = product(x, w.T, other_acc",
        "other_acc = product(x, w.T, acc",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_found(name: str, tmp_path: Path) -> None:
    with interpreted("_w8a8") as modules:
        broken = mutant(modules["_w8a8"], *MUTANTS[name], tmp_path)
        found = outcomes(broken, [c for c in CASES if c[0] == torch.int8])
        assert any(e > 1e-5 for e in found)


# torch's own products ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shared", "bias"), [(False, True), (True, True), (False, False)])
def test_torch_s_product_means_the_same(shared: bool, bias: bool) -> None:
    from quantkit_kernels import _w8a8

    given = arguments(FP8, 5, 48, 64, shared=shared, bias=bias, out_dtype=torch.bfloat16)
    y = _w8a8.library(*(given[name] for name in ("x_q", "x_scale", "weight", "weight_scale", "bias", "out_dtype")))
    assert error(y, w8a8_linear_reference(**given | {"out_dtype": torch.float32})) < 4e-3
    mixed = given | {"x_scale": torch.full((1,), 0.5), "weight_scale": torch.rand(48, 1) + 0.5}
    y = _w8a8.library(*(mixed[name] for name in ("x_q", "x_scale", "weight", "weight_scale", "bias", "out_dtype")))
    assert error(y, w8a8_linear_reference(**mixed | {"out_dtype": torch.float32})) < 4e-3


@pytest.mark.parametrize(
    ("shape", "shared", "out_dtype", "fits"),
    [
        ((5, 48, 64), False, torch.bfloat16, True),
        ((5, 48, 64), False, torch.float32, False),
        ((5, 48, 64), True, torch.float16, True),
        ((5, 48, 64), True, torch.float32, False),
        ((5, 40, 64), False, torch.bfloat16, False),
        ((5, 48, 72), False, torch.bfloat16, False),
    ],
)
def test_what_torch_s_product_takes(shape: Any, shared: bool, out_dtype: torch.dtype, fits: bool) -> None:
    from quantkit_kernels import _w8a8

    given = arguments(FP8, *shape, shared=shared)
    weight, scales = given["weight"], (given["x_scale"], given["weight_scale"])
    assert _w8a8.library_fits(given["x_q"], weight, *scales, out_dtype) is fits
    wide = torch.zeros(shape[0], 2 * shape[2]).to(FP8)[:, : shape[2]]
    assert not _w8a8.library_fits(wide, weight, *scales, out_dtype)


# Choice and machine code ---------------------------------------------------------------------------------------------

SHAPES = [(6144, 4096), (4096, 14336), (57344, 8192), (256, 512), (72, 40)]
GPUS = {80: 108, 89: 128, 90: 132, 100: 148}


def chosen(capability: int, m: int, n: int, k: int, fp8: bool, fits: bool = False) -> Config:
    major, minor = divmod(capability, 10)
    return choose(m, n, k, fp8=fp8, fits=fits, capability=(major, minor), processors=GPUS[capability])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_choice_fits_the_gpu(capability: int) -> None:
    major, minor = divmod(capability, 10)
    for n, k in SHAPES:
        for m in (1, 16, 17, 33, 64, 65, 128, 129, 400, 4096, 1 << 20):
            one_a_row = [chosen(capability, m, n, k, fp8) for fp8 in (False, True)]
            block = choose_block(m, n, k, fits=False, capability=(major, minor), processors=GPUS[capability])
            for config in (*one_a_row, block):
                shared = config.stages * config.bk * (config.bm + config.bn * config.halves)
                assert shared <= SHARED[capability]
                assert tiles(config, m, n) * config.bm * config.bn * config.halves >= m * n
                assert config.split == 1 or -(-k // config.bk) >= 4 * config.split
                assert config.path == "large" if m >= 4096 and n >= 4096 else config.path in ("small", "large")
                assert config.path == "large" or config.bm >= min(m, 64)
    assert chosen(90, 65, 4096, 4096, True, True).path == "library"
    assert chosen(90, 64, 4096, 4096, True, True).path == "small"


def compiled(config: Config, fp8: bool, capability: int, **constants: Any) -> Any:
    """The kernel as it is launched: strides of 1 are constants."""
    from quantkit_kernels import _w8a8

    code, total = ("*fp8e4nv", "*fp32") if fp8 else ("*i8", "*i32")
    tile = {"BM": config.bm, "BN": config.bn, "BK": config.bk, "x_scale_stride": 1, "w_scale_stride": 1}
    tile |= {"SPLIT": config.split} if config.path == "small" else {"HALVES": config.halves, "GROUP": 8}
    flags = {"BIAS": True, "SHIFTED": not fp8, "EVEN": True, "PROMOTE": capability < 100}
    types = {"x_ptr": code, "w_ptr": code, "y_ptr": "*bf16", "bias_ptr": "*bf16", "zero_ptr": "*i8"}
    types |= {"sum_ptr": "*i32", "part_ptr": total, "count_ptr": "*i32"}
    return compile_kernel(
        getattr(_w8a8, config.path),
        tile | flags | constants,
        capability,
        types,
        num_warps=config.warps,
        num_stages=config.stages,
    )


@pytest.mark.parametrize(
    ("capability", "fp8", "m", "opcode"),
    [
        (80, False, 16, "IMMA"),
        (80, False, 4096, "IMMA"),
        (89, False, 4096, "IMMA"),
        (89, True, 16, "QMMA"),
        (89, True, 4096, "QMMA"),
        (90, False, 16, "IGMMA"),
        (90, False, 4096, "IGMMA"),
        (90, True, 1, "QGMMA"),
        (90, True, 64, "QGMMA"),
        (90, True, 4096, "QGMMA"),
        (100, False, 16, "IMMA"),
        (100, True, 16, "UTCQMMA"),
        (100, True, 4096, "UTCQMMA"),
    ],
)
def test_machine_code(capability: int, fp8: bool, m: int, opcode: str, tmp_path: Path) -> None:
    """What is chosen runs on the tensor cores of each GPU, spills nothing, and reads 16 bytes at a time past L1."""
    one = {"m": 1} if m == 1 else {}  # a size of 1 is compiled in
    made = compiled(chosen(capability, m, 6144, 4096, fp8), fp8, capability, **one)
    code = sass(made, tmp_path)
    assert re.search(rf"\b{opcode}\b", code)
    assert made.metadata.shared <= SHARED[capability]
    assert resources(made, tmp_path)[1] == 0 and "LDL" not in code and "STL" not in code
    loads = re.findall(r"LDGSTS\.\S+", code)
    assert loads and all(".128" in one and "BYPASS" in one for one in loads)


def test_fp8_is_refused_where_there_is_none() -> None:
    with pytest.raises(Exception, match="fp8e4nv not supported"):
        compiled(SMALL, True, 80)


def test_fp8_is_summed_in_float32_every_128_columns(tmp_path: Path) -> None:
    """An addition an accumulator and 128 columns; without it the tensor core's short sums would run over all of K."""
    config = Config("small", 16, 64, 128, stages=2)
    made = {p: sass(compiled(config, True, 89, BIAS=False, PROMOTE=p), tmp_path).count("FADD") for p in (True, False)}
    assert made == {True: 16 * 64 // 128, False: 0}
