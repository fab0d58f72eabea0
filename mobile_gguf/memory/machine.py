"""How much memory this process may still take: the machine's and its cgroups' word.

Page cache counts as free, because the kernel gives it back; everything else that a cgroup
is charged for does not. Paths are taken below an injectable root, so tests use fixture trees.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .cgroup import cgroup_directories, read_number, read_stat, read_text
from .windows import physical_memory

if TYPE_CHECKING:
    from .promise import Promise

# cgroup v1 writes "no limit" as the largest multiple of the page size below 2^63.
_NO_LIMIT = 1 << 60
_CGROUP = "cgroup "
PROMISE = "--memory "


@dataclass(frozen=True)
class MemoryLimit:
    """One cgroup's limit and what it is charged with that cannot be reclaimed, in bytes."""

    path: Path
    limit_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True)
class Memory:
    """Memory left for this process, in bytes, and who says so; ``promise``: what was set aside of it."""

    available_bytes: int
    total_bytes: int
    source: str  # "the machine", "cgroup PATH" or "--memory SIZE"
    promise: Promise | None = None

    @property
    def is_capped(self) -> bool:
        """Whether no more may be taken, whatever else the machine has: the kernel would end the process, or
        a promise be broken."""
        return self.source.startswith((_CGROUP, PROMISE))


def read_memory(root: Path = Path("/")) -> Memory:
    """The smallest of the machine's available memory and every enclosing cgroup's free memory."""
    total, available = machine_memory(root)
    source = "the machine"
    for limit in cgroup_limits(root):
        total = min(total, limit.limit_bytes)
        if limit.free_bytes < available:
            available, source = limit.free_bytes, f"{_CGROUP}{limit.path}"
    return Memory(available, total, source)


def cgroup_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """Every memory limit above this process, innermost first; v1 and v2, nested groups included."""
    limits = []
    for directory, version in cgroup_directories(root, "memory"):
        limit = _limit_v2(directory) if version == 2 else _limit_v1(directory)
        if limit is not None:
            limits.append(limit)
    return limits


def machine_memory(root: Path = Path("/")) -> tuple[int, int]:
    """(total, available) bytes of the whole machine, whatever limits this process."""
    fields = {}
    for line in read_text(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            fields[name] = int(words[0]) * 1024
    if "MemTotal" in fields:
        # Kernels before 3.14 have no MemAvailable.
        fallback = fields.get("MemFree", 0) + fields.get("Cached", 0)
        return fields["MemTotal"], fields.get("MemAvailable", fallback)
    return physical_memory() or _sysconf_memory()


def _sysconf_memory() -> tuple[int, int]:
    """Systems with neither /proc nor Windows: all physical memory, half of it taken to be available."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        total = 8 << 30
    return total, total // 2


def _limit_v1(directory: Path) -> MemoryLimit | None:
    limit = read_number(directory / "memory.limit_in_bytes")
    if limit is None or limit >= _NO_LIMIT:
        return None
    stat = read_stat(directory)
    usage = read_number(directory / "memory.usage_in_bytes") or 0
    reclaimable = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
    return MemoryLimit(directory, limit, max(0, usage - reclaimable))


def _limit_v2(directory: Path) -> MemoryLimit | None:
    # memory.high does not kill, but above it every allocation waits for reclaim.
    limits = [read_number(directory / name) for name in ("memory.max", "memory.high")]
    known = [limit for limit in limits if limit is not None and limit < _NO_LIMIT]
    if not known:
        return None
    stat = read_stat(directory)
    usage = read_number(directory / "memory.current") or 0
    reclaimable = sum(stat.get(name, 0) for name in ("inactive_file", "active_file", "slab_reclaimable"))
    return MemoryLimit(directory, min(known), max(0, usage - reclaimable))
