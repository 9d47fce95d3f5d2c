"""What every number format of the registry does, so that algorithms and file formats need not know which one it is."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from quantkit import algorithms, numerics
from quantkit.errors import InputError
from quantkit.numerics import _tiles
from quantkit.types import Notes, QParams, QuantizedTensor, Stats, TensorScheme

N, K = 20, 96
STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "tensor"},
    {"strategy": "channel"},
    {"strategy": "group", "group_size": 16},
    {"strategy": "group", "group_size": 32},
    {"strategy": "block", "block_shape": (16, 40)},
]
CODES = {
    "int": torch.int8,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "mxfp8_e4m3": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
    "mxfp6": torch.uint8,
    "mxfp4": torch.uint8,
    "mxint8": torch.int8,
    "nvfp4": torch.uint8,
}


def weight(n: int = N, k: int = K) -> torch.Tensor:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n)) * 0.03
    w[:, 5] *= 7
    w[2, 32:64] = 0
    return w


def statistics(k: int = K) -> Stats:
    g = torch.Generator().manual_seed(8)
    x = torch.randn(600, k, generator=g) @ (torch.randn(k, k, generator=g) * torch.linspace(1, 0.1, k))
    return Stats(600, gram_KK=x.T @ x / 600, absmax_K=x.abs().amax(0))


def accepted(number: str, symmetric: bool, strategy: dict[str, Any]) -> TensorScheme | None:
    scheme = TensorScheme(number, symmetric=symmetric, **strategy)
    try:
        numerics.get(number).qparams(weight(), scheme, scale_dtype=torch.float32)
    except InputError:
        return None
    return scheme


SCHEMES = [s for x in itertools.product(numerics.registry(), (True, False), STRATEGIES) if (s := accepted(*x))]
SEARCHES = [(s, search) for s in SCHEMES for search in numerics.get(s.number).SEARCHES]


def name(value: object) -> str:
    if not isinstance(value, TensorScheme):
        return str(value)
    size = value.group_size or (value.block_shape[0] if value.block_shape else "")
    return f"{value.number}-{value.strategy}{size}-{'sym' if value.symmetric else 'asym'}"


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Equal in dtype, shape and bytes."""
    if a is None or b is None:
        return a is b
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )


def equal(a: QParams, b: QParams) -> bool:
    return same(a.scale_NG, b.scale_NG) and same(a.zero_NG, b.zero_NG) and same(a.global_scale, b.global_scale)


def output_error(w: torch.Tensor, q: QuantizedTensor, stats: Stats) -> float:
    assert stats.gram_KK is not None
    d = (w - numerics.dequantize(q)).double()
    return float(((d @ stats.gram_KK.double()) * d).sum())


def test_every_number_format_takes_part_with_all_its_strategies():
    found: dict[str, set[str]] = {}
    for s in SCHEMES:
        kind = f"{s.strategy}{s.group_size or ''}" + ("" if s.symmetric else " asym")
        found.setdefault("int" if s.number[:3] == "int" else s.number, set()).add(kind)
    plain = {"tensor", "channel", "group16", "group32"}
    fp8, mx = plain | {"block"}, {"group32"}
    assert found == {
        "int": plain | {f"{x} asym" for x in plain},
        **dict.fromkeys(("fp8_e4m3", "fp8_e5m2"), fp8),
        **dict.fromkeys(("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8"), mx),
        "nvfp4": {"group16"},
    }
    assert {s.number for s in SCHEMES} == set(numerics.registry())


