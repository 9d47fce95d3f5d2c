"""From a recipe to a checkpoint, for nine architectures; the same bytes twice; no input that leaves half a thing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import calibration_rows, formats, hub, numerics, output, pipeline
from quantkit import plan as planning
from quantkit.checkpoint import Checkpoint
from quantkit.errors import GateError, InputError, MissingError, QuantkitError
from quantkit.recipe import Recipe

CALIBRATION = {"data": "builtin:pydocs", "samples": 6, "length": 64, "batch_size": 4}
CHECK: dict[str, Any] = {
    "perplexity": {"data": "builtin:pydocs-heldout", "windows": 2, "length": 32},
    "generation": {"prompts": 2, "tokens": 4},
    "gates": {"kl": 1.0},
}


def recipe(model: object, **changes: object) -> dict[str, object]:
    return {
        "model": str(model),
        "scheme": {"preset": "W4A16", "group_size": 32},
        "calibration": CALIBRATION,
        "validate": CHECK,
        **changes,
    }


def quantized_layers(folder: Path) -> dict[str, torch.Tensor]:
    """Every packed layer of an output, decoded by the format's own functions."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    reader = formats.get("compressed-tensors").read_config(config)
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name in tensors:
        if name.endswith(".weight_packed"):
            layer = name.removesuffix(".weight_packed")
            own = {k.removeprefix(layer + "."): v for k, v in tensors.items() if k.startswith(layer + ".")}
            found[layer] = numerics.dequantize(formats.get("compressed-tensors").unpack(own, reader.scheme_for(layer)))
    return found


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_every_architecture_is_quantized_written_and_loads(kind, tmp_path):
    folder = tiny.save(tmp_path / "model", kind)
    result = quantkit.quantize(recipe(folder), out=tmp_path / "out", device="cpu")
    assert result.validation is not None and result.validation.status == "validated"
    original, decoded = load_file(folder / "model.safetensors"), quantized_layers(result.out)
    written = load_file(result.out / "model.safetensors")
    linears = [n.removesuffix(".weight") for n in original if "_proj" in n and n.endswith(".weight")]
    assert sorted(decoded) == sorted(linears)
    for name, w in decoded.items():
        error = (w - original[name + ".weight"].float()).norm() / original[name + ".weight"].float().norm()
        assert error < 0.2, name
    for name in original:
        if name.removesuffix(".weight") not in decoded:
            assert torch.equal(written[name].view(torch.uint8), original[name].view(torch.uint8)), name
    summary = json.loads((result.out / output.SUMMARY).read_text())
    assert summary == json.loads(json.dumps(result.summary))
    assert len(summary["layers"]) == len(linears) and summary["status"] == "validated"
    assert all(0 < x["relative_error"] < 0.1 and x["tokens"] == 384 for x in summary["layers"])
    assert [x["name"] for x in summary["not_quantized"]] == ["lm_head"]


def test_gptq_is_closer_than_rounding_and_asymmetric_than_symmetric_on_trained_weights(tmp_path):
    small = {
        "calibration": {**CALIBRATION, "samples": 24, "length": 256, "batch_size": 8},
        "validate": {"perplexity": {**CHECK["perplexity"], "windows": 8, "length": 256}},
    }
    kl = {}
    for method, preset in [("rtn", "W4A16"), ("gptq", "W3A16"), ("gptq", "W4A16"), ("gptq", "W4A16_ASYM")]:
        named = {"gptq": {"sweeps": 0}} if method == "gptq" else method
        changes = {"method": named, "scheme": preset, **small}
        result = quantkit.quantize(recipe("builtin:pydocs-llama-7m", **changes), out=tmp_path / f"{method}-{preset}")
        assert result.validation is not None
        kl[method, preset] = result.validation.comparison.kl
    assert kl["gptq", "W4A16_ASYM"] < kl["gptq", "W4A16"] < kl["rtn", "W4A16"] < kl["gptq", "W3A16"], kl


