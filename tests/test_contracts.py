"""What every number format, algorithm and checkpoint format must do. New ones are found by listing their folders."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save

from quantkit import algorithms, formats, numerics
from quantkit.errors import InputError
from quantkit.presets import PRESETS
from quantkit.stats import KNOWN
from quantkit.types import Notes, QParams, QuantizedTensor, Scheme, Stats, TensorScheme, TensorSpec

N, K = 33, 128  # an odd number of rows: a packing along N then ends inside a word
SHAPES = [(N, K), (256, 384), (128, 128), (1, 128), (40, 96)]
SCALE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "tensor"},
    {"strategy": "channel"},
    {"strategy": "group", "group_size": 16},
    {"strategy": "group", "group_size": 32},
    {"strategy": "block", "block_shape": (16, 32)},
    {"strategy": "block", "block_shape": (128, 128)},
]


def weight(seed: int = 0, shape: tuple[int, int] = (N, K)) -> torch.Tensor:
    """A weight with a channel of outliers, float32."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    w[:, 3] *= 8
    return w


def statistics(seed: int = 1, tokens: int = 4 * K) -> Stats:
    """Second moments and maxima of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, K, generator=generator) @ torch.randn(K, K, generator=generator) / K**0.5
    return Stats(tokens, gram_KK=x.T @ x / tokens, absmax_K=x.abs().amax(0))


def schemes() -> list[TensorScheme]:
    """Every number format with every strategy and symmetry that it accepts for a weight."""
    found = []
    for number, strategy, symmetric in itertools.product(sorted(numerics.registry()), STRATEGIES, (True, False)):
        scheme = TensorScheme(number, symmetric=symmetric, **strategy)
        try:
            numerics.get(number).qparams(weight(), scheme, scale_dtype=torch.float32)
        except InputError:
            continue
        found.append(scheme)
    return found


def name(scheme: TensorScheme) -> str:
    size = scheme.group_size or (scheme.block_shape[0] if scheme.block_shape else "")
    return f"{scheme.number}-{scheme.strategy}{size}-{'sym' if scheme.symmetric else 'asym'}"


def quantized(
    scheme: TensorScheme, shape: tuple[int, int] = (N, K), dtype: torch.dtype = torch.bfloat16
) -> QuantizedTensor:
    w = weight(shape=shape)
    return numerics.quantize(w, numerics.get(scheme.number).qparams(w, scheme, scale_dtype=dtype), scheme)


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """The same dtype, shape and bytes; torch.equal knows no float8."""
    if a is None or b is None:
        return a is b
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(_bytes(a), _bytes(b))


def _bytes(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().flatten().view(torch.uint8)


def output_error(q: QuantizedTensor, w_NK: torch.Tensor, stats: Stats) -> float:
    """Mean square of what the layer's outputs miss: tr(D H Dᵀ)."""
    assert stats.gram_KK is not None
    d = numerics.dequantize(q) - w_NK
    return float(torch.trace(d @ stats.gram_KK @ d.T))


SCHEMES = schemes()


def test_every_number_format_takes_part() -> None:
    assert {scheme.number for scheme in SCHEMES} == set(numerics.registry())


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
class TestNumberFormat:
    def test_a_decoded_weight_encodes_to_the_same_values(self, scheme: TensorScheme) -> None:
        q = quantized(scheme)
        decoded = numerics.dequantize(q)
        assert decoded.dtype == torch.float32 and decoded.shape == (N, K)
        assert torch.equal(numerics.dequantize(numerics.quantize(decoded, q.qparams, scheme)), decoded)

    def test_no_other_code_is_nearer(self, scheme: TensorScheme) -> None:
        """The codes of a fine ramp are all codes that there are: none of them may be nearer than the chosen one."""
        q, module = quantized(scheme), numerics.get(scheme.number)
        fine = numerics.column(numerics.expand(q.qparams, scheme, (N, K)), 5)
        w = weight()[:, 5:6]
        ramp = torch.linspace(-1, 1, 4097) * 2 * weight().abs().max()
        values = module.decode(module.encode(ramp.expand(N, -1), fine, scheme), fine, scheme)
        chosen = (numerics.dequantize(q)[:, 5:6] - w).abs()
        best = (values - w).abs().amin(1, keepdim=True)
        assert (chosen <= best * (1 + 1e-5) + 1e-8).all()

    def test_a_column_alone_has_the_codes_of_the_whole(self, scheme: TensorScheme) -> None:
        """Algorithms go column by column with `expand` and `column`."""
        q, module = quantized(scheme), numerics.get(scheme.number)
        fine = numerics.expand(q.qparams, scheme, (N, K))
        for j in (0, 31, 32, K - 1):
            codes = module.encode(weight()[:, j : j + 1], numerics.column(fine, j), scheme)
            assert same(codes, q.codes_NK[:, j : j + 1])

    def test_zeros_stay_zeros(self, scheme: TensorScheme) -> None:
        zeros = torch.zeros(N, K)
        qparams = numerics.get(scheme.number).qparams(zeros, scheme, scale_dtype=torch.bfloat16)
        assert torch.equal(numerics.dequantize(numerics.quantize(zeros, qparams, scheme)), zeros)


