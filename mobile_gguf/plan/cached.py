"""Fits and predictions from measurements made before: for lists of models, and beside a run."""

from __future__ import annotations

from collections.abc import Sequence

from mobile_gguf.errors import MobileError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.machine import Memory, read_memory
from mobile_gguf.options import LoadOptions
from mobile_gguf.sizes import OFF

from .fit import DeviceMemory, Fit, FitError, plan_fit
from .machine import read_measurements
from .planner import asked_of, predict_fit
from .prediction import Prediction
from .settings import read_hotness
from .workload import read_workload


def fit_of_run(
    info: GgufInfo, options: LoadOptions, devices: Sequence[DeviceMemory] = (), memory: Memory | None = None
) -> Fit:
    """Where a run with ``options`` would put a model now, on the host and on ``devices``.

    Devices that nobody asked for are left out where the model does not fit there, as a run does. Raises
    FitError if it would be refused.
    """
    memory = memory or read_memory()
    is_asked = bool(options.rpc) or (options.vram_budget != OFF and not options.vram_budget.is_auto)
    try:
        return plan_fit(info, asked_of(info, options, devices=bool(devices)), memory, devices)
    except FitError:
        if is_asked or not devices:
            raise
    return plan_fit(info, asked_of(info, options), memory)


def predict_cached(
    info: GgufInfo, options: LoadOptions | None = None, fit: Fit | None = None
) -> Prediction | None:
    """The speed of a model with ``options`` (default: LoadOptions()) by measurements made before.

    ``fit`` is where it goes (``fit_of_run``); None: where it would without devices. Never measures and never
    raises for the machine's or the file's sake: None without a valid measurement of this machine and of the
    devices in ``fit`` (``mobile-gguf plan MODEL`` makes them), and for a model that does not fit. Of matrices
    that no plan has measured it is a guess from those of the same type, and the band says so.
    Reads the header and two small files; takes milliseconds.
    """
    options = options or LoadOptions()
    measurements = read_measurements()
    if not measurements.entries:
        return None
    try:
        fit = fit or fit_of_run(info, options)
        workload = read_workload(info)
        prediction, _ = predict_fit(
            info, workload, measurements, options, fit, options.mode, hotness=read_hotness(info)
        )
    except (MobileError, OSError, ZeroDivisionError):
        return None
    return prediction
