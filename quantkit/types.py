"""The vocabulary: what a scheme, a code, a scale and a statistic are.

One legend for shapes, carried by names: M tokens, N out_features, K in_features, G groups of columns.
A weight `w_NK` is laid out like `torch.nn.Linear.weight`: one row an output, groups along the row.

    w_NK  ->  codes_NK, scale_NG (, zero_NG, global_scale)  ->  (codes - zero) * scale

Number format, algorithm, checkpoint format and kernel are four separate things that only share these types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel

Strategy = Literal["tensor", "channel", "group", "block", "token", "head"]


@dataclass(frozen=True)
class TensorScheme:
    """How one tensor (a weight, or an activation) is quantized.

    number      name of the number format, listed in `NUMBERS` of one file of quantkit/numerics: "int4", "fp8_e4m3"
    strategy    how much shares one scale: the tensor, a row ("channel"), `group_size` columns of a row ("group"),
                a `block_shape` tile ("block"), or, for activations, a token's row ("token"); in a KV cache, a "head"
    symmetric   False: each scale has a zero point
    dynamic     activations only: True when the engine computes the scale at run time
    """

    number: str
    strategy: Strategy = "channel"
    group_size: int | None = None
    symmetric: bool = True
    dynamic: bool = False
    block_shape: tuple[int, int] | None = None


@dataclass(frozen=True)
class Scheme:
    """What a linear layer stores and computes with. `activations` is None when they stay in the model's dtype."""

    weights: TensorScheme
    activations: TensorScheme | None = None

    @property
    def calibrates_input(self) -> bool:
        """Whether a scale of the layer's input is found by calibration and stored: static ones, NVFP4's global one."""
        a = self.activations
        return a is not None and (not a.dynamic or a.number == "nvfp4")


