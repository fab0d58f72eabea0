"""What the engine counts of a context, all of it zero where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mobile_gguf.engine.binding import Engine
from mobile_gguf.engine.loss import loss_counters
from mobile_gguf.engine.prefetch import prefetch_counters
from mobile_gguf.engine.structs import (
    Counters,
    DeviceCounters,
    LossCounters,
    PrefetchCounters,
    WarmCounters,
)
from mobile_gguf.engine.warm import warm_counters

from ..passes.costs import Traffic

if TYPE_CHECKING:
    from mobile_gguf.device.tier import DeviceTier

    from .native import Native


class Counted:
    """The counters of ``native``'s context: of ``engine``, None without a store, and of ``device``."""

    native: Native
    engine: Engine | None
    device: DeviceTier | None

    def counters(self) -> Counters:
        """The store's counters since the last reset; all zero without one."""
        return self.engine.counters(self.native.ctx) if self.engine is not None else Counters()

    def device_counters(self) -> DeviceCounters:
        """The device tier's counters since the last reset; all zero without one."""
        return self.device.counters() if self.device is not None else DeviceCounters()

    def prefetch_counters(self) -> PrefetchCounters:
        """What was read ahead since the last reset; all zero without a store."""
        engine, ctx = self.engine, self.native.ctx
        return prefetch_counters(engine, ctx) if engine is not None else PrefetchCounters()

    def loss_counters(self) -> LossCounters:
        """What the lossy rules did since the last reset; all zero without a store."""
        return loss_counters(self.engine, self.native.ctx) if self.engine is not None else LossCounters()

    def warm_counters(self) -> WarmCounters:
        """What became of the warm set since the model was loaded; all zero without a store."""
        return warm_counters(self.engine, self.native.ctx) if self.engine is not None else WarmCounters()

    def traffic(self) -> Traffic:
        """All that is counted from the last reset on."""
        return Traffic(
            self.counters(), self.device_counters(), self.prefetch_counters(), self.loss_counters()
        )

    def count_anew(self) -> None:
        """Reset them, whoever they are divided among."""
        if self.engine is not None:
            self.engine.reset_counters(self.native.ctx)
