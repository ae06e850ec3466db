"""A Hub on the loopback: as much of its HTTP interface as the real huggingface_hub client needs to push, list and pull.

The client reads HF_ENDPOINT and HF_HUB_DISABLE_XET when it is imported, so a subprocess gets `hub.env(home)`; inside
this process the `hub` fixture of tests/conftest.py points the client's constants here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

from tests.helpers.hub_state import TOKEN, Fault, LoopbackHub, Repo, git_oid, is_lfs, sha256

__all__ = ["TOKEN", "LoopbackHub", "git_oid", "is_lfs", "point_client", "serve", "sha256"]

Answer = tuple[int, Any, dict[str, str]]  # status, JSON or bytes, headers
TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}


@contextmanager
def serve() -> Iterator[LoopbackHub]:
    """Run a Hub on a free port of 127.0.0.1."""
    hub = LoopbackHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_client(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub, home: Path) -> None:
    """Let the real client in this process talk to `hub`, as me, with its cache under `home`, and not wait to retry."""
    from huggingface_hub import constants, hf_api

    for name, value in hub.env(home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # the object behind snapshot_download and its like
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


class _HubError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", headers: dict[str, str] | None = None) -> None:
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one packet: two would wait for the client's delayed acknowledgement

    def log_message(self, *args: object) -> None:
        """Say nothing: a request's headers hold the token."""

    def _handle(self) -> None:
        split = urlsplit(self.path)
        self.where, self.query = unquote(split.path), parse_qs(split.query)
        self.has_token = bool(self.headers.get("Authorization"))
        with self.hub.lock:
            self.hub.requests.append((self.command, self.where, self.has_token))
            fault = self._fault()
        if fault and fault.drop == "during":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0) // 2))
            return self._drop()
        body = self._read_body()
        if body is None:  # the client is gone: as on a real server, half a request changes nothing
            return self._drop()
        self.body = body
        with self.hub.lock:
            if fault and fault.drop == "before":
                return self._drop()
            try:
                if fault and fault.status:
                    raise _HubError(fault.status, fault.code, fault.message, fault.headers)
                status, value, headers = self._route()
            except _HubError as error:
                status, value = error.status, {"error": error.message}
                headers = {**error.headers, "X-Error-Message": error.message, "X-Error-Code": error.code}
            if fault and fault.drop == "after":
                return self._drop()
            if fault and fault.page:
                value, headers = b"<html>Bad gateway</html>", {"Content-Type": "text/html"}
        self._answer(status, value, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read_body(self) -> bytes | None:
        """The whole body of the request; None where the connection ended before it."""
        try:
            if self.headers.get("Transfer-Encoding", "") != "chunked":
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                return body if len(body) == length else None
            chunks = b""
            while size := int(self.rfile.readline(), 16):
                chunk = self.rfile.read(size)
                if len(chunk) < size:
                    return None
                chunks += chunk
                self.rfile.readline()
            self.rfile.readline()
        except (ConnectionError, ValueError):  # ValueError: the line with a chunk's size is empty
            return None
        return chunks

    def _fault(self) -> Fault | None:
        matching = (f for f in self.hub.faults if f.method == self.command and re.search(f.pattern, self.where))
        fault = next((f for f in matching if f.times > 0), None)
        if fault:
            fault.times -= 1
        return fault

    def _drop(self) -> None:
        self.close_connection = True
        with suppress(OSError):  # the client closed it before
            self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status: int, value: object, headers: dict[str, str]) -> None:
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else raw)

    def _route(self) -> Answer:
        named = r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"
        resolve = r"/((?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)"
        routes: tuple[tuple[str, str, Callable[[], Answer]], ...] = (
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", lambda: (200, {"errors": [], "warnings": []}, {})),
            ("GET", r"/api/whoami-v2", self._whoami),
            ("GET", named + r"/auth-check(?P<write>/write)?", self._auth_check),
            ("POST", named + r"/preupload/(?P<rev>.+)", self._preupload),
            ("POST", named + r"/commit/(?P<rev>.+)", self._commit),
            ("GET", named + r"/tree/(?P<rev>[^/]+)(?P<under>/.*)?", self._tree),
            ("POST", named + r"/paths-info/(?P<rev>.+)", self._paths_info),
            ("GET", named + r"(/revision/(?P<rev>.+))?", self._info),
            ("POST", r"/((?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})(/(?P<part>\d+))?", self._put),
            ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", self._complete),
            ("GET", resolve, self._resolve),
            ("HEAD", resolve, self._resolve),
        )
        for method, pattern, answer in routes:
            if method == self.command and (match := re.fullmatch(pattern, self.where)):
                self.match = match.groupdict()
                return answer()
        raise _HubError(404, message=f"no such endpoint: {self.command} {self.where}")

    def _repo(self, content: bool = True) -> Repo:
        repo = self.hub.repos.get((TYPES[self.match["kind"] or "models"], self.match["id"]))
        if repo is None or (repo.private and not self.has_token):
            raise _HubError(404 if self.has_token else 401, "RepoNotFound", "Repository not found")
        if repo.gated and content:
            raise _HubError(403 if self.has_token else 401, "GatedRepo", "Access to this repository is restricted")
        return repo

    def _at(self, repo: Repo, revision: str | None) -> str:
        sha = repo.head if revision is None or revision == "main" else revision
        if sha not in repo.commits:
            raise _HubError(404, "RevisionNotFound", "Invalid rev id")
        return sha

    def _may_write(self, namespace: str) -> None:
        if not self.has_token:
            raise _HubError(401, message="Invalid username or password.")
        if self.hub.token_role == "read" or {"me": "write", **self.hub.orgs}.get(namespace, "read") == "read":
            raise _HubError(403, message="You don't have the rights to write here")

    def _create(self) -> Answer:
        asked = json.loads(self.body)
        repo_id, kind = f"{asked.get('organization') or 'me'}/{asked['name']}", asked.get("type", "model")
        self._may_write(repo_id.split("/")[0])
        url = {"url": f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"}
        if (kind, repo_id) in self.hub.repos:
            return 409, {**url, "error": "You already created this model repo"}, {}
        repo = self.hub.repos[kind, repo_id] = Repo(private=asked.get("visibility") == "private")
        repo.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return 200, url, {}

    def _whoami(self) -> Answer:
        if not self.has_token:
            raise _HubError(401, message="Invalid username or password.")
        token: dict[str, Any] = {"displayName": "test", "role": self.hub.token_role}
        if self.hub.fine_grained is not None:
            token |= {"role": "fineGrained", "fineGrained": self.hub.fine_grained}
        orgs = [{"name": name, "type": "org", "roleInOrg": role} for name, role in self.hub.orgs.items()]
        return 200, {"name": "me", "type": "user", "orgs": orgs, "auth": {"accessToken": token}}, {}

    def _auth_check(self) -> Answer:
        self._repo()
        if self.match["write"]:
            self._may_write(self.match["id"].split("/")[0])
        return 200, {}, {}

    def _preupload(self) -> Answer:
        self._may_write(self.match["id"].split("/")[0])
        repo = self._repo()
        files = repo.commits[self._at(repo, self.match["rev"])]

        def entry(path: str) -> dict[str, Any]:
            mode, hashed = ("lfs", sha256) if is_lfs(path) else ("regular", git_oid)
            oid = hashed(files[path]) if path in files else None
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        return 200, {"files": [entry(f["path"]) for f in json.loads(self.body)["files"]]}, {}

    def _batch(self) -> Answer:
        self._may_write(self.match["id"].split("/")[0])
        objects = [self._upload_action(o["oid"], o["size"]) for o in json.loads(self.body)["objects"]]
        multipart = any("chunk_size" in o.get("actions", {}).get("upload", {}).get("header", {}) for o in objects)
        return 200, {"transfer": "multipart" if multipart else "basic", "objects": objects}, {}

    def _upload_action(self, oid: str, size: int) -> dict[str, Any]:
        if oid in self.hub.lfs:
            return {"oid": oid, "size": size}
        url, part = f"{self.hub.url}/lfs/{oid}", self.hub.multipart_bytes
        action: dict[str, Any] = {"href": url}
        if part and size > part:
            urls = {str(n + 1): f"{url}/{n + 1}" for n in range(-(-size // part))}
            action = {"href": f"{url}/complete", "header": {"chunk_size": str(part), **urls}}
        return {"oid": oid, "size": size, "actions": {"upload": action}}

    def _put(self) -> Answer:
        if self.match["part"]:
            self.hub.parts[self.match["oid"], int(self.match["part"])] = self.body
        else:
            self.hub.lfs[self.match["oid"]] = self.body
        return 200, {}, {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}

    def _complete(self) -> Answer:
        oid, numbers = self.match["oid"], sorted(p["partNumber"] for p in json.loads(self.body)["parts"])
        self.hub.lfs[oid] = b"".join(self.hub.parts[oid, n] for n in numbers)
        return 200, {}, {}

    def _commit(self) -> Answer:
        self._may_write(self.match["id"].split("/")[0])
        repo = self._repo()
        files = dict(repo.commits[self._at(repo, self.match["rev"])])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise _HubError(404, "EntryNotFound", "A file with this name doesn't exist")
            if self.hub.corrupt & {value.get("path")}:
                files[value["path"]] = files[value["path"]][:-1] + b"\0"
        sha = repo.commit(files)
        return 200, {"commitUrl": f"{self.hub.url}/{self.match['id']}/commit/{sha}", "commitOid": sha}, {}

    def _info(self) -> Answer:
        repo = self._repo(content=False)
        sha = self._at(repo, self.match["rev"])
        facts = {"id": self.match["id"], "sha": sha, "private": repo.private, "gated": "auto" if repo.gated else False}
        files = repo.commits[sha]
        front = re.match(rb"---\n(.*?)\n---\n", files.get("README.md", b""), re.DOTALL)
        card = {"cardData": yaml.safe_load(front[1])} if front else {}
        return 200, {**facts, **card, "siblings": [{"rfilename": path} for path in sorted(files)]}, {}

    def _entries(self) -> dict[str, dict[str, Any]]:
        repo = self._repo()
        entries: dict[str, dict[str, Any]] = {}
        for path, content in repo.commits[self._at(repo, self.match["rev"])].items():
            for parent in list(Path(path).parents)[:-1]:
                name = parent.as_posix()
                entries[name] = {"type": "directory", "path": name, "oid": git_oid(name.encode()), "size": 0}
            entries[path] = {"type": "file", "path": path, "oid": git_oid(content), "size": len(content)}
            if is_lfs(path):
                pointer = f"oid sha256:{sha256(content)}\nsize {len(content)}\n".encode()
                lfs = {"oid": sha256(content), "size": len(content), "pointerSize": len(pointer)}
                entries[path] |= {"oid": git_oid(pointer), "lfs": lfs}
        return entries

    def _tree(self) -> Answer:
        under = (self.match["under"] or "/").strip("/")
        entries = [e for e in self._entries().values() if not under or e["path"].startswith(under + "/")]
        if under and not entries:
            raise _HubError(404, "EntryNotFound", "Entry not found")
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            depth = under.count("/") + 1 if under else 0
            entries = [e for e in entries if e["path"].count("/") == depth]
        return 200, entries, {}

    def _paths_info(self) -> Answer:
        paths = parse_qs(self.body.decode()).get("paths", [])
        entries = self._entries()
        return 200, [entries[p] for p in paths if p in entries], {}

    def _resolve(self) -> Answer:
        repo = self._repo()
        sha = self._at(repo, self.match["rev"])
        content = repo.commits[sha].get(self.match["path"])
        if content is None:
            raise _HubError(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        content = self.hub.served.get(self.match["path"], content)
        etag = sha256(content) if is_lfs(self.match["path"]) else git_oid(content)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return 206, content[first : last + 1], headers
        return 200, content, headers