@dataclass(frozen=True)
class QParams:
    """Scales and zero points, in the dtypes in which they are stored.

    scale_NG      (N, G) for groups, (N, 1) per channel, (1, 1) per tensor, (ceil(N/bn), ceil(K/bk)) for blocks;
                  a float; float8_e4m3fn for NVFP4; uint8, the exponent plus 127 (E8M0), for MX formats
    zero_NG       int8, same shape as `scale_NG`, on the signed axis of the codes; None when symmetric
    global_scale  float32 (1,), divides the group scales (NVFP4); None elsewhere
    """

    scale_NG: torch.Tensor
    zero_NG: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight as codes, one element a code (unpacked). It is rounded once; packing and decoding only read it.

    codes_NK  (N, K); integers are signed, in [-2^(b-1), 2^(b-1)-1], as int8, also when the scheme is asymmetric;
              floats of 8 bits are torch's float8, those of 4 and 6 bits uint8 with the sign on top
    """

    codes_NK: torch.Tensor
    qparams: QParams
    scheme: TensorScheme

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes_NK.shape
        return n, k


@dataclass(frozen=True)
class Stats:
    """What was observed of one linear's input over the calibration tokens (padding left out).

    Each is None when nothing asked for it, by the name of the field without its shape ("gram").

    tokens      how many rows went in
    gram_KK     (K, K) float32, the mean of x xᵀ (GPTQ's Hessian up to a factor)
    energy_K    (K,) float32, the mean of x² of each channel: the diagonal of the Gram matrix, where no more is wanted
    absmax_K    (K,) float32, the largest |x| of each channel
    absmean_K   (K,) float32, the mean of |x| of each channel
    magnitudes  (32768,) int64, how often each |x| was seen, by its bfloat16 pattern
    sample_MK   (M, K) some of the tokens as they were, M at most a few thousand
    drift_KK    (K, K) float32, the mean of (x' - x) xᵀ, where x' is what the dense model would have had in x's place
    """

    tokens: int
    gram_KK: torch.Tensor | None = None
    absmax_K: torch.Tensor | None = None
    magnitudes: torch.Tensor | None = None
    energy_K: torch.Tensor | None = None
    absmean_K: torch.Tensor | None = None
    sample_MK: torch.Tensor | None = None
    drift_KK: torch.Tensor | None = None

    def divided(self, s_K: torch.Tensor) -> Stats:
        """The same statistics of x / s, exactly: what a fold of `s_K` (K,), all above 0, makes of a layer's input.

        Raises ValueError when magnitudes were counted: they do not tell channels apart.
        """
        if self.magnitudes is not None:
            raise ValueError("magnitudes cannot be rescaled by channel")
        r = 1 / s_K.float()

        def by(t: torch.Tensor | None, factor: torch.Tensor) -> torch.Tensor | None:
            return None if t is None else t * factor.to(t.dtype)

        outer = r[:, None] * r
        return Stats(
            self.tokens,
            gram_KK=by(self.gram_KK, outer),
            absmax_K=by(self.absmax_K, r),
            energy_K=by(self.energy_K, r * r),
            absmean_K=by(self.absmean_K, r),
            sample_MK=by(self.sample_MK, r),
            drift_KK=by(self.drift_KK, outer),
        )


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that is, or will be, in a checkpoint. `dtype` is safetensors' name: "BF16"."""

    dtype: str
    shape: tuple[int, ...]


@dataclass
class Notes:
    """What a user must be told about one layer: a damping that was raised, a dead column. Never silent."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.lines.append(line)


class NumberFormat(Protocol):
    """A file of quantkit/numerics: what a code means.

    NUMBERS   the names of the number formats in it
    SEARCHES  what `search` may be; all have "absmax" and "mse"
    """

    NUMBERS: tuple[str, ...]
    SEARCHES: tuple[str, ...]

    def qparams(
        self,
        w_NK: torch.Tensor,
        scheme: TensorScheme,
        *,
        scale_dtype: torch.dtype,
        search: str = "absmax",
        importance_K: torch.Tensor | None = None,
    ) -> QParams: ...

    def encode(self, w_NK: torch.Tensor, qparams: QParams, scheme: TensorScheme) -> torch.Tensor: ...

    def decode(self, codes_NK: torch.Tensor, qparams: QParams, scheme: TensorScheme) -> torch.Tensor: ...


class Algorithm(Protocol):
    """A file of quantkit/algorithms: which code each weight gets. Its name is `method:` in a recipe.

    Options  pydantic model of its options in a recipe
    """

    Options: type[BaseModel]

    def needs(self, options: Any) -> frozenset[str]:
        """The fields of Stats that it reads with these options, such as {"gram"}."""
        ...

    def quantize(
        self,
        w_NK: torch.Tensor,
        scheme: TensorScheme,
        stats: Stats | None,
        *,
        options: Any,
        scale_dtype: torch.dtype,
        notes: Notes,
    ) -> QuantizedTensor: ...


class Format(Protocol):
    """A file of quantkit/formats: how codes lie in a file. Its name is `export.format` in a recipe, with dashes.

    QUANT_METHOD  what its config calls itself, "fp8" for fp8-block
    MARKER        a tensor that packed layers have, and dense ones lack: "qweight"
    SCALE_DTYPE   safetensors' name of the dtype that its scales have; without it, that of the model
    """

    QUANT_METHOD: str
    MARKER: str

    def tensors(self, shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]: ...

    def pack(
        self, q: QuantizedTensor, activations: TensorScheme | None = None, inputs: QParams | None = None
    ) -> dict[str, torch.Tensor]: ...

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor: ...

    def shape(self, specs: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int] | None: ...

    def config(self, schemes: Mapping[str, Scheme | None]) -> dict[str, Any]: ...

    def files(self, schemes: Mapping[str, Scheme | None]) -> dict[str, Any]: ...

    def read_config(self, config: Mapping[str, Any]) -> Any: ...


class RowFormat(Format, Protocol):
    """A checkpoint format that has the codes of a weight's rows one after another: its parts can be packed alone."""

    def pack_codes(self, codes_NK: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]: ...

    def pack_scales(
        self, qparams: QParams, scheme: Scheme, shape: tuple[int, int], inputs: QParams | None = None
    ) -> dict[str, torch.Tensor]: ...


class KvFormat(Format, Protocol):
    """A checkpoint format that also holds the scales of a quantized KV cache, below each attention layer."""

    def kv_tensors(self, scheme: TensorScheme, heads: int, dtype: str) -> dict[str, TensorSpec]: ...

    def pack_kv(
        self, k_scale: torch.Tensor, v_scale: torch.Tensor, scheme: TensorScheme
    ) -> dict[str, torch.Tensor]: ...

    def config(self, schemes: Mapping[str, Scheme | None], kv_cache: TensorScheme | None = None) -> dict[str, Any]: ...
