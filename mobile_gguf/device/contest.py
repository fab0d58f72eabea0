"""Never slower: which placement of experts on a device is faster on the user's own tokens.

Pure decision over step times; ``controller.py`` drives it. Two arms: LAYERS, whole expert
layers on the device as the best ``--n-cpu-moe`` of llama.cpp puts them there, and CACHE, slots for the
experts in use. A contest runs them in turn in blocks of steps, leaves out the first steps after each
switch, and ends when the medians differ by more than their noise, or after a bounded number of rounds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from .structs import CACHE, LAYERS

ARMS = (CACHE, LAYERS)


@dataclass(frozen=True)
class Rules:
    """How a contest is held. Counts are steps; ``margin`` is a share of a median."""

    block: int = 16
    # A cache is cold after a switch; layers have their experts at once.
    warmup_cache: int = 24
    warmup_layers: int = 3
    rounds: int = 4
    # Medians must lie so many standard errors apart before the last round.
    certainty: float = 3.0
    # Within it the incumbent stays.
    margin: float = 0.03
    # An arm that is so much slower than the other's median is given up within its block.
    hopeless: float = 1.5
    hopeless_after: int = 5
    # The winner is measured on: a contest is held again when it has become slower than the loser was.
    watch: int = 32
    rest: int = 512

    def warmup(self, arm: str) -> int:
        """Steps after a switch to ``arm`` that are not measured."""
        return self.warmup_cache if arm == CACHE else self.warmup_layers

    @property
    def steps_max(self) -> int:
        """The most steps that one contest takes."""
        return self.rounds * (2 * self.block + self.warmup_cache + self.warmup_layers)


@dataclass(frozen=True)
class Figures:
    """What was measured: median seconds a step by arm, None where there is no measurement."""

    cache: float | None = None
    layers: float | None = None

    def of(self, arm: str) -> float | None:
        return self.cache if arm == CACHE else self.layers


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
            return self._decide(_other(arm))
        if self._in_block < self.rules.block:
            return False
        return self._end_block()

    def _begin(self) -> None:
        # The last two blocks of each arm count: a cache goes on warming up for a while.
        self._samples: dict[str, deque[float]] = {arm: deque(maxlen=2 * self.rules.block) for arm in ARMS}
        self._to_warm = self.rules.warmup(self.arm)
        self._in_block = 0
        self._round = 0
        self._is_second = False

    def _end_block(self) -> bool:
        self._in_block = 0
        if not self._is_second:
            self._is_second = True
            self._switch()
            return False
        # The arm that ended a round begins the next one, which saves a switch.
        self._is_second = False
        self._round += 1
        slower, faster = sorted(ARMS, key=self._median, reverse=True)
        gap = self._median(slower) - self._median(faster)
        if gap > self.rules.certainty * math.hypot(*(_noise(self._samples[arm]) for arm in ARMS)):
            return self._decide(faster)
        if self._round < self.rules.rounds:
            return False
        close = gap <= self.rules.margin * self._median(faster)
        return self._decide(self._incumbent if close else faster)

    def _is_hopeless(self) -> bool:
        other = self._samples[_other(self.arm)]
        if self._in_block < self.rules.hopeless_after or len(other) < self.rules.block:
            return False
        latest = list(self._samples[self.arm])[-self._in_block :]
        return _quantile(latest, 0.25) > self.rules.hopeless * _quantile(list(other), 0.75)

    def _decide(self, winner: str) -> bool:
        self.figures = Figures(**{arm: self._median(arm) for arm in ARMS if self._samples[arm]})
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
        loser = self.figures.of(_other(arm))
        if loser is None or self._since < self._rest or len(self._recent) < self.rules.watch:
            return
        # Twice the margin: what was decided within it is not called into question by the same noise.
        if _quantile(list(self._recent), 0.5) > loser * (1 + 2 * self.rules.margin):
            self._rest *= 2
            self.decided = False
            self._begin()
            self._to_warm = 0  # it has been running as this arm

    def _switch(self) -> None:
        self.arm = _other(self.arm)
        self._to_warm = self.rules.warmup(self.arm)

    def _median(self, arm: str) -> float:
        return _quantile(list(self._samples[arm]), 0.5)


def _other(arm: str) -> str:
    return LAYERS if arm == CACHE else CACHE


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
