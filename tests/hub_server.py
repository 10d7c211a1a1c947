"""A server on this machine that speaks as much of the Hub's protocol as huggingface_hub needs, for tests.

Repositories, commits and large files are kept in memory. A test can make the next requests of some kind fail: with a
status, with a connection that is cut while a body is on its way, or cut after the work was done. `python
tests/hub_server.py` serves until it is interrupted, for trying things by hand.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

import neva_hf.hub

TOKEN, USER = "hf_tests", "tester"
LARGE = (".safetensors", ".bin", ".png")

_KIND = r"(?P<kind>models|datasets|spaces)"
_ID = r"(?P<id>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, re.Pattern[str], str]] = []


def route(method: str, path: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers what answers to requests of a method and a path."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        _ROUTES.append((method, re.compile(path), function.__name__))
        return function

    return register


@dataclass(frozen=True)
class Stored:
    """A file of a commit."""

    content: bytes
    large: bool = False

    @property
    def oid(self) -> str:
        """Git's name of it, or the SHA-256 of a large file."""
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """What a listing says about it."""
        lfs = {"lfs": {"oid": self.oid, "size": len(self.content), "pointerSize": 130}} if self.large else {}
        return {"type": "file", "path": path, "size": len(self.content), "oid": self.oid[:40], **lfs}


@dataclass
class Repository:
    """Commits by their hashes, and what branches point at."""

    private: bool = False
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    sdk: str | None = None

    def add(self, branch: str, files: dict[str, Stored]) -> str:
        """One more commit on a branch."""
        told = json.dumps([len(self.commits), sorted((path, file.oid) for path, file in files.items())])
        commit = hashlib.sha1(told.encode()).hexdigest()
        self.commits[commit] = files
        self.refs[branch] = commit
        return commit


