"""The server as a command: what it cannot serve, a port that is taken, signals."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
openai = pytest.importorskip("openai", reason="pip install 'mobile-gguf[dev]'")
pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")
from server_harness import SECONDS, get, until  # noqa: E402

from mobile_gguf.engine.warm_files import remembered  # noqa: E402
from mobile_gguf.files.stamps import stamps  # noqa: E402

USER = [{"role": "user", "content": "Tell me about a person called Ann."}]
ENDLESS = {"grammar": "root ::= [a-z ] root"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_cuts_a_running_stream_cleanly(demo_gguf, command, serve, number, code):
    served = serve(demo_gguf, "--ram-budget", "40%", "--grace", "0.1", "-c", "8192", MOBILE_GGUF_API_KEY="k")
    stream = served.client("k").chat.completions.create(
        model=demo_gguf.stem, messages=USER, stream=True, extra_body=ENDLESS
    )
    next(iter(stream))
    served.process.send_signal(number)
    with pytest.raises(openai.APIError, match="the answer was cut"):
        list(stream)
    _, error = served.process.communicate(timeout=SECONDS)
    assert served.process.returncode == code
    assert "Traceback" not in error
    assert remembered(demo_gguf, stamps([demo_gguf])), "what was used was not remembered for the next start"


def test_who_has_not_sent_a_whole_body_is_told_that_the_server_ends(demo_gguf, serve):
    served = serve(demo_gguf, "--ram-budget", "40%", "-c", "512")
    address = httpx.URL(served.url)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.host}\r\nContent-Length: 99\r\n\r\n"
    with socket.create_connection((address.host, address.port), timeout=SECONDS) as client:
        client.sendall(head.encode() + b'{"prompt":')
        assert get(f"{served.url}/health").status_code == 200  # it came after the other
        code, error = served.end()
        said = client.recv(4096)
    assert code == 0
    assert "Traceback" not in error
    assert said.startswith(b"HTTP/1.1 503 ")
    assert b"the server shuts down, and the body was not complete" in said


def test_a_second_ctrl_c_cuts_without_a_traceback(demo_gguf, command, serve):
    served = serve(demo_gguf, "--ram-budget", "40%", "--grace", "200", "-c", "8192")
    stream = served.client().chat.completions.create(
        model=demo_gguf.stem, messages=USER, stream=True, extra_body=ENDLESS
    )
    next(iter(stream))
    served.process.send_signal(signal.SIGINT)
    until(lambda: not takes_requests(served.url))
    served.process.send_signal(signal.SIGINT)
    with contextlib.suppress(openai.APIError, httpx.HTTPError):
        list(stream)
    _, error = served.process.communicate(timeout=SECONDS)
    assert served.process.returncode == 130
    assert "stopping: the running answer has 200 s to end; Ctrl-C again cuts it" in error
    assert "Traceback" not in error


def takes_requests(url: str) -> bool:
    try:
        return get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def refused(*flags: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "mobile_gguf", "serve", "nothing.gguf", *flags],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        ((), 3, "nothing.gguf"),
        (("--port", "70000"), 2, "argument --port: port is 70000: it must be at most 65535"),
        (("--queue", "-1"), 2, "argument --queue: queue is -1: it must be at least 0"),
        (("--max-request", "40%"), 2, "--max-request"),
        (("--api-key", "a b"), 2, "API key"),
        (("--api-key-file", "/nonexistent"), 2, "cannot read /nonexistent"),
        (("--api-key", "a", "--api-key-file", "b"), 2, "give --api-key or --api-key-file, not both"),
    ],
)
def test_what_cannot_be_served_is_one_line(flags, code, text):
    got, error = refused(*flags)
    assert got == code, error
    assert text in error
    assert len(error.strip().splitlines()) == 1


def test_a_port_that_is_taken_is_one_line(command, demo_gguf):
    port = command.url.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "mobile_gguf", "serve", str(demo_gguf), "--port", port, "--ram-budget", "40%"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
