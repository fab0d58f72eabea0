"""How many answers are made at once: more while all of them together come faster.

What their drafts give counts, so that more answers and longer drafts are held against each other. Where it
is foreseen that more would not be faster, or have no room, they are tried as rarely as what did not win. The
rule knows no machine, so that it can be tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# What is compared: decodes of as many answers as may be made at once, and seconds that they take at least.
WINDOW = 12
WINDOW_S = 0.3
# What twice as many have to win, as a share of the tokens per second of all together.
GAIN = 0.05
# Windows until what did not win is tried again; doubled by each loss.
FIRST_PAUSE = 16
LAST_PAUSE = 256
FIRST = 2


@dataclass
class Growth:
    """``now`` answers may be made at once, at most ``most``; ``observe`` says what a decode took.

    ``foresee`` says how many tokens per second so many answers would have together, None: it is not known.
    """

    most: int
    now: int = 0
    foresee: Callable[[int], float | None] = lambda _n: None
    _steps: int = 0
    _tokens: int = 0
    _seconds: float = 0.0
    _before: tuple[int, float] | None = (
        None  # how many there were, and tokens per second, while more are tried
    )
    _pause: int = FIRST_PAUSE
    _windows_left: int = 0  # until more are tried again

    def __post_init__(self) -> None:
        self.now = min(FIRST, self.most)

    def observe(self, n_answers: int, n_tokens: int, seconds: float) -> int:
        """Take a decode of so many answers' tokens, with none of a prompt among them; returns ``now``."""
        if n_answers < self.now:
            return self.now  # there were no more to make
        if n_answers > self.now:
            self._forget()  # the last of those that were tried are being finished
            return self.now
        self._steps += 1
        self._tokens += n_tokens
        self._seconds += seconds
        if self._steps >= WINDOW and self._seconds >= WINDOW_S:
            self._judge(self._tokens / self._seconds)
            self._forget()
        return self.now

    def _judge(self, speed: float) -> None:
        if self._before is not None:
            (fewer, slower), self._before = self._before, None
            if speed < slower * (1 + GAIN):
                self.now = fewer
                self._windows_left, self._pause = self._pause, min(LAST_PAUSE, 2 * self._pause)
                return
            self._pause = FIRST_PAUSE
        self._windows_left -= 1
        if self.now < self.most and self._windows_left <= 0:
            more = min(self.most, 2 * self.now)
            if self._is_lost(more):
                self._windows_left, self._pause = self._pause, min(LAST_PAUSE, 2 * self._pause)
                if self._pause < LAST_PAUSE:
                    return
            self._before = self.now, speed
            self.now = more

    def _is_lost(self, more: int) -> bool:
        """Whether it is foreseen that so many would not be worth it."""
        now, then = self.foresee(self.now), self.foresee(more)
        return now is not None and then is not None and then < now * (1 + GAIN)

    def _forget(self) -> None:
        self._steps, self._tokens, self._seconds = 0, 0, 0.0
