"""The link as it is, and with less of it left.

Nobody but its owner may set a card's link slower, so a second process copies to and from it all the time; a
server on loopback has a proxy that passes so many megabytes a second. What is left is measured in both
states.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from mobile_gguf.device.tier import find_devices
from mobile_gguf.plan.ggml import Ggml
from mobile_gguf.sizes import MIB

from ..rpc_device import slow_link
from .replay import Event, job_of, markdown, model_of, run_job, table
from .replay_child import KitArm
from .results import Save
from .settings import RPC, Settings

_SHARE = 0.25
_PROXY_MEGABYTES = 200.0
_COPIES = {"64 KiB": MIB // 16, "1 MiB": MIB, "64 MiB": 64 * MIB}
_COPY_S = 0.6


def run(settings: Settings, result: dict[str, Any], save: Save) -> None:
    """Copies, then a quarter of the experts in slots with each miss policy, in both states."""
    model, shape = model_of(settings)
    result["n_prompt"] = settings.read_trace().n_prompt
    states = result["states"] = []
    for name, slowed in (("as it is", False), ("slowed", True)):
        state: dict[str, Any] = {"name": name, "copies": {}, "events": []}
        states.append(state)
        with _link(settings, slowed) as rpc:
            state["copies"] = _copies(rpc)
        save()
        budget = int(_SHARE * shape.all_expert_bytes)
        arms = [KitArm(miss, budget, miss=miss) for miss in ("fetch", "cpu", "auto")]
        job = replace(job_of(settings, model, shape, arms=arms), repeats=1)

        def heard(event: Event, state: dict[str, Any] = state) -> None:
            state["events"].append(event)
            save()

        with _link(settings, slowed) as rpc:
            run_job(replace(job, rpc=rpc), settings.environment(settings.engine_lib), heard)


@contextmanager
def _link(settings: Settings, slowed: bool) -> Iterator[str]:
    """``--rpc``, empty with a GPU; what slows the link runs meanwhile."""
    with ExitStack() as stack:
        rpc = stack.enter_context(settings.servers())
        if slowed and settings.device == RPC:
            rpc = stack.enter_context(slow_link(rpc, _PROXY_MEGABYTES))
        elif slowed:
            stack.enter_context(_hog())
        yield rpc


@contextmanager
def _hog() -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", "mobile_gguf.bench.gpu_kit.hog"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()


def _copies(rpc: str) -> dict[str, dict[str, float]]:
    """Bytes per second to and from the device, by size: the median copy."""
    ggml, device = Ggml(), find_devices(rpc)[0]
    found = {}
    with ggml.backend(device) as backend:
        for name, n_bytes in _COPIES.items():
            up, down = ggml.time_copies(device, backend, n_bytes, _COPY_S)
            found[name] = {
                "up": n_bytes / sorted(up)[len(up) // 2], "down": n_bytes / sorted(down)[len(down) // 2]
            }  # fmt: skip
    return found


def page(result: dict[str, Any]) -> list[str]:
    """As Markdown."""
    lines = []
    for state in result.get("states", []):
        lines += [f"## {state['name']}", "", "| copy | to the device | from it |", "|---|---|---|"]
        for size, rate in state["copies"].items():
            lines.append(f"| {size} | {rate['up'] / 1e9:.2f} GB/s | {rate['down'] / 1e9:.2f} GB/s |")
        lines += ["", *markdown(table(state["events"], result["n_prompt"])), ""]
    return lines