@pytest.mark.parametrize("method", algorithms.names())
class TestAlgorithm:
    @pytest.mark.parametrize("scheme", SCHEMES, ids=name)
    def test_no_worse_than_plain_rounding(self, method: str, scheme: TensorScheme) -> None:
        """The error of the layer's output, within 5%, against nearest codes under the format's plain scales."""
        module, w, stats = algorithms.get(method), weight(), statistics()
        before, plain = w.clone(), quantized(scheme)
        run = {"options": module.Options(), "scale_dtype": torch.bfloat16}
        q = module.quantize(w, scheme, stats, notes=Notes(), **run)
        again = module.quantize(w, scheme, stats, notes=Notes(), **run)
        assert torch.equal(w, before), "the weight was changed in place"
        assert q.scheme == scheme and q.shape == (N, K)
        assert q.qparams.scale_NG.dtype == plain.qparams.scale_NG.dtype
        assert q.qparams.scale_NG.shape == plain.qparams.scale_NG.shape
        assert same(q.codes_NK, again.codes_NK) and same(q.qparams.scale_NG, again.qparams.scale_NG)
        assert output_error(q, w, stats) <= 1.05 * output_error(plain, w, stats)

    def test_asks_for_what_it_needs(self, method: str) -> None:
        module = algorithms.get(method)
        needs = module.needs(module.Options())
        assert needs <= KNOWN
        run = {"options": module.Options(), "scale_dtype": torch.bfloat16, "notes": Notes()}
        if needs:
            with pytest.raises(InputError):
                module.quantize(weight(), TensorScheme("int4", "group", 32), None, **run)
        else:
            assert module.quantize(weight(), TensorScheme("int4", "group", 32), None, **run).shape == (N, K)

    def test_refuses_an_unknown_option(self, method: str) -> None:
        with pytest.raises(ValidationError):
            algorithms.get(method).Options.model_validate({"no_such_option": 1})


def held(form: str) -> dict[tuple[str, tuple[int, int]], dict[str, TensorSpec]]:
    """(preset, shape) -> the tensors that the format promises, of all that it does not refuse."""
    found = {}
    for preset, shape in itertools.product(PRESETS, SHAPES):
        try:
            found[preset, shape] = formats.get(form).tensors(shape, PRESETS[preset], "BF16")
        except InputError:
            continue
    return found


HELD = {form: held(form) for form in formats.names()}
CASES = [(form, preset, shape) for form in HELD for preset, shape in HELD[form]]
CONFIGS = sorted({(form, preset) for form, preset, _ in CASES})
INPUTS = QParams(torch.full((1, 1), 0.125, dtype=torch.bfloat16), None, torch.tensor([3.5]))


def test_every_preset_can_be_written() -> None:
    assert {preset for _, preset, _ in CASES} == set(PRESETS)


@pytest.mark.parametrize("form", formats.names())
def test_what_a_format_does_not_promise_it_does_not_write(form: str) -> None:
    """A format that is only read promises nothing, and refuses everything."""
    module = formats.get(form)
    for preset in sorted({*PRESETS} - {preset for preset, _ in HELD[form]}):
        scheme = PRESETS[preset]
        with pytest.raises(InputError):
            module.pack(quantized(scheme.weights, (256, 384)), scheme.activations, INPUTS)
        with pytest.raises(InputError):
            module.config({"model.layers.0.mlp.up_proj": scheme})


@pytest.mark.parametrize(("form", "preset", "shape"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_format_unpacks_what_it_packed(form: str, preset: str, shape: tuple[int, int]) -> None:
    module, scheme = formats.get(form), PRESETS[preset]
    q = quantized(scheme.weights, shape, SCALE_DTYPES[getattr(module, "SCALE_DTYPE", "BF16")])
    packed = module.pack(q, scheme.activations, INPUTS if scheme.calibrates_input else None)
    back = module.unpack(packed, scheme)
    assert same(back.codes_NK, q.codes_NK)
    assert same(back.qparams.scale_NG, q.qparams.scale_NG)
    assert same(back.qparams.zero_NG, q.qparams.zero_NG)
    if q.qparams.global_scale is None:
        assert back.qparams.global_scale is None
    else:  # a format may store its reciprocal, which is off by a rounding
        torch.testing.assert_close(back.qparams.global_scale, q.qparams.global_scale, rtol=2**-23, atol=0)
    assert all(t.is_contiguous() for t in packed.values())
    assert HELD[form][preset, shape] == on_disk(packed)


def on_disk(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    """Dtypes and shapes as a safetensors file has them."""
    data = save(tensors)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {key: TensorSpec(entry["dtype"], tuple(entry["shape"])) for key, entry in header.items()}


@pytest.mark.parametrize(("form", "preset"), CONFIGS)
def test_config_is_plain_json_and_reads_back(form: str, preset: str) -> None:
    layers: dict[str, Scheme | None] = {"model.layers.0.mlp.up_proj": PRESETS[preset], "lm_head": None}
    module = formats.get(form)
    config = module.config(layers)
    assert json.loads(json.dumps(config)) == config
    read = module.read_config(config)
    assert read.unsupported is None
    assert read.scheme_for("lm_head") is None
    scheme = read.scheme_for("model.layers.0.mlp.up_proj")
    assert scheme is not None and scheme.activations == PRESETS[preset].activations
    # a format without symmetric weights may write zero points that change nothing
    assert scheme.weights in (PRESETS[preset].weights, replace(PRESETS[preset].weights, symmetric=False))
