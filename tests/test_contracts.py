"""What every number format, algorithm and checkpoint format must do. New ones are found by listing their folders."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from quantkit import algorithms, formats, numerics
from quantkit.errors import InputError
from quantkit.presets import PRESETS
from quantkit.types import Notes, QuantizedTensor, Scheme, Stats, TensorScheme, TensorSpec

N, K = 33, 128  # an odd number of rows: a packing along N then ends inside a word
DTYPES = {"I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64, "BF16": torch.bfloat16}


def weight(seed: int = 0, n: int = N, k: int = K) -> torch.Tensor:
    """A weight with outliers, (n, k) float32."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * 0.02
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
    for number in sorted(numerics.registry()):
        for strategy, group in (("tensor", None), ("channel", None), ("group", 32)):
            for symmetric in (True, False):
                scheme = TensorScheme(number, strategy, group, symmetric)  # type: ignore[arg-type]
                try:
                    numerics.get(number).qparams(weight(), scheme, scale_dtype=torch.float32)
                except InputError:
                    continue
                found.append(scheme)
    return found


def name(scheme: TensorScheme) -> str:
    return f"{scheme.number}-{scheme.strategy}-{'sym' if scheme.symmetric else 'asym'}"


SCHEMES = schemes()
ALGORITHM_SCHEMES = [s for s in SCHEMES if s.number in ("int3", "int4", "int8") and s.strategy != "tensor"]


def quantized(scheme: TensorScheme, seed: int = 0, shape: tuple[int, int] = (N, K)) -> QuantizedTensor:
    w = weight(seed, *shape)
    return numerics.quantize(w, numerics.get(scheme.number).qparams(w, scheme, scale_dtype=torch.bfloat16), scheme)


def output_error(q: QuantizedTensor, w_NK: torch.Tensor, stats: Stats) -> float:
    """Mean square of what the layer's outputs miss: tr(D H Dᵀ)."""
    assert stats.gram_KK is not None
    d = numerics.dequantize(q) - w_NK
    return float(torch.trace(d @ stats.gram_KK @ d.T))


def test_every_number_format_takes_part() -> None:
    assert {scheme.number for scheme in SCHEMES} == set(numerics.registry())


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
class TestNumberFormat:
    def test_a_decoded_weight_encodes_to_the_same_codes(self, scheme: TensorScheme) -> None:
        q = quantized(scheme)
        decoded = numerics.dequantize(q)
        assert decoded.dtype == torch.float32 and decoded.shape == (N, K)
        assert torch.equal(numerics.quantize(decoded, q.qparams, scheme).codes_NK, q.codes_NK)

    def test_no_other_code_is_nearer(self, scheme: TensorScheme) -> None:
        """The codes of a fine ramp are all codes that there are: none of them may be nearer than the chosen one."""
        q = quantized(scheme)
        fine = numerics.column(numerics.expand(q.qparams, scheme, (N, K)), 5)
        w = weight()[:, 5:6]
        ramp = torch.linspace(-1, 1, 2049) * 2 * weight().abs().max()
        module = numerics.get(scheme.number)
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
            assert torch.equal(codes, q.codes_NK[:, j : j + 1])

    def test_zeros_stay_zeros(self, scheme: TensorScheme) -> None:
        zeros = torch.zeros(N, K)
        qparams = numerics.get(scheme.number).qparams(zeros, scheme, scale_dtype=torch.bfloat16)
        decoded = numerics.dequantize(numerics.quantize(zeros, qparams, scheme))
        assert torch.equal(decoded, zeros)


@pytest.mark.parametrize("method", algorithms.names())
class TestAlgorithm:
    @pytest.mark.parametrize("scheme", ALGORITHM_SCHEMES, ids=name)
    def test_no_worse_than_plain_rounding(self, method: str, scheme: TensorScheme) -> None:
        """The error of the layer's output, tr(D H Dᵀ), against nearest codes under scales from the absolute maximum."""
        module, w, stats = algorithms.get(method), weight(), statistics()
        before = w.clone()
        run = {"options": module.Options(), "scale_dtype": torch.bfloat16}
        q = module.quantize(w, scheme, stats, notes=Notes(), **run)
        again = module.quantize(w, scheme, stats, notes=Notes(), **run)
        assert torch.equal(w, before), "the weight was changed in place"
        assert q.scheme == scheme and q.shape == (N, K) and q.qparams.scale_NG.dtype == torch.bfloat16
        assert torch.equal(q.codes_NK, again.codes_NK) and torch.equal(q.qparams.scale_NG, again.qparams.scale_NG)
        assert output_error(q, w, stats) <= 1.02 * output_error(quantized(scheme), w, stats)

    def test_asks_for_what_it_needs(self, method: str) -> None:
        module = algorithms.get(method)
        assert {f"{need}_KK" if need == "gram" else f"{need}_K" for need in module.NEEDS} <= {"gram_KK", "absmax_K"}
        run = {"options": module.Options(), "scale_dtype": torch.bfloat16, "notes": Notes()}
        if module.NEEDS:
            with pytest.raises(InputError):
                module.quantize(weight(), TensorScheme("int4", "group", 32), None, **run)
        else:
            assert module.quantize(weight(), TensorScheme("int4", "group", 32), None, **run).shape == (N, K)

    def test_refuses_an_unknown_option(self, method: str) -> None:
        with pytest.raises(ValidationError):
            algorithms.get(method).Options.model_validate({"no_such_option": 1})


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("form", formats.names())
class TestFormat:
    @pytest.mark.parametrize("shape", [(N, K), (64, 384), (1, 128)], ids=str)
    def test_unpack_gives_back_what_was_packed(self, form: str, preset: str, shape: tuple[int, int]) -> None:
        module, scheme = formats.get(form), PRESETS[preset]
        q = quantized(scheme.weights, shape=shape)
        packed = module.pack(q)
        back = module.unpack(packed, scheme)
        assert torch.equal(back.codes_NK, q.codes_NK) and back.codes_NK.dtype == q.codes_NK.dtype
        assert torch.equal(back.qparams.scale_NG, q.qparams.scale_NG)
        assert (back.qparams.zero_NG is None) == (q.qparams.zero_NG is None)
        if back.qparams.zero_NG is not None and q.qparams.zero_NG is not None:
            assert torch.equal(back.qparams.zero_NG, q.qparams.zero_NG)
        told = module.tensors(shape, scheme, "BF16")
        kinds = {dtype: kind for kind, dtype in DTYPES.items()}
        assert told == {key: TensorSpec(kinds[t.dtype], tuple(t.shape)) for key, t in packed.items()}
        assert all(t.is_contiguous() for t in packed.values())

    def test_config_is_plain_json(self, form: str, preset: str) -> None:
        names: dict[str, Scheme | None] = {"a.q_proj": PRESETS[preset], "lm_head": None}
        config = formats.get(form).config(names)
        assert json.loads(json.dumps(config)) == config
        assert config["quant_method"]

    def test_refuses_a_group_size_that_does_not_divide(self, form: str, preset: str) -> None:
        scheme = Scheme(replace(PRESETS[preset].weights, strategy="group", group_size=48))
        with pytest.raises(InputError, match="48"):
            formats.get(form).tensors((N, K), scheme, "BF16")
