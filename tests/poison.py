"""Memory that a kernel must write: what it leaves out shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


@contextmanager
def poisoned() -> Iterator[None]:
    """What torch.empty and torch.empty_strided give holds NaN, or numbers that no code, scale or sum would be."""

    def poison(real: Any) -> Any:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            made: torch.Tensor = real(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(-77)

        return empty

    with mock.patch.multiple(torch, empty=poison(torch.empty), empty_strided=poison(torch.empty_strided)):
        yield
