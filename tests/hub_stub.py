"""A Hugging Face Hub on the loopback, as far as downloading a repository goes."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0ffee" + "0" * 34
_ERRORS = {"gated": (403, "GatedRepo"), "private": (401, "RepoNotFound"), "absent": (404, "RepoNotFound")}


class HubStub(ThreadingHTTPServer):
    """Serves `repositories`: name -> file name -> content. org/gated, org/private, org/broken answer errors.

    `requests` are the paths that were asked for; of the file named in `breaks_off` only the first bytes are
    sent, once.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.breaks_off = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HubStub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        return

    def do_HEAD(self) -> None:
        self.respond(body=False)

    def do_GET(self) -> None:
        self.respond(body=True)

    def respond(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(path)
        match = re.fullmatch(
            r"(?:/api/models)?/(org/[\w.-]+)(?:/(resolve|revision|tree)/([^/]+))?(?:/(.*))?", path
        )
        repo = match[1] if match else ""
        kind = repo.partition("/")[2]
        if kind == "broken":
            self.send(500, b"oops", body)
        elif match is None or kind in _ERRORS or repo not in self.server.repositories:
            status, code = _ERRORS.get(kind, _ERRORS["absent"])
            self.send(status, b"{}", body, {"X-Error-Code": code, "X-Error-Message": f"{kind} repository"})
        elif match[3] not in (None, COMMIT, "main", "v1"):
            self.send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        elif match[2] == "resolve":
            self.file(repo, match[4], body)
        elif match[2] == "tree":
            self.tree(repo, body)
        else:
            files = [{"rfilename": name} for name in self.server.repositories[repo]]
            info = {
                "id": repo,
                "modelId": repo,
                "sha": COMMIT,
                "siblings": files,
                "tags": [],
                "private": False,
            }
            self.send(200, json.dumps(info).encode(), body)

    def tree(self, repo: str, body: bool) -> None:
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self.server.repositories[repo].items()
        ]
        self.send(200, json.dumps(entries).encode(), body)

    def file(self, repo: str, name: str, body: bool) -> None:
        data = self.server.repositories[repo].get(name)
        if data is None:
            self.send(404, b"{}", body, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {
            "X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes",
        }  # fmt: skip
        status, part = 200, data
        if (wanted := self.headers.get("Range", "")).startswith("bytes="):
            first = int(wanted.removeprefix("bytes=").partition("-")[0])
            self.server.ranges.append(f"{name}:{first}")
            status, part = 206, data[first:]
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        if body and name == self.server.breaks_off:
            self.server.breaks_off = ""
            self.send(status, part, body, headers, stop_after=len(part) // 2)
            self.close_connection = True
            return
        self.send(status, part, body, headers)

    def send(
        self,
        status: int,
        data: bytes,
        body: bool,
        headers: dict[str, str] | None = None,
        stop_after: int = -1,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data if stop_after < 0 else data[:stop_after])
            self.wfile.flush()


@contextmanager
def serving(repositories: dict[str, dict[str, bytes]]) -> Iterator[HubStub]:
    """A running stub."""
    stub = HubStub(repositories)
    thread = threading.Thread(target=stub.serve_forever, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.shutdown()
        stub.server_close()
        thread.join()
