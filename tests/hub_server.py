"""A Hub on a port of this machine that can be written to: what the client of huggingface_hub asks for to push a model.

    with HubServer() as hub:                   # hub.url for HF_ENDPOINT, hub.token for HF_TOKEN
        hub.fault("commit", status=503, times=2, headers={"Retry-After": "1"})
        ...
        hub.files("alice/tiny")                # {path: content} at the head of main
        hub.calls                              # names of the calls that came in, as in ROUTES
    hub.served["model.safetensors"]        # bytes of it that went out

A data set's name is `datasets:org/name`.

Files above `large` bytes, and all safetensors, travel by the protocol of Git LFS; above `multipart` bytes in parts.
A commit is atomic: it counts from when it is made, and branches are names of commits, as on the Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_store import Fault, File, Repo, Store, git_blob

ID = r"([^/]+/[^/]+)"
# name of a call -> method and path; the first that fits counts
ROUTES = {
    "whoami": r"GET /api/whoami-v2",
    "create": r"POST /api/repos/create",
    "validate": r"POST /api/validate-yaml",
    "preupload": rf"POST /api/models/{ID}/preupload/(.+)",
    "batch": rf"POST /{ID}\.git/info/lfs/objects/batch",
    "verify": rf"POST /{ID}\.git/info/lfs/verify",
    "part": r"PUT /_lfs/part/(\w+)/(\d+)",
    "complete": r"POST /_lfs/complete/(\w+)",
    "put": r"PUT /_lfs/(\w+)",
    "commit": rf"POST /api/models/{ID}/commit/(.+)",
    "paths": rf"POST /api/models/{ID}/paths-info/(.+)",
    "tree": rf"GET /api/models/{ID}/tree/(refs/pr/\d+|[^/]+)(?:/(.*))?",
    "refs": rf"GET /api/models/{ID}/refs",
    "branch": rf"POST /api/models/{ID}/branch/(.+)",
    "unbranch": rf"DELETE /api/models/{ID}/branch/(.+)",
    "info": rf"GET /api/models/{ID}(?:/revision/(.+))?",
    "content": r"GET /_lfs/(\w+)/(.+)",
    "resolve": rf"(?:HEAD|GET) /{ID}/resolve/(refs/pr/\d+|[^/]+)/(.+)",
}
# no token is asked for: their addresses are signed, or say nothing
PUBLIC = ("part", "complete", "put", "content", "validate")


class HubServer(Store):
    """Repositories of models on a port; see the module's text."""

    def __init__(self, *, large: int = 10_000_000, multipart: int | None = None) -> None:
        super().__init__(large=large, multipart=multipart)
        answers = type("Answers", (_Answers,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), answers)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, call: str, **how: Any) -> Fault:
        assert call in ROUTES, call
        return super().fault(call, **how)


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Answers(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together: a client need not wait for the second packet

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        path = re.sub(r"^/(api/)?datasets/", lambda m: "/api/models/datasets:" if m[1] else "/datasets:", path)
        found = next(
            ((name, m) for name, route in ROUTES.items() if (m := re.fullmatch(route, f"{self.command} {path}"))), None
        )
        self.fault = None if found is None else self._due(found[0])
        if self.fault is not None and self.fault.drop is not None:
            self.rfile.read(min(int(self.headers.get("Content-Length") or 0), self.fault.drop))
            return self._hang_up()
        body = self._body()
        try:
            if found is None:
                raise _Refused(404, f"no such call: {self.command} {path}")
            if self.fault is not None and self.fault.status:
                raise _Refused(self.fault.status, "injected", self.fault.code)
            name, groups = found[0], found[1].groups()
            self._allow(name, groups)
            with self.hub.lock:
                answer = getattr(self, f"_{name}")(body, *groups)
            if answer is not None:
                self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        except _Refused as e:
            headers = {"X-Error-Message": str(e), **({"X-Error-Code": e.code} if e.code else {})}
            if self.fault is not None:
                headers |= self.fault.headers
            self._send(e.status, json.dumps({"error": str(e)}).encode(), headers)

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET

    def _due(self, name: str) -> Fault | None:
        with self.hub.lock:
            self.hub.calls.append(name)
            for fault in self.hub.faults:
                if fault.call == name and fault.times > 0:
                    if fault.after > 0:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _allow(self, name: str, groups: tuple[str, ...]) -> None:
        """Raises 401 without a token, 404 for what there is not or may not be seen, 403 for what is gated."""
        token = self.headers.get("Authorization")
        known = token == f"Bearer {self.hub.token}"
        reading = self.command in ("GET", "HEAD") or name == "paths"
        if token is not None and not known:
            raise _Refused(401, "Invalid credentials in Authorization header")
        if (not known and not reading and name not in PUBLIC) or (name == "whoami" and not known):
            raise _Refused(401, "Invalid username or password.")
        if groups and "/" in groups[0]:
            repo = self.hub.repos.get(groups[0])
            if repo is None or (repo.private and not known):
                raise _Refused(404 if known else 401, "Repository not found", "RepoNotFound")
            if name == "resolve" and repo.gated and not (known and groups[0] in self.hub.accepted):
                raise _Refused(403, "Access to this model is restricted", "GatedRepo")

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        if self.fault is not None and self.fault.lost:
            return self._hang_up()
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.cut is not None:
            self.wfile.write(content[: self.fault.cut])
            self.wfile.flush()
            return self._hang_up()
        self.wfile.write(content)

    # Accounts and repositories

    def _whoami(self, body: bytes) -> dict[str, Any]:
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": self.hub.role}}
        return {"type": "user", "id": "1", "name": self.hub.user, "orgs": [], "auth": token}

    def _create(self, body: bytes) -> dict[str, Any] | None:
        asked = json.loads(body)
        owner = asked.get("organization") or self.hub.user
        name = f"{owner}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{name}", "name": name, "id": "1"}
        if name in self.hub.repos:
            error = {"error": "You already created this model repo", **url}
            self._send(409, json.dumps(error).encode(), {})
            return None
        if owner != self.hub.user:
            raise _Refused(403, "You don't have the rights to create a model under this namespace")
        self.hub.repos[name] = Repo(asked.get("visibility") == "private")
        marks = self.hub.store(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)
        self.hub.commit(name, "main", {".gitattributes": marks}, set(), "initial commit")
        return url

    def _validate(self, body: bytes) -> dict[str, Any]:
        return {"errors": [], "warnings": []}

    def _info(self, body: bytes, name: str, revision: str | None) -> dict[str, Any]:
        sha = self._sha(name, revision or "main")
        files, repo = self.hub.repos[name].commits[sha], self.hub.repos[name]
        card = self.hub.blobs[files["README.md"].oid].decode() if "README.md" in files else ""
        front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
        return {
            "_id": "1",
            "id": name.removeprefix("datasets:"),
            "modelId": name,
            "sha": sha,
            "private": repo.private,
            "gated": repo.gated,
            "tags": [],
            "cardData": yaml.safe_load(front[1]) if front else None,
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }

    def _refs(self, body: bytes, name: str) -> dict[str, Any]:
        found = self.hub.repos[name].branches
        heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": s} for n, s in found.items() if "/pr/" not in n]
        return {"branches": heads, "converts": [], "tags": []}

    def _branch(self, body: bytes, name: str, branch: str) -> dict[str, Any]:
        if branch in self.hub.repos[name].branches:
            raise _Refused(409, "Reference already exists")
        self.hub.repos[name].branches[branch] = self._sha(name, json.loads(body or b"{}").get("startingPoint", "main"))
        return {}

    def _unbranch(self, body: bytes, name: str, branch: str) -> dict[str, Any]:
        if self.hub.repos[name].branches.pop(branch, None) is None:
            raise _Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return {}

    # Uploads

    def _preupload(self, body: bytes, name: str, revision: str) -> dict[str, Any]:
        there = self.hub.repos[name].commits[self._sha(name, revision)]
        answers = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            large = asked["size"] >= self.hub.large or path.endswith(".safetensors")
            same = there[path].oid if path in there else None
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": same})
        return {"files": answers}

    def _batch(self, body: bytes, name: str) -> dict[str, Any]:
        objects, parts = [], self.hub.multipart
        for asked in json.loads(body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            found: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.blobs:
                upload: dict[str, Any] = {"href": f"{self.hub.url}/_lfs/{oid}", "header": {}}
                if parts:
                    count = -(-size // parts)
                    links = {str(i): f"{self.hub.url}/_lfs/part/{oid}/{i}" for i in range(1, count + 1)}
                    header = {"chunk_size": str(parts), **links}
                    upload = {"href": f"{self.hub.url}/_lfs/complete/{oid}", "header": header}
                verify = {"href": f"{self.hub.url}/{name}.git/info/lfs/verify", "header": {}}
                found["actions"] = {"upload": upload, "verify": verify}
            objects.append(found)
        return {"transfer": "multipart" if parts else "basic", "objects": objects}

    def _put(self, body: bytes, oid: str) -> dict[str, Any]:
        return self._keep(oid, body)

    def _part(self, body: bytes, oid: str, number: str) -> None:
        self.hub.parts[oid, int(number)] = self._damaged(body)
        self._send(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def _complete(self, body: bytes, oid: str) -> dict[str, Any]:
        return self._keep(oid, b"".join(self.hub.parts[oid, p["partNumber"]] for p in json.loads(body)["parts"]))

    def _keep(self, oid: str, content: bytes) -> dict[str, Any]:
        content = self._damaged(content)
        if hashlib.sha256(content).hexdigest() != oid:
            raise _Refused(400, "sha256 of the content is not the oid")
        self.hub.blobs[oid] = content
        self.hub.sent.append(oid)
        return {}

    def _verify(self, body: bytes, name: str) -> dict[str, Any]:
        if json.loads(body)["oid"] not in self.hub.blobs:
            raise _Refused(404, "not uploaded")
        return {}

    def _commit(self, body: bytes, name: str, revision: str) -> dict[str, Any]:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, self._sha(name, revision)):
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        changed, gone = {}, set()
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "file":
                changed[value["path"]] = self.hub.store(self._damaged(base64.b64decode(value["content"])), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise _Refused(400, "LFS pointer to a file that does not exist")
                changed[value["path"]] = File(value["oid"], True)
            elif key == "deletedFile":
                gone.add(value["path"])
        answer = {}
        if "create_pr" in parse_qs(urlsplit(self.path).query):
            branches = self.hub.repos[name].branches
            number = sum(n.startswith("refs/pr/") for n in branches) + 1
            branches[f"refs/pr/{number}"] = branches[revision]
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        sha = self.hub.commit(name, revision, changed, gone, header["summary"])
        return {**answer, "success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"}

    # Reading

    def _tree(self, body: bytes, name: str, revision: str, folder: str | None) -> list[dict[str, Any]]:
        found = self.hub.repos[name].commits[self._sha(name, revision)]
        return [self._entry(path, file) for path, file in sorted(found.items()) if path.startswith(folder or "")]

    def _paths(self, body: bytes, name: str, revision: str) -> list[dict[str, Any]]:
        found = self.hub.repos[name].commits[self._sha(name, revision)]
        asked = parse_qs(body.decode()).get("paths", [])
        return [self._entry(path, found[path]) for path in asked if path in found]

    def _entry(self, path: str, file: File) -> dict[str, Any]:
        content = self.hub.blobs[file.oid]
        oid = "0" * len(file.oid) if self.fault is not None and self.fault.corrupt else file.oid
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": oid}
        if file.lfs:
            entry |= {"oid": git_blob(oid.encode()), "lfs": {"oid": oid, "size": len(content), "pointerSize": 134}}
        return entry

    def _resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        sha = self._sha(name, revision)
        file = self.hub.repos[name].commits[sha].get(path)
        if file is None:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        content = self.hub.blobs[file.oid]
        headers = {"ETag": f'"{file.oid}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(content))}
            if self.hub.elsewhere:
                return self._send(302, b"", {**headers, "Location": f"{self.hub.elsewhere}/_lfs/{file.oid}/{path}"})
        self._give(self._damaged(content), path, headers)

    def _content(self, body: bytes, oid: str, path: str) -> None:
        if "Authorization" in self.headers:
            raise _Refused(400, "a token was sent to a place that is not the Hub")
        self._give(self._damaged(self.hub.blobs[oid]), path, {"ETag": f'"{oid}"'})

    def _give(self, content: bytes, path: str, headers: dict[str, str]) -> None:
        status = 200
        if wanted := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        if self.command != "HEAD":
            with self.hub.lock:
                self.hub.served[path] += len(content)
        self._send(status, content, headers)

    def _damaged(self, content: bytes) -> bytes:
        wrong = self.fault is not None and self.fault.corrupt and content
        return bytes([content[0] ^ 1]) + content[1:] if wrong else content

    def _sha(self, name: str, revision: str) -> str:
        repo = self.hub.repos[name]
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha
