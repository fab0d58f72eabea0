"""What clients may take of a server: connections, headers, bytes, and a model that does not come back."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_backend import FakeBackend, fake_info, scripted

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
from server_harness import SECONDS, Gate, Running, get, post, running, until

from mobile_gguf.api import aio
from mobile_gguf.errors import MobileError
from mobile_gguf.server import answering, guard
from mobile_gguf.server.run import bind, start_listening

USER = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}
CHILD = Path(__file__).parents[1] / "support" / "stuck_server_child.py"


def connected(url: str) -> socket.socket:
    host, _, port = url.rpartition("/")[2].partition(":")
    made = socket.create_connection((host, int(port)), timeout=SECONDS)
    return made


def all_of(connection: socket.socket) -> bytes:
    """What a server says until it closes the connection."""
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


# connections


# where this test is put off for longer than the first, what it sends in time comes late, too
HEADER_SECONDS = (0.2, 2.0, 20.0)


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "])
def test_a_connection_without_whole_headers_is_closed(fake_model: Any, sent: bytes) -> None:
    with running(fake_model(), header_timeout=HEADER_SECONDS[0]) as server:
        with connected(server.url) as connection:
            with contextlib.suppress(OSError):  # closed already
                connection.sendall(sent)
            assert b'"code": "timeout"' in all_of(connection)
        until(lambda: is_well(server))


def is_well(server: Running) -> bool:
    try:
        return get(f"{server.url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_headers_that_drip_after_an_answer_are_no_reason_to_wait(fake_model: Any) -> None:
    found: list[bytes] = []
    for seconds in HEADER_SECONDS:
        with running(fake_model(), header_timeout=seconds) as server, connected(server.url) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /he")
            found.append(all_of(connection))
        if found[-1].startswith(b"HTTP/1.1 200"):
            break
    assert found[-1].startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 408" in found[-1]


def test_many_idle_connections_keep_nobody_out(fake_model: Any) -> None:
    with running(fake_model(FakeBackend(scripted("ok"))), max_connections=5) as server:
        idle = [connected(server.url) for _ in range(20)]
        assert server.chat().json()["choices"][0]["message"]["content"] == "ok"
        for connection in idle:
            connection.close()


def test_too_many_answers_at_once_are_refused(fake_model: Any) -> None:
    gate = Gate()
    backend = FakeBackend(scripted("ok"))
    backend.on_evaluate = gate
    with running(fake_model(backend), max_connections=2) as server, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(server.chat) for _ in range(2)]
        until(lambda: server.serving.worker.is_busy and server.serving.worker.n_waiting == 1)
        with connected(server.url) as connection:
            assert b'"code": "connections_full"' in all_of(connection)
        gate.open()
        assert [one.result().status_code for one in asked] == [200, 200]


def test_a_client_that_never_reads_is_dropped(fake_model: Any) -> None:
    backend = FakeBackend(scripted("x", end=False), n_ctx=1 << 20)
    model = fake_model(backend)
    model.n_ctx = 1 << 20
    body = json.dumps({"messages": USER, "stream": True, "max_tokens": 1 << 19}).encode()
    with running(model, send_timeout=0.3) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(connected(server.url).getpeername())
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        until(lambda: backend.n_evaluations)
        until(lambda: not server.serving.worker.is_busy)
        connection.close()


def test_who_waits_in_line_for_a_stream_gets_its_headers(
    fake_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "HEADERS_SECONDS", 0.05)
    monkeypatch.setattr(answering, "PING_SECONDS", 0.05)
    gate = Gate()
    backend = FakeBackend(scripted("ok"))
    backend.on_evaluate = gate
    body = {"messages": USER, "stream": True}
    with running(fake_model(backend)) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.chat)
        until(lambda: server.serving.worker.is_busy)
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=SECONDS) as answer:
            assert answer.status_code == 200
            lines = filter(None, answer.iter_lines())
            told = [next(lines), next(lines)]
            waiting = server.serving.worker.n_waiting
            gate.open()
            assert told[0] == ": place 1"
            assert told[1].startswith(": ping")
            assert waiting == 1
            assert list(lines)[-1] == "data: [DONE]"
        assert first.result().status_code == 200
        with_error = {"messages": [{"role": "tool", "content": "x"}], "stream": True, "tools": None}
        assert server.post("/v1/chat/completions", with_error).status_code == 200


# bodies


def test_a_compressed_body_is_a_415(fake_model: Any) -> None:
    with running(fake_model()) as server:
        headers = JSON | {"content-encoding": "gzip"}
        answer = post(f"{server.url}/v1/chat/completions", content=b"\x1f\x8b", headers=headers)
        assert answer.status_code == 415
        assert "Content-Encoding" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Host": "evil.example"}, b"403"), ({}, b"401"), ({"Authorization": "Bearer key"}, b"413")],
)
def test_a_client_that_sends_all_before_it_reads_is_told_why(
    fake_model: Any, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], status: bytes
) -> None:
    """More than the buffers between the two hold: a connection closed on it would be reset instead."""
    monkeypatch.setattr(guard, "DRAIN_SECONDS", SECONDS)
    n_bytes = 24 << 20
    lines = {
        "Host": "localhost",
        "Content-Length": str(n_bytes),
        "Content-Type": "application/json",
    } | headers
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    with running(fake_model(), hosts=("localhost",), api_key="key") as server:
        with connected(server.url) as connection:
            connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode())
            for _ in range(n_bytes >> 20):
                connection.sendall(b"x" * (1 << 20))
            assert all_of(connection).split(b" ")[1] == status
        # what asks first is told at once, and what is far too large
        for more in ({"Expect": "100-continue"}, {"Content-Length": str(1 << 40)}):
            with connected(server.url) as connection:
                words = "".join(f"{name}: {value}\r\n" for name, value in (lines | more).items())
                connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{words}\r\n".encode())
                assert all_of(connection).split(b" ")[1] == status


@pytest.mark.parametrize("value", ["[]", "{}", "1"])
def test_a_body_of_many_values_is_refused_before_it_is_read(
    fake_model: Any, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setattr(guard, "MAX_VALUES", 1000)
    many = f'{{"messages": [{",".join([value] * 1001)}]}}'.encode()
    with running(fake_model(FakeBackend(scripted("ok")), info=fake_info(n_ctx_train=1 << 14))) as server:
        answer = post(f"{server.url}/v1/chat/completions", content=many, headers=JSON)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        # the same characters in a text are text
        assert server.chat(',[{"\\' * 700).status_code == 200


def test_bodies_have_a_limit_together(fake_model: Any) -> None:
    gate = Gate()
    backend = FakeBackend(scripted("ok"))
    backend.on_evaluate = gate
    with (
        running(fake_model(backend), max_request_bytes=1500, max_bytes=2000) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(server.chat, "x" * 300, user="y" * 1000)
        until(lambda: server.serving.worker.is_busy)
        refused = server.chat("x" * 300, user="y" * 1000)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "requests_too_large")
        assert int(refused.headers["retry-after"]) >= 1
        gate.open()
        assert first.result().status_code == 200
        until(lambda: server.chat("x" * 300, user="y" * 1000).status_code == 200)


@pytest.mark.parametrize(
    "given",
    [{"deep": json.loads("[" * 70 + "]" * 70)}, {"many": [0] * 10_001}, {"messages": []}, {"self": 1}],
)
def test_values_for_the_template_are_bounded(fake_model: Any, given: dict[str, Any]) -> None:
    with running(fake_model()) as server:
        answer = server.chat(chat_template_kwargs=given)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "chat_template_kwargs")


def test_half_a_surrogate_pair_in_an_earlier_call_is_a_400(fake_model: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    messages = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with running(fake_model()) as server:
        answer = server.post("/v1/chat/completions", {"messages": messages})
        assert answer.status_code == 400
        assert "surrogate" in answer.json()["error"]["message"]


# names


def test_who_may_be_asked_for_without_a_key(fake_model: Any) -> None:
    with running(fake_model(), hosts=("localhost", "box.example"), addresses=True) as server:
        for host, status in {
            "evil.example": 403, "192.0.2.7:8080": 200, "[2001:db8::1]:80": 200, "localhost": 200,
            "box.example": 200, "1.2.3.4.evil.example": 403, "": 403,
        }.items():  # fmt: skip
            answer = get(f"{server.url}/health", headers={"host": host})
            assert answer.status_code == status, host


def test_head_is_get_without_a_body(fake_model: Any) -> None:
    with running(fake_model()) as server:
        for path in ("/", "/health", "/app.js"):
            answer = httpx.head(server.url + path, timeout=SECONDS)
            assert (answer.status_code, answer.content) == (200, b"")


# a model that does not come back


def test_a_model_that_is_stuck_is_told_and_forgotten_when_it_comes_back(
    fake_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio, "STUCK_SECONDS", 0.05)
    gate = Gate()
    backend = FakeBackend(scripted("ok"))
    backend.on_evaluate = gate
    with running(fake_model(backend), timeout=0.2) as server:
        assert server.chat().status_code == 504
        # one whose time is over before its turn has come holds nothing
        until(lambda: gate.reached.is_set() or (server.chat(), False)[1])
        until(lambda: get(f"{server.url}/health").status_code == 503)
        assert get(f"{server.url}/health").json()["error"]["code"] == "stuck"
        refused = server.chat()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stuck")
        gate.open()
        until(lambda: get(f"{server.url}/health").status_code == 200)
        until(lambda: server.chat().status_code == 200)


def test_a_worker_that_does_not_end_is_left_and_its_job_fails() -> None:
    import asyncio

    gate = Gate()

    def produce(_job: object) -> Any:
        gate()
        yield 1

    async def run() -> None:
        worker = aio.Worker()
        job = worker.submit(produce)
        await asyncio.to_thread(gate.reached.wait, SECONDS)
        assert not await asyncio.to_thread(worker.close, 0.0, 0.05)
        with pytest.raises(aio.ModelBusyError, match="the answer was cut"):
            await anext(job)
        gate.open()
        assert await asyncio.to_thread(worker.close)

    asyncio.run(run())


@pytest.mark.parametrize(("grace", "signals"), [("0.2", [signal.SIGTERM]), ("500", [signal.SIGINT] * 2)])
def test_a_signal_ends_a_server_whose_model_is_stuck(grace: str, signals: list[int]) -> None:
    child = subprocess.Popen(
        [sys.executable, str(CHILD), grace], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        prepared, url = child.stdout.readline().split()
        assert prepared == "prepared"  # with no client yet that would be held up by it
        body = {"messages": USER, "stream": True}
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(lambda: httpx.post(f"{url}/v1/chat/completions", json=body, timeout=SECONDS))
            until(lambda: get(f"{url}/health").json()["busy"])
            child.send_signal(signals[0])
            for number in signals[1:]:
                until(lambda: get(f"{url}/health").status_code == 503)
                child.send_signal(number)
            _, error = child.communicate(timeout=SECONDS)
            assert "the answer was cut" in asked.result().text
        assert child.returncode == 4
        assert error.count("\n") == 1
        assert "the model could not be stopped" in error
    finally:
        child.kill()
        child.wait()


def test_while_the_last_answer_is_made_others_are_told_that_the_server_ends(fake_model: Any) -> None:
    gate = Gate()
    backend = FakeBackend(scripted("ok"))
    backend.on_evaluate = gate
    with running(fake_model(backend), grace=SECONDS) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.chat)
        until(lambda: server.serving.worker.is_busy)
        server.server.should_exit = True
        until(lambda: get(f"{server.url}/health").status_code == 503)
        assert server.chat().status_code == 503
        gate.open()
        assert first.result().status_code == 200


# the address


def test_two_servers_want_one_port() -> None:
    first = start_listening(bind("127.0.0.1", 0))
    port = first.getsockname()[1]
    with pytest.raises(MobileError, match=f"cannot listen on 127.0.0.1:{port}"):
        bind("127.0.0.1", port)
    first.close()


@pytest.mark.parametrize("host", ["nowhere.invalid", "192.0.2.1", "a" * 300])
def test_an_address_that_cannot_be_had_is_one_error(host: str) -> None:
    with pytest.raises(MobileError, match="cannot listen on"):
        bind(host, 0)


def test_threads_are_not_left(fake_model: Any) -> None:
    before = threading.active_count()
    with running(fake_model()):
        pass
    until(lambda: threading.active_count() <= before)
