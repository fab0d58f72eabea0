"""The device tier's part of ``patches/src/mobile.h``: structs, numbers by name, and dataclasses of them.

``binding.ABI_VERSION`` guards the layouts.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from mobile_gguf.options.words import CACHE, HOST, LAYERS

MISS = {"auto": 0, "fetch": 1, "cpu": 2}
PLACEMENT = {HOST: 0, CACHE: 1, LAYERS: 2}


class DeviceParamsStruct(ctypes.Structure):
    """``struct mobile_device_params``."""

    _fields_ = [
        ("budget_bytes", ctypes.c_uint64),
        ("miss", ctypes.c_int32),
        ("placement", ctypes.c_int32),
        ("eviction", ctypes.c_int32),
        ("n_batch_max", ctypes.c_int32),
        ("n_uploads", ctypes.c_int32),
        ("poison", ctypes.c_int32),
        ("reserved", ctypes.c_int32 * 2),
    ]


class DeviceInfoStruct(ctypes.Structure):
    """``struct mobile_device_info``."""

    _fields_ = [
        ("name", ctypes.c_char * 64),
        ("description", ctypes.c_char * 128),
        ("free_bytes", ctypes.c_uint64),
        ("total_bytes", ctypes.c_uint64),
        ("pool_bytes", ctypes.c_uint64),
        ("expert_bytes", ctypes.c_uint64),
        ("n_layers", ctypes.c_int32),
        ("n_slots", ctypes.c_int32),
        ("is_gpu", ctypes.c_int32),
        ("is_async", ctypes.c_int32),
        ("upload_us", ctypes.c_double),
        ("stall_us", ctypes.c_double),
    ]


class DeviceCountersStruct(ctypes.Structure):
    """``struct mobile_device_counters``."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "n_hits",
            "n_misses",
            "n_fetched",
            "n_cpu",
            "n_admitted",
            "n_evictions",
            "n_wasted",
            "bytes_uploaded",
            "bytes_uploaded_background",
            "bytes_wasted",
            "upload_us",
            "cpu_us",
            "resident_bytes",
            "resident_bytes_peak",
            "n_ahead",
            "n_ahead_used",
            "n_ahead_wasted",
            "n_ahead_unused",
            "n_ahead_dropped",
            "bytes_uploaded_ahead",
            "bytes_ahead_wasted",
            "ahead_saved_us",
        )
    ]


@dataclass(frozen=True)
class DeviceInfo:
    """A device that holds layers with routed experts; bytes, free and total by its driver now.

    ``pool_bytes`` is what the slots take, ``expert_bytes`` what all experts of its ``n_layers`` would.
    ``upload_us`` is the measured time of an expert's upload that is waited for, ``stall_us`` how long one in
    the background holds up the computation; 0 before the slots are made.
    """

    name: str
    description: str
    free_bytes: int
    total_bytes: int
    pool_bytes: int
    expert_bytes: int
    n_layers: int
    n_slots: int
    is_gpu: int
    is_async: int
    upload_us: float = 0.0
    stall_us: float = 0.0


@dataclass(frozen=True)
class DeviceCounters:
    """What the device tier did since the last reset; ``resident_bytes`` is the present state.

    Bytes, microseconds and counts, as in mobile.h. ``n_ahead`` experts were uploaded because of a hint; of
    all such ``n_ahead_unused`` are in slots at present without a use yet.
    """

    n_hits: int = 0
    n_misses: int = 0
    n_fetched: int = 0
    n_cpu: int = 0
    n_admitted: int = 0
    n_evictions: int = 0
    n_wasted: int = 0
    bytes_uploaded: int = 0
    bytes_uploaded_background: int = 0
    bytes_wasted: int = 0
    upload_us: int = 0
    cpu_us: int = 0
    resident_bytes: int = 0
    resident_bytes_peak: int = 0
    n_ahead: int = 0
    n_ahead_used: int = 0
    n_ahead_wasted: int = 0
    n_ahead_unused: int = 0
    n_ahead_dropped: int = 0
    bytes_uploaded_ahead: int = 0
    bytes_ahead_wasted: int = 0
    ahead_saved_us: int = 0

    def __add__(self, later: DeviceCounters) -> DeviceCounters:
        """Both periods together; ``later`` has the present state."""
        sums = {name: getattr(self, name) + getattr(later, name) for name in self.__dataclass_fields__}
        sums["resident_bytes"] = later.resident_bytes
        sums["n_ahead_unused"] = later.n_ahead_unused
        sums["resident_bytes_peak"] = max(self.resident_bytes_peak, later.resident_bytes_peak)
        return DeviceCounters(**sums)
