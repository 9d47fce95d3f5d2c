"""Activations as an engine sees them: quantized on their way into a linear layer, with no statistics of other tokens.

    scheme of the activations                 scale                                  of what
    None                                      -                                      left as they are
    token, dynamic     (int8, fp8)            from the token itself                  each token
    group of 128, dyn. (fp8)                  from the group itself                  1 x 128 of a token
    group of 32, dyn.  (MX)                   E8M0, rule "even"                      1 x 32 of a token
    group of 16, dyn.  (NVFP4, "local")       E4M3, under a calibrated global scale  1 x 16 of a token
    tensor, dynamic    (int8, fp8)            from all tokens at hand                all
    tensor, static     (int8, fp8)            calibrated: `static_scale`             all

Numbers are those of compressed-tensors' forward pass when it computes in float32. Engines differ from it, and from
each other, in the last bits: they multiply by 1 / scale where this divides. vLLM's dynamic int8 scale is amax / 127,
not amax / 127.5 (0.4% more), and its FP8 scale per token is at least 1 / (448 * 512).

A static scale and the scales of a KV cache are calibrated: `Magnitudes` counts what was seen, `kv_scale` divides.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from quantkit import numerics, summation
from quantkit.errors import InputError
from quantkit.numerics import nvfp4
from quantkit.numerics._minifloat import E4M3
from quantkit.numerics._tiles import divide
from quantkit.types import QParams, TensorScheme

# bfloat16 has this many magnitudes, from 0 to NaN; those from INFINITY on are not finite
MAGNITUDES, INFINITY = 1 << 15, 0x7F80
SHRINK = tuple(2 ** (-i / 16) for i in range(128))  # of the scale that spans the largest: down to 1/256 of it


def fake_quantize(
    x: torch.Tensor, scheme: TensorScheme | None, static_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Activations rounded to what their codes stand for: (..., K) float -> same shape and dtype.

    static_scale  one float: the scale of a static scheme, or the global scale of NVFP4, 448 * 6 / amax
    Raises InputError when a scale is missing or of no use, K does not fit the groups, or x holds NaN or Inf.
    """
    if scheme is None or x.numel() == 0:
        return x
    rows = replace(scheme, strategy="channel") if scheme.strategy == "token" else scheme
    x_MK = x.reshape(-1, x.shape[-1]).float()
    qparams = _qparams(x_MK, rows, static_scale)
    return numerics.dequantize(numerics.quantize(x_MK, qparams, rows)).to(x.dtype).reshape(x.shape)


def _qparams(x_MK: torch.Tensor, scheme: TensorScheme, static_scale: torch.Tensor | None) -> QParams:
    needs_one = scheme.number == "nvfp4" or not scheme.dynamic
    if needs_one and static_scale is None:
        raise InputError(f"{scheme.number} activations need a calibrated scale; give static_scale")
    if not needs_one and static_scale is not None:
        raise InputError(f"{scheme.number} activations per {scheme.strategy} are dynamic; leave static_scale out")
    if static_scale is None:
        return numerics.get(scheme.number).qparams(x_MK, scheme, scale_dtype=torch.float32)
    if static_scale.numel() != 1 or not bool(torch.isfinite(static_scale.float()) & (static_scale > 0)):
        raise InputError(f"static_scale is one positive number, not {static_scale.tolist()}")
    if scheme.number == "nvfp4":
        return nvfp4.local_qparams(x_MK, static_scale.float().reshape(1), scheme)
    if scheme.strategy != "tensor" or not scheme.symmetric:
        raise InputError(
            f"static {scheme.number} activations have one scale a tensor and no zero point, "
            f"not {'one' if scheme.symmetric else 'zero points and one'} per {scheme.strategy}"
        )
    return QParams(static_scale.reshape(1, 1))


