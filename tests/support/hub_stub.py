"""A stand-in for the Hugging Face Hub on the loopback, as far as reading repositories goes."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mobile_gguf.hub.cache import repository_folder

COMMIT = "c0ffee" + "0" * 34
LARGE = bytes(range(256)) * 20_000  # of org/large, which is no GGUF
_ERRORS = {"gated": (403, "GatedRepo"), "private": (401, "RepoNotFound"), "absent": (404, "RepoNotFound")}
_LFS = (".gguf", ".safetensors", ".bin")


def etag_of(name: str, data: bytes) -> str:
    """sha256 of what LFS stores, git's sha1 of the rest: by these the Hub knows a file."""
    if name.endswith(_LFS):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubStub(ThreadingHTTPServer):
    """Serves ``repositories``: name -> file name -> content. org/gated, org/private, org/broken answer
    errors.

    Files that LFS would store are behind a redirect to another origin, as a CDN is. What a test may set:
    ``breaks_off``: of this file only ``break_after`` bytes are sent (default: half), ``breaks`` times (once);
    ``damaged``: these files are sent with another content; ``ranges_ignored``; ``refusals``: (status,
    headers) that the next requests get, whatever they ask for; ``commit`` of all repositories;
    ``holds_at``: after so many bytes in all nothing is sent until it is None again.
    Kept: ``requests`` (paths), ``ranges`` ("NAME:FIRST"), ``tokens`` (Authorization headers of the Hub
    itself) and ``cdn_tokens`` (of the other origin).
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.commit = COMMIT
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.tokens: list[str | None] = []
        self.cdn_tokens: list[str | None] = []
        self.breaks_off = ""
        self.break_after = -1
        self.breaks = 1
        self.damaged: dict[str, bytes] = {}
        self.ranges_ignored = False
        self.refusals: list[tuple[int, dict[str, str]]] = []
        self.holds_at: int | None = None
        self.sent_bytes = 0

    def is_held(self) -> bool:
        """Whether no more may be sent for now."""
        limit = self.holds_at
        return limit is not None and self.sent_bytes >= limit

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
        path = unquote(self.path.partition("?")[0])
        self.server.requests.append(path)
        if self.server.refusals:
            status, headers = self.server.refusals.pop(0)
            return self.send(status, b"{}", body, headers)
        match = re.fullmatch(
            r"(/cdn|/api/models)?/(org/[\w.-]+)(?:/(resolve|revision|tree)/([^/]+))?(?:/(.*))?", path
        )
        token = self.headers.get("Authorization")
        cdn = match is not None and match[1] == "/cdn"
        (self.server.cdn_tokens if cdn else self.server.tokens).append(token)
        repo = match[2] if match else ""
        kind = repo.partition("/")[2]
        if kind == "broken":
            self.send(500, b"oops", body)
        elif match is None or kind in _ERRORS or repo not in self.server.repositories:
            status, code = _ERRORS.get(kind, _ERRORS["absent"])
            self.send(status, b"{}", body, {"X-Error-Code": code, "X-Error-Message": f"{kind} repository"})
        elif match[4] not in (None, self.server.commit, "main", "v1"):
            self.send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        elif match[3] == "resolve":
            self.file(repo, match[5], body, cdn)
        elif match[3] == "tree":
            self.send(
                200, json.dumps([self.described(repo, name) for name in self.files(repo)]).encode(), body
            )
        else:
            self.send(200, json.dumps(self.info(repo)).encode(), body)

    def files(self, repo: str) -> dict[str, bytes]:
        return self.server.repositories[repo]

    def described(self, repo: str, name: str) -> dict[str, Any]:
        data = self.files(repo)[name]
        entry = {"type": "file", "path": name, "size": len(data), "oid": etag_of("", data)}
        if name.endswith(_LFS):
            entry["lfs"] = {"oid": etag_of(name, data), "size": len(data), "pointerSize": 134}
        return entry

    def info(self, repo: str) -> dict[str, Any]:
        siblings = []
        for name in self.files(repo):
            entry = self.described(repo, name)
            sibling = {"rfilename": name, "size": entry["size"], "blobId": entry["oid"]}
            if "lfs" in entry:
                sibling["lfs"] = {**entry["lfs"], "sha256": entry["lfs"]["oid"]}
            siblings.append(sibling)
        names = {"id": repo, "modelId": repo, "sha": self.server.commit}
        return {**names, "siblings": siblings, "tags": [], "private": False}

    def file(self, repo: str, name: str, body: bool, cdn: bool) -> None:
        data = self.files(repo).get(name)
        if data is None:
            self.send(404, b"{}", body, {"X-Error-Code": "EntryNotFound"})
            return
        etag = etag_of(name, data)
        headers = {"X-Repo-Commit": self.server.commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if name.endswith(_LFS) and not cdn:
            place = f"http://localhost:{self.server.server_port}/cdn/{repo}/resolve/main/{name}"
            linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data)), "Location": place}
            return self.send(302, b"", body, headers | linked)
        data = self.server.damaged.get(name, data)
        status, part = 200, data
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and not self.server.ranges_ignored:
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            if first > last:
                return self.send(416, b"", body, {"Content-Range": f"bytes */{len(data)}"})
            self.server.ranges.append(f"{name}:{first}")
            status, part = 206, data[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        if body and name == self.server.breaks_off and self.server.breaks:
            self.server.breaks -= 1
            after = self.server.break_after
            self.send(status, part, body, headers, stop_after=after if after >= 0 else len(part) // 2)
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
        if not body:
            return
        data = data if stop_after < 0 else data[:stop_after]
        for start in range(0, len(data), 1 << 16) or (0,):
            part = data[start : start + (1 << 16)]
            while self.server.is_held():
                time.sleep(0.01)
            try:
                self.wfile.write(part)
                self.wfile.flush()
            except OSError:  # the client has gone
                self.close_connection = True
                return
            self.server.sent_bytes += len(part)


@contextmanager
def serving(repositories: dict[str, dict[str, bytes]]) -> Iterator[HubStub]:
    """A running stub."""
    stub = HubStub(repositories)
    thread = threading.Thread(target=stub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.shutdown()
        stub.server_close()
        thread.join()


def blob(data: bytes, repo: str = "org/large") -> Path:
    """Where the cache keeps this content."""
    return repository_folder(repo) / "blobs" / etag_of("x.gguf", data)


def partial(data: bytes) -> Path:
    """Where what came of it until now is kept."""
    return blob(data).with_name(blob(data).name + ".incomplete")
