"""What a push does under each fault of each call of the Hub: two tables in Markdown, and what a user then reads.

    python eval/hub_faults.py

Against the tests' own Hub on a port of this machine, by the unmodified client, with a tiny random model, for a fault
does not ask what the weights are (hub_job.py has real ones). Nothing waits: the seconds are what would have been
waited. It stops with an AssertionError where a push that failed did not leave the
branch as it was, or a token was printed or stored.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

import tiny  # noqa: E402
from hub_client import REPO, World, opened  # noqa: E402
from push_faults import CALLS, SENDING, Outcome, outcome  # noqa: E402

from quantkit import api, job  # noqa: E402
from quantkit.errors import QuantkitError  # noqa: E402
from quantkit.progress import Progress  # noqa: E402

FAULTS: dict[str, dict[str, Any]] = {
    **{str(status): {"status": status} for status in (401, 403, 404, 409, 412)},
    "429, Retry-After 3": {"status": 429, "headers": {"Retry-After": "3"}},
    "500": {"status": 500},
    "503": {"status": 503},
    "cut while sending": {"drop": 10},
    "cut while answering": {"cut": 5},
    "answer lost": {"lost": True},
    "wrong content or hash": {"corrupt": True},
    "503 for good": {"status": 503, "times": 1000},
}
# Calls that take, keep or tell content; the others have none that could be wrong.
CONTENT = ("put", "part", "complete", "tree", "commit", "resolve")
# The faults while shards are sent ahead.
AHEAD = (
    "403",
    "429, Retry-After 3",
    "503",
    "cut while sending",
    "answer lost",
    "wrong content or hash",
    "503 for good",
)
MIDDLE = 50_000  # bytes of a weight file, or of a part of it, after which a connection is cut
RECIPE: dict[str, Any] = {
    "scheme": "W4A16",
    "method": "rtn",
    "validate": {"perplexity": {"windows": 2, "length": 32}, "generation": {"prompts": 0}, "gates": {"kl": 9.0}},
}


def fault_of(call: str, name: str) -> dict[str, Any]:
    """The fault as this call has it: a file is cut in its middle."""
    found = FAULTS[name]
    return {"drop": MIDDLE} if call in ("put", "part") and "drop" in found else found


def has(call: str, name: str) -> bool:
    return "corrupt" not in FAULTS[name] or call in CONTENT


def said(found: Outcome) -> str:
    """A cell: what became of the push."""
    done = {0: "pushed", 2: "refused", 4: "given up"}[found.exit_code]
    return f"{done}, {found.waited:g} s" if found.waited else done


def pushes(world: World, folder: Path) -> list[str]:
    """A row each call, a column each fault; then what a user reads when the commit is refused."""
    rows, messages = [], []
    for call in CALLS:
        found = {name: outcome(world, folder, call, fault_of(call, name)) for name in FAULTS if has(call, name)}
        rows.append([call, *(said(found[name]) if name in found else "" for name in FAULTS)])
        if call in ("commit", "put"):
            messages += [f"- {call}, {name}: {x.said}" for name, x in found.items() if not x.pushed]
    after = {name: outcome(world, folder, "resolve", {**FAULTS[name], "after": 5}) for name in FAULTS}
    rows.append(["resolve, after the commit", *map(said, after.values())])
    messages += [f"- resolve, after the commit, {name}: {x.said}" for name, x in after.items() if not x.pushed]
    return [*table(["call", *FAULTS], rows), "", *messages]


def streams(world: World, place: Path) -> list[str]:
    """The same while shards are sent ahead: the first shard's call has the fault."""
    rows = []
    for call in SENDING:
        rows.append(
            [call, *(streamed(world, place, call, fault_of(call, name)) if has(call, name) else "" for name in AHEAD)]
        )
    return table(["call for the first shard", *AHEAD], rows)


def streamed(world: World, place: Path, call: str, fault: dict[str, Any]) -> str:
    hub = world.hub
    for kept in (hub.repos, hub.blobs, hub.sent, hub.faults, hub.calls, hub.parts, world.waits):
        kept.clear()
    hub.multipart = 50_000 if call in ("part", "complete") else None
    hub.add(REPO, {"config.json": b"{}"}, private=True)
    before = hub.files(REPO)
    hub.fault(call, **fault)
    told = Progress(io.StringIO())
    export = {"shard_size": "200KB"}
    recipe = {**RECIPE, "model": str(place / "base"), "export": export, "push": {"repo": REPO, "stream": True}}
    try:
        done = job.run(recipe, out=place / "out", device="cpu", overwrite=True, progress=told)
    except QuantkitError as e:
        assert hub.files(REPO) == before and (place / "out" / "quantkit.json").is_file(), e
        return {2: "refused", 4: "given up"}[e.exit_code] + "; output kept"
    assert done.pushed is not None
    there = hub.files(REPO)
    assert all(there[p.name] == p.read_bytes() for p in (place / "out").iterdir() if p.name != "README.md")
    late = sum("is sent at the end" in warning for warning in told.warnings)
    return f"pushed; {late} at the end" if late else "pushed"


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        place = Path(name)
        tiny.save(place / "base", num_hidden_layers=1, head_dim=32, hidden_size=128, intermediate_size=128)
        folder = api.quantize({**RECIPE, "model": str(place / "base")}, out=place / "pushed", device="cpu").out
        with opened(patch, place) as world:
            for title, lines in (("A push", pushes(world, folder)), ("Shards sent ahead", streams(world, place))):
                print(f"### {title}\n\n" + "\n".join(lines) + "\n", flush=True)


if __name__ == "__main__":
    main()
