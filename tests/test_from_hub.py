"""A model of the Hub, by the unmodified client against a server on this machine: what travels, and when; what stays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hub_client import connect
from hub_server import HubServer
from typer.testing import CliRunner

import quantkit
from quantkit import hub, hub_calls, inspection
from quantkit import plan as planning
from quantkit.api import Result, describe
from quantkit.checkpoint import Checkpoint
from quantkit.cli import app
from quantkit.errors import InputError, MissingError, QuantkitError
from quantkit.progress import Progress
from quantkit.recipe import Recipe
from quantkit.shards import ShardWriter

REPO = "org/tiny"
RECIPE: dict[str, Any] = {
    "model": REPO,
    "scheme": {"preset": "W4A16", "group_size": 32},
    "calibration": {"samples": 4, "length": 32},
    "validate": {"perplexity": {"windows": 2, "length": 32}, "generation": {"prompts": 0}, "gates": {}},
}


class Listening(Progress):
    """Keeps what is said, and the bytes of weights in the cache whenever something is."""

    def __init__(self, cache: Path) -> None:
        super().__init__()
        self.cache, self.said, self.most = cache, [""], 0

    def _print(self, line: str) -> None:
        self.said.append(line)
        if line.startswith("fetching"):
            coming = int(line.split()[2].replace(",", ""))
            self.most = max(self.most, weights_in(self.cache) + coming)


def weights_in(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("snapshots/*/*.safetensors"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard for the embeddings, one for each of seven blocks, one for the head."""
    place = tmp_path_factory.mktemp("tiny") / "tiny"
    tiny.save(place, num_hidden_layers=7, hidden_size=32, head_dim=8, intermediate_size=512)
    checkpoint = Checkpoint.open(place)
    tensors = {name: checkpoint.read(name) for name in sorted(checkpoint.specs, key=lambda n: ("lm_head" in n, n))}
    (place / "model.safetensors").unlink()
    writer = ShardWriter(place, {name: checkpoint.specs[name] for name in tensors}, 110_000)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    return place


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def server(files: dict[str, bytes]) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add(REPO, {**files, "README.md": b"# tiny\n", "pytorch_model.bin": b"pickle", "logo.png": b"png"})
        yield server