def test_the_next_block_sees_the_decoded_weights(tmp_path):
    """The same Hessian comes out of the quantized model itself, loaded from disk and run as a whole."""
    folder = tiny.save(tmp_path / "model")
    settled = Recipe.from_any(recipe(folder))
    plan = planning.make(settled)
    seen = {}
    solve = pipeline._solve_each

    def spy(run, block, groups, observed):
        seen.update(observed.stats)
        return solve(run, block, groups, observed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_solve_each", spy)
        (tmp_path / "out").mkdir()
        pipeline.quantize(plan, tmp_path / "out", device=torch.device("cpu"), progress=quantkit.progress.Silent())
    shutil.copy(folder / "config.json", tmp_path / "out" / "plain.json")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, w in quantized_layers(tmp_path / "out").items():
            if name.startswith("model.layers.0."):
                model.get_parameter(name + ".weight").copy_(w.bfloat16().float())
    rows = calibration_rows.read(plan, quantkit.progress.Silent())
    grams = []
    model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, x: grams.append(x[0].reshape(-1, 64)))
    assert rows is not None
    with torch.no_grad():
        model(rows.ids_RL)
    x = torch.cat(grams).double()
    found = seen["model.layers.1.self_attn.q_proj"].gram_KK.double()
    assert torch.allclose(found, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_the_same_recipe_gives_the_same_bytes_and_so_does_the_one_beside_the_weights(tmp_path):
    folder = tiny.save(tmp_path / "model")
    one = quantkit.quantize(recipe(folder), out=tmp_path / "one").out
    two = quantkit.quantize(one / output.RECIPE, out=tmp_path / "two").out
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in two.iterdir())
    assert all((one / n).read_bytes() == (two / n).read_bytes() for n in names)
    # and over itself: an output of the same recipe is replaced
    assert quantkit.quantize(one / output.RECIPE, out=one).out == one
    assert all((one / n).read_bytes() == (two / n).read_bytes() for n in names)


