"""What a decode took and read, as the tuner is told it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass

from mobile_gguf.engine.structs import Counters

from .costs import Step
from .tuner import Tuner


@dataclass
class Iterations:
    """Decodes of several tokens, of one answer or more: ``n`` that took ``seconds``, as was ``predicted``.

    ``off`` sums by what share of what they took that was wrong.
    """

    n: int = 0
    n_tokens: int = 0
    predicted: float = 0.0
    seconds: float = 0.0
    off: float = 0.0

    def add(self, n_tokens: int, predicted: float, seconds: float) -> None:
        self.n += 1
        self.n_tokens += n_tokens
        self.predicted += predicted
        self.seconds += seconds
        self.off += abs(predicted - seconds) / max(seconds, 1e-9)

    @property
    def mean_ms(self) -> tuple[float, float] | None:
        """Milliseconds of one, as they were foreseen and as they were; None where there was none."""
        return (1e3 * self.predicted / self.n, 1e3 * self.seconds / self.n) if self.n else None


class StepWatch:
    """Measures decodes for ``tuner``: ``counters`` say what was read, ``wait`` ends once it is computed."""

    def __init__(
        self,
        tuner: Tuner,
        counters: Callable[[], Counters],
        wait: Callable[[], object],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.tuner = tuner
        self._counters = counters
        self._wait = wait
        self._clock = clock
        self._known: Counters | None = None  # the counters as they are, if nothing was run since
        self._n_before = 0  # tokens of the decode before, if nothing was run since
        self.iterations = Iterations()
        self.last: tuple[float, float] | None = (
            None  # seconds that the last one was to take, and those it took
        )

    def forget(self) -> None:
        """Something else is run, or counted anew."""
        self._known = self.last = None
        self._n_before = 0

    @contextlib.contextmanager
    def decode(self, n_tokens: int, n_answers: int = 1) -> Iterator[None]:
        """A decode of so many generated or drafted tokens, none of a prompt, that ends well."""
        before = self._known or self._counters()
        self._known, started = None, self._clock()
        n_before, self._n_before = self._n_before, 0
        yield
        self._wait()
        seconds = self._clock() - started
        after = self._known = self._counters()
        self._n_before = n_tokens
        step = Step(
            n_tokens,
            seconds,
            min(seconds, (after.stall_us - before.stall_us) / 1e6),
            after.bytes_read - before.bytes_read,
            after.n_hits + after.n_misses - before.n_hits - before.n_misses,
            n_before,
        )
        tuner = self.tuner
        costs = tuner.costs if n_answers == 1 else tuner.together
        self.last = None
        if n_tokens > 1 and tuner.is_timed and costs.is_known:
            self.last = costs.seconds_of(n_tokens) + step.is_anew * costs.anew_seconds, seconds
            self.iterations.add(n_tokens, *self.last)
        costs.observe(step)
        if n_tokens == 1:
            tuner.together.observe(step)


def watching(
    watch: StepWatch | None, slices: Sequence[Sized], *, is_plain: bool
) -> contextlib.AbstractContextManager[None]:
    """A decode of slices, which ``watch`` measures, if there is one and its tuner can use it.

    ``is_plain``: it has neither a prompt's tokens nor guesses.
    """
    if watch is None:
        return contextlib.nullcontext()
    if not (is_plain and watch.tuner.may_draft(len(slices))):
        watch.forget()
        return contextlib.nullcontext()
    return watch.decode(sum(map(len, slices)), len(slices))
