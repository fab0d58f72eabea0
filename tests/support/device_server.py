"""An RPC server on loopback as the device: a process of its own with real buffers and real transfers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine_libs
import numpy as np

CHILD = Path(__file__).with_name("device_api_child.py")

_SERVE = """
import ctypes, sys
import llama_cpp.llama_cpp as lib
lib.llama_backend_init()
ggml = lib._lib
ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
devices = (ctypes.c_void_p * 2)(ggml.ggml_backend_dev_by_type(0), None)
one = ctypes.c_size_t(1)
ggml.ggml_backend_rpc_start_server(sys.argv[1].encode(), None, one, one, devices)
"""


@dataclass
class Server:
    """A running server; ``endpoint`` is what --rpc takes."""

    endpoint: str
    process: subprocess.Popen[bytes]

    def resident(self, which: str = "VmHWM") -> int:
        """Resident bytes of the server: VmHWM the most so far, VmRSS now."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{which}:"):
                return int(line.split()[1]) * 1024
        raise OSError(f"the server's status has no {which}")


@contextmanager
def rpc_server() -> Iterator[Server]:
    """Start a server with one CPU thread on a free port, and end it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # one heap: each thread's own would be address space, which tests limit and compare
    environment = engine_libs.child_environment(engine_libs.engine_lib(), MALLOC_ARENA_MAX="1")
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, f"127.0.0.1:{port}"], env=environment, stdout=log, stderr=log
        )
        try:
            _wait_for(port, process)
            yield Server(f"127.0.0.1:{port}", process)
        finally:
            process.kill()
            process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"the RPC server did not start (exit code {process.poll()})")


def run_child(
    *runs: dict[str, Any], lib: Path | None = None, prefix: list[str] | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run jobs of ``device_api_child`` in a process of their own; returns results by name, and arrays."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.npz"
        done = subprocess.run(
            [*(prefix or []), sys.executable, str(CHILD)],
            input=json.dumps({"out": str(out), "runs": runs}),
            capture_output=True,
            text=True,
            env=engine_libs.child_environment(lib or engine_libs.engine_lib()),
            timeout=800,
            check=False,
        )
        if done.returncode != 0:
            raise engine_libs.ChildDiedError(done.returncode, done.stderr)
        with np.load(out) as arrays:
            return json.loads(done.stdout.splitlines()[-1]), dict(arrays)
