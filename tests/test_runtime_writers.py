"""Checkpoints as other tools write them, by their formulas, stay packed: also what stock transformers loads wrong."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from packed_models import inputs_of, quantized, write_config
from safetensors.torch import load_file, save_file
from test_format_awq import autoawq
from test_format_fp8_block import deepseek
from test_format_gptq import field_case, field_writer
from test_format_modelopt import modelopt_awq, modelopt_fp8, modelopt_nvfp4
from test_runtime_formats import loaded, logits, reference, saved_alike
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quantkit import formats
from quantkit.checkpoint import NAMES
from quantkit.errors import InputError
from quantkit.numerics._activations import fake_quantize
from quantkit.presets import PRESETS
from quantkit.runtime import disk, planning
from quantkit.runtime.held import Held, describe
from quantkit.runtime.linear import PackedLinear
from quantkit.types import QParams, Scheme, TensorSpec
from quantkit_kernels import _words

Tensors = dict[str, torch.Tensor]


def held_of(config: Mapping[str, Any], tensors: Tensors, shape: tuple[int, int], **more: Any) -> Held:
    form = formats.by_method(config["quant_method"])
    read = form.read_config(config)
    parts = {leaf: TensorSpec(NAMES[t.dtype], tuple(t.shape)) for leaf, t in tensors.items()}
    scheme = read.scheme_for("model.layers.0.a")
    assert scheme is not None
    disk = planning.disk_of(form, read, "model.layers.0.a", shape, scheme, parts)
    return describe(disk, tensors.get("g_idx"), tensors.get("pre_quant_scale"), **more)


def comes_back(held: Held, tensors: Tensors) -> Tensors:
    """What is held of a layer; its tensors on disk come back from it, to the byte."""
    packed = held.pack(tensors)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in packed.items()} == held.specs()
    assert not any(t.is_floating_point() for t in packed.values())
    again = held.unpack(packed)
    assert again.keys() == tensors.keys()
    for leaf, t in tensors.items():
        assert (again[leaf].dtype, again[leaf].shape) == (t.dtype, t.shape), leaf
        assert torch.equal(again[leaf].reshape(-1).view(torch.uint8), t.reshape(-1).view(torch.uint8)), leaf
    return packed


def weight_of(held: Held, packed: Tensors) -> torch.Tensor:
    layer = PackedLinear(held, dtype=torch.float32)
    for name, t in packed.items():
        layer.get_parameter(name).data = t
    x = torch.eye(held.shape[1])
    if held.activations is None:
        torch.testing.assert_close(layer(x).t(), layer.weight, atol=1e-6, rtol=1e-6)
    return layer.weight


GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "desc_act": False,
    "sym": True,
    "meta": {"quantizer": ["gptqmodel:7.3.4"]},
}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_what_gptqmodel_writes(bits: int, symmetric: bool, desc_act: bool, version: str) -> None:
    q, z, scale, g_idx, weight = field_case(bits, symmetric, desc_act)
    tensors = field_writer(q, z, scale, g_idx, bits, version)
    checkpoint = "gptq" if version == "v1" else "gptq_v2"
    config = {**GPTQ, "bits": bits, "desc_act": desc_act, "sym": symmetric, "checkpoint_format": checkpoint}
    held = held_of(config, tensors, (32, 128))
    assert (held.path, held.order) == ("packed", desc_act)
    assert torch.equal(weight_of(held, comes_back(held, tensors)), weight)


def test_zero_points_of_0_in_v1() -> None:
    """Stored with borrows; what GPTQModel wrote is known, and of others it is not."""
    q, z, scale, g_idx, weight = field_case(4, False, False, lowest=0)
    tensors = field_writer(q, z, scale, g_idx, 4, "v1")
    held = held_of({**GPTQ, "sym": False}, tensors, (32, 128))
    assert torch.equal(weight_of(held, comes_back(held, tensors)), weight)
    with pytest.raises(InputError, match="stored as 15"):
        held_of({**GPTQ, "sym": False, "meta": {}}, tensors, (32, 128)).pack(tensors)


@pytest.mark.parametrize("permuted", [True, False])
def test_a_ragged_last_group(permuted: bool) -> None:
    q, z, scale, _, _ = field_case(4, False, False)
    for size, path in ((48, "plain"), (80, "plain"), (256, "packed")):
        groups = -(-128 // size)
        g_idx = torch.arange(128) // size
        if permuted:
            g_idx = g_idx[torch.randperm(128, generator=torch.Generator().manual_seed(0))]
        tensors = field_writer(q, z[:groups], scale[:groups], g_idx, 4, "v2")
        held = held_of({**GPTQ, "sym": False, "group_size": size, "checkpoint_format": "gptq_v2"}, tensors, (32, 128))
        assert held.path == path
        expected = ((q - z[g_idx]).float() * scale.float()[g_idx]).t()
        assert torch.equal(weight_of(held, comes_back(held, tensors)), expected)


def test_fp8_on_a_gpu_that_cannot_multiply_it_is_held_for_a_kernel_that_decodes() -> None:
    w = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    for config, tensors in (
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, deepseek(w)),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, modelopt_fp8(w)),
    ):
        held = held_of(config, tensors, (256, 256), fp8=False)
        assert held.path == "packed" and held.rounds_input and held_of(config, tensors, (256, 256)).path != "packed"
        packed = comes_back(held, tensors)
        straight = held_of(config, tensors, (256, 256))
        assert torch.equal(weight_of(held, packed), weight_of(straight, straight.pack(tensors)))


def test_act_order_with_groups_of_other_sizes_is_decoded() -> None:
    q, z, scale, _, _ = field_case(4, False, False)
    g_idx = torch.randint(0, 4, (128,), generator=torch.Generator().manual_seed(0))
    tensors = field_writer(q, z, scale, g_idx, 4, "v2")
    held = held_of({**GPTQ, "sym": False, "desc_act": True, "checkpoint_format": "gptq_v2"}, tensors, (32, 128))
    assert held.path == "plain"
    expected = ((q - z[g_idx]).float() * scale.float()[g_idx]).t()
    assert torch.equal(weight_of(held, comes_back(held, tensors)), expected)


@pytest.mark.parametrize("group", [32, 128])
def test_what_autoawq_writes(group: int) -> None:
    g = torch.Generator().manual_seed(group)
    scale = (torch.rand(16, 128 // group, generator=g) + 0.1).half().float()
    zero = torch.randint(0, 16, scale.shape, generator=g)
    codes = torch.randint(0, 16, (16, 128), generator=g)
    weight = (codes - zero.repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)
    tensors = autoawq(weight, scale, zero, group)
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    held = held_of(config, tensors, (16, 128))
    assert torch.equal(weight_of(held, comes_back(held, tensors)), weight)


def test_rows_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large layers are laid out some rows at a time; the result is the same."""
    cases: list[tuple[dict[str, Any], Tensors, tuple[int, int]]] = []
    w = torch.randn(320, 256, generator=torch.Generator().manual_seed(0))
    for bits in (3, 4):
        g = torch.Generator().manual_seed(bits)
        q, z = torch.randint(0, 1 << bits, (256, 96), generator=g), torch.randint(1, 1 << bits, (8, 96), generator=g)
        scale, g_idx = torch.rand(8, 96, generator=g).half(), torch.arange(256) // 32
        config = {**GPTQ, "bits": bits, "sym": False, "checkpoint_format": "gptq_v2"}
        cases.append((config, field_writer(q, z, scale, g_idx, bits, "v2"), (96, 256)))
    cases.append(({"quant_method": "modelopt", "quant_algo": "NVFP4"}, modelopt_nvfp4(w), (320, 256)))
    awq = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 128}
    cases.append((awq, modelopt_awq(w, 128), (320, 256)))
    cases.append(({"quant_method": "fp8", "weight_block_size": [128, 128]}, deepseek(w), (320, 256)))
    wholes = [held_of(c, t, s).pack(t) for c, t, s in cases]
    monkeypatch.setattr(disk, "ELEMENTS", {"cpu": 256 * 40})
    for (config, tensors, shape), whole in zip(cases, wholes):
        held = held_of(config, tensors, shape)
        assert len(list(held.disk.pieces())) > 1
        parts = comes_back(held, tensors)
        assert parts.keys() == whole.keys() and all(torch.equal(parts[k], whole[k]) for k in parts)


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that were made while it was on and are alive: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.count(t.untyped_storage())
        return result

    def count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("name", ["W4A16", "gptq", "NVFP4", "FP8_BLOCK"])
