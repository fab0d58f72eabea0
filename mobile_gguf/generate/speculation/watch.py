"""What a decode took and read, as the tuner is told it."""

from __future__ import annotations

import time
from collections.abc import Callable

from mobile_gguf.engine.structs import Counters

from .costs import Step, StepCosts


class StepWatch:
    """Measures decodes for ``costs``: ``counters`` say what was read, ``wait`` ends once it is computed."""

    def __init__(
        self,
        costs: StepCosts,
        counters: Callable[[], Counters],
        wait: Callable[[], object],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._costs = costs
        self._counters = counters
        self._wait = wait
        self._clock = clock
        self._before = Counters()
        self._started = 0.0

    def before(self) -> None:
        """A decode begins."""
        self._before = self._counters()
        self._started = self._clock()

    def after(self, n_tokens: int) -> None:
        """It ran so many generated or drafted tokens, and none of a prompt."""
        self._wait()
        seconds = self._clock() - self._started
        after, before = self._counters(), self._before
        self._costs.observe(
            Step(
                n_tokens,
                seconds,
                min(seconds, (after.stall_us - before.stall_us) / 1e6),
                after.bytes_read - before.bytes_read,
                after.n_hits + after.n_misses - before.n_hits - before.n_misses,
            )
        )
