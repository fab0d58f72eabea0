"""Devices for a model: which there are, and the slot pools once it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from mobile_gguf.engine.binding import Engine, load_library, needs_engine
from mobile_gguf.engine.device_calls import DeviceCalls
from mobile_gguf.engine.devices import Device, list_devices
from mobile_gguf.engine.rpc import connect_servers
from mobile_gguf.engine.structs import DeviceCounters, DeviceInfo
from mobile_gguf.errors import BudgetError, EngineMemoryError, UsageError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.fit import Asked, Fit
from mobile_gguf.memory.pools import pool_all_bytes, pool_min_bytes
from mobile_gguf.options import LoadOptions, defaults
from mobile_gguf.options.words import CACHE, HOST, LAYERS
from mobile_gguf.sizes import OFF, format_bytes

from .controller import PlacementController
from .placement import placement_key

logger = logging.getLogger("mobile_gguf.device")

# An `auto` pool that the driver refuses is made this much smaller, so many times at most.
_SHRINK, _TRIES = 0.85, 8


def devices_for(options: LoadOptions, asked: Asked, engine: Engine | None) -> tuple[list[Device], list[str]]:
    """The devices that ``options`` may use, none for the host alone, and notices about what has no effect.

    Raises UsageError if devices were asked for and there are none, EngineError without the engine or if an
    RPC server cannot be reached.
    """
    if asked.vram is None:
        return [], _without_effect(options, f"with --vram-budget {OFF}")
    if engine is None:
        if asked.insists:
            raise needs_engine("--rpc" if options.rpc else "a --vram-budget")
        return [], _without_effect(options, "with a stock llama.cpp")
    devices = find_devices(options.rpc)
    if devices:
        return devices, []
    if asked.insists:
        raise UsageError(
            f"--vram-budget {asked.vram}: this engine has no device here; build one for your GPU "
            "(`mobile-gguf engine build --backend cuda`), or name a server with --rpc HOST:PORT"
        )
    return [], _without_effect(options, "without a device")


def find_devices(servers: str) -> list[Device]:
    """This machine's GPUs and the named RPC servers; raises EngineError for a server that is not there."""
    library, _path = load_library()
    return list_devices(library, connect_servers(servers) if servers else ())


def _without_effect(options: LoadOptions, why: str) -> list[str]:
    usual = defaults(LoadOptions)
    names = [name for name in ("miss", "placement") if getattr(options, name) != usual[name]]
    return [f"--{name} has no effect {why}" for name in names]


class DeviceTier:
    """The slot pools of a loaded model. Made by ``start_tier``; belongs to its context."""

    def __init__(
        self,
        calls: DeviceCalls,
        controller: PlacementController,
        *,
        budget_bytes: int,
        miss: str,
    ) -> None:
        self.calls = calls
        self.controller = controller
        self.budget_bytes = budget_bytes  # 0: no pools, experts on the host
        self.miss = miss

    def counters(self) -> DeviceCounters:
        """Since the engine's counters were last reset; zero without pools."""
        return self.calls.counters() if self.budget_bytes else DeviceCounters()

    def facts(self, counters: DeviceCounters) -> dict[str, Any]:
        """``stats()["device"]``; ``counters`` are those since the model was loaded."""
        return {
            "devices": [asdict(device) for device in self.calls.devices()],
            "budget_bytes": self.budget_bytes,
            "placement": self.controller.facts(),
            "miss": self.miss,
            "counters": asdict(counters),
        }


