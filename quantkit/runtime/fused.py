"""What lies between the products of a packed decoder, one launch each: loading arranges it for models on a GPU.

Eager models wait for Python and for launches. RMSNorm is eight of transformers' launches, rotary embedding ten, and
silu(gate) * up two. A module gets a forward of its own where its class computes what transformers' Llama does, by the
code of its methods, whatever it is called; classes and other models stay as they are. That forward is the class's own
again wherever a launch is not the whole of it: while a graph is traced, gradients are asked for, or tensors are not on
a GPU. The results are the same but for the last bit of a root and of an exponential.

    RMSNorm      activation.rms_norm
    an MLP       gate_proj and up_proj, joined (joint.py), then activation.silu_mul
    attention    the function apply_rotary_pos_emb, in a copy of the class's forward that finds rope.py in its place
"""

from __future__ import annotations

import dis
import functools
import logging
from collections import Counter
from collections.abc import Callable
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from quantkit.runtime.joint import Joint
from quantkit.runtime.linear import PackedLinear
from quantkit_kernels import rope
from quantkit_kernels._launch import direct
from quantkit_kernels.activation import launch_rms_norm, launch_silu_mul

ROPE = "apply_rotary_pos_emb"

logger = logging.getLogger("quantkit")


def fuse(model: nn.Module) -> Counter[str]:
    """Gives a loaded model's modules such forwards; says, and returns, how many of each kind."""
    from transformers.models.llama import modeling_llama as llama  # not while transformers is being imported

    found: Counter[str] = Counter()
    for module in model.modules():
        own = type(module).forward
        if "forward" in module.__dict__ or not isinstance(own, FunctionType):
            continue
        if _alike(own, llama.LlamaRMSNorm.forward):
            module.forward = MethodType(_norm, module)
            found["RMSNorm"] += 1
        elif _alike(own, llama.LlamaMLP.forward) and _is_silu(module.act_fn):
            module.forward = MethodType(_mlp, module)
            found["silu(gate) * up"] += 1
        elif ROPE in own.__code__.co_names and all(
            _alike(own.__globals__.get(name), getattr(llama, name)) for name in (ROPE, "rotate_half")
        ):
            module.forward = MethodType(_attention(own), module)
            found["rotary embedding"] += 1
    if found:
        what = ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
        logger.info("quantkit: one launch each, where nothing is compiled: %s", what)
    return found


def unfuse(model: nn.Module) -> None:
    """Every module has its class's forward again."""
    for module in model.modules():
        own = module.__dict__.get("forward")
        if isinstance(own, MethodType) and own.__func__.__module__ == __name__:
            del module.forward


def _alike(function: Any, other: Any) -> bool:
    """Whether two functions compute the same by the same code, their names, docstrings and annotations apart."""
    return isinstance(function, FunctionType) and _code(function.__code__) == _code(other.__code__)


@functools.cache
def _code(code: CodeType) -> tuple[Any, ...]:
    return code.co_argcount, *((i.opname, i.argrepr) for i in dis.get_instructions(code))


def _is_silu(module: Any) -> bool:
    return isinstance(module, nn.SiLU) or type(module).__name__ == "SiLUActivation"


def _named_forward(function: Callable[..., Any]) -> Callable[..., Any]:
    """Pickled, a bound method is its module and its name: then the class's own is found, and nothing is missing."""
    function.__name__ = function.__qualname__ = "forward"
    return function


@_named_forward
def _norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    weight = self._parameters["weight"]
    if direct(hidden_states, weight) and weight.dtype == hidden_states.dtype:
        return launch_rms_norm(hidden_states, weight, self.variance_epsilon)
    found: torch.Tensor = type(self).forward(self, hidden_states)
    return found


@_named_forward
def _mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    joint = _joined(self._modules["gate_proj"], self._modules["up_proj"]) if direct(x) else None
    if joint is None:
        found: torch.Tensor = type(self).forward(self, x)
        return found
    down: torch.Tensor = self.down_proj(launch_silu_mul(joint.lead.product(x)))
    return down


def _joined(gate: Any, up: Any) -> Joint | None:
    """The product of both at once, if there is one and nobody watches what each of them gives."""
    for place, m in enumerate((gate, up)):
        if type(m) is not PackedLinear or m.joint is None or m.place != place or m.joint is not gate.joint:
            return None
        if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__:
            return None
    joint: Joint = gate.joint
    return joint if len(joint.sizes) == 2 and joint.sizes[0] == joint.sizes[1] else None


@functools.cache
def _attention(own: FunctionType) -> Callable[..., Any]:
    """A class's forward with our rotary embedding; torch.compile looks names up elsewhere, and gets the class's."""
    theirs = own.__globals__[ROPE]

    def turned(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if unsqueeze_dim == 1 and direct(q, k, cos, sin) and rope.fits(q, k, cos, sin):
            return rope.rotated(q, k, cos, sin)
        found: tuple[torch.Tensor, torch.Tensor] = theirs(q, k, cos, sin, unsqueeze_dim)
        return found

    names = {**own.__globals__, ROPE: turned}
    copy = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    copy.__kwdefaults__ = own.__kwdefaults__

    @_named_forward
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return own(self, *args, **kwargs)
        return copy(self, *args, **kwargs)

    return forward
