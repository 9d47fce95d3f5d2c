"""FP8 products with scales of blocks: meaning, operator, kernels in the interpreter and as machine code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from poison import poisoned
from triton_tools import SHARED, compile_kernel, interpreted, mutant, resources, sass

from quantkit import numerics
from quantkit.numerics._activations import fake_quantize
from quantkit.types import TensorScheme
from quantkit_kernels import activation
from quantkit_kernels._w8a8_choice import Config, choose_block
from quantkit_kernels.fp8_block import fp8_block_linear, fp8_block_linear_reference

FP8 = torch.float8_e4m3fn
Arguments = dict[str, Any]


def arguments(m: int, n: int, k: int, *, bias: bool = True, out_dtype: torch.dtype = torch.float32) -> Arguments:
    """Codes over the whole range; each block has a scale unlike those beside it."""
    g = torch.Generator().manual_seed(m + n + k)

    def scales(down: int, across: int) -> torch.Tensor:
        powers = torch.exp2((torch.arange(down)[:, None] % 5 - 3 * torch.arange(across) % 4).float())
        return (torch.rand(down, across, generator=g) + 0.1) * powers

    groups = -(-k // 128)
    return {
        "x_q": (torch.randn(m, k, generator=g) * 100).clamp(-448, 448).to(FP8),
        "x_scale": scales(m, groups).t().contiguous(),
        "weight": (torch.randn(n, k, generator=g) * 100).clamp(-448, 448).to(FP8),
        "weight_scale": scales(-(-n // 128), groups),
        "bias": torch.randn(n, generator=g) * 100 if bias else None,
        "out_dtype": out_dtype,
    }


def error(y: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest relative error of a row; infinite where anything was not written."""
    if not bool(torch.isfinite(y).all()):
        return float("inf")
    y, wanted = y.double(), wanted.double()
    return float(((y - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


# What it means, and the operator -------------------------------------------------------------------------------------


def test_it_is_the_product_of_what_the_codes_stand_for() -> None:
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(200, 384, generator=g), torch.randn(2, 3, 384, generator=g)
    scheme = TensorScheme("fp8_e4m3", "block", block_shape=(128, 128))
    q = numerics.quantize(w, numerics.get("fp8_e4m3").qparams(w, scheme, scale_dtype=torch.float32), scheme)
    x_q, x_scale = activation.quantize_per_block(x, "fp8_e4m3")
    y = fp8_block_linear_reference(x_q, x_scale, q.codes_NK, q.qparams.scale_NG, None, torch.float32)
    seen = fake_quantize(x, TensorScheme("fp8_e4m3", "group", 128, dynamic=True))
    assert error(y, seen.double() @ numerics.dequantize(q).double().T) < 1e-6


@pytest.mark.parametrize("shape", [(5, 128, 256), (3, 130, 300), (1, 24, 40)])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_cpu_it_is_the_reference_in_float32(shape: tuple[int, int, int], out_dtype: torch.dtype) -> None:
    given = arguments(*shape, out_dtype=out_dtype)
    if out_dtype == torch.float16:
        given["weight_scale"] *= 1e-3
    y = fp8_block_linear(**given)
    assert y.dtype == out_dtype
    rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[out_dtype]
    assert error(y, fp8_block_linear_reference(**given | {"out_dtype": torch.float32})) < rounding


def test_the_reference_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(5, 300, 300)
    whole = fp8_block_linear_reference(**given)
    monkeypatch.setattr("quantkit_kernels.fp8_block.CHUNK", 1)
    assert torch.equal(fp8_block_linear_reference(**given), whole)


@pytest.mark.parametrize("lead", [(), (0,), (3, 1, 2)])
def test_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    m = torch.Size(lead).numel()
    given = arguments(m, 24, 130)
    flat = fp8_block_linear(**given)
    y = fp8_block_linear(**given | {"x_q": given["x_q"].view(*lead, 130)})
    assert y.shape == (*lead, 24) and torch.equal(y.view(m, 24), flat)


def test_operator_contract() -> None:
    """torch's own checks, but for one that cannot compute in FP8."""
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(fp8_block_linear, (), arguments(4, 130, 300), test_utils=checks)


def test_it_compiles_and_exports_with_any_number_of_tokens() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            given = arguments(1, 24, 130)
            self.weight = torch.nn.Parameter(given["weight"], requires_grad=False)
            self.scale = torch.nn.Parameter(given["weight_scale"], requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x_q, x_scale = activation.quantize_per_block(x, "fp8_e4m3")
            return fp8_block_linear(x_q, x_scale, self.weight, self.scale, None, x.dtype)

    layer, x = Layer(), torch.randn(5, 130, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2, max=512)},))
    for tokens in (2, 5):
        assert torch.equal(compiled(x[:tokens]), layer(x[:tokens]))
        assert torch.equal(exported.module()(x[:tokens]), layer(x[:tokens]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x_q": torch.zeros(2, 300, dtype=torch.int8)}, r"expected torch.float8_e4m3fn \(..., 300\)"),
        ({"x_scale": torch.ones(2, 3)}, r"x_scale is torch.float32 \(2, 3\); expected float \(3, 2\)"),
        ({"weight": torch.zeros(24, 300, dtype=torch.int8)}, r"expected float8_e4m3fn \(N, K\)"),
        ({"weight_scale": torch.ones(1, 2)}, r"expected float \(1, 3\)"),
        ({"weight_scale": torch.ones(1, 3, dtype=torch.int32)}, "weight_scale is torch.int32"),
        ({"bias": torch.zeros(23)}, r"expected float \(24,\)"),
    ],
)
def test_tensors_that_do_not_belong_together(change: Arguments, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fp8_block_linear(**arguments(2, 24, 300) | change)


# The kernels, interpreted --------------------------------------------------------------------------------------------

CASES = [
    (Config("small", 16, 64), (1, 64, 128), True),
    (Config("small", 16, 128, split=3), (17, 200, 700), True),
    (Config("small", 16, 64, split=4), (3, 300, 300), False),  # parts with nothing to do
    (Config("large", 16, 128), (33, 200, 300), True),
    (Config("large", 16, 128, halves=2), (150, 300, 384), True),
    (Config("large", 32, 128, halves=2), (20, 500, 200), False),
]


@pytest.fixture
def kernels() -> Iterator[Any]:
    with interpreted("_w8a8", "_fp8_block") as modules:
        yield modules["_fp8_block"]


def outcome(module: Any, case: Any) -> float:
    config, shape, bias = case
    given = arguments(*shape, bias=bias)
    with poisoned():
        y = module.linear(**given, config=Config(**vars(config)))
    return error(y, fp8_block_linear_reference(**given))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].path}{c[0].split}{c[0].halves}-{c[1]}")