def start_tier(
    calls: DeviceCalls,
    info: GgufInfo,
    options: LoadOptions,
    fit: Fit,
    hold: Callable[[bool], None] | None = None,
) -> tuple[DeviceTier, list[str]]:
    """Make the slot pools of a model whose context is there, and say how experts are placed.

    ``hold`` keeps other trials still while placements are compared. Raises BudgetError if the devices cannot
    hold what was asked for; the context then is as before.
    """
    devices = calls.devices()
    budget, notices = _make_pools(calls, devices, info, options, fit)
    if not budget:
        controller = PlacementController(
            lambda _placement: None, _no_key, current=HOST, fixed=HOST, why="no slots"
        )
        return DeviceTier(calls, controller, budget_bytes=0, miss=options.miss), notices
    controller = _controller(calls, devices, info, options, budget, hold)
    return DeviceTier(calls, controller, budget_bytes=budget, miss=options.miss), notices


def _make_pools(
    calls: DeviceCalls,
    devices: list[DeviceInfo],
    info: GgufInfo,
    options: LoadOptions,
    fit: Fit,
) -> tuple[int, list[str]]:
    """Start the pools; returns their budget, 0 if there are none, and notices."""
    if not devices:
        return 0, ["no layer with experts is on a device: experts are computed on the host"]
    if fit.pool_bytes is not None:
        try:
            _start(calls, options, fit.pool_bytes, info, len(devices))
        except EngineMemoryError as error:
            raise BudgetError(_refused(error, calls.devices(), info, fit)) from None
        return fit.pool_bytes, []
    wanted = budget = fit.auto_pool(devices, info)
    for _ in range(_TRIES):
        if budget < pool_min_bytes(info, len(devices)):
            break
        try:
            _start(calls, options, budget, info, len(devices))
        except BudgetError:
            break  # several devices or shapes: the smallest legal budget is more than the estimate
        except EngineMemoryError as error:
            logger.info("%s; trying less", error)
            budget = int(budget * _SHRINK)
        else:
            shrunk = f"the device has less room for experts than its driver says: {format_bytes(budget)}"
            return budget, [f"{shrunk} instead of {format_bytes(wanted)}"] if budget < wanted else []
    free = ", ".join(f"{device.name} {format_bytes(device.free_bytes)}" for device in calls.devices())
    return 0, [
        f"no room for experts on the device ({free} free with the model loaded, less a reserve): they are "
        "computed on the host; a smaller --ctx-size makes room"
    ]


def _start(calls: DeviceCalls, options: LoadOptions, budget: int, info: GgufInfo, n_devices: int) -> None:
    placement = first_placement(options, budget, info, n_devices)
    calls.start(budget, miss=options.miss, placement=placement, eviction=options.eviction)


def first_placement(options: LoadOptions, budget: int, info: GgufInfo, n_devices: int) -> str:
    """How experts are placed before anything was compared: all of them in whole layers, else a cache."""
    if options.placement == "auto":
        return LAYERS if budget >= pool_all_bytes(info, n_devices) else CACHE
    return options.placement


def _refused(error: EngineMemoryError, devices: list[DeviceInfo], info: GgufInfo, fit: Fit) -> str:
    fits = fit.auto_pool(devices, info)
    advice = f"the largest that fits is about {fits} bytes ({format_bytes(fits)})" if fits else "none fits"
    states = ", ".join(f"{device.name} has {format_bytes(device.free_bytes)} free" for device in devices)
    return f"--vram-budget {fit.asked.vram}: {error}; {states}, {advice}; or use --vram-budget {OFF}"


def _controller(
    calls: DeviceCalls,
    devices: list[DeviceInfo],
    info: GgufInfo,
    options: LoadOptions,
    budget: int,
    hold: Callable[[bool], None] | None,
) -> PlacementController:
    first = first_placement(options, budget, info, len(devices))
    fixed, why = None, ""
    if options.placement != "auto":
        fixed, why = first, "as asked"
    elif first == LAYERS:
        fixed, why = LAYERS, "all experts fit"

    def key_of(mode: str) -> str:
        kept = (mode, options.little_k, options.miss, options.ram_budget, options.threads)
        return placement_key(info, devices, budget, kept)

    return PlacementController(calls.set_placement, key_of, current=first, fixed=fixed, why=why, hold=hold)


def _no_key(_mode: str) -> str:
    return ""
