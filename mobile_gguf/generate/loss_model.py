"""What a lossy pass probably cost, foreseen from what it shows: what it moved, and how open its answer is.

KL of a token, nats: scale * spread^a * (moved + history * before)^b, where moved is the share of its weight
in a layer that the rules touched, before the mean of that over the tokens of the context before it, and
spread 1 - sum p^2 of its distribution: a change of the logits moves a certain answer little. Ours: the
quadratic term of KL in a change of logits, with powers that ``calibrate`` fits, since what matters is the
mean. An audit runs the same token exactly over the same memory, so it sees the token's own part alone, which
has a scale and powers of its own.
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
    """Powers and scales; ``of_rungs`` are factors of single rungs at the budget that there is, of the whole
    and of the token's own part, which a price list has.

    Deviations are relative: ``text_deviation`` of texts' means from what is foreseen, ``token_deviation`` of
    single tokens, ``audit_deviation`` of single audits. ``n_audits`` is how many audits the forecast of a
    text is worth, 0: nothing is known yet.
    """

    scale: float = 1.0
    spread_power: float = 1.0
    moved_power: float = 1.0
    history: float = 0.5
    step_scale: float = 1.0
    step_spread_power: float = 1.0
    step_moved_power: float = 1.0
    of_rungs: dict[str, tuple[float, float]] = field(default_factory=dict)
    text_deviation: float = 0.5
    token_deviation: float = 2.5
    audit_deviation: float = 1.5

    @property
    def n_audits(self) -> float:
        """How many audits say as much of a text as what was foreseen does."""
        return (self.audit_deviation / self.text_deviation) ** 2

    def whole(self, rung: str, spread: float, moved: float, before: float) -> float:
        """The KL of a token run under ``rung``, with what the memory lost before it."""
        lost = moved + self.history * before
        if lost <= 0 or spread <= 0:
            return 0.0
        factor = self.of_rungs.get(rung, (1.0, 1.0))[0]
        return factor * self.scale * spread**self.spread_power * lost**self.moved_power

    def own(self, rung: str, spread: float, moved: float) -> float:
        """The KL of its pass alone, over the memory that there is: what an audit measures."""
        if moved <= 0 or spread <= 0:
            return 0.0
        factor = self.of_rungs.get(rung, (1.0, 1.0))[1]
        return factor * self.step_scale * spread**self.step_spread_power * moved**self.step_moved_power

    def to_dict(self) -> dict[str, Any]:
        """What a price list keeps of it."""
        return {name: getattr(self, name) for name in _NUMBERS}


_NUMBERS = (
    "scale", "spread_power", "moved_power", "history", "step_scale", "step_spread_power", "step_moved_power",
    "text_deviation", "token_deviation", "audit_deviation",
)  # fmt: skip


def loss_model_of(facts: Any) -> LossModel:
    """What ``to_dict`` gave, from an untrusted file. Raises ModelFormatError without the file's name."""
    if not isinstance(facts, dict):
        raise ModelFormatError("there is no model of what rungs cost")
    numbers: dict[str, Any] = {name: number_of(facts.get(name), name) for name in _NUMBERS}
    if not numbers["text_deviation"] > 0 or not numbers["audit_deviation"] > 0:
        raise ModelFormatError("the deviations of what rungs cost are 0")
    return LossModel(**numbers)


def number_of(value: Any, name: str) -> float:
    """A number of at least 0. Raises ModelFormatError."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value < 0:
        raise ModelFormatError(f"{name:.60} is {value!r:.60}")
    return float(value)
