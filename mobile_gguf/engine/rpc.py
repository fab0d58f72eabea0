"""llama.cpp RPC servers as devices: endpoints, a check before ggml connects, and why one was lost.

The protocol is llama.cpp's own (``ggml/src/ggml-rpc``). Servers are asked here first, with a time limit:
what is unreachable, busy, of another version or no RPC server at all is then one clear error.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mobile_gguf.errors import EngineError, UsageError

from .binding import bind_backend_function, bind_function, load_library, needs_engine

DEFAULT_PORT = 50052
PROTOCOL = (7, 0)  # RPC_PROTO_MAJOR_VERSION, RPC_PROTO_MINOR_VERSION of the pinned ggml-rpc.h
MAX_SERVERS = 16  # GGML_RPC_MAX_SERVERS
CONNECT_SECONDS = 10.0
# How long a server may be silent while an answer waits for it; 0: for ever.
TIMEOUT_VARIABLE = "MOBILE_GGUF_RPC_TIMEOUT"

_HELLO, _DEVICE_COUNT, _DEVICE_MEMORY = 14, 15, 11  # enum rpc_cmd
_CAPABILITIES = bytes(24)  # RPC_CONN_CAPS_SIZE: no RDMA
_HOST = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens. llama.cpp's servers speak IPv4 only."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class ServerInfo:
    """What a server says about itself; a pair of free and total bytes for each of its devices."""

    endpoint: Endpoint
    version: tuple[int, int, int]
    memory: tuple[tuple[int, int], ...]


def parse_endpoints(text: str) -> list[Endpoint]:
    """Servers from ``HOST:PORT[,HOST:PORT]``; raises UsageError naming what cannot be meant."""
    endpoints = [_parse_endpoint(part.strip(), text) for part in text.split(",")]
    for index, endpoint in enumerate(endpoints):
        if endpoint in endpoints[:index]:
            raise UsageError(f"--rpc {text}: {endpoint} is named twice")
    if len(endpoints) > MAX_SERVERS:
        raise UsageError(f"--rpc names {len(endpoints)} servers: {MAX_SERVERS} are the most")
    return endpoints


def _parse_endpoint(part: str, text: str) -> Endpoint:
    host, colon, port = part.rpartition(":")
    if not part:
        raise UsageError(f"--rpc {text!r}: a server is missing; give HOST:PORT[,HOST:PORT]")
    if not colon:
        raise UsageError(f"--rpc {part}: the port is missing; give HOST:PORT, such as {part}:{DEFAULT_PORT}")
    if ":" in host:
        raise UsageError(f"--rpc {part}: not HOST:PORT; llama.cpp's RPC knows host names and IPv4 addresses")
    if not _HOST.fullmatch(host):
        raise UsageError(f"--rpc {part}: {host!r} is no host name; give HOST:PORT")
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise UsageError(f"--rpc {part}: {port!r} is no port; give a number from 1 to 65535")
    return Endpoint(host, int(port))


def probe_server(endpoint: Endpoint, seconds: float = CONNECT_SECONDS) -> ServerInfo:
    """Ask a server for its version and its devices' memory, within ``seconds`` for each answer.

    Raises EngineError if it cannot be reached, does not answer, or is not a server we can talk to.
    """
    try:
        connection = socket.create_connection((endpoint.host, endpoint.port), timeout=seconds)
    except socket.gaierror:
        raise EngineError(f"--rpc {endpoint}: there is no host of that name") from None
    except TimeoutError:
        raise EngineError(f"--rpc {endpoint}: no connection within {seconds:g} s; is the host up?") from None
    except OSError as error:
        raise EngineError(
            f"--rpc {endpoint}: no connection ({_reason(error)}); start one there with "
            f"`mobile-gguf engine rpc-server --port {endpoint.port}`"
        ) from None
    with connection:
        try:
            return _interview(connection, endpoint)
        except TimeoutError:
            raise EngineError(
                f"--rpc {endpoint}: no answer within {seconds:g} s; a server has one client at a time: "
                "it may be busy with another, hang, or be something else"
            ) from None
        except (OSError, EOFError, ValueError) as error:
            raise EngineError(
                f"--rpc {endpoint}: what listens there is no llama.cpp RPC server ({_reason(error)})"
            ) from None


def _interview(connection: socket.socket, endpoint: Endpoint) -> ServerInfo:
    # HELLO comes first; its answer: major, minor, patch, padding, capabilities.
    major, minor, patch = _ask(connection, _HELLO, _CAPABILITIES, 4 + len(_CAPABILITIES))[:3]
    if major != PROTOCOL[0] or minor > PROTOCOL[1]:
        ours = ".".join(map(str, PROTOCOL))
        raise EngineError(
            f"--rpc {endpoint}: the server speaks RPC protocol {major}.{minor}, this engine {ours}: "
            "run the same version of the engine on both machines"
        )
    (count,) = struct.unpack("<I", _ask(connection, _DEVICE_COUNT, b"", 4))
    if count == 0:
        raise EngineError(f"--rpc {endpoint}: the server offers no device")
    memory = [
        struct.unpack("<QQ", _ask(connection, _DEVICE_MEMORY, struct.pack("<I", index), 16))
        for index in range(count)
    ]
    return ServerInfo(endpoint, (major, minor, patch), tuple((free, total) for free, total in memory))


def _ask(connection: socket.socket, command: int, request: bytes, size: int) -> bytes:
    # Request: command (1 byte), size (8), data. Answer: size (8), data.
    connection.sendall(struct.pack("<BQ", command, len(request)) + request)
    (announced,) = struct.unpack("<Q", _receive(connection, 8))
    if announced != size:
        raise ValueError(f"an answer of {announced} bytes where {size} belong")
    return _receive(connection, size)


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError("it closed the connection")
        data += part
    return data


def _reason(error: BaseException) -> str:
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]


def connect_servers(text: str) -> list[int]:
    """The devices of the servers in ``text``, in its order, as ``ggml_backend_dev_t`` handles.

    ``text`` is ``HOST:PORT[,HOST:PORT]``. Each server is probed before ggml connects. Raises UsageError for
    malformed endpoints, EngineError for a server that cannot be used or an engine without RPC.
    """
    endpoints = parse_endpoints(text)
    library, _path = load_library()
    if not hasattr(library, "mobile_rpc_error"):
        raise needs_engine("--rpc")
    _check_timeout()
    for endpoint in endpoints:
        probe_server(endpoint)
    return [handle for endpoint in endpoints for handle in _add_server(library, endpoint)]


def _check_timeout() -> None:
    # Read by the engine; a number that it cannot read would silently mean the default.
    value = os.environ.get(TIMEOUT_VARIABLE, "")
    if value and not value.isdecimal():
        raise UsageError(f"{TIMEOUT_VARIABLE} is {value!r}: give whole seconds, 0 to wait for ever")


def _add_server(library: Any, endpoint: Endpoint) -> Sequence[int]:
    address, size = ctypes.c_void_p, ctypes.c_size_t
    add = bind_backend_function(library, "RPC", "ggml_backend_rpc_add_server", address, [ctypes.c_char_p])
    count = bind_function(library, "ggml_backend_reg_dev_count", size, [address])
    get = bind_function(library, "ggml_backend_reg_dev_get", address, [address, size])
    registry = add(str(endpoint).encode())
    if not registry:
        raise EngineError(f"--rpc {endpoint}: {last_loss() or 'ggml could not connect'}")
    return [get(registry, index) for index in range(count(registry))]


def context_loss(ctx: int) -> str:
    """Why the servers of a context cannot compute any more; empty while they can, or without an engine.

    ``ctx`` is a ``llama_context *``. Names the server, what it was doing, and what to do.
    """
    library, _path = load_library()
    if not hasattr(library, "mobile_rpc_error"):
        return ""
    text = bind_function(library, "mobile_rpc_error", ctypes.c_char_p, [ctypes.c_void_p])(ctx)
    return _with_advice(text)


def last_loss() -> str:
    """Why a server was lost since ``clear_loss``, for a load that failed; empty if none was."""
    library, _path = load_library()
    if not hasattr(library, "mobile_rpc_last_loss"):
        return ""
    return _with_advice(bind_function(library, "mobile_rpc_last_loss", ctypes.c_char_p, [])())


def clear_loss() -> None:
    """Forget earlier losses, before a load."""
    library, _path = load_library()
    if hasattr(library, "mobile_rpc_clear_loss"):
        bind_function(library, "mobile_rpc_clear_loss", None, [])()


def _with_advice(text: bytes | None) -> str:
    if not text:
        return ""
    return f"{text.decode('utf-8', errors='replace')}; start it again and load the model again"
