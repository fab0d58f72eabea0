"""Holds the contests of ``contest.py`` on a running model: one per mode, remembered between runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from mobile_gguf.errors import EngineError
from mobile_gguf.options.words import CACHE, LAYERS

from .contest import ARMS, Contest, Figures, Rules
from .placement import remember, remembered

logger = logging.getLogger("mobile_gguf.device")


class PlacementController:
    """Says before each single-token step how experts are placed, and learns from its time.

    ``switch`` puts a placement in force; ``key_of`` names a mode's decision in the cache, empty: not kept.
    A ``fixed`` placement is not measured against the others. ``hold`` is told True before the first step of a
    contest and False after the last: nothing else may try things out meanwhile (uploads ahead do), since
    each would take the other's trial for its own result.
    """

    def __init__(
        self,
        switch: Callable[[str], None],
        key_of: Callable[[str], str],
        *,
        current: str = CACHE,
        fixed: str | None = None,
        why: str = "",
        rules: Rules | None = None,
        hold: Callable[[bool], None] | None = None,
    ) -> None:
        self._switch = switch
        self._key_of = key_of
        self._rules = rules
        self._fixed = fixed
        self._why = why
        self._hold = hold
        self._is_holding = False
        self._contests: dict[str, Contest] = {}
        self._from_cache: set[str] = set()
        self._mode = ""
        self.current = current

    def before_step(self, mode: str) -> None:
        """Put the placement in force that the next step of ``mode`` should have."""
        self._mode = mode
        wanted = self._fixed or self._contest(mode).arm
        self._set_hold(self._fixed is None and not self._contest(mode).decided)
        if wanted == self.current:
            return
        try:
            self._switch(wanted)
        except EngineError as error:
            # The placement in force goes on working.
            self._fixed, self._why = self.current, f"{wanted} is not possible: {error}"
            self._set_hold(False)
            logger.warning("placement %s is not possible, %s stays: %s", wanted, self.current, error)
        else:
            self.current = wanted

    def after_step(self, seconds: float) -> None:
        """Take the time of the step."""
        if self._fixed is not None:
            return
        contest = self._contest(self._mode)
        if contest.record(seconds, self.current):
            self._from_cache.discard(self._mode)
            self._announce(self._mode, contest)

    def facts(self) -> dict[str, Any]:
        """``stats()["device"]["placement"]``: of the last step's mode; tokens/s, None where not measured."""
        if self._fixed is not None:
            return _facts(self._fixed, Figures(), decided=True, reason=self._why or "as asked")
        contest = self._contests.get(self._mode)
        if contest is None:
            return _facts(self.current, Figures(), decided=False, reason="nothing was generated yet")
        measured = "measured in an earlier run" if self._mode in self._from_cache else "measured"
        reason = measured if contest.decided else "being measured"
        return _facts(contest.arm, contest.figures, decided=contest.decided, reason=reason)

    def _set_hold(self, on: bool) -> None:
        if self._hold is not None and on != self._is_holding:
            self._is_holding = on
            self._hold(on)

    def _contest(self, mode: str) -> Contest:
        contest = self._contests.get(mode)
        if contest is None:
            key = self._key_of(mode)
            known = remembered(key) if key else None
            if known is None:
                contest = Contest(self._rules, first=self.current if self.current == LAYERS else CACHE)
            else:
                contest = Contest(self._rules, first=known[0], known=known[1])
                self._from_cache.add(mode)
            self._contests[mode] = contest
        return contest

    def _announce(self, mode: str, contest: Contest) -> None:
        rates = {arm: _per_second(contest.figures.of(arm)) for arm in ARMS}
        told = [
            f"{arm} " + ("not measured" if rate is None else f"{rate:.1f}") for arm, rate in rates.items()
        ]
        logger.info("placement for mode %s: %s (%s tokens/s)", mode, contest.arm, ", ".join(told))
        key = self._key_of(mode)
        if key:
            remember(key, contest.arm, contest.figures)


def _facts(chosen: str, figures: Figures, *, decided: bool, reason: str) -> dict[str, Any]:
    rates = {f"{arm}_tps": _per_second(figures.of(arm)) for arm in ARMS}
    return {"chosen": chosen, **rates, "decided": decided, "reason": reason}


def _per_second(seconds: float | None) -> float | None:
    return 1 / seconds if seconds else None