@dataclass
class Fault:
    """What goes wrong with requests of a kind: `status`, or a cut connection (`"in"` the body, or `"after"` the work)."""

    method: str
    path: str
    status: int | None = None
    cut: str | None = None
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class Hub:
    """The state of the server."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.unknown: list[tuple[str, str]] = []
        self.before: Callable[[str, str], None] | None = None
        self.lock = threading.RLock()
        self.url = ""

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """What a revision holds."""
        repository = self.repositories[kind, repo_id]
        commit = repository.refs.get(revision, revision)
        return {path: file.content for path, file in repository.commits[commit].items()}

    def commit(self, repo_id: str, files: dict[str, bytes | None], branch: str = "main") -> str:
        """A commit that somebody else makes; `None` removes a file."""
        repository = self.repositories["models", repo_id]
        held = dict(repository.commits[repository.refs[branch]])
        for path, content in files.items():
            if content is None:
                held.pop(path)
            else:
                held[path] = Stored(content, path.endswith(LARGE))
        return repository.add(branch, held)

    def count(self, method: str, path: str) -> int:
        """How many requests of a kind came."""
        return sum(one == method and re.search(path, other) is not None for one, other in self.requests)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_any(self) -> None:
        path = urlsplit(self.path).path
        self.query = parse_qs(urlsplit(self.path).query)
        self.hub.requests.append((self.command, path))
        if self.hub.before is not None:
            self.hub.before(self.command, path)
        fault = self._fault(path)
        if fault is not None and fault.cut == "in":
            self.rfile.read(min(100, int(self.headers.get("Content-Length") or 0)))
            return self._hang_up()
        self.body = self._read()
        if fault is not None and fault.status is not None:
            return self.answer(fault.status, {"error": f"made to fail with {fault.status}"}, **fault.headers)
        self.muted = fault is not None and fault.cut == "after"
        for method, pattern, name in _ROUTES:
            found = pattern.fullmatch(path)
            if found is not None and self.command in method.split("|"):
                with self.hub.lock:
                    getattr(self, name)(**{key: unquote(part or "") for key, part in found.groupdict().items()})
                return self._hang_up() if self.muted else None
        self.hub.unknown.append((self.command, path))
        return self.answer(404, {"error": f"not implemented: {self.command} {path}"})

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_any

    def _fault(self, path: str) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and fault.method == self.command and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        if getattr(self, "muted", False):
            return
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str, words: str, **headers: str) -> None:
        self.answer(status, {"error": words}, X_Error_Code=code, X_Error_Message=words, **headers)

    @property
    def known(self) -> bool:
        """Whether the request brings the token."""
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def may_write(self) -> bool:
        if not self.known:
            self.answer(401, {"error": "Invalid username or password."})
        return self.known

    def repository(self, kind: str, id: str) -> Repository | None:
        found = self.hub.repositories.get((kind or "models", id))
        if found is None or (found.private and not self.known):
            self.refuse(404 if self.known else 401, "RepoNotFound", "Repository not found")
            return None
        return found

    def commit_of(self, repository: Repository, revision: str) -> str | None:
        commit = repository.refs.get(revision) or (revision if revision in repository.commits else None)
        if commit is None:
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        return commit

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        told = {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        self.answer(200 if self.known else 401, told if self.known else {"error": "Invalid credentials"})

    @route("GET", "/api/agent-harnesses")
    def nothing(self) -> None:
        """What newer clients ask about themselves."""
        self.answer(404, {"error": "not here"})

    @route("POST", "/api/validate-yaml")
    def validate(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        asked = json.loads(self.body)
        kind, id = f"{asked.get('type', 'model')}s", f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{id}"
        if not self.may_write():
            return
        if (kind, id) in self.hub.repositories:
            return self.answer(409, {"error": "You already created this repo", "url": url})
        if id.split("/")[0] != USER:
            return self.answer(403, {"error": "You have no rights to create a repo under this namespace"})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        made = self.hub.repositories[kind, id] = Repository(private, sdk=asked.get("sdk"))
        made.add("main", {".gitattributes": Stored(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")})
        return self.answer(200, {"url": url, "name": id})

    @route("POST", f"/api/{_KIND}/{_ID}/branch/(?P<branch>.+)")
    def branch(self, kind: str, id: str, branch: str) -> None:
        found = self.repository(kind, id) if self.may_write() else None
        if found is None:
            return None
        if branch in found.refs:
            return self.answer(409, {"error": "Reference already exists"})
        found.refs[branch] = found.refs["main"]
        return self.answer(201, {})

    @route("POST", f"/api/{_KIND}/{_ID}/preupload/(?P<revision>.+)")
    def preupload(self, kind: str, id: str, revision: str) -> None:
        found = self.repository(kind, id) if self.may_write() else None
        commit = None if found is None else self.commit_of(found, revision)
        if found is None or commit is None:
            return
        told = []
        for file in json.loads(self.body)["files"]:
            old = found.commits[commit].get(file["path"])
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            told.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": old.oid if old else None}
            )
        self.answer(200, {"files": told})

    @route("POST", r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
    def batch(self, kind: str, id: str) -> None:
        told = []
        for one in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/large/{one['oid']}"}}
            told.append({**one, **({} if one["oid"] in self.hub.large else {"actions": upload})})
        self.answer(200, {"transfer": "basic", "objects": told}, Content_Type="application/vnd.git-lfs+json")

    @route("PUT", "/large/(?P<oid>[0-9a-f]{64})")
    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer(400, {"error": "the content has another SHA-256"})
        self.hub.large[oid] = self.body
        return self.answer(200)

    @route("POST", f"/api/{_KIND}/{_ID}/commit/(?P<revision>.+)")
    def commit(self, kind: str, id: str, revision: str) -> None:
        found = self.repository(kind, id) if self.may_write() else None
        commit = None if found is None else self.commit_of(found, revision)
        if found is None or commit is None:
            return None
        files = dict(found.commits[commit])
        for line in self.body.splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header" and value.get("parentCommit") not in (None, commit):
                return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            if key == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]))
            elif key == "lfsFile" and value["oid"] not in self.hub.large:
                return self.answer(400, {"error": "LFS pointer pointed to a file that does not exist"})
            elif key == "lfsFile":
                files[value["path"]] = Stored(self.hub.large[value["oid"]], large=True)
            elif key == "deletedFile":
                files.pop(value["path"])
        request = "create_pr" in self.query
        number = 1 + sum(name.startswith("refs/pr/") for name in found.refs)
        made = found.add(f"refs/pr/{number}" if request else revision, files)
        url = f"{self.hub.url}/{id}"
        opened = {"pullRequestUrl": f"{url}/discussions/{number}"} if request else {}
        return self.answer(200, {"success": True, "commitOid": made, "commitUrl": f"{url}/commit/{made}", **opened})

    @route("GET", f"/api/{_KIND}/{_ID}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?")
    def tree(self, kind: str, id: str, revision: str, path: str) -> None:
        found = self.repository(kind, id)
        commit = None if found is None else self.commit_of(found, revision)
        if found is not None and commit is not None:
            self.answer(
                200, [file.entry(name) for name, file in found.commits[commit].items() if name.startswith(path)]
            )

    @route("GET", f"/api/{_KIND}/{_ID}(?:/revision/(?P<revision>.+))?")
    def info(self, kind: str, id: str, revision: str) -> None:
        found = self.repository(kind, id)
        commit = None if found is None else self.commit_of(found, revision or "main")
        if found is None or commit is None:
            return
        files = [{"rfilename": path} for path in sorted(found.commits[commit])]
        told = {"id": id, "sha": commit, "private": found.private, "siblings": files, "tags": [], "sdk": found.sdk}
        self.answer(200, {**told, "modelId": id, "downloads": 0, "likes": 0, "gated": found.gated, "disabled": False})

    @route("GET|HEAD", r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, kind: str, id: str, revision: str, path: str) -> None:
        found = self.repository(kind, id)
        if found is not None and found.gated:
            return self.refuse(403, "GatedRepo", "Access to this repository is restricted")
        commit = None if found is None else self.commit_of(found, revision)
        if found is None or commit is None:
            return None
        file = found.commits[commit].get(path)
        if file is None:
            return self.refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        headers = {"X_Repo_Commit": commit, "ETag": f'"{file.oid}"', "Content_Type": "application/octet-stream"}
        if file.large:
            headers |= {"X_Linked_ETag": f'"{file.oid}"', "X_Linked_Size": str(len(file.content))}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return self.answer(206 if start else 200, file.content[int(start[1]) if start else 0 :], **headers)


@contextmanager
def serve(port: int = 0) -> Iterator[Hub]:
    """Runs a Hub on this machine while the context is open."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def a_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A Hub of its own that huggingface_hub talks to in this process, with its token; and nobody waits between tries."""
    with serve() as running:
        resolve = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(neva_hf.hub, "_WAIT_SECONDS", 0.0)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
        yield running
        assert running.unknown == []


if __name__ == "__main__":
    with serve(8765) as running:
        print(f"export HF_ENDPOINT={running.url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1")
        threading.Event().wait()
