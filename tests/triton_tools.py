"""Triton without a GPU: kernels in its interpreter, kernels compiled for GPUs that are not there."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

# What one thread block may have, in bytes, by compute capability; the compiler does not say when it is exceeded.
SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}
CAPABILITIES = sorted(SHARED)

_INTERPRETED: dict[str, ModuleType] = {}


def _take() -> dict[str, ModuleType]:
    """Triton and the kernels out of the imported modules, but for Triton's machine code, which loads only once."""
    names = [name for name in sys.modules if name.split(".")[0] in ("quantkit_kernels", "triton")]
    return {name: sys.modules.pop(name) for name in names if not name.startswith("triton._C")}


class _Unregistered:
    """In the place of an operator: its function. A name that is registered twice leaves torch with dead pointers."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def register_fake(self, function: Any) -> Any:
        return function

    def register_kernel(self, *_: Any) -> Any:
        return lambda function: function

    def register_autograd(self, *_: Any, **__: Any) -> None:
        pass


def _unregistered(*_: Any, **__: Any) -> Any:
    """torch.library.custom_op that registers nothing."""
    return _Unregistered


@contextmanager
def interpreted(*modules: str) -> Iterator[dict[str, Any]]:
    """Modules of quantkit_kernels, by their names, whose kernels run in Triton's interpreter while this lasts.

    Triton decides that when a kernel is defined, those in Triton itself included, so both are imported anew. bfloat16
    is not for the interpreter: its arithmetic there is silently wrong. Operators are plain functions meanwhile.
    """
    outside = _take()
    try:
        unregistered = mock.patch("torch.library.custom_op", _unregistered)
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"), unregistered:
            sys.modules.update(_INTERPRETED)
            yield {name: importlib.import_module(f"quantkit_kernels.{name}") for name in modules}
    finally:
        _INTERPRETED.update(_take())
        sys.modules.update(outside)


def mutant(module: Any, old: str, new: str, folder: Path) -> Any:
    """The module with one piece of its text replaced; its kernels see each other, not those of the original."""
    text = Path(module.__file__).read_text()
    assert old in text, old
    file = folder / "mutant.py"
    file.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", file)
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def compile_kernel(
    kernel: Any, constants: dict[str, Any], capability: int, types: dict[str, str], **options: Any
) -> Any:
    """Compiles for a GPU that need not be there. All pointers and sizes are multiples of 16, as they are for models.

    kernel  of Triton, or of Gluon, which knows one family of GPUs each
    types   of arguments that are neither constants nor *fp32 (names that end in _ptr) nor i32
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in names
    }
    aligned = [
        i
        for i, name in enumerate(names)
        if signature[name] not in ("constexpr", "fp32") and name != "first_group" and name[-5:] != "_desc"
    ]
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False, **options}
    )


def resources(compiled: Any, folder: Path) -> tuple[int, int]:
    """Registers a thread and bytes of stack of the machine code, by NVIDIA's tool that comes with Triton."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump("-res-usage", compiled, folder))
    assert found
    return int(found[1]), int(found[2])


def sass(compiled: Any, folder: Path) -> str:
    """The machine code as text."""
    return _cuobjdump("-sass", compiled, folder)


def _cuobjdump(option: str, compiled: Any, folder: Path) -> str:
    import triton.backends.nvidia

    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout
