"""Every call of a push, what may go wrong with it, and what a push then does; for the tests and eval/hub_faults.py."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub_client import REPO, World

from quantkit.errors import QuantkitError

# Of a file that goes up in one piece, and of one that goes up in parts.
SENDING = ("preupload", "batch", "put", "part", "complete", "verify")
CALLS = ("whoami", "info", "create", *SENDING, "tree", "branch", "validate", "commit", "resolve")
REFUSED = (401, 403, 404, 409, 412)
TRANSIENT: tuple[dict[str, Any], ...] = (
    {"status": 429, "headers": {"Retry-After": "3"}},
    {"status": 500},
    {"status": 503},
    {"drop": 10},
    {"lost": True},
    {"cut": 5},
)


@dataclass(frozen=True)
class Outcome:
    """exit_code: 0 when it was pushed; calls: how often the faulty call was made; waited: seconds between tries."""

    exit_code: int
    said: str
    calls: int
    waited: float

    @property
    def pushed(self) -> bool:
        return self.exit_code == 0


def outcome(world: World, folder: Path, call: str, fault: dict[str, Any]) -> Outcome:
    """What a push to a branch did under a fault; the branch must be whole: as before, or as the folder."""
    hub = world.hub
    branch = "next" if call == "branch" else "main"
    for kept in (hub.repos, hub.blobs, hub.sent, hub.faults, hub.calls, hub.parts, world.waits):
        kept.clear()
    hub.multipart = 1_000_000 if call in ("part", "complete") else None
    if call != "create":
        small = {"config.json": b"{}", "README.md": b"# old"}
        hub.add(REPO, {"old.safetensors": b"old", "model.safetensors": b"older", **small, "note": b"n"}, private=True)
    before = hub.files(REPO) if REPO in hub.repos else {}
    hub.fault(call, **fault)
    code, said = 0, ""
    try:
        world.push(folder, revision=branch)
    except QuantkitError as e:
        code, said = e.exit_code, str(e)
        assert hub.token not in "".join(traceback.format_exception(e))
        now = hub.files(REPO) if REPO in hub.repos else {}
        now.pop(".gitattributes", None)
        assert now == before, f"{call} {fault}: {e}"
        if REPO in hub.repos:
            assert hub.repos[REPO].branches.keys() == {"main"}
    else:
        there = hub.files(REPO, branch)
        assert all(there[p.name] == p.read_bytes() for p in folder.iterdir() if p.name != "README.md")
    return Outcome(code, said, Counter(hub.calls)[call], sum(world.waits))