class Magnitudes:
    """How often each |x| was seen, counted by its bfloat16 pattern: exact for bfloat16, 0.4% for wider dtypes.

    32768 counters, whatever the range; two of them can be added. Nothing depends on the order of the batches.
    """

    def __init__(self, device: torch.device | str = "cpu", counts: torch.Tensor | None = None) -> None:
        new = torch.zeros(MAGNITUDES, dtype=torch.int64, device=device)
        self.counts = new if counts is None else counts

    def update(self, x: torch.Tensor) -> None:
        """Counts all values of x, any shape, float. Leave padding out before. Raises InputError for NaN and Inf."""
        patterns = x.detach().reshape(-1).to(torch.bfloat16).abs().view(torch.int16).long()
        counts = torch.bincount(patterns, minlength=MAGNITUDES)
        if int(counts[INFINITY:].sum()):
            raise InputError(f"{int(counts[INFINITY:].sum())} of {x.numel()} activations are NaN or Inf")
        self.counts += counts.to(self.counts.device)

    def scale(self, scheme: TensorScheme, rule: str = "absmax", *, percentile: float = 99.99) -> torch.Tensor:
        """The static scale of activations, float32 (1,). For NVFP4, its global scale.

        rule        "absmax": the largest value seen is the largest code's.
                    "percentile": `percentile` % of the values do not saturate.
                    "mse": the least squared error over everything seen
        Raises InputError when nothing was seen but zeros, or for a scheme or rule that does not fit.
        """
        seen = self.counts.nonzero().flatten()
        values = seen.to(torch.int16).view(torch.bfloat16).float()
        if not len(seen) or values[-1] == 0:
            raise InputError("no activation but zeros was seen, so there is no scale; calibrate with other data")
        counts = self.counts[seen].double()
        if rule == "percentile":
            if not 0 < percentile <= 100:
                raise InputError(f"a percentile is above 0 and at most 100, not {percentile}")
            rank = (counts.cumsum(0) / counts.sum() < percentile / 100).sum().clamp(max=len(values) - 1)
            amax = values[rank].clamp(min=values[values > 0][0])
        elif rule in ("absmax", "mse"):
            amax = values[-1]
        else:
            raise InputError(f"unknown rule {rule!r} for a static scale; known: absmax, percentile, mse")
        if scheme.number == "nvfp4":
            if rule == "mse":
                raise InputError("the global scale of nvfp4 has no rule mse: its groups have scales of their own")
            return nvfp4.global_scale(amax)
        whole = TensorScheme(scheme.number, "tensor")
        spanning = numerics.get(scheme.number).qparams(amax.reshape(1, 1), whole, scale_dtype=torch.float32).scale_NG
        if rule != "mse":
            return spanning.reshape(1)
        trials = [spanning.reshape(1) * factor for factor in SHRINK]
        return min(trials, key=lambda s: self._error(values, counts, whole, s))

    @staticmethod
    def _error(values: torch.Tensor, counts: torch.Tensor, scheme: TensorScheme, scale: torch.Tensor) -> float:
        """Sum of the squared errors of all that was seen; the two signs are taken to be as frequent."""
        both = torch.stack([values, -values])
        missed = numerics.dequantize(numerics.quantize(both, QParams(scale.reshape(1, 1)), scheme)) - both
        return summation.total(missed.double().square() * counts)


def kv_scale(absmax: torch.Tensor) -> torch.Tensor:
    """Scales of an FP8 (E4M3) KV cache: absmax / 448, float32, in the shape of `absmax`: (1,), or (H,) per head.

    absmax  largest |k| after the rotary embedding, as it is cached, or |v|, over all calibration tokens
    A head that was never heard, below 1e-5, gets the scale of 1e-5: other text may use it.
    Raises InputError for NaN and Inf.
    """
    if not bool(torch.isfinite(absmax).all()):
        raise InputError("the calibration keys or values of this layer hold NaN or Inf")
    return divide(absmax.float().clamp(min=1e-5), E4M3.max)


def kv_absmax(x_BHLD: torch.Tensor, *, per_head: bool, mask_BL: torch.Tensor | None = None) -> torch.Tensor:
    """Largest |x| of keys or values: (B, H, L, D) float -> float32 (H,), or (1,) over all heads.

    mask_BL  False where a position is padding
    """
    x = x_BHLD.float().abs()
    if mask_BL is not None:
        x = x.masked_fill(~mask_BL[:, None, :, None], 0)
    return x.amax((0, 2, 3)) if per_head else x.amax().reshape(1)
