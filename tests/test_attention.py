"""Prefill attention without a GPU: the kernels in Triton's interpreter against float64, machine code, the operator."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from poison import poisoned
from triton_tools import CAPABILITIES, SHARED, interpreted, resources, sass

from quantkit_kernels import _attention_launch, attention
from quantkit_kernels.attention import attention_reference

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")  # of an empty sum


@pytest.fixture
def kernels() -> Iterator[dict[str, Any]]:
    """Modules with kernels, interpreted; the others import them when they are called. What is not written is NaN."""
    with poisoned(), interpreted("_attention") as modules:
        yield modules


def inputs(
    b: int, heads: int, groups: int, len_q: int, len_k: int, d: int, dtype: torch.dtype, order: str = "bhld"
) -> list[torch.Tensor]:
    """q, k and v (B, H, L, D), tokens of different sizes; "blhd": a token's heads side by side in memory."""
    g = torch.Generator().manual_seed(len_q + 7 * len_k + d)
    made = []
    for h, n in ((heads, len_q), (groups, len_k), (groups, len_k)):
        x = torch.randn(b, h, n, d, generator=g) * (1 + torch.arange(n) % 5)[:, None] / 2
        made.append(x.to(dtype) if order == "bhld" else x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2))
    return made


def problem(module: ModuleType, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kw: Any) -> Any:
    given: dict[str, Any] = {"scale": q.shape[-1] ** -0.5, "causal": True, "out_dtype": torch.float32, "with_lse": True}
    others = ("window", "soft_cap", "sinks", "cu_q", "cu_k", "starts", "lengths")
    return module.Problem(q, k, v, **dict.fromkeys(others) | {"max_len_q": 0} | given | kw)


def wanted(p: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_reference(
        p.q.double(), p.k.double(), p.v.double(), p.scale, p.causal, p.window, p.soft_cap, p.sinks, p.cu_q, p.cu_k,
        p.max_len_q, p.starts, p.lengths, torch.float64, True,
    )  # fmt: skip


def difference(found: tuple[torch.Tensor, torch.Tensor], p: Any) -> float:
    """The worst row's relative error, or the lse's; infinite where the one has a number and the other none."""
    out, lse = wanted(p)
    if not torch.equal(found[1] == -math.inf, lse == -math.inf) or not torch.isfinite(found[0]).all():
        return math.inf
    rows = (found[0].double() - out).norm(dim=-1) / out.norm(dim=-1).clamp(min=1e-3)
    logs = ((found[1] - lse) / (1 + lse.abs())).nan_to_num(0.0).abs()
    return max(float(rows.max()) if rows.numel() else 0.0, float(logs.max()) if logs.numel() else 0.0)


SIZES = (32, 16, 4, 2)


def ints(*x: int) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.int32)


FEATURES: dict[str, dict[str, Any]] = {
    "causal": {},
    "all": {"causal": False},
    "window": {"window": 21},
    "window of one": {"window": 1},
    "both sides": {"causal": False, "window": 13},
    "cap": {"soft_cap": 1.5},
    "sinks": {"sinks": torch.tensor([0.3, 5.0])},
    "left padding": {"starts": ints(0, 40)},
    "not full": {"lengths": ints(70, 9)},
    "everything": {
        "window": 30,
        "soft_cap": 3.0,
        "sinks": torch.tensor([0.3, 5.0]),
        "starts": ints(5, 33),
        "lengths": ints(70, 51),
    },
}


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, "flight") for name in FEATURES]
    + [("causal", "pointers"), ("both sides", "pointers"), ("everything", "pointers")]
    + [("cap", "descriptors"), ("all", "descriptors")],
)
def test_features_against_float64(kernels: dict[str, Any], name: str, way: str) -> None:
    module = _attention_launch
    order = "bhld" if len(name) % 2 else "blhd"
    p = problem(module, *inputs(2, 2, 1, 40, 70, 16, torch.float32, order), **FEATURES[name])
    assert difference(module.run(p, way, module.Tiling(*SIZES)), p) < 5e-6


