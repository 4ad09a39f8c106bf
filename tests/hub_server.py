"""A Hub on loopback: as much of its HTTP interface as huggingface_hub uses to make, fill and read repositories.

Weights go by Git LFS: a batch request, a PUT, and their hash in the commit. Xet, by which the client sends them where
hf_xet is installed and not disabled (HF_HUB_DISABLE_XET), is not spoken.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_owner"


class Hub:
    """Repositories by id, each with its revisions.

    `fail_commits` connections break in the middle of a commit, `fail_weights` in the middle of a large file.
    """

    def __init__(self) -> None:
        self.revisions: dict[str, dict[str, dict[str, bytes]]] = {}  # repository → commit → file → content
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}  # SHA-256 → content
        self.fail_commits = 0
        self.fail_weights = 0
        self.requests: list[str] = []

    def head(self, repo: str) -> str:
        return list(self.revisions[repo])[-1]

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        before = self.revisions[repo][self.head(repo)] if self.revisions[repo] else {}
        commit = hashlib.sha1(f"{repo} {len(self.revisions[repo])}".encode()).hexdigest()
        self.revisions[repo][commit] = {**before, **files}
        return commit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        self.hub.requests.append(f"POST {self.path}")
        body = self._body()
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path.endswith(".git/info/lfs/objects/batch"):
            return self._answer({"transfer": "basic", "objects": [*map(self._place, json.loads(body)["objects"])]})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path.split("?")[0])
        assert found is not None, self.path
        if found[2] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = ("lfs" if name.endswith(".safetensors") else "regular" for name in names)
            files = [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in zip(names, modes, strict=True)]
            return self._answer({"files": files})
        if self.hub.fail_commits:
            self.hub.fail_commits -= 1
            self.close_connection = True
            return None
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        large = [line["value"] for line in lines if line["key"] == "lfsFile"]
        files |= {value["path"]: self.hub.large[value["oid"]] for value in large}
        commit = self.hub.commit(found[1], files)
        url = f"{self._address}/{found[1]}/commit/{commit}"
        return self._answer({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def do_PUT(self) -> None:
        self.hub.requests.append(f"PUT {self.path}")
        body = self._body()
        if self.hub.fail_weights:
            self.hub.fail_weights -= 1
            self.close_connection = True
            return None
        assert hashlib.sha256(body).hexdigest() == self.path.removeprefix("/lfs/"), self.path
        self.hub.large[self.path.removeprefix("/lfs/")] = body
        return self._answer({})

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        if path == "/api/whoami-v2":
            return self._answer({"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}})
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo = (info or file or [None, None])[1]
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo not in self.hub.revisions or (repo in self.hub.private and not allowed):
            return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        revision = (info or file)[2] or "main"
        commit = self.hub.head(repo) if revision == "main" else revision
        if commit not in self.hub.revisions[repo]:
            return self._answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        files = self.hub.revisions[repo][commit]
        if info:
            siblings = [{"rfilename": name} for name in files]
            private = repo in self.hub.private
            return self._answer({"id": repo, "sha": commit, "private": private, "siblings": siblings, "tags": []})
        if file[3] not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            return self._answer({"error": "Entry not found"}, 404, headers)
        content = files[file[3]]
        etag = hashlib.sha1(content).hexdigest()
        return self._answer(content, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    do_HEAD = do_GET

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Return where a large object is to be put, or that it is there already."""
        upload = {"upload": {"href": f"{self._address}/lfs/{wanted['oid']}"}}
        return {**wanted, **({} if wanted["oid"] in self.hub.large else {"actions": upload})}

    def _create(self, wanted: dict[str, Any]) -> None:
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = {"url": f"{self._address}/{repo}"}
        if repo in self.hub.revisions:
            return self._answer({"error": "You already created this model repo", **url}, 409)
        self.hub.revisions[repo] = {}
        self.hub.commit(repo, {".gitattributes": b""})
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.hub.private.add(repo)
        return self._answer({**url, "id": repo})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    @property
    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def hub_server() -> Iterator[tuple[Hub, str]]:
    """Run a Hub; yields it and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
