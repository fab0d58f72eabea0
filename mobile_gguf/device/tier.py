"""Devices for a model: which to use, what must fit there, and the slot pools once it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from mobile_gguf.engine.binding import Engine, load_library, needs_engine
from mobile_gguf.engine.device_calls import DeviceCalls
from mobile_gguf.engine.devices import Device, list_devices
from mobile_gguf.engine.rpc import connect_servers
from mobile_gguf.engine.structs import DeviceCounters, DeviceInfo
from mobile_gguf.errors import BudgetError, EngineMemoryError, UsageError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.device_budget import (
    DeviceDemand,
    auto_budget,
    check_budget,
    check_fit,
    estimate_device_demand,
    pool_all_bytes,
    pool_min_bytes,
)
from mobile_gguf.memory.machine import read_memory
from mobile_gguf.options import LoadOptions, defaults
from mobile_gguf.options.words import CACHE, HOST, LAYERS
from mobile_gguf.sizes import OFF, Size, format_bytes, parse_size_or_off

from .controller import PlacementController
from .placement import placement_key

logger = logging.getLogger("mobile_gguf.device")

# An `auto` pool that the driver refuses is made this much smaller, so many times at most.
_SHRINK, _TRIES = 0.85, 8


@dataclass(frozen=True)
class DeviceRequest:
    """The devices that a model is to be loaded on, and the budget of their slots.

    ``budget_bytes`` is None for ``auto``, which is known only when the model is loaded. ``is_asked``: by a
    budget or servers, so that what cannot be done is an error and not a notice.
    """

    devices: tuple[Device, ...]
    size: Size
    budget_bytes: int | None
    demand: DeviceDemand
    is_asked: bool

    @property
    def shares_host_memory(self) -> bool:
        return any(device.shares_host_memory for device in self.devices)


def request_devices(
    info: GgufInfo, options: LoadOptions, n_ctx: int, engine: Engine | None
) -> tuple[DeviceRequest | None, list[str]]:
    """What ``options`` ask of devices, None for the host alone, and notices about what has no effect.

    Raises UsageError or BudgetError for what cannot be, EngineError without the engine or if an RPC server
    cannot be reached. Nothing is loaded yet.
    """
    size = parse_size_or_off(options.vram_budget)
    if isinstance(size, str):
        if options.rpc:
            raise UsageError("--rpc names devices, and --vram-budget off uses none: leave one of them out")
        return None, _without_effect(options, f"with --vram-budget {OFF}")
    is_asked = not size.is_auto or bool(options.rpc)
    if engine is None:
        if is_asked:
            raise needs_engine("--rpc" if options.rpc else "a --vram-budget")
        return None, _without_effect(options, "with a stock llama.cpp")
    devices = find_devices(options.rpc)
    if not devices:
        if is_asked:
            raise UsageError(
                f"--vram-budget {size}: this engine has no device here; build one for your GPU "
                "(`mobile-gguf engine build --backend cuda`), or name a server with --rpc HOST:PORT"
            )
        return None, _without_effect(options, "without a device")
    demand = estimate_device_demand(
        info, n_ctx=n_ctx, n_ubatch=options.n_ubatch, flash_attn=options.flash_attn
    )
    budget = check_budget(size, info, len(devices)) if info.is_moe else None
    least = (budget or pool_min_bytes(info, len(devices))) if info.is_moe else 0
    problem = check_fit(devices, demand, least)
    if problem and is_asked and info.is_moe:
        smaller = check_fit(devices, demand, pool_min_bytes(info, len(devices))) == "" and budget is not None
        remedy = "a smaller --vram-budget" if smaller else "a smaller --ctx-size or --ubatch-size"
        raise BudgetError(f"{problem}; try {remedy}, or --vram-budget {OFF}")
    if problem:
        return None, [f"the model stays on the host: {problem}"]
    if not info.is_moe and not size.is_auto:
        return DeviceRequest(tuple(devices), size, None, demand, is_asked), ["--vram-budget has no effect"]
    return DeviceRequest(tuple(devices), size, budget, demand, is_asked), []


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
        reason: str = "",
    ) -> None:
        self.calls = calls
        self.controller = controller
        self.budget_bytes = budget_bytes  # 0: no pools, experts on the host
        self.miss = miss
        self.reason = reason

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
    request: DeviceRequest,
    host_budget_bytes: int = 0,
    hold: Callable[[bool], None] | None = None,
) -> tuple[DeviceTier, list[str]]:
    """Make the slot pools of a model whose context is there, and say how experts are placed.

    ``host_budget_bytes`` is what the host tier will take of memory that a device may share; ``hold`` keeps
    other trials still while placements are compared. Raises
    BudgetError if the devices cannot hold what was asked for; the context then is as before.
    """
    devices = calls.devices()
    budget, notices = _make_pools(calls, devices, info, options, request, host_budget_bytes)
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
    request: DeviceRequest,
    host_budget_bytes: int,
) -> tuple[int, list[str]]:
    """Start the pools; returns their budget, 0 if there are none, and notices."""
    if not devices:
        return 0, ["no layer with experts is on a device: experts are computed on the host"]
    placement = _first_placement(options, request.budget_bytes, info, len(devices))
    if request.budget_bytes is not None:
        try:
            _start(calls, options, request.budget_bytes, placement)
        except EngineMemoryError as error:
            raise BudgetError(_refused(error, calls.devices(), info, request)) from None
        return request.budget_bytes, []
    shared = _host_bytes(request, host_budget_bytes)
    wanted = budget = auto_budget(devices, info, request.demand, shared)
    for _ in range(_TRIES):
        if budget < pool_min_bytes(info, len(devices)):
            break
        try:
            _start(calls, options, budget, _first_placement(options, budget, info, len(devices)))
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


def _start(calls: DeviceCalls, options: LoadOptions, budget: int, placement: str) -> None:
    calls.start(budget, miss=options.miss, placement=placement, eviction=options.eviction)


def _first_placement(options: LoadOptions, budget: int | None, info: GgufInfo, n_devices: int) -> str:
    if options.placement == "auto":
        return LAYERS if budget is not None and budget >= pool_all_bytes(info, n_devices) else CACHE
    return options.placement


def _refused(
    error: EngineMemoryError, devices: list[DeviceInfo], info: GgufInfo, request: DeviceRequest
) -> str:
    fits = auto_budget(devices, info, request.demand)
    advice = f"the largest that fits is about {fits} bytes ({format_bytes(fits)})" if fits else "none fits"
    states = ", ".join(f"{device.name} has {format_bytes(device.free_bytes)} free" for device in devices)
    return f"--vram-budget {request.size}: {error}; {states}, {advice}; or use --vram-budget {OFF}"


def _host_bytes(request: DeviceRequest, host_budget_bytes: int) -> dict[str, int]:
    """What is left of this machine's memory for devices that share it, by name."""
    left = max(0, read_memory().available_bytes - host_budget_bytes)
    # Half: the host's own needs grow as well, and a page too many ends a process.
    return {device.name: left // 2 for device in request.devices if device.shares_host_memory}


def _controller(
    calls: DeviceCalls,
    devices: list[DeviceInfo],
    info: GgufInfo,
    options: LoadOptions,
    budget: int,
    hold: Callable[[bool], None] | None,
) -> PlacementController:
    first = _first_placement(options, budget, info, len(devices))
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
