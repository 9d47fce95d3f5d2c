"""The unmodified client of huggingface_hub in the tests' own process, pointed at a HubServer, and what it says."""

from __future__ import annotations

import contextlib
import io
import logging
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

from quantkit import hub_calls, hub_push
from quantkit.progress import Progress

REPO = "alice/tiny-W4A16"


def connect(monkeypatch: pytest.MonkeyPatch, hub: HubServer, home: Path) -> list[float]:
    """Settings that the client reads from the environment when it is imported, which is too late here; it does not
    wait between its tries. Returns the seconds it would have waited."""
    import time

    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    waits: list[float] = []
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    clock = types.SimpleNamespace(**{**vars(time), "sleep": waits.append})
    monkeypatch.setattr(_http, "time", clock)
    monkeypatch.setattr(file_download, "time", clock)
    return waits


@dataclass
class World:
    """A Hub, what was waited for, and everything that was printed or logged."""

    hub: HubServer
    waits: list[float]
    said: io.StringIO

    def push(self, folder: Path, repo: str | None = REPO, **how: Any) -> hub_push.Pushed:
        return hub_push.push(folder, repo, progress=Progress(self.said), **how)


@contextlib.contextmanager
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[World]:
    """A Hub, and at the end a look for the token in everything that was said or stored."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("huggingface_hub").addHandler(handler)
    with HubServer() as hub:
        waits = connect(monkeypatch, hub, tmp_path / "cache")
        monkeypatch.setattr(hub_calls, "_sleep", waits.append)
        with contextlib.redirect_stderr(said):
            yield World(hub, waits, said)
        assert hub.token not in said.getvalue()
        for repo in hub.repos:
            for branch in hub.repos[repo].branches:
                assert not any(hub.token.encode() in content for content in hub.files(repo, branch).values())
    logging.getLogger("huggingface_hub").removeHandler(handler)
