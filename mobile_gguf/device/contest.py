"""Never slower: which placement of experts on a device is faster on the user's own tokens.

Pure decision over step times; ``controller.py`` drives it. Three arms: LAYERS, whole expert
layers on the device as the best ``--n-cpu-moe`` of llama.cpp puts them there, CACHE, slots for the
experts in use, and HOST, all experts on the CPU, which a slow device or link loses to. A contest runs them
in turn in blocks of steps, leaves out the first steps after each switch, and drops an arm whose median is
slower than the best by more than their noise. It ends with one arm left, or after a bounded number of rounds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from mobile_gguf.options.words import CACHE, HOST, LAYERS

# HOST is tried last: by then there is a figure that it can be hopeless against.
ARMS = (CACHE, LAYERS, HOST)


@dataclass(frozen=True)
class Rules:
    """How a contest is held. Counts are steps; ``margin`` is a share of a median."""

    block: int = 16
    # A cache is cold after a switch; the other arms have their experts at once.
    warmup_cache: int = 24
    warmup_others: int = 3
    rounds: int = 4
    # Medians must lie so many standard errors apart before the last round.
    certainty: float = 3.0
    # Within it the incumbent stays.
    margin: float = 0.03
    # An arm that is so much slower than the best is given up within its first block.
    hopeless: float = 1.5
    hopeless_after: int = 5
    # The winner is measured on: a contest is held again when it has become slower than the next best was.
    watch: int = 32
    rest: int = 512

    def warmup(self, arm: str) -> int:
        """Steps after a switch to ``arm`` that are not measured."""
        return self.warmup_cache if arm == CACHE else self.warmup_others


@dataclass(frozen=True)
class Figures:
    """What was measured: median seconds a step by arm, None where there is no measurement."""

    cache: float | None = None
    layers: float | None = None
    host: float | None = None

    def of(self, arm: str) -> float | None:
        return {CACHE: self.cache, LAYERS: self.layers, HOST: self.host}[arm]

    def next_best(self, winner: str) -> float | None:
        """The smallest of the other arms'."""
        others = [seconds for arm in ARMS if arm != winner and (seconds := self.of(arm)) is not None]
        return min(others, default=None)


class Contest:
    """One contest between the arms, for one mode; ``arm`` is the placement that the next step should have.

    ``first`` is the incumbent: it begins, and a tie leaves it in place. With ``known`` figures of an earlier
    run the contest counts as decided for ``first``.
    """

    def __init__(self, rules: Rules | None = None, first: str = CACHE, known: Figures | None = None) -> None:
        self.rules = rules or Rules()
        self.arm = first
        self.decided = known is not None
        self.figures = known or Figures()
        self._incumbent = first
        self._rest = self.rules.rest
        self._since = 0
        self._recent: deque[float] = deque(maxlen=self.rules.watch)
        self._begin()

    def record(self, seconds: float, arm: str) -> bool:
        """Take the time of a step that ran as ``arm``; returns whether the contest ended with it."""
        if self.decided:
            self._watch(seconds, arm)
            return False
        if arm != self.arm:
            return False  # the switch failed, or another mode's step came between
        if self._to_warm > 0:
            self._to_warm -= 1
            return False
        self._samples[arm].append(seconds)
        self._in_block += 1
        if self._is_hopeless():
            self._in_play.remove(arm)
            return self._next_block()
        if self._in_block < self.rules.block:
            return False
        return self._next_block()

    def _begin(self) -> None:
        # The last two blocks of each arm count: a cache goes on warming up for a while.
        self._samples: dict[str, deque[float]] = {arm: deque(maxlen=2 * self.rules.block) for arm in ARMS}
        self._to_warm = self.rules.warmup(self.arm)
        self._in_block = 0
        self._round = 0
        self._in_play = [self.arm, *(arm for arm in ARMS if arm != self.arm)]
        self._to_run = self._in_play[1:]

    def _next_block(self) -> bool:
        self._in_block = 0
        if self._to_run:
            self._switch(self._to_run.pop(0))
            return False
        self._round += 1
        self._in_play = [arm for arm in self._in_play if not self._is_beaten(arm)]
        if len(self._in_play) == 1 or self._round == self.rules.rounds:
            return self._decide()
        # The arm that ended a round begins the next one, which saves a switch.
        self._in_play.reverse()
        first, *self._to_run = self._in_play
        if first != self.arm:
            self._switch(first)
        return False

    def _is_hopeless(self) -> bool:
        mine = self._samples[self.arm]
        if self._round > 0 or len(mine) < self.rules.hopeless_after:
            return False
        full = [arm for arm in ARMS if arm != self.arm and len(self._samples[arm]) >= self.rules.block]
        if not full:
            return False
        best = self._samples[min(full, key=self._median)]
        return _quantile(list(mine), 0.25) > self.rules.hopeless * _quantile(list(best), 0.75)

    def _is_beaten(self, arm: str) -> bool:
        best = self._best()
        noise = math.hypot(_noise(self._samples[arm]), _noise(self._samples[best]))
        return self._median(arm) - self._median(best) > self.rules.certainty * noise

    def _best(self) -> str:
        return min((arm for arm in ARMS if self._samples[arm]), key=self._median)

    def _decide(self) -> bool:
        self.figures = Figures(**{arm: self._median(arm) for arm in ARMS if self._samples[arm]})
        winner = self._best()
        stays = self._incumbent in self._in_play
        if stays and self._median(self._incumbent) <= (1 + self.rules.margin) * self._median(winner):
            winner = self._incumbent
        self.arm = self._incumbent = winner
        self.decided = True
        self._since = 0
        self._recent.clear()
        return True

    def _watch(self, seconds: float, arm: str) -> None:
        if arm != self.arm:
            self._recent.clear()
            return
        self._since += 1
        self._recent.append(seconds)
        loser = self.figures.next_best(arm)
        if loser is None or self._since < self._rest or len(self._recent) < self.rules.watch:
            return
        # Twice the margin: what was decided within it is not called into question by the same noise.
        if _quantile(list(self._recent), 0.5) > loser * (1 + 2 * self.rules.margin):
            self._rest *= 2
            self.decided = False
            self._begin()
            self._to_warm = 0  # it has been running as this arm

    def _switch(self, arm: str) -> None:
        self.arm = arm
        self._to_warm = self.rules.warmup(self.arm)

    def _median(self, arm: str) -> float:
        return _quantile(list(self._samples[arm]), 0.5)


def _quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of ``values`` lie, interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _noise(values: Sequence[float]) -> float:
    """The standard error of the median, from the median absolute deviation; both are blind to outliers."""
    center = _quantile(values, 0.5)
    deviation = 1.4826 * _quantile([abs(value - center) for value in values], 0.5)
    return 1.2533 * deviation / math.sqrt(len(values))