def test_no_dense_copy_is_made_while_a_layer_is_laid_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "ELEMENTS", {"cpu": 1 << 16})
    monkeypatch.setattr(_words, "ELEMENTS", 1 << 16)
    n, k = 1024, 2048
    scheme = PRESETS["W4A16" if name == "gptq" else name]
    form = formats.get("gptq" if name == "gptq" else "compressed-tensors")
    q = quantized(torch.randn(n, k, generator=torch.Generator().manual_seed(0)), scheme)
    if name == "gptq":
        q = replace(q, qparams=QParams(q.qparams.scale_NG.half()))
    tensors = form.pack(q, scheme.activations, inputs_of(scheme))
    held = held_of({**form.config({"model.layers.0.a": scheme})}, tensors, (n, k))
    with Peak() as peak:
        packed = held.pack(tensors)
    size = sum(t.nbytes for t in packed.values())
    assert peak.most < size + 36 * (1 << 16)  # bytes of a piece, not of the layer
    with Peak() as back:
        held.unpack(packed)
    assert back.most < 2.2 * size + 40 * (1 << 16)


# whole models ---------------------------------------------------------------------------------------------------------


def checkpoint(
    folder: Path,
    config: dict[str, Any],
    write: Callable[[torch.Tensor], Tensors],
    more: Callable[[str], Tensors] = lambda name: {},
    **sizes: Any,
) -> dict[str, torch.Tensor]:
    """A tiny llama whose projections `write` has written. Returns each layer's decoded weight."""
    tiny.save(
        folder,
        "llama",
        **{"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 1, **sizes},
    )
    tensors, decoded = load_file(folder / "model.safetensors"), {}
    for key in [k for k in tensors if "_proj." in k]:
        name = key.removesuffix(".weight")
        weight = tensors.pop(key).float()
        written = write(weight)
        held = held_of(config, written, (weight.shape[0], weight.shape[1]))
        decoded[name] = weight_of(held, held.pack(written))
        tensors |= {f"{name}.{leaf}": t for leaf, t in {**written, **more(name)}.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_config(folder, config)
    return decoded


def scheme_of(config: dict[str, Any]) -> Scheme:
    scheme: Scheme | None = formats.by_method(config["quant_method"]).read_config(config).scheme_for("model.layers.0.a")
    assert scheme is not None
    return scheme


def test_a_factor_of_the_input_that_modelopt_could_not_fold(tmp_path: Path) -> None:
    def write(w: torch.Tensor) -> Tensors:
        factor = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(1)) + 0.5
        return {**modelopt_awq(w, 128), "pre_quant_scale": factor}

    config = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 128, "pre_quant_scale": True}
    decoded = checkpoint(tmp_path / "m", config, write)
    model, layers = loaded(tmp_path / "m", dtype=torch.float32)
    assert all(layer.held.factor for layer in layers.values())
    exact = reference(tmp_path / "m", decoded, {}, torch.float32)
    torch.testing.assert_close(logits(model), logits(exact), atol=1e-5, rtol=1e-4)
    saved_alike(loaded(tmp_path / "m")[0], tmp_path / "m", tmp_path / "again")


