"""What was measured before, used: where models would go now and how fast, and a run beside its prediction.

Nothing here measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mobile_gguf.device.ask import ask_devices
from mobile_gguf.engine.devices import Device
from mobile_gguf.errors import EngineError, MobileError
from mobile_gguf.generate.answer.receipt import Receipt
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.budget import stored_share
from mobile_gguf.memory.fit import Asked, Fit, asked_of, fit_model, host_demand, pool_share
from mobile_gguf.memory.machine import Memory, read_memory
from mobile_gguf.memory.promise import promised
from mobile_gguf.options import LoadOptions
from mobile_gguf.options.words import BIG_LITTLE, EXACT
from mobile_gguf.sizes import OFF

from .disk import disk_name
from .machine import (
    MIN_TOKENS,
    Measurements,
    correct,
    learn,
    lesson_for,
    lesson_name,
    read_measurements,
)
from .planner import predict_fit, settings_of
from .prompt import PromptPrediction, predict_prompts
from .speed import Prediction
from .workload import read_hotness, read_workload


class Here:
    """This machine, looked at once for many models. ``servers`` are RPC servers; devices are asked for with
    the first model that may use one."""

    def __init__(self, servers: str = "", options: LoadOptions | None = None) -> None:
        self._servers = servers
        self._options = options or LoadOptions()  # of a run that asks for nothing else
        self.problem = ""  # why the devices are not known, once they have been asked for

    @cached_property
    def memory(self) -> Memory:
        return promised(self._options, read_memory())

    @cached_property
    def devices(self) -> Sequence[Device]:
        """None of them where they cannot be had; ``problem`` then says why."""
        try:
            return ask_devices(self._servers)
        except EngineError as error:
            self.problem = str(error)
            return []

    def fit(self, info: GgufInfo, options: LoadOptions | None = None) -> Fit:
        """Where a run with ``options`` would put the model; raises BudgetError if it would be refused."""
        options = options or self._options
        devices = () if options.vram_budget == OFF else self.devices
        return fit_model(info, asked_of(info, options), self.memory, devices)

    def prompts(self, info: GgufInfo, fit: Fit, options: LoadOptions | None = None) -> list[PromptPrediction]:
        """The same of a first prompt, by its length; empty without measurements. Never raises."""
        options, measurements = options or self._options, read_measurements()
        try:
            settings = settings_of(info, options, fit, EXACT)
            workload, disk = read_workload(info), disk_name(info.path)
            return list(predict_prompts(info, workload, measurements, settings, disk))
        except (MobileError, OSError, ZeroDivisionError):
            return []

    def speed(self, info: GgufInfo, fit: Fit, options: LoadOptions | None = None) -> Prediction | None:
        """The speed of that run by measurements made before, None without them; never raises."""
        return predict_cached(info, options or self._options, fit)


def predict_cached(
    info: GgufInfo, options: LoadOptions | None = None, fit: Fit | None = None
) -> Prediction | None:
    """The speed of a model with ``options`` (default: LoadOptions()) by measurements made before.

    ``fit`` is where it goes (``Here.fit``); None: where it would without devices. Never measures and never
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
        fit = fit or fit_model(info, asked_of(info, options), promised(options, read_memory()))
        prediction, _ = predict_fit(
            info, read_workload(info), measurements, options, fit, options.mode, hotness=read_hotness(info)
        )
    except (MobileError, OSError, ZeroDivisionError):
        return None
    return prediction


@dataclass(frozen=True)
class Comparison:
    """A run's speed beside its prediction, in tokens per second."""

    predicted_tps: float
    low: float
    high: float
    actual_tps: float

    def to_dict(self) -> dict[str, float]:
        """The ``plan`` object of ``run --json``."""
        return {name: round(value, 3) for name, value in vars(self).items()}

    def __str__(self) -> str:
        return f"predicted {self.predicted_tps:.1f} ({self.low:.1f} to {self.high:.1f}) tok/s"


def compare_run(
    info: GgufInfo,
    options: LoadOptions,
    receipt: Receipt,
    n_tokens: int,
    tokens_per_second: float,
    device: dict[str, Any] | None = None,
    *,
    teach: bool = True,
) -> Comparison | None:
    """Hold an answer of ``n_tokens`` against what the plan says of its budget, mode and length.

    ``device``: ``Model.stats()["device"]``, if there is a device tier. None without measurements that
    suffice, or for an answer too short to have a speed. With ``teach`` it corrects later predictions. Never
    raises.
    """
    if n_tokens < 2 or tokens_per_second <= 0:
        return None
    try:
        measurements = read_measurements()
        if not measurements.entries:
            return None
        return _compare(measurements, info, options, receipt, n_tokens, tokens_per_second, device, teach)
    except (MobileError, OSError, ValueError, ArithmeticError):
        return None


def _compare(
    measurements: Measurements,
    info: GgufInfo,
    options: LoadOptions,
    receipt: Receipt,
    n_tokens: int,
    actual: float,
    device: dict[str, Any] | None,
    teach: bool,
) -> Comparison | None:
    fit = _fit_of_run(info, asked_of(info, options), receipt, device)
    prediction, _ = predict_fit(
        info, read_workload(info), measurements, options, fit, receipt.mode,
        n_tokens=n_tokens, hotness=read_hotness(info), corrected=False,
    )  # fmt: skip
    if prediction is None:
        return None
    where = fit.devices[0].name if fit.devices else ""
    name = lesson_name(info, receipt.mode, where, fit.ram_share)
    shown = correct(prediction, lesson_for(measurements, info, receipt.mode, where, fit.ram_share)[0])
    # how often drafts are right is the text's, and no speed of the model on this machine
    has_drafts = receipt.speculation is not None and receipt.speculation.drafted > 0
    if teach and n_tokens >= MIN_TOKENS and not has_drafts:
        share = None
        if receipt.mode == BIG_LITTLE:
            # the first token comes from the prompt's pass
            big = max(0, receipt.tokens_big - 1) + receipt.tokens_fallback
            share = big / max(1, big + receipt.tokens_little)
        learn(measurements, name, prediction.predicted_tps, actual, share)
    return Comparison(shown.predicted_tps, shown.low, shown.high, actual)


def _fit_of_run(info: GgufInfo, asked: Asked, receipt: Receipt, device: dict[str, Any] | None) -> Fit:
    """The fit that was in force."""
    devices: tuple[Device, ...] = ()
    vram = int(getattr(receipt, "vram_budget_bytes", 0) or 0)
    if device and vram:
        devices = tuple(
            Device(
                0,
                str(one.get("name")),
                str(one.get("description")),
                int(one.get("free_bytes", 0)),
                int(one.get("total_bytes", 0)),
            )
            for one in device.get("devices", ())
            if isinstance(one, dict)
        )
    demand = host_demand(info, asked)
    return Fit(
        asked, demand, demand, read_memory(),
        ram_budget_bytes=receipt.budget_bytes, ram_share=stored_share(info, receipt.budget_bytes),
        devices=devices, vram_budget_bytes=vram, vram_share=pool_share(info, vram, len(devices)),
    )  # fmt: skip
