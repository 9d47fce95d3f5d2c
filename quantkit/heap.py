"""Memory that is free again: glibc keeps it for later, in pieces that the next tensors may not fit into.

So the resident memory of a long run grows, though nothing is kept. Given back after each block, it is the same at each;
elsewhere than on glibc nothing is done.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

LARGE = 4 << 20  # bytes of a tensor that are a mapping of their own, and go back as soon as it is freed
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def available() -> int:
    """Memory of the host that is free for a new process; 0 where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            line = next(line for line in f if line.startswith("MemAvailable"))
            return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return 0


def give_back() -> None:
    """Gives the system back what is free in the heap: milliseconds."""
    if trim := _function("malloc_trim"):
        trim(0)


def set_up() -> None:
    """Has large tensors be mappings, for the rest of this process. For a program of its own, not for a library.

    glibc begins so, with 128 KiB, and raises the size to that of what is freed, up to 32 MiB. Setting it ends that.
    """
    if mallopt := _function("mallopt"):
        mallopt(_MMAP_THRESHOLD, LARGE)
        mallopt(_TRIM_THRESHOLD, 16 * LARGE)


@functools.cache
def _function(name: str) -> Callable[..., int] | None:
    """A function of glibc, or None in another C library."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 (asks whether it is there)
        return getattr(libc, name)
    except (OSError, AttributeError, TypeError):
        return None
