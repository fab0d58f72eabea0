"""The server of a soak: ``mobile-gguf serve`` on a port of its own, ended and started anew in the middle.

Who asks it reads ``generation`` before ``up``: what breaks while that changes was broken by the restart.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

_SECONDS = 300.0


class SoakServer:
    """A running server; ``flags`` are those of ``serve``, ``environment`` is beside this process's."""

    def __init__(self, model: str, flags: Sequence[str], environment: Mapping[str, str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.command = [sys.executable, "-m", "mobile_gguf", "serve", model, "--port", str(port), *flags]
        self.url = ""
        self.generation = 0
        self.up = threading.Event()
        self._ends: list[int] = []  # the signals that ended earlier generations
        self._environment = {**os.environ, **environment}
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, text=True, env=self._environment
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            raise SystemExit(f"the server did not start (exit code {self.process.wait()})")
        self.up.set()

    def end(self, number: int = signal.SIGTERM) -> str:
        """Send a signal and wait; what was wrong about the end, empty if nothing."""
        self.process.send_signal(number)
        try:
            code = self.process.wait(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        expected = 0 if number == signal.SIGTERM else -number
        return "" if code == expected else f"the server ended with {code} after signal {number}"

    def restart(self, number: int) -> str:
        """End it in the middle of everything, and start it again on the same port; what was wrong."""
        self.up.clear()
        self._ends.append(number)
        self.generation += 1
        wrong = self.end(number)
        self._start()
        return wrong

    def was_orderly(self, begin: int, end: int) -> bool:
        """Whether all generations from one to another were ended in order."""
        return signal.SIGKILL not in self._ends[begin:end]

    def resources(self) -> dict[str, int]:
        """Its memory, that part of it that is no file's, and its open files (Linux)."""
        return resources(self.process.pid)


def resources(pid: int) -> dict[str, int]:
    """The same of any process."""
    fields = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "RssAnon"):
            fields[name] = int(value.split()[0]) << 10
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return {"rss_bytes": fields["VmRSS"], "anonymous_bytes": fields["RssAnon"], "files": files}
