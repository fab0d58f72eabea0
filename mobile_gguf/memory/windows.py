"""The memory of a machine with Windows, which has neither /proc nor sysconf."""

from __future__ import annotations

import ctypes
from typing import Any


class MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of sysinfoapi.h."""

    _fields_ = [
        ("length", ctypes.c_uint32),
        ("load_percent", ctypes.c_uint32),
        ("total_physical", ctypes.c_uint64),
        ("available_physical", ctypes.c_uint64),
        ("total_page_file", ctypes.c_uint64),
        ("available_page_file", ctypes.c_uint64),
        ("total_virtual", ctypes.c_uint64),
        ("available_virtual", ctypes.c_uint64),
        ("available_extended_virtual", ctypes.c_uint64),
    ]


def physical_memory(kernel32: Any = None) -> tuple[int, int] | None:
    """(total, available) bytes; None where this is not Windows, or it does not say.

    What is available includes the standby list, which is Windows' page cache. It is no more than may still be
    committed, as memory of the store is when it is taken there.
    """
    kernel32 = kernel32 or getattr(getattr(ctypes, "windll", None), "kernel32", None)
    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    if kernel32 is None or not kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return status.total_physical, min(status.available_physical, status.available_page_file)
