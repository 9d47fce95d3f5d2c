"""`quantkit run`: quantize, validate and push in one go, against a Hub of the tests' own, by the unmodified client."""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hub_client import World, opened
from typer.testing import CliRunner

from quantkit import api, cli, job, output
from quantkit.errors import InputError, Interrupted, MissingError
from quantkit.progress import Progress
from quantkit.shards import ShardWriter
from quantkit.types import TensorSpec

REPO = "alice/base-W4A16"
VALIDATE = {
    "perplexity": {"data": "builtin:pydocs-heldout", "windows": 2, "length": 32},
    "generation": {"prompts": 0},
    "gates": {"kl": 9.0},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("job")
    return tiny.save(place / "base", num_hidden_layers=2, head_dim=32, hidden_size=128, intermediate_size=128)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[World]:
    with opened(monkeypatch, tmp_path) as world:
        yield world
    for thread in threading.enumerate():
        if thread.name == "quantkit-ahead":
            thread.join(20)  # what was on its way is not waited for, but ends
    assert not any(t.name == "quantkit-ahead" for t in threading.enumerate())


def recipe(base: Path, push: Any = True, **more: Any) -> dict[str, Any]:
    """Several shards, so that some are whole before the work is done."""
    export = {"shard_size": "100KB"}
    found = {"model": str(base), "scheme": "W4A16", "method": "rtn", "validate": VALIDATE, "export": export}
    return {**found, "push": push, **more}


def run(world: World, settings: dict[str, Any], out: Path, **more: Any) -> job.Done:
    return job.run(settings, out=out, device="cpu", progress=Progress(world.said), **more)


@pytest.mark.parametrize("stream", [False, True])
def test_the_whole_job(world: World, base: Path, tmp_path: Path, stream: bool) -> None:
    done = run(world, recipe(base, {"stream": stream}), tmp_path / "out")
    hub, out = world.hub, tmp_path / "out"
    assert done.pushed is not None and done.pushed.repo == REPO and done.pushed.commit == hub.head(REPO)
    assert hub.repos[REPO].private and done.result.summary["status"] == "validated"
    there = hub.files(REPO)
    assert all(there[p.name] == p.read_bytes() for p in out.iterdir() if p.name != "README.md")
    shards = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(shards) > 3 and len(hub.sent) == len(set(hub.sent)) == len(shards), "no file is sent twice"
    assert hub.calls.count("commit") == 1 and hub.calls.count("preupload") == (1 + len(shards) if stream else 1)
    assert hub.calls.index("create") < hub.calls.index("put") < hub.calls.index("tree")
    assert ("sent ahead" in world.said.getvalue()) == stream
    plain = api.quantize(recipe(base, "none"), out=tmp_path / "plain", device="cpu").out
    assert (out / "quantkit-recipe.yaml").read_text() == (plain / "quantkit-recipe.yaml").read_text()
    assert "push" not in (out / "quantkit-recipe.yaml").read_text()
    assert [(p.name, p.read_bytes()) for p in sorted(out.iterdir())] == [
        (p.name, p.read_bytes()) for p in sorted(plain.iterdir())
    ], "where it goes changes no byte"


@pytest.mark.parametrize("stream", [False, True])
def test_a_gate_that_fails_pushes_nothing(world: World, base: Path, tmp_path: Path, stream: bool) -> None:
    gates = {**VALIDATE, "gates": {"kl": 0.0}}
    if stream:
        world.hub.add(REPO, {"config.json": b"{}", "model.safetensors": b"older"}, private=True)
        before = (world.hub.head(REPO), world.hub.files(REPO))
    text = tmp_path / "recipe.yaml"
    text.write_text(json.dumps(recipe(base, {"stream": stream}, validate=gates)))
    done = CliRunner().invoke(cli.app, ["run", str(text), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert done.exit_code == 3 and "nothing was pushed" in done.output, done.output
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file(), "the output is kept, marked as failed"
    if stream:
        assert (world.hub.head(REPO), world.hub.files(REPO)) == before
        assert "commit" not in world.hub.calls and "put" in world.hub.calls
    else:
        assert REPO not in world.hub.repos


def test_repair_drops_the_shards_of_before(world: World, base: Path, tmp_path: Path) -> None:
    """What the first try sent is named by no commit; the second try's shards are those that arrive."""
    first = api.quantize(recipe(base, "none"), out=tmp_path / "first", device="cpu")
    assert first.validation is not None
    gates = {**VALIDATE, "gates": {"kl": first.validation.comparison.kl * 0.9}, "repair": {"size": 3.0}}
    done = run(world, recipe(base, {"stream": True}, validate=gates), tmp_path / "out")
    assert done.result.summary["repair"]["steps"], "nothing was repaired"
    there = world.hub.files(REPO)
    assert all(there[p.name] == p.read_bytes() for p in (tmp_path / "out").glob("*.safetensors"))
    assert "could not" not in world.said.getvalue()


def test_an_upload_that_fails_in_the_background_is_told_and_made_up_for(
    world: World, base: Path, tmp_path: Path
) -> None:
    world.hub.fault("put", status=403)
    world.hub.fault("batch", status=403, after=2)
    done = run(world, recipe(base, {"stream": True}), tmp_path / "out")
    assert done.pushed is not None
    told = [x for x in world.said.getvalue().splitlines() if "is sent at the end" in x]
    assert len(told) == 2 and all(x.startswith("warning: could not send model-0000") and "403" in x for x in told)
    there = world.hub.files(REPO)
    assert all(there[p.name] == p.read_bytes() for p in (tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_push_that_fails_keeps_the_output_and_says_how_to_go_on(
    world: World, base: Path, tmp_path: Path, stream: bool
) -> None:
    world.hub.fault("commit", status=503, times=6)
    push = {"stream": stream, "private": False, "revision": "v1"}
    with pytest.raises(MissingError, match=r"503.*there is no branch v1, as before.*The output is whole") as caught:
        run(world, recipe(base, push), tmp_path / "out")
    sent = len(world.hub.sent)
    command = shlex.split(str(caught.value).partition("to push it: ")[2])
    assert command[0] == "quantkit" and "--public" in command
    done = CliRunner().invoke(cli.app, command[1:])
    assert done.exit_code == 0, done.output
    assert "model.safetensors.index.json" in world.hub.files(REPO, "v1") and not world.hub.repos[REPO].private
    assert len(world.hub.sent) == sent, "files that were sent whole are not sent again"


def test_interrupted_in_the_work_the_branch_is_as_it_was(
    world: World, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.hub.add(REPO, {"config.json": b"{}"}, private=True)
    before = world.hub.head(REPO)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "write_others", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(world, recipe(base, {"stream": True}), tmp_path / "out")
    assert world.hub.head(REPO) == before and not (tmp_path / "out").exists()


def test_stopped_in_the_work_it_goes_on_and_sends_every_shard(
    world: World, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were whole when it was stopped are named to the second run too, and the Hub has them already."""
    settings = recipe(base, {"stream": True}, method="gptq", calibration={"samples": 4, "length": 64})
    told = Progress(world.said)
    went_on = told.item

    def stopped(k: int, name: str) -> None:
        if k == 2:
            told.stop()
        went_on(k, name)

    monkeypatch.setattr(told, "item", stopped)
    with pytest.raises(Interrupted):
        job.run(settings, out=tmp_path / "out", device="cpu", progress=told)
    assert "commit" not in world.hub.calls
    done = run(world, settings, tmp_path / "out")
    assert done.pushed is not None
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(world.hub.sent) == len(set(world.hub.sent)) == len(shards)
    there = world.hub.files(REPO)
    assert all(there[p.name] == p.read_bytes() for p in shards)


def test_interrupted_in_the_push_the_output_is_kept(
    world: World, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job.hub_push, "push", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(world, recipe(base, "other"), tmp_path / "out")
    assert f"to push it: quantkit push {tmp_path / 'out'} alice/other\n" in world.said.getvalue()
    assert (tmp_path / "out" / "quantkit.json").is_file()


def test_what_cannot_be_pushed_is_refused_before_the_work(
    world: World, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(api, "quantize", work)
    hub = world.hub
    commit = hub.add("org/base", {"README.md": b"---\nlicense: cc-by-nc-4.0\n---\n"})
    hub.add("alice/open", {})
    hub.add("alice/closed", {}, private=True)
    refused = [
        (recipe(base, "none"), "does not say where to push.*push=true"),
        (recipe(base, True, validate="none"), "push.unvalidated"),
        (recipe(base, "alice/open"), "alice/open is public already"),
        (recipe(base, {"repo": "closed", "create_pr": True, "revision": "v1"}), "alice/closed has no branch v1"),
    ]
    for settings, message in refused:
        with pytest.raises(InputError, match=message):
            run(world, settings, tmp_path / "out")
    monkeypatch.setattr(job.hub, "resolve", lambda *_, **__: job.hub.Source("org/base", base, commit))
    with pytest.raises(InputError, match=r"not for commercial use.*--base-public-ok"):
        run(world, recipe(base, {"private": False}), tmp_path / "out")
    hub.role = "read"
    with pytest.raises(InputError, match="the token of alice may only read"):
        run(world, recipe(base), tmp_path / "out")
    hub.fault("whoami", status=401)
    with pytest.raises(InputError, match=r"401.*hf auth login"):
        run(world, recipe(base), tmp_path / "out")
    assert hub.repos.keys() == {"org/base", "alice/open", "alice/closed"}


class Told:
    """Reads each file as it is told of it."""

    def __init__(self) -> None:
        self.seen: dict[str, bytes] = {}

    def finished(self, file: Path) -> None:
        self.seen[file.name] = file.read_bytes()

    def dropped(self) -> None: ...

    def wait(self) -> None: ...


def test_a_shard_is_told_of_when_it_is_whole_and_once(tmp_path: Path) -> None:
    import torch

    told = Told()
    specs = {name: TensorSpec("F32", (10,)) for name in "abcd"}
    writer = ShardWriter(tmp_path, specs, 80, told)
    for name in "acbd":
        assert len(told.seen) == "acbd".index(name) // 3
        writer.write(name, torch.full((10,), float(ord(name))))
    assert len(told.seen) == 2
    writer.close()
    assert {name: (tmp_path / name).read_bytes() for name in told.seen} == told.seen
