"""Activations in 8 bits: quantkit's own numbers, the operators, the kernels in the interpreter and as machine code."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from poison import poisoned
from triton_tools import CAPABILITIES, SHARED, compile_kernel, interpreted, mutant, resources, sass

from quantkit.numerics._activations import fake_quantize
from quantkit.types import TensorScheme
from quantkit_kernels import activation as act

KINDS = ("int8", "fp8_e4m3")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def inputs(m: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Tokens from faint to loud, one of zeros, one with outliers; where floats reach so far, one of the tiniest."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 3, m)[:, None]
    x[:, k // 3] *= 10
    if m > 2:
        x[1] = 0
        x[2] *= 1e-30 if dtype != torch.float16 else 1
    return x.to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bytes in the same layout; a NaN is a NaN."""
    if a.dtype != b.dtype or a.shape != b.shape or not (a.is_contiguous() and b.is_contiguous()):
        return False
    if a.is_floating_point() and a.element_size() > 1:
        return torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# quantkit's numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_per_token_is_what_numerics_computes(kind: str, dtype: torch.dtype) -> None:
    x = inputs(9, 200, dtype).view(3, 3, 200)
    codes, scale = act.quantize_per_token(x, kind)
    assert codes.dtype == act.KINDS[kind] and codes.shape == x.shape and scale.shape == (3, 3, 1)
    wanted = fake_quantize(x.float(), TensorScheme(kind, "token", dynamic=True))
    assert torch.equal(codes.float() * scale, wanted)
    if kind == "int8":
        codes, scale, zero = act.quantize_per_token_asymmetric(x)
        assert zero.dtype == torch.int8 and zero.shape == (3, 3, 1)
        wanted = fake_quantize(x.float(), TensorScheme(kind, "token", symmetric=False, dynamic=True))
        assert torch.equal((codes.float() - zero) * scale, wanted)


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_per_block_is_what_numerics_computes(kind: str, block: int) -> None:
    x = inputs(6, 384, torch.bfloat16).view(2, 3, 384)
    codes, scale = act.quantize_per_block(x, kind, block)
    assert scale.shape == (384 // block, 6) and scale.is_contiguous()
    spread = scale.t().repeat_interleave(block, 1).view(2, 3, 384)
    assert torch.equal(
        codes.float() * spread, fake_quantize(x.float(), TensorScheme(kind, "group", block, dynamic=True))
    )
    short, few = act.quantize_per_block(x[..., :300], kind, block)  # the last group is not full
    alone = act.quantize_per_block(x[..., 256:300], kind, block)
    assert same(short[..., 256:].contiguous(), alone[0]) and same(few[256 // block :].contiguous(), alone[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_static_is_what_numerics_computes(kind: str, dtype: torch.dtype) -> None:
    x = inputs(6, 40, dtype)
    for scale in (torch.tensor([0.05]), torch.tensor(3e-7), torch.tensor([2.0], dtype=torch.bfloat16)):
        codes = act.quantize_static(x, scale, kind)
        assert torch.equal(codes.float() * scale.float(), fake_quantize(x.float(), TensorScheme(kind, "tensor"), scale))
    shifted = act.quantize_static(x, torch.tensor([0.5]), "int8", torch.tensor([-7], dtype=torch.int8))
    assert torch.equal(shifted, (x.float() / 0.5 - 7).round().clamp(-128, 127).to(torch.int8))
    loud = torch.tensor([[float("inf"), -float("inf"), float("nan"), 1.0]])
    codes = act.quantize_static(loud, torch.tensor([1.0]), kind)
    if kind == "int8":
        assert codes.tolist() == [[127, -128, 0, 1]]
    else:
        assert codes[0, [0, 1, 3]].float().tolist() == [448, -448, 1] and codes.float()[0, 2].isnan()


def test_what_comes_before_is_what_torch_computes() -> None:
    x, residual = inputs(5, 200, torch.bfloat16), inputs(5, 200, torch.bfloat16, 1)
    weight = torch.rand(200, generator=torch.Generator().manual_seed(2)).bfloat16()
    total = x + residual
    hidden = total.float()
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-5)  # as LlamaRMSNorm of transformers has it
    wanted = weight * hidden.bfloat16()
    normed, kept = act.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(kept, total) and torch.equal(act.rms_norm(total, weight, 1e-5), normed)
    torch.testing.assert_close(normed, wanted, rtol=2**-7, atol=0)
    assert (normed != wanted).float().mean() < 0.01
    precise = F.rms_norm(total.double(), (200,), weight.double(), 1e-5)
    torch.testing.assert_close(act.rms_norm(total.float(), weight.float(), 1e-5).double(), precise, rtol=1e-6, atol=0)
    both = torch.cat([x, residual], -1)
    assert torch.equal(act.silu_mul(both), F.silu(x) * residual)
    for kind in KINDS:
        for block in (0, 128):
            alone = act.quantize_per_block(normed, kind, block) if block else act.quantize_per_token(normed, kind)
            fused = act.add_rms_norm_quantize(x, residual, weight, 1e-5, kind, block)
            assert all(map(same, fused, (*alone, total)))
            assert all(map(same, act.rms_norm_quantize(total, weight, 1e-5, kind, block), alone))
            acted = act.silu_mul(both)
            alone = act.quantize_per_block(acted, kind, block) if block else act.quantize_per_token(acted, kind)
            assert all(map(same, act.silu_mul_quantize(both, kind, block), alone))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_poison_their_token_and_no_other(kind: str, bad: float) -> None:
    x = inputs(4, 300)
    clean, poisoned = x.clone(), x.clone()
    poisoned[3, 130] = bad
    for found, wanted in (
        (act.quantize_per_token(poisoned, kind), act.quantize_per_token(clean, kind)),
        (act.quantize_per_token_asymmetric(poisoned), act.quantize_per_token_asymmetric(clean)),
    ):
        assert found[1][3].isnan().all()
        assert all(same(a[:3], b[:3]) for a, b in zip(found, wanted, strict=True))
    codes, scale = act.quantize_per_block(poisoned, kind)
    assert scale.isnan().nonzero().tolist() == [[1, 3]]
    spread = scale.t().repeat_interleave(128, 1)[:, :300]
    assert ((codes.float() * spread).isnan() == spread.isnan()).all()


# The operators -------------------------------------------------------------------------------------------------------


def calls(x: torch.Tensor) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator with arguments for it."""
    weight = torch.rand(x.shape[-1], generator=torch.Generator().manual_seed(2)).to(x.dtype)
    one, zero = torch.tensor([0.5]), torch.tensor([3], dtype=torch.int8)
    return [
        *((act.quantize_per_token, (x, kind)) for kind in KINDS),
        (act.quantize_per_token_asymmetric, (x,)),
        *((act.quantize_per_block, (x, kind, 32)) for kind in KINDS),
        *((act.quantize_static, (x, one, kind)) for kind in KINDS),
        (act.quantize_static, (x, one, "int8", zero)),
        (act.rms_norm, (x, weight, 1e-6)),
        (act.add_rms_norm, (x, x.flip(0), weight, 1e-6)),
        *((act.rms_norm_quantize, (x, weight, 1e-6, kind, block)) for kind in KINDS for block in (0, 32)),
        (act.add_rms_norm_quantize, (x, x.flip(0), weight, 1e-6, "int8", 32)),
        (act.silu_mul, (x,)),
        *((act.silu_mul_quantize, (x, "int8", block)) for block in (0, 32)),
    ]


def test_operator_contracts() -> None:
    """torch's own checks; its schema check computes with the outputs, which FP8 cannot."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator, given in calls(inputs(4, 72)):
        fp8 = "fp8_e4m3" in given
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.library.opcheck(operator, given, test_utils=checks[2:] if fp8 else checks)


@pytest.mark.parametrize("lead", [(), (0,), (3, 1, 2)])
def test_any_leading_dimensions_and_strides(lead: tuple[int, ...]) -> None:
    m = torch.Size(lead).numel()
    x = inputs(max(m, 1), 72)[:m]
    for (operator, given), (_, flat) in zip(calls(x.view(*lead, 72)) if lead else [], calls(x), strict=False):
        if operator in (act.add_rms_norm, act.add_rms_norm_quantize):
            flat = (x, given[1].reshape(m, 72), *flat[2:])
        found, wanted = operator(*given), operator(*flat)
        found, wanted = (t if isinstance(t, tuple) else (t,) for t in (found, wanted))
        for a, b in zip(found, wanted, strict=True):
            assert a.shape[:-1] in (lead, b.shape[:-1]) and same(a.reshape(b.shape), b)
    if not lead:
        assert act.quantize_per_token(x[0], "int8")[1].shape == (1,)
    across = inputs(6, 72).t().contiguous().t()
    for (operator, given), (_, plain) in zip(calls(across), calls(inputs(6, 72)), strict=True):
        found, wanted = operator(*given), operator(*plain)
        found, wanted = (t if isinstance(t, tuple) else (t,) for t in (found, wanted))
        assert all(map(same, found, wanted))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: act.quantize_per_token(x.long(), "int8"), "x is torch.int64"),
        (lambda x: act.quantize_per_token(x[:, :0], "int8"), r"x is torch.float32 \(4, 0\)"),
        (lambda x: act.quantize_per_token(x, "int4"), "unknown kind 'int4'; known: int8, fp8_e4m3"),
        (lambda x: act.quantize_per_block(x, "int8", 0), "block is 0"),
        (lambda x: act.quantize_per_block(x, "int8", 48), "block is 48; expected a power of two"),
        (lambda x: act.quantize_static(x, torch.ones(2), "int8"), r"scale is torch.float32 \(2,\)"),
        (lambda x: act.quantize_static(x, torch.ones(1), "fp8_e4m3", torch.zeros(1, dtype=torch.int8)), "zero is"),
        (lambda x: act.rms_norm(x, torch.ones(71), 1e-6), r"weight is \(71,\); expected \(72,\)"),
        (lambda x: act.add_rms_norm(x, x.half(), torch.ones(72), 1e-6), "residual is torch.float16"),
        (lambda x: act.silu_mul(x[:, :71]), "71 columns"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call(inputs(4, 72))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=says):
        call(torch.empty(4, 72))


def test_a_machine_without_triton_imports_the_module() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from quantkit_kernels import activation\n"
        "codes, scale = activation.quantize_per_token(torch.full((1, 4), -255.0), 'int8')\n"
        "print(codes.tolist(), 'quantkit_kernels._activation' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[-128, -128, -128, -128]] False"


# The kernels, interpreted --------------------------------------------------------------------------------------------


@pytest.fixture
def kernels() -> Iterator[Any]:
    with interpreted("_activation") as modules:
        yield modules["_activation"]


SHAPES = [(1, 16), (3, 200), (37, 130), (2, 1100)]


def agree(found: Any, wanted: Any) -> bool:
    found, wanted = (t if isinstance(t, tuple) else (t,) for t in (found, wanted))
    return len(found) == len(wanted) and all(map(same, found, wanted))


def quantizes_as_torch(module: Any, m: int, k: int, dtype: torch.dtype) -> bool:
    x, scale, zero = inputs(m, k, dtype), torch.tensor([0.037]), torch.tensor([-9], dtype=torch.int8)
    plain: dict[str, Any] = {"hardware": False}
    with poisoned():
        good = agree(
            module.quantize(x, "int8", mode="asymmetric", **plain), act.quantize_per_token_asymmetric_reference(x)
        )
        shifted = module.quantize(x, "int8", mode="shifted", scale=scale, zero=zero, **plain)
        good &= agree(shifted, act.quantize_static_reference(x, scale, "int8", zero))
        for kind in KINDS:
            good &= agree(module.quantize(x, kind, **plain), act.quantize_per_token_reference(x, kind))
            static = module.quantize(x, kind, mode="static", scale=scale, **plain)
            good &= agree(static, act.quantize_static_reference(x, scale, kind))
            for block in (16, 128):
                found = module.quantize(x, kind, block=block, **plain)
                good &= agree(found, act.quantize_per_block_reference(x, kind, block))
    return good


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_kernels_give_torch_s_bits(kernels: Any, m: int, k: int, dtype: torch.dtype) -> None:
    assert quantizes_as_torch(kernels, m, k, dtype)


def whole_numbers(m: int, k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Sums of their squares are exact, in any order. Every other token is as faint as eps."""
    x = torch.randint(-8, 9, (m, k), generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[1::2] *= 2**-10
    return x


def norms_as_torch(module: Any, m: int, k: int, dtype: torch.dtype) -> bool:
    x, residual = whole_numbers(m, k, dtype, 0), whole_numbers(m, k, dtype, 1)
    weight = (torch.rand(k, generator=torch.Generator().manual_seed(2)) + 0.5).to(dtype)
    x[0], good = 0, True
    if dtype == torch.float16 and m > 2:  # four sums that are rounded, and their squares still exact
        x[2], residual[2] = 0, 0
        x[2, :4], residual[2, :4] = 9, torch.tensor([1.0, 3.0, 5.0, 7.0]) * 2**-8
    with poisoned():
        for other in (None, residual):
            given = (x, weight, 1e-5) if other is None else (x, other, weight, 1e-5)
            normed = (act.rms_norm_reference if other is None else act.add_rms_norm_reference)(*given)
            good &= agree(module.rms_norm(x, other, weight, 1e-5, "none", hardware=False), normed)
            both: Any = act.rms_norm_quantize_reference if other is None else act.add_rms_norm_quantize_reference
            for kind in KINDS:
                for block in (0, 32):
                    found = module.rms_norm(x, other, weight, 1e-5, kind, block=block, hardware=False)
                    good &= agree(found, both(*given, kind, block))
    return good


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(1, 16), (3, 200), (37, 72), (5, 2500), (5, 4096), (2, 5120), (2, 9000)])
def test_norms_give_torch_s_bits(
    kernels: Any, m: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last four in parts."""
    monkeypatch.setattr(kernels, "MANY", 5)
    assert norms_as_torch(kernels, m, k, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_silu_is_torch_s_to_a_last_bit(kernels: Any, m: int, k: int, dtype: torch.dtype) -> None:
    both = torch.randn(m, 2 * k, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    with poisoned():
        (acted,) = kernels.quantize(both, "none", silu=True, hardware=False)
        wanted = act.silu_mul_reference(both)
        last = {torch.float32: 1e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
        torch.testing.assert_close(acted, wanted, rtol=last, atol=1e-9)
        assert dtype == torch.float32 or (acted != wanted).float().mean() < 0.02
        for kind in KINDS:
            for block in (0, 128):
                found = kernels.quantize(both, kind, silu=True, block=block, hardware=False)
                wanted_too = act._quantize_reference(acted, kind, block)
                assert same(found[0], wanted_too[0]) and same(found[1], wanted_too[1])


def test_rows_that_lie_apart_and_no_rows(kernels: Any) -> None:
    x = inputs(5, 300)
    for odd in (x[:, 7:107], x.t().contiguous().t()[:, 7:107], x[:, None, 7:107].expand(5, 3, 100), x[1, 7:107]):
        assert agree(kernels.quantize(odd, "int8", hardware=False), act.quantize_per_token_reference(odd, "int8"))
        found = kernels.rms_norm(odd, odd, torch.ones(100), 1e-6, "none", hardware=False)
        torch.testing.assert_close(found, act.add_rms_norm_reference(odd, odd, torch.ones(100), 1e-6))
    codes, scale = kernels.quantize(x[:0], "fp8_e4m3", block=128)
    assert codes.shape == (0, 300) and scale.shape == (3, 0)
    assert kernels.rms_norm(x[:0], None, torch.ones(300), 1e-6, "none")[0].shape == (0, 300)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_poison_stays_in_its_token_of_the_kernels(kernels: Any, bad: float) -> None:
    x = inputs(4, 200)
    x[3, 150] = bad
    wanted: tuple[torch.Tensor, ...]
    for kind in KINDS:
        wanted = act.quantize_per_token_reference(x, kind)
        found = kernels.quantize(x, kind, hardware=False)
        assert same(found[1], wanted[1]) and same(found[0][:3], wanted[0][:3])
        found = kernels.rms_norm(x, None, torch.ones(200), 1e-6, kind, block=128, hardware=False)[1]
        assert found[:, 3].isnan().any() and found[:, :3].isfinite().all()
    found, wanted = kernels.quantize(x, "int8", mode="asymmetric"), act.quantize_per_token_asymmetric_reference(x)
    assert same(found[1], wanted[1]) and same(found[2], wanted[2])


def test_the_hardware_s_way_differs_by_roundings_alone(kernels: Any) -> None:
    """The interpreter rounds a fused step twice, so this is close and no more; the bits are compared on a GPU."""
    for dtype in DTYPES:
        x = inputs(9, 300, dtype)
        found, wanted = kernels.quantize(x, "int8", hardware=True), act.quantize_per_token_reference(x, "int8")
        assert same(found[1], wanted[1])
        apart = (found[0].int() - wanted[0].int()).abs()
        assert apart.max() <= 1 and apart.float().mean() < 2e-3


def test_two_corrections_give_the_nearest_quotient() -> None:
    """The arithmetic of `divided` with exact fused steps: the same float as a division, where only one is off."""

    def nearest(value: Fraction) -> Fraction:
        if value == 0:
            return value
        exponent = value.numerator.bit_length() - value.denominator.bit_length()
        exponent -= abs(value) < Fraction(2) ** exponent
        unit = Fraction(2) ** (exponent - 23)
        return round(value / unit) * unit  # half to even

    g = torch.Generator().manual_seed(0)
    xs = (torch.randint(1 << 23, 1 << 24, (4000,), generator=g)).tolist()
    scales = (torch.randint(1 << 23, 1 << 24, (4000,), generator=g)).tolist()
    hard = [(1 << 24) - 1, 1 << 23, (1 << 23) + 1, (1 << 24) - 2, 3 << 22]
    pairs = [*zip(xs, scales), *((a, b) for a in hard for b in hard), *((a, b) for a in xs[:200] for b in hard)]
    misses = [0, 0, 0]
    for a, b in pairs:
        x, scale = Fraction(a), Fraction(b, 1 << 23)
        inverse = nearest(1 / scale)
        quotient = nearest(x * inverse)
        for corrections in range(3):
            misses[corrections] += quotient != nearest(x / scale)
            quotient = nearest(quotient + nearest(x - quotient * scale) * inverse)
    assert misses[0] > 0 and misses[2] == 0, misses


MUTANTS = {
    "a step too coarse": ("127.5 if FORM", "127.0 if FORM"),
    "the last column is left out": ("(column < k)[None, :]", "(column < k - 1)[None, :]"),
    "a group's columns from the next token": ("group * WIDTH + tl.arange", "group * WIDTH // 2 + tl.arange"),
    "scales lie token by token": ("group.to(tl.int64) * m + row", "row * groups + group"),
    "a zero point of the wrong sign": ("+ zero[:, None]", "- zero[:, None]"),
    "truncated instead of rounded": ("limited + 12582912.0", "limited - 0.4 + 12582912.0"),
    "no epsilon": ("tl.where(scale == 0, 1.1920928955078125e-07, scale)", "scale"),
    "eps outside the root": ("tl.sqrt_rn(mean + eps)", "tl.sqrt_rn(mean) + eps"),
    "the mean of the tile": ("tl.zeros((ROWS,), tl.float32) + k", "tl.zeros((ROWS,), tl.float32) + WIDTH"),
    "the sum is not rounded": ("        value = rounded(value, DTYPE, HARDWARE)\n        tl.store", "        tl.store"),
    "the norm is not rounded": ("rounded(value * factor[:, None], DTYPE, HARDWARE)", "value * factor[:, None]"),
    "the residual for the sum": ("value += tl.load(residual_ptr", "value = tl.load(residual_ptr"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_found(name: str, tmp_path: Path) -> None:
    with interpreted("_activation") as modules, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old, new = MUTANTS[name]
        broken = mutant(modules["_activation"], old, new, tmp_path)
        assert not (quantizes_as_torch(broken, 4, 200, torch.float32) and norms_as_torch(broken, 3, 72, torch.float16))


# Machine code --------------------------------------------------------------------------------------------------------

TYPES = {"x_ptr": "*bf16", "residual_ptr": "*bf16", "weight_ptr": "*bf16", "total_ptr": "*bf16", "zero_ptr": "*i8"}


def compiled(name: str, form: str, capability: int, k: int, block: int = 0, m: int = 4096, **flags: Any) -> Any:
    """The kernel as it is launched for bfloat16 (m, k), and the elements of a thread."""
    from quantkit_kernels import _activation

    width = block or k
    rows, warps = _activation._tile(m, k if name == "norm" else width)
    constants = {"FORM": form, "DTYPE": "bfloat16", "HARDWARE": True, "ROWS": rows} | flags
    constants |= {"WIDTH": k, "GROUP": width} if name == "norm" else {"WIDTH": width}
    if name == "rows" and not block:
        constants["groups"] = 1
    types = TYPES | {"eps": "fp32", "out_ptr": "*bf16" if form == "none" else "*i8"}
    made = compile_kernel(getattr(_activation, name), constants, capability, types, num_warps=warps)
    return made, rows * (k if name == "norm" else width) / (32 * warps)


@pytest.mark.parametrize(
    ("name", "form", "shape", "flags", "most"),
    [
        ("rows", "int8", {"k": 4096}, {"SILU": False, "MODE": "symmetric"}, 29),
        ("rows", "fp8_e4m3", {"k": 16384}, {"SILU": False, "MODE": "symmetric"}, 26),
        ("rows", "fp8_e4m3", {"k": 32768}, {"SILU": False, "MODE": "symmetric"}, 20),
        ("rows", "fp8_e4m3", {"k": 8192, "block": 128}, {"SILU": False, "MODE": "symmetric"}, 32),
        ("rows", "fp8_e4m3", {"k": 16384}, {"SILU": True, "MODE": "symmetric"}, 48),
        ("rows", "int8", {"k": 4096}, {"SILU": False, "MODE": "asymmetric"}, 42),
        ("rows", "fp8_e4m3", {"k": 2048}, {"SILU": False, "MODE": "static"}, 36),
        ("norm", "int8", {"k": 4096}, {"RESIDUAL": True}, 48),
        ("norm", "fp8_e4m3", {"k": 4096, "block": 128}, {"RESIDUAL": True}, 46),
        ("norm", "fp8_e4m3", {"k": 16384}, {"RESIDUAL": True}, 46),
        ("norm", "none", {"k": 4096}, {"RESIDUAL": False}, 30),
    ],
)
def test_machine_code(name: str, form: str, shape: Any, flags: Any, most: int, tmp_path: Path) -> None:
    """One pass: 16 bytes a load, only what is reduced in shared memory, nothing spilled, few instructions."""
    made, elements = compiled(name, form, 90, **shape, **flags)
    code = sass(made, tmp_path)
    found = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", code, re.M)
    assert resources(made, tmp_path)[1] == 0 and "LDL" not in found and "STL" not in found
    loads = sum(o.startswith("LDG") and o.endswith(".128") for o in found)
    tensors = 1 + (name == "norm") + flags.get("RESIDUAL", flags.get("SILU", 0))
    assert loads == tensors * elements / 8
    if "block" not in shape:  # with 32 values a thread, groups of 128 change places; it is the faster way even so
        assert not any(o in ("STS.128", "LDS.128") for o in found), "a change of layout goes through shared memory"
        assert made.metadata.shared <= 1024
    assert len(found) / elements <= most
    if form == "fp8_e4m3":
        assert any("E4M3" in o for o in found)


@pytest.mark.parametrize(("form", "most"), [("int8", 29), ("fp8_e4m3", 25), ("none", 11)])
def test_a_wide_norm_in_parts(form: str, most: float, tmp_path: Path) -> None:
    from quantkit_kernels import _norm

    constants = {"RESIDUAL": False, "FORM": form, "DTYPE": "bfloat16", "HARDWARE": True}
    constants |= {"PARTS": 7, "PART": 2048, "EVEN": True}
    types = TYPES | {"eps": "fp32", "out_ptr": "*bf16" if form == "none" else "*i8"}
    made = compile_kernel(_norm.norm_parts, constants, 90, types, num_warps=8)
    registers, stack = resources(made, tmp_path)
    assert stack == 0 and registers <= 128  # two tokens at once on a multiprocessor; Triton 3.6 makes it three
    found = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", sass(made, tmp_path), re.M)
    assert len(found) / 56 <= most and made.metadata.shared <= 1024


@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if c != 90])
def test_other_gpus(capability: int, tmp_path: Path) -> None:
    form = "int8" if capability < 89 else "fp8_e4m3"
    for name, flags in (("rows", {"SILU": True, "MODE": "symmetric"}), ("norm", {"RESIDUAL": True})):
        made, _ = compiled(name, form, capability, 4096, **flags, m=1)
        assert made.metadata.shared <= SHARED[capability] and resources(made, tmp_path)[1] == 0
    if capability < 89:
        with pytest.raises(Exception) as raised:
            compiled("rows", "fp8_e4m3", capability, 4096, SILU=False, MODE="symmetric")
        causes: list[BaseException] = [raised.value]
        while causes[-1].__cause__ is not None:  # a function within a function
            causes.append(causes[-1].__cause__)
        assert any("fp8e4nv" in str(error) for error in causes)
