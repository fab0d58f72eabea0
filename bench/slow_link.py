"""A slow link before a server on loopback: ``python -m mobile_gguf.bench.slow_link PORT MEGABYTES``.

Forwards TCP connections to PORT at so many megabytes (1e6 bytes) per second in each direction, 0 for no
limit, and prints the port to connect to. A process of its own: it shares no lock with what is measured.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time

_CHUNK = 1 << 15
_BUFFER = 1 << 18  # of a socket: what is on its way beyond the rate


class Pace:
    """Sends no more than ``rate`` bytes per second, without bursts after a pause."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free_at = 0.0

    def wait(self, n_bytes: int) -> None:
        """Return when so many bytes are through."""
        if self._rate <= 0:
            return
        now = time.perf_counter()
        self._free_at = max(self._free_at, now) + n_bytes / self._rate
        while (left := self._free_at - time.perf_counter()) > 0:
            time.sleep(left)


def serve(port: int, rate: float) -> None:
    """Forward until the process is killed."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    print(listener.getsockname()[1], flush=True)
    while True:
        client, _address = listener.accept()
        server = socket.create_connection(("127.0.0.1", port))
        for source, target in ((client, server), (server, client)):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_forward, args=(source, target, Pace(rate)), daemon=True).start()


def _forward(source: socket.socket, target: socket.socket, pace: Pace) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            pace.wait(len(data))
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    serve(int(sys.argv[1]), float(sys.argv[2]) * 1e6)
