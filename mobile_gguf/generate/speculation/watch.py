"""What a decode took and read, as the tuner is told it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence, Sized

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

    @contextlib.contextmanager
    def decode(self, n_tokens: int) -> Iterator[None]:
        """A decode of so many generated or drafted tokens, none of a prompt, that ends well."""
        before, started = self._counters(), self._clock()
        yield
        self._wait()
        seconds = self._clock() - started
        after = self._counters()
        self._costs.observe(
            Step(
                n_tokens,
                seconds,
                min(seconds, (after.stall_us - before.stall_us) / 1e6),
                after.bytes_read - before.bytes_read,
                after.n_hits + after.n_misses - before.n_hits - before.n_misses,
            )
        )


def watching(watch: StepWatch | None, slices: Sequence[Sized]) -> contextlib.AbstractContextManager[None]:
    """A decode of slices, which ``watch`` measures, if there is one."""
    return watch.decode(sum(map(len, slices))) if watch is not None else contextlib.nullcontext()
