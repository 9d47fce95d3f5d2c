"""Pushes to a Hub of the tests' own by the unmodified client: what arrives, what each fault does, what nobody sees."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hub_client import REPO, World, opened
from hub_server import HubServer
from push_faults import CALLS, REFUSED, TRANSIENT, outcome

from quantkit import api, convert, hub_commit, hub_push
from quantkit.errors import GateError, InputError, MissingError

CARD = """---
license: cc-by-sa-4.0
language: [en]
---
# tiny

## Training
On nothing.

## Limitations
It knows nothing.
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A validated output of a tiny random model that has a card."""
    place = tmp_path_factory.mktemp("push")
    tiny.save(place / "base", num_hidden_layers=1, head_dim=32, hidden_size=128, intermediate_size=128)
    (place / "base" / "README.md").write_text(CARD)
    recipe = {
        "model": str(place / "base"),
        "scheme": "W4A16",
        "method": "rtn",
        "validate": {
            "perplexity": {"data": "builtin:pydocs-heldout", "windows": 3, "length": 64},
            "generation": {"prompts": 0},
            "gates": {"kl": 9.0},
        },
    }
    done = api.quantize(recipe, out=place / "out", device="cpu")
    assert done.summary["status"] == "validated"
    return done.out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[World]:
    with opened(monkeypatch, tmp_path) as world:
        yield world


def change(folder: Path, **values: Any) -> None:
    file = folder / "quantkit.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_everything_arrives(world: World, folder: Path) -> None:
    (folder / ".hidden").write_text("not for the Hub")
    done = world.push(folder, "tiny-W4A16")
    assert (done.repo, done.revision, done.private) == (REPO, "main", True)
    assert done.commit == world.hub.head(REPO) and world.hub.repos[REPO].private
    there = world.hub.files(REPO)
    assert there.keys() == {".gitattributes", "README.md"} | {p.name for p in folder.iterdir() if p.name[0] != "."}
    for path in folder.iterdir():
        if path.name not in ("README.md", ".hidden"):
            assert there[path.name] == path.read_bytes()
    assert b"base_model_relation" not in there["README.md"], "the original is a folder, which the Hub does not know"
    again = world.push(folder)
    assert again.commit == done.commit and len(world.hub.sent) == 1, "nothing changed, so nothing is sent"


def test_the_name_when_none_is_given(world: World, folder: Path, tmp_path: Path) -> None:
    """The original's and the scheme's, under whoever is logged in; of another format with its name."""
    assert world.push(folder, None).repo == "alice/base-W4A16"
    converted = convert.convert(folder, "gptq", tmp_path / "gptq").out
    done = world.push(converted, None, unvalidated=True)
    assert done.repo == "alice/base-W4A16-gptq"
    assert "| format | gptq |" in world.hub.files(done.repo)["README.md"].decode()
    summary = json.loads((folder / "quantkit.json").read_text())
    source = {**summary["source"], "model": "org/Big-1B@main"}
    assert hub_push.default_name({**summary, "source": source}) == "Big-1B-W4A16"
    source = {**source, "model": "/models/my model (v2)..--ä"}
    assert hub_push.default_name({**summary, "source": source}) == "my-model-v2-W4A16"
    change(folder, source=None)
    with pytest.raises(InputError, match="does not say which model and recipe"):
        world.push(folder, None)


def test_by_the_command_line_and_back(made: Path, tmp_path: Path) -> None:
    """With the client as it is, settings from the environment; the model that comes back is the one on disk."""
    script = """
import sys, torch, quantkit
from quantkit.cli import app
app(["push", sys.argv[1]], standalone_mode=False)
from transformers import AutoModelForCausalLM
tokens = torch.arange(20)[None]
here, there = (AutoModelForCausalLM.from_pretrained(x).eval() for x in sys.argv[1:3])
with torch.no_grad():
    assert torch.equal(here(tokens).logits, there(tokens).logits)
