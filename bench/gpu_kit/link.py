"""What ``mobile-gguf plan`` measures of the device and of the link to it."""

from __future__ import annotations

from typing import Any

from mobile_gguf.device.tier import find_devices
from mobile_gguf.errors import EngineError
from mobile_gguf.gguf.info import read_gguf_info
from mobile_gguf.plan.ggml import Ggml
from mobile_gguf.plan.machine import Measurements, identify_machine
from mobile_gguf.plan.measure import measure, steps_for
from mobile_gguf.plan.workload import read_workload

from .replay import model_of
from .results import Save
from .settings import Settings


def run(settings: Settings, result: dict[str, Any], save: Save) -> None:
    """The device's steps first, then the host's; saved after each."""
    model, shape = model_of(settings)
    info = read_gguf_info(model)
    result["rates"], result["problems"] = {}, []
    with settings.servers() as rpc:
        devices = find_devices(rpc)
        if not devices:
            raise EngineError("the engine sees no device")
        result["devices"] = [device.to_dict() for device in devices]
        known = Measurements(identify_machine())
        steps = steps_for(
            info, read_workload(info), [shape.k, max(1, shape.k // 2)], settings.n_threads,
            devices=devices, ggml=Ggml(), known=known.get,
        )  # fmt: skip
        names = {device.name for device in devices}
        steps.sort(key=lambda step: step.phase.removeprefix("measuring ") not in names)
        for step in steps:
            result["problems"] += measure(known, [step])
            result["rates"] = dict(known.entries)
            save()


def page(result: dict[str, Any]) -> list[str]:
    """As Markdown: seconds, or bytes per second where the name is that of a link or of products."""
    lines = [f"- {device['name']}: {device['description']}" for device in result.get("devices", [])]
    lines += ["", "| what | value | low | high |", "|---|---|---|---|"]
    for name, rate in result.get("rates", {}).items():
        lines.append(f"| {name} | {rate['value']:.4g} | {rate['low']:.4g} | {rate['high']:.4g} |")
    return [*lines, "", *(f"- {problem}" for problem in result.get("problems", []))]
