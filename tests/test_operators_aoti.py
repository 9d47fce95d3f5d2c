"""Every operator of quantkit_kernels in a package of AOTInductor: what the package gives is what the operator gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor
from packed_weights import packed

from quantkit.runtime.compiled import OPTIONS
from quantkit_kernels import (
    activation,
    attention,
    decode_attention,
    fp8_block,
    grouped,
    kv_append,
    kv_layout,
    rope,
    w8a8,
    wxa16,
)

D, HEADS = 64, 2


class All(torch.nn.Module):
    """Tokens (T, 128) through each operator once; a dictionary by what was computed."""

    many_codes: torch.Tensor
    many_scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)

        def held(name: str, t: Any) -> None:
            self.register_buffer(name, t)

        self.one = packed("int4", "bf16", 128, 24, 128)
        self.many = grouped.stack([packed("int4", "bf16", 128, 24, 128, seed) for seed in range(3)])
        for name, p in (("one", self.one), ("many", self.many)):
            held(f"{name}_codes", p.codes)
            held(f"{name}_scale", p.scale)
        held("eight", torch.randint(-128, 128, (24, 128), generator=g).to(torch.int8))
        held("experts", torch.randint(-128, 128, (3, 24, 128), generator=g).to(torch.int8))
        held("fp8", torch.randn(24, 128, generator=g).to(torch.float8_e4m3fn))
        held("by_row", torch.rand(24, 1, generator=g))
        held("by_expert", torch.rand(3, 24, 1, generator=g))
        held("by_block", torch.rand(1, 1, generator=g))
        held("weight", torch.rand(128, generator=g))
        held("angles", torch.rand(1, 6, D, generator=g))

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> dict[str, torch.Tensor]:
        p, e = self.one, self.many
        fixed = (p.kind, p.scale_dtype, p.n, p.k, p.group)
        found = {"wxa16": wxa16.wxa16_linear(x, self.one_codes, self.one_scale, None, None, None, None, None, *fixed)}
        experts = e._replace(codes=self.many_codes, scale=self.many_scale)
        found["grouped_wxa16"] = grouped.grouped_linear(x, offsets, experts)
        i8, i8_scale = activation.quantize_per_token(x, "int8")
        f8, f8_scale = activation.quantize_per_block(x, "fp8_e4m3")
        found |= {"int8": i8, "int8 scale": i8_scale, "fp8 scale": f8_scale, "fp8": f8.float()}
        found["w8a8"] = w8a8.w8a8_linear(i8, i8_scale, self.eight, self.by_row, None, x.dtype)
        found["fp8_block"] = fp8_block.fp8_block_linear(f8, f8_scale, self.fp8, self.by_block, None, x.dtype)
        found["grouped_w8a8"] = grouped.grouped_w8a8(i8, i8_scale, offsets, self.experts, self.by_expert, None, x.dtype)
        found["static"] = activation.quantize_static(x, i8_scale[:1], "int8")
        found["asymmetric"], found["its scale"], found["its zero"] = activation.quantize_per_token_asymmetric(x)
        found["rms_norm"] = activation.rms_norm(x, self.weight, 1e-5)
        found["add_rms_norm"], found["their sum"] = activation.add_rms_norm(x, x * 2, self.weight, 1e-5)
        found["rms_norm_quantize"], _ = activation.rms_norm_quantize(x, self.weight, 1e-5, "int8")
        found["add_rms_norm_quantize"] = activation.add_rms_norm_quantize(x, x * 2, self.weight, 1e-5, "int8")[0]
        found["silu_mul"] = activation.silu_mul(x)
        found["silu_mul_quantize"], _ = activation.silu_mul_quantize(x, "int8")
        q = x.reshape(1, -1, HEADS, D).transpose(1, 2)
        found["rope q"], found["rope k"] = rope.rope(q, q * 2, self.angles, self.angles)
        found["attention"], _ = attention.attention(q, q * 2, q * 3, 0.125, True)
        cache = kv_layout.new_cache("int8", 1, HEADS, 16, D)
        starts = torch.zeros(1, dtype=torch.int32)
        kv_append.kv_append(q, q * 2, *cache, starts)
        found["keys"], found["values"] = cache[0], cache[1]
        found["decode"], _ = decode_attention.decode_attention(q[:, :, -1:], *cache, starts + 6, 0.125)
        return found


@pytest.mark.slow
def test_each_operator_in_a_package(tmp_path: Path) -> None:
    model, x = All().eval(), torch.randn(6, 128, generator=torch.Generator().manual_seed(1))
    offsets = torch.tensor([2, 2, 6], dtype=torch.int32)
    with torch.no_grad():
        program = torch.export.export(model, (x, offsets), strict=False)
        package = str(tmp_path / "all.pt2")
        options = OPTIONS | {"aot_inductor.package_constants_in_so": True}  # a model's step is given its weights later
        torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=options)
        wanted, found = model(x, offsets), torch._inductor.aoti_load_package(package)(x, offsets)
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        assert torch.allclose(found[name].double(), t.double(), rtol=1e-5, atol=1e-6), name
