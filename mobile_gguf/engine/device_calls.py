"""The device tier's calls of ``patches/src/mobile.h`` on one context."""

from __future__ import annotations

import ctypes

from mobile_gguf.options.words import CACHE, DEFAULT_EVICTION

from .binding import Engine, choice
from .structs import (
    EVICTION,
    MISS,
    PLACEMENT,
    DeviceCounters,
    DeviceCountersStruct,
    DeviceInfo,
    DeviceInfoStruct,
    DeviceParamsStruct,
    struct_fields,
    with_slack,
)


class DeviceCalls:
    """``mobile_device_*`` bound to a context; ``ctx`` is the address that llama-cpp-python holds.

    Calls raise EngineMemoryError where a device refuses memory, BudgetError, EngineError otherwise.
    """

    def __init__(self, engine: Engine, ctx: int) -> None:
        self._engine = engine
        self._ctx = ctx

    def start(
        self,
        budget_bytes: int,
        *,
        miss: str = "auto",
        placement: str = CACHE,
        eviction: str = DEFAULT_EVICTION,
        n_uploads: int | None = None,
        poison: bool = False,
    ) -> None:
        """Make the slot pools, ``budget_bytes`` of expert slots over all devices.

        ``n_uploads`` bounds background uploads, 0: none. ``poison`` overwrites slots on eviction, for tests.
        When it fails the context is as it was, without pools.
        """
        params = with_slack(DeviceParamsStruct)
        ctypes.pointer(params)[0] = self._engine.default_device_params()
        params.budget_bytes = budget_bytes
        params.miss = choice("miss", MISS, miss)
        params.placement = choice("placement", PLACEMENT, placement)
        params.eviction = choice("eviction", EVICTION, eviction)
        params.poison = poison
        if n_uploads is not None:
            params.n_uploads = n_uploads
        self._engine.checked("device_start", "making the slot pools", self._ctx, ctypes.byref(params))

    def stop(self) -> None:
        """Free the pools; experts are on the host again."""
        self._engine.checked("device_stop", "freeing the slot pools", self._ctx)

    def set_placement(self, placement: str) -> None:
        """From the next decode on use the pools as HOST, CACHE or LAYERS says."""
        number = choice("placement", PLACEMENT, placement)
        self._engine.checked("device_set_placement", f"placing experts by {placement}", self._ctx, number)

    def devices(self) -> list[DeviceInfo]:
        """The devices that hold layers with routed experts; empty where all are on the host."""
        n = self._engine.checked("device_count", "counting devices", self._ctx)
        return [self._info(i) for i in range(n)]

    def _info(self, i: int) -> DeviceInfo:
        info = with_slack(DeviceInfoStruct)
        self._engine.checked("device_get_info", "asking a device", self._ctx, i, ctypes.byref(info))
        return DeviceInfo(**struct_fields(info))

    def counters(self) -> DeviceCounters:
        """What the tier did since the engine's counters were last reset."""
        counters = with_slack(DeviceCountersStruct)
        self._engine.checked(
            "device_get_counters", "reading device counters", self._ctx, ctypes.byref(counters)
        )
        return DeviceCounters(**struct_fields(counters))

    def residency(self, n_layer: int, n_expert: int) -> list[bytes]:
        """One byte per expert as Engine.residency has it, here for the devices."""
        state = (ctypes.c_uint8 * (n_layer * n_expert))()
        self._engine.checked("device_get_residency", "reading device residency", self._ctx, state, len(state))
        flat = bytes(state)
        return [flat[start : start + n_expert] for start in range(0, len(flat), n_expert)]
