"""One line about the machine, so that a recorded result says where it comes from."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from mobile_gguf.memory.machine import read_memory
from mobile_gguf.sizes import format_bytes


def n_cpus() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_hardware(path: Path) -> str:
    """Processor, cores, memory, kernel, and the disk that holds ``path``."""
    parts = [
        f"{_cpu_name()}, {n_cpus()} cores",
        f"{format_bytes(read_memory().total_bytes)} RAM",
        f"{platform.system()} {platform.release()} {platform.machine()}",
        _disk_name(path),
    ]
    return "; ".join(part for part in parts if part)


def _cpu_name() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _disk_name(path: Path) -> str:
    """Device, model and file system of a path, as far as Linux tells."""
    best: tuple[int, str] = (-1, "")
    resolved = os.path.realpath(path)
    for line in _lines(Path("/proc/self/mountinfo")):
        left, separator, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if not separator or len(fields) < 5 or len(kind) < 2:
            continue
        point = fields[4]
        inside = point == "/" or resolved == point or resolved.startswith(point + "/")
        if inside and len(point) >= best[0]:
            best = (len(point), f"disk {kind[1]} ({kind[0]}{_disk_model(fields[2])})")
    return best[1]


def _disk_model(device: str) -> str:
    block = Path("/sys/dev/block") / device
    for place in (block, block / ".."):
        model = "".join(_lines(place / "device/model")).strip()
        if model:
            return f", {model}"
    return ""


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
