"""What is kept of this machine between runs: who it is, what was measured, and what runs taught.

One JSON file of measurements per machine under the cache directory. A file of another machine, engine, driver
or format is not read, an entry older than ``MAX_AGE_DAYS`` neither; a damaged file counts as none.

Beside it the lessons: correction = actual / predicted tokens per second of a model in a mode, averaged in its
logarithm with a weight of ``_WEIGHT`` for the newest run and never beyond ``_BOUND`` either way, and the
share of big tokens. Only answers of ``MIN_TOKENS`` or more teach.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError
from mobile_gguf.files.atomic import disk_errors, replace_file
from mobile_gguf.files.paths import cache_dir
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.machine import machine_memory
from mobile_gguf.options.words import MODES

from .speed import Prediction

FORMAT = 1
MAX_AGE_DAYS = 60
MIN_TOKENS = 16
_WEIGHT = 0.5
_BOUND = 2.0
_MAX_MODELS = 200
_NUMBERS = ("log_correction", "deviation", "n_runs")
_MIN_BAND = 1.1  # even a model seen often varies by so much


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
        "memory_gib": str(round(machine_memory()[0] / (1 << 30))),
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
            replace_file(partial, path)
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


# lessons


@dataclass(frozen=True)
class Lesson:
    """What is known of one model in one mode: log of the correction, its mean deviation, how many runs
    taught, and the share of big tokens (None: not of big-little)."""

    log_correction: float = 0.0
    deviation: float = 0.0
    n_runs: int = 0
    big_share: float | None = None

    @property
    def correction(self) -> float:
        return math.exp(self.log_correction)


def lesson_name(info: GgufInfo, mode: str, device: str, ram_share: float) -> str:
    """What a lesson is filed under. Everything in memory and reading from the disk are different errors."""
    where = "resident" if ram_share >= 1 else "store"
    return f"{info.path.name}:{info.file_bytes}:{mode}:{where}{':' + device if device else ''}"


def read_lesson(measurements: Measurements, name: str) -> Lesson:
    """What is known; an empty lesson if nothing is."""
    return _lesson(_read_lessons(_lessons_path(measurements)).get(name))


def lesson_for(
    measurements: Measurements, info: GgufInfo, mode: str, device: str, ram_share: float
) -> tuple[Lesson, str]:
    """What runs of this mode have taught, else those of another, and the mode that it was.

    What one mode was wrong by is mostly the machine's and the file's: predictions of modes that are compared
    must all have it, or none.
    """
    of_mode: dict[str, Lesson] = {}
    for other in (mode, *(one for one in MODES if one != mode)):
        of_mode[other] = read_lesson(measurements, lesson_name(info, other, device, ram_share))
    if of_mode[mode].n_runs:
        return of_mode[mode], mode
    teacher = max(of_mode, key=lambda one: of_mode[one].n_runs)
    return replace(of_mode[teacher], big_share=of_mode[mode].big_share), teacher


def correct(prediction: Prediction, lesson: Lesson) -> Prediction:
    """The prediction as earlier runs correct it; its band narrows to how much the runs varied."""
    if lesson.n_runs == 0:
        return prediction
    tps = prediction.predicted_tps * lesson.correction
    known = min(1.0, lesson.n_runs / 3)
    band = max(_MIN_BAND, math.exp(2 * lesson.deviation))
    up = math.exp((1 - known) * math.log(prediction.high / prediction.predicted_tps) + known * math.log(band))
    down = math.exp(
        (1 - known) * math.log(prediction.predicted_tps / prediction.low) + known * math.log(band)
    )
    return Prediction(prediction.mode, tps, tps / down, tps * up)


def learn(
    measurements: Measurements,
    name: str,
    uncorrected_tps: float,
    actual_tps: float,
    big_share: float | None = None,
) -> None:
    """Let a run teach; a disk that refuses is no reason to stop."""
    if uncorrected_tps <= 0 or actual_tps <= 0:
        return
    path = _lessons_path(measurements)
    known = _read_lessons(path)
    lesson = improved(_lesson(known.get(name)), math.log(actual_tps / uncorrected_tps), big_share)
    known.pop(name, None)
    known[name] = vars(lesson)
    for oldest in list(known)[: max(0, len(known) - _MAX_MODELS)]:
        del known[oldest]
    try:
        write_json(path, known)
    except MobileError:
        return


def improved(lesson: Lesson, residual: float, big_share: float | None = None) -> Lesson:
    """The lesson after one more run whose log(actual / uncorrected prediction) was ``residual``."""
    bound = math.log(_BOUND)
    residual = min(max(residual, -bound), bound)
    weight = 1.0 if lesson.n_runs == 0 else _WEIGHT
    deviation = abs(residual - lesson.log_correction) if lesson.n_runs else 0.0
    share = big_share
    if share is not None and lesson.big_share is not None:
        share = lesson.big_share + _WEIGHT * (share - lesson.big_share)
    return Lesson(
        lesson.log_correction + weight * (residual - lesson.log_correction),
        lesson.deviation + weight * (deviation - lesson.deviation),
        lesson.n_runs + 1,
        lesson.big_share if share is None else share,
    )


def _lessons_path(measurements: Measurements) -> Path:
    return cache_dir() / "plan" / f"lessons-{measurements.key}.json"


def _read_lessons(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lesson(found: Any) -> Lesson:
    """A lesson from a file; an empty one for what is none."""
    if not isinstance(found, dict):
        return Lesson()
    correction, deviation, n_runs = (_number(found.get(name)) for name in _NUMBERS)
    if correction is None or deviation is None or n_runs is None:
        return Lesson()
    if abs(correction) > math.log(_BOUND) or deviation < 0 or n_runs < 0:
        return Lesson()
    share = _number(found.get("big_share"))
    return Lesson(correction, deviation, int(n_runs), None if share is None else min(1.0, max(0.0, share)))


def _number(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None