assert type(there.model.layers[0].mlp.up_proj).__module__.startswith("quantkit"), "the weights did not stay packed"
print("the same")
"""
    with HubServer(multipart=1_000_000) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_TOKEN": hub.token}
        environment = {**os.environ, **settings, "HF_HUB_DISABLE_XET": "1", "QUANTKIT_DEBUG": "1"}
        command = [sys.executable, "-c", script, str(made), "alice/base-W4A16"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("the same\n") and hub.head("alice/base-W4A16") in done.stdout
        assert hub.token not in done.stdout + done.stderr
        assert hub.calls.count("part") == 3
        files = [p for p in tmp_path.rglob("*") if p.is_file()]
        assert files and not any(hub.token.encode() in p.read_bytes() for p in files)


def test_exit_codes(world: World, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from quantkit.cli import app

    monkeypatch.setenv("QUANTKIT_DEBUG", "1")

    def run(*more: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["push", str(folder), REPO, *more])
        assert world.hub.token not in done.output
        return done.exit_code, done.output

    world.hub.fault("whoami", status=401)
    code, output = run()
    assert code == 2 and "401" in output and "hf auth login" in output
    world.hub.fault("commit", status=503, times=6)
    code, output = run("--public")
    assert code == 4 and "branch main of alice/tiny-W4A16 is as it was" in output
    code, output = run("--public", "--create-pr")
    assert code == 0 and "refs/pr/1" in output and "everybody" in output
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "absent"))
    code, output = run()
    assert code == 4 and "there is no token for the Hub" in output


def test_what_was_not_validated_is_marked(world: World, folder: Path) -> None:
    for status in ("unvalidated", "failed"):
        change(folder, status=status)
        with pytest.raises(InputError, match=f"its status is {status}.*--unvalidated"):
            world.push(folder)
        assert REPO not in world.hub.repos
    world.push(folder, unvalidated=True)
    card = world.hub.files(REPO)["README.md"].decode()
    assert "It failed its gates" in card and "\n- failed\n" in card
    change(folder, status="unvalidated", validation=None)
    world.push(folder, unvalidated=True)
    card = world.hub.files(REPO)["README.md"].decode()
    assert "It was not validated" in card and "\n- unvalidated\n" in card and "model-index" not in card


def test_folders_that_will_not_do(world: World, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no quantkit\.json"):
        world.push(tmp_path)
    with pytest.raises(InputError, match="is not a name for the Hub"):
        world.push(folder, "alice/a b")
    (folder / "notes.txt").write_text(f"curl -H 'Authorization: Bearer {world.hub.token}'")
    with pytest.raises(InputError, match=r"notes\.txt: holds the token") as caught:
        world.push(folder)
    assert world.hub.token not in str(caught.value)
    (folder / "notes.txt").unlink()
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-40_000:] = bytes(x ^ 0x11 for x in content[-40_000:])
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(GateError, match="not those that were rounded"):
        world.push(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        world.push(folder)
    assert world.hub.repos == {}


def test_who_may_see_it(world: World, folder: Path) -> None:
    hub = world.hub
    hub.add("alice/open", {})
    with pytest.raises(InputError, match="alice/open is public already"):
        world.push(folder, "alice/open")
    assert hub.files("alice/open") == {}
    assert not world.push(folder, "alice/open", private=False).private
    hub.add("alice/closed", {}, private=True)
    assert world.push(folder, "alice/closed", private=False).private
    assert "is private and stays so" in world.said.getvalue()
    with pytest.raises(InputError, match="403"):
        world.push(folder, "other/tiny")


@pytest.mark.parametrize("terms", ["gated", "licence", "name", "unknown"])
def test_terms_of_the_original(world: World, folder: Path, terms: str) -> None:
    licence = {"licence": "cc-by-nc-4.0", "name": "other\nlicense_name: fair-noncommercial"}.get(terms, "mit")
    card = f"---\nlicense: {licence}\n---\n".encode()
    commit = world.hub.add("org/base", {"README.md": card}, gated="auto" if terms == "gated" else False)
    source = json.loads((folder / "quantkit.json").read_text())["source"]
    name = "org/absent" if terms == "unknown" else "org/base"
    change(folder, source={**source, "model": name, "revision": commit})
    with pytest.raises(InputError, match=f"{name} .*--base-public-ok"):
        world.push(folder, private=False)
    assert REPO not in world.hub.repos
    world.push(folder)
    text = world.hub.files(REPO)["README.md"].decode()
    assert f"\nbase_model: {name}\n" in text and "\nbase_model_relation: quantized\n" in text
    assert not world.push(folder, "alice/told", private=False, base_public_ok=True).private


def test_branches_and_pull_requests(world: World, folder: Path) -> None:
    world.hub.add(REPO, {"old.txt": b"old", "model-00001-of-00002.safetensors": b"old"}, private=True)
    before = world.hub.files(REPO)
    done = world.push(folder, revision="next")
    assert done.revision == "next" and done.url.endswith("/tree/next")
    assert world.hub.files(REPO) == before
    there = world.hub.files(REPO, "next")
    assert "old.txt" in there and "model-00001-of-00002.safetensors" not in there, "weights of before would be loaded"
    done = world.push(folder, create_pr=True)
    assert done.revision == "refs/pr/1" and done.pull_request is not None and world.hub.files(REPO) == before
    assert "model.safetensors" in world.hub.files(REPO, "refs/pr/1")
    with pytest.raises(InputError, match="no branch absent"):
        world.push(folder, revision="absent", create_pr=True)


def test_an_interrupted_upload_goes_on(world: World, folder: Path) -> None:
    (folder / "other.safetensors").write_bytes(b"x" * 1000)
    world.hub.fault("put", status=503, after=1, times=6)
    with pytest.raises(MissingError, match=r"could not send the files: .*503.*are not sent again"):
        world.push(folder)
    assert len(world.hub.sent) == 1 and world.hub.files(REPO).keys() == {".gitattributes"}
    world.hub.faults.clear()
    world.push(folder)
    assert len(world.hub.sent) == len(set(world.hub.sent)) == 2
    assert "other.safetensors" in world.hub.files(REPO)


def test_a_commit_is_tried_again_and_never_made_twice(world: World, folder: Path) -> None:
    world.hub.add(REPO, {}, private=True)
    world.hub.fault("commit", status=429, headers={"Retry-After": "7"})
    world.hub.fault("commit", status=503)
    world.hub.fault("commit", lost=True)
    world.push(folder)
    assert world.waits == [7.0, 2.0], "what the Hub asks for, then our own"
    assert len(world.hub.repos[REPO].commits) == 2 and world.hub.calls.count("put") == 1
    assert "again in 7 s" in world.said.getvalue()


def test_the_token_is_in_no_message(world: World, folder: Path) -> None:
    """Also where the Hub itself says it."""
    world.hub.add(REPO, {}, private=True)
    headers = {"X-Error-Message": f"cannot use {world.hub.token} here"}
    world.hub.fault("commit", status=503, headers=headers)
    world.hub.fault("commit", status=403, headers=headers)
    with pytest.raises(InputError, match=r"cannot use \*\*\* here") as caught:
        world.push(folder)
    assert world.hub.token not in "".join(traceback.format_exception(caught.value))
    assert "cannot use *** here" in world.said.getvalue()


def test_how_long_it_waits(world: World, folder: Path) -> None:
    world.hub.add(REPO, {}, private=True)
    world.hub.fault("commit", status=429, headers={"ratelimit": '"api";r=0;t=55'})
    world.hub.fault("commit", status=429, headers={"Retry-After": "4000"})
    with pytest.raises(MissingError, match=r"429.*run the same command again later"):
        world.push(folder)
    assert world.waits == [56.0]


def test_somebody_else_commits(world: World, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world.hub.add(REPO, {"a": b"a"}, private=True)
    original = hub_commit._commit

    def late(*arguments: Any) -> Any:
        world.hub.commit(REPO, "main", {"b": world.hub.store(b"b", False)}, set(), "theirs")
        return original(*arguments)

    monkeypatch.setattr(hub_commit, "_commit", late)
    with pytest.raises(InputError, match="somebody else has committed"):
        world.push(folder)
    assert world.hub.files(REPO) == {"a": b"a", "b": b"b"}


@pytest.mark.parametrize("how", ["hash", "hash of one file", "config"])
@pytest.mark.parametrize("branch", ["main", "next"])
def test_what_arrives_wrong_is_taken_back(world: World, folder: Path, how: str, branch: str) -> None:
    world.hub.add(REPO, {"old.safetensors": b"old", "config.json": b"{}", "note": b"n"}, private=True)
    before = world.hub.files(REPO)
    if how == "hash":
        world.hub.fault("tree", corrupt=True, after=1)
    elif how == "config":
        world.hub.fault("resolve", corrupt=True, times=2, after=2 if branch == "main" else 0)
    else:
        world.hub.fault("commit", corrupt=True)
    with pytest.raises(MissingError, match=r"is not that of the file|came back with another") as caught:
        world.push(folder, revision=branch)
    assert world.hub.files(REPO) == before
    assert world.hub.repos[REPO].branches.keys() == {"main"}
    assert ("there is no branch next, as before" if branch == "next" else "has the files of before again") in str(
        caught.value
    )


@pytest.mark.parametrize("call", CALLS)
def test_each_fault_of_each_call(world: World, folder: Path, call: str) -> None:
    """Once: what passes is tried again, a refusal is told. For good: told. Nothing is ever half there."""
    for fault in TRANSIENT:
        assert outcome(world, folder, call, fault).pushed, (call, fault)
    for status in REFUSED:
        found = outcome(world, folder, call, {"status": status})
        if not found.pushed and (call, status) != ("branch", 409):  # 409 reads as a branch that is there; it is not
            assert f"{status}" in found.said, (call, found)
    if call == "resolve":  # two files of before, two calls each; then the config that was sent
        for fault in ({"status": 503, "times": 1000}, {"status": 403}, {"corrupt": True}):
            assert not outcome(world, folder, call, {**fault, "after": 5}).pushed
    outcome(world, folder, call, {"corrupt": True})
    lasting = outcome(world, folder, call, {"status": 503, "times": 1000})
    assert lasting.exit_code == 4 and re.search("503|No address", lasting.said), (call, lasting)
