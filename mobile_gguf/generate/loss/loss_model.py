"""What a lossy pass probably cost, foreseen from what it shows: what it moved, and how open its answer is.

A token whose rules touched the share ``moved`` of its weight in a layer has *lost* factor * moved^b, of which
its answer shows spread^a, where spread is 1 - sum p^2 of its distribution: a change of the logits moves a
certain answer little. That is its own part of its KL, nats, and what an audit measures, which runs the same
token exactly over the same memory. What the tokens of the context before it have lost, on average, is in the
memory (``before``), and shows in any token, also one that loses nothing: scale * spread^c * before^d, the
*history*. The two add up, but for what they take back of each other: where a token loses something itself,
history adds ``history_beside`` of what it does alone. Ours: the quadratic term of KL in a change of logits,
with powers that ``calibrate`` fits, since what matters is the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from mobile_gguf.errors import ModelFormatError

# An audit's ratio to what is believed counts at most so much: a single token must not decide an answer.
MOST = 8.0


@dataclass(frozen=True)
class LossModel:
    """Powers and scales; ``of_rungs`` are factors of single rungs' own part at the budget that there is,
    which a price list has.

    Deviations are relative: ``text_deviation`` of texts' means from what is foreseen, ``token_deviation`` of
    single tokens, ``audit_deviation`` of single audits, whose ratio to what was foreseen is ``audit_mean``
    where the forecast is right: a little below 1, for it is cut at ``MOST``. ``n_audits`` is how many audits
    the forecast of a text is worth, 0: nothing is known yet.
    """

    own_scale: float = 1.0
    own_spread_power: float = 1.0
    own_moved_power: float = 1.0
    history_scale: float = 0.5
    history_spread_power: float = 1.0
    history_power: float = 1.0
    history_beside: float = 1.0
    of_rungs: dict[str, float] = field(default_factory=dict)
    text_deviation: float = 0.5
    token_deviation: float = 2.5
    audit_mean: float = 1.0
    audit_deviation: float = 1.5

    @property
    def n_audits(self) -> float:
        """How many audits say as much of a text as what was foreseen does."""
        return (self.audit_deviation / self.text_deviation) ** 2

    def lost(self, rung: str, moved: float) -> float:
        """What a token run under ``rung`` has lost, whatever its answer shows of it."""
        if moved <= 0:
            return 0.0
        return self.of_rungs.get(rung, 1.0) * self.own_scale * moved**self.own_moved_power

    def whole(self, rung: str, spread: float, moved: float, before: float) -> float:
        """The KL of a token; ``before`` is the mean of what those before it have lost."""
        return self.own(rung, spread, moved) + self.history(spread, before, moved)

    def own(self, rung: str, spread: float, moved: float) -> float:
        """The KL of its pass alone, over the memory that there is: what an audit measures."""
        return self.lost(rung, moved) * spread**self.own_spread_power if spread > 0 else 0.0

    def history(self, spread: float, before: float, moved: float = 0.0) -> float:
        """What the memory costs a token: one that moved nothing, or was run exactly, all of it."""
        if before <= 0 or spread <= 0:
            return 0.0
        beside = self.history_beside if moved > 0 else 1.0
        return beside * self.history_scale * spread**self.history_spread_power * before**self.history_power

    def to_dict(self) -> dict[str, Any]:
        """What a price list keeps of it."""
        return {name: getattr(self, name) for name in _NUMBERS}


_NUMBERS = (
    "own_scale", "own_spread_power", "own_moved_power", "history_scale", "history_spread_power",
    "history_power", "history_beside", "text_deviation", "token_deviation", "audit_mean", "audit_deviation",
)  # fmt: skip
# What models had that foresaw history within the token's own part.
_OLD = "step_scale"


def loss_model_of(facts: Any) -> LossModel:
    """What ``to_dict`` gave, from an untrusted file. Raises ModelFormatError without the file's name."""
    if not isinstance(facts, dict):
        raise ModelFormatError("there is no model of what rungs cost")
    if _OLD in facts:
        raise ModelFormatError("an older version measured them, and foresaw what tokens cost otherwise")
    numbers: dict[str, Any] = {name: number_of(facts.get(name), name) for name in _NUMBERS}
    if not min(numbers[name] for name in ("text_deviation", "audit_mean", "audit_deviation")) > 0:
        raise ModelFormatError("the deviations of what rungs cost are 0")
    return LossModel(**numbers)


def number_of(value: Any, name: str) -> float:
    """A number of at least 0. Raises ModelFormatError."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value < 0:
        raise ModelFormatError(f"{name:.60} is {value!r:.60}")
    return float(value)