@pytest.mark.parametrize("len_k", [0, 1, 15, 16, 17, 127, 128, 129, 300])
def test_lengths(kernels: dict[str, Any], len_k: int) -> None:
    """Queries fewer than keys, as many, and more: then the first ones see nothing."""
    module = _attention_launch
    for len_q in {1, 33, min(len_k + 3, 48)}:
        p = problem(module, *inputs(1, 2, 1, len_q, len_k, 16, torch.float32))
        ways = ("pointers",) if len_k < 128 else ("pointers", "flight")
        for way in ways:
            assert difference(module.run(p, way, module.Tiling(32, 32, 4, 2)), p) < 5e-6


@pytest.mark.parametrize(("heads", "groups", "d"), [(1, 1, 80), (3, 1, 96), (4, 4, 128), (8, 1, 256), (6, 2, 40)])
def test_heads_and_widths(kernels: dict[str, Any], heads: int, groups: int, d: int) -> None:
    module = _attention_launch
    for dtype, limit in ((torch.float32, 5e-6), (torch.float16, 3e-3)):
        p = problem(module, *inputs(1, heads, groups, 20, 37, d, dtype))
        assert difference(module.run(p, "auto", module.Tiling(16, 16, 4, 2)), p) < limit


def test_packed_sequences(kernels: dict[str, Any]) -> None:
    """Ragged, an empty sequence among them; keys with a length of their own."""
    module = _attention_launch
    cu_q, cu_k = ints(0, 17, 17, 18, 51, 56), ints(0, 17, 20, 53, 86, 86)
    q, k, v = (t[0].transpose(0, 1) for t in inputs(1, 4, 2, 56, 86, 16, torch.float32))
    for way in ("pointers", "flight"):
        for more in ({}, {"window": 9, "soft_cap": 4.0, "sinks": torch.zeros(4)})[way == "pointers" :]:
            p = problem(module, q, k, v, cu_q=cu_q, cu_k=cu_k, max_len_q=33, **more)
            found = module.run(p, way, module.Tiling(16, 16, 4, 2))
            assert found[0].shape == q.shape and found[1].shape == (56, 4)
            assert difference(found, p) < 5e-6


def test_strides_and_what_lies_between(kernels: dict[str, Any]) -> None:
    """Slices of wider tensors full of NaN, heads that share memory, a query whose channels are not side by side."""
    module = _attention_launch
    q, k, v = inputs(2, 4, 2, 20, 40, 32, torch.float16)
    wide = torch.full((2, 60, 2, 3, 32), math.nan, dtype=torch.float16)  # token, head, (k, v, unused), channel
    wide[:, 10:50, :, 0], wide[:, 10:50, :, 1] = k.transpose(1, 2), v.transpose(1, 2)
    k_view, v_view = (wide[:, 10:50, :, i].transpose(1, 2) for i in (0, 1))
    turned = q.transpose(2, 3).contiguous().transpose(2, 3)
    for keys in ((k_view, v_view), (k[:, :1].expand(2, 4, 40, 32), v[:, :1].expand(2, 4, 40, 32))):
        p = problem(module, turned, *keys)
        for way in ("pointers", "flight"):
            assert difference(module.run(p, way, module.Tiling(32, 16, 4, 2)), p) < 3e-3
    shifted = torch.full((2 * 2 * 40 * 32 + 1,), math.nan, dtype=torch.float16)[1:].view(2, 2, 40, 32)
    shifted.copy_(k)
    p = problem(module, q, shifted, v)
    assert difference(module.run(p, "auto", module.Tiling(16, 16, 4, 2)), p) < 3e-3


