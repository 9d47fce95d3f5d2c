"""Starting a kernel past Triton: what is handed to the compiled kernel, and when Triton's own way is taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from quantkit_kernels._launch import Start, direct


class Kernel:
    """Stands for a Triton kernel on a GPU; notes how it is called."""

    arg_names = ("block", "x_ptr", "y_ptr", "n", "SIZE", "FORM")

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.compiled = SimpleNamespace(
            run=lambda *given: self.calls.append(("straight", given)), function="f", packed_metadata="m"
        )

    def run(self) -> None:
        pass

    run.__module__ = "triton.runtime"

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*given: Any, **constants: Any) -> Any:
            self.calls.append(("triton", grid, given, constants))
            return self.compiled

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    from triton.runtime import driver

    active = SimpleNamespace(get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(type(driver), "active", active)
    return driver


def test_later_calls_go_straight_with_what_is_given_then(driver: Any) -> None:
    kernel = Kernel()
    start = Start(kernel, (7, 2), (640,), {"FORM": "int8", "num_warps": 4, "SIZE": 16})
    x, y = torch.zeros(64), torch.zeros(64)
    start(x, y, before=("first",))
    constants = {"FORM": "int8", "num_warps": 4, "SIZE": 16}
    assert kernel.calls.pop() == ("triton", (7, 2, 1), ("first", x, y, 640), constants)
    other = torch.zeros(64)
    start(other, y, before=("second",))
    pointers = (other.data_ptr(), y.data_ptr())
    none = (None, None, None)
    wanted = (7, 2, 1, "stream of -1", "f", "m", *none, "second", *pointers, 640, 16, "int8")
    assert kernel.calls.pop() == ("straight", wanted)
    start(torch.zeros(65)[1:], y, before=("third",))  # 4 bytes beyond a multiple of 16
    assert kernel.calls.pop()[0] == "triton"
    with mock.patch("triton.knobs.runtime.launch_enter_hook.calls", [print]):  # a profiler
        start(x, y, before=("fourth",))
    assert kernel.calls.pop()[0] == "triton"
    start(x, y, before=("fifth",))
    assert kernel.calls.pop()[0] == "straight"


def test_what_was_first_called_misaligned_or_only_compiled_is_not_kept(driver: Any) -> None:
    kernel = Kernel()
    start = Start(kernel, (1,), (), {"n": 1, "SIZE": 1, "FORM": ""})
    for _ in range(2):
        start(torch.zeros(5)[1:], torch.zeros(4), before=(0,))
    start(torch.zeros(4), torch.zeros(4), before=(0,))
    assert [call[0] for call in kernel.calls] == ["triton"] * 3
    with mock.patch.object(Kernel.run, "__module__", "elsewhere"):  # bench_core.compiling_only, the interpreter
        other = Start(Kernel(), (1,), (), {"n": 1, "SIZE": 1, "FORM": ""})
        for _ in range(2):
            other(torch.zeros(4), torch.zeros(4), before=(0,))
        assert not other.made


def test_what_is_not_direct() -> None:
    class OnGpu(torch.Tensor):
        is_cuda = True

    assert not direct(torch.zeros(1)) and not direct(torch.zeros(1).as_subclass(OnGpu))
    found: list[bool] = []

    def seen(x: torch.Tensor) -> torch.Tensor:
        found.append(direct())
        return x + 1

    seen(torch.zeros(1))
    torch.jit.trace(seen, torch.zeros(1), check_trace=False)
    assert found == [True, False]
