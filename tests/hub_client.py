"""The unmodified client of huggingface_hub in the tests' own process, pointed at a HubServer."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
from hub_server import HubServer


def connect(monkeypatch: pytest.MonkeyPatch, hub: HubServer, home: Path) -> list[float]:
    """Settings that the client reads from the environment when it is imported, which is too late here; it does not
    wait between its tries. Returns the seconds it would have waited."""
    import time

    from huggingface_hub import constants
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
    return waits