def test_unused_keys_do_not_leak(kernels: dict[str, Any]) -> None:
    """NaN and infinity beyond key_lengths and before key_starts; a sequence without keys gives zeros."""
    module = _attention_launch
    q, k, v = inputs(3, 2, 2, 20, 64, 32, torch.float32)
    starts, lengths = ints(0, 19, 7), ints(33, 60, 0)
    for b in range(3):
        for t in (k, v):
            t[b, :, : int(starts[b])], t[b, :, int(lengths[b]) :] = math.nan, math.inf
    for way in ("pointers", "descriptors", "flight"):
        p = problem(module, q, k, v, starts=starts, lengths=lengths)
        out, lse = module.run(p, way, module.Tiling(16, 16, 4, 2))
        assert torch.equal(out[2], torch.zeros_like(out[2])) and bool((lse[2] == -math.inf).all())
        assert difference((out, lse), p) < 5e-6
    v[0, 0, 5] = math.nan  # and one that is seen does: by all queries after it, and no head but its own
    out, _ = module.run(problem(module, q, k, v, starts=starts, lengths=lengths), "flight", module.Tiling(16, 16, 4, 2))
    assert bool(out[0, 0].isnan().all()) and not bool(out[0, 1].isnan().any())


def test_the_same_bytes_whatever_the_way(kernels: dict[str, Any]) -> None:
    """Descriptors change how tiles are loaded, not what is computed; and a run is repeated to the byte."""
    module = _attention_launch
    p = problem(module, *inputs(1, 2, 1, 64, 96, 32, torch.float16))
    sizes = module.Tiling(32, 16, 4, 2)
    first = module.run(p, "pointers", sizes)
    for way in ("pointers", "descriptors"):
        again = module.run(p, way, sizes)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def wrong_mask(s: Any, *args: Any) -> Any:
    """`_scores` with a token too many on the right."""
    q, k, n, position, *rest = (s, *args)
    return RIGHT["_scores"](q, k, n, position + 1, *rest)


def no_rescaling(acc: Any, m: Any, total: Any, *args: Any) -> Any:
    """`_step` that leaves the sum of an older maximum as it is."""
    found = RIGHT["_step"](acc, m, total, *args)
    return found[0], found[1], found[2] + total * 0.01


def skipped_tile(*args: Any) -> Any:
    """`_span_in_flight` that forgets the last tile."""
    *before, stop, scale, cap, has_cap, width = args
    return RIGHT["_span_in_flight"](*before, stop - width, scale, cap, has_cap, width)


