"""A minute of ``make torture``, and that it sees what it is there to see."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import hostile
import pytest
import tiny_models
import torture
from memory_caps import capped
from places import SUPPORT

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")


def test_a_server_under_hostile_clients(demo_gguf: Path) -> None:
    with capped(torture.LIMIT_BYTES) as group:
        report = torture.Torture(demo_gguf, group, 1, tuple(hostile.ATTACKS)).run(50, 25)
    assert report["problems"] == [], report
    assert report["oom_kills"] == 0
    assert report["outcomes"]["good answers"] > 0
    assert any(what.startswith("ended by") for what in report["outcomes"])


FORKS_PLANTED = """
import sys
import forking_server
if sys.argv[2] == "unguarded":
    forking_server.refused = lambda call: False
if sys.argv[2] == "hangs":
    forking_server.CHILD_SECONDS = 0.5
    forking_server.refused = lambda call: __import__("time").sleep(1000)
print(*forking_server.attack(sys.argv[1], 0.5), sep="\\n")
"""


@pytest.mark.parametrize(
    ("planted", "said"),
    [("nothing", ""), ("unguarded", "was not refused"), ("hangs", "a child hung")],
)
def test_forks_beside_a_server_that_answers(planted: str, said: str) -> None:
    path = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", FORKS_PLANTED, str(tiny_models.path("qwen3moe")), planted],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (said in done.stdout) if said else (done.stdout.strip() == ""), done.stdout


@contextlib.contextmanager
def answering(status: int, content: bytes, kind: str = "application/json") -> Iterator[str]:
    """A server that answers everything so."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def error(message: str) -> bytes:
    return json.dumps({"error": {"message": message}}).encode()


@pytest.mark.parametrize(
    ("status", "content", "kind"),
    [
        (500, error("the server failed"), "application/json"),
        (400, error("two\nlines"), "application/json"),
        (400, error(""), "application/json"),
        (200, b'data: {"choices": []}\n\n', "text/event-stream"),
    ],
)
def test_it_sees_a_wrong_answer(status: int, content: bytes, kind: str) -> None:
    with answering(status, content, kind) as url, pytest.raises(hostile.WrongAnswerError):
        hostile.ask_odd_fields(random.Random(1), url)


def test_it_sees_a_server_that_is_gone() -> None:
    with answering(400, error("no")) as url:
        assert hostile.ask_odd_fields(random.Random(1), url) == "400"
    with pytest.raises(hostile.httpx.ConnectError):
        hostile.ask_odd_fields(random.Random(1), url)


@pytest.mark.parametrize(
    ("script", "seen"),
    [
        ("echo Traceback >&2; echo http://x; cat", "a traceback"),
        ("trap 'exit 3' TERM; echo http://x; while :; do sleep 0.1; done", "ended it with 3"),
        ("trap '' TERM; echo http://x; while :; do sleep 0.1; done", "it had to be killed"),
    ],
)
def test_it_sees_an_end_that_is_none(script: str, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if seen == "it had to be killed":
        monkeypatch.setattr(torture, "END_SECONDS", 1.0)
    started = subprocess.Popen
    monkeypatch.setattr(
        torture.subprocess,
        "Popen",
        lambda _command, **options: started(["/bin/sh", "-c", f"exec 0</dev/null; {script}"], **options),
    )
    server = torture.Server(Path("x"), None)
    assert server.url == "http://x"
    assert seen in (server.end(signal.SIGTERM) or "")
