"""Float sums that do not depend on the number of threads, so that a CPU with more of them gives the same bytes.

What was found to depend on it, in float32: matrix products of some shapes, which Intel's MKL cuts along their sum if it
is not told otherwise before it is first used; LAPACK's factorizations, always; sums over a whole large tensor; a matrix
by a vector, whatever MKL is told. Not triangular solves, attention, a softmax, norms, sums of rows (eval/RESULTS.md).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MODE = "AUTO,STRICT"  # of MKL's "conditional numerical reproducibility": this CPU's instructions, any number of threads
_STRICT = 0x10000
ROW = 4096  # values that one thread adds up; several share a sum of 32768 or more


def fix() -> None:
    """Asks MKL for such products, unless the environment has its say; heeded when nothing was multiplied before."""
    os.environ.setdefault("MKL_CBWR", MODE)


def fixed() -> bool:
    """Whether matrix products are such; False also where it cannot be known: without MKL, or with one that hides it."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return bool(library.mkl_serv_cbwr_get(-1) & _STRICT)
    except (OSError, AttributeError):
        return False


def total(x: torch.Tensor) -> float:
    """The sum of all values of a tensor of any shape, in float64: of rows, then of what they gave, which is few."""
    flat = x.detach().flatten()
    whole = len(flat) - len(flat) % ROW
    rows = flat[:whole].view(-1, ROW).sum(1, dtype=torch.float64)
    return float(rows.sum() + flat[whole:].sum(dtype=torch.float64))


@contextmanager
def one_thread() -> Iterator[None]:
    """What torch computes on the CPU meanwhile, it computes in one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
