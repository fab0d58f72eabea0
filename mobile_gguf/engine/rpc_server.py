"""llama.cpp's RPC server in this process: its devices, its address, started and waited for."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from mobile_gguf.errors import EngineError, UsageError
from mobile_gguf.sockets import claim_address
from mobile_gguf.wording import why

from .binding import BUILD_HINT, bind_backend_function, load_library
from .devices import ACCEL, CPU, Device, all_devices
from .rpc import Endpoint, probe_server

_POLL_SECONDS = 0.05
_START_SECONDS = 60.0  # making the backends of some devices takes a while


def choose_devices(names: Sequence[str]) -> list[Device]:
    """The devices to offer: the named ones; without names every GPU, or else the CPU, as llama.cpp does.

    Raises UsageError for a name that is not there or is named twice.
    """
    devices = {device.name: device for device in all_devices()}
    for index, name in enumerate(names):
        if name not in devices:
            raise UsageError(
                f"--device {name}: there is no such device; this engine has {', '.join(devices)}"
            )
        if name in names[:index]:
            raise UsageError(f"--device {name} is named twice")
    chosen = [devices[name] for name in names]
    chosen = chosen or [device for device in devices.values() if device.type not in (CPU, ACCEL)]
    chosen = chosen or [device for device in devices.values() if device.type == CPU]
    if not chosen:
        raise EngineError(f"this engine has no device to offer: {BUILD_HINT}")
    return chosen


def choose_endpoint(host: str, port: int) -> Endpoint:
    """Where to listen; port 0 becomes a free one.

    Raises UsageError if ``host`` is no IPv4 address, EngineError if it cannot be bound.
    """
    try:
        address = str(ipaddress.IPv4Address("127.0.0.1" if host == "localhost" else host))
    except ValueError:
        raise UsageError(
            f"--host {host}: give an IPv4 address of this machine, such as 127.0.0.1 (0.0.0.0: all)"
        ) from None
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trial:
        claim_address(trial)
        try:
            trial.bind((address, port))
        except OSError as error:
            raise EngineError(
                f"cannot listen on {address}:{port} ({why(error).lower()}); "
                "choose another --port (0: a free one) or --host"
            ) from None
        return Endpoint(address, trial.getsockname()[1])


def is_loopback(endpoint: Endpoint) -> bool:
    """Whether only this machine can connect."""
    return ipaddress.IPv4Address(endpoint.host).is_loopback


class RpcServer:
    """llama.cpp's server, in a thread of its own that nothing but the end of the process ends."""

    def __init__(
        self, endpoint: Endpoint, devices: Sequence[Device], *, threads: int, cache: Path | None = None
    ) -> None:
        self.endpoint = endpoint
        library, _path = load_library()
        arguments = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
        try:
            name = "ggml_backend_rpc_start_server"
            self._serve = bind_backend_function(library, "RPC", name, None, arguments)
        except EngineError:
            raise EngineError(f"this engine is built without RPC: {BUILD_HINT}") from None
        self._handles = (ctypes.c_void_p * len(devices))(*(device.handle for device in devices))
        self._threads = threads
        self._cache = None if cache is None else os.fsencode(cache)
        self._thread = threading.Thread(target=self._run, name="rpc-server", daemon=True)

    def start(self) -> None:
        """Start serving; returns when the server has answered. Raises EngineError if it does not."""
        self._thread.start()
        host = self.endpoint.host
        own = Endpoint("127.0.0.1" if host == "0.0.0.0" else host, self.endpoint.port)
        end = time.monotonic() + _START_SECONDS
        while self._thread.is_alive():
            try:
                probe_server(own)
                return
            except EngineError as error:
                if time.monotonic() > end:
                    raise EngineError(f"the RPC server does not answer: {error}") from None
                time.sleep(_POLL_SECONDS)
        raise EngineError(f"the RPC server could not listen on {self.endpoint} or use its devices")

    def wait(self) -> None:
        """Block until the server ends, which it does only when it cannot accept any more."""
        while self._thread.is_alive():
            self._thread.join(3600)

    def _run(self) -> None:
        self._serve(
            str(self.endpoint).encode(), self._cache, self._threads, len(self._handles), self._handles
        )
