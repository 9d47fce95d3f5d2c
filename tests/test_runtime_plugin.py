"""`import quantkit` registers with transformers, before or after it is imported, and imports nothing heavy itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import packed_models
import pytest

import quantkit
from quantkit.presets import PRESETS
from quantkit.runtime import plugin, quantizer


def test_install_is_idempotent():
    auto = sys.modules["transformers.quantizers.auto"]
    before = list(sys.meta_path)
    plugin.install()
    assert sys.meta_path == before
    assert not any(isinstance(f, plugin.RegisterOnImport) for f in sys.meta_path)
    for method in plugin.QUANT_METHODS:
        assert auto.AUTO_QUANTIZER_MAPPING[method] is quantizer.PackedQuantizer
        config = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method]
        own = quantizer.STOCK[method]
        assert issubclass(config, quantizer.HeldConfig)
        assert (own is None) == (method == "modelopt") and (own is None or own[1].__name__ == config.__name__)


def test_a_transformers_that_cannot_be_extended_stays_usable(caplog):
    plugin.register(sys)  # a module without the tables
    assert "5.17 or newer" in caplog.text


ORDERS = {
    "quantkit first": """
import sys, quantkit
heavy = {"torch", "transformers", "triton", "numpy", "pydantic"} & set(sys.modules)
assert not heavy, heavy
quantkit.runtime.plugin.install()
assert sum("quantkit" in type(f).__module__ for f in sys.meta_path) == 1
import importlib.util
importlib.util.find_spec("transformers.quantizers.auto")  # looking is not importing
class Blocked:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] != "compressed_tensors", "the library was imported"
sys.meta_path.insert(0, Blocked())
from transformers import AutoModelForCausalLM
""",
    "transformers first": """
import sys
from transformers import AutoModelForCausalLM
import quantkit
""",
}


@pytest.mark.parametrize("order", ORDERS)
def test_import_order(order, tmp_path):
    packed_models.save(tmp_path / "m", "compressed-tensors", PRESETS["W4A16"])
    code = ORDERS[order] + (
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
        "assert not any('quantkit' in type(f).__module__ for f in sys.meta_path)\n"
    )
    paths = {str(Path(m.__file__ or "").parents[1]) for m in (quantkit, sys.modules["quantkit_kernels"])}
    code = f"import sys; sys.path[:0] = {sorted(paths)}\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["PackedLinear"], done.stderr