def test_kernels_give_the_reference(kernels: Any, case: Any) -> None:
    assert outcome(kernels, case) < 1e-6


def test_rows_that_lie_apart_and_no_rows(kernels: Any) -> None:
    given = arguments(4, 24, 130)
    wanted = fp8_block_linear_reference(**given)
    wide = torch.zeros(4, 300).to(FP8)
    wide[:, 3:133] = given["x_q"]
    assert error(kernels.linear(**given | {"x_q": wide[:, 3:133]}, config=CASES[0][0]), wanted) < 1e-6
    apart = given["x_scale"].t().contiguous().t()
    assert error(kernels.linear(**given | {"x_scale": apart}, config=CASES[3][0]), wanted) < 1e-6
    nothing = given | {"x_q": given["x_q"][:0], "x_scale": given["x_scale"][:, :0]}
    assert kernels.linear(**nothing).shape == (0, 24)


def test_each_block_has_its_own_scale(kernels: Any) -> None:
    """Tokens that are 1 in one column give that column of the weight, exactly."""
    given = arguments(1, 300, 300, bias=False)
    given |= {"x_q": torch.eye(300).to(FP8), "x_scale": torch.ones(3, 300)}
    spread = given["weight_scale"].repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :300]
    for config in (Config("small", 64, 64, split=2), Config("large", 64, 128, halves=2)):
        assert torch.equal(kernels.linear(**given, config=config), (given["weight"].float() * spread).t())


