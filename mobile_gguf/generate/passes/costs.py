"""What each answer cost, where several are decoded at once: the engine's counters, divided by who asked.

Pure arithmetic over what somebody reads. The parts of a count add up to it: they are whole numbers, cut off
where the running sum of the weights lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from mobile_gguf.engine.structs import (
    PREFETCH_STATES,
    Counters,
    DeviceCounters,
    LossCounters,
    PrefetchCounters,
)

Of = TypeVar("Of", Counters, DeviceCounters, PrefetchCounters, LossCounters)

# Fields that say how things are now, and are no counts.
_STATES = {"resident_bytes", "n_ahead_unused", "n_unused", "n_admit_left", *PREFETCH_STATES}
_PEAKS = {"resident_bytes_peak"}


@dataclass(frozen=True)
class Traffic:
    """All that the engine counts, at one time: of the host tier, devices, what was moved ahead, and loss."""

    host: Counters = field(default_factory=Counters)
    device: DeviceCounters = field(default_factory=DeviceCounters)
    ahead: PrefetchCounters = field(default_factory=PrefetchCounters)
    loss: LossCounters = field(default_factory=LossCounters)


@dataclass(eq=False)
class Costs:
    """An answer's share so far."""

    traffic: Traffic = field(default_factory=Traffic)


@dataclass(frozen=True)
class Share:
    """A part of a decode: its tokens ask for ``asked`` experts a layer, those that may lose for ``lossy``."""

    costs: Costs
    asked: int
    lossy: int = 0


class Meter:
    """Divides what ``read`` counts among those whose decode it was; ``reset`` has it count from 0.

    What moves between two decodes belongs to those of the first. What a part lost by itself may be known:
    ``lost`` is told.
    """

    def __init__(self, read: Callable[[], Traffic], reset: Callable[[], object]) -> None:
        self._read = read
        self._reset = reset
        self._last = Traffic()
        self._shares: list[Share] = []
        self._lost: list[LossCounters] = []  # what each of them lost, empty if that is not known
        self._only: Costs | None = None  # who asked for all that was counted since the restart
        self._is_divided = False  # there were others

    def restart(self) -> None:
        """Count anew, for nobody yet."""
        self._reset()
        for costs in [self._only, *(share.costs for share in self._shares)]:
            if costs is not None:
                costs.traffic = Traffic()
        self._last, self._shares, self._lost = self._read(), [], []
        self._only, self._is_divided = None, False

    def begin(self, shares: Sequence[Share]) -> None:
        """A decode begins that is theirs."""
        if not self._is_divided and len(shares) == 1 and self._only in (None, shares[0].costs):
            self._only = shares[0].costs
            return
        self.settle()
        self._is_divided, self._shares = True, list(shares)

    def lost(self, parts: Sequence[LossCounters]) -> None:
        """What each of those whose decode it was lost in it by itself; all else is divided."""
        if self._is_divided:
            self._lost = list(parts)

    def settle(self) -> None:
        """Give everyone a part of what was counted since the last time."""
        now, before = self._read(), self._last
        self._last = now
        if not self._is_divided:
            if self._only is not None:
                self._only.traffic = now
            return
        asked = _weights([share.asked for share in self._shares])
        lossy = _weights([share.lossy for share in self._shares])
        lost, self._lost = self._lost or [LossCounters()] * len(self._shares), []
        known = sum(lost, LossCounters())
        for i, share in enumerate(self._shares):
            had = share.costs.traffic
            share.costs.traffic = Traffic(
                _grown(had.host, before.host, now.host, asked, i),
                _grown(had.device, before.device, now.device, asked, i),
                _grown(had.ahead, before.ahead, now.ahead, asked, i),
                _grown(had.loss + lost[i], before.loss + known, now.loss, lossy, i),
            )


def _weights(weights: list[int]) -> list[int]:
    """Sums of weights up to each place, from 0 on; where nobody has one all have the same."""
    sums = [0]
    for weight in weights if any(weights) else [1] * len(weights):
        sums.append(sums[-1] + weight)
    return sums


def _grown(had: Of, before: Of, now: Of, sums: list[int], i: int) -> Of:
    values: dict[str, Any] = {}
    for one in fields(now):
        own, value = getattr(had, one.name), getattr(now, one.name)
        if one.name in _STATES:
            values[one.name] = value
        elif one.name in _PEAKS:
            values[one.name] = max(own, value)
        else:
            values[one.name] = own + _part(value - getattr(before, one.name), sums, i)
    return type(now)(**values)


def _part(amount: Any, sums: list[int], i: int) -> Any:
    if isinstance(amount, int):
        return amount * sums[i + 1] // sums[-1] - amount * sums[i] // sums[-1]
    # where parts are known the last digit of what is left may be below 0
    return max(0.0, amount) * (sums[i + 1] - sums[i]) / sums[-1]
