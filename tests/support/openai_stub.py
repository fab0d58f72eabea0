"""A server with OpenAI's API on the loopback, scripted: what it lists, streams and refuses."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# how long a client's going may take to be heard of, far beyond what a busy machine needs
SECONDS = 300


@dataclass
class OpenAiStub:
    """What the server does, and what it was asked: bodies and keys."""

    url: str = ""
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "m", "owned_by": "x"}])
    words: list[str] = field(default_factory=lambda: ["Blue ", "light."])
    key: str = ""
    usage: list[dict[str, Any]] = field(default_factory=list)  # by chunk, the last for the end
    deltas: list[dict[str, Any]] = field(default_factory=list)  # in place of words
    finish: str | None = "stop"
    fails: str = ""  # an error event in place of the end
    streams: bool = True
    hangs: bool = False  # behind the words
    raw: bytes | None = None  # the answer to a question, whatever it is
    status: int = 200
    experts: dict[str, Any] | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)  # a client has gone


@contextlib.contextmanager
def serving(stub: OpenAiStub) -> Iterator[OpenAiStub]:
    """Run it meanwhile."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

        def _refused(self) -> bool:
            stub.keys.append(self.headers.get("Authorization"))
            if stub.key and stub.keys[-1] != f"Bearer {stub.key}":
                self._json({"error": {"message": "no key, or a wrong one"}}, 401)
                return True
            return False

        def _json(self, said: Any, status: int = 200) -> None:
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            if self._refused():
                return
            if self.path.endswith("/v1/models"):
                self._json(stub.raw if stub.raw is not None else {"object": "list", "data": stub.models})
            elif self.path.startswith("/v1/experts") and stub.experts is not None:
                if "stream" not in self.path:
                    self._json(stub.experts)
                    return
                self._begin_events()
                with contextlib.suppress(OSError):
                    self._event(stub.experts)
                    self.rfile.read(1)  # until the client goes
            else:
                self._json({"error": {"message": "nothing is here"}}, 404)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.bodies.append(body)
            if self._refused():
                return
            if stub.status != 200:
                self._json({"error": {"message": "the queue is\nfull"}}, stub.status)
                return
            if not stub.streams:
                said = {"role": "assistant", "content": "".join(stub.words)}
                choice = {"index": 0, "message": said, "finish_reason": stub.finish}
                self._json({"choices": [choice], "usage": {"completion_tokens": 2}})
                return
            self._begin_events()
            try:
                self._answer()
            except OSError:
                stub.left.set()

        def _begin_events(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.end_headers()

        def _event(self, said: Any) -> None:
            self.wfile.write(f": a comment\r\ndata: {json.dumps(said)}\r\n\r\n".encode())
            self.wfile.flush()

        def _answer(self) -> None:
            deltas = stub.deltas or [{"content": word} for word in stub.words]
            for at, delta in enumerate([{"role": "assistant"}, *deltas]):
                chunk: dict[str, Any] = {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
                if 0 < at <= len(stub.usage):
                    chunk["usage"] = stub.usage[at - 1]
                self._event(chunk)
            if stub.hangs:
                if not self.rfile.read(1):
                    stub.left.set()
                return
            if stub.fails:
                self._event({"error": {"message": stub.fails}})
                return
            if stub.finish is None:
                return
            self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": stub.finish}]})
            if stub.usage:
                self._event({"choices": [], "usage": stub.usage[-1]})
            self.wfile.write(b"data: [DONE]\n\n")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
