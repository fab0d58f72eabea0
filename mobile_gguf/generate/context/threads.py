"""A number of threads that follows the machine.

Beside others who want the processors, each of a token's hundreds of barriers waits for the thread that was
put off last: two threads on two processors with a busy loop beside them are half as fast as one. How much
others want shows in the time that the decoding thread could have run and did not. Where another thread is the
one that is put off, it shows in what others used while no processor was idle. Whether fewer threads are
better is then tried, and whether more are better again once processors are idle. A cache that fills makes
every window faster than the one before: what is not won by far is held against a window before it and one
behind it. The rule knows no machine, so that it can be tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mobile_gguf.memory.competition import Competition, Processors

# Tokens that are compared, and seconds that they take at least.
WINDOW = 8
WINDOW_S = 0.15
# Share of a token's time on a run queue above which fewer threads are tried.
CONTENDED = 0.15
# Processors that others used above which fewer threads are tried, if fewer were idle.
TAKEN = 0.3
# Idle processors (a mean) from which on one more thread is tried.
IDLE = 0.7
# What a trial has to win, as a share of the time of a token; from which on once is enough.
GAIN = 0.05
CLEAR_GAIN = 0.3
# Windows until a lost trial is made again; doubled by each loss.
FIRST_PAUSE = 4
LAST_PAUSE = 64


@dataclass
class _Window:
    n: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    idle: float = 0.0  # processor seconds
    others: float = 0.0

    @property
    def is_full(self) -> bool:
        return self.n >= WINDOW and self.seconds >= WINDOW_S

    @property
    def is_contended(self) -> bool:
        taken = TAKEN * self.seconds
        return self.waited > CONTENDED * self.seconds or (self.others > taken and self.idle < taken)

    @property
    def per_token(self) -> float:
        return self.seconds / self.n


@dataclass
class ThreadRule:
    """How many threads the next token gets, at most ``limit``; ``observe`` says what a token took.

    ``n_changes`` counts trials that were won. Nothing is tried while nobody competes.
    """

    limit: int
    threads: int = 0
    n_changes: int = 0
    _window: _Window = field(default_factory=_Window)
    _settled: int = 0  # the number that a trial is compared with
    _best: float | None = None  # seconds a token of the settled number while one is tried
    _tried: tuple[int, float] | None = None  # a number and its seconds, while the settled one runs once more
    _pause: int = FIRST_PAUSE
    _windows_left: int = 0  # until something may be tried again
    _skip: int = 0  # tokens that count for nothing: threads are made or end

    def __post_init__(self) -> None:
        self.threads = self._settled = self.limit

    def observe(self, seconds: float, waited_s: float, idle_s: float, others_s: float) -> int:
        """Take a token's seconds, those on a run queue, those of idle processors and those that others used.

        Returns ``threads``.
        """
        if self._skip:
            self._skip -= 1
            return self.threads
        window = self._window
        window.n += 1
        window.seconds += seconds
        window.waited += waited_s
        window.idle += idle_s
        window.others += others_s
        if window.is_full:
            self._window = _Window()
            if self._best is None:
                self._consider(window)
            else:
                self._judge(window)
        return self.threads

    def _consider(self, window: _Window) -> None:
        self._windows_left -= 1
        wanted = self._wanted(window)
        if wanted == self.threads or self._windows_left > 0:
            return
        self._best = window.per_token
        self._use(wanted)

    def _wanted(self, window: _Window) -> int:
        idle = int(window.idle / window.seconds + 1 - IDLE)
        if self.threads < self.limit and idle > 0:
            return min(self.limit, self.threads + idle)
        if self.threads > 1 and window.is_contended:
            return self.threads - 1 if self.threads <= 4 else self.threads * 3 // 4
        if self.threads < self.limit and self._windows_left <= -LAST_PAUSE:
            return self.threads + 1  # what is idle may be said wrongly: of another machine's processors
        return self.threads

    def _judge(self, window: _Window) -> None:
        best = self._best or 0.0
        if self._tried is not None:
            threads, seconds = self._tried
            best = (best + window.per_token) / 2
        else:
            threads, seconds = self.threads, window.per_token
            if best * (1 - CLEAR_GAIN) <= seconds < best * (1 - GAIN):
                self._tried = threads, seconds
                self._use(self._settled)
                return
        if seconds < best * (1 - GAIN):
            self._settled = threads
            self.n_changes += 1
            self._pause = FIRST_PAUSE
            self._windows_left = 0
        else:
            self._windows_left = self._pause
            self._pause = min(LAST_PAUSE, 2 * self._pause)
        self._best = self._tried = None
        if self.threads != self._settled:
            self._use(self._settled)

    def _use(self, threads: int) -> None:
        self.threads = threads
        self._skip = 1


class FollowingThreads:
    """A context's threads under the rule: ``set_threads(n)`` changes them, ``competition`` tells of others.

    Call ``before`` and ``after`` around each token, on the thread that decodes.
    """

    def __init__(self, limit: int, set_threads: Callable[[int], object], competition: Competition) -> None:
        self._rule = ThreadRule(limit)
        self._set_threads = set_threads
        self._competition = competition
        self._in_use = limit
        self._before: Processors | None = None

    @property
    def threads(self) -> int:
        """In use for the next token."""
        return self._in_use

    @property
    def n_changes(self) -> int:
        """How often another number was found better."""
        return self._rule.n_changes

    def before(self) -> None:
        """A token begins."""
        self._before = self._competition.read()

    def after(self, n_tokens: float = 1.0) -> None:
        """A token is there, or a pass that takes what ``n_tokens`` do; the next may get other threads."""
        after = self._competition.read()
        if self._before is None or after is None:
            return
        wanted = self._rule.observe(
            (after.at - self._before.at) / n_tokens,
            (after.waited_s - self._before.waited_s) / n_tokens,
            (after.idle_s - self._before.idle_s) / n_tokens,
            (after.others_s - self._before.others_s) / n_tokens,
        )
        if wanted != self._in_use:
            self._set_threads(wanted)
            self._in_use = wanted