def test_modelopt_with_an_fp8_cache(tmp_path: Path) -> None:
    """Stock transformers loads the codes as if they were weights."""

    def scales(name: str) -> Tensors:
        side = name.rpartition(".")[2][0]
        return (
            {f"{side}_scale": torch.tensor(0.02 if side == "k" else 0.03)}
            if side in "kv" and "self_attn" in name
            else {}
        )

    config = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "ignore": ["lm_head"],
        "kv_cache_scheme": {"type": "float", "num_bits": 8},
    }
    decoded = checkpoint(tmp_path / "m", config, modelopt_fp8, scales)
    model, layers = loaded(tmp_path / "m", dtype=torch.float32)
    attention = model.model.layers[0].self_attn
    assert (
        len(layers) == 7 and float(attention.k_scale) == torch.tensor(0.02) and attention.v_scale.dtype == torch.float32
    )
    exact = reference(tmp_path / "m", decoded, {}, torch.float32)
    a = scheme_of(config).activations
    for name in decoded:
        linear = exact.get_submodule(name)
        linear.register_forward_pre_hook(lambda m, args: (fake_quantize(args[0], a, torch.tensor(0.013)),))
    ours, theirs = logits(model), logits(exact)
    assert 0 < (ours - theirs).norm() < 0.1 * theirs.norm()  # the cache's rounding
    saved_alike(loaded(tmp_path / "m")[0], tmp_path / "m", tmp_path / "again")