@pytest.mark.parametrize(("scheme", "search"), SEARCHES, ids=name)
class TestEverySearch:
    def test_shapes_and_dtypes(self, scheme: TensorScheme, search: str) -> None:
        w, module = weight(), numerics.get(scheme.number)
        before = w.clone()
        q = module.qparams(w, scheme, scale_dtype=torch.bfloat16, search=search, importance_K=torch.ones(K))
        if scheme.strategy == "block":
            down, across = 2, 3
        else:
            down, across = (1 if scheme.strategy == "tensor" else N), numerics.groups(scheme, K)
        stored = torch.uint8 if scheme.number.startswith("mx") else torch.bfloat16
        assert q.scale_NG.dtype == (torch.float8_e4m3fn if scheme.number == "nvfp4" else stored)
        assert q.scale_NG.shape == (down, across)
        if scheme.symmetric:
            assert q.zero_NG is None
        else:
            assert q.zero_NG is not None and q.zero_NG.dtype == torch.int8 and q.zero_NG.shape == (down, across)
        assert (q.global_scale is not None) == (scheme.number == "nvfp4")
        codes = module.encode(w, q, scheme)
        assert codes.dtype == next(t for prefix, t in CODES.items() if scheme.number.startswith(prefix))
        assert codes.shape == (N, K)
        decoded = module.decode(codes, q, scheme)
        assert decoded.dtype == torch.float32 and decoded.shape == (N, K)
        assert torch.equal(w, before)
        assert equal(q, module.qparams(w, scheme, scale_dtype=torch.bfloat16, search=search)), "all columns alike"

    def test_codes_are_kept_when_they_are_rounded_again(self, scheme: TensorScheme, search: str) -> None:
        w, module = weight(), numerics.get(scheme.number)
        q = module.qparams(w, scheme, scale_dtype=torch.bfloat16, search=search)
        codes = module.encode(w, q, scheme)
        assert same(module.encode(module.decode(codes, q, scheme), q, scheme), codes)

    def test_columns_have_the_codes_of_the_whole(self, scheme: TensorScheme, search: str) -> None:
        w, module = weight(), numerics.get(scheme.number)
        q = module.qparams(w, scheme, scale_dtype=torch.bfloat16, search=search)
        codes = module.encode(w, q, scheme)
        fine = numerics.expand(q, scheme, w.shape)
        assert fine.scale_NG.shape == w.shape and fine.scale_NG.dtype == torch.float32 and fine.global_scale is None
        assert same(module.encode(w, fine, scheme), codes)
        decoded = module.decode(codes, q, scheme)
        for j in range(K):
            column = numerics.column(fine, j)
            code = module.encode(w[:, j : j + 1], column, scheme)
            assert same(code, codes[:, j : j + 1])
            assert torch.equal(module.decode(code, column, scheme), decoded[:, j : j + 1])

    def test_zeros(self, scheme: TensorScheme, search: str) -> None:
        zeros, module = torch.zeros(N, K), numerics.get(scheme.number)
        q = module.qparams(zeros, scheme, scale_dtype=torch.bfloat16, search=search)
        codes = module.encode(zeros, q, scheme)
        assert not codes.contiguous().view(torch.uint8).any()
        assert torch.equal(module.decode(codes, q, scheme), zeros)

    def test_how_the_weight_lies_in_memory_is_all_one(self, scheme: TensorScheme, search: str) -> None:
        w, module = weight(), numerics.get(scheme.number)
        strided = w.repeat(1, 2)[:, :K].t().contiguous().t()
        assert not strided.is_contiguous()
        q = module.qparams(w, scheme, scale_dtype=torch.float32, search=search)
        assert equal(module.qparams(strided, scheme, scale_dtype=torch.float32, search=search), q)
        assert same(module.encode(strided, q, scheme), module.encode(w, q, scheme))
        narrow = w.bfloat16()
        assert equal(
            module.qparams(narrow, scheme, scale_dtype=torch.float32, search=search),
            module.qparams(narrow.float(), scheme, scale_dtype=torch.float32, search=search),
        )

    def test_a_large_weight_is_searched_in_parts(
        self, scheme: TensorScheme, search: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        w, module, importance = weight(), numerics.get(scheme.number), torch.linspace(0.1, 3, K)
        whole = module.qparams(w, scheme, scale_dtype=torch.float32, search=search, importance_K=importance)
        monkeypatch.setitem(_tiles.SEARCH_ELEMENTS, "cpu", 3 * K)
        parts = module.qparams(w, scheme, scale_dtype=torch.float32, search=search, importance_K=importance)
        assert equal(parts, whole)

    def test_none_misses_less_than_mse(self, scheme: TensorScheme, search: str) -> None:
        """Within the rounding of a sum; but for signed scales, which are those of mse and more."""
        w, module = weight(), numerics.get(scheme.number)

        def missed(by: str) -> float:
            q = module.qparams(w, scheme, scale_dtype=torch.float32, search=by)
            return float((numerics.dequantize(numerics.quantize(w, q, scheme)) - w).square().sum())

        least, other = (search, "mse") if search == "signed" else ("mse", search)
        assert missed(least) * (1 - 1e-6) <= missed(other) * (1.01 if search == "signed" else 1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
class TestEveryScheme:
    def test_algorithms_take_it_and_gptq_misses_no_more_than_rounding(self, scheme: TensorScheme) -> None:
        """From the same scales, to judge the columns' loop and not the search."""
        w, stats = weight(), statistics()
        errors = {}
        for method in ("rtn", "gptq"):
            module = algorithms.get(method)
            for search in ("absmax", "mse"):
                options = module.Options(scale_search=search)
                q = module.quantize(w, scheme, stats, options=options, scale_dtype=torch.bfloat16, notes=Notes())
                assert q.codes_NK.shape == (N, K)
                errors[method, search] = output_error(w, q, stats)
        assert errors["gptq", "absmax"] <= errors["rtn", "absmax"]
        assert errors["gptq", "mse"] <= errors["rtn", "mse"]

    def test_weighted_scales_miss_less_where_the_weight_is(self, scheme: TensorScheme) -> None:
        w, module, importance = weight(), numerics.get(scheme.number), torch.linspace(0.05, 4, K) ** 3

        def missed(by: torch.Tensor | None) -> float:
            q = module.qparams(w, scheme, scale_dtype=torch.float32, search="mse", importance_K=by)
            return float(((numerics.dequantize(numerics.quantize(w, q, scheme)) - w).square() * importance).sum())

        assert missed(importance) <= missed(None) * 1.02  # a search that goes downhill may end in another valley

    def test_stacked_rows_have_the_scales_they_have_alone(self, scheme: TensorScheme) -> None:
        """But for what all rows share: the scale of a tensor, NVFP4's global scale. A block is 16 rows."""
        w, module = weight(32), numerics.get(scheme.number)
        w[0, 0] = w[16, 0] = w.abs().max()
        whole = module.qparams(w, scheme, scale_dtype=torch.float32, search="mse")
        for i, half in enumerate((w[:16], w[16:])):
            part = module.qparams(half, scheme, scale_dtype=torch.float32, search="mse")
            assert same(part.global_scale, whole.global_scale)
            if scheme.strategy != "tensor":
                assert same(part.scale_NG, whole.scale_NG.chunk(2)[i])

    def test_nan_inf_and_unknown_searches_are_refused(self, scheme: TensorScheme) -> None:
        module = numerics.get(scheme.number)
        for bad in (float("nan"), float("inf"), -float("inf")):
            w = weight()
            w[19, 95] = bad
            with pytest.raises(InputError, match="1 of 1920 values are NaN or Inf, the first at row 19, column 95"):
                module.qparams(w, scheme, scale_dtype=torch.float32)
        with pytest.raises(InputError, match="no scale search 'none'"):
            module.qparams(weight(), scheme, scale_dtype=torch.float32, search="none")


def test_what_e8m0_scales_stand_for():
    scale = torch.arange(256).to(torch.uint8)
    values = numerics.e8m0(scale)
    assert values[:255].tolist() == [2.0 ** (s - 127) for s in range(255)]
    assert values[255].isnan()


def test_options_name_every_search():
    """`diagh` is mse with the diagonal of H as importance; `signed` has an option of its own in gptq."""
    known = {search for module in numerics.registry().values() for search in module.SEARCHES} - {"signed"}
    for method in ("rtn", "gptq"):
        options = algorithms.get(method).Options
        for search in known | {"diagh"}:
            assert options(scale_search=search).scale_search == search
    for module in numerics.registry().values():
        assert module.SEARCHES[:2] == ("absmax", "mse")
