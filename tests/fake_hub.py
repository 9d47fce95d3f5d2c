"""A Hub of one's own, on a port of this machine: the few answers that the datasets library asks for.

    with FakeHub({"org/name": {"README.md": b"...", "data/train.parquet": b"..."}}) as hub:
        hub.url       # for HF_ENDPOINT
        hub.served    # bytes of each file that went out

Errors are marked as the Hub marks them, with X-Error-Code.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

GATED = "org/gated"


def commit_of(files: Mapping[str, bytes]) -> str:
    """The one commit of a repository."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class FakeHub:
    """Datasets by name, each a mapping of path to content, at one commit that is also the branch main."""

    def __init__(self, datasets: Mapping[str, Mapping[str, bytes]]) -> None:
        self.datasets = datasets
        self.commits = {name: commit_of(files) for name, files in datasets.items()}
        self.etags = {id(c): hashlib.sha1(c).hexdigest() for files in datasets.values() for c in files.values()}
        self.served: Counter[str] = Counter()
        hub = self

        class Answers(_Answers):
            pass

        Answers.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Answers(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "datasets"] and len(parts) >= 4:
            name, rest = "/".join(parts[2:4]), parts[4:]
        elif parts[0] == "datasets" and parts[3:4] == ["resolve"]:
            name, rest = "/".join(parts[1:3]), parts[3:]
        else:
            return self._fail(404, "EntryNotFound")
        if name == GATED:
            return self._fail(403, "GatedRepo")
        files = self.hub.datasets.get(name)
        if files is None:
            return self._fail(401, "RepoNotFound")
        commit = self.hub.commits[name]
        if len(rest) > 1 and rest[1] not in ("main", commit):
            return self._fail(404, "RevisionNotFound")
        what, path = (rest[0] if rest else "revision"), "/".join(rest[2:])
        if what == "resolve":
            return self._file(files, path, commit)
        if what == "revision":
            return self._json({"id": name, "sha": commit, "siblings": [{"rfilename": f} for f in files]})
        if what == "tree":
            return self._json([self._entry(f, files) for f in files if f.startswith(path)])
        asked = parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths", [])
        return self._json([self._entry(f, files) for f in files if f in asked])

    def _file(self, files: Mapping[str, bytes], path: str, commit: str) -> None:
        if path not in files:
            return self._fail(404, "EntryNotFound")
        content, status, extra = files[path], 200, {}
        wanted = self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = int(last) + 1 if last else len(content)
            extra["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
            content, status = content[int(first) : end], 206
        if self.command != "HEAD":
            self.hub.served[path] += len(content)
        etag = self.hub.etags[id(files[path])]
        self._send(status, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes", **extra})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _entry(self, path: str, files: Mapping[str, bytes]) -> dict[str, Any]:
        content = files[path]
        return {"type": "file", "path": path, "size": len(content), "oid": self.hub.etags[id(content)]}
