"""A device without a GPU: llama.cpp's RPC server on loopback, behind a link of any speed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def rpc_server(threads: int = 1) -> Iterator[str]:
    """A server whose device is so many CPU threads; yields HOST:PORT. Raises SystemExit if none starts."""
    command = ["engine", "rpc-server", "--port", "0", "--threads", str(threads)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mobile_gguf", *command],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        if not said.startswith("listening on "):
            raise SystemExit(f"the RPC server did not start (exit code {process.wait()})")
        yield said.split()[-1]
    finally:
        process.kill()
        process.wait()


@contextmanager
def slow_link(endpoint: str, megabytes: float) -> Iterator[str]:
    """A proxy before a server that passes so many megabytes per second each way; yields its HOST:PORT."""
    port = endpoint.rpartition(":")[2]
    command = [sys.executable, "-m", "mobile_gguf.bench.slow_link", port, str(megabytes)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()
