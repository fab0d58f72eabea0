"""Endpoints, and the check before ggml connects: what may listen at an address and is no server of ours."""

from __future__ import annotations

import http.server
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mobile_gguf import vendor
from mobile_gguf.engine import rpc
from mobile_gguf.engine.rpc import Endpoint, parse_endpoints, probe_server
from mobile_gguf.errors import EngineError, UsageError

SECONDS = 600.0


@pytest.mark.parametrize(
    ("text", "endpoints"),
    [
        ("127.0.0.1:50052", [Endpoint("127.0.0.1", 50052)]),
        ("gpu-box.lan:1, b:65535", [Endpoint("gpu-box.lan", 1), Endpoint("b", 65535)]),
    ],
)
def test_endpoints_are_read(text, endpoints):
    assert parse_endpoints(text) == endpoints
    assert parse_endpoints(",".join(map(str, endpoints))) == endpoints


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a server is missing"),
        ("a:1,", "a server is missing"),
        ("box", "the port is missing; give HOST:PORT, such as box:50052"),
        ("box:", "'' is no port"),
        ("box:0", "'0' is no port"),
        ("box:65536", "'65536' is no port"),
        ("box:-1", "'-1' is no port"),
        ("box:\N{SUPERSCRIPT TWO}", "is no port"),
        (":50052", "'' is no host name"),
        ("tcp://box:50052", "host names and IPv4 addresses"),
        ("[::1]:50052", "host names and IPv4 addresses"),
        ("a b:1", "'a b' is no host name"),
        ("a:1,a:1", "a:1 is named twice"),
        (",".join(f"h:{n}" for n in range(1, 18)), "17 servers: 16 are the most"),
    ],
)
def test_malformed_endpoints_are_usage_errors(text, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        parse_endpoints(text)


@contextmanager
def listener(*answers: bytes) -> Iterator[Endpoint]:
    """Accepts one client, sends ``answers``, one for each thing it says, and closes; silent without any."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = threading.Event()

        def serve() -> None:
            client, _address = server.accept()
            with client:
                for answer in answers:
                    client.recv(1 << 12)
                    client.sendall(answer)
                if not answers:
                    done.wait(SECONDS)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield Endpoint("127.0.0.1", server.getsockname()[1])
        done.set()
        thread.join(SECONDS)


def message(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def hello(major: int, minor: int) -> bytes:
    return message(bytes([major, minor, 1, 0]) + bytes(24))


def refused(endpoint: Endpoint, seconds: float = SECONDS) -> str:
    with pytest.raises(EngineError) as caught:
        probe_server(endpoint, seconds)
    assert str(endpoint) in str(caught.value)
    return str(caught.value)


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = Endpoint("127.0.0.1", free.getsockname()[1])
    assert "no connection (connection refused); start one there with" in refused(endpoint)


def test_no_such_host():
    assert "no host of that name" in refused(Endpoint("no-such-host.invalid", 1))


def test_silence():
    with listener() as endpoint:
        assert "no answer within 0.3 s; a server has one client at a time" in refused(endpoint, 0.3)


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.2\r\n", message(b"x"), b"", b"\x1c"])
def test_something_else(answer):
    with listener(answer) as endpoint:
        assert "no llama.cpp RPC server" in refused(endpoint)


def test_a_web_server():
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.handle_request, daemon=True)
        thread.start()
        text = refused(Endpoint("127.0.0.1", server.server_port), 0.3)
        thread.join(SECONDS)  # it reads the end of what it was sent
    assert "no llama.cpp RPC server" in text or "no answer" in text


@pytest.mark.parametrize(("major", "minor"), [(6, 0), (8, 0), (7, 1)])
def test_another_version(major, minor):
    with listener(hello(major, minor)) as endpoint:
        assert f"speaks RPC protocol {major}.{minor}, this engine 7.0" in refused(endpoint)


def test_no_devices():
    with listener(hello(*rpc.PROTOCOL), message(bytes(4))) as endpoint:
        assert "offers no device" in refused(endpoint)


def test_what_a_server_says():
    answers = [hello(*rpc.PROTOCOL), message(struct.pack("<I", 2))]
    answers += [message(struct.pack("<QQ", *pair)) for pair in ((1, 2), (3, 4))]
    with listener(*answers) as endpoint:
        info = probe_server(endpoint, SECONDS)
    assert info.version == (*rpc.PROTOCOL, 1)
    assert info.memory == ((1, 2), (3, 4))


def test_numbers_are_the_pinned_headers():
    source = vendor.source_dir()
    if source is None:
        pytest.skip("the source distribution was never fetched")
    folder = source / "vendor" / "llama.cpp" / "ggml"
    header = (folder / "include" / "ggml-rpc.h").read_text()
    numbers = [re.search(rf"RPC_PROTO_{part}_VERSION\s+(\d+)", header) for part in ("MAJOR", "MINOR")]
    assert tuple(int(number[1]) for number in numbers if number) == rpc.PROTOCOL
    assert f"GGML_RPC_MAX_SERVERS       {rpc.MAX_SERVERS}" in header
    enum = re.search(r"enum rpc_cmd \{(.*?)\}", (folder / "src/ggml-rpc/ggml-rpc.cpp").read_text(), re.DOTALL)
    assert enum
    names = [line.split()[0].strip(",") for line in enum[1].strip().splitlines()]
    expected = {"HELLO": 14, "DEVICE_COUNT": 15, "GET_DEVICE_MEMORY": 11}
    assert {name: names.index(f"RPC_CMD_{name}") for name in expected} == expected
