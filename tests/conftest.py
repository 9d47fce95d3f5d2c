"""Settings of every test process, made before torch or transformers are imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.metadata import version

import pytest

# The tests run in as many processes as there are cores: one thread each is fastest, and sums come out in one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test with more of them shares the cores with other tests: threads that wait by counting would take theirs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# As quantize has it, but for all processes alike: some have multiplied matrices before they call it.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test may need the Hub; one that asks for it fails at once, not after a time-out.
os.environ["HF_HUB_OFFLINE"] = "1"

# compressed-tensors 0.20 needs Python 3.11. Python 3.10 gets an older one: what compares with 0.20 is left out there.
LIBRARY = tuple(int(part) for part in version("compressed-tensors").split(".")[:2])
COMPARED = [
    "test_format_compressed_tensors.py",
    "test_format_compressed_tensors_layouts.py",
    "test_format_compressed_tensors_transformers.py",
    "test_kv_cache.py",
    "test_numerics_activations.py",
    "test_numerics_mx.py",
    "test_presets.py",
]
collect_ignore = COMPARED if LIBRARY < (0, 20) else []


def pytest_report_header() -> list[str]:
    """Says what is left out."""
    if not collect_ignore:
        return []
    found = version("compressed-tensors")
    return [f"compressed-tensors {found} is older than 0.20: left out are {', '.join(collect_ignore)}"]


@pytest.fixture(autouse=True)
def threads_left() -> Iterator[None]:
    """A test that leaves torch with more threads hangs a later one: a process that is forked then waits for them."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and (found := torch.get_num_threads()) != int(os.environ["OMP_NUM_THREADS"]):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        pytest.fail(f"it left torch with {found} threads")


@pytest.fixture
def stock_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own loaders, as they are without quantkit."""
    import transformers.quantizers.auto as auto

    from quantkit.runtime.quantizer import STOCK

    for method, own in STOCK.items():
        for table, entry in zip(
            (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING), own or (None,) * 2
        ):
            if entry is None:
                monkeypatch.delitem(table, method)
            else:
                monkeypatch.setitem(table, method, entry)
