"""Measurements of this machine, kept between runs: who it is, what was measured when, and reading it back.

One JSON file per machine under the cache directory. A file of another machine, engine, driver or format is
not read, an entry older than ``MAX_AGE_DAYS`` neither; a damaged file counts as none.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import os
import platform
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobile_gguf.files.atomic import disk_errors
from mobile_gguf.files.paths import cache_dir

FORMAT = 1
MAX_AGE_DAYS = 60


@dataclass(frozen=True)
class Rate:
    """What was measured, with the lower and the upper quartile of its samples; units are the entry's."""

    value: float
    low: float
    high: float


@dataclass
class Measurements:
    """A machine's measurements: by name, a number with its spread and the day it was taken (ISO 8601)."""

    identity: dict[str, str]
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Twelve hex digits that name the machine."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]

    def get(self, name: str) -> Rate | None:
        """A measurement; None if there is none that is good."""
        entry = self.entries.get(name)
        if not isinstance(entry, dict) or not _is_fresh(entry.get("date")):
            return None
        numbers = [entry.get(part) for part in ("value", "low", "high")]
        good = all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers)
        if not good or not all(math.isfinite(n) and n >= 0 for n in numbers):  # type: ignore[arg-type]
            return None
        return Rate(*map(float, numbers))  # type: ignore[arg-type]

    def put(self, name: str, rate: Rate) -> None:
        """Keep a measurement, dated now."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.entries[name] = {"value": rate.value, "low": rate.low, "high": rate.high, "date": now}

    def date(self) -> str:
        """When the newest entry was measured; empty if there is none."""
        dates = [entry["date"] for entry in self.entries.values() if isinstance(entry.get("date"), str)]
        return max(dates, default="")


def identify_machine() -> dict[str, str]:
    """What a measurement is true of: processor, memory, kernel, drivers, engine library."""
    return {
        "processor": _processor(),
        "processors": str(_n_processors()),
        "memory_gib": str(round(_total_memory() / (1 << 30))),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "driver": _first_line(Path("/proc/driver/nvidia/version")),
        "engine": _engine(),
        "format": str(FORMAT),
    }


def measurements_path(identity: dict[str, str]) -> Path:
    """Where a machine's measurements are kept."""
    return cache_dir() / "plan" / f"machine-{Measurements(identity).key}.json"


def read_measurements() -> Measurements:
    """What is known about this machine; without entries if nothing is."""
    identity = identify_machine()
    empty = Measurements(identity)
    try:
        found = json.loads(measurements_path(identity).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return empty
    if not isinstance(found, dict) or found.get("identity") != identity:
        return empty
    entries = found.get("entries")
    if not isinstance(entries, dict):
        return empty
    return Measurements(identity, {name: entry for name, entry in entries.items() if isinstance(entry, dict)})


def write_measurements(measurements: Measurements) -> None:
    """Keep them; what another process has kept meanwhile stays. Raises MobileError if the disk refuses."""
    path = measurements_path(measurements.identity)
    merged = read_measurements().entries | measurements.entries
    write_json(path, {"identity": measurements.identity, "entries": merged})


def write_json(path: Path, value: Any) -> None:
    """Replace a small JSON file: readers see the old or the new one. Raises MobileError if the disk
    refuses."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _is_fresh(date: Any) -> bool:
    try:
        taken = datetime.datetime.fromisoformat(date)
        age = datetime.datetime.now(datetime.timezone.utc) - taken
    except (TypeError, ValueError):
        return False
    return age <= datetime.timedelta(days=MAX_AGE_DAYS)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _n_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _total_memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0


def _engine() -> str:
    """Sizes and times of the libraries that llama-cpp-python would load, without loading them."""
    import importlib.util

    folder = os.environ.get("LLAMA_CPP_LIB_PATH", "")
    if not folder:
        # find_spec of a top-level package imports nothing
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            return ""
        folder = str(Path(spec.origin).parent / "lib")
    found = []
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_file():
                status = entry.stat()
                found.append(f"{entry.name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16] if found else ""


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[0]
    except (OSError, IndexError):
        return ""
