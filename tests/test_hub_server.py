"""The tests' own Hub, by the unmodified client: what it answers, and that each fault does what it says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_client import connect
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

WEIGHTS = bytes(range(256)) * 40
REPO = "alice/tiny"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(large=5000) as hub:
        yield hub


@pytest.fixture
def api(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HfApi:
    connect(monkeypatch, hub, tmp_path / "cache")
    return HfApi()


def upload(api: HfApi, **more: object) -> str:
    files = {"README.md": b"# tiny\n", "config.json": b"{}", "model.safetensors": WEIGHTS}
    additions = [CommitOperationAdd(path, content) for path, content in files.items()]
    return str(api.create_commit(REPO, additions, commit_message="files", **more).oid)  # type: ignore[call-overload]


def test_a_model_goes_up_and_comes_back(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    assert api.whoami()["name"] == "alice"
    api.create_repo(REPO, private=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    sha = upload(api)
    assert hub.head(REPO) == sha == api.model_info(REPO).sha
    assert hub.calls.count("put") == 1 and hub.sent == [hashlib.sha256(WEIGHTS).hexdigest()]
    folder = Path(api.snapshot_download(REPO, local_dir=tmp_path / "back"))
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    entries = {x.path: x for x in api.list_repo_tree(REPO, revision=sha)}
    lfs = getattr(entries["model.safetensors"], "lfs")  # noqa: B009
    assert lfs.sha256 == hub.sent[0] and getattr(entries["config.json"], "lfs") is None  # noqa: B009
    upload(api)
    assert hub.head(REPO) == sha and len(hub.sent) == 1, "nothing changed, so nothing is sent and nothing committed"


def test_branches_copies_deletions_and_pull_requests(hub: HubServer, api: HfApi) -> None:
    api.create_repo(REPO)
    first = hub.head(REPO)
    sha = upload(api)
    api.create_branch(REPO, branch="next", revision=first)
    assert {ref.name for ref in api.list_repo_refs(REPO).branches} == {"main", "next"}
    copies = [CommitOperationCopy(name, name, src_revision=sha) for name in ("config.json", "model.safetensors")]
    api.create_commit(REPO, [*copies, CommitOperationDelete(".gitattributes")], commit_message="x", revision="next")
    assert hub.files(REPO, "next") == {"config.json": b"{}", "model.safetensors": WEIGHTS}
    api.delete_branch(REPO, branch="next")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="next")
    addition = CommitOperationAdd("new.txt", b"new")
    made = api.create_commit(REPO, [addition], commit_message="pull", create_pr=True)
    assert made.pr_revision == "refs/pr/1"
    assert "new.txt" not in hub.files(REPO) and "new.txt" in hub.files(REPO, "refs/pr/1")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(REPO, [CommitOperationAdd("b", b"b")], commit_message="late", parent_commit=first)


def test_multipart(api: HfApi, hub: HubServer) -> None:
    hub.multipart = 4096
    api.create_repo(REPO)
    upload(api)
    assert hub.files(REPO)["model.safetensors"] == WEIGHTS
    assert (hub.calls.count("part"), hub.calls.count("complete"), hub.calls.count("put")) == (3, 1, 0)


def test_who_may_see_what(hub: HubServer, api: HfApi) -> None:
    hub.add("org/private", {"config.json": b"{}"}, private=True)
    hub.add("org/gated", {"config.json": b"{}", "README.md": b"---\nlicense: mit\n---\n"}, gated="manual")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/private", token=False)
    assert api.model_info("org/private").private
    found = api.model_info("org/gated")
    assert found.gated == "manual" and found.card_data is not None and found.card_data.license == "mit"
    with pytest.raises(GatedRepoError):
        api.hf_hub_download("org/gated", "config.json")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("org/private", "absent.json")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_wrong").whoami()
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("other/tiny")


@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": 100}, {"lost": True}], ids=str)
def test_an_upload_is_tried_again(hub: HubServer, api: HfApi, fault: dict[str, object]) -> None:
    api.create_repo(REPO)
    hub.fault("put", times=2, **fault)
    upload(api)
    assert hub.files(REPO)["model.safetensors"] == WEIGHTS and hub.calls.count("put") == 3


def test_faults_of_a_commit(hub: HubServer, api: HfApi) -> None:
    api.create_repo(REPO)
    first = hub.head(REPO)
    hub.fault("commit", status=429, headers={"Retry-After": "7"})
    with pytest.raises(HfHubHTTPError) as caught:
        upload(api)
    assert caught.value.response.headers["Retry-After"] == "7" and hub.head(REPO) == first
    hub.fault("commit", lost=True)
    with pytest.raises(HTTPError, match=r"disconnected|closed|reset"):
        upload(api)
    assert hub.head(REPO) != first, "the commit was made, only its answer was lost"


def test_faults_of_a_download(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    api.create_repo(REPO)
    upload(api)
    hub.fault("resolve", cut=1000, after=1)
    assert Path(api.hf_hub_download(REPO, "model.safetensors")).read_bytes() == WEIGHTS
    hub.fault("resolve", corrupt=True, times=2)
    back = api.hf_hub_download(REPO, "config.json", local_dir=tmp_path)
    assert Path(back).read_bytes() == b"z}"
    hub.fault("tree", corrupt=True)
    (entry,) = [x for x in api.list_repo_tree(REPO) if x.path == "config.json"]
    assert set(getattr(entry, "blob_id")) == {"0"}  # noqa: B009
