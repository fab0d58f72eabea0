"""Devices for tests without a GPU: RPC servers of llama.cpp on loopback, and runs on them."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_libs
from engine_jobs import run, succeeded

FETCH, CPU, AUTO = 1, 2, 0
HOST, CACHE, LAYERS = 0, 1, 2

SERVER = Path(__file__).with_name("rpc_server_child.py")
CHILD = Path(__file__).with_name("device_child.py")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def rpc_servers(n: int = 1, *, memory: int = 0, lib: Path | None = None) -> Iterator[list[str]]:
    """Starts n servers and yields their endpoints; memory: bytes that each may take, 0 for no limit."""
    environment = engine_libs.child_environment(lib or engine_libs.engine_lib())
    with contextlib.ExitStack() as stack:

        def start() -> str:
            for _ in range(5):  # another program may take the port before the server does
                endpoint = f"127.0.0.1:{_free_port()}"
                process = subprocess.Popen(
                    [sys.executable, str(SERVER), endpoint, "1", str(memory)], env=environment,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
                stack.callback(process.wait)
                stack.callback(process.kill)
                if _listens(endpoint, process):
                    return endpoint
            raise AssertionError("the RPC server did not start")

        yield [start() for _ in range(n)]


def _listens(endpoint: str, process: subprocess.Popen[bytes]) -> bool:
    host, port = endpoint.split(":")
    for _ in range(6000):
        if process.poll() is not None:
            return False
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
            return True
        time.sleep(0.05)
    raise AssertionError(f"no RPC server at {endpoint}")


def device_run(
    name: str,
    model: str | Path,
    rpc: list[str],
    ops: list[dict[str, Any]],
    budget: int | str | None = 0,
    **settings: Any,
) -> dict[str, Any]:
    """A run whose layers are on the devices and whose experts are on the host; budget: of the host tier."""
    mobile = {"on_host": 1} if budget is not None else None
    return run(name, model, ops, budget, mobile=mobile, rpc=rpc, n_gpu_layers=99, **settings)


def on_devices(*runs: dict[str, Any], lib: Path | None = None, **how: Any) -> engine_libs.Outcome:
    """Runs a job of ``device_child``."""
    return engine_libs.run_job(lib or engine_libs.engine_lib(), list(runs), child=CHILD, **how)


def succeeded_on_devices(*runs: dict[str, Any], **how: Any) -> engine_libs.Outcome:
    return succeeded(on_devices(*runs, **how))


def until(ops: list[dict[str, Any]], **above: int) -> dict[str, Any]:
    """Rounds of ``ops`` till each of these device counters is above its number; the job fails if never."""
    return {"op": "device_until", "rounds": 200, "ops": ops, "above": above}
