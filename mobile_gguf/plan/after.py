"""After a run: what was foreseen beside what came, and the run teaching later predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mobile_gguf.errors import MobileError
from mobile_gguf.generate.receipt import Receipt
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.device_budget import pool_all_bytes
from mobile_gguf.memory.machine import read_memory
from mobile_gguf.options import LoadOptions
from mobile_gguf.options.words import BIG_LITTLE

from .fit import Asked, DeviceMemory, Fit, stored_share
from .ggml import device_key
from .learning import MIN_TOKENS, correct, learn, lesson_name, read_lesson
from .machine import Measurements, read_measurements
from .planner import asked_of, predict_fit
from .settings import read_hotness
from .workload import read_workload


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
    shown = correct(prediction, read_lesson(measurements, name))
    if teach and n_tokens >= MIN_TOKENS:
        share = None
        if receipt.mode == BIG_LITTLE:
            # the first token comes from the prompt's pass
            big = max(0, receipt.tokens_big - 1) + receipt.tokens_fallback
            share = big / max(1, big + receipt.tokens_little)
        learn(measurements, name, prediction.predicted_tps, actual, share)
    return Comparison(shown.predicted_tps, shown.low, shown.high, actual)


def _fit_of_run(info: GgufInfo, asked: Asked, receipt: Receipt, device: dict[str, Any] | None) -> Fit:
    """The fit that was in force."""
    from mobile_gguf.memory.budget import estimate_demand

    devices: tuple[DeviceMemory, ...] = ()
    vram = int(getattr(receipt, "vram_budget_bytes", 0) or 0)
    if device and vram:
        devices = tuple(
            DeviceMemory(
                str(one.get("name")),
                int(one.get("free_bytes", 0)),
                int(one.get("total_bytes", 0)),
                key=device_key(str(one.get("name")), str(one.get("description"))),
            )
            for one in device.get("devices", ())
            if isinstance(one, dict)
        )
    budget = receipt.budget_bytes
    return Fit(
        n_ctx=asked.n_ctx,
        n_ubatch=asked.n_ubatch,
        demand=estimate_demand(info, n_ctx=asked.n_ctx, n_ubatch=asked.n_ubatch, flash_attn=asked.flash_attn),
        memory=read_memory(),
        ram_budget_bytes=budget,
        ram_share=stored_share(info, budget),
        devices=devices,
        vram_budget_bytes=vram,
        vram_share=min(1.0, vram / max(1, pool_all_bytes(info, max(1, len(devices))))),
    )
