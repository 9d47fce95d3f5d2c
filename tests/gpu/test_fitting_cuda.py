"""A GPU with too little memory, made so by torch's own limit: the run goes on with smaller batches and ends well."""

from __future__ import annotations

import gc

import pytest
import tiny
import torch

import quantkit

pytestmark = pytest.mark.gpu


def test_a_gpu_with_too_little_memory(tmp_path):
    folder = tiny.save(tmp_path / "model", hidden_size=512, intermediate_size=2048, num_hidden_layers=3)
    recipe = {
        "model": str(folder),
        "scheme": {"preset": "W4A16", "group_size": 32},
        "calibration": {"samples": 64, "length": 1024, "batch_size": 64, "hidden": "device"},
        "validate": "none",
    }

    def fresh() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_reserved()

    before = fresh()
    plain = quantkit.quantize(recipe, out=tmp_path / "plain", device="cuda")
    peak = torch.cuda.max_memory_reserved()
    assert plain.summary["memory"] == []
    before = max(before, fresh())
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((before + 0.5 * (peak - before)) / total)
    try:
        tight = quantkit.quantize(recipe, out=tmp_path / "tight", device="cuda")
        assert torch.cuda.max_memory_reserved() < peak
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    steps = tight.summary["memory"]
    assert steps and steps[0]["batch_size"] == 32
    for a, b in zip(plain.summary["layers"], tight.summary["layers"], strict=True):
        assert a["name"] == b["name"] and a["tokens"] == b["tokens"]
        assert b["relative_error"] == pytest.approx(a["relative_error"], rel=0.02)
