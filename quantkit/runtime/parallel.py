"""Tensor parallelism: packed layers split over ranks at the boundaries of rows and groups.

transformers shards dense parameters by their dimensions while it reads them, and wraps each module's forward in what
gathers or sums. Words of packed codes have no such dimensions, so here every rank reads the whole tensors of a layer,
lays out its own rows or columns, and keeps those; what wraps the forward is transformers' own.

Where columns are split and a layer's inputs are quantized token by token, as they come, the ranks agree on the reach of
each token first, so that its scale is the one that a single rank finds.

Of a model's plan, the styles of packed modules are replaced by twins of them: "colwise" by "quantkit_colwise".
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn

from quantkit.errors import InputError
from quantkit.runtime.experts import PackedExperts
from quantkit.runtime.linear import PackedLinear

PREFIX = "quantkit_"


def plan(model: Any) -> None:
    """Changes the plan of an empty model whose modules have been swapped. By itself, or without a plan: nothing."""
    own: dict[str, str] | None = getattr(model, "_tp_plan", None)
    if not own or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    packed = {_wildcard(n): m for n, m in model.named_modules() if isinstance(m, PackedLinear | PackedExperts)}
    for name, style in list(own.items()):
        owner = name.rpartition(".")[0]
        if isinstance(packed.get(owner), PackedExperts):
            del own[name]  # a parameter that is not there; their owner's style splits them
        elif name in packed and not style.startswith(PREFIX):
            own[name] = _twin(style)


def _wildcard(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


@functools.cache
def _twin(style: str) -> str:
    """Registers a style that splits packed modules, and does with others what `style` does. Returns its name."""
    styles = _transformers().ALL_PARALLEL_STYLES
    found = copy.copy(styles[style])
    kind = type(found)
    found.__class__ = type(f"Packed{kind.__name__}", (_Splitting, kind), {"style": style})
    styles.register(PREFIX + style, found)
    return PREFIX + style


def _transformers() -> Any:
    """The module with the registry of styles: in 5.17 there is one for everything."""
    from transformers.distributed import tensor_parallel

    try:
        from transformers.distributed import parallel_utils
    except ImportError:
        return tensor_parallel
    return parallel_utils


class _Splitting:
    """Before one of transformers' styles: packed modules split themselves."""

    style: str

    def validate_param(self, module: nn.Module, param: str, mesh: Any, parameter_name: str | None = None) -> None:
        if not isinstance(module, PackedLinear | PackedExperts):
            super().validate_param(module, param, mesh, parameter_name=parameter_name)  # type: ignore[misc]

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        if not isinstance(module, PackedLinear | PackedExperts) or (
            isinstance(module, PackedLinear) and param == "bias"
        ):
            super().shard_param(module, param, mesh)  # type: ignore[misc]

    def install_forward(self, module: Any, mesh: Any) -> Any:
        rank, ranks = mesh.get_local_rank(), mesh.size()
        try:
            if isinstance(module, PackedExperts):
                if self.style != "moe_tp_experts":
                    raise InputError(f"experts are not split by the style {self.style!r}")
                module.split(rank, ranks)
                module.ranks = _group(mesh)
            elif isinstance(module, PackedLinear):
                dim = {"col": 0, "row": 1}.get(self.style[:3])
                if dim is None:
                    raise InputError(f"a packed layer is not split by the style {self.style!r}")
                module.split(dim, rank, ranks)
                module.ranks = _group(mesh) if dim == 1 else None
                module._hf_quantized_needs_local_tp = True
        except InputError as error:
            shape = f"{module.out_features} x {module.in_features}" if isinstance(module, PackedLinear) else "experts"
            raise InputError(f"tensor parallelism of a packed layer ({shape}): {error}") from None
        return super().install_forward(module, mesh)  # type: ignore[misc]

    def transform_output_post_forward(self, module: Any, output: Any, mesh: Any, **kwargs: Any) -> Any:
        if not isinstance(module, PackedExperts):
            return super().transform_output_post_forward(module, output, mesh, **kwargs)  # type: ignore[misc]
        # 5.17 sums only where it has sharded parameters itself
        return _transformers()._AllReduceForward.apply(output, _group(mesh))


def _group(mesh: Any) -> Any:
    return mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