@pytest.fixture
def cache(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    connect(monkeypatch, server, tmp_path / "cache")
    monkeypatch.setattr(hub_calls, "_sleep", lambda seconds: None)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def local(folder: Path) -> Result:
    """What comes out of the model as a folder."""
    return quantkit.quantize({**RECIPE, "model": str(folder)}, out=folder.parent / "local")


def shards(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.endswith(".safetensors")}


def headers(files: dict[str, bytes]) -> dict[str, int]:
    return {name: 8 + int.from_bytes(content[:8], "little") for name, content in shards(files).items()}


def served(server: HubServer) -> dict[str, int]:
    return {name: count for name, count in server.served.items() if name.endswith(".safetensors")}


def elsewhere(server: HubServer) -> None:
    """Weights come from another host, by a redirect, as on the Hub: that must not see the token."""
    server.elsewhere = server.url.replace("127.0.0.1", "localhost")


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_plan_and_inspect_fetch_headers_alone(
    server: HubServer, cache: Path, files: dict[str, bytes], folder: Path
) -> None:
    server.repos[REPO].private = True
    elsewhere(server)
    assert len(shards(files)) == 9
    described = describe(Recipe.from_any(RECIPE))
    assert served(server) == headers(files)
    facts = dict(described["facts"])
    whole = sum(map(len, shards(files).values()))
    assert facts["to fetch"].startswith(f"{whole:,} bytes of weights")
    server.served.clear()
    assert inspection.inspect(REPO)["table"] == inspection.inspect(str(folder))["table"]
    assert served(server) == headers(files)
    assert weights_in(cache) == 0
    assert hub.resolve(REPO).fingerprint() == hub.resolve(str(folder)).fingerprint()
    assert "logo.png" not in server.served and "pytorch_model.bin" not in server.served


def test_inspecting_a_quantized_model_fetches_no_shard(server: HubServer, cache: Path, tmp_path: Path) -> None:
    out = quantkit.quantize(
        {**RECIPE, "model": "builtin:pydocs-llama-7m", "method": "rtn", "validate": "none"}, out=tmp_path / "out"
    ).out
    server.add("org/small", {path.name: path.read_bytes() for path in out.iterdir()})
    assert inspection.inspect("org/small")["table"] == inspection.inspect(str(out))["table"]
    assert 0 < sum(served(server).values()) < 40_000 < (out / "model.safetensors").stat().st_size / 100


def test_the_same_bytes_as_from_a_folder(
    server: HubServer, cache: Path, local: Result, files: dict[str, bytes], tmp_path: Path
) -> None:
    large, head = sorted(map(len, shards(files).values())), server.head(REPO)
    planned = dict(describe(Recipe.from_any(RECIPE))["facts"])
    for delete in (True, False):
        server.served.clear()
        listening = Listening(cache)
        done = quantkit.quantize(RECIPE, out=tmp_path / "hub", delete_shards=delete, overwrite=True, progress=listening)
        for file in local.out.iterdir():
            if file.name not in ("quantkit.json", "quantkit-recipe.yaml"):
                assert (done.out / file.name).read_bytes() == file.read_bytes(), file.name
        assert done.validation is not None and local.validation is not None
        assert done.validation.comparison.to_dict() == local.validation.comparison.to_dict()
        assert done.summary["source"] == {**local.summary["source"], "model": REPO, "revision": head}
        assert Recipe.load(done.out / "quantkit-recipe.yaml").model == f"{REPO}@{head}"
        if delete:
            assert weights_in(cache) == 0 and not list(cache.rglob("blobs/*.incomplete"))
            assert 0 < listening.most <= sum(large[-3:]) < 0.6 * sum(large)
            output = done.summary["size"]["output_bytes"]
            first, *_, last, head_alone = (len(files[name]) for name in sorted(shards(files)))
            # the embeddings, the norm after the last block, which is in that block's, and the head
            assert planned["  --delete-shards"].startswith(f"{output + first + last + head_alone:,} bytes")
        else:
            assert weights_in(cache) == sum(large)
            expected = {name: len(content) + headers(files)[name] for name, content in shards(files).items()}
            assert served(server) == expected, "each shard once"


def test_without_calibration_shards_are_deleted_too(
    server: HubServer, cache: Path, folder: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    recipe = {**RECIPE, "method": "rtn", "validate": "none"}
    local = quantkit.quantize({**recipe, "model": str(folder)}, out=tmp_path / "local").out
    listening = Listening(cache)
    done = quantkit.quantize(recipe, out=tmp_path / "hub", delete_shards=True, progress=listening).out
    assert (done / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()
    large = sorted(map(len, shards(files).values()))
    assert 0 < listening.most <= sum(large[-4:]) < 0.7 * sum(large) and weights_in(cache) == 0


def test_what_was_in_the_cache_stays(server: HubServer, cache: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    kept = sorted(shards(files))[1]
    hf_hub_download(REPO, kept)
    server.served.clear()
    quantkit.quantize({**RECIPE, "method": "rtn", "validate": "none"}, out=tmp_path / "out", delete_shards=True)
    assert kept not in server.served and weights_in(cache) == len(files[kept])


def test_the_branch_may_move_meanwhile(
    server: HubServer,
    cache: Path,
    local: Result,
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = server.head(REPO)
    resolve = hub.resolve

    def then_it_moves(*args: Any, **kwargs: Any) -> hub.Source:
        found = resolve(*args, **kwargs)
        if server.head(REPO) == first:
            name = sorted(shards(files))[2]
            damaged = server.store(files[name][:-4] + b"\0\0\0\0", True)
            server.commit(REPO, "main", {name: damaged, "config.json": server.store(b"{}", False)}, set(), "moved")
        return found

    monkeypatch.setattr(hub, "resolve", then_it_moves)
    done = quantkit.quantize({**RECIPE, "validate": "none"}, out=tmp_path / "out")
    assert done.summary["source"]["revision"] == first != server.head(REPO)
    assert done.summary["recipe"]["model"] == f"{REPO}@{first}"
    assert (done.out / "model.safetensors").read_bytes() == (local.out / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds the result of another recipe"):
        monkeypatch.setattr(hub, "resolve", resolve)
        server.commit(REPO, "main", {"config.json": server.store(files["config.json"], False)}, set(), "new weights")
        quantkit.quantize({**RECIPE, "validate": "none"}, out=tmp_path / "out")


def test_offline(
    server: HubServer,
    cache: Path,
    local: Result,
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = {**RECIPE, "validate": "none"}
    source = hub.resolve(REPO)
    assert source.shards is not None
    source.shards.fetch_all(source.shards.names)
    offline(monkeypatch)
    server.calls.clear()
    done = quantkit.quantize(recipe, out=tmp_path / "offline")
    assert (done.out / "model.safetensors").read_bytes() == (local.out / "model.safetensors").read_bytes()
    assert done.summary["source"] == {**local.summary["source"], "model": REPO, "revision": server.head(REPO)}
    assert hub.resolve(source.pinned).fingerprint() == source.fingerprint()
    missing = sorted(shards(files))[3]
    (path,) = cache.rglob(missing)
    path.unlink()
    with pytest.raises(MissingError, match=rf"offline mode is on .*not in the cache: {missing}; go online once"):
        planning.make(Recipe.from_any(recipe))
    with pytest.raises(MissingError, match="of v2 is not in the cache"):
        hub.resolve(f"{REPO}@v2")
    assert server.calls == []


# Faults --------------------------------------------------------------------------------------------------------------


def test_who_may_read(server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos[REPO].gated = "manual"
    with pytest.raises(InputError, match=r"403|gated"):
        hub.resolve(REPO)
    server.accepted.add(REPO)
    assert hub.resolve(REPO).revision == server.head(REPO)
    with pytest.raises(InputError, match="has no revision 'v9'"):
        hub.resolve(f"{REPO}@v9")
    server.repos[REPO].private = True
    for token in ("hf_wrong0123456789", ""):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(QuantkitError) as caught:
            hub.resolve(REPO)
        assert isinstance(caught.value, InputError) and "hf auth login" in str(caught.value)
        assert "hf_" not in str(caught.value)


def fetched(name: str) -> Path:
    source = hub.resolve(REPO)
    assert source.shards is not None
    try:
        return source.shards.file(name)
    finally:
        source.close()


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 503, "times": 2},
        {"status": 500, "times": 1},
        {"status": 429, "times": 2, "headers": {"Retry-After": "3"}},
        {"cut": 70_000, "times": 2},
        {"drop": 0, "times": 1},
        {"corrupt": True, "times": 1},
    ],
    ids=str,
)
def test_a_download_goes_on(server: HubServer, cache: Path, files: dict[str, bytes], fault: dict[str, Any]) -> None:
    name = sorted(shards(files))[0]
    elsewhere(server)
    source = hub.resolve(REPO)
    assert source.shards is not None
    server.fault("content", **fault)
    assert source.shards.file(name).read_bytes() == files[name]
    assert not list(cache.rglob("*.incomplete"))


def test_a_cut_download_resumes(
    server: HubServer, cache: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 16_384)  # it goes on after whole chunks
    name = sorted(shards(files))[0]
    source = hub.resolve(REPO)
    assert source.shards is not None
    server.served.clear()
    server.fault("resolve", cut=100_000, after=1)
    assert source.shards.file(name).read_bytes() == files[name]
    assert server.served[name] == 2 * len(files[name]) - 6 * 16_384, "the first six chunks are not asked for again"


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ({"status": 503, "times": 99}, MissingError, "could not fetch {name} of org/tiny: the Hub answered 503"),
        ({"status": 401, "times": 99}, InputError, "answered 401 (injected); log in: hf auth login, or set HF_TOKEN"),
        ({"status": 403, "times": 99, "code": "GatedRepo"}, InputError, "answered 403"),
        ({"status": 404, "times": 99, "code": "EntryNotFound"}, InputError, "answered 404"),
        ({"status": 429, "times": 99, "headers": {"Retry-After": "9000"}}, MissingError, "asks for fewer calls"),
        ({"cut": 1000, "times": 99}, MissingError, "no answer from the Hub"),
        ({"corrupt": True, "times": 99}, MissingError, "came damaged twice (its hash is"),
    ],
    ids=str,
)
def test_a_download_fails(
    server: HubServer, cache: Path, files: dict[str, bytes], fault: dict[str, Any], kind: type, words: str
) -> None:
    name = sorted(shards(files))[0]
    elsewhere(server)
    source = hub.resolve(REPO)
    assert source.shards is not None
    server.fault("content", **fault)
    with pytest.raises(QuantkitError) as caught:
        source.shards.file(name)
    assert type(caught.value) is kind and words.format(name=name) in str(caught.value), caught.value
    assert server.token not in str(caught.value)
    assert not [path for path in cache.rglob("*") if path.name == name or path.name.endswith(".incomplete")]
    assert not (cache.parent / "out").exists()
    server.faults.clear()
    assert source.shards.file(name).read_bytes() == files[name], "a later read tries again"


def test_a_shard_that_the_cache_has_cut_short_is_fetched_again(
    server: HubServer, cache: Path, files: dict[str, bytes]
) -> None:
    name = sorted(shards(files))[0]
    blob = fetched(name).resolve()
    blob.write_bytes(files[name][:-100])
    assert fetched(name).read_bytes() == files[name]


def test_no_room_on_the_disk(
    server: HubServer, cache: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import errno

    from huggingface_hub import file_download

    from quantkit import room

    name = sorted(shards(files))[0]
    source = hub.resolve(REPO)
    assert source.shards is not None

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(MissingError, match=rf"no room for {name} of org/tiny .*--delete-shards"):
        source.shards.file(name)
    usage = type("Usage", (), {"free": 300_000})
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(MissingError, match=r"300,000 bytes are free, and [\d,]+ are needed .* --delete-shards"):
        quantkit.quantize(RECIPE, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_error_of_the_shard_ahead_is_raised_when_it_is_read(
    server: HubServer, cache: Path, local: Result, tmp_path: Path
) -> None:
    elsewhere(server)
    server.fault("content", status=404, times=99, code="EntryNotFound", after=2 * 9 + 4)  # beyond the headers
    command = ["quantize", _recipe(tmp_path), "--out", str(tmp_path / "out"), "--delete-shards"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "could not fetch model-0" in result.stderr and "Traceback" not in result.stderr
    assert server.token not in result.output + result.stderr
    assert not (tmp_path / "out").exists() and weights_in(cache) == 0
    server.faults.clear()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and "continuing at block" in result.stderr, result.stderr
    made = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert made == (local.out / "model.safetensors").read_bytes() and weights_in(cache) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}'}, "not a file of this folder"),
        ({"model-00001-of-00002.safetensors": b"\xff" * 100}, "is not a safetensors file"),
        ({"config.json": None}, "has no config.json"),
        ({"../../x.json": b"{}"}, "is no path inside it"),
    ],
    ids=["index", "header", "config", "path"],
)
def test_a_bad_repository(server: HubServer, cache: Path, change: dict[str, bytes | None], words: str) -> None:
    content = {"config.json": b"{}", "model-00001-of-00002.safetensors": b"\x02\0\0\0\0\0\0\0{}"}
    server.add("org/bad", {k: v for k, v in {**content, **change}.items() if v is not None})
    with pytest.raises(InputError, match=words):
        hub.resolve("org/bad").checkpoint()


def test_pickles_are_refused_unfetched(server: HubServer, cache: Path) -> None:
    server.add("org/pickle", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(InputError, match=r"its weights are pickles \(pytorch_model.bin\), which are refused"):
        hub.resolve("org/pickle")
    assert not server.served["pytorch_model.bin"]


# Reproducing ---------------------------------------------------------------------------------------------------------


def _recipe(tmp_path: Path) -> str:
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    return str(tmp_path / "recipe.json")


def test_reproduce(server: HubServer, cache: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    out = quantkit.quantize({**RECIPE, "validate": "none"}, out=tmp_path / "out").out
    server.add("org/tiny-W4A16", {**{p.name: p.read_bytes() for p in out.iterdir()}, "README.md": b"the card"})
    name = sorted(shards(files))[-1]
    server.commit(REPO, "main", {name: server.store(files[name][:-2] + b"\0\0", True)}, set(), "moved")
    server.served.clear()
    found = quantkit.reproduce("org/tiny-W4A16", delete_shards=True)
    assert found.same and found.surroundings == () and found.files["model.safetensors"] == "same", found
    assert found.files.keys().isdisjoint({"quantkit.json", "quantkit-recipe.yaml", "README.md"})
    assert "model.safetensors" not in server.served, "its hash is enough"
    # another version then, and a byte that is not what comes out now
    summary = json.loads((out / "quantkit.json").read_text())
    summary["versions"]["torch"] = "1.0"
    (out / "quantkit.json").write_text(json.dumps(summary))
    weights = bytearray((out / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "model.safetensors").write_bytes(weights)
    result = CliRunner().invoke(app, ["reproduce", str(out), "--out", str(tmp_path / "again")])
    assert result.exit_code == 3 and "model.safetensors of" in result.stderr and "torch 1.0 then" in result.stderr
    made = hashlib.sha256((tmp_path / "again" / "model.safetensors").read_bytes()).hexdigest()
    assert f"not {hashlib.sha256(weights).hexdigest()[:12]}" in result.stdout and made[:12] in result.stdout
    assert "README.md" in result.stdout
    assert not list(tmp_path.glob(".quantkit-reproduce-*")) and not list(Path.cwd().glob(".quantkit-reproduce-*"))


def test_what_cannot_be_reproduced(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no quantkit.json, so it is no output"):
        quantkit.reproduce(folder)
    recipe = {**RECIPE, "model": str(folder), "method": "rtn", "validate": "none"}
    out = quantkit.quantize(recipe, out=tmp_path / "out").out
    summary = json.loads((out / "quantkit.json").read_text())
    summary["source"]["fingerprint"] = "0" * 64
    (out / "quantkit.json").write_text(json.dumps(summary))
    with pytest.raises(InputError, match=r"is not the model that .* was made from"):
        quantkit.reproduce(out)
    summary["converted_from"] = {"format": "gptq"}
    (out / "quantkit.json").write_text(json.dumps(summary))
    with pytest.raises(InputError, match="was converted from another format"):
        quantkit.reproduce(out)