def test_shards_give_what_one_file_gives(tmp_path):
    folder = tiny.save(tmp_path / "model", shard="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    one = quantkit.quantize(recipe(folder), out=tmp_path / "one").out
    many = quantkit.quantize(recipe(folder, export={"shard_size": "40KB"}), out=tmp_path / "many").out
    assert (many / "model.safetensors.index.json").is_file() and not (one / "model.safetensors.index.json").exists()
    a, b = Checkpoint.open(one), Checkpoint.open(many)
    assert a.specs == b.specs and len(set(b.where.values())) > 2
    assert all(torch.equal(a.read(n).view(torch.uint8), b.read(n).view(torch.uint8)) for n in a.specs)


def test_rules_leave_layers_dense_or_give_them_another_scheme(tmp_path):
    folder = tiny.save(tmp_path / "model")
    rules = [
        {"match": "model.layers.0.mlp.down_proj", "scheme": "none"},
        {"match": "*.down_proj", "scheme": {"preset": "W8A16", "group_size": 32}},
        {"match": "re:.*nothing_like_it", "scheme": "none"},
    ]
    result = quantkit.quantize(recipe(folder, rules=rules), out=tmp_path / "out")
    assert any("re:.*nothing_like_it" in w for w in result.summary["warnings"])
    assert [x["name"] for x in result.summary["not_quantized"]] == ["model.layers.0.mlp.down_proj", "lm_head"]
    bits = {x["name"]: x["bits_per_weight"] for x in result.summary["layers"]}
    assert bits["model.layers.1.mlp.down_proj"] > 8 > bits["model.layers.1.mlp.up_proj"]
    config = json.loads((result.out / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 2
    assert set(config["ignore"]) == {"model.layers.0.mlp.down_proj", "lm_head"}
    model = quantkit.load(result.out)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear


def test_other_files_are_copied_and_other_weights_are_not(tmp_path):
    folder = tiny.save(tmp_path / "model")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("kept")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    result = quantkit.quantize(recipe(folder), out=tmp_path / "out")
    assert (result.out / "extra" / "notes.txt").read_text() == "kept"
    assert not (result.out / "pytorch_model.bin").exists() and not (result.out / ".git").exists()
    assert [x["name"] for x in result.summary["files"]["dropped"]] == [".git/", "pytorch_model.bin"]
    assert (result.out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_failed_gate_keeps_the_output_and_says_so(tmp_path):
    folder = tiny.save(tmp_path / "model")
    result = quantkit.quantize(recipe(folder, validate={**CHECK, "gates": {"kl": 0.0}}), out=tmp_path / "out")
    assert result.validation is not None and result.validation.status == "failed"
    assert json.loads((result.out / output.SUMMARY).read_text())["status"] == "failed"
    assert "kl" in result.validation.message and "model.layers." in result.validation.message
    again = quantkit.validate(result.out, gates={"kl": 10.0})
    assert again.status == "validated"
    assert json.loads((result.out / output.SUMMARY).read_text())["status"] == "validated"


def test_an_output_that_computes_nan_is_kept_and_marked_as_failed(tmp_path, monkeypatch):
    write = pipeline.ShardWriter.write

    def poisoned(self, name, tensor):
        write(self, name, tensor * float("nan") if name == "model.norm.weight" else tensor)

    monkeypatch.setattr(pipeline.ShardWriter, "write", poisoned)
    with pytest.raises(GateError, match="NaN or Inf"):
        quantkit.quantize(recipe(tiny.save(tmp_path / "model")), out=tmp_path / "out")
    summary = json.loads((tmp_path / "out" / output.SUMMARY).read_text())
    assert summary["status"] == "failed" and "NaN or Inf" in summary["validation"]["message"]


def test_without_validation_the_output_is_marked_so(tmp_path):
    result = quantkit.quantize(recipe(tiny.save(tmp_path / "model"), validate="none"), out=tmp_path / "out")
    assert result.validation is None
    assert json.loads((result.out / output.SUMMARY).read_text())["status"] == "unvalidated"


def test_validate_refuses_another_original(tmp_path):
    out = quantkit.quantize(recipe(tiny.save(tmp_path / "model"), validate="none"), out=tmp_path / "out").out
    tiny.save(tmp_path / "other", "llama", num_hidden_layers=1)
    with pytest.raises(InputError, match="is not the model that"):
        quantkit.validate(out, against=tmp_path / "other")


# Bad input: one sentence, and nothing half-written ------------------------------------------------------------------


def refused(
    tmp_path: Path, source: object, says: str, kind: type[QuantkitError] = InputError, **changes: object
) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(kind, match=says) as caught:
        quantkit.quantize(recipe(source, **changes), out=tmp_path / "out")
    assert caught.value.exit_code in (2, 4)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before, "something was left behind"


def test_no_such_model(tmp_path):
    refused(tmp_path, tmp_path / "absent", "neither a folder on this machine nor a Hub id")
    refused(tmp_path, "builtin:absent", "no built-in model is named 'builtin:absent'; known: builtin:pydocs-llama-7m")
    refused(tmp_path, "org/absent", "org/absent", MissingError)


def test_a_folder_without_config(tmp_path):
    (tmp_path / "model").mkdir()
    refused(tmp_path, tmp_path / "model", "no config.json")


def test_broken_config(tmp_path):
    folder = tiny.save(tmp_path / "model")
    (folder / "config.json").write_text("{")
    refused(tmp_path, folder, "config.json")


def test_nan_in_a_weight(tmp_path):
    folder = tiny.save(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, folder, "'model.layers.0.mlp.up_proj.weight' holds 1 NaN or Inf")


def test_truncated_weights(tmp_path):
    folder = tiny.save(tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(tmp_path, folder, "not a complete safetensors file")


def test_no_tokenizer(tmp_path):
    folder = tiny.save(tmp_path / "model")
    for name in tiny.TOKENIZER_FILES:
        (folder / name).unlink()
    refused(tmp_path, folder, "tokenizer")


def test_a_group_size_that_does_not_divide(tmp_path):
    folder = tiny.save(tmp_path / "model")
    refused(
        tmp_path,
        folder,
        r"mlp.down_proj 64x96: group_size 64 does not divide in_features 96",
        scheme={"preset": "W4A16", "group_size": 64},
    )


def test_a_scale_search_that_the_number_format_does_not_have(tmp_path):
    folder = tiny.save(tmp_path / "model")
    refused(tmp_path, folder, "int4 has no scale search 'ocp'", method={"rtn": {"scale_search": "ocp"}})


def test_nothing_to_quantize(tmp_path):
    folder = tiny.save(tmp_path / "model")
    refused(tmp_path, folder, "no layer would be quantized", rules=[{"match": "*", "scheme": "none"}])


def test_lm_head_cannot_be_asked_for(tmp_path):
    folder = tiny.save(tmp_path / "model")
    refused(tmp_path, folder, "lm_head: is in no block", rules=[{"match": "lm_head", "scheme": "W8A16"}])


def test_too_little_calibration_text(tmp_path):
    folder = tiny.save(tmp_path / "model")
    (tmp_path / "few.txt").write_text("three little words")
    refused(tmp_path, folder, "less than one row of 64", calibration={**CALIBRATION, "data": str(tmp_path / "few.txt")})
    (tmp_path / "few.txt").write_text("")
    refused(tmp_path, folder, "holds no text", calibration={**CALIBRATION, "data": str(tmp_path / "few.txt")})


def test_tokens_that_the_model_does_not_have(tmp_path):
    folder = tiny.save(tmp_path / "model", vocab_size=100)
    refused(tmp_path, folder, "has only 100 embeddings")


@pytest.mark.parametrize("what", ["foreign folder", "file", "inside the source", "another recipe"])
def test_an_output_that_is_not_ours_to_write(tmp_path, what):
    folder = tiny.save(tmp_path / "model")
    out = tmp_path / "out"
    if what == "foreign folder":
        out.mkdir()
        (out / "thesis.txt").write_text("the only copy")
    elif what == "file":
        out.write_text("the only copy")
    elif what == "inside the source":
        out = folder / "out"
    else:
        quantkit.quantize(recipe(folder, scheme={"preset": "W8A16", "group_size": 32}, validate="none"), out=out)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="choose another --out"):
        quantkit.quantize(recipe(folder), out=out)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_overwrite_replaces_another_recipe(tmp_path):
    folder = tiny.save(tmp_path / "model")
    quantkit.quantize(recipe(folder, scheme={"preset": "W8A16", "group_size": 32}), out=tmp_path / "out")
    result = quantkit.quantize(recipe(folder), out=tmp_path / "out", overwrite=True)
    assert "W4A16" in (result.out / output.RECIPE).read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    folder = tiny.save(tmp_path / "model")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(tmp_path, folder, "no room for the output", MissingError)


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self").exists(), reason="needs /proc as root")
def test_a_place_that_cannot_be_written(tmp_path):
    """A folder that even root may not write in."""
    folder = tiny.save(tmp_path / "model")
    with pytest.raises(MissingError, match="choose another --out"):
        quantkit.quantize(recipe(folder), out="/proc/self/out")


def test_ctrl_c_in_the_middle_leaves_the_old_output_alone_and_the_next_run_goes_on(tmp_path, monkeypatch):
    folder = tiny.save(tmp_path / "model")
    old = quantkit.quantize(recipe(folder), out=tmp_path / "out").out
    before = {p.name: p.read_bytes() for p in old.iterdir()}
    block = pipeline._block

    def interrupted(run, one, batches):
        if one.index == 1:
            raise KeyboardInterrupt
        block(run, one, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "_block", interrupted)
        quantkit.quantize(recipe(folder), out=tmp_path / "out")
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial", "model", "out"]
    quantkit.quantize(recipe(folder), out=tmp_path / "out")
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_a_killed_run_leaves_nothing_that_looks_finished_and_the_next_one_works(tmp_path):
    folder = tiny.save(tmp_path / "model")
    code = (
        "import os, sys, quantkit; from quantkit import output\n"
        "output.write_others = lambda *a: os.kill(os.getpid(), 9)\n"
        f"quantkit.quantize({recipe(folder)!r}, out={str(tmp_path / 'out')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment())
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial").is_dir()
    assert not (tmp_path / ".out.partial" / output.OUTPUT / "config.json").exists()
    assert quantkit.quantize(recipe(folder), out=tmp_path / "out").validation is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_two_runs_into_one_folder(tmp_path):
    inside, go_on = threading.Event(), threading.Event()

    def first():
        with output.staged(tmp_path / "out") as folder:
            (folder / "a").write_text("first")
            inside.set()
            go_on.wait(20)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(20)
    try:
        with pytest.raises(InputError, match="another run is writing this output"), output.staged(tmp_path / "out"):
            pass
    finally:
        go_on.set()
        thread.join()
    assert (tmp_path / "out" / "a").read_text() == "first"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def test_fingerprint_tells_models_apart(tmp_path):
    one = tiny.save(tmp_path / "one")
    same = tiny.save(tmp_path / "same")
    other = tiny.save(tmp_path / "other", intermediate_size=64)
    prints = [hub.resolve(str(p)).fingerprint() for p in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_real_interrupt_ends_the_command_with_130_and_the_same_command_goes_on(number, tmp_path):
    folder = tiny.save(tmp_path / "model", num_hidden_layers=8)
    text = (
        f"model: {folder}\nscheme: {{preset: W4A16, group_size: 32}}\ncalibration: {{samples: 400, length: 256}}\n"
        "validate: none\n"
    )
    (tmp_path / "recipe.yaml").write_text(text)
    command = [sys.executable, "-m", "quantkit", "quantize", "recipe.yaml", "--out", "out"]

    def listen() -> None:
        """A process started in the background by a script ignores SIGINT, and so would this one."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    run = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), preexec_fn=listen, stderr=subprocess.PIPE, text=True
    )
    assert run.stderr is not None
    seen = ""
    for line in run.stderr:
        seen += line
        if "block 2/8" in line:
            run.send_signal(number)
            break
    _, rest = run.communicate()
    assert run.returncode == 130, seen + rest
    assert "ending after this step" in rest and "Traceback" not in rest
    assert "error: interrupted after block " in rest and "run the same command again" in rest
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial", "model", "recipe.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "continuing at block " in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "recipe.yaml"]