@pytest.mark.parametrize("inner", [448, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_blocks_with_a_ragged_edge(inner: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Stock transformers takes 448 rows for four blocks of 112, and fails on 320."""

    def write(w: torch.Tensor) -> Tensors:
        tensors = deepseek(w)
        scale = tensors["weight_scale_inv"]
        tensors["weight_scale_inv"] = (torch.exp2(torch.ceil(torch.log2(scale))) if dtype.itemsize < 4 else scale).to(
            dtype
        )
        return tensors

    config = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0" if dtype.itemsize == 1 else "float",
    }
    decoded = checkpoint(tmp_path / "m", config, write, intermediate_size=inner)
    model, layers = loaded(tmp_path / "m", dtype=torch.float32)
    assert {layer.held.path for layer in layers.values()} == {"block"}
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for name in decoded:
        n, k = layers[name].held.shape
        scale = tensors[f"{name}.weight_scale_inv"].float().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)
        assert torch.equal(layers[name].weight, tensors[f"{name}.weight"].float() * scale[:, :k])
    assert torch.isfinite(logits(model)).all()
    saved_alike(loaded(tmp_path / "m")[0], tmp_path / "m", tmp_path / "again")


def test_a_bias_that_the_model_has_not(tmp_path: Path) -> None:
    """AutoGPTQ gave every layer one."""

    def write(w: torch.Tensor) -> Tensors:
        n, k = w.shape
        g = torch.Generator().manual_seed(n + k)
        q, z = torch.randint(0, 16, (k, n), generator=g), torch.full((k // 32, n), 8)
        return field_writer(q, z, torch.rand(k // 32, n, generator=g).half() * 0.01, torch.arange(k) // 32, 4, "v1")

    def bias(name: str) -> Tensors:
        return {
            "bias": torch.full((256 if name.endswith(("gate_proj", "up_proj")) else 128,), 0.5, dtype=torch.float16)
        }

    checkpoint(tmp_path / "m", GPTQ, write, bias, num_key_value_heads=4)
    model, layers = loaded(tmp_path / "m")
    assert all(layer.bias is not None and layer.bias.dtype == torch.float16 for layer in layers.values())
    layer = layers["model.layers.0.mlp.down_proj"]
    assert torch.equal(layer(torch.zeros(1, 256)), torch.full((1, 128), 0.5))
    saved_alike(model, tmp_path / "m", tmp_path / "again")
