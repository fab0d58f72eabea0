"""What runs taught about predictions: a bounded correction per machine, model and mode, and the share of big
tokens.

correction = actual / predicted tokens per second, averaged in its logarithm with a weight of ``_WEIGHT`` for
the newest run and never beyond ``_BOUND`` either way. Only answers of ``MIN_TOKENS`` or more teach.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError
from mobile_gguf.files.paths import cache_dir
from mobile_gguf.gguf.info import GgufInfo

from .machine import Measurements, write_json
from .prediction import Prediction

MIN_TOKENS = 16
_WEIGHT = 0.5
_BOUND = 2.0
_MAX_MODELS = 200
_NUMBERS = ("log_correction", "deviation", "n_runs")
_MIN_BAND = 1.1  # even a model seen often varies by so much


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
    return _lesson(_read(_path(measurements)).get(name))


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
    path = _path(measurements)
    known = _read(path)
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


def _path(measurements: Measurements) -> Path:
    return cache_dir() / "plan" / f"lessons-{measurements.key}.json"


def _read(path: Path) -> dict[str, Any]:
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
