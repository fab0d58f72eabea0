"""Predictions from measurements made before: for lists of models, and beside a run."""

from __future__ import annotations

from ..errors import MobileError
from ..gguf_info import GgufInfo
from ..memory import read_memory
from ..options import LoadOptions
from .fit import plan_fit
from .machine import read_measurements
from .planner import asked_of, predict_fit
from .prediction import Prediction
from .settings import read_hotness
from .workload import read_workload


def predict_cached(info: GgufInfo, options: LoadOptions | None = None) -> Prediction | None:
    """The speed of a model with ``options`` (default: LoadOptions()) by measurements made before.

    Never measures and never raises for the machine's or the file's sake: None without a valid measurement of
    this machine (``mobile-gguf plan MODEL`` makes one), and for a model that does not fit. Of matrices that
    no plan has measured it is a guess from those of the same type, and the band says so. Host tier only.
    Reads the header and two small files; takes milliseconds.
    """
    options = options or LoadOptions()
    measurements = read_measurements()
    if not measurements.entries:
        return None
    try:
        fit = plan_fit(info, asked_of(info, options), read_memory())
        workload = read_workload(info)
        prediction, _ = predict_fit(
            info, workload, measurements, options, fit, options.mode, hotness=read_hotness(info)
        )
    except (MobileError, OSError, ZeroDivisionError):
        return None
    return prediction