def test_poison_stays_in_its_token(kernels: Any) -> None:
    given = arguments(20, 40, 300)
    wanted = fp8_block_linear_reference(**given)
    given["x_scale"][1, 7] = float("nan")
    others = torch.arange(20) != 7
    for config in (CASES[0][0], CASES[3][0]):
        y = kernels.linear(**given, config=config)
        assert y[7].isnan().all() and error(y[others], wanted[others]) < 1e-6


MUTANTS = {
    "the last column is left out": ("(inside < k - group * BK)", "(inside < k - group * BK - 1)"),
    "the scales of the group before": ("scale = following", "scale = scale"),
    "the scales of the token before": ("x_scale_at += m", "x_scale_at += m - 1"),
    "the first blocks for all rows": (".to(tl.int64) * BN // BK * groups", ".to(tl.int64) * 0 * groups"),
    "a part begins too late": ("first = part * steps\n", "first = part * steps + tl.minimum(part, 1)\n"),
    "the second half has the first's scale": ("other_scale = next_other", "other_scale = next_scale"),
    "the second half's weights are the first's": ("w_at + other_steps)", "w_at + w_steps)"),
    "the last group's scales stay ahead": ("group + 1 < groups, 1, 0", "group + 2 < groups, 1, 0"),
    "no bias": ("        y += tl.load(bias_ptr", "        y += 0 * tl.load(bias_ptr"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_found(name: str, tmp_path: Path) -> None:
    with interpreted("_w8a8", "_fp8_block") as modules:
        old, new = MUTANTS[name]
        broken = mutant(modules["_fp8_block"], old, new, tmp_path)
        assert any(outcome(broken, case) > 1e-4 for case in CASES)


# torch's own product, choice and machine code ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 256, 512), (5, 256, 384)])
def test_torch_s_product_takes_the_layout(shape: tuple[int, int, int]) -> None:
    """On meta tensors, where torch checks shapes and strides: (G, M) as it is, the weight's scales in rows of 4."""
    from quantkit_kernels import _fp8_block

    names = ("x_q", "x_scale", "weight", "weight_scale")
    x, x_scale, *weight = (arguments(*shape)[name].to("meta") for name in names)
    made = _fp8_block.library(x, x_scale, weight[0], weight[1], None, torch.bfloat16)
    assert made.shape == shape[:2]
    with pytest.raises(RuntimeError, match="1x128 x 128x128"):
        _fp8_block.library(x, x_scale.t().contiguous().t(), weight[0], weight[1], None, torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "m", "opcode"),
    [
        (89, 16, "QMMA"),
        (89, 4096, "QMMA"),
        (90, 1, "QGMMA"),
        (90, 64, "QGMMA"),
        (90, 4096, "QGMMA"),
        (100, 16, "UTCQMMA"),
        (100, 4096, "UTCQMMA"),
    ],
)
def test_machine_code(capability: int, m: int, opcode: str, tmp_path: Path) -> None:
    """What is chosen runs on the tensor cores, spills nothing, reads 16 bytes at a time past L1."""
    from quantkit_kernels import _fp8_block

    major, minor = divmod(capability, 10)
    config = choose_block(m, 7168, 16384, fits=False, capability=(major, minor), processors=132)
    assert (config.path, config.halves) == ("small" if m <= 64 else "large", 1 + (m == 4096 and capability == 90))
    constants = {"BIAS": True, "EVEN": True, "BM": config.bm, "BN": config.bn, "BK": 128}
    constants |= {"SPLIT": config.split} if config.path == "small" else {"HALVES": config.halves, "GROUP": 8}
    types = {"x_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv", "y_ptr": "*bf16", "bias_ptr": "*bf16", "count_ptr": "*i32"}
    made = compile_kernel(
        getattr(_fp8_block, config.path),
        constants | ({"m": 1} if m == 1 else {}),
        capability,
        types,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    code = sass(made, tmp_path)
    assert re.search(rf"\b{opcode}\b", code)
    assert made.metadata.shared <= SHARED[capability]
    assert resources(made, tmp_path)[1] == 0 and "LDL" not in code and "STL" not in code
    loads = re.findall(r"LDGSTS\.\S+", code)
    assert loads and all(".128" in one and "BYPASS" in one for one in loads)
