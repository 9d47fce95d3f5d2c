"""The weight-only product: the operator on a CPU, and its GPU kernels in Triton's interpreter, every kind of weight.

The interpreter's bfloat16 is wrong, so the kernels run in float16 here, by the plain twin of their assembly;
test_wxa16_machine.py has the assembly, tests/gpu the rest.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_weights import CASES, exact, packed, weight
from triton_tools import interpreted

from quantkit_kernels import layout, wxa16

SIZES = [(1, 24, 128), (5, 72, 160), (17, 136, 384), (33, 24, 300)]  # M, N, K


@pytest.fixture
def modules() -> Iterator[dict[str, Any]]:
    with interpreted("layout", "choice", "wxa16", "_wxa16_launch", "_unpack", "_wxa16", "_wxa16_stream") as found:
        yield found


def activations(m: int, k: int, seed: int = 0) -> torch.Tensor:
    """Rows of a wider tensor: what lies beyond them is NaN, and must not be read."""
    wide = torch.full((m, k + 24), float("nan"), dtype=torch.float16)
    wide[:, :k] = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    return wide[:, :k]


def run(modules: dict[str, Any], choice: dict[str, Any], x: torch.Tensor, p: Any, **kw: Any) -> torch.Tensor:
    """float32 sums of one configuration, into a buffer of NaN, and that the counters are zero afterwards."""
    problem = modules["choice"].Problem(p.kind, p.scale_dtype, p.n, p.k, p.group, x.shape[0], "fp16")
    made = modules["choice"].Choice(**{"block_m": 16, "block_n": 64} | choice)
    fitted = modules["choice"].fitted(made, problem, modules["choice"].Gpu())
    counters = torch.zeros(64, dtype=torch.int32)
    out = torch.full((x.shape[0], p.n), float("nan"))
    modules["_wxa16_launch"].prepared.cache_clear()  # the kernels may have been changed
    y = modules["wxa16"].run_with(fitted, x, p, counters=counters, out=out, **kw)
    assert not counters.any()
    return y


def difference(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> float:
    """The largest relative error of a row of y against x wᵀ in float64; NaN counts as infinite."""
    wanted = x.double() @ w.double().T
    each = (y.double() - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-30)
    return float(torch.nan_to_num(each, nan=float("inf")).max())


def rounded(p: Any, where: str) -> torch.Tensor:
    """The weight that a sum is made of: rounded to float16, but where the scale comes after the sum."""
    if where != "before":
        return layout.decode(p, torch.float64)
    if p.global_scale is None:
        return layout.decode(p, torch.float16)
    return layout.decode(p._replace(global_scale=torch.ones(1)), torch.float16).double() / p.global_scale.double()


def wheres(case: tuple[str, str, int]) -> list[str]:
    """When the scale of such a weight can be applied."""
    kind, _, group = case
    return ["end"] if group == 0 else ["before"] if group % layout.get(kind).line else ["before", "group"]


@pytest.mark.parametrize(("case", "where"), [(case, where) for case in CASES for where in wheres(case)], ids=str)
def test_sums_of_every_kind(modules: dict[str, Any], case: tuple[str, str, int], where: str) -> None:
    """Sizes that are no multiple of anything, splits of one to three: float32 sums to 2e-6 of those in float64."""
    index = CASES.index(case)
    m, n, k = SIZES[(index + (where == "group")) % len(SIZES)]
    choice = {"split": 1 + index % 3, "unroll": 1 + index // 2 % 2, "where": where, "block_m": 64 if m > 16 else 16}
    x, p = activations(m, k, index), packed(*case, n, k, index)
    w = rounded(p, where).double()
    assert difference(run(modules, choice, x, p), x, w) < 2e-6
    meant = exact(weight(*case, n, k, index), case[0], case[2])
    assert torch.allclose(w, meant, rtol=2**-11 if where == "before" else 0, atol=2**-25)


@pytest.mark.parametrize(
    ("block_m", "block_n", "warps", "unroll"),
    [(8, 64, 4, 2), (8, 32, 2, 1), (16, 128, 8, 1), (32, 128, 4, 2), (64, 256, 8, 1), (16, 16, 1, 4)],
)
def test_tiles(modules: dict[str, Any], block_m: int, block_n: int, warps: int, unroll: int) -> None:
    """Rows come out in order whatever the warps; more tiles than one each way, in groups of token tiles."""
    m, n, k = 2 * block_m + 1 if block_m < 32 else 35, 2 * block_n + 8 if block_n < 128 else 200, 144
    x, p = activations(m, k), packed("int4z", "fp16", 32, n, k)
    choice = {"block_m": block_m, "block_n": block_n, "warps": warps, "unroll": unroll, "group_m": 2, "split": 2}
    assert difference(run(modules, choice, x, p), x, rounded(p, "before")) < 2e-6


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 6, 10, 17, 18, 19, 20, 23)], ids=str)
def test_one_column_at_a_time_is_the_weight(modules: dict[str, Any], case: tuple[str, str, int]) -> None:
    """x has a single 1 a row: each sum is one decoded weight, exactly."""
    k = 256
    p = packed(*case, 24, k)
    found = run(modules, {"block_m": 64, "block_n": 64}, torch.eye(k, dtype=torch.float16), p)
    wanted = rounded(p, "end" if case[2] == 0 else "before").T
    assert torch.equal(found, wanted.float() if case[0] != "nvfp4" else found)
    assert torch.allclose(found.double(), wanted.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decoded_to_memory(modules: dict[str, Any], case: tuple[str, str, int]) -> None:
    """Slabs of rows, the last ones short, columns that fill no line: to the last bit what layout.decode gives."""
    n, k = 88, 304
    p = packed(*case, n, k)
    for first, rows in ((0, 64), (64, 24), (8, 5)):
        out = torch.full((rows, k), float("nan"), dtype=torch.float16)
        modules["wxa16"].decode_rows(p, first, out, assembly=False)
        wanted = layout.decode(p, torch.float16)[first : first + rows]
        if case[0] == "nvfp4":  # divided by the global scale after the rounding of a product that is exact
            assert torch.allclose(out, wanted, rtol=1e-3, atol=0)
        else:
            assert torch.equal(out, wanted)


@pytest.mark.parametrize("split", [1, 2, 0])
def test_a_global_scale_for_each_row_divides_as_one_does(
    modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch, split: int
) -> None:
    """Weights on top of each other, as layers that are joined: the bits of each by itself, in sums and decoded."""
    monkeypatch.setattr(
        modules["_wxa16_launch"], "resident", lambda *_: 1
    )  # no tile is shared, whose parts would differ
    each, k = global_scales(), 288
    p, x = on_top(each), activations(5, k)
    choice = {"block_m": 8, "split": split}
    y = run(modules, choice, x, p)
    assert torch.equal(y, torch.cat([run(modules, choice, x, one) for one in each], 1))
    assert difference(y, x, torch.cat([rounded(one, "before") for one in each])) < 2e-6
    slabs = [torch.empty(n, k, dtype=torch.float16) for n in (p.n - 8, *(one.n for one in each))]
    for one, first, out in zip((p, *each), (8, 0, 0, 0), slabs):
        modules["wxa16"].decode_rows(one, first, out, assembly=False)
    assert torch.equal(slabs[0], torch.cat(slabs[1:])[8:])


def global_scales() -> list[layout.Packed]:
    """NVFP4 weights of 64, 128 and 64 rows, each with its own global scale."""
    made = [packed("nvfp4", "e4m3", 16, n, 288, seed) for seed, n in enumerate((64, 128, 64))]
    return [p._replace(global_scale=torch.tensor([value])) for p, value in zip(made, (37.5, 1234.5, 0.75))]


def on_top(each: list[layout.Packed]) -> layout.Packed:
    whole = torch.cat([p.global_scale.expand(p.n) for p in each if p.global_scale is not None])
    return each[0]._replace(
        n=len(whole),
        codes=torch.cat([p.codes for p in each], 1),
        scale=torch.cat([p.scale for p in each], 1),
        global_scale=whole,
    )


def test_many_tokens_by_slabs(modules: dict[str, Any]) -> None:
    x, p = activations(40, 72), packed("int8", "bf16", 128, 300, 72)
    bias = torch.randn(300, generator=torch.Generator().manual_seed(4)).half()
    for add in (None, bias):
        y = run(modules, {"path": "dequant", "slab": 128 * 72 * 2}, x, p, bias=add)
        assert difference(y - (0 if add is None else add.float()), x, rounded(p, "before")) < 2e-6
        half = modules["wxa16"].run_with(modules["choice"].Choice(path="dequant", slab=1), x, p, add)
        assert half.dtype == torch.float16 and torch.allclose(half.float(), y, rtol=2e-3, atol=2e-3)


def test_bias_order_and_shapes(modules: dict[str, Any]) -> None:
    k, n = 160, 40
    x, p = activations(6, k), packed("int4", "fp16", 32, n, k)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(2))
    order = torch.randperm(k, generator=torch.Generator().manual_seed(3))
    w, wx = rounded(p, "before"), modules["wxa16"]
    choice = modules["choice"].Choice(block_m=16, block_n=64, split=2)
    wanted = x[:, order].double() @ w.double().T + bias.double()
    for shaped in (x.view(2, 3, k), x.view(6, 1, k), x[:, None]):
        y = wx.run_with(choice, shaped, p, bias, order, out_dtype=torch.float32)
        assert y.shape == (*shaped.shape[:-1], n)
        assert torch.allclose(y.reshape(6, n).double(), wanted, rtol=1e-5, atol=1e-5)
    across = x.contiguous().t().contiguous().t()  # columns one after the other
    for one in (x[2], x[2].clone()):
        y = wx.run_with(choice, one, p, bias, order, out_dtype=torch.float32)
        assert y.shape == (n,) and torch.allclose(y.double(), wanted[2], rtol=1e-5, atol=1e-5)
    same = wx.run_with(choice, across, p, bias, order, out_dtype=torch.float32)
    assert torch.allclose(same.double(), wanted, rtol=1e-5, atol=1e-5)
    assert wx.run_with(choice, x[:0], p).shape == (0, n)
    repeated = x[1:2].expand(4, k)
    y = wx.run_with(choice, repeated, p, out_dtype=torch.float32)
    assert torch.equal(y, y[:1].expand(4, n))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_infinite_and_missing_numbers_stay_in_their_row(modules: dict[str, Any]) -> None:
    x, p = activations(9, 300).clone(), packed("int4", "fp16", 128, 40, 300)
    x[2, 7], x[5, 299] = float("inf"), float("nan")
    y = run(modules, {"split": 2}, x, p)
    good = [i for i in range(9) if i not in (2, 5)]
    assert torch.isfinite(y[good]).all() and torch.isnan(y[5]).all() and not torch.isfinite(y[2]).any()


@pytest.mark.parametrize("sms", [1, 2, 3, 5, 7, 40])
def test_tiles_shared_out_evenly(modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch, sms: int) -> None:
    """Whole rounds, parts of tiles, tiles of two and of many programs, fewer steps than programs."""
    monkeypatch.setattr(modules["_wxa16_launch"], "resident", lambda *_: sms)
    for (m, n, k), case, group_m in (
        ((33, 200, 700), CASES[0], 2),
        ((5, 136, 1300), CASES[6], 0),
        ((20, 72, 256), CASES[19], 0),
        ((3, 264, 400), CASES[5], 0),
    ):
        x, p = activations(m, k), packed(*case, n, k)
        one = {"split": 0, "unroll": 2 if sms == 3 else 1, "group_m": group_m}
        where = "end" if case[2] == 0 else "before"
        y = run(modules, one, x, p)
        assert difference(y, x, rounded(p, where)) < 2e-6
        assert torch.equal(y, run(modules, one, x, p))


# What is changed in a kernel, a text of its source for another, and a weight for which that must show.
STREAM = {"split": 0, "block_n": 64}
BUGS: list[tuple[str, str, str, tuple[str, str, int], dict[str, Any]]] = [
    ("_wxa16", "(word * (LINE // 4) // GROUP) % FIELDS", "(word * 0) % FIELDS", ("int4", "fp16", 32), {}),
    ("_wxa16", "LINE // SPAN * WIDTH\n", "LINE // SPAN * WIDTH * 0\n", ("int4", "fp16", 64), {}),
    ("_unpack", "return tl.where(word < 2, a, b)", "return tl.where(word < 2, a, a)", ("int4", "fp16", 32), {}),
    ("_wxa16", "scale_row(held, LINE, SPAN, WIDTH).to", "scale_row(line * 0, LINE, SPAN, 1).to", CASES[0], {}),
    ("_wxa16", "end = tl.minimum(begin + each,", "end = tl.minimum(begin + each - 1,", CASES[0], {}),
    ("_wxa16", "[None, :] < k)", "[None, :] < k + 8)", CASES[0], {}),
    ("_wxa16", "for part in tl.static_range(SPLIT)", "for part in tl.static_range(SPLIT - 1)", CASES[0], {}),
    ("_wxa16", "tl.store(count_ptr + tile, 0)", "pass", CASES[0], {}),
    ("_wxa16", "acc /= tl.load(global_ptr)", "pass", ("nvfp4", "e4m3", 16), {}),
    ("_wxa16", "acc *= scale\n", "acc *= 1\n", ("int8", "fp16", 0), {}),
    ("_wxa16", "tl.dot(w, x.T) * scales", "tl.dot(w, x.T)", ("int4", "bf16", 128), {"where": "group"}),
    ("_wxa16", "c // 2 * 16 + c % 2", "c // 2 * 16 + 1 - c % 2", ("int3", "fp16", 128), {}),
    ("_wxa16_stream", "+ (first_unit(other, programs, units) <= start)", "+ 0 * (other <= start)", CASES[0], STREAM),
    ("_wxa16_stream", "(unit + 1) * programs - 1", "unit * programs", CASES[0], STREAM),
    ("_wxa16_stream", "tl.minimum(after - start, steps)", "tl.minimum(after - start, steps - 1)", CASES[0], STREAM),
    ("_wxa16_stream", "tl.store(count_ptr + tile, 0)", "pass", CASES[0], STREAM),
    ("_unpack", "LOG: tl.constexpr = 3 if WARPS == 8 else 2", "LOG: tl.constexpr = 2", CASES[0], {"warps": 8}),
    ("_unpack", "zero = (holder & 0xFF).to(tl.float32)", "zero = (holder & 0xFE).to(tl.float32)", CASES[6], {}),
    ("_unpack", "q_low = (bits >> (STEP * i))", "q_low = (bits >> (STEP * (i ^ 1)))", CASES[0], {}),
    ("_unpack", "(bits << 2) ^ (bits >> 6)", "bits << 2", ("mxfp4", "e8m0", 32), {}),
    ("_unpack", "scale = second", "scale = first", ("nvfp4", "e4m3", 16), {}),
    ("_unpack", "& 1) * 8)[None, :]", "& 0) * 8)[None, :]", ("int3", "fp16", 128), {}),
    ("_unpack", "permute(0, 2, 1, 3, 5, 7, 6, 4)", "permute(0, 2, 1, 3, 5, 6, 7, 4)", CASES[0], {}),
]


@pytest.mark.parametrize("bug", [None, *range(len(BUGS))])
def test_planted_bugs_are_found(
    modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bug: int | None
) -> None:
    """The comparison with float64 fails for each of them, and holds for the kernels as they are."""
    monkeypatch.setattr(modules["_wxa16_launch"], "resident", lambda *_: 5)

    def error(case: tuple[str, str, int], extra: dict[str, Any]) -> float:
        x, p = activations(5, 400), packed(*case, 136, 400)
        choice = {"split": 2, "unroll": 1, "block_n": 128} | extra
        made = extra.get("where", "end" if case[2] == 0 else "before")
        try:
            return difference(run(modules, choice, x, p), x, rounded(p, made))
        except AssertionError:  # counters
            return float("inf")

    if bug is None:
        assert all(error(case, extra) < 2e-6 for *_, case, extra in BUGS[::6])
        return
    module, old, new, case, extra = BUGS[bug]
    with changed(tmp_path, module, old, new):
        assert error(case, extra) > 1e-3


def changed(folder: Path, module: str, old: str, new: str) -> Any:
    """While this lasts, a module of the kernels is what its source would be with `new` for `old`."""
    from contextlib import contextmanager

    @contextmanager
    def work() -> Iterator[None]:
        package = sys.modules["quantkit_kernels"]
        names = ["_wxa16_stream"] if module == "_wxa16_stream" else ["_wxa16"]
        names = ["_unpack", *names] if module == "_unpack" else names
        before = {name: sys.modules[f"quantkit_kernels.{name}"] for name in names}
        try:
            for name in names:
                text = Path(str(before[name].__file__)).read_text()
                if name == module:
                    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {name}"
                    text = text.replace(old, new)
                path = folder / f"{name}.py"
                path.write_text(text)
                spec = importlib.util.spec_from_file_location(f"quantkit_kernels.{name}", path)
                assert spec and spec.loader
                made = importlib.util.module_from_spec(spec)
                sys.modules[spec.name] = made
                setattr(package, name, made)
                spec.loader.exec_module(made)
            yield
        finally:
            for name, old_module in before.items():
                sys.modules[f"quantkit_kernels.{name}"] = old_module
                setattr(package, name, old_module)

    return work()


def operator(p: layout.Packed, x: torch.Tensor, **kw: Any) -> torch.Tensor:
    arguments: dict[str, Any] = {"bias": None, "order": None, "counters": None} | kw
    fixed = {name: getattr(p, name) for name in ("kind", "scale_dtype", "n", "k", "group")}
    return wxa16.wxa16_linear(x, p.codes, p.scale, p.zero, p.global_scale, **arguments, **fixed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_operator_on_a_cpu(case: tuple[str, str, int]) -> None:
    p = packed(*case, 40, 272)
    wanted = exact(weight(*case, 40, 272), case[0], case[2])
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)):
        x = activations(4, 272).to(dtype)
        y = operator(p, x)
        assert y.dtype == dtype and difference(y, x, wanted) < limit
    assert torch.equal(wxa16.linear(x, p), y)


def test_the_operator_with_a_global_scale_for_each_row() -> None:
    each = global_scales()
    p = on_top(each)
    assert torch.equal(layout.decode(p, torch.float32), torch.cat([layout.decode(one, torch.float32) for one in each]))
    w, whole = weight("nvfp4", "e4m3", 16, 24, 272), torch.linspace(0.5, 9000, 24)
    again = layout.pack("nvfp4", w.codes, w.scale, group=16, global_scale=whole)
    wanted = exact(w._replace(global_scale=None), "nvfp4", 16) / whole.double()[:, None]
    x = activations(4, 272).double()
    assert difference(operator(again, x), x, wanted) < 1e-12
    with pytest.raises(ValueError, match="23 global scales; expected 1, or 24, one a row"):
        layout.pack("nvfp4", w.codes, w.scale, group=16, global_scale=whole[:23])
    fixed = (p.kind, p.scale_dtype, p.n, p.k, p.group)
    arguments = (activations(3, 288).float(), p.codes, p.scale, None, p.global_scale, None, None, None)
    torch.library.opcheck(wxa16.wxa16_linear, (*arguments, *fixed))


@pytest.mark.parametrize("case", [CASES[0], CASES[8], CASES[19]], ids=str)
def test_the_operator_in_torch(case: tuple[str, str, int]) -> None:
    """Its fake, autograd, torch.compile without a break, torch.export with a batch of any size."""
    p = packed(*case, 24, 384)
    x = activations(3, 384).float().requires_grad_()
    bias = torch.randn(24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    order = torch.randperm(384, generator=torch.Generator().manual_seed(1))
    arguments = (x, p.codes, p.scale, p.zero, p.global_scale, bias, order, torch.zeros(4, dtype=torch.int32), *p[:1])
    torch.library.opcheck(wxa16.wxa16_linear, (*arguments, p.scale_dtype, p.n, p.k, p.group))

    y = operator(p, x, bias=bias, order=order)
    y.square().sum().backward()
    w = layout.decode(p, torch.float32)
    plain = x.detach().clone().requires_grad_()
    b = bias.detach().clone().requires_grad_()
    torch.nn.functional.linear(plain[:, order], w, b).square().sum().backward()
    assert plain.grad is not None and b.grad is not None and x.grad is not None and bias.grad is not None
    assert torch.allclose(x.grad, plain.grad, rtol=1e-4, atol=1e-4 * float(plain.grad.abs().max()))
    assert torch.allclose(bias.grad, b.grad, rtol=1e-5)

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return operator(p, x) * 2

    compiled = torch.compile(Layer(), fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), operator(p, x) * 2)
        batch = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
        exported = torch.export.export(Layer(), (x.detach(),), dynamic_shapes=batch).module()
        for m in (1, 7):
            z = activations(m, 384).float()
            assert torch.equal(exported(z), operator(p, z) * 2)
    assert operator(p, x[:0]).shape == (0, 24) and operator(p, x.view(3, 1, 384)).shape == (3, 1, 24)


def test_what_does_not_belong_together_is_refused() -> None:
    p, x = packed("int4", "bf16", 128, 24, 384), activations(3, 384).float()
    z, nv = packed("int4z", "fp32", 128, 24, 384), packed("nvfp4", "e4m3", 16, 24, 384)
    wrong: list[tuple[layout.Packed, dict[str, Any], str]] = [
        (p._replace(kind="int9"), {}, "kind 'int9'"),
        (
            p._replace(codes=p.codes[:2]),
            {},
            r"codes is torch.int32 \(2, 24, 16\); int4 \(24, 384\) has .* \(3, 24, 16\)",
        ),
        (p._replace(codes=p.codes.transpose(0, 1).contiguous().transpose(0, 1)), {}, "codes is torch.int32"),
        (p._replace(scale=p.scale.float()), {}, r"scale is torch.float32 \(2, 24\)"),
        (p._replace(group=64), {}, r"scale is torch.int32 \(2, 24\); .* \(3, 24\)"),
        (p._replace(scale_dtype="e8m0"), {}, "int4 has scales of bf16, fp16 or fp32, not 'e8m0'"),
        (z._replace(zero=None), {}, "zero is missing for int4z with fp32"),
        (p._replace(zero=p.scale), {}, "zero is given for int4 with bf16"),
        (nv._replace(global_scale=None), {}, "global_scale is missing for nvfp4"),
        (nv._replace(global_scale=torch.ones(23)), {}, r"global_scale is torch.float32 \(23,\)"),
        (p, {"bias": torch.zeros(23)}, r"bias is \(23,\); expected \(24,\)"),
        (p, {"order": torch.zeros(383, dtype=torch.int64)}, r"order is torch.int64 \(383,\)"),
        (p, {"counters": torch.zeros(4)}, r"counters are torch.float32 \(4,\)"),
    ]
    for bad, extra, message in wrong:
        with pytest.raises(ValueError, match=message):
            operator(bad, x, **extra)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=message):
            operator(bad, torch.empty(3, 384), **extra)
    with pytest.raises(ValueError, match=r"x is torch.float32 \(3, 383\); expected float \(..., 384\)"):
        operator(p, x[:, 1:])
    with pytest.raises(ValueError, match=r"x is torch\.int64"):
        operator(p, x.long())