RIGHT: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("name", "bug"), [("_scores", wrong_mask), ("_step", no_rescaling), ("_span_in_flight", skipped_tile)]
)
def test_planted_bugs_are_seen(kernels: dict[str, Any], name: str, bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _attention_launch
    p = problem(module, *inputs(1, 2, 1, 40, 96, 16, torch.float32))
    sizes = module.Tiling(16, 16, 4, 2)
    assert difference(module.run(p, "flight", sizes), p) < 5e-6
    RIGHT[name] = getattr(kernels["_attention"], name)
    monkeypatch.setattr(kernels["_attention"], name, bug)
    assert difference(module.run(p, "flight", sizes), p) > 1e-3


def test_torch_attention_is_taken_where_it_does_the_same() -> None:
    q, k, v = inputs(1, 4, 2, 64, 64, 64, torch.float32)
    few, one = q[:, :, :30], q[:, :, :1]

    def takes(q: torch.Tensor, **kw: Any) -> bool:
        given = {"out_dtype": None, "with_lse": False} | kw
        return _attention_launch.prefer_sdpa(problem(_attention_launch, q, k, v, **given))

    assert takes(q) and takes(q, causal=False) and takes(few, causal=False) and takes(one) and takes(q, window=64)
    assert not takes(few) and not takes(q, window=63) and not takes(q, soft_cap=30.0) and not takes(q, with_lse=True)
    assert not takes(q, sinks=torch.zeros(4)) and not takes(q, lengths=ints(60)) and not takes(q, starts=ints(1))
    assert not takes(q, out_dtype=torch.float64)
    p = problem(_attention_launch, q, k, v, out_dtype=None, with_lse=False)
    out, lse = _attention_launch.sdpa(p)
    assert lse.numel() == 0 and out.stride() == attention.attention(q, k, v, p.scale, True)[0].stride()
    assert torch.allclose(out.double(), wanted(p)[0], atol=1e-5)
    with pytest.raises(ValueError, match="has no soft cap"):
        _attention_launch.sdpa(problem(_attention_launch, few, k, v))


def test_operator() -> None:
    q, k, v = inputs(2, 4, 2, 9, 9, 16, torch.float32)
    packed = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    cu = ints(0, 9, 18)
    test: Any = torch.library.opcheck
    test(attention.attention, (q, k, v, 0.25, True), {"window": 4, "soft_cap": 3.0, "with_lse": True})
    test(attention.attention, (*packed, 0.25, True, None, None, None, cu, cu, 9))

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention.attention(q, k, v, 0.25, True, sinks=torch.zeros(4))[0].transpose(1, 2).flatten(2)

    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (9, 5):
        part = [t[:, :, :n] for t in (q, k, v)]
        assert torch.equal(compiled(*part), model(*part))
    none = attention.attention(q[:, :, :0], k, v, 0.25, True, with_lse=True)
    assert none[0].shape == (2, 4, 0, 16) and none[1].shape == (2, 4, 0)
    together = attention.attention(*packed, 0.25, True, cu_seqlens_q=cu, cu_seqlens_k=cu, max_len_q=9)[0]
    alone = attention.attention(q, k, v, 0.25, True)[0]
    assert torch.allclose(together.unflatten(0, (2, 9)).transpose(1, 2), alone, atol=1e-6)


def test_export_keeps_the_operator() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attention.attention(q, k, v, 0.25, True, 8)[0]

    given = tuple(inputs(1, 2, 2, 12, 12, 16, torch.float32))
    exported = torch.export.export(Model(), given)
    assert "quantkit.attention" in str(exported.graph)
    assert torch.equal(exported.module()(*given), Model()(*given))


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = inputs(1, 4, 2, 8, 8, 16, torch.float32)
    cu = ints(0, 8)
    for args, kw, said in (
        ((q[0], k[0], v[0]), {}, "expected 4 dimensions"),
        ((q, k, v[:, :, :7]), {}, "do not belong together"),
        ((q[:, :3], k, v), {}, "do not belong together"),
        ((q, k.half(), v.half()), {}, "do not belong together"),
        ((q[..., :12], k[..., :12], v[..., :12]), {}, "heads of 12 channels"),
        ((q, k, v), {"window": 0}, "window 0"),
        ((q, k, v), {"soft_cap": -1.0}, "soft_cap -1.0"),
        ((q, k, v), {"sinks": torch.zeros(3)}, "sinks are"),
        ((q, k, v), {"key_lengths": torch.zeros(1)}, "key_lengths is"),
        ((q, k, v), {"way": "magic"}, "no way 'magic'"),
        ((q[0].transpose(0, 1),) * 3, {"cu_seqlens_q": cu, "cu_seqlens_k": cu}, "max_len_q is 0"),
        (
            (q[0].transpose(0, 1),) * 3,
            {"cu_seqlens_q": cu, "cu_seqlens_k": cu.long(), "max_len_q": 8},
            "cu_seqlens are",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            attention.attention(*args, 0.25, True, **kw)
    with pytest.raises(ValueError, match="scale 0"):
        attention.attention(q, k, v, 0.0, True)
    with pytest.raises(ValueError, match="no tensor descriptors"):
        p = problem(_attention_launch, *inputs(1, 2, 2, 8, 8, 40, torch.float32))
        _attention_launch.run(p, "flight")


def test_a_machine_without_triton_imports_and_computes() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from quantkit_kernels.attention import attention\n"
        "q = torch.randn(1, 2, 3, 8); print(tuple(attention(q, q, q, 0.5, True)[0].shape))\n"
        "print('quantkit_kernels._attention' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["(1, 2, 3, 8)", "False"]


def compiled(capability: int, head_dim: int, mode: str, cap: bool, every: bool, len_q: int = 4096) -> Any:
    """The kernel for a GPU that need not be there, aligned as it is when launched."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from quantkit_kernels import _attention

    sizes, width = (
        _attention_launch.tiling(capability, head_dim, len_q),
        _attention_launch.head_width(head_dim),
    )
    constants: dict[str, Any] = {"RATIO": 4, "CAUSAL": True, "CAP": cap, "MODE": mode, "D": head_dim, "BD": width}
    constants |= dict.fromkeys(("WINDOW", "SINKS", "PACKED", "START", "LENGTH"), every)
    constants |= {"BM": sizes.queries, "BN": sizes.keys}
    if mode == "pointers":
        constants |= {"k_desc": None, "v_desc": None}
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16") | {"sink_ptr": "*fp32", "lse_ptr": "*fp32"}
    types |= dict.fromkeys(("cu_q_ptr", "cu_k_ptr", "start_ptr", "length_ptr"), "*i32") | {
        "scale": "fp32",
        "cap": "fp32",
    }
    types |= dict.fromkeys(("k_desc", "v_desc"), f"tensordesc<bf16[{sizes.keys},{width}]>")
    names = _attention.attend.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    sixteen = {"q_batch", "q_head", "q_row", "k_batch", "k_head", "v_batch", "v_head"}
    aligned = [i for i, n in enumerate(names) if signature[n].startswith("*") or n in sixteen]
    source = ASTSource(
        fn=_attention.attend,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": sizes.warps, "num_stages": sizes.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def loops(code: str) -> list[list[str]]:
    """The instructions of each loop with a matrix product, from the machine code as text."""
    lines = [(int(a, 16), b) for a, b in re.findall(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;", code, re.M)]
    found = []
    for at, line in lines:
        target = re.search(r"BRA.*0x([0-9a-f]+)$", line)
        if target and int(target[1], 16) < at:
            body = [text for a, text in lines if int(target[1], 16) <= a <= at]
            if any("MMA." in text for text in body):
                found.append(body)
    return found


@pytest.mark.parametrize(("capability", "kind"), [(c, "everything") for c in CAPABILITIES] + [(90, "wide")])
def test_machine_code(capability: int, kind: str, tmp_path: Path) -> None:
    """Tensor cores, loads of 16 bytes that run ahead, shared memory that fits, nothing spilled in a loop."""
    every = kind == "everything"
    made = compiled(capability, 256 if kind == "wide" else 128, "pointers", every, every)
    code = sass(made, tmp_path)
    assert {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[capability] in code
    assert "LDGSTS.E.BYPASS.128" in code
    assert made.metadata.shared <= SHARED[capability]
    assert resources(made, tmp_path)[1] <= 64
    assert not any(text.split()[0] in ("LDL", "STL") for body in loops(code) for text in body)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_products_run_while_exponentials_are_taken(head_dim: int, tmp_path: Path) -> None:
    """On Hopper: one wait a tile, none between the instructions of a product, TMA, no probability in shared memory."""
    made = compiled(90, head_dim, "flight", False, False)
    code = sass(made, tmp_path)
    body = min(loops(code), key=len)
    words = [text for text in body if re.search(r"HGMMA|MUFU.EX2|WARPGROUP.DEPBAR|UTMALDG|STSM|STS |LDL|STL", text)]
    kinds = "".join("G" if "HGMMA" in t else "e" if "MUFU" in t else "W" if "DEPBAR" in t else "." for t in words)
    assert kinds.count("W") == 1 and re.search(r"G+W(e*G)+e{5,}", kinds), kinds
    assert "UTMALDG" in code and not any("STS" in text for text in words)
    assert made.metadata.shared <= SHARED[90] and resources(made, tmp_path)[1] == 0
