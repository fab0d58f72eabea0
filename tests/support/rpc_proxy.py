"""A proxy before an RPC server that cuts or freezes every connection once so many bytes have gone to it."""

from __future__ import annotations

import contextlib
import socket
import threading


class Proxy:
    """Forwards to ``port`` on loopback until ``limit`` bytes (None: no limit) have come from clients.

    Then it closes all connections and refuses new ones, or with ``freeze`` keeps them open in silence.
    """

    def __init__(self, port: int, limit: int | None = None, *, freeze: bool = False) -> None:
        self.forwarded = 0
        self._port, self._limit, self._freeze = port, limit, freeze
        self._lock = threading.Lock()
        self._over = False
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _address = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                self._open += [client, server]
                threading.Thread(target=self._forward, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._forward, args=(server, client, False), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                with self._lock:
                    if counted and self._limit is not None and self.forwarded + len(data) > self._limit:
                        self._over = True
                    elif counted:
                        self.forwarded += len(data)
                    if self._over and self._freeze:
                        return
                    if self._over:
                        self._cut()
                        return
                target.sendall(data)
            if not self._over:
                target.shutdown(socket.SHUT_RDWR)

    def _cut(self) -> None:
        for connection in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
